//! Every request through every member, and what the answers say of who gave them.

use std::time::{Duration, Instant};

use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use kvorum::pb::mvccpb::Event;
use kvorum::pb::v3lockpb::lock_client::LockClient;
use kvorum::pb::v3lockpb::{LockRequest, UnlockRequest};
use prost::Message as _;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::rig::{Cluster, Member, get, put, soon, until};

/// A watch of everything that begins with `prefix`, at one member.
pub(crate) struct Watch {
    /// Dropped, it ends the stream.
    _requests: tokio::sync::mpsc::Sender<pb::WatchRequest>,
    stream: Streaming<pb::WatchResponse>,
    /// Events of an answer that were not asked for yet.
    queue: std::collections::VecDeque<(i64, String, String)>,
}

impl Watch {
    pub(crate) async fn open(member: &Member, prefix: &str, start_revision: i64) -> Watch {
        let mut end = prefix.as_bytes().to_vec();
        *end.last_mut().unwrap() += 1;
        let create = pb::WatchCreateRequest {
            key: prefix.to_owned().into(),
            range_end: end.into(),
            start_revision,
            ..pb::WatchCreateRequest::default()
        };
        let union = pb::watch_request::RequestUnion::CreateRequest(create);
        let (requests, receiver) = tokio::sync::mpsc::channel(8);
        requests.send(pb::WatchRequest { request_union: Some(union) }).await.unwrap();
        let mut client = WatchClient::new(member.channel());
        let stream = soon("a watch", client.watch(ReceiverStream::new(receiver))).await;
        let mut stream = stream.unwrap().into_inner();
        let created = soon("the watch to be there", stream.next()).await.unwrap().unwrap();
        assert!(created.created && !created.canceled, "{created:?}");
        Watch { _requests: requests, stream, queue: std::collections::VecDeque::new() }
    }

