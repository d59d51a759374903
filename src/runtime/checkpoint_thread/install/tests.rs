use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;

use super::*;
use crate::log::{BOOTSTRAP, Entry};
use crate::metrics::Metrics;
use crate::net::snapshot::Image as _;
use crate::pb::etcdserverpb::PutRequest;
use crate::pb::kvorumpb::{Command, command::Request};
use crate::raft::Node;
use crate::runtime::fault::Fault;
use crate::runtime::image::Source;
use crate::runtime::log_thread::LogThread;
use crate::runtime::published::Published;
use crate::runtime::raft_thread::RaftInput;
use crate::runtime::records;
use crate::runtime::recover::{self, Bootstrap, Place, Recovery};
use crate::runtime::timing::SyncTimes;
use crate::state::Effects;
use crate::state::members::{Members, member_id};
use crate::storage::spool::Spools;
use crate::storage::{Generations, MemoryGenerations, StorageError};

const TOKEN: &str = "etcd-cluster";

fn cluster() -> Vec<(String, Vec<String>)> {
    let member = |name: &str, port| (name.to_owned(), vec![format!("http://localhost:{port}")]);
    vec![member("one", 2380), member("two", 2381)]
}

fn open(dir: &Path) -> Recovery {
    let place = Place::Disk { data_dir: dir.to_owned(), wal_dir: None, fsync: false };
    let bootstrap = Bootstrap {
        initial_cluster: cluster(),
        cluster_token: TOKEN.to_owned(),
        name: "one".to_owned(),
        cluster_version: "3.7.0".to_owned(),
        ..Bootstrap::default()
    };
    recover::open(&place, &bootstrap).expect("opened")
}

/// The other member's state after so many entries of term 2.
fn other_state(entries: u64) -> StateMachine {
    let id = member_id(&["http://localhost:2381".to_owned()], TOKEN);
    let members = Members::bootstrap(&cluster(), TOKEN);
    let mut state = StateMachine::bootstrap(id, members, "3.7.0".to_owned());
    for index in 1..=entries {
        let key = Bytes::from(format!("key {index}"));
        let put = PutRequest { key, value: "v".into(), ..PutRequest::default() };
        let command = Command { header: None, request: Some(Request::Put(put)) };
        state.apply(Mark { index, term: 2 }, command, &mut Effects::default()).expect("applied");
    }
    state
}

fn spool_of(state: StateMachine) -> Spool {
    let mut source = Source::new(1, &Arc::new(RwLock::new(state)), &Arc::default());
    let spools = Spools::open(None).expect("in memory");
    let mut spool = spools.begin().expect("in memory").expect("there is room");
    while let Some(chunk) = source.next_chunk().expect("it is not lost") {
        spool.append(chunk).expect("in memory");
    }
    spool
}

fn install_of(spool: Spool, index: u64) -> (Install, oneshot::Receiver<()>) {
    let (done, in_force) = oneshot::channel();
    let hard_state = HardState { term: 3, vote: 9, commit: index };
    (Install { spool, mark: Mark { index, term: 2 }, hard_state, number: 5, done }, in_force)
}

/// What still works, besides the checkpoint.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Works {
    Nothing,
    Apply,
    ApplyAndLog,
}

/// A member with entries of its own in its log, that were never committed.
struct Bench {
    thread: CheckpointThread,
    log: Option<thread::JoinHandle<()>>,
    apply: Option<thread::JoinHandle<()>>,
    persisted: mpsc::Receiver<RaftInput>,
}

