//! The store against a model that never forgets and works everything out anew from the
//! list of all changes, and against values published by etcd.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use prost::Message;

use super::store::COUNTED_MAX;
use super::*;
use crate::error::Error;
use crate::pb::mvccpb::KeyValue;

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn everything() -> KeyRange {
    KeyRange::from_wire(Bytes::new(), bytes("\0"))
}

fn put(store: &mut Store, key: &str, value: &str) -> i64 {
    let mut txn = store.write();
    txn.put(bytes(key), bytes(value), 0);
    txn.commit().0
}

fn delete(store: &mut Store, key: &str) -> i64 {
    let mut txn = store.write();
    txn.delete_range(&KeyRange::single(bytes(key)));
    txn.commit().0
}

fn scan(store: &Store, range: &KeyRange, at: i64) -> Vec<KeyValue> {
    let mut found = Vec::new();
    let more = store.scan(range, at, usize::MAX, &mut |key, version| {
        let kv = KeyValue::decode(version.kv.clone()).unwrap();
        assert_eq!(kv.key, key);
        assert_eq!(kv.mod_revision, version.revision.main);
        assert_eq!(kv.create_revision, version.create_revision);
        assert_eq!(kv.version, version.version);
        found.push(kv);
    });
    assert_eq!(more, None);
    found
}

fn finish_compaction(store: &mut Store) -> Vec<Revision> {
    let mut removed = Vec::new();
    loop {
        let step = store.compact_step(i64::MAX, 3);
        assert!(!store.is_compaction_pinned(i64::MAX));
        removed.extend(step.removed);
        if step.done {
            return removed;
        }
    }
}

// The model.

/// A key, and, if it was put, the value and the lease.
type Written = (Bytes, Option<(Bytes, i64)>);

/// Everything that ever happened.
#[derive(Default)]
struct Model {
    log: Vec<(Revision, Written)>,
    revision: i64,
    compact_revision: i64,
    /// The rows etcd would still have if it freed everything at once, by revision.
    rows: BTreeMap<Revision, (bool, Bytes)>,
}

impl Model {
    fn new() -> Model {
        Model { revision: 1, compact_revision: -1, ..Model::default() }
    }

    /// All changes as watchers see them, and the keys that exist after the last at or
    /// below `at`.
    fn replay(&self, at: i64) -> (Vec<Change>, BTreeMap<Bytes, KeyValue>) {
        let mut state: BTreeMap<Bytes, KeyValue> = BTreeMap::new();
        let mut changes = Vec::new();
        for (revision, (key, value)) in self.log.iter().filter(|entry| entry.0.main <= at) {
            let before = state.get(key).cloned();
            let prev = before.as_ref().map(|kv| Bytes::from(kv.encode_to_vec()));
            let main = revision.main;
            let event = match value {
                Some((value, lease)) => KeyValue {
                    key: key.clone(),
                    create_revision: before.as_ref().map_or(main, |kv| kv.create_revision),
                    mod_revision: main,
                    version: before.as_ref().map_or(1, |kv| kv.version + 1),
                    value: value.clone(),
                    lease: *lease,
                },
                None => KeyValue { key: key.clone(), mod_revision: main, ..KeyValue::default() },
            };
            changes.push(Change {
                revision: *revision,
                key: key.clone(),
                deleted: value.is_none(),
                kv: Bytes::from(event.encode_to_vec()),
                prev,
                created: value.is_some() && before.is_none(),
            });
            match value {
                Some(_) => state.insert(key.clone(), event),
                None => state.remove(key),
            };
        }
        (changes, state)
    }

    fn apply(&mut self, changes: &[Written]) {
        if changes.is_empty() {
            return;
        }
        self.revision += 1;
        for (sub, written) in changes.iter().enumerate() {
            let revision = Revision::new(self.revision, sub as i64);
            self.log.push((revision, written.clone()));
        }
        for change in self.replay(self.revision).0.iter().rev().take(changes.len()) {
            self.rows.insert(change.revision, (change.deleted, change.record()));
        }
    }

    /// etcd's `keep` and `compact` of an index that never was compacted: which revisions
    /// are available after compaction to `at`, without (`keep`) or with the tombstones
    /// exactly there.
    fn available(&self, at: i64, tombstones: bool) -> BTreeSet<Revision> {
        let mut generations: BTreeMap<&Bytes, Vec<Vec<Revision>>> = BTreeMap::new();
        for (revision, (key, value)) in &self.log {
            let generations = generations.entry(key).or_insert_with(|| vec![Vec::new()]);
            generations.last_mut().unwrap().push(*revision);
            if value.is_none() {
                generations.push(Vec::new());
            }
        }
        let mut available = BTreeSet::new();
        for generations in generations.values() {
            let (open, closed) = generations.split_last().unwrap();
            let ended_at_or_after = closed.iter().find(|g| g.last().unwrap().main >= at);
            let generation = ended_at_or_after.unwrap_or(open);
            let Some(newest) = generation.iter().rev().find(|revision| revision.main <= at) else {
                continue;
            };
            let is_tombstone = ended_at_or_after.is_some() && generation.last() == Some(newest);
            if tombstones || !is_tombstone {
                available.insert(*newest);
            }
        }
        available
    }

