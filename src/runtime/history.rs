//! What the watch hub reads of the past: the state's history, under its lock.

use std::sync::Arc;

use parking_lot::RwLock;

use super::watch_hub::History;
use crate::mvcc::watch::{Compacted, Page};
use crate::state::StateMachine;

/// The state, as the hub sees it.
pub struct StateHistory(pub Arc<RwLock<StateMachine>>);

impl History for StateHistory {
    fn revision(&self) -> i64 {
        self.0.read().store().revision()
    }

    fn changes(&self, from: i64, max_changes: usize, max_bytes: usize) -> Result<Page, Compacted> {
        let state = self.0.read();
        let store = state.store();
        if from < store.compact_revision() {
            return Err(Compacted { compact_revision: store.compact_revision() });
        }
        // The page ends where it is full; an iterator that ended there itself would look
        // like the end of history.
        let changes = store.changes(from, usize::MAX);
        Ok(Page::collect(changes, store.revision(), max_changes, max_bytes))
    }
}
