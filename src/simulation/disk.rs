//! The disk of a simulated machine: it outlives the member, and fails when told to.

use std::io;
use std::path::PathBuf;
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
    random: Random,
    /// There is space, whatever was planned.
    is_spared: bool,
    /// How often a store that had run into its end was gone on with.
    reopened: u64,
}

impl Disk {
    pub(super) fn new(identity: Identity, random: &mut Random) -> Disk {
        // Some members began with an earlier version.
        let is_old = random.chance(250);
        let current = if is_old { FaultyDisk::without_frozen() } else { FaultyDisk::new() };
        let random = Random::new(random.next());
        let stores = Stores { current, next: None, random, is_spared: false, reopened: 0 };
        Disk { log: MemoryDisk::new(identity), store: Arc::new(Mutex::new(stores)) }
    }

    pub(super) fn reopened(&self) -> u64 {
        self.store.lock().reopened
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
        // A frozen record is a write, too.
        let few = [12, 60][random.index(2)];
        match random.below(10) {
            0..=4 => stores.current.fail_write_after(random.below(few)),
            5..=6 => stores.current.fill_after(random.below(few)),
            _ => stores.current.fail_sync_after(random.below(6)),
        }
    }

    /// Nothing that was planned will fail.
    pub(super) fn spare_store(&self) {
        let mut stores = self.store.lock();
        stores.current.fail_write_after(u64::MAX);
        stores.current.fail_sync_after(u64::MAX);
        stores.is_spared = true;
    }

    /// What is not synced is lost, or a part of it.
    pub(super) fn cut_power(&self, random: &mut Random) {
        let mut stores = self.store.lock();
        lose(&stores.current, random);
        stores.next = None;
    }
}

/// What is not synced is lost, or a part of it.
fn lose(store: &FaultyDisk, random: &mut Random) {
    let keep = random.index(store.unsynced_writes() + 1);
    store.power_cut(keep);
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
        let stores = &mut *self.store.lock();
        if !stores.is_spared && stores.random.chance(100) {
            next.fill_after(stores.random.below(60));
        }
        let storage = Box::new(next.open());
        stores.next = Some(next);
        Ok(storage)
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        let mut stores = self.store.lock();
        if let Some(next) = stores.next.take() {
            stores.current = next;
        }
        Ok(())
    }

    /// It had run into the end of its disk, and still may.
    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        let Stores { current, random, is_spared, reopened, .. } = &mut *self.store.lock();
        if !*is_spared && random.chance(300) {
            let source = io::Error::from(io::ErrorKind::StorageFull);
            let dir = PathBuf::from("(simulated)");
            return Err(StorageError::Io { dir, action: "open it", source });
        }
        lose(current, random);
        *reopened += 1;
        Ok(Box::new(current.open()))
    }

    fn discard(&mut self) {
        self.store.lock().next = None;
    }
}
