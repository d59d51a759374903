//! The state as an image: what a member that fell far behind is sent, and how it becomes a
//! checkpoint and a state there.
//!
//! ```text
//! sender                                                     receiver
//! state ── Source ── chunks ──▶ net ── chunks ──▶ Spool ── fill ──▶ next checkpoint ──▶ state
//!          one revision, pinned                   a file
//! ```
//!
//! **A source** is made in one hold of the state's read lock, in which everything small is
//! copied: the head, the members, and of each lease its three numbers (24 bytes: a million
//! leases are 24 MB and some ten milliseconds; in steps it could not be done, for a lease that
//! is revoked in between would be missing while its keys are there). The records follow in the
//! order of their revisions, as a checkpoint keeps them, in steps of `RECORDS_PER_STEP` at most
//! and not many more bytes than make a frame. So a source holds, besides the leases, no more than
//! a walk does ([`RevisionWalk`]), however large the state is. It pins its revision: compaction
//! goes on, and what the source has yet to read is spared. A receiver that takes it too slowly for
//! that, attempts that go on included, is given up when what is spared becomes
//! [too much](super::held).
//!
//! **Resuming.** The image is a function of the state at the source's revision. A source that
//! must go back begins again, and makes the same bytes once more up to where the receiver is:
//! that costs time, a second per gigabyte or so, and no memory. [`Images`] keeps a source whose
//! transfer was interrupted for [`RESUME_MAX`], after which its pin is given up and the next
//! attempt is a snapshot of its own.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use prost::Message as _;

use super::held::Held;
use super::pins::{Pin, Pins};
use super::records::{self, RecoverError};
use crate::log::Mark;
use crate::mvcc::RevisionWalk;
use crate::net::snapshot::{Image, ImageLost, SendError};
use crate::pb::kvorumpb::{CheckpointHead, MemberRecord};
use crate::pb::leasepb::Lease;
use crate::raft::Configuration;
use crate::state::{AuthRow, Restored, StateMachine};
use crate::storage::image::{FRAME_BYTES, ImageError, ImageReader, ImageRecord, ImageWriter};
use crate::storage::spool::Spool;
use crate::storage::{Batch, Storage, StorageError, Table};

/// Keys or changes looked at in one hold of the state's lock.
const RECORDS_PER_STEP: usize = 4096;
/// How long a source is kept whose transfer was interrupted.
pub const RESUME_MAX: Duration = Duration::from_secs(60);

/// The image of a state as of one moment, made bit by bit.
#[derive(Debug)]
pub struct Source {
    id: u64,
    head: CheckpointHead,
    members: Vec<MemberRecord>,
    leases: Vec<Lease>,
    auth: Arc<[AuthRow]>,
    /// The walk as it began, for beginning again.
    start: RevisionWalk,
    state: SharedState,
    pin: Pin,
    /// What the pin keeps.
    held: Held,
    progress: Progress,
}

/// The state; no more is to be said of it when debugging.
struct SharedState(Arc<RwLock<StateMachine>>);

impl std::fmt::Debug for SharedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the state")
    }
}

/// What a source has done.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Added,
    /// Has held the state's lock for a while.
    Looked,
}

/// How far a source has come.
#[derive(Debug)]
struct Progress {
    writer: ImageWriter,
    /// Bytes given out.
    offset: u64,
    members: usize,
    leases: usize,
    auth: usize,
    walk: RevisionWalk,
    ended: bool,
}

impl Progress {
    fn new(walk: RevisionWalk) -> Progress {
        let writer = ImageWriter::new();
        Progress { writer, offset: 0, members: 0, leases: 0, auth: 0, walk, ended: false }
    }
}

impl Source {
    /// The image of the present state. `id` is one that no other image has.
    pub fn new(id: u64, state: &Arc<RwLock<StateMachine>>, pins: &Arc<Pins>) -> Source {
        let held = state.read();
        let start = held.store().walk();
        Source {
            id,
            head: held.head(),
            members: held.members().records(),
            leases: held.lessor().iter().map(|lease| lease.to_record()).collect(),
            auth: held.auth_rows(),
            pin: pins.pin(start.floor()),
            held: Held::from(start.floor()),
            progress: Progress::new(start.clone()),
            start,
            state: SharedState(Arc::clone(state)),
        }
    }

    /// Who belongs to the cluster as of the image: raft's metadata has to say so.
    pub fn configuration(&self) -> Configuration {
        let (learners, voters): (Vec<_>, Vec<_>) =
            self.members.iter().partition(|member| member.is_learner);
        let ids = |members: Vec<&MemberRecord>| members.iter().map(|member| member.id).collect();
        Configuration { voters: ids(voters), learners: ids(learners) }
    }

