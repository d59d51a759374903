//! The other members of the cluster: how they are reached, and what they are told.
//!
//! ```text
//!  raft thread ── send(to, bytes) ──▶ Queue ──▶ Outgoing ─ one gRPC stream ─▶ peer's port
//!  forwarder ───── propose(to, …) ──▶               ▲
//!                  (never waits)              link: one task per peer connects,
//!                                             notices a break, connects again
//!  others ──────── client(to) ──────▶ unary calls and snapshots, on a connection of their own
//! ```
//!
//! Raft does not need a transport that keeps its promises: what is lost is sent again. It
//! needs one that never makes it wait and that forgets quickly. So [`Peers::send`] is a push
//! into a queue with a bound; when the bound is reached or the connection breaks, messages are
//! dropped, and raft is told that the peer is unreachable, which makes it send no more than
//! probes until the peer answers.
//!
//! - **Order.** Messages of one [`Lane`] arrive in the order in which they were sent, those of a
//!   later connection after those of an earlier one. Urgent messages overtake bulk in the
//!   queue: raft takes its messages in any order, and a heartbeat behind 64 MiB of entries would
//!   come too late. There is one stream for both, not two as in etcd: what is on its way
//!   ahead of an urgent message is bounded by the receiver's HTTP/2 window and one batch, 3 MiB.
//!   To followers these are entries, which count as heartbeats anyway. To the leader they are
//!   commands, as on etcd's stream: at 100 Mbit/s an answer is late by a quarter of a second then.
//! - **Commands for the leader** go the same way, so that a write through a follower costs
//!   neither a call nor its answer. They are sent once; those that never left, and those that the
//!   leader refuses, are told as [`PeerEvent::Refused`], and of others nobody knows.
//! - **Few wake-ups.** Everything that waits is one gRPC message, up to [`BATCH_BYTES`]. A push
//!   takes a lock and, when the stream was idle, wakes the one task that writes.
//! - **A dead connection is noticed** by HTTP/2 pings that the connector sets up, since a
//!   partition closes nothing, and by [`ACCEPT_TIMEOUT`] when it is opened.
//! - **Who is who.** Each call names the cluster, the caller and the member that is meant
//!   ([`identity`]); the receiving half is the service in `api/peer.rs`, which hands what
//!   comes in to a [`Receiver`].
//!
//! It never looks into a raft message, and it knows neither TLS nor sockets: a [`Connector`]
//! makes the channels.

pub mod identity;
mod link;
pub mod pull;
mod queue;
mod receiver;
pub mod refusal;
pub mod snapshot;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::RwLock;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use self::identity::Caller;
use self::link::Link;
use crate::metrics::{Metrics, PeerMetrics};
use crate::pb::kvorumpb::Proposal;
use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::refusal::Reason;

pub use self::queue::{
    BATCH_BYTES, BULK_QUEUE_BYTES, BULK_QUEUE_MESSAGES, URGENT_QUEUE_BYTES, URGENT_QUEUE_MESSAGES,
};
pub use self::receiver::{Receiver, Refusals, SnapshotReplies};

/// Time for a peer to take a stream of messages, from the first packet of the connection.
/// A member that is stopped by a signal accepts connections and never answers on them.
pub const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between two attempts to reach a peer.
pub const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// The same after the peer refused: it will do so again until somebody changes something.
pub const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// Time between two measurements of the round trip to a peer.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// Time for what is still queued when a peer is given up: the entry that removes a member
/// may be among it.
pub const LINGER: Duration = Duration::from_secs(1);

/// Where a member is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The member's id.
    pub id: u64,
    /// Its peer URLs; they are tried in turn.
    pub urls: Vec<String>,
}

/// Makes a channel to a peer URL, which connects with its first call. It is asked for a new
/// one for each connection, within the runtime.
pub type Connector = Arc<dyn Fn(&str) -> Result<Channel, BadUrl> + Send + Sync>;

