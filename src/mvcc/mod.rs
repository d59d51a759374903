//! Multi-version concurrency control: keys, their versions, and their history.
//!
//! Every write gets a *revision*, a number that counts the writes of the whole store.
//! A key is a chain of versions, one per write that touched it; a delete ends a
//! *generation* with a tombstone, and the next put begins a new one:
//!
//! ```text
//! revision      2        3        4        5        6
//! "a"        put v1   put v2              delete
//! "b"                          put v1             put v2
//!
//! read at 3:  a = v2                 create_revision 2, version 2
//! read at 4:  a = v2, b = v1
//! read at 5:  b = v1
//! ```
//!
//! So any revision can be read, and watched from, until it is compacted away.
//!
//! This module is pure: no clock, thread, randomness, file or socket. Equal calls on
//! equal stores give equal answers on every member of a cluster.
//!
//! The words here are etcd's: [`Revision`], [`KeyRange`] (a request's `key` and
//! `range_end`), [`Version`] (what a reader sees), [`Change`] (what a watcher sees).

mod by_revision;
mod chain;
mod hash;
mod keys;
mod record;
mod store;
mod tree;
pub mod watch;

#[cfg(test)]
mod tests;

use bytes::Bytes;

pub use by_revision::RevisionWalk;
pub use hash::HashKv;
pub use record::{Record, RestoreError, check as check_record, record_bytes};
pub use store::{CompactStep, Store, WriteTxn};

/// When a change happened: the write, and its place within that write.
///
/// Clients see `main` only (`mod_revision`, `create_revision`, header revision).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision {
    /// Counts the writes of the store; the first one is 2.
    pub main: i64,
    /// Counts the changes of one write, from 0, in the order they were made.
    pub sub: i64,
}

impl Revision {
    /// The revision `main`, change `sub`.
    pub fn new(main: i64, sub: i64) -> Revision {
        Revision { main, sub }
    }
}

/// Where a [`KeyRange`] ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RangeEnd {
    /// At its start: the range is that one key.
    Single,
    /// Just before this key.
    Before(Bytes),
    /// Nowhere: all keys from the start on.
    Open,
}

impl RangeEnd {
    /// Whether `key` lies before this end of a range that begins at `start`.
    fn is_after(&self, start: &[u8], key: &[u8]) -> bool {
        match self {
            RangeEnd::Single => key <= start,
            RangeEnd::Before(end) => key < end.as_ref(),
            RangeEnd::Open => true,
        }
    }
}

/// A set of neighbouring keys: one key, `[start, end)`, or everything from `start` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key of the range.
    pub start: Bytes,
    /// Where it ends.
    pub end: RangeEnd,
}

impl KeyRange {
    /// Exactly `key`.
    pub fn single(key: Bytes) -> KeyRange {
        KeyRange { start: key, end: RangeEnd::Single }
    }

    /// The range a request means: an empty `range_end` is the single key, one zero
    /// byte is all keys `>= key`, anything else ends the range, exclusively. A
    /// `range_end <= key` is an empty range, which is no error.
    pub fn from_wire(key: Bytes, range_end: Bytes) -> KeyRange {
        let end = match range_end.as_ref() {
            b"" => RangeEnd::Single,
            b"\0" => RangeEnd::Open,
            _ => RangeEnd::Before(range_end),
        };
        KeyRange { start: key, end }
    }

    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        self.start.as_ref() <= key && self.end.is_after(&self.start, key)
    }

    /// Whether no key can lie in the range.
    pub fn is_empty(&self) -> bool {
        !self.contains(&self.start)
    }
}

/// One version of one key, as readers see it. Tombstones are not versions to a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The change that made it.
    pub revision: Revision,
    /// The revision of the put that began this generation of the key.
    pub create_revision: i64,
    /// Counts the puts of this generation, from 1.
    pub version: i64,
    /// The encoded `mvccpb.KeyValue`, byte for byte what etcd stores and sends.
    pub kv: Bytes,
}

/// One change of the history. Handles only: a clone copies no key and no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// When it happened.
    pub revision: Revision,
    /// The key that changed.
    pub key: Bytes,
    /// Whether the key was deleted; otherwise it was put.
    pub deleted: bool,
    /// The encoded `mvccpb.KeyValue` as an event carries it: what was put, or, for a
    /// delete, the key and `mod_revision` alone.
    pub kv: Bytes,
    /// The encoded version this change replaced; `None` when the key did not exist.
    pub prev: Option<Bytes>,
    /// Whether this is a put of a key that did not exist just before.
    pub created: bool,
}

impl Change {
    /// The record to store for this change: the put version as it is, or, for a
    /// delete, a `mvccpb.KeyValue` that holds the key alone.
    pub fn record(&self) -> Bytes {
        if self.deleted { record::tombstone(&self.key) } else { self.kv.clone() }
    }

    /// The length of the value that was put, in bytes; 0 for a delete.
    pub fn value_len(&self) -> usize {
        record::value_len(&self.kv)
    }
}
