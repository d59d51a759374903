//! How records are laid out in the checkpoint store, and how they are read back.
//!
//! | table  | key                                  | value                                    |
//! |--------|--------------------------------------|------------------------------------------|
//! | Head   | `head`                               | `kvorumpb.CheckpointHead`                |
//! | Mvcc   | main, 8 bytes; sub, 8 bytes          | 1 byte (1 for a tombstone), `KeyValue`   |
//! | Lease  | id, 8 bytes                          | `leasepb.Lease`                          |
//! | Member | id, 8 bytes                          | `kvorumpb.MemberRecord`                  |
//! | Auth, User, Role | as in etcd's buckets       | as in etcd's buckets                     |
//!
//! Numbers are big-endian, so records are in revision order.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use prost::Message;

use super::pins::{Pin, Pins};
use crate::log::Identity;
use crate::mvcc::{Record, Revision, RevisionWalk, Store, record_bytes};
use crate::pb::kvorumpb::{CheckpointHead, MemberRecord};
use crate::pb::leasepb::Lease;
use crate::state::{AuthRow, AuthTable, Cut, Restored, StateMachine};
use crate::storage::{BATCH_MAX_CHANGES, Batch, SledStorage, Storage, StorageError, Table};

/// Keys or changes that [`Records`] looks at in one hold of the state's lock, and
/// [`kept_bytes`].
const RECORDS_PER_STEP: usize = 4096;
/// Bytes of records that such a step ends after: as handles they keep what compaction frees.
const STEP_BYTES: usize = 1 << 20;

/// The key of the one record in the table Head.
pub const HEAD: &[u8] = b"head";

/// Why a checkpoint could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A record is not what its table holds, though its checksum is right.
    #[error("the checkpoint's table {table:?} holds a record that is none: {reason}")]
    Record {
        /// Where.
        table: Table,
        /// What is wrong with it.
        reason: String,
    },
}

/// The key of an MVCC record.
pub fn key(revision: Revision) -> Bytes {
    let mut key = Vec::with_capacity(16);
    key.extend_from_slice(&revision.main.to_be_bytes());
    key.extend_from_slice(&revision.sub.to_be_bytes());
    Bytes::from(key)
}

fn revision(key: &[u8]) -> Option<Revision> {
    let (main, sub) = key.split_at_checked(8)?;
    let main = i64::from_be_bytes(main.try_into().ok()?);
    let sub = i64::from_be_bytes(sub.try_into().ok()?);
    Some(Revision { main, sub })
}

/// The value of an MVCC record.
pub fn value(tombstone: bool, kv: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(1 + kv.len());
    value.push(u8::from(tombstone));
    value.extend_from_slice(kv);
    value
}

/// The table of the rows about `of`.
pub fn auth_table(of: AuthTable) -> Table {
    match of {
        AuthTable::Auth => Table::Auth,
        AuthTable::User => Table::User,
        AuthTable::Role => Table::Role,
    }
}

/// Writes a cut and makes it durable. What compaction removed is not deleted yet
/// ([`delete`]). Doing it again, after a failure, does no harm.
///
/// Records up to `held`, the revision of the checkpoint's head, are in it as far as they
/// are needed, and left out. One that was written anew is ahead of the cut's first records:
/// it lacks those among them that compaction removed meanwhile, and a crash between a
/// version written again and its tombstone would bring a key back.
///
/// Leases and head change together, in one batch that is as large as it takes: replayed
/// over leases that are gone already, the log would leave their keys behind.
///
/// # Errors
/// The store fails; the checkpoint is then the one before, or this one.
pub fn write(storage: &mut dyn Storage, cut: &Cut, held: i64) -> Result<(), StorageError> {
    #[cfg(test)]
    if HEAD_APART.get() {
        let mut batch = Batch::new();
        batch.put(Table::Head, HEAD, cut.head.encode_to_vec());
        storage.write(batch)?;
    }
    // An attempt that failed may have been written all the same.
    let frozen_to = storage.frozen_to();
    let mut records = new_records(cut, held)
        .map(|(revision, tombstone, kv)| (key(*revision), value(*tombstone, kv)))
        .filter(|(key, _)| frozen_to.as_ref().is_none_or(|frozen_to| key > frozen_to));
    storage.freeze(&mut records)?;
    write_rest(storage, cut, false)
}

/// The records of a cut that a checkpoint that holds this revision lacks.
fn new_records(cut: &Cut, held: i64) -> impl Iterator<Item = &Record> {
    cut.dirty.records.iter().filter(move |(revision, ..)| revision.main > held)
}

/// The bytes of the records that [`write()`] adds of a cut to a checkpoint that holds this
/// revision.
pub fn new_bytes(cut: &Cut, held: i64) -> u64 {
    new_records(cut, held).map(|(.., kv)| record_bytes(kv)).sum()
}

