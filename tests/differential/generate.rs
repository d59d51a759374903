//! Random operations. Few keys, few leases and small limits, so that operations
//! meet each other; a share of them is wrong in every way a client can be wrong.

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    AlarmRequest, CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, HashRequest,
    LeaseGrantRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest,
    MemberListRequest, PutRequest, RangeRequest, RequestOp, StatusRequest, TxnRequest,
    WatchCreateRequest, compare::TargetUnion, request_op::Request,
};
use prost::Message as _;

use crate::common::rng::Rng;

/// `--max-txn-ops` of both servers: small, to be exceeded often.
pub(crate) const MAX_TXN_OPS: usize = 8;
/// How deep transactions nest.
const MAX_TXN_DEPTH: usize = 3;
/// Operations between raising an alarm and disarming it.
const ALARM_OPS: usize = 6;
/// The member the alarms are raised for: not one that exists, so that both
/// servers see the same number.
const ALARM_MEMBER: u64 = 7;

const KEYS: [&[u8]; 12] = [
    b"a",
    b"a/1",
    b"a/2",
    b"a/3",
    b"ab",
    b"b",
    b"b/1",
    b"b/2",
    b"\0",
    b"c\0",
    b"\xff",
    b"\xff\xff",
];
const VALUES: [&[u8]; 8] = [b"", b"0", b"1", b"2", b"value", b"\0", b"\xff\xfe", &[b'x'; 300]];
const LEASES: [i64; 6] = [1, 2, 3, 4, 5, -9];

/// One step of a run.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// A call with one answer.
    Unary { method: &'static str, request: Bytes },
    /// A call answered by the parts of one range.
    RangeStream { request: Bytes },
    /// One message on the keepalive stream.
    KeepAlive { id: i64 },
    /// A lease whose id the server picks, or that would expire soon: granted,
    /// looked at and revoked in one step.
    BriefLease { id: i64, ttl: i64 },
    /// A new watcher.
    Watch { request: WatchCreateRequest },
    /// The end of a watcher, chosen among all by this number.
    CancelWatch { choice: u64 },
    /// A progress request on every stream.
    Progress,
    /// All watchers are brought up to date and compared.
    Settle,
}

/// What the generator knows of the servers: enough to aim well.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// The current revision.
    pub(crate) revision: i64,
    /// The last successful compaction.
    pub(crate) compacted: i64,
    /// When to disarm, as an operation's number, and what.
    alarm: Option<(usize, i32)>,
}

impl Known {
    /// A fresh server.
    pub(crate) fn new() -> Known {
        Known { revision: 1, compacted: 0, alarm: None }
    }
}

