//! Reading a log back: which segments count, where the last one ends, and whether what
//! is wrong there is a write that never finished or a disk that lost something.
//!
//! # Torn or damaged
//!
//! Records are written in batches, one write and one sync each, and the disk may persist
//! the sectors of a batch in any order. So a bad record does not yet say anything, and
//! neither does a good one behind it: both may be of one batch that was under way. What
//! decides is the claim in each record's header, `synced`: *when I was written, everything
//! before this offset was on the disk*. The rule, at the first offset X of the last segment
//! where no valid record begins:
//!
//! - a valid record header anywhere behind X claims `synced > X`: what stood at X was on
//!   the disk, and was acknowledged. **Damage**; refused, naming file and X.
//! - otherwise, there is something at or behind X that is ours: the last batch was torn.
//!   Everything from X to the end of the file is **cut**: overwritten with zeros and
//!   synced, so that no record of the torn batch can ever line up behind a later one.
//! - otherwise X is where the log **ends**.
//!
//! In all other segments the next segment's header tells where the records end, and was
//! written after they were synced; a bad record before is always damage.
//!
//! The caller may know better how far the log once reached, because a checkpoint does
//! ([`Options::reaches`](super::Options::reaches)): what then looks torn is damage, too. So it is
//! where the checkpoint cannot be read any more ([`REACHES_UNKNOWN`]): nothing then vouches for the
//! last batch but the log, on a disk that has just lost something.
//!
//! A last segment whose file is shorter than when it was begun, as its header tells, was cut by
//! somebody else, and how much of the log with it cannot be told: **damage**. No crash does that, for
//! the file has its size on the disk before it is a segment.
//!
//! The claim counts even when only the header of a record is valid, for the header alone
//! makes it. What the rule cannot see is damage in the very last batch, behind which
//! nothing was ever written: it looks like a torn one, and is cut and reported. So an empty
//! record, whose claim covers the rest, is written when nothing else is for a moment
//! ([`LogStore::attest`]), and last in an orderly stop ([`LogStore::close`]).
//!
//! # Which segments count
//!
//! The unbroken run of sequence numbers up to the highest, which must not end with the
//! note that there is another. Removing old segments is not
//! ordered with anything, so a crash can leave any of them behind; what is left of a gap
//! is not needed, or the replay notices that entries are missing and refuses.
//!
//! [`LogStore::attest`]: super::LogStore::attest
//! [`LogStore::close`]: super::LogStore::close

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::dir::Directory;
use super::format::{
    BadHeader, FORMAT_VERSION, Place, RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, RecordHeader,
    SEGMENT_HEADER_BYTES, SegmentHeader,
};
use super::replay::{Bounds, Replay};
use super::{Entry, LogError, REACHES_UNKNOWN};

const RECORD_HEADER: usize = RECORD_HEADER_BYTES as usize;
/// Segments are read in pieces of this size, unless a record is larger.
const READ_BYTES: usize = 1 << 20;
/// Zeros are skipped by the block when looking for records.
const SCAN_BLOCK_BYTES: usize = 4096;

/// A log as it was found.
pub(super) struct Found {
    pub(super) bounds: Bounds,
    pub(super) entries: Vec<Entry>,
    /// In order; the last is the one to go on with.
    pub(super) segments: Vec<FoundSegment>,
    /// What was cut from the last one.
    pub(super) repaired: Option<String>,
}

/// A segment as it was found.
pub(super) struct FoundSegment {
    pub(super) path: PathBuf,
    pub(super) header: SegmentHeader,
    pub(super) file: File,
    pub(super) file_bytes: u64,
    /// Where its records end.
    pub(super) end: u64,
    /// Highest index of an entry in it; 0 if it has none that counts.
    pub(super) last_index: u64,
}

