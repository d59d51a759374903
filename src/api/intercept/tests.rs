use std::sync::atomic::AtomicU32;

use http_body_util::BodyExt as _;
use prost::Message as _;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::codegen::Service as _;
use tower::ServiceExt as _;

use super::*;
use crate::pb::etcdserverpb::kv_server::{Kv, KvServer};
use crate::pb::etcdserverpb::watch_server::{Watch, WatchServer};
use crate::pb::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader, TxnRequest,
    TxnResponse, WatchRequest, WatchResponse,
};

const LIMIT: u32 = 1000;

type Reply<T> = Result<tonic::Response<T>, Status>;

/// `put` answers, `range` never does, `compact` refuses.
struct FakeKv;

#[tonic::async_trait]
impl Kv for FakeKv {
    async fn put(&self, _: tonic::Request<PutRequest>) -> Reply<PutResponse> {
        let header = Some(ResponseHeader { revision: 5, ..ResponseHeader::default() });
        Ok(tonic::Response::new(PutResponse { header, ..PutResponse::default() }))
    }
    async fn range(&self, _: tonic::Request<RangeRequest>) -> Reply<RangeResponse> {
        std::future::pending().await
    }
    async fn compact(&self, _: tonic::Request<CompactionRequest>) -> Reply<CompactionResponse> {
        Err(status(Error::Compacted))
    }
    async fn delete_range(
        &self,
        _: tonic::Request<DeleteRangeRequest>,
    ) -> Reply<DeleteRangeResponse> {
        Err(Status::internal("not used"))
    }
    async fn txn(&self, _: tonic::Request<TxnRequest>) -> Reply<TxnResponse> {
        Err(Status::internal("not used"))
    }
    type RangeStreamStream = ReceiverStream<Result<RangeStreamResponse, Status>>;
    async fn range_stream(
        &self,
        _: tonic::Request<RangeRequest>,
    ) -> Reply<Self::RangeStreamStream> {
        Err(Status::internal("not used"))
    }
}

/// Answers each request with one response, and tells when its stream is dropped.
struct FakeWatch {
    dropped: Arc<Notify>,
}

