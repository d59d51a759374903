//! The checkpoint: where the state is kept on disk, behind a narrow trait.
//!
//! What clients are told is durable lies in the log. The checkpoint spares a restart
//! from replaying all of it: every now and then the state's changes are written here
//! in batches, then synced, and from then on the log may forget what led to them.
//!
//! ```text
//! write(batch) write(batch) write(batch) sync()  write(batch) ── power cut
//! └──────────── survive, each batch whole ─────┘  └ survives whole, or not at all
//! ```
//!
//! A record is a value under a [`Table`] and a key. [`Storage`] has three
//! implementations that one suite of tests holds to the same behaviour:
//!
//! - [`SledStorage`] keeps records on disk, with sled 0.34.7.
//! - [`MemoryStorage`] keeps them in a map.
//! - [`FaultyStorage`] does too, and fails, or loses what was not synced, on demand.
//!
//! Reads see all earlier writes, synced or not. There is one writer; nothing here
//! starts a thread of its own (sled does). All calls block.

mod faulty;
mod frozen;
mod generations;
pub mod image;
mod mark;
mod memory;
mod record;
mod sled_storage;
pub mod spool;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use bytes::Bytes;

#[cfg(test)]
pub(crate) use faulty::{APPENDS_TO_LEFTOVERS, COUNTS_LEFTOVERS};
pub use faulty::{FaultyDisk, FaultyStorage};
pub use generations::{DiskGenerations, Generations, MemoryGenerations};
pub use memory::MemoryStorage;
pub use sled_storage::SledStorage;

/// How many changes a batch should hold at most. sled lets no reader of the process in
/// while it applies one, so it had better take less than a millisecond or two.
pub const BATCH_MAX_CHANGES: usize = 200;
/// How many bytes of keys and values a batch should hold at most.
pub const BATCH_MAX_BYTES: usize = 1 << 20;
/// The longest key there can be, in bytes.
pub const KEY_MAX_BYTES: usize = 4096;

/// What a record is about. The numbers are part of the format on disk: never change or
/// reuse one. (0 and 255 are the storage's own.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// How far the checkpoint has come: applied index and term, revisions, ConfState.
    Head = 1,
    /// Versions and tombstones by revision.
    Mvcc = 2,
    /// Leases by id.
    Lease = 3,
    /// Members by id.
    Member = 4,
    /// Ids that were members and must not come back.
    RemovedMember = 5,
    /// Alarms by member and kind.
    Alarm = 6,
    /// Whether authentication is on, and its revision.
    Auth = 7,
    /// Users by name.
    User = 8,
    /// Roles by name.
    Role = 9,
}

impl Table {
    /// The table of this number, if there is one.
    fn of_number(number: u8) -> Option<Table> {
        use Table::{Alarm, Auth, Head, Lease, Member, Mvcc, RemovedMember, Role, User};
        let all = [Head, Mvcc, Lease, Member, RemovedMember, Alarm, Auth, User, Role];
        all.into_iter().find(|table| *table as u8 == number)
    }
}

/// Changes to be made at once or not at all. The last change of a key counts.
///
/// A batch can grow without bound; the caller looks at [`Batch::is_full`] and starts
/// another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    changes: BTreeMap<(Table, Bytes), Option<Bytes>>,
    size_bytes: usize,
}

impl Batch {
    /// No changes.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Sets the value of a key.
    pub fn put(&mut self, table: Table, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.change(table, key.into(), Some(value.into()));
    }

    /// Removes a key. It need not exist.
    pub fn delete(&mut self, table: Table, key: impl Into<Bytes>) {
        self.change(table, key.into(), None);
    }

    /// How many keys it changes.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The bytes of all keys and values in it.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// Whether it is time to write it and begin another: it has
    /// [`BATCH_MAX_CHANGES`] or [`BATCH_MAX_BYTES`].
    pub fn is_full(&self) -> bool {
        self.len() >= BATCH_MAX_CHANGES || self.size_bytes >= BATCH_MAX_BYTES
    }

    fn change(&mut self, table: Table, key: Bytes, value: Option<Bytes>) {
        let value_bytes = value.as_ref().map_or(0, Bytes::len);
        let key_bytes = key.len();
        let replaced_bytes = match self.changes.entry((table, key)) {
            Entry::Vacant(entry) => {
                entry.insert(value);
                self.size_bytes += key_bytes;
                0
            }
            Entry::Occupied(mut entry) => entry.insert(value).map_or(0, |old| old.len()),
        };
        self.size_bytes = (self.size_bytes + value_bytes).saturating_sub(replaced_bytes);
    }

    /// Whether it changes a key of [`Table::Mvcc`] up to this one.
    fn changes_up_to(&self, last: Option<&[u8]>) -> bool {
        let first = self.changes.range((Table::Mvcc, Bytes::new())..).next();
        first.is_some_and(|((table, key), _)| *table == Table::Mvcc && Some(&key[..]) <= last)
    }

    /// The first key that is too long to be stored, if any: its table and length.
    fn oversized_key(&self) -> Option<(Table, usize)> {
        let mut keys = self.changes.keys();
        keys.find(|(_, key)| key.len() > KEY_MAX_BYTES).map(|(table, key)| (*table, key.len()))
    }
}

/// Writes records of [`Table::Mvcc`] in batches, as any other.
fn write_in_batches(
    storage: &mut dyn Storage,
    records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
) -> Result<(), StorageError> {
    let mut batch = Batch::new();
    for (key, value) in records {
        batch.put(Table::Mvcc, key, value);
        if batch.is_full() {
            storage.write(std::mem::take(&mut batch))?;
        }
    }
    if batch.is_empty() { Ok(()) } else { storage.write(batch) }
}

