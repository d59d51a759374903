//! The store: every key's versions, the history of changes, and compaction.
//!
//! ```text
//!            tree (key -> chain of versions)           history (in revision order)
//!
//!   "a"      2: put   4: put                            2  a  put, created
//!   "b"      3: put   5: tombstone                      3  b  put, created
//!                                                       4  a  put      prev = a at 2
//!                                                       5  b  delete   prev = b at 3
//!
//!                                                counted: the 1st, 2nd and 4th change,
//!                                                which changed how many keys there are
//! ```
//!
//! Both hold handles to the same encoded `mvccpb.KeyValue`s: a value is encoded once, when
//! it is put, and its bytes go to the checkpoint, to readers and to watchers as they are.
//!
//! **Counting.** The tree counts the keys of the present. For a revision in the recent
//! past that count is corrected by the creates and deletes since, which `counted` finds in
//! the history.
//!
//! **Compaction** has two parts. [`Store::compact`] sets the logical mark, which is all
//! that any answer depends on. [`Store::compact_step`] frees memory later, a bounded piece
//! at a time, sparing what a pinned reader needs. It takes changes off the front of the
//! history and drops, for each, the version it replaced, and, if it is a delete, its
//! tombstone. That reaches all there is to drop: a version goes because a change below the
//! compact revision replaced it (or, a tombstone, because it is one), and that change is
//! in the history until the step that drops the version.
//!
//! Invariants:
//! - revisions in the history and in each chain ascend; none is above `revision`;
//! - the history holds every change at or above the compact revision, complete with the
//!   version it replaced, and every change below that still has something to drop;
//! - answers to equal questions at or above the compact revision do not depend on when,
//!   or whether, `compact_step` ran, nor on a restart between. (Sizes do.)
//!
//! What it does not do: leases (a lease is a number here), validation of requests, and
//! reading at a revision that is compacted or in the future: callers compare with
//! [`Store::compact_revision`] and [`Store::revision`] first.

use std::collections::VecDeque;

use bytes::Bytes;

use super::chain::Chain;
use super::record::{deletion, encode, key_within, record_bytes, size_bytes};
use super::tree::Tree;
use super::{Change, KeyRange, RangeEnd, Revision, Version};
use crate::error::Error;
use crate::pb::mvccpb::KeyValue;

/// Most creates and deletes remembered for counting in the past, in changes of 8 bytes
/// each. Counting further back answers `None`.
pub(super) const COUNTED_MAX: usize = 1 << 18;

/// A multi-version map from keys to values.
pub struct Store {
    pub(super) tree: Tree<Chain>,
    pub(super) revision: i64,
    pub(super) compact_revision: i64,
    /// Changes in revision order. Those below the compact revision are invisible and wait
    /// for `compact_step`.
    history: VecDeque<Change>,
    /// The number of the change at the front of `history`; numbers count all changes since
    /// this store was made or restored.
    history_start: u64,
    /// The numbers of those changes in `history` that created or deleted a key.
    counted: VecDeque<u64>,
    /// `counted` is complete above this main revision, as far as the history goes back.
    counted_above: i64,
    size_bytes: u64,
    /// Of that, what no reader can see: see [`Store::size_in_use_bytes`].
    spared_bytes: u64,
}

/// What one [`Store::compact_step`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CompactStep {
    /// The records that are gone from the store, to be removed from the checkpoint: at most
    /// two for each change looked at.
    pub removed: Vec<Revision>,
    /// Nothing is left to do for the present compact revision.
    pub done: bool,
}

impl Default for Store {
    fn default() -> Store {
        Store::new()
    }
}

impl Store {
    /// An empty store: revision 1, never compacted (compact revision -1).
    pub fn new() -> Store {
        Store {
            tree: Tree::new(),
            revision: 1,
            compact_revision: -1,
            history: VecDeque::new(),
            history_start: 0,
            counted: VecDeque::new(),
            counted_above: -1,
            size_bytes: 0,
            spared_bytes: 0,
        }
    }

    /// A store of these parts. `history` must satisfy the invariants at the head of the file.
    pub(super) fn from_parts(
        tree: Tree<Chain>,
        history: Vec<Change>,
        revision: i64,
        compact_revision: i64,
        size_bytes: u64,
    ) -> Store {
        let mut store = Store { tree, revision, compact_revision, size_bytes, ..Store::new() };
        for change in history {
            store.remember(change);
        }
        store.spared_bytes = store.spared_by_compaction_bytes();
        store
    }

    /// The revision of the last write; 1 before the first.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The revision of the last compaction, the oldest that can be read and watched from;
    /// -1 before the first.
    pub fn compact_revision(&self) -> i64 {
        self.compact_revision
    }

