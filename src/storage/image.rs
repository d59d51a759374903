//! A whole state as a stream of bytes: what a member that is far behind is sent.
//!
//! An image holds the records of a checkpoint, in any order, and the head last of all:
//!
//! ```text
//! "KVORUMIM" │ version u32 │ frame │ frame │ … │ frame with the head, and nothing after it
//!
//! frame:   payload_bytes u32 │ crc32c u32 │ payload
//! payload: { table u8 │ key_bytes u32 │ value_bytes u32 │ key │ value } …
//! ```
//!
//! Numbers are little-endian. A frame's checksum goes on from that of the frame before (the
//! first one's from that of the first twelve bytes), and covers its length: the last one is
//! the checksum of everything, and a frame that is missing, doubled or in another's place is
//! found like one that is damaged.
//!
//! Where frames end depends on the records alone, not on when they were written: the same
//! records in the same order are the same bytes. So an image whose transfer was interrupted
//! can be made again, and goes on at any byte.

use std::collections::VecDeque;
use std::io::{self, Read};

use bytes::Bytes;

use super::Table;

const MAGIC: &[u8; 8] = b"KVORUMIM";
const VERSION: u32 = 1;
const PREFIX_BYTES: usize = 12;
const FRAME_HEADER_BYTES: usize = 8;
const RECORD_HEADER_BYTES: usize = 9;
/// A frame is closed once its payload has so many bytes; the last record may go beyond.
pub const FRAME_BYTES: usize = 256 << 10;
/// What [`ImageWriter::take`] gives at most.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Why bytes are not an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// They begin as no image does.
    #[error(
        "what was received is no snapshot of kvorum: the member that sent it runs another program"
    )]
    Foreign,
    /// A newer version of kvorum made them.
    #[error(
        "the snapshot has format {found}, and this version knows format {VERSION}: start this \
         member with the version that the others run"
    )]
    NewerFormat {
        /// The format it has.
        found: u32,
    },
    /// They are not what was sent.
    #[error("the snapshot is damaged at byte {offset}: {what}; it has to be sent again")]
    Damaged {
        /// Of the frame, or what should be one.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The operating system refused.
    #[error("cannot read the snapshot: {0}")]
    Io(#[from] io::Error),
}

/// One record of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageRecord<'a> {
    /// Its table.
    pub table: Table,
    /// Its key.
    pub key: &'a [u8],
    /// Its value.
    pub value: &'a [u8],
}

/// Makes an image of records. Holds no more than the bytes that were not taken yet.
#[derive(Debug)]
pub struct ImageWriter {
    /// What can be taken.
    closed: VecDeque<Bytes>,
    closed_bytes: usize,
    /// The frame being filled, with room for its header.
    frame: Vec<u8>,
    crc: u32,
}

impl Default for ImageWriter {
    fn default() -> ImageWriter {
        ImageWriter::new()
    }
}

impl ImageWriter {
    /// An image without records.
    pub fn new() -> ImageWriter {
        let mut prefix = MAGIC.to_vec();
        prefix.extend_from_slice(&VERSION.to_le_bytes());
        ImageWriter {
            crc: crc32c::crc32c(&prefix),
            closed_bytes: prefix.len(),
            closed: VecDeque::from([Bytes::from(prefix)]),
            frame: vec![0; FRAME_HEADER_BYTES],
        }
    }

    /// Adds a record, whose value comes in two parts. (The first may be empty.)
    pub fn put(&mut self, table: Table, key: &[u8], value: [&[u8]; 2]) {
        let [first, second] = value;
        let len = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
        self.frame.push(table as u8);
        self.frame.extend_from_slice(&len(key.len()));
        self.frame.extend_from_slice(&len(first.len() + second.len()));
        for part in [key, first, second] {
            self.frame.extend_from_slice(part);
        }
        if self.frame.len() >= FRAME_HEADER_BYTES + FRAME_BYTES {
            self.close_frame();
        }
    }

    /// Adds the head, which ends the image.
    pub fn end(&mut self, key: &[u8], head: &[u8]) {
        self.close_frame();
        self.put(Table::Head, key, [&[], head]);
        self.close_frame();
    }

    /// How much can be taken now.
    pub fn ready_bytes(&self) -> usize {
        self.closed_bytes
    }

