//! From what is on disk to a member that can run.
//!
//! ```text
//! checkpoint ──▶ state as of applied index A        log ──▶ entries after its start
//!                          └────────── raft applies entries A+1 … again ─────────┘
//! ```
//!
//! A directory without a checkpoint that counts is a new member. It is made in this order,
//! each step durable before the next:
//!
//! ```text
//! directories ──▶ an empty log ──▶ its start ──▶ the first checkpoint ──▶ CURRENT, which
//!                                                                         says it counts
//! ```
//!
//! The first checkpoint says who the member is and who its cluster's members are. Members
//! of a new cluster know both from their flags, and their logs start at [`BOOTSTRAP`](crate::log::BOOTSTRAP). One
//! that joins a running cluster knows it from a peer, its log stays empty, and it is part
//! of no configuration until a snapshot has brought the state.
//!
//! A start that is cut short leaves a log without entries at most, and the next one goes on
//! from there. Once `CURRENT` is there, the flags that say how a member is made are ignored.
//! Anything else that does not fit together is a lost file, and refused before anything
//! is changed:
//!
//! | found                                        | refused because                      |
//! |----------------------------------------------|--------------------------------------|
//! | `CURRENT`, no log                            | acknowledged entries were in it      |
//! | no `CURRENT`, a log that was written to      | the checkpoint may hold its start    |
//! | no `CURRENT`, no log, a checkpoint           | acknowledged entries were in the log |
//! | a log of another member or cluster           | one of them was put there by mistake |
//! | a log that ends before the applied index     | its end was acknowledged             |
//! | a log that begins behind the applied index   | the checkpoint is an old one         |
//! | nothing, of a member that others saw running | it may have acknowledged what is gone |
//!
//! A checkpoint that is damaged or missing may be replaced, as long as something is left of it, be it
//! its name: [`super::heal`]. A damaged log is not. One that is intact, and that `CURRENT` alone does
//! not name, may be named again: [`super::current`].
//!
//! A log that ends too early is in order when the checkpoint says that it was installed: it came from another
//! member, a crash kept the log from beginning anew after it, and that is made up for here.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::claim::Claim;
use super::current;
use super::force::{self, ForceError};
use super::import::{self, ImportError};
use super::join::{self, JoinError};
use super::records::{self, RecoverError};
use super::stage;
use crate::log::{
    HardState, Identity, Log, LogError, LogStore, Mark, MemoryDisk, MemoryLog, Options,
    REACHES_UNKNOWN, Recovered, SEGMENT_BYTES_DEFAULT,
};
use crate::pb::kvorumpb::{MemberRecord, MembersResponse};
use crate::raft::{Configuration, Start};
use crate::state::StateMachine;
use crate::state::members::{Members, member_id};
use crate::storage::{
    DiskGenerations, Generations, MemoryGenerations, MemoryStorage, Storage, StorageError,
};

/// What decides who a new member is, and what becomes of one that was here before.
#[derive(Debug, Clone, Default)]
pub struct Bootstrap {
    /// `--initial-cluster`: every member's name and peer URLs.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub cluster_token: String,
    /// `--name`: which of the members this is.
    pub name: String,
    /// What all members of a new cluster serve, `X.Y.Z`.
    pub cluster_version: String,
    /// `--initial-cluster-state=existing`: a new member joins a running cluster.
    pub joins: bool,
    /// What a peer has answered to a new member; `None` when none did, which is usual while
    /// a cluster is made, and prevents one from joining.
    pub running: Option<MembersResponse>,
    /// `--max-learners`.
    pub max_learners: u64,
    /// `--force-new-cluster`: a member that was here before goes on without the others.
    pub force_new_cluster: bool,
    /// `--import-etcd-data`: a stopped etcd's data directory becomes this member's.
    pub import_etcd_data: bool,
}

