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

use tokio::sync::oneshot;

use super::{CheckpointError, CheckpointThread, Removed};
use crate::log::{HardState, Mark};
use crate::runtime::apply_thread::{ApplyTask, Replacement};
use crate::runtime::image::{self, FillError};
use crate::runtime::log_thread::LogTask;
use crate::state::StateMachine;
use crate::storage::Storage;
use crate::storage::spool::Spool;

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
        drop(spool);

        self.generations.switch()?;
        self.published.set_checkpoint_bytes(next.size_on_disk()?);
        // Closes the one before, and then its space can go.
        self.storage = Some(next);
        self.reopen = false;
        self.generations.discard();
        self.removed = Removed::default();
        self.snapshots.clear();
        self.durable_index = mark.index;
        self.durable_revision = state.store().revision();

        let (replaced, wait) = sync_channel(1);
        let replacement = Replacement { state, done: replaced };
        let _ = self.apply.send(ApplyTask::Install(Box::new(replacement)));
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
        let mut next = self.generations.begin()?;
        let is_stopped = || *self.published.stopped.borrow();
        let filled = image::fill(spool, next.as_mut(), cluster_id, member_id, is_stopped);
        let restored = match filled {
            Ok(restored) => restored,
            Err(error) => {
                drop(next);
                self.generations.discard();
                return match error {
                    FillError::Stopped => Ok(None),
                    error => Err(error.into()),
                };
            }
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
}

#[cfg(test)]
mod tests;
