//! Members that missed more than the log still holds, that were removed, or that come with
//! the wrong data or flags.

use kvorum::pb::etcdserverpb as pb;

use crate::common::server;
use crate::every_member::Watch;
use crate::rig::{Cluster, put, soon, until};

/// The leader's log holds little, so that who is stopped for a moment needs a snapshot.
const SHORT_LOG: [&str; 2] = ["--snapshot-count=100", "--snapshot-catchup-entries=10"];

async fn write(cluster: &Cluster, at: usize, round: usize, count: usize) -> i64 {
    let mut revision = 0;
    let client = cluster[at].kv();
    let value = "v".repeat(1000);
    for first in (0..count).step_by(100) {
        let mut writes = tokio::task::JoinSet::new();
        for key in first..first + 100 {
            let (mut client, value) = (client.clone(), value.clone());
            writes.spawn(async move {
                let request = put(&format!("k/{round}/{key}"), &value);
                client.put(request).await.unwrap().into_inner().header.unwrap().revision
            });
        }
        revision = soon("writes", writes.join_all()).await.into_iter().max().unwrap();
    }
    let compaction = pb::CompactionRequest { revision, physical: true };
    soon("a compaction", { client }.compact(compaction)).await.unwrap();
    revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_fell_behind_is_sent_the_state_again_and_again() {
    let mut cluster = Cluster::start(&SHORT_LOG).await;
    for round in 0..2 {
        let behind = cluster.follower().await;
        cluster[behind].kill();
        let leader = cluster.leader().await;
        let revision = write(&cluster, leader, round, 1000).await;
        // Killed while it takes the state in; the more often, the more places.
        for after in ["follows a leader", "receiving a snapshot", "received a snapshot"] {
            let seen = cluster[behind].log().matches(after).count();
            cluster[behind].spawn();
            until(after, || async {
                (cluster[behind].log().matches(after).count() > seen).then_some(())
            })
            .await;
            cluster[behind].kill();
        }
        let installed = cluster[behind].log().matches("installed a snapshot").count();
        cluster[behind].start().await;
        cluster.equal().await;
        assert!(cluster[behind].log().contains("received a snapshot"));
        assert!(cluster[behind].log().matches("installed a snapshot").count() >= installed);
        // It takes part: what is written there is there.
        let mut watch = Watch::open(&cluster[behind], "after", revision + 1).await;
        let revision = cluster[behind].put("after", "v").await.unwrap();
        assert_eq!(watch.next().await.0, revision);
        cluster.equal().await;
    }
}

/// A watch at a member that stood still goes on where it was, whether the member catches up
/// from the log or, as mostly, is sent the state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_across_a_state_that_was_sent() {
    use rustix::process::Signal;

    let mut cluster = Cluster::start(&SHORT_LOG).await;
    let behind = cluster.follower().await;
    let leader = cluster.leader().await;
    let mut watch = Watch::open(&cluster[behind], "watched", 0).await;
    cluster[leader].put("watched", "before").await.unwrap();
    assert_eq!(watch.next().await.2, "before");
    cluster[behind].signal(Signal::STOP);
    // Not compacted: the watch is told everything.
    let mut kv = cluster[leader].kv();
    for write in 0..1000 {
        let key = if write % 100 == 50 { "watched" } else { "other" };
        kv.put(put(key, &write.to_string())).await.unwrap();
    }
    // The leader gives up the connection that stands still, and then the entries.
    until("the leader to cut its log", || async {
        cluster[leader].log().contains("compacted Raft logs").then_some(())
    })
    .await;
    cluster[behind].signal(Signal::CONT);
    for write in 0..10 {
        assert_eq!(watch.next().await.2, (write * 100 + 50).to_string());
    }
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_ends_and_comes_back_only_as_a_new_one() {
    let mut cluster = Cluster::start(&[]).await;
    cluster[0].put("k", "v").await.unwrap();
    let gone = cluster.follower().await;
    let id = cluster[gone].id().await;
    let leader = cluster.leader().await;
    // The cluster agrees once the members have been connected for a while.
    until("the member to be removed", || async {
        let mut members = cluster[leader].members();
        members.member_remove(pb::MemberRemoveRequest { id }).await.ok()
    })
    .await;
    let said = "the member has been permanently removed from the cluster";
    assert_eq!(cluster[gone].ended().await.code(), Some(0));
    assert!(cluster[gone].log().contains(said));

    // With its data it ends again, and nobody's term grows.
    let term = cluster[leader].status().await.unwrap().raft_term;
    for _ in 0..2 {
        let seen = cluster[gone].log().matches(said).count();
        cluster[gone].spawn();
        assert_eq!(cluster[gone].ended().await.code(), Some(0));
        let log = cluster[gone].log();
        assert!(log.matches(said).count() > seen);
        assert!(log.contains("remove the directory"), "it says what to do");
    }
    assert_eq!(cluster[leader].status().await.unwrap().raft_term, term);

    // Nor does it go on alone, when nobody is left who could tell it.
    let others: Vec<usize> = (0..3).filter(|at| *at != gone).collect();
    for at in &others {
        cluster[*at].kill();
    }
    cluster[gone].spawn_with(&["--force-new-cluster"]);
    assert_eq!(cluster[gone].ended().await.code(), Some(1));
    assert!(cluster[gone].log().contains("was removed from its cluster, so its data may be old"));
    for at in &others {
        cluster[*at].spawn();
    }
    for at in others {
        cluster[at].healthy().await;
    }

    // As a new member, in the same place.
    std::fs::remove_dir_all(cluster[gone].data_dir()).unwrap();
    let added = cluster.add(leader, cluster[gone].peer_url(), false).await;
    assert_ne!(added.member.unwrap().id, id);
    let flags = &mut cluster[gone].flags;
    flags.push("--initial-cluster-state=existing".to_owned());
    cluster[gone].start().await;
    cluster[gone].put("k", "w").await.unwrap();
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lost_its_data_is_refused() {
    let mut cluster = Cluster::start(&[]).await;
    cluster[0].put("k", "v").await.unwrap();
    let wiped = cluster.follower().await;
    cluster[wiped].terminate().await;
    std::fs::remove_dir_all(cluster[wiped].data_dir()).unwrap();
    cluster[wiped].spawn();
    assert_eq!(cluster[wiped].ended().await.code(), Some(1));
    let log = cluster[wiped].log();
    assert!(log.contains("has already been bootstrapped"), "{log}");
    let leader = cluster.leader().await;
    cluster[leader].put("k", "w").await.unwrap();
}

/// It does not know any more what it voted and promised: its data is of no use to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_with_a_damaged_log_comes_back_as_a_new_one() {
    let mut cluster = Cluster::start(&[]).await;
    for number in 0..50 {
        cluster[0].put(&format!("key {number}"), "v").await.unwrap();
    }
    let forgotten = cluster.follower().await;
    let id = cluster[forgotten].id().await;
    cluster[forgotten].kill();
    let logs = std::fs::read_dir(cluster[forgotten].data_dir().join("member/wal")).unwrap();
    let logs = logs.map(|entry| entry.unwrap().path());
    let segment = logs.filter(|path| path.extension().is_some_and(|end| end == "log")).max();
    let segment = segment.unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[used / 2] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    cluster[forgotten].spawn();
    assert_eq!(cluster[forgotten].ended().await.code(), Some(1));
    let log = cluster[forgotten].log();
    for words in [segment.to_str().unwrap(), "member remove", "member add"] {
        assert!(log.contains(words), "{words:?} is not in {log}");
    }

    let leader = cluster.leader().await;
    until("the member to be removed", || async {
        let mut members = cluster[leader].members();
        members.member_remove(pb::MemberRemoveRequest { id }).await.ok()
    })
    .await;
    std::fs::remove_dir_all(cluster[forgotten].data_dir()).unwrap();
    cluster.add(leader, cluster[forgotten].peer_url(), false).await;
    cluster[forgotten].flags.push("--initial-cluster-state=existing".to_owned());
    cluster[forgotten].start().await;
    assert_ne!(cluster[forgotten].id().await, id);
    cluster.equal().await;
    // It counts: with it alone there is a majority.
    let other = (0..3).find(|at| ![leader, forgotten].contains(at)).unwrap();
    cluster[other].kill();
    until("a majority", || async { cluster[forgotten].put("k", "w").await.ok() }).await;
}

/// Two clusters that were given the same addresses by mistake keep apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_cluster_is_refused() {
    let mut cluster = Cluster::new(&server::kvorum(), 3, &[], false);
    cluster[2].flags.push("--initial-cluster-token=another".to_owned());
    for member in &mut cluster.members {
        member.spawn();
    }
    cluster[0].healthy().await;
    cluster[1].healthy().await;
    cluster[0].put("k", "v").await.unwrap();
    until("the mistake to be told", || async {
        cluster[2].log().contains("cluster ID mismatch").then_some(())
    })
    .await;
    assert!(cluster[2].status().await.is_none(), "it does not serve");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_goes_on_alone_and_gets_new_members() {
    let mut cluster = Cluster::start(&[]).await;
    for write in 0..50 {
        cluster[write % 3].put(&format!("k{write}"), "v").await.unwrap();
    }
    cluster.equal().await;
    let before = cluster[1].hash().await;
    for member in &mut cluster.members {
        member.kill();
    }
    cluster[1].spawn_with(&["--force-new-cluster"]);
    cluster[1].healthy().await;
    assert_eq!(cluster[1].hash().await, before);
    let members = |cluster: &Cluster| {
        let mut members = cluster[1].members();
        async move {
            let list = members.member_list(pb::MemberListRequest { linearizable: true }).await;
            list.unwrap().into_inner().members
        }
    };
    assert_eq!(members(&cluster).await.len(), 1);
    cluster[1].put("alone", "v").await.unwrap();
    cluster[1].terminate().await;
    cluster[1].start().await;
    assert_eq!(members(&cluster).await.len(), 1);
    // Those that were lost are not let in with what they had.
    cluster[0].spawn();
    assert_eq!(cluster[0].ended().await.code(), Some(0));
    assert!(cluster[0].log().contains("permanently removed"));
    // New ones are.
    let kept = cluster.members.remove(1);
    cluster.members = vec![kept];
    for name in ["n2", "n3"] {
        let new = cluster.join(name);
        let url = cluster[new].peer_url();
        cluster.add(0, url, false).await;
        cluster[new].start().await;
        cluster.equal().await;
    }
    assert_eq!(cluster[2].read("alone").await.unwrap().unwrap().value, "v");
}
