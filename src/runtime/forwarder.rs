//! Commands on their way to the leader.
//!
//! What is proposed at a member that does not lead goes to the one that does, on the stream
//! that carries raft's messages. A command is sent once. When the leader refuses it, or it never
//! left, its proposer is told, and proposes it again; when nobody knows, its proposer waits: the
//! command is applied, or a later term overtakes it ([`Waiters`]).

use std::sync::Arc;

use super::proposer::Forwarder;
use super::raft_thread::Proposal;
use super::waiters::Waiters;
use crate::net::Peers;
use crate::pb::kvorumpb::{self, Refusal, refusal::Reason};
use crate::raft::Refused;

/// See the module documentation.
pub struct PeerForwarder {
    peers: Peers,
    waiters: Arc<Waiters>,
}

impl PeerForwarder {
    /// Sends by way of `peers`, and tells `waiters` what does not leave.
    pub fn new(peers: Peers, waiters: Arc<Waiters>) -> PeerForwarder {
        PeerForwarder { peers, waiters }
    }
}

impl Forwarder for PeerForwarder {
    fn forward(&self, leader: u64, term: u64, proposal: Proposal) {
        let Proposal { command, sequence, .. } = proposal;
        let proposal = kvorumpb::Proposal { command, sequence, term };
        if !self.peers.propose(leader, proposal) {
            self.waiters.refuse(sequence, Refused::NotLeader);
        }
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
pub fn refusal(sequence: u64, refused: Refused) -> Refusal {
    let reason = match refused {
        Refused::NotLeader => Reason::NotLeader,
        Refused::Full => Reason::Full,
        Refused::Busy => Reason::Busy,
    };
    Refusal { sequence, reason: reason.into() }
}
