use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;
use tempfile::TempDir;

use super::dir::Step;
use super::format::{
    Batch, Place, RECORD_HEADER_BYTES, Record, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader,
};
use super::spares::SPARES_MAX;
use super::*;

const SEGMENT: u64 = 8192;
const IDENTITY: Identity = Identity { cluster_id: 0xc1, member_id: 0xa1 };

/// A directory to work in; in memory if there is such a file system, for what is tested
/// is what the files hold, and thousands of syncs on a disk take minutes.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").unwrap_or_else(|_| TempDir::new().unwrap())
}

/// A failing case is printed, shrunk; nothing is left in the source tree.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn options(dir: &Path) -> Options {
    Options {
        dir: dir.to_owned(),
        segment_bytes: SEGMENT,
        fsync: true,
        identity: IDENTITY,
        reaches: 0,
    }
}

fn open(dir: &Path) -> (Log, Recovered) {
    Log::open(options(dir)).unwrap()
}

/// Opens a copy that is only looked at: no need to wait for the disk.
fn look(dir: &Path) -> Result<Recovered, LogError> {
    Log::open(Options { fsync: false, ..options(dir) }).map(|(_, recovered)| recovered)
}

fn entry(index: u64, term: u64, data: &[u8]) -> Entry {
    Entry {
        index,
        term,
        kind: (index % 3) as u8,
        data: Bytes::copy_from_slice(data),
        context: Bytes::from(vec![0xcc; (index % 5) as usize]),
    }
}

/// `count` entries from `first` on, of `size` bytes each that name their index and term.
fn entries(first: u64, count: u64, term: u64, size: usize) -> Vec<Entry> {
    (first..first + count)
        .map(|index| {
            let mut data = format!("<{index}@{term}>").into_bytes();
            data.resize(size.max(data.len()), b'.');
            entry(index, term, &data)
        })
        .collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit }
}

fn copy_dir(from: &Path) -> TempDir {
    let to = scratch();
    for item in fs::read_dir(from).unwrap() {
        let path = item.unwrap().path();
        // The background thread may rename what was listed a moment ago.
        let _ = fs::copy(&path, to.path().join(path.file_name().unwrap()));
    }
    to
}

fn names(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|item| item.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    paths
}

fn last_segment(dir: &Path) -> PathBuf {
    names(dir, "log").pop().unwrap()
}

fn flip(path: &Path, offset: u64, mask: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
}

#[track_caller]
fn assert_damaged(result: Result<Recovered, LogError>, file: &Path, at_or_before: u64) {
    match result {
        Err(LogError::Damaged { file: named, offset, .. }) => {
            assert_eq!(named.file_name(), file.file_name());
            assert!(offset <= at_or_before, "damage at {at_or_before} reported at {offset}");
        }
        other => panic!("damage at {at_or_before} not refused: {other:?}"),
    }
}

// ------------------------------------------------------------------ plain use

#[test]
fn what_was_synced_is_there_after_a_restart() {
    let dir = scratch();
    let (mut log, fresh) = open(dir.path());
    assert_eq!(fresh.identity, IDENTITY);
    assert_eq!(fresh.hard_state, HardState::default());
    assert_eq!((fresh.start, fresh.entries.len()), (Mark::default(), 0));
    assert_eq!(fresh.repaired, None);

    let receipt = log.append(&entries(1, 3, 1, 20), Some(hard_state(1, 7, 0))).unwrap();
    assert_eq!(receipt.last_index, 3);
    let receipt = log.append(&[], Some(hard_state(2, 9, 3))).unwrap();
    let stats = log.sync().unwrap();
    assert_eq!(stats.bytes, receipt.waiting_bytes);
    assert_eq!(log.sync().unwrap(), SyncStats::default());
    log.append(&entries(4, 1, 2, 20), None).unwrap();
    drop(log); // Entry 4 was never synced.

    let other = Identity { cluster_id: 1, member_id: 2 };
    let (_log, found) = Log::open(Options { identity: other, ..options(dir.path()) }).unwrap();
    assert_eq!(found.identity, IDENTITY, "a log keeps its identity");
    assert_eq!(found.hard_state, hard_state(2, 9, 3));
    assert_eq!(found.entries, entries(1, 3, 1, 20));
    assert_eq!(found.repaired, None);
}

#[test]
fn exists_tells_a_log_from_a_directory() {
    let dir = scratch();
    let inner = dir.path().join("a/b/wal");
    assert!(!Log::exists(&inner).unwrap());
    drop(open(&inner));
    assert!(Log::exists(&inner).unwrap());
    assert!(!Log::exists(dir.path()).unwrap());
}

