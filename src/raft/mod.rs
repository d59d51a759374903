//! Consensus: the only room that names the raft crate.
//!
//! [`Node`] wraps raft-rs as a pure stepper. Inputs are method calls (a tick, a
//! proposal, "that write is on disk", "that entry is applied"); what they lead to
//! comes out of [`Node::effects`] as values that the caller carries out:
//!
//! ```text
//!   tick / propose / read_index / persisted / applied
//!                        │
//!                     ┌──▼───┐  effects()   append   → log thread, then persisted(number)
//!                     │ Node │ ──────────▶  committed → apply thread, then applied(index)
//!                     └──────┘              reads     → whoever waits for that context
//!                                           role      → published
//! ```
//!
//! Invariants:
//! * `Node` has no thread, clock, socket or file. A tick is whatever the caller
//!   says it is (`--heartbeat-interval`).
//! * The effects of one call are carried out in order. Appends overlap: a second
//!   one may be produced while the first is still being fsynced.
//! * An entry is committed only after the caller said it is on disk here, also in
//!   a cluster of one ([`Node::persisted`]).
//! * Entries that are not yet applied stay in [`LogCache`], so raft never reads
//!   the disk.

mod cache;
mod change;
mod drain;

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, EntryType};
use raft::{Config as RaftConfig, RawNode, StateRole};

use crate::log::{Entry, HardState, Mark};
pub use cache::LogCache;
pub use change::{Change, change_entry, is_change};

/// One message between members carries at most this many bytes of entries; etcd's value.
const MAX_MESSAGE_BYTES: u64 = 1024 * 1024;
/// Messages under way to one member; etcd's value.
const MAX_MESSAGES_IN_FLIGHT: usize = 512;
/// Entries proposed and not yet committed, in bytes. The engine admits less.
const MAX_UNCOMMITTED_BYTES: u64 = 256 * 1024 * 1024;
/// Committed entries handed out at once, in bytes: bounds one step of the apply thread.
const MAX_COMMITTED_BYTES_PER_READY: u64 = 4 * 1024 * 1024;

/// Who votes and who only listens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Members whose votes and acknowledgements count.
    pub voters: Vec<u64>,
    /// Members that receive the log and do not vote.
    pub learners: Vec<u64>,
}

/// What a member knows of itself when it starts.
#[derive(Debug)]
pub struct Start {
    /// This member. Never 0.
    pub id: u64,
    /// Ticks without a leader before this member campaigns (`--election-timeout`
    /// divided by `--heartbeat-interval`).
    pub election_ticks: usize,
    /// `--snapshot-catchup-entries`: applied entries kept for a member that is behind.
    pub catch_up_entries: u64,
    /// `--pre-vote`.
    pub pre_vote: bool,
    /// The newest term, vote and commit on disk.
    pub hard_state: HardState,
    /// Everything up to here is in the checkpoint and no longer in the log.
    pub start: Mark,
    /// The log after `start`, without a gap.
    pub entries: Vec<Entry>,
    /// How far the recovered state has applied the log; at least `start.index`.
    pub applied: u64,
    /// The configuration as of `applied`.
    pub configuration: Configuration,
}

/// Why a node could not be made or went on no further.
#[derive(Debug, thiserror::Error)]
#[error("raft: {0}")]
pub struct RaftError(String);

impl From<raft::Error> for RaftError {
    fn from(error: raft::Error) -> RaftError {
        RaftError(error.to_string())
    }
}

/// The node's part in its cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Role {
    /// The leader this node knows of; 0 when none.
    pub leader: u64,
    /// Whether that leader is this node.
    pub is_leader: bool,
    /// The node's current term.
    pub term: u64,
}

/// A write for the log: durable as a whole, or not at all.
#[derive(Debug)]
pub struct Append {
    /// What to hand to [`Node::persisted`] once this and all earlier writes are on disk.
    pub number: u64,
    /// Entries without a gap. The first may replace an earlier suffix.
    pub entries: Vec<Entry>,
    /// The newest term, vote and commit, when they changed since the last write.
    pub hard_state: Option<HardState>,
}

/// A read that may go ahead once this index is applied.
#[derive(Debug, PartialEq, Eq)]
pub struct ReadReady {
    /// The context given to [`Node::read_index`].
    pub context: u64,
    /// Apply at least up to here before reading.
    pub index: u64,
}

