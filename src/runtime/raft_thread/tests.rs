use std::sync::mpsc;

use parking_lot::Mutex;

use super::*;
use crate::log::Entry;
use crate::log::HardState;
use crate::raft::{Change, Kind, Start};

const TICK: Duration = Duration::from_millis(100);
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);

fn node(id: u64) -> Node {
    node_of(id, Configuration { voters: vec![1, 2], learners: vec![] })
}

fn node_of(id: u64, configuration: Configuration) -> Node {
    let begin = Mark { index: 1, term: 1 };
    let start = Start {
        id,
        election_ticks: 10,
        catch_up_entries: 5,
        resume_ticks: 0,
        pre_vote: true,
        seed: id,
        hard_state: HardState { term: 1, vote: 0, commit: 1 },
        start: begin,
        entries: vec![],
        applied: 1,
        configuration,
    };
    Node::new(start).expect("the parts agree")
}

#[derive(Clone, Default)]
struct Sent(Arc<Mutex<Vec<Outgoing>>>);

impl Sent {
    fn take(&self) -> Vec<Outgoing> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl Outbox for Sent {
    fn send(&mut self, message: Outgoing) -> bool {
        self.0.lock().push(message);
        true
    }

    fn make_snapshot(&mut self, _to: u64, _first_index: u64) {}
}

/// Has the other member hear what was sent, and answer.
fn answer(other: &mut Node, sent: &Sent, to_raft: &Sender<RaftInput>) {
    for message in sent.take() {
        other.step(&message.bytes).expect("a message of raft's");
        while let Some(effects) = other.effects().expect("effects") {
            if let Some(append) = effects.append {
                other.persisted(append.number);
            }
            for message in effects.messages {
                to_raft.send(RaftInput::Message(message.bytes)).expect("it is there");
            }
        }
    }
}

/// A thread without the others, and all that goes in and comes out.
struct Rig {
    thread: RaftThread,
    to_raft: Sender<RaftInput>,
    appends: Receiver<LogTask>,
    applies: Receiver<ApplyTask>,
    sent: Sent,
    published: Arc<Published>,
    _checkpoints: Receiver<CheckpointTask>,
}

impl Rig {
    fn new(node: Node, now: Instant) -> Rig {
        let (to_raft, mailbox) = mpsc::channel();
        let (log, appends) = mpsc::channel();
        let (apply, applies) = mpsc::channel();
        let (checkpoint, checkpoints) = mpsc::channel();
        let sent = Sent::default();
        let published = Arc::new(Published::new(1, 1));
        let parts = RaftParts {
            node,
            mailbox,
            outbox: Box::new(sent.clone()),
            log,
            apply,
            checkpoint,
            published: Arc::clone(&published),
            waiters: Arc::new(Waiters::new(1, 1)),
            metrics: Metrics::new().expect("metrics"),
            fault: Fault::default(),
            tick: TICK,
            election_timeout: ELECTION_TIMEOUT,
            member: 1,
        };
        let thread = RaftThread::new(parts, now);
        Rig { thread, to_raft, appends, applies, sent, published, _checkpoints: checkpoints }
    }

    fn tell(&self, input: RaftInput) {
        self.to_raft.send(input).expect("it is there");
    }

    fn turn(&mut self, now: Instant) {
        assert_eq!(self.thread.take_turn(None, now).expect("it goes on"), Flow::GoOn);
    }