/// The bytes of the records that a checkpoint written anew has: without those that compaction
/// gave up and has yet to remove, which takes it a while. About: the state moves on while they
/// are counted, and tombstones that are to be removed count as kept. So does what is not
/// looked at in so many steps, of `RECORDS_PER_STEP` changes each.
pub fn kept_bytes(state: &RwLock<StateMachine>, steps_max: usize) -> u64 {
    let (mut kept_bytes, mut next) = (state.read().store().size_bytes(), Revision::default());
    for _ in 0..steps_max {
        let (bytes, after) = state.read().store().replaced_bytes(next, RECORDS_PER_STEP);
        if after == next {
            break;
        }
        (kept_bytes, next) = (kept_bytes.saturating_sub(bytes), after);
    }
    kept_bytes
}

/// Like [`write`], into an empty checkpoint, which does not count yet: no batch is larger
/// than others.
///
/// # Errors
/// The store fails.
pub fn fill(storage: &mut dyn Storage, cut: &Cut) -> Result<(), StorageError> {
    fill_with(storage, cut, &mut cut.dirty.records.iter().cloned())
}

/// Like [`fill`], with records that come from elsewhere than the cut.
///
/// # Errors
/// The store fails.
pub fn fill_with(
    storage: &mut dyn Storage,
    cut: &Cut,
    records: &mut dyn Iterator<Item = Record>,
) -> Result<(), StorageError> {
    let mut records =
        records.map(|(revision, tombstone, kv)| (key(revision), value(tombstone, &kv)));
    storage.freeze(&mut records)?;
    write_rest(storage, cut, true)
}

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: the applied index is written apart from what it speaks of.
    pub(crate) static HEAD_APART: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Writes what is no record of a version, and syncs.
fn write_rest(storage: &mut dyn Storage, cut: &Cut, is_new: bool) -> Result<(), StorageError> {
    let mut batch = Batch::new();
    for (id, lease) in &cut.dirty.leases {
        let id = Bytes::copy_from_slice(&id.to_be_bytes());
        match lease {
            Some(lease) => batch.put(Table::Lease, id, lease.encode_to_vec()),
            None => batch.delete(Table::Lease, id),
        }
        if is_new && batch.is_full() {
            storage.write(std::mem::take(&mut batch))?;
        }
    }
    // In a checkpoint that is not new they are already.
    for AuthRow { table, key, value } in cut.auth.iter().filter(|_| is_new) {
        batch.put(auth_table(*table), key.clone(), value.clone());
        if batch.is_full() {
            storage.write(std::mem::take(&mut batch))?;
        }
    }
    for member in &cut.members {
        let id = Bytes::copy_from_slice(&member.id.to_be_bytes());
        batch.put(Table::Member, id, member.encode_to_vec());
    }
    // Most are gone already; they are few, and a cut that was never written is made up for.
    for id in &cut.head.removed_members {
        batch.delete(Table::Member, Bytes::copy_from_slice(&id.to_be_bytes()));
    }
    batch.put(Table::Head, HEAD, cut.head.encode_to_vec());
    storage.write(batch)?;
    storage.sync()
}

/// Deletes the first of the records that a compaction has removed from the state, as many
/// as fit one batch, and returns how many. They are gone for good once the store is synced.
/// To be called once a durable head knows of the compaction. What a crash undoes, the next
/// start finds to be removed again.
///
/// The order is that of the compaction: a version goes before the tombstone that deleted
/// it, or a crash between the two would leave the version alone, and bring the key back.
///
/// Frozen records cannot be deleted, and a tombstone may be the end of one of them. Both
/// stay until the checkpoint is written anew, and each start compacts them once more.
///
/// # Errors
/// The store fails.
pub fn delete(
    storage: &mut dyn Storage,
    removed: impl IntoIterator<Item = Revision>,
) -> Result<usize, StorageError> {
    let frozen_to = storage.frozen_to();
    let (mut batch, mut count) = (Batch::new(), 0);
    for revision in removed {
        count += 1;
        let key = key(revision);
        if let Some(frozen_to) = &frozen_to
            && (key <= *frozen_to || is_tombstone(storage.get(Table::Mvcc, &key)?.as_deref()))
        {
            continue;
        }
        batch.delete(Table::Mvcc, key);
        if batch.is_full() {
            break;
        }
    }
    if !batch.is_empty() {
        storage.write(batch)?;
    }
    Ok(count)
}

fn is_tombstone(value: Option<&[u8]>) -> bool {
    value.and_then(<[u8]>::first) == Some(&1)
}

/// Everything the state holds, as a cut without records, and the records: what a new
/// checkpoint begins with.
///
/// What has changed since the last cut is in here, and in the next cut once more, of which
/// [`write()`] leaves it out.
pub fn image(state: &Arc<RwLock<StateMachine>>, pins: &Arc<Pins>) -> (Cut, Records) {
    let held = state.read();
    let walk = held.store().walk();
    let pin = pins.pin(walk.floor());
    (held.image_without_records(), Records { state: Arc::clone(state), walk, pin })
}

/// The records of a state as of one revision, in their order. They are read in steps,
/// between which the state may move on; it must not be replaced.
pub struct Records {
    state: Arc<RwLock<StateMachine>>,
    walk: RevisionWalk,
    pin: Pin,
}

