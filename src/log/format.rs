//! The bytes of a segment: its header page and its records.
//!
//! Pure functions between values and bytes. The picture is in the module above; what
//! is decided here is what counts as *valid*: a header page whose checksum holds, and a
//! record header whose checksum, made over the segment's salt, its sequence and the
//! record's own offset, holds. Bytes left over from another life of the file, from
//! another file, or from another place in this one are therefore never valid, and
//! neither is what a client wrote to look like a record: it does not know the salt.
//!
//! Nothing here panics on any input; nothing here decides what to do about bad bytes.

use bytes::{Buf, BufMut, Bytes};

use super::{Entry, HardState, Identity, LogError, Mark};

/// Version of the format, in every segment header.
pub(super) const FORMAT_VERSION: u32 = 1;
/// The header has a page to itself, so that no later write touches its sector again.
pub(super) const SEGMENT_HEADER_BYTES: u64 = 4096;
/// Header of a record; as many zeros end the log.
pub(super) const RECORD_HEADER_BYTES: u64 = 24;
/// Records begin at multiples of this many bytes.
pub(super) const RECORD_ALIGN_BYTES: usize = 8;
/// A record's payload fits a `u32` with room to spare.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 30;

const HEADER_PAGE: usize = SEGMENT_HEADER_BYTES as usize;
const RECORD_HEADER: usize = RECORD_HEADER_BYTES as usize;
const MAGIC: &[u8; 8] = b"KVORUMLG";
/// The upper 24 bits of a record's first word; the lower eight are its flags.
const RECORD_MAGIC: u32 = 0x4b56_7200;
const FLAGS: u32 = 0xff;
const HAS_HARD_STATE: u32 = 1;
const HAS_START: u32 = 2;
const RESETS: u32 = 4;
const HAS_ENTRIES: u32 = 8;
const CONTINUES: u32 = 16;
/// Term, kind, length of context, length of data.
const ENTRY_HEADER_BYTES: usize = 8 + 4 + 4 + 4;

/// First page of a segment: all that is known when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) identity: Identity,
    /// Position in the chain of segments; never used twice in a directory.
    pub(super) sequence: u64,
    /// Random, so that a sequence used again after a restored backup does not verify either.
    pub(super) salt: u64,
    /// Where the records of the segment before end; 0 for the first segment of a log.
    pub(super) previous_end: u64,
    /// Index the next appended entry would have.
    pub(super) next_index: u64,
    pub(super) hard_state: HardState,
    pub(super) start: Mark,
    /// Size of the file when the segment was begun: it may grow, and never shrinks. 0 in logs from
    /// before 0.1.0, which did not say.
    pub(super) file_bytes: u64,
}

/// Why a page is not a segment header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    NotASegment,
    Checksum,
    Version(u32),
}

impl SegmentHeader {
    /// The header page.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(HEADER_PAGE);
        page.extend_from_slice(MAGIC);
        page.put_u32_le(FORMAT_VERSION);
        page.put_u32_le(0);
        for word in [
            self.identity.cluster_id,
            self.identity.member_id,
            self.sequence,
            self.salt,
            self.previous_end,
            self.next_index,
            self.hard_state.term,
            self.hard_state.vote,
            self.hard_state.commit,
            self.start.index,
            self.start.term,
            self.file_bytes,
        ] {
            page.put_u64_le(word);
        }
        page.resize(HEADER_PAGE - 4, 0);
        let checksum = crc32c::crc32c(&page);
        page.put_u32_le(checksum);
        page
    }

    /// Reads a header page back. Bytes beyond the page are ignored.
    pub(super) fn decode(bytes: &[u8]) -> Result<SegmentHeader, BadHeader> {
        let Some(page) = bytes.first_chunk::<HEADER_PAGE>() else {
            return Err(BadHeader::NotASegment);
        };
        let Some((body, checksum)) = page.split_last_chunk::<4>() else {
            return Err(BadHeader::NotASegment);
        };
        if !body.starts_with(MAGIC) {
            return Err(BadHeader::NotASegment);
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(BadHeader::Checksum);
        }
        let mut rest = body;
        rest.advance(MAGIC.len());
        let mut read = || -> Result<SegmentHeader, BadHeader> {
            let version = rest.try_get_u32_le().map_err(|_| BadHeader::NotASegment)?;
            if version != FORMAT_VERSION {
                return Err(BadHeader::Version(version));
            }
            rest.advance(4);
            let mut word = || rest.try_get_u64_le().map_err(|_| BadHeader::NotASegment);
            Ok(SegmentHeader {
                identity: Identity { cluster_id: word()?, member_id: word()? },
                sequence: word()?,
                salt: word()?,
                previous_end: word()?,
                next_index: word()?,
                hard_state: HardState { term: word()?, vote: word()?, commit: word()? },
                start: Mark { index: word()?, term: word()? },
                file_bytes: word()?,
            })
        };
        read()
    }
}