    /// Persists what is appended, and returns what is committed, until there is no more.
    fn settle(&mut self, now: Instant) -> Vec<Entry> {
        let mut committed = Vec::new();
        loop {
            self.turn(now);
            let appended: Vec<LogTask> = self.appends.try_iter().collect();
            for task in self.applies.try_iter() {
                let ApplyTask::Entries(entries) = task else { panic!("not entries") };
                committed.extend(entries);
            }
            if appended.is_empty() {
                return committed;
            }
            for task in appended {
                let LogTask::Append(append) = task else { panic!("{task:?}") };
                self.tell(RaftInput::Persisted(append.number));
            }
        }
    }
}

/// A learner may have applied an entry, and told its client, before the leader has; and so may
/// one that was removed since, of entries that were committed by then.
#[test]
fn a_leader_reads_without_a_round_once_nobody_else_can_know_more() {
    let configuration = Configuration { voters: vec![1], learners: vec![2] };
    let now = Instant::now();
    let mut rig = Rig::new(node_of(1, configuration), now);
    rig.thread.begin(now).expect("it leads");
    rig.settle(now);
    assert!(rig.published.role.borrow().is_leader);
    let term = rig.published.role.borrow().term;
    rig.tell(RaftInput::Applied(2));
    rig.settle(now);
    assert!(rig.published.confirmed_ago().is_some(), "nobody else may lead");
    assert!(!rig.published.is_lone_leader(), "a learner hears what is committed");

    let propose = |sequence, change| RaftInput::Propose {
        proposal: Proposal { command: Bytes::from_static(b"entry"), change, sequence },
        term,
    };
    rig.tell(propose(1, Some(Change::Remove(2))));
    rig.tell(propose(2, None));
    let committed: Vec<u64> = rig.settle(now).iter().map(|entry| entry.index).collect();
    assert_eq!(committed, [3, 4]);
    rig.tell(RaftInput::Changed { index: 3, is_accepted: true });
    rig.tell(RaftInput::Applied(3));
    rig.settle(now);
    assert!(!rig.published.is_lone_leader(), "it may have heard of the entry behind its removal");
    rig.tell(RaftInput::Applied(4));
    rig.settle(now);
    assert!(rig.published.is_lone_leader());
    // What is committed from here on nobody else hears.
    rig.tell(propose(3, None));
    assert_eq!(rig.settle(now).len(), 1);
    rig.tell(RaftInput::Applied(4));
    rig.settle(now);
    assert!(rig.published.is_lone_leader());
    rig.tell(propose(4, Some(Change::Listen(3))));
    rig.settle(now);
    rig.tell(RaftInput::Changed { index: 6, is_accepted: true });
    rig.settle(now);
    assert!(!rig.published.is_lone_leader());
}

#[test]
fn a_leader_whose_disk_hangs_says_nothing_whatever_it_is_asked() {
    let mut now = Instant::now();
    let rig = Rig::new(node(1), now);
    let Rig { mut thread, to_raft, appends, sent, published, .. } = rig;
    let mut other = node(2);
    let mut turn = |now| assert_eq!(thread.take_turn(None, now).expect("it goes on"), Flow::GoOn);
    for _ in 0..60 {
        now += TICK;
        turn(now);
        for task in appends.try_iter() {
            let LogTask::Append(append) = task else { panic!("{task:?}") };
            to_raft.send(RaftInput::Persisted(append.number)).expect("it is there");
        }
        answer(&mut other, &sent, &to_raft);
    }
    assert!(published.role.borrow().is_leader);

    // The disk hangs, and the other does not take over: what it lacks never reaches it.
    let proposal = Proposal { command: Bytes::from_static(b"one"), change: None, sequence: 1 };
    let term = published.role.borrow().term;
    to_raft.send(RaftInput::Propose { proposal, term }).expect("it is there");
    turn(now);
    assert_eq!(appends.try_iter().count(), 1);
    let hangs_since = now;
    while now < hangs_since + 2 * ELECTION_TIMEOUT {
        sent.0.lock().retain(|message| message.kind == Kind::Urgent);
        answer(&mut other, &sent, &to_raft);
        now += TICK;
        turn(now);
    }
    assert!(published.role.borrow().is_leader);
    sent.take();
    let (reply, _confirmed) = oneshot::channel();
    to_raft.send(RaftInput::ReadIndex(reply)).expect("it is there");
    now += TICK;
    turn(now);
    assert_eq!(sent.take(), [], "the heartbeat of a read keeps the other from electing, too");
}