#[tonic::async_trait]
impl Watch for FakeWatch {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;
    async fn watch(
        &self,
        request: tonic::Request<Streaming<WatchRequest>>,
    ) -> Reply<Self::WatchStream> {
        let (responses, stream) = mpsc::channel(8);
        let dropped = self.dropped.clone();
        tokio::spawn(async move {
            let mut inbound = request.into_inner();
            let answer = async {
                while let Some(message) = inbound.message().await.transpose() {
                    let answer = message.map(|_| WatchResponse::default());
                    responses.send(answer).await.unwrap();
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = responses.closed() => dropped.notify_one(),
                () = answer => {}
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }
}

struct Fakes {
    kv: KvServer<FakeKv>,
    watch: WatchServer<FakeWatch>,
}

impl Dispatch for Fakes {
    fn dispatch(
        &self,
        request: http::Request<RequestBody>,
    ) -> Option<BoxFuture<Response, Infallible>> {
        if request.uri().path().starts_with("/etcdserverpb.KV/") {
            Some(self.kv.clone().call(request))
        } else {
            Some(self.watch.clone().call(request))
        }
    }

    fn has_service(&self, name: &str) -> bool {
        name == "etcdserverpb.KV"
    }
}

struct Rig {
    layer: Intercept<Fakes>,
    metrics: Arc<Metrics>,
    leader: Arc<AtomicBool>,
    leader_checks: Arc<AtomicU32>,
    learner: Arc<AtomicBool>,
    dropped: Arc<Notify>,
}

fn rig() -> Rig {
    rig_with(Duration::from_secs(3600))
}

fn rig_with(slow_unary: Duration) -> Rig {
    let metrics = Metrics::new().unwrap();
    let leader = Arc::new(AtomicBool::new(true));
    let leader_checks = Arc::new(AtomicU32::new(0));
    let learner = Arc::new(AtomicBool::new(false));
    let dropped = Arc::new(Notify::new());
    let settings = Settings {
        max_message_bytes: LIMIT,
        election_timeout: Duration::from_millis(5),
        slow_unary,
        has_leader: {
            let (leader, checks) = (leader.clone(), leader_checks.clone());
            Box::new(move || {
                checks.fetch_add(1, Ordering::SeqCst);
                leader.load(Ordering::SeqCst)
            })
        },
        is_learner: {
            let learner = learner.clone();
            Box::new(move || learner.load(Ordering::SeqCst))
        },
    };
    let watch = WatchServer::new(FakeWatch { dropped: dropped.clone() });
    let services = Fakes { kv: KvServer::new(FakeKv), watch };
    let layer = Intercept::new(services, settings, metrics.clone());
    Rig { layer, metrics, leader, leader_checks, learner, dropped }
}

/// One message as gRPC frames it.
fn framed(message: &impl prost::Message) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    frame.extend(message.encode_to_vec());
    frame
}

fn request(path: &str, body: impl Into<axum::body::Body>) -> http::Request<axum::body::Body> {
    http::Request::post(format!("http://test{path}"))
        .header("content-type", "application/grpc")
        .body(body.into())
        .unwrap()
}

fn with(
    mut request: http::Request<axum::body::Body>,
    name: &'static str,
    value: &[u8],
) -> http::Request<axum::body::Body> {
    request.headers_mut().insert(name, http::HeaderValue::from_bytes(value).unwrap());
    request
}

/// A put of `value_bytes` bytes and the size of its message.
fn put(value_bytes: usize) -> (http::Request<axum::body::Body>, usize) {
    let message = PutRequest { value: vec![b'v'; value_bytes].into(), ..PutRequest::default() };
    (request("/etcdserverpb.KV/Put", framed(&message)), message.encoded_len())
}

/// A request whose body stays open, and the end that feeds it.
fn open_watch() -> (http::Request<axum::body::Body>, mpsc::Sender<Result<Vec<u8>, Infallible>>) {
    let (feed, body) = mpsc::channel(4);
    let body = axum::body::Body::from_stream(ReceiverStream::new(body));
    (request("/etcdserverpb.Watch/Watch", body), feed)
}

impl Rig {
    async fn call(&self, request: http::Request<axum::body::Body>) -> http::Response<ResponseBody> {
        self.layer.clone().oneshot(request).await.unwrap()
    }

    /// The status a call ends with.
    async fn status(&self, request: http::Request<axum::body::Body>) -> (Code, String) {
        let (head, body) = self.call(request).await.into_parts();
        let status = match Status::from_header_map(&head.headers) {
            Some(status) => status,
            None => {
                let body = body.collect().await.unwrap();
                Status::from_header_map(body.trailers().unwrap()).unwrap()
            }
        };
        (status.code(), status.message().to_owned())
    }

    /// The value of a series, given with its labels as the exposition writes them.
    fn count(&self, series: &str) -> u64 {
        let text = self.metrics.render().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no series {series} in:\n{text}")).parse().unwrap()
    }

    fn handled(&self, code: &str, service: &str, method: &str, kind: &str) -> u64 {
        self.count(&format!(
            "grpc_server_handled_total{{grpc_code=\"{code}\",grpc_method=\"{method}\",\
             grpc_service=\"{service}\",grpc_type=\"{kind}\"}}"
        ))
    }

    fn messages(&self, direction: &str, service: &str, method: &str, kind: &str) -> u64 {
        self.count(&format!(
            "grpc_server_{direction}_total{{grpc_method=\"{method}\",\
             grpc_service=\"{service}\",grpc_type=\"{kind}\"}}"
        ))
    }
}

#[tokio::test]
async fn a_unary_call_is_counted_once_with_its_messages_and_bytes() {
    let rig = rig();
    let (request, size) = put(100);
    let response = rig.call(with(request, "client-api-version", b"3.6")).await;
    let body = response.into_body().collect().await.unwrap();
    let sent = body.to_bytes().len() as u64 - PREFIX_BYTES as u64;

    let kv = "etcdserverpb.KV";
    assert_eq!(rig.messages("started", kv, "Put", "unary"), 1);
    assert_eq!(rig.messages("msg_received", kv, "Put", "unary"), 1);
    assert_eq!(rig.messages("msg_sent", kv, "Put", "unary"), 1);
    assert_eq!(rig.handled("OK", kv, "Put", "unary"), 1);
    assert_eq!(rig.handled("Canceled", kv, "Put", "unary"), 0);
    assert_eq!(rig.count("etcd_network_client_grpc_received_bytes_total"), size as u64);
    assert_eq!(rig.count("etcd_network_client_grpc_sent_bytes_total"), sent);
    assert_eq!(
        rig.count("etcd_server_client_requests_total{client_api_version=\"3.6\",type=\"unary\"}"),
        1
    );
}

#[tokio::test]
async fn a_refusal_is_counted_with_its_code() {
    let rig = rig();
    let compact = request("/etcdserverpb.KV/Compact", framed(&CompactionRequest::default()));
    let (code, text) = rig.status(compact).await;
    assert_eq!(code, Code::OutOfRange);
    assert_eq!(text, "etcdserver: mvcc: required revision has been compacted");
    assert_eq!(rig.handled("OutOfRange", "etcdserverpb.KV", "Compact", "unary"), 1);
    assert_eq!(rig.messages("msg_sent", "etcdserverpb.KV", "Compact", "unary"), 0);
}

#[tokio::test]
async fn a_call_its_client_gives_up_is_counted_as_cancelled() {
    let rig = rig();
    let range = request("/etcdserverpb.KV/Range", framed(&RangeRequest::default()));
    let mut call = rig.layer.clone().call(range);
    let mut cx = Context::from_waker(std::task::Waker::noop());
    assert!(Pin::new(&mut call).poll(&mut cx).is_pending());
    assert_eq!(rig.handled("Canceled", "etcdserverpb.KV", "Range", "unary"), 0);
    drop(call);
    assert_eq!(rig.handled("Canceled", "etcdserverpb.KV", "Range", "unary"), 1);
}

/// Where a test's log goes.
#[derive(Clone, Default)]
struct Log(Arc<parking_lot::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_slow_unary_call_is_worth_a_warning_that_names_it_and_its_client() {
    for (threshold, warns) in [(Duration::ZERO, true), (Duration::from_secs(3600), false)] {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _here = tracing::subscriber::set_default(subscriber);
        let rig = rig_with(threshold);
        let mut request = put(100).0;
        let connection = Connection {
            remote: Some("192.0.2.1:4711".parse().unwrap()),
            tls: false,
            peer_common_name: None,
        };
        request.extensions_mut().insert(Arc::new(connection));
        assert_eq!(rig.status(request).await.0, Code::Ok);
        let text = String::from_utf8(log.0.lock().clone()).unwrap();
        for part in ["WARN", "request took too long", "/etcdserverpb.KV/Put", "192.0.2.1:4711"] {
            assert_eq!(text.contains(part), warns, "{part} in {text:?}");
        }
    }
}

/// In etcd's order: before anything in the metadata is looked at.
#[tokio::test]
async fn a_learner_answers_little() {
    let rig = rig();
    rig.learner.store(true, Ordering::SeqCst);
    rig.leader.store(false, Ordering::SeqCst);
    let unsupported =
        (Code::FailedPrecondition, "etcdserver: rpc not supported for learner".to_owned());
    for path in [
        "/etcdserverpb.KV/Put",
        "/etcdserverpb.KV/RangeStream",
        "/etcdserverpb.Cluster/MemberList",
        "/etcdserverpb.Maintenance/HashKV",
        "/etcdserverpb.Watch/Watch",
    ] {
        let call = || request(path, framed(&PutRequest::default()));
        assert_eq!(rig.status(call()).await, unsupported, "{path}");
        let with_metadata = with(call(), "client-api-version", b"\xff");
        assert_eq!(rig.status(with(with_metadata, "hasleader", b"true")).await, unsupported);
    }
    for path in ANSWERED_BY_LEARNERS {
        let refused = rig.status(with(request(path, ""), "hasleader", b"true")).await;
        assert_eq!(refused, (Code::Unavailable, "etcdserver: no leader".to_owned()), "{path}");
    }
    rig.learner.store(false, Ordering::SeqCst);
    assert_eq!(rig.status(put(1).0).await.0, Code::Ok);
}

#[tokio::test]
async fn unknown_paths_are_refused_in_grpc_gos_words() {
    let rig = rig();
    for (path, text) in [
        ("/etcdserverpb.KV/Frob", "unknown method Frob for service etcdserverpb.KV"),
        ("/a.b.C/Frob", "unknown service a.b.C"),
        ("/a/b/Frob", "unknown service a/b"),
        ("/Frob", "malformed method name: \"Frob\""),
        ("/", "malformed method name: \"\""),
    ] {
        let refusal = rig.status(request(path, "")).await;
        assert_eq!(refusal, (Code::Unimplemented, text.to_owned()), "{path}");
    }
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_in_grpc_gos_words() {
    let rig = rig();
    // A message of exactly the limit is fine: 3 bytes of it are the field's header.
    let (largest, size) = put(LIMIT as usize - 3);
    assert_eq!(size, LIMIT as usize);
    assert_eq!(rig.status(largest).await.0, Code::Ok);

    let (larger, size) = put(LIMIT as usize - 2);
    let (code, text) = rig.status(larger).await;
    assert_eq!(code, Code::ResourceExhausted);
    assert_eq!(text, format!("grpc: received message larger than max ({size} vs. {LIMIT})"));
    assert_eq!(rig.messages("msg_received", "etcdserverpb.KV", "Put", "unary"), 1);
}

#[tokio::test]
async fn a_message_beyond_the_limit_ends_a_stream() {
    let rig = rig();
    let (watch, feed) = open_watch();
    let mut prefix = vec![0];
    prefix.extend((LIMIT + 1).to_be_bytes());
    feed.send(Ok(framed(&WatchRequest::default()))).await.unwrap();
    // The prefix is enough to refuse: the message itself never comes.
    feed.send(Ok(prefix)).await.unwrap();
    let (code, text) = rig.status(watch).await;
    assert_eq!(code, Code::ResourceExhausted);
    assert_eq!(text, format!("grpc: received message larger than max ({} vs. {LIMIT})", LIMIT + 1));
    let (service, kind) = ("etcdserverpb.Watch", "bidi_stream");
    assert_eq!(rig.messages("msg_received", service, "Watch", kind), 1);
    assert_eq!(rig.messages("msg_sent", service, "Watch", kind), 1);
    assert_eq!(rig.handled("ResourceExhausted", service, "Watch", kind), 1);
}

#[tokio::test]
async fn a_client_api_version_must_be_text() {
    let rig = rig();
    let (code, text) = rig.status(with(put(1).0, "client-api-version", b"3.\xff")).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(text, "etcdserver: invalid client api version");
    // Text beyond ASCII is text.
    let umlaut = with(put(1).0, "client-api-version", "drüben".as_bytes());
    assert_eq!(rig.status(umlaut).await.0, Code::Ok);
}

#[tokio::test]
async fn calls_that_need_a_leader_are_refused_without_one() {
    let rig = rig();
    let needing = || with(put(1).0, "hasleader", b"true");
    assert_eq!(rig.status(needing()).await.0, Code::Ok);
    rig.leader.store(false, Ordering::SeqCst);
    let refusal = (Code::Unavailable, "etcdserver: no leader".to_owned());
    assert_eq!(rig.status(needing()).await, refusal);
    assert_eq!(rig.status(with(open_watch().0, "hasleader", b"true")).await, refusal);
    assert_eq!(rig.status(with(put(1).0, "hasleader", b"false")).await.0, Code::Ok);
    assert_eq!(rig.status(put(1).0).await.0, Code::Ok);
}

#[tokio::test]
async fn a_running_stream_that_needs_a_leader_ends_after_three_leaderless_checks() {
    let rig = rig();
    let (watch, feed) = open_watch();
    feed.send(Ok(framed(&WatchRequest::default()))).await.unwrap();
    let needing = rig.call(with(watch, "hasleader", b"true")).await;
    let (watch, patient_feed) = open_watch();
    let mut patient = rig.call(watch).await.into_body();

    rig.leader.store(false, Ordering::SeqCst);
    let checks_before = rig.leader_checks.load(Ordering::SeqCst);
    let body = needing.into_body().collect().await.unwrap();
    let checks = rig.leader_checks.load(Ordering::SeqCst) - checks_before;
    assert!(checks >= LEADERLESS_CHECKS, "ended after {checks} checks");
    let status = Status::from_header_map(body.trailers().unwrap()).unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "etcdserver: no leader");
    assert_eq!(body.to_bytes().len(), PREFIX_BYTES, "what came before is delivered");

    // The service is told, by its response stream being dropped.
    rig.dropped.notified().await;
    assert_eq!(rig.handled("Unavailable", "etcdserverpb.Watch", "Watch", "bidi_stream"), 1);

    // A stream that did not ask for a leader goes on.
    patient_feed.send(Ok(framed(&WatchRequest::default()))).await.unwrap();
    assert!(patient.frame().await.unwrap().unwrap().is_data());
}

#[tokio::test]
async fn a_leader_that_comes_back_in_time_saves_the_stream() {
    let rig = rig();
    let shared = rig.layer.shared.clone();
    let mut lost = Shared::watch_leader(&shared);
    // One leaderless check, then a leader: the count starts anew each time.
    for round in 0..3 {
        rig.leader.store(false, Ordering::SeqCst);
        let seen = rig.leader_checks.load(Ordering::SeqCst);
        while rig.leader_checks.load(Ordering::SeqCst) == seen {
            tokio::task::yield_now().await;
        }
        rig.leader.store(true, Ordering::SeqCst);
        let seen = rig.leader_checks.load(Ordering::SeqCst);
        while rig.leader_checks.load(Ordering::SeqCst) == seen {
            tokio::task::yield_now().await;
        }
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Pin::new(&mut lost).poll_next(&mut cx).is_pending(), "round {round}");
    }
}

#[tokio::test]
async fn the_deadline_ends_calls_and_running_streams() {
    let rig = rig();
    let late = (Code::DeadlineExceeded, "context deadline exceeded".to_owned());
    let range = request("/etcdserverpb.KV/Range", framed(&RangeRequest::default()));
    assert_eq!(rig.status(with(range, "grpc-timeout", b"10m")).await, late);
    assert_eq!(rig.handled("DeadlineExceeded", "etcdserverpb.KV", "Range", "unary"), 1);

    let (watch, _feed) = open_watch();
    assert_eq!(rig.status(with(watch, "grpc-timeout", b"10m")).await, late);
    rig.dropped.notified().await;

    // Enough time is enough.
    assert_eq!(rig.status(with(put(1).0, "grpc-timeout", b"1H")).await.0, Code::Ok);
}

#[test]
fn deadlines_are_read_as_grpc_writes_them() {
    let read = |value: &str| {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", value.parse().unwrap());
        deadline(&headers)
    };
    for (value, duration) in [
        ("1H", Duration::from_secs(3600)),
        ("2M", Duration::from_secs(120)),
        ("30S", Duration::from_secs(30)),
        ("7m", Duration::from_millis(7)),
        ("99999999u", Duration::from_micros(99_999_999)),
        ("0n", Duration::ZERO),
    ] {
        assert_eq!(read(value).unwrap(), Some(duration), "{value}");
    }
    for value in ["", "S", "5", "5s", "+5S", "-5S", "123456789S", "5 S", "ü"] {
        assert_eq!(read(value).unwrap_err().code(), Code::Internal, "{value}");
    }
    assert_eq!(deadline(&HeaderMap::new()).unwrap(), None);
}

#[test]
fn messages_are_found_however_the_body_is_cut() {
    let sizes = [0usize, 1, 5, 0, 0, 300, 2];
    let body: Vec<u8> = sizes
        .iter()
        .flat_map(|size| {
            let mut frame = vec![0];
            frame.extend(u32::try_from(*size).unwrap().to_be_bytes());
            frame.extend(vec![0xff; *size]);
            frame
        })
        .collect();
    let expected = Passed { messages: 7, bytes: 308 };
    for piece in 1..=body.len() {
        let mut messages = Messages::default();
        let mut total = Passed::default();
        for piece in body.chunks(piece) {
            let passed = messages.pass(piece, 300).unwrap();
            total.messages += passed.messages;
            total.bytes += passed.bytes;
        }
        assert_eq!(total, expected, "in pieces of {piece}");
        let refused = body.chunks(piece).any(|piece| messages.pass(piece, 299) == Err(300));
        assert!(refused, "in pieces of {piece}");
    }
}
