//! The requests that kube-apiserver sends, in the shapes it sends them, and what
//! it takes for granted about the answers.

use kvorum::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kvorum::pb::etcdserverpb::range_request::SortOrder;
use kvorum::pb::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RangeResponse, StatusRequest, WatchCreateRequest,
};
use kvorum::pb::mvccpb::event::EventType;
use tonic::Code;

use crate::rig::{
    Rig, delete_op, get_op, get_request, keys, kvs, list_request, mod_revision_is, op, put_op,
    put_request, range_of, refused, soon, start, watch_prefix,
};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const PODS: &str = "/registry/pods/";

fn pod(number: usize) -> String {
    format!("{PODS}default/pod-{number:03}")
}

async fn with_pods(count: usize) -> Rig {
    let rig = start().await;
    for number in 0..count {
        rig.put(&pod(number), &format!("v{number}")).await;
    }
    rig
}

fn revision(response: &RangeResponse) -> i64 {
    response.header.as_ref().unwrap().revision
}

// ---- Range ----

#[tokio::test]
async fn get_returns_the_object_and_the_current_revision() {
    let rig = start().await;
    let get = RangeRequest { limit: 1, ..get_request(&pod(0)) };
    let absent = rig.range(get.clone()).await;
    assert_eq!((absent.count, absent.kvs.len(), revision(&absent)), (0, 0, 1));

    let created = rig.put(&pod(0), "old").await;
    let updated = rig.put(&pod(0), "new").await;
    let other = rig.put(&pod(1), "other").await;
    let response = rig.range(get.clone()).await;
    let kv = &kvs(&response)[0];
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (created, updated, 2));
    assert_eq!(&kv.value[..], b"new");
    assert_eq!((response.count, response.more, revision(&response)), (1, false, other));

    // At an older revision the object is the older one, and the header is not.
    let pinned = rig.range(RangeRequest { revision: created, ..get }).await;
    assert_eq!(&kvs(&pinned)[0].value[..], b"old");
    assert_eq!(revision(&pinned), other);
}

#[tokio::test]
async fn pages_of_a_list_are_one_snapshot_whatever_is_written_meanwhile() {
    let rig = with_pods(25).await;
    let first = rig.range(RangeRequest { limit: 10, ..list_request(PODS) }).await;
    let pinned = revision(&first);
    let (mut listed, mut page) = (Vec::new(), first);
    for round in 0.. {
        // What a page cannot see: a new object, a changed one, a deleted one.
        rig.put(&format!("{}-new", pod(round)), "late").await;
        rig.put(&pod(20), "late").await;
        rig.delete(&pod(24), "").await;

        listed.extend(kvs(&page));
        assert_eq!(
            page.count,
            25 - if round == 0 { 0 } else { listed.len() as i64 - page.kvs.len() as i64 }
        );
        assert_eq!(page.more, (page.kvs.len() as i64) < page.count);
        if !page.more {
            break;
        }
        let last = listed.last().unwrap().key.clone();
        let key = [&last[..], b"\0"].concat();
        let next =
            RangeRequest { key: key.into(), limit: 10, revision: pinned, ..list_request(PODS) };
        page = rig.range(next).await;
        assert!(revision(&page) > pinned, "the header says the present revision");
    }
    let expected: Vec<_> = (0..25).map(|n| (pod(n), format!("v{n}"))).collect();
    let listed: Vec<_> = listed
        .iter()
        .map(|kv| {
            let text = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            (text(&kv.key), text(&kv.value))
        })
        .collect();
    assert_eq!(listed, expected);
}

#[tokio::test]
async fn a_list_without_limit_and_one_beyond_its_end_have_no_more() {
    let rig = with_pods(12).await;
    for limit in [0, 12, 13, 10_000] {
        let all = rig.range(RangeRequest { limit, ..list_request(PODS) }).await;
        assert_eq!((all.kvs.len(), all.count, all.more), (12, 12, false), "limit {limit}");
    }
    let cut = rig.range(RangeRequest { limit: 11, ..list_request(PODS) }).await;
    assert_eq!((cut.kvs.len(), cut.count, cut.more), (11, 12, true));
}

#[tokio::test]
async fn revisions_that_are_gone_or_to_come_are_refused_by_their_texts() {
    let rig = with_pods(5).await;
    let now = rig.revision().await;
    rig.compact(now - 1).await.unwrap();
    let at = |revision| RangeRequest { revision, ..list_request(PODS) };
    refused(rig.kv().range(at(now + 1)).await, Code::OutOfRange, FUTURE);
    refused(rig.kv().range(at(now - 2)).await, Code::OutOfRange, COMPACTED);
    // The compacted revision itself stays readable.
    assert_eq!(rig.range(at(now - 1)).await.count, 4);
}

