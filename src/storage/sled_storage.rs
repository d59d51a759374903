//! Records on disk, with sled 0.34.7, and what it takes to trust it.
//!
//! - sled's `flush` leaves the data in the operating system's hands. [`Storage::sync`]
//!   flushes and then syncs sled's file through a descriptor of our own. It was opened
//!   before the first write, so no error of the disk escapes it.
//! - sled panics on damage it did not expect. Each call is caught; after a panic, or an
//!   error, the storage fails for good. After a panic sled is not touched again, not even
//!   to close it, because that may never return; its file stays locked until the process
//!   ends. After an error, most often a full disk, it is closed by a thread that may take
//!   its time, and the checkpoint can be opened anew.
//!   (So panics must unwind: a build with `panic = "abort"` dies instead.)
//! - Damage that sled does not notice is found by the checksum of each record
//!   ([`super::record`]), and lost records by counting: each batch carries the number
//!   of records there are in each table. An old state that sled takes for the newest
//!   is found by the mark ([`super::mark`]).
//! - Values too large for sled's pages would go to files that are never synced. They
//!   are stored in pieces, and that there is no such file is checked on each sync.
//! - Free space is reclaimed by sled's own thread only, hence `flush_every_ms`. The
//!   file never shrinks; what is free in it is used again.
//! - sled takes much more space than its records. Those of [`Table::Mvcc`] are put into a
//!   plain file beside it, of which sled holds no more than how long it is
//!   ([`super::frozen`]). A checkpoint of format 1 has them in sled, and keeps to that.
//!
//! Opening a new directory takes a few milliseconds, opening one with a million records
//! of 300 bytes a third of a second. sled holds about as much in memory as it has on disk,
//! whatever its cache is set to.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::mem;
use std::ops::Bound::{Excluded, Included};
use std::ops::ControlFlow;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::frozen::{self, ExtendError, Frozen};
use super::mark::Mark;
use super::record::{
    Head, OWN_TABLE, PIECE_BYTES, Pieces, decode_head, decode_piece, encode_head, encode_piece,
    piece_key, pieces_of, stored_key,
};
use super::{Batch, Storage, StorageError, Table, Visit};
use crate::{file_lock, large_file};

/// The format described in [`super::record`].
/// 2: there may be a file of frozen records.
const FORMAT: u32 = 2;
/// From this format on versions are in a file beside sled.
const FROZEN_FORMAT: u32 = 2;
const FORMAT_KEY: &[u8] = b"format";
const FORMAT_MAGIC: &[u8] = b"kvorum checkpoint ";
const PROGRESS_KEY: &[u8] = b"progress";
const FROZEN_KEY: &[u8] = b"frozen";
/// The name of the file with the mark.
const MARK_FILE: &str = "synced";

/// sled writes its file in units of this, in bytes. The largest page that stays in the
/// file is a quarter of it; see [`PIECE_BYTES`]. It cannot be changed later.
const SEGMENT_BYTES: usize = 4 << 20;
/// What sled should cache, in bytes. It does not help much to give it more, or less.
const CACHE_BYTES: u64 = 16 << 20;
/// How often sled's thread cleans up, in milliseconds.
const CLEAN_EVERY_MS: u64 = 500;
/// How long to wait for a sled that has reported an error to close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A [`Storage`] in a directory of its own.
#[derive(Debug)]
pub struct SledStorage {
    dir: PathBuf,
    /// Always there but while being dropped.
    db: Option<sled::Db>,
    /// sled's file, for syncing.
    file: File,
    failed: AtomicBool,
    /// It failed by a panic.
    panicked: AtomicBool,
    /// A sync failed: the kernel told of lost pages, and will not tell again.
    sync_failed: bool,
    /// The directory's entries, and its own in its parent, have been synced.
    names_synced: bool,
    progress: Progress,
    /// How many writes have been synced.
    mark: Mark,
    /// What it was begun with: versions are in sled before format [`FROZEN_FORMAT`].
    format: u32,
    /// Records that sled need not hold.
    frozen: Option<Frozen>,
    /// There are more of them than sled knows of.
    frozen_grew: bool,
}

/// What every batch says of the state it leads to.
#[derive(Debug, Default)]
struct Progress {
    /// How many batches led there.
    writes: u64,
    /// How many records each table has.
    counts: BTreeMap<u8, u64>,
}

