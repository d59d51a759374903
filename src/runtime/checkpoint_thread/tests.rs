use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;

use super::*;
use crate::pb::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest,
};
use crate::pb::kvorumpb::{Command, command::Request};
use crate::state::Effects;
use crate::state::members::Members;
use crate::storage::{FaultyDisk, MemoryGenerations, MemoryStorage};

/// No checkpoint can be begun: the disk is full.
struct FullDisk;

impl Generations for FullDisk {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        let source = io::Error::from(io::ErrorKind::StorageFull);
        Err(StorageError::Io { dir: PathBuf::from("(full)"), action: "write", source })
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        self.begin()
    }

    fn discard(&mut self) {}
}

/// A checkpoint thread that is not running, with what it is told through and tells.
struct Bench {
    thread: CheckpointThread,
    tasks: Sender<CheckpointTask>,
    log: Receiver<LogTask>,
}

impl Bench {
    fn new(storage: Option<Box<dyn Storage>>, generations: Box<dyn Generations>) -> Bench {
        let urls = vec!["http://localhost:2380".to_owned()];
        let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
        let state = StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned());
        let (tasks, receiver) = mpsc::channel();
        let (log_sender, log) = mpsc::channel();
        let thread = CheckpointThread {
            storage,
            generations,
            state: Arc::new(RwLock::new(state)),
            pins: Arc::default(),
            tasks: receiver,
            log: log_sender,
            apply: mpsc::channel().0,
            durable_index: 0,
            overhead_bytes: 0,
            durable_revision: 0,
            published: Arc::new(Published::new(0, 0)),
            busy: Arc::default(),
            directory: None,
            shortage: Arc::default(),
            reopen: false,
            removed: Removed::default(),
            catch_up_entries: 0,
            snapshots: VecDeque::new(),
            fault: Fault::default(),
            metrics: Metrics::new().expect("metrics"),
        };
        Bench { thread, tasks, log }
    }

    fn apply(&self, index: u64, request: Request) {
        let command = Command { header: None, request: Some(request) };
        let mut state = self.thread.state.write();
        state.apply(Mark { index, term: 1 }, command, &mut Effects::default()).expect("applied");
    }

    fn cut(&self) -> Box<Cut> {
        Box::new(self.thread.state.write().cut())
    }

    fn tell(&self, task: CheckpointTask) {
        self.tasks.send(task).expect("the thread's end is here");
    }

    fn ask_for_rewrite(&self) -> oneshot::Receiver<Result<(), Error>> {
        let (done, answer) = oneshot::channel();
        self.tell(CheckpointTask::Rewrite(done));
        answer
    }

    /// Has the thread do what it was told so far.
    fn work(&mut self) {
        self.tell(CheckpointTask::Stop);
        self.thread.run_until_stopped().expect("it goes on");
    }

    fn truncations(&self) -> usize {
        self.log.try_iter().filter(|task| matches!(task, LogTask::Truncate(_))).count()
    }
}

fn put(key: &'static str, lease: i64) -> Request {
    Request::Put(PutRequest { key: key.into(), value: "v".into(), lease, ..PutRequest::default() })
}

#[test]
fn the_log_is_truncated_to_a_snapshot_that_is_durable() {
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), Box::new(MemoryGenerations));
    bench.apply(1, put("k", 0));
    bench.tell(CheckpointTask::Write(bench.cut(), CutReason::Snapshot));
    bench.work();
    assert_eq!((bench.thread.durable_index, bench.truncations()), (1, 1));
}

/// The server stops while the disk is full: the cut is given up, and the log is all that
/// holds what was acknowledged.
#[test]
fn the_log_is_not_truncated_to_a_snapshot_that_was_given_up() {
    let mut bench = Bench::new(None, Box::new(FullDisk));
    bench.apply(1, put("k", 0));
    bench.tell(CheckpointTask::Write(bench.cut(), CutReason::Snapshot));
    bench.work();
    assert!(bench.thread.shortage.is_present());
    assert_eq!((bench.thread.durable_index, bench.truncations()), (0, 0));
}

