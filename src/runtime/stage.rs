//! A member that is made from etcd's database: beside where it will be, and named in the end.
//!
//! ```text
//! <data-dir>/member.new/   a checkpoint from the rows ─ synced ─▶ a log that begins behind it ─▶ CURRENT
//!        │ rename
//!        ▼
//! <data-dir>/member/       a member like any other
//! ```
//!
//! It is made within the data directory, which may be a file system of its own. A kill leaves
//! `member.new`: without `CURRENT` it is refused by a start, for somebody wanted this data
//! served and not an empty member; with `CURRENT` it is complete, and a start gives it its name
//! ([`complete`]). Whoever makes a member again removes what was left before. Meanwhile the data
//! directory is claimed ([`Claim`]), so that what lies there was left, and is nobody's work under way.
//!
//! The database is read twice: the first time nothing is written, and everything that can be
//! wrong with it is found ([`Source::open`]).

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use prost::Message as _;

use super::claim::Claim;
use super::records;
use crate::backup::decode::{self, Contents, DecodeError, major_minor};
use crate::backup::file::{FileError, SnapshotFile};
use crate::bolt::read::Database;
use crate::log::{
    HardState, Identity, Log, LogError, LogStore as _, Mark, Options, SEGMENT_BYTES_DEFAULT,
};
use crate::mvcc::Revision;
use crate::pb::kvorumpb::{CheckpointHead, MemberRecord};
use crate::state::{AuthRow, AuthTable};
use crate::storage::{Batch, DiskGenerations, Generations as _, Storage as _, StorageError, Table};
use crate::version::ETCD_STORAGE_VERSION;

/// The directory that is being filled, within the data directory.
const STAGED: &str = "member.new";
/// What it is called in the end.
const MEMBER: &str = "member";
/// Records are written in runs of so many bytes, or of so many records.
const RUN_BYTES: usize = 8 << 20;
const RUN_RECORDS: usize = 1 << 16;
/// Of so many records each the caller is told how far it is.
const RECORDS_PER_PROGRESS: u64 = 4096;

/// Why no member was made. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Users would have to log in, and nobody would ask them to.
    #[error(
        "authentication is enabled in {}, and kvorum has none yet: it would serve the data to \
         everyone. Run `etcdctl auth disable` and save again, or, to have it disabled in what is \
         restored, add --disable-auth to `kvorum snapshot restore`; users and roles are kept",
        .0.display()
    )]
    AuthEnabled(PathBuf),
    /// A newer etcd wrote it.
    #[error(
        "{} is of storage version {found}, and kvorum knows those up to {ETCD_STORAGE_VERSION}: \
         downgrade it with `etcdutl migrate`, or use a newer kvorum", path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// The revision cannot be raised so far.
    #[error("--bump-revision={0}: the revision would be larger than there can be")]
    Bump(u64),
    /// The file changed between its two readings.
    #[error("{} has changed while it was read: use a copy that nobody writes to", .0.display())]
    Changed(PathBuf),
    /// Somebody else makes a member here.
    #[error(
        "data-dir {} is in use: a server starts on it, or another restore fills it. Stop that server, \
         or wait until the other is done, and run this again, or with another --data-dir", .0.display()
    )]
    InUse(PathBuf),
    /// A directory cannot be used.
    #[error("cannot {action} {}: {error}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// Which directory.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// The log's directory holds the log of a member that has run.
    #[error("{} holds a log of kvorum: set --wal-dir to an empty directory", .0.display())]
    LogInUse(PathBuf),
    /// The disk is full, or refused. (What the storage and the log say of it is for a member that
    /// runs, and would be wrong here.)
    #[error(
        "cannot {action} {}: {error}. Free space there, or repair the disk, and run this again: \
         nothing is left of this attempt", path.display()
    )]
    Disk {
        /// What was tried.
        action: String,
        /// With which file or directory.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// The checkpoint cannot be written.
    #[error(transparent)]
    Storage(StorageError),
    /// The log cannot be begun.
    #[error(transparent)]
    Log(LogError),
}

