//! A member whose checkpoint was damaged heals, also through mutual TLS, and also when it is killed
//! while it does, again and again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::rng::Rng;
use crate::common::server;
use crate::rig::{Cluster, until};

/// How often it is killed.
const KILLS: usize = 8;
/// Within what time of its start: most of a start, and of what follows.
const KILLED_WITHIN_MS: i64 = 800;

fn checkpoint(data_dir: &Path) -> Option<PathBuf> {
    let current = fs::read_to_string(data_dir.join("member/CURRENT")).unwrap();
    let dir = data_dir.join("member").join(current.lines().next().unwrap());
    dir.is_dir().then_some(dir)
}

/// Zeros in the middle of what the checkpoint has.
fn damage(data_dir: &Path) {
    // Killed just before the new one counted: it is damaged enough.
    let Some(dir) = checkpoint(data_dir) else { return };
    let db = dir.join("db");
    let mut bytes = fs::read(&db).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    bytes[..used / 2].fill(0);
    fs::write(&db, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_killed_while_it_heals_heals() {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).unwrap();
    let seed = u64::from_le_bytes(seed);
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut cluster =
        Cluster::start(&["--snapshot-count=50", "--snapshot-catchup-entries=10"]).await;
    let value = "large ".repeat(10_000);
    for number in 0..200 {
        cluster[0].put(&format!("key {}", number % 60), &value).await.unwrap();
    }
    let mut last = 0;
    cluster[0].kill();
    for round in 0..KILLS {
        damage(&cluster[0].data_dir());
        cluster[0].spawn();
        last = cluster[1].put("round", &round.to_string()).await.unwrap();
        let moment = rng.between(0, KILLED_WITHIN_MS) as u64;
        tokio::time::sleep(Duration::from_millis(moment)).await;
        assert!(cluster[0].is_running(), "it does not give up");
        cluster[0].kill();
    }
    damage(&cluster[0].data_dir());
    cluster[0].start().await;
    assert!(cluster[0].log().contains("moved aside"), "it was healed");
    let hashes = || async {
        let (healed, other) = (cluster[0].hash().await?, cluster[1].hash().await?);
        (healed == other && healed.0 >= last).then_some(())
    };
    until("equal hashes", hashes).await;
    // With the healed member alone there is a majority.
    cluster[2].kill();
    let revision =
        until("a leader", || async { cluster[0].put("afterwards", "").await.ok() }).await;
    assert!(revision > last);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_checkpoint_is_fetched_through_mutual_tls() {
    // The log does not reach back to the beginning.
    let flags = ["--snapshot-count=20", "--snapshot-catchup-entries=5"];
    let mut cluster = Cluster::encrypted(&server::kvorum(), &flags).await;
    for number in 0..100 {
        cluster[number % 3].put(&format!("key {number}"), &"v".repeat(10_000)).await.unwrap();
    }
    let damaged = cluster.follower().await;
    cluster[damaged].kill();
    damage(&cluster[damaged].data_dir());
    cluster[damaged].start().await;
    assert!(cluster[damaged].log().contains("moved aside"), "it was healed");
    cluster.equal().await;
    cluster[damaged].put("afterwards", "v").await.unwrap();
}
