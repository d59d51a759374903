use std::sync::mpsc;

use super::*;
use crate::pb::etcdserverpb::{CompactionRequest, PutRequest};
use crate::pb::kvorumpb::command::Request;
use crate::runtime::hashes::{CompactionHashes, hasher};
use crate::runtime::history::StateHistory;
use crate::runtime::watch_hub::{WatchConfig, WatchHub};
use crate::state::members::Members;

/// How many compactions are hashed when these entries are applied, the first
/// `recovered_index` of which were in the log when the member started.
fn hashed(recovered_index: u64, entries: Vec<Entry>) -> usize {
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    let state = StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned());
    let state = Arc::new(RwLock::new(state));
    let watch_config =
        WatchConfig { progress_interval: Duration::MAX, max_request_bytes: 1 << 20, seed: 1 };
    let history = StateHistory(Arc::clone(&state));
    let (_hub, _handle, feed) =
        WatchHub::new(history, Arc::new(|_| Default::default()), watch_config);
    let (hashes, _work) = hasher(Arc::clone(&state), Arc::new(CompactionHashes::default()));
    let (tasks, receiver) = mpsc::channel();
    let (raft, _mailbox) = mpsc::channel();
    let (checkpoint, _checkpoints) = mpsc::channel();
    let pins = Arc::new(Pins::default());
    let published = Arc::new(Published::new(0, 0));
    let thread = ApplyThread {
        state,
        tasks: receiver,
        raft,
        published: Arc::clone(&published),
        waiters: Arc::new(Waiters::new(1, 1)),
        feed,
        leases: Arc::new(LeaseClock::new(published)),
        pins: Arc::clone(&pins),
        recovered_index,
        hashes,
        checkpointer: Checkpointer::new(checkpoint, Arc::default(), Arc::default(), 10_000, 0, 0),
        rolling_hashes: Arc::new(RollingHashes::new(At { index: 0, hash: 0 })),
        pace: CompactionPace { keys_per_step: 1000, pause: Duration::from_millis(10) },
        slow_apply: Duration::MAX,
        fault: Fault::default(),
        metrics: Metrics::new().expect("metrics"),
    };
    tasks.send(ApplyTask::Entries(entries)).expect("the thread's end is here");
    tasks.send(ApplyTask::Stop).expect("the thread's end is here");
    thread.run();
    // What is to be hashed is pinned until it is.
    pins.readers()
}

fn entry(index: u64, request: Option<Request>) -> Entry {
    let command = request.map(|request| Command { header: None, request: Some(request) });
    let data = command.map(|command| command.encode_to_vec()).unwrap_or_default();
    Entry { index, term: 1, kind: 0, data: data.into(), context: Default::default() }
}

#[test]
fn a_compaction_is_hashed_unless_it_was_in_the_log_at_the_start() {
    let put = || Request::Put(PutRequest { key: "k".into(), ..PutRequest::default() });
    let compact = |revision| Request::Compaction(CompactionRequest { revision, physical: false });
    // What was in the log and the new leader's empty entry may be committed together.
    let entries = |count: usize| {
        let requests =
            [Some(put()), Some(put()), Some(compact(2)), None, Some(compact(3))].into_iter();
        (1..).zip(requests).take(count).map(|(index, request)| entry(index, request)).collect()
    };
    assert_eq!(hashed(3, entries(3)), 0);
    assert_eq!(hashed(3, entries(4)), 0);
    assert_eq!(hashed(3, entries(5)), 1);
    assert_eq!(hashed(0, entries(5)), 2);
}
