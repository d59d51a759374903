//! Leases: grants, keepalive streams, what is told about them, and their end.

use kvorum::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::rig::{Rig, refused, seen, soon, start, watch_prefix};

async fn time_to_live(rig: &Rig, id: i64) -> LeaseTimeToLiveResponse {
    let request = LeaseTimeToLiveRequest { id, keys: true };
    rig.leases().lease_time_to_live(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn grants_raise_short_times_and_refuse_what_cannot_be() {
    let rig = start().await;
    let grant = |ttl, id| {
        let mut leases = rig.leases();
        async move { leases.lease_grant(LeaseGrantRequest { ttl, id }).await }
    };
    let given = grant(100, 77).await.unwrap().into_inner();
    assert_eq!((given.id, given.ttl, given.error.as_str()), (77, 100, ""));
    assert_eq!(given.header.unwrap().revision, 1, "a grant is no change of keys");
    for ttl in [1, 0, -5] {
        let given = grant(ttl, 0).await.unwrap().into_inner();
        assert!(given.id > 0);
        assert_eq!(given.ttl, 2, "one and a half election timeouts, in whole seconds");
    }
    refused(grant(100, 77).await, Code::FailedPrecondition, "etcdserver: lease already exists");
    refused(grant(9_000_000_001, 0).await, Code::OutOfRange, "etcdserver: too large lease TTL");
    assert!(grant(9_000_000_000, 0).await.is_ok());
}

#[tokio::test]
async fn a_keepalive_stream_answers_each_request_in_order() {
    let rig = start().await;
    let (short, long) = (rig.grant(100).await, rig.grant(200).await);
    let (requests, stream) = mpsc::channel(16);
    for id in [short, 999, long, short] {
        requests.send(LeaseKeepAliveRequest { id }).await.unwrap();
    }
    let mut answers =
        rig.leases().lease_keep_alive(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let mut told = Vec::new();
    for _ in 0..4 {
        let answer = soon("an answer", answers.message()).await.unwrap().unwrap();
        assert!(answer.header.is_some_and(|header| header.revision == 1));
        told.push((answer.id, answer.ttl));
    }
    assert_eq!(told, [(short, 100), (999, 0), (long, 200), (short, 100)]);
    // A client that is done asking ends the stream, without an error.
    drop(requests);
    assert!(soon("the end", answers.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn time_to_live_tells_the_keys_and_that_there_is_no_lease() {
    let rig = start().await;
    let id = rig.grant(100).await;
    rig.put_leased("b", "v", id).await;
    rig.put_leased("a", "v", id).await;
    let told = time_to_live(&rig, id).await;
    assert_eq!((told.id, told.granted_ttl), (id, 100));
    assert!((1..=100).contains(&told.ttl), "{}", told.ttl);
    let mut keys = told.keys;
    keys.sort();
    assert_eq!(keys, ["a", "b"]);

    let none = time_to_live(&rig, 999).await;
    assert_eq!((none.id, none.ttl, none.granted_ttl, none.keys.len()), (999, -1, 0, 0));
    assert!(none.header.is_some());
}

#[tokio::test]
async fn leases_are_listed() {
    let rig = start().await;
    let list = || async {
        let response = rig.leases().lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
        response.leases.into_iter().map(|lease| lease.id).collect::<Vec<_>>()
    };
    assert_eq!(list().await, [0i64; 0]);
    let (late, early) = (rig.grant(1000).await, rig.grant(100).await);
    assert_eq!(list().await, [early, late], "the first to end first");
}

#[tokio::test]
async fn a_revoked_lease_takes_its_keys_along_in_one_revision() {
    let rig = start().await;
    let id = rig.grant(100).await;
    for key in ["k/b", "k/a", "k/c"] {
        rig.put_leased(key, "v", id).await;
    }
    let before = rig.revision().await;
    let mut watches = rig.watches();
    watches.create(watch_prefix("k/", 0)).await;
    let revoke = || async { rig.leases().lease_revoke(LeaseRevokeRequest { id }).await };
    let response = revoke().await.unwrap().into_inner();
    assert_eq!(response.header.unwrap().revision, before + 1);
    let deleted: Vec<_> =
        seen(&watches.next().await).into_iter().map(|event| (event.key, event.revision)).collect();
    let expected = ["k/a", "k/b", "k/c"].map(|key| (key.to_owned(), before + 1));
    assert_eq!(deleted, expected);
    refused(revoke().await, Code::NotFound, "etcdserver: requested lease not found");

    // Without keys nothing changes.
    let id = rig.grant(100).await;
    let revoke = LeaseRevokeRequest { id };
    let response = rig.leases().lease_revoke(revoke).await.unwrap().into_inner();
    assert_eq!(response.header.unwrap().revision, before + 1);
}
