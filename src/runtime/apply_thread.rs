//! The thread that applies committed entries: the state's only writer.
//!
//! For each turn it takes what waits, decodes it, and applies it under the write
//! lock for about a millisecond at most. Then, in this order, because clients rely
//! on it: the state is visible, watchers are told, proposers are answered.
//!
//! Between turns it does what else changes the state's memory: physical compaction
//! in small steps, and cuts for the checkpoint.

mod install;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::RwLock;
use prost::Message as _;
// The same as std's, but for tests that move time.
use tokio::time::Instant;

pub use self::install::Replacement;
use super::checkpoint_thread::Checkpointer;
use super::fault::Fault;
use super::hashes::{HashJob, HashQueue};
use super::leases::LeaseClock;
use super::pins::Pins;
use super::published::Published;
use super::raft_thread::RaftInput;
use super::rolling_hashes::{At, RollingHashes};
use super::waiters::{Answer, Waiters};
use super::watch_hub::Feed;
use crate::error::Error;
use crate::log::{Entry, Mark};
use crate::metrics::{Metrics, Op};
use crate::pb::etcdserverpb::{TxnResponse, response_op};
use crate::pb::kvorumpb::{Command, CommandHeader};
use crate::raft;
use crate::state::{Effects, LeaseChange, Outcome, Response, StateMachine};

/// Entries applied under one hold of the write lock.
const ENTRIES_PER_LOCK: usize = 256;
/// A hold of the write lock ends after this, however many entries wait.
const LOCK_HELD_MAX: Duration = Duration::from_millis(1);
/// While a reader needs what is left to remove, the thread looks again after this, or after
/// `--compaction-sleep-interval` when that is longer.
const PINNED_PAUSE: Duration = Duration::from_millis(10);

/// What the apply thread is told.
#[derive(Debug)]
pub enum ApplyTask {
    /// Apply these committed entries, which follow the last ones.
    Entries(Vec<Entry>),
    /// Go on with another state, which a durable checkpoint holds.
    Install(Box<Replacement>),
    /// Stop. What is queued, and not yet applied, is applied at the next start.
    Stop,
}

/// Limits of physical compaction: `--compaction-batch-limit`, `--compaction-sleep-interval`.
#[derive(Debug, Clone, Copy)]
pub struct CompactionPace {
    /// Keys looked at in one step.
    pub keys_per_step: usize,
    /// Pause between steps.
    pub pause: Duration,
}

/// Everything the apply thread works with.
pub struct ApplyThread {
    /// The state. Readers share the lock; only this thread writes.
    pub state: Arc<RwLock<StateMachine>>,
    /// What the thread is told.
    pub tasks: Receiver<ApplyTask>,
    /// Whom to tell what is applied.
    pub raft: Sender<RaftInput>,
    /// What the thread tells everybody.
    pub published: Arc<Published>,
    /// Who is told outcomes.
    pub waiters: Arc<Waiters>,
    /// The watchers' feed.
    pub feed: Feed,
    /// Deadlines of leases.
    pub leases: Arc<LeaseClock>,
    /// Revisions that readers need.
    pub pins: Arc<Pins>,
    /// The log's last index when this member started. Compactions up to there were
    /// hashed in an earlier life, if at all, as in etcd.
    pub recovered_index: u64,
    /// Where compactions are hashed.
    pub hashes: HashQueue,
    /// Where cuts go.
    pub checkpointer: Checkpointer,
    /// Rolling hashes, for comparing members.
    pub rolling_hashes: Arc<RollingHashes>,
    /// How fast to compact.
    pub pace: CompactionPace,
    /// An apply that takes longer is logged: `--warning-apply-duration`.
    pub slow_apply: Duration,
    /// Where a fatal error goes.
    pub fault: Fault,
    /// Counters of applied entries and keys.
    pub metrics: Arc<Metrics>,
}

/// Work in progress of this thread.
#[derive(Default)]
pub(crate) struct Progress {
    entries: VecDeque<Entry>,
    /// When the next step of physical compaction is due; `None` when all is done.
    compact_at: Option<Instant>,
    /// The removal under way.
    removal: Option<Removal>,
}