impl Bootstrap {
    /// The peer URLs of all members but this one, in etcd's order: whom to ask for
    /// [`Bootstrap::running`].
    pub fn other_peer_urls(&self) -> Vec<String> {
        let others = self.initial_cluster.iter().filter(|(name, _)| *name != self.name);
        let mut urls: Vec<String> = others.flat_map(|(_, urls)| urls.iter().cloned()).collect();
        urls.sort_unstable();
        urls
    }
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

impl Place {
    /// Where checkpoints are, and what else is the member's own.
    pub fn member_dir(&self) -> Option<PathBuf> {
        match self {
            Place::Memory => None,
            Place::Disk { data_dir, .. } => Some(data_dir.join("member")),
        }
    }
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
    /// The directory holds an etcd's data.
    #[error(
        "{} holds the data of an etcd member: to go on with it, stop that etcd, and start once \
         with --import-etcd-data (its files are kept aside); or set --data-dir to another directory",
        .0.display()
    )]
    EtcdsData(PathBuf),
    /// The directory holds an etcd's data, and a checkpoint.
    #[error(
        "{} holds data of kvorum, and a member/snap/db, which is an etcd's: both programs were \
         started on it. If member/wal, or --wal-dir, still has kvorum's *.log, kvorum's data is as it \
         was: stop that etcd, and, to go on with kvorum's, move it away: member/snap/db, and etcd's \
         *-*.wal if they are there. Otherwise restore a snapshot, or set --data-dir to another \
         directory", .0.display()
    )]
    EtcdsDataToo(PathBuf),
    /// `--import-etcd-data`, and nothing is there.
    #[error(
        "{} has no etcd's data (member/snap/db) to import: correct --data-dir, or leave out \
         --import-etcd-data to begin with nothing", .0.display()
    )]
    NothingToImport(PathBuf),
    /// An etcd's data cannot be imported.
    #[error("cannot import: {0}")]
    Import(#[from] ImportError),
    /// Somebody makes a member in the data directory.
    #[error(
        "the data directory {} is in use: `kvorum snapshot restore` fills it, or another server \
         starts on it. Wait until that is done, and start again; or set --data-dir to another \
         directory", .0.display()
    )]
    InUse(PathBuf),
    /// Somebody wanted other data served than none.
    #[error(
        "a restore was cut short, and left {}: run `kvorum snapshot restore` again, or remove that \
         directory", .0.display()
    )]
    RestoreCutShort(PathBuf),
    /// The member is not part of the cluster it is to found.
    #[error("--initial-cluster does not contain --name={0}; add {0}=<peer url> to it")]
    NotInCluster(String),
    /// No peer has said who belongs to the cluster that is to be joined.
    #[error(
        "cannot fetch cluster info from peer urls: could not retrieve cluster information from \
         the given URLs; start the other members, or correct --initial-cluster"
    )]
    NoPeerAnswered,
    /// The flags do not fit the cluster that is to be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The other members have seen it running, and its data is gone.
    #[error(
        "member {id:x} has already been bootstrapped, and its data directory {} holds nothing \
         of it: correct --data-dir. If the data is lost, have a member that runs remove it \
         (`etcdctl member remove {id:x}`) and add it again (`etcdctl member add`), and start it \
         with --initial-cluster-state=existing", data.display()
    )]
    AlreadyBootstrapped {
        /// Its id.
        id: u64,
        /// The data directory.
        data: PathBuf,
    },
    /// A member cannot go on without the others.
    #[error(transparent)]
    Force(#[from] ForceError),
    /// The directory is of a version that was never released.
    #[error(
        "the data directory {} is of a version of kvorum from before clusters, which was never \
         released: copy the keys with that version, for example with `etcdctl make-mirror`, and \
         begin with an empty --data-dir", .0.display()
    )]
    BeforeClusters(PathBuf),
    /// There is a checkpoint, and no log.
    #[error(
        "the raft log in {} is missing, though its member has applied entries up to {applied}: \
         put the log back (or correct --wal-dir), restore a snapshot, or remove the data \
         directory {} to begin anew. If the cluster has a majority without this member, remove \
         the member before that (`etcdctl member remove <id>`) and add it again (`etcdctl member \
         add`): it has forgotten what it voted and acknowledged", log.display(), data.display()
    )]
    LogMissing {
        /// The log's directory.
        log: PathBuf,
        /// The data directory.
        data: PathBuf,
        /// The checkpoint's applied index.
        applied: u64,
    },
    /// There is a log that was written to, or a checkpoint, and nothing that says which
    /// checkpoint counts; not both.
    #[error(
        "{} is missing, which names the checkpoint that counts, though {} is there: put it \
         back, restore a snapshot (`kvorum snapshot restore <file> --data-dir <empty directory>`), \
         or remove the data directory {} to begin anew. If the cluster has a majority without this \
         member, remove the member before that (`etcdctl member remove <id>`) and add it again \
         (`etcdctl member add`): it may have forgotten what it voted and acknowledged",
        current.display(), found.display(), data.display()
    )]
    CheckpointMissing {
        /// The file that is missing.
        current: PathBuf,
        /// What shows that it was there.
        found: PathBuf,
        /// The data directory.
        data: PathBuf,
    },
    /// The same, with both.
    #[error(
        "{} is missing, which names the checkpoint that counts, though {} is there: put it back, or \
         restore a snapshot (`kvorum snapshot restore <file> --data-dir <empty directory>`)",
        current.display(), checkpoint.display()
    )]
    CurrentMissing {
        /// The file that is missing.
        current: PathBuf,
        /// A checkpoint.
        checkpoint: PathBuf,
    },
    /// There are several checkpoints, and nothing that says which one counts.
    #[error(
        "{} is damaged or missing, and which checkpoint counts cannot be told: {found}. Keep a copy of \
         {}; then name the one that goes furthest (`echo {furthest} > {}`), and start again: what it \
         lacks is in the raft log, and the others are removed. Or restore a snapshot: `kvorum snapshot \
         restore <file> --data-dir <empty directory>`",
        current.display(), data.display(), current.display()
    )]
    SeveralCheckpoints {
        /// The file that should say it.
        current: PathBuf,
        /// Each checkpoint, and what is in it.
        found: String,
        /// The name of the one that goes furthest.
        furthest: String,
        /// The data directory.
        data: PathBuf,
    },
    /// The log does not hold what the checkpoint ends with.
    #[error(
        "the checkpoint {} holds entries up to {applied}, the last of which is another one in the raft \
         log in {}: they are not of one history. Put back the one that belongs to the log, or restore \
         a snapshot", checkpoint.display(), log.display()
    )]
    OtherHistory {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Its applied index.
        applied: u64,
        /// The log's directory.
        log: PathBuf,
    },
    /// Log and checkpoint are not of the same member.
    #[error(
        "the raft log in {} is of member {:x} of cluster {:x}, and the checkpoint in {} of \
         member {:x} of cluster {:x}: correct --data-dir or --wal-dir",
        log.display(), of_log.member_id, of_log.cluster_id,
        data.display(), of_checkpoint.member_id, of_checkpoint.cluster_id
    )]
    OtherMember {
        /// The log's directory.
        log: PathBuf,
        /// Whose log it is.
        of_log: Identity,
        /// The data directory.
        data: PathBuf,
        /// Whose checkpoint it is.
        of_checkpoint: Identity,
    },
    /// An earlier start of a new member was cut short, and the flags that say who it is
    /// have changed since.
    #[error(
        "the data directory {} was begun for another member or cluster: set --name, \
         --initial-cluster, --initial-cluster-state and --initial-cluster-token as they were, or \
         remove it (there is nothing in it yet)", .0.display()
    )]
    BegunForAnother(PathBuf),
    /// The store failed.
    #[error("cannot open the checkpoint: {0}")]
    Storage(#[from] StorageError),
    /// The checkpoint cannot be understood.
    #[error("cannot read the checkpoint: {0}")]
    Checkpoint(#[from] RecoverError),
    /// The log failed.
    #[error("cannot open the raft log: {0}")]
    Log(#[from] LogError),
    /// Between the checkpoint's end and the log's beginning entries are missing.
    #[error(
        "the checkpoint {} holds entries up to {applied}, and the raft log in {} goes on behind \
         {start} only: the checkpoint is an older one than this log's. Put back the one that \
         belongs to the log", checkpoint.display(), log.display()
    )]
    CheckpointTooOld {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Its applied index.
        applied: u64,
        /// The log's directory.
        log: PathBuf,
        /// The index behind which it begins.
        start: u64,
    },
    /// The checkpoint is damaged, and so is the log, without which nothing can take its place.
    #[error(
        "{damage}; and the raft log, without which this member must not go on, cannot be used \
         either: {log}. What this member voted and acknowledged is not known any more. If the \
         cluster has a majority without it, remove it (`etcdctl member remove {}`), add it \
         again (`etcdctl member add`), and start it with an empty --data-dir and \
         --initial-cluster-state=existing. Otherwise restore a snapshot, for all members: \
         `kvorum snapshot restore <file> --data-dir <empty directory>`",
        id_of(*member)
    )]
    BothDamaged {
        /// What is wrong with the checkpoint.
        damage: String,
        /// What is wrong with the log.
        log: LogError,
        /// The member; 0 when the log does not tell.
        member: u64,
    },
    /// The checkpoint is damaged, there is nobody who has another, and the log begins too late.
    #[error(
        "{damage}. This member has no peers that could give it the state, and its raft log, \
         which is intact, holds only the entries {first} to {last}: all keys and leases that were \
         written before entry {first} and not since cannot be recovered from {}. Restore a \
         snapshot: `kvorum snapshot restore <file> --data-dir <empty directory>`, and start with \
         that directory; keep this one until you have what you need", data.display()
    )]
    Unrecoverable {
        /// What is wrong with the checkpoint.
        damage: String,
        /// The log's first entry.
        first: u64,
        /// Its last.
        last: u64,
        /// The data directory.
        data: PathBuf,
    },
}