#[tokio::test]
async fn count_keys_and_current_revision_requests() {
    let rig = with_pods(7).await;
    let now = rig.put("/registry/services/a", "s").await;

    let count = rig.range(RangeRequest { count_only: true, ..list_request(PODS) }).await;
    assert_eq!((count.count, count.kvs.len(), count.more), (7, 0, false));

    let names = rig.range(RangeRequest { keys_only: true, ..list_request(PODS) }).await;
    assert_eq!(keys(&names), (0..7).map(pod).collect::<Vec<_>>());
    for kv in kvs(&names) {
        assert!(kv.value.is_empty() && kv.mod_revision > 1 && kv.version == 1, "{kv:?}");
    }

    for request in
        [list_request("/registry/none/"), list_request(PODS), get_request("/registry/pods")]
    {
        let current = rig.range(RangeRequest { limit: 1, ..request }).await;
        assert_eq!(revision(&current), now);
    }
    for key in ["/registry/health", "compact_rev_key"] {
        let absent = rig.range(get_request(key)).await;
        assert_eq!((absent.count, revision(&absent)), (0, now));
    }
}

// ---- Txn ----

#[tokio::test]
async fn create_succeeds_once_and_again_after_a_delete() {
    let rig = start().await;
    let create = |value: &'static str, failure| {
        let key = pod(1);
        let rig = &rig;
        async move { rig.txn(mod_revision_is(&key, 0), vec![put_op(&key, value)], failure).await }
    };
    let first = create("a", Vec::new()).await;
    assert!(first.succeeded);
    let created = first.header.unwrap().revision;
    assert_eq!(rig.get(&pod(1)).await.unwrap().mod_revision, created);

    let again = create("b", Vec::new()).await;
    assert!(!again.succeeded && again.responses.is_empty());
    assert_eq!(again.header.unwrap().revision, created, "a refusal changes nothing");

    // With a read in the other branch, the client indexes its answer.
    let again = create("b", vec![get_op(&pod(1))]).await;
    assert_eq!(&kvs(range_of(&again, 0))[0].value[..], b"a");

    rig.delete(&pod(1), "").await;
    assert!(create("c", Vec::new()).await.succeeded);
    let kv = rig.get(&pod(1)).await.unwrap();
    assert_eq!((kv.version, kv.create_revision), (1, kv.mod_revision));
}

#[tokio::test]
async fn update_and_delete_compare_the_revision_and_tell_the_present_object() {
    let rig = start().await;
    let key = pod(2);
    let created = rig.put(&key, "v1").await;
    let update = |at: i64, value: &str| {
        (mod_revision_is(&key, at), vec![put_op(&key, value)], vec![get_op(&key)])
    };
    let (compare, then, otherwise) = update(created, "v2");
    let updated = rig.txn(compare, then, otherwise).await;
    assert!(updated.succeeded);
    let updated = updated.header.unwrap().revision;
    assert_eq!(updated, created + 1);

    let (compare, then, otherwise) = update(created, "v3");
    let stale = rig.txn(compare, then, otherwise).await;
    assert!(!stale.succeeded);
    let present = &kvs(range_of(&stale, 0))[0];
    assert_eq!((&present.value[..], present.mod_revision), (&b"v2"[..], updated));

    let delete = |at| (mod_revision_is(&key, at), vec![delete_op(&key)], vec![get_op(&key)]);
    let (compare, then, otherwise) = delete(created);
    assert!(!rig.txn(compare, then, otherwise).await.succeeded);
    let (compare, then, otherwise) = delete(updated);
    let deleted = rig.txn(compare, then, otherwise).await;
    assert!(deleted.succeeded);
    assert_eq!(deleted.header.unwrap().revision, updated + 1);

    // On an object that is gone the other branch's read is there, and empty.
    let (compare, then, otherwise) = delete(updated);
    let gone = rig.txn(compare, then, otherwise).await;
    assert!(!gone.succeeded);
    assert_eq!(range_of(&gone, 0).kvs.len(), 0);
}

#[tokio::test]
async fn the_compactor_takes_turns_by_version() {
    let rig = start().await;
    let key = "compact_rev_key";
    let turn = |version: i64, revision: &str| {
        let compare = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Version.into(),
            key: key.into(),
            target_union: Some(TargetUnion::Version(version)),
            ..Compare::default()
        };
        (compare, vec![put_op(key, revision)], vec![get_op(key)])
    };
    let (compare, then, otherwise) = turn(0, "1");
    assert!(rig.txn(compare, then, otherwise).await.succeeded);
    let (compare, then, otherwise) = turn(0, "7");
    let lost = rig.txn(compare, then, otherwise).await;
    assert!(!lost.succeeded);
    let present = &kvs(range_of(&lost, 0))[0];
    assert_eq!((present.version, &present.value[..]), (1, &b"1"[..]));
    let (compare, then, otherwise) = turn(1, "7");
    assert!(rig.txn(compare, then, otherwise).await.succeeded);

    let now = rig.put(&pod(0), "v").await;
    rig.compact(now).await.unwrap();
    refused(rig.compact(now).await, Code::OutOfRange, COMPACTED);
    refused(rig.compact(now + 1).await, Code::OutOfRange, FUTURE);
}

