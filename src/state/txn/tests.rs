use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::mvcc::Revision;

/// A store as one would write it without a thought for speed.
#[derive(Clone, Debug, Default, PartialEq)]
struct Plain {
    revision: i64,
    compacted: i64,
    /// Changes of the write under way.
    changes: i64,
    /// Every key with all it ever was; `None` for a delete.
    keys: BTreeMap<Bytes, Vec<(i64, Option<Version>)>>,
    /// Whether [`Reads::count`] can answer.
    counts: bool,
}

impl Plain {
    fn new() -> Plain {
        Plain { revision: 1, compacted: -1, counts: true, ..Plain::default() }
    }

    fn commit(&mut self) {
        self.revision = self.revision();
        self.changes = 0;
    }

    fn at(&self, key: &[u8], at: i64) -> Option<&Version> {
        let versions = self.keys.get(key)?;
        versions.iter().rev().find(|(revision, _)| *revision <= at)?.1.as_ref()
    }

    fn change(&mut self, key: &Bytes, version: Option<Version>) {
        let revision = self.revision + 1;
        self.keys.entry(key.clone()).or_default().push((revision, version));
        self.changes += 1;
    }
}

impl Reads for Plain {
    fn revision(&self) -> i64 {
        self.revision + i64::from(self.changes > 0)
    }

    fn compact_revision(&self) -> i64 {
        self.compacted
    }

    fn get(&self, key: &[u8]) -> Option<&Version> {
        self.at(key, self.revision())
    }

    fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        looked_max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        let (mut visited, mut looked) = (0, 0);
        for key in self.keys.keys().filter(|key| range.contains(key)) {
            if looked == looked_max {
                return Some(key.clone());
            }
            looked += 1;
            let Some(version) = self.at(key, at) else { continue };
            if visited == max {
                return Some(key.clone());
            }
            visited += 1;
            visit(key, version);
        }
        None
    }

    fn count(&self, range: &KeyRange, at: i64, _budget: usize) -> Option<u64> {
        let live = self.keys.keys().filter(|key| range.contains(key) && self.at(key, at).is_some());
        self.counts.then(|| live.count() as u64)
    }
}

impl Writes for Plain {
    fn put(&mut self, key: Bytes, value: Bytes, lease: i64) -> Option<Bytes> {
        let revision = Revision::new(self.revision + 1, self.changes);
        let before = self.get(&key).cloned();
        let create_revision = before.as_ref().map_or(revision.main, |old| old.create_revision);
        let version = before.as_ref().map_or(1, |old| old.version + 1);
        let record = KeyValue {
            key: key.clone(),
            create_revision,
            mod_revision: revision.main,
            version,
            value,
            lease,
        };
        let kv = record.encode_to_vec().into();
        self.change(&key, Some(Version { revision, create_revision, version, kv }));
        before.map(|old| old.kv)
    }

    fn delete_range(&mut self, range: &KeyRange) -> Vec<Bytes> {
        let mut found = Vec::new();
        self.scan(range, self.revision(), usize::MAX, usize::MAX, &mut |key, version| {
            found.push((Bytes::copy_from_slice(key), version.kv.clone()));
        });
        for (key, _) in &found {
            self.change(key, None);
        }
        found.into_iter().map(|(_, kv)| kv).collect()
    }
}

fn no_lease(_: i64) -> bool {
    false
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put_request(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..PutRequest::default() }
}

fn all() -> RangeRequest {
    RangeRequest { key: bytes("\0"), range_end: bytes("\0"), ..RangeRequest::default() }
}

fn get_request(key: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), ..RangeRequest::default() }
}

fn put_op(key: &str, value: &str) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(put_request(key, value))) }
}

fn range_op(request: RangeRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestRange(request)) }
}

fn delete_op(key: &str, range_end: &str) -> RequestOp {
    RequestOp { request: Some(Request::RequestDeleteRange(delete_request(key, range_end))) }
}

fn delete_request(key: &str, range_end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: bytes(key), range_end: bytes(range_end), prev_kv: true }
}

fn txn_op(request: TxnRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestTxn(request)) }
}

fn compare(key: &str, target: CompareTarget, result: CompareResult, given: TargetUnion) -> Compare {
    Compare {
        result: result as i32,
        target: target as i32,
        key: bytes(key),
        range_end: Bytes::new(),
        target_union: Some(given),
    }
}