/// Reads `segments`, a run of consecutive sequence numbers, oldest first. An entry of index
/// `reaches` is known to have been synced.
///
/// Changes nothing on the disk but a torn tail, and returns with all it has read synced. The names in
/// the directory are the caller's to sync.
pub(super) fn read(
    dir: &Directory,
    segments: Vec<(u64, u64, PathBuf)>,
    reaches: u64,
) -> Result<Option<Found>, LogError> {
    let mut readers = Vec::new();
    for (sequence, first_index, path) in segments {
        readers.push(Reader::open(path, sequence, first_index)?);
    }
    let Some(first) = readers.first() else { return Ok(None) };
    let identity = first.header.identity;
    let mut replay = Replay::new(Bounds::of_header(&first.header));
    let ends: Vec<u64> = readers.iter().skip(1).map(|r| r.header.previous_end).collect();
    let mut ends = ends.into_iter();
    let mut found: Vec<FoundSegment> = Vec::new();
    let mut repaired = None;
    for mut reader in readers {
        if Bounds::of_header(&reader.header) != replay.bounds || reader.header.identity != identity
        {
            return Err(reader.damaged(0, "its header does not continue the segment before"));
        }
        let mut last_index = 0;
        let mut claimed = SEGMENT_HEADER_BYTES;
        let mut offset = SEGMENT_HEADER_BYTES;
        let sealed_end = ends.next();
        loop {
            if sealed_end.is_some_and(|end| offset >= end) {
                break;
            }
            let Some((header, payload)) = reader.record(offset)? else { break };
            if header.continues() {
                if sealed_end.is_some() {
                    break;
                }
                let sequence = reader.header.sequence.saturating_add(1);
                return Err(LogError::Missing { dir: dir.path().to_owned(), sequence });
            }
            let Some(record) = header.record(payload) else {
                return Err(reader.damaged(offset, "a record that verifies makes no sense"));
            };
            if record.resets {
                last_index = 0;
                found.iter_mut().for_each(|segment| segment.last_index = 0);
            }
            last_index = last_index.max(record.entries.last().map_or(0, |entry| entry.index));
            if let Err(error) = replay.apply(record) {
                return Err(reader.damaged(offset, &format!("a record out of order: {error}")));
            }
            claimed = header.synced;
            offset += RECORD_HEADER_BYTES + u64::from(header.payload_bytes);
        }
        match sealed_end {
            Some(end) if offset == end => {}
            Some(_) => return Err(reader.damaged(offset, "a record does not verify")),
            // Sealed ones end where the next one says, however long their files are.
            None if reader.file_bytes < reader.header.file_bytes => {
                let (is, was) = (reader.file_bytes, reader.header.file_bytes);
                let what = format!("the file ends there, and had {was} bytes when it was begun");
                return Err(reader.damaged(is, &what));
            }
            None if reaches != REACHES_UNKNOWN && replay.bounds.last_index() < reaches => {
                let last = replay.bounds.last_index();
                let what = format!(
                    "the log ends there, at index {last}, but the checkpoint holds entries up to \
                     index {reaches}, which the log once had"
                );
                return Err(reader.damaged(offset, &what));
            }
            None => repaired = reader.check_tail(dir, offset, reaches != REACHES_UNKNOWN)?,
        }
        if sealed_end.is_none() && dir.fsync() {
            reader.rewrite(claimed, offset)?;
        }
        // Not for this process's writes, but for those that an earlier one left in the
        // page cache when it was killed, or made without syncing at all.
        dir.sync_file(&reader.file, &reader.path)?;
        found.push(FoundSegment {
            path: reader.path,
            header: reader.header,
            file: reader.file,
            file_bytes: reader.file_bytes,
            end: offset,
            last_index,
        });
    }
    let bounds = replay.bounds;
    let Some(entries) = replay.into_entries() else {
        return Err(LogError::Missing {
            dir: dir.path().to_owned(),
            sequence: found.first().map_or(0, |s| s.header.sequence.saturating_sub(1)),
        });
    };
    Ok(Some(Found { bounds, entries, segments: found, repaired }))
}

