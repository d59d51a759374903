//! A snapshot file: a database, and behind it its SHA-256, as `etcdctl snapshot save` writes it;
//! or a database alone, as it lies in an etcd's data directory.
//!
//! Pages come in multiples of 512 bytes, so the length tells the two apart.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::decode::DecodeError;
use super::{Digest, TRAILER_BYTES};
use crate::bolt::read::{Database, ReadError};

/// A database's length is a multiple of this, in bytes.
const LENGTH_UNIT_BYTES: u64 = 512;
/// So much is read at once to be hashed, in bytes.
const HASHED_BYTES: usize = 256 << 10;

/// Why a snapshot file is refused. Each text says which file, and why.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is none, or it cannot be opened.
    #[error("open {}: {error}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// It is a directory, or a device.
    #[error("{} is no file: name the snapshot, or an etcd's member/snap/db", .0.display())]
    NoFile(PathBuf),
    /// It cannot be read.
    #[error("read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// No hash is behind the database.
    #[error(
        "snapshot missing hash but --skip-hash-check=false: {} has {len} bytes, and a file of \
         `snapshot save` has 32 more than whole pages. It was cut off, or is something else; if \
         it was copied from a data directory, add --skip-hash-check", path.display()
    )]
    HashMissing {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        len: u64,
    },
    /// The hash is another one.
    #[error(
        "expected sha256 {expected}, got {found}: {} was changed after it was saved; use another \
         copy", path.display()
    )]
    HashWrong {
        /// The file.
        path: PathBuf,
        /// What is behind the database.
        expected: String,
        /// The database's.
        found: String,
    },
    /// It is no database, or a damaged one.
    #[error("{}: {error}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: ReadError,
    },
    /// The database is not etcd's, or a damaged one.
    #[error("{}: {error}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: DecodeError,
    },
}

/// An open snapshot file.
#[derive(Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl SnapshotFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`FileError::Open`], [`FileError::NoFile`].
    pub fn open(path: &Path) -> Result<SnapshotFile, FileError> {
        let failed = |error| FileError::Open { path: path.to_owned(), error };
        // Looked at first: opening a named pipe would wait for who writes to it.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(FileError::NoFile(path.to_owned()));
        }
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        Ok(SnapshotFile { path: path.to_owned(), file, len })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a hash is behind the database.
    pub fn has_hash(&self) -> bool {
        self.len % LENGTH_UNIT_BYTES == TRAILER_BYTES as u64
    }

    /// The database's length, in bytes.
    pub fn database_bytes(&self) -> u64 {
        if self.has_hash() { self.len - TRAILER_BYTES as u64 } else { self.len }
    }

    /// Reads all of it, and compares it with its hash.
    ///
    /// # Errors
    /// [`FileError::HashMissing`], [`FileError::HashWrong`], [`FileError::Read`].
    pub fn check_hash(&self) -> Result<(), FileError> {
        if !self.has_hash() {
            return Err(FileError::HashMissing { path: self.path.clone(), len: self.len });
        }
        let failed = |error| FileError::Read { path: self.path.clone(), error };
        let len = self.database_bytes();
        let mut expected = [0; TRAILER_BYTES];
        self.file.read_exact_at(&mut expected, len).map_err(failed)?;
        let mut hash = Digest::new();
        let mut buffer = vec![0; HASHED_BYTES];
        let mut at = 0;
        while at < len {
            let left = usize::try_from(len - at).unwrap_or(HASHED_BYTES).min(HASHED_BYTES);
            let piece = buffer.get_mut(..left).unwrap_or_default();
            self.file.read_exact_at(piece, at).map_err(failed)?;
            hash.add(piece);
            at += left as u64;
        }
        let found = hash.finish();
        if found == expected {
            return Ok(());
        }
        Err(FileError::HashWrong {
            path: self.path.clone(),
            expected: hex(&expected),
            found: hex(&found),
        })
    }

    /// The database in it, whose hash is not looked at.
    ///
    /// # Errors
    /// [`FileError::Database`], [`FileError::Read`].
    pub fn database(&self) -> Result<Database, FileError> {
        let failed = |error| FileError::Read { path: self.path.clone(), error };
        let file = self.file.try_clone().map_err(failed)?;
        Database::open(file, self.database_bytes())
            .map_err(|error| FileError::Database { path: self.path.clone(), error })
    }

    /// What is wrong with what is in it, with its name.
    pub fn content_error(&self, error: DecodeError) -> FileError {
        FileError::Content { path: self.path.clone(), error }
    }
}

/// Bytes as people compare them.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(bytes: &[u8]) -> (tempfile::TempDir, SnapshotFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        std::fs::write(&path, bytes).unwrap();
        let file = SnapshotFile::open(&path).unwrap();
        (dir, file)
    }

    #[test]
    fn the_hash_is_behind_whole_pages_and_is_compared() {
        let mut bytes = vec![7; 1024];
        let (_dir, file) = written(&bytes);
        assert!(!file.has_hash());
        assert_eq!(file.database_bytes(), 1024);
        let error = file.check_hash().unwrap_err().to_string();
        assert!(error.starts_with("snapshot missing hash but --skip-hash-check=false"), "{error}");

        let mut hash = Digest::new();
        hash.add(&bytes);
        bytes.extend_from_slice(&hash.finish());
        let (_dir, file) = written(&bytes);
        assert_eq!(file.database_bytes(), 1024);
        file.check_hash().unwrap();
        bytes[500] ^= 1;
        let (_dir, file) = written(&bytes);
        let error = file.check_hash().unwrap_err();
        assert!(matches!(error, FileError::HashWrong { .. }), "{error}");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(SnapshotFile::open(dir.path()), Err(FileError::NoFile(_))));
        let missing = SnapshotFile::open(&dir.path().join("x")).unwrap_err().to_string();
        assert!(missing.starts_with("open ") && missing.contains("No such file"), "{missing}");
    }
}
