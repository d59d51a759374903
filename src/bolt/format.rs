//! Pages, metas and elements: what is where, in bytes.
//!
//! ```text
//! page     0 id u64 │ 8 flags u16 │ 10 count u16 │ 12 overflow u32 │ 16 …
//! leaf     count × ( flags u32 │ pos u32 │ key length u32 │ value length u32 ) … keys and values
//! branch   count × ( pos u32 │ key length u32 │ page u64 )                    … keys
//! meta     magic u32 │ version u32 │ page size u32 │ flags u32 │ root u64 │ sequence u64
//!          │ freelist u64 │ high water u64 │ txid u64 │ FNV-1a of all this u64
//! bucket   root u64 │ sequence u64 │ a leaf page, if root is 0
//! ```
//!
//! `pos` counts from the start of the element it stands in. A page that does not suffice goes on
//! in `overflow` further ones, which have no header. Of a leaf's elements those that are flagged
//! [`BUCKET_ELEMENT`] hold a bucket: its name, and a [`BucketHeader`]; a small bucket is *inline*,
//! within that value, and has no page of its own.
//!
//! Decoding takes what it needs off the front of what it is given, and says `None` if there is
//! too little. What the numbers say is for the caller to doubt.

use bytes::BufMut;

/// The size of the pages that are written, in bytes. Files of others can be read.
pub const PAGE_BYTES: usize = 4096;
/// The length of a page's header, in bytes.
pub const PAGE_HEADER_BYTES: usize = 16;
/// The length of a leaf's element, without its key and value, in bytes.
pub const LEAF_ELEMENT_BYTES: usize = 16;
/// The length of a branch's element, without its key, in bytes.
pub const BRANCH_ELEMENT_BYTES: usize = 16;
/// The length of a meta, in bytes.
pub const META_BYTES: usize = 64;
/// The length of a bucket's header, in bytes.
pub const BUCKET_HEADER_BYTES: usize = 16;

/// What a meta begins with.
pub const MAGIC: u32 = 0xED0C_DAED;
/// The version of the format; there is no other.
pub const VERSION: u32 = 2;
/// In the place of the freelist's page: it was not written, and has to be worked out.
pub const NO_FREELIST: u64 = u64::MAX;
/// A freelist with this many pages or more has its true count in the first eight bytes.
pub const FREELIST_COUNT_AHEAD: u16 = u16::MAX;

/// Flag of a page of branch elements.
pub const BRANCH_PAGE: u16 = 0x01;
/// Flag of a page of leaf elements.
pub const LEAF_PAGE: u16 = 0x02;
/// Flag of a page that holds a meta.
pub const META_PAGE: u16 = 0x04;
/// Flag of a page that lists free ones.
pub const FREELIST_PAGE: u16 = 0x10;
/// Flag of a leaf's element whose value is a bucket.
pub const BUCKET_ELEMENT: u32 = 0x01;

/// FNV-1a, 64 bits.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What every page begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// Its own number.
    pub id: u64,
    /// What it is: [`BRANCH_PAGE`], [`LEAF_PAGE`], [`META_PAGE`] or [`FREELIST_PAGE`].
    pub flags: u16,
    /// How many elements it has.
    pub count: u16,
    /// In how many further pages it goes on.
    pub overflow: u32,
}

impl PageHeader {
    /// As bytes, [`PAGE_HEADER_BYTES`] of them.
    pub fn encode(&self, to: &mut impl BufMut) {
        to.put_slice(&self.id.to_le_bytes());
        to.put_slice(&self.flags.to_le_bytes());
        to.put_slice(&self.count.to_le_bytes());
        to.put_slice(&self.overflow.to_le_bytes());
    }

    /// From the start of a page.
    pub fn decode(page: &[u8]) -> Option<PageHeader> {
        let mut fields = Fields(page);
        Some(PageHeader {
            id: fields.u64()?,
            flags: fields.u16()?,
            count: fields.u16()?,
            overflow: fields.u32()?,
        })
    }
}

