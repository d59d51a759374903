//! Raft's messages as bytes, and a guard before the node.
//!
//! Others carry messages without looking into them. What comes from the network is looked
//! at here before raft sees it: raft-rs takes its peers for well-behaved, and panics, or
//! worse believes, what a member with a damaged disk or a bug of its own may say.

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{self, EntryType, MessageType};
use raft::{RawNode, Storage as _};

use super::LogCache;
use crate::log::Mark;

/// A message for another member, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Whom it is for.
    pub to: u64,
    /// Raft's encoding of it.
    pub bytes: Bytes,
    /// How it travels.
    pub kind: Kind,
}

/// How a message travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Entries, and what acknowledges them: behind others of the kind.
    Log,
    /// Small, and late is as bad as never: heartbeats, votes, reads, and their answers.
    Urgent,
    /// Goes with the image of the state as of this entry, and is stepped by the receiver
    /// once that is there. What became of it is reported by
    /// [`Node::report_snapshot`](super::Node::report_snapshot).
    Snapshot(Mark),
}

/// Why a message is not for this node to see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is none, or none that a member would send.
    #[error("{0}")]
    Message(&'static str),
    /// The sender knows this member to have had entries that are not in its log.
    #[error(
        "member {from:x} says that this member holds entries up to {commit}, and its log ends \
         at {last_index}: the end of its log was lost. Remove this member from the cluster \
         (`etcdctl member remove`), and add it again with an empty data directory"
    )]
    LogLost {
        /// Who says so.
        from: u64,
        /// What is committed and was acknowledged by this member.
        commit: u64,
        /// What there is.
        last_index: u64,
    },
    /// The leader's log contradicts what was committed here.
    #[error(
        "member {from:x} leads with another entry {index} than the one committed here: the \
         logs are of different clusters, or one of them was changed. Remove this member from \
         the cluster, and add it again with an empty data directory"
    )]
    Diverged {
        /// The leader.
        from: u64,
        /// The entry.
        index: u64,
    },
}

impl Malformed {
    /// Whether this member has to stop rather than to go on without the message.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Malformed::Message(_))
    }
}

pub(super) fn encode(message: &eraftpb::Message) -> Option<Outgoing> {
    let kind = match message.get_msg_type() {
        MessageType::MsgSnapshot => {
            let metadata = message.get_snapshot().get_metadata();
            Kind::Snapshot(Mark { index: metadata.index, term: metadata.term })
        }
        MessageType::MsgAppend | MessageType::MsgAppendResponse => Kind::Log,
        _ => Kind::Urgent,
    };
    // A message that raft made can be encoded: it is no longer than memory.
    let bytes = message.write_to_bytes().ok()?;
    Some(Outgoing { to: message.to, bytes: Bytes::from(bytes), kind })
}

pub(super) fn decode(bytes: &[u8]) -> Result<eraftpb::Message, Malformed> {
    eraftpb::Message::parse_from_bytes(bytes).map_err(|_| Malformed::Message("it is no message"))
}

/// Whether raft may see the message.
pub(super) fn check(node: &RawNode<LogCache>, message: &eraftpb::Message) -> Result<(), Malformed> {
    let malformed = |what| Err(Malformed::Message(what));
    let raft = &node.raft;
    if message.to != raft.id {
        return malformed("it is for another member");
    }
    if message.from == 0 || message.from == raft.id {
        return malformed("it is from nobody else");
    }
    if message.term == 0 {
        // Raft takes it for its own.
        return match message.get_msg_type() {
            MessageType::MsgReadIndex => check_read_index(message),
            _ => malformed("it has no term"),
        };
    }
    match message.get_msg_type() {
        MessageType::MsgAppend => check_append(raft, message),
        MessageType::MsgHeartbeat => {
            let last_index = raft.raft_log.last_index();
            if message.term >= raft.term && message.commit > last_index {
                let (from, commit) = (message.from, message.commit);
                return Err(Malformed::LogLost { from, commit, last_index });
            }
            Ok(())
        }
        MessageType::MsgAppendResponse => {
            if !message.reject && message.index > raft.raft_log.last_index() {
                return malformed("it acknowledges entries that were never sent");
            }
            Ok(())
        }
        MessageType::MsgSnapshot => {
            let metadata = message.get_snapshot().get_metadata();
            if metadata.index == 0 || metadata.term == 0 {
                return malformed("its snapshot is of nothing");
            }
            if metadata.get_conf_state().voters.is_empty() {
                return malformed("its snapshot is of no cluster");
            }
            Ok(())
        }
        MessageType::MsgReadIndex => check_read_index(message),
        MessageType::MsgReadIndexResp
        | MessageType::MsgHeartbeatResponse
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgTimeoutNow => Ok(()),
        // Commands are forwarded otherwise, where they are answered; the rest never leaves
        // its node.
        _ => malformed("members do not send this kind"),
    }
}

fn check_read_index(message: &eraftpb::Message) -> Result<(), Malformed> {
    match message.entries.len() {
        1 => Ok(()),
        _ => Err(Malformed::Message("a read index needs its context")),
    }
}

fn check_append(raft: &raft::Raft<LogCache>, message: &eraftpb::Message) -> Result<(), Malformed> {
    let (mut index, mut term) = (message.index, message.log_term);
    for entry in &message.entries {
        if Some(entry.index) != index.checked_add(1) {
            return Err(Malformed::Message("its entries leave a gap"));
        }
        if entry.term < term || entry.term > message.term {
            return Err(Malformed::Message("the terms of its entries go back"));
        }
        if entry.get_entry_type() == EntryType::EntryConfChange {
            return Err(Malformed::Message("it changes the members in a way of old"));
        }
        (index, term) = (entry.index, entry.term);
    }
    if message.term < raft.term {
        return Ok(());
    }
    // What is committed here and is in the message must be the same in both.
    let committed = raft.raft_log.committed;
    let first = raft.raft_log.store.first_index().unwrap_or(u64::MAX);
    for entry in &message.entries {
        if entry.index > committed {
            break;
        }
        let known = entry.index + 1 >= first;
        if known && raft.raft_log.term(entry.index).is_ok_and(|term| term != entry.term) {
            return Err(Malformed::Diverged { from: message.from, index: entry.index });
        }
    }
    Ok(())
}