#[test]
fn only_the_owner_may_look() {
    let dir = scratch();
    let inner = dir.path().join("above/wal");
    let (mut log, _) = open(&inner);
    for first in (1..200).step_by(10) {
        log.append(&entries(first, 10, 1, 100), None).unwrap();
        log.sync().unwrap();
    }
    assert_eq!(log.spares.settle(), 1);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&inner), 0o700);
    assert_eq!(mode(inner.parent().unwrap()), 0o700);
    for item in fs::read_dir(&inner).unwrap() {
        let path = item.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn one_process_at_a_time() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let error = Log::open(options(dir.path())).unwrap_err();
    assert!(matches!(error, LogError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    drop(log);
    open(dir.path());
}

#[test]
fn a_new_log_is_small() {
    let dir = scratch();
    let (log, _) =
        Log::open(Options { segment_bytes: SEGMENT_BYTES_DEFAULT, ..options(dir.path()) }).unwrap();
    log.spares.settle();
    assert_eq!(fs::metadata(last_segment(dir.path())).unwrap().len(), 1 << 20);
    assert_eq!(names(dir.path(), "spare").len(), 0, "nothing is filled before it is needed");
}

#[test]
fn a_conflict_replaces_the_suffix() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    // Over a segment boundary and back behind it.
    log.append(&entries(1, 30, 1, 200), None).unwrap();
    log.sync().unwrap();
    log.append(&entries(31, 10, 1, 200), None).unwrap();
    log.sync().unwrap();
    assert_eq!(log.current.sequence, 2);
    log.append(&entries(25, 2, 2, 200), Some(hard_state(2, 0, 24))).unwrap();
    log.sync().unwrap();
    let expected = [entries(1, 24, 1, 200), entries(25, 2, 2, 200)].concat();
    drop(log);
    let (mut log, found) = open(dir.path());
    assert_eq!(found.entries, expected);
    assert!(matches!(log.append(&entries(28, 1, 2, 1), None), Err(LogError::Misuse(_))));
    log.append(&entries(27, 1, 2, 1), None).unwrap();
    log.sync().unwrap();

    // The same, with the first segment gone.
    log.truncate_prefix(Mark { index: 26, term: 2 }).unwrap();
    log.spares.settle();
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!(found.start, Mark { index: 26, term: 2 });
    assert_eq!(found.entries, entries(27, 1, 2, 1));
}

#[test]
fn a_batch_larger_than_a_segment_fits() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    let mut expected = Vec::new();
    for (index, size) in [(1, 3 * SEGMENT as usize), (2, 10), (3, 2_500_000), (4, 10)] {
        let one = entries(index, 1, 1, size);
        log.append(&one, Some(hard_state(1, 1, index))).unwrap();
        log.sync().unwrap();
        expected.extend(one);
    }
    drop(log);
    let (mut log, found) = open(dir.path());
    assert_eq!(found.entries, expected);
    log.truncate_prefix(Mark { index: 4, term: 1 }).unwrap();
    log.spares.settle();
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!((found.entries.len(), found.hard_state), (0, hard_state(1, 1, 4)));
}

#[test]
fn misuse_changes_nothing() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    log.append(&entries(1, 10, 1, 10), None).unwrap();
    log.truncate_prefix(Mark { index: 5, term: 1 }).unwrap();
    let mut gap = entries(11, 2, 1, 10);
    gap[1].index = 13;
    for result in [
        log.append(&entries(5, 1, 2, 10), None).map(drop),
        log.append(&entries(12, 1, 2, 10), None).map(drop),
        log.append(&gap, None).map(drop),
        log.truncate_prefix(Mark { index: 11, term: 1 }),
        log.install(Mark { index: 4, term: 1 }, HardState::default()),
    ] {
        assert!(matches!(result, Err(LogError::Misuse(_))), "{result:?}");
    }
    log.truncate_prefix(Mark { index: 3, term: 1 }).unwrap();
    log.append(&entries(11, 1, 1, 10), None).unwrap();
    log.sync().unwrap();
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!(found.start, Mark { index: 5, term: 1 });
    assert_eq!(found.entries, entries(6, 6, 1, 10));
}

// ---------------------------------------------------- segments come and go

/// Appends and syncs ten entries at a time, up to `last`.
fn fill(log: &mut Log, last: u64) {
    while log.appended.next_index <= last {
        let first = log.appended.next_index;
        log.append(&entries(first, 10, 1, 100), None).unwrap();
        log.sync().unwrap();
    }
}

#[test]
fn a_vote_outlives_its_segment() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    log.append(&[], Some(hard_state(5, 3, 0))).unwrap();
    fill(&mut log, 400);
    log.truncate_prefix(Mark { index: 400, term: 1 }).unwrap();
    log.spares.settle();
    assert_eq!(names(dir.path(), "log").len(), 1);
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!(found.hard_state, hard_state(5, 3, 0));
    assert_eq!((found.start, found.entries.len()), (Mark { index: 400, term: 1 }, 0));
}

#[test]
fn an_installed_snapshot_replaces_everything() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 400);
    let start = Mark { index: 150, term: 2 };
    log.append(&entries(401, 1, 1, 10), None).unwrap();
    log.install(start, hard_state(2, 0, 150)).unwrap();
    for reopened in [false, true] {
        if reopened {
            drop(log);
            let (again, found) = open(dir.path());
            log = again;
            assert_eq!((found.start, found.hard_state), (start, hard_state(2, 0, 150)));
            assert_eq!(found.entries.len(), 0);
        }
        assert!(log.append(&entries(150, 1, 2, 10), None).is_err());
        assert!(log.append(&entries(152, 1, 2, 10), None).is_err());
    }
    log.append(&entries(151, 3, 2, 10), None).unwrap();
    log.sync().unwrap();
    log.spares.settle();
    assert_eq!(names(dir.path(), "log").len(), 1);
    drop(log);
    let (mut log, found) = open(dir.path());
    assert_eq!(found.entries, entries(151, 3, 2, 10));
    // The entries that were replaced do not keep the segment alive: 153 is its highest.
    fill(&mut log, 300);
    log.truncate_prefix(Mark { index: 160, term: 1 }).unwrap();
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!(found.start.index, 160);
}

#[test]
fn entries_that_a_snapshot_replaced_keep_no_segment() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 400);
    log.install(Mark { index: 50, term: 2 }, hard_state(2, 0, 50)).unwrap();
    fill(&mut log, 300);
    log.truncate_prefix(Mark { index: 300, term: 1 }).unwrap();
    log.spares.settle();
    assert_eq!(names(dir.path(), "log").len(), 1);
}

