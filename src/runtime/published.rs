//! What the raft and apply threads tell everybody else.
//!
//! Plain numbers that anyone may read at any time, and watches for those who wait: the
//! role (is there a leader?), the applied index, and the end of it all.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use super::boot_clock::BootClock;
use crate::raft::{Progress, Role};
use crate::state::StateMachine;

/// See the module documentation. Each is written by one thread: by raft's (`role`,
/// `committed`, `lone_leader`, `confirmed`, `progress`, `stopped`), by apply's (`applied`,
/// `applied_term`, `members`, `removed_below`, `size_bytes`, `learner`,
/// `removed`) or by the checkpoint's
/// (`checkpoint_bytes`).
#[derive(Debug)]
pub struct Published {
    /// Who leads, as far as this member knows.
    pub role: watch::Sender<Role>,
    /// The newest index whose entry is applied and visible.
    pub applied: watch::Sender<u64>,
    /// The newest compact revision below which everything is removed that compaction
    /// gave up; -1 before any.
    pub removed_below: watch::Sender<i64>,
    /// Counts the changes of the members, of which one is applied and visible.
    pub members: watch::Sender<u64>,
    /// Whether raft has ended: nothing is committed or confirmed any more.
    pub stopped: watch::Sender<bool>,
    applied_term: AtomicU64,
    committed: AtomicU64,
    lone_leader: AtomicBool,
    boot_clock: BootClock,
    /// By that clock.
    confirmed: Mutex<Option<Duration>>,
    progress: Mutex<Vec<Progress>>,
    learner: AtomicBool,
    removed: RwLock<BTreeSet<u64>>,
    size_bytes: AtomicU64,
    checkpoint_bytes: AtomicU64,
}

impl Published {
    /// Before anything ran: `applied` and its term are what was recovered.
    pub fn new(applied: u64, applied_term: u64) -> Published {
        Published::with_clock(applied, applied_term, BootClock::System)
    }

    /// As [`Published::new`], by another clock.
    pub(crate) fn with_clock(applied: u64, applied_term: u64, boot_clock: BootClock) -> Published {
        Published {
            boot_clock,
            role: watch::Sender::new(Role::default()),
            applied: watch::Sender::new(applied),
            removed_below: watch::Sender::new(-1),
            members: watch::Sender::new(0),
            stopped: watch::Sender::new(false),
            applied_term: AtomicU64::new(applied_term),
            committed: AtomicU64::new(applied),
            lone_leader: AtomicBool::new(false),
            confirmed: Mutex::default(),
            progress: Mutex::default(),
            learner: AtomicBool::new(false),
            removed: RwLock::default(),
            size_bytes: AtomicU64::new(0),
            checkpoint_bytes: AtomicU64::new(0),
        }
    }

    /// The term of the newest applied entry; what etcd calls `raft_term` in headers.
    pub fn applied_term(&self) -> u64 {
        self.applied_term.load(Ordering::Relaxed)
    }

    /// The newest committed index.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Whether this member is the leader and the only member, and has applied an entry
    /// of its term, and all that members which were removed can have heard of. Then nobody else
    /// can have acknowledged a write, what was acknowledged in earlier lives is applied, and what
    /// this one acknowledges it has applied before.
    pub fn is_lone_leader(&self) -> bool {
        self.lone_leader.load(Ordering::Acquire)
    }

    /// How long ago a majority took this member for its leader, as far as it knows, the time
    /// for which the machine was suspended included. What a leader that was asleep tells its
    /// clients is worth nothing, and it does not know that it was asleep.
    pub fn confirmed_ago(&self) -> Option<Duration> {
        let confirmed = *self.confirmed.lock();
        confirmed.map(|at| self.boot_clock.now().saturating_sub(at))
    }

    /// What [`Published::set_confirmed`] is told the time by.
    pub(super) fn boot_clock(&self) -> &BootClock {
        &self.boot_clock
    }

    /// How far each member is, of the last tick; empty unless this member leads.
    pub fn progress(&self) -> Vec<Progress> {
        self.progress.lock().clone()
    }

    /// Whether this member only listens, as of the newest applied entry.
    pub fn is_learner(&self) -> bool {
        self.learner.load(Ordering::Relaxed)
    }

    /// Whether a member of this id was removed, as of the newest applied entry. Asked for
    /// whatever a peer says, so it does not wait for the state's lock.
    pub fn is_removed(&self, id: u64) -> bool {
        self.removed.read().contains(&id)
    }

    /// Told by the apply thread, and by the server when it starts.
    pub fn set_members(&self, state: &StateMachine) {
        self.learner.store(state.is_learner(), Ordering::Relaxed);
        *self.removed.write() = state.members().removed().into_iter().collect();
        self.members.send_modify(|changes| *changes += 1);
    }

    /// Bytes of all records that are held; what the quota is compared with.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Told by the apply thread, and by the server when it starts.
    pub fn set_size(&self, bytes: u64) {
        self.size_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Bytes that the checkpoint takes on disk, as of its last write.
    pub fn checkpoint_bytes(&self) -> u64 {
        self.checkpoint_bytes.load(Ordering::Relaxed)
    }

    /// Told by the checkpoint thread, and by the server when it starts.
    pub fn set_checkpoint_bytes(&self, bytes: u64) {
        self.checkpoint_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_lone_leader(&self, lone_leader: bool) {
        self.lone_leader.store(lone_leader, Ordering::Release);
    }

    pub(super) fn set_confirmed(&self, at: Duration) {
        *self.confirmed.lock() = Some(at);
    }

    /// The role has changed: what was confirmed before says nothing of now.
    pub(super) fn forget_confirmed(&self) {
        *self.confirmed.lock() = None;
    }

    pub(super) fn set_progress(&self, progress: Vec<Progress>) {
        *self.progress.lock() = progress;
    }

    /// Told by the raft thread when it ends.
    pub(super) fn set_stopped(&self) {
        self.set_lone_leader(false);
        self.stopped.send_replace(true);
    }

    pub(super) fn set_committed(&self, index: u64) {
        self.committed.store(index, Ordering::Relaxed);
    }

    pub(super) fn set_applied(&self, index: u64, term: u64) {
        self.applied_term.store(term, Ordering::Relaxed);
        self.applied.send_replace(index);
    }
}
