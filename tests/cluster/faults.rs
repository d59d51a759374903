//! Members that are killed, stopped or cut off, and what clients see of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use rustix::process::Signal;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};

use crate::common::{judge, server};
use crate::every_member::Watch;
use crate::rig::{Cluster, get, put, soon, until};

/// The members other than `at`.
fn others(at: usize) -> [usize; 2] {
    [(at + 1) % 3, (at + 2) % 3]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_the_leader() {
    let mut cluster = Cluster::start(&[]).await;
    for round in 0..3 {
        let leader = cluster.leader().await;
        let [survivor, other] = others(leader);
        let mut watch = Watch::open(&cluster[survivor], "k", 0).await;
        // Writes go on through a survivor while the leader dies.
        let mut kv = cluster[survivor].kv();
        let writing = tokio::spawn(async move {
            let mut revisions = Vec::new();
            for write in 0..200 {
                let request = put(&format!("k{round}"), &write.to_string());
                // The member waits for the next leader and asks it; nobody need try again.
                let answer = soon("a put", kv.put(request)).await;
                revisions.push(answer.unwrap().into_inner().header.unwrap().revision);
            }
            revisions
        });
        for write in 0..20 {
            assert_eq!(watch.next().await.2, write.to_string());
        }
        cluster[leader].kill();
        let revisions = writing.await.unwrap();
        assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");
        for (write, expected) in revisions.iter().enumerate().skip(20) {
            let (revision, _, value) = watch.next().await;
            assert_eq!((revision, value), (*expected, write.to_string()));
        }
        // Each was carried out once.
        let kv = cluster[other].read(&format!("k{round}")).await.unwrap().unwrap();
        assert_eq!((kv.version, kv.mod_revision), (200, revisions[199]));
        cluster[leader].start().await;
        cluster.equal().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_the_leader_and_ends_in_time() {
    const TTL: Duration = Duration::from_secs(4);
    let mut cluster = Cluster::start(&[]).await;
    let leader = cluster.leader().await;
    let [one, two] = others(leader);
    let mut revision = 0;
    for id in [1, 2] {
        let lease = pb::LeaseGrantRequest { ttl: TTL.as_secs() as i64, id };
        cluster[leader].leases().lease_grant(lease).await.unwrap();
        let leased = pb::PutRequest { lease: id, ..put(&format!("lease{id}"), "v") };
        let answer = cluster[leader].kv().put(leased).await.unwrap().into_inner();
        revision = answer.header.unwrap().revision;
    }
    let granted = Instant::now();
    let mut watch = Watch::open(&cluster[one], "lease", revision + 1).await;
    cluster[leader].kill();
    // One is kept through both of the others, the other is not.
    let mut last = granted;
    let kept_until = granted + 2 * TTL;
    let mut at = 0;
    while Instant::now() < kept_until {
        let mut leases = cluster[[one, two][at % 2]].leases();
        at += 1;
        let before = Instant::now();
        let asked = tokio_stream::iter([pb::LeaseKeepAliveRequest { id: 1 }]);
        let kept = leases.lease_keep_alive(asked).await;
        let kept = match kept {
            Ok(mut stream) => stream.get_mut().next().await.unwrap(),
            Err(status) => Err(status),
        };
        match kept {
            Ok(kept) => {
                assert_eq!(kept.ttl, TTL.as_secs() as i64);
                last = before;
            }
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, key, _) = watch.next().await;
    assert_eq!(key, "lease2");
    assert!(granted.elapsed() >= TTL);
    let (_, key, _) = watch.next().await;
    assert_eq!(key, "lease1");
    assert!(last.elapsed() >= TTL, "too early: {:?}", last.elapsed());
    assert!(last.elapsed() < 3 * TTL, "too late: {:?}", last.elapsed());
}

/// What a member answers that sees no majority.
async fn alone(program: &std::path::Path) -> Vec<String> {
    let mut cluster = Cluster::of(program, &[]).await;
    cluster[0].put("k", "v").await.unwrap();
    cluster.equal().await;
    let leader = cluster.leader().await;
    let [one, two] = others(leader);
    let survivor = one;
    let lease = pb::LeaseGrantRequest { ttl: 600, id: 7 };
    cluster[survivor].leases().lease_grant(lease).await.unwrap();
    let mut lines = Vec::new();
    let say = |lines: &mut Vec<String>, what: &str, result: Result<String, Status>| {
        lines.push(match result {
            Ok(text) => format!("{what}: {text}"),
            Err(status) => format!("{what}: {:?} {}", status.code(), status.message()),
        });
    };
    // Two streams: one needs a leader, the other does not.
    let open = |needs_leader: bool| {
        let channel = cluster[survivor].channel();
        async move {
            let union = pb::watch_request::RequestUnion::CreateRequest(pb::WatchCreateRequest {
                key: "k".into(),
                ..pb::WatchCreateRequest::default()
            });
            let (requests, receiver) = tokio::sync::mpsc::channel(8);
            requests.send(pb::WatchRequest { request_union: Some(union) }).await.unwrap();
            let mut request = Request::new(ReceiverStream::new(receiver));
            if needs_leader {
                request.metadata_mut().insert("hasleader", "true".parse().unwrap());
            }
            let mut client = WatchClient::new(channel);
            let mut stream = client.watch(request).await?.into_inner();
            let created = soon("a watch", stream.next()).await.unwrap()?;
            assert!(created.created);
            Ok::<_, Status>((requests, stream))
        }
    };
    let (_first, mut needs) = open(true).await.unwrap();
    let (_second, mut stays) = open(false).await.unwrap();

    cluster[leader].kill();
    cluster[two].kill();
    let began = Instant::now();
    until("the survivor to have no leader", || async {
        cluster[survivor].status().await.filter(|status| status.leader == 0)
    })
    .await;
    let lost = Instant::now();
    let ended = soon("the stream to end", needs.next()).await.unwrap();
    let ended = ended.map(|answer| format!("{answer:?}"));
    say(&mut lines, "the stream that needs a leader", ended);
    // Three looks, one election timeout apart, the first of which may be at once.
    assert!(lost.elapsed() > Duration::from_millis(1500), "{:?}", lost.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    let survivor = &cluster[survivor];
    let mut kv = survivor.kv();
    let serializable = pb::RangeRequest { serializable: true, ..get("k") };
    let read = kv.range(serializable).await.map(|answer| answer.into_inner().count.to_string());
    say(&mut lines, "serializable", read);
    let demanding = |mut request: Request<pb::RangeRequest>| {
        request.metadata_mut().insert("hasleader", "true".parse().unwrap());
        request
    };
    let read = kv.range(demanding(Request::new(get("k")))).await.map(|_| String::new());
    say(&mut lines, "get that needs a leader", read);
    let status = survivor.status().await.map(|status| status.errors);
    say(&mut lines, "status", Ok(format!("{status:?}")));
    let mut clients = (kv.clone(), kv.clone(), kv.clone(), survivor.leases(), survivor.leases());
    let mut members = survivor.members();
    let mut maintenance = survivor.maintenance();
    let keepalive = async {
        let mut leases = survivor.leases();
        let asked = tokio_stream::iter([pb::LeaseKeepAliveRequest { id: 7 }]);
        let mut stream = leases.lease_keep_alive(asked).await?.into_inner();
        let kept = soon("an answer to the keepalive", stream.next()).await;
        kept.unwrap_or_else(|| Err(Status::ok("the stream ended"))).map(|kept| kept.ttl.to_string())
    };
    let probes = async {
        let mut answers = Vec::new();
        for path in ["/health", "/health?serializable=true", "/livez", "/readyz", "/version"] {
            let (status, body) = survivor.get(path).await.unwrap_or_default();
            // Etcd lists its checks in no order.
            let mut lines: Vec<&str> = body.lines().collect();
            lines.sort_unstable();
            answers.push(format!("{path}: {status} {lines:?}"));
        }
        answers
    };
    let probes = probes.await;
    let (put, read, revoke, grant, left, listed, promoted, moved, kept, compacted) = tokio::join!(
        clients.0.put(put("k", "w")),
        clients.1.range(get("k")),
        clients.3.lease_revoke(pb::LeaseRevokeRequest { id: 7 }),
        async { survivor.leases().lease_grant(pb::LeaseGrantRequest { ttl: 5, id: 0 }).await },
        clients.4.lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 7, keys: false }),
        members.member_list(pb::MemberListRequest { linearizable: true }),
        async {
            let id = pb::MemberPromoteRequest { id: 1 };
            survivor.members().member_promote(id).await
        },
        maintenance.move_leader(pb::MoveLeaderRequest { target_id: 1 }),
        keepalive,
        clients.2.compact(pb::CompactionRequest { revision: 1, physical: false }),
    );
    say(&mut lines, "put", put.map(|answer| format!("{answer:?}")));
    say(&mut lines, "get", read.map(|answer| format!("{answer:?}")));
    say(&mut lines, "revoke", revoke.map(|answer| format!("{answer:?}")));
    say(&mut lines, "grant", grant.map(|answer| format!("{answer:?}")));
    say(&mut lines, "time to live", left.map(|answer| format!("{answer:?}")));
    say(&mut lines, "member list", listed.map(|answer| format!("{answer:?}")));
    say(&mut lines, "promote", promoted.map(|answer| format!("{answer:?}")));
    say(&mut lines, "move leader", moved.map(|answer| format!("{answer:?}")));
    say(&mut lines, "keepalive", kept);
    say(&mut lines, "compact", compacted.map(|answer| format!("{answer:?}")));
    lines.extend(probes);
    let listed = members.member_list(pb::MemberListRequest { linearizable: false }).await;
    say(&mut lines, "list", listed.map(|list| list.into_inner().members.len().to_string()));
    // The stream that does not need a leader is still there, and goes on when there is one.
    let quiet = tokio::time::timeout(Duration::from_millis(100), stays.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    cluster[two].start().await;
    cluster[two].put("k", "again").await.unwrap();
    loop {
        let answer = soon("the event", stays.next()).await.unwrap().unwrap();
        if !answer.events.is_empty() {
            break;
        }
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_a_majority_answers_as_etcd() {
    let test = "a_member_without_a_majority_answers_as_etcd";
    let Some(judges) = judge::find(test) else { return };
    let program = server::kvorum();
    let (etcd, kvorum) = tokio::join!(alone(&judges.etcd), alone(&program));
    assert_eq!(etcd, kvorum);
}

/// While the leader stands still the others elect one and go on; when it wakes it neither
/// answers with what it knew nor disturbs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stood_still_serves_nothing_old() {
    let mut cluster = Cluster::start(&[]).await;
    let leader = cluster.leader().await;
    let [one, two] = others(leader);
    let lease = pb::LeaseGrantRequest { ttl: 2, id: 7 };
    cluster[leader].leases().lease_grant(lease).await.unwrap();
    cluster[leader].put("k", "old").await.unwrap();
    // Connections that are there already, so that requests wait inside.
    let mut kv = cluster[leader].kv();
    kv.range(get("k")).await.unwrap();
    let mut leases = cluster[leader].leases();
    let (keepalives, receiver) = tokio::sync::mpsc::channel(8);
    keepalives.send(pb::LeaseKeepAliveRequest { id: 7 }).await.unwrap();
    let kept = leases.lease_keep_alive(ReceiverStream::new(receiver)).await;
    let mut kept = kept.unwrap().into_inner();
    assert_eq!(soon("a keepalive", kept.next()).await.unwrap().unwrap().ttl, 2);

    cluster[leader].signal(Signal::STOP);
    let stopped = Instant::now();
    soon("a put at the others", cluster[one].put("k", "new")).await.unwrap();
    // What is asked from here on must not be answered by what was. (A read that was on its
    // way before the put was begun may be.)
    let reads: Vec<_> = (0..20)
        .map(|_| {
            let mut kv = kv.clone();
            tokio::spawn(async move { kv.range(get("k")).await })
        })
        .collect();
    let term = cluster[two].status().await.unwrap().raft_term;
    tokio::time::sleep(Duration::from_secs(3).saturating_sub(stopped.elapsed())).await;
    until("the lease to end", || async {
        let ask = pb::LeaseTimeToLiveRequest { id: 7, keys: false };
        let left = cluster[one].leases().lease_time_to_live(ask).await.ok()?.into_inner();
        (left.ttl < 0).then_some(())
    })
    .await;
    for _ in 0..3 {
        keepalives.send(pb::LeaseKeepAliveRequest { id: 7 }).await.unwrap();
    }
    cluster[leader].signal(Signal::CONT);
    for read in reads {
        match soon("a read", read).await.unwrap() {
            Ok(answer) => {
                let kv = answer.into_inner().kvs.remove(0);
                let kv: kvorum::pb::mvccpb::KeyValue = prost::Message::decode(kv).unwrap();
                assert_eq!(kv.value, "new");
            }
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
        }
    }
    // The lease is gone: a keepalive may fail, and must not say that it lives.
    for _ in 0..3 {
        match soon("an answer to a keepalive", kept.next()).await {
            Some(Ok(kept)) => assert_eq!(kept.ttl, 0, "the lease is gone"),
            Some(Err(status)) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                break;
            }
            None => break,
        }
    }
    let now = cluster.leader().await;
    assert_ne!(now, leader, "it follows");
    assert_eq!(cluster[leader].status().await.unwrap().raft_term, term, "it does not disturb");
    cluster.equal().await;
}

/// Who is asked by then does not lead any more, or not yet; the client is not told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_left_of_a_lease_is_told_while_leaders_change() {
    const TTL: i64 = 600;
    const LEAST: usize = 10;
    let mut cluster = Cluster::start(&[]).await;
    let lease = pb::LeaseGrantRequest { ttl: TTL, id: 7 };
    cluster[0].leases().lease_grant(lease).await.unwrap();
    let told: [_; 3] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
    let mut asking = tokio::task::JoinSet::new();
    for (member, told) in cluster.members.iter().zip(&told) {
        let (mut leases, told) = (member.leases(), Arc::clone(told));
        asking.spawn(async move {
            loop {
                let asked = pb::LeaseTimeToLiveRequest { id: 7, keys: false };
                let answer = soon("the time left", leases.lease_time_to_live(asked)).await;
                let left = answer.unwrap().into_inner().ttl;
                assert!((1..=TTL).contains(&left), "{left}");
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut moves = 0;
    while moves < LEAST || told.iter().any(|told| told.load(Ordering::Relaxed) < LEAST) {
        let leader = cluster.leader().await;
        let target_id = cluster[(leader + 1) % 3].id().await;
        let moved = pb::MoveLeaderRequest { target_id };
        soon("a move", cluster[leader].maintenance().move_leader(moved)).await.unwrap();
        moves += 1;
        if let Some(ended) = asking.try_join_next() {
            ended.unwrap();
        }
    }
}
