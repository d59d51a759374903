//! A number on disk that only grows: how many writes have been synced.
//!
//! When part of its file is damaged, sled may take what follows for writes that a
//! crash cut short, and open in an older state without a word. The mark lies in a file
//! of its own and says how old the state can be at most.
//!
//! ```text
//! offset 0      number u64 | checksum u32      the two are written in turn, so that
//! offset 4096   number u64 | checksum u32      a write cut short spoils only one
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SLOT_OFFSETS: [u64; 2] = [0, 4096];
const SLOT_BYTES: usize = 12;

/// The file, open.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    number: u64,
    next_offset: u64,
}

impl Mark {
    /// Begins at 0, which is not durable before the mark was advanced. The caller syncs the
    /// directory.
    pub(super) fn create(path: &Path) -> io::Result<Mark> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
        let [first, second] = SLOT_OFFSETS;
        file.write_all_at(&slot(0), first)?;
        Ok(Mark { file, number: 0, next_offset: second })
    }

    /// The mark in a file; `None` when there is no file. Without a valid slot the number
    /// is `u64::MAX`, beyond every state.
    pub(super) fn open(path: &Path) -> io::Result<Option<Mark>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let [first, second] = SLOT_OFFSETS;
        let mark = match (read_slot(&file, first)?, read_slot(&file, second)?) {
            (Some(old), Some(new)) if old < new => Mark { file, number: new, next_offset: first },
            (Some(number), _) => Mark { file, number, next_offset: second },
            (None, Some(number)) => Mark { file, number, next_offset: first },
            (None, None) => Mark { file, number: u64::MAX, next_offset: first },
        };
        Ok(Some(mark))
    }

    /// The number last advanced to.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Sets the number, durably.
    pub(super) fn advance(&mut self, number: u64) -> io::Result<()> {
        self.file.write_all_at(&slot(number), self.next_offset)?;
        self.file.sync_data()?;
        let [first, second] = SLOT_OFFSETS;
        self.next_offset = if self.next_offset == first { second } else { first };
        self.number = number;
        Ok(())
    }
}

fn slot(number: u64) -> Vec<u8> {
    let mut slot = Vec::with_capacity(SLOT_BYTES);
    slot.extend_from_slice(&number.to_le_bytes());
    slot.extend_from_slice(&crc32c::crc32c(&number.to_le_bytes()).to_le_bytes());
    slot
}

fn read_slot(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let mut slot = [0; SLOT_BYTES];
    match file.read_exact_at(&mut slot, offset) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let Some((number, checksum)) = slot.split_first_chunk::<8>() else { return Ok(None) };
    let intact = checksum == crc32c::crc32c(number).to_le_bytes();
    Ok(intact.then(|| u64::from_le_bytes(*number)))
}
