//! What a sequence of records adds up to.
//!
//! A log is the fold of its records; this is the fold. Recovery runs it over the
//! records of the segments, the in-memory log keeps one as its disk, and [`Bounds`], the
//! part of it that must be known to admit the next record, is what the log on disk
//! carries while it is open.

use super::format::{Record, SegmentHeader};
use super::{Entry, HardState, LogError, Mark};

/// What the log holds, without the entries: after `start`, up to before `next_index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) hard_state: HardState,
    pub(super) start: Mark,
    pub(super) next_index: u64,
}

impl Bounds {
    /// Of a log that was never written to.
    pub(super) const EMPTY: Bounds = Bounds {
        hard_state: HardState { term: 0, vote: 0, commit: 0 },
        start: Mark { index: 0, term: 0 },
        next_index: 1,
    };

    /// Of everything before the segment that begins with `header`.
    pub(super) fn of_header(header: &SegmentHeader) -> Bounds {
        Bounds { hard_state: header.hard_state, start: header.start, next_index: header.next_index }
    }

    /// Index of the last entry, or of the start if there is none.
    pub(super) fn last_index(&self) -> u64 {
        self.next_index.saturating_sub(1)
    }

    /// Whether `entries` can follow: contiguous, after the start, no gap.
    pub(super) fn check_append(&self, entries: &[Entry]) -> Result<(), LogError> {
        let Some(first) = entries.first() else { return Ok(()) };
        let last_index = self.last_index();
        if first.index <= self.start.index || first.index > self.next_index {
            return Err(LogError::Misuse(format!(
                "entries from index {} appended to a log of ({}, {last_index}]",
                first.index, self.start.index
            )));
        }
        let contiguous = entries
            .iter()
            .zip(entries.iter().skip(1))
            .all(|(one, next)| one.index.checked_add(1) == Some(next.index));
        if !contiguous || entries.last().is_some_and(|last| last.index == u64::MAX) {
            return Err(LogError::Misuse(format!(
                "entries from index {} are not contiguous",
                first.index
            )));
        }
        Ok(())
    }

    /// Whether the log can be cut at `to`; `false` if that is behind its start, where
    /// nothing is left to cut.
    pub(super) fn check_truncate(&self, to: Mark) -> Result<bool, LogError> {
        if to.index > self.last_index() {
            return Err(LogError::Misuse(format!(
                "cut at index {}, but the log ends at {}",
                to.index,
                self.last_index()
            )));
        }
        Ok(to.index > self.start.index)
    }

    /// Whether a snapshot at `start` can replace the log.
    pub(super) fn check_install(&self, start: Mark) -> Result<(), LogError> {
        if start.index < self.start.index || start.index == u64::MAX {
            return Err(LogError::Misuse(format!(
                "snapshot at index {} installed over a log that starts after {}",
                start.index, self.start.index
            )));
        }
        Ok(())
    }

    /// Follows a record that the checks above have admitted.
    pub(super) fn advance(
        &mut self,
        hard_state: Option<HardState>,
        start: Option<Mark>,
        resets: bool,
        entries: &[Entry],
    ) {
        self.hard_state = hard_state.unwrap_or(self.hard_state);
        self.start = start.unwrap_or(self.start);
        if resets {
            self.next_index = self.start.index.saturating_add(1);
        }
        if let Some(last) = entries.last() {
            self.next_index = last.index.saturating_add(1);
        }
    }
}

/// The fold: [`Bounds`] and the entries themselves.
#[derive(Debug, Clone)]
pub(super) struct Replay {
    pub(super) bounds: Bounds,
    /// Index of `entries`' first. Above `start + 1` while entries that a later record
    /// will declare cut are in segments that are gone.
    base: u64,
    entries: Vec<Entry>,
}

impl Replay {
    /// Before the first record of a log (or of what is left of it) with these bounds.
    pub(super) fn new(bounds: Bounds) -> Replay {
        Replay { bounds, base: bounds.next_index, entries: Vec::new() }
    }

    /// Adds one record; says why if it cannot follow the ones before.
    pub(super) fn apply(&mut self, record: Record) -> Result<(), LogError> {
        let Record { hard_state, start, resets, entries } = record;
        match start {
            Some(start) if resets => self.bounds.check_install(start)?,
            Some(start) => {
                self.bounds.check_truncate(start)?;
            }
            None => {}
        }
        self.bounds.advance(hard_state, start, resets, &[]);
        if resets {
            self.entries.clear();
            self.base = self.bounds.next_index;
        }
        let start = self.bounds.start.index;
        if start >= self.base {
            let cut = usize::try_from((start - self.base).saturating_add(1)).unwrap_or(usize::MAX);
            self.entries.drain(..cut.min(self.entries.len()));
            self.base = start.saturating_add(1);
        }
        self.bounds.check_append(&entries)?;
        if let Some(first) = entries.first() {
            let kept = usize::try_from(first.index.saturating_sub(self.base)).unwrap_or(0);
            self.entries.truncate(kept);
            self.base = self.base.min(first.index);
            self.bounds.advance(None, None, false, &entries);
            self.entries.extend(entries);
        }
        Ok(())
    }

    /// The term of the entry at `index`, if there is one.
    #[cfg(test)]
    pub(super) fn term(&self, index: u64) -> Option<u64> {
        let position = usize::try_from(index.checked_sub(self.base)?).ok()?;
        self.entries.get(position).map(|entry| entry.term)
    }

    /// The entries after the start, all of them; `None` if some are missing.
    pub(super) fn into_entries(self) -> Option<Vec<Entry>> {
        (self.base <= self.bounds.start.index.saturating_add(1)).then_some(self.entries)
    }
}
