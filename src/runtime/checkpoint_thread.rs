//! Checkpoints: what is in memory, written to the store in the background.
//!
//! What clients were told is in the log; a checkpoint only saves replaying it. So
//! nobody waits for one, and it is made in large steps:
//!
//! ```text
//! apply thread   ── cut (everything changed up to index A, taken in one move) ──▶ checkpoint thread
//!                                       records, in batches                          │ write
//!                                       last batch: leases, members, head with A     │ write (atomic)
//!                                       the store's file                             │ fsync  → A is durable
//!                                       records that compaction removed              │ delete
//! log thread     ◀── truncate to the last snapshot ≤ A − catch-up entries ─────────────┘
//! ```
//!
//! Invariants:
//! * The head is written after everything it speaks of, in one batch with all that
//!   is not a record. A crash before it leaves records above the head's revision,
//!   which recovery deletes.
//! * Records are deleted only after a durable head says that the compaction which
//!   removed them has happened.
//! * The log is truncated only to what a durable checkpoint has passed.
//! * The head's index never goes back: leases are written in place, so an older head
//!   beside newer leases would be the state of no index at all.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::oneshot;

use super::fault::Fault;
use super::log_thread::LogTask;
use super::pins::Pins;
use super::published::Published;
use super::records;
use crate::error::Error;
use crate::log::Mark;
use crate::metrics::Metrics;
use crate::state::{Cut, StateMachine};
use crate::storage::{Generations, Storage, StorageError};

/// Changes are at most this old when a checkpoint of them begins.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(1);
/// Changes of this size are not kept waiting for their age.
const DIRTY_BYTES_SOON: usize = 16 * 1024 * 1024;
/// While a cut is due and the one before is still being written, the apply thread
/// looks again after this.
const BUSY_RETRY: Duration = Duration::from_millis(10);
/// A store that is full is tried again after this.
const FULL_RETRY: Duration = Duration::from_secs(1);
/// Keys gathered in one hold of the state's lock when everything is written anew.
const KEYS_PER_STEP: usize = 4096;

/// Why a cut is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutReason {
    /// There are changes of a certain age or size.
    Dirty,
    /// `--snapshot-count` entries were applied since the last one: the log is
    /// truncated after it.
    Snapshot,
}

/// What the checkpoint thread is told.
#[derive(Debug)]
pub enum CheckpointTask {
    /// Write this and make it durable.
    Write(Box<Cut>, CutReason),
    /// Write everything anew, give back the space of the old checkpoint, and answer:
    /// [`Error::NoSpace`] when the disk cannot hold both for a while.
    Rewrite(oneshot::Sender<Result<(), Error>>),
    /// Stop. What is queued before it is written.
    Stop,
}

/// The apply thread's side: decides when to cut.
pub struct Checkpointer {
    tasks: Sender<CheckpointTask>,
    busy: Arc<AtomicBool>,
    snapshot_count: u64,
    /// Applied index of the last cut that was a snapshot.
    snapshot_index: u64,
    applied_index: u64,
    dirty_bytes: usize,
    dirty_since: Option<Instant>,
}

impl Checkpointer {
    /// `snapshot_index` is that of the last snapshot, as far as it is known; `busy` is
    /// shared with the checkpoint thread.
    pub fn new(
        tasks: Sender<CheckpointTask>,
        busy: Arc<AtomicBool>,
        snapshot_count: u64,
        snapshot_index: u64,
    ) -> Checkpointer {
        Checkpointer {
            tasks,
            busy,
            snapshot_count,
            snapshot_index,
            applied_index: snapshot_index,
            dirty_bytes: 0,
            dirty_since: None,
        }
    }

    /// Takes note of what was applied.
    pub fn note(&mut self, state: &StateMachine) {
        let dirty = state.dirty();
        self.applied_index = state.applied().index;
        self.dirty_bytes = dirty.records_bytes;
        if !dirty.is_empty() && self.dirty_since.is_none() {
            self.dirty_since = Some(Instant::now());
        }
    }

