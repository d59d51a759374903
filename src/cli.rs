//! The commands that are no server: `kvorum snapshot …`, with the flags, the output and the exit
//! codes of `etcdctl snapshot` and `etcdutl snapshot`.
//!
//! A command is a [`Command`]: what it is called with, its flags, and the function that carries
//! it out. The syntax is that of etcd's tools: `--flag=v`, `--flag v`, `-w v`, `--flag` alone for
//! one that is yes or no, anywhere between the arguments and before the command; `--` ends the
//! flags. The flags of a command of etcdctl's are variables, too: `ETCDCTL_ENDPOINTS` is
//! `--endpoints`.
//!
//! | exit code | |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed, or a flag is none |
//! | 4 | there is no such output format |
//! | 5 | no server could be asked, or it did not answer well |
//! | 128 | arguments are missing or too many, or flags do not go together |

mod restore;
mod save;
mod status;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;

/// etcd's code for what failed.
pub(crate) const EXIT_ERROR: u8 = 1;
/// etcd's code for a format that there is not.
pub(crate) const EXIT_BAD_FEATURE: u8 = 4;
/// etcdctl's code for what failed between it and the server.
pub(crate) const EXIT_SERVER: u8 = 5;
/// etcd's code for arguments that cannot be.
pub(crate) const EXIT_BAD_ARGUMENTS: u8 = 128;

/// Why a command ends without having done what it is for.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What to tell; `Error: ` goes before it.
    pub(crate) message: String,
    /// The process's exit code.
    pub(crate) exit_code: u8,
}

impl Failure {
    /// It failed.
    pub(crate) fn new(error: impl ToString) -> Failure {
        Failure { message: error.to_string(), exit_code: EXIT_ERROR }
    }

    /// It was called wrongly.
    pub(crate) fn usage(message: impl ToString) -> Failure {
        Failure { message: message.to_string(), exit_code: EXIT_BAD_ARGUMENTS }
    }
}

/// A flag of a command.
pub(crate) struct Flag {
    /// Its name, without dashes.
    pub(crate) name: &'static str,
    /// What the value is, for the help; empty for a flag that is yes or no.
    pub(crate) kind: &'static str,
    /// The value when it is not given.
    pub(crate) default: &'static str,
    /// What it does, in one line.
    pub(crate) help: &'static str,
}

/// How to show a result, which all commands know.
pub(crate) const WRITE_OUT: Flag = Flag {
    name: "write-out",
    kind: "string",
    default: "simple",
    help: "set the output format (fields, json, simple, table); -w for short",
};

/// A command below `kvorum snapshot`.
pub(crate) struct Command {
    /// What it is called.
    name: &'static str,
    /// What follows it.
    arguments: &'static str,
    /// What it does, in one line.
    help: &'static str,
    /// Its flags.
    flags: &'static [Flag],
    /// What the names of their variables begin with; empty if there are none.
    variables: &'static str,
    /// Carries it out, and returns what to print.
    run: fn(&Arguments) -> Result<String, Failure>,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "save",
        arguments: "<filename> [options]",
        help: "Stores a server's snapshot in a file",
        flags: save::FLAGS,
        variables: "ETCDCTL_",
        run: save::run,
    },
    Command {
        name: "status",
        arguments: "<filename>",
        help: "Shows the hash, the revision, the number of keys and the size of a snapshot file",
        flags: &[WRITE_OUT],
        variables: "",
        run: status::run,
    },
    Command {
        name: "restore",
        arguments: "<filename> --data-dir {output dir} [options]",
        help: "Makes the data directory of a new cluster's member from a snapshot file",
        flags: restore::FLAGS,
        variables: "",
        run: restore::run,
    },
];

/// Flags and arguments, as they were given.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    flags: BTreeMap<&'static str, String>,
    /// What is no flag.
    pub(crate) positional: Vec<String>,
}

impl Arguments {
    /// The value of a flag, given or not.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.flags.get(name).map_or("", String::as_str)
    }

    /// Whether a flag that is yes or no says yes.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.get(name) == "true"
    }

    /// The one argument that there must be; otherwise it fails with `message`.
    pub(crate) fn only(&self, message: &str) -> Result<&str, Failure> {
        match self.positional.as_slice() {
            [only] => Ok(only),
            _ => Err(Failure::usage(message)),
        }
    }
}

/// Carries a command out, if that is what the program was called for.
pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let arguments: Vec<OsString> = arguments.collect();
    Some(match dispatch(command_first(&arguments)?) {
        Ok(text) => {
            // Standard output may be a closed pipe: nothing is lost that anybody waits for.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(Failure { message, exit_code }) => {
            let _ = writeln!(io::stderr(), "Error: {message}");
            ExitCode::from(exit_code)
        }
    })
}