/// Defragmenting is what one does when a disk is almost full: that there is no room for it
/// must not cost the checkpoint there is.
#[test]
fn without_room_for_a_rewrite_the_checkpoint_stays_in_use() {
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), Box::new(FullDisk));
    let mut answer = bench.ask_for_rewrite();
    bench.apply(1, put("k", 0));
    bench.tell(CheckpointTask::Write(bench.cut(), CutReason::Dirty));
    bench.work();
    assert_eq!(answer.try_recv().expect("an answer"), Err(Error::NoSpace));
    assert_eq!(bench.thread.durable_index, 1);
    assert!(!bench.thread.shortage.is_present(), "writes are not refused for it");
}

/// Counts the checkpoints that are begun; while the first is, somebody does something.
struct Counted {
    begun: Arc<AtomicUsize>,
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

impl Generations for Counted {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        MemoryGenerations.begin()
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        MemoryGenerations.reopen()
    }

    fn discard(&mut self) {}
}

#[test]
fn nothing_is_written_anew_for_somebody_who_has_gone() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Counted { begun: Arc::clone(&begun), meanwhile: None };
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), Box::new(counted));
    drop(bench.ask_for_rewrite());
    bench.work();
    assert_eq!(begun.load(Ordering::Relaxed), 0);
    drop(bench.ask_for_rewrite());
    let mut answer = bench.ask_for_rewrite();
    bench.work();
    assert_eq!(answer.try_recv().expect("an answer"), Ok(()));
    assert_eq!(begun.load(Ordering::Relaxed), 1);
}

/// Two calls come while the checkpoint is written for a third, and a cut between them, which
/// is then superseded. What they are to see may have happened after that one was begun.
#[test]
fn who_waits_while_a_checkpoint_is_written_anew_shares_the_next_one() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Counted { begun: Arc::clone(&begun), meanwhile: None };
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), Box::new(counted));
    bench.apply(1, put("k", 0));
    let answers = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let meanwhile = {
        let (tasks, answers) = (bench.tasks.clone(), Arc::clone(&answers));
        let cut = bench.cut();
        let ask = move || {
            let (done, answer) = oneshot::channel();
            answers.lock().push(answer);
            CheckpointTask::Rewrite(done)
        };
        move || {
            let between = CheckpointTask::Write(cut, CutReason::Snapshot);
            for task in [ask(), between, ask(), CheckpointTask::Stop] {
                tasks.send(task).expect("the thread is here");
            }
        }
    };
    let counted = Counted { begun: Arc::clone(&begun), meanwhile: Some(Box::new(meanwhile)) };
    bench.thread.generations = Box::new(counted);
    let mut first = bench.ask_for_rewrite();
    bench.thread.run_until_stopped().expect("it goes on");
    assert_eq!(first.try_recv().expect("an answer"), Ok(()));
    for answer in answers.lock().iter_mut() {
        assert_eq!(answer.try_recv().expect("an answer"), Ok(()));
    }
    assert_eq!((answers.lock().len(), begun.load(Ordering::Relaxed)), (2, 2));
    assert_eq!((bench.thread.durable_index, bench.truncations()), (1, 1), "the cut is not lost");
    assert_eq!(bench.thread.metrics.disk_backend_defrag_duration_seconds.get_sample_count(), 2);
    assert_eq!(bench.thread.metrics.disk_defrag_inflight.get(), 0);
}

