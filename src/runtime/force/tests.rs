use super::*;
use crate::log::{BOOTSTRAP, Entry, Identity, MemoryDisk, MemoryLog};
use crate::pb::kvorumpb::MemberRecord;
use crate::state::members::Members;

const THIS: u64 = 1;
const OTHERS: [u64; 2] = [2, 3];
const NEW: u64 = 4;

fn member(id: u64, is_learner: bool) -> MemberRecord {
    MemberRecord {
        id,
        peer_urls: vec![format!("http://{id}:2380")],
        is_learner,
        ..MemberRecord::default()
    }
}

fn state(members: Vec<MemberRecord>) -> StateMachine {
    let members = Members::restore(7, members, Vec::new());
    StateMachine::bootstrap(THIS, members, "3.7.0".to_owned())
}

fn three() -> StateMachine {
    state([THIS, 2, 3].map(|id| member(id, false)).into())
}

fn put(index: u64) -> Entry {
    let data = format!("put {index}").into();
    Entry { index, term: 2, kind: 0, data, context: Default::default() }
}

fn change(index: u64, change: Change) -> Entry {
    let change = MemberChange { change: Some(change) };
    let command = Command { request: Some(Request::MemberChange(change)), header: None };
    let of_raft = raft::Change::Listen(NEW);
    change_entry(Mark { index, term: 2 }, of_raft, command.encode_to_vec()).expect("it encodes")
}

/// The log of a member of a new cluster with these entries.
fn disk(entries: &[Entry], commit: u64) -> MemoryDisk {
    let disk = MemoryDisk::new(Identity { cluster_id: 7, member_id: THIS });
    let (mut log, _) = MemoryLog::open(&disk);
    log.install(BOOTSTRAP, HardState::of_start(BOOTSTRAP)).expect("installs");
    let hard_state = HardState { term: 3, vote: 2, commit };
    log.append(entries, Some(hard_state)).expect("appends");
    log.sync().expect("syncs");
    disk
}

/// What is in the log after the flag was there, as the next start finds it.
fn forced(state: &StateMachine, disk: &MemoryDisk) -> Result<Recovered, ForceError> {
    let (mut log, mut recovered) = MemoryLog::open(disk);
    leave_alone(state, &mut log, &mut recovered)?;
    drop(log);
    let (_, found) = MemoryLog::open(disk);
    assert_eq!(found, recovered, "what the start goes on with is on disk");
    Ok(found)
}

/// What the entries from `from` on do to the members.
fn changes(recovered: &Recovered, from: u64) -> Vec<Change> {
    let entries = recovered.entries.iter().filter(|entry| entry.index >= from);
    entries.map(|entry| change_of(&entry.context).expect("a change")).collect()
}

#[test]
fn the_others_are_removed_behind_the_whole_log() {
    // The newest entries were acknowledged after the last time the commit was written.
    let disk = disk(&[put(2), put(3), put(4)], 2);
    let found = forced(&three(), &disk).expect("goes on alone");
    assert_eq!(found.entries.first_chunk(), Some(&[put(2), put(3), put(4)]));
    assert_eq!(changes(&found, 5), OTHERS.map(Change::Remove));
    assert_eq!(found.hard_state, HardState { term: 3, vote: 2, commit: 6 });
    let places: Vec<_> = found.entries.iter().map(|entry| (entry.index, entry.term)).collect();
    assert_eq!(places, [(2, 2), (3, 2), (4, 2), (5, 3), (6, 3)]);
    assert!(found.entries.iter().skip(3).all(is_change));
}

#[test]
fn a_log_without_entries_will_do() {
    let found = forced(&three(), &disk(&[], 1)).expect("goes on alone");
    assert_eq!(changes(&found, 0), OTHERS.map(Change::Remove));
    assert_eq!((found.start, found.hard_state.commit), (BOOTSTRAP, 3));
}

#[test]
fn members_that_the_log_is_yet_to_add_are_removed_too() {
    let disk = disk(&[change(2, Change::Add(member(NEW, true)))], 1);
    let found = forced(&three(), &disk).expect("goes on alone");
    assert_eq!(changes(&found, 3), [2, 3, NEW].map(Change::Remove));
}

#[test]
fn a_learner_votes_before_the_last_voter_is_gone() {
    let state = state(vec![member(THIS, true), member(2, false)]);
    let found = forced(&state, &disk(&[], 1)).expect("goes on alone");
    assert_eq!(changes(&found, 0), [Change::Promote(THIS), Change::Remove(2)]);
}

#[test]
fn one_that_is_alone_already_is_left_as_it_is() {
    let state = state(vec![member(THIS, false)]);
    let disk = disk(&[put(2), put(3)], 2);
    let before = MemoryLog::open(&disk).1;
    assert_eq!(forced(&state, &disk).expect("goes on alone"), before);
}

#[test]
fn its_own_removal_counts_only_if_it_was_committed() {
    let entries = [put(2), change(3, Change::Remove(THIS)), put(4)];
    let found = forced(&three(), &disk(&entries, 2)).expect("goes on alone");
    assert_eq!(found.entries.first(), Some(&put(2)));
    assert_eq!(changes(&found, 3), OTHERS.map(Change::Remove));

    let error = forced(&three(), &disk(&entries, 3)).expect_err("it was removed");
    assert!(matches!(error, ForceError::Removed(THIS)), "{error}");
    let state = state(vec![member(2, false)]);
    let error = forced(&state, &disk(&[], 1)).expect_err("it was removed");
    assert!(matches!(error, ForceError::Removed(THIS)), "{error}");
}

#[test]
fn one_that_never_had_data_cannot_go_on() {
    let members = vec![member(THIS, true), member(2, false)];
    let state = StateMachine::joining(THIS, 7, members, "3.7.0".to_owned());
    let disk = MemoryDisk::new(Identity { cluster_id: 7, member_id: THIS });
    let error = forced(&state, &disk).expect_err("there is nothing");
    assert!(matches!(error, ForceError::NoData(THIS)), "{error}");
}