/// A peer URL that no channel can be made for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot connect to {url}: {reason}")]
pub struct BadUrl {
    /// The URL.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What happened to a peer's connection, or to what was sent. The handler is called by the tasks that send, and
/// must not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerEvent {
    /// The connection to this peer broke, and what was queued is lost.
    Broken(u64),
    /// An attempt to connect to this peer failed. Told for each.
    Unreachable(u64),
    /// A command for the leader is in no log: it refused it, or it was never sent.
    Refused {
        /// The command's, as in its [`Proposal`].
        sequence: u64,
        /// Why.
        reason: Reason,
    },
    /// A peer says that this member was removed from the cluster, for ever. Told each time.
    Removed,
}

/// Where events go.
pub type Events = Arc<dyn Fn(PeerEvent) + Send + Sync>;

/// Which messages overtake which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Small, and late is as bad as never: heartbeats, votes, their answers, timeout-now.
    Urgent,
    /// Entries and what acknowledges them.
    Bulk,
}

/// A client for calls to a peer, with the metadata that names the two.
pub type Client = PeerClient<InterceptedService<Channel, Caller>>;

/// The other members. Clones share the connections, which end with the last clone.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    links: RwLock<BTreeMap<u64, Link>>,
}

/// What all links have in common.
struct Shared {
    cluster_id: u64,
    member_id: u64,
    connector: Connector,
    events: Events,
    metrics: Arc<Metrics>,
}

impl Peers {
    /// No peers, until [`Peers::update`] names some. `member_id` is this member.
    pub fn new(
        cluster_id: u64,
        member_id: u64,
        connector: Connector,
        events: Events,
        metrics: Arc<Metrics>,
    ) -> Peers {
        let shared = Shared { cluster_id, member_id, connector, events, metrics };
        Peers { inner: Arc::new(Inner { shared: Arc::new(shared), links: RwLock::default() }) }
    }

    /// Queues one of raft's messages, encoded, for the member `to`. Never waits. False when it
    /// was dropped, because the member is unknown or its queue is full: the caller then
    /// tells raft that it is unreachable.
    pub fn send(&self, to: u64, message: Bytes, lane: Lane) -> bool {
        self.inner.links.read().get(&to).is_some_and(|link| link.send(message, lane))
    }

    /// Queues a command for the leader `to`. Never waits. False when the member is unknown.
    /// The queue has no bound of its own: who proposes bounds what is under way in a term, and of
    /// an earlier one there is nothing once there is something of a later.
    pub fn propose(&self, to: u64, proposal: Proposal) -> bool {
        self.inner.links.read().get(&to).map(|link| link.propose(proposal)).is_some()
    }

    /// The members as they are now; this one is passed over if it is among them. Connections
    /// to new ones begin, those to members that are gone end once they are told what is
    /// queued, and those whose URLs changed are made anew. To be called within a runtime, where
    /// they run; nothing else here holds on to it, for handles may outlive it.
    pub fn update(&self, peers: &[PeerAddress]) {
        let shared = &self.inner.shared;
        let mut links = self.inner.links.write();
        links.retain(|id, _| peers.iter().any(|peer| peer.id == *id));
        for peer in peers.iter().filter(|peer| peer.id != shared.member_id) {
            if links.get(&peer.id).is_none_or(|link| link.urls() != peer.urls) {
                // The old link goes first: the new one's gauges are the ones to stay.
                links.remove(&peer.id);
                links.insert(peer.id, Link::new(Arc::clone(shared), peer.clone()));
            }
        }
    }

    /// A client for calls to the member `to`, on another connection than raft's messages.
    /// `None` for a member that is unknown or whose URLs are unusable.
    pub fn client(&self, to: u64) -> Option<Client> {
        self.inner.links.read().get(&to)?.client()
    }

    /// Whether there is nobody else.
    pub fn is_empty(&self) -> bool {
        self.inner.links.read().is_empty()
    }

    /// The series about a member.
    pub fn metrics(&self, id: u64) -> PeerMetrics {
        self.inner.shared.metrics.peer(self.inner.shared.member_id, id)
    }

    /// Since when messages have reached the member without a break; `None` while they do not.
    pub fn active_since(&self, id: u64) -> Option<Instant> {
        self.inner.links.read().get(&id)?.active_since()
    }

    /// Ends all connections, after what is queued or [`LINGER`]; does not wait for it.
    pub fn close(&self) {
        self.inner.links.write().clear();
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let links = self.inner.links.read();
        f.debug_struct("Peers").field("peers", &links.keys()).finish_non_exhaustive()
    }
}