impl Progress {
    fn encode(&self) -> Vec<u8> {
        let mut encoded = self.writes.to_le_bytes().to_vec();
        for (table, count) in &self.counts {
            encoded.push(*table);
            encoded.extend_from_slice(&count.to_le_bytes());
        }
        encoded
    }

    fn decode(encoded: &[u8]) -> Option<Progress> {
        let (writes, counts) = encoded.split_first_chunk::<8>()?;
        let counts = counts.chunks(9).map(|entry| {
            let (table, count) = entry.split_first()?;
            Some((*table, u64::from_le_bytes(count.try_into().ok()?)))
        });
        Some(Progress {
            writes: u64::from_le_bytes(*writes),
            counts: counts.collect::<Option<_>>()?,
        })
    }
}

impl SledStorage {
    /// Opens the checkpoint in `dir`, or begins one there, in a directory that only the
    /// owner can read. Waits up to two seconds while another process has it open.
    ///
    /// # Errors
    /// See [`StorageError`]; each says what to do.
    pub fn open(dir: &Path) -> Result<SledStorage, StorageError> {
        let io = |action| move |source| StorageError::Io { dir: dir.to_path_buf(), action, source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io("create its directory"))?;
        let (db, is_empty) = open_sled(dir)?;
        let files = || {
            let file = File::open(dir.join("db")).map_err(io("open its file"))?;
            let mark_path = dir.join(MARK_FILE);
            let mark = match Mark::open(&mark_path).map_err(io("open its mark"))? {
                Some(mark) => mark,
                None if is_empty => Mark::create(&mark_path).map_err(io("create its mark"))?,
                None => {
                    let detail = format!("a sled database without a file {MARK_FILE:?}");
                    return Err(StorageError::Foreign { dir: dir.to_path_buf(), detail });
                }
            };
            Ok((file, mark))
        };
        let (file, mark) = match files() {
            Ok(files) => files,
            Err(error) => {
                // On a full disk sled, which has yet to notice, would try to write for ever.
                close_after_error(dir, Some(db));
                return Err(error);
            }
        };
        let progress = Progress::default();
        let (failed, panicked) = (AtomicBool::new(false), AtomicBool::new(false));
        let dir = dir.to_path_buf();
        let mut storage = SledStorage {
            dir,
            db: Some(db),
            file,
            failed,
            panicked,
            sync_failed: false,
            // If an earlier process did not get that far, its first sync never succeeded.
            names_synced: mark.number() > 0,
            progress,
            mark,
            format: FORMAT,
            frozen: None,
            frozen_grew: false,
        };
        if is_empty && storage.mark.number() == 0 {
            storage.begin()?;
            return Ok(storage);
        }
        if !is_empty {
            storage.format = storage.check_format()?;
            storage.progress = storage.read_progress()?;
            storage.frozen = storage.open_frozen()?;
        }
        let (writes, synced) = (storage.progress.writes, storage.mark.number());
        if writes < synced {
            return Err(storage.damaged(format!("only {writes} of {synced} writes are left")));
        }
        Ok(storage)
    }

    /// Gives back what a checkpoint takes on the disk, even if a sled that never closed
    /// still has its file open: without its name alone the file would take up space until
    /// the process ends. Only for a checkpoint that does not count any more.
    pub(super) fn give_back_space(dir: &Path) {
        for name in ["db", frozen::FILE] {
            // What is not there takes no space; what cannot be opened is removed by name.
            let file = fs::File::options().write(true).open(dir.join(name));
            let _ = file.and_then(|file| large_file::empty(&file));
        }
    }

    /// Marks an empty checkpoint as ours. Not yet durably: what nothing was synced in is
    /// as good as not there, so the first sync is soon enough.
    fn begin(&mut self) -> Result<(), StorageError> {
        let key = stored_key(OWN_TABLE, FORMAT_KEY);
        let mut format = FORMAT_MAGIC.to_vec();
        format.extend_from_slice(&FORMAT.to_le_bytes());
        let mut batch = sled::Batch::default();
        batch.insert(key.clone(), encode_head(&key, &Head::Whole(&format)));
        self.names_synced = false;
        self.apply(batch, BTreeMap::new())
    }

