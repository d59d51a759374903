//! A single member whose file `CURRENT` is damaged or missing, while its checkpoint is intact.
//!
//! ```text
//! ckpt-3  intact, and the log goes on from it   ─┐ exactly one such: CURRENT names it again
//! ckpt-4  never finished: it has no head         ┘
//! ckpt-3  intact     ckpt-4  intact, or damaged  ── refused: the operator writes which one, and is
//! ```                                               told of those only that the log goes on from
//!
//! Members of clusters have peers, from whom they get what they lack as before ([`super::heal`]).
//!
//! # Why this is safe
//!
//! `CURRENT` says which checkpoint counts so that a start need not find out. It promises nothing that
//! the log does not: whatever was acknowledged is in the log, and the log forgets an entry only when
//! a durable checkpoint holds what it led to. Let *A* be the applied index in the head of a checkpoint.
//!
//! * **One that has a head is whole.** In a checkpoint that is filled at once the head is in the last
//!   batch, behind everything it speaks of; in one that is continued it is replaced in one batch with all
//!   that is not a record, behind the records, and records above it are deleted when it is read. Each
//!   record has a checksum, the records of each table are counted in the batch, and the mark
//!   beside them says how many batches were synced. All of that is read here, as recovery does it. So
//!   what is read is the state as of *A*, and not a mixture; one that was begun and not finished has no
//!   head, and never counted.
//! * **Each is the state of the same history.** It is of the log's member, and its last entry is the
//!   log's: *(A, term)* is where the log starts, or an entry of it. By Log Matching all before is the
//!   same, and a member applies only what is committed.
//! * **So each leads to the same state.** That is a function of the entries 1 … *A*, and then of those
//!   that the log holds behind *A*: all of them, since the log starts at *A* or before. An older one
//!   makes a start longer, and nothing else. One that the log does not reach back to is not taken,
//!   however intact; nor one that goes further than the log, whose end is missing then.
//!
//! With that any of several would do as well. That there are several intact ones, or a damaged one
//! beside, is not what a single fault leaves, however: somebody should look before all but one of them
//! are removed, as leftovers are.
//!
//! One that was installed, as another member's snapshot, may let the log begin anew, which must not
//! happen to one that never counted: it is not taken. What `CURRENT` says beside the name is the format
//! of the data directory, which is lost with it; log and checkpoint have formats of their own, and are
//! refused if they are of a later version.

use std::fs;
use std::path::Path;

use super::records::{self, RecoverError};
use super::recover::{OnDisk, OpenError};
use crate::log::{Entry, Log, LogError, Mark, REACHES_UNKNOWN};
use crate::pb::kvorumpb::CheckpointHead;
use crate::storage::{DiskGenerations, SledStorage, StorageError};

/// What a directory of the name of a checkpoint holds.
enum Candidate {
    /// It was begun, and cannot have counted.
    Unfinished,
    /// It is of a cluster of several.
    OfCluster,
    /// All of it can be read.
    Intact(CheckpointHead),
    /// Not so.
    Damaged(StorageError),
}