/// The operation number `index`.
pub(crate) fn operation(rng: &mut Rng, known: &mut Known, index: usize) -> Op {
    if let Some((due, alarm)) = known.alarm
        && index >= due
    {
        known.alarm = None;
        let request = AlarmRequest { action: 2, member_id: ALARM_MEMBER, alarm };
        return unary("etcdserverpb.Maintenance/Alarm", &request);
    }
    let weights =
        [260, 240, 90, 210, 30, 40, 20, 30, 15, 20, 10, 20, 12, 12, 8, 4, 60, 30, 15, 10, 6];
    match rng.weighted(&weights) {
        0 => unary("etcdserverpb.KV/Range", &range(rng, known, false)),
        1 => unary("etcdserverpb.KV/Put", &put(rng)),
        2 => unary("etcdserverpb.KV/DeleteRange", &delete(rng)),
        3 => {
            let mut request = txn(rng, known, 1);
            spare_etcd(&mut request);
            unary("etcdserverpb.KV/Txn", &request)
        }
        4 => Op::RangeStream { request: range(rng, known, true).encode_to_vec().into() },
        5 => {
            let ttls = [100, 5_000, 9_000_000_000, 9_000_000_001, i64::MAX];
            let ttl = rng.pick(&ttls);
            unary("etcdserverpb.Lease/LeaseGrant", &LeaseGrantRequest { id: lease(rng), ttl })
        }
        6 => {
            let id = if rng.chance(50) { 0 } else { 50 };
            Op::BriefLease { id, ttl: rng.pick(&[i64::MIN, -1, 0, 1, 2, 3, 60]) }
        }
        7 => {
            unary("etcdserverpb.Lease/LeaseRevoke", &LeaseRevokeRequest { id: lease_or_none(rng) })
        }
        8 => Op::KeepAlive { id: lease_or_none(rng) },
        9 => {
            let request = LeaseTimeToLiveRequest { id: lease_or_none(rng), keys: rng.chance(70) };
            unary("etcdserverpb.Lease/LeaseTimeToLive", &request)
        }
        10 => unary("etcdserverpb.Lease/LeaseLeases", &LeaseLeasesRequest {}),
        11 => {
            let revision = match rng.weighted(&[80, 5, 5, 5, 5]) {
                0 => rng.between(known.compacted.max(0), known.revision),
                1 => known.compacted,
                2 => known.revision + 1,
                3 => -1,
                _ => known.revision,
            };
            let request = CompactionRequest { revision, physical: rng.chance(50) };
            unary("etcdserverpb.KV/Compact", &request)
        }
        12 => {
            let request = HashKvRequest { revision: revision(rng, known) };
            unary("etcdserverpb.Maintenance/HashKV", &request)
        }
        13 => {
            let request = MemberListRequest { linearizable: rng.chance(50) };
            unary("etcdserverpb.Cluster/MemberList", &request)
        }
        14 => unary("etcdserverpb.Maintenance/Status", &StatusRequest {}),
        15 => unary("etcdserverpb.Maintenance/Hash", &HashRequest {}),
        16 => Op::Watch { request: watch(rng, known) },
        17 => Op::CancelWatch { choice: rng.next() },
        18 => match rng.below(3) {
            0 => Op::Progress,
            _ => Op::Settle,
        },
        19 => alarm(rng, known, index),
        _ => malformed(rng),
    }
}

fn unary(method: &'static str, request: &impl prost::Message) -> Op {
    Op::Unary { method, request: request.encode_to_vec().into() }
}

fn key(rng: &mut Rng) -> Bytes {
    if rng.chance(2) { Bytes::new() } else { Bytes::from_static(rng.pick(&KEYS)) }
}

fn value(rng: &mut Rng) -> Bytes {
    Bytes::from_static(rng.pick(&VALUES))
}

fn lease(rng: &mut Rng) -> i64 {
    rng.pick(&LEASES)
}

fn lease_or_none(rng: &mut Rng) -> i64 {
    if rng.chance(15) { rng.pick(&[0, 99, i64::MAX, i64::MIN]) } else { lease(rng) }
}

fn range_end(rng: &mut Rng, key: &[u8]) -> Bytes {
    match rng.weighted(&[30, 25, 12, 25, 4, 4]) {
        0 => Bytes::new(),
        1 => prefix_end(key),
        2 => Bytes::from_static(b"\0"),
        3 => Bytes::from_static(rng.pick(&KEYS)),
        4 => Bytes::copy_from_slice(key),
        _ => [key, b"\0"].concat().into(),
    }
}

/// The first key after all that begin with `prefix`, as clients compute it.
fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}

fn revision(rng: &mut Rng, known: &Known) -> i64 {
    match rng.weighted(&[55, 25, 5, 5, 4, 3, 3]) {
        0 => 0,
        1 => rng.between(known.compacted.max(1), known.revision),
        2 => known.compacted - 1,
        3 => known.compacted,
        4 => known.revision + 1,
        5 => known.revision + 100,
        _ => -1,
    }
}

fn bound(rng: &mut Rng, known: &Known) -> i64 {
    if rng.chance(88) { 0 } else { rng.between(-1, known.revision + 1) }
}