    /// Takes the next bytes of the image, [`CHUNK_BYTES`] at most; `None` until more records
    /// were added.
    pub fn take(&mut self) -> Option<Bytes> {
        let first = self.closed.front_mut()?;
        let taken = first.split_to(first.len().min(CHUNK_BYTES));
        if first.is_empty() {
            self.closed.pop_front();
        }
        self.closed_bytes -= taken.len();
        Some(taken)
    }

    fn close_frame(&mut self) {
        let mut frame = std::mem::replace(&mut self.frame, vec![0; FRAME_HEADER_BYTES]);
        let Some((header, payload)) = frame.split_first_chunk_mut::<FRAME_HEADER_BYTES>() else {
            return;
        };
        if payload.is_empty() {
            return;
        }
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes();
        self.crc = frame_crc(self.crc, len, payload);
        let [a, b, c, d] = len;
        let [e, f, g, h] = self.crc.to_le_bytes();
        *header = [a, b, c, d, e, f, g, h];
        self.closed_bytes += frame.len();
        self.closed.push_back(Bytes::from(frame));
    }
}

fn frame_crc(before: u32, len: [u8; 4], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(before, &len), payload)
}

/// Reads an image, and checks it: what it has shown is right as far as it has got, and all of
/// the image is when there is no record left.
#[derive(Debug)]
pub struct ImageReader<R> {
    input: R,
    /// Bytes that are left of the input.
    left: u64,
    offset: u64,
    crc: u32,
    frame: Vec<u8>,
    /// Where the next record of the frame begins.
    at: usize,
    /// The head was read.
    ended: bool,
}

impl<R: Read> ImageReader<R> {
    /// An image in the first `len` bytes of `input`.
    ///
    /// # Errors
    /// [`ImageError`]: these bytes are no image.
    pub fn new(mut input: R, len: u64) -> Result<ImageReader<R>, ImageError> {
        let left = len.checked_sub(PREFIX_BYTES as u64).ok_or(ImageError::Foreign)?;
        let mut prefix = [0; PREFIX_BYTES];
        input.read_exact(&mut prefix)?;
        let Some(version) = prefix.strip_prefix(MAGIC.as_slice()) else {
            return Err(ImageError::Foreign);
        };
        let found = version.try_into().map(u32::from_le_bytes).map_err(|_| ImageError::Foreign)?;
        if found != VERSION {
            return Err(ImageError::NewerFormat { found });
        }
        Ok(ImageReader {
            input,
            left,
            offset: PREFIX_BYTES as u64,
            crc: crc32c::crc32c(&prefix),
            frame: Vec::new(),
            at: 0,
            ended: false,
        })
    }

    /// The next record. `None` after the head: then all of the image was as it was made.
    ///
    /// # Errors
    /// [`ImageError`]: this is not an image, or not all of one.
    #[expect(clippy::should_implement_trait, reason = "what it gives borrows from it")]
    pub fn next(&mut self) -> Result<Option<ImageRecord<'_>>, ImageError> {
        if self.at == self.frame.len() {
            if self.ended {
                return match self.left {
                    0 => Ok(None),
                    _ => Err(self.damaged("it goes on after its end")),
                };
            }
            self.read_frame()?;
        }
        let offset = self.offset;
        let bad = |what| ImageError::Damaged { offset, what };
        let rest = self.frame.get(self.at..).unwrap_or_default();
        let Some((record, used)) = parse(rest) else { return Err(bad("a frame with no record")) };
        self.at += used;
        if record.table == Table::Head {
            if self.ended || used != self.frame.len() {
                return Err(bad("a head that is not the last record"));
            }
            self.ended = true;
        }
        Ok(Some(record))
    }

    fn read_frame(&mut self) -> Result<(), ImageError> {
        self.offset += match self.frame.len() {
            0 => 0,
            payload => (FRAME_HEADER_BYTES + payload) as u64,
        };
        let cut_short = self.damaged("it ends too early");
        let Some(left) = self.left.checked_sub(FRAME_HEADER_BYTES as u64) else {
            return Err(cut_short);
        };
        let mut numbers = [[0; 4]; 2];
        self.input.read_exact(numbers.as_flattened_mut())?;
        let [len, crc] = numbers;
        let payload_bytes = u32::from_le_bytes(len);
        // Also what bounds the memory that a damaged length makes this take.
        self.left = left.checked_sub(u64::from(payload_bytes)).ok_or(cut_short)?;
        self.frame.clear();
        (&mut self.input).take(u64::from(payload_bytes)).read_to_end(&mut self.frame)?;
        self.at = 0;
        self.crc = frame_crc(self.crc, len, &self.frame);
        if self.frame.is_empty() || self.crc != u32::from_le_bytes(crc) {
            return Err(self.damaged("a frame whose checksum is not right"));
        }
        Ok(())
    }

    fn damaged(&self, what: &'static str) -> ImageError {
        ImageError::Damaged { offset: self.offset, what }
    }
}

