use std::collections::BTreeSet;

use axum::routing::post;
use http_body::Frame;
use http_body_util::{Full, StreamBody};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tower::ServiceExt as _;

use super::*;
use crate::pb::etcdserverpb as pb;
use crate::pb::etcdserverpb::kv_server::{Kv, KvServer};
use crate::pb::etcdserverpb::watch_server::{Watch, WatchServer};
use crate::pb::mvccpb;

const LIMIT: usize = 4096;

/// Answers by echo, so that a test sees what arrived.
struct Fake;

fn header(revision: i64) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { cluster_id: u64::MAX, member_id: 2, revision, raft_term: 0 })
}

fn record(key: &[u8], value: &[u8]) -> Bytes {
    let record = mvccpb::KeyValue {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
        create_revision: 2,
        mod_revision: 3,
        version: 1,
        lease: 0,
    };
    record.encode_to_vec().into()
}

type Reply<T> = Result<tonic::Response<T>, Status>;

#[tonic::async_trait]
impl Kv for Fake {
    /// The key, the limit and the order come back as values; errors by name of the key.
    async fn range(&self, request: tonic::Request<pb::RangeRequest>) -> Reply<pb::RangeResponse> {
        let metadata = request.metadata();
        let seen = ["authorization", "token", "content-type", "grpc-x"]
            .map(|name| metadata.get(name).map(|value| value.to_str().unwrap().to_owned()));
        let connection = request.extensions().get::<Arc<Connection>>().cloned();
        let request = request.into_inner();
        let body = match &request.key[..] {
            b"metadata" => format!("{seen:?}"),
            b"connection" => format!("{connection:?}"),
            b"large" => "x".repeat(4 * OFFLOAD_BYTES),
            b"slow" => std::future::pending().await,
            b"" => return Err(Status::invalid_argument("etcdserver: key is not provided")),
            b"token" => return Err(Status::unauthenticated("etcdserver: invalid auth token")),
            b"quoted" => return Err(Status::unknown("a \"quoted\"\nerror: 100% ü")),
            _ => format!("{} {} {}", request.limit, request.sort_order, request.sort_target),
        };
        let mut reply = tonic::Response::new(pb::RangeResponse {
            header: header(7),
            kvs: vec![record(&request.key, body.as_bytes())],
            more: false,
            count: 1,
        });
        reply.metadata_mut().insert("x-served-by", "fake".parse().unwrap());
        Ok(reply)
    }

    type RangeStreamStream = ReceiverStream<Result<pb::RangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        _: tonic::Request<pb::RangeRequest>,
    ) -> Reply<Self::RangeStreamStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn put(&self, request: tonic::Request<pb::PutRequest>) -> Reply<pb::PutResponse> {
        let request = request.into_inner();
        let prev_kv = record(&request.key, &request.value);
        Ok(tonic::Response::new(pb::PutResponse { header: header(8), prev_kv }))
    }

    async fn delete_range(
        &self,
        _: tonic::Request<pb::DeleteRangeRequest>,
    ) -> Reply<pb::DeleteRangeResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn txn(&self, request: tonic::Request<pb::TxnRequest>) -> Reply<pb::TxnResponse> {
        let request = request.into_inner();
        let compared = request.compare.first().map(|compare| compare.result == 1);
        let succeeded = compared.unwrap_or_default() && request.success.len() == 2;
        Ok(tonic::Response::new(pb::TxnResponse {
            header: header(9),
            succeeded,
            responses: Vec::new(),
        }))
    }

    async fn compact(
        &self,
        request: tonic::Request<pb::CompactionRequest>,
    ) -> Reply<pb::CompactionResponse> {
        let revision = request.into_inner().revision;
        Ok(tonic::Response::new(pb::CompactionResponse { header: header(revision) }))
    }
}

#[tonic::async_trait]
impl Watch for Fake {
    type WatchStream = ReceiverStream<Result<pb::WatchResponse, Status>>;