/// What the caller has to carry out, in this order.
#[derive(Debug)]
pub struct Effects {
    /// The node's part, when it changed. Published before anything else.
    pub role: Option<Role>,
    /// A write for the log.
    pub append: Option<Append>,
    /// Entries to apply, following the last ones handed out.
    pub committed: Vec<Entry>,
    /// Reads that were confirmed.
    pub reads: Vec<ReadReady>,
}

/// Why a proposal was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// This node is not the leader, or leadership is being handed over.
    NotLeader,
    /// Too much is proposed and not yet committed.
    Full,
}

/// One raft node. See the module documentation.
pub struct Node {
    raw: RawNode<LogCache>,
    role: Role,
    /// Numbers of the writes that are handed out and not yet on disk are at most
    /// this; 0 when there is none.
    unpersisted: u64,
    catch_up_entries: u64,
    /// The hard state changed since the last write.
    hard_state_is_new: bool,
}

impl Node {
    /// A node as it was when it stopped.
    ///
    /// # Errors
    /// When the recovered parts contradict each other.
    pub fn new(start: Start) -> Result<Node, RaftError> {
        let Start { id, election_ticks, pre_vote, hard_state, applied, configuration, .. } = start;
        let commit = hard_state.commit.max(applied);
        let cache = LogCache::new(
            start.start,
            start.entries,
            HardState { commit, ..hard_state },
            &configuration,
        );
        let last = cache.last_index();
        if commit > last || applied < start.start.index {
            return Err(RaftError(format!(
                "the log holds entries {}..={last}, but {applied} are applied and {commit} committed: \
                 the log and the checkpoint are not of the same member or the log lost its end",
                start.start.index + 1,
            )));
        }
        let config = RaftConfig {
            id,
            election_tick: election_ticks,
            heartbeat_tick: 1,
            applied,
            max_size_per_msg: MAX_MESSAGE_BYTES,
            max_inflight_msgs: MAX_MESSAGES_IN_FLIGHT,
            check_quorum: true,
            pre_vote,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            max_committed_size_per_ready: MAX_COMMITTED_BYTES_PER_READY,
            ..RaftConfig::default()
        };
        config.validate()?;
        let raw = RawNode::new(&config, cache, &drain::logger())?;
        Ok(Node {
            raw,
            role: Role::default(),
            unpersisted: 0,
            catch_up_entries: start.catch_up_entries,
            hard_state_is_new: false,
        })
    }

    /// Time went on by one heartbeat interval.
    ///
    /// A lone voter that could campaign must have nothing unpersisted when it does
    /// (raft-rs asserts it), so its election clock stands still meanwhile.
    pub fn tick(&mut self) {
        if self.raw.raft.state != StateRole::Leader && self.unpersisted != 0 {
            return;
        }
        self.raw.tick();
    }

    /// Stands for election at once instead of waiting for the election timeout.
    /// Used by the only voter of a cluster when it starts.
    ///
    /// # Errors
    /// When raft refuses, for example because nothing is known of this node.
    pub fn campaign(&mut self) -> Result<(), RaftError> {
        Ok(self.raw.campaign()?)
    }

    /// Whether this node is the cluster's only voter.
    pub fn is_only_voter(&self) -> bool {
        let voters = self.raw.raft.prs().conf().voters().ids();
        let mut ids = voters.iter();
        ids.next() == Some(self.raw.raft.id) && ids.next().is_none()
    }

    /// Appends a command to the log, as leader.
    ///
    /// # Errors
    /// [`Refused`]: it is not in the log and never will be.
    pub fn propose(&mut self, data: Vec<u8>) -> Result<(), Refused> {
        if self.raw.raft.state != StateRole::Leader {
            return Err(Refused::NotLeader);
        }
        self.raw.propose(Vec::new(), data).map_err(|_| Refused::Full)
    }

    /// Asks for an index that a linearizable read has to wait for. `context` must
    /// never be used twice. Answered by [`Effects::reads`], or not at all: then the
    /// caller asks again with a new context. `false`: dropped at once.
    pub fn read_index(&mut self, context: u64) -> bool {
        let before = self.raw.raft.pending_read_count() + self.raw.raft.ready_read_count();
        self.raw.read_index(context.to_be_bytes().to_vec());
        self.raw.raft.pending_read_count() + self.raw.raft.ready_read_count() > before
    }

