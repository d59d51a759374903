//! How the value of a flag is read and written, one implementation per type of
//! [`Config`](super::Config) field.
//!
//! A value comes as text (command line, environment) or as YAML. What Go's `flag`
//! package refuses while parsing is [`Invalid::Syntax`] (usage, exit code 2); what
//! etcd refuses afterwards is [`Invalid::Rule`] (exit code 1).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_yaml_ng::Value as Yaml;

use super::features::{FeatureGates, Gate};
use super::url::{self, Url};
use super::{duration, go_number};

/// Why a value was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invalid {
    /// Not of the flag's type.
    Syntax(String),
    /// Of its type, but not one of the values there are.
    Rule(String),
}

impl Invalid {
    pub(crate) fn message(&self) -> &str {
        match self {
            Invalid::Syntax(message) | Invalid::Rule(message) => message,
        }
    }
}

/// A field of the configuration, as the parser sees it.
pub(crate) trait Value {
    /// Takes over what a command line or environment variable says. On error the
    /// field keeps what it had.
    fn set(&mut self, text: &str) -> Result<(), Invalid>;

    /// Takes over what a YAML file says; `Null` never gets here.
    fn set_yaml(&mut self, value: &Yaml) -> Result<(), Invalid> {
        self.set(&scalar(value)?)
    }

    /// The value as [`Value::set`] reads it.
    fn text(&self) -> String;

    /// What may be written, for the fix of a bad value.
    fn expected(&self) -> String;

    /// Whether `--flag` alone means `--flag=true`.
    fn is_bool(&self) -> bool {
        false
    }
}

fn scalar(value: &Yaml) -> Result<String, Invalid> {
    match value {
        Yaml::String(text) => Ok(text.clone()),
        Yaml::Bool(on) => Ok(on.to_string()),
        Yaml::Number(number) => Ok(number.to_string()),
        _ => Err(Invalid::Syntax("not a single value".to_owned())),
    }
}

/// A list, or one string with commas.
fn list(value: &Yaml) -> Result<String, Invalid> {
    match value {
        Yaml::Sequence(items) => {
            Ok(items.iter().map(scalar).collect::<Result<Vec<_>, _>>()?.join(","))
        }
        other => scalar(other),
    }
}

pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

impl Value for bool {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self = parse_bool(text).ok_or_else(|| Invalid::Syntax("parse error".to_owned()))?;
        Ok(())
    }
    fn text(&self) -> String {
        self.to_string()
    }
    fn expected(&self) -> String {
        "true or false".to_owned()
    }
    fn is_bool(&self) -> bool {
        true
    }
}

impl Value for String {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        text.clone_into(self);
        Ok(())
    }
    fn text(&self) -> String {
        self.clone()
    }
    fn expected(&self) -> String {
        "a text".to_owned()
    }
}

impl Value for u64 {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self = go_number::unsigned(text, u64::MAX)
            .map_err(|kind| Invalid::Syntax(kind.flag_text().to_owned()))?;
        Ok(())
    }
    fn text(&self) -> String {
        self.to_string()
    }
    fn expected(&self) -> String {
        "a whole number, 0 or more".to_owned()
    }
}

impl Value for u32 {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        let number = go_number::unsigned(text, u64::from(u32::MAX)).map_err(|kind| {
            Invalid::Syntax(format!("strconv.ParseUint: parsing {text:?}: {}", kind.strconv_text()))
        })?;
        *self =
            u32::try_from(number).map_err(|_| Invalid::Syntax("value out of range".to_owned()))?;
        Ok(())
    }
    fn text(&self) -> String {
        self.to_string()
    }
    fn expected(&self) -> String {
        format!("a whole number from 0 to {}", u32::MAX)
    }
}

impl Value for i64 {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self =
            go_number::signed(text).map_err(|kind| Invalid::Syntax(kind.flag_text().to_owned()))?;
        Ok(())
    }
    fn text(&self) -> String {
        self.to_string()
    }
    fn expected(&self) -> String {
        "a whole number".to_owned()
    }
}