/// A segment being read, through a window that slides over it.
struct Reader {
    path: PathBuf,
    header: SegmentHeader,
    file: File,
    file_bytes: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl Reader {
    fn open(path: PathBuf, sequence: u64, first_index: u64) -> Result<Reader, LogError> {
        let failed = |e| LogError::io("read", &path, e);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        let mut page = vec![0; SEGMENT_HEADER_BYTES.min(file_bytes) as usize];
        file.read_exact_at(&mut page, 0).map_err(failed)?;
        let header = match SegmentHeader::decode(&page) {
            Ok(header) => header,
            Err(BadHeader::Version(version)) => {
                return Err(LogError::Format { file: path, version, known: FORMAT_VERSION });
            }
            Err(BadHeader::NotASegment) => {
                return Err(damaged(&path, 0, "it does not begin as a segment does"));
            }
            Err(BadHeader::Checksum) => {
                return Err(damaged(&path, 0, "its header does not verify"));
            }
        };
        if header.sequence != sequence || header.next_index != first_index {
            return Err(damaged(&path, 0, "its header is that of another segment"));
        }
        Ok(Reader { path, header, file, file_bytes, window: Vec::new(), window_at: 0 })
    }

    fn damaged(&self, offset: u64, what: &str) -> LogError {
        damaged(&self.path, offset, what)
    }

    fn place(&self, offset: u64) -> Place {
        Place { salt: self.header.salt, sequence: self.header.sequence, offset }
    }

    /// At least `wanted` bytes from `offset` on, or what the file has of them.
    fn bytes(&mut self, offset: u64, wanted: usize) -> Result<&[u8], LogError> {
        let left = usize::try_from(self.file_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = wanted.min(left);
        let have = offset
            .checked_sub(self.window_at)
            .and_then(|skip| self.window.len().checked_sub(usize::try_from(skip).ok()?))
            .unwrap_or(0);
        if have < wanted {
            self.window.clear();
            self.window.resize(wanted.max(READ_BYTES).min(left), 0);
            self.file
                .read_exact_at(&mut self.window, offset)
                .map_err(|e| LogError::io("read", &self.path, e))?;
            self.window_at = offset;
        }
        let skip = usize::try_from(offset.saturating_sub(self.window_at)).unwrap_or(usize::MAX);
        Ok(self.window.get(skip..).unwrap_or_default())
    }

    /// The record at `offset`, if one verifies there.
    fn record(&mut self, offset: u64) -> Result<Option<(RecordHeader, Bytes)>, LogError> {
        let place = self.place(offset);
        let Some(header) = self
            .bytes(offset, RECORD_HEADER)?
            .first_chunk()
            .and_then(|bytes| RecordHeader::decode(bytes, place))
        else {
            return Ok(None);
        };
        let length = header.payload_bytes as usize;
        let bytes = self.bytes(offset, RECORD_HEADER + length)?;
        let Some(payload) = bytes.get(RECORD_HEADER..RECORD_HEADER + length) else {
            return Ok(None);
        };
        // A copy, so that an entry that is kept holds on to its record and no more.
        Ok(header.matches(payload).then(|| (header, Bytes::copy_from_slice(payload))))
    }

    /// Decides what it means that no record verifies at `end`; cuts a torn one, or refuses it.
    fn check_tail(
        &mut self,
        dir: &Directory,
        end: u64,
        cuts: bool,
    ) -> Result<Option<String>, LogError> {
        let terminated =
            self.bytes(end, RECORD_HEADER)?.iter().take(RECORD_HEADER).all(|&byte| byte == 0);
        let mut remains = !terminated;
        let mut offset = end;
        while offset + RECORD_HEADER_BYTES <= self.file_bytes {
            let place = self.place(0);
            let window = self.bytes(offset, RECORD_HEADER)?;
            let starts = (window.len() + 1).saturating_sub(RECORD_HEADER);
            let mut claim = 0;
            for block in (0..starts).step_by(SCAN_BLOCK_BYTES) {
                let stop = block + SCAN_BLOCK_BYTES;
                if window.get(block..stop) == Some(&[0; SCAN_BLOCK_BYTES]) {
                    continue;
                }
                for at in (block..stop.min(starts)).step_by(RECORD_ALIGN_BYTES) {
                    let place = Place { offset: offset + at as u64, ..place };
                    let bytes = window.get(at..).and_then(|rest| rest.first_chunk());
                    if let Some(header) = bytes.and_then(|b| RecordHeader::decode(b, place)) {
                        remains = true;
                        claim = claim.max(header.synced);
                    }
                }
            }
            if claim > end {
                return Err(self.damaged(
                    end,
                    "a record does not verify, though later ones prove that it was on the disk",
                ));
            }
            offset += starts.next_multiple_of(RECORD_ALIGN_BYTES) as u64;
        }
        if !remains {
            return Ok(None);
        }
        if !cuts {
            let what = "a write there was cut short or is damaged, and only the checkpoint, which \
                        is damaged as well, could tell which";
            return Err(self.damaged(end, what));
        }
        self.cut(end)?;
        dir.sync_file(&self.file, &self.path)?;
        Ok(Some(format!(
            "raft log {}: cut a write that had not finished, at byte {end}",
            self.path.display()
        )))
    }

    /// Writes the bytes between the offsets once more. A sync that failed in an earlier
    /// process may have left pages that the kernel takes for clean though the disk never
    /// got them; written again, they are dirty, and the next sync means something.
    fn rewrite(&mut self, from: u64, to: u64) -> Result<(), LogError> {
        let mut offset = from;
        while offset < to {
            let piece = (to - offset).min(READ_BYTES as u64) as usize;
            let bytes = self.bytes(offset, piece)?;
            let bytes = bytes.get(..piece).unwrap_or(bytes).to_vec();
            if bytes.is_empty() {
                break;
            }
            self.write(&bytes, offset)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Overwrites everything from `offset` on with zeros.
    fn cut(&mut self, mut offset: u64) -> Result<(), LogError> {
        self.window.clear();
        let zeros = vec![0; READ_BYTES];
        while offset < self.file_bytes {
            let piece = (self.file_bytes - offset).min(READ_BYTES as u64) as usize;
            self.write(zeros.get(..piece).unwrap_or(&zeros), offset)?;
            offset += piece as u64;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), LogError> {
        self.file.write_all_at(bytes, offset).map_err(|e| LogError::io("write", &self.path, e))
    }
}

fn damaged(path: &Path, offset: u64, what: &str) -> LogError {
    LogError::Damaged { file: path.to_owned(), offset, what: what.to_owned() }
}
