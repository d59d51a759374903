//! A file from sorted rows: buckets one after the other, front to back, nothing twice.
//!
//! ```text
//! rows ─▶ leaf ─▶ page 3, 4, 5 …                    a leaf is full: it becomes a page
//!          └─ first key, page ─▶ branch ─▶ page 90  a branch is full: likewise
//!                                 └─ ─▶ branch …    until one page is above all: the root
//! ```
//!
//! The first pages say where the root is and how many pages there are, which is known at the end
//! alone. So a file is written in two passes over the same rows, by the same code: one that
//! counts ([`Writer::planning`]), and one that is given the count, and writes
//! ([`Writer::writing`]). Between rows a writer holds one page's worth of each level of the
//! present bucket's tree, and what it has written and nobody took yet ([`Writer::take`]).
//!
//! Leaves are filled as far as they go; a row that is larger than a page has its own pages. A
//! branch has two children at least: bbolt, when it deletes a row, panics over one that is an
//! only child. So a branch that is full waits until two more children are there for the next.
//!
//! Every bucket has pages of its own: none is inline, which spares etcd no work at this size.
//! The freelist is there, and empty.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::format::{
    BRANCH_ELEMENT_BYTES, BRANCH_PAGE, BUCKET_ELEMENT, BranchElement, BucketHeader, FREELIST_PAGE,
    LEAF_ELEMENT_BYTES, LEAF_PAGE, LeafElement, META_BYTES, META_PAGE, Meta, PAGE_BYTES,
    PAGE_HEADER_BYTES, PageHeader,
};

/// The page of the freelist, behind the two metas.
const FREELIST: u64 = 2;
/// The first page of a tree.
const FIRST: u64 = 3;
/// The transaction that the file is the result of. Even, so that the next one's meta goes to
/// page 1, and page 0 stays as it is until that is whole.
const TXID: u64 = 2;
/// The fewest children that a branch may have.
const CHILDREN_MIN: usize = 2;
/// The longest key that bbolt takes, in bytes.
const KEY_MAX_BYTES: usize = 32768;
/// The longest value that bbolt takes, in bytes.
const VALUE_MAX_BYTES: usize = (1 << 31) - 2;

/// Why rows do not make a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Keys and names of buckets must ascend.
    #[error("a row is out of order")]
    OutOfOrder,
    /// A key is empty or too long, or a value too long, for bbolt.
    #[error("a row has a key of {key} bytes and a value of {value} bytes, which bbolt cannot hold")]
    Size {
        /// The key's length.
        key: usize,
        /// The value's length.
        value: usize,
    },
    /// The rows are not those that were planned.
    #[error("the rows are not those that the file was planned for")]
    NotAsPlanned,
}

/// What the first pass finds out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    root: u64,
    pages: u64,
}

impl Plan {
    /// The size of the file, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES as u64
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Writer {
    pages: Pages,
    /// What is planned, when it is being written.
    plan: Option<Plan>,
    tree: Tree,
    /// The buckets that are done: rows of the root.
    buckets: Vec<(Bytes, Bytes)>,
}

impl Writer {
    /// A writer that counts, and writes nothing.
    pub fn planning() -> Writer {
        Writer::new(None)
    }

    /// A writer of what was planned.
    pub fn writing(plan: Plan) -> Writer {
        let mut writer = Writer::new(Some(plan));
        let out = &mut writer.pages.out;
        for (id, txid) in [(0, TXID), (1, TXID - 1)] {
            PageHeader { id, flags: META_PAGE, count: 0, overflow: 0 }.encode(out);
            let meta = Meta {
                page_size: PAGE_BYTES as u32,
                root: BucketHeader { root: plan.root, sequence: 0 },
                freelist: FREELIST,
                high_water: plan.pages,
                txid,
            };
            meta.encode(out);
            fill_page(META_BYTES, out);
        }
        PageHeader { id: FREELIST, flags: FREELIST_PAGE, count: 0, overflow: 0 }.encode(out);
        fill_page(0, out);
        writer
    }

    fn new(plan: Option<Plan>) -> Writer {
        let pages = Pages { next: FIRST, is_written: plan.is_some(), out: BytesMut::new() };
        Writer { pages, plan, tree: Tree::default(), buckets: Vec::new() }
    }

    /// Adds a row to the present bucket.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`], [`WriteError::Size`].
    pub fn row(&mut self, key: Bytes, value: Bytes) -> Result<(), WriteError> {
        self.tree.row(&mut self.pages, 0, key, value)
    }

