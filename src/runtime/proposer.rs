//! Asking raft: to append a command, or for an index to read at.
//!
//! [`Proposer`] is the runtime's front. The engine uses it for clients, the leader's
//! duties for themselves. It works on any member: where another leads, commands are sent
//! there.
//!
//! A command is proposed for one term. When it was refused, or overtaken by a later term
//! (see [`Waiters`]), it certainly was not carried out, and it is proposed again, as long as
//! its caller has patience. So a caller whose leader dies hears nothing of it but a delay,
//! where etcd answers seven seconds later that nobody knows.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{oneshot, watch};
// The same as std's, but for tests that move time.
use tokio::time::Instant;

use super::published::Published;
use super::raft_thread::{Proposal, RaftInput};
use super::waiters::{Answer, Waiters};
use crate::error::Error;
use crate::metrics::{Metrics, Op};
use crate::pb::kvorumpb::{Command, command::Request, member_change};
use crate::raft::{Change, Refused, Role};
use crate::state::Response;

/// How long a request waits for the cluster, apart from two election timeouts that
/// are added to it; etcd's value.
const REQUEST_TIMEOUT_BASE: Duration = Duration::from_secs(5);
/// A command that was refused is proposed again after this, unless the leader changes
/// before.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

/// Carries commands to the member that leads.
pub trait Forwarder: Send + Sync {
    /// Sends a command to `leader`, to be appended in `term`. Does not wait. That it was
    /// refused is told to the [`Waiters`]; that it may have been lost on the way is not.
    fn forward(&self, leader: u64, term: u64, proposal: Proposal);
}

/// See the module documentation.
pub struct Proposer {
    mailbox: Sender<RaftInput>,
    waiters: Arc<Waiters>,
    published: Arc<Published>,
    forwarder: Arc<dyn Forwarder>,
    metrics: Arc<Metrics>,
    max_request_bytes: usize,
    election_timeout: Duration,
}

impl Proposer {
    /// Asks through this mailbox. `max_request_bytes` bounds a command as etcd would
    /// encode it.
    pub fn new(
        mailbox: Sender<RaftInput>,
        waiters: Arc<Waiters>,
        published: Arc<Published>,
        forwarder: Arc<dyn Forwarder>,
        metrics: Arc<Metrics>,
        max_request_bytes: usize,
        election_timeout: Duration,
    ) -> Proposer {
        Proposer {
            mailbox,
            waiters,
            published,
            forwarder,
            metrics,
            max_request_bytes,
            election_timeout,
        }
    }

    /// etcd's ReqTimeout: 5 s and two election timeouts.
    pub fn request_timeout(&self) -> Duration {
        REQUEST_TIMEOUT_BASE + 2 * self.election_timeout
    }

    /// Has a command committed and applied. The outcome is durable and visible here.
    ///
    /// Dropping the future does not take the command back: it may still be applied.
    ///
    /// # Errors
    /// The command's own error, or that it was not taken, or that nobody knows:
    /// [`Error::is_ambiguous`].
    pub async fn propose(&self, request: Request) -> Result<Response, Error> {
        let (op, began) = (Op::from(&request), Instant::now());
        let answered = self.propose_untimed(request).await;
        let durations = &self.metrics.server_request_duration_seconds;
        durations.observe(op, answered.is_ok(), began.elapsed());
        answered
    }

