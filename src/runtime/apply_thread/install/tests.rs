use std::sync::mpsc::{self, Sender, sync_channel};
use std::thread;
use std::time::Duration;

use parking_lot::RwLock;
use prost::Message as _;

use super::*;
use crate::log::Entry;
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{
    CompactionRequest, PutRequest, WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::pb::kvorumpb::{Command, CommandHeader, command::Request};
use crate::pb::mvccpb::Event;
use crate::runtime::apply_thread::{ApplyTask, CompactionPace};
use crate::runtime::checkpoint_thread::{CheckpointTask, Checkpointer};
use crate::runtime::fault::Fault;
use crate::runtime::hashes::{CompactionHashes, hasher};
use crate::runtime::history::StateHistory;
use crate::runtime::leases::LeaseClock;
use crate::runtime::pins::Pins;
use crate::runtime::published::Published;
use crate::runtime::rolling_hashes::{At, RollingHashes};
use crate::runtime::waiters::{Answer, Waiters};
use crate::runtime::watch_hub::{HubHandle, Responses, WatchConfig, WatchHub};
use crate::state::members::Members;

fn new_state() -> StateMachine {
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned())
}

fn put(index: u64) -> Entry {
    let put = PutRequest { key: "k".into(), value: index.to_string().into(), ..Default::default() };
    entry(index, Request::Put(put))
}

fn entry(index: u64, request: Request) -> Entry {
    let command = Command { header: None, request: Some(request) };
    let data = command.encode_to_vec().into();
    Entry { index, term: 1, kind: 0, data, context: Default::default() }
}

/// The state that puts up to `index` lead to, one revision each from 2 on, with a compaction
/// as the last entry if there is a revision for it.
fn state_at(index: u64, compact_revision: Option<i64>) -> StateMachine {
    let mut state = new_state();
    let mut entries: Vec<Entry> = (1..=index).map(put).collect();
    if let Some(revision) = compact_revision {
        let compaction = CompactionRequest { revision, physical: false };
        entries.push(entry(index + 1, Request::Compaction(compaction)));
    }
    for entry in entries {
        let command = Command::decode(entry.data).expect("a command");
        let mark = crate::log::Mark { index: entry.index, term: 1 };
        state.apply(mark, command, &mut Default::default()).expect("applied");
    }
    state
}

/// An apply thread that runs, with a hub.
struct Bench {
    state: Arc<RwLock<StateMachine>>,
    pins: Arc<Pins>,
    waiters: Arc<Waiters>,
    published: Arc<Published>,
    tasks: Sender<ApplyTask>,
    hub: HubHandle,
    checkpoints: mpsc::Receiver<CheckpointTask>,
    thread: thread::JoinHandle<()>,
}

impl Bench {
    /// Within a runtime.
    fn new() -> Bench {
        let state = Arc::new(RwLock::new(new_state()));
        let config =
            WatchConfig { progress_interval: Duration::MAX, max_request_bytes: 1 << 20, seed: 1 };
        let history = StateHistory(Arc::clone(&state));
        let header = Arc::new(|revision| crate::pb::etcdserverpb::ResponseHeader {
            revision,
            ..Default::default()
        });
        let (task, hub, feed) = WatchHub::new(history, header, config);
        tokio::spawn(task.run());
        let (hashes, _work) = hasher(Arc::clone(&state), Arc::new(CompactionHashes::default()));
        let (tasks, receiver) = mpsc::channel();
        let (checkpoint, checkpoints) = mpsc::channel();
        let pins: Arc<Pins> = Arc::default();
        let published = Arc::new(Published::new(0, 0));
        let waiters = Arc::new(Waiters::new(1, 1));
        let thread = ApplyThread {
            state: Arc::clone(&state),
            tasks: receiver,
            raft: mpsc::channel().0,
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            feed,
            leases: Arc::new(LeaseClock::new(Arc::clone(&published))),
            pins: Arc::clone(&pins),
            recovered_index: 0,
            hashes,
            checkpointer: Checkpointer::new(
                checkpoint,
                Arc::default(),
                Arc::default(),
                10_000,
                0,
                0,
            ),
            rolling_hashes: Arc::new(RollingHashes::new(At { index: 0, hash: 0 })),
            pace: CompactionPace { keys_per_step: 1000, pause: Duration::from_millis(1) },
            slow_apply: Duration::MAX,
            fault: Fault::default(),
            metrics: Metrics::new().expect("metrics"),
        };
        let thread = thread::spawn(move || thread.run());
        Bench { state, pins, waiters, published, tasks, hub, checkpoints, thread }
    }