    /// The rows since the last bucket are those of bucket `name`, and that is complete.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`].
    pub fn end_bucket(&mut self, name: &'static str) -> Result<(), WriteError> {
        let root = std::mem::take(&mut self.tree).end(&mut self.pages);
        let mut header = BytesMut::new();
        BucketHeader { root, sequence: 0 }.encode(&mut header);
        let name = Bytes::from_static(name.as_bytes());
        if self.buckets.last().is_some_and(|(last, _)| *last >= name) {
            return Err(WriteError::OutOfOrder);
        }
        self.buckets.push((name, header.freeze()));
        Ok(())
    }

    /// All buckets are there. What was written since the last [`Writer::take`] can be taken.
    ///
    /// # Errors
    /// [`WriteError::NotAsPlanned`]: what was written is no file.
    pub fn end(&mut self) -> Result<Plan, WriteError> {
        let mut tree = std::mem::take(&mut self.tree);
        for (name, header) in std::mem::take(&mut self.buckets) {
            tree.row(&mut self.pages, BUCKET_ELEMENT, name, header)?;
        }
        let root = tree.end(&mut self.pages);
        let made = Plan { root, pages: self.pages.next };
        if self.plan.is_some_and(|plan| plan != made) {
            return Err(WriteError::NotAsPlanned);
        }
        Ok(made)
    }

    /// The next bytes of the file: `len` of them, or `None` while there are not as many.
    pub fn take(&mut self, len: usize) -> Option<Bytes> {
        (self.pages.out.len() >= len).then(|| self.pages.out.split_to(len).freeze())
    }

    /// How many bytes there are to take.
    pub fn ready_bytes(&self) -> usize {
        self.pages.out.len()
    }
}

/// Pages as they are given out.
#[derive(Debug)]
struct Pages {
    next: u64,
    is_written: bool,
    out: BytesMut,
}

impl Pages {
    /// A page whose content is this long, and what it begins with.
    fn begin(&mut self, flags: u16, count: usize, content_bytes: usize) -> u64 {
        let id = self.next;
        let pages = (PAGE_HEADER_BYTES + content_bytes).div_ceil(PAGE_BYTES);
        self.next += pages as u64;
        if self.is_written {
            self.out.reserve(pages * PAGE_BYTES);
            // Neither is cut off: a page has some hundred elements, and a row less than 2 GiB.
            let (count, overflow) = (count as u16, (pages - 1) as u32);
            PageHeader { id, flags, count, overflow }.encode(&mut self.out);
        }
        id
    }
}

/// Zeros to the end of a page with this much content.
fn fill_page(content_bytes: usize, out: &mut BytesMut) {
    let used = PAGE_HEADER_BYTES + content_bytes;
    out.put_bytes(0, used.next_multiple_of(PAGE_BYTES) - used);
}

/// The tree of one bucket: what of it is not in pages yet.
#[derive(Debug, Default)]
struct Tree {
    leaf: Vec<Row>,
    leaf_bytes: usize,
    last_key: Bytes,
    /// Above the leaves, and above each other.
    branches: Vec<Branch>,
}

#[derive(Debug)]
struct Row {
    flags: u32,
    key: Bytes,
    value: Bytes,
}

/// Children that have no parent yet: the first key and the page of each.
#[derive(Debug, Default)]
struct Branch {
    children: Vec<(Bytes, u64)>,
    bytes: usize,
}

impl Tree {
    fn row(
        &mut self,
        pages: &mut Pages,
        flags: u32,
        key: Bytes,
        value: Bytes,
    ) -> Result<(), WriteError> {
        if key.is_empty() || key.len() > KEY_MAX_BYTES || value.len() > VALUE_MAX_BYTES {
            return Err(WriteError::Size { key: key.len(), value: value.len() });
        }
        if key <= self.last_key {
            return Err(WriteError::OutOfOrder);
        }
        let bytes = LEAF_ELEMENT_BYTES + key.len() + value.len();
        if !self.leaf.is_empty() && PAGE_HEADER_BYTES + self.leaf_bytes + bytes > PAGE_BYTES {
            self.end_leaf(pages);
        }
        self.last_key = key.clone();
        self.leaf_bytes += bytes;
        self.leaf.push(Row { flags, key, value });
        Ok(())
    }

