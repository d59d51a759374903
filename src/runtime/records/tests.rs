use super::*;
use crate::log::{BOOTSTRAP, Mark};
use crate::pb::etcdserverpb::{
    AlarmRequest, AlarmType, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest,
    LeaseRevokeRequest, PutRequest, alarm_request::AlarmAction,
};
use crate::pb::kvorumpb::{
    Command, MemberChange, MemberPublish, command::Request, member_change::Change,
};
use crate::state::Effects;
use crate::state::members::Members;
use crate::storage::{FaultyDisk, MemoryStorage};

fn new_state() -> StateMachine {
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned())
}

/// A log with something of everything.
fn log(member: u64) -> Vec<Request> {
    let put = |key: &'static str, value: &'static str, lease| {
        Request::Put(PutRequest {
            key: key.into(),
            value: value.into(),
            lease,
            ..PutRequest::default()
        })
    };
    let nospace = AlarmRequest {
        action: AlarmAction::Activate as i32,
        member_id: member,
        alarm: AlarmType::Nospace as i32,
    };
    vec![
        Request::MemberPublish(MemberPublish {
            id: member,
            name: "one".to_owned(),
            client_urls: vec!["http://localhost:2379".to_owned()],
        }),
        change(Change::Add(added(5))),
        change(Change::Add(added(6))),
        change(Change::Remove(5)),
        Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 7 }),
        Request::LeaseGrant(LeaseGrantRequest { ttl: 90, id: 8 }),
        put("a", "1", 7),
        put("b", "1", 8),
        put("a", "2", 7),
        put("c", "1", 0),
        Request::Compaction(CompactionRequest { revision: 4, physical: false }),
        Request::DeleteRange(DeleteRangeRequest { key: "c".into(), ..Default::default() }),
        Request::LeaseRevoke(LeaseRevokeRequest { id: 7 }),
        put("c", "2", 8),
        change(Change::Promote(6)),
        Request::Alarm(nospace),
        put("d", "refused", 0),
    ]
}

fn change(change: Change) -> Request {
    Request::MemberChange(MemberChange { change: Some(change) })
}

/// A member that is to be added.
fn added(id: u64) -> MemberRecord {
    let peer_urls = vec![format!("http://127.0.0.1:{id}")];
    MemberRecord { id, peer_urls, is_learner: true, ..MemberRecord::default() }
}

/// How many entries of the log a state has applied.
fn entries_applied(state: &StateMachine) -> usize {
    (state.applied().index - BOOTSTRAP.index) as usize
}

/// Applies `log[from..to]`; the first entry follows the log's begin.
fn apply(state: &mut StateMachine, from: usize, to: usize) {
    for (i, request) in log(state.member_id()).into_iter().enumerate().take(to).skip(from) {
        let command = Command { header: None, request: Some(request) };
        let entry = Mark { index: BOOTSTRAP.index + 1 + i as u64, term: 1 };
        let _ = state.apply(entry, command, &mut Effects::default());
    }
}

fn restored(storage: &mut dyn Storage) -> StateMachine {
    StateMachine::restore(recover(storage).expect("a checkpoint"))
}

fn assert_equal(left: &StateMachine, right: &StateMachine) {
    assert_eq!(left.applied(), right.applied());
    assert_eq!(left.store().revision(), right.store().revision());
    assert_eq!(left.store().compact_revision(), right.store().compact_revision());
    assert_eq!(left.members(), right.members());
    assert_eq!(left.alarms(AlarmType::None), right.alarms(AlarmType::None));
    let leases = |state: &StateMachine| {
        let leases = state.lessor().iter();
        let leases = leases.map(|lease| (lease.to_record(), lease.keys().cloned().collect()));
        leases.collect::<Vec<(Lease, Vec<Bytes>)>>()
    };
    assert_eq!(leases(left), leases(right), "with the keys that hang on them");
    assert_eq!(left.hash(), right.hash());
}

