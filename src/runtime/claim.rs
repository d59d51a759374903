//! While a member is made in a data directory, or opened, nobody else does either there.
//!
//! ```text
//! a start      claim ─▶ look: new? left? etcd's? ─▶ make or open the member ─▶ give up the claim
//! a restore    claim ─▶ look: is it empty? ─▶ read the file, fill member.new ─▶ member ─▶ give up
//! ```
//!
//! Whoever comes second waits for a moment (`PATIENCE` of `file_lock`), and then is
//! refused, or finds what the first one has made; if that gave up, and took the directory with it,
//! the second makes it anew. So no start takes a directory for new in which a
//! restore is about to succeed, and no restore succeeds under a server. Once the member is
//! there its own lock keeps two servers apart, and a restore sees that the directory is not empty.
//!
//! The directory itself is locked, not a file in it: nothing is left there, and what is not to be left
//! behind can be removed as a whole. On a file system that several machines share the claim holds on
//! this one only.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::file_lock::{DirectoryLock, FileLock};

/// How often a directory is made anew that somebody else removes meanwhile; then it is theirs.
const TIMES_MADE_MAX: usize = 10;

/// A data directory that is one's own until this is dropped. What was made of it goes then, if
/// nothing is in it.
#[derive(Debug)]
pub struct Claim {
    data_dir: PathBuf,
    /// Directories that were not there before, the topmost first.
    made: Vec<PathBuf>,
    _lock: FileLock,
}

impl Claim {
    /// Claims a data directory, which is made if need be, durably if it is to be `fsync`ed. `None`
    /// if it is somebody else's. Blocks.
    ///
    /// # Errors
    /// What the disk says.
    pub fn of(data_dir: &Path, fsync: bool) -> io::Result<Option<Claim>> {
        let made = make(data_dir, fsync)?;
        Claim::of_opened(data_dir, fsync, made, File::open(data_dir))
    }

    /// Claims one that was opened, or, if it is gone by then, one made in its place.
    fn of_opened(
        data_dir: &Path,
        fsync: bool,
        mut made: Vec<PathBuf>,
        mut opened: io::Result<File>,
    ) -> io::Result<Option<Claim>> {
        for _ in 0..TIMES_MADE_MAX {
            match opened {
                Ok(directory) => match FileLock::of_directory(directory, data_dir)? {
                    DirectoryLock::Locked(lock) => {
                        return Ok(Some(Claim {
                            data_dir: data_dir.to_owned(),
                            made,
                            _lock: lock,
                        }));
                    }
                    DirectoryLock::Kept => return Ok(None),
                    DirectoryLock::Gone => {}
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            made.extend(make(data_dir, fsync)?);
            // The topmost first.
            made.sort_unstable();
            made.dedup();
            opened = File::open(data_dir);
        }
        Ok(None)
    }

    /// The directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }
}

impl Drop for Claim {
    /// Fields are dropped after this: whoever waits for the lock sees that the directory has gone.
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            // One that is in use is kept.
            if fs::remove_dir(path).is_err() {
                break;
            }
        }
    }
}

/// Makes a directory with all above it. Returns those that were made.
fn make(path: &Path, fsync: bool) -> io::Result<Vec<PathBuf>> {
    let named = path.ancestors().filter(|dir| !dir.as_os_str().is_empty());
    let mut made: Vec<PathBuf> =
        named.take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
    made.reverse();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    for dir in made.iter().filter(|_| fsync) {
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        match File::open(parent.unwrap_or(Path::new("."))) {
            Ok(parent) => parent.sync_all()?,
            // One that may be passed through but not read is not this member's to sync.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(path: &Path) -> Option<Claim> {
        Claim::of(path, false).expect("the disk is fine")
    }

    #[test]
    fn a_claimed_directory_is_nobody_elses_until_it_is_given_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = claim(dir.path()).expect("free");
        assert!(claim(dir.path()).is_none(), "somebody else has it");
        drop(first);
        assert!(claim(dir.path()).is_some(), "it is free again");
        assert_eq!(fs::read_dir(dir.path()).expect("it was there before").count(), 0);
    }

    #[test]
    fn what_was_made_goes_unless_it_is_used() {
        let dir = tempfile::tempdir().expect("a directory");
        let (above, data_dir) = (dir.path().join("a/b"), dir.path().join("a/b/data"));
        drop(claim(&data_dir).expect("free"));
        assert!(!dir.path().join("a").exists(), "with all that was made for it");
        let used = claim(&data_dir).expect("free");
        fs::write(data_dir.join("member"), "").expect("written");
        drop(used);
        assert!(data_dir.join("member").exists());
        fs::remove_dir_all(&data_dir).expect("removed");
        drop(claim(&data_dir).expect("free"));
        assert!(above.is_dir() && !data_dir.exists(), "what was there before stays");
    }

    #[test]
    fn a_directory_that_was_removed_meanwhile_is_made_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let data_dir = dir.path().join("data");
        let first = claim(&data_dir).expect("free");
        let open = || File::open(&data_dir);
        let (waiting, another) = (open().expect("there"), open());
        drop(first);
        let locked = FileLock::of_directory(waiting, &data_dir).expect("the disk is fine");
        assert!(matches!(locked, DirectoryLock::Gone), "{locked:?}");
        let second = Claim::of_opened(&data_dir, false, Vec::new(), another);
        let second = second.expect("the disk is fine").expect("nobody has it");
        assert!(data_dir.is_dir() && claim(&data_dir).is_none(), "it is claimed");
        drop(second);
        assert!(!data_dir.exists(), "who made it removes it");
        let late = Claim::of_opened(&data_dir, false, Vec::new(), open());
        assert!(late.expect("the disk is fine").is_some(), "it was gone before it was opened");
    }
}
