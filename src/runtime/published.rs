//! What the raft and apply threads tell everybody else.
//!
//! Plain numbers that anyone may read at any time, and watches for those who wait: the
//! role (is there a leader?), the applied index, and the end of it all.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::watch;

use crate::raft::Role;

/// See the module documentation. Each is written by one thread: by raft's (`role`,
/// `committed`, `lone_leader`, `stopped`), by apply's (`applied`, `applied_term`,
/// `removed_below`, `size_bytes`, `learner`) or by the checkpoint's (`checkpoint_bytes`).
#[derive(Debug)]
pub struct Published {
    /// Who leads, as far as this member knows.
    pub role: watch::Sender<Role>,
    /// The newest index whose entry is applied and visible.
    pub applied: watch::Sender<u64>,
    /// The newest compact revision below which everything is removed that compaction
    /// gave up; -1 before any.
    pub removed_below: watch::Sender<i64>,
    /// Whether raft has ended: nothing is committed or confirmed any more.
    pub stopped: watch::Sender<bool>,
    applied_term: AtomicU64,
    committed: AtomicU64,
    lone_leader: AtomicBool,
    learner: AtomicBool,
    size_bytes: AtomicU64,
    checkpoint_bytes: AtomicU64,
}

impl Published {
    /// Before anything ran: `applied` and its term are what was recovered.
    pub fn new(applied: u64, applied_term: u64) -> Published {
        Published {
            role: watch::Sender::new(Role::default()),
            applied: watch::Sender::new(applied),
            removed_below: watch::Sender::new(-1),
            stopped: watch::Sender::new(false),
            applied_term: AtomicU64::new(applied_term),
            committed: AtomicU64::new(applied),
            lone_leader: AtomicBool::new(false),
            learner: AtomicBool::new(false),
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

    /// Whether this member is the leader and the only voter, and has applied an entry
    /// of its term. Then nobody else can have acknowledged a write, what was
    /// acknowledged in earlier lives is applied, and what this one acknowledges it has
    /// applied before.
    pub fn is_lone_leader(&self) -> bool {
        self.lone_leader.load(Ordering::Acquire)
    }

    /// Whether this member only listens, as of the newest applied entry.
    pub fn is_learner(&self) -> bool {
        self.learner.load(Ordering::Relaxed)
    }

    /// Told by the apply thread, and by the server when it starts.
    pub fn set_learner(&self, learner: bool) {
        self.learner.store(learner, Ordering::Relaxed);
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