#[test]
fn stale_bytes_of_a_recycled_segment_never_appear() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 200);
    log.truncate_prefix(Mark { index: 200, term: 1 }).unwrap();
    assert_eq!(log.spares.settle(), SPARES_MAX);
    assert_eq!(names(dir.path(), "spare").len(), SPARES_MAX);
    // Into a recycled file, leaving most of its old bytes behind the new end.
    let sequence = log.current.sequence;
    let mut next = 201;
    while log.current.sequence == sequence {
        log.append(&entries(next, 1, 9, 100), None).unwrap();
        log.sync().unwrap();
        next += 1;
    }
    assert_eq!(log.current.capacity, SEGMENT);
    let end = log.current.end as usize;
    drop(log);
    let stale = fs::read(last_segment(dir.path())).unwrap();
    let behind = String::from_utf8_lossy(&stale[end..]).into_owned();
    assert!(behind.contains("@1>"), "the test wants old entries behind the end");
    let (mut log, found) = open(dir.path());
    assert_eq!(found.repaired, None, "an end among old bytes is an end");
    assert_eq!(found.entries, entries(201, next - 201, 9, 100));

    // Nor where the end was cut, at whatever byte the old record begins.
    let synced = log.current.end;
    log.append(&entries(next, 1, 9, 700), None).unwrap();
    log.sync().unwrap();
    let end = log.current.end;
    let image = fs::read(&log.current.path).unwrap();
    let segment = last_segment(dir.path());
    drop(log);
    for kept in synced..end {
        let copy = copy_dir(dir.path());
        let mut torn = stale.clone();
        torn[..kept as usize].copy_from_slice(&image[..kept as usize]);
        fs::write(copy.path().join(segment.file_name().unwrap()), torn).unwrap();
        let found = look(copy.path()).unwrap();
        assert_eq!(found.entries, entries(201, next - 201, 9, 100), "torn at {kept}");
    }
}

#[test]
fn spares_are_bounded_and_wrong_sizes_go() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 600);
    log.append(&entries(601, 1, 1, 50_000), None).unwrap();
    fill(&mut log, 700);
    assert!(names(dir.path(), "log").len() > 6);
    log.truncate_prefix(Mark { index: 700, term: 1 }).unwrap();
    assert!(log.spares.settle() <= SPARES_MAX);
    for spare in names(dir.path(), "spare") {
        assert_eq!(fs::metadata(spare).unwrap().len(), SEGMENT);
    }
    drop(log);
    let (log, _) =
        Log::open(Options { segment_bytes: 2 * SEGMENT, ..options(dir.path()) }).unwrap();
    log.spares.settle();
    assert_eq!(names(dir.path(), "spare").len(), 0, "another size is of no use");
    fs::write(dir.path().join("segment-0000000000000009.tmp"), b"half").unwrap();
    fs::write(dir.path().join("ffffffffffffffff.spare"), b"odd").unwrap();
    fs::write(dir.path().join("notes.tmp"), b"mine").unwrap();
    drop(log);
    drop(open(dir.path()));
    assert_eq!(names(dir.path(), "tmp"), [dir.path().join("notes.tmp")]);
}

#[test]
fn without_room_for_spares_the_log_goes_on() {
    let dir = scratch();
    let (mut log, _) =
        Log::open(Options { segment_bytes: 1 << 50, ..options(dir.path()) }).unwrap();
    for index in 1..=8 {
        log.append(&entries(index, 1, 1, 400_000), None).unwrap();
        log.sync().unwrap();
        assert_eq!(log.spares.settle(), 0);
    }
    assert!(log.current.sequence > 2);
    drop(log);
    let (_log, found) = open(dir.path());
    assert_eq!(found.entries, (1..=8).flat_map(|i| entries(i, 1, 1, 400_000)).collect::<Vec<_>>());
}

#[test]
fn a_missing_segment_is_missed_only_if_its_entries_are() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 300);
    let cut = Mark { index: 250, term: 1 };
    let segments = names(dir.path(), "log");
    assert!(segments.len() >= 5);

    let copy = copy_dir(dir.path());
    fs::remove_file(copy.path().join(segments[2].file_name().unwrap())).unwrap();
    let error = look(copy.path()).unwrap_err();
    assert!(matches!(error, LogError::Missing { sequence: 3, .. }), "{error}");
    assert!(error.to_string().contains(&copy.path().display().to_string()), "{error}");

    let copy = copy_dir(dir.path());
    let last = segments.len();
    fs::remove_file(copy.path().join(segments[last - 1].file_name().unwrap())).unwrap();
    let error = look(copy.path()).unwrap_err();
    let LogError::Missing { sequence, .. } = error else { panic!("{error}") };
    assert_eq!(sequence, last as u64, "the one before says that it is not the last");

    // A crash while segments were being recycled may leave any of them.
    let before = copy_dir(dir.path());
    log.truncate_prefix(cut).unwrap();
    log.spares.settle();
    let rest = names(dir.path(), "log");
    drop(log);
    for left_over in &segments {
        let copy = copy_dir(dir.path());
        let name = left_over.file_name().unwrap();
        if !rest.contains(left_over) {
            fs::copy(before.path().join(name), copy.path().join(name)).unwrap();
        }
        let (log, found) = open(copy.path());
        log.spares.settle();
        assert_eq!(found.start, cut);
        assert_eq!(found.entries, entries(251, 50, 1, 100));
        assert_eq!(names(copy.path(), "log").len(), rest.len(), "what is left over goes");
    }
}

// ------------------------------------------------------------ torn and damaged

/// Three batches in one segment. Returns where each began, and the end.
fn three_batches(dir: &Path) -> (Vec<u64>, PathBuf) {
    let (mut log, _) = open(dir);
    let mut offsets = Vec::new();
    for first in [1, 4, 6] {
        offsets.push(log.current.end);
        let count = if first == 1 { 3 } else { 2 };
        log.append(&entries(first, count, 1, 230), Some(hard_state(1, 8, first - 1))).unwrap();
        log.sync().unwrap();
    }
    offsets.push(log.current.end);
    assert_eq!(log.current.sequence, 1);
    (offsets, log.current.path.clone())
}

fn in_copy(copy: &TempDir, file: &Path) -> PathBuf {
    copy.path().join(file.file_name().unwrap())
}

