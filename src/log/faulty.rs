//! A log whose disk fails when told to.
//!
//! [`FaultyLog`] stands before another log and hands appends on only when they are synced.
//! So it decides what of a failed sync has arrived nevertheless: nothing, some records, or
//! all of it, which are the states a crash in the middle of a write can leave. As with a
//! real disk, the log is poisoned from then on; the one behind it is opened again to see
//! what survived.

use std::io;
use std::path::Path;

use super::replay::Bounds;
use super::{AppendReceipt, Entry, HardState, LogError, LogStore, Mark, Recovered, SyncStats};

/// When to fail. Calls are counted from 1, each kind for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The nth sync that has something to write fails. The first `kept` of its records
    /// have arrived all the same; `usize::MAX` for all.
    Sync {
        /// Which one fails.
        nth: u64,
        /// How many records arrive.
        kept: usize,
    },
    /// The nth truncation fails, before it has any effect.
    Truncate {
        /// Which one fails.
        nth: u64,
    },
    /// The nth installed snapshot fails, before it has any effect.
    Install {
        /// Which one fails.
        nth: u64,
    },
}

/// A log that fails once, by plan, and stays failed.
#[derive(Debug)]
pub struct FaultyLog<L> {
    inner: L,
    bounds: Bounds,
    fault: Option<Fault>,
    waiting: Vec<(Vec<Entry>, Option<HardState>)>,
    waiting_bytes: u64,
    syncs: u64,
    truncations: u64,
    installs: u64,
    poison: Option<LogError>,
}

impl<L: LogStore> FaultyLog<L> {
    /// A log that does what `inner`, just opened with `recovered`, does, until the `fault`.
    /// `None`: always.
    pub fn new(inner: L, recovered: &Recovered, fault: Option<Fault>) -> FaultyLog<L> {
        let Recovered { hard_state, start, entries, .. } = recovered;
        let next_index = start.index.saturating_add(1).saturating_add(entries.len() as u64);
        FaultyLog {
            inner,
            bounds: Bounds { hard_state: *hard_state, start: *start, next_index },
            fault,
            waiting: Vec::new(),
            waiting_bytes: 0,
            syncs: 0,
            truncations: 0,
            installs: 0,
            poison: None,
        }
    }

    /// Plans another fault, counted from now on.
    pub fn plan(&mut self, fault: Fault) {
        (self.syncs, self.truncations, self.installs) = (0, 0, 0);
        self.fault = Some(fault);
    }

    fn check(&self) -> Result<(), LogError> {
        self.poison.clone().map_or(Ok(()), Err)
    }

    fn fail<T>(&mut self, action: &'static str) -> Result<T, LogError> {
        let error = LogError::io(action, Path::new("faulty"), io::Error::other("planned fault"));
        self.poison = Some(error.clone());
        Err(error)
    }

    fn hand_on(&mut self, records: usize) -> Result<(), LogError> {
        let records = records.min(self.waiting.len());
        for (entries, hard_state) in self.waiting.drain(..records) {
            self.inner.append(&entries, hard_state)?;
        }
        Ok(())
    }
}

impl<L: LogStore> LogStore for FaultyLog<L> {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<HardState>,
    ) -> Result<AppendReceipt, LogError> {
        self.check()?;
        self.bounds.check_append(entries)?;
        if !entries.is_empty() || hard_state.is_some() {
            self.bounds.advance(hard_state, None, false, entries);
            self.waiting.push((entries.to_vec(), hard_state));
            self.waiting_bytes +=
                entries.iter().map(|e| (e.data.len() + e.context.len()) as u64).sum::<u64>();
        }
        Ok(AppendReceipt {
            last_index: self.bounds.last_index(),
            waiting_bytes: self.waiting_bytes,
        })
    }

    fn sync(&mut self) -> Result<SyncStats, LogError> {
        self.check()?;
        if self.waiting.is_empty() {
            return Ok(SyncStats::default());
        }
        self.syncs += 1;
        if let Some(Fault::Sync { nth, kept }) = self.fault
            && nth == self.syncs
        {
            self.hand_on(kept)?;
            self.inner.sync()?;
            return self.fail("sync");
        }
        self.hand_on(usize::MAX)?;
        self.waiting_bytes = 0;
        self.inner.sync()
    }

    fn truncate_prefix(&mut self, to: Mark) -> Result<(), LogError> {
        self.check()?;
        if !self.bounds.check_truncate(to)? {
            return Ok(());
        }
        self.truncations += 1;
        if self.fault == Some(Fault::Truncate { nth: self.truncations }) {
            return self.fail("truncate");
        }
        self.sync()?;
        self.bounds.advance(None, Some(to), false, &[]);
        self.inner.truncate_prefix(to)
    }

    fn install(&mut self, start: Mark, hard_state: HardState) -> Result<(), LogError> {
        self.check()?;
        self.bounds.check_install(start)?;
        self.installs += 1;
        if self.fault == Some(Fault::Install { nth: self.installs }) {
            return self.fail("install");
        }
        self.sync()?;
        self.bounds.advance(Some(hard_state), Some(start), true, &[]);
        self.inner.install(start, hard_state)
    }
}