    fn apply(&self, indexes: std::ops::RangeInclusive<u64>) {
        self.tasks.send(ApplyTask::Entries(indexes.map(put).collect())).expect("it runs");
    }

    fn install(&self, state: StateMachine) {
        let (done, wait) = sync_channel(1);
        let replacement = Box::new(Replacement { state, done });
        self.tasks.send(ApplyTask::Install(replacement)).expect("it runs");
        wait.recv().expect("it is in place");
    }

    async fn watch(&self, start_revision: i64) -> Responses {
        let stream = self.hub.open_stream();
        let create =
            WatchCreateRequest { key: "k".into(), start_revision, ..WatchCreateRequest::default() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        stream.requests.send(request).await.expect("the hub runs");
        let mut responses = stream.responses;
        assert!(next(&mut responses).await.created);
        responses
    }

    fn end(self) {
        self.tasks.send(ApplyTask::Stop).expect("it runs");
        self.thread.join().expect("no panic");
        for task in self.checkpoints.try_iter() {
            if let CheckpointTask::Write(cut, _) = task {
                assert!(cut.head.applied_index > 0);
            }
        }
    }
}

async fn next(responses: &mut Responses) -> WatchResponse {
    responses.recv().await.expect("the hub runs")
}

/// The revisions of the events up to `last`, as they come.
async fn revisions_to(responses: &mut Responses, last: i64) -> Vec<i64> {
    let mut revisions = Vec::new();
    while revisions.last() != Some(&last) {
        let response = next(responses).await;
        assert!(!response.canceled, "after {revisions:?}");
        for event in response.events {
            let kv = Event::decode(event).expect("an event").kv.expect("a key");
            revisions.push(kv.mod_revision);
        }
    }
    revisions
}

/// etcd #15271: a watch across an install has each revision once and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_through_an_install_without_gap_or_repetition() {
    let bench = Bench::new();
    bench.apply(1..=10);
    let (mut live, mut behind) = (bench.watch(0).await, bench.watch(2).await);
    bench.apply(11..=12);
    // A live watch begins somewhere from 2 to 14; take it from the first one it shows.
    bench.install(state_at(100, None));
    // Late, and of no use.
    bench.install(state_at(50, None));
    assert_eq!(bench.state.read().applied().index, 100);
    assert_eq!(*bench.published.applied.borrow(), 100);
    bench.apply(101..=110);
    assert_eq!(revisions_to(&mut behind, 111).await, (2..=111).collect::<Vec<_>>());
    let seen = revisions_to(&mut live, 111).await;
    let first = *seen.first().expect("some");
    assert!(first <= 14, "began at {first}");
    assert_eq!(seen, (first..=111).collect::<Vec<_>>());
    bench.end();
}

/// What a watcher has yet to see is compacted in the new state: it is told so. One that begins
/// later is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_whose_history_is_gone_is_cancelled() {
    let bench = Bench::new();
    bench.apply(1..=10);
    let mut applied = bench.published.applied.subscribe();
    applied.wait_for(|applied| *applied == 10).await.expect("it runs");
    let (mut early, mut late) = (bench.watch(0).await, bench.watch(80).await);
    bench.install(state_at(100, Some(60)));
    let response = next(&mut early).await;
    assert!(response.canceled && response.compact_revision == 60, "{response:?}");
    assert_eq!(revisions_to(&mut late, 101).await, (80..=101).collect::<Vec<_>>());
    bench.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_go_on_or_are_told_and_proposers_are_told() {
    let bench = Bench::new();
    bench.apply(1..=70);
    let mut applied = bench.published.applied.subscribe();
    applied.wait_for(|applied| *applied == 70).await.expect("it runs");
    let at = |revision| {
        let state = bench.state.read();
        state.store().get(b"k", revision).map(|version| version.kv.clone())
    };
    let (old, new) = (bench.pins.pin(59), bench.pins.pin(65));
    let before = at(65);
    let header: CommandHeader = bench.waiters.next_header();
    let answer = bench.waiters.register(&header, 10, 1).expect("there is room");
    bench.install(state_at(100, Some(60)));
    assert!(old.is_lost() && !new.is_lost());
    assert_eq!(at(65), before);
    assert!(matches!(answer.await.expect("an answer"), Answer::Lost(Error::Timeout)));
    // What a reader needs stays, and then goes.
    let mut removed = bench.published.removed_below.subscribe();
    drop((old, new));
    removed.wait_for(|removed| *removed == 60).await.expect("it runs");
    bench.end();
}