impl OpenError {
    /// Whether the checkpoint is not what was written, or cannot be told from others: then `heal`
    /// may find another.
    pub fn is_damaged_checkpoint(&self) -> bool {
        match self {
            OpenError::Storage(error) | OpenError::Checkpoint(RecoverError::Storage(error)) => {
                error.is_damage()
            }
            OpenError::Checkpoint(RecoverError::Record { .. })
            | OpenError::CurrentMissing { .. }
            | OpenError::CheckpointTooOld { .. }
            | OpenError::SeveralCheckpoints { .. } => true,
            _ => false,
        }
    }

    /// Whether the checkpoint may be intact, and only the file damaged or missing that names it.
    fn is_of_current(&self) -> bool {
        let is_damaged = matches!(self, OpenError::Storage(StorageError::CurrentDamaged { .. }));
        is_damaged || matches!(self, OpenError::CurrentMissing { .. })
    }
}

/// A member as `etcdctl` takes it; 0 stands for one that is not known.
fn id_of(member: u64) -> String {
    if member == 0 { "<id>".to_owned() } else { format!("{member:x}") }
}

/// Whether [`open`] makes a new member, or finds that it was none: then it is worth asking the
/// others about it ([`Bootstrap::running`]). Changes nothing.
///
/// # Errors
/// What the disk says.
pub fn is_new(place: &Place) -> Result<bool, OpenError> {
    match place {
        Place::Memory => Ok(true),
        Place::Disk { data_dir, .. } => {
            check_directory(data_dir)?;
            // One that is not complete may be gone before the data directory is claimed.
            let is_made = stage::is_complete(data_dir)
                .and_then(|is_complete| Ok(is_complete || import::is_etcds(data_dir)?));
            Ok(!is_made.map_err(|error| unusable(data_dir, error))?
                && DiskGenerations::is_new(&data_dir.join("member"))?)
        }
    }
}