    /// Makes durable that the checkpoint's files are there, when it was begun just now.
    fn sync_names(&mut self) -> io::Result<()> {
        if self.names_synced {
            return Ok(());
        }
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
        sync(&self.dir.join("conf"))?;
        sync(&self.dir)?;
        self.dir.parent().map_or(Ok(()), sync_parent)?;
        self.names_synced = true;
        Ok(())
    }

    fn check_format(&self) -> Result<u32, StorageError> {
        let foreign =
            |detail: &str| StorageError::Foreign { dir: self.dir.clone(), detail: detail.into() };
        let key = stored_key(OWN_TABLE, FORMAT_KEY);
        let stored = self.call("read", |db| db.get(&key))?;
        let stored = stored.ok_or_else(|| foreign("a sled database without a format record"))?;
        let Some(Head::Whole(format)) = decode_head(&key, &stored) else {
            return Err(self.damaged("its format record".into()));
        };
        let version = format.strip_prefix(FORMAT_MAGIC).and_then(|rest| rest.try_into().ok());
        let found = u32::from_le_bytes(version.ok_or_else(|| foreign("an unknown format"))?);
        if found > FORMAT {
            return Err(StorageError::NewerFormat { dir: self.dir.clone(), found, known: FORMAT });
        }
        Ok(found)
    }

    fn read_progress(&self) -> Result<Progress, StorageError> {
        let key = stored_key(OWN_TABLE, PROGRESS_KEY);
        let stored = self.call("read", |db| db.get(&key))?;
        let progress = stored.as_ref().and_then(|stored| match decode_head(&key, stored)? {
            Head::Whole(progress) => Progress::decode(progress),
            Head::InPieces(_) => None,
        });
        progress.ok_or_else(|| self.damaged("its progress record".into()))
    }

    fn open_frozen(&self) -> Result<Option<Frozen>, StorageError> {
        let key = stored_key(OWN_TABLE, FROZEN_KEY);
        let Some(stored) = self.call("read", |db| db.get(&key))? else { return Ok(None) };
        match decode_head(&key, &stored) {
            Some(Head::Whole(encoded)) => {
                Frozen::open(&self.dir, encoded).map(Some).map_err(|error| self.unreadable(error))
            }
            _ => Err(self.damaged(describe(&key))),
        }
    }

    fn unreadable(&self, error: frozen::ReadError) -> StorageError {
        match error {
            frozen::ReadError::Io(source) => self.io("read its frozen records", source),
            frozen::ReadError::Damaged(detail) => self.damaged(detail),
        }
    }

    /// Makes changes that lead to so many records.
    fn apply(
        &mut self,
        mut changes: sled::Batch,
        counts: BTreeMap<u8, u64>,
    ) -> Result<(), StorageError> {
        let progress = Progress { writes: self.progress.writes.saturating_add(1), counts };
        let mut insert_own = |key: &[u8], value: &[u8]| {
            let key = stored_key(OWN_TABLE, key);
            let sealed = encode_head(&key, &Head::Whole(value));
            changes.insert(key, sealed);
        };
        insert_own(PROGRESS_KEY, &progress.encode());
        if let Some(frozen) = self.frozen.as_ref().filter(|_| self.frozen_grew) {
            insert_own(FROZEN_KEY, &frozen.encode());
        }
        self.call("write", |db| db.apply_batch(changes))?;
        self.progress = progress;
        self.frozen_grew = false;
        Ok(())
    }

    /// Calls sled, unless it has failed before.
    fn call<T>(
        &self,
        action: &'static str,
        call: impl FnOnce(&sled::Db) -> sled::Result<T>,
    ) -> Result<T, StorageError> {
        let failed = || StorageError::Failed { dir: self.dir.clone() };
        if self.failed.load(Ordering::Relaxed) {
            return Err(failed());
        }
        let db = self.db.as_ref().ok_or_else(failed)?;
        let error = match catch_unwind(AssertUnwindSafe(|| call(db))) {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error_of(&self.dir, action, error),
            Err(panic) => {
                self.panicked.store(true, Ordering::Relaxed);
                self.damaged(message_of(&*panic))
            }
        };
        self.failed.store(true, Ordering::Relaxed);
        Err(error)
    }

    fn io(&self, action: &'static str, source: io::Error) -> StorageError {
        self.failed.store(true, Ordering::Relaxed);
        StorageError::Io { dir: self.dir.clone(), action, source }
    }