    /// Adds what comes next to the writer, or looks for it.
    fn step(&mut self) -> Result<Step, ImageLost> {
        let Progress { writer, members, leases, auth, walk, ended, .. } = &mut self.progress;
        if let Some(member) = self.members.get(*members) {
            writer.put(Table::Member, &member.id.to_be_bytes(), [&[], &member.encode_to_vec()]);
            *members += 1;
        } else if let Some(lease) = self.leases.get(*leases) {
            writer.put(Table::Lease, &lease.id.to_be_bytes(), [&[], &lease.encode_to_vec()]);
            *leases += 1;
        } else if let Some(AuthRow { table, key, value }) = self.auth.get(*auth) {
            writer.put(records::auth_table(*table), key, [&[], value]);
            *auth += 1;
        } else if let Some((revision, tombstone, kv)) = walk.take() {
            writer.put(Table::Mvcc, &records::key(revision), [&[u8::from(tombstone)], &kv]);
        } else if !walk.is_done() {
            {
                let state = self.state.0.read();
                if self.pin.is_lost() {
                    return Err(ImageLost::Replaced);
                }
                walk.step(state.store(), RECORDS_PER_STEP, FRAME_BYTES);
            }
            if self.held.is_too_much(&self.state.0) {
                return Err(ImageLost::TooMuchHeld);
            }
            return Ok(Step::Looked);
        } else if !*ended {
            writer.end(records::HEAD, &self.head.encode_to_vec());
            *ended = true;
        }
        Ok(Step::Added)
    }
}

impl Image for Source {
    fn id(&self) -> u64 {
        self.id
    }

    fn index(&self) -> u64 {
        self.head.applied_index
    }

    fn term(&self) -> u64 {
        self.head.applied_term
    }

    fn offset(&self) -> u64 {
        self.progress.offset
    }

    fn restart(&mut self) {
        self.progress = Progress::new(self.start.clone());
    }

    fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost> {
        loop {
            if let Some(chunk) = self.progress.writer.take() {
                self.progress.offset += chunk.len() as u64;
                return Ok(Some(chunk));
            }
            if self.progress.ended {
                return Ok(None);
            }
            if self.step()? == Step::Looked {
                return Ok(Some(Bytes::new()));
            }
        }
    }
}

/// Makes sources, and keeps those whose transfer was interrupted: one for each member at most.
pub struct Images {
    state: Arc<RwLock<StateMachine>>,
    pins: Arc<Pins>,
    kept: Mutex<BTreeMap<u64, Kept>>,
}

/// A source that waits for raft to make use of it, for [`RESUME_MAX`] at most: its pin keeps
/// what is compacted in memory.
pub(super) struct Kept {
    pub(super) source: Source,
    since: Instant,
}

impl Kept {
    pub(super) fn new(source: Source) -> Kept {
        Kept { source, since: Instant::now() }
    }

    pub(super) fn is_old(&self) -> bool {
        self.since.elapsed() >= RESUME_MAX
    }
}

impl Images {
    /// Sources of this state.
    pub fn new(state: Arc<RwLock<StateMachine>>, pins: Arc<Pins>) -> Images {
        Images { state, pins, kept: Mutex::default() }
    }

    /// The source for a member: the one whose transfer to it was interrupted, if that may
    /// still go on with an index of at least `first_index`, or else one of the present state.
    ///
    /// Holds the state's read lock for as long as copying the leases takes.
    ///
    /// # Errors
    /// The operating system has no random numbers.
    pub fn source(&self, member: u64, first_index: u64) -> Result<Source, getrandom::Error> {
        let kept = self.kept.lock().remove(&member).map(|kept| kept.source);
        match kept.filter(|source| source.index() >= first_index && !source.pin.is_lost()) {
            Some(source) => Ok(source),
            None => Ok(Source::new(getrandom::u64()?, &self.state, &self.pins)),
        }
    }

    /// A transfer to a member has ended. If another attempt may go on where it was, its source is
    /// kept for [`RESUME_MAX`]; nobody need come back for it. To be called within the runtime.
    pub fn ended(self: &Arc<Self>, member: u64, source: Source, sent: &Result<(), SendError>) {
        if sent.as_ref().err().is_none_or(|error| !error.may_be_resumed()) {
            return;
        }
        self.kept.lock().insert(member, Kept::new(source));
        let outgoing = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(RESUME_MAX).await;
            outgoing.forget_old();
        });
    }

    fn forget_old(&self) {
        self.kept.lock().retain(|_, kept| !kept.is_old());
    }
}