/// However the log is divided into checkpoints, they hold what the log led to.
#[test]
fn what_is_written_in_cuts_is_read_back() {
    let end = log(0).len();
    for first in 0..=end {
        for compacts in [false, true] {
            let mut storage = MemoryStorage::new();
            let mut state = new_state();
            for (from, to) in [(0, first), (first, end)] {
                apply(&mut state, from, to);
                while compacts && !state.compact_step(i64::MAX, 1) {}
                write(&mut storage, &state.cut(), 0).expect("written");
                assert_equal(&restored(&mut storage), &state);
            }
        }
    }
}

/// Also when the cut that took it along was lost: the next one makes up for it.
#[test]
fn a_member_that_left_leaves_the_checkpoint() {
    for loses_a_cut in [false, true] {
        let mut storage = MemoryStorage::new();
        let mut state = new_state();
        let apply = |state: &mut StateMachine, request: Request| {
            let entry = Mark { index: state.applied().index + 1, term: 1 };
            let command = Command { header: None, request: Some(request) };
            state.apply(entry, command, &mut Effects::default()).expect("it is applied");
        };
        let stored = |storage: &MemoryStorage, id: u64| {
            storage.get(Table::Member, &id.to_be_bytes()).expect("readable").is_some()
        };
        apply(&mut state, change(Change::Add(added(5))));
        write(&mut storage, &state.cut(), 0).expect("written");
        assert!(stored(&storage, 5));

        apply(&mut state, change(Change::Remove(5)));
        if loses_a_cut {
            state.cut();
            apply(&mut state, change(Change::Add(added(6))));
        }
        write(&mut storage, &state.cut(), 0).expect("written");
        assert!(!stored(&storage, 5));
        let restored = restored(&mut storage);
        assert!(restored.members().is_removed(5));
        assert_equal(&restored, &state);
    }
}

#[test]
fn what_is_written_anew_is_read_back() {
    let mut state = new_state();
    apply(&mut state, 0, usize::MAX);
    let state = Arc::new(RwLock::new(state));
    let pins = Arc::default();
    let (image, mut records) = image(&state, &pins);
    assert_eq!(pins.readers(), 1);
    let mut storage = MemoryStorage::new();
    fill_with(&mut storage, &image, &mut records).expect("written");
    assert_equal(&restored(&mut storage), &state.read());
}

/// A crash after any write or before any sync: what is then on the disk, and the log from
/// there on, lead to the state that was lost.
#[test]
fn a_crash_anywhere_and_the_log_lead_to_the_same_state() {
    let end = log(0).len();
    let mut expected = new_state();
    apply(&mut expected, 0, end);
    for is_old in [false, true] {
        for first in 1..end {
            for fault in Fault::all() {
                let disk = if is_old { FaultyDisk::without_frozen() } else { FaultyDisk::new() };
                let mut state = new_state();
                write(&mut disk.open(), &state.cut(), 0).expect("the first checkpoint");
                apply(&mut state, 0, first);
                while !state.compact_step(i64::MAX, 100) {}
                match fault.fails {
                    Fails::Nothing => {}
                    Fails::Sync => disk.fail_sync_after(0),
                    Fails::Write(nth) => disk.fail_write_after(nth),
                }
                let written = write(&mut disk.open(), &state.cut(), 0);
                match fault.fails {
                    Fails::Nothing => written.expect("nothing failed"),
                    Fails::Sync => drop(written.expect_err("the sync failed")),
                    Fails::Write(_) => {}
                }
                disk.power_cut(fault.kept);

                let mut state = restored(&mut disk.open());
                let from = entries_applied(&state);
                assert!(from == 0 || from == first, "a checkpoint is written whole or not at all");
                apply(&mut state, from, end);
                assert_equal(&state, &expected);
                // Whatever was left behind, the next one can be written.
                write(&mut disk.open(), &state.cut(), 0).expect("written");
                assert_equal(&restored(&mut disk.open()), &expected);
            }
        }
    }
}

/// What fails while a checkpoint is written, and how many batches are on the disk afterwards
/// that were not synced.
#[derive(Clone, Copy)]
struct Fault {
    fails: Fails,
    kept: usize,
}

