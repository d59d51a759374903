//! The thread that owns the raft node.
//!
//! It takes what is in its mailbox, lets the node see all of it, and carries out
//! the effects: appends go to the log thread, committed entries to the apply
//! thread. It never waits for either, so ticks and elections do not depend on the
//! disk.
//!
//! ```text
//!   engine ──Propose, ReadIndex──▶┐             ┌──▶ log thread ──Persisted──┐
//!   log ─────Persisted───────────▶├─ mailbox ─▶ raft                         │
//!   apply ───Applied─────────────▶│             └──▶ apply thread ─Applied───┤
//!                                 └◀─────────────────────────────────────────┘
//! ```
//!
//! Mailboxes are unbounded channels whose content is bounded elsewhere: proposals by
//! [`Waiters`], appends, entries and their reports by what was proposed, reads by the
//! requests that the listeners let in.
//!
//! **Reads.** All reads that wait when a round is started share it; nobody joins a
//! round later, because its index may predate the write they must see. A change of
//! leader or term throws the round's answer away and asks again, with a context
//! that was never used (etcd's stale reads of 2026 came from reusing them).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::apply_thread::ApplyTask;
use super::fault::Fault;
use super::log_thread::LogTask;
use super::published::Published;
use super::waiters::Waiters;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::raft::{Effects, Node, RaftError, Refused, Role};

/// A mailbox is emptied in turns of at most this many inputs, so that a flood of
/// proposals cannot keep effects and ticks waiting.
const INPUTS_PER_TURN: usize = 4096;
/// After a pause (a stopped process, a stalled machine) the node does not live
/// through every missed tick: it would depose a leader that is well.
const CATCH_UP_TICKS_MAX: u32 = 2;
/// A round of ReadIndex that got no answer is asked again after this; etcd's value.
const READ_INDEX_RETRY: Duration = Duration::from_millis(500);

/// What the raft thread is told.
#[derive(Debug)]
pub enum RaftInput {
    /// Append this command. `sequence` is its entry in [`Waiters`].
    Propose {
        /// The encoded command.
        data: Vec<u8>,
        /// Whom to tell when it is refused.
        sequence: u64,
    },
    /// Find out which index a linearizable read must wait for. Not answered while
    /// there is no leader: the caller limits its patience.
    ReadIndex(oneshot::Sender<u64>),
    /// All writes up to this number are on disk.
    Persisted(u64),
    /// All entries up to this index are applied.
    Applied(u64),
    /// Stop. What is in the mailbox behind it is dropped.
    Stop,
}

/// Everything the raft thread works with.
pub struct RaftThread {
    /// The node, freshly made.
    pub node: Node,
    /// What the thread is told.
    pub mailbox: Receiver<RaftInput>,
    /// Where appends go.
    pub log: Sender<LogTask>,
    /// Where committed entries go.
    pub apply: Sender<ApplyTask>,
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
    /// This member's id, for the log.
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

/// A round of ReadIndex that is under way.
struct Round {
    context: u64,
    waiting: Vec<oneshot::Sender<u64>>,
    since: Instant,
}

impl RaftThread {
    /// Runs until told to stop. The only voter stands for election at once.
    pub fn run(self) {
        // What is declared later is dropped earlier: first the thread with its mailbox, and
        // when nobody can ask anything any more, the others are told.
        let _end = End {
            log: self.log.clone(),
            apply: self.apply.clone(),
            published: Arc::clone(&self.published),
            waiters: Arc::clone(&self.waiters),
        };
        let mut thread = self;
        if let Err(error) = thread.run_until_stopped() {
            thread.fault.raise("raft", error);
        }
    }

