//! The connection to one peer, made again whenever it breaks.
//!
//! ```text
//!            ┌───────────── pause, next URL ◀── Unreachable, queue dropped ◀─┐
//!            ▼                                                               │
//!  new channel ─▶ Messages(Outgoing) ─▶ answer begins: up ─▶ answer ends, ───┤
//!            └── refused, no route, no answer in ACCEPT_TIMEOUT ─────────────┘
//! ```
//!
//! The task here does not touch the messages: [`Outgoing`](super::queue::Outgoing) is the
//! body of the request, and is asked for more when the connection can take it. The task waits
//! for the answer, which says by its beginning that the peer takes messages, by its end that it
//! no longer does, and between them answers probes.
//!
//! While there is no connection, messages wait for the attempt that is under way or next, and
//! are dropped with it when it fails: a vote that is asked for while a peer restarts need not
//! wait for another election.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::identity::{Caller, Identity};
use super::queue::{Dropped, Queue};
use super::{
    ACCEPT_TIMEOUT, BadUrl, Client, LINGER, Lane, PROBE_INTERVAL, PeerAddress, PeerEvent,
    RECONNECT_PAUSE, REFUSED_PAUSE, Shared, refusal,
};
use crate::metrics::PeerMetrics;
use crate::pb::kvorumpb::Proposal;
use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::refusal::Reason;

/// A peer. Dropping it ends the connection, after what is queued or [`LINGER`].
pub(super) struct Link {
    state: Arc<State>,
    closing: watch::Sender<bool>,
}

/// What a link and its task share.
struct State {
    shared: Arc<Shared>,
    address: PeerAddress,
    queue: Arc<Queue>,
    metrics: PeerMetrics,
    standing: Mutex<Standing>,
}

struct Standing {
    /// Since when messages get through.
    active_since: Option<Instant>,
    /// For calls: another connection than that of the messages, to the URL that last worked.
    calls: Option<(usize, Channel)>,
    /// The link was dropped: its task keeps off the gauges, which may be another's.
    dropped: bool,
}

/// Why a connection ended, or was never there.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Url(#[from] BadUrl),
    #[error("no answer within {ACCEPT_TIMEOUT:?}")]
    Silence,
    #[error("{}", whole(.0))]
    Status(Box<Status>),
    #[error("the peer ended the stream")]
    Ended,
}

impl From<Status> for Broken {
    fn from(status: Status) -> Broken {
        Broken::Status(Box::new(status))
    }
}

/// What a status says, with what is beneath it: "transport error" alone helps nobody.
fn whole(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        let beneath = error.to_string();
        if !text.contains(&beneath) {
            text = format!("{text}: {beneath}");
        }
        source = error.source();
    }
    text
}

impl Link {
    /// Begins to connect.
    pub(super) fn new(shared: Arc<Shared>, address: PeerAddress) -> Link {
        let metrics = shared.metrics.peer(shared.member_id, address.id);
        metrics.known.set(1);
        let standing = Standing { active_since: None, calls: None, dropped: false };
        let state = Arc::new(State {
            shared,
            address,
            queue: Arc::new(Queue::new()),
            metrics,
            standing: Mutex::new(standing),
        });
        for at in 0..state.address.urls.len() {
            if state.call_at(at) {
                break;
            }
        }
        let (closing, closed) = watch::channel(false);
        tokio::spawn(Arc::clone(&state).run(closed));
        Link { state, closing }
    }

    pub(super) fn send(&self, message: Bytes, lane: Lane) -> bool {
        let queued = self.state.queue.push(message, lane);
        if !queued {
            self.state.metrics.sent_failures.inc();
        }
        queued
    }

    pub(super) fn propose(&self, proposal: Proposal) {
        self.state.refuse(self.state.queue.propose(proposal));
    }

    pub(super) fn urls(&self) -> &[String] {
        &self.state.address.urls
    }

    pub(super) fn client(&self) -> Option<Client> {
        let channel = self.state.standing.lock().calls.as_ref()?.1.clone();
        Some(self.state.client(channel))
    }

    pub(super) fn active_since(&self) -> Option<Instant> {
        self.state.standing.lock().active_since
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        {
            let mut standing = self.state.standing.lock();
            standing.dropped = true;
            self.state.metrics.active.set(0);
            self.state.metrics.known.set(0);
        }
        self.state.queue.close();
        // Fails only when the task has ended, with its runtime.
        let _ = self.closing.send(true);
    }
}

impl State {
    async fn run(self: Arc<State>, mut closed: watch::Receiver<bool>) {
        let given_up = async {
            let _ = closed.wait_for(|closed| *closed).await;
            // What is left when the time is up was not to be delivered.
            sleep(LINGER).await;
        };
        tokio::select! {
            () = self.keep_connected() => {}
            () = given_up => {}
        }
        self.drop_waiting();
    }

