//! One life of a simulated member: the real threads' work without the threads.
//!
//! What `server::member` puts on threads is driven here turn by turn. The tasks (proposals,
//! leases' time, watches) are polled in their order, within a tokio runtime that has the clock:
//! it is paused and moved by the simulator alone, so that each member has its own time.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::mem;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use tokio::task::unconstrained;

use super::disk::{Disk, log_fault};
use super::random::Random;
use super::{Failure, Planted};
use crate::error::Error;
use crate::log::Mark;
use crate::metrics::Metrics;
use crate::net::snapshot::{Arrived, Image as _};
use crate::pb::etcdserverpb::ResponseHeader;
use crate::pb::kvorumpb::{Refusal, SnapshotBegin};
use crate::raft::{Configuration, Node, Outgoing, Role};
use crate::runtime::apply_thread::{self, ApplyTask, ApplyThread, CompactionPace};
use crate::runtime::boot_clock::BootClock;
use crate::runtime::checkpoint_thread::{
    CheckpointTask, CheckpointThread, Checkpointer, Removed, UnderWay,
};
use crate::runtime::fault::Fault;
use crate::runtime::hashes::{self, CompactionHashes};
use crate::runtime::history::StateHistory;
use crate::runtime::image::Source;
use crate::runtime::leases::{LeaseClock, LeaseDuty};
use crate::runtime::log_thread::{LogTask, LogThread};
use crate::runtime::pins::Pins;
use crate::runtime::proposer::{Forwarder, Proposer};
use crate::runtime::published::Published;
use crate::runtime::raft_thread::{Outbox, Proposal, RaftInput, RaftParts, RaftThread};
use crate::runtime::records;
use crate::runtime::recover;
use crate::runtime::rolling_hashes::{At, RollingHashes};
use crate::runtime::space::Shortage;
use crate::runtime::timing::SyncTimes;
use crate::runtime::waiters::Waiters;
use crate::runtime::watch_hub::{HubHandle, WatchConfig, WatchHub};
use crate::state::StateMachine;
use crate::storage::spool::Spools;

/// How often each task is polled in one turn: what one of them does, others wait for.
const TASK_PASSES: usize = 4;

thread_local! {
    /// Nobody looks at them, and making them takes longer than a seed.
    static METRICS: Arc<Metrics> = Metrics::new().expect("metrics");
}

/// How a cluster is set up.
#[derive(Debug, Clone)]
pub(super) struct Timing {
    pub(super) tick: Duration,
    pub(super) election_ticks: usize,
    pub(super) pre_vote: bool,
    /// A snapshot is made, and the log truncated, after so many entries.
    pub(super) snapshot_entries: u64,
    /// So many are kept for members that are behind.
    pub(super) entries_kept: u64,
    /// The log behind a snapshot that was interrupted is kept for so long.
    pub(super) resume_ticks: u64,
}

/// What members say to each other beside raft's messages: a command for the leader.
#[derive(Debug)]
pub(super) struct Forward {
    pub(super) leader: u64,
    pub(super) term: u64,
    pub(super) proposal: Proposal,
}

/// Something that waits. tokio would poll what a change wakes in a random order.
type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where it is told that a command of another member was not taken.
type Refusals = UnboundedReceiver<Refusal>;

/// See the module documentation.
pub(super) struct Life {
    pub(super) boot: u64,
    runtime: Runtime,
    /// Everything that waits, in the order in which it is polled.
    tasks: Vec<Task>,
    /// How far this member's clock is, in microseconds.
    clock_us: u64,
    /// By how much it is behind the world's: a machine that is suspended has no time.
    behind_us: u64,
    /// The world's time.
    boot_clock: Arc<AtomicU64>,
    began: Instant,

    raft: RaftThread,
    mailbox: Sender<RaftInput>,
    /// Everybody's way to the raft thread; passed on by its turn.
    pub(super) to_raft: Sender<RaftInput>,
    raft_inputs: Receiver<RaftInput>,
    raft_next: Option<RaftInput>,

    log: LogThread,
    log_next: Option<LogTask>,
    pub(super) log_may_fail: bool,

    apply: ApplyThread,
    progress: Option<apply_thread::Progress>,
    apply_tasks: Sender<ApplyTask>,
    /// What raft hands to the apply thread; looked at before it gets there.
    committed: Receiver<ApplyTask>,

