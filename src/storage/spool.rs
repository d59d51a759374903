//! Where an image is kept while it arrives: a file, or memory for a member without a disk.
//!
//! ```text
//! member/snap/incoming-7.image      being received, or waiting for its sender to come back
//! ```
//!
//! A spool only grows at its end, and is gone when it is dropped. What a crash leaves behind is
//! removed at the next start: nothing in it counts, and its sender begins anew.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;

use super::image::{ImageError, ImageReader};
use crate::large_file::{self, Unlinked};

/// Spools there may be at a time. Each may become as large as a whole state.
pub const SPOOLS_MAX: usize = 2;
const READ_BUFFER_BYTES: usize = 256 << 10;
const PREFIX: &str = "incoming-";
const SUFFIX: &str = ".image";

/// Makes spools.
#[derive(Debug)]
pub struct Spools {
    /// `None`: in memory.
    dir: Option<PathBuf>,
    next: AtomicU64,
    live: Arc<AtomicUsize>,
}

/// An image, or the beginning of one.
#[derive(Debug)]
pub struct Spool {
    content: Content,
    len: u64,
    live: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Content {
    File { file: File, path: PathBuf },
    Memory(VecDeque<Bytes>),
}

impl Spools {
    /// Spools in a directory, which is made when there is none, and in which what an earlier
    /// life has left is removed; in memory without a directory.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(dir: Option<&Path>) -> io::Result<Spools> {
        if let Some(dir) = dir {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(Spools { dir: dir.map(Path::to_owned), next: AtomicU64::new(1), live: Arc::default() })
    }

    /// An empty spool; `None` when there are [`SPOOLS_MAX`].
    ///
    /// # Errors
    /// What the disk says.
    pub fn begin(&self) -> io::Result<Option<Spool>> {
        let admit = |live| (live < SPOOLS_MAX).then_some(live + 1);
        if self.live.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).is_err() {
            return Ok(None);
        }
        // From here on dropping the spool gives its place back.
        let mut spool = Spool {
            content: Content::Memory(VecDeque::new()),
            len: 0,
            live: Arc::clone(&self.live),
        };
        if let Some(dir) = &self.dir {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("{PREFIX}{number}{SUFFIX}"));
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true).mode(0o600);
            let file = options.open(&path)?;
            spool.content = Content::File { file, path };
        }
        Ok(Some(spool))
    }
}

impl Spool {
    /// Adds bytes at the end. Blocks on the disk.
    ///
    /// # Errors
    /// What the disk says. The spool is then as it was before.
    pub fn append(&mut self, bytes: Bytes) -> io::Result<()> {
        let added = bytes.len() as u64;
        match &mut self.content {
            Content::Memory(pieces) => pieces.push_back(bytes),
            Content::File { file, .. } => {
                // A write that failed half way is written over.
                file.seek(SeekFrom::Start(self.len))?;
                file.write_all(&bytes)?;
            }
        }
        self.len += added;
        Ok(())
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has arrived yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The image, from its beginning. Blocks on the disk.
    ///
    /// # Errors
    /// [`ImageError`]: what has arrived is none.
    pub fn read(&mut self) -> Result<ImageReader<Box<dyn Read + '_>>, ImageError> {
        let len = self.len;
        let input: Box<dyn Read + '_> = match &mut self.content {
            Content::Memory(pieces) => Box::new(Pieces { pieces, next: 0, rest: &[] }),
            Content::File { file, .. } => {
                file.seek(SeekFrom::Start(0))?;
                Box::new(BufReader::with_capacity(READ_BUFFER_BYTES, file))
            }
        };
        ImageReader::new(input, len)
    }

    /// Reads all of it, to see that it is a whole image and as it was made. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// [`ImageError`]: it is not.
    pub fn verify(&mut self) -> Result<(), ImageError> {
        let mut image = self.read()?;
        while image.next()?.is_some() {}
        Ok(())
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Content::File { path, .. } = &self.content {
            // If it cannot be removed now, the next start tries again.
            let _ = large_file::unlink(path).map(Unlinked::give_back_later);
        }
        self.live.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Pieces, read as one.
struct Pieces<'a> {
    pieces: &'a VecDeque<Bytes>,
    next: usize,
    rest: &'a [u8],
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            let Some(piece) = self.pieces.get(self.next) else { return Ok(0) };
            self.rest = piece;
            self.next += 1;
        }
        self.rest.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Table;
    use super::super::image::ImageWriter;
    use super::*;

    fn image() -> Vec<u8> {
        let mut writer = ImageWriter::new();
        writer.put(Table::Mvcc, b"k", [b"", &[7; 1000]]);
        writer.end(b"head", b"the head");
        let mut bytes = Vec::new();
        while let Some(chunk) = writer.take() {
            bytes.extend_from_slice(&chunk);
        }
        bytes
    }

    #[test]
    fn what_was_spooled_is_read_back_and_vanishes_with_the_spool() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = || fs::read_dir(dir.path()).expect("the directory").count();
        for dir in [None, Some(dir.path())] {
            let spools = Spools::open(dir).expect("opened");
            let mut spool = spools.begin().expect("the disk works").expect("there is room");
            assert!(spool.is_empty() && spool.verify().is_err());
            let image = image();
            for piece in image.chunks(100) {
                assert!(spool.verify().is_err());
                spool.append(Bytes::copy_from_slice(piece)).expect("appended");
            }
            assert_eq!(spool.len(), image.len() as u64);
            spool.verify().expect("all of it");
            spool.verify().expect("and once more");
        }
        assert_eq!(files(), 0);
    }

    #[test]
    fn there_are_few_at_a_time_and_none_outlives_the_process() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = Spools::open(Some(dir.path())).expect("opened");
        let begin = || spools.begin().expect("the disk works");
        let live: Vec<Spool> = (0..SPOOLS_MAX).map(|_| begin().expect("there is room")).collect();
        assert!(begin().is_none());
        drop(live);
        let left_behind = begin().expect("there is room again");
        std::mem::forget(left_behind);
        fs::write(dir.path().join("another file"), "stays").expect("written");
        Spools::open(Some(dir.path())).expect("opened");
        let left: Vec<_> = fs::read_dir(dir.path()).expect("the directory").flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
