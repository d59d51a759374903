//! The power fails: what the block device holds at that moment is all there is.
//!
//! The data lies on an ext4 image. The server is frozen under load, the image copied
//! and the copy mounted, which replays the file system's journal as after a real cut.
//! What the server had acknowledged must be in the copy; the page cache is not.

use std::sync::Arc;
use std::time::Duration;

use crate::disk::{self, Disk};
use crate::history::History;
use crate::killed::arguments;
use crate::load::{Load, Mix};
use crate::node::Node;
use crate::{seeded, setting, watcher};

/// Power cuts in an ordinary run.
const ROUNDS: u64 = 2;
const DISK_BYTES: u64 = 512 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_acknowledged() {
    if let Some(reason) = disk::unavailable() {
        println!("skipped: {reason}");
        return;
    }
    let rounds = setting("KVORUM_CRASH_ROUNDS_POWER", ROUNDS);
    let mut rng = seeded("power");
    let directory = tempfile::tempdir().unwrap();
    let mut disk = Disk::ext4(DISK_BYTES);
    let mut node = Node::new(&disk.path().join("data"), &directory.path().join("log"), &[]);
    let history = Arc::new(History::new());
    let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
    for round in 0..rounds {
        if rng.chance(if round == 0 { 60 } else { 20 }) {
            // While it comes up, at first on an empty directory.
            node.set_arguments(arguments(&mut rng));
            node.spawn();
            tokio::time::sleep(Duration::from_micros(rng.next() % 250_000)).await;
            node.freeze();
            disk = cut(&mut node, &disk);
            println!("round {round}: cut during start-up");
        }
        node.set_arguments(arguments(&mut rng));
        node.start();
        history.verify(node.channel(), &mut rng).await;
        let load = Load::start(&node.channel(), &history, Mix::Everything, &mut rng);
        tokio::time::sleep(Duration::from_millis(rng.next() % 2500)).await;
        node.freeze();
        // What was sent before counts; it has arrived by the time the copy is made.
        let after = cut(&mut node, &disk);
        load.stop().await;
        disk = after;
        println!("round {round}: {} acknowledged, at {}", history.acknowledged(), history.seen());
        assert!(!node.log().contains("panicked"), "{}", node.log_tail());
        assert!(!follower.is_finished(), "the watcher has failed");
    }
    node.start();
    history.verify(node.channel(), &mut rng).await;
    let (status, _) = node.terminate();
    assert!(status.success(), "{status}");
    follower.abort();
    assert!(history.acknowledged() as u64 > rounds * 10, "hardly any load");
}

/// What is left when a frozen server's power fails; the server is killed, and to be
/// started there.
fn cut(node: &mut Node, disk: &Disk) -> Disk {
    let after = disk.after_a_power_cut();
    node.kill();
    node.move_to(&after.path().join("data"));
    after
}