    /// One answer per request, with the id that was asked for; -1 fails the call and the
    /// end of the requests ends it.
    async fn watch(
        &self,
        request: tonic::Request<Streaming<pb::WatchRequest>>,
    ) -> Reply<Self::WatchStream> {
        use pb::watch_request::RequestUnion;
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                let Ok(request) = request else { return };
                let watch_id = match request.request_union {
                    Some(RequestUnion::CreateRequest(request)) => request.watch_id,
                    Some(RequestUnion::CancelRequest(request)) => request.watch_id,
                    _ => 0,
                };
                let answer = if watch_id == -1 {
                    Err(Status::unavailable("etcdserver: no leader"))
                } else {
                    Ok(pb::WatchResponse { watch_id, created: true, ..Default::default() })
                };
                let failed = answer.is_err();
                if sender.send(answer).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

/// A snapshot in two messages, sent in pieces that do not fall together with them.
async fn snapshot() -> Response {
    let message = |remaining_bytes: u64, blob: &'static [u8]| {
        frame(
            &pb::SnapshotResponse { remaining_bytes, blob: blob.into(), ..Default::default() }
                .encode_to_vec(),
        )
    };
    let all = [message(3, b"abc"), message(0, b"")].concat();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let pieces: Vec<_> = all
        .chunks(4)
        .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))))
        .chain([Ok::<_, Infallible>(Frame::trailers(trailers))])
        .collect();
    let body = Body::new(StreamBody::new(tokio_stream::iter(pieces)));
    ([(CONTENT_TYPE, GRPC)], body).into_response()
}

fn gateway() -> Router {
    let grpc = tonic::service::Routes::new(KvServer::new(Fake))
        .add_service(WatchServer::new(Fake))
        .into_axum_router()
        .route("/etcdserverpb.Maintenance/Snapshot", post(snapshot));
    router(grpc, GatewayOptions { max_message_bytes: LIMIT }).unwrap()
}

fn post_to(path: &str, body: impl Into<Body>) -> Request {
    Request::post(path).header(CONTENT_TYPE, "application/json").body(body.into()).unwrap()
}