/// The arguments behind `snapshot`, the name of the command first, if that is what is called. Flags
/// of the commands may stand before either, as `etcdctl` takes them; all others are the server's,
/// and so is what follows them.
fn command_first(arguments: &[OsString]) -> Option<impl Iterator<Item = OsString>> {
    let (flags, rest) = arguments.split_at_checked(flags_len(arguments))?;
    let (_, rest) = rest.split_first().filter(|(first, _)| *first == "snapshot")?;
    let (more_flags, rest) = rest.split_at_checked(flags_len(rest))?;
    let (name, rest) = rest.split_at_checked(1).unwrap_or_default();
    Some([name, flags, more_flags, rest].concat().into_iter())
}

/// How many arguments are flags of commands, and their values, before the first that is not. May
/// be more than there are, if a value is missing.
fn flags_len(arguments: &[OsString]) -> usize {
    let mut at = 0;
    while let Some(argument) = arguments.get(at).and_then(|argument| argument.to_str())
        && argument.starts_with('-')
    {
        let (name, value) = name_and_value(argument);
        let mut flags = COMMANDS.iter().flat_map(|command| command.flags);
        let Some(flag) = flags.find(|flag| flag.name == name) else { break };
        at += if value.is_some() || flag.kind.is_empty() { 1 } else { 2 };
    }
    at
}

/// What a flag is called, and its value if that is in the same argument.
fn name_and_value(argument: &str) -> (&str, Option<&str>) {
    let (written, value) = match argument.split_once('=') {
        Some((written, value)) => (written, Some(value)),
        None => (argument, None),
    };
    match written.strip_prefix("--") {
        Some(name) => (name, value),
        None if written == "-h" => ("help", value),
        // `-w json`, `-wjson` and `-w=json` are the same.
        None => match written.strip_prefix("-w") {
            Some("") => (WRITE_OUT.name, value),
            attached @ Some(_) => (WRITE_OUT.name, attached),
            None => (written, value),
        },
    }
}

fn dispatch(mut arguments: impl Iterator<Item = OsString>) -> Result<String, Failure> {
    let name = arguments.next().unwrap_or_default();
    if ["", "-h", "--help", "help"].iter().any(|help| name == *help) {
        return Ok(help_of_all());
    }
    let command = COMMANDS.iter().find(|command| name == *command.name).ok_or_else(|| {
        Failure::new(format!(
            "unknown command {:?} for \"kvorum snapshot\"\n\n{}",
            name,
            help_of_all()
        ))
    })?;
    match parse(command, arguments, &|name| std::env::var(name).ok())? {
        Some(arguments) => (command.run)(&arguments),
        None => Ok(help_of(command)),
    }
}

