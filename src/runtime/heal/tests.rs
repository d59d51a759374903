use std::fs;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;

use super::super::image::Source;
use super::super::pins::Pins;
use super::super::recover::{Recovery, open};
use super::*;
use crate::log::{Entry, HardState, Options, SEGMENT_BYTES_DEFAULT};
use crate::net::snapshot::Image as _;
use crate::pb::etcdserverpb::PutRequest;
use crate::pb::kvorumpb::{Command, command::Request};
use crate::raft::Start;
use crate::state::Effects;
use crate::storage::{Batch, DiskGenerations, Storage as _, Table};

const URLS: [&str; 3] = ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"];

fn bootstrap(members: usize, name: &str) -> Bootstrap {
    let names = ["a", "b", "c"].into_iter().zip(URLS).take(members);
    let initial = names.map(|(name, url)| (name.to_owned(), vec![url.to_owned()]));
    Bootstrap {
        initial_cluster: initial.collect(),
        cluster_token: "etcd-cluster".to_owned(),
        name: name.to_owned(),
        cluster_version: "3.7.0".to_owned(),
        ..Bootstrap::default()
    }
}

fn place(dir: &Path) -> Place {
    Place::Disk { data_dir: dir.to_owned(), wal_dir: None, fsync: false }
}

/// An entry that puts a key of its index.
fn entry(index: u64, term: u64) -> Entry {
    let command = Command { header: None, request: Some(put(index)) };
    let data = prost::Message::encode_to_vec(&command).into();
    Entry { index, term, kind: 0, data, context: "".into() }
}

fn put(index: u64) -> Request {
    let key = format!("key {index}").into();
    Request::Put(PutRequest { key, ..PutRequest::default() })
}

/// A member whose log has entries up to `last`, of term 2, and begins behind `start`.
fn member(dir: &Path, members: usize, start: u64, last: u64, hard_state: HardState) {
    let Recovery { mut log, .. } = open(&place(dir), &bootstrap(members, "a")).expect("opens");
    let entries: Vec<Entry> = (2..=last).map(|index| entry(index, 2)).collect();
    log.append(&entries, Some(hard_state)).expect("appends");
    log.sync().expect("syncs");
    if start > 1 {
        log.truncate_prefix(Mark { index: start, term: 2 }).expect("truncates");
    }
    log.close().expect("closes");
}

fn lose_current(dir: &Path) {
    fs::remove_file(dir.join("member/CURRENT")).expect("is there");
}

/// Loses the checkpoint, so that nothing of it can be read.
fn lose_checkpoint(dir: &Path) {
    fs::remove_dir_all(dir.join("member/ckpt-1")).expect("is there");
}

fn examine(dir: &Path, members: usize) -> Result<Damage, OpenError> {
    let bootstrap = bootstrap(members, "a");
    let error = open(&place(dir), &bootstrap).err().expect("it is damaged");
    Damage::examine(&place(dir), &bootstrap, error)
}

/// The image of member `b`, which has applied entries up to `index`, the last of `term`.
fn image(damage: &Damage, members: &Bootstrap, index: u64, term: u64) -> Pulled {
    let mut state = first_state(members, Path::new("b")).expect("a state");
    for at in 2..=index {
        let mark = Mark { index: at, term: if at == index { term } else { 2.min(term) } };
        let command = Command { header: None, request: Some(put(at)) };
        state.apply(mark, command, &mut Effects::default()).expect("applied");
    }
    let pins: Arc<Pins> = Arc::default();
    let mut source = Source::new(1, &Arc::new(RwLock::new(state)), &pins);
    let mut spool = damage.spools().expect("spools").begin().expect("a spool").expect("room");
    while let Some(chunk) = source.next_chunk().expect("not lost") {
        spool.append(chunk).expect("appended");
    }
    Pulled { spool, index, term }
}

const HARD: HardState = HardState { term: 7, vote: 42, commit: 6 };

