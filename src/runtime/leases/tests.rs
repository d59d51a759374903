use std::sync::mpsc::{self, Receiver};

use super::super::proposer::Forwarder;
use super::super::raft_thread::{Proposal, RaftInput};
use super::super::waiters::Waiters;
use super::*;
use crate::log::Mark;
use crate::pb::etcdserverpb::LeaseGrantRequest;
use crate::pb::kvorumpb::Command;
use crate::raft::Role;
use crate::state::Effects;
use crate::state::members::Members;

const LEADER: Role = Role { leader: 1, is_leader: true, term: 3 };
const FOLLOWER: Role = Role { leader: 2, is_leader: false, term: 4 };
const NO_TIME: Duration = Duration::ZERO;

/// A leader that has yet to take its leases over: a long one, and one that is overdue as
/// soon as it has a deadline. Nobody ends leases but the test.
struct Rig {
    clock: Arc<LeaseClock>,
    proposer: Arc<Proposer>,
    published: Arc<Published>,
    state: RwLock<StateMachine>,
    /// Raft's, where nobody reads.
    _mailbox: Receiver<RaftInput>,
}

const LONG: i64 = 7;
const OVERDUE: i64 = 8;
const UNKNOWN: i64 = 9;

fn rig() -> Rig {
    let members = Members::bootstrap(&[("default".to_owned(), Vec::new())], "etcd-cluster");
    let mut state = StateMachine::bootstrap(1, members, "3.7.0".to_owned());
    for (index, (id, ttl)) in [(1, (LONG, 60)), (2, (OVERDUE, 0))] {
        let request = Some(Request::LeaseGrant(LeaseGrantRequest { id, ttl }));
        let command = Command { header: None, request };
        state.apply(Mark { index, term: 3 }, command, &mut Effects::default()).unwrap();
    }
    let published = Arc::new(Published::new(2, 3));
    published.role.send_replace(LEADER);
    published.set_confirmed(published.boot_clock().now());
    let (sender, mailbox) = mpsc::channel();
    let proposer = Arc::new(Proposer::new(
        sender,
        Arc::new(Waiters::new(1, 1)),
        Arc::clone(&published),
        Arc::new(Nobody),
        Metrics::new().unwrap(),
        1024,
        Duration::from_secs(1),
    ));
    Rig {
        clock: Arc::new(LeaseClock::new(Arc::clone(&published))),
        proposer,
        published,
        state: RwLock::new(state),
        _mailbox: mailbox,
    }
}

/// Nobody else leads.
struct Nobody;

impl Forwarder for Nobody {
    fn forward(&self, leader: u64, _term: u64, _proposal: Proposal) {
        panic!("sent to {leader}");
    }
}

impl Rig {
    fn take_over(&self) {
        self.clock.take_over(&self.state, NO_TIME);
    }

    fn end(&self, id: i64) {
        self.clock.take_note(&[LeaseChange::Revoked(id)], self.state.read().lessor());
    }

    /// Sends a keepalive, and lets it come as far as it comes.
    async fn keep_alive(&self, id: i64) -> tokio::task::JoinHandle<Result<i64, Error>> {
        let (clock, proposer) = (Arc::clone(&self.clock), Arc::clone(&self.proposer));
        let asked = tokio::spawn(async move { clock.keep_alive(id, &proposer).await });
        settle().await;
        asked
    }
}

/// Gives the one other task its turns.
async fn settle() {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_keepalive_of_an_overdue_lease_is_answered_when_the_lease_is_gone() {
    let rig = rig();
    rig.take_over();
    let asked = rig.keep_alive(OVERDUE).await;
    // The end of another is none of its business.
    rig.end(LONG);
    settle().await;
    assert!(!asked.is_finished(), "the lease and its keys are still there");
    rig.end(OVERDUE);
    assert_eq!(asked.await.unwrap(), Ok(0));
}

#[tokio::test(start_paused = true)]
async fn a_keepalive_waits_no_longer_than_any_request() {
    let rig = rig();
    rig.take_over();
    let began = tokio::time::Instant::now();
    assert_eq!(rig.keep_alive(OVERDUE).await.await.unwrap(), Err(Error::Timeout));
    let waited = began.elapsed();
    let limit = rig.proposer.request_timeout();
    // The clock stands still but for what is waited for, to the timer's millisecond.
    let slack = Duration::from_millis(10);
    assert!(limit <= waited && waited <= limit + slack, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_keepalive_that_waits_is_told_that_this_member_leads_no_more_or_stops() {
    let rig = rig();
    rig.take_over();
    let asked = rig.keep_alive(OVERDUE).await;
    rig.published.role.send_replace(FOLLOWER);
    rig.clock.demote();
    assert_eq!(asked.await.unwrap(), Err(Error::NoLeader));
    assert_eq!(rig.keep_alive(LONG).await.await.unwrap(), Err(Error::NoLeader));

    rig.published.role.send_replace(LEADER);
    rig.take_over();
    let asked = rig.keep_alive(OVERDUE).await;
    rig.published.set_stopped();
    assert_eq!(asked.await.unwrap(), Err(Error::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_keepalive_waits_until_its_leader_has_taken_over() {
    let rig = rig();
    let asked = [rig.keep_alive(LONG).await, rig.keep_alive(UNKNOWN).await];
    // Leads, and begins to take over: what is not there yet may still come.
    rig.clock.deadlines.lock().expiry.promote();
    rig.clock.changed.send_replace(());
    settle().await;
    assert!(asked.iter().all(|asked| !asked.is_finished()));
    rig.take_over();
    let [long, unknown] = asked;
    assert_eq!(long.await.unwrap(), Ok(60));
    assert_eq!(unknown.await.unwrap(), Ok(0));
}

#[tokio::test(start_paused = true)]
async fn deadlines_are_asked_for_once_they_are_there() {
    let rig = rig();
    let (clock, proposer) = (Arc::clone(&rig.clock), Arc::clone(&rig.proposer));
    let asked = tokio::spawn(async move { clock.taken_over(&proposer).await });
    settle().await;
    assert!(!asked.is_finished(), "a lease that exists has no deadline yet");
    rig.take_over();
    assert_eq!(asked.await.unwrap(), Ok(()));
    assert!(rig.clock.remaining(LONG).is_some());
}