    fn compact(&mut self, revision: i64) -> Result<(), Error> {
        if revision <= self.compact_revision {
            return Err(Error::Compacted);
        }
        if revision > self.revision {
            return Err(Error::FutureRevision);
        }
        self.compact_revision = revision;
        let available = self.available(revision, true);
        self.rows.retain(|row, _| row.main > revision || available.contains(row));
        Ok(())
    }

    fn hash_kv(&self, at: i64) -> u32 {
        self.hash_keeping(at, &self.available(at, false))
    }

    fn compaction_hash(&self, at: i64) -> u32 {
        self.hash_keeping(at, &self.available(at, true))
    }

    fn hash_keeping(&self, at: i64, keep: &BTreeSet<Revision>) -> u32 {
        let mut hashed = b"key".to_vec();
        for (row, (tombstone, value)) in &self.rows {
            if row.main > at
                || (row.main <= self.compact_revision && !keep.is_empty() && !keep.contains(row))
                || (row.main == self.compact_revision && *tombstone)
            {
                continue;
            }
            hashed.extend(row.main.to_be_bytes());
            hashed.push(b'_');
            hashed.extend(row.sub.to_be_bytes());
            if *tombstone {
                hashed.push(b't');
            }
            hashed.extend(value);
        }
        crc32c::crc32c(&hashed)
    }

    /// What a checkpoint must hold: etcd's rows, and the versions replaced exactly at the
    /// compact revision.
    fn records(&self) -> Vec<Record> {
        let mut records: BTreeMap<Revision, (bool, Bytes)> = self.rows.clone();
        for (revision, (key, _)) in &self.log {
            if revision.main == self.compact_revision {
                let mut before = self.replay(revision.main - 1).1;
                if let Some(kv) = before.remove(key) {
                    let log = self.log.iter().rev();
                    let row = log.filter(|e| e.1.0 == *key && e.0.main == kv.mod_revision);
                    let row = row.map(|entry| entry.0).next().unwrap();
                    records.insert(row, (false, Bytes::from(kv.encode_to_vec())));
                }
            }
        }
        records.into_iter().map(|(revision, (deleted, kv))| (revision, deleted, kv)).collect()
    }
}

/// Asks the store everything that can be asked at or above its compact revision.
fn check_all(store: &Store, model: &Model, ranges: &[KeyRange]) {
    assert_eq!(store.revision(), model.revision);
    assert_eq!(store.compact_revision(), model.compact_revision);
    let oldest = model.compact_revision.max(0);
    for at in oldest..=model.revision {
        check_reads(store, model, ranges, at);
        assert_eq!(store.hash_kv(at), model.hash_kv(at), "hash at {at}");
        let mut hash = store.compaction_hash_begin(at);
        hash.step(store, usize::MAX);
        assert_eq!(hash.finish(), model.compaction_hash(at), "hash of a compaction to {at}");
    }
    assert_eq!(store.keys_total(), model.replay(model.revision).1.len() as u64);
    assert_eq!(store.records().collect::<Vec<_>>(), model.records());

    let (changes, _) = model.replay(model.revision);
    for from in model.compact_revision - 2..=model.revision + 1 {
        let from_there = from.max(model.compact_revision);
        let expected: Vec<_> =
            changes.iter().filter(|c| c.revision.main >= from_there).cloned().collect();
        for max in [0, 1, 3, usize::MAX] {
            let found: Vec<_> = store.changes(from, max).cloned().collect();
            assert_eq!(found, expected[..found.len()], "from {from}, {max}");
            // At least max, if there are; whole revisions; no revision more than needed.
            assert!(found.len() >= max.min(expected.len()));
            if let (Some(last), Some(next)) = (found.last(), expected.get(found.len())) {
                assert_ne!(last.revision.main, next.revision.main);
            }
            if let Some(last) = found.last() {
                let whole_before =
                    found.iter().filter(|c| c.revision.main < last.revision.main).count();
                assert!(whole_before < max);
            }
        }
    }
}