/// The rows of the table in the module's essay that keep or renew the log.
#[test]
fn the_log_keeps_what_was_promised() {
    // Index and term of the image; then the log's start and entries, the hard state.
    let kept: Vec<Entry> = (5..=9).map(|index| entry(index, 2)).collect();
    for (index, term, entries, start, hard_state) in [
        // It begins there; it has the entry, before and behind what it knows to be committed.
        (4, 2, kept.clone(), Mark { index: 4, term: 2 }, HARD),
        (6, 2, kept.clone(), Mark { index: 4, term: 2 }, HARD),
        (8, 2, kept.clone(), Mark { index: 4, term: 2 }, HARD),
        (9, 2, kept, Mark { index: 4, term: 2 }, HARD),
        // Another entry is committed there.
        (8, 5, vec![], Mark { index: 8, term: 5 }, HardState { commit: 8, ..HARD }),
        // It ends before. A vote is of its term.
        (12, 6, vec![], Mark { index: 12, term: 6 }, HardState { commit: 12, ..HARD }),
        (12, 9, vec![], Mark { index: 12, term: 9 }, HardState { term: 9, vote: 0, commit: 12 }),
    ] {
        let what = format!("index {index}, term {term}");
        let dir = tempfile::tempdir().expect("a directory");
        member(dir.path(), 3, 4, 9, HARD);
        lose_checkpoint(dir.path());
        let mut damage = examine(dir.path(), 3).expect("its log is intact");
        assert_eq!(
            (damage.at_least(), damage.peer_urls()),
            (4, &[URLS[1], URLS[2]].map(str::to_owned)[..])
        );
        let pulled = image(&damage, &bootstrap(3, "b"), index, term);
        damage.replace(pulled).expect("replaced");
        drop(damage);
        for life in 0..2 {
            let recovery = open(&place(dir.path()), &Bootstrap::default()).expect("opens");
            let Start { applied, .. } = recovery.start;
            assert_eq!(recovery.state.applied(), Mark { index, term }, "{what}, {life}");
            assert_eq!(applied, index, "{what}, {life}");
            assert_eq!(recovery.start.start, start, "{what}, {life}");
            assert_eq!(recovery.start.entries, entries, "{what}, {life}");
            assert_eq!(recovery.start.hard_state, hard_state, "{what}, {life}");
            assert_eq!(recovery.state.member_id(), recovery.identity.member_id);
            crate::raft::Node::new(Start { election_ticks: 10, ..recovery.start })
                .map(drop)
                .expect("raft goes on from there");
        }
    }
}

#[test]
fn images_that_would_lose_or_invent_something_are_refused() {
    type Check = fn(&ReplaceError) -> bool;
    let refused: [(&str, u64, u64, usize, Check); 4] = [
        ("before the log's beginning", 3, 2, 3, |e| matches!(e, ReplaceError::OtherIndex { .. })),
        ("another entry was committed", 6, 3, 3, |e| matches!(e, ReplaceError::OtherHistory(_))),
        ("another where it begins", 4, 3, 3, |e| matches!(e, ReplaceError::OtherHistory(_))),
        ("another cluster", 8, 2, 2, |e| {
            matches!(e, ReplaceError::Fill(FillError::OtherCluster { .. }))
        }),
    ];
    let dir = tempfile::tempdir().expect("a directory");
    member(dir.path(), 3, 4, 9, HARD);
    lose_checkpoint(dir.path());
    for (what, index, term, members, is_expected) in refused {
        let mut damage = examine(dir.path(), 3).expect("its log is intact");
        let pulled = image(&damage, &bootstrap(members, "b"), index, term);
        let error = damage.replace(pulled).expect_err(what);
        assert!(is_expected(&error), "{what}: {error}");
    }
    // What was announced is not what came.
    let mut damage = examine(dir.path(), 3).expect("its log is intact");
    let pulled = image(&damage, &bootstrap(3, "b"), 8, 2);
    let error = damage.replace(Pulled { index: 7, ..pulled }).expect_err("another index");
    assert!(matches!(error, ReplaceError::OtherIndex { .. }), "{error}");
    // And after all of them one that fits.
    let pulled = image(&damage, &bootstrap(3, "b"), 8, 2);
    damage.replace(pulled).expect("replaced");
    drop(damage);
    assert_eq!(open(&place(dir.path()), &Bootstrap::default()).expect("opens").start.applied, 8);
}

