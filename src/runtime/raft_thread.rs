//! The thread that owns the raft node.
//!
//! It takes what is in its mailbox, lets the node see all of it, and carries out
//! the effects: messages go to other members, appends to the log thread, committed
//! entries to the apply thread. It never waits for any of them, so ticks and elections
//! do not depend on the disk or the network.
//!
//! ```text
//!   engine ──Propose, ReadIndex──▶┐             ┌──▶ outbox ─▶ other members
//!   peers ───Message, Forwarded──▶│             │
//!   log ─────Persisted───────────▶├─ mailbox ─▶ raft ──▶ log thread ──Persisted──┐
//!   apply ───Applied─────────────▶│             │                                │
//!                                 │             └──▶ apply thread ─Applied───────┤
//!                                 └◀─────────────────────────────────────────────┘
//! ```
//!
//! Mailboxes are unbounded channels whose content is bounded elsewhere: proposals by
//! [`Waiters`], appends, entries and their reports by what was proposed, reads by the
//! requests that the listeners let in, messages by what their senders have under way.
//!
//! **A disk that hangs** does not stop the ticks, and a leader would go on leading with
//! nothing that it could commit alone. When its oldest write waits for an election timeout
//! it hands leadership over; when nobody takes it, it falls silent, and others elect.

pub(crate) mod reads;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use self::reads::Reads;
use super::apply_thread::ApplyTask;
use super::checkpoint_thread::{CheckpointTask, Install};
use super::fault::Fault;
use super::forwarder::refusal;
use super::log_thread::LogTask;
use super::published::Published;
use super::waiters::Waiters;
use crate::error::Error;
use crate::log::Mark;
use crate::metrics::Metrics;
use crate::net::Refusals;
use crate::net::snapshot::Arrived;
use crate::raft::{
    self, Change, Configuration, Effects, Kind, Malformed, Node, Outgoing, RaftError, Refused, Role,
};

/// A mailbox is emptied in turns of at most this many inputs, so that a flood of
/// proposals cannot keep effects and ticks waiting.
const INPUTS_PER_TURN: usize = 4096;
/// After a pause (a stopped process, a stalled machine) the node does not live
/// through every missed tick: it would depose a leader that is well.
const CATCH_UP_TICKS_MAX: u32 = 2;
/// A command to be appended to the log.
#[derive(Debug)]
pub struct Proposal {
    /// The encoded command.
    pub command: Bytes,
    /// What it changes in raft's configuration, if it does.
    pub change: Option<Change>,
    /// Its entry in the [`Waiters`] of the member that made it.
    pub sequence: u64,
}

/// What the raft thread is told.
#[derive(Debug)]
pub enum RaftInput {
    /// Append this command of this member, if it leads in `term`.
    Propose {
        /// The command.
        proposal: Proposal,
        /// In which term.
        term: u64,
    },
    /// Append this command of another member, if this one leads in `term`.
    Forwarded {
        /// The command.
        proposal: Proposal,
        /// In which term.
        term: u64,
        /// Told if it was not taken.
        refusals: Refusals,
    },
    /// What another member says.
    Message(Bytes),
    /// The image of a snapshot has arrived, with raft's message.
    Snapshot(Arrived),
    /// An image of the state is there for a member that needs one.
    SnapshotMade {
        /// Which member.
        to: u64,
        /// As of which entry.
        mark: Mark,
        /// Who belonged to the cluster then.
        configuration: Configuration,
    },
    /// A snapshot was sent, or was not.
    SnapshotSent {
        /// To which member.
        to: u64,
        /// Whether it is in force there.
        is_in_force: bool,
    },
    /// A member cannot be reached. `is_broken`: it could before.
    Unreachable {
        /// Which.
        id: u64,
        /// Whether a connection broke, rather than could not be made.
        is_broken: bool,
    },
    /// Find out which index a linearizable read must wait for. Not answered while
    /// there is no leader: the caller limits its patience.
    ReadIndex(oneshot::Sender<u64>),
    /// All writes up to this number are on disk.
    Persisted(u64),
    /// The change of the configuration at this index was applied, or refused.
    Changed {
        /// Where.
        index: u64,
        /// Whether it is in force.
        is_accepted: bool,
    },
    /// All entries up to this index are applied.
    Applied(u64),
    /// Hand leadership to this member.
    Transfer(u64),
    /// Hand leadership to whoever could take over soonest: this member is about to stop.
    Resign,
    /// Stop. What is in the mailbox behind it is dropped.
    Stop,
}

