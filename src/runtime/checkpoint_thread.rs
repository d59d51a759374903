//! Checkpoints: what is in memory, written to the store in the background.
//!
//! What clients were told is in the log; a checkpoint only saves replaying it. So
//! nobody waits for one, and it is made in large steps:
//!
//! ```text
//! apply thread   ── cut (everything changed up to index A, taken in one move) ──▶ checkpoint thread
//!                                       records, to the end of their file            │ write
//!                                       one batch: leases, members, head with A      │ write (atomic)
//!                                       the store's file                             │ fsync  → A is durable
//! log thread     ◀── truncate to the last snapshot ≤ A − catch-up entries ─────────────┘
//! ```
//!
//! When too much of the checkpoint would be of no use with the cut in it, everything there is, the
//! cut included, is written to the next checkpoint instead, and the one before goes.
//!
//! Invariants:
//! * The head is written after everything it speaks of, in one batch with all that
//!   is not a record. A crash before it leaves records that were never part of the
//!   checkpoint.
//! * What compaction removed stays in the file, and each start compacts it once more, until
//!   the checkpoint is written anew, without it.
//! * The log is truncated only to what a durable checkpoint has passed.
//! * The head's index never goes back: leases are written in place, so an older head
//!   beside newer leases would be the state of no index at all.
//!
//! A checkpoint of format 1 has its records in sled: there they are written in batches, a
//! crash leaves some above the head's revision, which recovery deletes, and those that
//! compaction removed are deleted one by one, after a durable head says so.

mod install;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::oneshot;
// The same as std's, but for tests that move time.
use tokio::time::Instant;

pub use self::install::Install;
pub(crate) use self::install::Installing;
use super::apply_thread::ApplyTask;
use super::fault::Fault;
use super::image::FillError;
use super::log_thread::LogTask;
use super::pins::Pins;
use super::published::Published;
use super::raft_thread::Flow;
use super::records;
use super::space::{self, RESERVE_BYTES, STORE_BYTES_PER_BYTE, Shortage};
use crate::error::Error;
use crate::log::Mark;
use crate::metrics::Metrics;
use crate::mvcc::{Revision, record_bytes};
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
/// Free space that a checkpoint takes, in bytes, beside its records: a store that runs
/// into the end of its disk must be opened anew, which is better avoided.
const STORE_SPARE_BYTES: u64 = 8 << 20;
/// With less free space, in bytes, nothing is deleted: a page of large values that loses
/// one of them is written anew.
const DELETE_FREE_BYTES: u64 = 2 * RESERVE_BYTES;
/// Space that a rewrite leaves to the log, in bytes.
const REWRITE_SPARES_BYTES: u64 = 32 << 20;
/// Steps that are taken with each cut to count what is kept: a million changes that are to be
/// removed, about a tenth of a second. After more the checkpoint is written anew later.
const KEPT_STEPS_MAX: usize = 256;
/// A rewrite rests after this many bytes of records: about those of one sync.
const PACE_BYTES: usize = 512 << 10;
/// And rests no longer than this.
const REST_MAX: Duration = Duration::from_millis(100);

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
    /// [`Error::NoSpace`] when there is no space for both. All that wait by then are answered at
    /// once; for somebody who has gone nothing is done.
    Rewrite(oneshot::Sender<Result<(), Error>>),
    /// Replace the checkpoint, the state and the log by an image from another member.
    Install(Box<Install>),
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
    shortage: Arc<Shortage>,
}

impl Checkpointer {
    /// `snapshot_index` is that of the last snapshot, as far as it is known, `applied_index`
    /// what was recovered; `busy` and `shortage` are shared with the checkpoint thread.
    pub fn new(
        tasks: Sender<CheckpointTask>,
        busy: Arc<AtomicBool>,
        shortage: Arc<Shortage>,
        snapshot_count: u64,
        snapshot_index: u64,
        applied_index: u64,
    ) -> Checkpointer {
        Checkpointer {
            tasks,
            busy,
            shortage,
            snapshot_count,
            snapshot_index,
            applied_index,
            dirty_bytes: 0,
            dirty_since: None,
        }
    }