    /// The next event: revision, key, value.
    pub(crate) async fn next(&mut self) -> (i64, String, String) {
        while self.queue.is_empty() {
            let answer = soon("an event", self.stream.next()).await.unwrap().unwrap();
            assert!(!answer.canceled, "{answer:?}");
            let text = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            for event in &answer.events {
                let kv = Event::decode(event.clone()).unwrap().kv.unwrap();
                self.queue.push_back((kv.mod_revision, text(&kv.key), text(&kv.value)));
            }
        }
        self.queue.pop_front().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_takes_every_request_and_answers_in_its_own_name() {
    let mut cluster = Cluster::start(&[]).await;
    cluster.leader().await;
    let mut revision = cluster[0].status().await.unwrap().header.unwrap().revision;
    let mut clusters = std::collections::BTreeSet::new();
    for at in 0..3 {
        let id = cluster[at].id().await;
        let mut check = |header: Option<pb::ResponseHeader>, expected: i64| {
            let header = header.expect("a header");
            assert_eq!((header.member_id, header.revision), (id, expected));
            assert!(header.raft_term > 0);
            clusters.insert(header.cluster_id);
        };
        let mut kv = cluster[at].kv();
        // Each sees at once what it has written itself.
        let key = format!("k{at}");
        revision += 1;
        check(kv.put(put(&key, "1")).await.unwrap().into_inner().header, revision);
        let read = kv.range(get(&key)).await.unwrap().into_inner();
        assert_eq!(read.count, 1);
        check(read.header, revision);
        let txn = pb::TxnRequest {
            success: vec![pb::RequestOp { request: Some(Op::RequestPut(put(&key, "2"))) }],
            ..pb::TxnRequest::default()
        };
        revision += 1;
        let answer = kv.txn(txn).await.unwrap().into_inner();
        assert!(answer.succeeded);
        check(answer.header, revision);
        let delete = pb::DeleteRangeRequest { key: key.clone().into(), ..Default::default() };
        revision += 1;
        let answer = kv.delete_range(delete).await.unwrap().into_inner();
        assert_eq!(answer.deleted, 1);
        check(answer.header, revision);
        let compaction = pb::CompactionRequest { revision: revision - 1, physical: true };
        check(kv.compact(compaction).await.unwrap().into_inner().header, revision);
        let again = kv.compact(compaction).await.expect_err("it is compacted");
        assert_eq!(again.message(), "etcdserver: mvcc: required revision has been compacted");
        assert_eq!(again.code(), Code::OutOfRange);
        // The others have it, too.
        for other in 0..3 {
            let old = pb::RangeRequest { revision: revision - 2, ..get(&key) };
            let refused = cluster[other].kv().range(old).await.expect_err("it is compacted");
            assert_eq!(refused.code(), Code::OutOfRange);
        }

        let mut leases = cluster[at].leases();
        let granted = leases.lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 0 }).await;
        let granted = granted.unwrap().into_inner();
        check(granted.header, revision);
        let lease = granted.id;
        revision += 1;
        let leased = pb::PutRequest { lease, ..put("leased", "v") };
        check(kv.put(leased).await.unwrap().into_inner().header, revision);
        for other in 0..3 {
            let mut leases = cluster[other].leases();
            let id = cluster[other].id().await;
            let asked = tokio_stream::iter([pb::LeaseKeepAliveRequest { id: lease }]);
            let mut kept = leases.lease_keep_alive(asked).await.unwrap().into_inner();
            let kept = soon("a keepalive", kept.next()).await.unwrap().unwrap();
            assert_eq!((kept.id, kept.ttl), (lease, 60));
            assert_eq!(kept.header.unwrap().member_id, id);
            let ask = pb::LeaseTimeToLiveRequest { id: lease, keys: true };
            let left = until("the lease to be known", || async {
                let mut leases = cluster[other].leases();
                let left = leases.lease_time_to_live(ask).await.unwrap().into_inner();
                (left.keys.len() == 1).then_some(left)
            })
            .await;
            assert!((55..=60).contains(&left.ttl) && left.granted_ttl == 60, "{left:?}");
            assert_eq!(left.header.unwrap().member_id, id);
            let all = leases.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
            assert_eq!(all.leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [lease]);
        }
        revision += 1;
        let revoked = leases.lease_revoke(pb::LeaseRevokeRequest { id: lease }).await;
        check(revoked.unwrap().into_inner().header, revision);
        for other in 0..3 {
            assert_eq!(cluster[other].read("leased").await.unwrap(), None);
        }
        let gone = leases.lease_revoke(pb::LeaseRevokeRequest { id: lease }).await;
        let gone = gone.expect_err("it is revoked");
        assert_eq!(
            (gone.code(), gone.message()),
            (Code::NotFound, "etcdserver: requested lease not found")
        );
        // A keepalive of a lease that is gone says so by a TTL of 0, wherever it is asked.
        for other in 0..3 {
            let asked = tokio_stream::iter([pb::LeaseKeepAliveRequest { id: lease }]);
            let mut leases = cluster[other].leases();
            let mut kept = leases.lease_keep_alive(asked).await.unwrap().into_inner();
            assert_eq!(soon("a keepalive", kept.next()).await.unwrap().unwrap().ttl, 0);
        }
    }
    assert_eq!(clusters.len(), 1);
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_s_watches_see_all_writes_in_order() {
    const WRITES: usize = 50;
    let cluster = Cluster::start(&[]).await;
    let mut watches = Vec::new();
    for member in &cluster.members {
        watches.push(Watch::open(member, "w/", 0).await);
    }
    let mut expected = Vec::new();
    for write in 0..WRITES {
        let (key, value) = (format!("w/{write}"), format!("by {}", write % 3));
        let revision = cluster[write % 3].put(&key, &value).await.unwrap();
        expected.push((revision, key, value));
    }
    for watch in &mut watches {
        for expected in &expected {
            assert_eq!(watch.next().await, *expected);
        }
    }
    // And from the past, at another member.
    let first = expected[0].0;
    for member in &cluster.members {
        let mut watch = Watch::open(member, "w/", first).await;
        for expected in &expected {
            assert_eq!(watch.next().await, *expected);
        }
    }
}

/// A read at any member sees what was acknowledged by any other before it began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_see_what_other_members_have_acknowledged() {
    let cluster = Cluster::start(&[]).await;
    let clients: Vec<_> = cluster.members.iter().map(Member::kv).collect();
    for round in 0..60 {
        let value = round.to_string();
        let mut writer = clients[round % 3].clone();
        soon("a put", writer.put(put("k", &value))).await.unwrap();
        for reader in &clients {
            let answer = soon("a get", { reader.clone() }.range(get("k"))).await.unwrap();
            let kv = answer.into_inner().kvs.remove(0);
            let kv = kvorum::pb::mvccpb::KeyValue::decode(kv).unwrap();
            assert_eq!(kv.value, value);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_is_one_lock_whichever_member_is_asked() {
    let cluster = Cluster::start(&[]).await;
    let mut held = Vec::new();
    let mut waiting = Vec::new();
    for at in 0..3 {
        let mut leases = cluster[at].leases();
        let granted = leases.lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 0 });
        let lease = granted.await.unwrap().into_inner().id;
        let mut locks = LockClient::new(cluster[at].channel());
        let lock = LockRequest { name: "lock".into(), lease };
        if at == 0 {
            held.push(soon("the lock", locks.lock(lock)).await.unwrap().into_inner().key);
            continue;
        }
        waiting.push(tokio::spawn(async move { locks.lock(lock).await.unwrap().into_inner().key }));
        // It is in the queue before the next one comes.
        until("who waits for the lock", || async {
            let all = pb::RangeRequest { range_end: "lock0".into(), ..get("lock/") };
            let answer = cluster[2].kv().range(all).await.unwrap();
            (answer.into_inner().count == at as i64 + 1).then_some(())
        })
        .await;
    }
    for (at, waits) in waiting.into_iter().enumerate() {
        assert!(!waits.is_finished());
        // At a member that neither holds nor waits for it.
        let mut locks = LockClient::new(cluster[2 - at].channel());
        let key = held.pop().unwrap();
        soon("the unlock", locks.unlock(UnlockRequest { key })).await.unwrap();
        held.push(soon("the next to have it", waits).await.unwrap());
    }
}

/// A lease lives as long as keepalives come through any member, and ends in time after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepalives_through_any_member_keep_a_lease() {
    const TTL: i64 = 2;
    let mut cluster = Cluster::start(&[]).await;
    let follower = cluster.follower().await;
    let lease = pb::LeaseGrantRequest { ttl: TTL, id: 7 };
    cluster[follower].leases().lease_grant(lease).await.unwrap();
    let leased = pb::PutRequest { lease: 7, ..put("leased", "v") };
    cluster[follower].kv().put(leased).await.unwrap();
    let began = Instant::now();
    let mut last = began;
    let mut at = 0;
    while began.elapsed() < Duration::from_secs(3 * TTL as u64) {
        let mut leases = cluster[at % 3].leases();
        let before = Instant::now();
        let asked = tokio_stream::iter([pb::LeaseKeepAliveRequest { id: 7 }]);
        let mut kept = leases.lease_keep_alive(asked).await.unwrap().into_inner();
        assert_eq!(soon("a keepalive", kept.next()).await.unwrap().unwrap().ttl, TTL);
        last = before;
        at += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    until("the lease to end", || async {
        cluster[0].read("leased").await.unwrap().is_none().then_some(())
    })
    .await;
    assert!(last.elapsed() >= Duration::from_secs(TTL as u64), "too early: {:?}", last.elapsed());
}