#[test]
fn the_last_record_torn_at_any_byte_is_cut() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    let image = fs::read(&file).unwrap();
    let [.., begin, end] = offsets[..] else { panic!() };
    let synced = entries(1, 5, 1, 230);
    let copy = copy_dir(dir.path());
    let path = in_copy(&copy, &file);
    for at in begin..end {
        for garbage in [0u8, 0xff] {
            let mut torn = image.clone();
            torn[at as usize..end as usize].fill(garbage);
            let same = torn.get(..end as usize) == image.get(..end as usize);
            fs::write(&path, &torn).unwrap();
            let found = look(copy.path()).unwrap();
            let expected = if same { entries(1, 7, 1, 230) } else { synced.clone() };
            assert_eq!(found.entries, expected, "torn at {at}, {garbage}");
            assert_eq!(found.hard_state.commit, if same { 5 } else { 3 });
            let visible = torn.get(begin as usize..).unwrap().iter().any(|&b| b != 0);
            assert_eq!(found.repaired.is_some(), visible && !same, "torn at {at}, {garbage}");
            // Cut means cut: nothing left to be found a second time.
            assert_eq!(look(copy.path()).unwrap().repaired, None);
            assert!(fs::read(&path).unwrap()[begin as usize..].iter().all(|&b| b == 0) || same);
        }
    }
}

/// What was behind the cut may have been acknowledged, and nothing is left that says so.
#[test]
fn a_file_that_was_made_shorter_is_refused() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    let bytes = fs::metadata(&file).unwrap().len();
    for at in offsets.into_iter().flat_map(|offset| [offset, offset + 10]).chain([bytes - 1]) {
        let copy = copy_dir(dir.path());
        let path = in_copy(&copy, &file);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(at).unwrap();
        for _ in 0..2 {
            let told = look(copy.path()).unwrap_err().to_string();
            assert!(told.contains(&format!("at byte {at}")), "{told}");
        }
        OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes + 1).unwrap();
        assert!(look(copy.path()).is_ok(), "it may grow");
    }
}

#[test]
fn any_flipped_byte_before_the_last_batch_is_refused() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    let [_, _, begin, end] = offsets[..] else { panic!() };
    let copy = copy_dir(dir.path());
    let path = in_copy(&copy, &file);
    for at in 0..begin {
        let mask = 1 << (at % 8);
        flip(&path, at, mask);
        assert_damaged(look(copy.path()), &file, at);
        flip(&path, at, mask);
    }
    assert_eq!(look(copy.path()).unwrap().entries.len(), 7);
    // In the last batch it cannot be told from a torn write.
    for at in begin..end {
        fs::copy(&file, &path).unwrap();
        flip(&path, at, 0x10);
        let found = look(copy.path()).unwrap();
        assert_eq!(found.entries, entries(1, 5, 1, 230), "flipped at {at}");
        assert!(found.repaired.is_some_and(|text| text.contains(&begin.to_string())));
    }
}

/// Which is written once, and is no entry.
#[test]
fn with_proof_any_flipped_byte_of_the_last_batch_is_refused() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    let [.., begin, end] = offsets[..] else { panic!() };
    let (mut log, _) = open(dir.path());
    for _ in 0..2 {
        log.attest().unwrap();
        assert_eq!(log.current.end, end + RECORD_HEADER_BYTES);
    }
    let copy = copy_dir(dir.path());
    let path = in_copy(&copy, &file);
    for at in begin..end {
        flip(&path, at, 0x10);
        assert_damaged(look(copy.path()), &file, begin);
        flip(&path, at, 0x10);
    }
    // Damage to the proof, which is not synced, is none to what it proves.
    for at in end..end + RECORD_HEADER_BYTES {
        fs::copy(&file, &path).unwrap();
        flip(&path, at, 0x10);
        assert_eq!(look(copy.path()).unwrap().entries.len(), 7, "flipped at {at}");
    }
    log.append(&entries(8, 1, 1, 40), None).unwrap();
    log.sync().unwrap();
    drop(log);
    assert_eq!(look(dir.path()).unwrap().entries.len(), 8);
}

#[test]
fn a_log_that_ends_before_the_checkpoint_is_damaged_and_left_alone() {
    let dir = scratch();
    let (ends, file) = three_batches(dir.path());
    let last = look(dir.path()).unwrap().entries.last().unwrap().index;
    let whole = fs::read(&file).unwrap();
    let reaching = |reaches| Log::open(Options { reaches, ..options(dir.path()) });
    drop(reaching(last).unwrap());

    // The last batch looks torn; the checkpoint knows that it was not.
    let torn_at = ends[ends.len() - 2];
    let mut torn = whole.clone();
    torn[torn_at as usize..].fill(0);
    torn[torn_at as usize] = 1;
    fs::write(&file, &torn).unwrap();
    let error = reaching(last).map(|(_, found)| found);
    assert_damaged(error, &file, torn_at);
    assert_eq!(fs::read(&file).unwrap(), torn, "nothing is cut");
    let (_, found) = reaching(last - 2).unwrap();
    assert_eq!(found.entries.last().unwrap().index, last - 2);
    assert!(found.repaired.is_some());
}

#[test]
fn nothing_is_written_into_a_directory_that_is_refused() {
    let dir = scratch();
    let (_, file) = three_batches(dir.path());
    let guard = dir.path().join(super::guard::GUARD);
    fs::remove_file(&guard).unwrap();
    let begun = dir.path().join("segment-0000000000000002.tmp");
    fs::write(&begun, "begun").unwrap();
    flip(&file, 0, 1);
    assert_damaged(look(dir.path()), &file, 0);
    assert!(!guard.exists() && begun.exists());
    flip(&file, 0, 1);
    look(dir.path()).unwrap();
    assert!(guard.exists() && !begun.exists());
}