fn range(rng: &mut Rng, known: &Known, stream: bool) -> RangeRequest {
    let key = key(rng);
    let range_end = range_end(rng, &key);
    // A stream takes neither sort nor filter: mostly do not ask for them.
    let plain = stream && rng.chance(85);
    let sort_order = match rng.weighted(&[50, 24, 24, 2]) {
        _ if plain => 0,
        3 => rng.pick(&[3, -1, 77]),
        order => order as i32,
    };
    RangeRequest {
        range_end,
        key,
        limit: if rng.chance(60) { 0 } else { rng.between(-1, 5) },
        revision: revision(rng, known),
        sort_order,
        sort_target: match rng.weighted(&[40, 15, 15, 15, 13, 2]) {
            // Without an order etcd takes any target, and its stream loses keys.
            _ if plain || (stream && sort_order == 0) => 0,
            5 => rng.pick(&[5, -1, 77]),
            target => target as i32,
        },
        serializable: rng.chance(40),
        keys_only: rng.chance(15),
        count_only: rng.chance(10),
        min_mod_revision: if plain { 0 } else { bound(rng, known) },
        max_mod_revision: if plain { 0 } else { bound(rng, known) },
        min_create_revision: if plain { 0 } else { bound(rng, known) },
        max_create_revision: if plain { 0 } else { bound(rng, known) },
    }
}

fn put(rng: &mut Rng) -> PutRequest {
    let ignore_value = rng.chance(10);
    let ignore_lease = rng.chance(10);
    PutRequest {
        key: key(rng),
        value: if ignore_value && rng.chance(85) { Bytes::new() } else { value(rng) },
        lease: if (ignore_lease && rng.chance(85)) || rng.chance(65) {
            0
        } else if rng.chance(3) {
            99
        } else {
            lease(rng)
        },
        prev_kv: rng.chance(40),
        ignore_value,
        ignore_lease,
    }
}

fn delete(rng: &mut Rng) -> DeleteRangeRequest {
    let key = key(rng);
    // Whole prefixes go rarely, so that something is left.
    let range_end = if rng.chance(75) { Bytes::new() } else { range_end(rng, &key) };
    DeleteRangeRequest { range_end, key, prev_kv: rng.chance(50) }
}

fn compare(rng: &mut Rng, known: &Known) -> Compare {
    let key = key(rng);
    let target = rng.below(5) as i32;
    let near = match rng.weighted(&[40, 30, 30]) {
        0 => 0,
        1 => rng.between(1, 4),
        _ => rng.between((known.revision - 10).max(1), known.revision),
    };
    // Now and then the value belongs to another target.
    let union = if rng.chance(4) { rng.below(6) as i32 } else { target };
    Compare {
        result: if rng.chance(2) { rng.pick(&[4, -1]) } else { rng.below(4) as i32 },
        target: if rng.chance(2) { rng.pick(&[5, -1]) } else { target },
        range_end: if rng.chance(70) { Bytes::new() } else { range_end(rng, &key) },
        key,
        target_union: match union {
            0 => Some(TargetUnion::Version(near)),
            1 => Some(TargetUnion::CreateRevision(near)),
            2 => Some(TargetUnion::ModRevision(near)),
            3 => Some(TargetUnion::Value(value(rng))),
            4 => Some(TargetUnion::Lease(if rng.chance(50) { 0 } else { lease(rng) })),
            _ => None,
        },
    }
}

fn txn(rng: &mut Rng, known: &Known, depth: usize) -> TxnRequest {
    let many = rng.chance(3);
    let [compares, success, failure] = [2, 3, 3].map(|usual| {
        if many && rng.chance(40) {
            rng.between(MAX_TXN_OPS as i64 - 1, MAX_TXN_OPS as i64 + 1)
        } else {
            rng.between(0, usual)
        }
    });
    TxnRequest {
        compare: (0..compares).map(|_| compare(rng, known)).collect(),
        success: (0..success).map(|_| request_op(rng, known, depth)).collect(),
        failure: (0..failure).map(|_| request_op(rng, known, depth)).collect(),
    }
}

