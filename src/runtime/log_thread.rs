//! The thread that writes the raft log.
//!
//! It takes everything that waits, writes it at once and syncs it once: the more
//! waits, the less each write pays for the disk (group commit). Only then are the
//! writes reported as persisted. A failed write or sync is never retried: what the
//! disk then holds is unknown, so the member stops.
//!
//! Each write proves that the one before was synced. When none comes for a moment,
//! an empty one does, so that damage to the last is not taken for a write that a crash
//! cut short.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::raft_thread::{Flow, RaftInput};
use super::timing::SyncTimes;
use crate::log::{HardState, LogError, LogStore, Mark};
use crate::metrics::Metrics;
use crate::raft::Append;

/// At most this many appends are synced together. They are in memory anyway; the
/// limit keeps the first of them from waiting for a very long write.
const APPENDS_PER_SYNC: usize = 1024;

/// After so long without anything to write, there is proof of the last write.
const ATTEST_AFTER: Duration = Duration::from_millis(10);

/// What the log thread is told.
#[derive(Debug)]
pub enum LogTask {
    /// Make this durable, then report it.
    Append(Append),
    /// Everything up to here is in a durable checkpoint.
    Truncate(Mark),
    /// A snapshot is in the checkpoint that counts: begin anew after it, then report that
    /// like a write.
    Install {
        /// Where the snapshot ends. The state is there already, and raft is told so.
        start: Mark,
        /// Term, vote and commit from then on.
        hard_state: HardState,
        /// What is reported as persisted.
        number: u64,
        /// Told when it is done.
        done: SyncSender<()>,
    },
    /// Stop, with everything before it durable.
    Stop,
}

/// Everything the log thread works with.
pub struct LogThread {
    /// The log, owned by this thread.
    pub log: Box<dyn LogStore>,
    /// What the thread is told.
    pub tasks: Receiver<LogTask>,
    /// Whom to tell what is persisted.
    pub raft: Sender<RaftInput>,
    /// Where a fatal error goes.
    pub fault: Fault,
    /// Whether elections suit the disk.
    pub sync_times: SyncTimes,
    /// Asked whether there are other members: one that is alone has no elections to lose.
    pub has_peers: Box<dyn Fn() -> bool + Send>,
    /// Sync times and bytes.
    pub metrics: Arc<Metrics>,
}

impl LogThread {
    /// Runs until told to stop or the disk fails.
    pub fn run(mut self) {
        if let Err(error) = self.run_until_stopped() {
            self.fault.raise("raft log", error);
        }
    }

    fn run_until_stopped(&mut self) -> Result<(), LogError> {
        let mut is_proven = false;
        loop {
            let first = if is_proven {
                self.tasks.recv().map_err(RecvTimeoutError::from)
            } else {
                self.tasks.recv_timeout(ATTEST_AFTER)
            };
            match first {
                Ok(first) => {
                    if self.turn(first)? == Flow::Stop {
                        return Ok(());
                    }
                    is_proven = false;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.log.attest()?;
                    is_proven = true;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Does what waits, of which `first` was taken already.
    pub(crate) fn turn(&mut self, first: LogTask) -> Result<Flow, LogError> {
        let mut stop = false;
        let mut truncate = None;
        let mut persisted = None;
        let mut installed = None;
        let waiting = std::iter::once(first).chain(self.tasks.try_iter());
        for task in waiting.take(APPENDS_PER_SYNC) {
            match task {
                LogTask::Append(append) => {
                    self.log.append(&append.entries, append.hard_state)?;
                    persisted = Some(append.number);
                }
                LogTask::Truncate(to) => truncate = Some(to),
                LogTask::Install { start, hard_state, number, done } => {
                    // Durable on return, and with it all that was appended before.
                    self.log.install(start, hard_state)?;
                    // What was to be cut is gone.
                    truncate = None;
                    persisted = Some(number);
                    installed = Some((start, done));
                }
                LogTask::Stop => {
                    stop = true;
                    break;
                }
            }
        }
        if let Some(number) = persisted {
            let stats = self.log.sync()?;
            self.metrics
                .disk_wal_fsync_duration_seconds
                .observe(stats.fsync_duration.as_secs_f64());
            self.metrics
                .disk_wal_write_duration_seconds
                .observe(stats.write_duration.as_secs_f64());
            if (self.has_peers)()
                && let Some(advice) = self.sync_times.note(stats.fsync_duration, Instant::now())
            {
                tracing::warn!("{advice}");
            }
            let written = i64::try_from(stats.bytes).unwrap_or(i64::MAX);
            self.metrics.disk_wal_write_bytes_total.add(written);
            // The raft thread stops before this one does; then nobody waits.
            let _ = self.raft.send(RaftInput::Persisted(number));
        }
        if let Some((start, done)) = installed {
            // The state was replaced before, but raft takes nothing for applied that it
            // does not know to be persisted.
            let _ = self.raft.send(RaftInput::Applied(start.index));
            self.tell_first_index(start);
            tracing::info!(index = start.index, term = start.term, "the log begins anew");
            let _ = done.send(());
        }
        if let Some(to) = truncate {
            self.log.truncate_prefix(to)?;
            self.metrics.kvorum_raft_log_truncations_total.inc();
            self.tell_first_index(to);
            tracing::info!(index = to.index, term = to.term, "compacted Raft logs");
        }
        if stop {
            // Proof that all was synced: what is missing at the next start is damage.
            self.log.close()?;
            return Ok(Flow::Stop);
        }
        Ok(Flow::GoOn)
    }

    fn tell_first_index(&self, start: Mark) {
        let first = i64::try_from(start.index + 1).unwrap_or(i64::MAX);
        self.metrics.kvorum_raft_log_first_index.set(first);
    }
}
