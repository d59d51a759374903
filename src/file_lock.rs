//! The lock on a directory that one process at a time may have open.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long to wait for the lock of a process that is just ending.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// How often to look meanwhile.
pub(crate) const RETRY: Duration = Duration::from_millis(20);

/// An exclusive lock on a file, from [`FileLock::acquire`] until it is dropped or the
/// process ends, however it ends.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

/// What becomes of the wish to lock a directory.
#[derive(Debug)]
pub(crate) enum DirectoryLock {
    /// It is one's own.
    Locked(FileLock),
    /// Whoever has it keeps it.
    Kept,
    /// Whoever had it removed it before this one's turn.
    Gone,
}

impl FileLock {
    /// Makes the file at `path` if need be, and locks it. Waits up to [`PATIENCE`] for
    /// whoever has it; `None` means that they keep it.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn acquire(path: &Path) -> io::Result<Option<FileLock>> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        FileLock::lock(options.open(path)?)
    }

    /// Locks a directory itself, which was opened at `path`, as [`FileLock::acquire`] a file: nothing
    /// is left in it.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn of_directory(directory: File, path: &Path) -> io::Result<DirectoryLock> {
        let Some(lock) = FileLock::lock(directory)? else { return Ok(DirectoryLock::Kept) };
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let locked = identity(lock.file.metadata()?);
        let is_there = fs::metadata(path).is_ok_and(|there| identity(there) == locked);
        Ok(if is_there { DirectoryLock::Locked(lock) } else { DirectoryLock::Gone })
    }

    fn lock(file: File) -> io::Result<Option<FileLock>> {
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(FileLock { file })),
                Err(Errno::WOULDBLOCK) if begun.elapsed() < PATIENCE => thread::sleep(RETRY),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for FileLock {
    /// Closing the file is not enough: a child that another thread has just forked still
    /// has it open until it executes its program.
    fn drop(&mut self) {
        // The system would refuse only what is no lock.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_free_at_once_although_a_child_has_the_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("LOCK");
        let lock = FileLock::acquire(&path).unwrap().unwrap();
        let inherited = lock.file.try_clone().unwrap();
        drop(lock);
        let begun = Instant::now();
        assert!(FileLock::acquire(&path).unwrap().is_some());
        assert!(begun.elapsed() < PATIENCE / 2, "waited for the child");
        drop(inherited);
    }

    #[test]
    fn is_refused_while_somebody_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("LOCK");
        let _lock = FileLock::acquire(&path).unwrap().unwrap();
        assert!(FileLock::acquire(&path).unwrap().is_none());
    }
}