impl From<StorageError> for StageError {
    fn from(error: StorageError) -> StageError {
        match error {
            StorageError::Io { dir: path, action, source: error } => {
                StageError::Disk { action: format!("{action} in"), path, error }
            }
            error => StageError::Storage(error),
        }
    }
}

impl From<LogError> for StageError {
    fn from(error: LogError) -> StageError {
        match error {
            LogError::NoSpace { file: path } => {
                let error = rustix::io::Errno::NOSPC.into();
                StageError::Disk { action: "write".to_owned(), path, error }
            }
            LogError::Io { action, path, source } => {
                let error = io::Error::new(source.kind(), source);
                StageError::Disk { action: action.to_owned(), path, error }
            }
            error => StageError::Log(error),
        }
    }
}

/// A database whose content is in order.
pub struct Source {
    file: SnapshotFile,
    database: Database,
    /// What is in it.
    pub contents: Contents,
}

impl Source {
    /// Reads all of a file, writes nothing, and keeps no keys.
    ///
    /// # Errors
    /// Its hash, a page or a row is not right, or it is of a newer etcd. Whether authentication
    /// is enabled is the caller's to look at.
    pub fn open(path: &Path, skip_hash_check: bool) -> Result<Source, StageError> {
        let file = SnapshotFile::open(path)?;
        // Each takes about as long as the other. What the hash says goes first: that the file was
        // changed says more than what in it is wrong.
        let (hashed, checked) = thread::scope(|scope| {
            let hashed = (!skip_hash_check).then(|| scope.spawn(|| file.check_hash()));
            let checked = check(&file);
            (hashed.map(thread::ScopedJoinHandle::join), checked)
        });
        match hashed {
            Some(Ok(hashed)) => hashed?,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => {}
        }
        let (database, contents) = checked?;
        if let Some(found) = &contents.storage_version
            && major_minor(found) > major_minor(ETCD_STORAGE_VERSION)
        {
            return Err(StageError::Newer { path: path.to_owned(), found: found.clone() });
        }
        Ok(Source { file, database, contents })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Turns authentication off; users and roles remain.
    pub fn disable_auth(&mut self) {
        for row in &mut self.contents.auth {
            if row.table == AuthTable::Auth && row.key == crate::backup::auth::ENABLED {
                row.value = vec![0].into();
            }
        }
        self.contents.auth_enabled = false;
    }
}

/// The database of a file, when everything in it is in order.
fn check(file: &SnapshotFile) -> Result<(Database, Contents), FileError> {
    let database = file.database()?;
    let contents = decode::read(&database, |_, _, _| Ok::<_, DecodeError>(()))
        .map_err(|error| file.content_error(error))?;
    Ok((database, contents))
}

/// What a new member has that its database does not say, or that differs from it.
pub struct NewMember {
    /// Whose it is.
    pub identity: Identity,
    /// Who belongs to its cluster.
    pub members: Vec<MemberRecord>,
    /// Who left it.
    pub removed_members: Vec<u64>,
    /// Where its log begins.
    pub mark: Mark,
    /// What raft begins with.
    pub hard_state: HardState,
    /// A revision behind the newest one, up to which all is compacted.
    pub bumped: Option<Revision>,
}

impl NewMember {
    /// What all members that are made from one file for one cluster have in common is summed up
    /// in the rolling hash, so that one that was made from another is named at once.
    fn head(&self, contents: &Contents) -> CheckpointHead {
        let mut rolling = contents.rolling;
        let (mut revision, mut compact_revision) = (contents.revision(), contents.compact_revision);
        if let Some(bumped) = self.bumped {
            rolling.record(bumped, false, b"");
            (revision, compact_revision) = (bumped.main, bumped.main);
        }
        rolling.compaction(compact_revision);
        for lease in &contents.leases {
            rolling.lease(lease.id, Some(lease));
        }
        for alarm in &contents.alarms {
            rolling.alarm(alarm.member_id, alarm.alarm, true);
        }
        for AuthRow { table, key, value } in &contents.auth {
            rolling.auth_row(*table as u64, key, value);
        }
        for member in &self.members {
            rolling.member(member.id, Some(member));
        }
        rolling.entry(self.mark);
        CheckpointHead {
            applied_index: self.mark.index,
            applied_term: self.mark.term,
            revision,
            compact_revision,
            cluster_id: self.identity.cluster_id,
            member_id: self.identity.member_id,
            cluster_version: ETCD_STORAGE_VERSION.to_owned(),
            alarms: contents.alarms.clone(),
            removed_members: self.removed_members.clone(),
            installed: false,
            rolling_hash: rolling.value(),
        }
    }
}

/// Where a member is made that will be in this data directory.
pub fn directory(data_dir: &Path) -> PathBuf {
    data_dir.join(STAGED)
}

/// Whether a member lies in the data directory that was not given its name.
///
/// # Errors
/// What the disk says.
pub fn is_left(data_dir: &Path) -> io::Result<bool> {
    data_dir.join(STAGED).try_exists()
}

/// Whether it was completed.
///
/// # Errors
/// What the disk says.
pub fn is_complete(data_dir: &Path) -> io::Result<bool> {
    DiskGenerations::current(&data_dir.join(STAGED)).try_exists()
}

/// Gives a member its name that was completed before the process ended. Returns whether what
/// lies there now was not completed.
///
/// # Errors
/// What the disk says.
pub fn complete(data_dir: &Path) -> io::Result<bool> {
    let staged = data_dir.join(STAGED);
    if !staged.try_exists()? {
        return Ok(false);
    }
    if !is_complete(data_dir)? || data_dir.join(MEMBER).try_exists()? {
        return Ok(true);
    }
    name(data_dir)?;
    Ok(false)
}

fn name(data_dir: &Path) -> io::Result<()> {
    fs::rename(data_dir.join(STAGED), data_dir.join(MEMBER))?;
    sync_directory(data_dir)
}

/// Waits until the names in a directory are on the disk.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The directory that is being filled. Dropped, it is gone, with all that was made for it.
pub struct Staged {
    data_dir: PathBuf,
    dir: PathBuf,
    /// To be removed if no member comes of it, in this order.
    made: Vec<PathBuf>,
    /// The log's directory, if it was there before and held no log, with what was in it: all else is
    /// to be removed.
    found: Option<(PathBuf, HashSet<OsString>)>,
}

impl Staged {
    /// Begins to make a member in a data directory. What an earlier attempt has left is removed.
    ///
    /// # Errors
    /// [`StageError::Directory`].
    pub fn begin(claim: &Claim) -> Result<Staged, StageError> {
        let data_dir = claim.data_dir();
        let dir = data_dir.join(STAGED);
        let failed = |action| {
            let path = dir.clone();
            move |error| StageError::Directory { action, path, error }
        };
        if dir.try_exists().map_err(failed("look for"))? {
            fs::remove_dir_all(&dir).map_err(failed("remove what an earlier attempt left in"))?;
        }
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(failed("make"))?;
        Ok(Staged { data_dir: data_dir.to_owned(), made: vec![dir.clone()], found: None, dir })
    }

