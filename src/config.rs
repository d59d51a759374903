//! etcd's flags, environment variables and YAML file, made into one checked [`Config`].
//!
//! ```text
//! command line ─┐
//! ETCD_*       ─┼─ parse ─▶ Config ─ validate ─▶ Warnings        (start)
//! YAML file    ─┘             ▲                └▶ ConfigErrors   (every mistake, where it is, how to fix it)
//!                  a program that embeds the server writes one itself
//! ```
//!
//! One table (`config::flag`) knows everything about a flag: its field, its name, its YAML
//! key, its help and whether it has an effect here. The parser, the checks, `--help`
//! and `docs/flags.md` are made from it.
//!
//! Invariants:
//! - Parsing takes its arguments and environment as values and changes nothing of the
//!   process; it reads the configuration file and nothing else.
//! - A flag that is accepted either works or is reported in the log. One that promises
//!   security or a cluster and cannot keep the promise prevents the start.
//! - [`Config::validate`] does not stop at the first mistake.
//!
//! It opens no socket, makes no directory and reads no certificate: that is the
//! server's, and only then do addresses in use and unreadable files show.

mod deprecated;
mod duration;
mod features;
mod flag;
mod go_number;
mod help;
mod parse;
mod report;
mod tls;
mod url;
mod validate;
mod value;
mod yaml;

#[cfg(test)]
mod tests;

#[doc(hidden)]
pub use duration::parse as parse_duration;
pub use features::{FeatureGates, Gate, Stage};
pub use flag::Config;
pub use parse::{Outcome, parse};
pub use report::{ConfigErrors, Notice, Origin, Problem, Warnings};
pub use tls::CipherSuite;
pub use url::{Address, Scheme, Url};
pub use validate::AutoCompaction;
pub use value::{
    AutoCompactionMode, ClusterState, LogFormat, LogLevel, LogOutput, MetricsLevel, TlsVersion,
};
