//! Consensus: the only room that names the raft crate.
//!
//! [`Node`] wraps raft-rs as a pure stepper. Inputs are method calls (a tick, a
//! proposal, "that write is on disk", "that entry is applied"); what they lead to
//! comes out of [`Node::effects`] as values that the caller carries out:
//!
//! ```text
//!   tick / step / propose / read_index / persisted / change_applied / applied / offer_snapshot
//!                        │
//!                     ┌──▼───┐  effects()   role      → published
//!                     │ Node │ ──────────▶  messages  → other members
//!                     └──────┘              wanted    → an image is made, then offer_snapshot(to)
//!                                           install   → checkpoint thread, then persisted(number)
//!                                           append    → log thread, then persisted(number)
//!                                           committed → apply thread, then applied(index)
//!                                           reads     → whoever waits for that context
//! ```
//!
//! Invariants:
//! * `Node` has no thread, clock, socket, file or random number. A tick is whatever the
//!   caller says it is (`--heartbeat-interval`), and the same calls lead to the same effects.
//! * The effects of one call are carried out in order. Appends overlap: a second
//!   one may be produced while the first is still being fsynced. A leader's messages do not
//!   wait for its own disk; what says that something is on this disk, or promises a vote,
//!   is kept back until it is ([`Node::persisted`]).
//! * An entry is committed only after a majority has it on disk, also in a cluster of one.
//! * Entries that are not yet applied, and the last ones that are, stay in [`LogCache`], so
//!   raft never reads the disk. A member that needs older ones is sent a snapshot.
//! * Raft's configuration is that of the state machine's members. A committed change takes
//!   effect when the state machine has judged it ([`Node::change_applied`]); there is one
//!   change at a time, of one member, so that no configuration is ever joint. A leader that
//!   is removed leads no more from then on.

mod cache;
mod change;
mod drain;
mod message;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{self, ConfChangeV2, MessageType};
use raft::{Config as RaftConfig, ProgressState, RawNode, SnapshotStatus, StateRole};

use crate::log::{Entry, HardState, Mark};
pub use cache::LogCache;
pub use change::{Change, change_entry, is_change};
pub use message::{Kind, Malformed, Outgoing};

/// One message between members carries at most this many bytes of entries; etcd's value.
const MAX_MESSAGE_BYTES: u64 = 1024 * 1024;
/// Messages under way to one member; etcd's value.
const MAX_MESSAGES_IN_FLIGHT: usize = 512;
/// Entries proposed and not yet committed, in bytes. The engine admits less.
const MAX_UNCOMMITTED_BYTES: u64 = 256 * 1024 * 1024;
/// Committed entries handed out at once, in bytes: bounds one step of the apply thread.
const MAX_COMMITTED_BYTES_PER_READY: u64 = 4 * 1024 * 1024;
/// A member that knows its leader to be gone campaigns after this part of an election
/// timeout, or up to twice that.
const HASTE: usize = 5;

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
    /// Ticks for which a snapshot whose transfer was interrupted may go on: so long the log
    /// behind it is kept.
    pub resume_ticks: u64,
    /// `--pre-vote`.
    pub pre_vote: bool,
    /// Decides how long this member waits before it campaigns, within one and two election
    /// timeouts. Differs from member to member.
    pub seed: u64,
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
    pub context: [u8; 24],
    /// Apply at least up to here before reading.
    pub index: u64,
}

/// The state as of an entry takes the place of the log up to there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Install {
    /// Up to which entry.
    pub mark: Mark,
    /// What to hand to [`Node::persisted`] once the image is in force and the log begins
    /// behind it. Until then nothing else comes out of the node but messages.
    pub number: u64,
    /// The newest term, vote and commit; durable with it.
    pub hard_state: HardState,
}

