//! The directory of a log: names, lock, modes, and syncing what a name points to.
//!
//! ```text
//! LOCK                                  held while a process has the log open
//! 0000000000000007-00000000000186a0.log segment 7, begun when the next index was 100000
//! 0000000000000003.spare                a file to write a later segment over
//! segment-….tmp  spare-….tmp            being made; removed when the log is opened
//! kvorum.wal                            keeps etcd away, see [`super::guard`]
//! ```
//!
//! Other names are left alone. Directories are made with mode 0700, files with 0600.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{LogError, guard};
use crate::file_lock::FileLock;

/// Sequences and numbers of spares in names stay below.
const NUMBER_MAX: u64 = 1 << 60;
/// Held while a process has the log open.
const LOCK: &str = "LOCK";

/// Points a crash can fall between; tests look at the directory at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    HeaderWritten,
    HeaderSynced,
    SegmentNamed,
    SegmentSynced,
    BatchWritten,
    BatchSynced,
    SegmentGone,
    RecyclingSynced,
}

/// An open, locked directory.
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    fsync: bool,
    /// Holds the lock; the kernel gives it up with the descriptor.
    _lock: FileLock,
    #[cfg(test)]
    pub(super) observer: parking_lot::Mutex<Option<Observer>>,
}

/// What a test does at each [`Step`].
#[cfg(test)]
pub(super) type Observer = Box<dyn FnMut(Step) + Send>;

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What [`Directory::list`] finds.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// (sequence, first index, path), in order of sequence.
    pub(super) segments: Vec<(u64, u64, PathBuf)>,
    /// (number, path)
    pub(super) spares: Vec<(u64, PathBuf)>,
    pub(super) temporaries: Vec<PathBuf>,
}

impl Directory {
    /// Makes the directory if need be, and locks it.
    pub(super) fn open(path: &Path, fsync: bool) -> Result<Directory, LogError> {
        create_synced(path, fsync)?;
        let lock_path = path.join(LOCK);
        let lock = FileLock::acquire(&lock_path)
            .map_err(|e| LogError::io("lock", &lock_path, e))?
            .ok_or_else(|| LogError::Locked { dir: path.to_owned() })?;
        let handle = File::open(path).map_err(|e| LogError::io("open", path, e))?;
        Ok(Directory {
            path: path.to_owned(),
            handle,
            fsync,
            _lock: lock,
            #[cfg(test)]
            observer: parking_lot::Mutex::new(None),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether anything is synced at all.
    pub(super) fn fsync(&self) -> bool {
        self.fsync
    }

    pub(super) fn segment(&self, sequence: u64, first_index: u64) -> PathBuf {
        self.path.join(format!("{sequence:016x}-{first_index:016x}.log"))
    }

    pub(super) fn spare(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number:016x}.spare"))
    }

    pub(super) fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.tmp"))
    }

    /// Creates a file, empty even if it was there.
    pub(super) fn create(&self, path: &Path) -> Result<File, LogError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| LogError::io("create", path, e))
    }

    /// Waits until the directory's names are on the disk.
    pub(super) fn sync(&self) -> Result<(), LogError> {
        if !self.fsync {
            return Ok(());
        }
        self.handle.sync_all().map_err(|e| LogError::io("sync directory", &self.path, e))
    }

    /// Waits until a file is on the disk, its size included.
    pub(super) fn sync_file(&self, file: &File, path: &Path) -> Result<(), LogError> {
        if !self.fsync {
            return Ok(());
        }
        file.sync_data().map_err(|e| LogError::io("sync", path, e))
    }

    /// Sorts the names of the directory.
    pub(super) fn list(&self) -> Result<Listing, LogError> {
        let failed = |e| LogError::io("list", &self.path, e);
        let mut listing = Listing::default();
        for item in fs::read_dir(&self.path).map_err(failed)? {
            let path = item.map_err(failed)?.path();
            match classify(&path) {
                Name::Segment { sequence, first_index } => {
                    listing.segments.push((sequence, first_index, path));
                }
                Name::Spare { number } => listing.spares.push((number, path)),
                Name::Temporary => listing.temporaries.push(path),
                Name::Other => {}
            }
        }
        listing.segments.sort();
        listing.spares.sort();
        Ok(listing)
    }

    /// Tells a watching test how far the work has come.
    #[cfg(test)]
    pub(super) fn step(&self, step: Step) {
        if let Some(observer) = self.observer.lock().as_mut() {
            observer(step);
        }
    }

    /// Tells a watching test how far the work has come.
    #[cfg(not(test))]
    pub(super) fn step(&self, _: Step) {}
}

/// Whether `dir` holds a log.
pub(super) fn holds_a_log(dir: &Path) -> Result<bool, LogError> {
    let items = match fs::read_dir(dir) {
        Ok(items) => items,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(LogError::io("list", dir, e)),
    };
    for item in items {
        let path = item.map_err(|e| LogError::io("list", dir, e))?.path();
        if matches!(classify(&path), Name::Segment { .. }) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether everything in `dir` is of a log.
pub(super) fn holds_a_log_only(dir: &Path) -> Result<bool, LogError> {
    let failed = |e| LogError::io("list", dir, e);
    for item in fs::read_dir(dir).map_err(failed)? {
        let path = item.map_err(failed)?.path();
        let is_ours = path.file_name().is_some_and(|name| name == LOCK || name == guard::GUARD);
        if !is_ours && matches!(classify(&path), Name::Other) {
            return Ok(false);
        }
    }
    Ok(true)
}

enum Name {
    Segment { sequence: u64, first_index: u64 },
    Spare { number: u64 },
    Temporary,
    Other,
}

fn classify(path: &Path) -> Name {
    let hex = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    // One that was never counted up to cannot be counted on from.
    let counted = |text: &str| hex(text).filter(|&number| number < NUMBER_MAX);
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Name::Other };
    match name.split_once('.') {
        Some((stem, "tmp")) if stem.starts_with("segment-") || stem.starts_with("spare-") => {
            Name::Temporary
        }
        Some((stem, "spare")) => counted(stem).map_or(Name::Other, |number| Name::Spare { number }),
        Some((stem, "log")) => match stem.split_once('-').map(|(a, b)| (counted(a), hex(b))) {
            Some((Some(sequence), Some(first_index))) => Name::Segment { sequence, first_index },
            _ => Name::Other,
        },
        _ => Name::Other,
    }
}

/// Makes a directory with all above it, and syncs the name of each that was made; that of
/// the last one in any case, for an earlier start may have died just before.
fn create_synced(path: &Path, fsync: bool) -> Result<(), LogError> {
    let above = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty());
    let missing: Vec<&Path> =
        std::iter::once(path).chain(above.take_while(|p| !p.exists())).collect();
    for &dir in missing.iter().rev() {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(LogError::io("create directory", dir, e));
            }
            _ => {}
        }
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        match File::open(parent) {
            Ok(parent_dir) if fsync => {
                parent_dir.sync_all().map_err(|e| LogError::io("sync directory", parent, e))?;
            }
            Ok(_) => {}
            // One that may be passed through but not read is not ours to sync.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => return Err(LogError::io("open", parent, e)),
        }
    }
    Ok(())
}
