//! A stopped etcd's data directory becomes a member's of kvorum: `--import-etcd-data`.
//!
//! ```text
//! member/snap/db, member/wal ─ read, checked ─▶ member.new ─ complete      a kill: etcd's, as it was
//! member      ─ rename ─▶ member.etcd                                       a kill: the next start
//! member.new  ─ rename ─▶ member                                            does the rest
//! ```
//!
//! The member keeps its id, its cluster's id, its peer URLs and its place in raft's log: the
//! index and term that the database had applied. Nothing of etcd's is deleted; to go back, stop
//! kvorum, remove `member`, and name `member.etcd` `member` again.
//!
//! What etcd's log holds and its database lacks would be lost, and is refused: an etcd that was
//! killed. So is a member of a cluster with several: the others would go on with etcd's log.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::claim::Claim;
use super::stage::{NewMember, Source, StageError, Staged, sync_directory};
use crate::backup::file::SnapshotFile;
use crate::backup::wal::{self, Wal, WalError};
use crate::file_lock::FileLock;
use crate::log::{BOOTSTRAP, HardState, Identity, Log, Mark};
use crate::pb::kvorumpb::MemberRecord;

/// Where etcd's files go, within the data directory.
const ASIDE: &str = "member.etcd";
/// Where those of a `--wal-dir` go, within that.
const WAL_ASIDE: &str = "wal.etcd";

/// Why nothing was imported: etcd's files are as they were.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// An etcd runs there.
    #[error("an etcd has {} open: stop it first", .0.display())]
    Running(PathBuf),
    /// Something is where etcd's files are to go.
    #[error("{} is there already, where etcd's files are to be kept: move it away", .0.display())]
    AsideTaken(PathBuf),
    /// etcd was killed.
    #[error(
        "the etcd of {} was not stopped cleanly: its log holds {count} changes, from index {first} \
         on, that its database lacks. Start that etcd once and stop it with SIGTERM; or save a \
         snapshot of it while it runs (`etcdctl snapshot save`), and restore that with `kvorum \
         snapshot restore`", data_dir.display()
    )]
    Unapplied {
        /// The data directory.
        data_dir: PathBuf,
        /// How many.
        count: usize,
        /// The first one's index.
        first: u64,
    },
    /// The log ends before the database.
    #[error(
        "etcd's log in {} ends at index {last_index}, and its database has applied index \
         {applied}: they are not of one member, or a part of the log is missing; correct \
         --wal-dir", wal_dir.display()
    )]
    LogBehind {
        /// The log's directory.
        wal_dir: PathBuf,
        /// Where it ends.
        last_index: u64,
        /// How far the database is.
        applied: u64,
    },
    /// The others would go on without.
    #[error(
        "{} is of a member of a cluster with {count} members, which cannot change one by one. \
         Save a snapshot of the cluster (`etcdctl snapshot save <file>`; or, if it does not run, \
         copy member/snap/db of a member that was stopped cleanly) and make each member anew: \
         `kvorum snapshot restore <file> --name … --initial-cluster … --data-dir <a new one>`, \
         with --skip-hash-check for a copied db", data_dir.display()
    )]
    SeveralMembers {
        /// The data directory.
        data_dir: PathBuf,
        /// How many.
        count: usize,
    },
    /// The database does not know the member.
    #[error(
        "{}: the log is of member {member_id:x}, which is no voting member by the database: they \
         are not of one member; correct --data-dir or --wal-dir", data_dir.display()
    )]
    OtherMember {
        /// The data directory.
        data_dir: PathBuf,
        /// Whose log it is.
        member_id: u64,
    },
    /// Authentication is on.
    #[error(
        "authentication is enabled in {}, and kvorum has none yet: it would serve the data to \
         everyone. Start the etcd, run `etcdctl auth disable`, and stop it with SIGTERM; users and \
         roles are kept", .0.display()
    )]
    AuthEnabled(PathBuf),
    /// The log cannot be read.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The database cannot be read, or the member not written.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// A file cannot be moved.
    #[error("cannot {action} {}: {error}", path.display())]
    Move {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
}

/// etcd's database in a data directory.
fn database(data_dir: &Path) -> PathBuf {
    data_dir.join("member").join("snap").join("db")
}

/// Whether a data directory holds an etcd's data.
///
/// # Errors
/// What the disk says.
pub fn is_etcds(data_dir: &Path) -> io::Result<bool> {
    Ok(database(data_dir).try_exists()? && left_by_a_refusal(data_dir).is_none())
}

/// The database of an etcd that was started on a directory of kvorum by mistake, and refused it
/// because of the log's guard. It had made the database before that, and put nothing into it. One
/// that holds anything is of an etcd that ran, with its log elsewhere.
pub fn left_by_a_refusal(data_dir: &Path) -> Option<PathBuf> {
    let path = database(data_dir);
    let is_guarded = Log::is_guarded(&data_dir.join("member").join("wal"));
    (is_guarded && is_empty(&path) == Some(true)).then_some(path)
}