impl Iterator for Records {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        while !self.walk.is_done() {
            if let Some(record) = self.walk.take() {
                return Some(record);
            }
            let state = self.state.read();
            debug_assert!(!self.pin.is_lost(), "who replaces the state is the one who reads this");
            self.walk.step(state.store(), RECORDS_PER_STEP, STEP_BYTES);
        }
        None
    }
}

/// Whether a checkpoint was ever completed: its head is written last.
///
/// # Errors
/// The store fails; also when it had a head, and has it no more.
pub fn has_head(storage: &dyn Storage) -> Result<bool, StorageError> {
    let mut is_there = false;
    storage.scan(Table::Head, b"", b"", &mut |key, _| {
        is_there |= key == HEAD;
        ControlFlow::Continue(())
    })?;
    Ok(is_there)
}

/// Reads the checkpoint back.
///
/// Records above the head's revision are leftovers of a checkpoint that was cut
/// short. They are deleted: the log is about to make them again.
///
/// # Errors
/// The store fails, or holds something that is not a checkpoint.
pub fn recover(storage: &mut dyn Storage) -> Result<Restored, RecoverError> {
    let head = storage.get(Table::Head, HEAD)?.ok_or_else(|| RecoverError::Record {
        table: Table::Head,
        reason: "it is empty".to_owned(),
    })?;
    let head: CheckpointHead = decode(Table::Head, head)?;
    let mut mvcc = Vec::new();
    let mut leftovers = Vec::new();
    for_each(storage, Table::Mvcc, |key, mut value| {
        let bad =
            |reason: &str| RecoverError::Record { table: Table::Mvcc, reason: reason.to_owned() };
        let revision = revision(key).ok_or_else(|| bad("its key is no revision"))?;
        if revision.main > head.revision {
            leftovers.push(revision);
            return Ok(());
        }
        if value.is_empty() {
            return Err(bad("it is empty"));
        }
        let tombstone = is_tombstone(Some(&value.split_to(1)));
        mvcc.push((revision, tombstone, value));
        Ok(())
    })?;
    for leftovers in leftovers.chunks(BATCH_MAX_CHANGES) {
        let mut batch = Batch::new();
        for revision in leftovers {
            batch.delete(Table::Mvcc, key(*revision));
        }
        storage.write(batch)?;
    }
    let store = Store::restore(mvcc, head.revision, head.compact_revision)
        .map_err(|error| RecoverError::Record { table: Table::Mvcc, reason: error.to_string() })?;
    let members: Vec<MemberRecord> = decode_all(storage, Table::Member)?;
    let leases: Vec<Lease> = decode_all(storage, Table::Lease)?;
    let mut auth = Vec::new();
    for table in [AuthTable::Auth, AuthTable::User, AuthTable::Role] {
        for_each(storage, auth_table(table), |key, value| {
            auth.push(AuthRow { table, key: Bytes::copy_from_slice(key), value });
            Ok(())
        })?;
    }
    Ok(Restored { head, members, leases, auth, store })
}

/// What can still be read of a damaged checkpoint; each part that is here is intact.
#[derive(Debug, Default)]
pub struct Legible {
    /// How far it goes.
    pub head: Option<CheckpointHead>,
    /// All members; none if one of them is illegible.
    pub members: Vec<MemberRecord>,
}

/// Whose checkpoint it is.
pub fn identity(head: &CheckpointHead) -> Identity {
    Identity { cluster_id: head.cluster_id, member_id: head.member_id }
}

/// Reads what can be read of a damaged checkpoint.
pub fn legible(dir: &Path) -> Legible {
    // To open it would begin one there.
    if !fs::read_dir(dir).is_ok_and(|mut names| names.next().is_some()) {
        return Legible::default();
    }
    let Ok(storage) = SledStorage::open(dir) else { return Legible::default() };
    let head = storage.get(Table::Head, HEAD).ok().flatten();
    Legible {
        head: head.and_then(|head| decode(Table::Head, head).ok()),
        members: decode_all(&storage, Table::Member).unwrap_or_default(),
    }
}

/// Shows `visit` all records of a table, until it fails.
fn for_each(
    storage: &dyn Storage,
    table: Table,
    mut visit: impl FnMut(&[u8], Bytes) -> Result<(), RecoverError>,
) -> Result<(), RecoverError> {
    let mut visited = Ok(());
    storage.scan(table, b"", b"", &mut |key, value| {
        visited = visit(key, value);
        if visited.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    visited
}

fn decode_all<M: Message + Default>(
    storage: &dyn Storage,
    table: Table,
) -> Result<Vec<M>, RecoverError> {
    let mut found = Vec::new();
    for_each(storage, table, |_, value| {
        found.push(decode(table, value)?);
        Ok(())
    })?;
    Ok(found)
}

fn decode<M: Message + Default>(table: Table, value: Bytes) -> Result<M, RecoverError> {
    M::decode(value).map_err(|error| RecoverError::Record { table, reason: error.to_string() })
}

#[cfg(test)]
mod tests;