/// A store with revision 2: a=1; 3: b=2; 4: c=3 (lease 7); 5: a=4; 6: c deleted; 7: d=0.
fn sample() -> Plain {
    let mut store = Plain::new();
    let puts = [("a", "1", 0), ("b", "2", 0), ("c", "3", 7), ("a", "4", 0)];
    for (key, value, lease) in puts {
        apply_put(&mut store, &PutRequest { lease, ..put_request(key, value) }, &|_| true).unwrap();
        store.commit();
    }
    assert_eq!(apply_delete_range(&mut store, &delete_request("c", "")).deleted, 1);
    store.commit();
    apply_put(&mut store, &put_request("d", "0"), &no_lease).unwrap();
    store.commit();
    assert_eq!(store.revision, 7);
    store
}

/// The keys of a response with their values, as text.
fn pairs(kvs: &[Bytes]) -> Vec<String> {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    kvs.iter()
        .map(|kv| KeyValue::decode(kv.clone()).unwrap())
        .map(|kv| format!("{}={}", text(&kv.key), text(&kv.value)))
        .collect()
}

#[test]
fn a_put_says_what_was_there() {
    let mut store = sample();
    let request = PutRequest { prev_kv: true, ..put_request("a", "5") };
    let response = apply_put(&mut store, &request, &no_lease).unwrap();
    assert_eq!(response.header, Some(revision_header(8)));
    assert_eq!(pairs(&[response.prev_kv]), ["a=4"]);
    let request = PutRequest { prev_kv: true, ..put_request("new", "") };
    assert_eq!(apply_put(&mut store, &request, &no_lease).unwrap().prev_kv, Bytes::new());
    let kept = apply_put(&mut store, &put_request("a", "6"), &no_lease).unwrap();
    assert_eq!(kept.prev_kv, Bytes::new(), "not asked for");
}

#[test]
fn a_put_keeps_what_it_is_told_to() {
    let mut store = Plain::new();
    let leased = PutRequest { lease: 7, ..put_request("k", "v") };
    assert_eq!(apply_put(&mut store, &leased, &no_lease), Err(Error::LeaseNotFound));
    let ignoring = PutRequest { ignore_value: true, ..put_request("k", "") };
    assert_eq!(apply_put(&mut store, &ignoring, &no_lease), Err(Error::KeyNotFound));
    assert_eq!(store, Plain::new());

    apply_put(&mut store, &leased, &|id| id == 7).unwrap();
    let stored = |store: &Plain| decode(&store.get(b"k").unwrap().kv);
    apply_put(&mut store, &ignoring, &no_lease).unwrap();
    assert_eq!((&stored(&store).value[..], stored(&store).lease), (&b"v"[..], 0));
    apply_put(&mut store, &leased, &|id| id == 7).unwrap();
    let ignoring = PutRequest { ignore_lease: true, ..put_request("k", "w") };
    apply_put(&mut store, &ignoring, &no_lease).unwrap();
    assert_eq!((&stored(&store).value[..], stored(&store).lease), (&b"w"[..], 7));
    assert_eq!(stored(&store).version, 4);
}

#[test]
fn a_delete_of_nothing_makes_no_revision() {
    let mut store = sample();
    let response = apply_delete_range(&mut store, &delete_request("x", ""));
    assert_eq!((response.deleted, response.header), (0, Some(revision_header(7))));
    let response = apply_delete_range(&mut store, &delete_request("a", "c"));
    assert_eq!((response.deleted, response.header), (2, Some(revision_header(8))));
    assert_eq!(pairs(&response.prev_kvs), ["a=4", "b=2"]);
    let quiet = DeleteRangeRequest { prev_kv: false, ..delete_request("d", "") };
    let response = apply_delete_range(&mut store, &quiet);
    assert_eq!((response.deleted, response.prev_kvs.len()), (1, 0));
}

#[test]
fn a_range_reads_the_revision_asked_for() {
    let mut store = sample();
    let at = |store: &Plain, revision| {
        range(store, &RangeRequest { revision, ..all() })
            .map(|response| (response.header.unwrap().revision, pairs(&response.kvs).join(" ")))
    };
    assert_eq!(at(&store, 0), Ok((7, "a=4 b=2 d=0".into())));
    assert_eq!(at(&store, -3), Ok((7, "a=4 b=2 d=0".into())));
    assert_eq!(at(&store, 4), Ok((7, "a=1 b=2 c=3".into())));
    assert_eq!(at(&store, 1), Ok((7, String::new())));
    assert_eq!(at(&store, 8), Err(Error::FutureRevision));
    store.compacted = 5;
    assert_eq!(at(&store, 4), Err(Error::Compacted));
    assert_eq!(at(&store, 5), Ok((7, "a=4 b=2 c=3".into())));
}

