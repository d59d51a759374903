//! Clusters and snapshot files: saved from members that do not lead, and restored from files that
//! are not the same.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvorum::pb::etcdserverpb as pb;

use crate::common::{judge, server};
use crate::rig::{Cluster, Member, get, put, until};

/// Runs kvorum's own command in the cluster's directory.
async fn snapshot(cluster: &Cluster, arguments: Vec<String>) {
    let mut command = std::process::Command::new(server::kvorum());
    command.arg("snapshot").args(&arguments).current_dir(cluster.directory.path());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
}

/// Makes the data directory of a member that was not started yet.
async fn restore(cluster: &Cluster, at: usize, file: PathBuf) {
    let (name, initial) = (cluster[at].name.clone(), cluster.initial());
    let mut arguments = vec!["restore".to_owned(), file.display().to_string()];
    for (flag, value) in [
        ("name", name.clone()),
        ("data-dir", name),
        ("initial-cluster", initial),
        ("initial-advertise-peer-urls", cluster[at].peer_url()),
    ] {
        arguments.push(format!("--{flag}={value}"));
    }
    snapshot(cluster, arguments).await;
}

/// Who is in doubt, as far as a member knows; `None` if it does not answer.
async fn corrupt(member: &Member) -> Option<Vec<u64>> {
    let answer = member.maintenance().alarm(pb::AlarmRequest::default()).await.ok()?;
    let alarms = answer.into_inner().alarms.into_iter();
    let alarms = alarms.filter(|alarm| alarm.alarm == pb::AlarmType::Corrupt as i32);
    Some(alarms.map(|alarm| alarm.member_id).collect())
}

/// Raft's logs are empty and alike; the states below them are not. The first writes show it: of
/// two members nobody knows who is wrong, of three the one that is alone is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_were_restored_from_different_files_do_not_serve() {
    let mut source = Cluster::new(&server::kvorum(), 1, &[], false);
    source.start_all().await;
    let mut files = Vec::new();
    for value in ["older", "newer"] {
        source[0].put("k", value).await.unwrap();
        let endpoints = format!("--endpoints={}", source[0].client_url());
        snapshot(&source, vec!["save".to_owned(), value.to_owned(), endpoints]).await;
        files.push(source.directory.path().join(value));
    }
    let [older, newer] = &files[..] else { panic!("{files:?}") };
    for restored_from in [&[older, newer][..], &[newer, newer, older]] {
        let mut cluster = Cluster::new(&server::kvorum(), restored_from.len(), &[], false);
        for (at, file) in restored_from.iter().enumerate() {
            restore(&cluster, at, (*file).clone()).await;
        }
        for member in &mut cluster.members {
            member.spawn();
        }
        let is_alone = cluster.members.len() == 2;
        let named = until("the difference to be told", || async {
            corrupt(&cluster[0]).await.filter(|named| !named.is_empty())
        })
        .await;
        let refused = cluster[0].put("k", "refused").await.unwrap_err();
        assert_eq!(refused.message(), "etcdserver: corrupt cluster");
        if is_alone {
            assert_eq!(named, [0], "the cluster");
            let others = || async { corrupt(&cluster[1]).await.filter(|named| *named == [0]) };
            until("the other to tell it", others).await;
        } else {
            let request = pb::MemberListRequest::default();
            let members = cluster[0].members().member_list(request).await.unwrap().into_inner();
            let wrong = members.members.iter().find(|member| named.contains(&member.id)).unwrap();
            assert_eq!((named.len(), &wrong.peer_ur_ls[..]), (1, &[cluster[2].peer_url()][..]));
            assert!(!cluster[2].ended().await.success());
        }
    }
}

/// Writes until it is told to stop.
async fn load(member: pb::kv_client::KvClient<tonic::transport::Channel>, stop: Arc<AtomicBool>) {
    let mut member = member;
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("key {}", number % 50);
        member.put(put(&key, &format!("{number} {}", "v".repeat(2000)))).await.unwrap();
    }
}

/// A member's hash of the keys as of a revision.
async fn hash_at(member: &Member, revision: i64) -> u32 {
    until("the hash", || async {
        let mut client = member.maintenance();
        let answer = client.hash_kv(pb::HashKvRequest { revision }).await.ok()?.into_inner();
        Some(answer.hash)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_follower_or_a_learner_saves_under_load_is_restored() {
    let test = "what_a_follower_or_a_learner_saves_under_load_is_restored";
    if judge::find(test).is_none() {
        return;
    }
    let mut cluster = Cluster::start(&[]).await;
    let leader = cluster.leader().await;
    let follower = cluster.follower().await;
    let learner = cluster.join("m4");
    cluster.add(leader, cluster[learner].peer_url(), true).await;
    cluster[learner].spawn();
    let stop = Arc::new(AtomicBool::new(false));
    let loading = tokio::spawn(load(cluster[leader].kv(), Arc::clone(&stop)));
    for at in [follower, learner] {
        // What was acknowledged before is to be in the file, once the member has seen it.
        let before = cluster[leader].put("before", &cluster[at].name).await.unwrap();
        until("the member to have it", || async {
            let request = pb::RangeRequest { serializable: true, ..get("before") };
            let answer = cluster[at].kv().range(request).await.ok()?.into_inner();
            (answer.header?.revision >= before).then_some(())
        })
        .await;
        let file = format!("saved by {}", cluster[at].name);
        cluster.etcdctl_until(at, &["snapshot", "save", &file]).await;
        let mut restored = Cluster::new(&server::kvorum(), 1, &[], false);
        restore(&restored, 0, cluster.directory.path().join(&file)).await;
        restored.start_all().await;
        let answer = restored[0].kv().range(get("before")).await.unwrap().into_inner();
        let revision = answer.header.unwrap().revision;
        assert!(revision >= before, "{revision} is before {before}");
        let hashes =
            (hash_at(&restored[0], revision).await, hash_at(&cluster[leader], revision).await);
        assert_eq!(hashes.0, hashes.1, "at {revision}, of {}", cluster[at].name);
        restored[0].put("afterwards", "v").await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    loading.await.unwrap();
}