#[derive(Clone, Copy)]
enum Fails {
    Nothing,
    Sync,
    Write(u64),
}

impl Fault {
    fn all() -> impl Iterator<Item = Fault> {
        let fails = [Fails::Nothing, Fails::Sync].into_iter().chain((0..12).map(Fails::Write));
        fails.flat_map(|fails| (0..4).map(move |kept| Fault { fails, kept }))
    }
}

#[test]
fn an_empty_store_is_no_checkpoint() {
    let error = recover(&mut MemoryStorage::new()).err().expect("refused").to_string();
    assert!(error.contains("Head"), "{error}");
}

/// Keys deleted long ago stay deleted, wherever a crash falls between the batches that take
/// their versions and tombstones out of the checkpoint.
#[test]
fn a_crash_while_removed_records_are_deleted_brings_no_key_back() {
    const KEYS: usize = 350;
    let mut state = new_state();
    let mut index = 0;
    let mut apply = |state: &mut StateMachine, request: Request| {
        index += 1;
        let command = Command { header: None, request: Some(request) };
        let entry = Mark { index, term: 1 };
        state.apply(entry, command, &mut Effects::default()).expect("it is applied");
    };
    let key = |number: usize| Bytes::from(format!("key {number}"));
    for number in 0..KEYS {
        let put = PutRequest { key: key(number), ..PutRequest::default() };
        apply(&mut state, Request::Put(put));
    }
    for number in 0..KEYS {
        let delete = DeleteRangeRequest { key: key(number), ..DeleteRangeRequest::default() };
        apply(&mut state, Request::DeleteRange(delete));
    }
    // One more, so that a batch ends between a version and its tombstone.
    for _ in 0..3 {
        let put = PutRequest { key: "twice".into(), ..PutRequest::default() };
        apply(&mut state, Request::Put(put));
    }
    let revision = state.store().revision();
    apply(&mut state, Request::Compaction(CompactionRequest { revision, physical: false }));
    let mut storage = MemoryStorage::new();
    write(&mut storage, &state.cut(), 0).expect("written");
    while !state.compact_step(i64::MAX, 10) {}
    let cut = state.cut();
    write(&mut storage, &cut, 0).expect("written");
    assert_eq!(cut.dirty.removed.len(), 2 * KEYS + 1);
    let mut removed = cut.dirty.removed.into_iter();
    while delete(&mut storage, &mut removed).expect("deleted") > 0 {
        let mut restored = restored(&mut storage.clone());
        assert_eq!(restored.store().keys_total(), 1);
        while !restored.compact_step(i64::MAX, 10) {}
        assert_equal(&restored, &state);
    }
}

#[test]
fn what_is_kept_does_not_depend_on_how_much_is_removed() {
    let state = RwLock::new(new_state());
    let apply = |request| {
        let mut state = state.write();
        let entry = Mark { index: state.applied().index + 1, term: 1 };
        let command = Command { header: None, request: Some(request) };
        state.apply(entry, command, &mut Effects::default()).expect("applied");
    };
    let value = Bytes::from(vec![7; 1000]);
    for _ in 0..3 * RECORDS_PER_STEP {
        let put = PutRequest { key: "k".into(), value: value.clone(), ..Default::default() };
        apply(Request::Put(put));
    }
    assert_eq!(kept_bytes(&state, usize::MAX), state.read().store().size_bytes());
    let revision = state.read().store().revision();
    apply(Request::Compaction(CompactionRequest { revision, physical: false }));
    let at_first = kept_bytes(&state, usize::MAX);
    assert!(at_first < 3000, "the last two versions: {at_first}");
    assert!(kept_bytes(&state, 1) > at_first, "the rest is not looked at");
    while !state.write().compact_step(i64::MAX, 1000) {
        assert_eq!(kept_bytes(&state, usize::MAX), at_first);
    }
    assert_eq!(state.read().store().size_bytes(), at_first);
}