/// What a compaction has removed so far.
struct Removal {
    began: Instant,
    records: usize,
}

/// A command, ready to be applied.
struct Decoded {
    entry: Mark,
    command: Option<Command>,
    /// It changes raft's configuration as well, if it is accepted.
    is_change: bool,
}

/// A command that was applied: what it led to, and what is counted about it.
struct Applied {
    header: Option<CommandHeader>,
    outcome: Outcome,
    op: Option<Op>,
    took: Duration,
    /// How many keys it changed.
    changed: usize,
}

impl ApplyThread {
    /// Runs until told to stop, or until an entry cannot be understood. Whoever waits then
    /// is told.
    pub fn run(mut self) {
        self.run_until_stopped();
        // From here on the raft thread sees that nobody applies, and tells who comes later.
        drop(self.tasks);
        self.waiters.fail_all(&Error::Stopped);
    }

    fn run_until_stopped(&mut self) {
        let mut progress = self.begin();
        loop {
            let received = if progress.entries.is_empty() {
                self.receive(&mut progress)
            } else {
                self.receive_now(&mut progress)
            };
            if received == Received::Stop {
                return;
            }
            if let Err(error) = self.go_on(&mut progress) {
                return self.fault.raise("apply", error);
            }
        }
    }

    /// What is under way when nothing is: see [`ApplyThread::run`].
    fn begin(&self) -> Progress {
        // What was recovered may hold versions that a compaction had yet to remove.
        Progress { compact_at: Some(Instant::now() + self.pace.pause), ..Progress::default() }
    }

    fn go_on(&mut self, progress: &mut Progress) -> Result<(), CorruptEntry> {
        self.apply_some(progress)?;
        // Also while entries keep coming: what is compacted takes memory.
        self.compact(progress);
        self.checkpointer.cut_if_due(&self.state);
        Ok(())
    }

    /// Does what waits, without waiting for more. What a simulator calls instead of
    /// [`ApplyThread::run`]. Returns whether more waits.
    #[cfg(test)]
    pub(crate) fn turn(&mut self, progress: &mut Option<Progress>) -> Result<bool, CorruptEntry> {
        let mut under_way = progress.take().unwrap_or_else(|| self.begin());
        self.receive_now(&mut under_way);
        let went = self.go_on(&mut under_way);
        let more = !under_way.entries.is_empty();
        *progress = Some(under_way);
        went.map(|()| more)
    }

    /// Waits for a task, or for the time of something else to do.
    fn receive(&mut self, progress: &mut Progress) -> Received {
        let now = Instant::now();
        let due = [progress.compact_at, self.checkpointer.due_at()].into_iter().flatten().min();
        let received = match due {
            Some(due) => self.tasks.recv_timeout(due.saturating_duration_since(now)),
            None => self.tasks.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(task) => self.accept(task, progress),
            Err(RecvTimeoutError::Timeout) => Received::Went,
            Err(RecvTimeoutError::Disconnected) => Received::Stop,
        }
    }

    fn receive_now(&mut self, progress: &mut Progress) -> Received {
        while progress.entries.len() < ENTRIES_PER_LOCK {
            match self.tasks.try_recv() {
                Ok(task) => match self.accept(task, progress) {
                    Received::Stop => return Received::Stop,
                    Received::Went => {}
                },
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Received::Stop,
            }
        }
        Received::Went
    }

    fn accept(&mut self, task: ApplyTask, progress: &mut Progress) -> Received {
        match task {
            ApplyTask::Entries(entries) => progress.entries.extend(entries),
            ApplyTask::Install(replacement) => self.install(*replacement, progress),
            ApplyTask::Stop => return Received::Stop,
        }
        Received::Went
    }

    /// Applies what fits under one hold of the lock, and tells everybody.
    fn apply_some(&mut self, progress: &mut Progress) -> Result<(), CorruptEntry> {
        let batch: Vec<Entry> =
            progress.entries.drain(..progress.entries.len().min(ENTRIES_PER_LOCK)).collect();
        let mut decoded = VecDeque::with_capacity(batch.len());
        for entry in batch {
            decoded.push_back(decode(entry)?);
        }
        while !decoded.is_empty() {
            self.apply_under_lock(&mut decoded, progress);
        }
        Ok(())
    }