fn check_reads(store: &Store, model: &Model, ranges: &[KeyRange], at: i64) {
    let (_, state) = model.replay(at);
    for range in ranges {
        let expected: Vec<KeyValue> =
            state.values().filter(|kv| range.contains(&kv.key)).cloned().collect();
        assert_eq!(scan(store, range, at), expected, "{range:?} at {at}");

        let mut first_two = Vec::new();
        let next = store.scan(range, at, 2, &mut |key, _| first_two.push(key.to_vec()));
        assert_eq!(next, expected.get(2).map(|kv| kv.key.clone()));
        assert_eq!(first_two.len(), expected.len().min(2));

        let mut stepped = Vec::new();
        let mut rest = range.clone();
        while let Some(next) = store
            .scan_step(&rest, at, 3, 2, &mut |key, _| stepped.push(Bytes::copy_from_slice(key)))
        {
            rest.start = next;
        }
        assert_eq!(stepped, expected.iter().map(|kv| kv.key.clone()).collect::<Vec<_>>());

        if at >= model.compact_revision {
            let count = store.count(range, at, usize::MAX);
            assert_eq!(count, Some(expected.len() as u64), "{range:?} at {at}");
        }
        for budget in [0, 2] {
            if let Some(count) = store.count(range, at, budget) {
                assert_eq!(count, expected.len() as u64);
            }
        }
    }
    for key in KEYS {
        let version = store.get(key.as_bytes(), at);
        let kv = version.map(|version| KeyValue::decode(version.kv.clone()).unwrap());
        assert_eq!(kv.as_ref(), state.get(key.as_bytes()), "{key:?} at {at}");
    }
}

const KEYS: [&str; 8] = ["a", "a\0", "ab", "b", "ba", "c", "d/long/key", "\u{7f}"];

#[derive(Debug, Clone)]
enum Write {
    Put(usize, u8, bool),
    /// From this key to that one; to itself: the one key.
    Delete(usize, usize),
}

#[derive(Debug, Clone)]
enum Op {
    Write(Vec<Write>),
    /// To this part, of 255, of the way between the compact revision and beyond the present.
    Compact(u8),
    CompactStep(usize),
    /// Pins a readable revision, as `Compact` chooses it, and begins a hash and a cut.
    Pin(u8),
    /// Ends the pin, and checks what was read under it.
    Unpin,
    /// Removes from the checkpoint so many of the records reported as removed.
    CleanCheckpoint(usize),
    RestoreFromRecords,
    RestoreFromCheckpoint,
}

fn any_op() -> impl Strategy<Value = Op> {
    let key = 0..KEYS.len();
    let write = prop_oneof![
        3 => (key.clone(), any::<u8>(), any::<bool>()).prop_map(|(k, v, l)| Write::Put(k, v, l)),
        1 => (key.clone(), key).prop_map(|(from, to)| Write::Delete(from, to)),
    ];
    prop_oneof![
        12 => proptest::collection::vec(write, 1..4).prop_map(Op::Write),
        3 => any::<u8>().prop_map(Op::Compact),
        4 => (0usize..6).prop_map(Op::CompactStep),
        2 => any::<u8>().prop_map(Op::Pin),
        1 => Just(Op::Unpin),
        1 => (0usize..8).prop_map(Op::CleanCheckpoint),
        1 => Just(Op::RestoreFromRecords),
        1 => Just(Op::RestoreFromCheckpoint),
    ]
}

fn any_range() -> impl Strategy<Value = KeyRange> {
    let bound = || prop_oneof![Just(""), Just("\0"), proptest::sample::select(&KEYS[..])];
    (bound(), bound()).prop_map(|(key, end)| KeyRange::from_wire(bytes(key), bytes(end)))
}

/// A reader in the middle of its work.
struct Pin {
    revision: i64,
    hash: HashKv,
    hash_expected: u32,
    walk: RevisionWalk,
    walk_expected: Vec<Record>,
}