/// A leaf's element, in front of its key and value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafElement {
    /// 0, or [`BUCKET_ELEMENT`].
    pub flags: u32,
    /// Where its key is, from the start of the element. The value follows the key.
    pub pos: u32,
    /// The key's length, in bytes.
    pub key_len: u32,
    /// The value's length, in bytes.
    pub value_len: u32,
}

impl LeafElement {
    /// As bytes, [`LEAF_ELEMENT_BYTES`] of them.
    pub fn encode(&self, to: &mut impl BufMut) {
        for field in [self.flags, self.pos, self.key_len, self.value_len] {
            to.put_slice(&field.to_le_bytes());
        }
    }

    /// From its place in a page.
    pub fn decode(bytes: &[u8]) -> Option<LeafElement> {
        let mut fields = Fields(bytes);
        Some(LeafElement {
            flags: fields.u32()?,
            pos: fields.u32()?,
            key_len: fields.u32()?,
            value_len: fields.u32()?,
        })
    }
}

/// A branch's element, in front of its key: the first key of the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchElement {
    /// Where its key is, from the start of the element.
    pub pos: u32,
    /// The key's length, in bytes.
    pub key_len: u32,
    /// The child.
    pub page: u64,
}

impl BranchElement {
    /// As bytes, [`BRANCH_ELEMENT_BYTES`] of them.
    pub fn encode(&self, to: &mut impl BufMut) {
        to.put_slice(&self.pos.to_le_bytes());
        to.put_slice(&self.key_len.to_le_bytes());
        to.put_slice(&self.page.to_le_bytes());
    }

    /// From its place in a page.
    pub fn decode(bytes: &[u8]) -> Option<BranchElement> {
        let mut fields = Fields(bytes);
        Some(BranchElement { pos: fields.u32()?, key_len: fields.u32()?, page: fields.u64()? })
    }
}

/// What a bucket's value begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketHeader {
    /// The first page of its tree; 0 when the bucket is inline and follows here.
    pub root: u64,
    /// A number for its users, which etcd does not use.
    pub sequence: u64,
}

impl BucketHeader {
    /// As bytes, [`BUCKET_HEADER_BYTES`] of them.
    pub fn encode(&self, to: &mut impl BufMut) {
        to.put_slice(&self.root.to_le_bytes());
        to.put_slice(&self.sequence.to_le_bytes());
    }

    /// From the start of a bucket's value.
    pub fn decode(bytes: &[u8]) -> Option<BucketHeader> {
        let mut fields = Fields(bytes);
        Some(BucketHeader { root: fields.u64()?, sequence: fields.u64()? })
    }
}

/// Where everything begins. A file has two; the one with the larger `txid` counts, if it is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// The size of all pages of the file, in bytes.
    pub page_size: u32,
    /// The root of the tree that holds the buckets.
    pub root: BucketHeader,
    /// The page that lists the free ones, or [`NO_FREELIST`].
    pub freelist: u64,
    /// Pages from this one on do not exist.
    pub high_water: u64,
    /// Counts the file's transactions.
    pub txid: u64,
}

/// Why bytes are no meta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// There are too few of them.
    #[error("it is cut off")]
    CutOff,
    /// They are something else.
    #[error("it does not begin as bbolt's files do")]
    Magic,
    /// The format is of a version that there is not.
    #[error("it is of version {0} of the format; {VERSION} is known")]
    Version(u32),
    /// They were changed.
    #[error("its checksum is wrong")]
    Checksum,
}

impl Meta {
    /// As bytes, [`META_BYTES`] of them, the checksum included.
    pub fn encode(&self, to: &mut impl BufMut) {
        let mut summed = Vec::with_capacity(META_BYTES);
        for field in [MAGIC, VERSION, self.page_size, 0] {
            summed.put_slice(&field.to_le_bytes());
        }
        self.root.encode(&mut summed);
        for field in [self.freelist, self.high_water, self.txid] {
            summed.put_slice(&field.to_le_bytes());
        }
        to.put_slice(&summed);
        to.put_slice(&fnv1a(&summed).to_le_bytes());
    }

