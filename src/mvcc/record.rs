//! Records: the versions of a store as bytes, for checkpoints and snapshots.
//!
//! A record is a revision, whether it is a tombstone, and an encoded `mvccpb.KeyValue`:
//! the put version in full, or, for a tombstone, the key alone. In etcd's `key` bucket it
//! is stored under its revision:
//!
//! ```text
//! 8 bytes main, big-endian | '_' | 8 bytes sub, big-endian | 't' if a tombstone
//! ```
//!
//! All records of a store in revision order are all there is to know of it, besides its
//! revision and its compact revision: [`Store::restore`] is the inverse of
//! [`Store::walk`]. The latter leaves out what compaction has given up, whether freed
//! yet or not, so that equal stores have equal records.

use bytes::Bytes;
use prost::Message;
use prost::encoding::{self, WireType};

use super::chain::Chain;
use super::store::Store;
use super::tree::Tree;
use super::{Change, Revision, Version};
use crate::pb::mvccpb::KeyValue;

/// A stored record: its revision, whether it is a tombstone, and the encoded `KeyValue`.
pub type Record = (Revision, bool, Bytes);

/// Why records are not those of a store: they were damaged, or are not all there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The revision or the compact revision cannot be.
    #[error(
        "revision {revision} with compact revision {compact_revision}: the revision must be \
         at least 1 and not below the compact revision"
    )]
    Revision {
        /// The store's revision, as given.
        revision: i64,
        /// The store's compact revision, as given.
        compact_revision: i64,
    },
    /// A record does not come after the one before it.
    #[error("record {}.{}: out of order, after {}.{}", .found.main, .found.sub, .last.main, .last.sub)]
    OutOfOrder {
        /// The record's revision.
        found: Revision,
        /// The revision of the record before.
        last: Revision,
    },
    /// A record is newer than the store.
    #[error("record {}.{}: newer than the store, which is at revision {revision}", .found.main, .found.sub)]
    Future {
        /// The record's revision.
        found: Revision,
        /// The store's revision, as given.
        revision: i64,
    },
    /// A record's value is not the `KeyValue` that belongs there.
    #[error("record {}.{}: {problem}", .found.main, .found.sub)]
    Damaged {
        /// The record's revision.
        found: Revision,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Store {
    /// All records, in revision order, in one go; see [`Store::walk`] for steps.
    #[cfg(test)]
    pub fn records(&self) -> impl Iterator<Item = Record> + use<'_> {
        let mut walk = self.walk();
        std::iter::from_fn(move || {
            while !walk.is_done() {
                if let Some(record) = walk.take() {
                    return Some(record);
                }
                walk.step(self, usize::MAX, usize::MAX);
            }
            None
        })
    }

    /// The store that has these records, which must come in revision order, and these
    /// revisions. Records that compaction has given up may be among them, or not.
    ///
    /// The store keeps the `Bytes` it is given: as slices they would keep the buffers they
    /// were cut from.
    pub fn restore(
        records: impl IntoIterator<Item = Record>,
        revision: i64,
        compact_revision: i64,
    ) -> Result<Store, RestoreError> {
        if revision < 1 || compact_revision > revision {
            return Err(RestoreError::Revision { revision, compact_revision });
        }
        let mut versions = Vec::new();
        let mut last = Revision::default();
        for (found, tombstone, kv) in records {
            if found <= last {
                return Err(RestoreError::OutOfOrder { found, last });
            }
            if found.main > revision {
                return Err(RestoreError::Future { found, revision });
            }
            last = found;
            versions.push(decode(found, tombstone, kv)?);
        }
        // By key, and within a key by revision, as the sort is stable.
        versions.sort_by(|(left, _), (right, _)| left.cmp(right));

        let mut history = Vec::new();
        let mut size_total_bytes = 0;
        let mut versions = versions.into_iter().peekable();
        let chains = std::iter::from_fn(|| {
            let (key, first) = versions.next()?;
            let mut replaced: Option<&Version> = None;
            let mut chain = Chain::One(first);
            while let Some((_, version)) = versions.next_if(|(next, _)| *next == key) {
                chain.push(version);
            }
            for version in chain.versions() {
                size_total_bytes += size_bytes(&key, version);
                // The history, and what `compact_step` has to look at.
                if version.revision.main >= compact_revision
                    || version.is_tombstone()
                    || replaced.is_some()
                {
                    let prev = replaced.filter(|replaced| !replaced.is_tombstone());
                    history.push(change(&key, version, prev.map(|prev| prev.kv.clone())));
                }
                replaced = Some(version);
            }
            Some((key, chain))
        });
        let tree = Tree::from_sorted(chains);
        history.sort_unstable_by_key(|change| change.revision);
        Ok(Store::from_parts(tree, history, revision, compact_revision, size_total_bytes))
    }

    /// Shows `visit` up to `budget` keys from `start` on, dead ones included. Returns the
    /// key to go on from, if there are more.
    pub(super) fn for_each_chain(
        &self,
        start: &[u8],
        budget: usize,
        mut visit: impl FnMut(&[u8], &Chain),
    ) -> Option<Bytes> {
        let mut chains = self.tree.iter_from(start, false);
        chains.by_ref().take(budget).for_each(|(key, chain)| visit(key, chain));
        chains.next().map(|(key, _)| Bytes::copy_from_slice(key))
    }
}

/// What the index needs of a `KeyValue`. The value is skipped, not copied.
#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(int64, tag = "2")]
    create_revision: i64,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(int64, tag = "4")]
    version: i64,
}