/// Why an image did not become a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// It is none.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is one, of something that is no state.
    #[error(transparent)]
    Records(#[from] RecoverError),
    /// The checkpoint failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It is of another cluster.
    #[error(
        "the snapshot is of cluster {found:x}, and this member belongs to {own:x}: correct \
         --initial-cluster, or remove the data directory to join the other cluster"
    )]
    OtherCluster {
        /// The image's.
        found: u64,
        /// This member's.
        own: u64,
    },
    /// It ends elsewhere than raft was told, or before what the checkpoint holds already.
    #[error(
        "the snapshot ends at index {}, term {}, where raft was told {} and {}, and the \
         checkpoint holds entries up to {durable_index}",
        .found.index, .found.term, .expected.index, .expected.term
    )]
    OtherIndex {
        /// Where it ends.
        found: Mark,
        /// Where raft was told it ends.
        expected: Mark,
        /// What the checkpoint holds.
        durable_index: u64,
    },
    /// The member stops.
    #[error("stopped while a snapshot was being installed")]
    Stopped,
}

impl FillError {
    /// Whether the disk has no space left: the same may succeed once it has.
    pub fn is_full(&self) -> bool {
        match self {
            FillError::Storage(error) | FillError::Records(RecoverError::Storage(error)) => {
                error.is_full()
            }
            _ => false,
        }
    }
}

/// Fills an empty checkpoint with an image, and reads back what then is in there. The image
/// becomes this member's: its head names `member_id`, and says that it was installed. Durable
/// on return, if the checkpoint then is made to count. `is_stopped` is asked now and then.
///
/// # Errors
/// [`FillError`]; what was filled is of no use then.
pub fn fill(
    spool: &mut Spool,
    storage: &mut dyn Storage,
    cluster_id: u64,
    member_id: u64,
    is_stopped: &dyn Fn() -> bool,
) -> Result<Restored, FillError> {
    let mut image = spool.read()?;
    let mut batch = Batch::new();
    let mut last_version = Bytes::new();
    let mut next = image.next()?.map(Owned::of);
    while let Some(Owned { table, key, value }) = next {
        next = match table {
            Table::Mvcc => {
                let first = Some(Owned { table, key, value });
                let (image, last) = (&mut image, &mut last_version);
                let mut versions = Versions { image, next: first, last, failed: None, is_stopped };
                storage.freeze(&mut versions)?;
                match versions.failed {
                    Some(failed) => return Err(failed),
                    None => versions.next,
                }
            }
            Table::Head => {
                batch.put(table, key, installed(&value, cluster_id, member_id)?.encode_to_vec());
                image.next()?.map(Owned::of)
            }
            _ => {
                batch.put(table, key, value);
                image.next()?.map(Owned::of)
            }
        };
        if batch.is_full() {
            if is_stopped() {
                return Err(FillError::Stopped);
            }
            storage.write(std::mem::take(&mut batch))?;
        }
    }
    storage.write(batch)?;
    storage.sync()?;
    Ok(records::recover(storage)?)
}

/// The head of a state that was sent, as this member's.
fn installed(head: &[u8], cluster_id: u64, member_id: u64) -> Result<CheckpointHead, FillError> {
    let mut head = CheckpointHead::decode(head)
        .map_err(|error| RecoverError::Record { table: Table::Head, reason: error.to_string() })?;
    if head.cluster_id != cluster_id {
        return Err(FillError::OtherCluster { found: head.cluster_id, own: cluster_id });
    }
    head.member_id = member_id;
    head.installed = true;
    Ok(head)
}

/// A record that outlives the frame it came in.
struct Owned {
    table: Table,
    key: Bytes,
    value: Vec<u8>,
}

impl Owned {
    fn of(record: ImageRecord<'_>) -> Owned {
        let ImageRecord { table, key, value } = record;
        Owned { table, key: Bytes::copy_from_slice(key), value: value.to_vec() }
    }
}

/// The versions of an image, from the next record on until another's comes.
struct Versions<'a, R> {
    image: &'a mut ImageReader<R>,
    /// The first that was not given out; of another table, once all versions were.
    next: Option<Owned>,
    /// The key of the last that was.
    last: &'a mut Bytes,
    /// Why there are no more, if not for that.
    failed: Option<FillError>,
    is_stopped: &'a dyn Fn() -> bool,
}

impl<R: Read> Iterator for Versions<'_, R> {
    type Item = (Bytes, Vec<u8>);

    fn next(&mut self) -> Option<(Bytes, Vec<u8>)> {
        let Owned { key, value, .. } = self.next.take_if(|next| next.table == Table::Mvcc)?;
        let next = match self.image.next() {
            Ok(next) => Ok(next.map(Owned::of)),
            Err(error) => Err(error.into()),
        };
        let is_in_order = key > *self.last;
        self.failed = match next {
            Err(failed) => Some(failed),
            Ok(_) if (self.is_stopped)() => Some(FillError::Stopped),
            Ok(_) if !is_in_order => {
                let reason = "it does not come after the one before".to_owned();
                Some(RecoverError::Record { table: Table::Mvcc, reason }.into())
            }
            Ok(next) => {
                self.next = next;
                None
            }
        };
        if self.failed.is_some() {
            return None;
        }
        *self.last = key.clone();
        Some((key, value))
    }
}

#[cfg(test)]
mod tests;
