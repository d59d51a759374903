use proptest::prelude::*;

use super::*;
use crate::pb::etcdserverpb::Compare;

const MAX_OPS: usize = 128;

fn put(key: &str) -> RequestOp {
    put_with(PutRequest { key: bytes(key), ..PutRequest::default() })
}

fn put_with(request: PutRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(request)) }
}

fn delete(key: &str, range_end: &str) -> RequestOp {
    let request = DeleteRangeRequest {
        key: bytes(key),
        range_end: bytes(range_end),
        ..DeleteRangeRequest::default()
    };
    RequestOp { request: Some(Request::RequestDeleteRange(request)) }
}

fn range(key: &str) -> RequestOp {
    range_with(RangeRequest { key: bytes(key), ..RangeRequest::default() })
}

fn range_with(request: RangeRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestRange(request)) }
}

fn nested(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
    RequestOp { request: Some(Request::RequestTxn(txn(success, failure))) }
}

fn txn(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { compare: Vec::new(), success, failure }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

#[test]
fn a_key_is_required_everywhere() {
    assert_eq!(check_range(&RangeRequest::default()), Err(Error::EmptyKey));
    assert_eq!(check_put(&PutRequest::default()), Err(Error::EmptyKey));
    assert_eq!(check_delete_range(&DeleteRangeRequest::default()), Err(Error::EmptyKey));
    for op in [put(""), range(""), delete("", "z"), nested(vec![put("")], vec![])] {
        assert_eq!(check_txn(&txn(vec![op.clone()], vec![]), MAX_OPS), Err(Error::EmptyKey));
        assert_eq!(check_txn(&txn(vec![], vec![op]), MAX_OPS), Err(Error::EmptyKey));
    }
    let request = TxnRequest { compare: vec![Compare::default()], ..TxnRequest::default() };
    assert_eq!(check_txn(&request, MAX_OPS), Err(Error::EmptyKey));
}

#[test]
fn sort_options_must_exist() {
    let request = |sort_order, sort_target| RangeRequest {
        key: bytes("k"),
        sort_order,
        sort_target,
        ..RangeRequest::default()
    };
    for order in 0..=2 {
        for target in 0..=4 {
            assert_eq!(check_range(&request(order, target)), Ok(()), "{order} {target}");
        }
    }
    for (order, target) in [(3, 0), (-1, 0), (0, 5), (0, -1)] {
        assert_eq!(check_range(&request(order, target)), Err(Error::InvalidSortOption));
        let op = range_with(request(order, target));
        assert_eq!(check_txn(&txn(vec![], vec![op]), MAX_OPS), Err(Error::InvalidSortOption));
    }
}

#[test]
fn a_stream_is_by_key_and_unfiltered() {
    let with = |change: fn(&mut RangeRequest)| {
        let mut request = RangeRequest { key: bytes("k"), ..RangeRequest::default() };
        change(&mut request);
        check_range_stream(&request)
    };
    assert_eq!(with(|_| ()), Ok(()));
    assert_eq!(with(|r| r.sort_order = SortOrder::Ascend as i32), Ok(()));
    // etcd lets a target without an order pass, and ignores it.
    assert_eq!(with(|r| r.sort_target = SortTarget::Mod as i32), Ok(()));
    assert_eq!(
        with(|r| r.sort_order = SortOrder::Descend as i32),
        Err(Error::StreamSortUnsupported)
    );
    for filter in [
        |r: &mut RangeRequest| r.min_mod_revision = 1,
        |r: &mut RangeRequest| r.max_mod_revision = 1,
        |r: &mut RangeRequest| r.min_create_revision = 1,
        |r: &mut RangeRequest| r.max_create_revision = 1,
    ] {
        assert_eq!(with(filter), Err(Error::StreamFilterUnsupported));
    }
}

#[test]
fn what_is_ignored_must_not_be_given() {
    let request = PutRequest {
        key: bytes("k"),
        value: bytes("v"),
        lease: 7,
        ignore_value: true,
        ..PutRequest::default()
    };
    assert_eq!(check_put(&request), Err(Error::ValueProvided));
    let request = PutRequest { ignore_value: false, ignore_lease: true, ..request };
    assert_eq!(check_put(&request), Err(Error::LeaseProvided));
    assert_eq!(check_put(&PutRequest { lease: 0, ..request.clone() }), Ok(()));
    assert_eq!(
        check_txn(&txn(vec![put_with(request)], vec![]), MAX_OPS),
        Err(Error::LeaseProvided)
    );
}

#[test]
fn an_operation_must_be_one() {
    assert_eq!(
        check_txn(&txn(vec![RequestOp::default()], vec![]), MAX_OPS),
        Err(Error::KeyNotFound)
    );
}

#[test]
fn operations_are_counted_per_list_and_passed_down() {
    let ranges = |count: usize| vec![range("k"); count];
    assert_eq!(check_txn(&txn(ranges(3), ranges(3)), 3), Ok(()));
    assert_eq!(check_txn(&txn(ranges(4), vec![]), 3), Err(Error::TooManyOps));
    assert_eq!(check_txn(&txn(vec![], ranges(4)), 3), Err(Error::TooManyOps));
    let compare = Compare { key: bytes("k"), ..Compare::default() };
    let request = TxnRequest { compare: vec![compare; 4], ..TxnRequest::default() };
    assert_eq!(check_txn(&request, 3), Err(Error::TooManyOps));
    assert_eq!(check_txn(&request, 4), Ok(()));

    // One operation outside, so one less inside.
    assert_eq!(check_txn(&txn(vec![nested(ranges(2), vec![])], vec![]), 3), Ok(()));
    assert_eq!(check_txn(&txn(vec![nested(ranges(3), vec![])], vec![]), 3), Err(Error::TooManyOps));
    // The wider branch outside counts, whichever the nested one stands in.
    assert_eq!(
        check_txn(&txn(vec![nested(ranges(2), vec![])], ranges(2)), 3),
        Err(Error::TooManyOps)
    );
    // Too many operations is found before an empty key.
    assert_eq!(check_txn(&txn(vec![put(""), put("")], vec![]), 1), Err(Error::TooManyOps));
}

#[test]
fn a_branch_changes_a_key_once() {
    let duplicate = [
        vec![put("a"), put("a")],
        vec![put("a"), delete("a", "")],
        vec![delete("a", ""), put("a")],
        vec![delete("a", "c"), put("b")],
        vec![delete("a", "b"), delete("b", "c"), put("b")],
        vec![put("a"), nested(vec![put("a")], vec![])],
        vec![nested(vec![], vec![put("a")]), put("a")],
        vec![nested(vec![put("a")], vec![]), nested(vec![], vec![put("a")])],
        vec![delete("a", "c"), nested(vec![nested(vec![], vec![put("b")])], vec![])],
        vec![nested(vec![delete("a", "c")], vec![]), put("b")],
        vec![nested(vec![delete("a", "c")], vec![]), nested(vec![put("b")], vec![])],
    ];
    for ops in duplicate {
        let error = Err(Error::DuplicateKey);
        assert_eq!(check_txn(&txn(ops.clone(), vec![]), MAX_OPS), error, "{ops:?}");
        assert_eq!(check_txn(&txn(vec![], ops.clone()), MAX_OPS), error, "{ops:?}");
    }

    let fine = [
        vec![put("a"), put("b")],
        vec![put("a"), range("a"), delete("b", "c")],
        vec![delete("a", "c"), delete("b", "d"), delete("b", "")],
        vec![delete("a", "b"), put("b")],
        vec![delete("c", "a"), put("b"), put("c")],
        vec![delete("a", ""), put("a\0")],
        vec![nested(vec![put("a")], vec![put("a"), put("b")])],
        vec![nested(vec![put("a")], vec![delete("a", "c")])],
        // The gaps that etcd has.
        vec![delete("a", "\0"), put("b")],
        vec![nested(vec![put("b")], vec![]), nested(vec![delete("a", "c")], vec![])],
    ];
    for ops in fine {
        assert_eq!(check_txn(&txn(ops.clone(), vec![]), MAX_OPS), Ok(()), "{ops:?}");
    }
    assert_eq!(check_txn(&txn(vec![put("a")], vec![put("a")]), MAX_OPS), Ok(()));
}

#[test]
fn transactions_are_told_apart_for_reading() {
    let serializable = || {
        range_with(RangeRequest { key: bytes("k"), serializable: true, ..RangeRequest::default() })
    };
    // (request, read only, serializable)
    let table = [
        (txn(vec![], vec![]), true, true),
        (txn(vec![range("k")], vec![]), true, false),
        (txn(vec![serializable()], vec![serializable()]), true, true),
        (txn(vec![serializable()], vec![range("k")]), true, false),
        (txn(vec![range("k")], vec![put("k")]), false, false),
        (txn(vec![nested(vec![serializable()], vec![])], vec![]), false, false),
        (txn(vec![RequestOp::default()], vec![]), false, false),
    ];
    for (request, read_only, serializable) in table {
        assert_eq!(is_txn_read_only(&request), read_only, "{request:?}");
        assert_eq!(is_txn_serializable(&request), serializable, "{request:?}");
    }
}

#[test]
fn the_dearer_branch_is_charged() {
    let request = PutRequest { key: bytes("key"), value: bytes("12345"), ..PutRequest::default() };
    assert_eq!(put_cost(&request), 256 + 3 + 5);
    let put = || put_with(request.clone());
    assert_eq!(txn_write_cost(&txn(vec![put()], vec![put(), put()])), 2 * 264);
    assert_eq!(txn_write_cost(&txn(vec![nested(vec![put()], vec![]), put()], vec![])), 2 * 264);
    assert!(txn_has_put(&txn(vec![], vec![nested(vec![], vec![put()])])));
    assert!(!txn_has_put(&txn(vec![range("a"), delete("a", "b")], vec![nested(vec![], vec![])])));
}

#[test]
fn wide_nested_transactions_are_checked_in_good_time() {
    // 40 x 40 x 40 puts: checking each pair would take two thousand million steps.
    let mut next = 0;
    let mut leaf = || {
        let puts = (0..40).map(|_| {
            next += 1;
            put(&format!("key{next:08}"))
        });
        nested(puts.collect(), vec![delete("x", "y")])
    };
    let middle: Vec<_> =
        (0..40).map(|_| nested((0..40).map(|_| leaf()).collect(), vec![])).collect();
    let mut request = txn(middle, vec![]);
    assert_eq!(check_txn(&request, MAX_OPS), Ok(()));
    request.success.push(put("key00031234"));
    assert_eq!(check_txn(&request, MAX_OPS), Err(Error::DuplicateKey));
}

/// etcd's rule for duplicates, pair by pair. The deletes are intervals, the last
/// key excluded.
type Plain = (Vec<Bytes>, Vec<(Bytes, Bytes)>);

fn plain_changes(ops: &[RequestOp]) -> Option<Plain> {
    let covered = |deletes: &[(Bytes, Bytes)], key: &Bytes| {
        deletes.iter().any(|(start, end)| start <= key && key < end)
    };
    let (mut puts, mut deletes): Plain = (Vec::new(), Vec::new());
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            let end = if delete.range_end.is_empty() {
                Bytes::from([&delete.key[..], b"\0"].concat())
            } else {
                delete.range_end.clone()
            };
            deletes.push((delete.key.clone(), end));
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(txn)) = &op.request {
            let success = plain_changes(&txn.success)?;
            let failure = plain_changes(&txn.failure)?;
            for key in success.0.iter().chain(&failure.0) {
                if puts.contains(key) || covered(&deletes, key) {
                    return None;
                }
            }
            puts.extend(success.0.into_iter().chain(failure.0));
            deletes.extend(success.1.into_iter().chain(failure.1));
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request {
            if puts.contains(&put.key) || covered(&deletes, &put.key) {
                return None;
            }
            puts.push(put.key.clone());
        }
    }
    Some((puts, deletes))
}