impl Value for Duration {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        // Go's flag package replaces the reason by "parse error"; ours helps.
        *self = duration::parse(text).map_err(Invalid::Syntax)?;
        Ok(())
    }
    fn set_yaml(&mut self, value: &Yaml) -> Result<(), Invalid> {
        match value {
            // etcd's files carry integer nanoseconds.
            Yaml::Number(number) => {
                let nanos = number.as_u64().ok_or_else(|| {
                    Invalid::Syntax("not a whole number of nanoseconds, 0 or more".to_owned())
                })?;
                *self = Duration::from_nanos(nanos);
                Ok(())
            }
            other => self.set(&scalar(other)?),
        }
    }
    fn text(&self) -> String {
        duration::format(*self)
    }
    fn expected(&self) -> String {
        "a duration such as 300ms, 5s or 1h30m (in a file also integer nanoseconds)".to_owned()
    }
}

impl Value for PathBuf {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self = PathBuf::from(text);
        Ok(())
    }
    fn text(&self) -> String {
        self.to_string_lossy().into_owned()
    }
    fn expected(&self) -> String {
        "a path".to_owned()
    }
}

impl Value for Option<PathBuf> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self = (!text.is_empty()).then(|| PathBuf::from(text));
        Ok(())
    }
    fn text(&self) -> String {
        self.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default()
    }
    fn expected(&self) -> String {
        "a path".to_owned()
    }
}

impl Value for Vec<String> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        *self =
            if text.is_empty() { Vec::new() } else { text.split(',').map(str::to_owned).collect() };
        Ok(())
    }
    fn set_yaml(&mut self, value: &Yaml) -> Result<(), Invalid> {
        self.set(&list(value)?)
    }
    fn text(&self) -> String {
        self.join(",")
    }
    fn expected(&self) -> String {
        "a comma-separated list".to_owned()
    }
}

impl Value for Vec<Url> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        // An empty list means "as by default" to etcd, not "none".
        if !text.is_empty() {
            *self = url::parse_list(text).map_err(Invalid::Syntax)?;
        }
        Ok(())
    }
    fn set_yaml(&mut self, value: &Yaml) -> Result<(), Invalid> {
        self.set(&list(value)?)
    }
    fn text(&self) -> String {
        url::join(self)
    }
    fn expected(&self) -> String {
        "comma-separated URLs such as http://10.0.0.1:2379, https://10.0.0.1:2379 or unix:///run/etcd.sock".to_owned()
    }
}

/// Members and their peer URLs: `n1=http://10.0.0.1:2380,n2=http://10.0.0.2:2380`.
impl Value for BTreeMap<String, Vec<Url>> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        let mut members: BTreeMap<String, Vec<Url>> = BTreeMap::new();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, peer_url) = item.split_once('=').unwrap_or((item, ""));
            let peer_url: Url = peer_url.parse().map_err(Invalid::Rule)?;
            members.entry(name.to_owned()).or_default().push(peer_url);
        }
        for urls in members.values_mut() {
            urls.sort();
        }
        *self = members;
        Ok(())
    }
    fn text(&self) -> String {
        let pairs = self
            .iter()
            .flat_map(|(name, urls)| urls.iter().map(move |url| format!("{name}={url}")));
        pairs.collect::<Vec<_>>().join(",")
    }
    fn expected(&self) -> String {
        "name=peer-url pairs separated by commas, such as n1=http://10.0.0.1:2380".to_owned()
    }
}

impl Value for FeatureGates {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        self.merge(text).map_err(Invalid::Syntax)
    }
    fn text(&self) -> String {
        self.to_string()
    }
    fn expected(&self) -> String {
        let names: Vec<&str> = Gate::ALL.iter().map(|gate| gate.name()).collect();
        format!("Gate=true or Gate=false separated by commas; gates: {}", names.join(", "))
    }
}

