//! What the parser and the checks have to say: mistakes that prevent a start, and
//! notices for the log.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The program that embeds the server wrote it into its `Config`.
    Program,
    /// The command line.
    CommandLine,
    /// This environment variable.
    Environment(String),
    /// A key of the configuration file.
    File {
        /// The file as `--config-file` names it.
        path: PathBuf,
        /// The key, with dots between the levels.
        key: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("the default"),
            Origin::Program => f.write_str("the program's Config"),
            Origin::CommandLine => f.write_str("the command line"),
            Origin::Environment(name) => write!(f, "environment variable {name}"),
            Origin::File { path, key } => write!(f, "file {}, key {key}", path.display()),
        }
    }
}

/// One mistake: what is wrong, where it stands and how to put it right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The flag, without dashes; empty when no flag is concerned.
    pub flag: String,
    /// Its value; secrets are masked.
    pub value: String,
    /// Where the value came from.
    pub origin: Origin,
    /// What is wrong, in etcd's words where etcd has any.
    pub message: String,
    /// What to do about it.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.flag.is_empty() {
            write!(f, "\n    where: --{}={} ({})", self.flag, self.value, self.origin)?;
        }
        write!(f, "\n    fix:   {}", self.fix)
    }
}

/// Every mistake of a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The mistakes, in the order of the checks.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, noun) =
            (self.problems.len(), if self.problems.len() == 1 { "mistake" } else { "mistakes" });
        write!(
            f,
            "failed to verify flags: {count} {noun} in the configuration, nothing was started"
        )?;
        for problem in &self.problems {
            write!(f, "\n\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Something the log should say about the configuration; none of it prevents a start.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A variable was used.
    EnvironmentUsed {
        /// Its name.
        name: String,
        /// Its value; secrets are masked.
        value: String,
    },
    /// A variable begins with `ETCD_` and belongs to no flag.
    EnvironmentUnknown {
        /// The variable as `NAME=value`.
        variable: String,
    },
    /// `ETCD_VERSION` cannot be set.
    EnvironmentSpecial {
        /// Its value.
        value: String,
    },
    /// A configuration file was read; this flag or variable beside it was not.
    IgnoredBesideFile {
        /// `--flag` or `ETCD_VARIABLE`.
        what: String,
    },
    /// A configuration file was read.
    FileLoaded {
        /// Its path.
        path: PathBuf,
    },
    /// The file has a key that means nothing.
    FileKeyUnknown {
        /// The key, with dots between the levels.
        key: String,
    },
    /// A name of an older release was used.
    Deprecated {
        /// The name, without dashes.
        flag: String,
        /// What became of it.
        detail: String,
    },
    /// A flag is set that changes nothing here.
    NoEffect {
        /// The flag, without dashes.
        flag: String,
        /// Its value.
        value: String,
        /// Why.
        reason: String,
    },
    /// Worth knowing, or about to surprise.
    Advice {
        /// Whether it is a warning.
        warning: bool,
        /// The flag, without dashes.
        flag: String,
        /// What it is about.
        message: String,
    },
}

impl Notice {
    /// Sends the notice to the caller's `tracing` subscriber.
    pub fn log(&self) {
        match self {
            Notice::EnvironmentUsed { name, value } => {
                tracing::info!("variable-name" = name, "variable-value" = value, "{self}");
            }
            Notice::EnvironmentUnknown { variable } => {
                tracing::warn!("environment-variable" = variable, "{self}");
            }
            Notice::EnvironmentSpecial { value } => {
                tracing::warn!(key = "ETCD_VERSION", value, "{self}")
            }
            Notice::IgnoredBesideFile { what } => tracing::warn!(ignored = what, "{self}"),
            Notice::FileLoaded { path } => tracing::info!(path = %path.display(), "{self}"),
            Notice::FileKeyUnknown { key } => tracing::warn!(key, "{self}"),
            Notice::Deprecated { flag, detail } => {
                tracing::warn!("flag-name" = flag, detail, "{self}")
            }
            Notice::NoEffect { flag, value, reason } => {
                tracing::info!("flag-name" = flag, value, reason, "{self}");
            }
            Notice::Advice { warning: true, flag, .. } => {
                tracing::warn!("flag-name" = flag, "{self}")
            }
            Notice::Advice { warning: false, flag, .. } => {
                tracing::info!("flag-name" = flag, "{self}")
            }
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Notice::EnvironmentUsed { .. } => "recognized and used environment variable",
            Notice::EnvironmentUnknown { .. } => "unrecognized environment variable",
            Notice::EnvironmentSpecial { .. } => "cannot set special environment variable",
            Notice::IgnoredBesideFile { .. } => "ignored because a configuration file is used",
            Notice::FileLoaded { .. } => {
                "loaded server configuration, other configuration command line flags and environment variables will be ignored if provided"
            }
            Notice::FileKeyUnknown { .. } => "unknown key in the configuration file, ignored",
            Notice::Deprecated { .. } => "a flag of an older release is set",
            Notice::NoEffect { .. } => "a flag is set that has no effect in this server",
            Notice::Advice { message, .. } => message,
        })
    }
}

/// What a valid configuration has to say.
pub type Warnings = Vec<Notice>;
