//! The raft log: entries and hard states on the disk before anyone is told of them.
//!
//! What the server acknowledges, it has synced here first; everything else it stores can
//! be made again from this. One thread owns a [`Log`]. It appends what raft hands out, any
//! number of times, and then calls [`sync`](LogStore::sync) once: one write and one
//! `fdatasync` carry everything that was waiting.
//!
//! ```text
//! append(Ready 7) append(Ready 8) append(Ready 9)   sync()
//! ───────────────────────────────────────────────►  pwrite(7 8 9) fdatasync   all durable
//! ```
//!
//! The log is written and, when the process starts, read once. The caller keeps the
//! entries it still needs in memory; there is no index here and no reading back.
//!
//! # On the disk
//!
//! A chain of segment files, each continuing the one before, numbered without a gap:
//!
//! ```text
//! 0000000000000004-…3e81.log    0000000000000005-…5a12.log    0000000000000006-…71c0.log
//! sealed                        sealed                        current        …03.spare
//! ┌──────┬────┬───┬──────┐      ┌──────┬───┬─────┬───┐        ┌──────┬───┬─┐ ┌──────────┐
//! │header│rec │rec│rec   │      │header│rec│rec  │rec│        │header│rec│0│ │whatever  │
//! └──────┴────┴───┴──────┘      └──────┴───┴─────┴───┘        └──────┴───┴─┘ └──────────┘
//!                        └── previous_end ┘
//! ```
//!
//! All numbers are little-endian. The **header** page says everything that is known when
//! the segment begins, so that it stands without the ones before; above all, a vote
//! outlives the segment it was written to:
//!
//! ```text
//! byte 0       8        12   16          24         32        40    48            56
//!      KVORUMLG│version │0   │cluster_id │member_id │sequence │salt │previous_end │next_index
//!      64    72    80      88           96          104         112     4092   4096
//!      term  │vote │commit │start.index │start.term │file_bytes │0 …  0│crc32c│
//! ```
//!
//! A **record** is one append, most often one raft `Ready`, whole or not there:
//!
//! ```text
//! byte 0            4              8        16              20            24
//!      magic│flags  │payload_bytes │synced  │payload crc32c │header crc32c │payload …
//!
//! payload, each part if flagged:  term vote commit │ start.index start.term │
//!                                 count first_index { term kind context_bytes data_bytes context data }…
//!                                 zeros up to a multiple of 8
//! ```
//!
//! - The header's checksum covers the segment's random `salt`, its sequence, the record's
//!   own offset, and through the payload's checksum all the rest. Files are recycled
//!   without being cleaned, so this is what keeps an earlier life from being read.
//! - `synced`: everything before this offset was on the disk before this was written. With
//!   it a torn write, which is cut, is told from damage, which is refused: see
//!   `log/recover.rs` for the exact rule.
//! - After the last record come 24 zero bytes, unless the file ends before. In a segment
//!   that is sealed a header without a payload comes first, flagged: there is a next one.
//! - A record whose entries begin at or before the last index replaces the log from there
//!   on (a new leader overrules the old one's tail). One that carries a start cuts all
//!   up to it. One flagged as reset empties the log first (an installed snapshot).
//! - A batch is never split; one larger than a segment makes that segment's file grow.
//!
//! # Order of things
//!
//! ```text
//! roll      (current is synced to its end) → header written to a spare → synced → renamed to
//!           its name → directory synced → current; the one before flagged → synced
//! truncate  record with the new start written → synced → segments wholly below renamed to
//!           .spare or removed → directory synced → may be overwritten
//! open      lock → read → tail cut, or written once more → all segments and the directory
//!           synced → returned
//! ```
//!
//! # Invariants
//!
//! 1. What a successful `sync` covered is returned by every later `open`, or refused.
//! 2. What `open` returns is synced, and a prefix of what was appended, record by record.
//! 3. After any error of the disk the log is poisoned: the same error, always, and no
//!    second attempt, for the kernel forgets which pages a failed sync did not write.
//! 4. The newest segment knows the last hard state and start, whatever became of others.
//! 5. Only one process has a directory open.
//!
//! It is assumed that the disk writes a sector of 512 bytes wholly or not at all. Without
//! fsync ([`Options::fsync`]) the log survives a killed process, but no power cut.
//!
//! # What it does not do
//!
//! It knows no raft: terms and kinds are numbers. Of the checkpoint it knows no more than
//! how far the log must reach ([`Options::reaches`]).
//! It does not bound what waits to be synced: [`AppendReceipt::waiting_bytes`] tells.

