//! From what is on disk to a member that can run.
//!
//! ```text
//! checkpoint ──▶ state as of applied index A        log ──▶ entries after its start
//!                          └────────── raft applies entries A+1 … again ─────────┘
//! ```
//!
//! A directory without a checkpoint is a new member: its first checkpoint says who it
//! is and who its cluster's members are, and is durable before the log exists.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::records::{self, RecoverError};
use crate::log::{
    Identity, Log, LogError, LogStore, MemoryDisk, MemoryLog, Options, Recovered,
    SEGMENT_BYTES_DEFAULT,
};
use crate::raft::{Configuration, Start};
use crate::state::StateMachine;
use crate::state::members::{Members, member_id};
use crate::storage::{
    DiskGenerations, Generations, MemoryGenerations, MemoryStorage, Storage, StorageError,
};

/// What decides who a new member is.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// `--initial-cluster`: every member's name and peer URLs.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub cluster_token: String,
    /// `--name`: which of the members this is.
    pub name: String,
    /// What all members of a new cluster serve, `X.Y.Z`.
    pub cluster_version: String,
}

/// Where a member keeps its data.
#[derive(Debug, Clone)]
pub enum Place {
    /// Nowhere: it is gone when the server stops.
    Memory,
    /// On disk.
    Disk {
        /// `--data-dir`.
        data_dir: PathBuf,
        /// `--wal-dir`; inside the data directory when not set.
        wal_dir: Option<PathBuf>,
        /// Whether the log is synced; not so with `--unsafe-no-fsync`.
        fsync: bool,
    },
}

/// A member read back from disk, or made anew.
pub struct Recovery {
    /// The state as of its applied index.
    pub state: StateMachine,
    /// For the raft node; the caller adds its timing.
    pub start: Start,
    /// The log, open for appending.
    pub log: Box<dyn LogStore>,
    /// The checkpoint store.
    pub storage: Box<dyn Storage>,
    /// Makes the next checkpoint store.
    pub generations: Box<dyn Generations>,
    /// This member's and its cluster's ids.
    pub identity: Identity,
    /// Whether the member was made just now.
    pub is_new: bool,
}

/// Why a member cannot be read back. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory cannot be made or read.
    #[error("cannot use the directory {}: {error}; check its permissions, or set --{flag}", path.display())]
    Directory {
        /// Which directory.
        path: PathBuf,
        /// The flag that names it.
        flag: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The directory holds another program's data.
    #[error(
        "{} holds the data of an etcd member, which this version cannot take over: \
         set --data-dir to an empty directory and copy the keys, for example with `etcdctl make-mirror`",
        .0.display()
    )]
    ForeignData(PathBuf),
    /// The member is not part of the cluster it is to found.
    #[error("--initial-cluster does not contain --name={0}; add {0}=<peer url> to it")]
    NotInCluster(String),
    /// The checkpoint says that entries were applied which the log no longer has.
    #[error(
        "the raft log in {} is missing, but its member has applied {applied} entries: restore the \
         directory, or remove the data directory {} to begin anew", log.display(), data.display()
    )]
    LogMissing {
        /// The log's directory.
        log: PathBuf,
        /// The data directory.
        data: PathBuf,
        /// The checkpoint's applied index.
        applied: u64,
    },
    /// The store failed.
    #[error("cannot open the checkpoint: {0}")]
    Storage(#[from] StorageError),
    /// The checkpoint cannot be understood.
    #[error("cannot read the checkpoint: {0}")]
    Checkpoint(#[from] RecoverError),
    /// The log failed.
    #[error("cannot open the raft log: {0}")]
    Log(#[from] LogError),
}

/// Reads a member back, or makes a new one. Blocks on the disk.
///
/// # Errors
/// [`OpenError`]; nothing was changed then, except that a new member may be half made,
/// which the next attempt completes.
pub fn open(place: &Place, bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
    match place {
        Place::Memory => in_memory(bootstrap),
        Place::Disk { data_dir, wal_dir, fsync } => {
            let member_dir = data_dir.join("member");
            let log_dir = wal_dir.clone().unwrap_or_else(|| member_dir.join("wal"));
            make_directory(data_dir, "data-dir")?;
            if member_dir.join("snap").join("db").exists() {
                return Err(OpenError::ForeignData(data_dir.clone()));
            }
            make_directory(&member_dir, "data-dir")?;
            let (mut generations, mut storage, is_new) = DiskGenerations::open(&member_dir)?;
            let state = if is_new {
                let state = first_checkpoint(bootstrap, &mut storage)?;
                generations.switch()?;
                state
            } else {
                StateMachine::restore(records::recover(&mut storage)?)
            };
            let identity = identity(&state);
            let applied = state.applied().index;
            if applied > 0 && !Log::exists(&log_dir)? {
                return Err(OpenError::LogMissing {
                    log: log_dir,
                    data: data_dir.clone(),
                    applied,
                });
            }
            if wal_dir.is_some() {
                make_directory(&log_dir, "wal-dir")?;
            }
            let options = Options {
                dir: log_dir,
                segment_bytes: SEGMENT_BYTES_DEFAULT,
                fsync: *fsync,
                identity,
            };
            let (log, recovered) = Log::open(options)?;
            if let Some(repaired) = &recovered.repaired {
                tracing::warn!("repaired the raft log: {repaired}");
            }
            Ok(Recovery {
                start: start(&state, recovered),
                state,
                log: Box::new(log),
                storage: Box::new(storage),
                generations: Box::new(generations),
                identity,
                is_new,
            })
        }
    }
}

fn in_memory(bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
    let mut storage = MemoryStorage::new();
    let state = first_checkpoint(bootstrap, &mut storage)?;
    let identity = identity(&state);
    let (log, recovered) = MemoryLog::open(&MemoryDisk::new(identity));
    Ok(Recovery {
        start: start(&state, recovered),
        state,
        log: Box::new(log),
        storage: Box::new(storage),
        generations: Box::new(MemoryGenerations),
        identity,
        is_new: true,
    })
}

/// The state of a new member, durable before anything else is.
fn first_checkpoint(
    bootstrap: &Bootstrap,
    storage: &mut dyn Storage,
) -> Result<StateMachine, OpenError> {
    let initial = &bootstrap.initial_cluster;
    let this = initial.iter().find(|(name, _)| *name == bootstrap.name);
    let (_, peer_urls) = this.ok_or_else(|| OpenError::NotInCluster(bootstrap.name.clone()))?;
    let id = member_id(peer_urls, &bootstrap.cluster_token);
    let members = Members::bootstrap(initial, &bootstrap.cluster_token);
    let mut state = StateMachine::bootstrap(id, members, bootstrap.cluster_version.clone());
    records::write(storage, &state.cut())?;
    Ok(state)
}

fn identity(state: &StateMachine) -> Identity {
    Identity { cluster_id: state.members().cluster_id(), member_id: state.member_id() }
}

fn start(state: &StateMachine, recovered: Recovered) -> Start {
    let (voters, learners) = state.members().voters_and_learners();
    Start {
        id: recovered.identity.member_id,
        election_ticks: 0,
        catch_up_entries: 0,
        pre_vote: true,
        hard_state: recovered.hard_state,
        start: recovered.start,
        entries: recovered.entries,
        applied: state.applied().index,
        configuration: Configuration { voters, learners },
    }
}

fn make_directory(path: &Path, flag: &'static str) -> Result<(), OpenError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| OpenError::Directory { path: path.to_owned(), flag, error })
}
