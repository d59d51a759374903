//! What Lock and Election share: sessions, queues of keys, and waiting in them.
//!
//! Both services keep a queue of keys under `<name>/`, one for each session,
//! named after the session's lease and ordered by creation. The oldest key holds
//! the lock, or leads:
//!
//! ```text
//! jobs/694d8c…01   created at 12   the holder
//! jobs/694d8c…07   created at 15   waits until the key of 12 is deleted
//! jobs/694d8c…0a   created at 18   waits until the key of 15 is deleted
//! ```
//!
//! Each waiter watches the one key before its own, so a release wakes one waiter.
//! The algorithm and the names are those of etcd's client library, so that its
//! users and the users of these services can stand in one queue.
//!
//! A waiter whose client goes away must not stay in the queue: [`Session`] takes
//! its key out when the waiting future is dropped.

use bytes::Bytes;
use prost::Message as _;
use tokio::task::JoinHandle;

use crate::engine::{Engine, WatchStream};
use crate::error::Error;
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::pb::etcdserverpb::request_op::Request as OpRequest;
use crate::pb::etcdserverpb::response_op::Response as OpResponse;
use crate::pb::etcdserverpb::watch_create_request::FilterType;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RangeResponse, RequestOp, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest,
    WatchResponse,
};
use crate::pb::mvccpb;

/// TTL of the lease a session gets when its client brings none, in seconds. Nobody
/// renews that lease, so what it holds is released after this time at the latest.
const SESSION_TTL_SECONDS: i64 = 60;

/// Why a Lock or Election call failed. The texts are those of etcd's client library.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Engine(#[from] Error),
    #[error("mutex: session is expired")]
    SessionExpired,
    #[error("election: not leader")]
    NotLeader,
    #[error("election: no leader")]
    NoLeader,
    #[error("\"leader\" field must be provided")]
    MissingLeaderKey,
    /// A watch was refused, with the reason it gave.
    #[error("{0}")]
    WatchRefused(String),
    /// A stored record could not be decoded.
    #[error("a stored record is not a key-value pair: {0}")]
    Record(#[from] prost::DecodeError),
}

/// The keys under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Queue {
    /// `<name>/`
    prefix: Bytes,
    /// The first key after those that begin with the prefix.
    end: Bytes,
}

impl Queue {
    pub(super) fn new(name: &[u8]) -> Queue {
        Queue { prefix: [name, b"/"].concat().into(), end: [name, b"0"].concat().into() }
    }

    /// The key of a session: the prefix and the lease in hexadecimal.
    pub(super) fn key(&self, lease: i64) -> Bytes {
        let sign = if lease < 0 { "-" } else { "" };
        [&self.prefix, format!("{sign}{:x}", lease.unsigned_abs()).as_bytes()].concat().into()
    }

    /// Asks for the oldest key: the one that holds the lock, or leads.
    pub(super) fn oldest(&self) -> RangeRequest {
        self.first(SortOrder::Ascend)
    }

    /// Asks for the youngest key created at `max_create_revision` or before.
    fn youngest(&self, max_create_revision: i64) -> RangeRequest {
        RangeRequest { max_create_revision, ..self.first(SortOrder::Descend) }
    }

    fn first(&self, order: SortOrder) -> RangeRequest {
        RangeRequest {
            key: self.prefix.clone(),
            range_end: self.end.clone(),
            limit: 1,
            sort_order: order.into(),
            sort_target: SortTarget::Create.into(),
            ..RangeRequest::default()
        }
    }

    /// Asks for the puts (only) under the prefix, from `start_revision` on.
    pub(super) fn puts(&self, start_revision: i64) -> WatchCreateRequest {
        WatchCreateRequest {
            key: self.prefix.clone(),
            range_end: self.end.clone(),
            start_revision,
            filters: vec![FilterType::Nodelete.into()],
            ..WatchCreateRequest::default()
        }
    }

    /// Waits until no key is left that was created at `max_create_revision` or before.
    pub(super) async fn wait_for_deletes(
        &self,
        engine: &Engine,
        max_create_revision: i64,
    ) -> Result<(), Failure> {
        loop {
            let response = engine.range(self.youngest(max_create_revision)).await?;
            let Some(previous) = first_kv(&response)? else { return Ok(()) };
            let mut watch = Watcher::open(
                engine,
                WatchCreateRequest {
                    key: previous.key,
                    start_revision: revision(&response),
                    filters: vec![FilterType::Noput.into()],
                    ..WatchCreateRequest::default()
                },
            )
            .await?;
            // When the watch's start has been compacted meanwhile, look again.
            while let Some(response) = watch.next().await? {
                if !response.events.is_empty() {
                    break;
                }
            }
        }
    }
}

/// A watch of one range, on a stream of its own. Dropping it ends it.
pub(super) struct Watcher {
    stream: WatchStream,
}

impl Watcher {
    pub(super) async fn open(engine: &Engine, create: WatchCreateRequest) -> Result<Self, Failure> {
        let stream = engine.watch()?;
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        stream.requests.send(request).await.map_err(|_| Error::Stopped)?;
        Ok(Watcher { stream })
    }