#[test]
fn after_an_orderly_stop_any_flipped_byte_is_refused() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    let end = *offsets.last().unwrap();
    let (mut log, _) = open(dir.path());
    log.close().unwrap();
    drop(log);
    let copy = copy_dir(dir.path());
    let path = in_copy(&copy, &file);
    for at in 0..end {
        flip(&path, at, 0x04);
        assert_damaged(look(copy.path()), &file, at);
        flip(&path, at, 0x04);
    }
    let found = look(copy.path()).unwrap();
    assert_eq!((found.entries, found.repaired), (entries(1, 7, 1, 230), None));
}

#[test]
fn a_header_alone_proves_what_was_synced() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    flip(&file, offsets[1] + 30, 1);
    flip(&file, offsets[3] - 1, 1); // The last record's payload; its header stays.
    assert_damaged(look(dir.path()), &file, offsets[1]);
}

#[test]
fn what_arrived_behind_a_hole_is_cut_with_it() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    let hole = log.current.end;
    let first = log.append(&entries(1, 1, 1, 300), None).unwrap().waiting_bytes;
    log.append(&entries(2, 1, 1, 300), None).unwrap();
    log.sync().unwrap();
    let path = log.current.path.clone();
    drop(log);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0; first as usize], hole).unwrap();
    let (mut log, found) = open(dir.path());
    assert_eq!(found.entries.len(), 0);
    assert!(found.repaired.is_some());
    // As long as the one before, so that the old second record would follow it.
    log.append(&entries(1, 1, 2, 300), None).unwrap();
    log.sync().unwrap();
    drop(log);
    assert_eq!(open(dir.path()).1.entries, entries(1, 1, 2, 300));
}

#[test]
fn any_flipped_byte_of_an_older_segment_is_refused() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    log.append(&entries(1, 1, 1, 300), None).unwrap();
    log.sync().unwrap();
    log.close().unwrap(); // An empty record, which only the next header can miss.
    let end = log.current.end;
    log.append(&entries(2, 1, 1, 7900), None).unwrap();
    log.sync().unwrap();
    assert_eq!(log.current.sequence, 2);
    let file = names(dir.path(), "log")[0].clone();
    drop(log);
    for at in 0..end {
        flip(&file, at, 0x80);
        assert_damaged(look(dir.path()), &file, at);
        flip(&file, at, 0x80);
    }
    // Behind the end nothing counts.
    flip(&file, end + 100, 0x80);
    assert_eq!(look(dir.path()).unwrap().entries.len(), 2);
    OpenOptions::new().write(true).open(&file).unwrap().set_len(end - 1).unwrap();
    assert_damaged(look(dir.path()), &file, end - 1);
}

#[test]
fn messages_tell_file_and_offset_and_what_to_do() {
    let dir = scratch();
    let (offsets, file) = three_batches(dir.path());
    flip(&file, offsets[1] + 40, 1);
    let text = look(dir.path()).unwrap_err().to_string();
    assert!(text.contains(&file.display().to_string()), "{text}");
    assert!(text.contains(&format!("byte {}", offsets[1])), "{text}");
    assert!(text.contains("remove this member"), "{text}");

    // A newer format, with a checksum that is right.
    let mut page = fs::read(&file).unwrap();
    page[8] = 2;
    let checksum = crc32c::crc32c(&page[..4092]).to_le_bytes();
    page[4092..4096].copy_from_slice(&checksum);
    fs::write(&file, page).unwrap();
    let error = look(dir.path()).unwrap_err();
    assert!(matches!(error, LogError::Format { version: 2, known: 1, .. }), "{error}");
}