    fn end_leaf(&mut self, pages: &mut Pages) {
        let id = pages.begin(LEAF_PAGE, self.leaf.len(), self.leaf_bytes);
        let first = self.leaf.first().map(|row| row.key.clone()).unwrap_or_default();
        if pages.is_written {
            write_leaf(&self.leaf, &mut pages.out);
            fill_page(self.leaf_bytes, &mut pages.out);
        }
        self.leaf.clear();
        self.leaf_bytes = 0;
        self.child(pages, 0, first, id);
    }

    /// A page of one level is done: a child of the level above, `level` of the branches.
    fn child(&mut self, pages: &mut Pages, level: usize, first: Bytes, id: u64) {
        if self.branches.len() == level {
            self.branches.push(Branch::default());
        }
        let Some(branch) = self.branches.get_mut(level) else { return };
        let before_bytes = branch.bytes;
        branch.push(first, id);
        // All but the last do not fit a page: all but the last two did.
        let closing = branch.children.len().saturating_sub(CHILDREN_MIN);
        if PAGE_HEADER_BYTES + before_bytes > PAGE_BYTES && closing >= CHILDREN_MIN {
            let (first, id) = branch.write(closing, pages);
            self.child(pages, level + 1, first, id);
        }
    }

    /// Writes what is left, and returns the root.
    fn end(mut self, pages: &mut Pages) -> u64 {
        // A bucket without rows is a leaf without rows.
        if !self.leaf.is_empty() || self.branches.is_empty() {
            self.end_leaf(pages);
        }
        let mut level = 0;
        while let Some(branch) = self.branches.get_mut(level) {
            if let [(_, root)] = branch.children.as_slice() {
                return *root;
            }
            // The last page may be one child too large; then it is two.
            let count = branch.children.len();
            let is_two = PAGE_HEADER_BYTES + branch.bytes > PAGE_BYTES && count >= 2 * CHILDREN_MIN;
            let first_part = if is_two { count - CHILDREN_MIN } else { count };
            for part in [first_part, count - first_part].into_iter().filter(|part| *part > 0) {
                if let Some(branch) = self.branches.get_mut(level) {
                    let (first, id) = branch.write(part, pages);
                    self.child(pages, level + 1, first, id);
                }
            }
            level += 1;
        }
        0
    }
}

impl Branch {
    fn push(&mut self, first: Bytes, id: u64) {
        self.bytes += BRANCH_ELEMENT_BYTES + first.len();
        self.children.push((first, id));
    }

    /// Writes the first `count` children as a page; returns its first key and its number.
    fn write(&mut self, count: usize, pages: &mut Pages) -> (Bytes, u64) {
        let children: Vec<(Bytes, u64)> = self.children.drain(..count).collect();
        let bytes = children.iter().map(|(key, _)| BRANCH_ELEMENT_BYTES + key.len()).sum();
        self.bytes -= bytes;
        let id = pages.begin(BRANCH_PAGE, count, bytes);
        if pages.is_written {
            write_branch(&children, &mut pages.out);
            fill_page(bytes, &mut pages.out);
        }
        let first = children.into_iter().next().map(|(key, _)| key).unwrap_or_default();
        (first, id)
    }
}

fn write_leaf(rows: &[Row], out: &mut BytesMut) {
    let mut pos = rows.len() * LEAF_ELEMENT_BYTES;
    for row in rows {
        let (key_len, value_len) = (row.key.len(), row.value.len());
        // Nothing is cut off: all of it is less than 4 GiB, as the row's size is.
        let element = LeafElement {
            flags: row.flags,
            pos: pos as u32,
            key_len: key_len as u32,
            value_len: value_len as u32,
        };
        element.encode(out);
        pos = pos + key_len + value_len - LEAF_ELEMENT_BYTES;
    }
    for row in rows {
        out.put_slice(&row.key);
        out.put_slice(&row.value);
    }
}

fn write_branch(children: &[(Bytes, u64)], out: &mut BytesMut) {
    let mut pos = children.len() * BRANCH_ELEMENT_BYTES;
    for (key, page) in children {
        let element = BranchElement { pos: pos as u32, key_len: key.len() as u32, page: *page };
        element.encode(out);
        pos = pos + key.len() - BRANCH_ELEMENT_BYTES;
    }
    for (key, _) in children {
        out.put_slice(key);
    }
}

#[cfg(test)]
pub(crate) mod tests;