/// Changes a transaction that etcd 3.7.1 would accept though it changes a key
/// twice: it overlooks a delete up to "\0" (it takes that for an empty range),
/// and a delete in a nested transaction after a put in its elder sibling. Later
/// it crashes over the two changes, at a compaction or at an `ignore_value`.
fn spare_etcd(txn: &mut TxnRequest) {
    if has_put(txn) {
        close_deletes(txn);
    }
    for branch in [&mut txn.success, &mut txn.failure] {
        let mut elder = false;
        for op in branch {
            if let Some(Request::RequestTxn(nested)) = &mut op.request {
                spare_etcd(nested);
                if elder {
                    drop_deletes(nested);
                }
                elder = true;
            }
        }
    }
}

fn has_put(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(nested)) => has_put(nested),
        _ => false,
    })
}

fn close_deletes(txn: &mut TxnRequest) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(Request::RequestDeleteRange(delete)) if delete.range_end == b"\0".as_slice() => {
                delete.range_end = Bytes::new();
            }
            Some(Request::RequestTxn(nested)) => close_deletes(nested),
            _ => {}
        }
    }
}

fn drop_deletes(txn: &mut TxnRequest) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(Request::RequestDeleteRange(delete)) => {
                let (key, range_end) = (delete.key.clone(), delete.range_end.clone());
                let range = RangeRequest { key, range_end, ..Default::default() };
                op.request = Some(Request::RequestRange(range));
            }
            Some(Request::RequestTxn(nested)) => drop_deletes(nested),
            _ => {}
        }
    }
}

fn request_op(rng: &mut Rng, known: &Known, depth: usize) -> RequestOp {
    let nested = if depth < MAX_TXN_DEPTH { 12 } else { 0 };
    let request = match rng.weighted(&[40, 32, 16, nested, 1]) {
        0 => Some(Request::RequestPut(put(rng))),
        1 => Some(Request::RequestRange(range(rng, known, false))),
        2 => Some(Request::RequestDeleteRange(delete(rng))),
        3 => Some(Request::RequestTxn(txn(rng, known, depth + 1))),
        _ => None,
    };
    RequestOp { request }
}

fn watch(rng: &mut Rng, known: &Known) -> WatchCreateRequest {
    let key = key(rng);
    WatchCreateRequest {
        range_end: range_end(rng, &key),
        key,
        start_revision: match rng.weighted(&[35, 35, 8, 7, 10, 3, 2]) {
            0 => 0,
            1 => rng.between(known.compacted.max(1), known.revision),
            2 => known.revision + 1,
            3 => known.revision + rng.between(2, 20),
            4 => known.compacted - 1,
            5 => known.compacted,
            _ => -1,
        },
        progress_notify: rng.chance(20),
        filters: match rng.weighted(&[70, 12, 12, 4, 2]) {
            0 => vec![],
            1 => vec![0],
            2 => vec![1],
            3 => vec![0, 1],
            _ => vec![7],
        },
        prev_kv: rng.chance(50),
        watch_id: if rng.chance(80) { 0 } else { rng.pick(&[1, 2, 5, 1_000, -5]) },
        fragment: rng.chance(20),
    }
}

fn alarm(rng: &mut Rng, known: &mut Known, index: usize) -> Op {
    let alarm = rng.pick(&[0, 1, 1, 2, 9]);
    // Not an action that does not exist: etcd 3.7.1 crashes on it.
    let action = rng.pick(&[0, 0, 1, 2]);
    if action == 1 && known.alarm.is_none() {
        known.alarm = Some((index + ALARM_OPS, alarm));
    } else if action == 1 {
        return Op::Settle;
    }
    let request = AlarmRequest { action, member_id: ALARM_MEMBER, alarm };
    unary("etcdserverpb.Maintenance/Alarm", &request)
}

/// What no client library sends.
fn malformed(rng: &mut Rng) -> Op {
    let methods = [
        "etcdserverpb.KV/Range",
        "etcdserverpb.KV/Put",
        "etcdserverpb.KV/Txn",
        "etcdserverpb.Lease/LeaseRevoke",
        "etcdserverpb.KV/Nope",
        "etcdserverpb.Nope/Range",
    ];
    let requests: [&[u8]; 4] = [b"\xff", b"\x0a\x05a", b"\x0a\x01a\x12", b""];
    Op::Unary { method: rng.pick(&methods), request: Bytes::from_static(rng.pick(&requests)) }
}