mod dir;
mod disk;
mod faulty;
mod format;
mod guard;
mod memory;
mod recover;
mod replay;
mod spares;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use disk::Log;
pub use faulty::{Fault, FaultyLog};
pub use memory::{MemoryDisk, MemoryLog};

/// [`Options::segment_bytes`] unless there is a reason.
pub const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;

/// Where the log of a new cluster starts. It is no entry: it stands for the first members,
/// whom every one of them knows by itself. A member that joins later begins with an empty
/// log at (0, 0), lacks that start, and so is sent a snapshot, which brings the members.
pub const BOOTSTRAP: Mark = Mark { index: 1, term: 1 };

/// raft's own durable state. All zero in a log that was never written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    /// The term this member is in.
    pub term: u64,
    /// Whom it voted for in that term; 0 for nobody.
    pub vote: u64,
    /// Index up to which it knows entries to be committed.
    pub commit: u64,
}

impl HardState {
    /// That of a log which starts at `start`, before anything happened in it.
    pub fn of_start(start: Mark) -> HardState {
        HardState { term: start.term, vote: 0, commit: start.index }
    }
}

/// A place in the log; as its start, everything up to and including `index` is in a
/// checkpoint. (0, 0) is before the first entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// Index of an entry.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
}

/// One entry of the raft log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Place in the log; the first is 1.
    pub index: u64,
    /// Term of the leader that proposed it.
    pub term: u64,
    /// raft's entry type, as a number.
    pub kind: u8,
    /// What was proposed.
    pub data: Bytes,
    /// What came along with it.
    pub context: Bytes,
}

/// Whose log it is; set when the log is begun, and never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// The cluster's id.
    pub cluster_id: u64,
    /// The member's id.
    pub member_id: u64,
}

/// How to open a [`Log`].
#[derive(Debug, Clone)]
pub struct Options {
    /// The log's own directory; made, with mode 0700, if it is not there.
    pub dir: PathBuf,
    /// Size of a segment's file in bytes; held between 8 KiB and 1 PiB, and rounded up to
    /// pages of 4096. May differ from one start to the next. See [`SEGMENT_BYTES_DEFAULT`].
    pub segment_bytes: u64,
    /// Whether to sync at all. Without, a power cut loses acknowledged writes, and may
    /// leave a log that does not open any more.
    pub fsync: bool,
    /// For a log that is begun; one that exists keeps its own.
    pub identity: Identity,
    /// The log has held, synced, an entry of this index: a checkpoint has it. A log that
    /// ends before is damaged, even where it looks like one whose last write was torn. 0
    /// when there never was a checkpoint that knew more; [`REACHES_UNKNOWN`] when there was.
    pub reaches: u64,
}

/// [`Options::reaches`] of a log whose checkpoint cannot be read: whether its last write was
/// torn, or acknowledged and then damaged, cannot be told, and the latter is assumed.
pub const REACHES_UNKNOWN: u64 = u64::MAX;

/// What a log held when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// Whose log it is, which need not be whose the caller thought it was.
    pub identity: Identity,
    /// The last hard state.
    pub hard_state: HardState,
    /// What the log starts after.
    pub start: Mark,
    /// All entries after `start`, without a gap.
    pub entries: Vec<Entry>,
    /// What was cut from the end: a write that was under way when the process or the
    /// machine stopped. The operator's log has it already.
    pub repaired: Option<String>,
}

impl Recovered {
    /// Index of the last entry; of the start if there is none.
    pub fn last_index(&self) -> u64 {
        self.entries.last().map_or(self.start.index, |entry| entry.index)
    }

    /// Whether anything was ever written to it, but for the start of a new cluster.
    pub fn was_written_to(&self) -> bool {
        let is_begun = [Mark::default(), BOOTSTRAP].contains(&self.start);
        !is_begun || self.hard_state != HardState::of_start(self.start) || !self.entries.is_empty()
    }
}

/// What an [`append`](LogStore::append) leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendReceipt {
    /// Index of the log's last entry with this append; of its start if it has none.
    pub last_index: u64,
    /// All that waits for the next [`sync`](LogStore::sync), in bytes.
    pub waiting_bytes: u64,
}

/// What a [`sync`](LogStore::sync) did. All zero if nothing was waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SyncStats {
    /// Bytes written.
    pub bytes: u64,
    /// How long the write took, with beginning a new segment if that was necessary.
    pub write_duration: Duration,
    /// How long the disk took to have it.
    pub fsync_duration: Duration,
}