#[test]
fn ranges_take_their_ends_as_etcd_does() {
    let store = sample();
    let table = [
        ("a", "", 1),
        ("c", "", 0),
        ("a", "d", 2),
        ("a", "\0", 3),
        ("b", "\0", 2),
        ("b", "b", 0),
        ("d", "a", 0),
    ];
    for (key, range_end, count) in table {
        let request = RangeRequest { range_end: bytes(range_end), ..get_request(key) };
        let response = range(&store, &request).unwrap();
        assert_eq!((response.count, response.kvs.len() as i64), (count, count), "{request:?}");
    }
}

#[test]
fn count_ignores_limit_and_filters_and_more_does_not() {
    // (change to the request, rows, count, more)
    type Case = (fn(&mut RangeRequest), &'static str, i64, bool);
    let table: [Case; 13] = [
        (|r| r.limit = 2, "a=4 b=2", 3, true),
        (|r| r.limit = 3, "a=4 b=2 d=0", 3, false),
        (|r| r.limit = -1, "a=4 b=2 d=0", 3, false),
        (|r| r.limit = i64::MAX, "a=4 b=2 d=0", 3, false),
        (|r| r.count_only = true, "", 3, false),
        (|r| (r.count_only, r.limit) = (true, 1), "", 3, false),
        (|r| r.min_mod_revision = 5, "a=4 d=0", 3, false),
        (|r| (r.min_mod_revision, r.limit) = (5, 1), "a=4", 3, true),
        (|r| r.max_mod_revision = 4, "b=2", 3, false),
        (|r| (r.max_mod_revision, r.limit) = (4, 1), "b=2", 3, false),
        (|r| r.min_create_revision = 3, "b=2 d=0", 3, false),
        (|r| r.max_create_revision = 2, "a=4", 3, false),
        (|r| r.keys_only = true, "a= b= d=", 3, false),
    ];
    for counts in [true, false] {
        let store = Plain { counts, ..sample() };
        for (index, (change, rows, count, more)) in table.iter().enumerate() {
            let mut request = all();
            change(&mut request);
            let response = range(&store, &request).unwrap();
            assert_eq!(pairs(&response.kvs).join(" "), *rows, "case {index}");
            assert_eq!((response.count, response.more), (*count, *more), "case {index}");
        }
    }
}

#[test]
fn rows_are_sorted_by_any_target() {
    use SortOrder::{Ascend, Descend, None};
    use SortTarget::{Create, Key, Mod, Value, Version};
    let store = sample();
    let table = [
        (None, Key, 0, "a=4 b=2 d=0"),
        (Descend, Key, 0, "d=0 b=2 a=4"),
        (Descend, Key, 1, "d=0"),
        (Ascend, Value, 0, "d=0 b=2 a=4"),
        (Descend, Value, 2, "a=4 b=2"),
        (Ascend, Mod, 0, "b=2 a=4 d=0"),
        (Descend, Mod, 1, "d=0"),
        (Ascend, Create, 0, "a=4 b=2 d=0"),
        // Equals stay by key, either way.
        (Ascend, Version, 0, "b=2 d=0 a=4"),
        (Descend, Version, 0, "a=4 b=2 d=0"),
        // With a limit, `NONE` sorts only the rows that come first by key, and one more:
        // d=0 is never seen, although it is the least.
        (None, Value, 1, "b=2"),
        (None, Value, 0, "d=0 b=2 a=4"),
        (Ascend, Value, 1, "d=0"),
    ];
    for (order, target, limit, rows) in table {
        let request =
            RangeRequest { sort_order: order as i32, sort_target: target as i32, limit, ..all() };
        let response = range(&store, &request).unwrap();
        assert_eq!(pairs(&response.kvs).join(" "), rows, "{order:?} {target:?} {limit}");
        assert_eq!((response.count, response.more), (3, limit > 0));
    }
}

#[test]
fn keys_only_leaves_the_value_out_and_all_else_in() {
    let mut store = Plain::new();
    store.put(bytes("k"), bytes("v"), 7);
    let request =
        RangeRequest { keys_only: true, sort_target: SortTarget::Value as i32, ..get_request("k") };
    let response = range(&store, &request).unwrap();
    let expected = KeyValue {
        key: bytes("k"),
        create_revision: 2,
        mod_revision: 2,
        version: 1,
        value: Bytes::new(),
        lease: 7,
    };
    assert_eq!(response.kvs, [Bytes::from(expected.encode_to_vec())]);
}

#[test]
fn compares_hold_as_in_etcd() {
    use CompareResult::{Equal, Greater, Less, NotEqual};
    use CompareTarget::{Create, Lease, Mod, Value, Version};
    let mut store = sample();
    store.put(bytes("leased"), bytes("x"), 7);
    store.commit();
    let table = [
        (compare("a", Version, Equal, TargetUnion::Version(2)), true),
        (compare("a", Version, Greater, TargetUnion::Version(2)), false),
        (compare("a", Create, Equal, TargetUnion::CreateRevision(2)), true),
        (compare("a", Mod, Less, TargetUnion::ModRevision(6)), true),
        (compare("a", Mod, NotEqual, TargetUnion::ModRevision(5)), false),
        (compare("a", Value, Equal, TargetUnion::Value(bytes("4"))), true),
        (compare("a", Value, Greater, TargetUnion::Value(bytes("30"))), true),
        (compare("leased", Lease, Equal, TargetUnion::Lease(7)), true),
        // Missing or deleted: all numbers are 0, and no compare of its value holds.
        (compare("c", Mod, Equal, TargetUnion::ModRevision(0)), true),
        (compare("c", Version, Less, TargetUnion::Version(1)), true),
        (compare("x", Lease, Equal, TargetUnion::Lease(0)), true),
        (compare("x", Value, Equal, TargetUnion::Value(bytes(""))), false),
        (compare("x", Value, NotEqual, TargetUnion::Value(bytes("y"))), false),
        // What is given for another target, or not at all, is 0 or empty.
        (compare("a", Mod, Greater, TargetUnion::Version(99)), true),
        (
            Compare { target_union: None, ..compare("a", Value, Greater, TargetUnion::Lease(0)) },
            true,
        ),
        (
            Compare { target_union: None, ..compare("x", Create, Equal, TargetUnion::Lease(0)) },
            true,
        ),
        // Values of the enums that do not exist.
        (Compare { result: 9, ..compare("a", Mod, Equal, TargetUnion::ModRevision(0)) }, true),
        (Compare { target: 9, ..compare("a", Mod, Equal, TargetUnion::ModRevision(3)) }, true),
        (Compare { target: 9, ..compare("x", Mod, NotEqual, TargetUnion::ModRevision(0)) }, false),
        // Ranges: every key, or the missing one.
        (
            Compare {
                range_end: bytes("e"),
                ..compare("a", Create, Greater, TargetUnion::CreateRevision(1))
            },
            true,
        ),
        (
            Compare {
                range_end: bytes("e"),
                ..compare("a", Create, Less, TargetUnion::CreateRevision(7))
            },
            false,
        ),
        (
            Compare {
                range_end: bytes("z"),
                ..compare("x", Create, Equal, TargetUnion::CreateRevision(0))
            },
            true,
        ),
        (
            Compare {
                range_end: bytes("\0"),
                ..compare("x", Value, NotEqual, TargetUnion::Value(bytes("v")))
            },
            false,
        ),
        (
            Compare {
                range_end: bytes("a"),
                ..compare("b", Mod, Equal, TargetUnion::ModRevision(0))
            },
            true,
        ),
    ];
    for (compare, expected) in table {
        assert_eq!(holds(&store, &compare), expected, "{compare:?}");
    }
}

#[test]
fn a_compare_over_many_keys_sees_the_last_one() {
    let mut store = Plain::new();
    for number in 0..3 * COMPARE_STEP_KEYS {
        store.put(bytes(&format!("k{number:05}")), bytes("v"), 0);
    }
    let mut request =
        compare("k", CompareTarget::Value, CompareResult::Equal, TargetUnion::Value(bytes("v")));
    request.range_end = bytes("l");
    assert!(holds(&store, &request));
    store.put(bytes("k99999"), bytes("w"), 0);
    assert!(!holds(&store, &request));
}

#[test]
fn operations_see_the_ones_before_them() {
    let mut store = sample();
    let request = TxnRequest {
        success: vec![
            range_op(get_request("a")),
            put_op("a", "5"),
            range_op(get_request("a")),
            range_op(RangeRequest { revision: 7, ..get_request("a") }),
            delete_op("b", "c"),
            delete_op("b", "c"),
            range_op(RangeRequest { count_only: true, ..all() }),
        ],
        ..TxnRequest::default()
    };
    let response = apply_txn(&mut store, &request, &no_lease).unwrap();
    assert!(response.succeeded);
    assert_eq!(response.header, Some(revision_header(8)));
    let mut seen = Vec::new();
    for op in response.responses {
        seen.push(match op.response.unwrap() {
            Response::ResponseRange(range) => {
                let revision = range.header.unwrap().revision;
                format!("{} {} {}", revision, range.count, pairs(&range.kvs).join(" "))
            }
            Response::ResponsePut(put) => format!("put {}", put.header.unwrap().revision),
            Response::ResponseDeleteRange(delete) => {
                format!("delete {} {}", delete.header.unwrap().revision, delete.deleted)
            }
            Response::ResponseTxn(_) => panic!("not asked for"),
        });
    }
    assert_eq!(
        seen,
        ["7 1 a=4", "put 8", "8 1 a=5", "8 1 a=4", "delete 8 1", "delete 8 0", "8 2 "]
    );
}

#[test]
fn all_compares_see_the_state_before() {
    let mut store = sample();
    let is_old =
        |key| compare(key, CompareTarget::Mod, CompareResult::Less, TargetUnion::ModRevision(8));
    let inner = TxnRequest {
        compare: vec![is_old("a")],
        success: vec![put_op("path", "then")],
        failure: vec![put_op("path", "else")],
    };
    let request = TxnRequest {
        compare: vec![is_old("a")],
        success: vec![put_op("a", "9"), txn_op(inner.clone()), txn_op(TxnRequest::default())],
        failure: vec![],
    };
    let response = apply_txn(&mut store, &request, &no_lease).unwrap();
    store.commit();
    assert_eq!(pairs(&range(&store, &get_request("path")).unwrap().kvs), ["path=then"]);
    let Some(Response::ResponseTxn(nested)) = &response.responses[1].response else {
        panic!("{response:?}")
    };
    assert!(nested.succeeded);
    assert_eq!(nested.header, Some(ResponseHeader::default()), "there, and empty");
    // Now `a` is new, so the nested one takes its other branch.
    let request = TxnRequest { success: vec![txn_op(inner)], ..TxnRequest::default() };
    apply_txn(&mut store, &request, &no_lease).unwrap();
    assert_eq!(pairs(&range(&store, &get_request("path")).unwrap().kvs), ["path=else"]);
}

#[test]
fn a_transaction_that_fails_has_no_effect() {
    let mut before = sample();
    before.compacted = 3;
    let put = |request: PutRequest| RequestOp { request: Some(Request::RequestPut(request)) };
    let ignoring = PutRequest { ignore_value: true, ..put_request("x", "") };
    let read = |revision| range_op(RangeRequest { revision, ..get_request("a") });
    let nested = |op| txn_op(TxnRequest { success: vec![op], ..TxnRequest::default() });
    let table = [
        (put(PutRequest { lease: 9, ..put_request("k", "v") }), Error::LeaseNotFound),
        (put(PutRequest { ignore_lease: true, ..ignoring.clone() }), Error::KeyNotFound),
        (put(ignoring.clone()), Error::KeyNotFound),
        // The revision about to be made is in the future still.
        (read(8), Error::FutureRevision),
        (read(2), Error::Compacted),
        (read(-1), Error::Compacted),
        (nested(nested(read(2))), Error::Compacted),
    ];
    for (op, error) in table {
        let mut store = before.clone();
        let request =
            TxnRequest { success: vec![put_op("a", "!"), op.clone()], ..TxnRequest::default() };
        let outcome = apply_txn(&mut store, &request, &no_lease);
        assert_eq!(outcome, Err(error), "{op:?}");
        assert_eq!(store, before, "{op:?}");
        // On the path not taken it does not matter.
        let request = TxnRequest { failure: vec![op], ..TxnRequest::default() };
        assert!(apply_txn(&mut store, &request, &no_lease).is_ok());
    }
    // A key made by the same transaction cannot be referred to.
    let request = TxnRequest {
        success: vec![
            txn_op(TxnRequest { success: vec![put_op("x", "1")], ..Default::default() }),
            put(ignoring),
        ],
        ..TxnRequest::default()
    };
    let outcome = apply_txn(&mut before, &request, &no_lease);
    assert_eq!(outcome, Err(Error::KeyNotFound));
}

#[test]
fn before_any_compaction_revision_minus_one_is_now() {
    let mut store = sample();
    let request = TxnRequest {
        success: vec![range_op(RangeRequest { revision: -1, ..all() })],
        ..TxnRequest::default()
    };
    let response = apply_txn(&mut store, &request, &no_lease).unwrap();
    let Some(Response::ResponseRange(range)) = &response.responses[0].response else { panic!() };
    assert_eq!(range.count, 3);
}

#[test]
fn a_key_deleted_on_the_way_has_nothing_to_keep() {
    // etcd's duplicate check lets this through, and etcd crashes on it.
    let mut store = sample();
    let ignoring = PutRequest { ignore_value: true, ignore_lease: true, ..put_request("b", "") };
    let request = TxnRequest {
        success: vec![
            delete_op("a", "\0"),
            RequestOp { request: Some(Request::RequestPut(ignoring)) },
        ],
        ..TxnRequest::default()
    };
    assert_eq!(super::super::check::check_txn(&request, 128), Ok(()));
    apply_txn(&mut store, &request, &no_lease).unwrap();
    assert_eq!(pairs(&range(&store, &all()).unwrap().kvs), ["b="]);
}

#[test]
fn reads_without_changes_leave_the_revision() {
    let mut store = sample();
    let request =
        TxnRequest { success: vec![range_op(all()), delete_op("x", "")], ..TxnRequest::default() };
    let response = apply_txn(&mut store, &request, &no_lease).unwrap();
    assert_eq!(response.header, Some(revision_header(7)));
    assert_eq!(store, sample());
}

#[test]
fn a_read_only_transaction_answers_as_if_applied() {
    let store = sample();
    let request = TxnRequest {
        compare: vec![compare(
            "a",
            CompareTarget::Version,
            CompareResult::Equal,
            TargetUnion::Version(1),
        )],
        success: vec![],
        failure: vec![range_op(get_request("a")), range_op(RangeRequest { revision: 3, ..all() })],
    };
    let applied = apply_txn(&mut store.clone(), &request, &no_lease);
    for keys_per_step in [1, 2, usize::MAX] {
        let mut scan = TxnScan::new(&store, &request).unwrap();
        assert_eq!(scan.at(), 3);
        // What is written between two steps is not seen.
        let mut written = store.clone();
        while scan.step(&written, keys_per_step) == Step::More {
            apply_put(&mut written, &put_request("a", "new"), &no_lease).unwrap();
            apply_put(&mut written, &put_request("z", "new"), &no_lease).unwrap();
        }
        assert_eq!(written.revision() > store.revision(), keys_per_step < usize::MAX);
        assert_eq!(Ok(scan.finish()), applied);
    }
    assert_eq!(applied.unwrap().responses.len(), 2);
    let request = TxnRequest {
        success: vec![range_op(RangeRequest { revision: 8, ..all() })],
        ..TxnRequest::default()
    };
    assert_eq!(TxnScan::new(&store, &request).err(), Some(Error::FutureRevision));
}

#[test]
fn leases_follow_the_changes_of_a_write() {
    let mut lessor = Lessor::new();
    for id in [7, 8] {
        lessor.grant(id, 60).unwrap();
    }
    let change = |key: &str, deleted: bool, lease: i64| {
        let kv = KeyValue { key: bytes(key), lease, ..KeyValue::default() };
        Change {
            revision: Revision::new(2, 0),
            key: bytes(key),
            deleted,
            kv: kv.encode_to_vec().into(),
            prev: None,
            created: !deleted,
        }
    };
    attach_leases(&mut lessor, &[change("a", false, 7), change("b", false, 7)]);
    attach_leases(&mut lessor, &[change("a", false, 8), change("c", false, 8)]);
    assert_eq!([lessor.lease_of(b"a"), lessor.lease_of(b"b"), lessor.lease_of(b"c")], [8, 7, 8]);
    attach_leases(
        &mut lessor,
        &[change("a", true, 0), change("b", false, 0), change("c", false, 9)],
    );
    assert_eq!([lessor.lease_of(b"a"), lessor.lease_of(b"b"), lessor.lease_of(b"c")], [0, 0, 0]);
}

#[test]
fn a_limited_range_stops_where_it_has_enough() {
    let mut store = Plain::new();
    for number in 0..1000 {
        store.put(bytes(&format!("k{number:04}")), bytes("v"), 0);
    }
    store.commit();
    let request = RangeRequest { limit: 10, ..all() };
    let mut scan = RangeScan::new(request.clone(), store.revision, store.compacted).unwrap();
    assert_eq!(scan.step(&store, 8), Step::More);
    assert_eq!(scan.step(&store, 8), Step::Done);
    let response = scan.finish();
    assert_eq!((response.kvs.len(), response.count, response.more), (10, 1000, true));

    // When the count is not known it goes on to the end.
    store.counts = false;
    let mut scan = RangeScan::new(request, store.revision, store.compacted).unwrap();
    let mut steps = 1;
    while scan.step(&store, 100) == Step::More {
        steps += 1;
    }
    assert_eq!(steps, 10);
    assert_eq!(scan.finish(), response);
}

#[test]
fn a_range_in_steps_reads_one_revision() {
    let mut store = sample();
    let mut scan = RangeScan::new(all(), store.revision, store.compacted).unwrap();
    assert_eq!((scan.at(), scan.step(&store, 1)), (7, Step::More));
    apply_delete_range(&mut store, &delete_request("\0", "\0"));
    store.put(bytes("e"), bytes("!"), 0);
    store.commit();
    assert_eq!(pairs(&scan.take_kvs()), ["a=4"]);
    while scan.step(&store, 1) == Step::More {}
    let response = scan.finish();
    assert_eq!(pairs(&response.kvs), ["b=2", "d=0"]);
    assert_eq!((response.count, response.header), (3, Some(revision_header(7))));
}

/// etcd's range, done plainly: all of it, then filter, sort and cut.
fn plain_range(store: &Plain, request: &RangeRequest) -> RangeResponse {
    let at = if request.revision > 0 { request.revision } else { store.revision };
    let span = KeyRange::from_wire(request.key.clone(), request.range_end.clone());
    let mut kvs: Vec<KeyValue> = store
        .keys
        .keys()
        .filter(|key| span.contains(key))
        .filter_map(|key| store.at(key, at))
        .map(|version| KeyValue::decode(version.kv.clone()).unwrap())
        .collect();
    let count = kvs.len() as i64;
    if request.count_only {
        kvs.clear();
    }
    let filters = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    let limit = if request.limit > 0 { request.limit as usize } else { usize::MAX };
    if request.sort_order == 0 && filters == [0; 4] {
        kvs.truncate(limit.saturating_add(1));
    }
    let keep = |revision: i64, min: i64, max: i64| {
        (min == 0 || revision >= min) && (max == 0 || revision <= max)
    };
    kvs.retain(|kv| keep(kv.mod_revision, filters[0], filters[1]));
    kvs.retain(|kv| keep(kv.create_revision, filters[2], filters[3]));
    let order = |left: &KeyValue, right: &KeyValue| match request.sort_target {
        0 => left.key.cmp(&right.key),
        1 => left.version.cmp(&right.version),
        2 => left.create_revision.cmp(&right.create_revision),
        3 => left.mod_revision.cmp(&right.mod_revision),
        _ => left.value.cmp(&right.value),
    };
    if request.sort_order == SortOrder::Descend as i32 {
        kvs.sort_by(|left, right| order(right, left));
    } else {
        kvs.sort_by(order);
    }
    let more = kvs.len() > limit;
    kvs.truncate(limit);
    let encode = |mut kv: KeyValue| {
        if request.keys_only {
            kv.value.clear();
        }
        Bytes::from(kv.encode_to_vec())
    };
    RangeResponse {
        header: Some(revision_header(store.revision)),
        kvs: kvs.into_iter().map(encode).collect(),
        more,
        count,
    }
}

fn any_store() -> impl Strategy<Value = Plain> {
    let write = (0..12_u8, "[a-c]{0,2}", 0..4_u8);
    prop::collection::vec(write, 0..60).prop_map(|writes| {
        let mut store = Plain::new();
        for (key, value, kind) in writes {
            let key = Bytes::from(vec![b'a' + key]);
            if kind == 0 {
                store.delete_range(&KeyRange::single(key));
            } else {
                store.put(key, bytes(&value), i64::from(kind));
            }
            store.commit();
        }
        store
    })
}

fn any_range() -> impl Strategy<Value = RangeRequest> {
    let filter = || prop_oneof![3 => Just(0_i64), 1 => 1..50_i64];
    let ends = ("[a-m]", prop_oneof![Just(String::new()), Just("\0".into()), "[a-m]"]);
    let flags = (any::<bool>(), prop::bool::weighted(0.1), -1..14_i64);
    (ends, flags, 0..3_i32, 0..5_i32, 0..50_i64, [filter(), filter(), filter(), filter()]).prop_map(
        |(
            (key, end),
            (keys_only, count_only, limit),
            sort_order,
            sort_target,
            revision,
            filters,
        )| {
            RangeRequest {
                key: bytes(&key),
                range_end: bytes(&end),
                limit,
                revision,
                sort_order,
                sort_target,
                keys_only,
                count_only,
                min_mod_revision: filters[0],
                max_mod_revision: filters[1],
                min_create_revision: filters[2],
                max_create_revision: filters[3],
                ..RangeRequest::default()
            }
        },
    )
}

fn any_compare() -> impl Strategy<Value = Compare> {
    let given = prop_oneof![
        (0..20_i64).prop_map(TargetUnion::ModRevision),
        (0..20_i64).prop_map(TargetUnion::CreateRevision),
        (0..3_i64).prop_map(TargetUnion::Version),
        (0..3_i64).prop_map(TargetUnion::Lease),
        "[a-c]{0,2}".prop_map(|value| TargetUnion::Value(bytes(&value))),
    ];
    let ends = ("[a-l]", prop_oneof![3 => Just(String::new()), 1 => "[a-m]"]);
    (ends, 0..4_i32, 0..5_i32, given).prop_map(|((key, end), result, target, given)| Compare {
        result,
        target,
        key: bytes(&key),
        range_end: bytes(&end),
        target_union: Some(given),
    })
}

fn any_txn() -> impl Strategy<Value = TxnRequest> {
    let flags = (any::<bool>(), prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let put = ("[a-l]", "[a-c]{0,2}", 0..3_i64, flags).prop_map(
        |(key, value, lease, (prev_kv, ignore_value, ignore_lease))| {
            let put = PutRequest { prev_kv, ignore_value, ignore_lease, ..put_request(&key, "") };
            let value = if ignore_value { Bytes::new() } else { bytes(&value) };
            let lease = if ignore_lease { 0 } else { lease };
            Request::RequestPut(PutRequest { value, lease, ..put })
        },
    );
    let delete = ("[a-l]", prop_oneof![Just(""), Just("\0"), Just("c"), Just("h")]);
    let delete =
        delete.prop_map(|(key, end)| Request::RequestDeleteRange(delete_request(&key, end)));
    let range = any_range().prop_map(|range| {
        Request::RequestRange(RangeRequest { revision: range.revision / 4, ..range })
    });
    let op = prop_oneof![4 => put, 1 => delete, 2 => range]
        .prop_map(|request| RequestOp { request: Some(request) });
    let compares = || prop::collection::vec(any_compare(), 0..2);
    let leaf =
        (compares(), prop::collection::vec(op.clone(), 0..4), prop::collection::vec(op, 0..2))
            .prop_map(|(compare, success, failure)| TxnRequest { compare, success, failure });
    leaf.prop_recursive(2, 8, 3, move |inner| {
        (inner.clone(), prop::collection::vec(inner.prop_map(txn_op), 0..3)).prop_map(
            |(mut outer, nested)| {
                outer.success.extend(nested);
                outer
            },
        )
    })
}

proptest! {
    #[test]
    fn a_range_is_what_filter_sort_and_cut_give(
        store in any_store(),
        request in any_range(),
        counts in any::<bool>(),
        step in 1..6_usize,
    ) {
        let store = Plain { counts, ..store };
        let request = RangeRequest { revision: request.revision.min(store.revision), ..request };
        let expected = plain_range(&store, &request);
        prop_assert_eq!(range(&store, &request).unwrap(), expected.clone());
        let mut scan = RangeScan::new(request, store.revision, store.compacted).unwrap();
        while scan.step(&store, step) == Step::More {}
        prop_assert_eq!(scan.finish(), expected);
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_long_sorted_range_keeps_the_right_rows(
        values in prop::collection::vec(0..50_u8, SORT_SLACK_ROWS..2 * SORT_SLACK_ROWS),
        limit in 1..20_i64,
        sort_order in 1..3_i32,
    ) {
        let mut store = Plain::new();
        for (number, value) in values.iter().enumerate() {
            store.put(bytes(&format!("k{number:05}")), Bytes::from(vec![*value]), 0);
        }
        store.commit();
        let request = RangeRequest {
            sort_order,
            sort_target: SortTarget::Value as i32,
            limit,
            ..all()
        };
        let mut rows = Rows::new(request.clone());
        store.scan(
            &KeyRange { start: bytes("k"), end: RangeEnd::Open },
            store.revision,
            usize::MAX,
            usize::MAX,
            &mut |_, version| rows.offer(version),
        );
        prop_assert!(rows.ranked.len() < SORT_SLACK_ROWS + 2 * 21);
        let expected = plain_range(&store, &request);
        prop_assert_eq!(rows.finish(), (expected.kvs, expected.more));
    }

    #[test]
    fn the_store_answers_as_the_plain_one_does(txns in prop::collection::vec(any_txn(), 1..25)) {
        let mut store = Store::new();
        let mut plain = Plain::new();
        let lease_exists = |id| id == 1;
        for request in txns {
            let applied = apply_txn(&mut plain, &request, &lease_exists);
            plain.commit();
            let mut write = store.write();
            prop_assert_eq!(apply_txn(&mut write, &request, &lease_exists), applied);
            write.commit();
            prop_assert_eq!(range(&store, &all()).unwrap(), range(&plain, &all()).unwrap());
        }
        for revision in 1..=plain.revision {
            let request = RangeRequest { revision, ..all() };
            let mut scan = RangeScan::new(request.clone(), store.revision(), -1).unwrap();
            while scan.step(&store, 2) == Step::More {}
            prop_assert_eq!(scan.finish(), range(&plain, &request).unwrap());
        }
    }
}
