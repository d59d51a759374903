//! All records of a store in revision order, a few at a time: what a checkpoint, an image for
//! another member, and etcd's bucket `key` hold.
//!
//! The tree is by key. What is in revision order is the history, and it begins at the compact
//! revision C:
//!
//! ```text
//!  revision   2   3   4   5   6   7 = C   8   9   10          at = 10
//!             ╰──── the base ────╯ ╰─── the history ───╯
//!             of each key the version  every change
//!             that C sees, if older
//! ```
//!
//! So the history is read as it is, and the base is gathered from the tree and sorted: a *window*
//! of it at a time, those records that come first after the last window. Each window takes a walk
//! over all keys, which looks at revisions alone and copies nothing but handles. So a base takes
//! `WINDOW_RECORDS` of memory and some walks; one that would take more than `WALKS_MAX` of these
//! has larger windows.
//!
//! What compaction has given up is left out, whether it is freed yet or not. What it spares for
//! watchers only, the versions replaced exactly at C, etcd does not have: they are in the base of
//! [`Store::walk`], and not in that of [`Store::walk_as_etcd`].

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::chain::Chain;
use super::record::{Record, record_bytes};
use super::store::Store;
use super::{Revision, Version};

/// Records in a window, unless there are no more: some 20 MiB.
const WINDOW_RECORDS: usize = 1 << 18;
/// Walks over the keys, about, however many there are.
const WALKS_MAX: usize = 16;

/// The records of a store as of one revision, in revision order. Between steps the store may be
/// written and compacted, as long as [`RevisionWalk::floor`] is respected by every
/// [`Store::compact_step`]; it may also be replaced by a later state of the same cluster that is
/// not compacted beyond that floor. What comes out does not depend on it.
#[derive(Debug, Clone)]
pub struct RevisionWalk {
    at: i64,
    base: Base,
    window_records: usize,
    phase: Phase,
}

/// Which records are in the base.
#[derive(Debug, Clone, Copy)]
struct Base {
    compact_revision: i64,
    as_etcd: bool,
}

#[derive(Debug, Clone)]
enum Phase {
    /// Gathers the base and gives it out, window by window.
    Base(Window),
    /// Reads the history.
    History {
        /// From here on.
        next: Revision,
        found: VecDeque<Record>,
        ended: bool,
    },
}

#[derive(Debug, Clone)]
struct Window {
    /// The last record of the windows before.
    after: Revision,
    /// Records from here on are for later windows.
    before: Option<Revision>,
    /// Where the walk over the keys goes on; `None` when it has seen all.
    next_key: Option<Bytes>,
    found: BTreeMap<Revision, Bytes>,
}

impl Store {
    /// Begins to walk all records as of the present revision: what [`Store::restore`] needs.
    pub fn walk(&self) -> RevisionWalk {
        RevisionWalk::new(self, false, self.window_records())
    }

    /// Begins to walk those records as of the present revision that etcd would have.
    pub fn walk_as_etcd(&self) -> RevisionWalk {
        RevisionWalk::new(self, true, self.window_records())
    }

    fn window_records(&self) -> usize {
        WINDOW_RECORDS.max(self.tree.live() / WALKS_MAX)
    }
}

impl RevisionWalk {
    pub(super) fn new(store: &Store, as_etcd: bool, window_records: usize) -> RevisionWalk {
        let compact_revision = store.compact_revision;
        let phase = if compact_revision < 0 {
            Phase::history(Revision::default())
        } else {
            Phase::Base(Window::after(Revision::default()))
        };
        let base = Base { compact_revision, as_etcd };
        RevisionWalk { at: store.revision, base, window_records, phase }
    }

    /// The revision the records are as of.
    pub fn revision(&self) -> i64 {
        self.at
    }

    /// The `floor` for [`Store::compact_step`] until the last step is done.
    pub fn floor(&self) -> i64 {
        self.base.compact_revision
    }

    /// Whether all records were taken.
    pub fn is_done(&self) -> bool {
        matches!(&self.phase, Phase::History { found, ended: true, .. } if found.is_empty())
    }

