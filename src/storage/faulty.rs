//! A disk that fails when told to, for tests.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Batch, MemoryStorage, Storage, StorageError, Table, Visit};

/// What survives the storages opened on it, and what makes them fail. Clones are the
/// same disk.
#[derive(Debug, Clone, Default)]
pub struct FaultyDisk(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    /// What a power cut leaves for certain.
    synced: MemoryStorage,
    /// What has been written since, oldest first.
    unsynced: Vec<Batch>,
    /// What reads see: both of the above.
    current: MemoryStorage,
    /// Power cuts so far. A storage opened before the last one is dead.
    cuts: u64,
    /// Writes that still succeed.
    writes_left: Option<u64>,
    /// Syncs that still succeed.
    syncs_left: Option<u64>,
    /// A write or sync has failed since the last power cut.
    failed: bool,
    /// What fails does so for want of space.
    full: bool,
}

impl FaultyDisk {
    /// An empty disk without faults.
    pub fn new() -> FaultyDisk {
        FaultyDisk::default()
    }

    /// The storage on this disk.
    pub fn open(&self) -> FaultyStorage {
        FaultyStorage { disk: self.0.clone(), opened_after_cuts: self.0.lock().cuts }
    }

    /// Lets `count` more writes succeed and the one after fail, and with it all that
    /// follows until a power cut. The failing write may have reached the disk or not.
    pub fn fail_write_after(&self, count: u64) {
        self.0.lock().writes_left = Some(count);
    }

    /// Like [`FaultyDisk::fail_write_after`], because there is no space left: a storage that
    /// has failed may be opened anew.
    pub fn fill_after(&self, count: u64) {
        let mut disk = self.0.lock();
        disk.writes_left = Some(count);
        disk.full = true;
    }

    /// Lets `count` more syncs succeed and the one after fail, and with it all that
    /// follows until a power cut.
    pub fn fail_sync_after(&self, count: u64) {
        self.0.lock().syncs_left = Some(count);
    }

    /// How many writes have not been synced.
    pub fn unsynced_writes(&self) -> usize {
        self.0.lock().unsynced.len()
    }

    /// Cuts the power: of the writes since the last sync the oldest `keep` survive.
    /// Storages opened before are dead; faults that were ordered are forgotten.
    pub fn power_cut(&self, keep: usize) {
        let mut disk = self.0.lock();
        let mut survivor = disk.synced.clone();
        for batch in disk.unsynced.drain(..).take(keep) {
            survivor.apply(batch);
        }
        *disk = Disk {
            synced: survivor.clone(),
            current: survivor,
            cuts: disk.cuts + 1,
            ..Disk::default()
        };
    }
}

/// A [`Storage`] on a [`FaultyDisk`].
#[derive(Debug)]
pub struct FaultyStorage {
    disk: Arc<Mutex<Disk>>,
    opened_after_cuts: u64,
}

impl FaultyStorage {
    fn with_disk<T>(
        &self,
        act: impl FnOnce(&mut Disk) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let mut disk = self.disk.lock();
        if disk.failed || disk.cuts != self.opened_after_cuts {
            return Err(StorageError::Failed { dir: dir() });
        }
        act(&mut disk)
    }
}

impl Storage for FaultyStorage {
    fn write(&mut self, batch: Batch) -> Result<(), StorageError> {
        if let Some((table, len)) = batch.oversized_key() {
            return Err(StorageError::KeyTooLong { table, len });
        }
        self.with_disk(|disk| {
            let fails = is_used_up(&mut disk.writes_left);
            disk.failed = fails;
            disk.unsynced.push(batch.clone());
            if fails {
                return Err(fault("write", disk.full));
            }
            disk.current.apply(batch);
            Ok(())
        })
    }

    fn freeze(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), StorageError> {
        // Each of the batches may fail, or be the last that a power cut leaves.
        super::write_in_batches(self, records)
    }

    fn frozen_to(&self) -> Option<Bytes> {
        None
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        self.with_disk(|disk| {
            if is_used_up(&mut disk.syncs_left) {
                disk.failed = true;
                return Err(fault("sync", disk.full));
            }
            disk.unsynced.clear();
            disk.synced = disk.current.clone();
            Ok(())
        })
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.with_disk(|disk| disk.current.get(table, key))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError> {
        // On a copy, so that `visit` may use the disk.
        let current = self.with_disk(|disk| Ok(disk.current.clone()))?;
        current.scan(table, from, to, visit)
    }

    fn may_be_reopened(&mut self) -> bool {
        self.disk.lock().full
    }

    fn size_on_disk(&self) -> Result<u64, StorageError> {
        self.with_disk(|disk| disk.current.size_on_disk())
    }
}

/// Counts down, and says whether nothing was left.
fn is_used_up(left: &mut Option<u64>) -> bool {
    match left {
        None => false,
        Some(0) => true,
        Some(count) => {
            *count -= 1;
            false
        }
    }
}

fn fault(action: &'static str, full: bool) -> StorageError {
    let kind = if full { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
    let source = io::Error::new(kind, "fault ordered by a test");
    StorageError::Io { dir: dir(), action, source }
}

fn dir() -> PathBuf {
    PathBuf::from("(faulty disk)")
}
