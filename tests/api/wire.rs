//! What surrounds the calls: unknown methods, health, authentication, metadata.

use kvorum::Config;
use kvorum::pb::etcdserverpb::auth_client::AuthClient;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::{
    AuthEnableRequest, AuthStatusRequest, AuthUserListRequest, AuthenticateRequest, RangeRequest,
    RequestOp, TxnRequest,
};
use kvorum::pb::health::HealthCheckRequest;
use kvorum::pb::health::health_check_response::ServingStatus;
use kvorum::pb::health::health_client::HealthClient;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::rig::{Rig, get_request, kvs, put_op, put_request, refused, soon, start, start_with};

/// Calls any method, known or not, with an empty message.
async fn call(channel: Channel, path: &'static str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<RangeRequest, RangeRequest>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    grpc.unary(Request::new(RangeRequest::default()), path, codec).await.map(drop)
}

async fn over_tcp(rig: &Rig) -> Channel {
    let url = rig.server.client_urls()[0].to_string();
    Endpoint::from_shared(url).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn unknown_services_and_methods_are_told_apart() {
    let rig = start().await;
    for channel in [rig.channel.clone(), over_tcp(&rig).await] {
        refused(
            call(channel.clone(), "/etcdserverpb.KV/Frobnicate").await,
            Code::Unimplemented,
            "unknown method Frobnicate for service etcdserverpb.KV",
        );
        refused(
            call(channel.clone(), "/some.Service/Method").await,
            Code::Unimplemented,
            "unknown service some.Service",
        );
        // A known one, for comparison.
        refused(
            call(channel, "/etcdserverpb.KV/Range").await,
            Code::InvalidArgument,
            "etcdserver: key is not provided",
        );
    }
}

#[tokio::test]
async fn health_is_known_for_the_whole_server() {
    let rig = start().await;
    let mut health = HealthClient::new(rig.channel.clone());
    let request = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let answer = health.check(request("")).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    refused(health.check(request("x")).await, Code::NotFound, "unknown service");
    let mut watch = health.watch(request("")).await.unwrap().into_inner();
    let first = soon("the status", watch.message()).await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
}

#[tokio::test]
async fn authentication_is_off_and_says_so() {
    let rig = start().await;
    let mut auth = AuthClient::new(rig.channel.clone());
    let status = auth.auth_status(AuthStatusRequest {}).await.unwrap().into_inner();
    assert!(!status.enabled && status.header.is_some());
    refused(
        auth.authenticate(AuthenticateRequest::default()).await,
        Code::FailedPrecondition,
        "etcdserver: authentication is not enabled",
    );
    for refusal in [
        auth.auth_enable(AuthEnableRequest {}).await.map(drop).unwrap_err(),
        auth.user_list(AuthUserListRequest {}).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(refusal.code(), Code::Unimplemented);
        assert!(refusal.message().contains("later"), "{refusal:?}");
    }
}

#[tokio::test]
async fn etcds_metadata_is_accepted() {
    let rig = start().await;
    let mut request = Request::new(get_request("k"));
    request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    request.metadata_mut().insert("client-api-version", "3.6".parse().unwrap());
    let header = rig.kv().range(request).await.unwrap().into_inner().header.unwrap();
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term > 0);
}

#[tokio::test]
async fn all_clones_of_the_channel_reach_the_server_and_end_with_it() {
    let rig = start().await;
    let revision = rig.put("k", "v").await;
    let tcp = Rig { channel: over_tcp(&rig).await, server: rig.server };
    assert_eq!(tcp.get("k").await.unwrap().mod_revision, revision);
    soon("the server to stop", tcp.server.shutdown()).await.unwrap();
    let mut kv = kvorum::pb::etcdserverpb::kv_client::KvClient::new(rig.channel);
    let refusal = soon("an answer", kv.range(get_request("k"))).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unavailable, "{refusal:?}");
}

/// As with etcd, whose gRPC has gzip. What a message becomes counts, not what was sent.
#[tokio::test]
async fn requests_may_be_compressed() {
    let rig = start().await;
    for channel in [rig.channel.clone(), over_tcp(&rig).await] {
        let mut kv = KvClient::new(channel).send_compressed(CompressionEncoding::Gzip);
        kv.put(put_request("k", &"v".repeat(10_000), 0)).await.unwrap();
        let found = kv.range(get_request("k")).await.unwrap().into_inner();
        assert_eq!(kvs(&found)[0].value.len(), 10_000);
        let large = kv.put(put_request("k", &"v".repeat(8 << 20), 0)).await.unwrap_err();
        assert_eq!(large.code(), Code::ResourceExhausted, "{large}");
        assert_eq!(kv.range(get_request("k")).await.unwrap().into_inner().kvs, found.kvs);
    }
}

/// A transaction that nests deeper than the log can be read with would end the member, and
/// every start after that.
#[tokio::test]
async fn deep_transactions_are_refused_or_outlive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let config = || Config {
        data_dir: directory.path().join("data"),
        in_memory: false,
        ..Config::in_memory()
    };
    let rig = start_with(config()).await;
    let mut accepted = 0;
    for depth in 30..60 {
        let nested = (0..depth).fold(put_op("k", "v"), |op, _| {
            let txn = TxnRequest { success: vec![op], ..TxnRequest::default() };
            RequestOp { request: Some(Op::RequestTxn(txn)) }
        });
        let request = TxnRequest { success: vec![nested], ..TxnRequest::default() };
        match rig.kv().txn(request).await {
            Ok(_) => accepted += 1,
            Err(status) if depth < 48 => {
                let text = "etcdserver: too many operations in txn request";
                refused(Err::<(), _>(status), Code::InvalidArgument, text);
            }
            Err(_) => {}
        }
    }
    assert_eq!(accepted, 11, "depths of 30 to 40");
    rig.server.shutdown().await.unwrap();
    let rig = start_with(config()).await;
    assert_eq!(rig.get("k").await.unwrap().version, accepted);
}
