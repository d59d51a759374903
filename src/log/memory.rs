//! The log in memory: for a server without a disk, and for simulated crashes.
//!
//! A [`MemoryDisk`] is what a directory is to the log on disk: it outlives the
//! [`MemoryLog`] that writes to it. Dropping the log and opening another over the same
//! disk is a crash: what was not synced is gone. (A *torn* crash, of which part arrives,
//! is made with [`FaultyLog`](super::FaultyLog).)
//!
//! Entries are handles to shared bytes, so keeping them here costs no second copy.

use std::sync::Arc;

use parking_lot::Mutex;

use super::format::Record;
use super::replay::{Bounds, Replay};
use super::{
    AppendReceipt, Entry, HardState, Identity, LogError, LogStore, Mark, Recovered, SyncStats,
};

/// What survives a [`MemoryLog`]. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct MemoryDisk {
    identity: Identity,
    synced: Arc<Mutex<Replay>>,
}

impl MemoryDisk {
    /// An empty disk for the log of `identity`.
    pub fn new(identity: Identity) -> MemoryDisk {
        MemoryDisk { identity, synced: Arc::new(Mutex::new(Replay::new(Bounds::EMPTY))) }
    }

    /// Whether this entry is on it, or behind the start.
    #[cfg(test)]
    pub(crate) fn holds(&self, entry: Mark) -> bool {
        let replay = self.synced.lock();
        entry.index <= replay.bounds.start.index || replay.term(entry.index) == Some(entry.term)
    }
}

/// A log over a [`MemoryDisk`]. Keeps every promise of [`LogStore`] but to outlive the
/// process.
#[derive(Debug)]
pub struct MemoryLog {
    disk: MemoryDisk,
    bounds: Bounds,
    waiting: Vec<Record>,
    waiting_bytes: u64,
}

impl MemoryLog {
    /// Opens the log on `disk`. One at a time: a second one's writes would not follow
    /// those of the first.
    pub fn open(disk: &MemoryDisk) -> (MemoryLog, Recovered) {
        let replay = disk.synced.lock().clone();
        let bounds = replay.bounds;
        let recovered = Recovered {
            identity: disk.identity,
            hard_state: bounds.hard_state,
            start: bounds.start,
            entries: replay.into_entries().unwrap_or_default(),
            repaired: None,
        };
        let log = MemoryLog { disk: disk.clone(), bounds, waiting: Vec::new(), waiting_bytes: 0 };
        (log, recovered)
    }

    fn push(&mut self, record: Record) {
        let Record { hard_state, start, resets, ref entries } = record;
        self.bounds.advance(hard_state, start, resets, entries);
        self.waiting_bytes +=
            entries.iter().map(|e| (e.data.len() + e.context.len()) as u64).sum::<u64>();
        self.waiting.push(record);
    }
}

impl LogStore for MemoryLog {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<HardState>,
    ) -> Result<AppendReceipt, LogError> {
        self.bounds.check_append(entries)?;
        if !entries.is_empty() || hard_state.is_some() {
            self.push(Record { hard_state, entries: entries.to_vec(), ..Record::default() });
        }
        Ok(AppendReceipt {
            last_index: self.bounds.last_index(),
            waiting_bytes: self.waiting_bytes,
        })
    }

    fn sync(&mut self) -> Result<SyncStats, LogError> {
        let mut disk = self.disk.synced.lock();
        for record in self.waiting.drain(..) {
            disk.apply(record)?;
        }
        let bytes = std::mem::take(&mut self.waiting_bytes);
        Ok(SyncStats { bytes, ..SyncStats::default() })
    }

    fn truncate_prefix(&mut self, to: Mark) -> Result<(), LogError> {
        if self.bounds.check_truncate(to)? {
            self.push(Record { start: Some(to), ..Record::default() });
            self.sync()?;
        }
        Ok(())
    }

    fn install(&mut self, start: Mark, hard_state: HardState) -> Result<(), LogError> {
        self.bounds.check_install(start)?;
        self.push(Record {
            hard_state: Some(hard_state),
            start: Some(start),
            resets: true,
            entries: Vec::new(),
        });
        self.sync().map(drop)
    }
}