// ---- Leases ----

#[tokio::test]
async fn a_put_without_lease_takes_the_key_off_its_lease() {
    let rig = start().await;
    let lease = rig.grant(3600).await;
    rig.put_leased("/registry/events/a", "v", lease).await;
    rig.put_leased("/registry/events/b", "v", lease).await;
    rig.put("/registry/events/b", "v").await;
    let revoke = kvorum::pb::etcdserverpb::LeaseRevokeRequest { id: lease };
    rig.leases().lease_revoke(revoke).await.unwrap();
    assert!(rig.get("/registry/events/a").await.is_none());
    assert!(rig.get("/registry/events/b").await.is_some());
}

#[tokio::test]
async fn a_put_with_an_unknown_lease_is_refused() {
    let rig = start().await;
    let before = rig.revision().await;
    refused(
        rig.kv().put(put_request("/registry/events/a", "v", 123)).await,
        Code::NotFound,
        "etcdserver: requested lease not found",
    );
    assert_eq!(rig.revision().await, before);
}

#[tokio::test]
async fn an_expired_lease_deletes_its_keys_in_one_revision_with_events() {
    let rig = start().await;
    let lease = rig.grant(1).await;
    rig.put_leased("/registry/events/b", "2", lease).await;
    let last = rig.put_leased("/registry/events/a", "1", lease).await;
    let mut watches = rig.watches();
    let create =
        WatchCreateRequest { prev_kv: true, ..watch_prefix("/registry/events/", last + 1) };
    watches.create(create).await;
    let response = watches.next().await;
    let events = crate::rig::seen(&response);
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.kind, event.key.as_str(), event.previous.as_deref(), event.revision))
        .collect();
    assert_eq!(
        told,
        [
            (EventType::Delete, "/registry/events/a", Some("1"), last + 1),
            (EventType::Delete, "/registry/events/b", Some("2"), last + 1),
        ]
    );
}

// ---- Status and limits ----

#[tokio::test]
async fn status_lets_the_client_use_progress_requests_and_streams() {
    let rig = start().await;
    let status = rig.maintenance().status(StatusRequest {}).await.unwrap().into_inner();
    let numbers: Vec<u32> =
        status.version.split('.').map(|number| number.parse().unwrap()).collect();
    assert!(numbers.as_slice() >= [3, 5, 13].as_slice(), "{}", status.version);
    let header = status.header.unwrap();
    assert_eq!(status.leader, header.member_id);
    assert!(status.db_size > 0 && status.raft_applied_index > 0 && header.raft_term > 0);
    assert!(!status.is_learner && status.errors.is_empty(), "{:?}", status.errors);
}

#[tokio::test]
async fn large_requests_are_refused_by_their_texts() {
    let rig = start().await;
    let put =
        |size: usize| PutRequest { value: vec![b'v'; size].into(), ..put_request("k", "", 0) };
    assert!(rig.kv().put(put(1_500_000)).await.is_ok());
    refused(
        rig.kv().put(put(1_572_864)).await,
        Code::InvalidArgument,
        "etcdserver: request is too large",
    );
    let message = put(3 << 20);
    let size = prost::Message::encoded_len(&message);
    refused(
        rig.kv().put(message).await,
        Code::ResourceExhausted,
        &format!("grpc: received message larger than max ({size} vs. 2097152)"),
    );
    assert!(rig.kv().put(put(1)).await.is_ok(), "the connection goes on");
}

// ---- RangeStream ----

async fn streamed(rig: &Rig, request: RangeRequest) -> Vec<RangeResponse> {
    let mut stream = rig.kv().range_stream(request).await.unwrap().into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = soon("a chunk", stream.message()).await.unwrap() {
        chunks.push(chunk.range_response.unwrap());
    }
    chunks
}

