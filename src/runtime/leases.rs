//! Time for leases: the leader's deadlines, and what happens when they pass.
//!
//! Deadlines live in memory, at the leader only; keepalives move them and are not
//! written anywhere. When a lease's time is up the leader proposes its end, and only
//! the applied proposal ends it. Before it does, it makes sure that it still is the
//! leader: it may have been asleep for minutes and not know (etcd #15247).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
// The same as std's, but for tests that move time.
use tokio::time::Instant;

use super::proposer::Proposer;
use super::published::Published;
use crate::error::Error;
use crate::lease::{Expiry, Lessor, Renewal};
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::{LeaseCheckpoint, LeaseCheckpointRequest};
use crate::pb::kvorumpb::{LeaseExpire, LeaseRemainders, command::Request};
use crate::state::{LeaseChange, StateMachine};

/// How often the leader looks for leases whose time is up. etcd takes 500 ms.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(200);
/// Leases ended by one log entry; their keys go in one revision each.
const EXPIRED_PER_ENTRY: usize = 500;
/// How often the time a long lease has left is written to the log; etcd's value.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);
/// Remainders written by one log entry; etcd's value.
const CHECKPOINTS_PER_ENTRY: usize = 1000;
/// Leases given a deadline in one hold of the lock when this member begins to lead.
const SCHEDULED_PER_STEP: usize = 10_000;

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: the leader ends leases without making sure that it still leads.
    pub(crate) static EXPIRES_UNASKED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The deadlines. One lock, held briefly: by keepalives, by the apply thread for
/// leases that came or went, by the duty below.
pub struct LeaseClock {
    began: Instant,
    deadlines: Mutex<Deadlines>,
    /// Tells the keepalives that wait to look again: a lease was forgotten, or this member
    /// has taken over, or leads no more.
    changed: watch::Sender<()>,
    published: Arc<Published>,
}

struct Deadlines {
    expiry: Expiry,
    /// Whether every lease has a deadline; not so until this member has taken over.
    complete: bool,
}

