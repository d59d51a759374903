//! From a command line and an environment to a [`Config`].
//!
//! The syntax is that of Go's `flag` package: `--flag=v`, `--flag v`, `-flag v`, and
//! `--flag` alone for a boolean. Then, unless there is a configuration file, the
//! `ETCD_*` variables; a flag and its variable together are a mistake.
//!
//! ```text
//! scan ──▶ settings (name, value) ──▶ apply: old names first, so that a new one wins ──▶ finish ──▶ validate
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::deprecated::{DEPRECATED, Deprecated, IGNORED, Meaning};
use super::flag::{self, Config, DEFAULT_NAME, Flag};
use super::report::{ConfigErrors, Notice, Origin, Problem};
use super::value::{Invalid, parse_bool};
use super::{help, yaml};
use crate::version;

/// What a command line asks for.
#[derive(Debug)]
pub enum Outcome {
    /// Start a server; log the notices first.
    Run {
        /// The checked configuration.
        config: Box<Config>,
        /// What the log should say about where it came from. What there is to say about
        /// the values, [`Config::validate`] says, and a server that starts logs that.
        notices: Vec<Notice>,
    },
    /// Print this to standard output and exit with 0.
    Print(String),
    /// Print this to standard error and exit with this code: 2 for a command line that
    /// cannot be read, 1 for a configuration that cannot be used.
    Fail {
        /// Every mistake, and how to put it right.
        message: String,
        /// The process's exit code.
        exit_code: u8,
    },
}

/// Reads a command line (without the program's name) and an environment, and the
/// configuration file they name. Looks also whether the data directory holds a member,
/// because what makes a new one is checked only when it does not.
pub fn parse<A, E>(args: A, env: E) -> Outcome
where
    A: IntoIterator,
    A::Item: Into<OsString>,
    E: IntoIterator<Item = (OsString, OsString)>,
{
    parse_with(
        args.into_iter().map(Into::into),
        env,
        |path| std::fs::read_to_string(path),
        Path::exists,
    )
}

/// [`parse`] with its two looks at the file system passed in.
pub(super) fn parse_with(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    read_file: impl FnOnce(&Path) -> std::io::Result<String>,
    exists: impl FnOnce(&Path) -> bool,
) -> Outcome {
    let mut texts = Vec::new();
    for arg in args {
        match arg.into_string() {
            Ok(text) => texts.push(text),
            Err(arg) => return usage_error(&[format!("argument {arg:?} is not UTF-8")]),
        }
    }
    if let Some(command @ ("gateway" | "grpc-proxy")) = texts.first().map(String::as_str) {
        return Outcome::Fail {
            message: format!(
                "the command {command:?} is not available: this program is a server only. \
                 Use etcd's own {command}, which works in front of this server too.\n"
            ),
            exit_code: 1,
        };
    }
    let mut builder = Builder::new();
    let line = match scan(&texts, &mut builder.config) {
        Ok(line) => line,
        Err(ScanEnd::Help) => {
            return Outcome::Print(format!("{}\n{}", help::usage(), help::flags()));
        }
        Err(ScanEnd::Errors(errors)) => return usage_error(&errors),
    };
    if let Some(errors) = builder.apply_command_line(&line.settings) {
        return usage_error(&errors);
    }
    if let Some(stray) = line.stray {
        return Outcome::Fail {
            message: format!("{stray:?} is not a valid flag. See 'kvorum --help'.\n"),
            exit_code: 1,
        };
    }
    if line.version {
        return Outcome::Print(version::text());
    }
    let env = Environment::of(env);
    let variable =
        || env.variables.get(&flag::env_name("config-file")).filter(|path| !path.is_empty());
    match line.config_file.as_ref().or_else(variable) {
        Some(path) => {
            let notices = beside_file(&line.settings, &env);
            builder = Builder::new();
            builder.notices = notices;
            builder.apply_file(PathBuf::from(path), read_file);
        }
        None => {
            builder.problems.extend(env.problems.iter().cloned());
            builder.apply_environment(&line.settings, &env);
        }
    }
    builder.finish(exists)
}