    /// From what follows a page's header.
    ///
    /// # Errors
    /// [`MetaError`]. Page size and page numbers are not judged.
    pub fn decode(bytes: &[u8]) -> Result<Meta, MetaError> {
        let meta = bytes.get(..META_BYTES).ok_or(MetaError::CutOff)?;
        let mut fields = Fields(meta);
        let (magic, version) = fields.u32().zip(fields.u32()).ok_or(MetaError::CutOff)?;
        if magic != MAGIC {
            return Err(MetaError::Magic);
        }
        if version != VERSION {
            return Err(MetaError::Version(version));
        }
        let (summed, checksum) = meta.split_at(META_BYTES - size_of::<u64>());
        if Fields(checksum).u64() != Some(fnv1a(summed)) {
            return Err(MetaError::Checksum);
        }
        Meta::fields(fields).ok_or(MetaError::CutOff)
    }

    /// What follows magic and version.
    fn fields(mut fields: Fields<'_>) -> Option<Meta> {
        let page_size = fields.u32()?;
        fields.u32()?;
        let root = BucketHeader { root: fields.u64()?, sequence: fields.u64()? };
        Some(Meta {
            page_size,
            root,
            freelist: fields.u64()?,
            high_water: fields.u64()?,
            txid: fields.u64()?,
        })
    }
}

/// Numbers, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&mut bytes);
        bytes
    }

    #[test]
    fn fnv_is_the_one_that_go_has() {
        // The vectors that the algorithm's authors publish.
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn what_is_written_is_read_and_is_as_long_as_it_says() {
        let header = PageHeader { id: 7, flags: LEAF_PAGE, count: 3, overflow: 2 };
        let bytes = encoded(|to| header.encode(to));
        assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 2, 0, 0, 0]);
        assert_eq!((bytes.len(), PageHeader::decode(&bytes)), (PAGE_HEADER_BYTES, Some(header)));

        let leaf = LeafElement { flags: BUCKET_ELEMENT, pos: 32, key_len: 5, value_len: 16 };
        let bytes = encoded(|to| leaf.encode(to));
        assert_eq!((bytes.len(), LeafElement::decode(&bytes)), (LEAF_ELEMENT_BYTES, Some(leaf)));

        let branch = BranchElement { pos: 16, key_len: 17, page: 1 << 40 };
        let bytes = encoded(|to| branch.encode(to));
        let decoded = BranchElement::decode(&bytes);
        assert_eq!((bytes.len(), decoded), (BRANCH_ELEMENT_BYTES, Some(branch)));

        let bucket = BucketHeader { root: 9, sequence: 4 };
        let bytes = encoded(|to| bucket.encode(to));
        let decoded = BucketHeader::decode(&bytes);
        assert_eq!((bytes.len(), decoded), (BUCKET_HEADER_BYTES, Some(bucket)));
        assert_eq!(BucketHeader::decode(&bytes[..15]), None);
    }

    #[test]
    fn a_meta_is_refused_for_each_bit_that_differs() {
        let meta = Meta {
            page_size: 4096,
            root: BucketHeader { root: 12, sequence: 0 },
            freelist: NO_FREELIST,
            high_water: 13,
            txid: 2,
        };
        let bytes = encoded(|to| meta.encode(to));
        assert_eq!((bytes.len(), Meta::decode(&bytes)), (META_BYTES, Ok(meta)));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Meta::decode(&flipped).is_err(), "bit {bit}");
        }
        assert_eq!(Meta::decode(&bytes[..63]), Err(MetaError::CutOff));
        assert_eq!(Meta::decode(&[0; 64]), Err(MetaError::Magic));
    }
}
