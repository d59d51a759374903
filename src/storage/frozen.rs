//! Records that a checkpoint begins with, in a file that is written once.
//!
//! sled takes two bytes of its file, and one of memory, for each byte of records, and
//! writes five. So a checkpoint that is written as a whole puts its versions here, one
//! after the other, and sled holds only what came later. Nothing in the file ever changes.
//! It goes with its checkpoint, when the next one is written.
//!
//! ```text
//! frozen    magic | format u32 | block | block | …
//! block     length of the records u32 | checksum u32 | records
//! record    length of the key u16 | length of the value u32 | key | value
//! ```
//!
//! Numbers are little-endian. A block's checksum is CRC32C over where it begins and its
//! records, so that a block in another's place is wrong. How long the file is, how many
//! records it has and which is the last is in sled ([`Frozen::encode`]): a file that was cut
//! short, or is another's, is found when it is opened.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use bytes::Bytes;

use super::Visit;

/// The file's name, in the checkpoint's directory.
pub(super) const FILE: &str = "frozen";
const MAGIC: &[u8; 12] = b"kvorumfrozen";
const FORMAT: u32 = 1;
const FILE_HEADER_BYTES: u64 = 16;
const BLOCK_HEADER_BYTES: usize = 8;
/// A block ends with the record that makes it this long, in bytes.
const BLOCK_BYTES: usize = 256 << 10;
/// So many bytes are written before the disk is waited for. More, and the kernel would
/// write them all at once, while the raft log waits.
const SYNC_EVERY_BYTES: u64 = 8 << 20;

/// The file, open for reading.
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
    /// Writes the file and makes it durable, but for its name. The records come in the order
    /// of their keys. `None` if there are none.
    pub(super) fn create(
        dir: &Path,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> io::Result<Option<Frozen>> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(dir.join(FILE))?;
        file.write_all(MAGIC)?;
        file.write_all(&FORMAT.to_le_bytes())?;
        let mut frozen = Frozen { file, len: FILE_HEADER_BYTES, records: 0, last: Bytes::new() };
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let mut synced = 0;
        for (key, value) in records {
            if frozen.records > 0 && key <= frozen.last {
                return Err(io::Error::other("records are to come in the order of their keys"));
            }
            let too_long = |_| io::Error::other("a record is longer than its length can say");
            block.extend_from_slice(&u16::try_from(key.len()).map_err(too_long)?.to_le_bytes());
            block.extend_from_slice(&u32::try_from(value.len()).map_err(too_long)?.to_le_bytes());
            block.extend_from_slice(&key);
            block.extend_from_slice(&value);
            frozen.records += 1;
            frozen.last = key;
            if block.len() >= BLOCK_BYTES {
                frozen.append(&mut block)?;
            }
            if frozen.len - synced >= SYNC_EVERY_BYTES {
                frozen.file.sync_data()?;
                synced = frozen.len;
            }
        }
        frozen.append(&mut block)?;
        frozen.file.sync_all()?;
        Ok((frozen.records > 0).then_some(frozen))
    }

    fn append(&mut self, block: &mut Vec<u8>) -> io::Result<()> {
        if block.is_empty() {
            return Ok(());
        }
        let length = u32::try_from(block.len()).map_err(io::Error::other)?;
        self.file.write_all(&length.to_le_bytes())?;
        self.file.write_all(&checksum(self.len, block).to_le_bytes())?;
        self.file.write_all(block)?;
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
        let file = match File::open(dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("it is missing"));
            }
            opened => opened?,
        };
        let found = file.metadata()?.len();
        if found != len {
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