/// A store, its model, and a checkpoint written from what the store reports.
struct Bench {
    store: Store,
    model: Model,
    checkpoint: BTreeMap<Revision, (bool, Bytes)>,
    to_remove: Vec<Revision>,
    pin: Option<Pin>,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            store: Store::new(),
            model: Model::new(),
            checkpoint: BTreeMap::new(),
            to_remove: Vec::new(),
            pin: None,
        }
    }

    /// A revision from the compact revision to one above the present.
    fn choose(&self, part: u8) -> i64 {
        let low = self.model.compact_revision;
        low + (self.model.revision + 1 - low) * i64::from(part) / 255
    }

    fn write(&mut self, writes: &[Write]) {
        let (_, mut state) = self.model.replay(self.model.revision);
        let mut txn = self.store.write();
        let mut made: Vec<Written> = Vec::new();
        let mut prevs = Vec::new();
        for write in writes {
            // etcd refuses transactions that change a key twice.
            match *write {
                Write::Put(key, value, leased) => {
                    let key = bytes(KEYS[key]);
                    if made.iter().any(|(other, _)| *other == key) {
                        continue;
                    }
                    let value = Bytes::from(vec![value; usize::from(value) % 40]);
                    let lease = i64::from(leased) * 7;
                    let prev = txn.put(key.clone(), value.clone(), lease);
                    prevs.push(prev);
                    state.insert(key.clone(), KeyValue::default());
                    made.push((key, Some((value, lease))));
                }
                Write::Delete(from, to) => {
                    let end = if from == to { "" } else { KEYS[to] };
                    let range = KeyRange::from_wire(bytes(KEYS[from]), bytes(end));
                    if made.iter().any(|(key, _)| range.contains(key)) {
                        continue;
                    }
                    let keys: Vec<_> =
                        state.keys().filter(|k| range.contains(k)).cloned().collect();
                    let deleted = txn.delete_range(&range);
                    assert_eq!(deleted.len(), keys.len());
                    prevs.extend(deleted.into_iter().map(Some));
                    for key in keys {
                        state.remove(&key);
                        made.push((key, None));
                    }
                }
            }
            // Reads see what was written so far.
            let at = txn.read_revision();
            assert_eq!(at, self.model.revision + i64::from(!made.is_empty()));
            assert_eq!(txn.count(&everything(), at, 0), Some(state.len() as u64));
            let mut keys = Vec::new();
            txn.scan(&everything(), at, usize::MAX, &mut |key, _| keys.push(key.to_vec()));
            assert_eq!(keys, state.keys().map(|key| key.to_vec()).collect::<Vec<_>>());
            assert!(KEYS.iter().all(|key| {
                txn.get(key.as_bytes()).is_some() == state.contains_key(key.as_bytes())
            }));
        }
        let (revision, changes) = txn.commit();
        self.model.apply(&made);
        assert_eq!(revision, self.model.revision);
        let (all, _) = self.model.replay(revision);
        assert_eq!(changes, all[all.len() - changes.len()..]);
        assert_eq!(changes.len(), made.len());
        assert_eq!(changes.iter().map(|c| c.prev.clone()).collect::<Vec<_>>(), prevs);
        for change in &changes {
            self.checkpoint.insert(change.revision, (change.deleted, change.record()));
        }
    }

    fn compact_step(&mut self, budget: usize) -> CompactStep {
        let pinned = self.pin.as_ref().map(|pin| {
            let walks = pin.hash.floor().min(pin.walk.floor());
            walks.min(pin.revision)
        });
        let floor = pinned.unwrap_or(i64::MAX);
        let was_pinned = self.store.is_compaction_pinned(floor);
        let step = self.store.compact_step(floor, budget);
        assert!(!was_pinned || (step.removed.is_empty() && !step.done));
        for revision in &step.removed {
            assert!(revision.main < self.model.compact_revision);
            assert!(self.checkpoint.contains_key(revision), "{revision:?} removed twice");
        }
        self.to_remove.extend(&step.removed);
        step
    }

    fn unpin(&mut self) {
        let Some(mut pin) = self.pin.take() else { return };
        check_reads(&self.store, &self.model, &[everything()], pin.revision);
        while !pin.hash.step(&self.store, 2) {}
        assert_eq!(pin.hash.finish(), pin.hash_expected);
        let mut walked = Vec::new();
        while !pin.walk.is_done() {
            pin.walk.step(&self.store, 3, usize::MAX);
            walked.extend(std::iter::from_fn(|| pin.walk.take()));
        }
        assert_eq!(walked, pin.walk_expected);
    }

    fn clean_checkpoint(&mut self, count: usize) {
        for revision in self.to_remove.drain(..count.min(self.to_remove.len())) {
            self.checkpoint.remove(&revision);
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Write(writes) => self.write(writes),
            Op::Compact(part) => {
                let revision = self.choose(*part);
                assert_eq!(self.store.compact(revision), self.model.compact(revision));
            }
            Op::CompactStep(budget) => {
                self.compact_step(*budget);
            }
            Op::Pin(part) => {
                self.unpin();
                let revision = self.choose(*part).clamp(0, self.model.revision);
                self.pin = Some(Pin {
                    revision,
                    hash: self.store.hash_kv_begin(revision),
                    hash_expected: self.store.hash_kv(revision),
                    walk: self.store.walk(),
                    walk_expected: self.store.records().collect(),
                });
            }
            Op::Unpin => self.unpin(),
            Op::CleanCheckpoint(count) => self.clean_checkpoint(*count),
            Op::RestoreFromRecords => {
                self.pin = None;
                let records: Vec<_> = self.store.records().collect();
                self.checkpoint = records.iter().map(|(r, d, kv)| (*r, (*d, kv.clone()))).collect();
                self.restore();
            }
            Op::RestoreFromCheckpoint => {
                self.pin = None;
                self.restore();
            }
        }
    }

    fn restore(&mut self) {
        // What was reported and not removed yet will be reported again.
        self.to_remove.clear();
        let records = self.checkpoint.iter().map(|(r, (deleted, kv))| (*r, *deleted, kv.clone()));
        let (revision, compact_revision) = (self.model.revision, self.model.compact_revision);
        self.store = Store::restore(records, revision, compact_revision).unwrap();
    }

    /// With everything freed, what is left is exactly what must be left.
    fn finish(&mut self) {
        self.unpin();
        while !self.compact_step(2).done {}
        self.clean_checkpoint(usize::MAX);
        let records = self.model.records();
        let left: Vec<_> =
            self.checkpoint.iter().map(|(r, (d, kv))| (*r, *d, kv.clone())).collect();
        assert_eq!(left, records);
        let size: usize = records.iter().map(|(r, d, kv)| r.record_key(*d).len() + kv.len()).sum();
        assert_eq!(self.store.size_bytes(), size as u64);
        let mut held = Vec::new();
        self.store.for_each_chain(b"", usize::MAX, |key, chain| {
            held.extend(chain.versions().map(|version| record::record(key, version)));
        });
        held.sort_by_key(|record| record.0);
        assert_eq!(held, records);
    }
}