    /// Fills it: a checkpoint, a log, and what says that it is complete. `log_dir` is where
    /// the log will be, if not in the member's own directory. `progress` is told how many
    /// records were carried over.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn fill(
        &mut self,
        source: &Source,
        member: &NewMember,
        log_dir: Option<&Path>,
        fsync: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), StageError> {
        let (mut generations, mut storage) = DiskGenerations::begin_first(&self.dir)?;
        let Source { file, database, contents } = source;
        let (mut run, mut run_bytes, mut count) = (Vec::new(), 0, 0);
        let read = decode::read(database, |revision, tombstone, kv| {
            run.push((records::key(revision), records::value(tombstone, kv)));
            run_bytes += kv.len();
            if run_bytes >= RUN_BYTES || run.len() >= RUN_RECORDS {
                storage.freeze(&mut run.drain(..)).map_err(Carry::Storage)?;
                run_bytes = 0;
            }
            count += 1;
            if count % RECORDS_PER_PROGRESS == 0 {
                progress(count);
            }
            Ok(())
        });
        let read = match read {
            Ok(read) => read,
            Err(Carry::Storage(error)) => return Err(error.into()),
            Err(Carry::Decode(error)) => return Err(file.content_error(error).into()),
        };
        if (read.rolling, read.records) != (contents.rolling, contents.records) {
            return Err(StageError::Changed(file.path().to_owned()));
        }
        if let Some(bumped) = member.bumped {
            run.push((records::key(bumped), records::value(false, b"")));
        }
        storage.freeze(&mut run.into_iter())?;
        let mut batch = Batch::new();
        for lease in &contents.leases {
            batch.put(Table::Lease, lease.id.to_be_bytes().to_vec(), lease.encode_to_vec());
            if batch.is_full() {
                storage.write(std::mem::take(&mut batch))?;
            }
        }
        for AuthRow { table, key, value } in &contents.auth {
            batch.put(records::auth_table(*table), key.clone(), value.clone());
            if batch.is_full() {
                storage.write(std::mem::take(&mut batch))?;
            }
        }
        for record in &member.members {
            batch.put(Table::Member, record.id.to_be_bytes().to_vec(), record.encode_to_vec());
        }
        batch.put(Table::Head, records::HEAD, member.head(contents).encode_to_vec());
        storage.write(batch)?;
        storage.sync()?;
        progress(count);
        self.begin_log(member, log_dir, fsync)?;
        drop(storage);
        generations.switch()?;
        Ok(())
    }

