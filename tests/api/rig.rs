//! A server, clients for it, and short forms of the calls that tests make.

use std::future::Future;
use std::time::Duration;

use kvorum::pb::etcdserverpb::cluster_client::ClusterClient;
use kvorum::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::response_op::Response as OpResponse;
use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use kvorum::pb::etcdserverpb::watch_request::RequestUnion;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest,
    RangeResponse, RequestOp, TxnRequest, TxnResponse, WatchCancelRequest, WatchCreateRequest,
    WatchProgressRequest, WatchRequest, WatchResponse,
};
use kvorum::pb::mvccpb::event::EventType;
use kvorum::pb::mvccpb::{Event, KeyValue};
use kvorum::{Config, Server};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// How long anything may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for `future`, but not for ever.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

/// Waits until `condition` gives something.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    soon(what, async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}

/// Asserts that a call failed with this code and exactly this text.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.expect_err("a refusal");
    assert_eq!((status.code(), status.message()), (code, text));
}

pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) channel: Channel,
}

pub(crate) async fn start() -> Rig {
    start_with(Config::in_memory()).await
}

pub(crate) async fn start_with(config: Config) -> Rig {
    let server = soon("the server to start", Server::start(config)).await.unwrap();
    let channel = server.channel();
    Rig { server, channel }
}

/// The end of the range of all keys that begin with `prefix`.
pub(crate) fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    String::from_utf8(end).unwrap()
}

pub(crate) fn kvs(response: &RangeResponse) -> Vec<KeyValue> {
    response.kvs.iter().map(|kv| KeyValue::decode(kv.clone()).unwrap()).collect()
}

pub(crate) fn keys(response: &RangeResponse) -> Vec<String> {
    kvs(response).iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap()).collect()
}

pub(crate) fn range_of(response: &TxnResponse, index: usize) -> &RangeResponse {
    match &response.responses[index].response {
        Some(OpResponse::ResponseRange(range)) => range,
        other => panic!("not a range: {other:?}"),
    }
}

pub(crate) fn op(request: Op) -> RequestOp {
    RequestOp { request: Some(request) }
}

pub(crate) fn put_request(key: &str, value: &str, lease: i64) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        lease,
        ..PutRequest::default()
    }
}

pub(crate) fn put_op(key: &str, value: &str) -> RequestOp {
    op(Op::RequestPut(put_request(key, value, 0)))
}

pub(crate) fn get_op(key: &str) -> RequestOp {
    op(Op::RequestRange(get_request(key)))
}

pub(crate) fn delete_op(key: &str) -> RequestOp {
    op(Op::RequestDeleteRange(DeleteRangeRequest {
        key: key.to_owned().into(),
        ..DeleteRangeRequest::default()
    }))
}

pub(crate) fn get_request(key: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() }
}

pub(crate) fn list_request(prefix: &str) -> RangeRequest {
    RangeRequest { range_end: prefix_end(prefix).into(), ..get_request(prefix) }
}

pub(crate) fn mod_revision_is(key: &str, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key: key.to_owned().into(),
        target_union: Some(TargetUnion::ModRevision(revision)),
        ..Compare::default()
    }
}

impl Rig {
    pub(crate) fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone())
    }

    pub(crate) fn leases(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    pub(crate) fn members(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone())
    }

    pub(crate) fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel.clone())
    }

    /// Puts and returns the revision.
    pub(crate) async fn put(&self, key: &str, value: &str) -> i64 {
        self.put_leased(key, value, 0).await
    }

    pub(crate) async fn put_leased(&self, key: &str, value: &str, lease: i64) -> i64 {
        let response = self.kv().put(put_request(key, value, lease)).await.unwrap();
        response.into_inner().header.unwrap().revision
    }

    /// Deletes a range and returns the revision.
    pub(crate) async fn delete(&self, key: &str, range_end: &str) -> i64 {
        let request = DeleteRangeRequest {
            key: key.to_owned().into(),
            range_end: range_end.to_owned().into(),
            prev_kv: false,
        };
        let response = self.kv().delete_range(request).await.unwrap();
        response.into_inner().header.unwrap().revision
    }

    pub(crate) async fn range(&self, request: RangeRequest) -> RangeResponse {
        self.kv().range(request).await.unwrap().into_inner()
    }

    pub(crate) async fn get(&self, key: &str) -> Option<KeyValue> {
        kvs(&self.range(get_request(key)).await).into_iter().next()
    }

    pub(crate) async fn revision(&self) -> i64 {
        self.range(get_request("any")).await.header.unwrap().revision
    }

    pub(crate) async fn txn(
        &self,
        compare: Compare,
        success: Vec<RequestOp>,
        failure: Vec<RequestOp>,
    ) -> TxnResponse {
        let request = TxnRequest { compare: vec![compare], success, failure };
        self.kv().txn(request).await.unwrap().into_inner()
    }

    pub(crate) async fn compact(&self, revision: i64) -> Result<(), Status> {
        let request = CompactionRequest { revision, physical: false };
        self.kv().compact(request).await.map(drop)
    }

    /// Grants a lease and returns its id.
    pub(crate) async fn grant(&self, ttl: i64) -> i64 {
        let request = LeaseGrantRequest { ttl, id: 0 };
        self.leases().lease_grant(request).await.unwrap().into_inner().id
    }

    pub(crate) fn watches(&self) -> Watches {
        Watches::open(self.channel.clone())
    }
}