impl Bench {
    fn new(dir: &Path, works: Works) -> Bench {
        let Recovery { state, mut log, storage, generations, start, .. } = open(dir);
        if start.entries.is_empty() && start.start == BOOTSTRAP {
            let entry = |index| Entry {
                index,
                term: 1,
                kind: 0,
                data: Bytes::new(),
                context: Bytes::new(),
            };
            let entries: Vec<Entry> = (2..=4).map(entry).collect();
            let hard_state = HardState { term: 1, vote: 7, commit: 1 };
            log.append(&entries, Some(hard_state)).expect("appended");
            log.sync().expect("synced");
        }
        let metrics = Metrics::new().expect("metrics");
        let applied = state.applied();
        let durable_revision = state.store().revision();
        let state = Arc::new(RwLock::new(state));
        let (raft, persisted) = mpsc::channel();
        let (log_sender, tasks) = mpsc::channel();
        let log_thread = LogThread {
            log,
            tasks,
            raft,
            fault: Fault::default(),
            sync_times: SyncTimes::new(Duration::from_secs(1), Duration::from_secs(10)),
            has_peers: Box::new(|| false),
            metrics: Arc::clone(&metrics),
        };
        let (apply_sender, apply_tasks) = mpsc::channel();
        let apply = (works != Works::Nothing).then(|| {
            let state = Arc::clone(&state);
            thread::spawn(move || {
                for task in apply_tasks {
                    if let ApplyTask::Install(replacement) = task {
                        *state.write() = replacement.state;
                        replacement.done.send(()).expect("it is waited for");
                    }
                }
            })
        });
        let log = (works == Works::ApplyAndLog).then(|| thread::spawn(move || log_thread.run()));
        let thread = CheckpointThread {
            storage: Some(storage),
            generations,
            state,
            pins: Arc::default(),
            tasks: mpsc::channel().1,
            log: log_sender,
            apply: apply_sender,
            durable_index: applied.index,
            overhead_bytes: 0,
            durable_revision,
            published: Arc::new(Published::new(0, 0)),
            busy: Arc::default(),
            directory: None,
            shortage: Arc::default(),
            reopen: false,
            removed: Removed::default(),
            catch_up_entries: 0,
            snapshots: VecDeque::new(),
            fault: Fault::default(),
            metrics,
        };
        Bench { thread, log, apply, persisted }
    }

    /// Like the end of the process: nothing is written any more.
    fn end(self) {
        let Bench { thread, log, apply, persisted } = self;
        drop((thread, persisted));
        for thread in [log, apply].into_iter().flatten() {
            thread.join().expect("no panic");
        }
    }
}

/// The member as the next start finds it: raft accepts it, and its state is at this index.
fn assert_recovers(dir: &Path, index: u64, expected: &StateMachine) {
    let Recovery { state, start, .. } = open(dir);
    assert_eq!(state.applied().index, index);
    assert_eq!(state.member_id(), member_id(&["http://localhost:2380".to_owned()], TOKEN));
    assert_eq!(state.hash(), expected.hash());
    if index == BOOTSTRAP.index {
        assert_eq!((start.entries.len(), start.hard_state.vote), (3, 7), "the log as it was");
    } else {
        assert_eq!(start.start, expected.applied());
        assert!(start.entries.is_empty() && start.hard_state.commit == index);
        assert!(start.hard_state.term >= 2);
    }
    let start = crate::raft::Start { election_ticks: 10, ..start };
    Node::new(start).expect("log and checkpoint fit together");
}

/// Wherever the process ends, the next start has the old state with the old log, or the new
/// one with a log that begins behind it.
#[test]
fn a_crash_at_any_step_leaves_the_old_state_or_the_new() {
    for works in [Works::Nothing, Works::Apply, Works::ApplyAndLog] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut bench = Bench::new(dir.path(), works);
        let (install, mut in_force) = install_of(spool_of(other_state(50)), 50);
        let goes_on = bench.thread.install(install).expect("installed");
        assert_eq!(goes_on, works == Works::ApplyAndLog);
        assert_eq!(in_force.try_recv().is_ok(), goes_on);
        let heard: Vec<RaftInput> = bench.persisted.try_iter().collect();
        let in_order = matches!(heard[..], [RaftInput::Persisted(_), RaftInput::Applied(50)]);
        assert_eq!(in_order, goes_on, "raft hears of it last, and in this order: {heard:?}");
        assert_eq!(heard.is_empty(), !goes_on);
        bench.end();
        // The first start completes it, and the second finds it complete.
        assert_recovers(dir.path(), 50, &other_state(50));
        assert_recovers(dir.path(), 50, &other_state(50));
    }
}

