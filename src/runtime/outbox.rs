//! Raft's messages on their way out, and the images that some of them need.
//!
//! ```text
//! raft ── wants a snapshot for 7 ──▶ make ──▶ a source, kept here ── SnapshotMade ──▶ raft
//! raft ── the message for 7 ───────▶ source and message go out together
//!                                    ── in force over there, or not: SnapshotSent ──▶ raft
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::image::{Images, Kept, RESUME_MAX, Source};
use super::raft_thread::{Outbox, RaftInput};
use crate::log::Mark;
use crate::net::snapshot::{self, Image as _};
use crate::net::{Lane, Peers};
use crate::raft::{Kind, Outgoing};

/// The way to the other members.
pub struct PeerOutbox {
    shared: Arc<Shared>,
}

struct Shared {
    peers: Peers,
    images: Arc<Images>,
    raft: Sender<RaftInput>,
    runtime: Handle,
    /// Bytes of images sent per second to one member; 0: as fast as it goes.
    bytes_per_sec: u64,
    sources: Mutex<Sources>,
}

/// Sources that raft was told of, or will be; one for each member at most.
#[derive(Default)]
struct Sources {
    making: BTreeSet<u64>,
    made: BTreeMap<u64, Kept>,
}

impl PeerOutbox {
    /// To these peers; what becomes of images is told to `raft`.
    pub fn new(
        peers: Peers,
        images: Arc<Images>,
        raft: Sender<RaftInput>,
        runtime: Handle,
        bytes_per_sec: u64,
    ) -> PeerOutbox {
        let sources = Mutex::default();
        let shared = Shared { peers, images, raft, runtime, bytes_per_sec, sources };
        PeerOutbox { shared: Arc::new(shared) }
    }
}

impl Outbox for PeerOutbox {
    fn send(&mut self, message: Outgoing) -> bool {
        let Outgoing { to, bytes, kind } = message;
        match kind {
            Kind::Log => self.shared.peers.send(to, bytes, Lane::Bulk),
            Kind::Urgent => self.shared.peers.send(to, bytes, Lane::Urgent),
            Kind::Snapshot(mark) => {
                let shared = Arc::clone(&self.shared);
                self.shared.runtime.spawn(async move {
                    let is_in_force = shared.send_image(to, mark, bytes).await;
                    // When raft has stopped, nobody needs to know.
                    let _ = shared.raft.send(RaftInput::SnapshotSent { to, is_in_force });
                });
                true
            }
        }
    }

    fn make_snapshot(&mut self, to: u64, first_index: u64) {
        let mut sources = self.shared.sources.lock();
        let made = sources.made.get(&to).map(|made| &made.source);
        if let Some(made) = made.filter(|made| made.index() >= first_index) {
            // Raft has forgotten, or will hear of it in a moment.
            let _ = self.shared.raft.send(made_for(to, made));
            return;
        }
        if !sources.making.insert(to) {
            return;
        }
        sources.made.remove(&to);
        drop(sources);
        let shared = Arc::clone(&self.shared);
        self.shared.runtime.spawn(async move { shared.make(to, first_index).await });
    }
}

/// What raft is told of a source.
fn made_for(to: u64, source: &Source) -> RaftInput {
    let mark = Mark { index: source.index(), term: source.term() };
    RaftInput::SnapshotMade { to, mark, configuration: source.configuration() }
}

impl Shared {
    async fn make(self: Arc<Self>, to: u64, first_index: u64) {
        let images = Arc::clone(&self.images);
        let made = tokio::task::spawn_blocking(move || images.source(to, first_index)).await;
        let Ok(Ok(source)) = made else {
            self.sources.lock().making.remove(&to);
            tracing::warn!(member = format!("{to:x}"), "cannot make a snapshot");
            return;
        };
        let told = made_for(to, &source);
        {
            let mut sources = self.sources.lock();
            sources.making.remove(&to);
            sources.made.insert(to, Kept::new(source));
        }
        let _ = self.raft.send(told);
        tokio::time::sleep(RESUME_MAX).await;
        self.sources.lock().made.retain(|_, made| !made.is_old());
    }

    /// Sends the image as of `mark`; returns whether it is in force over there.
    async fn send_image(&self, to: u64, mark: Mark, message: Bytes) -> bool {
        let made = self.sources.lock().made.remove(&to);
        let Some(Kept { mut source, .. }) = made else { return false };
        if source.index() != mark.index {
            return false;
        }
        let Some(client) = self.peers.client(to) else { return false };
        let member = format!("{to:x}");
        tracing::info!(member, index = mark.index, "sending a snapshot");
        let metrics = self.peers.metrics(to);
        let began = Instant::now();
        metrics.snapshot_send_inflights.inc();
        let sent = snapshot::send(client, &mut source, message, self.bytes_per_sec).await;
        metrics.snapshot_send_inflights.dec();
        match &sent {
            Ok(()) => {
                metrics.snapshot_send_success.inc();
                metrics.snapshot_send_seconds.observe(began.elapsed().as_secs_f64());
                tracing::info!(member, index = mark.index, "a snapshot is in force");
            }
            Err(error) => {
                metrics.snapshot_send_failures.inc();
                tracing::warn!(member, %error, "a snapshot was not taken");
            }
        }
        let is_in_force = sent.is_ok();
        self.images.ended(to, source, &sent);
        is_in_force
    }
}
