//! Files made by hand, page by page, and what is said of damaged ones.

use std::fs;
use std::io::Write as _;

use super::*;

const NAME: &[u8] = b"key";

/// A file in the making: pages of one size, in order.
struct Written {
    page_bytes: usize,
    bytes: Vec<u8>,
}

impl Written {
    /// A file whose metas are yet to come ([`Written::end`]).
    fn new(page_bytes: usize) -> Written {
        Written { page_bytes, bytes: vec![0; 2 * page_bytes] }
    }

    fn page(&mut self, flags: u16, count: usize, content: &[u8]) -> u64 {
        let id = (self.bytes.len() / self.page_bytes) as u64;
        let pages = (PAGE_HEADER_BYTES + content.len()).div_ceil(self.page_bytes);
        let overflow = pages as u32 - 1;
        PageHeader { id, flags, count: count as u16, overflow }.encode(&mut self.bytes);
        self.bytes.extend_from_slice(content);
        self.bytes.resize((id as usize + pages) * self.page_bytes, 0);
        id
    }

    fn leaf(&mut self, rows: &[(&[u8], &[u8])]) -> u64 {
        self.page(LEAF_PAGE, rows.len(), &leaf(0, rows))
    }

    fn branch(&mut self, children: &[(&[u8], u64)]) -> u64 {
        let mut elements = Vec::new();
        let mut keys = Vec::new();
        for (at, (key, page)) in children.iter().enumerate() {
            let left = (children.len() - at) * BRANCH_ELEMENT_BYTES;
            let pos = (left + keys.len()) as u32;
            BranchElement { pos, key_len: key.len() as u32, page: *page }.encode(&mut elements);
            keys.extend_from_slice(key);
        }
        self.page(BRANCH_PAGE, children.len(), &[elements, keys].concat())
    }

    /// The root, with one bucket, and the metas.
    fn end(mut self, root: u64, freelist: u64) -> Vec<u8> {
        let mut bucket = Vec::new();
        BucketHeader { root, sequence: 0 }.encode(&mut bucket);
        self.end_with(&bucket, freelist)
    }

    fn end_with(&mut self, bucket: &[u8], freelist: u64) -> Vec<u8> {
        let root = self.page(LEAF_PAGE, 1, &leaf(BUCKET_ELEMENT, &[(NAME, bucket)]));
        let high_water = (self.bytes.len() / self.page_bytes) as u64;
        for (id, txid) in [(0u64, 8), (1, 7)] {
            let mut page = Vec::new();
            PageHeader { id, flags: 4, count: 0, overflow: 0 }.encode(&mut page);
            let root = BucketHeader { root, sequence: 0 };
            let page_size = self.page_bytes as u32;
            Meta { page_size, root, freelist, high_water, txid }.encode(&mut page);
            let at = id as usize * self.page_bytes;
            self.bytes[at..at + page.len()].copy_from_slice(&page);
        }
        self.bytes.clone()
    }
}

fn leaf(flags: u32, rows: &[(&[u8], &[u8])]) -> Vec<u8> {
    let (mut elements, mut content) = (Vec::new(), Vec::new());
    for (at, (key, value)) in rows.iter().enumerate() {
        let pos = ((rows.len() - at) * LEAF_ELEMENT_BYTES + content.len()) as u32;
        let (key_len, value_len) = (key.len() as u32, value.len() as u32);
        LeafElement { flags, pos, key_len, value_len }.encode(&mut elements);
        content.extend_from_slice(key);
        content.extend_from_slice(value);
    }
    [elements, content].concat()
}

/// A key and its value.
type Pair = (Vec<u8>, Vec<u8>);

/// The rows of the one bucket.
fn rows(bytes: &[u8]) -> Result<Vec<Pair>, ReadError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let database = Database::open(file, bytes.len() as u64)?;
    let mut scan = database.scan()?;
    let buckets = scan.buckets()?;
    let mut found = Vec::new();
    for bucket in &buckets {
        assert_eq!(bucket.name, NAME);
        let mut rows = scan.rows(bucket)?;
        while let Some(row) = rows.next()? {
            found.push((row.key.to_vec(), row.value.to_vec()));
        }
    }
    scan.end()?;
    Ok(found)
}

fn problem(bytes: &[u8]) -> String {
    rows(bytes).unwrap_err().to_string()
}

/// Two leaves below a branch; the second goes on in further pages.
fn two_levels(page_bytes: usize) -> Vec<u8> {
    let mut file = Written::new(page_bytes);
    let first = file.leaf(&[(b"a", b"1"), (b"b", b"2")]);
    let second = file.leaf(&[(b"c", &[3; 20_000]), (b"d", b"4")]);
    let root = file.branch(&[(b"a", first), (b"c", second)]);
    file.end(root, NO_FREELIST)
}

#[test]
fn rows_come_in_order_from_pages_of_any_size() {
    for page_bytes in [1024, 4096, 8192, 65536] {
        let found = rows(&two_levels(page_bytes)).unwrap();
        let keys: Vec<&[u8]> = found.iter().map(|(key, _)| key.as_slice()).collect();
        assert_eq!(keys, [b"a", b"b", b"c", b"d"], "{page_bytes}");
        assert_eq!(found[2].1, [3; 20_000]);
    }
}

