//! Changes of the configuration, and the entries that carry them.
//!
//! While a cluster runs, raft makes the entries when changes are proposed. One that has lost
//! its majority cannot propose anything any more; `--force-new-cluster` then writes them into
//! the log of the member that is left, as if they had been.

use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, EntryType};

use super::RaftError;
use crate::log::{Entry, Mark};

/// A change of who votes and who listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A member votes from now on: a new one, or one that has listened.
    Vote(u64),
    /// A new member listens.
    Listen(u64),
    /// A member is no longer part of it.
    Remove(u64),
}

impl Change {
    pub(super) fn to_raft(self) -> ConfChangeV2 {
        let (kind, id) = match self {
            Change::Vote(id) => (ConfChangeType::AddNode, id),
            Change::Listen(id) => (ConfChangeType::AddLearnerNode, id),
            Change::Remove(id) => (ConfChangeType::RemoveNode, id),
        };
        let single = ConfChangeSingle { change_type: kind, node_id: id, ..Default::default() };
        ConfChangeV2 { changes: vec![single].into(), ..Default::default() }
    }
}

/// The entry at `place` that carries a change: raft's own part of it, and the command that
/// changes the record of the members.
///
/// # Errors
/// The change cannot be encoded.
pub fn change_entry(place: Mark, change: Change, command: Vec<u8>) -> Result<Entry, RaftError> {
    let data = change
        .to_raft()
        .write_to_bytes()
        .map_err(|error| RaftError(format!("cannot encode a change of membership: {error}")))?;
    Ok(Entry {
        index: place.index,
        term: place.term,
        kind: EntryType::EntryConfChangeV2 as u8,
        data: data.into(),
        context: command.into(),
    })
}

/// Whether the entry changes the configuration; its context is the command then.
pub fn is_change(entry: &Entry) -> bool {
    entry.kind == EntryType::EntryConfChangeV2 as u8
}