/// A cut may wait behind a rewrite that goes further. Written after it, its head would have
/// the log replayed over leases that are gone already, and their keys would stay.
#[test]
fn a_cut_older_than_a_rewrite_is_not_written() {
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), Box::new(MemoryGenerations));
    bench.apply(1, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 7 }));
    bench.apply(2, put("leased", 7));
    let older = bench.cut();
    bench.apply(3, Request::LeaseRevoke(LeaseRevokeRequest { id: 7 }));
    let _answer = bench.ask_for_rewrite();
    bench.tell(CheckpointTask::Write(older, CutReason::Dirty));
    bench.work();
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    let restored = StateMachine::restore(records::recover(storage).expect("a checkpoint"));
    assert_eq!(restored.applied(), Mark { index: 3, term: 1 });
    assert_eq!(restored.hash(), bench.thread.state.read().hash());
}

/// Checkpoints on one disk. What is opened anew has lost everything that was not synced.
struct LosingGenerations(FaultyDisk);

impl Generations for LosingGenerations {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        Ok(Box::new(self.0.open()))
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        self.0.power_cut(0);
        self.begin()
    }

    fn discard(&mut self) {}
}

/// Deletions are not synced by themselves. When a store that ran into the end of its disk is
/// opened anew it may have what was deleted, and without its tombstone, which goes later, a
/// version would bring its key back.
#[test]
fn what_a_full_disk_undeletes_is_deleted_again() {
    let disk = FaultyDisk::without_frozen();
    let storage = Some(Box::new(disk.open()) as Box<dyn Storage>);
    let mut bench = Bench::new(storage, Box::new(LosingGenerations(disk.clone())));
    let compact = |bench: &Bench, index, revision| {
        let request = CompactionRequest { revision, physical: false };
        bench.apply(index, Request::Compaction(request));
        while !bench.thread.state.write().compact_step(i64::MAX, 10) {}
    };
    let waiting = |bench: &Bench| WaitingCut {
        cut: bench.cut(),
        reason: CutReason::Dirty,
        since: Instant::now(),
    };

    bench.apply(1, put("k", 0));
    bench.apply(2, put("k", 0));
    bench.apply(3, put("other", 0));
    let cut = waiting(&bench);
    assert!(bench.thread.write(&cut).unwrap());
    compact(&bench, 4, 4);
    let cut = waiting(&bench);
    assert!(bench.thread.write(&cut).unwrap());
    assert_eq!(disk.unsynced_writes(), 1, "the first version of k is deleted, not durably");

    disk.fill_after(0);
    bench.apply(5, put("other", 0));
    let cut = waiting(&bench);
    assert!(!bench.thread.write(&cut).unwrap(), "the disk is full");
    assert!(bench.thread.write(&cut).unwrap(), "there is space again");

    let delete = DeleteRangeRequest { key: "k".into(), ..DeleteRangeRequest::default() };
    bench.apply(6, Request::DeleteRange(delete));
    bench.apply(7, put("other", 0));
    compact(&bench, 8, 7);
    let cut = waiting(&bench);
    assert!(bench.thread.write(&cut).unwrap());
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    let restored = StateMachine::restore(records::recover(storage).expect("a checkpoint"));
    assert_eq!(restored.hash(), bench.thread.state.read().hash());
    assert_eq!(restored.store().keys_total(), 1, "k was deleted");
}

/// A checkpoint written anew lacks what was compacted. The cut after it still has that, and
/// a crash in the middle of writing it must not bring back a version without its tombstone.
#[test]
fn a_crash_after_a_rewrite_brings_no_key_back() {
    for disk in [FaultyDisk::new(), FaultyDisk::without_frozen()] {
        crash_after_rewrite(&disk);
    }
}