/// How the raft thread reaches others. Neither blocks.
pub trait Outbox: Send {
    /// Sends a message; `false` when it is dropped.
    fn send(&mut self, message: Outgoing) -> bool;

    /// Prepares a snapshot for a member, as of an entry that is not before `first_index`:
    /// [`RaftInput::SnapshotMade`] follows. Asked for again and again until then.
    fn make_snapshot(&mut self, to: u64, first_index: u64);
}

/// Everything the raft thread works with.
pub struct RaftParts {
    /// The node, freshly made.
    pub node: Node,
    /// What the thread is told.
    pub mailbox: Receiver<RaftInput>,
    /// Where messages go.
    pub outbox: Box<dyn Outbox>,
    /// Where appends go.
    pub log: Sender<LogTask>,
    /// Where committed entries go.
    pub apply: Sender<ApplyTask>,
    /// Where images are put in force.
    pub checkpoint: Sender<CheckpointTask>,
    /// What the thread tells everybody.
    pub published: Arc<Published>,
    /// Who is told when a proposal is refused.
    pub waiters: Arc<Waiters>,
    /// Leadership, in numbers.
    pub metrics: Arc<Metrics>,
    /// Where a fatal error goes.
    pub fault: Fault,
    /// One tick of raft's clock: `--heartbeat-interval`.
    pub tick: Duration,
    /// `--election-timeout`: a disk that hangs for longer costs leadership.
    pub election_timeout: Duration,
    /// This member's id.
    pub member: u64,
}

/// Tells the others, when it is dropped, that this thread has come to its end: also when
/// the raft crate panics, as it does where it finds that it contradicts itself. Else they
/// would wait for ever, and reads would go on as if this member still led.
struct End {
    log: Sender<LogTask>,
    apply: Sender<ApplyTask>,
    published: Arc<Published>,
    waiters: Arc<Waiters>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.published.set_stopped();
        let _ = self.log.send(LogTask::Stop);
        // Who asked and has no answer gets one from the apply thread when that has come to
        // its end, or here when it has already.
        if self.apply.send(ApplyTask::Stop).is_err() {
            self.waiters.fail_all(&Error::Stopped);
        }
    }
}

/// The raft thread, or what a simulator runs in its place, turn by turn.
pub struct RaftThread {
    parts: RaftParts,
    reads: Reads,
    next_tick: Instant,
    /// Writes that are on their way to the disk, with when they set out.
    unsynced: VecDeque<(u64, Instant)>,
    /// Whether leadership was offered because of a disk that hangs.
    resigns: bool,
    /// Whether nobody took it, so that the others are to hear nothing of this leader.
    is_silent: bool,
    /// The image whose message raft is looking at.
    arrived: Option<Arrived>,
}

/// Why the raft thread ends by itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RaftFailure {
    #[error(transparent)]
    Raft(#[from] RaftError),
    #[error(transparent)]
    Peer(#[from] Malformed),
}

/// Whether a thread goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    GoOn,
    Stop,
}

impl RaftThread {
    /// A thread that has yet to run; its clock begins at `now`.
    pub fn new(parts: RaftParts, now: Instant) -> RaftThread {
        let next_tick = now + parts.tick;
        let reads = Reads::new(parts.member, parts.waiters.boot(), parts.election_timeout);
        RaftThread {
            parts,
            reads,
            next_tick,
            unsynced: VecDeque::new(),
            resigns: false,
            is_silent: false,
            arrived: None,
        }
    }

    /// Runs until told to stop. The only voter stands for election at once.
    pub fn run(self) {
        // What is declared later is dropped earlier: first the thread with its mailbox, and
        // when nobody can ask anything any more, the others are told.
        let _end = End {
            log: self.parts.log.clone(),
            apply: self.parts.apply.clone(),
            published: Arc::clone(&self.parts.published),
            waiters: Arc::clone(&self.parts.waiters),
        };
        let mut thread = self;
        if let Err(error) = thread.run_until_stopped() {
            thread.parts.fault.raise("raft", error);
        }
    }

