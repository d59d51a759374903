use std::sync::mpsc;

use parking_lot::Mutex;

use super::*;
use crate::log::HardState;
use crate::raft::{Kind, Start};

const TICK: Duration = Duration::from_millis(100);
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);

fn node(id: u64) -> Node {
    let begin = Mark { index: 1, term: 1 };
    let start = Start {
        id,
        election_ticks: 10,
        catch_up_entries: 5,
        pre_vote: true,
        seed: id,
        hard_state: HardState { term: 1, vote: 0, commit: 1 },
        start: begin,
        entries: vec![],
        applied: 1,
        configuration: Configuration { voters: vec![1, 2], learners: vec![] },
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

#[test]
fn a_leader_whose_disk_hangs_says_nothing_whatever_it_is_asked() {
    let (to_raft, mailbox) = mpsc::channel();
    let (log, appends) = mpsc::channel();
    let (apply, _applies) = mpsc::channel();
    let (checkpoint, _checkpoints) = mpsc::channel();
    let sent = Sent::default();
    let published = Arc::new(Published::new(1, 1));
    let parts = RaftParts {
        node: node(1),
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
    let mut now = Instant::now();
    let mut thread = RaftThread::new(parts, now);
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