/// The first record of a payload, and its length.
fn parse(payload: &[u8]) -> Option<(ImageRecord<'_>, usize)> {
    let (header, rest) = payload.split_first_chunk::<RECORD_HEADER_BYTES>()?;
    let [table, a, b, c, d, e, f, g, h] = *header;
    let key_bytes = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok()?;
    let value_bytes = usize::try_from(u32::from_le_bytes([e, f, g, h])).ok()?;
    let (key, rest) = rest.split_at_checked(key_bytes)?;
    let value = rest.get(..value_bytes)?;
    let record = ImageRecord { table: Table::of_number(table)?, key, value };
    Some((record, RECORD_HEADER_BYTES + key_bytes + value_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    type ReadBack = Vec<(Table, Vec<u8>, Vec<u8>)>;

    fn image(records: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
        let mut writer = ImageWriter::new();
        let mut bytes = Vec::new();
        for (key, value) in records {
            writer.put(Table::Mvcc, key, [b"v", value]);
            while let Some(chunk) = writer.take() {
                assert!(chunk.len() <= CHUNK_BYTES);
                bytes.extend_from_slice(&chunk);
            }
        }
        writer.end(b"head", b"the head");
        while let Some(chunk) = writer.take() {
            bytes.extend_from_slice(&chunk);
        }
        assert_eq!(writer.ready_bytes(), 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<ReadBack, ImageError> {
        let mut reader = ImageReader::new(bytes, bytes.len() as u64)?;
        let mut records = Vec::new();
        while let Some(ImageRecord { table, key, value }) = reader.next()? {
            records.push((table, key.to_vec(), value.to_vec()));
        }
        Ok(records)
    }

    #[test]
    fn records_large_and_small_are_read_back() {
        let records: [(&[u8], Vec<u8>); 4] = [
            (b"a", vec![1; 10]),
            (b"b", vec![2; 3 * FRAME_BYTES]),
            (b"", vec![]),
            (b"d", vec![4; FRAME_BYTES]),
        ];
        let found = read(&image(&records)).expect("an image");
        assert_eq!(found.len(), 5);
        for (found, (key, value)) in found.iter().zip(&records) {
            assert_eq!((found.0, found.1.as_slice()), (Table::Mvcc, *key));
            assert_eq!(found.2, [b"v".as_slice(), value].concat());
        }
        assert_eq!(found[4], (Table::Head, b"head".to_vec(), b"the head".to_vec()));
        assert_eq!(read(&image(&[])).expect("an image").len(), 1);
    }

    /// Whatever byte is wrong or missing, or comes after the end, it is refused.
    #[test]
    fn what_is_not_as_it_was_made_is_refused() {
        let intact = image(&[(b"a", vec![1; 10]), (b"b", vec![2; 20])]);
        for at in 0..intact.len() {
            for bit in 0..8 {
                let mut flipped = intact.clone();
                flipped[at] ^= 1 << bit;
                assert!(read(&flipped).is_err(), "bit {bit} of byte {at}");
            }
            assert!(read(&intact[..at]).is_err(), "cut at {at}");
        }
        let error = read(&[intact.clone(), vec![0]].concat()).expect_err("it goes on");
        assert!(error.to_string().contains("after its end"), "{error}");
        assert!(matches!(read(b"{\"json\": \"of another program\"}"), Err(ImageError::Foreign)));
        let mut newer = intact;
        newer[8] = 2;
        assert!(matches!(read(&newer), Err(ImageError::NewerFormat { found: 2 })));
    }
}