    fn begin_log(
        &mut self,
        member: &NewMember,
        log_dir: Option<&Path>,
        fsync: bool,
    ) -> Result<(), StageError> {
        let dir = log_dir.map_or_else(|| self.dir.join("wal"), Path::to_owned);
        if !dir.exists() {
            self.made.push(dir.clone());
        } else if !Log::exists(&dir)? {
            let failed = |error| StageError::Directory { action: "list", path: dir.clone(), error };
            self.found = Some((dir.clone(), names(&dir).map_err(failed)?));
        }
        let options = Options {
            dir: dir.clone(),
            segment_bytes: SEGMENT_BYTES_DEFAULT,
            fsync,
            identity: member.identity,
            reaches: 0,
        };
        let (mut log, recovered) = Log::open(options)?;
        // An earlier attempt may have begun it; no more than that.
        if !recovered.entries.is_empty() || recovered.identity != member.identity {
            return Err(StageError::LogInUse(dir));
        }
        log.install(member.mark, member.hard_state)?;
        log.close()?;
        if log_dir.is_some() {
            Log::guard(&self.dir.join("wal"));
        }
        Ok(())
    }

    /// From here on it is kept, whatever happens: a start gives it its name.
    pub fn keep(&mut self) {
        self.made.clear();
        self.found = None;
    }

    /// Makes a member of it. Durable on return.
    ///
    /// # Errors
    /// [`StageError::Directory`]; whether it has its name a start will tell, and complete it.
    pub fn finish(mut self) -> Result<(), StageError> {
        self.keep();
        name(&self.data_dir).map_err(|error| StageError::Directory {
            action: "rename",
            path: self.dir.clone(),
            error,
        })?;
        if let Some(parent) = self.data_dir.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            // One that may not be read is not this member's to sync.
            let _ = sync_directory(parent);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for path in self.made.drain(..).rev() {
            // What cannot be removed is refused by a start, and removed by the next attempt.
            let _ = fs::remove_dir_all(&path);
        }
        let Some((dir, before)) = self.found.take() else { return };
        for name in names(&dir).unwrap_or_default().difference(&before) {
            // A log puts no directories there.
            let _ = fs::remove_file(dir.join(name));
        }
    }
}

/// What is in a directory.
fn names(dir: &Path) -> io::Result<HashSet<OsString>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
}

/// What ends a reading.
enum Carry {
    Storage(StorageError),
    Decode(DecodeError),
}

impl From<DecodeError> for Carry {
    fn from(error: DecodeError) -> Carry {
        Carry::Decode(error)
    }
}
