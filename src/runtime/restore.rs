//! A member of a new cluster from a snapshot file: `kvorum snapshot restore`.
//!
//! What comes over from the file: keys with all their revisions, leases, alarms, the rows of
//! users and roles, how far it was compacted. What does not: who the members were, and raft's
//! log. The members are those of `--initial-cluster`, each restored from the same file; their
//! logs begin at [`RESTORED`], which is no member's that was begun empty: one that somebody
//! forgot to restore is sent a snapshot by the others.

use std::path::{Path, PathBuf};

use super::claim::Claim;
use super::stage::{NewMember, Source, StageError, Staged, is_left};
use crate::log::{BOOTSTRAP, HardState, Identity, Log, Mark};
use crate::mvcc::Revision;
use crate::state::members::{Members, member_id};

/// Where the logs of restored members begin.
pub const RESTORED: Mark = Mark { index: BOOTSTRAP.index + 1, term: BOOTSTRAP.term };

/// What is restored, where, and for whom.
#[derive(Debug, Clone)]
pub struct Restore {
    /// The snapshot file.
    pub file: PathBuf,
    /// `--data-dir`.
    pub data_dir: PathBuf,
    /// `--wal-dir`; inside the data directory when not set.
    pub wal_dir: Option<PathBuf>,
    /// `--name`.
    pub name: String,
    /// `--initial-cluster`: every member's name and peer URLs, checked.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub cluster_token: String,
    /// `--skip-hash-check`.
    pub skip_hash_check: bool,
    /// `--bump-revision`, with `--mark-compacted`; 0: neither.
    pub bump_revision: u64,
    /// `--disable-auth`.
    pub disable_auth: bool,
}

/// Why nothing was restored. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The member is not one of its cluster.
    #[error("couldn't find local name {0:?} in the initial cluster configuration")]
    NotInCluster(String),
    /// Something is there already.
    #[error(
        "data-dir {0:?} not empty or could not be read: name one that is not there yet, or \
         remove what is in it"
    )]
    DataDir(PathBuf),
    /// Likewise.
    #[error("wal-dir {0:?} exists: name one that is not there yet, or remove it")]
    WalDir(PathBuf),
    /// See there.
    #[error(transparent)]
    Stage(#[from] StageError),
}

/// What was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// The member's id.
    pub member_id: u64,
    /// The cluster's id.
    pub cluster_id: u64,
    /// The store's revision.
    pub revision: i64,
    /// Rows of keys.
    pub records: u64,
}

/// Makes a data directory from a file. Blocks. `progress` is told how many of how many rows of
/// keys were carried over. From before the file is read no server starts on the directory.
///
/// # Errors
/// [`RestoreError`]. Nothing was written, or what was written is gone.
pub fn restore(
    restore: &Restore,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Restored, RestoreError> {
    let this = restore.initial_cluster.iter().find(|(name, _)| *name == restore.name);
    let (_, urls) = this.ok_or_else(|| RestoreError::NotInCluster(restore.name.clone()))?;
    check_directories(restore)?;
    let failed =
        |error| StageError::Directory { action: "claim", path: restore.data_dir.clone(), error };
    let claim = Claim::of(&restore.data_dir, true).map_err(failed)?;
    let claim = claim.ok_or_else(|| StageError::InUse(restore.data_dir.clone()))?;
    // Whoever had it in between may have made a member.
    check_directories(restore)?;
    let mut source = Source::open(&restore.file, restore.skip_hash_check)?;
    if restore.disable_auth {
        source.disable_auth();
    }
    if source.contents.auth_enabled {
        return Err(StageError::AuthEnabled(restore.file.clone()).into());
    }
    let members = Members::bootstrap(&restore.initial_cluster, &restore.cluster_token);
    let identity = Identity {
        cluster_id: members.cluster_id(),
        member_id: member_id(urls, &restore.cluster_token),
    };
    let member = NewMember {
        identity,
        members: members.records(),
        removed_members: Vec::new(),
        mark: RESTORED,
        hard_state: HardState::of_start(RESTORED),
        bumped: bumped(source.contents.last, restore.bump_revision)?,
    };
    let records = source.contents.records;
    let mut staged = Staged::begin(&claim)?;
    let log_dir = restore.wal_dir.as_deref();
    staged.fill(&source, &member, log_dir, true, &mut |done| progress(done, records))?;
    staged.finish()?;
    let revision = member.bumped.map_or(source.contents.revision(), |bumped| bumped.main);
    let Identity { cluster_id, member_id } = identity;
    Ok(Restored { member_id, cluster_id, revision, records })
}

/// The newest revision that may be restored to. What is left is more than can ever be written.
const REVISION_MAX: i64 = i64::MAX / 2;

/// The revision that etcdutl would go on from: that of the newest row, raised.
fn bumped(last: Revision, by: u64) -> Result<Option<Revision>, StageError> {
    if by == 0 {
        return Ok(None);
    }
    let main = last.main.checked_add_unsigned(by).filter(|main| *main <= REVISION_MAX);
    Ok(Some(Revision { main: main.ok_or(StageError::Bump(by))?, sub: 0 }))
}

/// Nobody's data may be in the way, but for what an earlier attempt has left. That may have begun
/// its log elsewhere; whether the log there is this member's, and empty, is looked at when it is
/// opened.
fn check_directories(restore: &Restore) -> Result<(), RestoreError> {
    let in_the_way = || RestoreError::DataDir(restore.data_dir.clone());
    let mut is_again = false;
    if restore.data_dir.try_exists().map_err(|_| in_the_way())? {
        is_again = is_left(&restore.data_dir).map_err(|_| in_the_way())?;
        let entries = std::fs::read_dir(&restore.data_dir).map_err(|_| in_the_way())?;
        if entries.count() != usize::from(is_again) {
            return Err(in_the_way());
        }
    }
    match restore.wal_dir.as_deref() {
        Some(wal_dir) if wal_dir.exists() => {
            let is_its = is_again && Log::is_all_of(wal_dir).is_ok_and(|is_its| is_its);
            is_its.then_some(()).ok_or_else(|| RestoreError::WalDir(wal_dir.to_owned()))
        }
        _ => Ok(()),
    }
}

/// Where etcdutl restores to when it is not told: beside where it is called.
pub fn default_data_dir(name: &str) -> PathBuf {
    Path::new(&format!("{name}.etcd")).to_owned()
}