    /// When [`Checkpointer::cut_if_due`] is to be called again, if nothing else
    /// happens.
    pub fn due_at(&self) -> Option<Instant> {
        let due = if self.reason_now().is_some() {
            Instant::now()
        } else {
            self.dirty_since? + DIRTY_AGE_MAX
        };
        Some(if self.busy.load(Ordering::Acquire) {
            due.max(Instant::now() + BUSY_RETRY)
        } else {
            due
        })
    }

    /// Makes a cut and hands it over, when one is due and the last one is written.
    pub fn cut_if_due(&mut self, state: &RwLock<StateMachine>) {
        let old = self.dirty_since.is_some_and(|since| since.elapsed() >= DIRTY_AGE_MAX);
        let Some(reason) = self.reason_now().or(old.then_some(CutReason::Dirty)) else { return };
        if self.busy.swap(true, Ordering::AcqRel) {
            return;
        }
        let cut = Box::new(state.write().cut());
        if reason == CutReason::Snapshot {
            tracing::info!(
                snapshot_index = self.snapshot_index,
                applied_index = cut.head.applied_index,
                snapshot_count = self.snapshot_count,
                "triggering snapshot"
            );
            self.snapshot_index = cut.head.applied_index;
        }
        self.dirty_bytes = 0;
        self.dirty_since = None;
        // The checkpoint thread ends only when told to, or with a fault raised.
        let _ = self.tasks.send(CheckpointTask::Write(cut, reason));
    }

    fn reason_now(&self) -> Option<CutReason> {
        if self.applied_index.saturating_sub(self.snapshot_index) > self.snapshot_count {
            Some(CutReason::Snapshot)
        } else {
            (self.dirty_bytes >= DIRTY_BYTES_SOON).then_some(CutReason::Dirty)
        }
    }
}

/// Everything the checkpoint thread works with.
pub struct CheckpointThread {
    /// The store; `None` while there is none to write to, because its disk was full.
    pub storage: Option<Box<dyn Storage>>,
    /// Makes the next one.
    pub generations: Box<dyn Generations>,
    /// The state, for writing it anew as a whole. Only read here.
    pub state: Arc<RwLock<StateMachine>>,
    /// Holds what is being written.
    pub pins: Arc<Pins>,
    /// What the thread is told.
    pub tasks: Receiver<CheckpointTask>,
    /// Where the log is told what it no longer needs to hold.
    pub log: Sender<LogTask>,
    /// The applied index of the checkpoint as it is on disk.
    pub durable_index: u64,
    /// Told the checkpoint's size.
    pub published: Arc<Published>,
    /// Set while a cut is under way; cleared by this thread.
    pub busy: Arc<AtomicBool>,
    /// Set while the store has no space; writes are refused meanwhile.
    pub full: Arc<AtomicBool>,
    /// `--snapshot-catchup-entries`.
    pub catch_up_entries: u64,
    /// Snapshots that the log still reaches back to, oldest first: the places to
    /// truncate it at.
    pub snapshots: VecDeque<Mark>,
    /// Set when the server stops: then a full store is not waited for.
    pub stopping: Arc<AtomicBool>,
    /// Where a fatal error goes.
    pub fault: Fault,
    /// Times.
    pub metrics: Arc<Metrics>,
}

impl CheckpointThread {
    /// Runs until told to stop or the store fails.
    pub fn run(mut self) {
        if let Err(error) = self.run_until_stopped() {
            self.fault.raise("checkpoint", error);
        }
    }

