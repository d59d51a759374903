//! A disk that fails when told to, for tests.
//!
//! It has what [`SledStorage`](super::SledStorage) has: a database, which takes batches, and
//! beside it a file that only grows, for frozen records.
//!
//! ```text
//! database   batch batch(3 of the file) sync │ batch batch(5 of the file)      ── power cut
//! file       1 2 3                           │ 4 5        6 7
//!                                              └ as many as the batch before them that is left
//!                                                says; what is behind is written over
//! ```
//!
//! What is in the file is durable at once, and counts with the next batch. A failure in the
//! middle leaves a part of it there, which never counts.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Batch, MemoryStorage, Storage, StorageError, Table, Visit};

/// What survives the storages opened on it, and what makes them fail. Clones are the
/// same disk.
#[derive(Debug, Clone, Default)]
pub struct FaultyDisk(Arc<Mutex<Disk>>);

/// A frozen record: key and value.
type Record = (Bytes, Bytes);

#[derive(Debug, Default)]
struct Disk {
    /// What a power cut leaves of the database for certain.
    synced: Database,
    /// What has been written to it since, oldest first.
    unsynced: Vec<Write>,
    /// What reads see of it: both of the above.
    current: Database,
    /// The file beside it.
    file: Vec<Record>,
    /// There is none: frozen records are written in batches, as to a checkpoint of format 1.
    is_without_file: bool,
    /// Power cuts so far. A storage opened before the last one is dead.
    cuts: u64,
    /// Writes that still succeed.
    writes_left: Option<u64>,
    /// Syncs that still succeed.
    syncs_left: Option<u64>,
    /// A write or sync has failed since the last power cut.
    failed: bool,
    /// It was a sync: the kernel may have dropped what was written before.
    sync_failed: bool,
    /// What fails does so for want of space.
    full: bool,
}

#[derive(Debug, Clone, Default)]
struct Database {
    records: MemoryStorage,
    /// How many records of the file count.
    frozen: usize,
}

impl Database {
    fn apply(&mut self, write: Write) {
        self.records.apply(write.batch);
        self.frozen = write.frozen.unwrap_or(self.frozen);
    }
}