    /// The write of this number, and all before it, are on disk.
    pub fn persisted(&mut self, number: u64) {
        if self.unpersisted <= number {
            self.unpersisted = 0;
        }
        self.raw.on_persist_ready(number);
    }

    /// Everything up to `index` is applied, of which the last entries are kept.
    pub fn applied(&mut self, index: u64) {
        self.raw.advance_apply_to(index);
        let keep = self.catch_up_entries;
        self.raw.mut_store().forget_applied(index, keep);
    }

    /// The newest committed index.
    pub fn committed(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// What there is to do now; `None` when there is nothing.
    ///
    /// # Errors
    /// A committed change of membership that raft does not accept.
    pub fn effects(&mut self) -> Result<Option<Effects>, RaftError> {
        if !self.raw.has_ready() {
            return Ok(None);
        }
        let mut ready = self.raw.ready();
        let role = self.role_change();
        let entries: Vec<Entry> = ready.take_entries().into_iter().map(cache::from_raft).collect();
        let hard_state =
            ready.hs().map(|hs| HardState { term: hs.term, vote: hs.vote, commit: hs.commit });
        let reads = ready.take_read_states().iter().filter_map(read_ready).collect();
        let committed: Vec<Entry> =
            ready.take_committed_entries().into_iter().map(cache::from_raft).collect();

        let must_sync = ready.must_sync();
        let number = ready.number();
        let store = self.raw.mut_store();
        store.append(&entries);
        if let Some(hard_state) = hard_state {
            store.set_hard_state(hard_state);
            self.hard_state_is_new = true;
        }
        let hard_state = self.hard_state_is_new.then(|| store.hard_state());
        self.raw.advance_append_async(ready);

        // A commit index alone is not worth a write: on start it is raised to what
        // is applied, and the next entries carry it.
        let append = must_sync.then(|| Append { number, entries, hard_state });
        if append.is_some() {
            self.unpersisted = number;
            self.hard_state_is_new = false;
        } else if self.unpersisted == 0 {
            // Nothing of this effect needs the disk, so raft may forget its record.
            self.raw.on_persist_ready(number);
        }
        for entry in &committed {
            self.change_configuration(entry)?;
        }
        Ok(Some(Effects { role, append, committed, reads }))
    }

    /// Raft's own view of who votes changes when the entry is applied. The type is
    /// looked at before the data: the entry that leaves a joint configuration has
    /// none.
    fn change_configuration(&mut self, entry: &Entry) -> Result<(), RaftError> {
        let corrupt = |error: protobuf::ProtobufError| {
            RaftError(format!("entry {} holds no change of membership: {error}", entry.index))
        };
        let configuration = if entry.kind == EntryType::EntryConfChange as u8 {
            let change = ConfChange::parse_from_bytes(&entry.data).map_err(corrupt)?;
            self.raw.apply_conf_change(&change)?
        } else if entry.kind == EntryType::EntryConfChangeV2 as u8 {
            let change = ConfChangeV2::parse_from_bytes(&entry.data).map_err(corrupt)?;
            self.raw.apply_conf_change(&change)?
        } else {
            return Ok(());
        };
        self.raw.mut_store().set_configuration(configuration);
        Ok(())
    }

    fn role_change(&mut self) -> Option<Role> {
        let raft = &self.raw.raft;
        let role = Role {
            leader: raft.leader_id,
            is_leader: raft.state == StateRole::Leader,
            term: raft.term,
        };
        (role != self.role).then(|| {
            self.role = role;
            role
        })
    }
}

fn read_ready(state: &raft::ReadState) -> Option<ReadReady> {
    let context = u64::from_be_bytes(state.request_ctx.as_slice().try_into().ok()?);
    Some(ReadReady { context, index: state.index })
}

/// Whether the entry carries a command for the state machine. A leader's first
/// entry and a membership change that raft refused carry none.
pub fn is_command(entry: &Entry) -> bool {
    entry.kind == EntryType::EntryNormal as u8 && !entry.data.is_empty()
}

#[cfg(test)]
mod tests;