/// Whether the data directory is one, or not there yet.
fn check_directory(data_dir: &Path) -> Result<(), OpenError> {
    if data_dir.exists() && !data_dir.is_dir() {
        let error = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(unusable(data_dir, error));
    }
    Ok(())
}

fn unusable(data_dir: &Path, error: io::Error) -> OpenError {
    OpenError::Directory { path: data_dir.to_owned(), flag: "data-dir", error }
}

/// What a restore or an import has left is completed, or refused; an etcd's data is imported, or
/// refused.
fn adopt(
    claim: &Claim,
    wal_dir: Option<&Path>,
    fsync: bool,
    bootstrap: &Bootstrap,
) -> Result<(), OpenError> {
    let data_dir = claim.data_dir();
    let failed = |error| unusable(data_dir, error);
    let is_cut_short = stage::complete(data_dir).map_err(failed)?;
    if import::is_etcds(data_dir).map_err(failed)? {
        if !DiskGenerations::is_new(&data_dir.join("member"))? {
            return Err(OpenError::EtcdsDataToo(data_dir.to_owned()));
        }
        if !bootstrap.import_etcd_data {
            return Err(OpenError::EtcdsData(data_dir.to_owned()));
        }
        import::import(claim, wal_dir, fsync)?;
    } else if is_cut_short {
        return Err(OpenError::RestoreCutShort(stage::directory(data_dir)));
    } else if bootstrap.import_etcd_data && DiskGenerations::is_new(&data_dir.join("member"))? {
        return Err(OpenError::NothingToImport(data_dir.to_owned()));
    }
    if let Some(path) = import::left_by_a_refusal(data_dir) {
        let path = path.display();
        tracing::warn!(
            %path,
            "an etcd was started on this data directory by mistake, and refused it; the empty database \
             that it left may be removed"
        );
    }
    Ok(())
}