    fn run_until_stopped(&mut self) -> Result<(), RaftError> {
        let mut reads = Reads::default();
        if self.node.is_only_voter() {
            self.node.campaign()?;
        }
        let mut next_tick = Instant::now() + self.tick;
        loop {
            self.carry_out(&mut reads)?;
            let patience = next_tick.saturating_duration_since(Instant::now());
            match self.mailbox.recv_timeout(patience) {
                Ok(RaftInput::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(input) => self.take(input, &mut reads),
                Err(RecvTimeoutError::Timeout) => {}
            }
            for _ in 1..INPUTS_PER_TURN {
                match self.mailbox.try_recv() {
                    Ok(RaftInput::Stop) => return Ok(()),
                    Ok(input) => self.take(input, &mut reads),
                    Err(_) => break,
                }
            }
            let now = Instant::now();
            let mut ticks = 0;
            while next_tick <= now && ticks < CATCH_UP_TICKS_MAX {
                self.node.tick();
                next_tick += self.tick;
                ticks += 1;
            }
            if next_tick <= now {
                next_tick = now + self.tick;
            }
            reads.ask(&mut self.node, now);
        }
    }

    fn take(&mut self, input: RaftInput, reads: &mut Reads) {
        match input {
            RaftInput::Propose { data, sequence } => {
                if let Err(refused) = self.node.propose(data) {
                    let error = match refused {
                        Refused::NotLeader => Error::LeaderChanged,
                        Refused::Full => Error::TooManyRequests,
                    };
                    self.waiters.refuse(sequence, error);
                }
            }
            RaftInput::ReadIndex(reply) => reads.queue.push(reply),
            RaftInput::Persisted(number) => self.node.persisted(number),
            RaftInput::Applied(index) => {
                self.node.applied(index);
                self.leads_alone(index, reads);
            }
            RaftInput::Stop => {}
        }
    }

    /// Carries out effects until there are none. The other threads end only after
    /// this one, so a message to them is lost only when they failed, and then the
    /// fault is raised already.
    fn carry_out(&mut self, reads: &mut Reads) -> Result<(), RaftError> {
        while let Some(effects) = self.node.effects()? {
            let Effects { role, append, committed, reads: confirmed } = effects;
            if let Some(role) = role {
                self.publish_role(role);
                reads.term_index = None;
                reads.start_over();
            }
            if let Some(append) = append {
                let _ = self.log.send(LogTask::Append(append));
            }
            if let Some(last) = committed.last() {
                let (index, term) = (last.index, last.term);
                self.published.set_committed(index);
                let committed_total = i64::try_from(index).unwrap_or(i64::MAX);
                self.metrics.server_proposals_committed_total.set(committed_total);
                let _ = self.apply.send(ApplyTask::Entries(committed));
                let role = *self.published.role.borrow();
                // Only an entry of its own term tells a leader that all it holds
                // is committed (raft paper, 5.4.2).
                if role.is_leader && term == role.term {
                    reads.term_index.get_or_insert(index);
                }
            }
            for read in confirmed {
                reads.confirm(read.context, read.index);
            }
        }
        Ok(())
    }

    /// Everything up to `applied` is applied. A lone leader need ask nobody before it
    /// reads once that includes all that was committed before its term.
    fn leads_alone(&self, applied: u64, reads: &Reads) {
        if !self.published.is_lone_leader()
            && reads.term_index.is_some_and(|index| index <= applied)
            && self.node.is_only_voter()
        {
            self.published.set_lone_leader(true);
        }
    }

    fn publish_role(&self, role: Role) {
        self.published.set_lone_leader(false);
        let before = self.published.role.send_replace(role);
        self.metrics.server_has_leader.set(i64::from(role.leader != 0));
        self.metrics.server_is_leader.set(i64::from(role.is_leader));
        if before.leader != role.leader && role.leader != 0 {
            self.metrics.server_leader_changes_seen_total.inc();
        }
        if before.leader != role.leader || before.is_leader != role.is_leader {
            let member = format!("{:x}", self.member);
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

/// Reads that wait for an index, and from when on none need wait.
#[derive(Default)]
struct Reads {
    /// While this member leads: an index whose entry is of its term and committed.
    term_index: Option<u64>,
    /// Not asked for yet.
    queue: Vec<oneshot::Sender<u64>>,
    round: Option<Round>,
    /// The last context used. Unique within this node's life, which is all raft
    /// compares it over.
    context: u64,
}

impl Reads {
    /// Starts a round for all who wait, when none is under way.
    fn ask(&mut self, node: &mut Node, now: Instant) {
        if self.round.as_ref().is_some_and(|round| now - round.since >= READ_INDEX_RETRY) {
            self.start_over();
        }
        if self.round.is_some() {
            return;
        }
        self.queue.retain(|reply| !reply.is_closed());
        if self.queue.is_empty() {
            return;
        }
        self.context += 1;
        if node.read_index(self.context) {
            let waiting = std::mem::take(&mut self.queue);
            self.round = Some(Round { context: self.context, waiting, since: now });
        }
    }

    /// The round's answer, should it come, is not to be used.
    fn start_over(&mut self) {
        if let Some(round) = self.round.take() {
            self.queue.extend(round.waiting);
        }
    }

    fn confirm(&mut self, context: u64, index: u64) {
        if self.round.as_ref().is_some_and(|round| round.context == context)
            && let Some(round) = self.round.take()
        {
            for reply in round.waiting {
                let _ = reply.send(index);
            }
        }
    }
}