#[test]
fn a_member_that_is_not_in_the_image_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    member(dir.path(), 3, 4, 9, HARD);
    lose_checkpoint(dir.path());
    let mut damage = examine(dir.path(), 3).expect("its log is intact");
    let own = damage.identity().member_id;
    damage.identity.member_id = own ^ 1;
    let pulled = image(&damage, &bootstrap(3, "b"), 8, 2);
    let error = damage.replace(pulled).expect_err("it is no member");
    assert!(matches!(error, ReplaceError::NotAMember(id) if id == own ^ 1), "{error}");
}

#[test]
fn a_single_members_state_is_built_from_its_log_if_that_has_all() {
    for (start, has_all) in [(1, true), (4, false)] {
        let dir = tempfile::tempdir().expect("a directory");
        member(dir.path(), 1, start, 9, HARD);
        lose_checkpoint(dir.path());
        let mut damage = examine(dir.path(), 1).expect("its log is intact");
        assert!(damage.peer_urls().is_empty());
        let rebuilt = damage.rebuild(&bootstrap(1, "a"));
        drop(damage);
        if has_all {
            rebuilt.expect("it has all");
            let recovery = open(&place(dir.path()), &Bootstrap::default()).expect("opens");
            assert_eq!((recovery.start.applied, recovery.start.entries.len()), (1, 8));
            assert_eq!(recovery.start.hard_state, HARD);
        } else {
            let error = rebuilt.expect_err("it lacks the beginning").to_string();
            for words in ["ckpt-1", "entries 5 to 9", "kvorum snapshot restore"] {
                assert!(error.contains(words), "{words:?} is not in {error}");
            }
        }
    }
}

/// Nothing but the checkpoint could tell whether the last write was acknowledged.
#[test]
fn a_log_with_a_torn_end_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    member(dir.path(), 3, 1, 9, HARD);
    let wal = dir.path().join("member/wal");
    let segments = fs::read_dir(&wal).expect("a log").map(|entry| entry.expect("a name").path());
    let segment = segments.filter(|path| path.extension().is_some_and(|end| end == "log")).max();
    let segment = segment.expect("a segment");
    let mut bytes = fs::read(&segment).expect("read");
    let last = bytes.iter().rposition(|&byte| byte != 0).expect("a record");
    bytes[last] ^= 0x10;
    fs::write(&segment, &bytes).expect("written");
    let current = fs::read(dir.path().join("member/CURRENT")).expect("read");
    let harms: [(&str, &dyn Fn()); 3] = [
        ("CURRENT is gone", &|| lose_current(dir.path())),
        ("the checkpoint is gone", &|| {
            fs::write(dir.path().join("member/CURRENT"), &current).expect("written");
            lose_checkpoint(dir.path());
        }),
        ("as it was", &|| {}),
    ];
    for (name, harm) in harms {
        eprintln!("{name}");
        harm();
        let error = examine(dir.path(), 3).expect_err("it is refused");
        assert!(matches!(error, OpenError::BothDamaged { .. }), "{error}");
        assert!(fs::read(&segment).expect("read") == bytes, "it was changed");
    }
    // With a checkpoint the rule is the usual one.
    let options = Options {
        dir: wal,
        segment_bytes: SEGMENT_BYTES_DEFAULT,
        fsync: false,
        identity: Identity::default(),
        reaches: 9,
    };
    let (_, log) = Log::open(options).expect("the last record is an empty one");
    assert_eq!(log.entries.len(), 8);
}