    fn damaged(&self, detail: String) -> StorageError {
        StorageError::Damaged { dir: self.dir.clone(), detail }
    }

    /// The frozen records of a table: their keys come before those that sled has.
    fn frozen_of(&self, table: Table) -> Option<&Frozen> {
        self.frozen.as_ref().filter(|_| table == Table::Mvcc)
    }

    /// The record stored under a key, and whether its value is elsewhere.
    fn pieces_at(&self, key: &[u8]) -> Result<Option<Option<Pieces>>, StorageError> {
        let Some(stored) = self.call("read", |db| db.get(key))? else { return Ok(None) };
        match decode_head(key, &stored) {
            Some(Head::Whole(_)) => Ok(Some(None)),
            Some(Head::InPieces(pieces)) => Ok(Some(Some(pieces))),
            None => Err(self.damaged(describe(key))),
        }
    }

    fn value_of(&self, key: &[u8], stored: &[u8]) -> Result<Bytes, StorageError> {
        let pieces = match decode_head(key, stored) {
            Some(Head::Whole(value)) => return Ok(Bytes::copy_from_slice(value)),
            Some(Head::InPieces(pieces)) => pieces,
            None => return Err(self.damaged(describe(key))),
        };
        let mut value = Vec::new();
        for number in 0..pieces.count() {
            let piece_key = piece_key(key, number);
            let stored = self.call("read", |db| db.get(&piece_key))?;
            match stored.as_ref().and_then(|stored| decode_piece(&piece_key, stored)) {
                Some(piece) => value.extend_from_slice(piece),
                None => return Err(self.damaged(format!("{}, piece {number}", describe(key)))),
            }
        }
        if value.len() as u64 != pieces.len || crc32c::crc32c(&value) != pieces.checksum {
            return Err(self.damaged(describe(key)));
        }
        Ok(value.into())
    }
}

impl Storage for SledStorage {
    fn write(&mut self, batch: Batch) -> Result<(), StorageError> {
        if let Some((table, len)) = batch.oversized_key() {
            return Err(StorageError::KeyTooLong { table, len });
        }
        if batch.changes_up_to(self.frozen_to().as_deref()) {
            return Err(StorageError::Frozen);
        }
        let mut counts = self.progress.counts.clone();
        let mut changes = sled::Batch::default();
        for ((table, key), value) in batch.changes {
            let key = stored_key(table as u8, &key);
            let before = self.pieces_at(&key)?;
            let pieces = value.as_deref().and_then(pieces_of);
            if let Some(value) = &value {
                let head = pieces.map_or(Head::Whole(value), Head::InPieces);
                changes.insert(&key[..], encode_head(&key, &head));
                if pieces.is_some() {
                    for (number, piece) in (0..).zip(value.chunks(PIECE_BYTES)) {
                        let key = piece_key(&key, number);
                        let sealed = encode_piece(&key, piece);
                        changes.insert(key, sealed);
                    }
                }
            } else {
                changes.remove(&key[..]);
            }
            let needed = pieces.map_or(0, Pieces::count);
            let present = before.flatten().map_or(0, Pieces::count);
            for number in needed..present {
                changes.remove(piece_key(&key, number));
            }
            let count = counts.entry(table as u8).or_default();
            match (before.is_some(), value.is_some()) {
                (false, true) => *count = count.saturating_add(1),
                (true, false) => *count = count.saturating_sub(1),
                _ => {}
            }
        }
        self.apply(changes, counts)
    }

    fn freeze(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), StorageError> {
        let in_sled = self.progress.counts.get(&(Table::Mvcc as u8)).copied().unwrap_or(0);
        // Whoever knows the older format alone would not look for the file.
        if in_sled > 0 || self.format < FROZEN_FORMAT {
            return super::write_in_batches(self, records);
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err(StorageError::Failed { dir: self.dir.clone() });
        }
        let mut records = records.peekable();
        if records.peek().is_none() {
            return Ok(());
        }
        let frozen = match self.frozen.take() {
            Some(frozen) => Ok(frozen),
            None => {
                // Its name has to be durable before sled may say that there is such a file.
                self.names_synced = false;
                let frozen = Frozen::create(&self.dir);
                frozen
                    .and_then(|frozen| self.sync_names().map(|()| frozen))
                    .map_err(ExtendError::Io)
            }
        };
        let extended = frozen.and_then(|mut frozen| {
            frozen.extend(&mut records)?;
            Ok(frozen)
        });
        match extended {
            Ok(frozen) => self.frozen = Some(frozen),
            Err(ExtendError::OutOfOrder) => {
                *self.failed.get_mut() = true;
                return Err(StorageError::Frozen);
            }
            Err(ExtendError::Io(source)) => {
                let error = self.io("write its frozen records", source);
                // Without space nothing was lost that sled knows of.
                self.sync_failed |= !error.is_full();
                return Err(error);
            }
        }
        self.frozen_grew = true;
        Ok(())
    }