/// Declares a type whose values are a few words. `$refuse` makes the error.
macro_rules! choices {
    ($(#[doc = $doc:literal])+ $name:ident, $refuse:expr;
     $($(#[doc = $choice_doc:literal])+ $choice:ident = $text:literal $(| $alias:literal)*,)+) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[doc = $choice_doc])+ $choice,)+ }

        impl $name {
            /// The value as flags spell it.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$choice => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Value for $name {
            fn set(&mut self, text: &str) -> Result<(), Invalid> {
                *self = match text {
                    $($text $(| $alias)* => $name::$choice,)+
                    _ => {
                        let refuse: fn(&str) -> Invalid = $refuse;
                        return Err(refuse(text));
                    }
                };
                Ok(())
            }
            fn text(&self) -> String {
                self.as_str().to_owned()
            }
            fn expected(&self) -> String {
                [$($text,)+].join(" or ")
            }
        }
    };
}

choices! {
    /// `--initial-cluster-state`.
    ClusterState, |_| Invalid::Syntax("invalid value".to_owned());
    /// A cluster that is to be made.
    New = "new",
    /// A cluster that exists and that this member joins.
    Existing = "existing",
}

choices! {
    /// `--auto-compaction-mode`: how `--auto-compaction-retention` is read.
    AutoCompactionMode, |text| Invalid::Rule(match text {
        "" => "undefined auto-compaction-mode".to_owned(),
        text => format!("unknown auto-compaction-mode {text:?}"),
    });
    /// Keep the history of a time.
    Periodic = "periodic",
    /// Keep a number of revisions.
    Revision = "revision",
}

choices! {
    /// `--tls-min-version`.
    TlsVersion, |text| {
        Invalid::Rule(format!("unexpected TLS version {text:?} (must be one of: TLS1.2, TLS1.3)"))
    };
    /// TLS 1.2.
    Tls12 = "TLS1.2" | "",
    /// TLS 1.3.
    Tls13 = "TLS1.3",
}

impl Value for Option<TlsVersion> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        let mut version = TlsVersion::Tls12;
        version.set(text)?;
        *self = (!text.is_empty()).then_some(version);
        Ok(())
    }
    fn text(&self) -> String {
        self.map(|version| version.text()).unwrap_or_default()
    }
    fn expected(&self) -> String {
        "TLS1.2 or TLS1.3, or empty for the highest there is".to_owned()
    }
}

choices! {
    /// `--metrics`.
    MetricsLevel, |text| Invalid::Rule(format!("unknown metrics level {text:?}"));
    /// The usual metrics.
    Basic = "basic" | "",
    /// Histograms of every gRPC method besides.
    Extensive = "extensive",
}

choices! {
    /// `--log-level`; the levels above `error` show errors only.
    LogLevel, |text| Invalid::Rule(format!("unrecognized level: {text:?}"));
    /// Everything.
    Debug = "debug" | "DEBUG",
    /// What happens in normal operation.
    Info = "info" | "INFO" | "",
    /// What deserves a look.
    Warn = "warn" | "WARN" | "warning" | "WARNING",
    /// What failed.
    Error = "error" | "ERROR",
    /// As `error`.
    DPanic = "dpanic" | "DPANIC",
    /// As `error`.
    Panic = "panic" | "PANIC",
    /// As `error`.
    Fatal = "fatal" | "FATAL",
}

choices! {
    /// `--log-format`.
    LogFormat, |text| Invalid::Rule(format!("unknown log format: {text}, supported values json, console"));
    /// One JSON object per line.
    Json = "json" | "",
    /// Tab-separated text for people.
    Console = "console",
}

/// One target of `--log-outputs`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogOutput {
    /// Standard error.
    Default,
    /// Standard error.
    Stderr,
    /// Standard output.
    Stdout,
    /// systemd's journal: standard error, which systemd connects to it.
    Journal,
    /// A file that is appended to.
    File(PathBuf),
}

impl LogOutput {
    fn text(&self) -> String {
        match self {
            LogOutput::Default => "default".to_owned(),
            LogOutput::Stderr => "stderr".to_owned(),
            LogOutput::Stdout => "stdout".to_owned(),
            LogOutput::Journal => "systemd/journal".to_owned(),
            LogOutput::File(path) => path.to_string_lossy().into_owned(),
        }
    }
}

impl Value for Vec<LogOutput> {
    fn set(&mut self, text: &str) -> Result<(), Invalid> {
        let mut outputs: Vec<LogOutput> = text
            .split(',')
            .filter(|item| !item.is_empty())
            .map(|item| match item {
                "default" => LogOutput::Default,
                "stderr" => LogOutput::Stderr,
                "stdout" => LogOutput::Stdout,
                "systemd/journal" => LogOutput::Journal,
                path => LogOutput::File(PathBuf::from(path)),
            })
            .collect();
        outputs.sort();
        outputs.dedup();
        if outputs.is_empty() {
            outputs.push(LogOutput::Default);
        }
        *self = outputs;
        Ok(())
    }
    fn set_yaml(&mut self, value: &Yaml) -> Result<(), Invalid> {
        self.set(&list(value)?)
    }
    fn text(&self) -> String {
        self.iter().map(LogOutput::text).collect::<Vec<_>>().join(",")
    }
    fn expected(&self) -> String {
        "default, or stderr, stdout, systemd/journal and file paths separated by commas".to_owned()
    }
}
