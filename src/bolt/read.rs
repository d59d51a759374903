//! Reading a file, and trusting nothing in it.
//!
//! ```text
//! Database::open ─ the newer of two metas that are whole ─▶ page size, root, high water
//!      └─▶ Scan ── buckets() ─▶ names      one scan of all buckets is the check of the file:
//!            └──── rows(name) ─▶ rows      no page twice, none out of bounds, keys ascend
//! ```
//!
//! Rows come in the order of their keys, by descending from the root; of a tree there are in
//! memory the pages from the root to the present leaf, and what was read ahead
//! (`READ_AHEAD_BYTES`). Pages are read with `pread`, not mapped: a file that somebody cuts
//! short meanwhile is an error and not a signal, and no `unsafe` is needed.
//!
//! What bounds the work on a damaged file: a page is entered once in a scan (a bit for each page
//! that the file is long enough for), a tree is at most `DEPTH_MAX` pages deep, and a run of
//! pages is at most `RUN_BYTES_MAX` long.
//!
//! [`Scan::end`] says whether all pages were met: in trees, or on the freelist, if there is one
//! (etcd writes none). What is beyond the high water, or behind the file's last page, is not
//! looked at.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use bytes::{Buf as _, Bytes, BytesMut};

use super::format::{
    BRANCH_ELEMENT_BYTES, BRANCH_PAGE, BUCKET_ELEMENT, BUCKET_HEADER_BYTES, BranchElement,
    BucketHeader, FREELIST_COUNT_AHEAD, FREELIST_PAGE, LEAF_ELEMENT_BYTES, LEAF_PAGE, LeafElement,
    META_BYTES, Meta, MetaError, NO_FREELIST, PAGE_HEADER_BYTES, PageHeader,
};

/// Pages are at least this large, in bytes.
const PAGE_BYTES_MIN: u64 = 1 << 10;
/// Pages are at most this large, in bytes.
const PAGE_BYTES_MAX: u64 = 1 << 24;
/// While pages are asked for in the order they are in, so much is read at once, in bytes.
const READ_AHEAD_BYTES: u64 = 256 << 10;
/// The most pages between a root and a leaf. A tree that is twice as wide on each level has, at
/// this depth, more pages than a disk.
const DEPTH_MAX: usize = 48;
/// The longest run of pages that is one, in bytes: larger than any request of etcd's.
const RUN_BYTES_MAX: u64 = 1 << 30;
/// The most buckets. etcd has ten.
const BUCKETS_MAX: usize = 1000;

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The operating system refused.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    /// There is nothing, or not even two pages.
    #[error(
        "it is too short for a bbolt database ({0} bytes): it was cut off, or is something else"
    )]
    TooShort(u64),
    /// Neither of its metas is one.
    #[error("it is no bbolt database: of its first meta page, {first}; of its second, {second}")]
    NoMeta {
        /// What is wrong with the first.
        first: MetaError,
        /// What is wrong with the second.
        second: MetaError,
    },
    /// The pages are of a size that there is not.
    #[error("its pages are said to be of {0} bytes, which cannot be")]
    PageSize(u32),
    /// It ends before it should.
    #[error("it was cut off: it has {len} bytes, and says that it has {needed}")]
    CutOff {
        /// Its length, in bytes.
        len: u64,
        /// What it should be, in bytes.
        needed: u64,
    },
    /// A page is not what it should be.
    #[error("page {page} is damaged: {problem}")]
    Page {
        /// Which.
        page: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// An open file.
#[derive(Debug)]
pub struct Database {
    file: File,
    len: u64,
    meta: Meta,
}

impl Database {
    /// Opens the database that is the first `len` bytes of a file.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn open(file: File, len: u64) -> Result<Database, ReadError> {
        let meta = newest_meta(&file, len)?;
        let page_bytes = u64::from(meta.page_size);
        if !page_bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page_bytes)
        {
            return Err(ReadError::PageSize(meta.page_size));
        }
        let needed = meta.high_water.saturating_mul(page_bytes);
        if needed > len {
            return Err(ReadError::CutOff { len, needed });
        }
        Ok(Database { file, len, meta })
    }

    /// The length of all pages, in bytes. The file may be longer.
    pub fn size_bytes(&self) -> u64 {
        // No more than the file's length.
        self.meta.high_water.saturating_mul(u64::from(self.meta.page_size))
    }

    /// Begins to read all of it.
    ///
    /// # Errors
    /// The freelist, if there is one, is damaged.
    pub fn scan(&self) -> Result<Scan<'_>, ReadError> {
        let mut scan = Scan {
            pages: Pages {
                database: self,
                seen: vec![0; usize::try_from(self.meta.high_water / 64 + 1).unwrap_or_default()],
                ahead: Bytes::new(),
                ahead_at: 0,
            },
        };
        // The metas.
        scan.pages.enter(0, 2)?;
        if self.meta.freelist != NO_FREELIST {
            scan.pages.enter_freelist(self.meta.freelist)?;
        }
        Ok(scan)
    }
}