    /// Takes note of what was applied.
    pub fn note(&mut self, state: &StateMachine) {
        let dirty = state.dirty();
        self.applied_index = state.applied().index;
        self.dirty_bytes = dirty.records_bytes;
        self.shortage.set_dirty_bytes(dirty.records_bytes);
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
        self.shortage.set_cut_bytes(cut.dirty.records_bytes);
        self.shortage.set_dirty_bytes(0);
        self.dirty_bytes = 0;
        self.dirty_since = None;
        // The checkpoint thread ends only when told to, or with a fault raised.
        let _ = self.tasks.send(CheckpointTask::Write(cut, reason));
    }

    /// The state was replaced by one that its checkpoint holds, which is like a snapshot.
    pub fn replaced(&mut self, state: &StateMachine) {
        self.snapshot_index = state.applied().index;
        self.dirty_since = None;
        self.note(state);
    }

    fn reason_now(&self) -> Option<CutReason> {
        if self.applied_index.saturating_sub(self.snapshot_index) > self.snapshot_count {
            Some(CutReason::Snapshot)
        } else {
            (self.dirty_bytes >= DIRTY_BYTES_SOON).then_some(CutReason::Dirty)
        }
    }
}

/// Records that compaction removed from the state, and that the store has or may come to
/// have again.
#[derive(Debug, Default)]
pub struct Removed {
    /// In the order they are to be deleted in.
    revisions: VecDeque<Revision>,
    /// So many of them, from the front, are deleted, but not durably.
    deleted: usize,
}

impl Removed {
    fn is_any_left(&self) -> bool {
        self.deleted < self.revisions.len()
    }

    /// Those that are yet to be deleted.
    fn left(&self) -> impl Iterator<Item = Revision> {
        self.revisions.range(self.deleted..).copied()
    }