/// Each checkpoint that is there knows how far the log once reached, whether it is named or not.
#[test]
fn a_log_that_ends_before_a_checkpoint_is_refused() {
    for members in [1, 3] {
        for current in [None, Some("nonsense")] {
            let dir = tempfile::tempdir().expect("a directory");
            member(dir.path(), members, 1, 5, HardState { commit: 5, ..HARD });
            let (generations, mut storage) =
                DiskGenerations::open(&dir.path().join("member")).expect("opens");
            let head = storage.get(Table::Head, records::HEAD).expect("intact").expect("there");
            let head: CheckpointHead = prost::Message::decode(head).expect("a head");
            let further = CheckpointHead { applied_index: 9, applied_term: 2, ..head };
            let mut batch = Batch::new();
            batch.put(Table::Head, records::HEAD, prost::Message::encode_to_vec(&further));
            storage.write(batch).expect("written");
            storage.sync().expect("synced");
            drop((generations, storage));
            lose_current(dir.path());
            if let Some(text) = current {
                fs::write(dir.path().join("member/CURRENT"), text).expect("written");
            }
            let error = examine(dir.path(), members).expect_err("it is refused");
            assert!(matches!(error, OpenError::BothDamaged { .. }), "{members}: {error}");
            assert!(error.to_string().contains("up to index 9"), "{error}");
        }
    }
}

/// As a crash leaves it between the damaged one's new name and the new one's.
#[test]
fn what_was_begun_to_heal_is_healed_without_a_name() {
    let dir = tempfile::tempdir().expect("a directory");
    member(dir.path(), 3, 4, 9, HARD);
    lose_current(dir.path());
    let at = dir.path().join("member");
    fs::rename(at.join("ckpt-1"), at.join("damaged-ckpt-1")).expect("renamed");
    let error = open(&place(dir.path()), &bootstrap(3, "a")).err().expect("its log was written to");
    assert!(matches!(error, OpenError::CheckpointMissing { .. }), "{error}");
    fs::create_dir(at.join("healing")).expect("made");
    let mut damage = examine(dir.path(), 3).expect("its log is intact");
    assert_eq!(damage.peer_urls(), [URLS[1], URLS[2]]);
    let pulled = image(&damage, &bootstrap(3, "b"), 8, 2);
    damage.replace(pulled).expect("replaced");
    drop(damage);
    let recovery = open(&place(dir.path()), &Bootstrap::default()).expect("opens");
    assert_eq!(recovery.state.applied(), Mark { index: 8, term: 2 });
}

/// The log has a disk of its own, and all else is lost: its member is not a new one.
#[test]
fn a_log_that_is_left_alone_is_refused() {
    let (dir, wal) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("another"));
    let wal_dir = Some(wal.path().join("wal"));
    let place = Place::Disk { data_dir: dir.path().to_owned(), wal_dir, fsync: false };
    for members in [1, 3] {
        let bootstrap = bootstrap(members, "a");
        let _ = fs::remove_dir_all(wal.path().join("wal"));
        let Recovery { mut log, .. } = open(&place, &bootstrap).expect("opens");
        log.append(&[entry(2, 2)], Some(HardState { commit: 2, ..HARD })).expect("appends");
        log.close().expect("closes");
        drop(log);
        fs::remove_dir_all(dir.path().join("member")).expect("is there");
        let error = open(&place, &bootstrap).err().expect("refused");
        let error = Damage::examine(&place, &bootstrap, error).expect_err("refused");
        assert!(matches!(error, OpenError::CheckpointMissing { .. }), "{error}");
        assert!(error.to_string().contains("member remove"), "{error}");
    }
}

#[test]
fn what_is_no_damage_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    member(dir.path(), 3, 1, 9, HARD);
    let log_is_gone = OpenError::NoPeerAnswered;
    let back = Damage::examine(&place(dir.path()), &bootstrap(3, "a"), log_is_gone);
    assert!(matches!(back, Err(OpenError::NoPeerAnswered)));
    // Whoever forces a new cluster wants no peer's state.
    lose_checkpoint(dir.path());
    let forced = Bootstrap { force_new_cluster: true, ..bootstrap(3, "a") };
    let error = open(&place(dir.path()), &forced).err().expect("it is damaged");
    let back = Damage::examine(&place(dir.path()), &forced, error);
    assert!(matches!(back, Err(OpenError::Storage(_))));
}