    /// Connects again and again, until the link is dropped and all has been sent.
    async fn keep_connected(&self) {
        let mut at = 0;
        let mut told = String::new();
        loop {
            let Some(url) = self.address.urls.get(at) else {
                // Without URLs there is nothing to do until there is another link.
                return std::future::pending().await;
            };
            let broken = self.connection(at, url).await;
            let was_active = self.inactive();
            if self.standing.lock().dropped {
                return;
            }
            let dropped = self.drop_waiting();
            let id = self.address.id;
            let event = if was_active { PeerEvent::Broken(id) } else { PeerEvent::Unreachable(id) };
            (self.shared.events)(event);
            let refused = self.report(url, &broken, was_active, dropped, &mut told);
            if !was_active {
                at = (at + 1) % self.address.urls.len();
            }
            sleep(if refused { REFUSED_PAUSE } else { RECONNECT_PAUSE }).await;
        }
    }

    /// Drops what waits: how many messages. Who proposed a command is told.
    fn drop_waiting(&self) -> usize {
        let Dropped { messages, proposals } = self.queue.disconnect();
        let dropped = messages + proposals.len();
        self.metrics.sent_failures.inc_by(u64::try_from(dropped).unwrap_or(u64::MAX));
        self.refuse(proposals);
        dropped
    }

    /// Tells who proposed commands that they were never sent.
    fn refuse(&self, proposals: impl IntoIterator<Item = Proposal>) {
        for Proposal { sequence, .. } in proposals {
            (self.shared.events)(PeerEvent::Refused { sequence, reason: Reason::NotLeader });
        }
    }

    /// One connection from its first packet to its end.
    async fn connection(&self, at: usize, url: &str) -> Broken {
        match self.messages(at, url).await {
            Ok(()) => Broken::Ended,
            Err(broken) => broken,
        }
    }

    async fn messages(&self, at: usize, url: &str) -> Result<(), Broken> {
        // A channel of its own: what is wrong with the last connection ends with it.
        let mut client = self.client((self.shared.connector)(url)?);
        let outgoing = self.queue.connect(self.metrics.clone());
        let accepted = timeout(ACCEPT_TIMEOUT, client.messages(outgoing)).await;
        let mut replies = accepted.map_err(|_| Broken::Silence)??.into_inner();
        self.active(at);
        tracing::info!(peer = self.name(), url, "peer became active");

        let mut probes = interval(PROBE_INTERVAL);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probe = (0, Instant::now());
        loop {
            tokio::select! {
                reply = replies.message() => {
                    let Some(reply) = reply? else { return Ok(()) };
                    if reply.probe != 0 && reply.probe == probe.0 {
                        let seconds = probe.1.elapsed().as_secs_f64();
                        self.metrics.round_trip_time_seconds.observe(seconds);
                    }
                    for refusal in reply.refusals {
                        let (sequence, reason) = (refusal.sequence, refusal.reason());
                        (self.shared.events)(PeerEvent::Refused { sequence, reason });
                    }
                }
                _ = probes.tick() => {
                    probe = (probe.0 + 1, Instant::now());
                    self.queue.probe(probe.0);
                }
            }
        }
    }

    fn active(&self, at: usize) {
        self.call_at(at);
        let mut standing = self.standing.lock();
        standing.active_since = Some(Instant::now());
        if !standing.dropped {
            self.metrics.active.set(1);
        }
    }

    /// Whether it was active until now.
    fn inactive(&self) -> bool {
        let mut standing = self.standing.lock();
        let was_active = standing.active_since.take().is_some();
        if was_active && !standing.dropped {
            self.metrics.active.set(0);
            self.metrics.disconnected.inc();
        }
        was_active
    }

    /// Has calls go to this URL. Whether there is a channel to it.
    fn call_at(&self, at: usize) -> bool {
        if self.standing.lock().calls.as_ref().is_some_and(|(calls, _)| *calls == at) {
            return true;
        }
        let Some(url) = self.address.urls.get(at) else { return false };
        let Ok(channel) = (self.shared.connector)(url) else { return false };
        self.standing.lock().calls = Some((at, channel));
        true
    }

    fn client(&self, channel: Channel) -> Client {
        let Shared { cluster_id, member_id, .. } = *self.shared;
        let identity = Identity { cluster_id, member_id };
        PeerClient::with_interceptor(channel, Caller::new(identity, self.address.id))
    }

    /// Says what happened: once for each reason until it works again, not ten times a
    /// second. Whether the peer refused, so that trying again soon is of no use.
    fn report(
        &self,
        url: &str,
        broken: &Broken,
        was_active: bool,
        dropped: usize,
        told: &mut String,
    ) -> bool {
        let mut refused = false;
        if let Broken::Status(status) = broken {
            refused = status.code() == Code::FailedPrecondition;
            if refusal::is_removed(status) {
                (self.shared.events)(PeerEvent::Removed);
            }
        }
        let peer = self.name();
        let error = broken.to_string();
        if was_active {
            tracing::warn!(peer, url, error, dropped, "lost the connection to a peer");
        } else if *told == error {
            tracing::debug!(peer, url, error, dropped, "cannot connect to a peer");
        } else {
            tracing::warn!(peer, url, error, dropped, "cannot connect to a peer");
        }
        *told = error;
        refused
    }

    fn name(&self) -> String {
        format!("{:x}", self.address.id)
    }
}