#[tokio::test]
async fn a_streamed_list_is_the_list_in_pieces() {
    let rig = with_pods(60).await;
    let pinned = rig.revision().await;
    rig.put("/registry/other", "v").await;
    for request in [
        list_request(PODS),
        RangeRequest { limit: 33, ..list_request(PODS) },
        RangeRequest { revision: pinned, ..list_request(PODS) },
        RangeRequest { count_only: true, ..list_request(PODS) },
        list_request("/registry/none/"),
    ] {
        let whole = rig.range(request.clone()).await;
        let chunks = streamed(&rig, request.clone()).await;
        let (last, before) = chunks.split_last().unwrap();
        for chunk in before {
            assert!(
                chunk.header.is_none() && chunk.count == 0 && !chunk.more && !chunk.kvs.is_empty()
            );
        }
        assert_eq!(last.header, whole.header, "{request:?}");
        assert_eq!((last.count, last.more), (whole.count, whole.more), "{request:?}");
        let pieces: Vec<_> = chunks.iter().flat_map(|chunk| chunk.kvs.clone()).collect();
        assert_eq!(pieces, whole.kvs);
    }
    assert!(streamed(&rig, list_request(PODS)).await.len() > 1);
}

#[tokio::test]
async fn a_streamed_list_has_no_sort_orders_or_filters() {
    let rig = start().await;
    let sorted = RangeRequest { sort_order: SortOrder::Descend.into(), ..list_request(PODS) };
    refused(
        rig.kv().range_stream(sorted).await,
        Code::Unimplemented,
        "RangeStream does not support custom sort orders",
    );
    let filtered = RangeRequest { min_mod_revision: 1, ..list_request(PODS) };
    refused(
        rig.kv().range_stream(filtered).await,
        Code::Unimplemented,
        "RangeStream does not support revision filters",
    );
}

// ---- Watch ----

#[tokio::test]
async fn a_resource_watch_tells_all_changes_with_what_they_replaced() {
    let rig = start().await;
    let listed = rig.put(&pod(0), "v0").await;
    let mut watches = rig.watches();
    let create = WatchCreateRequest {
        prev_kv: true,
        progress_notify: true,
        ..watch_prefix(PODS, listed + 1)
    };
    let created = watches.create(create).await;
    assert_eq!((created.watch_id, created.canceled), (0, false));

    let r1 = rig.put(&pod(1), "a").await;
    let r2 = rig.txn(mod_revision_is(&pod(1), r1), vec![put_op(&pod(1), "b")], vec![]).await;
    let r2 = r2.header.unwrap().revision;
    rig.put("/registry/services/x", "not watched").await;
    let r4 = rig.delete(&pod(1), "").await;
    let told: Vec<_> = watches
        .events(3)
        .await
        .into_iter()
        .map(|event| (event.kind, event.value, event.revision, event.previous))
        .collect();
    let text = |text: &str| text.to_owned();
    assert_eq!(
        told,
        [
            (EventType::Put, text("a"), r1, None),
            (EventType::Put, text("b"), r2, Some(text("a"))),
            (EventType::Delete, text(""), r4, Some(text("b"))),
        ]
    );
}

#[tokio::test]
async fn a_watch_from_the_current_revision_begins_with_it() {
    let rig = start().await;
    let current = rig.put("compact_rev_key", "1").await;
    let mut watches = rig.watches();
    let create = WatchCreateRequest {
        key: "compact_rev_key".into(),
        start_revision: current,
        ..WatchCreateRequest::default()
    };
    watches.create(create).await;
    let next = rig.put("compact_rev_key", "2").await;
    let revisions: Vec<_> = watches.events(2).await.iter().map(|event| event.revision).collect();
    assert_eq!(revisions, [current, next]);
}

#[tokio::test]
async fn what_a_catching_up_watch_replaced_is_told_although_it_is_compacted() {
    let rig = start().await;
    rig.put(&pod(0), "v1").await;
    let start = rig.put(&pod(0), "v2").await;
    rig.put(&pod(0), "v3").await;
    rig.compact(start).await.unwrap();
    let mut watches = rig.watches();
    let create = WatchCreateRequest { prev_kv: true, ..watch_prefix(PODS, start) };
    watches.create(create).await;
    let previous: Vec<_> =
        watches.events(2).await.into_iter().map(|event| event.previous).collect();
    assert_eq!(previous, [Some("v1".to_owned()), Some("v2".to_owned())]);
}

#[tokio::test]
async fn a_lease_is_told_with_the_key_until_it_is_taken_off() {
    let rig = start().await;
    let lease = rig.grant(3600).await;
    let put = op(kvorum::pb::etcdserverpb::request_op::Request::RequestPut(put_request(
        &pod(0),
        "v",
        lease,
    )));
    assert!(rig.txn(mod_revision_is(&pod(0), 0), vec![put], Vec::new()).await.succeeded);
    assert_eq!(rig.get(&pod(0)).await.unwrap().lease, lease);
    rig.put(&pod(0), "v").await;
    assert_eq!(rig.get(&pod(0)).await.unwrap().lease, 0);
}