/// Reads a member back, or makes a new one. Blocks on the disk, and, when URLs with names
/// have to be compared, on their resolution.
///
/// # Errors
/// [`OpenError`]; nothing was changed then, except that a new member may be half made,
/// which the next attempt completes.
pub fn open(place: &Place, bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
    match place {
        Place::Memory => in_memory(bootstrap),
        Place::Disk { data_dir, wal_dir, fsync } => {
            let disk = OnDisk::of(data_dir, wal_dir.as_deref(), *fsync);
            check_directory(data_dir)?;
            let claim = Claim::of(data_dir, *fsync).map_err(|error| unusable(data_dir, error))?;
            let claim = claim.ok_or_else(|| OpenError::InUse(data_dir.clone()))?;
            adopt(&claim, wal_dir.as_deref(), *fsync, bootstrap)?;
            let opened = if DiskGenerations::is_new(&disk.member_dir)? {
                disk.begin(wal_dir.is_some(), bootstrap)
            } else {
                disk.recover(bootstrap)
            };
            let recovery = match opened {
                Err(error) if error.is_of_current() && current::repair(&disk, &error)? => {
                    disk.recover(bootstrap)?
                }
                opened => opened?,
            };
            if wal_dir.is_some() {
                // Where an etcd looks that is told of the data directory alone.
                Log::guard(&disk.member_dir.join("wal"));
            }
            Ok(recovery)
        }
    }
}

/// The directories of a member.
pub(super) struct OnDisk<'a> {
    pub(super) data_dir: &'a Path,
    pub(super) member_dir: PathBuf,
    pub(super) log_dir: PathBuf,
    fsync: bool,
}

