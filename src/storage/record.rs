//! How records are laid out in sled, which is a map from bytes to bytes.
//!
//! ```text
//! key                                 value
//! table | key                         checksum | 0 | value
//! table | key                         checksum | 1 | length u64 | checksum of the value
//! 255 | table | key | number u32      checksum | a piece of the value
//! ```
//!
//! A value of more than [`PIECE_BYTES`] is stored in pieces: sled would write a page
//! that exceeds a quarter of its segment into a file of its own, and never sync that.
//! A page has about 20 entries, hence the size of a piece.
//!
//! Checksums are CRC32C, first the key, then what follows the checksum: a value under
//! the wrong key is as wrong as a flipped bit. Numbers are little-endian but for the
//! piece's, which is big-endian so that pieces sort.

/// The longest value, or piece of one, that sled gets to see.
pub(super) const PIECE_BYTES: usize = 32 << 10;
/// Where the storage's own records are.
pub(super) const OWN_TABLE: u8 = 0;
const PIECES_TABLE: u8 = 255;

const CHECKSUM_BYTES: usize = 4;
const WHOLE: u8 = 0;
const IN_PIECES: u8 = 1;

/// What is stored under a record's own key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head<'a> {
    /// The value.
    Whole(&'a [u8]),
    /// Where to find it.
    InPieces(Pieces),
}

/// A value that is stored in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pieces {
    pub(super) len: u64,
    pub(super) checksum: u32,
}

impl Pieces {
    /// How many there are.
    pub(super) fn count(self) -> u64 {
        self.len.div_ceil(PIECE_BYTES as u64)
    }
}

/// The key in sled of a record.
pub(super) fn stored_key(table: u8, key: &[u8]) -> Vec<u8> {
    let mut stored = Vec::with_capacity(1 + key.len());
    stored.push(table);
    stored.extend_from_slice(key);
    stored
}

/// The key in sled of a piece. Two values never share one: the number has a fixed
/// length, so equal keys have equal records and equal numbers.
pub(super) fn piece_key(stored_key: &[u8], number: u64) -> Vec<u8> {
    // A value of 2^32 pieces would be 128 TiB.
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let mut key = Vec::with_capacity(1 + stored_key.len() + 4);
    key.push(PIECES_TABLE);
    key.extend_from_slice(stored_key);
    key.extend_from_slice(&number.to_be_bytes());
    key
}

/// Whether a value must be stored in pieces.
pub(super) fn pieces_of(value: &[u8]) -> Option<Pieces> {
    (value.len() > PIECE_BYTES)
        .then(|| Pieces { len: value.len() as u64, checksum: crc32c::crc32c(value) })
}

/// What to store under `key` for a value.
pub(super) fn encode_head(key: &[u8], head: &Head<'_>) -> Vec<u8> {
    match head {
        Head::Whole(value) => seal(key, &[&[WHOLE], value]),
        Head::InPieces(pieces) => {
            seal(key, &[&[IN_PIECES], &pieces.len.to_le_bytes(), &pieces.checksum.to_le_bytes()])
        }
    }
}

/// What was stored under `key`; `None` when that is damaged.
pub(super) fn decode_head<'a>(key: &[u8], stored: &'a [u8]) -> Option<Head<'a>> {
    match unseal(key, stored)?.split_first()? {
        (&WHOLE, value) => Some(Head::Whole(value)),
        (&IN_PIECES, rest) => {
            let (len, checksum) = rest.split_first_chunk::<8>()?;
            let len = u64::from_le_bytes(*len);
            let checksum = u32::from_le_bytes(checksum.try_into().ok()?);
            Some(Head::InPieces(Pieces { len, checksum }))
        }
        _ => None,
    }
}

/// What to store under `key` for a piece.
pub(super) fn encode_piece(key: &[u8], piece: &[u8]) -> Vec<u8> {
    seal(key, &[piece])
}

/// The piece stored under `key`; `None` when it is damaged.
pub(super) fn decode_piece<'a>(key: &[u8], stored: &'a [u8]) -> Option<&'a [u8]> {
    unseal(key, stored)
}

fn seal(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut checksum = crc32c::crc32c(key);
    for part in parts {
        checksum = crc32c::crc32c_append(checksum, part);
    }
    let mut sealed = Vec::with_capacity(CHECKSUM_BYTES + len);
    sealed.extend_from_slice(&checksum.to_le_bytes());
    for part in parts {
        sealed.extend_from_slice(part);
    }
    sealed
}

fn unseal<'a>(key: &[u8], sealed: &'a [u8]) -> Option<&'a [u8]> {
    let (checksum, rest) = sealed.split_first_chunk::<CHECKSUM_BYTES>()?;
    let found = crc32c::crc32c_append(crc32c::crc32c(key), rest);
    (found == u32::from_le_bytes(*checksum)).then_some(rest)
}
