//! etcd's HashKV: one number that tells whether two members hold the same data.
//!
//! CRC-32C over the word `key`, and then, for the records up to the revision asked for, in
//! revision order, each record's revision key and value. Members may have got to different
//! points in freeing what was compacted, so records at or below the compact revision C
//! count only as far as compaction is certain to have kept them:
//!
//! ```text
//!                 C = 5      at = 8
//! a    2: put     4: put                 4 counts: the state of a at C and still at 8
//! b    3: put               7: put       3 does not: replaced by 7; 7 counts
//! c               5: tombstone           never counts: older etcd drops it, newer keeps it
//! d               5: put    8: delete    5 does not; 8 counts
//! ```
//!
//! etcd has one more rule: when *no* key exists at the revision asked for, the records at
//! or below C that compaction keeps all count (b's 3 and d's 5 in the picture, were a not
//! there and b deleted at 7). The hash that it works out while it compacts, to that revision,
//! has the same rule, but there a key deleted exactly at the revision is one that exists,
//! because compaction keeps its tombstone. What compaction spares for watchers only, the version
//! replaced exactly at C, is unknown to etcd and never counts.

use bytes::Bytes;

use super::record::{Record, record};
use super::store::Store;

/// HashKV under way, gathered in steps, so that the store is never held for long. Between
/// steps the store may be written and compacted, as long as [`HashKv::floor`] is respected
/// by every [`Store::compact_step`].
pub struct HashKv {
    at: i64,
    compact_revision: i64,
    /// Where the next step begins; `None` when all keys were seen.
    next_key: Option<Bytes>,
    records: Vec<Record>,
    /// Kept by compaction but replaced since: counted when no key exists at `at`.
    replaced: Vec<Record>,
    some_key_exists: bool,
    /// Whether a key deleted exactly at `at` is one that exists.
    tombstones_exist: bool,
}

impl HashKv {
    /// The revision hashed.
    pub fn revision(&self) -> i64 {
        self.at
    }

    /// The compact revision that belongs to the hash.
    pub fn compact_revision(&self) -> i64 {
        self.compact_revision
    }

    /// The `floor` for [`Store::compact_step`] until the last step is done.
    pub fn floor(&self) -> i64 {
        self.compact_revision
    }

    /// Looks at up to `budget` further keys of `store`, which must be the one the hash was
    /// begun with. Returns whether that was all.
    pub fn step(&mut self, store: &Store, budget: usize) -> bool {
        let Some(start) = self.next_key.take() else { return true };
        let (at, compact_revision) = (self.at, self.compact_revision);
        self.next_key = store.for_each_chain(&start, budget, |key, chain| {
            let mut versions = chain
                .kept_by(compact_revision)
                .take_while(|version| version.revision.main <= at)
                .peekable();
            while let Some(version) = versions.next() {
                let next = versions.peek();
                let (main, put) = (version.revision.main, !version.is_tombstone());
                self.some_key_exists |=
                    next.is_none() && (put || (self.tombstones_exist && main == at));
                if main > compact_revision || (put && next.is_none()) {
                    self.records.push(record(key, version));
                } else if put
                    && !self.some_key_exists
                    && next.is_some_and(|next| next.revision.main > compact_revision)
                {
                    self.replaced.push(record(key, version));
                }
            }
        });
        if self.some_key_exists {
            self.replaced = Vec::new();
        }
        self.next_key.is_none()
    }

    /// The hash, once the steps are done. Needs the store no more.
    pub fn finish(mut self) -> u32 {
        self.records.append(&mut self.replaced);
        self.records.sort_unstable_by_key(|record| record.0);
        self.records.iter().fold(crc32c::crc32c(b"key"), |crc, (revision, tombstone, kv)| {
            let crc = crc32c::crc32c_append(crc, &revision.record_key(*tombstone));
            crc32c::crc32c_append(crc, kv)
        })
    }
}

impl Store {
    /// Begins HashKV as of revision `at`, which must be neither compacted nor in the future.
    pub fn hash_kv_begin(&self, at: i64) -> HashKv {
        HashKv {
            at,
            compact_revision: self.compact_revision,
            next_key: Some(Bytes::new()),
            records: Vec::new(),
            replaced: Vec::new(),
            some_key_exists: false,
            tombstones_exist: false,
        }
    }

    /// Begins the hash that goes with compaction to revision `at`, before the compaction
    /// takes effect.
    pub fn compaction_hash_begin(&self, at: i64) -> HashKv {
        HashKv { tombstones_exist: true, ..self.hash_kv_begin(at) }
    }

    /// HashKV as of revision `at`, which must be neither compacted nor in the future, in
    /// one go; see [`Store::hash_kv_begin`] for steps.
    pub fn hash_kv(&self, at: i64) -> u32 {
        let mut hash = self.hash_kv_begin(at);
        hash.step(self, usize::MAX);
        hash.finish()
    }
}