/// Whether a database has no row; `None` if that cannot be told.
fn is_empty(path: &Path) -> Option<bool> {
    let file = SnapshotFile::open(path).ok()?;
    // An etcd that was killed before it wrote the first page.
    if file.database_bytes() == 0 {
        return Some(true);
    }
    let database = file.database().ok()?;
    let mut scan = database.scan().ok()?;
    for bucket in scan.buckets().ok()? {
        if scan.rows(&bucket).ok()?.next().ok()?.is_some() {
            return Some(false);
        }
    }
    Some(true)
}

/// Imports. Blocks. On return the data directory holds a member of kvorum.
///
/// # Errors
/// [`ImportError`].
pub fn import(claim: &Claim, wal_dir: Option<&Path>, fsync: bool) -> Result<(), ImportError> {
    let data_dir = claim.data_dir();
    let path = database(data_dir);
    let aside = data_dir.join(ASIDE);
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |error| ImportError::Move { action, path, error }
    };
    if aside.try_exists().map_err(failed("look for", &aside))? {
        return Err(ImportError::AsideTaken(aside));
    }
    // bbolt locks its file in the same way while it is open.
    let lock = FileLock::acquire(&path).map_err(failed("lock", &path))?;
    let _lock = lock.ok_or_else(|| ImportError::Running(path.clone()))?;
    let source = Source::open(&path, true)?;
    let etcd_wal_dir = wal_dir.map_or_else(|| data_dir.join("member").join("wal"), Path::to_owned);
    let wal = wal::read(&etcd_wal_dir, source.contents.consistent_index)?;
    let this = check(data_dir, &etcd_wal_dir, &source, &wal)?;
    let mark = Mark {
        index: source.contents.consistent_index.max(BOOTSTRAP.index + 1),
        // A database before etcd 3.5 does not say its term.
        term: [source.contents.term, wal.term, BOOTSTRAP.term]
            .into_iter()
            .find(|term| *term > 0)
            .unwrap_or(BOOTSTRAP.term),
    };
    let member = NewMember {
        identity: Identity { cluster_id: wal.cluster_id, member_id: wal.member_id },
        members: vec![this],
        removed_members: source.contents.removed_members.clone(),
        mark,
        hard_state: HardState { term: wal.term.max(mark.term), vote: 0, commit: mark.index },
        bumped: None,
    };
    tracing::info!(
        data_dir = %data_dir.display(),
        records = source.contents.records,
        revision = source.contents.revision(),
        "importing an etcd's data"
    );
    let mut staged = Staged::begin(claim)?;
    staged.fill(&source, &member, wal_dir, fsync, &mut |_| {})?;
    let member_dir = data_dir.join("member");
    fs::rename(&member_dir, &aside).map_err(failed("rename", &member_dir))?;
    staged.keep();
    // Before the next step, or a power cut could leave two names for one member.
    sync_directory(data_dir).map_err(failed("sync", data_dir))?;
    staged.finish()?;
    if let Some(wal_dir) = wal_dir {
        move_logs(wal_dir)?;
    }
    tracing::info!(
        etcds_files = %aside.display(),
        member_id = format!("{:x}", wal.member_id),
        cluster_id = format!("{:x}", wal.cluster_id),
        "imported an etcd's data; its files are kept, and can be removed when all is well"
    );
    Ok(())
}

/// The member, if it can be imported.
fn check(
    data_dir: &Path,
    wal_dir: &Path,
    source: &Source,
    wal: &Wal,
) -> Result<MemberRecord, ImportError> {
    let data_dir = data_dir.to_owned();
    let contents = &source.contents;
    let applied = contents.consistent_index;
    if wal.last_index < applied {
        let (wal_dir, last_index) = (wal_dir.to_owned(), wal.last_index);
        return Err(ImportError::LogBehind { wal_dir, last_index, applied });
    }
    if contents.members.len() > 1 {
        let count = contents.members.len();
        return Err(ImportError::SeveralMembers { data_dir, count });
    }
    if let Some(first) = wal.unapplied.first() {
        let (count, first) = (wal.unapplied.len(), *first);
        return Err(ImportError::Unapplied { data_dir, count, first });
    }
    if contents.auth_enabled {
        return Err(ImportError::AuthEnabled(data_dir));
    }
    let this = contents.members.iter().find(|member| member.id == wal.member_id);
    this.filter(|member| !member.is_learner)
        .cloned()
        .ok_or(ImportError::OtherMember { data_dir, member_id: wal.member_id })
}

/// etcd's log in a directory of its own, which is kvorum's log's directory now.
fn move_logs(wal_dir: &Path) -> Result<(), ImportError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |error| ImportError::Move { action, path, error }
    };
    let aside = wal_dir.join(WAL_ASIDE);
    fs::create_dir_all(&aside).map_err(failed("make", &aside))?;
    for (_, path) in wal::files(wal_dir)? {
        let Some(name) = path.file_name() else { continue };
        fs::rename(&path, aside.join(name)).map_err(failed("rename", &path))?;
    }
    Ok(())
}