    fn frozen_to(&self) -> Option<Bytes> {
        self.frozen.as_ref().map(|frozen| Bytes::copy_from_slice(frozen.last()))
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        self.call("flush", |db| db.flush())?;
        if let Err(source) = self.file.sync_data() {
            self.sync_failed = true;
            return Err(self.io("sync", source));
        }
        let mut blobs = fs::read_dir(self.dir.join("blobs"))
            .map_err(|source| self.io("list its blobs", source))?;
        if blobs.next().is_some() {
            // Such a file is not durable, and making it so is not in our hands.
            let source = io::Error::other("sled has put a page into a file of its own");
            return Err(self.io("sync", source));
        }
        if let Err(source) = self.sync_names() {
            self.sync_failed = true;
            return Err(self.io("sync its directory", source));
        }
        if let Err(source) = self.mark.advance(self.progress.writes) {
            self.sync_failed = true;
            return Err(self.io("sync its mark", source));
        }
        Ok(())
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        if let Some(frozen) = self.frozen_of(table).filter(|frozen| key <= frozen.last()) {
            let mut found = None;
            let scanned = frozen.scan(key, b"", &mut |at, value| {
                found = (at == key).then_some(value);
                ControlFlow::Break(())
            });
            return scanned.map(|_| found).map_err(|error| self.unreadable(error));
        }
        let key = stored_key(table as u8, key);
        let stored = self.call("read", |db| db.get(&key))?;
        stored.map(|stored| self.value_of(&key, &stored)).transpose()
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError> {
        if !to.is_empty() && from >= to {
            return Ok(());
        }
        if let Some(frozen) = self.frozen_of(table)
            && frozen.scan(from, to, visit).map_err(|error| self.unreadable(error))?.is_break()
        {
            return Ok(());
        }
        let start = stored_key(table as u8, from);
        let end = match to {
            b"" => vec![(table as u8).saturating_add(1)],
            _ => stored_key(table as u8, to),
        };
        let mut records = self.call("read", |db| Ok(db.range((Included(start), Excluded(end)))))?;
        let mut seen = 0_u64;
        while let Some((key, stored)) = self.call("read", |_| records.next().transpose())? {
            let value = self.value_of(&key, &stored)?;
            seen = seen.saturating_add(1);
            if visit(key.get(1..).unwrap_or_default(), value) == ControlFlow::Break(()) {
                return Ok(());
            }
        }
        let written = self.progress.counts.get(&(table as u8)).copied().unwrap_or(0);
        if from.is_empty() && to.is_empty() && seen != written {
            return Err(
                self.damaged(format!("table {table:?} has {seen} records of {written} written"))
            );
        }
        Ok(())
    }

    fn may_be_reopened(&mut self) -> bool {
        // This descriptor has been open since before the first write, so it is told of
        // every page that did not reach the disk.
        let panicked = self.panicked.load(Ordering::Relaxed);
        !panicked && !self.sync_failed && self.file.sync_data().is_ok()
    }

    fn size_on_disk(&self) -> Result<u64, StorageError> {
        let sizes = || -> io::Result<u64> {
            let mut total_bytes = 0_u64;
            for entry in fs::read_dir(&self.dir)? {
                let metadata = match entry?.metadata() {
                    Ok(metadata) => metadata,
                    // sled renames and removes files of its own.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                if metadata.is_file() {
                    total_bytes = total_bytes.saturating_add(metadata.len());
                }
            }
            Ok(total_bytes)
        };
        sizes().map_err(|source| StorageError::Io {
            dir: self.dir.clone(),
            action: "measure its size",
            source,
        })
    }
}

impl Drop for SledStorage {
    fn drop(&mut self) {
        let db = self.db.take();
        if self.panicked.load(Ordering::Relaxed) {
            mem::forget(db);
        } else if self.failed.load(Ordering::Relaxed) {
            close_after_error(&self.dir, db);
        } else if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
            // What was synced is safe, and nothing else was promised.
            tracing::warn!(dir = %self.dir.display(), "sled panicked while closing the checkpoint");
        }
    }
}