    checkpoint: CheckpointThread,
    checkpoint_next: Option<CheckpointTask>,
    under_way: UnderWay,
    to_checkpoint: Sender<CheckpointTask>,
    /// The last caller of Defragment that has not given up.
    defragments: Option<oneshot::Receiver<Result<(), Error>>>,
    /// What an installation waits for is done.
    installed: bool,
    pub(super) store_may_fail: bool,

    pub(super) sent: Arc<Mutex<Vec<Outgoing>>>,
    pub(super) forwards: Arc<Mutex<Vec<Forward>>>,
    /// Members that need a snapshot, and from which index on.
    pub(super) wanted: Arc<Mutex<BTreeMap<u64, u64>>>,
    /// Images for them.
    sources: BTreeMap<u64, Source>,
    images: u64,
    /// Images of others that are being installed: whose, in which life of theirs.
    pub(super) installs: Vec<(u64, u64, oneshot::Receiver<()>)>,
    spools: Spools,
    pins: Arc<Pins>,
    /// Who forwarded, in which life, and where the refusals arrive.
    pub(super) refusals: Vec<(u64, u64, Refusals)>,

    pub(super) state: Arc<RwLock<StateMachine>>,
    pub(super) published: Arc<Published>,
    pub(super) waiters: Arc<Waiters>,
    pub(super) leases: Arc<LeaseClock>,
    pub(super) proposer: Arc<Proposer>,
    pub(super) hub: HubHandle,
    fault: Fault,
}

struct Post {
    sent: Arc<Mutex<Vec<Outgoing>>>,
    wanted: Arc<Mutex<BTreeMap<u64, u64>>>,
}

impl Outbox for Post {
    fn send(&mut self, message: Outgoing) -> bool {
        self.sent.lock().push(message);
        true
    }

    fn make_snapshot(&mut self, to: u64, first_index: u64) {
        self.wanted.lock().insert(to, first_index);
    }
}

struct Forwards(Arc<Mutex<Vec<Forward>>>);

impl Forwarder for Forwards {
    fn forward(&self, leader: u64, term: u64, proposal: Proposal) {
        self.0.lock().push(Forward { leader, term, proposal });
    }
}