    fn run_until_stopped(&mut self) -> Result<(), StorageError> {
        while let Ok(task) = self.tasks.recv() {
            match task {
                CheckpointTask::Write(cut, reason) => {
                    self.write(&cut, reason)?;
                    self.busy.store(false, Ordering::Release);
                }
                CheckpointTask::Rewrite(done) => {
                    let rewritten = match self.rewrite() {
                        Err(error) if error.is_full() => {
                            tracing::warn!(%error, "no space to write the checkpoint anew");
                            self.generations.abandon();
                            Err(Error::NoSpace)
                        }
                        other => Ok(other?),
                    };
                    // Whoever asked may have gone.
                    let _ = done.send(rewritten);
                }
                CheckpointTask::Stop => break,
            }
        }
        Ok(())
    }

    fn write(&mut self, cut: &Cut, reason: CutReason) -> Result<(), StorageError> {
        let began = Instant::now();
        let index = cut.head.applied_index;
        // Everything was written anew after a cut that waited behind that: it holds the cut.
        let is_superseded = index < self.durable_index;
        if !is_superseded && !self.write_while_full(cut)? {
            return Ok(());
        }
        let took = began.elapsed().as_secs_f64();
        self.metrics.disk_backend_commit_duration_seconds.observe(took);
        tracing::debug!(
            index,
            ?reason,
            took,
            records = cut.dirty.records.len(),
            "checkpoint is durable"
        );
        if let Some(storage) = &self.storage {
            self.published.set_checkpoint_bytes(storage.size_on_disk()?);
        }
        if reason == CutReason::Snapshot {
            self.metrics.debugging_snap_save_total_duration_seconds.observe(took);
            tracing::info!(snapshot_index = index, "saved snapshot");
            self.truncate(Mark { index, term: cut.head.applied_term });
        }
        Ok(())
    }

    /// A snapshot is durable. Truncates the log to the newest one that is as far behind
    /// it as a member may be that catches up from the log.
    fn truncate(&mut self, snapshot: Mark) {
        self.snapshots.push_back(snapshot);
        let keep = snapshot.index.saturating_sub(self.catch_up_entries);
        let mut to = None;
        while let Some(mark) = self.snapshots.front().filter(|mark| mark.index <= keep) {
            to = Some(*mark);
            self.snapshots.pop_front();
        }
        if let Some(to) = to {
            // When the server stops, the log may have stopped already.
            let _ = self.log.send(LogTask::Truncate(to));
        }
    }

    /// Writes a cut, however long its disk is full. Nothing is lost meanwhile: the log
    /// holds what the checkpoint lacks, and no write that takes space is admitted. Returns
    /// whether the cut is durable; it is not when the server stops first.
    fn write_while_full(&mut self, cut: &Cut) -> Result<bool, StorageError> {
        loop {
            let written = match self.storage.as_deref_mut() {
                Some(storage) => records::write(storage, cut),
                // A store that failed is not trusted again; everything is in memory.
                None => self.rewrite(),
            };
            match written {
                Ok(()) => {
                    self.durable_index = self.durable_index.max(cut.head.applied_index);
                    return Ok(true);
                }
                Err(error) if error.is_full() => {
                    self.storage = None;
                    if !self.full.swap(true, Ordering::AcqRel) {
                        tracing::error!(%error, "the checkpoint's disk is full: writes that take space are refused until it has space again");
                    }
                }
                Err(error) => return Err(error),
            }
            if self.stopping.load(Ordering::Acquire) {
                return Ok(false);
            }
            std::thread::sleep(FULL_RETRY);
        }
    }

    /// Writes everything there is into the next checkpoint, which then counts.
    fn rewrite(&mut self) -> Result<(), StorageError> {
        let mut next = self.generations.begin()?;
        let image = records::image(&self.state, &self.pins, KEYS_PER_STEP);
        records::write(next.as_mut(), &image)?;
        self.storage = None;
        self.generations.switch()?;
        self.published.set_checkpoint_bytes(next.size_on_disk()?);
        self.storage = Some(next);
        self.durable_index = image.head.applied_index;
        tracing::info!(applied_index = image.head.applied_index, "wrote the checkpoint anew");
        Ok(())
    }
}

#[cfg(test)]
mod tests;
