use std::fs;

use prost::Message as _;

use super::*;
use crate::log::{BOOTSTRAP, Entry};
use crate::pb::kvorumpb::CheckpointHead;
use crate::storage::{Batch, Table};

const VERSION: &str = "3.7.0";
const URLS: [&str; 3] =
    ["http://127.0.0.1:2380", "http://127.0.0.1:22380", "http://127.0.0.1:32380"];
/// Ids that etcd gives members of those URLs, and their cluster.
const IDS: [u64; 3] = [0xb71f_7532_0dc0_6a6c, 0x9e73_7feb_b6b9_9eee, 0x0628_170c_800d_bcee];
const CLUSTER: u64 = 0x066d_3a07_0bf8_9b39;
const JOINER: u64 = 0x1234;

fn place(dir: &Path) -> Place {
    Place::Disk { data_dir: dir.to_owned(), wal_dir: None, fsync: false }
}

/// The first of three members that make a cluster.
fn founder() -> Bootstrap {
    let named = |(name, url): (&str, &str)| (name.to_owned(), vec![url.to_owned()]);
    Bootstrap {
        initial_cluster: ["a", "b", "c"].into_iter().zip(URLS).map(named).collect(),
        cluster_token: "etcd-cluster".to_owned(),
        name: "a".to_owned(),
        cluster_version: VERSION.to_owned(),
        max_learners: 1,
        ..Bootstrap::default()
    }
}

/// The cluster as its members tell: the founders run, and the joiner was added.
fn running() -> MembersResponse {
    let record = |(id, url): (u64, &str)| MemberRecord {
        id,
        peer_urls: vec![url.to_owned()],
        client_urls: vec!["http://127.0.0.1:2379".to_owned()],
        ..MemberRecord::default()
    };
    let mut members: Vec<MemberRecord> = IDS.into_iter().zip(URLS).map(record).collect();
    members.push(MemberRecord {
        id: JOINER,
        peer_urls: vec!["http://127.0.0.1:4".to_owned()],
        is_learner: true,
        ..MemberRecord::default()
    });
    MembersResponse { cluster_id: CLUSTER, members }
}

/// A fourth member, which joins.
fn joiner() -> Bootstrap {
    let mut bootstrap = founder();
    bootstrap.initial_cluster.push(("d".to_owned(), vec!["http://127.0.0.1:4".to_owned()]));
    Bootstrap { name: "d".to_owned(), joins: true, running: Some(running()), ..bootstrap }
}

fn begin(dir: &Path, bootstrap: &Bootstrap) -> Recovery {
    open(&place(dir), bootstrap).expect("opens")
}

fn refusal(dir: &Path, bootstrap: &Bootstrap) -> OpenError {
    match open(&place(dir), bootstrap) {
        Ok(_) => panic!("it must be refused"),
        Err(error) => error,
    }
}

/// As if the start had been cut short just before the checkpoint counted.
fn lose_current(dir: &Path) {
    fs::remove_file(dir.join("member/CURRENT")).expect("is there");
}

/// As if it had been cut short before the log was begun.
fn lose_log_too(dir: &Path) {
    lose_current(dir);
    fs::remove_dir_all(dir.join("member/wal")).expect("is there");
    fs::remove_dir_all(dir.join("member/ckpt-1")).expect("is there");
}

fn log_dir(dir: &Path) -> PathBuf {
    dir.join("member/wal")
}

/// The log alone, as an unfinished start leaves it.
fn empty_log(dir: &Path, identity: Identity) -> Log {
    fs::create_dir_all(dir.join("member")).expect("a directory");
    let options = Options {
        dir: log_dir(dir),
        segment_bytes: SEGMENT_BYTES_DEFAULT,
        fsync: false,
        identity,
        reaches: 0,
    };
    Log::open(options).expect("opens").0
}