proptest! {
    #![proptest_config(cases(300))]

    /// A power cut while a batch of several records is written: of the sectors it
    /// touches, any may have arrived. Before, the file held zeros or an older life.
    #[test]
    fn a_batch_torn_by_sectors_leaves_a_prefix(
        sizes in prop::collection::vec(0usize..900, 1..6),
        arrived in prop::collection::vec(any::<bool>(), 20),
        recycled in any::<bool>(),
        again in 1usize..600,
    ) {
        let dir = scratch();
        let (mut log, _) = open(dir.path());
        if recycled {
            fill(&mut log, 200);
            log.truncate_prefix(Mark { index: 200, term: 1 }).unwrap();
            log.spares.settle();
            let sequence = log.current.sequence;
            while log.current.sequence == sequence {
                let next = log.appended.next_index;
                fill(&mut log, next);
            }
            let next = log.appended.next_index;
            log.truncate_prefix(Mark { index: next - 1, term: 1 }).unwrap();
        }
        let first = log.appended.next_index;
        log.append(&entries(first, 2, 1, 10), Some(hard_state(3, 3, 3))).unwrap();
        log.sync().unwrap();
        let path = log.current.path.clone();
        let room = (log.current.capacity - log.current.end) as usize;
        prop_assume!(sizes.iter().map(|size| size + 120).sum::<usize>() < room);
        let before = fs::read(&path).unwrap();
        let mut records = Vec::new();
        for (index, &size) in (first + 2..).zip(&sizes) {
            let record = entries(index, 1, 2, size);
            log.append(&record, Some(hard_state(4, index, 3))).unwrap();
            records.push(record);
        }
        log.sync().unwrap();
        drop(log);
        let after = fs::read(&path).unwrap();
        let mut torn = before.clone();
        for (nth, sector) in (0..after.len()).step_by(512).enumerate() {
            if arrived[nth % arrived.len()] {
                torn[sector..sector + 512].copy_from_slice(&after[sector..sector + 512]);
            }
        }
        fs::write(&path, &torn).unwrap();

        let (mut log, found) = open(dir.path());
        let kept = found.entries.len() - 2;
        prop_assert!(kept <= records.len());
        let mut expected = entries(first, 2, 1, 10);
        expected.extend(records[..kept].concat());
        prop_assert_eq!(&found.entries, &expected);
        let vote = if kept == 0 { 3 } else { first + 1 + kept as u64 };
        prop_assert_eq!(found.hard_state.vote, vote);

        // What was cut stays cut, whatever is written over it and torn off again.
        let next = first + 2 + kept as u64;
        let more = entries(next, 1, 5, again);
        log.append(&more, None).unwrap();
        log.sync().unwrap();
        expected.extend(more);
        drop(log);
        let (_log, found) = open(dir.path());
        prop_assert_eq!(&found.entries, &expected);
        prop_assert_eq!(found.repaired, None);
    }

    /// Whatever the files hold, opening answers; and what it answers was appended.
    #[test]
    fn no_bytes_make_it_panic_or_invent(
        hits in prop::collection::vec((any::<u16>(), any::<u8>(), 1usize..40), 1..6),
        shorten in prop::option::of(any::<u16>()),
        which in any::<bool>(),
    ) {
        let dir = scratch();
        let (mut log, _) = Log::open(Options { fsync: false, ..options(dir.path()) }).unwrap();
        fill(&mut log, 60);
        drop(log);
        let files = names(dir.path(), "log");
        let file = if which { &files[0] } else { files.last().unwrap() };
        let mut image = fs::read(file).unwrap();
        for (at, byte, length) in hits {
            let at = usize::from(at) % image.len();
            let to = (at + length).min(image.len());
            image[at..to].fill(byte);
        }
        if let Some(shorten) = shorten {
            image.truncate(usize::from(shorten) % (image.len() + 1));
        }
        fs::write(file, image).unwrap();
        if let Ok(found) = look(dir.path()) {
            prop_assert_eq!(&found.entries, &entries(1, found.entries.len() as u64, 1, 100));
        }
    }

    #[test]
    fn decoding_never_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        flags in 0u32..16,
    ) {
        let _ = SegmentHeader::decode(&bytes);
        // A header that verifies over a payload nobody wrote.
        let mut batch = Batch::default();
        batch.push(None, None, false, &[entry(1, 1, &bytes)]).unwrap();
        let place = Place { salt: 1, sequence: 1, offset: 4096 };
        let mut image = batch.seal(place, 4096, 0)[..24].to_vec();
        image[0] = image[0] & 0xf0 | flags as u8;
        let mut checksum = crc32c::crc32c(&1u64.to_le_bytes());
        checksum = crc32c::crc32c_append(checksum, &1u64.to_le_bytes());
        checksum = crc32c::crc32c_append(checksum, &4096u64.to_le_bytes());
        checksum = crc32c::crc32c_append(checksum, &image[..20]);
        image[20..].copy_from_slice(&checksum.to_le_bytes());
        let header = RecordHeader::decode(image.first_chunk().unwrap(), place).unwrap();
        let _ = header.record(Bytes::from(bytes));
    }
}

// -------------------------------------------------------------- crash points

#[test]
fn a_crash_at_any_step_keeps_what_was_synced() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    // Each: the step, the directory then, and how far it was durable for certain then.
    type Image = (Step, TempDir, Vec<Entry>, Mark);
    let images: Arc<Mutex<Vec<Image>>> = Arc::default();
    let durable: Arc<Mutex<(Vec<Entry>, Mark)>> = Arc::default();
    {
        let (images, durable, path) = (images.clone(), durable.clone(), dir.path().to_owned());
        *log.dir.observer.lock() = Some(Box::new(move |step| {
            let (entries, start) = durable.lock().clone();
            images.lock().push((step, copy_dir(&path), entries, start));
        }));
    }
    let mut written: Vec<Entry> = Vec::new();
    for round in 0..30u64 {
        let first = 1 + round * 10;
        let some = entries(first, 10, 1, 100);
        written.extend(some.clone());
        log.append(&some, Some(hard_state(round + 1, 2, 0))).unwrap();
        log.sync().unwrap();
        durable.lock().0.extend(some);
        if round % 8 == 7 {
            let cut = Mark { index: first - 5, term: 1 };
            log.truncate_prefix(cut).unwrap();
            durable.lock().1 = cut;
            log.spares.settle();
        }
    }
    *log.dir.observer.lock() = None;
    drop(log);
    let images = std::mem::take(&mut *images.lock());
    let steps: Vec<Step> = images.iter().map(|image| image.0).collect();
    // The order that makes a roll safe.
    let roll = [
        Step::HeaderWritten,
        Step::HeaderSynced,
        Step::SegmentNamed,
        Step::SegmentSynced,
        Step::BatchWritten,
        Step::BatchSynced,
    ];
    assert!(steps.windows(roll.len()).any(|window| window == roll), "{steps:?}");
    assert!(steps.contains(&Step::SegmentGone) && steps.contains(&Step::RecyclingSynced));
    for (step, image, durable, start) in &images {
        let (_log, found) = open(image.path());
        assert!(found.start.index >= start.index, "{step:?}");
        let from = found.start.index;
        let last = found.entries.last().map_or(from, |entry| entry.index);
        assert!(last >= durable.last().map_or(0, |entry| entry.index), "{step:?}");
        let expected: Vec<Entry> =
            written.iter().filter(|e| e.index > from && e.index <= last).cloned().collect();
        assert_eq!(found.entries, expected, "{step:?}");
        assert_eq!(found.hard_state.term, last / 10, "a batch's hard state comes with it");
        assert_eq!(found.repaired, None, "{step:?}");
    }
}

#[test]
fn a_spare_that_was_begun_is_no_segment() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    fill(&mut log, 20);
    let header = SegmentHeader {
        identity: IDENTITY,
        sequence: 2,
        salt: 1,
        previous_end: log.current.end,
        next_index: 21,
        hard_state: HardState::default(),
        start: Mark::default(),
        file_bytes: SEGMENT,
    };
    drop(log);
    let mut spare = header.encode();
    spare.resize(SEGMENT as usize, 7);
    fs::write(dir.path().join("0000000000000001.spare"), spare).unwrap();
    let (mut log, found) = open(dir.path());
    assert_eq!(found.entries.len(), 20);
    fill(&mut log, 100);
    drop(log);
    assert_eq!(open(dir.path()).1.entries, entries(1, 100, 1, 100));
}