/// Makes `CURRENT` name the checkpoint that counts, when `error`, for which a member could not be
/// opened, is that it names none. Returns whether it does now; otherwise nothing was changed, and
/// `error` stands. Blocks on the disk.
///
/// # Errors
/// [`OpenError::SeveralCheckpoints`], of which the log goes on from one at least; or what the disk
/// says.
pub(super) fn repair(disk: &OnDisk<'_>, error: &OpenError) -> Result<bool, OpenError> {
    let mut generations = DiskGenerations::of_damaged(&disk.member_dir)?;
    let (mut intact, mut found) = (Vec::new(), Vec::new());
    for (number, dir) in generations.all()? {
        let name = format!("ckpt-{number}");
        match examine(&dir)? {
            Candidate::Unfinished => {}
            Candidate::OfCluster => return Ok(false),
            Candidate::Intact(head) => {
                found.push(format!("{name} holds entries up to {}", head.applied_index));
                intact.push((number, dir, head));
            }
            Candidate::Damaged(error) => found.push(format!("{name} cannot be read ({error})")),
        }
    }
    if found.len() > 1 {
        // None of them is trusted with how far the log once reached: nothing is cut here.
        intact.retain(|(_, dir, head)| {
            joins(disk, dir, head, REACHES_UNKNOWN).is_ok_and(|joins| joins)
        });
        let furthest = intact.iter().max_by_key(|(.., head)| head.applied_index);
        let Some((number, ..)) = furthest else { return Ok(false) };
        return Err(several(disk, &found, *number));
    }
    let Some((number, dir, head)) = intact.pop() else { return Ok(false) };
    if !joins(disk, &dir, &head, head.applied_index)? {
        return Ok(false);
    }
    generations.name(number)?;
    tracing::warn!(
        %error,
        checkpoint = %dir.display(),
        applied_index = head.applied_index,
        "CURRENT was made anew: it names the only checkpoint there is, which is intact, and which the \
         raft log goes on from. Check the disk"
    );
    Ok(true)
}

fn examine(dir: &Path) -> Result<Candidate, OpenError> {
    let failed = |source| StorageError::Io { dir: dir.to_owned(), action: "read", source };
    // To open it would begin one there.
    if fs::read_dir(dir).map_err(failed)?.next().is_none() {
        return Ok(Candidate::Unfinished);
    }
    // The state of such a one would be built, and leftovers deleted, for nothing.
    if records::legible(dir).members.len() > 1 {
        return Ok(Candidate::OfCluster);
    }
    match read(dir) {
        Ok(candidate) => Ok(candidate),
        Err(RecoverError::Storage(error)) if !error.is_damage() => Err(error.into()),
        Err(RecoverError::Storage(error)) => Ok(Candidate::Damaged(error)),
        Err(error @ RecoverError::Record { .. }) => {
            let detail = error.to_string();
            Ok(Candidate::Damaged(StorageError::Damaged { dir: dir.to_owned(), detail }))
        }
    }
}

fn read(dir: &Path) -> Result<Candidate, RecoverError> {
    let mut storage = SledStorage::open(dir)?;
    if !records::has_head(&storage)? {
        return Ok(Candidate::Unfinished);
    }
    Ok(Candidate::Intact(records::recover(&mut storage)?.head))
}

/// Whether the log, which `reaches` so far, goes on from a checkpoint. One that it does not go on from
/// is refused here: when it was opened its end was judged by what this checkpoint knows of it.
fn joins(
    disk: &OnDisk<'_>,
    dir: &Path,
    head: &CheckpointHead,
    reaches: u64,
) -> Result<bool, OpenError> {
    if head.installed || !Log::exists(&disk.log_dir)? {
        return Ok(false);
    }
    let identity = records::identity(head);
    let applied = Mark { index: head.applied_index, term: head.applied_term };
    let log = match Log::open(disk.log_options(identity, reaches)) {
        Ok((_, log)) => log,
        Err(error @ (LogError::Damaged { .. } | LogError::Missing { .. })) => {
            tracing::warn!(%error, checkpoint = %dir.display(), "the raft log does not go on from it");
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    disk.check_fit(&log, dir, identity, applied.index)?;
    let is_last = |entry: &Entry| (entry.index, entry.term) == (applied.index, applied.term);
    if log.start == applied || log.entries.iter().any(is_last) {
        return Ok(true);
    }
    let (checkpoint, log) = (dir.to_owned(), disk.log_dir.clone());
    Err(OpenError::OtherHistory { checkpoint, applied: applied.index, log })
}

fn several(disk: &OnDisk<'_>, found: &[String], furthest: u64) -> OpenError {
    OpenError::SeveralCheckpoints {
        current: DiskGenerations::current(&disk.member_dir),
        found: found.join("; "),
        furthest: format!("ckpt-{furthest}"),
        data: disk.data_dir.to_owned(),
    }
}
