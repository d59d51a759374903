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
        History::changes(self.0.read().store(), from, max_changes, max_bytes)
    }
}