/// The meta that counts.
fn newest_meta(file: &File, len: u64) -> Result<Meta, ReadError> {
    let read = |at: u64| -> Result<Result<Meta, MetaError>, ReadError> {
        let mut page = [0; PAGE_HEADER_BYTES + META_BYTES];
        if at + page.len() as u64 > len {
            return Ok(Err(MetaError::CutOff));
        }
        file.read_exact_at(&mut page, at)?;
        Ok(Meta::decode(page.get(PAGE_HEADER_BYTES..).unwrap_or_default()))
    };
    if len < 2 * PAGE_BYTES_MIN {
        return Err(ReadError::TooShort(len));
    }
    let first = read(0)?;
    // Where the second is says the first; if it is damaged, each size has to be tried.
    let second = match &first {
        Ok(first) => read(u64::from(first.page_size))?,
        Err(_) => {
            let mut found = Err(MetaError::Magic);
            let mut at = PAGE_BYTES_MIN;
            while at <= PAGE_BYTES_MAX && found.is_err() {
                found = match read(at)? {
                    Ok(meta) if u64::from(meta.page_size) == at => Ok(meta),
                    Ok(_) => found,
                    Err(MetaError::Magic | MetaError::CutOff) => found,
                    Err(error) => Err(error),
                };
                at *= 2;
            }
            found
        }
    };
    match (first, second) {
        (Ok(first), Ok(second)) if second.txid > first.txid => Ok(second),
        (Ok(first), _) => Ok(first),
        (Err(_), Ok(second)) => Ok(second),
        (Err(first), Err(second)) => Err(ReadError::NoMeta { first, second }),
    }
}

/// A bucket of the root.
#[derive(Debug, Clone)]
pub struct BucketRow {
    /// Its name.
    pub name: Bytes,
    /// Its header, and a page, if it is inline.
    value: Bytes,
    /// The page the value was found in.
    page: u64,
}

/// A row. Keeps the page it stands in, and those that were read with it: copy what you keep.
#[derive(Debug, Clone)]
pub struct Row {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
}

/// One pass over a file, of which each bucket can be read once.
#[derive(Debug)]
pub struct Scan<'a> {
    pages: Pages<'a>,
}