    /// Looks at `budget` further keys or changes of `store`, and ends earlier once changes of
    /// `max_bytes` are there to be taken. To be called when [`RevisionWalk::take`] has nothing.
    pub fn step(&mut self, store: &Store, budget: usize, max_bytes: usize) {
        if let Phase::Base(window) = &self.phase
            && window.is_spent()
        {
            self.phase = match window.before {
                Some(_) => Phase::Base(Window::after(window.after)),
                None => Phase::history(Revision::new(self.base.compact_revision, 0)),
            };
        }
        match &mut self.phase {
            Phase::Base(window) => window.gather(store, budget, self.base, self.window_records),
            Phase::History { next, found, ended } => {
                let mut bytes = 0;
                for (looked, change) in store.history_from(*next).enumerate() {
                    if change.revision.main > self.at {
                        break;
                    }
                    if looked >= budget || bytes >= max_bytes {
                        return;
                    }
                    let record = (change.revision, change.deleted, change.record());
                    bytes += record_bytes(&record.2) as usize;
                    found.push_back(record);
                    *next = Revision { sub: change.revision.sub + 1, ..change.revision };
                }
                *ended = true;
            }
        }
    }

    /// The record that comes next; `None` if it is not known before another step, or there are
    /// no more.
    pub fn take(&mut self) -> Option<Record> {
        match &mut self.phase {
            Phase::Base(window) if window.next_key.is_some() => None,
            Phase::Base(window) => {
                let (revision, kv) = window.found.pop_first()?;
                window.after = revision;
                Some((revision, false, kv))
            }
            Phase::History { found, .. } => found.pop_front(),
        }
    }
}

impl Phase {
    /// From this revision on.
    fn history(next: Revision) -> Phase {
        Phase::History { next, found: VecDeque::new(), ended: false }
    }
}

impl Base {
    /// The record of a key that is in the base, if there is one.
    fn of<'a>(&self, chain: &'a Chain) -> Option<&'a Version> {
        let version = match self.as_etcd {
            true => chain.at(self.compact_revision),
            // All others that are kept are the history's.
            false => chain.kept_by(self.compact_revision).next(),
        };
        version.filter(|version| version.revision.main < self.compact_revision)
    }
}

impl Window {
    /// What comes first after a revision.
    fn after(after: Revision) -> Window {
        let next_key = Some(Bytes::new());
        Window { after, before: None, next_key, found: BTreeMap::new() }
    }

    /// Whether it was gathered and taken.
    fn is_spent(&self) -> bool {
        self.next_key.is_none() && self.found.is_empty()
    }