/// A raft log, on disk or a twin of it.
///
/// After an error other than [`LogError::Misuse`] every call returns that error.
pub trait LogStore: Send {
    /// Adds `entries` and `hard_state` (`None`: as before) as one record, in memory.
    ///
    /// Entries are contiguous, begin after the log's start, and leave no gap; those the
    /// log already has from the first one's index on are replaced. Nothing is durable
    /// until [`sync`](Self::sync) returns. A record survives as a whole or not at all.
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<HardState>,
    ) -> Result<AppendReceipt, LogError>;

    /// Makes everything appended so far durable: one write, one sync. Blocks.
    fn sync(&mut self) -> Result<SyncStats, LogError>;

    /// Forgets everything up to and including `to`, an index the log has; no effect if it
    /// was forgotten before. Durable on return, with everything appended so far. Blocks.
    fn truncate_prefix(&mut self, to: Mark) -> Result<(), LogError>;

    /// Replaces everything by a snapshot that ends at `start`: the log goes on, empty,
    /// after it. Durable on return. Blocks.
    fn install(&mut self, start: Mark, hard_state: HardState) -> Result<(), LogError>;

    /// Leaves proof, if there is none yet, that what was synced was, by which damage to the last write
    /// is told from a torn one: for when nothing is to be written for a while. Not synced itself, it
    /// outlives the process, and the machine soon. Optional.
    fn attest(&mut self) -> Result<(), LogError> {
        Ok(())
    }

    /// Last call of an orderly stop: syncs, and leaves proof that all was synced, by
    /// which damage to the last write is told from a torn one. Optional.
    fn close(&mut self) -> Result<(), LogError> {
        self.sync().map(drop)
    }
}

/// Why a log cannot be opened, or written to any further.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Another process has the directory open.
    #[error(
        "raft log {}: another process has it open; stop that process, or give this one \
         a --data-dir (or --wal-dir) of its own", dir.display()
    )]
    Locked {
        /// The log's directory.
        dir: PathBuf,
    },
    /// Something that was on the disk is not what it was.
    #[error(
        "raft log {} is damaged at byte {offset}: {what}. Starting would silently lose what \
         was acknowledged. Put back an intact copy of the file; or remove this member from \
         the cluster (`etcdctl member list`, `etcdctl member remove <id>`) and add it again \
         (`etcdctl member add <name> --peer-urls=<urls>`) with an empty data directory and \
         --initial-cluster-state=existing; or, if it is the only member, restore a snapshot \
         (`kvorum snapshot restore <file> --data-dir <empty directory>`)", file.display()
    )]
    Damaged {
        /// The segment.
        file: PathBuf,
        /// Offset of the first byte that is not right, or of the record it is in.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A segment is not there that still has entries the others do not.
    #[error(
        "raft log {}: segment {sequence:016x}-*.log is missing, or one before it. Put it back; \
         or remove this member from the cluster (`etcdctl member list`, `etcdctl member remove \
         <id>`) and add it again (`etcdctl member add <name> --peer-urls=<urls>`) with an empty \
         data directory and --initial-cluster-state=existing; or, if it is the only member, \
         restore a snapshot (`kvorum snapshot restore <file> --data-dir <empty directory>`)",
        dir.display()
    )]
    Missing {
        /// The log's directory.
        dir: PathBuf,
        /// Sequence number of the last segment that is missing.
        sequence: u64,
    },
    /// The segment was written by a version with another format.
    #[error(
        "raft log {}: written in format {version}, and this version knows format {known}: \
         start the version of kvorum that wrote it. To go back to this version, save a snapshot \
         with the other one (`kvorum snapshot save`) and restore it with this one into an empty \
         --data-dir (`kvorum snapshot restore`), for all members", file.display()
    )]
    Format {
        /// The segment.
        file: PathBuf,
        /// Its format.
        version: u32,
        /// The format this version reads and writes.
        known: u32,
    },
    /// The file system is full, or the quota used up.
    #[error(
        "raft log {}: no space left to write to. Free space on its file system, or move the \
         log to a larger one (--wal-dir), and start again; nothing acknowledged is lost",
        file.display()
    )]
    NoSpace {
        /// The file being written.
        file: PathBuf,
    },
    /// The operating system refused.
    #[error(
        "raft log: cannot {action} {}: {source}. Check the disk and the directory's owner and \
         mode, and start again", path.display()
    )]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// The caller broke the contract. Nothing was changed, and the log goes on.
    #[error("raft log: {0}")]
    Misuse(String),
}

impl LogError {
    fn io(action: &'static str, path: &Path, error: io::Error) -> LogError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                LogError::NoSpace { file: path.to_owned() }
            }
            _ => LogError::Io { action, path: path.to_owned(), source: Arc::new(error) },
        }
    }
}
