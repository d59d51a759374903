//! All records of a store in revision order, a few at a time: the rows of etcd's bucket `key`.
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
//! over all keys, which looks at revisions alone and copies nothing but handles, so that a base
//! of any size takes `WINDOW_RECORDS` of memory, and some walks.
//!
//! What compaction has given up is left out, whether it is freed yet or not, and so is what it
//! spares for watchers only, the versions replaced exactly at C: etcd does not have them.

use bytes::Bytes;

use super::Revision;
use super::record::{Record, record_bytes};
use super::store::Store;

/// Records in a window, at least (twice as many at most), unless there are no more: 12 MiB to 24.
const WINDOW_RECORDS: usize = 1 << 18;

/// The records of a store as of one revision, in revision order. Between steps the store may be
/// written and compacted, as long as [`RevisionWalk::floor`] is respected by every
/// [`Store::compact_step`]; it may also be replaced by a later state of the same cluster that is
/// not compacted beyond that floor. What comes out does not depend on it.
#[derive(Debug, Clone)]
pub struct RevisionWalk {
    at: i64,
    compact_revision: i64,
    window_records: usize,
    phase: Phase,
}

#[derive(Debug, Clone)]
enum Phase {
    /// Gathers a window of the base.
    Base(Window),
    /// Reads the history from here on.
    History(Revision, Vec<Record>),
    Done(Vec<Record>),
}

#[derive(Debug, Clone, Default)]
struct Window {
    /// The last record of the windows before.
    after: Revision,
    /// Records from here on are for later windows.
    before: Option<Revision>,
    /// Where the walk over the keys goes on; `None` when it has seen all.
    next_key: Option<Bytes>,
    found: Vec<(Revision, Bytes)>,
}

impl Store {
    /// Begins to walk all records as of the present revision.
    pub fn revision_walk(&self) -> RevisionWalk {
        RevisionWalk::new(self, WINDOW_RECORDS)
    }
}

impl RevisionWalk {
    pub(super) fn new(store: &Store, window_records: usize) -> RevisionWalk {
        let window = Window { next_key: Some(Bytes::new()), ..Window::default() };
        RevisionWalk {
            at: store.revision,
            compact_revision: store.compact_revision,
            window_records,
            phase: Phase::Base(window),
        }
    }

    /// The revision the records are as of.
    pub fn revision(&self) -> i64 {
        self.at
    }

    /// The `floor` for [`Store::compact_step`] until the last step is done.
    pub fn floor(&self) -> i64 {
        self.compact_revision
    }

    /// Whether all records were taken.
    pub fn is_done(&self) -> bool {
        matches!(&self.phase, Phase::Done(found) if found.is_empty())
    }

    /// Looks at `budget` further keys or changes of `store`, and ends earlier once changes of
    /// `max_bytes` are there to be taken. To be followed by [`RevisionWalk::take`].
    pub fn step(&mut self, store: &Store, budget: usize, max_bytes: usize) {
        let (at, compact_revision) = (self.at, self.compact_revision);
        match &mut self.phase {
            Phase::Base(window) => window.gather(store, compact_revision, budget),
            Phase::History(from, found) => {
                let (mut bytes, mut looked) = (0, 0);
                for change in store.history_from(*from) {
                    if change.revision.main > at {
                        break;
                    }
                    if looked >= budget || bytes >= max_bytes {
                        return;
                    }
                    looked += 1;
                    let record = (change.revision, change.deleted, change.record());
                    bytes += record_bytes(&record.2) as usize;
                    found.push(record);
                    *from = Revision { sub: change.revision.sub + 1, ..change.revision };
                }
                self.phase = Phase::Done(std::mem::take(found));
            }
            Phase::Done(_) => {}
        }
    }

    /// The records that come next, as far as they are known after the last step: maybe none.
    /// Needs the store no more, and can take some ten milliseconds, for it sorts.
    pub fn take(&mut self) -> Vec<Record> {
        match &mut self.phase {
            Phase::Base(window) if window.next_key.is_some() => {
                window.narrow(self.window_records);
                Vec::new()
            }
            Phase::Base(window) => {
                let mut found = std::mem::take(&mut window.found);
                found.sort_unstable_by_key(|(revision, _)| *revision);
                match (window.before, found.last()) {
                    (Some(_), Some((after, _))) => {
                        let next_key = Some(Bytes::new());
                        *window = Window { after: *after, next_key, ..Window::default() };
                    }
                    _ => {
                        let from = Revision::new(self.compact_revision, 0);
                        self.phase = Phase::History(from, Vec::new());
                    }
                }
                found.into_iter().map(|(revision, kv)| (revision, false, kv)).collect()
            }
            Phase::History(_, found) | Phase::Done(found) => std::mem::take(found),
        }
    }
}

impl Window {
    fn gather(&mut self, store: &Store, compact_revision: i64, budget: usize) {
        let Some(start) = self.next_key.take() else { return };
        let (after, before) = (self.after, self.before);
        // Nothing is older than a compaction that there never was.
        if compact_revision < 0 {
            return;
        }
        self.next_key = store.for_each_chain(&start, budget, |_, chain| {
            let seen = chain.at(compact_revision);
            let older = seen.filter(|version| version.revision.main < compact_revision);
            if let Some(version) = older
                && version.revision > after
                && before.is_none_or(|before| version.revision < before)
            {
                self.found.push((version.revision, version.kv.clone()));
            }
        });
    }

    /// Keeps the first of what was found, once it is too much.
    fn narrow(&mut self, records: usize) {
        if self.found.len() < 2 * records {
            return;
        }
        let (_, next, _) = self.found.select_nth_unstable_by_key(records, |found| found.0);
        self.before = Some(next.0);
        self.found.truncate(records);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mvcc::KeyRange;

    /// Takes all, in steps of `budget`; `between` is done to the store between them.
    fn walked(
        store: &mut Store,
        window_records: usize,
        budget: usize,
        mut between: impl FnMut(&mut Store, i64),
    ) -> Vec<Record> {
        let mut walk = RevisionWalk::new(store, window_records);
        let mut records = Vec::new();
        while !walk.is_done() {
            walk.step(store, budget, usize::MAX);
            records.extend(walk.take());
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

    /// What etcd keeps: all from the compact revision on, and what that revision sees.
    fn expected(store: &Store) -> Vec<Record> {
        let compacted = store.compact_revision();
        let is_kept = |record: &Record| {
            let (revision, deleted, kv) = record;
            let sees = || {
                let decoded = <crate::pb::mvccpb::KeyValue as prost::Message>::decode(kv.as_ref());
                store.get(&decoded.unwrap().key, compacted).map(|version| version.revision)
            };
            revision.main >= compacted || (!deleted && sees() == Some(*revision))
        };
        store.records().filter(is_kept).collect()
    }

    #[test]
    fn records_come_in_order_whatever_the_steps() {
        for compact_revision in [-1, 1, 2, 50, 150, 213, store(-1).revision()] {
            let mut store = store(compact_revision);
            let expected = expected(&store);
            for (window, budget) in [(1, 1), (2, 3), (5, 40), (7, 1000), (1000, 7)] {
                let found = walked(&mut store, window, budget, |_, _| {});
                assert_eq!(found, expected, "compacted to {compact_revision}, {window}, {budget}");
            }
        }
    }

    #[test]
    fn writes_and_compactions_meanwhile_change_nothing() {
        let expected = expected(&store(150));
        let mut store = store(150);
        let found = walked(&mut store, 4, 3, |store, floor| {
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