proptest! {
    #[test]
    fn store_behaves_like_the_full_history(
        ops in proptest::collection::vec(any_op(), 0..40),
        mut ranges in proptest::collection::vec(any_range(), 3),
        check_each in 0..8,
    ) {
        ranges.push(everything());
        let mut bench = Bench::new();
        for op in &ops {
            bench.run(op);
            if check_each == 0 {
                check_all(&bench.store, &bench.model, &ranges);
            }
            if let Some(pin) = &bench.pin {
                check_reads(&bench.store, &bench.model, &ranges, pin.revision);
            }
        }
        check_all(&bench.store, &bench.model, &ranges);
        bench.finish();
        check_all(&bench.store, &bench.model, &ranges);
        bench.restore();
        check_all(&bench.store, &bench.model, &ranges);
    }
}

// Ranges.

#[test]
fn ranges_of_the_wire() {
    let single = KeyRange::from_wire(bytes("b"), bytes(""));
    assert_eq!(single, KeyRange::single(bytes("b")));
    assert!(single.contains(b"b") && !single.contains(b"b\0") && !single.contains(b"a"));
    let open = KeyRange::from_wire(bytes("b"), bytes("\0"));
    assert!(open.contains(b"b") && open.contains(b"\xff\xff") && !open.contains(b"a"));
    let before = KeyRange::from_wire(bytes("b"), bytes("d"));
    assert!(before.contains(b"b") && before.contains(b"c\xff") && !before.contains(b"d"));
    for end in ["b", "a"] {
        assert!(KeyRange::from_wire(bytes("b"), bytes(end)).is_empty());
    }
    assert!(KeyRange::from_wire(bytes("\0"), bytes("\0")).contains(b"\0"));
}

// Writes.

#[test]
fn a_write_that_changes_nothing_has_no_revision() {
    let mut store = Store::new();
    assert_eq!(store.revision(), 1);
    let mut txn = store.write();
    assert!(txn.delete_range(&everything()).is_empty());
    assert_eq!(txn.read_revision(), 1);
    assert_eq!(txn.commit(), (1, Vec::new()));
    assert_eq!(put(&mut store, "a", "1"), 2);
    assert_eq!(put(&mut store, "a", "1"), 3);
    assert_eq!(delete(&mut store, "b"), 3);
}

#[test]
fn one_key_changed_again_and_again_in_one_write() {
    let mut store = Store::new();
    let mut txn = store.write();
    assert_eq!(txn.put(bytes("a"), bytes("1"), 0), None);
    let first = txn.get(b"a").unwrap().clone();
    assert_eq!((first.revision.main, first.version), (2, 1));
    assert_eq!(txn.put(bytes("a"), bytes("2"), 0), Some(first.kv));
    let second = txn.get(b"a").unwrap().clone();
    assert_eq!((second.revision, second.version), (Revision::new(2, 1), 2));
    assert_eq!(txn.delete_range(&everything()), [second.kv]);
    assert_eq!(txn.get(b"a"), None);
    assert_eq!(txn.put(bytes("a"), bytes("3"), 0), None);
    let (revision, changes) = txn.commit();
    assert_eq!((revision, changes.len()), (2, 4));
    assert_eq!(store.get(b"a", 2).map(|version| version.version), Some(1));
    assert_eq!(store.count(&everything(), 2, 0), Some(1));
    assert_eq!(store.count(&everything(), 1, 9), Some(0));
}