/// Where a record stands; part of what its checksum covers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) salt: u64,
    pub(super) sequence: u64,
    pub(super) offset: u64,
}

/// Header of a record, once its checksum has been found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    flags: u32,
    /// Bytes of payload that follow, padding included.
    pub(super) payload_bytes: u32,
    /// Everything before this offset was on the disk before this record was written.
    pub(super) synced: u64,
    payload_checksum: u32,
}

impl RecordHeader {
    /// The header at `place`, if `bytes` are one.
    pub(super) fn decode(bytes: &[u8; RECORD_HEADER], place: Place) -> Option<RecordHeader> {
        let mut rest = bytes.as_slice();
        let word = rest.try_get_u32_le().ok()?;
        if word & !FLAGS != RECORD_MAGIC {
            return None;
        }
        let payload_bytes = rest.try_get_u32_le().ok()?;
        let synced = rest.try_get_u64_le().ok()?;
        let payload_checksum = rest.try_get_u32_le().ok()?;
        let checksum = rest.try_get_u32_le().ok()?;
        (checksum == header_checksum(bytes, place)).then_some(RecordHeader {
            flags: word & FLAGS,
            payload_bytes,
            synced,
            payload_checksum,
        })
    }

    /// Whether it is no record but says that the next segment exists.
    pub(super) fn continues(&self) -> bool {
        self.flags & CONTINUES != 0
    }

    /// Whether `payload` is the payload this header was written with.
    pub(super) fn matches(&self, payload: &[u8]) -> bool {
        crc32c::crc32c(payload) == self.payload_checksum
    }

    /// The record, from a payload that [`matches`](Self::matches). `None` if it does not
    /// follow the format, which is then not the disk's fault.
    pub(super) fn record(&self, mut payload: Bytes) -> Option<Record> {
        let mut record = Record { resets: self.flags & RESETS != 0, ..Record::default() };
        if self.flags & HAS_HARD_STATE != 0 {
            record.hard_state = Some(HardState {
                term: payload.try_get_u64_le().ok()?,
                vote: payload.try_get_u64_le().ok()?,
                commit: payload.try_get_u64_le().ok()?,
            });
        }
        if self.flags & HAS_START != 0 {
            record.start = Some(Mark {
                index: payload.try_get_u64_le().ok()?,
                term: payload.try_get_u64_le().ok()?,
            });
        }
        if self.flags & HAS_ENTRIES != 0 {
            let count = payload.try_get_u64_le().ok()?;
            let first = payload.try_get_u64_le().ok()?;
            for nth in 0..count {
                let term = payload.try_get_u64_le().ok()?;
                let kind = u8::try_from(payload.try_get_u32_le().ok()?).ok()?;
                let context_bytes = usize::try_from(payload.try_get_u32_le().ok()?).ok()?;
                let data_bytes = usize::try_from(payload.try_get_u32_le().ok()?).ok()?;
                if payload.len() < context_bytes {
                    return None;
                }
                let context = payload.split_to(context_bytes);
                if payload.len() < data_bytes {
                    return None;
                }
                let data = payload.split_to(data_bytes);
                let index = first.checked_add(nth)?;
                record.entries.push(Entry { index, term, kind, data, context });
            }
        }
        (payload.len() < RECORD_ALIGN_BYTES).then_some(record)
    }
}

/// What is written behind the last record of a segment, at `place`, once the next one is
/// on the disk; with the zeros that follow the end.
pub(super) fn continuation(place: Place) -> [u8; 2 * RECORD_HEADER] {
    let mut bytes = [0; 2 * RECORD_HEADER];
    if let Some(header) = bytes.first_chunk_mut::<RECORD_HEADER>() {
        let mut fields = header.as_mut_slice();
        fields.put_u32_le(RECORD_MAGIC | CONTINUES);
        fields.put_u32_le(0);
        fields.put_u64_le(place.offset);
        fields.put_u32_le(crc32c::crc32c(&[]));
        complete_header(header, place);
    }
    bytes
}

/// Puts the checksum into a header that is otherwise done.
fn complete_header(header: &mut [u8; RECORD_HEADER], place: Place) {
    let checksum = header_checksum(header, place);
    if let Some(field) = header.last_chunk_mut::<4>() {
        *field = checksum.to_le_bytes();
    }
}

