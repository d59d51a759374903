use std::collections::BTreeMap;

use super::*;

pub(crate) type Rows = Vec<(Bytes, Bytes)>;

/// Both passes over the rows; the file.
fn file(buckets: &[(&'static str, Rows)]) -> Vec<u8> {
    let plan = pass(Writer::planning(), buckets, &mut Vec::new());
    let mut file = Vec::new();
    assert_eq!(pass(Writer::writing(plan), buckets, &mut file), plan);
    assert_eq!(file.len() as u64, plan.file_bytes());
    file
}

fn pass(mut writer: Writer, buckets: &[(&'static str, Rows)], file: &mut Vec<u8>) -> Plan {
    for (name, rows) in buckets {
        for (key, value) in rows {
            writer.row(key.clone(), value.clone()).unwrap();
            // No matter in what pieces.
            while let Some(piece) = writer.take(1000) {
                file.extend_from_slice(&piece);
            }
        }
        writer.end_bucket(name).unwrap();
    }
    let plan = writer.end().unwrap();
    file.extend_from_slice(&writer.take(writer.ready_bytes()).unwrap());
    plan
}

/// A reader that believes nothing: each page once, of the type that it must be, full, in order.
struct Reader<'a> {
    file: &'a [u8],
    /// Who has seen each page.
    seen: BTreeMap<u64, u64>,
}

impl Reader<'_> {
    fn page(&mut self, id: u64) -> (PageHeader, &[u8]) {
        let start = usize::try_from(id).unwrap() * PAGE_BYTES;
        let header = PageHeader::decode(&self.file[start..]).unwrap();
        assert_eq!(header.id, id);
        let end = start + (header.overflow as usize + 1) * PAGE_BYTES;
        for page in id..=id + u64::from(header.overflow) {
            assert_eq!(self.seen.insert(page, id), None, "page {page} twice");
        }
        (header, &self.file[start..end])
    }

    /// The rows below a page, with their flags, and how deep the leaves are.
    fn rows(&mut self, id: u64, is_root: bool) -> (Vec<(u32, Bytes, Bytes)>, usize) {
        let (header, page) = self.page(id);
        let page = page.to_vec();
        let at = |index: usize| PAGE_HEADER_BYTES + index * LEAF_ELEMENT_BYTES;
        let bytes = |from: usize, len: u32| {
            Bytes::copy_from_slice(&page[from..from + usize::try_from(len).unwrap()])
        };
        if header.flags == LEAF_PAGE {
            assert!(is_root || header.count > 0);
            assert!(header.count == 1 || header.overflow == 0, "small rows beside a large one");
            let elements = (0..usize::from(header.count)).map(|index| {
                let element = LeafElement::decode(&page[at(index)..]).unwrap();
                let key = at(index) + element.pos as usize;
                let value = key + element.key_len as usize;
                (element.flags, bytes(key, element.key_len), bytes(value, element.value_len))
            });
            return (elements.collect(), 0);
        }
        assert_eq!(header.flags, BRANCH_PAGE);
        assert!(header.count >= 2, "page {id} has an only child");
        let (mut rows, mut depths) = (Vec::new(), Vec::new());
        for index in 0..usize::from(header.count) {
            let element = BranchElement::decode(&page[at(index)..]).unwrap();
            let first = bytes(at(index) + element.pos as usize, element.key_len);
            let (below, depth) = self.rows(element.page, false);
            assert_eq!(below[0].1, first);
            rows.extend(below);
            depths.push(depth);
        }
        assert!(depths.iter().all(|depth| *depth == depths[0]), "leaves of different depth");
        (rows, depths[0] + 1)
    }
}

pub(crate) fn read(file: &[u8]) -> BTreeMap<String, (Rows, usize)> {
    let metas = [0, 1].map(|id| Meta::decode(&file[id * PAGE_BYTES + PAGE_HEADER_BYTES..]));
    let [meta, older] = metas.map(Result::unwrap);
    assert_eq!(Meta { txid: meta.txid, ..older }, meta);
    assert_eq!((meta.txid, meta.txid % 2), (older.txid + 1, 0));
    assert_eq!(meta.high_water * PAGE_BYTES as u64, file.len() as u64);
    let mut reader = Reader { file, seen: BTreeMap::new() };
    assert_eq!(reader.page(meta.freelist).0.count, 0);
    let (buckets, _) = reader.rows(meta.root.root, true);
    let mut found = BTreeMap::new();
    for (flags, name, value) in buckets {
        assert_eq!(flags, BUCKET_ELEMENT);
        let header = BucketHeader::decode(&value).unwrap();
        let (rows, depth) = reader.rows(header.root, true);
        assert!(rows.iter().all(|(flags, ..)| *flags == 0));
        assert!(rows.is_sorted_by(|left, right| left.1 < right.1));
        let rows = rows.into_iter().map(|(_, key, value)| (key, value)).collect();
        found.insert(String::from_utf8(name.to_vec()).unwrap(), (rows, depth));
    }
    // Two metas, and nothing that nobody knows.
    assert_eq!(reader.seen.len() as u64 + 2, meta.high_water);
    found
}

fn numbered(count: u64, value_len: impl Fn(u64) -> usize) -> Rows {
    let row = |number: u64| {
        let key = Bytes::copy_from_slice(&number.to_be_bytes());
        (key, Bytes::from(vec![number as u8; value_len(number)]))
    };
    (0..count).map(row).collect()
}

#[test]
fn every_number_of_rows_makes_a_file() {
    // With keys of 8 bytes and values of 2000, two rows fill a leaf, and 170 leaves a branch.
    let few = (0..20).chain(330..360).chain([170 * 170 * 2, 170 * 170 * 2 + 1, 60_000]);
    for count in few {
        let rows = numbered(count, |_| 2000);
        let file = file(&[("a", Vec::new()), ("key", rows.clone())]);
        let found = read(&file);
        assert!(found["a"].0.is_empty());
        assert!(found["key"].0 == rows, "{count} rows");
        let depth = match count {
            0..=2 => 0,
            3..=340 => 1,
            _ => found["key"].1,
        };
        assert_eq!(found["key"].1, depth, "{count} rows");
    }
}

#[test]
fn large_rows_have_pages_of_their_own() {
    // What just fits a page, what just does not, and what takes many.
    let fits = PAGE_BYTES - PAGE_HEADER_BYTES - LEAF_ELEMENT_BYTES - 8;
    let lengths = [0, 1, fits - 1, fits, fits + 1, 8150, 1_500_000, 3, 65_536, 0, 9];
    let rows = numbered(11, |number| lengths[number as usize]);
    let file = file(&[("key", rows.clone()), ("lease", numbered(3, |_| 4))]);
    let found = read(&file);
    assert!(found["key"].0 == rows);
    assert_eq!(found["lease"].0.len(), 3);
    let pages: usize = lengths.iter().map(|len| (len + 40).div_ceil(PAGE_BYTES)).sum();
    assert!(file.len() <= (pages + 8) * PAGE_BYTES);
}

#[test]
fn long_keys_leave_no_branch_with_an_only_child() {
    for (key_len, count) in [(900, 500), (1300, 100), (2500, 40), (5000, 33), (32_768, 20)] {
        for count in count..count + 6 {
            let row = |number: u64| {
                let mut key = number.to_be_bytes().to_vec();
                key.resize(key_len, 7);
                (Bytes::from(key), Bytes::new())
            };
            let rows: Rows = (0..count).map(row).collect();
            let found = read(&file(&[("authUsers", rows.clone())]));
            assert!(found["authUsers"].0 == rows, "{count} keys of {key_len} bytes");
        }
    }
}

#[test]
fn what_bbolt_cannot_hold_is_refused() {
    let mut writer = Writer::planning();
    let key = |len: usize| Bytes::from(vec![b'k'; len]);
    assert_eq!(writer.row(key(0), Bytes::new()), Err(WriteError::Size { key: 0, value: 0 }));
    assert!(writer.row(key(KEY_MAX_BYTES + 1), Bytes::new()).is_err());
    writer.row(key(2), Bytes::new()).unwrap();
    assert_eq!(writer.row(key(2), Bytes::new()), Err(WriteError::OutOfOrder));
    assert_eq!(writer.row(key(1), Bytes::new()), Err(WriteError::OutOfOrder));
    writer.end_bucket("b").unwrap();
    assert_eq!(writer.end_bucket("a"), Err(WriteError::OutOfOrder));
}

#[test]
fn rows_that_were_not_planned_make_no_file() {
    let plan = pass(Writer::planning(), &[("key", numbered(10, |_| 1000))], &mut Vec::new());
    let mut writer = Writer::writing(plan);
    for (key, value) in numbered(20, |_| 1000) {
        writer.row(key, value).unwrap();
    }
    writer.end_bucket("key").unwrap();
    assert_eq!(writer.end(), Err(WriteError::NotAsPlanned));
}
