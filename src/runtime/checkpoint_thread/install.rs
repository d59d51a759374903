//! Installing an image from another member: checkpoint, state and log, in this order.
//!
//! ```text
//! 1  next checkpoint filled from the spool, read back, synced    a crash: the old one counts
//! 2  CURRENT names it                                            a crash: recovery does 4
//! 3  the state is replaced                                       (memory)
//! 4  the log begins anew behind it; raft hears that it may go on
//! ```
//!
//! Each step waits for the one before. So no cut of the old state is written over the new
//! checkpoint, and no cut of the new state before the log has begun anew: it would take away
//! the mark `installed` by which recovery knows that step 4 is missing.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{CheckpointError, CheckpointThread, FULL_RETRY, Removed};
use crate::log::{HardState, Mark};
use crate::runtime::apply_thread::{ApplyTask, Replacement};
use crate::runtime::image::{self, FillError};
use crate::runtime::log_thread::LogTask;
use crate::runtime::space;
use crate::state::{Restored, StateMachine};
use crate::storage::Storage;
use crate::storage::spool::Spool;

/// While it waits for space the thread looks this often whether the server stops.
const STOP_POLL: Duration = Duration::from_millis(20);

/// An image that raft has decided to go on from.
#[derive(Debug)]
pub struct Install {
    /// The image, checked.
    pub spool: Spool,
    /// What raft said of it: it has to end there.
    pub mark: Mark,
    /// Raft's durable state with it.
    pub hard_state: HardState,
    /// What raft is told is persisted in the end.
    pub number: u64,
    /// Told when the image is in force.
    pub done: oneshot::Sender<()>,
}

/// An installation that waits for the apply thread, or for the log thread. Neither of them
/// waits for this one. A thread that is gone drops its end: the server stops, or has failed
/// elsewhere, and the next start makes up for the rest.
pub(crate) struct Installing {
    mark: Mark,
    /// What the log thread has yet to be told.
    log: Option<(HardState, u64)>,
    pub(crate) wait: Receiver<()>,
    done: oneshot::Sender<()>,
}

/// The next checkpoint, and the state that it holds.
type Filled = (Box<dyn Storage>, StateMachine);

impl CheckpointThread {
    /// Puts the checkpoint in force, and has the apply thread replace the state. `None` when
    /// the server stops meanwhile.
    pub(super) fn begin_install(
        &mut self,
        install: Install,
    ) -> Result<Option<Installing>, CheckpointError> {
        let Install { mut spool, mark, hard_state, number, done } = install;
        let Some((next, state)) = self.fill_next(&mut spool, mark)? else { return Ok(None) };
        while let Err(error) = self.generations.switch() {
            if !error.is_full() {
                return Err(error.into());
            }
            if !self.wait_for_room(&spool) {
                return Ok(None);
            }
        }
        if self.shortage.set_checkpoint_waits(false) {
            tracing::info!("the disk has space for the snapshot");
        }
        self.published.set_checkpoint_bytes(next.size_on_disk()?);
        // Closes the one before, and then its space can go.
        self.storage = Some(next);
        self.reopen = false;
        self.removed = Removed::default();
        self.snapshots.clear();
        self.overhead_bytes = 0;
        self.durable_index = mark.index;
        self.durable_revision = state.store().revision();

        let (replaced, wait) = sync_channel(1);
        let replacement = Replacement { state, done: replaced };
        let _ = self.apply.send(ApplyTask::Install(Box::new(replacement)));
        // Nobody waits for the space but who wants to write.
        drop(spool);
        self.generations.discard();
        let log = Some((hard_state, number));
        Ok(Some(Installing { mark, log, wait, done }))
    }

    /// Waits until an installation is done; `false` when the server stops meanwhile.
    pub(super) fn finish_install(&self, installing: Installing) -> bool {
        let mut under_way = Some(installing);
        while let Some(installing) = under_way {
            if installing.wait.recv().is_err() {
                return false;
            }
            under_way = self.go_on_installing(installing);
        }
        true
    }

    #[cfg(test)]
    fn install(&mut self, install: Install) -> Result<bool, CheckpointError> {
        let begun = self.begin_install(install)?;
        Ok(begun.is_some_and(|installing| self.finish_install(installing)))
    }

    /// What was waited for is done: has the log begin anew, or says that all is.
    pub(crate) fn go_on_installing(&self, installing: Installing) -> Option<Installing> {
        let Installing { mark, log, done, .. } = installing;
        let Some((hard_state, number)) = log else {
            tracing::info!(index = mark.index, term = mark.term, "installed a snapshot");
            // The sender may have gone.
            let _ = done.send(());
            return None;
        };
        let (begun, wait) = sync_channel(1);
        let _ = self.log.send(LogTask::Install { start: mark, hard_state, number, done: begun });
        Some(Installing { mark, log: None, wait, done })
    }

    /// The next checkpoint with the image in it, and the state that it holds. `None` when the
    /// server stops. After an error the checkpoint before counts, and the log with it.
    fn fill_next(
        &mut self,
        spool: &mut Spool,
        mark: Mark,
    ) -> Result<Option<Filled>, CheckpointError> {
        let (cluster_id, member_id) = {
            let state = self.state.read();
            (state.members().cluster_id(), state.member_id())
        };
        let filled = loop {
            if self.has_room(spool) {
                match self.fill_once(spool, cluster_id, member_id) {
                    Err(error) if error.is_full() => {}
                    filled => break filled,
                }
            }
            if !self.wait_for_room(spool) {
                return Ok(None);
            }
        };
        let (next, restored) = match filled {
            Ok(filled) => filled,
            Err(FillError::Stopped) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let state = StateMachine::restore(restored);
        if state.applied() != mark || mark.index <= self.durable_index {
            drop(next);
            self.generations.discard();
            let (found, durable_index) = (state.applied(), self.durable_index);
            return Err(FillError::OtherIndex { found, expected: mark, durable_index }.into());
        }
        Ok(Some((next, state)))
    }

    /// One attempt to fill the next checkpoint; nothing is left of one that failed.
    fn fill_once(
        &mut self,
        spool: &mut Spool,
        cluster_id: u64,
        member_id: u64,
    ) -> Result<(Box<dyn Storage>, Restored), FillError> {
        let mut next = self.generations.begin()?;
        let is_stopped = || *self.published.stopped.borrow();
        match image::fill(spool, next.as_mut(), cluster_id, member_id, &is_stopped) {
            Ok(restored) => Ok((next, restored)),
            Err(error) => {
                drop(next);
                self.generations.discard();
                Err(error)
            }
        }
    }

    fn has_room(&self, spool: &Spool) -> bool {
        let directory = self.directory.as_deref();
        directory.is_none_or(|at| space::has_room_for_image(at, spool.len()))
    }

    /// Raft has decided to go on from the image, so there is no way back, and the member waits
    /// until its disk has space. `false` when the server stops.
    fn wait_for_room(&self, spool: &Spool) -> bool {
        if !self.shortage.set_checkpoint_waits(true) {
            let image_bytes = spool.len();
            tracing::error!(
                image_bytes,
                "a snapshot of the leader waits for space on this member's disk, and the member \
                 does not follow until it has some"
            );
        }
        let until = Instant::now() + FULL_RETRY;
        while Instant::now() < until {
            if *self.published.stopped.borrow() {
                return false;
            }
            thread::sleep(STOP_POLL);
        }
        !*self.published.stopped.borrow()
    }
}

#[cfg(test)]
mod tests;
