//! `kill -9` at any moment, again and again on the same directory.

use std::sync::Arc;
use std::time::Duration;

use crate::common::rng::Rng;
use crate::history::History;
use crate::load::{Load, Mix};
use crate::node::Node;
use crate::{seeded, setting, watcher};

/// Kills under load in an ordinary run.
const ROUNDS: u64 = 12;

/// Flags that decide when checkpoints are made and the log is cut; another set in each
/// life.
pub(crate) fn arguments(rng: &mut Rng) -> Vec<String> {
    let count = rng.pick(&[20, 50, 200, 10_000]);
    let kept = rng.pick(&[1, 10, 100, 5_000]);
    vec![
        format!("--snapshot-count={count}"),
        format!("--snapshot-catchup-entries={kept}"),
        "--compaction-sleep-interval=1ms".to_owned(),
        format!("--compaction-batch-limit={}", rng.pick(&[5, 50, 1000])),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost() {
    let rounds = setting("KVORUM_CRASH_ROUNDS", ROUNDS);
    let mut rng = seeded("killed");
    let directory = tempfile::tempdir().unwrap();
    let mut node = Node::new(&directory.path().join("data"), &directory.path().join("log"), &[]);
    let history = Arc::new(History::new());
    let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
    for round in 0..rounds {
        while rng.chance(if round == 0 { 70 } else { 25 }) {
            // Killed while it comes up, perhaps several times in a row.
            node.set_arguments(arguments(&mut rng));
            node.spawn();
            tokio::time::sleep(Duration::from_micros(rng.next() % 150_000)).await;
            node.kill();
        }
        node.set_arguments(arguments(&mut rng));
        node.start();
        history.verify(node.channel(), &mut rng).await;
        let load = Load::start(&node.channel(), &history, Mix::Everything, &mut rng);
        tokio::time::sleep(Duration::from_millis(rng.next() % 900)).await;
        node.kill();
        load.stop().await;
        println!("round {round}: {} acknowledged, at {}", history.acknowledged(), history.seen());
        assert!(!node.log().contains("panicked"), "{}", node.log_tail());
        assert!(!follower.is_finished(), "the watcher has failed");
    }
    node.start();
    history.verify(node.channel(), &mut rng).await;
    let (status, _) = node.terminate();
    assert!(status.success(), "{status}");
    node.start();
    history.verify(node.channel(), &mut rng).await;
    follower.abort();
    assert!(history.acknowledged() as u64 > rounds * 10, "hardly any load");
}