#[test]
fn a_bucket_may_be_inline_or_empty() {
    let mut bucket = Vec::new();
    BucketHeader { root: 0, sequence: 0 }.encode(&mut bucket);
    PageHeader { id: 0, flags: LEAF_PAGE, count: 1, overflow: 0 }.encode(&mut bucket);
    bucket.extend(leaf(0, &[(b"x", b"y")]));
    let inline = Written::new(4096).end_with(&bucket, NO_FREELIST);
    assert_eq!(rows(&inline).unwrap(), [(b"x".to_vec(), b"y".to_vec())]);
    let mut file = Written::new(4096);
    let root = file.leaf(&[]);
    assert_eq!(rows(&file.end(root, NO_FREELIST)).unwrap(), []);
    let branch = Written::new(4096).end_with(&[&bucket[..16], &[0; 16]].concat(), NO_FREELIST);
    assert!(problem(&branch).contains("a bucket in it is no leaf"));
}

#[test]
fn one_whole_meta_is_enough_and_the_newer_one_counts() {
    let good = two_levels(4096);
    let mut first_gone = good.clone();
    first_gone[..4096].fill(0);
    assert_eq!(rows(&first_gone).unwrap().len(), 4);
    let mut second_gone = good.clone();
    second_gone[4096 + 20] ^= 1;
    assert_eq!(rows(&second_gone).unwrap().len(), 4);
    let mut both_gone = first_gone;
    both_gone[4096 + 20] ^= 1;
    assert!(problem(&both_gone).contains("it is no bbolt database"));
}

#[test]
fn what_was_cut_off_or_is_something_else_is_refused() {
    let good = two_levels(4096);
    for len in [0, 1, 100, 4096, 8192, good.len() - 1] {
        let error = rows(&good[..len]).unwrap_err();
        let is_named = matches!(error, ReadError::TooShort(_) | ReadError::CutOff { .. });
        assert!(is_named, "{len}: {error}");
    }
    assert!(matches!(rows(&[7; 10_000]), Err(ReadError::NoMeta { .. })));
    // What is behind the last page is not looked at.
    assert_eq!(rows(&[&good[..], &[1; 5000]].concat()).unwrap().len(), 4);
}

#[test]
fn pages_used_twice_out_of_bounds_or_lost_are_found() {
    let mut file = Written::new(4096);
    let page = file.leaf(&[(b"a", b"1")]);
    let root = file.branch(&[(b"a", page), (b"b", page)]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("it is used twice"));

    let mut file = Written::new(4096);
    let root = file.branch(&[(b"a", 99)]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("page 99 is damaged: it is beyond"));

    let mut file = Written::new(4096);
    let root = file.branch(&[(b"a", 2)]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("it is used twice"), "itself");

    // A freelist that lists a page in use, and one that lacks a page.
    for (free, text) in [(2u64, "used twice"), (3, "")] {
        let mut file = Written::new(4096);
        let root = file.leaf(&[(b"a", b"1")]);
        file.leaf(&[]);
        let list = file.page(FREELIST_PAGE, 1, &free.to_le_bytes());
        let found = rows(&file.end(root, list));
        match text {
            "" => assert_eq!(found.unwrap().len(), 1),
            text => assert!(found.unwrap_err().to_string().contains(text)),
        }
    }
    let mut file = Written::new(4096);
    let root = file.leaf(&[(b"a", b"1")]);
    file.leaf(&[]);
    let list = file.page(FREELIST_PAGE, 0, &[]);
    assert!(problem(&file.end(root, list)).contains("page 3 is damaged: it is neither in use"));
}

#[test]
fn keys_in_disorder_are_found_within_a_page_and_between_pages() {
    let mut file = Written::new(4096);
    let root = file.leaf(&[(b"b", b"1"), (b"a", b"2")]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("its keys are not in order"));

    let mut file = Written::new(4096);
    let (first, second) = (file.leaf(&[(b"a", b""), (b"d", b"")]), file.leaf(&[(b"c", b"")]));
    let root = file.branch(&[(b"a", first), (b"c", second)]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("its keys are not in order"));

    let mut file = Written::new(4096);
    let (first, second) = (file.leaf(&[(b"a", b"")]), file.leaf(&[(b"b", b"")]));
    let root = file.branch(&[(b"a", first), (b"c", second)]);
    assert!(problem(&file.end(root, NO_FREELIST)).contains("it begins before the key"));
}

#[test]
fn a_chain_of_branches_ends() {
    let mut file = Written::new(1024);
    let mut page = file.leaf(&[(b"a", b"")]);
    for _ in 0..100 {
        page = file.branch(&[(b"a", page)]);
    }
    assert!(problem(&file.end(page, NO_FREELIST)).contains("deeper in its tree"));
}

#[test]
fn no_flipped_bit_is_a_panic() {
    let good = two_levels(1024);
    for bit in 0..5 * 1024 * 8 {
        let mut flipped = good.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        // Refused or not: it ends, and says which page.
        if let Err(error @ ReadError::Page { page, .. }) = rows(&flipped) {
            assert!(error.to_string().contains(&format!("page {page}")));
        }
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let bytes = two_levels(4096);
    fs::write(&path, &bytes).unwrap();
    let database = Database::open(File::open(&path).unwrap(), bytes.len() as u64).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8192).unwrap();
    let error = database.scan().and_then(|mut scan| scan.buckets()).unwrap_err();
    assert!(matches!(error, ReadError::Io(_)), "{error}");
}