    /// The logical size of all records held, old versions included, in bytes: each
    /// record's revision key and its value. It shrinks as compaction frees memory.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// [`Store::size_bytes`] without the versions that changes exactly at the compact
    /// revision replaced: these are there for watchers that start at it, and nobody could
    /// free them. After a bulk delete and a compaction they are all the data there was.
    pub fn size_in_use_bytes(&self) -> u64 {
        self.size_bytes.saturating_sub(self.spared_bytes)
    }

    /// What the versions take that changes at the compact revision replaced. A key that was
    /// changed twice at it, which nested transactions can do, counts twice.
    fn spared_by_compaction_bytes(&self) -> u64 {
        let at = self.compact_revision;
        let from = self.history.partition_point(|change| change.revision.main < at);
        let changes = self.history.range(from..).take_while(|change| change.revision.main == at);
        changes.filter_map(|change| change.prev.as_deref()).map(record_bytes).sum()
    }

    /// How many keys exist at present.
    pub fn keys_total(&self) -> u64 {
        self.tree.live() as u64
    }

    /// The version of `key` as of revision `at`; `None` if it did not exist then.
    pub fn get(&self, key: &[u8], at: i64) -> Option<&Version> {
        self.tree.get(key)?.at(at)
    }

    /// Shows `visit` the versions in `range` as of revision `at`, in key order, at most
    /// `max` of them. If there are more, returns the key of the next one.
    pub fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        self.scan_step(range, at, max, usize::MAX, visit)
    }

    /// As [`Store::scan`], but looks at no more than `looked_max` keys, dead ones
    /// included, so that the time it takes is bounded: in the past, any number of keys
    /// that did not exist then may lie between two that did. A returned key is where to go
    /// on; it says that there *may* be more.
    pub fn scan_step(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        looked_max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        if range.is_empty() {
            return None;
        }
        let live_only = at >= self.revision;
        let (mut visited, mut looked) = (0, 0);
        for (key, chain) in self.tree.iter_from(&range.start, live_only) {
            if !range.end.is_after(&range.start, key) {
                return None;
            }
            if looked == looked_max {
                return Some(Bytes::copy_from_slice(key));
            }
            looked += 1;
            let Some(version) = chain.at(at) else { continue };
            if visited == max {
                return Some(Bytes::copy_from_slice(key));
            }
            visited += 1;
            visit(key, version);
        }
        None
    }

    /// How many keys in `range` existed at revision `at`. For the present this costs two
    /// descents of the tree; for the past, a look at each create and delete since. `None`
    /// if these are more than `budget` or no longer remembered: count by scanning then.
    pub fn count(&self, range: &KeyRange, at: i64, budget: usize) -> Option<u64> {
        if range.is_empty() {
            return Some(0);
        }
        let end = match &range.end {
            RangeEnd::Single => return Some(u64::from(self.get(&range.start, at).is_some())),
            RangeEnd::Before(end) => Some(end.as_ref()),
            RangeEnd::Open => None,
        };
        let present = self.tree.count(&range.start, end) as u64;
        if at >= self.revision {
            return Some(present);
        }
        if at < self.counted_above {
            return None;
        }
        let since = self.counted.partition_point(|number| {
            self.change(*number).is_some_and(|change| change.revision.main <= at)
        });
        if self.counted.len() - since > budget {
            return None;
        }
        let (mut created, mut deleted) = (0u64, 0u64);
        for change in self.counted.range(since..).filter_map(|number| self.change(*number)) {
            if range.contains(&change.key) {
                *(if change.deleted { &mut deleted } else { &mut created }) += 1;
            }
        }
        Some((present + deleted).saturating_sub(created))
    }

    /// The history from main revision `from_main` (or the compact revision, whichever is
    /// later), in revision order: at least `max_changes` of it if there is as much, and
    /// whole revisions always. Finding the start costs O(log n).
    pub fn changes(&self, from_main: i64, max_changes: usize) -> impl Iterator<Item = &Change> {
        let from = from_main.max(self.compact_revision);
        let start = self.history.partition_point(|change| change.revision.main < from);
        let mut taken = 0;
        let mut last_main = None;
        self.history.range(start..).take_while(move |change| {
            let more = taken < max_changes || last_main == Some(change.revision.main);
            taken += 1;
            last_main = Some(change.revision.main);
            more
        })
    }

    /// The history from `from` on, in revision order, compacted or not, as far as it is there.
    pub(super) fn history_from(&self, from: Revision) -> impl Iterator<Item = &Change> {
        let start = self.history.partition_point(|change| change.revision < from);
        self.history.range(start..)
    }

    /// The bytes of the versions that were replaced by changes from `from` on and below the
    /// compact revision: what a reader pinned there keeps from being freed, and, from the
    /// beginning, what compaction has yet to free, tombstones apart. Looks at `budget` changes;
    /// also returns where to go on.
    pub fn replaced_bytes(&self, from: Revision, budget: usize) -> (u64, Revision) {
        let (mut bytes, mut next) = (0, from);
        let compacted = |change: &&Change| change.revision.main < self.compact_revision;
        for change in self.history_from(from).take_while(compacted).take(budget) {
            bytes += change.prev.as_deref().map_or(0, record_bytes);
            next = Revision { sub: change.revision.sub + 1, ..change.revision };
        }
        (bytes, next)
    }

    /// Begins a write. All that it changes has one main revision.
    pub fn write(&mut self) -> WriteTxn<'_> {
        WriteTxn { main: self.revision + 1, next_sub: 0, store: self }
    }

    /// Marks everything below `revision` as compacted: [`Store::changes`] and
    /// [`Store::hash_kv`] see that at once. Memory is freed by [`Store::compact_step`].
    ///
    /// [`Error::Compacted`] if that was done before, [`Error::FutureRevision`] if
    /// `revision` is above the present one.
    pub fn compact(&mut self, revision: i64) -> Result<(), Error> {
        if revision <= self.compact_revision {
            return Err(Error::Compacted);
        }
        if revision > self.revision {
            return Err(Error::FutureRevision);
        }
        self.compact_revision = revision;
        self.spared_bytes = self.spared_by_compaction_bytes();
        Ok(())
    }

    /// Frees some of what the last compactions gave up, looking at no more than `budget`
    /// changes, which cost one to three microseconds each.
    ///
    /// `floor` is the lowest revision that a reader has pinned (`i64::MAX` without any):
    /// reads at `floor` and above go on finding all they need, compacted or not.
    pub fn compact_step(&mut self, floor: i64, budget: usize) -> CompactStep {
        let bound = self.compact_revision.min(floor);
        let mut step = CompactStep::default();
        for _ in 0..budget {
            let Some(change) = self.forget_below(bound) else { break };
            self.drop_replaced_by(&change, &mut step.removed);
        }
        step.done = self.oldest() >= self.compact_revision;
        if step.done {
            self.release_room();
        }
        step
    }

    /// Whether all that is left to remove is needed by a reader pinned at `floor`: then
    /// [`Store::compact_step`] does nothing before the floor rises.
    pub fn is_compaction_pinned(&self, floor: i64) -> bool {
        (floor..self.compact_revision).contains(&self.oldest())
    }

    /// The revision of the oldest change in the history.
    fn oldest(&self) -> i64 {
        self.history.front().map_or(i64::MAX, |change| change.revision.main)
    }

    /// Takes the oldest change off the history, if it is below `bound`.
    fn forget_below(&mut self, bound: i64) -> Option<Change> {
        if self.history.front()?.revision.main >= bound {
            return None;
        }
        let change = self.history.pop_front()?;
        if self.counted.front() == Some(&self.history_start) {
            self.counted.pop_front();
        }
        self.history_start += 1;
        Some(change)
    }

    /// Gives back the room that a history much longer than the present one has left.
    fn release_room(&mut self) {
        if self.history.len() < self.history.capacity() / 4 {
            self.history.shrink_to(self.history.len() * 2);
            self.counted.shrink_to(self.counted.len() * 2);
        }
    }

    /// Drops the version that `change` replaced, and the one it made if that is a
    /// tombstone: what compaction to just above it drops, all changes before it done.
    fn drop_replaced_by(&mut self, change: &Change, removed: &mut Vec<Revision>) {
        let key = change.key.as_ref();
        let mut freed_bytes = 0;
        let left = self.tree.update(key, |chain| {
            chain.compact(change.revision.main + 1, |version| {
                freed_bytes += size_bytes(key, version);
                removed.push(version.revision);
            })
        });
        self.size_bytes = self.size_bytes.saturating_sub(freed_bytes);
        if left == Some(false) {
            self.tree.remove(key);
        }
    }

    /// The change with this number, unless it is forgotten.
    fn change(&self, number: u64) -> Option<&Change> {
        self.history.get(usize::try_from(number.checked_sub(self.history_start)?).ok()?)
    }

    /// Appends `change` to the history.
    fn remember(&mut self, change: Change) {
        if change.created || change.deleted {
            self.counted.push_back(self.history_start + self.history.len() as u64);
        }
        self.history.push_back(change);
        if self.counted.len() > COUNTED_MAX
            && let Some(number) = self.counted.pop_front()
        {
            let main = self.change(number).map_or(self.revision, |change| change.revision.main);
            self.counted_above = self.counted_above.max(main);
        }
    }

    /// Puts `key` at `revision`; returns the encoded version it replaces.
    fn put(&mut self, revision: Revision, key: Bytes, value: Bytes, lease: i64) -> Option<Bytes> {
        let mut kv = KeyValue {
            key,
            create_revision: revision.main,
            mod_revision: revision.main,
            version: 1,
            value,
            lease,
        };
        // The key by a second handle, as `kv` goes into the closure.
        let key = kv.key.clone();
        let (encoded, prev, size_bytes) = self.tree.upsert(&key, |chain| {
            let replaced = chain.as_deref().and_then(Chain::live);
            let prev = replaced.map(|replaced| {
                kv.create_revision = replaced.create_revision;
                kv.version = replaced.version + 1;
                replaced.kv.clone()
            });
            let encoded = encode(&kv);
            let version = Version {
                revision,
                create_revision: kv.create_revision,
                version: kv.version,
                kv: encoded.clone(),
            };
            let size_bytes = size_bytes(&kv.key, &version);
            let new = match chain {
                Some(chain) => {
                    chain.push(version);
                    None
                }
                None => Some(Chain::One(version)),
            };
            (new, (encoded, prev, size_bytes))
        });
        self.size_bytes += size_bytes;
        self.remember(Change {
            revision,
            key: key_within(&encoded, key.len()),
            deleted: false,
            kv: encoded,
            created: prev.is_none(),
            prev: prev.clone(),
        });
        prev
    }

    /// Deletes `key`, which must exist, at `revision`; returns the encoded version that
    /// ends.
    fn delete(&mut self, revision: Revision, key: &[u8]) -> Option<Bytes> {
        let tombstone = Version::tombstone(revision);
        let size_bytes = size_bytes(key, &tombstone);
        let prev = self.tree.update(key, |chain| {
            let prev = chain.live()?.kv.clone();
            chain.push(tombstone);
            Some(prev)
        })??;
        self.size_bytes += size_bytes;
        self.remember(deletion(revision, key, Some(prev.clone())));
        Some(prev)
    }
}