impl<'a> OnDisk<'a> {
    pub(super) fn of(data_dir: &'a Path, wal_dir: Option<&Path>, fsync: bool) -> OnDisk<'a> {
        let member_dir = data_dir.join("member");
        let log_dir = wal_dir.map_or_else(|| member_dir.join("wal"), Path::to_owned);
        OnDisk { data_dir, member_dir, log_dir, fsync }
    }

    /// A new member, or one that was begun and no more.
    fn begin(&self, separate_log: bool, bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
        let has_log = Log::exists(&self.log_dir)?;
        let checkpoint = DiskGenerations::any(&self.member_dir)?;
        if !has_log && let Some(checkpoint) = checkpoint {
            return Err(self.checkpoint_missing(checkpoint));
        }
        let begun = if has_log { Some(self.begun_log(checkpoint)?) } else { None };
        let mut state = first_state(bootstrap, self.data_dir)?;
        make_directory(&self.member_dir, "data-dir", self.fsync)?;
        if separate_log {
            make_directory(&self.log_dir, "wal-dir", self.fsync)?;
        }
        let identity = identity(&state);
        let (mut log, mut recovered) = match begun {
            Some(begun) => begun,
            None => Log::open(self.log_options(identity, 0))?,
        };
        let starts_later = recovered.start.index > state.applied().index;
        if recovered.identity != identity || starts_later {
            return Err(OpenError::BegunForAnother(self.data_dir.to_owned()));
        }
        begin_log(&mut log, &mut recovered, state.applied())?;
        let (mut generations, mut storage) = DiskGenerations::begin_first(&self.member_dir)?;
        records::fill(&mut storage, &state.cut())?;
        generations.switch()?;
        Ok(Recovery {
            start: start(&state, recovered),
            state,
            log: Box::new(log),
            storage: Box::new(storage),
            generations: Box::new(generations),
            identity,
            is_new: true,
        })
    }

    /// The log of a member that was begun and no more. One that was written to is refused: its
    /// member was here before, whatever is left of it.
    fn begun_log(&self, checkpoint: Option<PathBuf>) -> Result<(Log, Recovered), OpenError> {
        // A checkpoint may know that what looks torn was acknowledged.
        let reaches = if checkpoint.is_some() { REACHES_UNKNOWN } else { 0 };
        // Whose it is, it says itself.
        let opened = Log::open(self.log_options(Identity::default(), reaches));
        match (checkpoint, opened) {
            (Some(checkpoint), Err(LogError::Damaged { .. })) => {
                Err(self.current_missing(checkpoint))
            }
            (Some(checkpoint), Ok((_, log))) if log.was_written_to() => {
                Err(self.current_missing(checkpoint))
            }
            (None, Ok((_, log))) if log.was_written_to() => {
                Err(self.checkpoint_missing(self.log_dir.clone()))
            }
            (_, opened) => Ok(opened?),
        }
    }

    /// A member that was here before.
    fn recover(&self, bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
        tracing::info!(
            data_dir = %self.data_dir.display(),
            dir_type = "member",
            "server has already been initialized; the flags --initial-* are ignored"
        );
        let (mut generations, mut storage) = DiskGenerations::open(&self.member_dir)?;
        let restored = records::recover(&mut storage)?;
        let installed = restored.head.installed;
        let state = StateMachine::restore(restored);
        // sled keeps most of what it has read; opened anew, it has read nothing.
        drop(storage);
        let storage = generations.reopen()?;
        let applied = state.applied().index;
        if !Log::exists(&self.log_dir)? {
            return Err(OpenError::LogMissing {
                log: self.log_dir.clone(),
                data: self.data_dir.to_owned(),
                applied,
            });
        }
        let identity = identity(&state);
        // A snapshot's entries have never been in this log.
        let reaches = if installed { 0 } else { applied };
        let (mut log, mut recovered) = Log::open(self.log_options(identity, reaches))?;
        let checkpoint = generations.counting().unwrap_or_else(|| self.member_dir.clone());
        self.check_fit(&recovered, &checkpoint, identity, applied)?;
        if installed {
            complete_install(&mut log, &mut recovered, state.applied())?;
        }
        if applied == 0 && !recovered.entries.is_empty() {
            return Err(OpenError::BeforeClusters(self.data_dir.to_owned()));
        }
        if bootstrap.force_new_cluster {
            force::refuse_if_told(&self.member_dir, state.member_id())?;
            force::leave_alone(&state, &mut log, &mut recovered)?;
        }
        generations.remove_leftovers()?;
        Ok(Recovery {
            start: start(&state, recovered),
            state,
            log: Box::new(log),
            storage,
            generations: Box::new(generations),
            identity,
            is_new: false,
        })
    }

    /// Whether a checkpoint is of the member whose log this is, and goes as far as the log begins.
    pub(super) fn check_fit(
        &self,
        log: &Recovered,
        checkpoint: &Path,
        identity: Identity,
        applied: u64,
    ) -> Result<(), OpenError> {
        if log.identity != identity {
            return Err(OpenError::OtherMember {
                log: self.log_dir.clone(),
                of_log: log.identity,
                data: self.data_dir.to_owned(),
                of_checkpoint: identity,
            });
        }
        if applied < log.start.index {
            return Err(OpenError::CheckpointTooOld {
                checkpoint: checkpoint.to_owned(),
                applied,
                log: self.log_dir.clone(),
                start: log.start.index,
            });
        }
        Ok(())
    }

    pub(super) fn log_options(&self, identity: Identity, reaches: u64) -> Options {
        Options {
            dir: self.log_dir.clone(),
            segment_bytes: SEGMENT_BYTES_DEFAULT,
            fsync: self.fsync,
            identity,
            reaches,
        }
    }

    fn checkpoint_missing(&self, found: PathBuf) -> OpenError {
        let current = DiskGenerations::current(&self.member_dir);
        OpenError::CheckpointMissing { current, found, data: self.data_dir.to_owned() }
    }

    fn current_missing(&self, checkpoint: PathBuf) -> OpenError {
        OpenError::CurrentMissing {
            current: DiskGenerations::current(&self.member_dir),
            checkpoint,
        }
    }
}

/// The checkpoint came from another member, up to `applied`. A crash may have come between the
/// switch to it and the log's new beginning, which is made up for: what the log holds instead
/// is of another history, or ends before.
pub(crate) fn complete_install(
    log: &mut dyn LogStore,
    recovered: &mut Recovered,
    applied: Mark,
) -> Result<(), LogError> {
    let entry = recovered.entries.iter().find(|entry| entry.index == applied.index);
    let has_entry = entry.is_some_and(|entry| entry.term == applied.term);
    if recovered.start == applied || has_entry {
        return Ok(());
    }
    let HardState { term, vote, .. } = recovered.hard_state;
    let hard_state = HardState {
        term: term.max(applied.term),
        // A vote is of its term.
        vote: if term >= applied.term { vote } else { 0 },
        commit: applied.index,
    };
    log.install(applied, hard_state)?;
    tracing::info!(index = applied.index, term = applied.term, "completed a snapshot");
    recovered.start = applied;
    recovered.hard_state = hard_state;
    recovered.entries.clear();
    Ok(())
}

fn in_memory(bootstrap: &Bootstrap) -> Result<Recovery, OpenError> {
    let mut storage = MemoryStorage::new();
    let mut state = first_state(bootstrap, Path::new("(memory)"))?;
    records::fill(&mut storage, &state.cut())?;
    let identity = identity(&state);
    let (mut log, mut recovered) = MemoryLog::open(&MemoryDisk::new(identity));
    begin_log(&mut log, &mut recovered, state.applied())?;
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

/// The state of a new member: of a cluster that begins, or of one that it joins.
pub(crate) fn first_state(
    bootstrap: &Bootstrap,
    data_dir: &Path,
) -> Result<StateMachine, OpenError> {
    let version = bootstrap.cluster_version.clone();
    let initial = &bootstrap.initial_cluster;
    if bootstrap.joins {
        let cluster = bootstrap.running.as_ref().ok_or(OpenError::NoPeerAnswered)?;
        let Bootstrap { name, max_learners, .. } = bootstrap;
        let this = join::find(cluster, initial, name, *max_learners, &join::resolve)?;
        refuse_started(this, data_dir)?;
        let MembersResponse { cluster_id, members } = cluster.clone();
        return Ok(StateMachine::joining(this.id, cluster_id, members, version));
    }
    let this = initial.iter().find(|(name, _)| *name == bootstrap.name);
    let (_, peer_urls) = this.ok_or_else(|| OpenError::NotInCluster(bootstrap.name.clone()))?;
    let id = member_id(peer_urls, &bootstrap.cluster_token);
    let members = Members::bootstrap(initial, &bootstrap.cluster_token);
    if let Some(cluster) = &bootstrap.running {
        if let Some(this) = cluster.members.iter().find(|member| member.id == id) {
            refuse_started(this, data_dir)?;
        }
        if cluster.cluster_id != members.cluster_id() {
            tracing::warn!(
                local_cluster_id = format!("{:x}", members.cluster_id()),
                peer_cluster_id = format!("{:x}", cluster.cluster_id),
                "a peer belongs to another cluster: compare --initial-cluster and \
                 --initial-cluster-token with the other members', or, to join a cluster that \
                 runs, remove this data directory and set --initial-cluster-state=existing"
            );
        }
    }
    Ok(StateMachine::bootstrap(id, members, version))
}

/// A member tells the others its client URLs once it runs. One that has, and comes back
/// with nothing, has forgotten whom it voted for and what it acknowledged: were it let in,
/// what a majority had acknowledged could be lost. (etcd lets it in as `existing`.)
fn refuse_started(member: &MemberRecord, data_dir: &Path) -> Result<(), OpenError> {
    if member.client_urls.is_empty() {
        return Ok(());
    }
    Err(OpenError::AlreadyBootstrapped { id: member.id, data: data_dir.to_owned() })
}

/// Lets an empty log start where the state of a new member is, durably.
fn begin_log(
    log: &mut dyn LogStore,
    recovered: &mut Recovered,
    start: Mark,
) -> Result<(), LogError> {
    if recovered.start != start {
        recovered.start = start;
        recovered.hard_state = HardState::of_start(start);
        log.install(start, recovered.hard_state)?;
    }
    Ok(())
}

pub(crate) fn identity(state: &StateMachine) -> Identity {
    Identity { cluster_id: state.members().cluster_id(), member_id: state.member_id() }
}

pub(crate) fn start(state: &StateMachine, recovered: Recovered) -> Start {
    // Nobody, of one that is yet to be sent the state: with others, it might vote or campaign
    // as if it knew who they are.
    let (voters, learners) = state.configuration_members();
    Start {
        id: recovered.identity.member_id,
        election_ticks: 0,
        catch_up_entries: 0,
        resume_ticks: 0,
        pre_vote: true,
        seed: 0,
        hard_state: recovered.hard_state,
        start: recovered.start,
        entries: recovered.entries,
        applied: state.applied().index,
        configuration: Configuration { voters, learners },
    }
}

/// Makes a directory with all above it. Its name is durable on return, and that of every
/// directory made here; those that were there before are taken to be, but for its parent,
/// which an earlier start may have made just before the power failed.
fn make_directory(path: &Path, flag: &'static str, fsync: bool) -> Result<(), OpenError> {
    let failed = |error| OpenError::Directory { path: path.to_owned(), flag, error };
    let missing = path.ancestors().take_while(|dir| !dir.exists()).count();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    if !fsync {
        return Ok(());
    }
    for dir in path.ancestors().skip(1).take(missing.max(2)) {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        match fs::File::open(dir) {
            Ok(dir) => dir.sync_all().map_err(failed)?,
            // One that may be passed through but not read is not this member's to sync.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