/// Closes a sled that has reported an error. It writes nothing more then, but has threads
/// to wait for.
fn close_after_error(dir: &Path, db: Option<sled::Db>) {
    let (closed, wait) = mpsc::sync_channel(1);
    let close = move || {
        // What a panic here would say is known: it has failed.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
        let _ = closed.send(());
    };
    // If there is no thread to be had, `db` is dropped here.
    let closing = thread::Builder::new().name("sled-close".to_owned()).spawn(close);
    if closing.is_ok() && wait.recv_timeout(CLOSE_PATIENCE).is_err() {
        tracing::warn!(dir = %dir.display(), "sled does not close after an error");
    }
}

/// Opens sled, and tells whether it holds nothing.
fn open_sled(dir: &Path) -> Result<(sled::Db, bool), StorageError> {
    let begun = Instant::now();
    loop {
        let open = || {
            sled::Config::new()
                .path(dir)
                .segment_size(SEGMENT_BYTES)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(Some(CLEAN_EVERY_MS))
                .use_compression(false)
                .open()
                .and_then(|db| db.first().map(|first| (db.clone(), first.is_none())))
        };
        match catch_unwind(open) {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) if is_locked(&error) => {
                if begun.elapsed() >= file_lock::PATIENCE {
                    return Err(StorageError::Locked { dir: dir.to_path_buf() });
                }
                thread::sleep(file_lock::RETRY);
            }
            Ok(Err(error)) => return Err(error_of(dir, "open it", error)),
            Err(panic) => {
                let detail = message_of(&*panic);
                return Err(StorageError::Damaged { dir: dir.to_path_buf(), detail });
            }
        }
    }
}

/// sled has no error of its own for this.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

fn error_of(dir: &Path, action: &'static str, error: sled::Error) -> StorageError {
    let dir = dir.to_path_buf();
    match error {
        sled::Error::Io(source) => StorageError::Io { dir, action, source },
        sled::Error::Unsupported(detail) => StorageError::Foreign { dir, detail },
        other => StorageError::Damaged { dir, detail: other.to_string() },
    }
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("sled gave up: {}", message.unwrap_or("for an unknown reason"))
}

/// Names a record in an error.
fn describe(stored_key: &[u8]) -> String {
    let (table, key) = stored_key.split_first().unwrap_or((&OWN_TABLE, &[]));
    format!("table {table}, key {}", key.escape_ascii())
}

fn sync_parent(parent: &Path) -> io::Result<()> {
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_panic_sled_is_left_alone() {
        let dir = tempfile::TempDir::new().unwrap();
        let mut storage = SledStorage::open(&dir.path().join("ckpt-1")).unwrap();
        let error = storage.call::<()>("read", |_| panic!("a page of no known kind")).unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("a page of no known kind"), "{error}");
        assert!(matches!(storage.get(Table::Head, b""), Err(StorageError::Failed { .. })));
        assert!(matches!(storage.write(Batch::new()), Err(StorageError::Failed { .. })));
        assert!(matches!(storage.sync(), Err(StorageError::Failed { .. })));
        drop(storage);
        let error = SledStorage::open(&dir.path().join("ckpt-1")).unwrap_err();
        assert!(matches!(error, StorageError::Locked { .. }), "never closed: {error}");
    }

    #[test]
    fn a_failed_sync_is_not_tried_again() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("ckpt-1");
        let mut storage = SledStorage::open(&path).unwrap();
        // As sled would for a page that is too large.
        fs::write(path.join("blobs").join("1"), "page").unwrap();
        assert!(matches!(storage.sync(), Err(StorageError::Io { .. })));
        fs::remove_file(path.join("blobs").join("1")).unwrap();
        assert!(matches!(storage.sync(), Err(StorageError::Failed { .. })));
    }
}
