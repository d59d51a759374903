//! raft-rs speaks slog, kvorum speaks tracing: this passes its lines on.

use std::fmt::Write as _;

use slog::{Drain, KV as _, Level, Never, OwnedKVList, Record, Serializer};

/// A logger whose lines come out as tracing events of target `kvorum::raft`.
pub(super) fn logger() -> slog::Logger {
    slog::Logger::root(Forward, slog::o!())
}

struct Forward;

impl Drain for Forward {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        // Raft tells much that only matters when it misbehaves: its info is our debug.
        match record.level() {
            Level::Critical | Level::Error => tracing::error!("{}", line(record, values)),
            Level::Warning => tracing::warn!("{}", line(record, values)),
            Level::Info => tracing::debug!("{}", line(record, values)),
            Level::Debug | Level::Trace => tracing::trace!("{}", line(record, values)),
        }
        Ok(())
    }
}

fn line(record: &Record<'_>, values: &OwnedKVList) -> String {
    let mut text = Text(format!("raft: {}", record.msg()));
    // Formatting into a string does not fail; a value that refuses is left out.
    let _ = record.kv().serialize(record, &mut text);
    let _ = values.serialize(record, &mut text);
    text.0
}

struct Text(String);

impl Serializer for Text {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}")?;
        Ok(())
    }
}