/// A batch, and what it says of the file if that has grown.
#[derive(Debug)]
struct Write {
    batch: Batch,
    frozen: Option<usize>,
}

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: frozen records count although their batch was lost.
    pub(crate) static COUNTS_LEFTOVERS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    /// Another: those that do not count are not written over.
    pub(crate) static APPENDS_TO_LEFTOVERS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl FaultyDisk {
    /// An empty disk without faults.
    pub fn new() -> FaultyDisk {
        FaultyDisk::default()
    }

    /// One that freezes nothing: all records are written in batches, and can be deleted.
    pub fn without_frozen() -> FaultyDisk {
        let disk = FaultyDisk::new();
        disk.0.lock().is_without_file = true;
        disk
    }

    /// The storage on this disk.
    pub fn open(&self) -> FaultyStorage {
        let disk = self.0.lock();
        let frozen = disk.current.frozen;
        #[cfg(test)]
        let frozen = if COUNTS_LEFTOVERS.get() { disk.file.len() } else { frozen };
        let disk_of = Arc::clone(&self.0);
        FaultyStorage { disk: disk_of, opened_after_cuts: disk.cuts, frozen, frozen_grew: false }
    }

    /// Lets `count` more writes succeed and the one after fail, and with it all that
    /// follows until a power cut. The failing write may have reached the disk or not. A frozen
    /// record is a write.
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

    /// How many batches have not been synced.
    pub fn unsynced_writes(&self) -> usize {
        self.0.lock().unsynced.len()
    }

    /// Cuts the power: of the batches since the last sync the oldest `keep` survive.
    /// Storages opened before are dead; faults that were ordered are forgotten.
    pub fn power_cut(&self, keep: usize) {
        let mut disk = self.0.lock();
        let mut survivor = disk.synced.clone();
        for write in disk.unsynced.drain(..).take(keep) {
            survivor.apply(write);
        }
        *disk = Disk {
            synced: survivor.clone(),
            current: survivor,
            file: std::mem::take(&mut disk.file),
            is_without_file: disk.is_without_file,
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
    /// How many records of the file are to count.
    frozen: usize,
    /// The database does not know yet.
    frozen_grew: bool,
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

    /// The frozen records, which come before all others of their table.
    fn frozen_of(&self, disk: &Disk, table: Table) -> Result<Vec<Record>, StorageError> {
        if table != Table::Mvcc {
            return Ok(Vec::new());
        }
        let frozen = disk.file.get(..self.frozen).ok_or_else(|| damaged("it is too short"))?;
        let is_sorted = frozen.is_sorted_by(|(before, _), (after, _)| before < after);
        if is_sorted { Ok(frozen.to_vec()) } else { Err(damaged("its keys are in disorder")) }
    }

    /// Puts one more into the file.
    fn append(&mut self, record: Record) -> Result<(), StorageError> {
        let is_in_order = self.frozen_to().is_none_or(|last| last < record.0);
        self.with_disk(|disk| {
            let fails = is_used_up(&mut disk.writes_left);
            disk.failed = fails || !is_in_order;
            disk.file.push(record);
            match (fails, is_in_order) {
                (true, _) => Err(fault("write its frozen records", disk.full)),
                (_, false) => Err(StorageError::Frozen),
                _ => Ok(()),
            }
        })?;
        self.frozen += 1;
        self.frozen_grew = true;
        Ok(())
    }
}

impl Storage for FaultyStorage {
    fn write(&mut self, batch: Batch) -> Result<(), StorageError> {
        if let Some((table, len)) = batch.oversized_key() {
            return Err(StorageError::KeyTooLong { table, len });
        }
        if batch.changes_up_to(self.frozen_to().as_deref()) {
            return Err(StorageError::Frozen);
        }
        let frozen = self.frozen_grew.then_some(self.frozen);
        self.with_disk(|disk| {
            let fails = is_used_up(&mut disk.writes_left);
            disk.failed = fails;
            disk.unsynced.push(Write { batch: batch.clone(), frozen });
            if fails {
                return Err(fault("write", disk.full));
            }
            disk.current.apply(Write { batch, frozen });
            Ok(())
        })?;
        self.frozen_grew = false;
        Ok(())
    }

    fn freeze(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), StorageError> {
        let is_without_file =
            self.with_disk(|disk| Ok(disk.is_without_file || disk.current.records.has_versions()))?;
        if is_without_file {
            return super::write_in_batches(self, records);
        }
        #[cfg(test)]
        let keeps_leftovers = APPENDS_TO_LEFTOVERS.get();
        #[cfg(not(test))]
        let keeps_leftovers = false;
        let frozen = self.frozen;
        self.with_disk(|disk| {
            if !keeps_leftovers {
                disk.file.truncate(frozen);
            }
            Ok(())
        })?;
        for (key, value) in records {
            self.append((key, value.into()))?;
        }
        Ok(())
    }

    fn frozen_to(&self) -> Option<Bytes> {
        let last = self.frozen.checked_sub(1)?;
        self.disk.lock().file.get(last).map(|(key, _)| key.clone())
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        self.with_disk(|disk| {
            if is_used_up(&mut disk.syncs_left) {
                (disk.failed, disk.sync_failed) = (true, true);
                return Err(fault("sync", disk.full));
            }
            disk.unsynced.clear();
            disk.synced = disk.current.clone();
            Ok(())
        })
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.with_disk(|disk| {
            let frozen = self.frozen_of(disk, table)?;
            let found = frozen.into_iter().find(|(found, _)| found == key);
            found.map_or_else(|| disk.current.records.get(table, key), |(_, value)| Ok(Some(value)))
        })
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError> {
        // On a copy, so that `visit` may use the disk.
        let (frozen, records) = self
            .with_disk(|disk| Ok((self.frozen_of(disk, table)?, disk.current.records.clone())))?;
        for (key, value) in frozen {
            let is_meant = key >= from && (to.is_empty() || key < to);
            if is_meant && visit(&key, value) == ControlFlow::Break(()) {
                return Ok(());
            }
        }
        records.scan(table, from, to, visit)
    }

    fn may_be_reopened(&mut self) -> bool {
        let disk = self.disk.lock();
        disk.full && !disk.sync_failed
    }

    fn size_on_disk(&self) -> Result<u64, StorageError> {
        self.with_disk(|disk| {
            let file_bytes = disk.file.iter().map(|(key, value)| (key.len() + value.len()) as u64);
            Ok(file_bytes.sum::<u64>() + disk.current.records.size_on_disk()?)
        })
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

fn damaged(what: &str) -> StorageError {
    StorageError::Damaged { dir: dir(), detail: format!("its frozen records: {what}") }
}

fn dir() -> PathBuf {
    PathBuf::from("(faulty disk)")
}
