//! Commands on their way to the leader.
//!
//! What is proposed at a member that does not lead goes to the one that does, in batches:
//! everything that waits while calls are under way makes up the next one. A command is
//! sent once. When the leader refuses it, or the call never reached it, its proposer is
//! told, and proposes it again; when nobody knows, its proposer waits: the command is
//! applied, or a later term overtakes it ([`Waiters`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::proposer::Forwarder;
use super::raft_thread::Proposal;
use super::waiters::Waiters;
use crate::net::{Peers, refusal};
use crate::pb::kvorumpb::{self, ProposeRequest, refusal::Reason};
use crate::raft::Refused;

/// Commands in one call.
const BATCH_COMMANDS: usize = 1024;
/// A call is not added to once its commands have this many bytes.
const BATCH_BYTES: usize = 512 * 1024;
/// Calls under way to one leader.
const CALLS_MAX: usize = 4;
/// A call that takes longer has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module documentation.
pub struct PeerForwarder {
    queue: mpsc::UnboundedSender<Parcel>,
}

/// A command for the leader of a term.
struct Parcel {
    leader: u64,
    term: u64,
    proposal: Proposal,
}

/// Sends what the [`PeerForwarder`] is given.
pub struct Sending {
    queue: mpsc::UnboundedReceiver<Parcel>,
    peers: Peers,
    waiters: Arc<Waiters>,
}

/// A forwarder, and what is to be run for it. The queue holds no more than the waiters let in.
pub fn forwarder(peers: Peers, waiters: Arc<Waiters>) -> (PeerForwarder, Sending) {
    let (sender, queue) = mpsc::unbounded_channel();
    (PeerForwarder { queue: sender }, Sending { queue, peers, waiters })
}

impl Forwarder for PeerForwarder {
    fn forward(&self, leader: u64, term: u64, proposal: Proposal) {
        // When nobody sends any more, the server stops, and everybody is told.
        let _ = self.queue.send(Parcel { leader, term, proposal });
    }
}

impl Sending {
    /// Runs until the forwarder is gone.
    pub async fn run(mut self) {
        let (mut to, mut calls) = ((0, 0), Arc::new(Semaphore::new(CALLS_MAX)));
        let mut waiting = VecDeque::new();
        loop {
            // While all calls are under way it goes on listening: there may be another leader.
            let may_listen = waiting.len() < BATCH_COMMANDS || calls.available_permits() == 0;
            tokio::select! {
                biased;
                parcel = self.queue.recv(), if may_listen => {
                    let Some(Parcel { leader, term, proposal }) = parcel else { return };
                    if term < to.1 {
                        self.waiters.refuse(proposal.sequence, Refused::NotLeader);
                        continue;
                    }
                    if to != (leader, term) {
                        // Calls to a leader that is gone do not hold up those to the next, and
                        // what has yet to be sent there may go elsewhere.
                        for Proposal { sequence, .. } in waiting.drain(..) {
                            self.waiters.refuse(sequence, Refused::NotLeader);
                        }
                        (to, calls) = ((leader, term), Arc::new(Semaphore::new(CALLS_MAX)));
                    }
                    waiting.push_back(proposal);
                }
                Ok(permit) = Arc::clone(&calls).acquire_owned(), if !waiting.is_empty() => {
                    self.send(to.0, to.1, next_batch(&mut waiting), permit);
                }
                else => return,
            }
        }
    }

    fn send(&self, leader: u64, term: u64, batch: Vec<Proposal>, permit: OwnedSemaphorePermit) {
        let sequences: Vec<u64> = batch.iter().map(|proposal| proposal.sequence).collect();
        let waiters = Arc::clone(&self.waiters);
        let refuse = move |sequences: &[u64]| {
            for sequence in sequences {
                waiters.refuse(*sequence, Refused::NotLeader);
            }
        };
        let Some(mut client) = self.peers.client(leader) else {
            return refuse(&sequences);
        };
        let proposals = batch.into_iter().map(|proposal| kvorumpb::Proposal {
            command: proposal.command,
            sequence: proposal.sequence,
        });
        let request = ProposeRequest { term, proposals: proposals.collect() };
        let waiters = Arc::clone(&self.waiters);
        tokio::spawn(async move {
            let _permit = permit;
            let answer = tokio::time::timeout(CALL_TIMEOUT, client.propose(request)).await;
            match answer {
                Ok(Ok(response)) => {
                    for refusal in response.into_inner().refusals {
                        waiters.refuse(refusal.sequence, reason(refusal.reason()));
                    }
                }
                Ok(Err(status)) if refusal::never_arrived(&status) => refuse(&sequences),
                Ok(Err(status)) => {
                    tracing::debug!(error = status.message(), "a call to the leader broke off");
                }
                Err(_) => tracing::debug!("the leader did not answer in time"),
            }
        });
    }
}

/// What goes into the next call.
fn next_batch(waiting: &mut VecDeque<Proposal>) -> Vec<Proposal> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while batch.len() < BATCH_COMMANDS && bytes < BATCH_BYTES {
        let Some(proposal) = waiting.pop_front() else { break };
        bytes += proposal.command.len();
        batch.push(proposal);
    }
    batch
}

/// What the leader's refusal means.
pub fn reason(reason: Reason) -> Refused {
    match reason {
        Reason::NotLeader => Refused::NotLeader,
        Reason::Full => Refused::Full,
        Reason::Busy => Refused::Busy,
    }
}

/// The same, to be told.
pub fn told(refused: Refused) -> Reason {
    match refused {
        Refused::NotLeader => Reason::NotLeader,
        Refused::Full => Reason::Full,
        Refused::Busy => Reason::Busy,
    }
}