#[test]
fn versions_and_create_revision_begin_anew_after_a_delete() {
    let mut store = Store::new();
    put(&mut store, "a", "1");
    put(&mut store, "a", "2");
    delete(&mut store, "a");
    put(&mut store, "a", "3");
    let seen = |at| store.get(b"a", at).map(|v| (v.revision.main, v.create_revision, v.version));
    assert_eq!(seen(1), None);
    assert_eq!(seen(2), Some((2, 2, 1)));
    assert_eq!(seen(3), Some((3, 2, 2)));
    assert_eq!(seen(4), None);
    assert_eq!(seen(5), Some((5, 5, 1)));
}

#[test]
fn a_delete_event_holds_key_and_revision_its_record_the_key() {
    let mut store = Store::new();
    put(&mut store, "a", "1");
    let mut txn = store.write();
    txn.delete_range(&everything());
    let (_, changes) = txn.commit();
    let event = KeyValue { key: bytes("a"), mod_revision: 3, ..KeyValue::default() };
    assert_eq!(KeyValue::decode(changes[0].kv.clone()).unwrap(), event);
    assert_eq!(changes[0].record(), b"\x0a\x01a".as_slice());
}

#[test]
fn stored_values_do_not_keep_request_buffers() {
    let mut store = Store::new();
    let request = Bytes::from(vec![b'x'; 1000]);
    let mut txn = store.write();
    txn.put(request.slice(..4), request.slice(500..510), 0);
    txn.commit();
    assert!(request.is_unique());
}

// Compaction.

#[test]
fn compaction_marks() {
    let mut store = Store::new();
    assert_eq!(store.compact_revision(), -1);
    assert_eq!(store.compact(-1), Err(Error::Compacted));
    assert_eq!(store.compact(0), Ok(()));
    assert_eq!(store.compact(0), Err(Error::Compacted));
    assert_eq!(store.compact(2), Err(Error::FutureRevision));
    put(&mut store, "a", "1");
    assert_eq!(store.compact(2), Ok(()));
    assert_eq!(store.compact(2), Err(Error::Compacted));
    assert_eq!(store.compact(1), Err(Error::Compacted));
    assert_eq!(finish_compaction(&mut store), []);
    assert_eq!(scan(&store, &everything(), 2).len(), 1);
}

#[test]
fn compacting_away_the_last_tombstone_keeps_the_revision() {
    let mut store = Store::new();
    put(&mut store, "a", "1");
    delete(&mut store, "a");
    store.compact(3).unwrap();
    assert_eq!(finish_compaction(&mut store), []);
    put(&mut store, "b", "1");
    delete(&mut store, "b");
    store.compact(5).unwrap();
    let removed = finish_compaction(&mut store);
    assert_eq!(removed, [Revision::new(2, 0), Revision::new(3, 0)]);

    let store = Store::restore(store.records(), store.revision(), store.compact_revision());
    let store = store.unwrap();
    assert_eq!((store.revision(), store.compact_revision()), (5, 5));
    assert_eq!(store.records().count(), 2, "b as it was, and its tombstone");
}

#[test]
fn what_compaction_spares_for_watchers_is_not_in_use() {
    let mut store = Store::new();
    let value = "v".repeat(1000);
    for key in ["a", "b", "c"] {
        put(&mut store, key, &value);
    }
    let used = store.size_bytes();
    assert_eq!(store.size_in_use_bytes(), used);
    let mut write = store.write();
    write.delete_range(&everything());
    write.commit();
    store.compact(5).unwrap();
    finish_compaction(&mut store);
    assert!(store.size_bytes() > used, "the three are there, with their tombstones");
    assert_eq!(store.size_in_use_bytes(), store.size_bytes() - used);
    let restored = Store::restore(store.records(), 5, 5).unwrap();
    assert_eq!(restored.size_in_use_bytes(), store.size_in_use_bytes());

    put(&mut store, "a", "1");
    store.compact(6).unwrap();
    finish_compaction(&mut store);
    assert_eq!(store.size_in_use_bytes(), store.size_bytes(), "nothing was replaced at 6");
}