/// A watch stream.
pub(crate) struct Watches {
    /// `None` after a half-close.
    requests: Option<mpsc::Sender<WatchRequest>>,
    responses: Responses,
}

/// etcd sends nothing before it has something to say, not even that the call is
/// accepted: so the call is still on its way when the first request is sent.
enum Responses {
    Opening(JoinHandle<Result<tonic::Response<Streaming<WatchResponse>>, Status>>),
    Open(Box<Streaming<WatchResponse>>),
}

/// An event without what most tests do not look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: EventType,
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) revision: i64,
    pub(crate) previous: Option<String>,
}

pub(crate) fn watch_prefix(prefix: &str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest {
        key: prefix.to_owned().into(),
        range_end: prefix_end(prefix).into(),
        start_revision,
        ..WatchCreateRequest::default()
    }
}

impl Watches {
    pub(crate) fn open(channel: Channel) -> Watches {
        let (requests, stream) = mpsc::channel(8);
        let mut client = WatchClient::new(channel);
        let opening = tokio::spawn(async move { client.watch(ReceiverStream::new(stream)).await });
        Watches { requests: Some(requests), responses: Responses::Opening(opening) }
    }

    pub(crate) async fn send(&self, union: RequestUnion) {
        let request = WatchRequest { request_union: Some(union) };
        self.requests.as_ref().unwrap().send(request).await.unwrap();
    }

    pub(crate) fn half_close(&mut self) {
        self.requests = None;
    }

    pub(crate) async fn next(&mut self) -> WatchResponse {
        if let Responses::Opening(opening) = &mut self.responses {
            let opened = soon("the watch stream to open", opening).await.unwrap().unwrap();
            self.responses = Responses::Open(Box::new(opened.into_inner()));
        }
        let Responses::Open(responses) = &mut self.responses else { panic!("just opened") };
        let response = soon("a watch response", responses.message()).await.unwrap().unwrap();
        assert!(response.header.is_some(), "clients follow the header without looking");
        response
    }

    /// Creates a watch and takes its first answer.
    pub(crate) async fn create(&mut self, create: WatchCreateRequest) -> WatchResponse {
        self.send(RequestUnion::CreateRequest(create)).await;
        let response = self.next().await;
        assert!(response.created, "{response:?}");
        response
    }

    pub(crate) async fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await;
    }

    pub(crate) async fn request_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    }

    /// The next responses' events, until there are as many as `count`.
    pub(crate) async fn events(&mut self, count: usize) -> Vec<Seen> {
        let mut events = Vec::new();
        while events.len() < count {
            events.extend(seen(&self.next().await));
        }
        assert_eq!(events.len(), count, "{events:?}");
        events
    }
}

pub(crate) fn seen(response: &WatchResponse) -> Vec<Seen> {
    let text = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    response
        .events
        .iter()
        .map(|event| {
            let event = Event::decode(event.clone()).unwrap();
            let kv = event.kv.as_ref().unwrap();
            Seen {
                kind: event.r#type(),
                key: text(&kv.key),
                value: text(&kv.value),
                revision: kv.mod_revision,
                previous: event.prev_kv.as_ref().map(|kv| text(&kv.value)),
            }
        })
        .collect()
}