    /// The next response; `None` when the start revision has been compacted.
    pub(super) async fn next(&mut self) -> Result<Option<WatchResponse>, Failure> {
        let response = self.stream.responses.recv().await.ok_or(Error::Stopped)?;
        match response {
            WatchResponse { canceled: false, .. } => Ok(Some(response)),
            WatchResponse { compact_revision: 1.., .. } => Ok(None),
            WatchResponse { cancel_reason, .. } => Err(Failure::WatchRefused(cancel_reason)),
        }
    }
}

/// A session: a lease, and the key it put into a queue.
///
/// Dropping it leaves the queue, so that a client that goes away while it waits
/// is not waited for. [`Session::keep`] stays in the queue instead.
pub(super) struct Session {
    engine: Engine,
    lease: i64,
    /// The lease was granted here, so that nobody else can use it.
    granted: bool,
    /// The session's key and its create revision, as far as known.
    key: Option<(Bytes, i64)>,
    armed: bool,
}

impl Session {
    /// A session with the client's lease, or with a fresh one when it is 0.
    pub(super) async fn open(engine: &Engine, lease: i64) -> Result<Session, Failure> {
        let granted = lease == 0;
        let lease = if granted {
            let request = LeaseGrantRequest { ttl: SESSION_TTL_SECONDS, id: 0 };
            engine.lease_grant(request).await?.id
        } else {
            lease
        };
        Ok(Session { engine: engine.clone(), lease, granted, key: None, armed: true })
    }

    pub(super) fn lease(&self) -> i64 {
        self.lease
    }

    /// Notes the key that leaving has to delete. Until then a client's lease is not
    /// touched: an earlier call may hold the lock under the same key.
    pub(super) fn entered(&mut self, key: Bytes, create_revision: i64) {
        self.key = Some((key, create_revision));
    }

    /// Stays in the queue until the lease ends or the client asks to leave.
    pub(super) fn keep(mut self) {
        self.armed = false;
    }

    /// Leaves the queue and waits until that is done, as far as it can be.
    pub(super) async fn leave(mut self) {
        if let Some(leaving) = self.start_leaving() {
            // A task that did not finish leaves the rest to the lease's end.
            let _ = leaving.await;
        }
    }

    /// Leaves the queue only if nobody else can be behind the session's lease.
    pub(super) async fn leave_if_granted(self) {
        if self.granted { self.leave().await } else { self.keep() }
    }

    fn start_leaving(&mut self) -> Option<JoinHandle<()>> {
        if !std::mem::take(&mut self.armed) || (!self.granted && self.key.is_none()) {
            return None;
        }
        // Without a runtime the process is ending, and the lease will.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        let (engine, lease, granted) = (self.engine.clone(), self.lease, self.granted);
        let key = self.key.take();
        Some(runtime.spawn(async move {
            // Errors are of no use to anyone: the lease's end does the same, later.
            if granted {
                let _ = engine.lease_revoke(LeaseRevokeRequest { id: lease }).await;
            } else if let Some((key, create_revision)) = key {
                let _ = engine.txn(delete_if(key, create_revision)).await;
            }
        }))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.start_leaving();
    }
}

/// The condition that `key` was created at `revision`; 0 means that it does not exist.
fn created_at(key: &Bytes, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Compare::default()
    }
}

fn op(request: OpRequest) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn put(key: &Bytes, value: Bytes, lease: i64) -> RequestOp {
    op(OpRequest::RequestPut(PutRequest {
        key: key.clone(),
        value,
        lease,
        ..PutRequest::default()
    }))
}

/// A read of one key.
pub(super) fn get(key: &Bytes) -> RangeRequest {
    RangeRequest { key: key.clone(), ..RangeRequest::default() }
}

/// Puts the session's key unless it exists; then reads it instead. `also` is
/// read in both cases.
pub(super) fn enter(
    key: &Bytes,
    value: Bytes,
    lease: i64,
    also: Option<RangeRequest>,
) -> TxnRequest {
    let also = also.map(|range| op(OpRequest::RequestRange(range)));
    TxnRequest {
        compare: vec![created_at(key, 0)],
        success: std::iter::once(put(key, value, lease)).chain(also.clone()).collect(),
        failure: std::iter::once(op(OpRequest::RequestRange(get(key)))).chain(also).collect(),
    }
}

/// Puts a new value if the key is still the one created at `create_revision`.
pub(super) fn put_if(key: &Bytes, create_revision: i64, value: Bytes, lease: i64) -> TxnRequest {
    TxnRequest {
        compare: vec![created_at(key, create_revision)],
        success: vec![put(key, value, lease)],
        failure: Vec::new(),
    }
}

/// Deletes the key if it is still the one created at `create_revision`.
pub(super) fn delete_if(key: Bytes, create_revision: i64) -> TxnRequest {
    TxnRequest {
        compare: vec![created_at(&key, create_revision)],
        success: vec![op(OpRequest::RequestDeleteRange(DeleteRangeRequest {
            key,
            ..DeleteRangeRequest::default()
        }))],
        failure: Vec::new(),
    }
}