async fn answer(request: Request) -> (u16, String) {
    let response = gateway().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn ask(path: &str, body: &str) -> (u16, Value) {
    let (status, body) = answer(post_to(path, body.to_owned())).await;
    (status, serde_json::from_str(&body).unwrap_or_else(|_| panic!("not JSON: {body}")))
}

/// What a range of the fake says it was asked: its only value, as text.
async fn seen(body: &str) -> String {
    let (status, answer) = ask("/v3/kv/range", body).await;
    assert_eq!(status, 200, "{answer}");
    seen_in(&answer)
}

/// The text an answer of the fake holds as its only value.
fn seen_in(answer: &Value) -> String {
    let pool = DescriptorPool::decode(crate::pb::DESCRIPTORS).unwrap();
    let put = pool.get_message_by_name("etcdserverpb.PutRequest").unwrap();
    let json = json!({ "value": answer["kvs"][0]["value"] }).to_string();
    let put = pb::PutRequest::decode(to_proto(&put, json.as_bytes()).unwrap()).unwrap();
    String::from_utf8(put.value.to_vec()).unwrap()
}

#[test]
fn every_route_stands_for_a_method_and_every_method_but_one_has_a_route() {
    let pool = DescriptorPool::decode(crate::pb::DESCRIPTORS).unwrap();
    let routed: BTreeSet<(&str, &str)> =
        ROUTES.iter().map(|(_, service, method)| (*service, *method)).collect();
    let methods: Vec<_> =
        pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect();
    let known: BTreeSet<(&str, &str)> = methods
        .iter()
        .map(|method| (method.parent_service().full_name(), method.name()))
        .filter(|(service, _)| !["grpc.health.v1.Health", "kvorumpb.Peer"].contains(service))
        .collect();
    assert!(routed.is_subset(&known), "{:?}", routed.difference(&known));
    let unrouted: Vec<_> = known.difference(&routed).collect();
    assert_eq!(unrouted, [&("etcdserverpb.KV", "RangeStream")]);
    let paths: BTreeSet<&str> = ROUTES.iter().map(|(path, _, _)| *path).collect();
    assert_eq!(paths.len(), 51);
}

#[tokio::test]
async fn a_call_and_its_answer_are_json_as_etcd_writes_it() {
    let request = post_to("/v3/kv/put", r#"{"key":"Zm9v","value":"YmFy","lease":"0"}"#);
    let response = gateway().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
    assert_eq!(response.headers()["grpc-metadata-content-type"], "application/grpc");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    // Zero fields are left out, 64-bit numbers are strings, records are messages.
    let expected = concat!(
        r#"{"header":{"cluster_id":"18446744073709551615","member_id":"2","revision":"8"},"#,
        r#""prev_kv":{"key":"Zm9v","create_revision":"2","mod_revision":"3","version":"1","#,
        r#""value":"YmFy"}}"#
    );
    assert_eq!(body, expected);
    let older = answer(post_to("/v3beta/kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#)).await;
    assert_eq!(older, (200, expected.to_owned()));
}

#[tokio::test]
async fn json_is_read_with_the_tolerance_of_etcd() {
    assert_eq!(seen(r#"{"key":"Zm9v"}"#).await, "0 0 0");
    assert_eq!(seen(r#"{"key":"Zm9v","limit":5,"sort_order":"DESCEND"}"#).await, "5 2 0");
    assert_eq!(seen(r#"{"key":"Zm9v","limit":"5","sort_order":1}"#).await, "5 1 0");
    assert_eq!(seen(r#"{"key":"Zm9v","sortTarget":"MOD","limit":1.0}"#).await, "1 0 3");
    // Unknown fields and unknown names of values are ignored.
    assert_eq!(seen(r#"{"nope":{"a":[1,"}"]},"key":"Zm9v","sort_order":"NOPE"}"#).await, "0 0 0");
    assert_eq!(seen(r#"{"key":"Zm9v","limit":null}"#).await, "0 0 0");
    // Only the first object counts.
    assert_eq!(seen(" \n{\"key\":\"Zm9v\"} trailing").await, "0 0 0");
    assert_eq!(seen(r#"{"key":"Zm9v"}{"key":""}"#).await, "0 0 0");
    // Base64 of both alphabets, with padding or without.
    for value in ["+/8=", "-_8=", "-_8", "+/8"] {
        let (_, answer) = ask("/v3/kv/put", &json!({ "value": value }).to_string()).await;
        assert_eq!(answer["prev_kv"]["value"], "+/8=", "{value}");
    }
    let txn = r#"{"compare":[{"key":"Zm9v","result":"GREATER","target":"CREATE",
        "create_revision":"0"}],"success":[{"request_range":{"key":"Zm9v"}},
        {"requestPut":{"key":"YQ","value":"-_8="}}]}"#;
    assert_eq!(ask("/v3/kv/txn", txn).await.1["succeeded"], true);
}

#[tokio::test]
async fn no_body_is_a_message_without_fields() {
    let expected = json!({ "code": 3, "message": "etcdserver: key is not provided" });
    for body in ["", "{}", "  \n"] {
        assert_eq!(ask("/v3/kv/range", body).await, (400, expected.clone()), "{body:?}");
    }
}

#[tokio::test]
async fn bad_json_is_an_invalid_argument() {
    for (body, message) in [
        ("{", "unexpected EOF"),
        (r#"{"key":"Zm9v"#, "unexpected EOF"),
        ("hello", "invalid character 'h' looking for beginning of value"),
        ("[]", "proto: syntax error (line 1:1): unexpected token ["),
    ] {
        let expected = json!({ "code": 3, "message": message });
        assert_eq!(ask("/v3/kv/range", body).await, (400, expected), "{body}");
    }
    for body in [
        r#"{"key":"!!"}"#,
        r#"{"key":5}"#,
        r#"{"limit":"x"}"#,
        r#"{"limit":99999999999999999999}"#,
        r#"{"keys_only":"true"}"#,
        r#"{"key":"YQ==","key":"YQ=="}"#,
        r#"{"range_end":"YQ==","rangeEnd":"YQ=="}"#,
        r#"{"key":"Zm9v",}"#,
        "{]",
        "{}}}",
    ] {
        let (status, answer) = ask("/v3/kv/range", body).await;
        assert_eq!((status, &answer["code"]), (400, &json!(3)), "{body}: {answer}");
    }
    let both = r#"{"success":[{"request_range":{},"request_put":{}}]}"#;
    assert_eq!(ask("/v3/kv/txn", both).await.0, 400);
}

#[tokio::test]
async fn deep_json_is_refused_and_not_a_stack_overflow() {
    let deep = format!("{}{}", "{\"x\":".repeat(600), "}".repeat(600));
    assert!(deep.len() < 2 * LIMIT);
    let (status, answer) = ask("/v3/kv/range", &deep).await;
    assert_eq!((status, &answer["code"]), (400, &json!(3)), "{answer}");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused() {
    let body = json!({ "key": "A".repeat(2 * LIMIT) }).to_string();
    let (status, answer) = ask("/v3/kv/range", &body).await;
    assert_eq!((status, &answer["code"]), (429, &json!(8)));
    let message = answer["message"].as_str().unwrap();
    assert!(message.starts_with("grpc: received message larger than max ("), "{message}");
}

#[tokio::test]
async fn other_paths_and_methods_are_answered_by_the_gateway() {
    let not_found = json!({ "code": 5, "message": "Not Found" });
    for path in ["/v3/nope", "/v3/", "/v3/kv/range/", "/v3beta/nope"] {
        assert_eq!(ask(path, "{}").await, (404, not_found.clone()), "{path}");
    }
    for method in ["GET", "PUT", "DELETE"] {
        let request = Request::builder().method(method).uri("/v3/watch");
        let (status, body) = answer(request.body(Body::empty()).unwrap()).await;
        let expected = r#"{"code":12,"message":"Method Not Allowed"}"#;
        assert_eq!((status, body.as_str()), (501, expected), "{method}");
    }
    // The router behind does not serve it.
    assert_eq!(ask("/v3/lease/grant", "{}").await.0, 501);
}

#[tokio::test]
async fn errors_keep_their_text_and_get_an_http_status() {
    let (status, answer) = ask("/v3/kv/range", &key("quoted")).await;
    assert_eq!(status, 500);
    assert_eq!(answer, json!({ "code": 2, "message": "a \"quoted\"\nerror: 100% ü" }));

    let response = gateway().oneshot(post_to("/v3/kv/range", key("token"))).await.unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(response.headers()[WWW_AUTHENTICATE], "etcdserver: invalid auth token");
    assert!(!response.headers().contains_key("grpc-metadata-content-type"));

    // As grpc-gateway maps them.
    let expected = [
        (Code::Cancelled, 499),
        (Code::Unknown, 500),
        (Code::DeadlineExceeded, 504),
        (Code::AlreadyExists, 409),
        (Code::PermissionDenied, 403),
        (Code::ResourceExhausted, 429),
        (Code::FailedPrecondition, 400),
        (Code::OutOfRange, 400),
        (Code::Unavailable, 503),
    ];
    for (code, status) in expected {
        assert_eq!(http_status(code).as_u16(), status, "{code:?}");
    }
}

/// A request for the key that is this text.
fn key(text: &str) -> String {
    let kinds = DescriptorPool::decode(crate::pb::DESCRIPTORS).unwrap();
    let range = kinds.get_message_by_name("etcdserverpb.RangeRequest").unwrap();
    let request = pb::RangeRequest { key: text.to_owned().into(), ..Default::default() };
    String::from_utf8(to_json(&range, request.encode_to_vec().into()).unwrap()).unwrap()
}

#[tokio::test]
async fn tokens_and_metadata_reach_the_call() {
    let mut request = post_to("/v3/kv/range", key("metadata"));
    let headers = request.headers_mut();
    for (name, value) in [
        ("authorization", "abc.1"),
        ("grpc-metadata-token", "def.2"),
        ("grpc-metadata-content-type", "text/plain"),
        ("grpc-metadata-grpc-x", "no"),
        ("cookie", "no"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let response = gateway().oneshot(request).await.unwrap();
    assert_eq!(response.headers()["grpc-metadata-x-served-by"], "fake");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let answer: Value = serde_json::from_slice(&body).unwrap();
    let text = seen_in(&answer);
    assert_eq!(text, r#"[Some("abc.1"), Some("def.2"), Some("application/grpc"), None]"#);
}

#[tokio::test]
async fn a_certificate_of_the_http_client_is_nobodys_user() {
    let mut request = post_to("/v3/kv/range", key("connection"));
    let connection =
        Connection { remote: None, tls: true, peer_common_name: Some("root".to_owned()) };
    request.extensions_mut().insert(Arc::new(connection));
    let (_, body) = answer(request).await;
    let text = seen_in(&serde_json::from_str(&body).unwrap());
    assert!(text.contains("tls: true") && text.contains("peer_common_name: None"), "{text}");
}

#[tokio::test]
async fn a_large_answer_arrives_whole() {
    let text = seen(&key("large")).await;
    assert_eq!(text.len(), 4 * OFFLOAD_BYTES);
}

#[tokio::test]
async fn a_timeout_of_the_client_is_kept() {
    let mut request = post_to("/v3/kv/range", key("slow"));
    request.headers_mut().insert(GRPC_TIMEOUT, HeaderValue::from_static("30m"));
    let expected = r#"{"code":4,"message":"context deadline exceeded"}"#;
    assert_eq!(answer(request).await, (504, expected.to_owned()));
    for bad in ["", "5", "m", "5x", "-5S", "99999999999999999999H", "18446744073709551615H"] {
        let mut request = post_to("/v3/kv/range", key("slow"));
        request.headers_mut().insert(GRPC_TIMEOUT, HeaderValue::from_static(bad));
        assert_eq!(answer(request).await.0, 400, "{bad:?}");
    }
    let mut request = post_to("/v3/watch", Body::new(Endless(vec![CREATE])));
    request.headers_mut().insert(GRPC_TIMEOUT, HeaderValue::from_static("100m"));
    let expected = "{\"result\":{\"watch_id\":\"5\",\"created\":true}}\n\
                    {\"error\":{\"code\":4,\"message\":\"context deadline exceeded\"}}\n";
    assert_eq!(answer(request).await, (200, expected.to_owned()));
}

const CREATE: &str = r#"{"create_request":{"key":"Zm9v","watch_id":"5"}}"#;

/// A body that sends its pieces and then stays open.
struct Endless(Vec<&'static str>);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.0.is_empty() {
            return Poll::Pending;
        }
        let piece = self.0.remove(0);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(piece.as_bytes())))))
    }
}

#[tokio::test]
async fn a_watch_takes_and_gives_one_object_after_the_other() {
    let body = r#"{"create_request":{"watch_id":"1"}}{"createRequest":{"watch_id":2}}
        {"cancel_request":{"watch_id":"3"}}"#;
    let expected = "{\"result\":{\"watch_id\":\"1\",\"created\":true}}\n\
                    {\"result\":{\"watch_id\":\"2\",\"created\":true}}\n\
                    {\"result\":{\"watch_id\":\"3\",\"created\":true}}\n";
    let response = gateway().oneshot(post_to("/v3/watch", body)).await.unwrap();
    assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
    assert_eq!(response.headers()["grpc-metadata-content-type"], "application/grpc");
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(bytes, expected);

    // Bad JSON ends the requests; what came before it is answered.
    let bad = r#"{"create_request":{"watch_id":"1"}} junk {"create_request":{}}"#;
    let expected = "{\"result\":{\"watch_id\":\"1\",\"created\":true}}\n";
    assert_eq!(answer(post_to("/v3/watch", bad)).await, (200, expected.to_owned()));
    for nothing in ["", "junk", "{\"create_request\""] {
        assert_eq!(answer(post_to("/v3/watch", nothing)).await, (200, String::new()), "{nothing}");
    }
}

#[tokio::test]
async fn an_object_of_a_stream_is_answered_before_the_next_is_there() {
    let body = Body::new(Endless(vec!["{\"create_requ", "est\":{\"watch_id\":\"5\"}}", "  {"]));
    let response = gateway().oneshot(post_to("/v3/watch", body)).await.unwrap();
    let mut body = response.into_body();
    let line = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(line, "{\"result\":{\"watch_id\":\"5\",\"created\":true}}\n");
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_its_status_or_its_last_line() {
    let error = "{\"error\":{\"code\":14,\"message\":\"etcdserver: no leader\"}}\n";
    let fails = r#"{"create_request":{"watch_id":"-1"}}"#;
    assert_eq!(answer(post_to("/v3/watch", fails)).await, (503, error.to_owned()));
    let later = format!("{CREATE}{fails}");
    let expected = format!("{{\"result\":{{\"watch_id\":\"5\",\"created\":true}}}}\n{error}");
    assert_eq!(answer(post_to("/v3/watch", later)).await, (200, expected));
    // A call that no service takes.
    let (status, body) = answer(post_to("/v3/lease/keepalive", "{}")).await;
    assert_eq!((status, body.as_str()), (501, "{\"error\":{\"code\":12}}\n"));
}

#[tokio::test]
async fn a_reply_is_put_together_whatever_pieces_it_comes_in() {
    let expected = "{\"result\":{\"remaining_bytes\":\"3\",\"blob\":\"YWJj\"}}\n{\"result\":{}}\n";
    let got = answer(post_to("/v3/maintenance/snapshot", "{}")).await;
    assert_eq!(got, (200, expected.to_owned()));
    // Bad JSON of a call that takes one object is an error of its own.
    let (status, body) = answer(post_to("/v3/maintenance/snapshot", "{")).await;
    assert_eq!((status, body.as_str()), (400, r#"{"code":3,"message":"unexpected EOF"}"#));
}

#[tokio::test]
async fn objects_are_cut_wherever_the_pieces_end() {
    let text = r#"{"a":"}{\"\\","b":[{},[]]} {"c":{}}{}"#;
    let expected = [r#"{"a":"}{\"\\","b":[{},[]]}"#, r#"{"c":{}}"#, "{}"];
    for size in 1..=text.len() {
        let pieces: Vec<_> = text
            .as_bytes()
            .chunks(size)
            .map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(piece))))
            .collect();
        let body = Body::new(StreamBody::new(tokio_stream::iter(pieces)));
        let mut objects = JsonObjects::new(body, LIMIT);
        for expected in expected {
            let object = std::future::poll_fn(|cx| objects.poll_object(cx)).await;
            assert_eq!(object.unwrap().unwrap(), expected, "pieces of {size}");
        }
        let end = std::future::poll_fn(|cx| objects.poll_object(cx)).await;
        assert!(end.is_none(), "pieces of {size}");
    }
}

#[tokio::test]
async fn an_object_that_never_ends_is_given_up_at_the_limit() {
    let body = Body::new(Full::new(Bytes::from(vec![b'['; LIMIT]))).into_data_stream();
    let endless = tokio_stream::iter([Ok(Bytes::from_static(b"{"))]).chain(body);
    let mut objects = JsonObjects::new(Body::from_stream(endless), 100);
    let status = std::future::poll_fn(|cx| objects.poll_object(cx)).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(std::future::poll_fn(|cx| objects.poll_object(cx)).await.is_none());
}

#[tokio::test]
async fn grpc_and_json_and_probes_are_served_on_one_port() {
    use super::super::http::{self, AccessControl, tests::FakeSource};
    use super::super::listener::{Listener, ServeOptions, SocketOptions, serve};
    use crate::metrics::Metrics;
    use crate::pb::etcdserverpb::kv_client::KvClient;

    let grpc = tonic::service::Routes::new(KvServer::new(Fake)).into_axum_router();
    let metrics = Metrics::new().unwrap();
    let endpoints =
        http::client_router(Arc::new(FakeSource::default()), metrics, Duration::from_secs(5));
    let gateway = router(grpc.clone(), GatewayOptions { max_message_bytes: LIMIT }).unwrap();
    let port = http::one_port(grpc, endpoints.merge(gateway), AccessControl::default());
    let any = url::Url::parse("http://127.0.0.1:0").unwrap();
    let listener = Listener::bind(&any, None, &SocketOptions::default()).unwrap();
    let url = listener.local_url().clone();
    let task = serve(listener, port, ServeOptions::default(), std::future::pending());

    let channel = tonic::transport::Endpoint::from_shared(url.to_string()).unwrap();
    let mut client = KvClient::connect(channel).await.unwrap();
    let request = pb::RangeRequest { key: "connection".into(), ..Default::default() };
    let reply = client.range(request).await.unwrap().into_inner();
    let seen = mvccpb::KeyValue::decode(reply.kvs[0].clone()).unwrap().value;
    assert!(seen.starts_with(b"Some(Connection { remote: Some(127.0.0.1:"), "{seen:?}");

    let address = (url.host_str().unwrap(), url.port().unwrap());
    let ask = async |request: &str| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = ask("GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(answer.contains("\r\nContent-Type: text/plain; charset=utf-8\r\n"), "{answer}");
    assert!(answer.ends_with(r#"{"health":"true","reason":""}"#), "{answer}");
    let post = "POST /v3/kv/compaction HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\
                Connection: close\r\n\r\n{\"revision\":\"5\"}";
    let answer = ask(post).await;
    assert!(answer.contains("\r\nGrpc-Metadata-Content-Type: application/grpc\r\n"), "{answer}");
    assert!(answer.contains("\r\nAccess-Control-Allow-Origin: *\r\n"), "{answer}");
    assert!(answer.contains(r#""revision":"5""#), "{answer}");
    task.abort();
}