fn crash_after_rewrite(disk: &FaultyDisk) {
    let storage = Some(Box::new(MemoryStorage::new()) as Box<dyn Storage>);
    let mut bench = Bench::new(storage, Box::new(LosingGenerations(disk.clone())));
    bench.apply(1, put("k", 0));
    // More than a batch between the version and its tombstone.
    for index in 2..302 {
        bench.apply(index, put("other", 0));
    }
    let delete = DeleteRangeRequest { key: "k".into(), ..DeleteRangeRequest::default() };
    bench.apply(302, Request::DeleteRange(delete));
    bench.apply(303, put("other", 0));
    let revision = bench.thread.state.read().store().revision();
    let request = CompactionRequest { revision, physical: false };
    bench.apply(304, Request::Compaction(request));
    while !bench.thread.state.write().compact_step(i64::MAX, 10) {}
    let _answer = bench.ask_for_rewrite();
    bench.work();
    assert_eq!(bench.thread.durable_index, 304);

    bench.apply(305, put("other", 0));
    disk.fail_write_after(1);
    let cut = WaitingCut { cut: bench.cut(), reason: CutReason::Dirty, since: Instant::now() };
    let _ = bench.thread.write(&cut);
    disk.power_cut(1);
    let restored = records::recover(&mut disk.open()).expect("a checkpoint");
    assert_eq!(restored.store.keys_total(), 1, "k was deleted");
}

/// A checkpoint that was written anew cannot give up single records. That a key was deleted
/// must not be forgotten before the key is.
#[test]
fn what_is_deleted_after_a_rewrite_stays_deleted() {
    let storage = Some(Box::new(MemoryStorage::new()) as Box<dyn Storage>);
    let mut bench = Bench::new(storage, Box::new(MemoryGenerations));
    bench.apply(1, put("k", 0));
    bench.apply(2, put("other", 0));
    let _answer = bench.ask_for_rewrite();
    bench.work();
    let delete = DeleteRangeRequest { key: "k".into(), ..DeleteRangeRequest::default() };
    bench.apply(3, put("other", 0));
    bench.apply(4, Request::DeleteRange(delete));
    bench.apply(5, put("other", 0));
    let revision = bench.thread.state.read().store().revision();
    let request = CompactionRequest { revision, physical: false };
    bench.apply(6, Request::Compaction(request));
    while !bench.thread.state.write().compact_step(i64::MAX, 10) {}
    for index in 7..9 {
        bench.apply(index, put("other", 0));
        bench.tell(CheckpointTask::Write(bench.cut(), CutReason::Dirty));
        bench.work();
    }
    assert!(!bench.thread.removed.is_any_left());
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    let mut restored = StateMachine::restore(records::recover(storage).expect("a checkpoint"));
    assert_eq!(restored.store().keys_total(), 1, "k was deleted");
    while !restored.compact_step(i64::MAX, 10) {}
    assert_eq!(restored.hash(), bench.thread.state.read().hash());
    let _answer = bench.ask_for_rewrite();
    bench.work();
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    let restored = records::recover(storage).expect("a checkpoint").store;
    let state = bench.thread.state.read();
    assert_eq!(restored.size_bytes(), state.store().size_bytes(), "nothing else is left");
}

/// More versions of one key than fit below the floor, and two leases, in a checkpoint; then a
/// compaction that gives up all but the last, nothing of which is removed yet. And the cut after
/// that.
fn with_superseded_versions(generations: Box<dyn Generations>) -> (Bench, Box<Cut>) {
    const VALUE_BYTES: u64 = 1 << 20;
    let mut bench = Bench::new(Some(Box::new(MemoryStorage::new())), generations);
    let lease = |id| Request::LeaseGrant(LeaseGrantRequest { id, ttl: 60 });
    bench.apply(1, lease(7));
    bench.apply(2, lease(8));
    bench.apply(3, put("gone", 7));
    let value = bytes::Bytes::from(vec![7; VALUE_BYTES as usize]);
    let versions = space::REWRITE_FLOOR_BYTES / VALUE_BYTES + 1;
    for index in 4..4 + versions {
        let put = PutRequest { key: "k".into(), value: value.clone(), ..Default::default() };
        bench.apply(index, Request::Put(put));
    }
    bench.tell(CheckpointTask::Write(bench.cut(), CutReason::Dirty));
    bench.work();
    let index = 4 + versions;
    let revision = bench.thread.state.read().store().revision();
    bench.apply(index, Request::Compaction(CompactionRequest { revision, physical: false }));
    bench.apply(index + 1, Request::LeaseRevoke(LeaseRevokeRequest { id: 7 }));
    bench.apply(index + 2, lease(9));
    bench.apply(index + 3, put("other", 8));
    let cut = bench.cut();
    (bench, cut)
}

