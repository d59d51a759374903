//! Versions and tombstones, in a file that only grows.
//!
//! sled takes two bytes of its file, and one of memory, for each byte of records, and
//! writes five. The records of a checkpoint's largest table come in the order of their
//! keys and are never changed, so they are put one after the other into a file of their own.
//! Nothing is removed from it: what compaction gave up goes when the next checkpoint is
//! written, without it.
//!
//! ```text
//! frozen    magic | format u32 | block | block | …
//! block     length of the records u32 | checksum u32 | records
//! record    length of the key u16 | length of the value u32 | key | value
//! ```
//!
//! Numbers are little-endian. A block's checksum is CRC32C over where it begins and its
//! records, so that a block in another's place is wrong. How long the file is, how many
//! records it has and which is the last is in sled ([`Frozen::encode`]), and changes there
//! in the batch that needs the records, after they were synced here. So they become part of
//! the checkpoint at once or not at all: what lies behind that length was never written. A
//! file that is shorter is found when it is opened.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use bytes::Bytes;

use super::Visit;
use crate::large_file::SYNC_EVERY_BYTES;

/// The file's name, in the checkpoint's directory.
pub(super) const FILE: &str = "frozen";
const MAGIC: &[u8; 12] = b"kvorumfrozen";
const FORMAT: u32 = 1;
const FILE_HEADER_BYTES: u64 = 16;
const BLOCK_HEADER_BYTES: usize = 8;
/// A block ends with the record that makes it this long, in bytes.
const BLOCK_BYTES: usize = 256 << 10;

/// The file, open.
#[derive(Debug)]
pub(super) struct Frozen {
    file: File,
    len: u64,
    records: u64,
    last: Bytes,
}

/// Why the file could not be read.
pub(super) enum ReadError {
    /// The operating system says so.
    Io(io::Error),
    /// It is not what was written.
    Damaged(String),
}

/// Why records could not be added.
pub(super) enum ExtendError {
    /// The operating system says so.
    Io(io::Error),
    /// They do not come in the order of their keys, after those there are.
    OutOfOrder,
}

impl From<io::Error> for ExtendError {
    fn from(error: io::Error) -> ExtendError {
        ExtendError::Io(error)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => ReadError::Io(error),
        }
    }
}

fn damaged(what: impl std::fmt::Display) -> ReadError {
    ReadError::Damaged(format!("its file {FILE:?}: {what}"))
}