    /// The store was synced.
    fn synced(&mut self) {
        self.revisions.drain(..self.deleted);
        self.deleted = 0;
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
    /// Where the state is replaced.
    pub apply: Sender<ApplyTask>,
    /// The applied index of the checkpoint as it is on disk.
    pub durable_index: u64,
    /// What the checkpoint took beside its records (for leases, say) when this thread last wrote
    /// it anew, in bytes; 0 before that.
    pub overhead_bytes: u64,
    /// The revision that goes with it.
    pub durable_revision: i64,
    /// Told the checkpoint's size.
    pub published: Arc<Published>,
    /// Set while a cut is under way; cleared by this thread.
    pub busy: Arc<AtomicBool>,
    /// Where the store is, to ask how much space there is; `None` when in memory.
    pub directory: Option<PathBuf>,
    /// Told while the store waits for space; writes are refused meanwhile.
    pub shortage: Arc<Shortage>,
    /// While `storage` is `None`: the checkpoint that counts may be opened anew.
    pub reopen: bool,
    /// Records that compaction removed; empty at first.
    pub removed: Removed,
    /// `--snapshot-catchup-entries`.
    pub catch_up_entries: u64,
    /// Snapshots that the log still reaches back to, oldest first: the places to
    /// truncate it at.
    pub snapshots: VecDeque<Mark>,
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

    fn run_until_stopped(&mut self) -> Result<(), CheckpointError> {
        let mut under_way = UnderWay::default();
        loop {
            if let Some(installing) = under_way.installing.take()
                && !self.finish_install(installing)
            {
                return Ok(());
            }
            let task = match (under_way.passed.pop_front(), &under_way.cut) {
                (Some(task), _) => Ok(task),
                (None, None) => self.tasks.recv().map_err(|_| RecvTimeoutError::Disconnected),
                (None, Some(_)) => self.tasks.recv_timeout(FULL_RETRY),
            };
            if self.turn(task, &mut under_way)? == Flow::Stop {
                return Ok(());
            }
        }
    }

    /// Does one task, and writes the cut that waits if there is space.
    pub(crate) fn turn(
        &mut self,
        task: Result<CheckpointTask, RecvTimeoutError>,
        under_way: &mut UnderWay,
    ) -> Result<Flow, CheckpointError> {
        match task {
            Ok(CheckpointTask::Write(cut, reason)) => {
                under_way.cut = Some(WaitingCut { cut, reason, since: Instant::now() });
            }
            Ok(CheckpointTask::Rewrite(done)) => self.rewrite_for(done, &mut under_way.passed)?,
            Ok(CheckpointTask::Install(install)) => match self.begin_install(*install)? {
                Some(installing) => under_way.installing = Some(installing),
                None => return Ok(Flow::Stop),
            },
            // What waits for space is in the log.
            Ok(CheckpointTask::Stop) | Err(RecvTimeoutError::Disconnected) => {
                return Ok(Flow::Stop);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(cut) = &under_way.cut
            && self.write(cut)?
        {
            under_way.cut = None;
        }
        Ok(Flow::GoOn)
    }

    /// Writes everything anew for all who wait for that, whatever waits between them: it is all
    /// they want. What else there is to do is left in `passed`, in its order.
    fn rewrite_for(
        &mut self,
        first: oneshot::Sender<Result<(), Error>>,
        passed: &mut VecDeque<CheckpointTask>,
    ) -> Result<(), StorageError> {
        let mut waiting = vec![first];
        passed.extend(self.tasks.try_iter());
        for task in std::mem::take(passed) {
            match task {
                CheckpointTask::Rewrite(done) => waiting.push(done),
                other => passed.push_back(other),
            }
        }
        waiting.retain(|done| !done.is_closed());
        if waiting.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        self.metrics.disk_defrag_inflight.set(1);
        let rewritten = self.rewrite_where_there_is_space();
        self.metrics.disk_defrag_inflight.set(0);
        self.metrics.disk_backend_defrag_duration_seconds.observe(began.elapsed().as_secs_f64());
        let rewritten = rewritten?;
        for done in waiting {
            // Whoever asked may have gone meanwhile.
            let _ = done.send(rewritten.clone());
        }
        Ok(())
    }

    /// Writes a cut if there is space for it; `false` if there is none. Nothing is lost
    /// meanwhile: the log holds what the checkpoint lacks, and no write that takes space is
    /// admitted.
    fn write(&mut self, waiting: &WaitingCut) -> Result<bool, StorageError> {
        let WaitingCut { cut, reason, since } = waiting;
        // Everything was written anew while the cut waited, and the checkpoint holds it; or a
        // snapshot was installed, and the log does not reach back to the cut.
        let is_superseded = cut.head.applied_index < self.durable_index;
        let cut_bytes = records::new_bytes(cut, self.durable_revision);
        if !is_superseded && !self.write_where_there_is_space(cut, cut_bytes)? {
            if !self.shortage.set_checkpoint_waits(true) {
                tracing::error!(
                    needed_bytes = needed_bytes(cut_bytes),
                    "the checkpoint waits for space on its disk: \
                     writes that take space are refused until it has some"
                );
            }
            return Ok(false);
        }
        if self.shortage.set_checkpoint_waits(false) {
            tracing::info!("the checkpoint has space again");
        }
        self.shortage.set_cut_bytes(0);
        self.busy.store(false, Ordering::Release);
        if !is_superseded {
            self.tell(cut, *reason, since.elapsed())?;
        }
        Ok(true)
    }

    /// Adds a cut to the checkpoint, or writes that anew with it. `cut_bytes` are its records that
    /// the checkpoint lacks.
    fn write_where_there_is_space(
        &mut self,
        cut: &Cut,
        cut_bytes: u64,
    ) -> Result<bool, StorageError> {
        // The cut is in what is written anew, and not beside it too.
        let is_due = self.is_worth_rewriting(cut_bytes)?;
        if is_due && self.rewrite_where_there_is_space()?.is_ok() {
            return Ok(true);
        }
        if self.has_free(needed_bytes(cut_bytes)) && self.has_storage()? {
            let Some(storage) = self.storage.as_deref_mut() else { return Ok(false) };
            let began = Instant::now();
            return match records::write(storage, cut, self.durable_revision) {
                Ok(()) => {
                    // Not of a rewrite: that takes its time, and would look like a slow disk.
                    let took = began.elapsed().as_secs_f64();
                    self.metrics.disk_backend_commit_duration_seconds.observe(took);
                    self.durable_index = cut.head.applied_index;
                    self.durable_revision = cut.head.revision;
                    self.removed.synced();
                    self.removed.revisions.extend(&cut.dirty.removed);
                    self.delete_removed()?;
                    Ok(true)
                }
                Err(error) if error.is_full() => {
                    self.close_full_storage(&error);
                    Ok(false)
                }
                Err(error) => Err(error),
            };
        }
        // Everything is in memory, this cut included. It may be that compaction has left
        // so little that all of it fits where what was there before does not.
        Ok(!is_due && self.rewrite_where_there_is_space()?.is_ok())
    }

    /// Deletes what compaction removed. Piece by piece that takes space before it gives any
    /// back, and none to anybody else; where there is little, all is written anew instead if
    /// that is worth it, or else what is removed stays for now, which does no harm.
    fn delete_removed(&mut self) -> Result<(), StorageError> {
        while self.removed.is_any_left() && self.has_free(DELETE_FREE_BYTES) {
            let Some(storage) = self.storage.as_deref_mut() else { return Ok(()) };
            match records::delete(storage, self.removed.left()) {
                Ok(count) => self.removed.deleted += count,
                Err(error) if error.is_full() => self.close_full_storage(&error),
                Err(error) => return Err(error),
            }
        }
        let Some(storage) = &self.storage else { return Ok(()) };
        let on_disk_bytes = storage.size_on_disk()?;
        if self.removed.is_any_left()
            && on_disk_bytes / 2 > needed_bytes(records::kept_bytes(&self.state, usize::MAX))
        {
            // If there is no space for it either, there may be the next time.
            let _ = self.rewrite_where_there_is_space()?;
        }
        Ok(())
    }

    /// The store ran into the end of the disk and is of no use any more. It is opened anew
    /// when there is space, if that is safe.
    fn close_full_storage(&mut self, error: &StorageError) {
        tracing::error!(%error, "the checkpoint's disk is full");
        if let Some(mut storage) = self.storage.take() {
            self.reopen = storage.may_be_reopened();
        }
        // Opened anew it may have again what was deleted since the last sync.
        self.removed.deleted = 0;
    }

    /// Whether there is a store to go on with: the one that ran into the end of the disk,
    /// perhaps, opened anew. All earlier cuts are in there, durably.
    fn has_storage(&mut self) -> Result<bool, StorageError> {
        if self.storage.is_none() && self.reopen {
            match self.generations.reopen() {
                Ok(storage) => self.storage = Some(storage),
                Err(error) => {
                    tracing::warn!(%error, "cannot go on with the checkpoint that failed");
                    self.reopen = error.is_full();
                }
            }
        }
        Ok(self.storage.is_some())
    }

    /// The cut is durable.
    fn tell(&mut self, cut: &Cut, reason: CutReason, took: Duration) -> Result<(), StorageError> {
        let index = cut.head.applied_index;
        let took = took.as_secs_f64();
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

    fn has_free(&self, bytes: u64) -> bool {
        let free = self.directory.as_deref().and_then(space::free_bytes);
        free.is_none_or(|free| free >= bytes)
    }

    /// Writes everything there is into the next checkpoint, which then counts, and gives
    /// back the one before. Refused rather than that it leaves the log without space; then,
    /// and after an error, the one before counts.
    fn rewrite_where_there_is_space(&mut self) -> Result<Result<(), Error>, StorageError> {
        let needed_bytes = space::rewritten_bytes(records::kept_bytes(&self.state, usize::MAX))
            .saturating_add(STORE_SPARE_BYTES);
        if !self.has_free(needed_bytes.saturating_add(REWRITE_SPARES_BYTES)) {
            let free_bytes = self.directory.as_deref().and_then(space::free_bytes);
            tracing::debug!(needed_bytes, free_bytes, "no space to write the checkpoint anew");
            return Ok(Err(Error::NoSpace));
        }
        match self.write_next() {
            Ok(next) => {
                // Closes the one before, and then its space can go.
                self.storage = Some(next);
                self.generations.discard();
                self.removed = Removed::default();
                Ok(Ok(()))
            }
            Err(error) if error.is_full() => {
                self.generations.discard();
                tracing::warn!(%error, "no space to write the checkpoint anew");
                Ok(Err(Error::NoSpace))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether much more is taken than is needed once a cut is added that has so many bytes.
    fn is_worth_rewriting(&self, cut_bytes: u64) -> Result<bool, StorageError> {
        let Some(storage) = &self.storage else { return Ok(false) };
        let on_disk_bytes = storage.size_on_disk()?.saturating_add(cut_bytes);
        let is_due =
            |kept_bytes| space::is_rewrite_due(on_disk_bytes, kept_bytes, self.overhead_bytes);
        // Counted only where it may matter, and with each cut not for long.
        if !is_due(0) {
            return Ok(false);
        }
        let kept_bytes = records::kept_bytes(&self.state, KEPT_STEPS_MAX);
        let is_worth_it = is_due(kept_bytes);
        if is_worth_it {
            tracing::debug!(on_disk_bytes, kept_bytes, "the checkpoint takes too much space");
        }
        Ok(is_worth_it)
    }

    fn write_next(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        let mut next = self.generations.begin()?;
        let (image, records) = records::image(&self.state, &self.pins);
        let mut pace = Pace::begin();
        let mut written_bytes = 0;
        let (shortage, published) = (&self.shortage, &self.published);
        // Nobody who waits for this thread waits for its rests.
        let is_awaited = || shortage.is_behind() || *published.stopped.borrow();
        let mut records = records.inspect(|(.., kv)| {
            written_bytes += record_bytes(kv);
            pace.note(kv.len(), is_awaited);
        });
        records::fill_with(next.as_mut(), &image, &mut records)?;
        self.generations.switch()?;
        let on_disk_bytes = next.size_on_disk()?;
        self.published.set_checkpoint_bytes(on_disk_bytes);
        self.overhead_bytes = on_disk_bytes.saturating_sub(space::rewritten_bytes(written_bytes));
        self.durable_index = image.head.applied_index;
        self.durable_revision = image.head.revision;
        tracing::info!(applied_index = self.durable_index, "wrote the checkpoint anew");
        Ok(next)
    }
}

/// Why the checkpoint thread cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckpointError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("cannot install a snapshot: {0}")]
    Install(#[from] FillError),
}

/// What is not done in one turn.
#[derive(Default)]
pub(crate) struct UnderWay {
    cut: Option<WaitingCut>,
    /// Comes before the tasks that have yet to be received.
    passed: VecDeque<CheckpointTask>,
    /// Nothing else is done before it is.
    pub(crate) installing: Option<Installing>,
}

#[cfg(test)]
impl UnderWay {
    pub(crate) fn waits_for_space(&self) -> bool {
        self.cut.is_some()
    }

    /// The next task, if there is one.
    pub(crate) fn next(&mut self, tasks: &Receiver<CheckpointTask>) -> Option<CheckpointTask> {
        self.passed.pop_front().or_else(|| tasks.try_recv().ok())
    }
}

/// A cut on its way to the disk.
struct WaitingCut {
    cut: Box<Cut>,
    reason: CutReason,
    since: Instant,
}

/// Makes the thread rest for as long as it works while it writes a checkpoint anew, so that
/// those who serve have the disk and a processor to themselves half of the time.
struct Pace {
    bytes: usize,
    since: std::time::Instant,
}

impl Pace {
    fn begin() -> Pace {
        Pace { bytes: 0, since: std::time::Instant::now() }
    }

    fn note(&mut self, bytes: usize, is_awaited: impl Fn() -> bool) {
        self.bytes += bytes;
        if self.bytes >= PACE_BYTES {
            if !is_awaited() {
                std::thread::sleep(self.since.elapsed().min(REST_MAX));
            }
            *self = Pace::begin();
        }
    }
}

/// What must be free to write records of so many bytes.
fn needed_bytes(records_bytes: u64) -> u64 {
    records_bytes.saturating_mul(STORE_BYTES_PER_BYTE).saturating_add(STORE_SPARE_BYTES)
}

#[cfg(test)]
mod tests;