/// Receives the records of a scan; `Break` ends it.
pub type Visit<'a> = dyn FnMut(&[u8], Bytes) -> ControlFlow<()> + 'a;

/// Records on disk, or as if. See the module's documentation.
///
/// After a failed write or sync nothing is known about what was to be written, and
/// every further call may fail: drop the storage and open it anew, or give up.
pub trait Storage: Send {
    /// Makes all changes of a batch, or none. They are visible at once, and durable
    /// after the next [`Storage::sync`], or earlier.
    ///
    /// # Errors
    /// `KeyTooLong` before anything is changed; otherwise what the disk says.
    fn write(&mut self, batch: Batch) -> Result<(), StorageError>;

    /// Adds records of [`Table::Mvcc`] that are never changed: they come in the order of their
    /// keys, and after all that are there, from an iterator that may take its time. They take
    /// less space than others, and stay as they are: no batch may change a key up to
    /// [`Storage::frozen_to`]. They may become visible with the next batch, in which all of them
    /// are written or none; where a storage does without this, or has others in that table that
    /// are not frozen, they are written in batches of their own.
    ///
    /// # Errors
    /// What the disk says, or that they do not come in order.
    fn freeze(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), StorageError>;

    /// The last key of those in [`Table::Mvcc`] that cannot be changed or removed.
    fn frozen_to(&self) -> Option<Bytes>;

    /// Makes all earlier writes durable: they survive the loss of power.
    ///
    /// # Errors
    /// What the disk says. Never try again: the disk may have dropped what it could
    /// not write, and would report success.
    fn sync(&mut self) -> Result<(), StorageError>;

    /// The value of a key.
    ///
    /// # Errors
    /// `Damaged` when it is not what was written.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StorageError>;

    /// Visits the records of a table with `from <= key < to`, in the order of their
    /// keys. An empty `to` means the table's end.
    ///
    /// # Errors
    /// `Damaged` when a record is not what was written, or, at the end of an
    /// unbroken scan of the whole table, when there are not as many as were written.
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError>;

    /// After a failure: whether all that was synced is still there for certain, so that
    /// the storage may be dropped, opened again and gone on with. Otherwise the kernel may
    /// have lost pages that it goes on showing, and only a new copy is worth anything.
    fn may_be_reopened(&mut self) -> bool;

    /// The bytes it takes on disk.
    fn size_on_disk(&self) -> Result<u64, StorageError>;
}

impl StorageError {
    /// Whether what is on the disk is not what was written there, or not all of it. Another
    /// start would find the same.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            StorageError::Damaged { .. }
                | StorageError::CurrentDamaged { .. }
                | StorageError::Foreign { .. }
        )
    }

    /// Whether the disk has no space left: the same may succeed once it has.
    pub fn is_full(&self) -> bool {
        let StorageError::Io { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Why the checkpoint could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// Another server has it open, in this process or another.
    #[error(
        "checkpoint {} is in use by another server: stop that one, or give this member a \
         --data-dir of its own", .dir.display()
    )]
    Locked {
        /// The checkpoint's directory.
        dir: PathBuf,
    },
    /// What is there is not what was written.
    #[error("checkpoint {} is damaged ({detail}): keep it, and check the disk", .dir.display())]
    Damaged {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// Which part, and what is wrong with it.
        detail: String,
    },
    /// The file that names the checkpoint that counts is not what was written.
    #[error(
        "checkpoint {} is damaged (its file CURRENT does not name a checkpoint): keep it, and check \
         the disk", .dir.display()
    )]
    CurrentDamaged {
        /// The directory that the file is in.
        dir: PathBuf,
    },
    /// The directory holds something else.
    #[error(
        "{} does not hold a checkpoint of kvorum ({detail}): choose another --data-dir",
        .dir.display()
    )]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A newer version of kvorum wrote it.
    #[error(
        "{} has format {found}, this version of kvorum knows formats up to {known}: start the \
         version that wrote it, or a newer one. To go back to this version, save a snapshot with \
         the newer one (`kvorum snapshot save`) and restore it with this one into an empty \
         --data-dir (`kvorum snapshot restore`), for all members", .dir.display()
    )]
    NewerFormat {
        /// The checkpoint's directory, or the file that says it of the whole data directory.
        dir: PathBuf,
        /// The format it has.
        found: u32,
        /// The newest format this version reads.
        known: u32,
    },
    /// The operating system refused.
    #[error(
        "checkpoint {}: cannot {action}: {source}. Free or repair the disk, then start the \
         member again: the log still holds what the checkpoint lacks", .dir.display()
    )]
    Io {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// What was being done, as a verb.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// An earlier call failed, and this storage with it.
    #[error("checkpoint {}: not used any more after an earlier failure", .dir.display())]
    Failed {
        /// The checkpoint's directory.
        dir: PathBuf,
    },
    /// A key is among those that stay as they are, or comes before them.
    #[error("a key of table Mvcc is changed that is frozen, or frozen out of order")]
    Frozen,
    /// A key is longer than [`KEY_MAX_BYTES`].
    #[error("a key of {len} bytes in table {table:?}, where {KEY_MAX_BYTES} is the most")]
    KeyTooLong {
        /// The key's table.
        table: Table,
        /// The key's length.
        len: usize,
    },
}

#[cfg(test)]
mod tests;