fn usage_error(errors: &[String]) -> Outcome {
    Outcome::Fail { message: format!("{}\n{}", errors.join("\n"), help::usage()), exit_code: 2 }
}

/// What a name on the command line or in the environment stands for.
#[derive(Clone, Copy)]
enum Known {
    Flag(&'static Flag),
    Old(&'static Deprecated),
    Ignored,
}

impl Known {
    fn named(name: &str) -> Option<Known> {
        Flag::named(name)
            .map(Known::Flag)
            .or_else(|| DEPRECATED.iter().find(|old| old.name == name).map(Known::Old))
            .or_else(|| IGNORED.contains(&name).then_some(Known::Ignored))
    }

    /// Whether the name alone is a complete setting.
    fn is_bool(self, config: &mut Config) -> bool {
        match self {
            Known::Flag(flag) => match flag.field {
                Some(field) => field(config).is_bool(),
                None => flag.name == "version",
            },
            Known::Old(old) => old.is_bool,
            Known::Ignored => true,
        }
    }
}

/// One `--name=value`.
struct Setting {
    name: String,
    known: Known,
    value: String,
}

/// A command line, taken apart.
struct CommandLine {
    settings: Vec<Setting>,
    version: bool,
    config_file: Option<String>,
    /// The first argument that is no flag; nothing after it was looked at.
    stray: Option<String>,
}

enum ScanEnd {
    Help,
    Errors(Vec<String>),
}

/// Takes a command line apart. Goes on after a mistake, to name them all.
fn scan(args: &[String], config: &mut Config) -> Result<CommandLine, ScanEnd> {
    let mut line =
        CommandLine { settings: Vec::new(), version: false, config_file: None, stray: None };
    let mut errors = Vec::new();
    let mut rest = args.iter().peekable();
    while let Some(arg) = rest.next() {
        let Some(name) = arg.strip_prefix('-').filter(|name| !name.is_empty()) else {
            line.stray = Some(arg.clone());
            break;
        };
        let name = name.strip_prefix('-').unwrap_or(name);
        if name.is_empty() {
            line.stray = rest.next().cloned();
            break;
        }
        if name.starts_with(['-', '=']) {
            errors.push(format!("bad flag syntax: {arg}"));
            continue;
        }
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        let Some(known) = Known::named(name) else {
            if matches!(name, "help" | "h") {
                return Err(if errors.is_empty() {
                    ScanEnd::Help
                } else {
                    ScanEnd::Errors(errors)
                });
            }
            errors.push(format!("flag provided but not defined: -{name}"));
            if value.is_none() {
                // Whatever follows is most likely its value, not another mistake.
                rest.next_if(|next| !next.starts_with('-'));
            }
            continue;
        };
        let is_bool = known.is_bool(config);
        let value = match value {
            Some(value) => value,
            None if is_bool => "true".to_owned(),
            None => match rest.next() {
                Some(value) => value.clone(),
                None => {
                    errors.push(format!("flag needs an argument: -{name}"));
                    break;
                }
            },
        };
        match (known, name) {
            (Known::Flag(_), "version") => match parse_bool(&value) {
                Some(on) => line.version = on,
                None => errors
                    .push(format!("invalid boolean value {value:?} for -version: parse error")),
            },
            (Known::Flag(_), "config-file") => {
                line.config_file = Some(value).filter(|path| !path.is_empty())
            }
            _ => line.settings.push(Setting { name: name.to_owned(), known, value }),
        }
    }
    if errors.is_empty() { Ok(line) } else { Err(ScanEnd::Errors(errors)) }
}

/// The variables that concern the server.
struct Environment {
    variables: BTreeMap<String, String>,
    problems: Vec<Problem>,
}

impl Environment {
    fn of(env: impl IntoIterator<Item = (OsString, OsString)>) -> Environment {
        let mut found = Environment { variables: BTreeMap::new(), problems: Vec::new() };
        for (name, value) in env {
            let Ok(name) = name.into_string() else { continue };
            if !name.starts_with("ETCD_") {
                continue;
            }
            match value.into_string() {
                Ok(value) => {
                    found.variables.insert(name, value);
                }
                Err(value) => found.problems.push(Problem {
                    flag: String::new(),
                    value: String::new(),
                    message: format!(
                        "the value {value:?} of environment variable {name} is not UTF-8"
                    ),
                    fix: format!("unset {name}, or write its value in UTF-8"),
                    origin: Origin::Environment(name),
                }),
            }
        }
        found
    }
}

/// What a configuration file keeps from being used.
fn beside_file(settings: &[Setting], env: &Environment) -> Vec<Notice> {
    let flags: BTreeSet<String> =
        settings.iter().map(|setting| format!("--{}", setting.name)).collect();
    let variables = env.variables.iter().filter(|(name, value)| {
        !value.is_empty()
            && **name != flag::env_name("config-file")
            && names().any(|flag| flag::env_name(flag) == **name)
    });
    let what = flags.into_iter().chain(variables.map(|(name, _)| name.clone()));
    what.map(|what| Notice::IgnoredBesideFile { what }).collect()
}

/// Every name that is understood, each once.
fn names() -> impl Iterator<Item = &'static str> {
    let flags = flag::all().map(|flag| flag.name);
    flags.chain(DEPRECATED.iter().map(|old| old.name)).chain(IGNORED.iter().copied())
}

/// The values of these never appear in a log or a message.
fn shown(flag: &str, value: &str) -> String {
    if matches!(flag, "discovery-password" | "discovery-user") && !value.is_empty() {
        "(hidden)".to_owned()
    } else {
        value.to_owned()
    }
}

/// A configuration on its way, with where its values came from and what there is to say.
pub(super) struct Builder {
    pub(super) config: Config,
    pub(super) origins: BTreeMap<&'static str, Origin>,
    pub(super) problems: Vec<Problem>,
    pub(super) notices: Vec<Notice>,
}

impl Builder {
    fn new() -> Builder {
        Builder {
            config: Config::default(),
            origins: BTreeMap::new(),
            problems: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// Takes over the command line; the texts of values that are not of their flag's
    /// type, which Go calls an unreadable command line.
    fn apply_command_line(&mut self, settings: &[Setting]) -> Option<Vec<String>> {
        let mut errors = Vec::new();
        let (old, new): (Vec<_>, Vec<_>) =
            settings.iter().partition(|setting| matches!(setting.known, Known::Old(_)));
        for Setting { name, known, value } in old.into_iter().chain(new) {
            let is_bool = known.is_bool(&mut self.config);
            if let Err(invalid) =
                self.apply(*known, value, Origin::CommandLine, |value, text| value.set(text))
            {
                match invalid.error {
                    Invalid::Syntax(message) if is_bool => {
                        errors.push(format!(
                            "invalid boolean value {value:?} for -{name}: {message}"
                        ));
                    }
                    Invalid::Syntax(message) => errors.push(format!(
                        "invalid value {:?} for flag -{name}: {message} (expected {})",
                        shown(name, value),
                        invalid.expected
                    )),
                    Invalid::Rule(message) => {
                        self.problem(name, value, Origin::CommandLine, message, &invalid.expected)
                    }
                }
            }
        }
        (!errors.is_empty()).then_some(errors)
    }

    fn apply_environment(&mut self, settings: &[Setting], env: &Environment) {
        let on_line: BTreeSet<&str> =
            settings.iter().map(|setting| setting.name.as_str()).collect();
        let mut used: BTreeSet<String> = BTreeSet::new();
        // Old names first, so that a new one wins; then by name.
        let mut names: Vec<&'static str> = names().collect();
        names.sort_by_key(|name| (!DEPRECATED.iter().any(|old| old.name == *name), *name));
        for name in names {
            let variable = flag::env_name(name);
            let Some(value) = env.variables.get(&variable) else { continue };
            let origin = Origin::Environment(variable.clone());
            if on_line.contains(name) {
                used.insert(variable.clone());
                self.problems.push(Problem {
                    flag: name.to_owned(),
                    value: shown(name, value),
                    // etcd's text to the letter, its two closing parentheses included.
                    message: "conflicting environment variable is shadowed by corresponding command-line flag \
                              (either unset environment variable or disable flag))"
                        .to_owned(),
                    fix: format!("unset {variable}, or remove --{name} from the command line"),
                    origin,
                });
                continue;
            }
            if value.is_empty() {
                continue;
            }
            used.insert(variable.clone());
            if name == "version" {
                self.notices.push(Notice::EnvironmentSpecial { value: value.clone() });
                continue;
            }
            let Some(known) = Known::named(name) else { continue };
            match self.apply(known, value, origin.clone(), |field, text| field.set(text)) {
                Ok(()) => {
                    let value = shown(name, value);
                    self.notices.push(Notice::EnvironmentUsed { name: variable, value });
                }
                Err(invalid) => {
                    let message = format!(
                        "invalid value {:?} for {variable}: {}",
                        shown(name, value),
                        invalid.error.message()
                    );
                    self.problem(name, value, origin, message, &invalid.expected);
                }
            }
        }
        for (variable, value) in &env.variables {
            if !used.contains(variable) && *variable != flag::env_name("config-file") {
                self.notices
                    .push(Notice::EnvironmentUnknown { variable: format!("{variable}={value}") });
            }
        }
        // etcd requires the published URLs to be given with those listened on, because the
        // defaults would send clients to the wrong place.
        if self.origins.contains_key("listen-client-urls")
            && !self.origins.contains_key("advertise-client-urls")
        {
            self.config.advertise_client_urls = Vec::new();
            let origin = self.origins.get("listen-client-urls").cloned().unwrap_or(Origin::Default);
            self.origins.insert("advertise-client-urls", origin);
        }
    }

    fn apply_file(
        &mut self,
        path: PathBuf,
        read_file: impl FnOnce(&Path) -> std::io::Result<String>,
    ) {
        let problem = |message: String, fix: &str| Problem {
            flag: "config-file".to_owned(),
            value: path.display().to_string(),
            origin: Origin::File { path: path.clone(), key: "(the whole file)".to_owned() },
            message,
            fix: fix.to_owned(),
        };
        let leaves = match read_file(&path) {
            Ok(text) => yaml::leaves(&text)
                .map_err(|message| problem(message, "write YAML: one `flag-name: value` per line")),
            Err(error) => Err(problem(
                format!("cannot read the configuration file {}: {error}", path.display()),
                "give --config-file (or ETCD_CONFIG_FILE) the path of a file that this process may read",
            )),
        };
        let mut leaves = match leaves {
            Ok(leaves) => leaves,
            Err(problem) => return self.problems.push(problem),
        };
        self.notices.push(Notice::FileLoaded { path: path.clone() });
        let known = |key: &str| {
            let flag = flag::all().find(|flag| flag.yaml_path() == Some(key)).map(Known::Flag);
            flag.or_else(|| DEPRECATED.iter().find(|old| old.name == key).map(Known::Old))
        };
        leaves.sort_by_key(|(key, _)| !matches!(known(key), Some(Known::Old(_))));
        for (key, value) in leaves {
            let origin = Origin::File { path: path.clone(), key: key.clone() };
            // A key without a value leaves the default, as in etcd.
            if value.is_null() {
                continue;
            }
            let Some(known) = known(&key) else {
                if yaml::is_section(&key) {
                    let message = format!("invalid {key}");
                    self.problem(
                        &key,
                        "",
                        origin,
                        message,
                        "the section's keys, indented, on the lines below it",
                    );
                } else {
                    self.notices.push(Notice::FileKeyUnknown { key });
                }
                continue;
            };
            // So does an empty text, except where it is what the user can mean.
            if value.as_str() == Some("")
                && !matches!(key.as_str(), "initial-cluster" | "auto-compaction-mode")
            {
                continue;
            }
            let text = yaml::scalar_text(&value);
            if let Err(invalid) =
                self.apply(known, &text, origin.clone(), |field, _| field.set_yaml(&value))
            {
                let message = format!(
                    "invalid value {:?} for {key}: {}",
                    shown(&key, &text),
                    invalid.error.message()
                );
                self.problem(&key, &text, origin, message, &invalid.expected);
            }
        }
    }

    /// Takes over one setting of whatever kind.
    fn apply(
        &mut self,
        known: Known,
        text: &str,
        origin: Origin,
        set: impl FnOnce(&mut dyn super::value::Value, &str) -> Result<(), Invalid>,
    ) -> Result<(), Rejected> {
        match known {
            Known::Ignored => Ok(()),
            Known::Flag(flag) => self.set_field(flag, text, origin, set),
            Known::Old(old) => {
                let detail = match old.meaning {
                    Meaning::Flag(now) => {
                        if let Some(flag) = Flag::named(now) {
                            self.set_field(flag, text, origin, set)?;
                        }
                        format!("use --{now}")
                    }
                    Meaning::Gate(gate) => {
                        let on = parse_bool(text).ok_or_else(|| Rejected {
                            error: Invalid::Syntax("parse error".to_owned()),
                            expected: "true or false".to_owned(),
                        })?;
                        self.config.feature_gates.set(gate, on);
                        self.origins.insert("feature-gates", origin);
                        format!("use --feature-gates={}={on}", gate.name())
                    }
                    Meaning::Dropped(why) => format!("it has no effect: {why}"),
                    Meaning::RefusedUnless(harmless, why) if harmless.contains(&text) => {
                        format!("it has no effect: {why}")
                    }
                    Meaning::RefusedUnless(_, why) => {
                        return Err(Rejected {
                            error: Invalid::Rule(format!(
                                "--{}={text} is not supported: {why}",
                                old.name
                            )),
                            expected: format!("no --{} at all", old.name),
                        });
                    }
                };
                self.notices.push(Notice::Deprecated { flag: old.name.to_owned(), detail });
                Ok(())
            }
        }
    }

    fn set_field(
        &mut self,
        flag: &'static Flag,
        text: &str,
        origin: Origin,
        set: impl FnOnce(&mut dyn super::value::Value, &str) -> Result<(), Invalid>,
    ) -> Result<(), Rejected> {
        let Some(field) = flag.field else { return Ok(()) };
        let value = field(&mut self.config);
        set(value, text).map_err(|error| Rejected { error, expected: value.expected() })?;
        self.origins.insert(flag.name, origin);
        Ok(())
    }

    fn problem(
        &mut self,
        flag: &str,
        value: &str,
        origin: Origin,
        message: String,
        expected: &str,
    ) {
        self.problems.push(Problem {
            flag: flag.to_owned(),
            value: shown(flag, value),
            origin,
            message,
            fix: format!("write {expected}"),
        });
    }

    /// Fills in what follows from other values, checks, and concludes.
    fn finish(mut self, exists: impl FnOnce(&Path) -> bool) -> Outcome {
        let config = &mut self.config;
        if config.data_dir.as_os_str().is_empty() || !self.origins.contains_key("data-dir") {
            config.data_dir = PathBuf::from(format!("{}.etcd", config.name));
            self.notices.push(Notice::Advice {
                warning: true,
                flag: "data-dir".to_owned(),
                message: format!(
                    "'data-dir' was empty; using default {}",
                    config.data_dir.display()
                ),
            });
        }
        let defaults = Config::default();
        let discovers = !config.discovery_srv.is_empty()
            || !config.discovery_srv_name.is_empty()
            || !config.discovery_endpoints.is_empty();
        if discovers && config.initial_cluster == defaults.initial_cluster {
            config.initial_cluster = BTreeMap::new();
        } else if config.name != DEFAULT_NAME && config.initial_cluster == defaults.initial_cluster
        {
            // Only the name was given: the cluster is this member alone.
            config.initial_cluster =
                BTreeMap::from([(config.name.clone(), config.initial_advertise_peer_urls.clone())]);
        }
        let is_new = !exists(&self.config.member_dir());
        if let Err(errors) = self.config.validate_from(&self.origins, is_new) {
            self.problems.extend(errors.problems);
        }
        if self.problems.is_empty() {
            return Outcome::Run { config: Box::new(self.config), notices: self.notices };
        }
        for problem in &mut self.problems {
            problem.value = shown(&problem.flag, &problem.value);
        }
        Outcome::Fail {
            message: format!("{}\n", ConfigErrors { problems: self.problems }),
            exit_code: 1,
        }
    }
}

/// A value that was refused, and what its flag takes.
struct Rejected {
    error: Invalid,
    expected: String,
}