// ------------------------------------------------------------------- failures

#[test]
fn a_failed_sync_poisons() {
    let dir = scratch();
    for (device, expected) in [("/dev/full", "no space left"), ("/dev/null", "cannot sync")] {
        let (mut log, before) = open(dir.path());
        let next = before.entries.len() as u64 + 1;
        log.append(&entries(next, 1, 1, 10), None).unwrap();
        log.sync().unwrap();
        log.append(&entries(next + 1, 1, 1, 10), None).unwrap();
        // The one refuses the write, the other takes it and refuses the sync.
        let device = OpenOptions::new().write(true).open(device).unwrap();
        let good = std::mem::replace(&mut log.current.file, device);
        let error = log.sync().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        // Even if the disk has come back.
        log.current.file = good;
        let mark = Mark { index: 1, term: 1 };
        for result in [
            log.sync().map(drop),
            log.append(&[], None).map(drop),
            log.truncate_prefix(mark),
            log.install(mark, HardState::default()),
            log.close(),
        ] {
            assert_eq!(result.unwrap_err().to_string(), error);
        }
        drop(log);
        let (_log, found) = open(dir.path());
        assert_eq!(found.entries, entries(1, next, 1, 10));
    }
}

#[test]
fn a_roll_that_fails_poisons() {
    let dir = scratch();
    let (mut log, _) = open(dir.path());
    log.append(&entries(1, 1, 1, 3000), None).unwrap();
    log.sync().unwrap();
    assert_eq!(log.spares.settle(), 1);
    for spare in names(dir.path(), "spare") {
        fs::remove_file(spare).unwrap();
    }
    log.append(&entries(2, 1, 1, 3000), None).unwrap();
    let error = log.sync().unwrap_err().to_string();
    assert!(error.contains("spare"), "{error}");
    assert_eq!(log.sync().unwrap_err().to_string(), error);
    drop(log);
    assert_eq!(open(dir.path()).1.entries, entries(1, 1, 1, 3000));
}

// --------------------------------------------------------------------- layout