/// What the caller has to carry out, in this order.
#[derive(Debug, Default)]
pub struct Effects {
    /// The node's part, when it changed. Published before anything else.
    pub role: Option<Role>,
    /// Messages for others, in order.
    pub messages: Vec<Outgoing>,
    /// Members that need a snapshot: see [`Node::offer_snapshot`].
    pub snapshots_wanted: Vec<u64>,
    /// An image that was received, and stepped, is to be put in force.
    pub install: Option<Install>,
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
    /// Another change of the configuration is under way.
    Busy,
}

/// How far a member is, as its leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The member.
    pub id: u64,
    /// The newest entry that it is known to have on disk.
    pub matched: u64,
    /// Whether it was heard of within the last election timeout.
    pub is_active: bool,
}

/// One raft node. See the module documentation.
pub struct Node {
    raw: RawNode<LogCache>,
    role: Role,
    /// Numbers of the writes that are handed out and not yet on disk are at most
    /// this; 0 when there is none.
    unpersisted: u64,
    /// The newest of them that has another term or vote than the one on disk; 0: none.
    promised: u64,
    catch_up_entries: u64,
    /// Ticks so far.
    ticks: u64,
    /// As in [`Start`].
    resume_ticks: u64,
    /// Members that were sent a snapshot, until they have the log behind it.
    kept_for: BTreeMap<u64, KeptFor>,
    /// Members that were probed once more since the last tick.
    probed_again: BTreeSet<u64>,
    /// The hard state changed since the last write.
    hard_state_is_new: bool,
    /// Messages that say what is on disk, with the number of the write that has to be first.
    held: VecDeque<(u64, Vec<Outgoing>)>,
    /// Messages whose time has come.
    released: Vec<Outgoing>,
    /// The snapshot that is being put in force.
    installing: Option<u64>,
    /// Committed changes that the state machine has yet to judge, by index.
    changes: BTreeMap<u64, ConfChangeV2>,
    patience: Patience,
    /// Mistakes for the tests to find.
    #[cfg(test)]
    pub(crate) planted: Planted,
}

/// Mistakes that the simulator has to find.
#[cfg(test)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Planted {
    /// Votes and acknowledgements leave before what they promise is on disk.
    pub(crate) sends_before_fsync: bool,
    /// Who is to listen votes.
    pub(crate) learners_vote: bool,
    /// A change that the state machine has refused is carried out.
    pub(crate) ignores_refusals: bool,
}

#[cfg(test)]
impl Planted {
    fn in_place_of(self, change: Change) -> Change {
        match change {
            Change::Listen(id) if self.learners_vote => Change::Vote(id),
            change => change,
        }
    }
}

/// For how long the log behind a snapshot is kept that is not under way any more.
#[derive(Debug, Clone, Copy)]
struct KeptFor {
    /// The member needs the log behind this index.
    behind: u64,
    /// Whether the snapshot is in force there. If not, its transfer was interrupted, and may go
    /// on.
    is_in_force: bool,
    /// It is kept up to this tick.
    until: u64,
}

/// How long a node waits for a leader before it campaigns. raft-rs draws a random number
/// each time; here the numbers follow from a seed.
#[derive(Debug)]
struct Patience {
    seed: u64,
    /// Campaigns so far.
    round: u64,
    election_ticks: usize,
}

impl Patience {
    /// Ticks to wait in this term.
    fn ticks(&self, term: u64) -> usize {
        spread(self.election_ticks, self.random(term))
    }

    /// Ticks to wait when the leader is known to be gone.
    fn hasty_ticks(&self, term: u64) -> usize {
        spread((self.election_ticks / HASTE).max(1), self.random(term))
    }

    fn random(&self, term: u64) -> u64 {
        mix(self.seed ^ mix(term ^ mix(self.round)))
    }
}

/// A number from `from` to before twice that.
fn spread(from: usize, random: u64) -> usize {
    from + usize::try_from(random % from.max(1) as u64).unwrap_or(0)
}