/// What is checked of a member of a new cluster that nothing has happened to.
fn assert_founded(recovery: &Recovery, is_new: bool) {
    let Start { id, start, hard_state, entries, applied, configuration, .. } = &recovery.start;
    assert_eq!(recovery.identity, Identity { cluster_id: CLUSTER, member_id: IDS[0] });
    assert_eq!((*id, *start, *applied), (IDS[0], BOOTSTRAP, 1));
    assert_eq!(*hard_state, HardState { term: 1, vote: 0, commit: 1 });
    assert!(entries.is_empty());
    let mut voters = IDS.to_vec();
    voters.sort_unstable();
    assert_eq!(*configuration, Configuration { voters, learners: Vec::new() });
    assert_eq!(recovery.state.applied(), BOOTSTRAP);
    assert_eq!(recovery.is_new, is_new);
}

/// What is checked of a member that is to join and has received nothing.
fn assert_joining(recovery: &Recovery, is_new: bool) {
    let Start { id, start, hard_state, entries, applied, configuration, .. } = &recovery.start;
    assert_eq!(recovery.identity, Identity { cluster_id: CLUSTER, member_id: JOINER });
    assert_eq!((*id, *start, *applied), (JOINER, Mark::default(), 0));
    assert_eq!(*hard_state, HardState::default());
    assert!(entries.is_empty());
    assert_eq!(*configuration, Configuration::default(), "it knows nobody who votes");
    let mut members = running().members;
    members.sort_by_key(|member| member.id);
    assert_eq!(recovery.state.members().records(), members, "it knows whom to expect");
    assert_eq!(recovery.is_new, is_new);
}

#[test]
fn a_new_cluster_begins_behind_an_entry_that_never_was() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(is_new(&place(dir.path())).expect("looks"));
    assert_founded(&begin(dir.path(), &founder()), true);
    assert!(!is_new(&place(dir.path())).expect("looks"));
    assert_founded(&begin(dir.path(), &founder()), false);
    let in_memory = open(&Place::Memory, &founder()).expect("opens");
    assert_founded(&in_memory, true);
}

#[test]
fn all_but_this_member_are_asked() {
    assert_eq!(founder().other_peer_urls(), [URLS[1], URLS[2]]);
    let last = Bootstrap { name: "c".to_owned(), ..founder() };
    assert_eq!(last.other_peer_urls(), [URLS[1], URLS[0]], "in the order of their text");
}

#[test]
fn a_new_members_log_goes_on_where_it_begins() {
    let dir = tempfile::tempdir().expect("a directory");
    let entry = Entry { index: 2, term: 2, kind: 0, data: "x".into(), context: "".into() };
    for place in [place(dir.path()), Place::Memory] {
        let mut log = open(&place, &founder()).expect("opens").log;
        let hard_state = HardState { term: 2, vote: IDS[0], commit: 1 };
        log.append(std::slice::from_ref(&entry), Some(hard_state)).expect("appends");
        log.sync().expect("syncs");
    }
    let recovery = begin(dir.path(), &founder());
    assert_eq!((recovery.start.start, recovery.start.entries), (BOOTSTRAP, vec![entry]));
}