impl<'a> Scan<'a> {
    /// All buckets, in the order of their names. To be asked for once.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn buckets(&mut self) -> Result<Vec<BucketRow>, ReadError> {
        let root = self.pages.database.meta.root.root;
        let mut walk = Walk::from_page(&mut self.pages, root)?;
        let mut buckets = Vec::new();
        while let Some(Element { flags, key, value, page }) = walk.next(&mut self.pages)? {
            if flags != BUCKET_ELEMENT {
                return Err(ReadError::Page { page, problem: "a row of the root is no bucket" });
            }
            if buckets.len() == BUCKETS_MAX {
                return Err(ReadError::Page { page, problem: "there are too many buckets" });
            }
            let (name, value) = (Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&value));
            buckets.push(BucketRow { name, value, page });
        }
        Ok(buckets)
    }

    /// The rows of a bucket.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn rows(&mut self, bucket: &BucketRow) -> Result<Rows<'_, 'a>, ReadError> {
        let page = bucket.page;
        let header = BucketHeader::decode(&bucket.value)
            .ok_or(ReadError::Page { page, problem: "a bucket has no header" })?;
        let walk = if header.root == 0 {
            Walk::inline(bucket.value.slice(BUCKET_HEADER_BYTES..), page)?
        } else {
            Walk::from_page(&mut self.pages, header.root)?
        };
        Ok(Rows { pages: &mut self.pages, walk })
    }

    /// All buckets were read: whether that were all pages.
    ///
    /// # Errors
    /// A page is in no tree, and not free either.
    pub fn end(&self) -> Result<(), ReadError> {
        let meta = &self.pages.database.meta;
        if meta.freelist == NO_FREELIST {
            return Ok(());
        }
        match (0..meta.high_water).find(|page| !self.pages.is_seen(*page)) {
            Some(page) => {
                Err(ReadError::Page { page, problem: "it is neither in use nor on the freelist" })
            }
            None => Ok(()),
        }
    }
}

/// See [`Scan::rows`].
#[derive(Debug)]
pub struct Rows<'s, 'a> {
    pages: &'s mut Pages<'a>,
    walk: Walk,
}

impl Rows<'_, '_> {
    /// The next row. After an error there is no more.
    ///
    /// # Errors
    /// [`ReadError`].
    #[expect(clippy::should_implement_trait, reason = "an iterator would go on after an error")]
    pub fn next(&mut self) -> Result<Option<Row>, ReadError> {
        match self.walk.next(self.pages)? {
            None => Ok(None),
            Some(Element { flags: 0, key, value, .. }) => Ok(Some(Row { key, value })),
            Some(Element { page, .. }) => {
                Err(ReadError::Page { page, problem: "a row is flagged to be something else" })
            }
        }
    }
}

/// The pages of a file, and which of them were met.
#[derive(Debug)]
struct Pages<'a> {
    database: &'a Database,
    /// A bit for each page.
    seen: Vec<u64>,
    /// What was read last, and from where in the file.
    ahead: Bytes,
    ahead_at: u64,
}