    async fn propose_untimed(&self, request: Request) -> Result<Response, Error> {
        let deadline = Instant::now() + self.request_timeout();
        let pending = Pending::begin(&self.metrics);
        let change = change_of(&request);
        let mut command = Command { header: None, request: Some(request) };
        let mut unlucky = false;
        loop {
            let role = match self.wait_for_leader(deadline).await {
                Err(Error::Timeout) if unlucky => return Err(Error::TimeoutLeaderFail),
                // Etcd's raft takes no proposal without a leader, and tells its own deadline.
                Err(Error::Timeout) => return Err(Error::DeadlineExceeded),
                role => role?,
            };
            let header = self.waiters.next_header();
            let sequence = header.sequence;
            command.header = Some(header);
            let data = command.encode_to_vec();
            if data.len() - header.encoded_len() + etcd_header_len(header.member)
                > self.max_request_bytes
            {
                return Err(Error::RequestTooLarge);
            }
            let answer = self.waiters.register(&header, data.len(), role.term)?;
            let proposal = Proposal { command: data.into(), change, sequence };
            if !role.is_leader {
                self.forwarder.forward(role.leader, role.term, proposal);
            } else if self.mailbox.send(RaftInput::Propose { proposal, term: role.term }).is_err() {
                return Err(Error::Stopped);
            }
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(Answer::Applied(outcome))) => return outcome,
                Ok(Ok(Answer::Refused(Refused::Full))) => return Err(Error::TooManyRequests),
                Ok(Ok(Answer::Refused(Refused::Busy))) => {
                    self.pause(deadline, |_| false).await?;
                }
                Ok(Ok(Answer::Refused(Refused::NotLeader))) => {
                    unlucky = true;
                    self.pause(deadline, |now| *now != role).await?;
                }
                Ok(Ok(Answer::Overtaken)) => unlucky = true,
                Ok(Ok(Answer::Lost(error))) => return Err(error),
                Ok(Err(_)) => return Err(Error::Stopped),
                Err(_) => {
                    self.metrics.server_proposals_failed_total.inc();
                    let now = *self.published.role.borrow();
                    let lost = now.leader != role.leader || now.term != role.term;
                    drop(pending);
                    return Err(if lost { Error::TimeoutLeaderFail } else { Error::Timeout });
                }
            }
        }
    }

    /// Waits a moment before a command is proposed again, or until the role is as wanted.
    async fn pause(
        &self,
        deadline: Instant,
        until: impl FnMut(&Role) -> bool,
    ) -> Result<(), Error> {
        let wake = deadline.min(Instant::now() + REFUSED_PAUSE);
        match self.wait_for(&self.published.role, until, wake).await {
            Err(Error::Timeout) if Instant::now() >= deadline => Err(Error::Timeout),
            Err(Error::Timeout) => Ok(()),
            waited => waited,
        }
    }

    /// Waits until everything is visible here that was acknowledged anywhere before
    /// the call: what makes a read linearizable.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Stopped`].
    pub async fn read_barrier(&self) -> Result<(), Error> {
        // Nobody else can have acknowledged a write, and what this member
        // acknowledged it had applied.
        if self.published.is_lone_leader() {
            return Ok(());
        }
        let deadline = Instant::now() + self.request_timeout();
        let (reply, confirmed) = oneshot::channel();
        self.mailbox.send(RaftInput::ReadIndex(reply)).map_err(|_| Error::Stopped)?;
        let index = match tokio::time::timeout_at(deadline, confirmed).await {
            Ok(index) => index.map_err(|_| Error::Stopped)?,
            Err(_) => {
                self.metrics.server_read_indexes_failed_total.inc();
                return Err(Error::Timeout);
            }
        };
        self.wait_for(&self.published.applied, |applied| *applied >= index, deadline).await
    }

    /// Makes sure that this member led a moment ago, if it does: what a leader tells that was
    /// asleep, and does not know that there is another, is not to be relied on. A moment is
    /// less than the election timeout, by which a new leader lets all leases live longer.
    ///
    /// # Errors
    /// [`Error::NotLeader`]; [`Error::Timeout`], [`Error::Stopped`].
    pub async fn confirm_leadership(&self) -> Result<(), Error> {
        let role = *self.published.role.borrow();
        if !role.is_leader {
            return Err(Error::NotLeader);
        }
        let moment = self.election_timeout / 2;
        let is_fresh = self.published.confirmed_ago().is_some_and(|ago| ago < moment);
        if !is_fresh {
            self.read_barrier().await?;
        }
        // The barrier may have been passed with the help of another leader.
        if *self.published.role.borrow() == role { Ok(()) } else { Err(Error::NotLeader) }
    }

    /// Hands leadership to another voter, and waits until it has it.
    ///
    /// # Errors
    /// [`Error::LeaderTransferTimeout`], [`Error::Stopped`].
    pub async fn transfer_leader(&self, to: u64) -> Result<(), Error> {
        let deadline = Instant::now() + self.request_timeout();
        self.mailbox.send(RaftInput::Transfer(to)).map_err(|_| Error::Stopped)?;
        let moved = self.wait_for(&self.published.role, |role| role.leader == to, deadline).await;
        match moved {
            Err(Error::Timeout) => Err(Error::LeaderTransferTimeout),
            moved => moved,
        }
    }

    /// Before this member stops: hands leadership to whoever can take it, if it leads.
    /// Waits no longer than an election timeout.
    pub async fn resign(&self) {
        let role = *self.published.role.borrow();
        if !role.is_leader || self.published.is_lone_leader() {
            return;
        }
        let deadline = Instant::now() + self.election_timeout;
        if self.mailbox.send(RaftInput::Resign).is_ok() {
            let other = |now: &Role| now.leader != 0 && now.leader != role.leader;
            let moved = self.wait_for(&self.published.role, other, deadline).await;
            tracing::info!(moved = moved.is_ok(), "handed leadership over before the stop");
        }
    }

    /// A member that has just started, or lost its leader, holds proposals back until
    /// there is one, as etcd does.
    async fn wait_for_leader(&self, deadline: Instant) -> Result<Role, Error> {
        loop {
            let role = *self.published.role.borrow();
            if role.leader != 0 {
                return Ok(role);
            }
            self.wait_for(&self.published.role, |role| role.leader != 0, deadline).await?;
        }
    }

    /// Waits until what is published meets a condition, or nothing more will be.
    async fn wait_for<T>(
        &self,
        published: &watch::Sender<T>,
        condition: impl FnMut(&T) -> bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        let mut value = published.subscribe();
        let mut stopped = self.published.stopped.subscribe();
        tokio::select! {
            biased;
            met = value.wait_for(condition) => met.map(drop).map_err(|_| Error::Stopped),
            _ = stopped.wait_for(|stopped| *stopped) => Err(Error::Stopped),
            () = tokio::time::sleep_until(deadline) => Err(Error::Timeout),
        }
    }
}

/// What a command changes in raft's configuration, beside the record of members.
pub fn change_of(request: &Request) -> Option<Change> {
    let Request::MemberChange(change) = request else { return None };
    match change.change.as_ref()? {
        member_change::Change::Add(member) if member.is_learner => Some(Change::Listen(member.id)),
        member_change::Change::Add(member) => Some(Change::Vote(member.id)),
        member_change::Change::Promote(id) => Some(Change::Vote(*id)),
        member_change::Change::Remove(id) => Some(Change::Remove(*id)),
        member_change::Change::Update(_) => None,
    }
}

/// The length of the header that etcd's encoding of a command has: one number, with the
/// member's id in its upper and the time in its lower bits. The rest of a command is
/// encoded alike, so what is too large for etcd is too large here, to the byte.
fn etcd_header_len(member: u64) -> usize {
    1 + prost::encoding::encoded_len_varint(member << 48 | 1 << 47)
}

/// Counts a proposal as pending until dropped.
struct Pending<'a>(&'a Metrics);

impl Pending<'_> {
    fn begin(metrics: &Metrics) -> Pending<'_> {
        metrics.server_proposals_pending.inc();
        Pending(metrics)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.server_proposals_pending.dec();
    }
}