#[test]
fn a_watcher_at_the_compact_revision_gets_prev_kv_after_a_restart() {
    let mut store = Store::new();
    put(&mut store, "a", "1");
    put(&mut store, "a", "2");
    store.compact(3).unwrap();
    assert_eq!(finish_compaction(&mut store), []);
    let restored = Store::restore(store.records(), 3, 3).unwrap();
    let changes: Vec<_> = restored.changes(0, 10).cloned().collect();
    assert_eq!(changes.len(), 1);
    let prev = KeyValue::decode(changes[0].prev.clone().unwrap()).unwrap();
    assert_eq!((prev.value, prev.mod_revision), (bytes("1"), 2));
    assert_eq!(
        restored.changes(0, 10).collect::<Vec<_>>(),
        store.changes(0, 10).collect::<Vec<_>>()
    );

    put(&mut store, "b", "1");
    store.compact(4).unwrap();
    assert_eq!(finish_compaction(&mut store), [Revision::new(2, 0)]);
}

#[test]
fn steps_are_bounded_and_wait_for_pins() {
    let mut store = Store::new();
    for value in 0..100 {
        put(&mut store, "a", &value.to_string());
    }
    assert!(store.compact_step(i64::MAX, 10).done, "nothing to do");
    store.compact(101).unwrap();
    let step = store.compact_step(50, 10);
    assert!(step.removed.len() == 9 && !step.done, "{step:?}");
    assert!(!store.is_compaction_pinned(50));
    assert!(!store.compact_step(50, 1000).done);
    assert!(store.is_compaction_pinned(50));
    assert!(!store.is_compaction_pinned(51));
    assert_eq!(store.get(b"a", 50).map(|v| v.revision.main), Some(50));
    let step = store.compact_step(i64::MAX, 0);
    assert_eq!(step, CompactStep { removed: Vec::new(), done: false });
    assert!(store.compact_step(i64::MAX, 1000).done);
    assert!(!store.is_compaction_pinned(50), "nothing is left");
    assert_eq!(store.records().count(), 2);
}

// Counting.

#[test]
fn counting_remembers_a_bounded_number_of_creates_and_deletes() {
    let mut store = Store::new();
    put(&mut store, "b", "1");
    let toggles = COUNTED_MAX + 10;
    for toggle in 0..toggles {
        if toggle % 2 == 0 {
            put(&mut store, "a", "1")
        } else {
            delete(&mut store, "a")
        };
    }
    assert_eq!(store.count(&everything(), 2, usize::MAX), None);
    // The put of b and the first ten toggles are forgotten.
    let oldest = 2 + 10;
    assert_eq!(store.count(&everything(), oldest - 1, usize::MAX), None);
    assert_eq!(store.count(&everything(), oldest, usize::MAX), Some(1));
    assert_eq!(store.count(&everything(), oldest + 1, usize::MAX), Some(2));
    assert_eq!(store.count(&everything(), oldest, COUNTED_MAX - 1), None);
    assert_eq!(store.count(&everything(), store.revision() - 3, 3), Some(1 + 1));
}

// Recovery.

#[test]
fn restore_refuses_what_is_not_a_store() {
    let mut store = Store::new();
    put(&mut store, "a", "1");
    put(&mut store, "b", "1");
    let records: Vec<_> = store.records().collect();
    let refused = |records: &[Record], revision, compact_revision| {
        Store::restore(records.iter().cloned(), revision, compact_revision).err()
    };
    assert_eq!(refused(&records, 3, -1), None);
    assert!(matches!(refused(&records, 0, -1), Some(RestoreError::Revision { .. })));
    assert!(matches!(refused(&records, 3, 4), Some(RestoreError::Revision { .. })));
    assert!(matches!(refused(&records, 2, -1), Some(RestoreError::Future { .. })));
    let turned = [records[1].clone(), records[0].clone()];
    assert!(matches!(refused(&turned, 3, -1), Some(RestoreError::OutOfOrder { .. })));
    let twice = [records[0].clone(), records[0].clone()];
    assert!(matches!(refused(&twice, 3, -1), Some(RestoreError::OutOfOrder { .. })));
    let with = |kv: Bytes| [(Revision::new(2, 0), false, kv)];
    let whole = records[0].2.clone();
    let nameless = bytes("\u{20}\u{1}");
    for kv in
        [nameless.clone(), bytes("\u{7f}"), whole.slice(..whole.len() - 1), records[1].2.clone()]
    {
        let refused = refused(&with(kv), 3, -1);
        assert!(matches!(refused, Some(RestoreError::Damaged { .. })), "{refused:?}");
    }
    let error = refused(&with(nameless), 3, -1).unwrap();
    assert_eq!(error.to_string(), "record 2.0: it has no key");
    // What etcdutl leaves where it raised the revision.
    assert_eq!(refused(&with(Bytes::new()), 3, -1), None);
}