/// Of the header but for its last four bytes, and of where it stands.
fn header_checksum(bytes: &[u8; RECORD_HEADER], place: Place) -> u32 {
    let mut checksum = crc32c::crc32c(&place.salt.to_le_bytes());
    checksum = crc32c::crc32c_append(checksum, &place.sequence.to_le_bytes());
    checksum = crc32c::crc32c_append(checksum, &place.offset.to_le_bytes());
    let covered = bytes.first_chunk::<{ RECORD_HEADER - 4 }>();
    crc32c::crc32c_append(checksum, covered.map_or(&[][..], |covered| covered.as_slice()))
}

/// What one record says, decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) hard_state: Option<HardState>,
    /// The log now starts after this mark.
    pub(super) start: Option<Mark>,
    /// A snapshot replaced the log: nothing before this record counts.
    pub(super) resets: bool,
    /// Contiguous; they replace whatever the log held from the first one's index on.
    pub(super) entries: Vec<Entry>,
}

/// Records waiting to be written, encoded but for what depends on where they will stand.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
}

/// A batch's buffer is given back when one large batch made it larger than this.
const BATCH_KEPT_BYTES: usize = 4 << 20;

impl Batch {
    /// Bytes the batch will take in a segment.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds one record. On an error the batch is as before.
    pub(super) fn push(
        &mut self,
        hard_state: Option<HardState>,
        start: Option<Mark>,
        resets: bool,
        entries: &[Entry],
    ) -> Result<(), LogError> {
        let data_bytes: usize =
            entries.iter().map(|e| ENTRY_HEADER_BYTES + e.context.len() + e.data.len()).sum();
        let body_bytes = 24 + 16 + 16 + data_bytes;
        if body_bytes > RECORD_BYTES_MAX {
            return Err(LogError::Misuse(format!(
                "one append of {body_bytes} bytes; at most {RECORD_BYTES_MAX} fit a record"
            )));
        }
        self.bytes.reserve(RECORD_HEADER + body_bytes + RECORD_ALIGN_BYTES);
        let begin = self.bytes.len();
        self.bytes.put_bytes(0, RECORD_HEADER);
        let mut flags = if resets { RESETS } else { 0 };
        if let Some(hard_state) = hard_state {
            flags |= HAS_HARD_STATE;
            self.bytes.put_u64_le(hard_state.term);
            self.bytes.put_u64_le(hard_state.vote);
            self.bytes.put_u64_le(hard_state.commit);
        }
        if let Some(start) = start {
            flags |= HAS_START;
            self.bytes.put_u64_le(start.index);
            self.bytes.put_u64_le(start.term);
        }
        if let Some(first) = entries.first() {
            flags |= HAS_ENTRIES;
            self.bytes.put_u64_le(entries.len() as u64);
            self.bytes.put_u64_le(first.index);
        }
        for entry in entries {
            self.bytes.put_u64_le(entry.term);
            self.bytes.put_u32_le(u32::from(entry.kind));
            // Both fit: RECORD_BYTES_MAX is below 2^32.
            self.bytes.put_u32_le(entry.context.len() as u32);
            self.bytes.put_u32_le(entry.data.len() as u32);
            self.bytes.extend_from_slice(&entry.context);
            self.bytes.extend_from_slice(&entry.data);
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(RECORD_ALIGN_BYTES), 0);
        let Some((header, payload)) = self
            .bytes
            .get_mut(begin..)
            .and_then(|record| record.split_first_chunk_mut::<RECORD_HEADER>())
        else {
            return Ok(()); // The header was put there a few lines up.
        };
        let mut fields = header.as_mut_slice();
        fields.put_u32_le(RECORD_MAGIC | flags);
        fields.put_u32_le(payload.len() as u32);
        fields.put_u64_le(0);
        fields.put_u32_le(crc32c::crc32c(payload));
        Ok(())
    }

    /// The bytes to write at `place`, headers completed, followed by `zeros` zero bytes.
    pub(super) fn seal(&mut self, place: Place, synced: u64, zeros: usize) -> &[u8] {
        let mut offset = place.offset;
        let mut rest = self.bytes.as_mut_slice();
        while let Some((header, tail)) = rest.split_first_chunk_mut::<RECORD_HEADER>() {
            if let Some(field) = header.get_mut(8..16) {
                field.copy_from_slice(&synced.to_le_bytes());
            }
            complete_header(header, Place { offset, ..place });
            let length = header.get(4..8).map_or(0, |mut field| field.get_u32_le()) as usize;
            offset += (RECORD_HEADER + length) as u64;
            rest = tail.get_mut(length..).unwrap_or_default();
        }
        self.bytes.resize(self.bytes.len() + zeros, 0);
        &self.bytes
    }

    /// Empties the batch after it was written.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(BATCH_KEPT_BYTES);
    }
}