impl LeaseClock {
    /// No deadlines yet. `published` says whether this member leads.
    pub fn new(published: Arc<Published>) -> LeaseClock {
        let deadlines = Deadlines { expiry: Expiry::new(CHECKPOINT_INTERVAL), complete: false };
        LeaseClock {
            began: Instant::now(),
            deadlines: Mutex::new(deadlines),
            changed: watch::Sender::new(()),
            published,
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Leases came or went. Called by the apply thread before anybody is told.
    pub fn take_note(&self, changes: &[LeaseChange], lessor: &Lessor) {
        if changes.is_empty() {
            return;
        }
        let now = self.now();
        let mut forgotten = false;
        let mut deadlines = self.deadlines.lock();
        for change in changes {
            match *change {
                LeaseChange::Granted(id) => {
                    if let Some(lease) = lessor.get(id) {
                        deadlines.expiry.schedule(lease, now, Duration::ZERO);
                    }
                }
                LeaseChange::Revoked(id) => {
                    deadlines.expiry.forget(id);
                    forgotten = true;
                }
            }
        }
        drop(deadlines);
        if forgotten {
            self.changed.send_replace(());
        }
    }

    /// What is left of a lease, if this member leads.
    pub fn remaining(&self, id: i64) -> Option<Duration> {
        self.deadlines.lock().expiry.remaining(id, self.now())
    }

    /// This member leads: every lease gets a deadline, `extend` later than it would be.
    fn take_over(&self, state: &RwLock<StateMachine>, extend: Duration) {
        {
            let mut deadlines = self.deadlines.lock();
            deadlines.complete = false;
            deadlines.expiry.promote();
        }
        let mut after = i64::MIN;
        loop {
            let state = state.read();
            let now = self.now();
            let mut deadlines = self.deadlines.lock();
            let mut scheduled = 0;
            for lease in state.lessor().iter_after(after).take(SCHEDULED_PER_STEP) {
                deadlines.expiry.schedule(lease, now, extend);
                after = lease.id();
                scheduled += 1;
            }
            if scheduled < SCHEDULED_PER_STEP {
                deadlines.complete = true;
                break;
            }
        }
        self.changed.send_replace(());
    }

    /// The state was replaced by another member's: this one does not lead, and what it may
    /// still remember of deadlines is of leases that need not be there any more.
    pub fn state_replaced(&self) {
        self.demote();
    }

    /// This member leads no more.
    fn demote(&self) {
        let mut deadlines = self.deadlines.lock();
        deadlines.complete = false;
        deadlines.expiry.demote();
        drop(deadlines);
        self.changed.send_replace(());
    }

    /// A keepalive: the lease's time begins anew. The TTL in seconds; 0 when there is
    /// no such lease.
    ///
    /// A lease whose time is up lives until its end is committed, and so does one that this
    /// member has yet to take over: both are waited for, as in etcd. An answer of 0 would
    /// tell a client that its keys are gone while others still read them.
    ///
    /// # Errors
    /// [`Error::NotLeader`] when this member does not lead, [`Error::NoLeader`] when it stops
    /// leading meanwhile; [`Error::Timeout`], [`Error::Stopped`].
    pub async fn keep_alive(&self, id: i64, proposer: &Proposer) -> Result<i64, Error> {
        let mut waiting = None;
        loop {
            let (renewal, complete) = {
                let mut deadlines = self.deadlines.lock();
                (deadlines.expiry.renew(id, self.now()), deadlines.complete)
            };
            match renewal {
                // Only now: between a confirmation and the answer it might fall asleep.
                Renewal::Renewed { ttl_secs } => {
                    return proposer.confirm_leadership().await.map(|()| ttl_secs);
                }
                Renewal::NotFound if complete => {
                    return proposer.confirm_leadership().await.map(|()| 0);
                }
                Renewal::NotFound | Renewal::NotPrimary | Renewal::Expired => match &mut waiting {
                    // Most keepalives need not wait; one that does looks once more first,
                    // so that it misses nothing.
                    None => waiting = Some(self.waiting(proposer)),
                    Some(waiting) => self.wait(waiting).await?,
                },
                Renewal::CommitFirst { token } => {
                    // The log says that little is left. A later leader must not
                    // believe that once this keepalive is acknowledged.
                    let whole = LeaseCheckpoint { id, remaining_ttl: 0 };
                    let request = LeaseCheckpointRequest { checkpoints: vec![whole] };
                    proposer.propose(Request::LeaseCheckpoint(request)).await?;
                    self.deadlines.lock().expiry.renewal_committed(id, token);
                }
            }
        }
    }

    /// Waits until every lease has its deadline, while this member leads: a moment after it
    /// began to.
    ///
    /// # Errors
    /// [`Error::NoLeader`] when this member does not lead, or stops leading meanwhile;
    /// [`Error::Timeout`], [`Error::Stopped`].
    pub async fn taken_over(&self, proposer: &Proposer) -> Result<(), Error> {
        let mut waiting = self.waiting(proposer);
        while !self.deadlines.lock().complete {
            self.wait(&mut waiting).await?;
        }
        Ok(())
    }

    /// To wait from now on for changes, no longer than a request may take.
    fn waiting(&self, proposer: &Proposer) -> Waiting {
        let until = tokio::time::Instant::now() + proposer.request_timeout();
        Waiting { changed: self.changed.subscribe(), until }
    }

    /// Waits for a change that `waiting` has not seen, while this member leads.
    async fn wait(&self, waiting: &mut Waiting) -> Result<(), Error> {
        let mut role = self.published.role.subscribe();
        let mut stopped = self.published.stopped.subscribe();
        tokio::select! {
            biased;
            seen = waiting.changed.changed() => seen.map_err(|_| Error::Stopped),
            _ = role.wait_for(|role| !role.is_leader) => Err(Error::NoLeader),
            _ = stopped.wait_for(|stopped| *stopped) => Err(Error::Stopped),
            () = tokio::time::sleep_until(waiting.until) => Err(Error::Timeout),
        }
    }
}

/// Somebody who waits for the deadlines to change.
struct Waiting {
    changed: watch::Receiver<()>,
    until: tokio::time::Instant,
}

/// What the duty below works with.
pub struct LeaseDuty {
    /// The deadlines.
    pub clock: Arc<LeaseClock>,
    /// The leases.
    pub state: Arc<RwLock<StateMachine>>,
    /// How leases are ended.
    pub proposer: Arc<Proposer>,
    /// Whether this member leads.
    pub published: Arc<Published>,
    /// Added to every lease when this member begins to lead.
    pub election_timeout: Duration,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl LeaseDuty {
    /// Runs until the future is dropped: keeps deadlines while this member leads.
    pub async fn run(self) {
        let mut led_term = None;
        let mut ticks = tokio::time::interval(EXPIRY_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut role = self.published.role.subscribe();
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => {}
                changed = role.changed() => if changed.is_err() { return },
            }
            let now = *role.borrow_and_update();
            if !now.is_leader {
                if led_term.take().is_some() {
                    self.clock.demote();
                }
                continue;
            }
            if led_term != Some(now.term) {
                // Until what earlier leaders committed is applied, there may be leases
                // that this member does not know of.
                if self.proposer.read_barrier().await.is_err() {
                    continue;
                }
                self.clock.take_over(&self.state, self.election_timeout);
                led_term = Some(now.term);
            }
            self.expire(now.term).await;
            self.checkpoint(now.term).await;
        }
    }

    async fn expire(&self, term: u64) {
        loop {
            let ids = {
                let now = self.clock.now();
                self.clock.deadlines.lock().expiry.expired(now, EXPIRED_PER_ENTRY)
            };
            if ids.is_empty() {
                return;
            }
            let count = ids.len();
            let expired = async {
                #[cfg(test)]
                let unasked = EXPIRES_UNASKED.get();
                #[cfg(not(test))]
                let unasked = false;
                if !unasked {
                    self.proposer.read_barrier().await?;
                }
                self.proposer.propose(Request::LeaseExpire(LeaseExpire { term, ids })).await
            };
            match expired.await {
                Ok(_) => self.metrics.debugging_server_lease_expired_total.inc_by(count as u64),
                // They are reported again; until then nothing has happened to them.
                Err(error) => {
                    tracing::warn!(%error, count, "failed to revoke expired leases");
                    return;
                }
            }
            if count < EXPIRED_PER_ENTRY {
                return;
            }
        }
    }

    async fn checkpoint(&self, term: u64) {
        let due = {
            let now = self.clock.now();
            self.clock.deadlines.lock().expiry.due_checkpoints(now, CHECKPOINTS_PER_ENTRY)
        };
        if due.is_empty() {
            return;
        }
        let checkpoints =
            due.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl });
        let request = LeaseRemainders { term, checkpoints: checkpoints.collect() };
        if let Err(error) = self.proposer.propose(Request::LeaseRemainders(request)).await {
            tracing::warn!(%error, "failed to checkpoint leases");
        }
    }
}

#[cfg(test)]
mod tests;