fn on_disk_bytes(bench: &Bench) -> u64 {
    bench.thread.storage.as_deref().expect("a store").size_on_disk().expect("a size")
}

fn commits(bench: &Bench) -> u64 {
    bench.thread.metrics.disk_backend_commit_duration_seconds.get_sample_count()
}

/// The checkpoint, and the state, after all that was compacted is removed from both.
fn hashes(bench: &mut Bench) -> [u32; 2] {
    let storage = bench.thread.storage.as_deref_mut().expect("a store");
    let mut restored = StateMachine::restore(records::recover(storage).expect("a checkpoint"));
    let mut state = bench.thread.state.write();
    [&mut restored, &mut *state].map(|state| {
        while !state.compact_step(i64::MAX, 10) {}
        state.hash()
    })
}

/// It takes a while until what compaction gave up is removed. Waiting for that, the checkpoint
/// would take it and what was written meanwhile.
#[test]
fn what_compaction_gave_up_is_given_back_before_it_is_removed() {
    let (mut bench, cut) = with_superseded_versions(Box::new(MemoryGenerations));
    assert!(on_disk_bytes(&bench) > space::REWRITE_FLOOR_BYTES, "all of it is needed");
    let index = cut.head.applied_index;
    bench.tell(CheckpointTask::Write(cut, CutReason::Snapshot));
    bench.work();
    assert!(on_disk_bytes(&bench) < space::REWRITE_FLOOR_BYTES / 8);
    assert!(bench.thread.state.read().store().size_bytes() > space::REWRITE_FLOOR_BYTES);
    assert_eq!((bench.thread.durable_index, bench.truncations()), (index, 1));
    assert_eq!(commits(&bench), 1, "what is written anew is none");
    let [restored, state] = hashes(&mut bench);
    assert_eq!(restored, state);
}

/// Then the cut is written to the checkpoint there is.
#[test]
fn where_the_next_checkpoint_has_no_room_a_cut_is_written_all_the_same() {
    let (mut bench, cut) = with_superseded_versions(Box::new(FullDisk));
    let before_bytes = on_disk_bytes(&bench);
    let index = cut.head.applied_index;
    bench.tell(CheckpointTask::Write(cut, CutReason::Dirty));
    bench.work();
    assert!(on_disk_bytes(&bench) > before_bytes);
    assert_eq!(bench.thread.durable_index, index);
    assert!(!bench.thread.shortage.is_present());
    assert_eq!(commits(&bench), 2);
    let [restored, state] = hashes(&mut bench);
    assert_eq!(restored, state);
}

/// What was written while all was written anew is in that, and in the cut after it once more.
#[test]
fn what_the_checkpoint_holds_already_does_not_make_it_due_again() {
    let (mut bench, first) = with_superseded_versions(Box::new(MemoryGenerations));
    let mut index = first.head.applied_index;
    let value = bytes::Bytes::from(vec![7; 6 << 20]);
    for key in ["a", "b"] {
        index += 1;
        let put = PutRequest { key: key.into(), value: value.clone(), ..Default::default() };
        bench.apply(index, Request::Put(put));
    }
    bench.tell(CheckpointTask::Write(first, CutReason::Dirty));
    bench.work();
    let second = bench.cut();
    assert!(second.dirty.records_bytes >= 2 * value.len());
    assert_eq!(bench.thread.durable_index, index, "the image is of now");
    space::FLOOR_BYTES.set(1 << 20);
    let new_bytes = records::new_bytes(&second, bench.thread.durable_revision);
    assert!(!bench.thread.is_worth_rewriting(new_bytes).expect("a size"));
}