#[test]
fn an_image_that_is_not_what_raft_was_told_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut bench = Bench::new(dir.path(), Works::ApplyAndLog);
    let (install, _) = install_of(spool_of(other_state(50)), 49);
    bench.thread.install(install).expect_err("it ends elsewhere");
    let mut cut_short = Spools::open(None).unwrap().begin().unwrap().unwrap();
    cut_short.append(Bytes::from_static(b"KVORUMIM\x01\0\0\0")).unwrap();
    bench.thread.install(install_of(cut_short, 50).0).expect_err("it is no image");
    // The server stops while it is being filled.
    bench.thread.published.set_stopped();
    let (install, _) = install_of(spool_of(other_state(1000)), 1000);
    assert!(!bench.thread.install(install).expect("stopped"));
    bench.end();
    assert_recovers(dir.path(), BOOTSTRAP.index, &other_state(0));
}

/// A disk that is full for the first attempts.
struct FullAtFirst {
    generations: Box<dyn Generations>,
    full_for: usize,
}

impl Generations for FullAtFirst {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        if self.full_for > 0 {
            self.full_for -= 1;
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(StorageError::Io { dir: "(full)".into(), action: "write", source });
        }
        self.generations.begin()
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        self.generations.switch()
    }

    fn discard(&mut self) {
        self.generations.discard();
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        self.generations.reopen()
    }
}

fn fill_disk(bench: &mut Bench, full_for: usize) {
    let placeholder = Box::new(MemoryGenerations);
    let generations = std::mem::replace(&mut bench.thread.generations, placeholder);
    bench.thread.generations = Box::new(FullAtFirst { generations, full_for });
}

#[test]
fn a_snapshot_waits_for_a_disk_that_is_full() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut bench = Bench::new(dir.path(), Works::ApplyAndLog);
    fill_disk(&mut bench, 1);
    let (install, in_force) = install_of(spool_of(other_state(50)), 50);
    assert!(bench.thread.install(install).expect("installed in the end"));
    in_force.blocking_recv().expect("in force");
    assert!(!bench.thread.shortage.is_present(), "it waits no more");
    // When it stops while it waits, the old state stays.
    fill_disk(&mut bench, usize::MAX);
    bench.thread.published.set_stopped();
    let (install, _) = install_of(spool_of(other_state(90)), 90);
    assert!(!bench.thread.install(install).expect("stopped"));
    bench.end();
    assert_recovers(dir.path(), 50, &other_state(50));
}

/// etcd #18055: two in a short time; and then one that comes late.
#[test]
fn snapshots_follow_each_other_and_never_go_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut bench = Bench::new(dir.path(), Works::ApplyAndLog);
    for index in [50, 51, 300] {
        // That of the checkpoint before.
        bench.thread.overhead_bytes = 7;
        let (install, in_force) = install_of(spool_of(other_state(index)), index);
        assert!(bench.thread.install(install).expect("installed"));
        in_force.blocking_recv().expect("in force");
        assert_eq!((bench.thread.durable_index, bench.thread.overhead_bytes), (index, 0));
    }
    let (install, _) = install_of(spool_of(other_state(60)), 60);
    bench.thread.install(install).expect_err("it is behind");
    bench.end();
    assert_recovers(dir.path(), 300, &other_state(300));
}

/// The mark is for a log that has not begun anew yet: the next checkpoint is like any other.
#[test]
fn the_next_checkpoint_is_not_an_installed_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut bench = Bench::new(dir.path(), Works::ApplyAndLog);
    let (install, _in_force) = install_of(spool_of(other_state(50)), 50);
    assert!(bench.thread.install(install).expect("installed"));
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    assert!(records::recover(storage).expect("a checkpoint").head.installed);
    let cut = bench.thread.state.write().cut();
    records::write(storage, &cut, bench.thread.durable_revision).expect("written");
    let restored = records::recover(storage).expect("a checkpoint");
    assert!(!restored.head.installed);
    assert_eq!(StateMachine::restore(restored).hash(), other_state(50).hash());
    bench.end();
}
