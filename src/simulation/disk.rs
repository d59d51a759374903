//! The disk of a simulated machine: it outlives the member, and fails when told to.

use std::sync::Arc;

use parking_lot::Mutex;

use super::random::Random;
use crate::log::{Fault, FaultyLog, Identity, Mark, MemoryDisk, MemoryLog, Recovered};
use crate::storage::{FaultyDisk, Generations, Storage, StorageError};

/// Log and checkpoints. Clones are the same disk.
#[derive(Clone)]
pub(super) struct Disk {
    log: MemoryDisk,
    store: Arc<Mutex<Stores>>,
}

struct Stores {
    current: FaultyDisk,
    next: Option<FaultyDisk>,
}

impl Disk {
    pub(super) fn new(identity: Identity) -> Disk {
        let stores = Stores { current: FaultyDisk::new(), next: None };
        Disk { log: MemoryDisk::new(identity), store: Arc::new(Mutex::new(stores)) }
    }

    pub(super) fn open_store(&self) -> Box<dyn Storage> {
        Box::new(self.store.lock().current.open())
    }

    pub(super) fn open_log(&self) -> (FaultyLog<MemoryLog>, Recovered) {
        let (log, recovered) = MemoryLog::open(&self.log);
        (FaultyLog::new(log, &recovered, None), recovered)
    }

    /// Whether an entry of the log is durable, or was before the log forgot it.
    pub(super) fn holds(&self, entry: Mark) -> bool {
        self.log.holds(entry)
    }

    /// Lets a write or sync of the checkpoint fail some time from now.
    pub(super) fn plan_store_fault(&self, random: &mut Random) {
        let stores = self.store.lock();
        if random.chance(700) {
            stores.current.fail_write_after(random.below(12));
        } else {
            stores.current.fail_sync_after(random.below(6));
        }
    }

    /// Nothing that was planned will fail.
    pub(super) fn spare_store(&self) {
        self.store.lock().current.fail_write_after(u64::MAX);
        self.store.lock().current.fail_sync_after(u64::MAX);
    }

    /// What is not synced is lost, or a part of it.
    pub(super) fn cut_power(&self, random: &mut Random) {
        let mut stores = self.store.lock();
        let keep = random.index(stores.current.unsynced_writes() + 1);
        stores.current.power_cut(keep);
        stores.next = None;
    }
}

/// A sync of the log that fails some time from now, with as much of it on the disk as it
/// happens.
pub(super) fn log_fault(random: &mut Random) -> Fault {
    let nth = random.between(1, 60);
    match random.below(12) {
        0 => Fault::Truncate { nth: random.between(1, 4) },
        1..=4 => Fault::Sync { nth, kept: 0 },
        5..=8 => Fault::Sync { nth, kept: random.index(4) },
        _ => Fault::Sync { nth, kept: usize::MAX },
    }
}

impl Generations for Disk {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        let next = FaultyDisk::new();
        let storage = Box::new(next.open());
        self.store.lock().next = Some(next);
        Ok(storage)
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        let mut stores = self.store.lock();
        if let Some(next) = stores.next.take() {
            stores.current = next;
        }
        Ok(())
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        Ok(self.open_store())
    }

    fn discard(&mut self) {
        self.store.lock().next = None;
    }
}