    fn apply_under_lock(&mut self, decoded: &mut VecDeque<Decoded>, progress: &mut Progress) {
        let mut effects = Effects::default();
        let mut applied = Vec::with_capacity(decoded.len());
        let mut rolling_hashes = Vec::with_capacity(decoded.len());
        let mut last = Mark::default();
        let began = Instant::now();

        let mut state = self.state.write();
        let revision_before = state.store().revision();
        let mut held = began.elapsed();
        while let Some(Decoded { entry, command, is_change }) = decoded.pop_front() {
            last = entry;
            let Some(command) = command else {
                state.apply_empty(entry);
                rolling_hashes.push(At { index: entry.index, hash: state.rolling_hash() });
                continue;
            };
            let header = command.header;
            let op = command.request.as_ref().map(Op::from);
            let changes_before = effects.changes.len();
            let outcome = state.apply(entry, command, &mut effects);
            rolling_hashes.push(At { index: entry.index, hash: state.rolling_hash() });
            let changed = effects.changes.len() - changes_before;
            if is_change {
                let (index, is_accepted) = (entry.index, outcome.is_ok());
                let _ = self.raft.send(RaftInput::Changed { index, is_accepted });
            }
            if entry.index <= self.recovered_index {
                effects.compactions.clear();
            }
            let now = began.elapsed();
            let took = now.saturating_sub(held);
            held = now;
            applied.push(Applied { header, outcome, op, took, changed });
            if held >= LOCK_HELD_MAX {
                break;
            }
        }
        let revision = state.store().revision();
        self.checkpointer.note(&state);
        self.leases.take_note(&effects.leases, state.lessor());
        self.published.set_size(state.store().size_in_use_bytes());
        if effects.members_changed {
            self.published.set_members(&state);
        }
        for hash in std::mem::take(&mut effects.compactions) {
            // Pinned before anything it reads can be removed.
            self.hashes.push(HashJob::new(hash, &self.pins));
        }
        drop(state);

        self.rolling_hashes.extend(&rolling_hashes);
        self.published.set_applied(last.index, last.term);
        self.count(&applied, &effects, last);
        if !effects.changes.is_empty() {
            self.feed.publish(revision_before, revision, Arc::from(effects.changes));
        }
        let took = began.elapsed();
        if took >= self.slow_apply {
            self.metrics.server_slow_apply_total.inc();
            tracing::warn!(took = ?took, expected = ?self.slow_apply, entries = applied.len(), "apply request took too long");
        }
        self.answer(applied, progress);
        self.waiters.overtake(last.term);
        // The raft thread outlives this one, or is gone and does not care.
        let _ = self.raft.send(RaftInput::Applied(last.index));
        self.checkpointer.cut_if_due(&self.state);
    }

    /// Tells proposers what became of their commands.
    fn answer(&self, applied: Vec<Applied>, progress: &mut Progress) {
        for Applied { header, outcome, .. } in applied {
            if matches!(outcome, Ok(Response::Compact(_))) {
                progress.compact_at = Some(Instant::now());
                progress.removal.get_or_insert_with(Removal::begin);
            }
            if let Some(waiter) = header.and_then(|header| self.waiters.take(&header)) {
                // A caller that gave up does not want to know.
                let _ = waiter.send(Answer::Applied(outcome));
            }
        }
    }

    /// As etcd counts: keys for puts, operations for deletes.
    fn count(&self, applied: &[Applied], effects: &Effects, last: Mark) {
        let metrics = &self.metrics;
        metrics.server_proposals_applied_total.set(last.index as i64);

        let (mut puts, mut put_bytes) = (0, 0);
        for change in effects.changes.iter().filter(|change| !change.deleted) {
            puts += 1;
            put_bytes += change.key.len() + change.value_len();
        }
        metrics.mvcc_put_total.inc_by(puts);
        metrics.debugging_mvcc_total_put_size_in_bytes.add(put_bytes as i64);

        let mut deletes = 0;
        for Applied { outcome, op, took, changed, .. } in applied {
            if let Some(op) = *op {
                let success = matches!(outcome, Ok(_) | Err(Error::Compacted));
                metrics.server_apply_duration_seconds.observe(op, success, *took);
                deletes += match outcome {
                    Ok(Response::DeleteRange(_)) => 1,
                    Ok(Response::Txn(response)) => deletes_in(response),
                    // A lease's keys are deleted one by one.
                    _ if op == Op::LeaseRevoke => *changed as u64,
                    _ => 0,
                };
            }
            if let Ok(Response::LeaseGrant(response)) = outcome {
                metrics.debugging_lease_granted_total.inc();
                metrics.debugging_lease_ttl_total.observe(response.ttl as f64);
            }
        }
        metrics.mvcc_delete_total.inc_by(deletes);
        let revoked =
            effects.leases.iter().filter(|change| matches!(change, LeaseChange::Revoked(_)));
        metrics.debugging_lease_revoked_total.inc_by(revoked.count() as u64);
    }