impl Pages<'_> {
    fn is_seen(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|word| self.seen.get(word));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// Takes note that `count` pages from `first` are in use.
    fn enter(&mut self, first: u64, count: u64) -> Result<(), ReadError> {
        let end = first.checked_add(count).filter(|end| *end <= self.database.meta.high_water);
        let Some(end) = end else {
            return Err(ReadError::Page { page: first, problem: "it is beyond the last page" });
        };
        for page in first..end {
            if self.is_seen(page) {
                return Err(ReadError::Page { page, problem: "it is used twice" });
            }
            if let Ok(at) = usize::try_from(page / 64)
                && let Some(word) = self.seen.get_mut(at)
            {
                *word |= 1 << (page % 64);
            }
        }
        Ok(())
    }

    /// Reads a page, with those in which it goes on.
    fn read(&mut self, page: u64) -> Result<(PageHeader, Bytes), ReadError> {
        let page_bytes = u64::from(self.database.meta.page_size);
        self.enter(page, 1)?;
        // Below the high water, so this is within the file.
        let at = page.saturating_mul(page_bytes);
        let first = self.bytes(at, page_bytes)?;
        let damaged = |problem| ReadError::Page { page, problem };
        let header = PageHeader::decode(&first).ok_or(damaged("it has no header"))?;
        if header.id != page {
            return Err(damaged("it is another page by its number"));
        }
        if header.overflow == 0 {
            return Ok((header, first));
        }
        let run_bytes = (u64::from(header.overflow) + 1).saturating_mul(page_bytes);
        if run_bytes > RUN_BYTES_MAX {
            return Err(damaged("it goes on in more pages than there can be"));
        }
        self.enter(page + 1, u64::from(header.overflow))?;
        drop(first);
        Ok((header, self.bytes(at, run_bytes)?))
    }

    /// Bytes of the file, all of which is there.
    fn bytes(&mut self, at: u64, len: u64) -> Result<Bytes, ReadError> {
        let ahead_end = self.ahead_at + self.ahead.len() as u64;
        if at < self.ahead_at || at + len > ahead_end {
            let goes_on = (self.ahead_at..=ahead_end).contains(&at);
            let wanted = if goes_on { len.max(READ_AHEAD_BYTES) } else { len };
            let wanted = wanted.min(self.database.len.saturating_sub(at));
            let mut read = BytesMut::zeroed(usize::try_from(wanted).unwrap_or_default());
            self.database.file.read_exact_at(&mut read, at)?;
            self.ahead = read.freeze();
            self.ahead_at = at;
        }
        let mut bytes = self.ahead.clone();
        let skipped = usize::try_from(at - self.ahead_at).unwrap_or(usize::MAX);
        bytes.advance(skipped.min(bytes.len()));
        bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    /// The pages on the freelist are free, and it has pages itself.
    fn enter_freelist(&mut self, page: u64) -> Result<(), ReadError> {
        let damaged = |problem| ReadError::Page { page, problem };
        let (header, mut bytes) = self.read(page)?;
        if header.flags != FREELIST_PAGE {
            return Err(damaged("it is no freelist, which the meta says"));
        }
        bytes.advance(PAGE_HEADER_BYTES);
        let mut count = u64::from(header.count);
        if header.count == FREELIST_COUNT_AHEAD {
            count = bytes.try_get_u64_le().map_err(|_| damaged("it is cut off"))?;
        }
        for _ in 0..count {
            let free = bytes.try_get_u64_le();
            self.enter(free.map_err(|_| damaged("it lists more pages than it can hold"))?, 1)?;
        }
        Ok(())
    }
}

/// A page that is being walked: its elements from `next` on are yet to come.
#[derive(Debug)]
struct Frame {
    page: u64,
    header: PageHeader,
    bytes: Bytes,
    next: usize,
}

/// An element of a leaf, and the page it stands in.
struct Element {
    flags: u32,
    key: Bytes,
    value: Bytes,
    page: u64,
}

/// From a root to the present leaf.
#[derive(Debug)]
struct Walk {
    frames: Vec<Frame>,
    last_key: Bytes,
}

impl Walk {
    fn from_page(pages: &mut Pages<'_>, root: u64) -> Result<Walk, ReadError> {
        let mut walk = Walk { frames: Vec::new(), last_key: Bytes::new() };
        walk.descend(pages, root)?;
        Ok(walk)
    }

    /// A bucket whose only page is `bytes`, within a page.
    fn inline(bytes: Bytes, page: u64) -> Result<Walk, ReadError> {
        let header = PageHeader::decode(&bytes).filter(|header| header.flags == LEAF_PAGE);
        let problem = "a bucket in it is no leaf";
        let header = header.ok_or(ReadError::Page { page, problem })?;
        let frame = Frame { page, header, bytes, next: 0 };
        Ok(Walk { frames: vec![frame], last_key: Bytes::new() })
    }

