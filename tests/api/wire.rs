//! What surrounds the calls: unknown methods, health, authentication, metadata.

use kvorum::pb::etcdserverpb::auth_client::AuthClient;
use kvorum::pb::etcdserverpb::{
    AuthEnableRequest, AuthStatusRequest, AuthUserListRequest, AuthenticateRequest, RangeRequest,
};
use kvorum::pb::health::HealthCheckRequest;
use kvorum::pb::health::health_check_response::ServingStatus;
use kvorum::pb::health::health_client::HealthClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::rig::{Rig, get_request, refused, soon, start};

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