#[test]
fn the_bytes_are_as_drawn() {
    let header = SegmentHeader {
        identity: Identity { cluster_id: 1, member_id: 2 },
        sequence: 3,
        salt: 4,
        previous_end: 5,
        next_index: 6,
        hard_state: hard_state(7, 8, 9),
        start: Mark { index: 10, term: 11 },
        file_bytes: 12,
    };
    let page = header.encode();
    assert_eq!(page.len() as u64, SEGMENT_HEADER_BYTES);
    assert_eq!(&page[..16], b"KVORUMLG\x01\0\0\0\0\0\0\0");
    for word in 1..=12u8 {
        let at = 8 + 8 * usize::from(word);
        assert_eq!(page[at..at + 8], [word, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert!(page[112..4092].iter().all(|&byte| byte == 0));
    assert_eq!(SegmentHeader::decode(&page), Ok(header));

    let mut batch = Batch::default();
    let entry = Entry {
        index: 6,
        term: 7,
        kind: 2,
        data: Bytes::from_static(b"data!"),
        context: Bytes::from_static(b"con"),
    };
    let (hs, mark) = (hard_state(7, 8, 9), Mark { index: 5, term: 6 });
    batch.push(Some(hs), Some(mark), false, std::slice::from_ref(&entry)).unwrap();
    let place = Place { salt: 4, sequence: 3, offset: 4096 };
    let bytes = batch.seal(place, 0x1000, RECORD_HEADER_BYTES as usize).to_vec();
    let word = |value: u64| value.to_le_bytes().to_vec();
    let payload: Vec<u8> = [
        [7, 8, 9, 5, 6, 1, 6].iter().flat_map(|&value| word(value)).collect::<Vec<u8>>(),
        word(7),
        vec![2, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0],
        b"condata!".to_vec(),
        vec![0; 4],
    ]
    .concat();
    assert_eq!(bytes[24..24 + payload.len()], payload);
    assert!(bytes[24 + payload.len()..].iter().all(|&byte| byte == 0));
    assert_eq!(bytes.len(), 24 + payload.len() + 24);
    assert_eq!(bytes[..4], [1 | 2 | 8, 0x72, 0x56, 0x4b]);
    assert_eq!(bytes[4..8], (payload.len() as u32).to_le_bytes());
    assert_eq!(bytes[8..16], [0, 0x10, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[16..20], crc32c::crc32c(&payload).to_le_bytes());
    let covered = [&word(4), &word(3), &word(4096), &bytes[..20]].concat();
    assert_eq!(bytes[20..24], crc32c::crc32c(&covered).to_le_bytes());

    let head = bytes.first_chunk().unwrap();
    let decoded = RecordHeader::decode(head, place).unwrap();
    let record =
        Record { hard_state: Some(hs), start: Some(mark), resets: false, entries: vec![entry] };
    assert!(decoded.matches(&payload));
    assert_eq!(decoded.record(Bytes::from(payload)), Some(record));
    for elsewhere in [
        Place { salt: 5, ..place },
        Place { sequence: 4, ..place },
        Place { offset: 4104, ..place },
    ] {
        assert_eq!(RecordHeader::decode(head, elsewhere), None);
    }
}

// ---------------------------------------------------------------------- model

#[derive(Debug, Clone)]
enum Op {
    /// Back by so many entries, then so many new ones of this size.
    Append {
        back: u64,
        count: u64,
        size: usize,
        vote: Option<u64>,
    },
    Sync,
    /// This far between start and end, in percent.
    Truncate(u64),
    /// This far beyond the start.
    Install(u64),
    Restart,
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (0u64..4, 0u64..12, 0usize..400, prop::option::of(any::<u64>()))
            .prop_map(|(back, count, size, vote)| Op::Append {
                back: back.saturating_sub(1), count, size, vote
            }),
        1 => (0u64..4, 1u64..3, 5_000usize..30_000)
            .prop_map(|(back, count, size)| Op::Append { back, count, size, vote: None }),
        8 => Just(Op::Sync),
        3 => (0u64..=100).prop_map(Op::Truncate),
        1 => (0u64..60).prop_map(Op::Install),
        2 => Just(Op::Restart),
        1 => Just(Op::Close),
    ]
}

/// The log as a list.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    hard_state: HardState,
    start: Mark,
    entries: Vec<Entry>,
}

impl Model {
    fn next(&self) -> u64 {
        self.start.index + self.entries.len() as u64 + 1
    }
}

/// Runs `ops` on a log that `reopen` opens, and on the model.
fn run<L: LogStore>(
    ops: &[Op],
    mut reopen: impl FnMut(Option<L>) -> (L, Recovered),
) -> Result<(), TestCaseError> {
    let mut now = Model::default();
    let mut durable = now.clone();
    let mut term = 1;
    let (mut log, _) = reopen(None);
    for op in ops.iter().chain([&Op::Sync, &Op::Restart]) {
        match *op {
            Op::Append { back, count, size, vote } => {
                let first = now.next() - back.min(now.entries.len() as u64);
                term += 1;
                let new = entries(first, count, term, size);
                let hs = vote.map(|vote| hard_state(term, vote, now.start.index));
                log.append(&new, hs).unwrap();
                if count > 0 {
                    now.entries.truncate((first - now.start.index - 1) as usize);
                }
                now.entries.extend(new);
                now.hard_state = hs.unwrap_or(now.hard_state);
            }
            Op::Sync => {
                log.sync().unwrap();
                durable = now.clone();
            }
            Op::Truncate(percent) => {
                let cut = now.entries.len() as u64 * percent / 100;
                let to = Mark { index: now.start.index + cut, term: 77 };
                log.truncate_prefix(to).unwrap();
                if cut > 0 {
                    now.start = to;
                    now.entries.drain(..cut as usize);
                    durable = now.clone();
                }
            }
            Op::Install(beyond) => {
                now.start = Mark { index: now.start.index + beyond, term: 99 };
                now.hard_state.commit = now.start.index;
                now.entries.clear();
                log.install(now.start, now.hard_state).unwrap();
                durable = now.clone();
            }
            Op::Restart | Op::Close => {
                if matches!(op, Op::Close) {
                    log.close().unwrap();
                    durable = now.clone();
                }
                let (again, found) = reopen(Some(log));
                log = again;
                let Recovered { hard_state, start, entries, repaired, .. } = found;
                prop_assert_eq!(&Model { hard_state, start, entries }, &durable);
                prop_assert_eq!(repaired, None);
                now = durable.clone();
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn the_disk_keeps_what_the_model_keeps(
        ops in prop::collection::vec(op(), 1..60),
        fsync in any::<bool>(),
    ) {
        let dir = scratch();
        run(&ops, |log| {
            drop(log);
            Log::open(Options { fsync, ..options(dir.path()) }).unwrap()
        })?;
    }

    #[test]
    fn memory_keeps_what_the_model_keeps(ops in prop::collection::vec(op(), 1..60)) {
        let disk = MemoryDisk::new(IDENTITY);
        run(&ops, |log| {
            drop(log);
            MemoryLog::open(&disk)
        })?;
        run(&ops, {
            let disk = MemoryDisk::new(IDENTITY);
            move |log| {
                drop(log);
                let (log, found) = MemoryLog::open(&disk);
                (FaultyLog::new(log, &found, None), found)
            }
        })?;
    }
}

// ---------------------------------------------------------------------- twins

#[test]
fn a_faulty_log_fails_where_planned_and_tears() {
    for kept in [0, 1, 2, usize::MAX] {
        let disk = MemoryDisk::new(IDENTITY);
        let (log, found) = MemoryLog::open(&disk);
        let mut log = FaultyLog::new(log, &found, Some(Fault::Sync { nth: 2, kept }));
        log.append(&entries(1, 1, 1, 5), None).unwrap();
        log.sync().unwrap();
        log.sync().unwrap(); // Nothing to write: does not count.
        for index in 2..=4 {
            log.append(&entries(index, 1, 1, 5), Some(hard_state(1, index, 0))).unwrap();
        }
        let error = log.sync().unwrap_err();
        assert!(matches!(error, LogError::Io { .. }));
        assert_eq!(log.sync().unwrap_err().to_string(), error.to_string());
        assert!(log.append(&entries(5, 1, 1, 5), None).is_err());
        drop(log);
        let (_, found) = MemoryLog::open(&disk);
        assert_eq!(found.entries, entries(1, 1 + kept.min(3) as u64, 1, 5));
        assert_eq!(found.identity, IDENTITY);
    }
}

#[test]
fn a_faulty_log_fails_truncation_and_install_before_they_happen() {
    for fault in [Fault::Truncate { nth: 1 }, Fault::Install { nth: 1 }] {
        let dir = scratch();
        let (log, found) = open(dir.path());
        let mut log = FaultyLog::new(log, &found, None);
        log.append(&entries(1, 5, 1, 5), None).unwrap();
        log.sync().unwrap();
        log.plan(fault);
        let mark = Mark { index: 3, term: 1 };
        let result = match fault {
            Fault::Install { .. } => log.install(mark, HardState::default()),
            _ => log.truncate_prefix(mark),
        };
        result.unwrap_err();
        assert!(log.close().is_err());
        drop(log);
        assert_eq!(open(dir.path()).1.entries, entries(1, 5, 1, 5));
    }
}