impl Frozen {
    /// Begins the file, without records. Its name is not durable.
    pub(super) fn create(dir: &Path) -> io::Result<Frozen> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(dir.join(FILE))?;
        file.write_all_at(&[&MAGIC[..], &FORMAT.to_le_bytes()].concat(), 0)?;
        Ok(Frozen { file, len: FILE_HEADER_BYTES, records: 0, last: Bytes::new() })
    }

    /// Adds records, which come in the order of their keys and after those there are, and
    /// makes them durable.
    pub(super) fn extend(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), ExtendError> {
        // An earlier attempt may have left something that never became part of it.
        self.file.set_len(self.len)?;
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let mut synced = self.len;
        for (key, value) in records {
            if self.records > 0 && key <= self.last {
                return Err(ExtendError::OutOfOrder);
            }
            let too_long = |_| io::Error::other("a record is longer than its length can say");
            block.extend_from_slice(&u16::try_from(key.len()).map_err(too_long)?.to_le_bytes());
            block.extend_from_slice(&u32::try_from(value.len()).map_err(too_long)?.to_le_bytes());
            block.extend_from_slice(&key);
            block.extend_from_slice(&value);
            self.records += 1;
            self.last = key;
            if block.len() >= BLOCK_BYTES {
                self.append(&mut block)?;
            }
            if self.len - synced >= SYNC_EVERY_BYTES {
                self.file.sync_data()?;
                synced = self.len;
            }
        }
        self.append(&mut block)?;
        Ok(self.file.sync_data()?)
    }

    fn append(&mut self, block: &mut Vec<u8>) -> io::Result<()> {
        if block.is_empty() {
            return Ok(());
        }
        let length = u32::try_from(block.len()).map_err(io::Error::other)?;
        let header = [length.to_le_bytes(), checksum(self.len, block).to_le_bytes()].concat();
        self.file.write_all_at(&header, self.len)?;
        self.file.write_all_at(block, self.len + header.len() as u64)?;
        self.len += (BLOCK_HEADER_BYTES + block.len()) as u64;
        block.clear();
        Ok(())
    }

    /// What sled remembers of the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        [&self.len.to_le_bytes()[..], &self.records.to_le_bytes(), &self.last].concat()
    }

    /// Opens the file that sled remembers this of. Reads its first bytes.
    pub(super) fn open(dir: &Path, encoded: &[u8]) -> Result<Frozen, ReadError> {
        let read = || {
            let (len, rest) = encoded.split_first_chunk()?;
            let (records, last) = rest.split_first_chunk()?;
            let last = Bytes::copy_from_slice(last);
            Some((u64::from_le_bytes(*len), u64::from_le_bytes(*records), last))
        };
        let (len, records, last) = read().ok_or_else(|| damaged("sled's record of it"))?;
        let file = match OpenOptions::new().read(true).write(true).open(dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("it is missing"));
            }
            opened => opened?,
        };
        let found = file.metadata()?.len();
        if found < len {
            return Err(damaged(format_args!("it has {found} bytes of {len} written")));
        }
        let mut header = [0; FILE_HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0)?;
        let format = header.strip_prefix(MAGIC);
        if format != Some(&FORMAT.to_le_bytes()) {
            return Err(damaged("it begins with something else"));
        }
        Ok(Frozen { file, len, records, last })
    }

    /// The key of the last record.
    pub(super) fn last(&self) -> &[u8] {
        &self.last
    }

    /// Shows `visit` the records with `from <= key < to`, all from `from` on if `to` is empty.
    /// The file is read from its beginning: who asks wants all of it.
    pub(super) fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, ReadError> {
        let (mut at, mut seen) = (FILE_HEADER_BYTES, 0);
        let mut last = Vec::new();
        while at < self.len {
            let block = self.block(at)?;
            let mut rest = &block[..];
            while !rest.is_empty() {
                let (key, value) = next_record(&mut rest)
                    .filter(|(key, _)| seen == 0 || *key > &last[..])
                    .ok_or_else(|| damaged(format_args!("a record of the block at byte {at}")))?;
                seen += 1;
                last.clear();
                last.extend_from_slice(key);
                if !to.is_empty() && key >= to {
                    return Ok(ControlFlow::Continue(()));
                }
                if key >= from && visit(key, Bytes::copy_from_slice(value)).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            at += (BLOCK_HEADER_BYTES + block.len()) as u64;
        }
        if seen != self.records {
            return Err(damaged(format_args!("{seen} records of {} written", self.records)));
        }
        Ok(ControlFlow::Continue(()))
    }

    fn block(&self, at: u64) -> Result<Vec<u8>, ReadError> {
        let bad = || damaged(format_args!("the block at byte {at}"));
        let mut length = [0; 4];
        let mut written = [0; 4];
        self.file.read_exact_at(&mut length, at)?;
        self.file.read_exact_at(&mut written, at + 4)?;
        let length = u32::from_le_bytes(length);
        let begin = at + BLOCK_HEADER_BYTES as u64;
        // Also what bounds the memory: the file is there in that length.
        if length == 0 || begin + u64::from(length) > self.len {
            return Err(bad());
        }
        let mut block = vec![0; length as usize];
        self.file.read_exact_at(&mut block, begin)?;
        if checksum(at, &block) != u32::from_le_bytes(written) {
            return Err(bad());
        }
        Ok(block)
    }
}

fn next_record<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (key_len, after) = rest.split_first_chunk()?;
    let (value_len, after) = after.split_first_chunk()?;
    let (key, after) = after.split_at_checked(u16::from_le_bytes(*key_len).into())?;
    let value_len = usize::try_from(u32::from_le_bytes(*value_len)).ok()?;
    let (value, after) = after.split_at_checked(value_len)?;
    *rest = after;
    Some((key, value))
}

fn checksum(at: u64, block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&at.to_le_bytes()), block)
}