/// The key of the `index`th operation of a transaction, if that was a read that found one.
pub(super) fn read_kv(
    response: &TxnResponse,
    index: usize,
) -> Result<Option<mvccpb::KeyValue>, Failure> {
    match response.responses.get(index).and_then(|op| op.response.as_ref()) {
        Some(OpResponse::ResponseRange(range)) => first_kv(range),
        _ => Ok(None),
    }
}

/// The first key of a read.
pub(super) fn first_kv(response: &RangeResponse) -> Result<Option<mvccpb::KeyValue>, Failure> {
    let first = response.kvs.first().cloned();
    Ok(first.map(mvccpb::KeyValue::decode).transpose()?)
}

/// The store's revision when a read was done.
pub(super) fn revision(response: &RangeResponse) -> i64 {
    response.header.as_ref().map_or(0, |header| header.revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_after_the_lease_in_hexadecimal() {
        let queue = Queue::new(b"jobs");
        assert_eq!(queue.key(0x694d_8c01), "jobs/694d8c01");
        assert_eq!(queue.key(-31), "jobs/-1f");
        assert_eq!(queue.key(i64::MIN), "jobs/-8000000000000000");
        assert_eq!(Queue::new(b"").key(1), "/1");
    }

    #[test]
    fn a_queue_spans_its_name_and_the_slash_only() {
        let RangeRequest { key, range_end, .. } = Queue::new(b"a/b").oldest();
        let inside = |candidate: &[u8]| *key <= *candidate && *candidate < *range_end;
        assert!(inside(b"a/b/1") && inside(b"a/b/ffff"));
        assert!(!inside(b"a/b") && !inside(b"a/c/1") && !inside(b"a/b0"));
    }

    #[test]
    fn the_holder_is_the_oldest_and_a_waiter_waits_for_the_one_before() {
        let queue = Queue::new(b"q");
        let oldest = queue.oldest();
        assert_eq!(
            (oldest.sort_target(), oldest.sort_order()),
            (SortTarget::Create, SortOrder::Ascend)
        );
        assert_eq!((oldest.limit, oldest.max_create_revision), (1, 0));
        let before = queue.youngest(41);
        assert_eq!(
            (before.sort_target(), before.sort_order()),
            (SortTarget::Create, SortOrder::Descend)
        );
        assert_eq!((before.limit, before.max_create_revision), (1, 41));
        assert!(!before.serializable && !oldest.serializable, "a queue is read linearizably");
    }

    #[test]
    fn entering_creates_the_key_once_and_reads_the_holder_either_way() {
        let key = Bytes::from("q/1");
        let txn = enter(&key, Bytes::from("v"), 1, Some(Queue::new(b"q").oldest()));
        assert_eq!(txn.compare, [created_at(&key, 0)]);
        assert_eq!((txn.success.len(), txn.failure.len()), (2, 2));
        assert_eq!(txn.success.get(1), txn.failure.get(1));
        match txn.success.first().unwrap().request.as_ref().unwrap() {
            OpRequest::RequestPut(put) => {
                assert_eq!((&put.key, &put.value[..], put.lease), (&key, &b"v"[..], 1));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(txn.failure.first().unwrap().request, Some(OpRequest::RequestRange(get(&key))));
    }

    #[test]
    fn leaving_deletes_only_the_key_of_this_creation() {
        let txn = delete_if(Bytes::from("q/1"), 7);
        assert_eq!(txn.compare, [created_at(&Bytes::from("q/1"), 7)]);
        assert_eq!((txn.success.len(), txn.failure.len()), (1, 0));
    }

    #[test]
    fn failures_have_the_texts_of_etcds_client_library() {
        let texts = [
            (Failure::SessionExpired, "mutex: session is expired"),
            (Failure::NotLeader, "election: not leader"),
            (Failure::NoLeader, "election: no leader"),
            (Failure::MissingLeaderKey, "\"leader\" field must be provided"),
            (Failure::Engine(Error::LeaseNotFound), "etcdserver: requested lease not found"),
        ];
        for (failure, text) in texts {
            assert_eq!(failure.to_string(), text);
        }
    }

    #[test]
    fn kvs_of_transactions_are_found_by_position() {
        let kv =
            mvccpb::KeyValue { key: Bytes::from("k"), create_revision: 3, ..Default::default() };
        let range = RangeResponse { kvs: vec![kv.encode_to_vec().into()], ..Default::default() };
        let response = TxnResponse {
            responses: vec![
                crate::pb::etcdserverpb::ResponseOp {
                    response: Some(OpResponse::ResponsePut(Default::default())),
                },
                crate::pb::etcdserverpb::ResponseOp {
                    response: Some(OpResponse::ResponseRange(range)),
                },
            ],
            ..TxnResponse::default()
        };
        assert_eq!(read_kv(&response, 0).unwrap(), None);
        assert_eq!(read_kv(&response, 1).unwrap(), Some(kv));
        assert_eq!(read_kv(&response, 2).unwrap(), None);
    }
}