fn any_key() -> impl Strategy<Value = String> {
    "[a-c][a-c]?"
}

fn any_ops() -> impl Strategy<Value = Vec<RequestOp>> {
    let op = prop_oneof![
        3 => any_key().prop_map(|key| put(&key)),
        1 => (any_key(), prop_oneof![any_key(), Just(String::new()), Just("\0".into())])
            .prop_map(|(key, end)| delete(&key, &end)),
        1 => any_key().prop_map(|key| range(&key)),
    ];
    let ops = prop::collection::vec(op, 0..3);
    ops.prop_recursive(3, 24, 4, |ops| {
        (ops.clone(), prop::collection::vec((ops.clone(), ops), 0..3)).prop_map(
            |(mut all, txns)| {
                all.extend(txns.into_iter().map(|(success, failure)| nested(success, failure)));
                all
            },
        )
    })
}

proptest! {
    #[test]
    fn duplicates_are_found_as_by_comparing_every_pair(ops in any_ops(), others in any_ops()) {
        let expected = if plain_changes(&ops).is_some() && plain_changes(&others).is_some() {
            Ok(())
        } else {
            Err(Error::DuplicateKey)
        };
        prop_assert_eq!(check_txn(&txn(ops, others), 1000), expected);
    }

    #[test]
    fn intervals_hold_what_was_put_in(
        intervals in prop::collection::vec((any_key(), any_key()), 0..12),
        key in any_key(),
        others in prop::collection::btree_set(any_key(), 0..12),
    ) {
        let mut held = Intervals::default();
        for (start, end) in &intervals {
            held.insert_wire(&bytes(start), &bytes(end));
        }
        let plain = |key: &str| {
            intervals.iter().any(|(start, end)| start.as_str() <= key && key < end.as_str())
        };
        prop_assert_eq!(held.contains(key.as_bytes()), plain(&key));
        let keys: BTreeSet<&[u8]> = others.iter().map(|key| key.as_bytes()).collect();
        prop_assert_eq!(held.intersects(&keys), others.iter().any(|key| plain(key)));
        let ends: Vec<_> = held.0.iter().collect();
        prop_assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", ends);
    }
}

/// What is admitted to the log can be read from it: an entry that cannot be read ends the
/// member, and every start after that.
#[test]
fn transactions_nest_no_deeper_than_the_log_can_be_read() {
    use prost::Message as _;

    use crate::pb::kvorumpb::{Command, command};

    let nested = |depth: usize| {
        let range = RangeRequest { key: "k".into(), ..RangeRequest::default() };
        let first = RequestOp { request: Some(Request::RequestRange(range)) };
        let txn = TxnRequest { success: vec![first], ..TxnRequest::default() };
        (0..depth).fold(txn, |txn, _| {
            let op = RequestOp { request: Some(Request::RequestTxn(txn)) };
            TxnRequest { success: vec![op], ..TxnRequest::default() }
        })
    };
    let deepest = nested(TXN_DEPTH_MAX);
    assert_eq!(check_txn(&deepest, 128), Ok(()));
    let header = Some(Default::default());
    let command = Command { header, request: Some(command::Request::Txn(deepest)) };
    let bytes = command.encode_to_vec();
    assert_eq!(Command::decode(bytes.as_slice()), Ok(command));
    assert_eq!(check_txn(&nested(TXN_DEPTH_MAX + 1), 128), Err(Error::TooManyOps));
}