    /// One step of physical compaction, when it is due.
    fn compact(&mut self, progress: &mut Progress) {
        if progress.compact_at.is_none_or(|due| due > Instant::now()) {
            return;
        }
        // Looked up beside the readers: nobody is shut out for a step that removes nothing.
        if self.state.read().store().is_compaction_pinned(self.floor()) {
            progress.compact_at = Some(Instant::now() + self.pace.pause.max(PINNED_PAUSE));
            return;
        }
        let began = Instant::now();
        let mut state = self.state.write();
        let floor = self.floor();
        let waiting = state.dirty().removed.len();
        let done = state.compact_step(floor, self.pace.keys_per_step);
        let removed = state.dirty().removed.len() - waiting;
        let compact_revision = state.store().compact_revision();
        self.checkpointer.note(&state);
        self.published.set_size(state.store().size_in_use_bytes());
        drop(state);
        let metrics = &self.metrics;
        metrics
            .debugging_mvcc_db_compaction_pause_duration_milliseconds
            .observe(milliseconds(began.elapsed()));
        metrics.debugging_mvcc_db_compaction_keys_total.inc_by(removed as u64);
        if removed > 0 {
            progress.removal.get_or_insert_with(Removal::begin).records += removed;
        }
        progress.compact_at = (!done).then(|| Instant::now() + self.pace.pause);
        if done {
            if let Some(Removal { began, records }) = progress.removal.take() {
                let took = began.elapsed();
                metrics
                    .debugging_mvcc_db_compaction_total_duration_milliseconds
                    .observe(milliseconds(took));
                metrics.debugging_mvcc_db_compaction_last.set(unix_seconds());
                tracing::info!(compact_revision, ?took, records, "finished scheduled compaction");
            }
            self.published.removed_below.send_replace(compact_revision);
        }
    }

    /// What is compacted and not below this has to stay.
    fn floor(&self) -> i64 {
        self.pins.lowest().unwrap_or(i64::MAX)
    }
}

impl Removal {
    fn begin() -> Removal {
        Removal { began: Instant::now(), records: 0 }
    }
}

#[derive(PartialEq)]
enum Received {
    Went,
    Stop,
}

/// A committed entry that is not a command. The log's checksum held, so another
/// program or a newer version wrote it.
#[derive(Debug, thiserror::Error)]
#[error(
    "entry {index} of the raft log is not a command this version understands ({error}); \
     start the version that wrote it, or restore from a snapshot"
)]
pub(crate) struct CorruptEntry {
    index: u64,
    error: prost::DecodeError,
}

fn decode(entry: Entry) -> Result<Decoded, CorruptEntry> {
    let mark = Mark { index: entry.index, term: entry.term };
    let is_change = raft::is_change(&entry);
    let command = raft::command(&entry).map(|command| Command::decode(command.clone()));
    let command = command.transpose().map_err(|error| CorruptEntry { index: mark.index, error })?;
    Ok(Decoded { entry: mark, command, is_change })
}

/// Delete operations that a transaction carried out.
fn deletes_in(response: &TxnResponse) -> u64 {
    let deletes = response.responses.iter().map(|one| match &one.response {
        Some(response_op::Response::ResponseDeleteRange(_)) => 1,
        Some(response_op::Response::ResponseTxn(inner)) => deletes_in(inner),
        _ => 0,
    });
    deletes.sum()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