    fn run_until_stopped(&mut self) -> Result<(), RaftFailure> {
        self.begin(Instant::now())?;
        loop {
            let patience = self.next_tick.saturating_duration_since(Instant::now());
            let first = match self.parts.mailbox.recv_timeout(patience) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            if self.take_turn(first, Instant::now())? == Flow::Stop {
                return Ok(());
            }
        }
    }

    /// See [`Node::configuration`].
    #[cfg(test)]
    pub(crate) fn configuration(&self) -> Option<(u64, Configuration)> {
        self.parts.node.configuration()
    }

    /// What a failed simulation tells of the node.
    #[cfg(test)]
    pub(crate) fn describe(&self) -> String {
        self.parts.node.describe()
    }

    /// The first turn.
    pub(crate) fn begin(&mut self, now: Instant) -> Result<(), RaftFailure> {
        if self.parts.node.is_only_voter() {
            self.parts.node.campaign()?;
        }
        self.carry_out(now)
    }

    /// Takes what waits, lets the time pass up to `now`, and carries out what follows.
    pub(crate) fn take_turn(
        &mut self,
        first: Option<RaftInput>,
        now: Instant,
    ) -> Result<Flow, RaftFailure> {
        let mut next = first;
        for _ in 0..INPUTS_PER_TURN {
            let Some(input) = next.take().or_else(|| self.parts.mailbox.try_recv().ok()) else {
                break;
            };
            if let RaftInput::Stop = input {
                return Ok(Flow::Stop);
            }
            self.take(input, now)?;
        }
        self.pass_time(now);
        let RaftParts { node, published, .. } = &mut self.parts;
        if self.reads.ask(node, now, published.boot_clock()) {
            self.parts.metrics.server_slow_read_indexes_total.inc();
        }
        self.carry_out(now)?;
        Ok(Flow::GoOn)
    }

