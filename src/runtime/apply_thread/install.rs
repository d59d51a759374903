//! Going on with another state: a snapshot from another member took this one's place.
//!
//! It is the same cluster's state at a later index, so to everybody but those who look at what
//! is compacted it is as if many entries had been applied at once:
//!
//! - **Readers** in the middle of a range go on in the new state, which holds the same at
//!   their revision, unless it is compacted further: then they are told so ([`super::Pins`]).
//! - **Watchers** read what they missed from the new state's history. One whose next
//!   revision is compacted there is cancelled with the compact revision, as ever. A revision
//!   never goes back, for that of the new state is not below that of the old.
//! - **Proposers** are told that time is up. Their commands may be among the entries that this
//!   member will never see one by one, and then nobody could tell them what became of these.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use super::{ApplyThread, Progress};
use crate::error::Error;
use crate::runtime::rolling_hashes::At;
use crate::state::StateMachine;

/// The state to go on with.
pub struct Replacement {
    /// As its checkpoint holds it.
    pub state: StateMachine,
    /// Told when it is in place.
    pub done: SyncSender<()>,
}

impl std::fmt::Debug for Replacement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replacement").field("applied", &self.state.applied()).finish()
    }
}

impl ApplyThread {
    /// Replaces the state, unless it is ahead already.
    pub(super) fn install(&mut self, replacement: Replacement, progress: &mut Progress) {
        let Replacement { state: new, done } = replacement;
        let applied = new.applied();
        let mut state = self.state.write();
        if applied.index <= state.applied().index {
            drop(state);
            // Whoever waits need not know that nothing was to be done.
            let _ = done.send(());
            return;
        }
        let revision = new.store().revision();
        let old = std::mem::replace(&mut *state, new);
        self.pins.lose_below(state.store().compact_revision());
        self.leases.state_replaced();
        self.checkpointer.replaced(&state);
        self.published.set_size(state.store().size_in_use_bytes());
        self.published.set_members(&state);
        self.rolling_hashes.replace(At { index: applied.index, hash: state.rolling_hash() });
        drop(state);

        self.published.set_applied(applied.index, applied.term);
        let applied_total = i64::try_from(applied.index).unwrap_or(i64::MAX);
        self.metrics.server_proposals_applied_total.set(applied_total);
        progress.entries.retain(|entry| entry.index > applied.index);
        // What it holds of compacted versions is to be removed like after a start.
        progress.removal = None;
        progress.compact_at = Some(tokio::time::Instant::now() + self.pace.pause);
        self.feed.publish(revision, revision, Arc::default());
        self.waiters.fail_all(&Error::Timeout);
        // Raft hears of it from the log thread: for raft nothing is applied that is not persisted.
        let _ = done.send(());
        // Takes a while, and everybody goes on meanwhile.
        drop(old);
    }
}

#[cfg(test)]
mod tests;