    /// Looks at `budget` further keys.
    fn gather(&mut self, store: &Store, budget: usize, base: Base, records_max: usize) {
        let Some(start) = self.next_key.take() else { return };
        self.next_key = store.for_each_chain(&start, budget, |_, chain| {
            let Some(Version { revision, kv, .. }) = base.of(chain) else { return };
            if *revision <= self.after || self.before.is_some_and(|before| *revision >= before) {
                return;
            }
            self.found.insert(*revision, kv.clone());
            if self.found.len() > records_max
                && let Some((last, _)) = self.found.pop_last()
            {
                self.before = Some(last);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::record;
    use super::*;
    use crate::mvcc::KeyRange;

    /// Takes all, in steps of `budget`; `between` is done to the store between them.
    fn walked(
        store: &mut Store,
        as_etcd: bool,
        window_records: usize,
        budget: usize,
        mut between: impl FnMut(&mut Store, i64),
    ) -> Vec<Record> {
        let mut walk = RevisionWalk::new(store, as_etcd, window_records);
        let mut records = Vec::new();
        while !walk.is_done() {
            walk.step(store, budget, usize::MAX);
            records.extend(std::iter::from_fn(|| walk.take()));
            between(store, walk.floor());
        }
        records
    }

    /// 300 writes of a few keys, some deleted now and then, compacted to each revision in turn.
    fn store(compact_revision: i64) -> Store {
        let mut store = Store::new();
        for number in 0..300_u32 {
            let mut write = store.write();
            for sub in 0..1 + number % 3 {
                let key = Bytes::from(format!("key {}", (number * 7 + sub) % 40));
                if (number + sub) % 5 == 0 {
                    write.delete_range(&KeyRange::single(key));
                } else {
                    write.put(key, Bytes::from(vec![b'v'; number as usize % 50]), 0);
                }
            }
            write.commit();
        }
        if compact_revision > 0 {
            store.compact(compact_revision).unwrap();
        }
        store
    }

    /// What compaction keeps, from the tree.
    fn kept(store: &Store) -> Vec<Record> {
        let mut records = Vec::new();
        store.for_each_chain(b"", usize::MAX, |key, chain| {
            let kept = chain.kept_by(store.compact_revision());
            records.extend(kept.map(|version| record(key, version)));
        });
        records.sort_unstable_by_key(|record| record.0);
        records
    }

    /// What etcd keeps: all from the compact revision on, and what that revision sees.
    fn kept_by_etcd(store: &Store) -> Vec<Record> {
        let compacted = store.compact_revision();
        let is_kept = |record: &Record| {
            let (revision, deleted, kv) = record;
            let sees = || {
                let decoded = <crate::pb::mvccpb::KeyValue as prost::Message>::decode(kv.as_ref());
                store.get(&decoded.unwrap().key, compacted).map(|version| version.revision)
            };
            revision.main >= compacted || (!deleted && sees() == Some(*revision))
        };
        kept(store).into_iter().filter(is_kept).collect()
    }

    #[test]
    fn records_come_in_order_whatever_the_steps() {
        for compact_revision in [-1, 1, 2, 50, 150, 213, store(-1).revision()] {
            let mut store = store(compact_revision);
            for (as_etcd, expected) in [(false, kept(&store)), (true, kept_by_etcd(&store))] {
                for (window, budget) in [(1, 1), (2, 3), (5, 40), (7, 1000), (1000, 7)] {
                    let found = walked(&mut store, as_etcd, window, budget, |_, _| {});
                    assert_eq!(found, expected, "to {compact_revision}, {window}, {budget}");
                }
            }
        }
    }

    #[test]
    fn a_step_ends_when_it_has_found_so_many_bytes() {
        let store = store(150);
        let mut walk = store.walk();
        let mut steps = Vec::new();
        while !walk.is_done() {
            walk.step(&store, usize::MAX, 1);
            steps.push(std::iter::from_fn(|| walk.take()).count());
        }
        // The base, from which nothing can be taken before all of it is known; then one by one.
        let (base, history) = steps.split_first().unwrap();
        let is_one = |found: &usize| *found == 1;
        assert!(*base > 20 && history.iter().rev().skip(1).all(is_one), "{steps:?}");
    }

    #[test]
    fn writes_and_compactions_meanwhile_change_nothing() {
        for (as_etcd, expected) in [(false, kept(&store(150))), (true, kept_by_etcd(&store(150)))] {
            let mut store = store(150);
            let found = walked(&mut store, as_etcd, 4, 3, |store, floor| {
                let mut write = store.write();
                write.put(Bytes::from_static(b"key 3"), Bytes::from_static(b"new"), 0);
                write.delete_range(&KeyRange::single(Bytes::from_static(b"key 4")));
                let (revision, _) = write.commit();
                store.compact(revision).unwrap();
                store.compact_step(floor, 100);
            });
            assert_eq!(found, expected);
            // Nobody is in the way any more.
            assert!(store.compact_step(i64::MAX, usize::MAX).done);
            assert!(store.size_bytes() < 10_000);
        }
    }

    #[test]
    fn what_a_reader_keeps_from_being_freed_is_counted_in_steps() {
        let mut store = store(-1);
        let end = store.revision();
        store.compact(end).unwrap();
        let all = store.replaced_bytes(Revision::new(50, 0), usize::MAX);
        let (mut bytes, mut next) = (0, Revision::new(50, 0));
        loop {
            let (more, go_on) = store.replaced_bytes(next, 7);
            if go_on == next {
                break;
            }
            (bytes, next) = (bytes + more, go_on);
        }
        assert_eq!((bytes, next), all);
        let before = store.size_bytes();
        store.compact_step(50, usize::MAX);
        let pinned = store.size_bytes();
        store.compact_step(i64::MAX, usize::MAX);
        // And the tombstones that go with it.
        assert!(before > pinned && pinned - store.size_bytes() >= bytes && bytes > 1000);
    }
}