/// Spreads the bits of a number over all of it (splitmix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Node {
    /// A node as it was when it stopped.
    ///
    /// # Errors
    /// When the recovered parts contradict each other.
    pub fn new(start: Start) -> Result<Node, RaftError> {
        let Start {
            id, election_ticks, pre_vote, seed, hard_state, applied, configuration, ..
        } = start;
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
        let mut node = Node {
            raw,
            role: Role::default(),
            unpersisted: 0,
            promised: 0,
            catch_up_entries: start.catch_up_entries,
            ticks: 0,
            resume_ticks: start.resume_ticks,
            kept_for: BTreeMap::new(),
            probed_again: BTreeSet::new(),
            hard_state_is_new: false,
            held: VecDeque::new(),
            released: Vec::new(),
            installing: None,
            changes: BTreeMap::new(),
            patience: Patience { seed: mix(seed ^ id), round: 0, election_ticks },
            #[cfg(test)]
            planted: Planted::default(),
        };
        node.be_patient();
        Ok(node)
    }

    /// Time went on by one heartbeat interval.
    ///
    /// A node that may become leader must have nothing unpersisted when it does (raft-rs
    /// asserts it), so its election clock stands still meanwhile.
    pub fn tick(&mut self) {
        let leads = self.raw.raft.state == StateRole::Leader;
        self.ticks += 1;
        self.probed_again.clear();
        if !leads {
            self.kept_for.clear();
        }
        if !leads && self.unpersisted != 0 {
            return;
        }
        self.raw.tick();
        if !leads && self.raw.raft.election_elapsed == 0 {
            self.patience.round += 1;
        }
        self.be_patient();
    }

    /// Sees a message of another member.
    ///
    /// # Errors
    /// [`Malformed`]: raft has not seen it. Most are to be passed over, see
    /// [`Malformed::is_fatal`].
    pub fn step(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        let message = message::decode(bytes)?;
        if message.get_msg_type() == MessageType::MsgSnapshot {
            return Err(Malformed::Message("it is of a snapshot, and comes without the image"));
        }
        self.see(message)
    }

    /// Sees the message of a snapshot whose image is there. `false`: it has not, because
    /// another is being put in force, and raft could not be told what became of both.
    ///
    /// # Errors
    /// As [`Node::step`].
    pub fn step_snapshot(&mut self, bytes: &[u8]) -> Result<bool, Malformed> {
        if self.installing.is_some() {
            return Ok(false);
        }
        let message = message::decode(bytes)?;
        if message.get_msg_type() != MessageType::MsgSnapshot {
            return Err(Malformed::Message("an image comes with it, and it is of no snapshot"));
        }
        self.see(message).map(|()| true)
    }

    fn see(&mut self, message: eraftpb::Message) -> Result<(), Malformed> {
        message::check(&self.raw, &message)?;
        let leads = self.raw.raft.state == StateRole::Leader;
        if message.get_msg_type() == MessageType::MsgReadIndex && !leads {
            // Raft would send it on, perhaps in a circle.
            return Ok(());
        }
        if message.get_msg_type() == MessageType::MsgRequestVote
            && message.term < self.raw.raft.term
        {
            self.raw.raft.msgs.push(refusal(&self.raw.raft, &message));
            return Ok(());
        }
        let (from, kind) = (message.from, message.get_msg_type());
        let was_sent = self.snapshot_under_way(from);
        let is_probed_already = self.is_probed(from);
        let said_before = self.raw.raft.msgs.len();
        // What raft refuses is of a member that it does not know (yet, or any more).
        let _ = self.raw.step(message);
        if kind == MessageType::MsgHeartbeatResponse && is_probed_already {
            self.shorten_probe(from, said_before);
        }
        let has = match self.kept_for.get(&from) {
            Some(kept) if kept.is_in_force => Some(kept.behind),
            // It may say that it has the snapshot before whoever sent that hears it.
            _ => was_sent.filter(|_| self.snapshot_under_way(from).is_none()),
        };
        if let Some(behind) = has {
            self.keep_log_for(from, behind, true);
        }
        self.be_patient();
        Ok(())
    }

    /// Whether a member was sent entries to find out how far it is, and has not answered.
    fn is_probed(&self, id: u64) -> bool {
        let progress = self.raw.raft.prs().get(id);
        progress.is_some_and(|progress| progress.state == ProgressState::Probe && progress.paused)
    }

    /// With each answer to a heartbeat raft-rs, as etcd, takes a probe for lost, and sends it
    /// again with as many entries as a message holds. A member that was deaf for a while
    /// answers many heartbeats at once. One entry in each heartbeat interval does it; with none,
    /// its acknowledgement would be taken for an old one.
    fn shorten_probe(&mut self, to: u64, said_before: usize) {
        let is_first = self.probed_again.insert(to);
        let messages = &mut self.raw.raft.msgs;
        for mut message in messages.split_off(said_before.min(messages.len())) {
            let is_probe = message.to == to && message.get_msg_type() == MessageType::MsgAppend;
            if is_probe {
                message.entries.truncate(1);
            }
            if is_first || !is_probe {
                messages.push(message);
            }
        }
    }

    /// The connection to a member broke: it may be gone. If that is the leader, this member
    /// campaigns soon, without waiting for the whole election timeout. Members that still
    /// hear the leader refuse, and with `pre_vote` nothing comes of it.
    pub fn lost_sight_of(&mut self, id: u64) {
        self.raw.report_unreachable(id);
        let raft = &mut self.raw.raft;
        if raft.state == StateRole::Follower && raft.leader_id == id && raft.promotable() {
            let (term, vote) = (raft.term, raft.vote);
            raft.become_follower(term, 0);
            debug_assert_eq!(raft.vote, vote, "within a term a vote stays");
            self.be_patient();
            let haste = self.patience.hasty_ticks(term);
            let raft = &mut self.raw.raft;
            raft.election_elapsed = raft.randomized_election_timeout().saturating_sub(haste);
        }
    }

    /// Has raft-rs wait as long as the seed says, whatever it drew.
    fn be_patient(&mut self) {
        let ticks = self.patience.ticks(self.raw.raft.term);
        self.raw.raft.set_randomized_election_timeout(ticks);
    }

    /// Stands for election at once instead of waiting for the election timeout.
    /// Used by the only voter of a cluster when it starts.
    ///
    /// # Errors
    /// When raft refuses, for example because nothing is known of this node.
    pub fn campaign(&mut self) -> Result<(), RaftError> {
        self.raw.campaign()?;
        self.be_patient();
        Ok(())
    }

    /// Whether this node is the cluster's only voter.
    pub fn is_only_voter(&self) -> bool {
        let voters = self.raw.raft.prs().conf().voters().ids();
        let mut ids = voters.iter();
        ids.next() == Some(self.raw.raft.id) && ids.next().is_none()
    }

    /// Whether nobody else belongs to the cluster: no learner either, who would hear what is
    /// committed.
    pub fn is_only_member(&self) -> bool {
        self.is_only_voter() && self.raw.raft.prs().iter().count() == 1
    }

    /// Hands leadership to another voter, as soon as that one has the whole log. Proposals
    /// are refused meanwhile; given up after an election timeout.
    pub fn transfer_leader(&mut self, to: u64) {
        self.raw.transfer_leader(to);
    }

    /// Hands leadership to the voter that could take over soonest: the one heard of lately
    /// that has most of the log. `false` when this node does not lead or there is none.
    pub fn resign(&mut self) -> bool {
        let Some(successor) = self.successor() else { return false };
        self.transfer_leader(successor);
        true
    }

    fn successor(&self) -> Option<u64> {
        let voters = self.raw.raft.prs().conf().voters();
        let others = self.progress().into_iter().filter(|progress| {
            progress.is_active && progress.id != self.raw.raft.id && voters.contains(progress.id)
        });
        others.max_by_key(|progress| (progress.matched, progress.id)).map(|progress| progress.id)
    }

    /// How far each member is; empty unless this node leads.
    pub fn progress(&self) -> Vec<Progress> {
        if self.raw.raft.state != StateRole::Leader {
            return Vec::new();
        }
        let mut members: Vec<Progress> = self
            .raw
            .raft
            .prs()
            .iter()
            .map(|(id, progress)| Progress {
                id: *id,
                matched: progress.matched,
                is_active: progress.recent_active || *id == self.raw.raft.id,
            })
            .collect();
        members.sort_unstable_by_key(|progress| progress.id);
        members
    }

    /// Appends a command to the log, as leader.
    ///
    /// # Errors
    /// [`Refused`]: it is not in the log and never will be.
    pub fn propose(&mut self, command: Bytes) -> Result<(), Refused> {
        self.may_propose()?;
        // Bytes that nobody else holds become a vector without a copy.
        self.raw.propose(Vec::new(), command.into()).map_err(|_| Refused::Full)
    }

    /// Appends a change of the configuration to the log, as leader, with the command that
    /// changes the record of members.
    ///
    /// # Errors
    /// [`Refused`]: it is not in the log and never will be.
    pub fn propose_change(&mut self, change: Change, command: Bytes) -> Result<(), Refused> {
        self.may_propose()?;
        // raft-rs would take it and make it an empty entry.
        if self.raw.raft.has_pending_conf() {
            return Err(Refused::Busy);
        }
        // It hands over first: to step down when that is applied would cost an election.
        if change == Change::Remove(self.raw.raft.id) && self.resign() {
            return Err(Refused::NotLeader);
        }
        #[cfg(test)]
        let change = self.planted.in_place_of(change);
        let change = change.to_raft();
        self.raw.propose_conf_change(command.into(), change).map_err(|_| Refused::Full)
    }

    fn may_propose(&self) -> Result<(), Refused> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.lead_transferee.is_some() {
            return Err(Refused::NotLeader);
        }
        Ok(())
    }

    /// Asks for an index that a linearizable read has to wait for. `context` must
    /// never be used twice, by any member. Answered by [`Effects::reads`], or not at all:
    /// then the caller asks again with a new context. `false`: dropped at once.
    pub fn read_index(&mut self, context: [u8; 24]) -> bool {
        if self.raw.raft.state != StateRole::Leader {
            let has_leader = self.raw.raft.leader_id != 0;
            if has_leader {
                self.raw.read_index(context.to_vec());
            }
            return has_leader;
        }
        let before = self.raw.raft.pending_read_count() + self.raw.raft.ready_read_count();
        self.raw.read_index(context.to_vec());
        self.raw.raft.pending_read_count() + self.raw.raft.ready_read_count() > before
    }

    /// The write of this number, and all before it, are on disk.
    pub fn persisted(&mut self, number: u64) {
        if self.unpersisted <= number {
            self.unpersisted = 0;
        }
        if self.promised <= number {
            self.promised = 0;
        }
        if self.installing.is_some_and(|installing| installing <= number) {
            self.installing = None;
        }
        self.raw.on_persist_ready(number);
        while self.held.front().is_some_and(|(held, _)| *held <= number) {
            self.released.extend(self.held.pop_front().into_iter().flat_map(|(_, held)| held));
        }
    }

    /// An image of the state as of `mark` can be sent to a member; `configuration` is that
    /// as of `mark`. Raft sends it when it next finds that the member needs one.
    pub fn offer_snapshot(&mut self, to: u64, mark: Mark, configuration: &Configuration) {
        self.raw.mut_store().offer_snapshot(to, mark, configuration);
    }

    /// What became of a snapshot that was sent: whether it is in force over there. Until it
    /// is told, raft sends that member nothing else; from then on the offer does not hold. The
    /// log behind it is kept for a while, for a member that has it to catch up with, or for the
    /// rest of it to be sent.
    pub fn report_snapshot(&mut self, to: u64, is_in_force: bool) {
        let status = if is_in_force { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raw.mut_store().withdraw_offer(to);
        // If it is not under way, the member has acknowledged it, or raft begins anew with all.
        if let Some(index) = self.snapshot_under_way(to) {
            self.keep_log_for(to, index, is_in_force);
        }
        self.raw.report_snapshot(to, status);
    }

    /// Up to which entry the snapshot goes that a member is being sent.
    fn snapshot_under_way(&self, to: u64) -> Option<u64> {
        under_way(self.raw.raft.prs().get(to)?)
    }

    fn keep_log_for(&mut self, id: u64, behind: u64, is_in_force: bool) {
        let patience =
            if is_in_force { self.patience.election_ticks as u64 } else { self.resume_ticks };
        let until = self.ticks + patience;
        self.kept_for.insert(id, KeptFor { behind, is_in_force, until });
    }

    /// The state machine has applied, or refused, the change of the configuration at
    /// `index`. To be told before [`Node::applied`] of that index.
    ///
    /// # Errors
    /// Raft refuses what the state machine has accepted: they have come apart.
    pub fn change_applied(&mut self, index: u64, is_accepted: bool) -> Result<(), RaftError> {
        let Some(change) = self.changes.remove(&index) else { return Ok(()) };
        #[cfg(test)]
        let is_accepted = is_accepted || self.planted.ignores_refusals;
        if is_accepted {
            let configuration = self.raw.apply_conf_change(&change)?;
            self.raw.mut_store().set_configuration(configuration);
            self.step_down_if_removed();
        }
        Ok(())
    }

    /// raft-rs lets a leader that was removed lead on. It panics then when it next looks for
    /// its own progress, and where one voter is left it answers reads at once, as that voter
    /// might, whatever another leader has committed meanwhile.
    fn step_down_if_removed(&mut self) {
        let raft = &mut self.raw.raft;
        let votes = raft.prs().conf().voters().contains(raft.id);
        if raft.state == StateRole::Leader && !votes {
            raft.become_follower(raft.term, 0);
            self.be_patient();
        }
    }

    /// Everything up to `index` is applied, of which the last entries are kept, and those
    /// that a member will need which is being sent a snapshot, has just got one, or may be sent
    /// the rest of one.
    pub fn applied(&mut self, index: u64) {
        if self.installing.is_some() {
            // Raft would not believe it before the image is in force, and what the image
            // holds is told then.
            return;
        }
        self.raw.advance_apply_to(index);
        let keep = index.saturating_sub(self.catch_up_entries);
        let forget = self.not_needed_of(keep);
        self.raw.mut_store().forget_applied(index, forget);
    }

    /// Up to which of the entries up to `last` nobody needs them because of a snapshot.
    fn not_needed_of(&mut self, last: u64) -> u64 {
        let members = self.raw.raft.prs();
        self.kept_for.retain(|id, kept| {
            let Some(progress) = members.get(*id) else { return false };
            kept.behind = kept.behind.max(goes_on_behind(progress));
            let has_it = progress.state == ProgressState::Replicate && progress.matched >= last;
            !has_it && self.ticks <= kept.until
        });
        let needed = members.iter().filter_map(|(_, progress)| under_way(progress));
        needed.chain(self.kept_for.values().map(|kept| kept.behind)).fold(last, u64::min)
    }

    /// The log held here begins behind this index: a snapshot has to reach at least there.
    pub fn log_start(&self) -> u64 {
        self.raw.store().start_index()
    }

    /// A member cannot be reached: raft probes it rather than send it one message after the
    /// other.
    pub fn report_unreachable(&mut self, id: u64) {
        self.raw.report_unreachable(id);
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// The newest committed index.
    pub fn committed(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// What there is to do now; `None` when there is nothing.
    ///
    /// # Errors
    /// A committed change of membership that is none.
    pub fn effects(&mut self) -> Result<Option<Effects>, RaftError> {
        let released = std::mem::take(&mut self.released);
        if self.installing.is_some() || !self.raw.has_ready() {
            let snapshots_wanted = self.raw.mut_store().take_wanted();
            let is_nothing = released.is_empty() && snapshots_wanted.is_empty();
            let effects = Effects { messages: released, snapshots_wanted, ..Effects::default() };
            return Ok((!is_nothing).then_some(effects));
        }
        let mut ready = self.raw.ready();
        let number = ready.number();
        let must_sync = ready.must_sync();
        let role = self.role_change();
        let entries: Vec<Entry> = ready.take_entries().into_iter().map(cache::from_raft).collect();
        let hard_state =
            ready.hs().map(|hs| HardState { term: hs.term, vote: hs.vote, commit: hs.commit });
        let reads = ready.take_read_states().iter().filter_map(read_ready).collect();
        let committed: Vec<Entry> =
            ready.take_committed_entries().into_iter().map(cache::from_raft).collect();
        let mut messages = released;
        let now = ready.take_messages();
        let later = ready.take_persisted_messages();
        let snapshot = (!ready.snapshot().is_empty()).then(|| ready.snapshot().get_metadata());

        let store = self.raw.store();
        let promises = hard_state.is_some_and(|new| {
            let durable = store.hard_state();
            (new.term, new.vote) != (durable.term, durable.vote)
        });
        let mark = snapshot.map(|of| Mark { index: of.index, term: of.term });
        let configuration = snapshot.map(|of| of.get_conf_state().clone());
        let store = self.raw.mut_store();
        if let (Some(mark), Some(configuration)) = (mark, configuration) {
            store.reset(mark, configuration);
            // The snapshot's configuration has them in it. Entries that were committed before
            // may be applied yet, and must not change it once more.
            self.changes.clear();
        }
        store.append(&entries);
        if let Some(hard_state) = hard_state {
            store.set_hard_state(hard_state);
            self.hard_state_is_new = true;
        }
        let hard_state = store.hard_state();
        let snapshots_wanted = store.take_wanted();
        self.raw.advance_append_async(ready);

        let install = mark.map(|mark| Install { mark, number, hard_state });
        // A commit index alone is not worth a write: on start it is raised to what
        // is applied, and the next entries carry it. But who has to be asked after a crash is
        // said by the changes that are known to be committed: the last of two may be alone.
        let writes = must_sync || (self.hard_state_is_new && committed.iter().any(is_change));
        let append = (writes && install.is_none()).then(|| {
            let hard_state = self.hard_state_is_new.then_some(hard_state);
            Append { number, entries, hard_state }
        });
        if writes {
            self.unpersisted = number;
            self.hard_state_is_new = false;
            self.installing = install.is_some().then_some(number);
        } else if self.unpersisted == 0 {
            // Nothing of this effect needs the disk, so raft may forget its record.
            self.raw.on_persist_ready(number);
        }
        if promises {
            self.promised = number;
        }
        // A leader's messages need not wait for its own disk, unless they are of a term
        // that it might have forgotten after a crash: a lone voter leads at once. That goes for
        // what it says later, too, as long as its term is not on disk: it would lead in the same
        // term once more, and a learner would have two entries of one index and term.
        let encode = |message: &eraftpb::Message| message::encode(message);
        let now = now.iter().filter_map(encode);
        let later = later.iter().filter_map(encode);
        if self.promised != 0 && !self.forgets_to_hold() {
            self.hold(now.chain(later).collect());
        } else {
            messages.extend(now);
            if self.unpersisted == 0 || self.forgets_to_hold() {
                messages.extend(later);
            } else {
                self.hold(later.collect());
            }
        }
        for entry in &committed {
            self.note_change(entry)?;
        }
        Ok(Some(Effects { role, messages, snapshots_wanted, install, append, committed, reads }))
    }

    /// Keeps messages back until the last write is on disk.
    fn hold(&mut self, messages: Vec<Outgoing>) {
        if !messages.is_empty() {
            self.held.push_back((self.unpersisted, messages));
        }
    }

    #[cfg(test)]
    fn forgets_to_hold(&self) -> bool {
        self.planted.sends_before_fsync
    }

    #[cfg(not(test))]
    fn forgets_to_hold(&self) -> bool {
        false
    }

    /// Remembers a committed change of the configuration until the state machine has judged
    /// it. The type is looked at and not the data, which may be empty.
    fn note_change(&mut self, entry: &Entry) -> Result<(), RaftError> {
        if is_change(entry) {
            let change = ConfChangeV2::parse_from_bytes(&entry.data).map_err(|error| {
                RaftError(format!("entry {} holds no change of membership: {error}", entry.index))
            })?;
            self.changes.insert(entry.index, change);
        }
        Ok(())
    }

    /// The configuration, and as of which applied entry; `None` while a snapshot changes both.
    #[cfg(test)]
    pub(crate) fn configuration(&self) -> Option<(u64, Configuration)> {
        let raft = &self.raw.raft;
        let of = raft.prs().conf().to_conf_state();
        let mut configuration = Configuration { voters: of.voters, learners: of.learners };
        configuration.voters.sort_unstable();
        configuration.learners.sort_unstable();
        self.installing.is_none().then_some((raft.raft_log.applied, configuration))
    }

    /// What a failed simulation tells of the node.
    #[cfg(test)]
    pub(crate) fn describe(&self) -> String {
        let raft = &self.raw.raft;
        let members: Vec<String> =
            raft.prs().iter().map(|(id, progress)| format!("{id:x}: {progress:?}")).collect();
        format!(
            "committed {}, applied {}, persisted {}, last {}, log from {}, unpersisted {}, \
             installing {:?}, held {}, voters and listeners {members:?}",
            raft.raft_log.committed,
            raft.raft_log.applied,
            raft.raft_log.persisted,
            raft.raft_log.last_index(),
            self.log_start(),
            self.unpersisted,
            self.installing,
            self.held.len(),
        )
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

/// The answer to who asks for votes, not before votes, in a term that has passed: the raft paper, 5.1.
/// raft-rs, as etcd, says nothing. Then, without pre-vote or past it, a voter whose term is behind, and who
/// alone could win, never catches up: each campaign of the other, who cannot, raises its term again.
fn refusal(raft: &raft::Raft<LogCache>, of: &eraftpb::Message) -> eraftpb::Message {
    let mut refusal = eraftpb::Message::default();
    refusal.set_msg_type(MessageType::MsgRequestVoteResponse);
    refusal.from = raft.id;
    refusal.to = of.from;
    refusal.term = raft.term;
    refusal.reject = true;
    refusal
}

/// Up to which entry the snapshot goes that is on its way.
fn under_way(progress: &raft::Progress) -> Option<u64> {
    (progress.state == ProgressState::Snapshot).then_some(progress.pending_snapshot)
}

/// The entry behind which a member will be sent the log.
fn goes_on_behind(progress: &raft::Progress) -> u64 {
    match progress.state {
        ProgressState::Snapshot => progress.pending_snapshot,
        ProgressState::Probe => progress.next_idx.saturating_sub(1),
        ProgressState::Replicate => progress.matched,
    }
}

fn read_ready(state: &raft::ReadState) -> Option<ReadReady> {
    let context = state.request_ctx.as_slice().try_into().ok()?;
    Some(ReadReady { context, index: state.index })
}

/// The command for the state machine that an entry carries. A leader's first entry has none.
pub fn command(entry: &Entry) -> Option<&Bytes> {
    let command = if is_change(entry) { &entry.context } else { &entry.data };
    (!command.is_empty()).then_some(command)
}

#[cfg(test)]
mod tests;