#[test]
fn a_founder_that_was_half_made_is_completed() {
    type Cut = fn(&Path);
    let identity = Identity { cluster_id: CLUSTER, member_id: IDS[0] };
    for (cut, when) in [
        (lose_current as Cut, "before CURRENT"),
        (
            |dir| {
                lose_current(dir);
                fs::remove_dir_all(dir.join("member/ckpt-1")).expect("is there");
            },
            "before the checkpoint",
        ),
        (lose_log_too, "before the log"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        drop(begin(dir.path(), &founder()));
        cut(dir.path());
        assert!(is_new(&place(dir.path())).expect("looks"), "{when}");
        assert_founded(&begin(dir.path(), &founder()), true);
    }
    let dir = tempfile::tempdir().expect("a directory");
    drop(empty_log(dir.path(), identity));
    assert_founded(&begin(dir.path(), &founder()), true);
}

#[test]
fn a_joiner_is_who_its_peers_say() {
    let dir = tempfile::tempdir().expect("a directory");
    assert_joining(&begin(dir.path(), &joiner()), true);
    // From now on it knows by itself, whatever the flags are.
    assert_joining(&begin(dir.path(), &Bootstrap::default()), false);
    assert_joining(&open(&Place::Memory, &joiner()).expect("opens"), true);
}

#[test]
fn a_joiner_that_was_half_made_is_completed() {
    for cut in [lose_current, lose_log_too] {
        let dir = tempfile::tempdir().expect("a directory");
        drop(begin(dir.path(), &joiner()));
        cut(dir.path());
        assert!(matches!(
            refusal(dir.path(), &Bootstrap { running: None, ..joiner() }),
            OpenError::NoPeerAnswered
        ));
        assert_joining(&begin(dir.path(), &joiner()), true);
    }
    // Members have come meanwhile, which changes nothing of who this one is.
    let dir = tempfile::tempdir().expect("a directory");
    drop(begin(dir.path(), &joiner()));
    lose_current(dir.path());
    let mut later = joiner();
    later.initial_cluster.push(("e".to_owned(), vec!["http://127.0.0.1:5".to_owned()]));
    later.running.as_mut().expect("some").members.push(MemberRecord {
        id: 5,
        peer_urls: vec!["http://127.0.0.1:5".to_owned()],
        ..MemberRecord::default()
    });
    let recovery = begin(dir.path(), &later);
    assert_eq!(recovery.identity, Identity { cluster_id: CLUSTER, member_id: JOINER });
    assert_eq!(recovery.state.members().records().len(), 5);
}

#[test]
fn what_was_begun_for_another_is_not_completed() {
    // The joiner was removed and added again while it was down: it has another id.
    let dir = tempfile::tempdir().expect("a directory");
    drop(begin(dir.path(), &joiner()));
    lose_current(dir.path());
    let mut again = joiner();
    again.running.as_mut().expect("some").members[3].id = JOINER + 1;
    let error = refusal(dir.path(), &again);
    assert!(matches!(error, OpenError::BegunForAnother(_)), "{error}");

    // One that was to found the cluster is to join it, under the id it has.
    let dir = tempfile::tempdir().expect("a directory");
    drop(begin(dir.path(), &founder()));
    lose_current(dir.path());
    let mut cluster = running();
    cluster.members.pop();
    cluster.members.iter_mut().for_each(|member| member.client_urls.clear());
    let joins = Bootstrap { joins: true, running: Some(cluster), ..founder() };
    let error = refusal(dir.path(), &joins);
    assert!(matches!(error, OpenError::BegunForAnother(_)), "{error}");

    // The other way round nothing is in the way: the log is empty.
    let dir = tempfile::tempdir().expect("a directory");
    drop(begin(dir.path(), &joins));
    lose_current(dir.path());
    assert_founded(&begin(dir.path(), &founder()), true);
}

#[test]
fn a_member_that_the_others_saw_running_does_not_begin_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut cluster = running();
    cluster.members.pop();
    for joins in [false, true] {
        let wiped = Bootstrap { running: Some(cluster.clone()), joins, ..founder() };
        let error = refusal(dir.path(), &wiped).to_string();
        assert!(
            error.starts_with("member b71f75320dc06a6c has already been bootstrapped"),
            "{error}"
        );
        assert!(is_new(&place(dir.path())).expect("looks"), "nothing was made");
    }
    // The others have begun, and this one is late.
    let late = cluster.members.iter_mut().find(|member| member.id == IDS[0]).expect("is in it");
    late.client_urls.clear();
    let late = Bootstrap { running: Some(cluster), ..founder() };
    assert_founded(&begin(dir.path(), &late), true);
}

