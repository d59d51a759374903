//! The ordinary ends and beginnings: SIGTERM under load, and a start on an empty directory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvorum::pb::etcdserverpb::PutRequest;
use kvorum::pb::etcdserverpb::kv_client::KvClient;

use crate::history::History;
use crate::load::{Load, Mix};
use crate::node::{Node, PATIENCE};
use crate::{seeded, watcher};

/// How long a stop under load may take.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Starts that are measured.
const STARTS: usize = 5;
/// How long the middle one of them may take, even of a debug build on a busy machine.
const START_MAX: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_stops_soon_and_loses_nothing() {
    let mut rng = seeded("sigterm");
    let directory = tempfile::tempdir().unwrap();
    let flags = ["--snapshot-count=100", "--snapshot-catchup-entries=10"];
    let log = directory.path().join("log");
    let mut node = Node::new(&directory.path().join("data"), &log, &flags);
    let history = Arc::new(History::new());
    let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
    for round in 0..3 {
        node.start();
        history.verify(node.channel(), &mut rng).await;
        let load = Load::start(&node.channel(), &history, Mix::Everything, &mut rng);
        tokio::time::sleep(Duration::from_millis(200 + rng.next() % 400)).await;
        let (status, took) = node.terminate();
        load.stop().await;
        println!("round {round}: stopped in {took:?}, {} acknowledged", history.acknowledged());
        assert!(status.success(), "{status}");
        assert!(took < STOP_MAX, "{took:?}");
    }
    node.start();
    history.verify(node.channel(), &mut rng).await;
    assert!(!node.log().contains("repaired"), "an orderly stop leaves nothing to repair");
    assert!(!node.log().contains("panicked"), "{}", node.log_tail());
    follower.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_server_takes_its_first_write_soon() {
    let mut took = Vec::new();
    for _ in 0..STARTS {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut node = Node::new(&directory.path().join("data"), &log, &[]);
        let began = Instant::now();
        node.spawn();
        while !first_put(&node).await {
            assert!(node.is_running() && began.elapsed() < PATIENCE, "{}", node.log_tail());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        took.push(began.elapsed());
    }
    took.sort();
    println!("from the start to the first write: {took:?}");
    assert!(took[STARTS / 2] < START_MAX, "{took:?}");
}

async fn first_put(node: &Node) -> bool {
    let put = PutRequest { key: "first".into(), ..Default::default() };
    // A connection of its own: one that was refused is not tried again at once.
    KvClient::new(node.channel()).put(put).await.is_ok()
}