impl Life {
    /// Starts a member from its disk.
    pub(super) fn begin(
        disk: &Disk,
        boot: u64,
        timing: &Timing,
        planted: Planted,
        has_faults: bool,
        random: &mut Random,
    ) -> Result<Life, Failure> {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .map_err(|error| Failure::Violation(error.to_string()))?;
        let _context = runtime.enter();
        let violation =
            |error: &dyn std::fmt::Display| Failure::Violation(format!("recovery: {error}"));

        // It may be that not even the start succeeds.
        let fails_at_once = has_faults && random.chance(50);
        if fails_at_once {
            disk.plan_store_fault(random);
        }
        let mut storage = disk.open_store();
        let restored = records::recover(storage.as_mut())
            .map_err(|error| Failure::of_disk(fails_at_once, &error))?;
        let installed = restored.head.installed;
        let state = StateMachine::restore(restored);
        let (mut log, mut recovered) = disk.open_log();
        if installed {
            recover::complete_install(&mut log, &mut recovered, state.applied())
                .map_err(|error| violation(&error))?;
        }
        let log_may_fail = has_faults && random.chance(300);
        if log_may_fail {
            log.plan(log_fault(random));
        }
        let fails_later = has_faults && random.chance(300);
        let store_may_fail = fails_at_once || fails_later;
        if fails_later {
            disk.plan_store_fault(random);
        }

        let identity = recover::identity(&state);
        let applied = state.applied();
        let mut start = recover::start(&state, recovered);
        start.election_ticks = timing.election_ticks;
        start.pre_vote = timing.pre_vote;
        start.seed = random.next();
        start.catch_up_entries = timing.entries_kept;
        start.resume_ticks = timing.resume_ticks;
        let recovered_index = start.entries.last().map_or(start.start.index, |entry| entry.index);
        let mut node = Node::new(start).map_err(|error| violation(&error))?;
        node.planted.sends_before_fsync = planted == Planted::SendsBeforeFsync;
        node.planted.learners_vote = planted == Planted::LearnersVote;
        node.planted.ignores_refusals = planted == Planted::RefusedChangesCount;

        let metrics = METRICS.with(Arc::clone);
        let (fault, shortage) = (Fault::default(), Arc::new(Shortage::default()));
        let durable_revision = state.store().revision();
        let recovered_hash = At { index: applied.index, hash: state.rolling_hash() };
        let state = Arc::new(RwLock::new(state));
        let boot_clock = Arc::new(AtomicU64::new(0));
        let published = Arc::new(Published::with_clock(
            applied.index,
            applied.term,
            BootClock::Simulated(Arc::clone(&boot_clock)),
        ));
        published.set_members(&state.read());
        let waiters = Arc::new(Waiters::new(identity.member_id, boot));
        let leases = Arc::new(LeaseClock::new(Arc::clone(&published)));
        let pins = Arc::new(Pins::default());
        let (mailbox, raft_mailbox) = mpsc::channel();
        let (to_raft, raft_inputs) = mpsc::channel();
        let (log_sender, log_tasks) = mpsc::channel();
        let (apply_sender, committed) = mpsc::channel();
        let (apply_tasks, apply_receiver) = mpsc::channel();
        let (checkpoint_sender, checkpoint_tasks) = mpsc::channel();
        let to_checkpoint = checkpoint_sender.clone();
        let busy = Arc::new(AtomicBool::new(false));
        let (sent, forwards, wanted) = (Arc::default(), Arc::default(), Arc::default());

        let spools = Spools::open(None).map_err(|error| violation(&error))?;
        let header = {
            let published = Arc::clone(&published);
            Arc::new(move |revision| ResponseHeader {
                cluster_id: identity.cluster_id,
                member_id: identity.member_id,
                revision,
                raft_term: published.applied_term(),
            })
        };
        let watch_config = WatchConfig {
            progress_interval: Duration::from_millis(random.between(100, 1000)),
            max_request_bytes: 1 << 20,
            seed: random.next(),
        };
        let (hub, hub_handle, feed) =
            WatchHub::new(StateHistory(Arc::clone(&state)), header, watch_config);
        let compaction_hashes = Arc::new(CompactionHashes::default());
        // Nobody works hashes out: that takes threads.
        let (hashes, _) = hashes::hasher(Arc::clone(&state), compaction_hashes);

        let election_timeout = timing.tick * u32::try_from(timing.election_ticks).unwrap_or(1);
        let proposer = Arc::new(Proposer::new(
            to_raft.clone(),
            Arc::clone(&waiters),
            Arc::clone(&published),
            Arc::new(Forwards(Arc::clone(&forwards))),
            Arc::clone(&metrics),
            1 << 20,
            election_timeout,
        ));
        let checkpointer = Checkpointer::new(
            checkpoint_sender,
            Arc::clone(&busy),
            Arc::clone(&shortage),
            timing.snapshot_entries,
            applied.index,
            applied.index,
        );
        let checkpoint = CheckpointThread {
            storage: Some(storage),
            generations: Box::new(disk.clone()),
            state: Arc::clone(&state),
            pins: Arc::clone(&pins),
            tasks: checkpoint_tasks,
            log: log_sender.clone(),
            apply: apply_sender.clone(),
            durable_index: applied.index,
            overhead_bytes: 0,
            durable_revision,
            published: Arc::clone(&published),
            busy,
            shortage,
            directory: None,
            reopen: false,
            removed: Removed::default(),
            catch_up_entries: timing.entries_kept,
            snapshots: VecDeque::new(),
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        let log = LogThread {
            log: Box::new(log),
            tasks: log_tasks,
            raft: to_raft.clone(),
            fault: fault.clone(),
            sync_times: SyncTimes::new(timing.tick, election_timeout),
            has_peers: Box::new(|| false),
            metrics: Arc::clone(&metrics),
        };
        let apply = ApplyThread {
            rolling_hashes: Arc::new(RollingHashes::new(recovered_hash)),
            state: Arc::clone(&state),
            tasks: apply_receiver,
            raft: to_raft.clone(),
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            feed,
            leases: Arc::clone(&leases),
            pins: Arc::clone(&pins),
            recovered_index,
            hashes,
            checkpointer,
            pace: CompactionPace {
                keys_per_step: random.between(1, 20) as usize,
                pause: Duration::from_millis(random.between(1, 200)),
            },
            slow_apply: Duration::from_secs(3600),
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        let parts = RaftParts {
            node,
            mailbox: raft_mailbox,
            outbox: Box::new(Post { sent: Arc::clone(&sent), wanted: Arc::clone(&wanted) }),
            log: log_sender,
            apply: apply_sender,
            checkpoint: to_checkpoint.clone(),
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            metrics: Arc::clone(&metrics),
            fault: fault.clone(),
            tick: timing.tick,
            election_timeout,
            member: identity.member_id,
        };
        let duty = LeaseDuty {
            clock: Arc::clone(&leases),
            state: Arc::clone(&state),
            proposer: Arc::clone(&proposer),
            published: Arc::clone(&published),
            election_timeout,
            metrics,
        };
        let tasks: Vec<Task> = vec![Box::pin(hub.run()), Box::pin(unconstrained(duty.run()))];
        let began = tokio::time::Instant::now().into_std();
        let mut raft = RaftThread::new(parts, began);
        raft.begin(began).map_err(|error| violation(&error))?;
        drop(_context);
        Ok(Life {
            boot,
            runtime,
            tasks,
            clock_us: 0,
            behind_us: 0,
            boot_clock,
            began,
            raft,
            mailbox,
            to_raft,
            raft_inputs,
            raft_next: None,
            log,
            log_next: None,
            log_may_fail,
            apply,
            progress: None,
            apply_tasks,
            committed,
            checkpoint,
            checkpoint_next: None,
            under_way: UnderWay::default(),
            to_checkpoint,
            defragments: None,
            installed: false,
            store_may_fail,
            sent,
            forwards,
            wanted,
            sources: BTreeMap::new(),
            images: 0,
            installs: Vec::new(),
            spools,
            pins,
            refusals: Vec::new(),
            state,
            published,
            waiters,
            leases,
            proposer,
            hub: hub_handle,
            fault,
        })
    }

    /// The checkpoint does not fail any more, if it was to. The log may, once.
    pub(super) fn spare_disk(&self, disk: &Disk) {
        disk.spare_store();
    }

    /// The world's time at which this life began is `behind_us`.
    pub(super) fn set_behind(&mut self, behind_us: u64) {
        self.behind_us = behind_us;
    }

    /// For so long this machine was suspended.
    pub(super) fn suspended(&mut self, us: u64) {
        self.behind_us += us;
    }

    /// Moves this member's clock to the world's time. No timer runs out here, but in the next
    /// turn of the tasks.
    fn advance(&mut self, now_us: u64) {
        self.boot_clock.store(now_us, Ordering::Relaxed);
        let local = now_us.saturating_sub(self.behind_us);
        if local > self.clock_us {
            let by = Duration::from_micros(local - self.clock_us);
            self.clock_us = local;
            let _context = self.runtime.enter();
            let advance = pin!(tokio::time::advance(by));
            // Moves the clock, and then would give way.
            let _ = advance.poll(&mut Context::from_waker(Waker::noop()));
        }
    }

    fn now(&self) -> Instant {
        self.began + Duration::from_micros(self.clock_us)
    }

    pub(super) fn role(&self) -> Role {
        *self.published.role.borrow()
    }

    /// Raft's configuration, and as of which applied entry, when that can be said.
    pub(super) fn configuration(&self) -> Option<(u64, Configuration)> {
        self.raft.configuration()
    }

    pub(super) fn describe(&self) -> String {
        self.raft.describe()
    }

    pub(super) fn fault(&self) -> Option<String> {
        self.fault.get().map(|fatal| fatal.to_string())
    }

    pub(super) fn raft_has_work(&mut self) -> bool {
        if self.raft_next.is_none() {
            self.raft_next = self.raft_inputs.try_recv().ok();
        }
        self.raft_next.is_some()
    }

    pub(super) fn log_has_work(&mut self) -> bool {
        if self.log_next.is_none() {
            self.log_next = self.log.tasks.try_recv().ok();
        }
        self.log_next.is_some()
    }

    /// Asks for the checkpoint to be written anew; who asked before gives up.
    pub(super) fn defragment(&mut self) {
        let (done, receiver) = oneshot::channel();
        self.defragments = Some(receiver);
        let _ = self.to_checkpoint.send(CheckpointTask::Rewrite(done));
    }

    pub(super) fn checkpoint_has_work(&mut self) -> bool {
        if let Some(installing) = &self.under_way.installing {
            // It waits for another, and nothing else is done before.
            let installed = installing.wait.try_recv() == Ok(());
            self.installed |= installed;
            return self.installed;
        }
        if self.checkpoint_next.is_none() {
            self.checkpoint_next = self.under_way.next(&self.checkpoint.tasks);
        }
        // A cut that waits for space is tried again.
        self.checkpoint_next.is_some() || self.under_way.waits_for_space()
    }

    /// What raft has committed since, on its way to the apply thread.
    pub(super) fn take_committed(&mut self) -> Option<ApplyTask> {
        self.committed.try_recv().ok()
    }

    pub(super) fn hand_to_apply(&self, task: ApplyTask) {
        let _ = self.apply_tasks.send(task);
    }

    /// Makes the images that raft wants, and tells it.
    pub(super) fn make_images(&mut self) {
        for (to, first_index) in mem::take(&mut *self.wanted.lock()) {
            let kept = self.sources.remove(&to).filter(|source| source.index() >= first_index);
            let source = kept.unwrap_or_else(|| {
                self.images += 1;
                Source::new(self.boot ^ self.images, &self.state, &self.pins)
            });
            let mark = Mark { index: source.index(), term: source.term() };
            let configuration = source.configuration();
            self.sources.insert(to, source);
            // Raft may have forgotten that there is one.
            let _ = self.to_raft.send(RaftInput::SnapshotMade { to, mark, configuration });
        }
    }

    /// All of the image that goes with raft's message for a member.
    pub(super) fn image(&mut self, to: u64, mark: Mark) -> Option<(u64, Vec<Bytes>)> {
        let mut source = self.sources.remove(&to).filter(|source| source.index() == mark.index)?;
        let mut chunks = Vec::new();
        while let Some(chunk) = source.next_chunk().ok()? {
            chunks.push(chunk);
        }
        Some((source.id(), chunks))
    }

    /// An image has arrived; `false` when it is not taken.
    pub(super) fn receive_image(
        &mut self,
        from: (u64, u64),
        begin: SnapshotBegin,
        chunks: Vec<Bytes>,
    ) -> bool {
        let Ok(Some(mut spool)) = self.spools.begin() else { return false };
        let is_whole = chunks.into_iter().all(|chunk| spool.append(chunk).is_ok());
        if !is_whole || spool.verify().is_err() {
            return false;
        }
        let (done, receiver) = oneshot::channel();
        self.installs.push((from.0, from.1, receiver));
        let _ = self.to_raft.send(RaftInput::Snapshot(Arrived { spool, begin, done }));
        true
    }

    pub(super) fn raft_turn(&mut self, now_us: u64) -> Result<(), Failure> {
        self.advance(now_us);
        let now = self.now();
        let _context = self.runtime.enter();
        let inputs = self.raft_next.take().into_iter().chain(self.raft_inputs.try_iter());
        for input in inputs {
            let _ = self.mailbox.send(input);
        }
        let turn = self.raft.take_turn(None, now);
        turn.map(drop).map_err(|error| Failure::Violation(format!("raft stops: {error}")))
    }

    pub(super) fn log_turn(&mut self, now_us: u64) -> Result<(), Failure> {
        self.advance(now_us);
        let Some(first) = self.log_next.take() else { return Ok(()) };
        let turn = self.log.turn(first);
        turn.map(drop).map_err(|error| Failure::of_disk(self.log_may_fail, &error))
    }

    /// Returns whether more waits to be applied.
    pub(super) fn apply_turn(&mut self, now_us: u64) -> Result<bool, Failure> {
        self.advance(now_us);
        let _context = self.runtime.enter();
        let turn = self.apply.turn(&mut self.progress);
        turn.map_err(|error| Failure::Violation(format!("apply stops: {error}")))
    }

    pub(super) fn checkpoint_turn(&mut self, now_us: u64) -> Result<(), Failure> {
        self.advance(now_us);
        let _context = self.runtime.enter();
        if let Some(installing) = self.under_way.installing.take() {
            if mem::take(&mut self.installed) {
                self.under_way.installing = self.checkpoint.go_on_installing(installing);
            } else {
                self.under_way.installing = Some(installing);
            }
            return Ok(());
        }
        let task = self.checkpoint_next.take().ok_or(RecvTimeoutError::Timeout);
        let turn = self.checkpoint.turn(task, &mut self.under_way);
        turn.map(drop).map_err(|error| Failure::of_disk(self.store_may_fail, &error))
    }

    /// Runs proposals, leases' time and watches, as far as they come.
    pub(super) fn tasks_turn(&mut self, now_us: u64) {
        self.advance(now_us);
        let tasks = &mut self.tasks;
        self.runtime.block_on(async {
            for _ in 0..TASK_PASSES {
                let mut context = Context::from_waker(Waker::noop());
                tasks.retain_mut(|task| task.as_mut().poll(&mut context).is_pending());
                // Lets timers run out.
                tokio::task::yield_now().await;
            }
        });
    }

    /// Begins at once, rather than in the next turn of the tasks.
    pub(super) fn spawn_now(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        let _context = self.runtime.enter();
        let mut task: Task = Box::pin(unconstrained(task));
        if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.tasks.push(task);
        }
    }

    pub(super) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(Box::pin(unconstrained(task)));
    }
}