#[test]
fn a_new_member_that_is_asked_for_nothing_known_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let nameless = Bootstrap { name: "x".to_owned(), ..founder() };
    assert!(matches!(refusal(dir.path(), &nameless), OpenError::NotInCluster(_)));
    let nameless = Bootstrap { name: "x".to_owned(), ..joiner() };
    assert!(matches!(refusal(dir.path(), &nameless), OpenError::Join(JoinError::NotNamed(_))));
    let mut not_added = joiner();
    not_added.running.as_mut().expect("some").members.pop();
    let error = refusal(dir.path(), &not_added);
    assert!(matches!(error, OpenError::Join(JoinError::Count { .. })), "{error}");
    assert!(!dir.path().join("member").exists(), "nothing was made");
}

#[test]
fn a_log_that_was_voted_in_is_not_begun_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    for bootstrap in [founder(), joiner()] {
        let _ = fs::remove_dir_all(dir.path().join("member"));
        let mut log = begin(dir.path(), &bootstrap).log;
        log.append(&[], Some(HardState { term: 2, vote: 1, commit: 0 })).expect("appends");
        log.sync().expect("syncs");
        drop(log);
        lose_current(dir.path());
        let error = refusal(dir.path(), &bootstrap);
        assert!(matches!(error, OpenError::CurrentMissing { .. }), "{error}");
        fs::remove_dir_all(dir.path().join("member/ckpt-1")).expect("is there");
        let error = refusal(dir.path(), &bootstrap);
        assert!(matches!(error, OpenError::CheckpointMissing { .. }), "{error}");
    }
}

#[test]
fn an_old_checkpoint_that_was_installed_is_called_an_old_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = begin(dir.path(), &founder()).identity;
    let (_, mut storage) = DiskGenerations::open(&dir.path().join("member")).expect("opens");
    let head = storage.get(Table::Head, records::HEAD).expect("intact").expect("there");
    let head = CheckpointHead::decode(head).expect("a head");
    let mut batch = Batch::new();
    let installed = CheckpointHead { installed: true, ..head }.encode_to_vec();
    batch.put(Table::Head, records::HEAD, installed);
    storage.write(batch).expect("written");
    storage.sync().expect("synced");
    drop(storage);
    let start = Mark { index: 9, term: 1 };
    let mut log = empty_log(dir.path(), identity);
    log.install(start, HardState::of_start(start)).expect("written");
    drop(log);
    let error = refusal(dir.path(), &founder());
    assert!(matches!(error, OpenError::CheckpointTooOld { applied: 1, start: 9, .. }), "{error}");
}

#[test]
fn a_directory_from_before_clusters_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    // It began at (0, 0), and its first checkpoint had nothing applied.
    let mut log = begin(dir.path(), &joiner()).log;
    let entry = Entry { index: 1, term: 1, kind: 0, data: "x".into(), context: "".into() };
    log.append(&[entry], Some(HardState { term: 1, vote: 1, commit: 0 })).expect("appends");
    log.sync().expect("syncs");
    drop(log);
    let error = refusal(dir.path(), &Bootstrap::default());
    assert!(matches!(error, OpenError::BeforeClusters(_)), "{error}");
}

#[test]
fn a_forced_member_has_the_others_removals_in_its_log() {
    let dir = tempfile::tempdir().expect("a directory");
    drop(begin(dir.path(), &founder()));
    let forces = Bootstrap { force_new_cluster: true, ..founder() };
    let start = begin(dir.path(), &forces).start;
    assert_eq!((start.entries.len(), start.hard_state.commit), (2, 3));
    // They stay there, with the flag or without.
    let again = begin(dir.path(), &founder()).start;
    assert_eq!((again.entries, again.hard_state), (start.entries, start.hard_state));
    // A new member has nothing to force.
    let dir = tempfile::tempdir().expect("a directory");
    assert_founded(&begin(dir.path(), &forces), true);
}
