//! Commands on their way to the leader.
//!
//! What is proposed at a member that does not lead goes to the one that does, in batches:
//! everything that waits while calls are under way makes up the next one. A command is
//! sent once. When the leader refuses it, or the call never reached it, its proposer is
//! told, and proposes it again; when nobody knows, its proposer waits: the command is
//! applied, or a later term overtakes it ([`Waiters`]).

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
        let mut next = None;
        loop {
            let first = match next.take() {
                Some(parcel) => parcel,
                None => match self.queue.recv().await {
                    Some(parcel) => parcel,
                    None => return,
                },
            };
            let (leader, term) = (first.leader, first.term);
            if to != (leader, term) {
                // Calls to a leader that is gone do not hold up those to the next.
                (to, calls) = ((leader, term), Arc::new(Semaphore::new(CALLS_MAX)));
            }
            let Ok(permit) = Arc::clone(&calls).acquire_owned().await else { return };
            let mut bytes = first.proposal.command.len();
            let mut batch = vec![first.proposal];
            while batch.len() < BATCH_COMMANDS && bytes < BATCH_BYTES {
                match self.queue.try_recv() {
                    Ok(parcel) if (parcel.leader, parcel.term) == to => {
                        bytes += parcel.proposal.command.len();
                        batch.push(parcel.proposal);
                    }
                    Ok(other) => {
                        next = Some(other);
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.send(leader, term, batch, permit);
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
            is_member_change: proposal.change.is_some(),
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
