//! Time for leases: the leader's deadlines, and what happens when they pass.
//!
//! Deadlines live in memory, at the leader only; keepalives move them and are not
//! written anywhere. When a lease's time is up the leader proposes its end, and only
//! the applied proposal ends it. Before it does, it makes sure that it still is the
//! leader: it may have been asleep for minutes and not know (etcd #15247).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::proposer::Proposer;
use super::published::Published;
use crate::error::Error;
use crate::lease::{Expiry, Lessor, Renewal};
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::{LeaseCheckpoint, LeaseCheckpointRequest};
use crate::pb::kvorumpb::{LeaseExpire, command::Request};
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

/// The deadlines. One lock, held briefly: by keepalives, by the apply thread for
/// leases that came or went, by the duty below.
pub struct LeaseClock {
    began: Instant,
    expiry: Mutex<Expiry>,
    /// Whether every lease has a deadline; not so until this member has taken over.
    complete: AtomicBool,
}

impl Default for LeaseClock {
    fn default() -> LeaseClock {
        LeaseClock {
            began: Instant::now(),
            expiry: Mutex::new(Expiry::new(CHECKPOINT_INTERVAL)),
            complete: AtomicBool::new(false),
        }
    }
}

impl LeaseClock {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Leases came or went. Called by the apply thread before anybody is told.
    pub fn take_note(&self, changes: &[LeaseChange], lessor: &Lessor) {
        if changes.is_empty() {
            return;
        }
        let now = self.now();
        let mut expiry = self.expiry.lock();
        for change in changes {
            match *change {
                LeaseChange::Granted(id) => {
                    if let Some(lease) = lessor.get(id) {
                        expiry.schedule(lease, now, Duration::ZERO);
                    }
                }
                LeaseChange::Revoked(id) => expiry.forget(id),
            }
        }
    }

    /// What is left of a lease, if this member leads.
    pub fn remaining(&self, id: i64) -> Option<Duration> {
        self.expiry.lock().remaining(id, self.now())
    }

    /// This member leads: every lease gets a deadline, `extend` later than it would be.
    fn take_over(&self, state: &RwLock<StateMachine>, extend: Duration) {
        self.complete.store(false, Ordering::Release);
        self.expiry.lock().promote();
        let mut after = i64::MIN;
        loop {
            let state = state.read();
            let now = self.now();
            let mut expiry = self.expiry.lock();
            let mut scheduled = 0;
            for lease in state.lessor().iter_after(after).take(SCHEDULED_PER_STEP) {
                expiry.schedule(lease, now, extend);
                after = lease.id();
                scheduled += 1;
            }
            if scheduled < SCHEDULED_PER_STEP {
                break;
            }
        }
        self.complete.store(true, Ordering::Release);
    }

    /// This member leads no more.
    fn demote(&self) {
        self.complete.store(false, Ordering::Release);
        self.expiry.lock().demote();
    }

    /// A keepalive: the lease's time begins anew. The TTL in seconds; 0 when there is
    /// no such lease or its time is up already.
    ///
    /// # Errors
    /// [`Error::NoLeader`] when this member does not lead, or has yet to take over the
    /// lease: it lives, so the answer must not be 0.
    pub async fn keep_alive(&self, id: i64, proposer: &Proposer) -> Result<i64, Error> {
        loop {
            let complete = self.complete.load(Ordering::Acquire);
            let renewal = self.expiry.lock().renew(id, self.now());
            match renewal {
                Renewal::NotFound if !complete => return Err(Error::NoLeader),
                Renewal::Renewed { ttl_secs } => return Ok(ttl_secs),
                Renewal::NotFound | Renewal::Expired => return Ok(0),
                Renewal::NotPrimary => return Err(Error::NoLeader),
                Renewal::CommitFirst { token } => {
                    // The log says that little is left. A later leader must not
                    // believe that once this keepalive is acknowledged.
                    let whole = LeaseCheckpoint { id, remaining_ttl: 0 };
                    let request = LeaseCheckpointRequest { checkpoints: vec![whole] };
                    proposer.propose(Request::LeaseCheckpoint(request)).await?;
                    self.expiry.lock().renewal_committed(id, token);
                }
            }
        }
    }
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
            self.checkpoint().await;
        }
    }

    async fn expire(&self, term: u64) {
        loop {
            let ids = {
                let now = self.clock.now();
                self.clock.expiry.lock().expired(now, EXPIRED_PER_ENTRY)
            };
            if ids.is_empty() {
                return;
            }
            let count = ids.len();
            let expired = async {
                self.proposer.read_barrier().await?;
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

    async fn checkpoint(&self) {
        let due = {
            let now = self.clock.now();
            self.clock.expiry.lock().due_checkpoints(now, CHECKPOINTS_PER_ENTRY)
        };
        if due.is_empty() {
            return;
        }
        let checkpoints =
            due.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl });
        let request = LeaseCheckpointRequest { checkpoints: checkpoints.collect() };
        if let Err(error) = self.proposer.propose(Request::LeaseCheckpoint(request)).await {
            tracing::warn!(%error, "failed to checkpoint leases");
        }
    }
}