    fn descend(&mut self, pages: &mut Pages<'_>, page: u64) -> Result<(), ReadError> {
        let damaged = |problem| ReadError::Page { page, problem };
        if self.frames.len() == DEPTH_MAX {
            return Err(damaged("it is deeper in its tree than there can be"));
        }
        let (header, bytes) = pages.read(page)?;
        match header.flags {
            LEAF_PAGE => {}
            BRANCH_PAGE if header.count > 0 => {}
            BRANCH_PAGE => return Err(damaged("it is a branch without children")),
            _ => return Err(damaged("it is neither a leaf nor a branch")),
        }
        self.frames.push(Frame { page, header, bytes, next: 0 });
        Ok(())
    }

    fn next(&mut self, pages: &mut Pages<'_>) -> Result<Option<Element>, ReadError> {
        loop {
            let Some(frame) = self.frames.last_mut() else { return Ok(None) };
            if frame.next == usize::from(frame.header.count) {
                self.frames.pop();
                continue;
            }
            let page = frame.page;
            let damaged = |problem| ReadError::Page { page, problem };
            let is_leaf = frame.header.flags == LEAF_PAGE;
            let at = PAGE_HEADER_BYTES + frame.next * LEAF_ELEMENT_BYTES.max(BRANCH_ELEMENT_BYTES);
            let element = frame.bytes.get(at..).unwrap_or_default();
            let is_first = frame.next == 0;
            frame.next += 1;
            let cut_off = "a row is not within it";
            if is_leaf {
                let found = LeafElement::decode(element).ok_or(damaged(cut_off))?;
                let (key, value) = leaf_row(&frame.bytes, at, &found).ok_or(damaged(cut_off))?;
                if key.is_empty() || key <= self.last_key {
                    return Err(damaged("its keys are not in order"));
                }
                self.last_key = key.clone();
                return Ok(Some(Element { flags: found.flags, key, value, page }));
            }
            let found = BranchElement::decode(element).ok_or(damaged(cut_off))?;
            let key = slice(&frame.bytes, at, found.pos, 0, found.key_len);
            let key = key.ok_or(damaged(cut_off))?;
            // What came before is smaller. What comes now is not: the row that follows is looked
            // at against the key in its place. The first child of a branch may be older.
            if !is_first && key <= self.last_key {
                return Err(damaged("its keys are not in order"));
            }
            let last = self.last_key.clone();
            self.descend(pages, found.page)?;
            if !is_first {
                self.check_first(&key, &last)?;
            }
        }
    }

    /// The page that was just entered begins at `from` or later.
    fn check_first(&self, from: &Bytes, last: &Bytes) -> Result<(), ReadError> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        let damaged = |problem| ReadError::Page { page: frame.page, problem };
        let element = frame.bytes.get(PAGE_HEADER_BYTES..).unwrap_or_default();
        let (pos, len) = match frame.header.flags {
            LEAF_PAGE => LeafElement::decode(element).map(|row| (row.pos, row.key_len)),
            _ => BranchElement::decode(element).map(|child| (child.pos, child.key_len)),
        }
        .ok_or(damaged("a row is not within it"))?;
        if frame.header.count == 0 {
            return Ok(());
        }
        let first = slice(&frame.bytes, PAGE_HEADER_BYTES, pos, 0, len);
        let first = first.ok_or(damaged("a row is not within it"))?;
        if first < *from || first <= *last {
            return Err(damaged("it begins before the key that leads to it"));
        }
        Ok(())
    }
}

fn leaf_row(page: &Bytes, at: usize, element: &LeafElement) -> Option<(Bytes, Bytes)> {
    let key = slice(page, at, element.pos, 0, element.key_len)?;
    let value = slice(page, at, element.pos, element.key_len, element.value_len)?;
    Some((key, value))
}

/// `len` bytes, `skipped` after `pos` after the element that begins at `at`.
fn slice(page: &Bytes, at: usize, pos: u32, skipped: u32, len: u32) -> Option<Bytes> {
    let start = at.checked_add(pos as usize)?.checked_add(skipped as usize)?;
    let end = start.checked_add(len as usize)?;
    (end <= page.len()).then(|| page.slice(start..end))
}

#[cfg(test)]
mod tests;
