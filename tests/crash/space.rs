//! `kill -9` while space is given back: in the middle of compactions, of checkpoints, and of
//! checkpoints that are written anew.
//!
//! A store that takes a while to write is there first. Then, beside the usual load, which
//! compacts and defragments now and then as well, one of them begins, and a random time later
//! the server is killed. Afterwards everything acknowledged must be there, and HashKV be what
//! it was.

use std::sync::Arc;
use std::time::Duration;

use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{CompactionRequest, DefragmentRequest};
use tokio::task::JoinSet;

use crate::history::History;
use crate::killed::arguments;
use crate::load::{Load, Mix};
use crate::node::Node;
use crate::{seeded, setting, watcher};

/// Kills in an ordinary run.
const ROUNDS: u64 = 5;
/// How long the store is made larger in each round, so that writing it anew takes a while.
const GROWING: Duration = Duration::from_millis(200);
const VALUE_BYTES: usize = 8 << 10;
/// The longest time from the beginning of a compaction or defragmentation to the kill.
const WITHIN: Duration = Duration::from_millis(150);
/// As long as there is one checkpoint, at least.
const CHECKPOINT: Duration = Duration::from_millis(1_200);

/// What the server is in the middle of.
#[derive(Debug, Clone, Copy)]
enum Moment {
    Defragment,
    Compaction,
    Checkpoint,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_while_space_is_given_back() {
    let rounds = setting("KVORUM_CRASH_ROUNDS_SPACE", ROUNDS);
    let mut rng = seeded("space");
    let directory = tempfile::tempdir().unwrap();
    let mut node = Node::new(&directory.path().join("data"), &directory.path().join("log"), &[]);
    let history = Arc::new(History::new());
    let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
    for round in 0..rounds {
        node.set_arguments(arguments(&mut rng));
        node.start();
        history.verify(node.channel(), &mut rng).await;
        let growing = Load::start(&node.channel(), &history, Mix::Fill(VALUE_BYTES), &mut rng);
        tokio::time::sleep(GROWING).await;
        growing.finish().await;
        let load = Load::start(&node.channel(), &history, Mix::Everything, &mut rng);
        let moment = rng.pick(&[Moment::Defragment, Moment::Compaction, Moment::Checkpoint]);
        let mut asked = JoinSet::new();
        begin(moment, &node, &history, &mut asked);
        let within = if matches!(moment, Moment::Checkpoint) { CHECKPOINT } else { WITHIN };
        let micros = rng.next() % within.as_micros() as u64;
        tokio::time::sleep(Duration::from_micros(micros)).await;
        node.kill();
        load.stop().await;
        let answered = asked.try_join_next().is_some_and(|answer| answer.unwrap());
        println!(
            "round {round}: {moment:?}{}, {} acknowledged, at {}",
            if answered { ", done before" } else { "" },
            history.acknowledged(),
            history.seen()
        );
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
}

/// Asks for what the server is to be killed in the middle of. Whether it was done is told,
/// if anything is.
fn begin(moment: Moment, node: &Node, history: &Arc<History>, asked: &mut JoinSet<bool>) {
    match moment {
        Moment::Defragment => {
            let mut maintenance = MaintenanceClient::new(node.channel());
            asked.spawn(async move { maintenance.defragment(DefragmentRequest {}).await.is_ok() });
        }
        Moment::Compaction => {
            let mut kv = KvClient::new(node.channel());
            let history = Arc::clone(history);
            asked.spawn(async move {
                let revision = history.seen();
                history.ask_compaction(revision);
                let done = kv.compact(CompactionRequest { revision, physical: true }).await.is_ok();
                if done {
                    history.compacted(revision);
                }
                done
            });
        }
        Moment::Checkpoint => {}
    }
}