/// Reads what follows a command; `None` if it asks for help. `variable` gives variables of the
/// environment.
fn parse(
    command: &Command,
    arguments: impl Iterator<Item = OsString>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<Arguments>, Failure> {
    let mut parsed = Arguments::default();
    for flag in command.flags {
        let name = format!("{}{}", command.variables, flag.name).to_uppercase().replace('-', "_");
        let value = Some(name).filter(|_| !command.variables.is_empty());
        let value = value.and_then(|name| variable(&name));
        parsed.flags.insert(flag.name, value.unwrap_or_else(|| flag.default.to_owned()));
    }
    let wrong = |what: String| Failure::new(format!("{what}\n{}", help_of(command)));
    let mut arguments = arguments.map(|argument| {
        argument
            .into_string()
            .map_err(|bad| Failure::usage(format!("argument {bad:?} is not UTF-8")))
    });
    let mut flags_ended = false;
    while let Some(argument) = arguments.next() {
        let argument = argument?;
        if flags_ended || argument == "-" || !argument.starts_with('-') {
            parsed.positional.push(argument);
            continue;
        }
        if argument == "--" {
            flags_ended = true;
            continue;
        }
        let (name, value) = name_and_value(&argument);
        if name == "help" {
            return Ok(None);
        }
        let flag = command.flags.iter().find(|flag| flag.name == name).ok_or_else(|| {
            let written = argument.split('=').next().unwrap_or_default();
            match written.strip_prefix("--") {
                Some(name) => wrong(format!("unknown flag: --{name}")),
                None => wrong(format!("unknown shorthand flag: {written}")),
            }
        })?;
        let value = match value {
            Some(value) if flag.kind.is_empty() && !["true", "false"].contains(&value) => {
                return Err(wrong(format!(
                    "invalid argument {value:?} for \"--{name}\" flag: give true or false"
                )));
            }
            Some(value) => value.to_owned(),
            None if flag.kind.is_empty() => "true".to_owned(),
            None => match arguments.next() {
                Some(value) => value?,
                None => return Err(wrong(format!("flag needs an argument: --{name}"))),
            },
        };
        parsed.flags.insert(flag.name, value);
    }
    Ok(Some(parsed))
}

fn help_of_all() -> String {
    let mut text = "Usage:\n  kvorum snapshot <command>\n\nCommands:\n".to_owned();
    for command in COMMANDS {
        text.push_str(&format!("  {:<10}{}\n", command.name, command.help));
    }
    text.push_str("\n`kvorum snapshot <command> --help` shows a command's flags.\n");
    text
}

fn help_of(command: &Command) -> String {
    let Command { name, arguments, help, flags, .. } = command;
    let mut text = format!("{help}\n\nUsage:\n  kvorum snapshot {name} {arguments}\n\nFlags:\n");
    let signature = |flag: &Flag| format!("--{} {}", flag.name, flag.kind);
    let width = flags.iter().map(|flag| signature(flag).len()).max().unwrap_or(0);
    for flag in *flags {
        let default = match flag.default {
            "" => String::new(),
            default => format!(" (default {default:?})"),
        };
        text.push_str(&format!("  {:<width$}   {}{default}\n", signature(flag), flag.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Option<Arguments>, Failure> {
        let command = COMMANDS.iter().find(|command| command.name == "restore").unwrap();
        parse(command, arguments.iter().map(OsString::from), &|_| None)
    }

    #[test]
    fn flags_may_be_written_as_etcds_tools_take_them() {
        let given = parsed(&["--name=a", "file", "--data-dir", "d", "--skip-hash-check", "-wjson"])
            .unwrap()
            .unwrap();
        assert_eq!(given.positional, ["file"]);
        assert_eq!((given.get("name"), given.get("data-dir")), ("a", "d"));
        assert_eq!(given.get("initial-cluster-token"), "etcd-cluster");
        assert!(given.is_set("skip-hash-check") && !given.is_set("mark-compacted"));
        let given = parsed(&["--skip-hash-check=false", "--", "--name"]).unwrap().unwrap();
        assert_eq!(given.positional, ["--name"]);
        assert!(!given.is_set("skip-hash-check"));
        assert!(parsed(&["x", "--help"]).unwrap().is_none());
    }

    #[test]
    fn what_is_no_flag_or_no_command_is_refused() {
        for (arguments, text) in [
            (&["--bla"][..], "unknown flag: --bla"),
            (&["-x"], "unknown shorthand flag: -x"),
            (&["--name"], "flag needs an argument: --name"),
            (&["--skip-hash-check=maybe"], "invalid argument \"maybe\""),
        ] {
            let failure = parsed(arguments).unwrap_err();
            assert!(failure.message.starts_with(text), "{}", failure.message);
            assert_eq!(failure.exit_code, EXIT_ERROR);
        }
        let failure = dispatch(["destroy".into()].into_iter()).unwrap_err();
        assert!(failure.message.starts_with("unknown command"), "{}", failure.message);
    }

    #[test]
    fn a_command_may_stand_behind_its_flags() {
        let split = |text: &str| text.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        for (arguments, expected) in [
            ("snapshot save f --cert c", Some("save f --cert c")),
            ("--endpoints=a snapshot save f", Some("save --endpoints=a f")),
            ("snapshot --endpoints a save f", Some("save --endpoints a f")),
            (
                "--endpoints a --insecure-skip-tls-verify -w json snapshot -wtable save f",
                Some("save --endpoints a --insecure-skip-tls-verify -w json -wtable f"),
            ),
            ("--endpoints=a snapshot", Some("--endpoints=a")),
            ("snapshot", Some("")),
            ("snapshot --help", Some("--help")),
            ("-w=json snapshot -h", Some("-h -w=json")),
            // What is a flag's, or behind one that no command has, is the server's.
            ("--name snapshot", None),
            ("--name", None),
            ("--log-level snapshot", None),
            ("--listen-client-urls=a snapshot", None),
            ("", None),
        ] {
            let first = command_first(&split(arguments)).map(Iterator::collect::<Vec<_>>);
            assert_eq!(first, expected.map(split), "{arguments}");
        }
        let failure = run(["--name=a", "snapshot", "destroy"].map(OsString::from).into_iter());
        assert!(failure.is_some(), "it is no server");
    }
}