#[test]
fn a_tombstone_that_outlived_its_version_in_the_checkpoint_is_removed() {
    let tombstone = (Revision::new(3, 0), true, bytes("\n\x01a"));
    let mut store = Store::restore([tombstone], 5, 5).unwrap();
    assert_eq!(store.records().count(), 0);
    assert_eq!(finish_compaction(&mut store), [Revision::new(3, 0)]);
    assert_eq!(store.size_bytes(), 0);
}

#[test]
fn restored_counts_reach_back_to_the_compact_revision() {
    let mut store = Store::new();
    for key in ["a", "b", "c", "d"] {
        put(&mut store, key, "1");
    }
    delete(&mut store, "b");
    store.compact(3).unwrap();
    let store = Store::restore(store.records(), 6, 3).unwrap();
    let counts: Vec<_> = (3..=6).map(|at| store.count(&everything(), at, 10)).collect();
    assert_eq!(counts, [Some(2), Some(3), Some(4), Some(3)]);
}

// HashKV against etcd's own published values (`TestHashByRevValue` and
// `TestHashByRevValueLastRevision`), which say: (hash, compact revision, revision).

fn etcd_test_key(i: i64) -> &'static str {
    match (i % 142, i % 71, i % 7) {
        (30, ..) => "zenek",
        (_, 30, _) => "xavery",
        (.., 0) => "alice",
        (.., 1) => "bob",
        (.., 2) => "celine",
        (.., 3) => "dominik",
        (.., 4) => "eve",
        (.., 5) => "frederica",
        _ => "gorge",
    }
}

/// Puts in cycles of 71 (the last one of 1210), and after each hashes and compacts at
/// `hash_at(start of the cycle, its length)`, 0 being the present.
fn etcd_hash_run(hash_at: fn(i64, i64) -> i64, free_memory: bool) -> Vec<(u32, i64, i64)> {
    let mut store = Store::new();
    let mut hashes = Vec::new();
    let cycles = (0..=17).map(|cycle| (cycle * 71, 71)).chain([(18 * 71, 1210)]);
    for (start, count) in cycles {
        for i in start..=start + count {
            put(&mut store, etcd_test_key(i), &i.to_string());
        }
        let at = match hash_at(start, count) {
            0 => store.revision(),
            at => at,
        };
        hashes.push((store.hash_kv(at), store.compact_revision(), at));
        store.compact(at).unwrap();
        if free_memory {
            finish_compaction(&mut store);
        }
    }
    hashes
}

#[test]
fn hash_kv_in_the_past_is_etcds() {
    let expected = [
        (4082599214, -1, 35),
        (2279933401, 35, 106),
        (3284231217, 106, 177),
        (126286495, 177, 248),
        (900108730, 248, 319),
        (2475485232, 319, 390),
        (1226296507, 390, 461),
        (2503661030, 461, 532),
        (4155130747, 532, 603),
        (106915399, 603, 674),
        (406914006, 674, 745),
        (1882211381, 745, 816),
        (806177088, 816, 887),
        (664311366, 887, 958),
        (1496914449, 958, 1029),
        (2434525091, 1029, 1100),
        (3988652253, 1100, 1171),
        (1122462288, 1171, 1242),
        (724436716, 1242, 1883),
    ];
    for free_memory in [false, true] {
        assert_eq!(etcd_hash_run(|start, count| start + count / 2, free_memory), expected);
    }
}

#[test]
fn hash_kv_at_present_is_etcds() {
    let expected = [
        (1913897190, -1, 73),
        (224860069, 73, 145),
        (1565167519, 145, 217),
        (1566261620, 217, 289),
        (2037173024, 289, 361),
        (691659396, 361, 433),
        (2713730748, 433, 505),
        (3919322507, 505, 577),
        (769967540, 577, 649),
        (2909194793, 649, 721),
        (1576921157, 721, 793),
        (4067701532, 793, 865),
        (2226384237, 865, 937),
        (2923408134, 937, 1009),
        (2680329256, 1009, 1081),
        (1546717673, 1081, 1153),
        (2713657846, 1153, 1225),
        (1046575299, 1225, 1297),
        (2017735779, 1297, 2508),
    ];
    for free_memory in [false, true] {
        assert_eq!(etcd_hash_run(|_, _| 0, free_memory), expected);
    }
}

#[test]
fn a_change_knows_how_long_its_value_is() {
    let mut store = Store::new();
    let mut write = store.write();
    write.put("key".into(), vec![5; 300].into(), 7);
    write.put("empty".into(), Bytes::new(), 7);
    write.delete_range(&KeyRange::single("key".into()));
    let (_, changes) = write.commit();
    let lengths: Vec<usize> = changes.iter().map(Change::value_len).collect();
    assert_eq!(lengths, [300, 0, 0]);
}