/// A write in progress. What it changes is in the store at once, and cannot be undone:
/// check before. Reads through it see its own changes.
pub struct WriteTxn<'a> {
    store: &'a mut Store,
    main: i64,
    next_sub: i64,
}

impl WriteTxn<'_> {
    /// The revision at which reads see everything, own changes included: the store's, or,
    /// once something changed, the one this write makes.
    pub fn read_revision(&self) -> i64 {
        self.store.revision
    }

    /// As [`Store::compact_revision`].
    pub fn compact_revision(&self) -> i64 {
        self.store.compact_revision
    }

    /// The present version of `key`.
    pub fn get(&self, key: &[u8]) -> Option<&Version> {
        self.store.get(key, self.store.revision)
    }

    /// As [`Store::scan`].
    pub fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        self.store.scan(range, at, max, visit)
    }

    /// As [`Store::count`].
    pub fn count(&self, range: &KeyRange, at: i64, budget: usize) -> Option<u64> {
        self.store.count(range, at, budget)
    }

    /// Sets `key` to `value`, attached to `lease` (0: none). Returns the encoded version
    /// it replaces, if the key existed.
    pub fn put(&mut self, key: Bytes, value: Bytes, lease: i64) -> Option<Bytes> {
        let revision = self.next_revision();
        self.store.put(revision, key, value, lease)
    }

    /// Deletes all keys of `range`, in key order. Returns the encoded versions that end.
    pub fn delete_range(&mut self, range: &KeyRange) -> Vec<Bytes> {
        let mut keys: Vec<Box<[u8]>> = Vec::new();
        let at = self.store.revision;
        self.store.scan(range, at, usize::MAX, &mut |key, _| keys.push(key.into()));
        keys.iter()
            .filter_map(|key| {
                let revision = self.next_revision();
                self.store.delete(revision, key)
            })
            .collect()
    }

    /// Ends the write. Returns the store's revision and the changes made, in order; if
    /// there are none, the revision is what it was.
    pub fn commit(self) -> (i64, Vec<Change>) {
        let made = usize::try_from(self.next_sub).unwrap_or(usize::MAX);
        let history = &self.store.history;
        let changes = history.range(history.len().saturating_sub(made)..).cloned().collect();
        (self.store.revision, changes)
    }

    /// The revision of the next change, which is certain to be made.
    fn next_revision(&mut self) -> Revision {
        self.store.revision = self.main;
        let revision = Revision::new(self.main, self.next_sub);
        self.next_sub += 1;
        revision
    }
}