    fn pass_time(&mut self, now: Instant) {
        if self.next_tick > now {
            return;
        }
        let hangs_for = self
            .unsynced
            .front()
            .map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(*since));
        // Heartbeats leave with ticks. As in etcd, one that is a whole interval late counts.
        let leads =
            self.parts.published.role.borrow().is_leader && !self.parts.node.is_only_voter();
        if leads && now.saturating_duration_since(self.next_tick) > self.parts.tick {
            self.parts.metrics.server_heartbeat_send_failures_total.inc();
            tracing::warn!(
                late = ?now.saturating_duration_since(self.next_tick),
                "leader failed to send out heartbeat on time; took too long, leader is overloaded"
            );
        }
        let mut ticks = 0;
        while self.next_tick <= now && ticks < CATCH_UP_TICKS_MAX {
            if self.is_fit_to_lead(hangs_for) {
                self.parts.node.tick();
            }
            self.next_tick += self.parts.tick;
            ticks += 1;
        }
        if self.next_tick <= now {
            self.next_tick = now + self.parts.tick;
        }
        self.parts.published.set_progress(self.parts.node.progress());
    }

    /// Whether time may pass for a leader whose oldest write waits for so long.
    fn is_fit_to_lead(&mut self, hangs_for: Duration) -> bool {
        let RaftParts { node, election_timeout, published, .. } = &mut self.parts;
        let leads = published.role.borrow().is_leader && !node.is_only_voter();
        if !leads || hangs_for < *election_timeout {
            self.resigns = false;
            self.is_silent = false;
            return true;
        }
        if !self.resigns {
            self.resigns = true;
            tracing::warn!(?hangs_for, "the disk hangs: handing leadership over");
            node.resign();
        }
        self.is_silent = hangs_for >= 2 * *election_timeout;
        !self.is_silent
    }

    fn take(&mut self, input: RaftInput, now: Instant) -> Result<(), RaftFailure> {
        let node = &mut self.parts.node;
        match input {
            RaftInput::Propose { proposal, term } => {
                let sequence = proposal.sequence;
                if let Err(refused) = self.propose(proposal, term) {
                    self.parts.waiters.refuse(sequence, refused);
                }
            }
            RaftInput::Forwarded { proposal, term, refusals } => {
                let sequence = proposal.sequence;
                if let Err(refused) = self.propose(proposal, term) {
                    // Who asked may have gone.
                    let _ = refusals.send(refusal(sequence, refused));
                }
            }
            RaftInput::Message(bytes) => self.step(&bytes)?,
            RaftInput::Snapshot(arrived) => self.receive_snapshot(arrived, now)?,
            RaftInput::SnapshotMade { to, mark, configuration } => {
                node.offer_snapshot(to, mark, &configuration);
            }
            RaftInput::SnapshotSent { to, is_in_force } => node.report_snapshot(to, is_in_force),
            RaftInput::Unreachable { id, is_broken: true } => node.lost_sight_of(id),
            RaftInput::Unreachable { id, is_broken: false } => node.report_unreachable(id),
            RaftInput::ReadIndex(reply) => self.reads.queue.push(reply),
            RaftInput::Persisted(number) => {
                node.persisted(number);
                while self.unsynced.front().is_some_and(|(written, _)| *written <= number) {
                    self.unsynced.pop_front();
                }
            }
            RaftInput::Changed { index, is_accepted } => {
                node.change_applied(index, is_accepted)?;
                // Before a member that was added hears anything.
                self.leads_alone(index.saturating_sub(1));
            }
            RaftInput::Applied(index) => {
                node.applied(index);
                self.leads_alone(index);
            }
            RaftInput::Transfer(to) => node.transfer_leader(to),
            RaftInput::Resign => {
                node.resign();
            }
            RaftInput::Stop => {}
        }
        Ok(())
    }

    fn propose(&mut self, proposal: Proposal, term: u64) -> Result<(), Refused> {
        let node = &mut self.parts.node;
        if node.term() != term {
            return Err(Refused::NotLeader);
        }
        match proposal.change {
            None => node.propose(proposal.command),
            Some(change) => node.propose_change(change, proposal.command),
        }
    }

    fn step(&mut self, bytes: &[u8]) -> Result<(), RaftFailure> {
        let seen = self.parts.node.step(bytes);
        pass_over(seen, ())
    }

    /// Raft decides at once whether it goes on from the image, which then waits for nothing
    /// else: the message of a later one would replace it. While another is being put in force
    /// the decision would come too late for that, so its sender is to try again (etcd #18055
    /// was two in a short time).
    fn receive_snapshot(&mut self, arrived: Arrived, now: Instant) -> Result<(), RaftFailure> {
        let message = arrived.begin.message.clone();
        let seen = self.parts.node.step_snapshot(&message);
        if !pass_over(seen, false)? {
            // Dropped with what its sender waits for: that one tries again.
            return Ok(());
        }
        self.arrived = Some(arrived);
        self.carry_out(now)?;
        if let Some(unused) = self.arrived.take() {
            // This member is ahead of it. The sender may have gone.
            let _ = unused.done.send(());
        }
        Ok(())
    }

    fn install(&mut self, install: raft::Install) {
        let raft::Install { mark, number, hard_state } = install;
        self.parts.published.set_committed(mark.index);
        // Raft restores what it was just shown, and nothing else.
        if let Some(Arrived { spool, done, .. }) = self.arrived.take() {
            let install = Install { spool, mark, hard_state, number, done };
            let _ = self.parts.checkpoint.send(CheckpointTask::Install(Box::new(install)));
        }
    }

    fn send(&mut self, message: Outgoing) {
        let RaftParts { node, outbox, .. } = &mut self.parts;
        let (to, is_snapshot) = (message.to, matches!(message.kind, Kind::Snapshot(_)));
        // Reads and appends would keep the others from electing, as heartbeats do.
        let is_kept_back = self.is_silent;
        if is_kept_back || !outbox.send(message) {
            if is_snapshot {
                // Raft sends that member nothing else until it hears what became of it.
                node.report_snapshot(to, false);
            }
            if !is_kept_back {
                node.report_unreachable(to);
            }
        }
    }

    /// Carries out effects until there are none. The other threads end only after
    /// this one, so a message to them is lost only when they failed, and then the
    /// fault is raised already.
    fn carry_out(&mut self, now: Instant) -> Result<(), RaftFailure> {
        while let Some(effects) = self.parts.node.effects()? {
            let Effects { role, messages, snapshots_wanted, install, append, committed, reads } =
                effects;
            if let Some(role) = role {
                self.publish_role(role);
                self.reads.term_index = None;
                self.reads.start_over();
            }
            for message in messages {
                self.send(message);
            }
            for to in snapshots_wanted {
                self.parts.outbox.make_snapshot(to, self.parts.node.log_start());
            }
            if let Some(install) = install {
                self.install(install);
            }
            if let Some(append) = append {
                self.unsynced.push_back((append.number, now));
                let _ = self.parts.log.send(LogTask::Append(append));
            }
            if let Some(last) = committed.last() {
                let (index, term) = (last.index, last.term);
                self.parts.published.set_committed(index);
                let committed_total = i64::try_from(index).unwrap_or(i64::MAX);
                self.parts.metrics.server_proposals_committed_total.set(committed_total);
                let _ = self.parts.apply.send(ApplyTask::Entries(committed));
                let role = *self.parts.published.role.borrow();
                // Only an entry of its own term tells a leader that all it holds
                // is committed (raft paper, 5.4.2).
                if role.is_leader && term == role.term {
                    self.reads.term_index.get_or_insert(index);
                }
            }
            for read in reads {
                if let Some(asked_at) = self.reads.confirm(read.context, read.index, now) {
                    self.parts.published.set_confirmed(asked_at);
                }
            }
        }
        Ok(())
    }

    /// Everything up to `applied` is applied. A leader who is the only member need ask nobody
    /// before it reads, once that includes all that was committed before its term, and all that
    /// others heard of before they left. A learner votes for nobody else; but it applies what it
    /// is sent, perhaps before the leader does, and answers its clients.
    fn leads_alone(&mut self, applied: u64) {
        let RaftParts { node, published, .. } = &self.parts;
        let leads = published.role.borrow().is_leader;
        let has_applied = |index: Option<u64>| index.is_some_and(|index| index <= applied);
        let is_certain = leads && node.is_only_voter() && has_applied(self.reads.term_index);
        if leads && node.is_only_member() {
            self.reads.alone_index.get_or_insert(node.committed());
        } else {
            self.reads.alone_index = None;
        }
        let is_alone = is_certain && has_applied(self.reads.alone_index);
        if published.is_lone_leader() != is_alone {
            published.set_lone_leader(is_alone);
        }
        if is_certain {
            published.set_confirmed(published.boot_clock().now());
        }
    }

    fn publish_role(&self, role: Role) {
        let RaftParts { published, metrics, .. } = &self.parts;
        published.set_lone_leader(false);
        published.forget_confirmed();
        let before = published.role.send_replace(role);
        metrics.server_has_leader.set(i64::from(role.leader != 0));
        metrics.server_is_leader.set(i64::from(role.is_leader));
        if before.leader != role.leader && role.leader != 0 {
            metrics.server_leader_changes_seen_total.inc();
        }
        if before.leader != role.leader || before.is_leader != role.is_leader {
            let member = format!("{:x}", self.parts.member);
            let leader = format!("{:x}", role.leader);
            if role.is_leader {
                tracing::info!(member, term = role.term, "became leader");
            } else if role.leader == 0 {
                tracing::info!(member, term = role.term, "has no leader");
            } else {
                tracing::info!(member, term = role.term, leader, "follows a leader");
            }
        }
    }
}

/// What raft refuses to see is passed over, unless this member cannot go on after it.
fn pass_over<T>(seen: Result<T, Malformed>, instead: T) -> Result<T, RaftFailure> {
    match seen {
        Err(malformed) if malformed.is_fatal() => Err(malformed.into()),
        Err(malformed) => {
            tracing::warn!(%malformed, "passed over a message of another member");
            Ok(instead)
        }
        Ok(seen) => Ok(seen),
    }
}

#[cfg(test)]
mod tests;
