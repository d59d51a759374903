//! `--force-new-cluster`: one member of a cluster that lost its majority goes on alone.
//!
//! As in etcd, the log is made to say that the others were removed, and that this was
//! committed; then the member starts as ever, applies it, and is alone:
//!
//! ```text
//! found    … applied │ committed │ tail            commit is somewhere before the tail's end
//! written  … applied │ committed │ tail │ promote this, remove x, remove y │ ◀─ commit
//! ```
//!
//! It is one record of the log: it is there whole or not at all, and doing it again does no
//! harm. Members that are removed stay so: their ids are never used again.
//!
//! etcd drops the tail. Here the log knows how far it is committed only as of its last
//! append, so in the tail are writes that were acknowledged; and of what was not, nobody
//! was told the outcome. So the tail is kept, and committed.
//!
//! A member that was removed must not go on. It knows from the log, if it got so far; most often the
//! others tell it before, and nobody may be left to do so now. So what they said is kept in a file
//! ([`note_removal`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use prost::Message as _;

use crate::log::{HardState, LogError, LogStore, Mark, Recovered};
use crate::pb::kvorumpb::{Command, MemberChange, command::Request, member_change::Change};
use crate::raft::{self, RaftError, change_entry, is_change};
use crate::state::StateMachine;

/// Why the member cannot go on alone.
#[derive(Debug, thiserror::Error)]
pub enum ForceError {
    /// It was removed from the cluster, and knows it.
    #[error(
        "--force-new-cluster: member {0:x} was removed from its cluster, so its data may be \
         old: use the data directory of another member, or restore a snapshot"
    )]
    Removed(u64),
    /// It never had any data.
    #[error(
        "--force-new-cluster: member {0:x} was about to join its cluster and has received no \
         data yet: use the data directory of another member, or restore a snapshot"
    )]
    NoData(u64),
    /// The entries cannot be made.
    #[error(transparent)]
    Raft(#[from] RaftError),
    /// The log failed.
    #[error("cannot write to the raft log: {0}")]
    Log(#[from] LogError),
    /// The member's directory cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
}

/// The file in a member's directory that says that others have told it of its removal.
const TOLD: &str = "removed";

/// Keeps in a member's directory that others have told it of its removal. Where that cannot be
/// written, it is warned of.
pub fn note_removal(member_dir: &Path) {
    let text = "Other members have told this one that it was removed from its cluster.\n";
    let noted = File::create(member_dir.join(TOLD)).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        File::open(member_dir)?.sync_all()
    });
    if let Err(error) = noted {
        let dir = member_dir.display();
        tracing::warn!(%error, %dir, "cannot write down that this member was removed");
    }
}

/// Refuses to leave a member alone that others have told of its removal.
///
/// # Errors
/// [`ForceError::Removed`]; [`ForceError::Directory`].
pub fn refuse_if_told(member_dir: &Path, member_id: u64) -> Result<(), ForceError> {
    match member_dir.join(TOLD).try_exists() {
        Ok(false) => Ok(()),
        Ok(true) => Err(ForceError::Removed(member_id)),
        Err(error) => Err(ForceError::Directory { path: member_dir.to_owned(), error }),
    }
}

/// Removes all members but this one, durably. `state` and `recovered` are what was read
/// back; what is written to the log is in `recovered` too on return.
///
/// # Errors
/// [`ForceError`]; nothing was changed, unless the log failed.
pub fn leave_alone(
    state: &StateMachine,
    log: &mut dyn LogStore,
    recovered: &mut Recovered,
) -> Result<(), ForceError> {
    let this = state.member_id();
    let applied = state.applied().index;
    if applied == 0 {
        return Err(ForceError::NoData(this));
    }
    let record = state.members().get(this).ok_or(ForceError::Removed(this))?;
    let committed = recovered.hard_state.commit.max(applied);
    let mut others: BTreeSet<u64> =
        state.members().records().iter().map(|member| member.id).collect();
    let mut kept = recovered.entries.len();
    for (position, entry) in recovered.entries.iter().enumerate() {
        if entry.index <= applied || !is_change(entry) {
            continue;
        }
        match change_of(&entry.context) {
            Some(Change::Add(member)) => {
                others.insert(member.id);
            }
            Some(Change::Remove(id)) if id == this => {
                if entry.index <= committed {
                    return Err(ForceError::Removed(this));
                }
                // Nobody knows whether it was, and it must not be.
                kept = position;
                break;
            }
            _ => {}
        }
    }
    others.remove(&this);
    recovered.entries.truncate(kept);
    // Raft must not be without a voter in between, so this member comes first.
    let promote = (Change::Promote(this), raft::Change::Vote(this));
    let remove = |id: &u64| (Change::Remove(*id), raft::Change::Remove(*id));
    let changes: Vec<(Change, raft::Change)> =
        record.is_learner.then_some(promote).into_iter().chain(others.iter().map(remove)).collect();
    if changes.is_empty() {
        return Ok(());
    }
    let last = recovered.entries.last();
    let mut place =
        last.map_or(recovered.start, |last| Mark { index: last.index, term: last.term });
    place.term = place.term.max(recovered.hard_state.term);
    let mut entries = Vec::with_capacity(changes.len());
    for (change, of_raft) in changes {
        place.index += 1;
        let change = MemberChange { change: Some(change) };
        // No member has asked for it, so it has no header, and nobody waits for it.
        let command = Command { request: Some(Request::MemberChange(change)), header: None };
        entries.push(change_entry(place, of_raft, command.encode_to_vec())?);
    }
    let hard_state = HardState { term: place.term, commit: place.index, ..recovered.hard_state };
    log.append(&entries, Some(hard_state))?;
    log.sync()?;
    recovered.entries.extend(entries);
    recovered.hard_state = hard_state;
    tracing::warn!(
        local_member_id = format!("{this:x}"),
        removed_members = ?others.iter().map(|id| format!("{id:x}")).collect::<Vec<_>>(),
        wal_commit_index = committed,
        commit_index = hard_state.commit,
        "forcing restart member: all others are removed from the cluster; \
         start without --force-new-cluster from now on"
    );
    Ok(())
}

/// The change that an entry carries; `None` when it is none that this version knows.
fn change_of(command: &[u8]) -> Option<Change> {
    match Command::decode(command).ok()?.request? {
        Request::MemberChange(MemberChange { change }) => change,
        _ => None,
    }
}

#[cfg(test)]
mod tests;