/// Whether a record is one that [`Store::restore`] takes; it has to come after those before it,
/// too. Returns its key.
///
/// # Errors
/// [`RestoreError::Damaged`].
pub fn check(found: Revision, tombstone: bool, kv: &Bytes) -> Result<Box<[u8]>, RestoreError> {
    decode(found, tombstone, kv.clone()).map(|(key, _)| key)
}

/// The version a record holds, and its key.
fn decode(
    found: Revision,
    tombstone: bool,
    kv: Bytes,
) -> Result<(Box<[u8]>, Version), RestoreError> {
    let damaged = |problem| RestoreError::Damaged { found, problem };
    // Restoring with a higher revision leaves such a record (`etcdutl snapshot restore
    // --bump-revision`): to etcd it is a put of the key without a name, which no request can
    // name, and it is part of its hashes.
    if kv.is_empty() && !tombstone {
        let version = Version { revision: found, create_revision: found.main, version: 1, kv };
        return Ok((Box::default(), version));
    }
    let head = Head::decode(kv.as_ref()).map_err(|_| damaged("it is not a KeyValue"))?;
    if head.key.is_empty() {
        return Err(damaged("it has no key"));
    }
    let key = head.key.into_boxed_slice();
    if tombstone {
        return Ok((key, Version::tombstone(found)));
    }
    let Head { create_revision, version, .. } = head;
    if head.mod_revision != found.main {
        return Err(damaged("its mod_revision is not its revision"));
    }
    if version < 1 || !(1..=found.main).contains(&create_revision) {
        return Err(damaged("its version or create_revision cannot be"));
    }
    Ok((key, Version { revision: found, create_revision, version, kv }))
}

/// The change that made `version`, which replaced `prev`.
fn change(key: &[u8], version: &Version, prev: Option<Bytes>) -> Change {
    if version.is_tombstone() {
        return deletion(version.revision, key, prev);
    }
    Change {
        revision: version.revision,
        key: key_within(&version.kv, key.len()),
        deleted: false,
        kv: version.kv.clone(),
        prev,
        created: version.version == 1,
    }
}

/// The change that deletes `key`, which had the encoded version `prev`.
pub(super) fn deletion(revision: Revision, key: &[u8], prev: Option<Bytes>) -> Change {
    let key_len = key.len();
    let key = Bytes::copy_from_slice(key);
    let kv = encode(&KeyValue { key, mod_revision: revision.main, ..KeyValue::default() });
    let key = key_within(&kv, key_len);
    Change { revision, key, deleted: true, kv, prev, created: false }
}

/// The record of `version`, a version of `key`.
pub(super) fn record(key: &[u8], version: &Version) -> Record {
    let deleted = version.is_tombstone();
    (version.revision, deleted, if deleted { tombstone(key) } else { version.kv.clone() })
}

/// The stored value of a tombstone of `key`.
pub(super) fn tombstone(key: &[u8]) -> Bytes {
    encode(&KeyValue { key: Bytes::copy_from_slice(key), ..KeyValue::default() })
}

/// `kv` in its wire form, in one allocation of exactly its size.
pub(super) fn encode(kv: &KeyValue) -> Bytes {
    Bytes::from(kv.encode_to_vec())
}

/// The key of an encoded `KeyValue`, as a slice of it: its first field.
pub(super) fn key_within(kv: &Bytes, key_len: usize) -> Bytes {
    let key_start = if key_len == 0 { 0 } else { 1 + prost::length_delimiter_len(key_len) };
    kv.slice(key_start..key_start + key_len)
}

/// The length of the value of an encoded `KeyValue`, without copying it.
pub(super) fn value_len(kv: &[u8]) -> usize {
    const VALUE: u32 = 5;
    let mut rest = kv;
    while let Ok((field, wire_type)) = encoding::decode_key(&mut rest) {
        let Ok(number) = encoding::decode_varint(&mut rest) else { break };
        if wire_type == WireType::LengthDelimited {
            let len = usize::try_from(number).unwrap_or(usize::MAX);
            if field == VALUE {
                return len;
            }
            rest = rest.get(len..).unwrap_or_default();
        }
    }
    0
}

/// The size of the record of `version`, a version of `key`: revision key and value.
pub(super) fn size_bytes(key: &[u8], version: &Version) -> u64 {
    let size = if !version.is_tombstone() {
        return record_bytes(&version.kv);
    } else if key.is_empty() {
        REVISION_KEY_BYTES + 1
    } else {
        REVISION_KEY_BYTES + 1 + 1 + prost::length_delimiter_len(key.len()) + key.len()
    };
    size as u64
}

/// The size of a record, from its encoded form; a tombstone's is a byte more.
pub fn record_bytes(kv: &[u8]) -> u64 {
    (REVISION_KEY_BYTES + kv.len()) as u64
}

/// The length of a record's revision key, without a tombstone's mark.
const REVISION_KEY_BYTES: usize = 17;

impl Revision {
    /// The key under which etcd stores the record of this revision. Keys sort as
    /// revisions do.
    pub fn record_key(self, tombstone: bool) -> Vec<u8> {
        let mark: &[u8] = if tombstone { b"t" } else { b"" };
        let (main, sub) = (self.main.to_be_bytes(), self.sub.to_be_bytes());
        [main.as_slice(), b"_", sub.as_slice(), mark].concat()
    }
}
