//! The queue of events, the network, the faults, and the clients. Who comes and goes is in
//! [`membership`].

mod membership;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::mem;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::mpsc::error::TryRecvError;

use super::disk::Disk;
use super::judge::{Asked, Cursor, Ended, Judge, Op};
use super::member::{Life, Timing};
use super::random::{Random, mix};
use super::{Failure, Planted, Summary};
use crate::error::Error;
use crate::log::Mark;
use crate::log::{HardState, LogStore as _};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchProgressRequest,
    WatchRequest, request_op,
};
use crate::pb::kvorumpb::command::Request;
use crate::pb::kvorumpb::{Refusal, SnapshotBegin};
use crate::pb::mvccpb::KeyValue;
use crate::raft::Kind;
use crate::runtime::apply_thread::ApplyTask;
use crate::runtime::forwarder;
use crate::runtime::raft_thread::{Proposal, RaftInput};
use crate::runtime::records;
use crate::runtime::recover::{self, Bootstrap};
use crate::runtime::watch_hub::WatchStream;
use crate::state::{Outcome, StateMachine};

const MS: u64 = 1000;
const SECOND: u64 = 1000 * MS;
/// When nothing fails any more, the cluster has so long to come to its end.
const LIVENESS_US: u64 = 60 * SECOND;
/// An operation of the end may take so long, in which nothing fails.
const LAST_WRITE: Duration = Duration::from_secs(10);

/// How bad this seed is. Chances are per mille.
#[derive(Debug)]
struct Nature {
    members: usize,
    timing: Timing,
    chaos_us: u64,
    loss: u64,
    duplicates: u64,
    min_delay_us: u64,
    delay_us: u64,
    /// How many of the operations are linearizable reads.
    reads: u64,
    /// Messages that take very long.
    strays: u64,
    fsync_us: u64,
    apply_us: u64,
    fault_us: u64,
    op_us: u64,
    keys: u64,
    /// It is over only when all leases are.
    outlives_leases: bool,
    /// How often the members change, if they do.
    change_us: Option<u64>,
    /// Whether it is asked before whether a change is safe: `--strict-reconfig-check`.
    strict: bool,
    /// Whether raft hears what members that were removed say, as if nobody refused them.
    hears_removed: bool,
}

impl Nature {
    fn draw(random: &mut Random) -> Nature {
        // Some never truncate their log, others all the time.
        let (snapshot_entries, entries_kept) = if random.chance(400) {
            (1 << 40, 1 << 40)
        } else {
            (random.between(3, 40), random.below(30))
        };
        // Members on several continents.
        let is_far = random.chance(100);
        let tick_ms = if is_far { 100 } else { random.between(20, 100) };
        Nature {
            members: if random.chance(700) { 3 } else { 5 },
            timing: Timing {
                tick: Duration::from_millis(tick_ms),
                election_ticks: if is_far { 20 } else { random.between(5, 11) as usize },
                pre_vote: random.chance(800),
                snapshot_entries,
                entries_kept,
                // Not drawn, or every seed would be another one from here on.
                resume_ticks: snapshot_entries,
            },
            chaos_us: random.between(3, 9) * SECOND,
            loss: if random.chance(500) { random.below(100) } else { 0 },
            duplicates: if random.chance(500) { random.below(100) } else { 0 },
            min_delay_us: if is_far { random.between(50, 120) * MS } else { 100 },
            delay_us: random.between(1, 10) * MS,
            strays: if random.chance(500) { random.below(100) } else { 0 },
            fsync_us: random.between(1, 20) * MS,
            apply_us: random.between(1, 10) * MS,
            fault_us: random.between(100, 1500) * MS,
            op_us: random.between(5, 60) * MS,
            keys: random.between(1, 8),
            reads: if random.chance(300) { 700 } else { 200 },
            outlives_leases: random.chance(150),
            change_us: random.chance(300).then(|| random.between(50, 600) * MS),
            strict: random.chance(300),
            hears_removed: random.chance(300),
        }
    }
}

/// What happens to a member by itself; only in the life that it was scheduled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Raft,
    Log,
    Apply,
    Checkpoint,
    Tasks,
    Tick,
}

#[derive(Debug)]
enum Packet {
    Raft {
        from: usize,
        to: usize,
        bytes: Bytes,
    },
    Forward {
        from: usize,
        boot: u64,
        to: usize,
        term: u64,
        proposal: Proposal,
    },
    Refusal {
        to: usize,
        boot: u64,
        refusal: Refusal,
    },
    Image {
        from: usize,
        boot: u64,
        to: usize,
        begin: SnapshotBegin,
        chunks: Vec<Bytes>,
    },
    /// What became of an image; to a life of its sender.
    ImageSent {
        to: usize,
        boot: u64,
        id: u64,
        is_in_force: bool,
    },
    /// A life is told that its member was removed.
    Removed {
        to: usize,
        boot: u64,
    },
}

impl Packet {
    /// From where and to where, if it is not an answer.
    fn to(&self) -> Option<(usize, usize)> {
        match self {
            Packet::Raft { from, to, .. } | Packet::Forward { from, to, .. } => Some((*from, *to)),
            // Calls fail by themselves.
            Packet::Refusal { .. }
            | Packet::Image { .. }
            | Packet::ImageSent { .. }
            | Packet::Removed { .. } => None,
        }
    }
}

#[derive(Debug)]
enum Event {
    Turn { member: usize, boot: u64, turn: Turn },
    Packet(Packet),
    Client,
    Fault,
    Change,
    Farewell { member: usize, boot: u64 },
    Start(usize),
    Wake { member: usize, suspended: bool },
    Heal,
    FastAgain(usize),
    Calm,
}

struct Scheduled {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Scheduled) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Scheduled) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Scheduled) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A client's watch of all keys.
struct Watching {
    stream: WatchStream,
    start: i64,
    cursor: Cursor,
}

/// One machine: what survives a crash, and the life on it.
struct Machine {
    id: u64,
    disk: Disk,
    boots: u64,
    life: Option<Life>,
    /// Which turns are in the queue.
    scheduled: [bool; 6],
    /// While it sleeps: since when, and what happens when it wakes.
    asleep: Option<u64>,
    deferred: Vec<Event>,
    /// Its disk is slower by this factor.
    slowness: u64,
    watching: Option<Watching>,
    last_revision: i64,
    last_compact: i64,
    applied_seen: u64,
    /// Whether it knows that it was removed, and stops soon.
    leaves: bool,
    /// It was removed, and does not start again.
    gone: bool,
}

impl Machine {
    /// One that has never run, with a member's first state on its disk.
    fn new(mut state: StateMachine, random: &mut Random) -> Machine {
        let disk = Disk::new(recover::identity(&state), random);
        let start = state.applied();
        if start.index > 0 {
            let (mut log, _) = disk.open_log();
            log.install(start, HardState::of_start(start)).expect("an empty log");
        }
        records::fill(disk.open_store().as_mut(), &state.cut()).expect("an empty store");
        Machine {
            id: state.member_id(),
            disk,
            boots: 0,
            life: None,
            scheduled: [false; 6],
            asleep: None,
            deferred: Vec::new(),
            slowness: 1,
            watching: None,
            last_revision: 0,
            last_compact: -1,
            applied_seen: 0,
            leaves: false,
            gone: false,
        }
    }
}

type Done = Arc<Mutex<Vec<(u64, Ended)>>>;

/// See the module documentation.
pub(super) struct World {
    random: Random,
    nature: Nature,
    planted: Planted,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    machines: Vec<Machine>,
    /// Whether what one sends reaches the other.
    cut: Vec<Vec<bool>>,
    /// By how much it comes later, in microseconds.
    lag: Vec<Vec<u64>>,
    calm: bool,
    judge: Judge,
    ops: BTreeMap<u64, Op>,
    done: Done,
    next_tag: u64,
    leases: Vec<(i64, i64)>,
    events: u64,
    crashes: u64,
    last_writes: Vec<u64>,
    wrote_last: bool,
    /// Members that were asked for, the first ones included.
    named: usize,
}

fn bootstrap(members: usize, name: usize) -> Bootstrap {
    let url = |member: usize| vec![format!("http://10.0.0.{member}:2380")];
    Bootstrap {
        initial_cluster: (0..members).map(|m| (format!("m{m}"), url(m))).collect(),
        cluster_token: "simulation".to_owned(),
        name: format!("m{name}"),
        cluster_version: "3.7.0".to_owned(),
        joins: false,
        running: None,
        max_learners: 1,
        force_new_cluster: false,
        import_etcd_data: false,
    }
}

fn first_state(members: usize, name: usize) -> StateMachine {
    recover::first_state(&bootstrap(members, name), Path::new("(none)"))
        .expect("the member is one of them")
}

impl World {
    pub(super) fn new(seed: u64, planted: Planted) -> World {
        let mut random = Random::new(seed);
        let nature = Nature::draw(&mut random);
        let members = nature.members;
        let machines = (0..members).map(|name| first_state(members, name));
        let machines = machines.map(|state| Machine::new(state, &mut random));
        let machines = machines.collect();
        World {
            random,
            planted,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            machines,
            cut: vec![vec![false; members]; members],
            lag: vec![vec![0; members]; members],
            calm: false,
            judge: Judge::new(Box::new(move || first_state(members, 0))),
            ops: BTreeMap::new(),
            done: Done::default(),
            next_tag: 1,
            leases: Vec::new(),
            events: 0,
            crashes: 0,
            last_writes: Vec::new(),
            wrote_last: false,
            named: members,
            nature,
        }
    }

    fn schedule(&mut self, after: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { at: self.now + after, order: self.order, event }));
    }

    fn member_of(&self, id: u64) -> Option<usize> {
        self.machines.iter().position(|machine| machine.id == id)
    }

    /// Lives through it all.
    pub(super) fn live(mut self) -> Result<Summary, String> {
        match self.live_on() {
            Ok(()) => Ok(Summary {
                trace: self.judge.trace,
                events: self.events,
                entries: self.judge.last_index(),
                terms: self.judge.leader_count() as u64,
                crashes: self.crashes,
                reopened: self.machines.iter().map(|machine| machine.disk.reopened()).sum(),
                checked: self.judge.checked(),
            }),
            Err(Failure::Violation(what)) => {
                Err(format!("at {} µs, event {}: {what}", self.now, self.events))
            }
            Err(Failure::Crash) => Err("a crash of nobody".to_owned()),
        }
    }

    fn live_on(&mut self) -> Result<(), Failure> {
        for member in 0..self.machines.len() {
            let after = self.random.below(100 * MS);
            self.schedule(after, Event::Start(member));
        }
        self.schedule(100 * MS, Event::Client);
        let first_fault = self.random.below(self.nature.fault_us * 2);
        self.schedule(first_fault, Event::Fault);
        if let Some(change_us) = self.nature.change_us {
            self.schedule(change_us, Event::Change);
        }
        let chaos_us = self.nature.chaos_us;
        self.schedule(chaos_us, Event::Calm);
        while let Some(Reverse(Scheduled { at, event, .. })) = self.queue.pop() {
            self.now = at;
            self.events += 1;
            self.happen(event)?;
            if self.calm && self.is_over() {
                break;
            }
            if self.now > self.nature.chaos_us + LIVENESS_US {
                return Err(Failure::Violation(self.stuck()));
            }
        }
        for machine in self.members() {
            let Some(life) = &machine.life else { continue };
            self.judge.is_at_end(machine.id, &life.state.read())?;
        }
        Ok(())
    }

    fn stuck(&self) -> String {
        let members = self.machines.iter().map(|machine| match &machine.life {
            Some(life) => {
                let applied = life.state.read().applied();
                let (role, raft) = (life.role(), life.describe());
                format!("{:x}: {role:?}, applied {applied:?}, {raft}", machine.id)
            }
            None => format!("{:x} is dead", machine.id),
        });
        let members: Vec<_> = members.collect();
        format!(
            "the cluster does not come to an end: {members:?}, committed {}, writes left {:?}",
            self.judge.last_index(),
            self.last_writes
        )
    }

    /// Whether all is as it should be once nothing fails.
    fn is_over(&self) -> bool {
        let end = self.judge.last_index();
        let is_done = |machine: &Machine| {
            let life = machine.life.as_ref();
            let watching = machine.watching.as_ref();
            let knows = |life: &Life| life.configuration().is_some_and(|(index, _)| index == end);
            life.is_some_and(|life| life.state.read().applied().index == end && knows(life))
                && watching.is_none_or(|watching| self.judge.is_told(&watching.cursor))
        };
        self.wrote_last
            && self.ops.is_empty()
            && !(self.nature.outlives_leases && self.judge.has_leases())
            && self.members().count() == self.judge.roll.last().records().len()
            && self.members().all(is_done)
    }

    fn happen(&mut self, event: Event) -> Result<(), Failure> {
        // Who sleeps sees it later.
        let of = match &event {
            Event::Turn { member, .. } => Some(*member),
            Event::Packet(
                Packet::Raft { to, .. }
                | Packet::Forward { to, .. }
                | Packet::Refusal { to, .. }
                | Packet::Image { to, .. }
                | Packet::ImageSent { to, .. }
                | Packet::Removed { to, .. },
            ) => Some(*to),
            _ => None,
        };
        if let Some(member) = of
            && self.machines[member].asleep.is_some()
        {
            self.machines[member].deferred.push(event);
            return Ok(());
        }
        match event {
            Event::Turn { member, boot, turn } => self.take_turn(member, boot, turn),
            Event::Packet(packet) => self.deliver(packet),
            Event::Client => self.client(),
            Event::Fault => self.fault(),
            Event::Change => {
                self.change();
                Ok(())
            }
            Event::Farewell { member, boot } => {
                if self.machines[member].life.as_ref().is_some_and(|life| life.boot == boot) {
                    self.leave(member);
                }
                Ok(())
            }
            Event::Start(member) => self.start(member),
            Event::Wake { member, suspended } => {
                self.wake(member, suspended);
                Ok(())
            }
            Event::Heal => {
                self.heal();
                Ok(())
            }
            Event::FastAgain(member) => {
                self.machines[member].slowness = 1;
                Ok(())
            }
            Event::Calm => self.calm_down(),
        }
    }

    // Members.

    fn start(&mut self, member: usize) -> Result<(), Failure> {
        let now = self.now;
        let machine = &mut self.machines[member];
        if machine.life.is_some() || machine.gone {
            return Ok(());
        }
        machine.boots += 1;
        // Never the same twice.
        let boot = mix(machine.id ^ mix(machine.boots)) ^ self.random.next();
        let timing = &self.nature.timing;
        let faults = !self.calm;
        let begun =
            Life::begin(&machine.disk, boot, timing, self.planted, faults, &mut self.random);
        let mut life = match begun {
            Ok(life) => life,
            Err(Failure::Crash) => {
                machine.disk.cut_power(&mut self.random);
                self.crashes += 1;
                self.schedule(50 * MS, Event::Start(member));
                return Ok(());
            }
            Err(failure) => return Err(failure),
        };
        life.set_behind(now);
        {
            let state = life.state.read();
            self.judge.recovered(machine.id, &state)?;
            machine.last_revision = state.store().revision();
            machine.last_compact = state.store().compact_revision();
            machine.applied_seen = state.applied().index;
        }
        self.judge.note(7 ^ (member as u64) << 8 ^ machine.applied_seen << 16);
        machine.life = Some(life);
        machine.leaves = false;
        machine.scheduled = [false; 6];
        self.turn_later(member, Turn::Tick, 0);
        self.say_farewell(member);
        self.publish(member);
        self.look_after(member)
    }

    /// The member dies, and what was not synced is lost.
    fn crash(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        let Some(life) = machine.life.take() else { return };
        let senders: Vec<_> = life.installs.iter().map(|(from, boot, _)| (*from, *boot)).collect();
        drop(life);
        let id = machine.id;
        self.crashes += 1;
        self.judge.note(8 ^ (member as u64) << 8);
        machine.disk.cut_power(&mut self.random);
        machine.watching = None;
        machine.asleep = None;
        // Nor does an image arrive that was on its way to it.
        let deferred = mem::take(&mut machine.deferred);
        machine.scheduled = [false; 6];
        machine.slowness = 1;
        // Who sent it an image sees the call fail.
        for event in deferred {
            if let Event::Packet(Packet::Image { from, boot, .. }) = event {
                let packet = Packet::ImageSent { to: from, boot, id, is_in_force: false };
                self.schedule(5 * MS, Event::Packet(packet));
            }
        }
        for (from, boot) in senders {
            if let Some(to) = self.member_of(from) {
                let packet = Packet::ImageSent { to, boot, id, is_in_force: false };
                self.schedule(5 * MS, Event::Packet(packet));
            }
        }
        // Whoever asked it hears nothing any more.
        let boots = self.machines[member].boots;
        self.ops.retain(|_, op| op.at != (member, boots));
        if self.wrote_last {
            // They are to be written again.
            self.wrote_last = false;
            self.last_writes.clear();
            self.schedule(200 * MS, Event::Client);
        }
        if !self.machines[member].gone {
            let after = if self.calm { 10 * MS } else { self.random.between(10, 2000) * MS };
            self.schedule(after, Event::Start(member));
        }
        // Others may see the connection break.
        let id = self.machines[member].id;
        for other in 0..self.machines.len() {
            if other != member
                && self.random.chance(500)
                && let Some(life) = &self.machines[other].life
            {
                let _ = life.to_raft.send(RaftInput::Unreachable { id, is_broken: true });
                self.turn_later(other, Turn::Raft, MS);
            }
        }
    }

    fn turn_later(&mut self, member: usize, turn: Turn, after: u64) {
        let machine = &mut self.machines[member];
        let Some(life) = &machine.life else { return };
        if mem::replace(&mut machine.scheduled[turn as usize], true) {
            return;
        }
        let boot = life.boot;
        self.schedule(after, Event::Turn { member, boot, turn });
    }

    fn take_turn(&mut self, member: usize, boot: u64, turn: Turn) -> Result<(), Failure> {
        let now = self.now;
        let machine = &mut self.machines[member];
        let Some(life) = machine.life.as_mut().filter(|life| life.boot == boot) else {
            return Ok(());
        };
        machine.scheduled[turn as usize] = false;
        self.judge.note(turn as u64 ^ (member as u64) << 8 ^ now << 16);
        let went = match turn {
            Turn::Raft => life.raft_turn(now),
            Turn::Log => life.log_turn(now),
            Turn::Checkpoint => life.checkpoint_turn(now),
            Turn::Apply => match life.apply_turn(now) {
                Ok(more) => {
                    if more {
                        self.turn_later(member, Turn::Apply, 0);
                    }
                    self.turn_later(member, Turn::Checkpoint, 5 * MS);
                    Ok(())
                }
                Err(failure) => Err(failure),
            },
            Turn::Tasks => {
                life.tasks_turn(now);
                Ok(())
            }
            Turn::Tick => {
                let tick = self.nature.timing.tick.as_micros() as u64;
                self.turn_later(member, Turn::Tick, tick);
                self.turn_later(member, Turn::Raft, 0);
                self.turn_later(member, Turn::Apply, 0);
                self.turn_later(member, Turn::Tasks, 0);
                Ok(())
            }
        };
        match went {
            Ok(()) => {}
            Err(Failure::Crash) => {
                self.crash(member);
                return Ok(());
            }
            Err(failure) => return Err(failure),
        }
        if matches!(turn, Turn::Raft | Turn::Apply) {
            let after = self.random.below(MS);
            self.turn_later(member, Turn::Tasks, after);
        }
        self.look_after(member)?;
        if turn == Turn::Raft {
            self.look_at_configuration(member)?;
        }
        if turn == Turn::Apply {
            self.look_at_state(member)?;
            self.say_farewell(member);
        }
        if turn == Turn::Tasks {
            self.hear(member)?;
        }
        Ok(())
    }

    /// Carries on what a turn led to.
    fn look_after(&mut self, member: usize) -> Result<(), Failure> {
        let machine = &mut self.machines[member];
        let Some(life) = machine.life.as_mut() else { return Ok(()) };
        let id = machine.id;
        if let Some(fault) = life.fault() {
            return Err(Failure::Violation(format!("{id:x} stops: {fault}")));
        }
        self.judge.leads(id, life.role())?;
        let applies = self.commit(member)?;
        let machine = &mut self.machines[member];
        let Some(life) = machine.life.as_mut() else { return Ok(()) };
        life.make_images();
        let mut installed = Vec::new();
        life.installs.retain_mut(|(from, boot, receiver)| match receiver.try_recv() {
            Ok(()) => {
                installed.push((*from, *boot, true));
                false
            }
            Err(tokio::sync::oneshot::error::TryRecvError::Empty) => true,
            Err(_) => {
                installed.push((*from, *boot, false));
                false
            }
        });
        let boot = life.boot;
        let (raft, log) = (life.raft_has_work(), life.log_has_work());
        let checkpoint = life.checkpoint_has_work();
        let sent = mem::take(&mut *life.sent.lock());
        let forwards = mem::take(&mut *life.forwards.lock());
        let mut refusals = Vec::new();
        life.refusals.retain_mut(|(from, boot, receiver)| match receiver.try_recv() {
            Ok(refusal) => {
                refusals.push((*from, *boot, refusal));
                false
            }
            Err(error) => error == TryRecvError::Empty,
        });
        let slowness = machine.slowness;
        if raft {
            let after = self.random.below(MS / 2);
            self.turn_later(member, Turn::Raft, after);
        }
        if log {
            let after = (1 + self.random.below(self.nature.fsync_us)) * slowness;
            self.turn_later(member, Turn::Log, after);
        }
        if applies {
            let after = self.random.below(self.nature.apply_us);
            self.turn_later(member, Turn::Apply, after);
        }
        if checkpoint {
            let after = self.random.between(1, 50) * MS * slowness;
            self.turn_later(member, Turn::Checkpoint, after);
        }
        for message in sent {
            if let Kind::Snapshot(mark) = message.kind {
                self.send_image(member, message.to, mark, message.bytes);
                continue;
            }
            if let Some(to) = self.member_of(message.to) {
                let bytes = message.bytes;
                if self.random.chance(self.nature.duplicates) && !self.calm {
                    self.send(Packet::Raft { from: member, to, bytes: bytes.clone() });
                }
                self.send(Packet::Raft { from: member, to, bytes });
            }
        }
        for forward in forwards {
            if let Some(to) = self.member_of(forward.leader) {
                let (term, proposal) = (forward.term, forward.proposal);
                self.send(Packet::Forward { from: member, boot, to, term, proposal });
            }
        }
        for (from, boot, is_in_force) in installed {
            if let Some(to) = self.member_of(from) {
                self.schedule(MS, Event::Packet(Packet::ImageSent { to, boot, id, is_in_force }));
            }
        }
        for (from, boot, refusal) in refusals {
            if let Some(to) = self.member_of(from) {
                self.send(Packet::Refusal { to, boot, refusal });
            }
        }
        Ok(())
    }

    /// Passes on what raft takes for committed, once the judge has seen it.
    fn commit(&mut self, member: usize) -> Result<bool, Failure> {
        let mut applies = false;
        while let Some(task) = self.machines[member].life.as_mut().and_then(Life::take_committed) {
            let machines = &self.machines;
            if let ApplyTask::Entries(entries) = &task {
                let holders = |entry: Mark| {
                    let holding = machines.iter().filter(|machine| machine.disk.holds(entry));
                    holding.map(|machine| machine.id).collect()
                };
                self.judge.committed(machines[member].id, entries, self.now, &holders)?;
            }
            if let Some(life) = &machines[member].life {
                life.hand_to_apply(task);
            }
            applies = true;
        }
        if applies && self.calm {
            self.start_the_added();
        }
        Ok(applies)
    }

    fn look_at_configuration(&self, member: usize) -> Result<(), Failure> {
        let machine = &self.machines[member];
        let configuration = machine.life.as_ref().and_then(Life::configuration);
        let Some((index, configuration)) = configuration else { return Ok(()) };
        self.judge.configured(machine.id, index, &configuration)
    }

    fn look_at_state(&mut self, member: usize) -> Result<(), Failure> {
        let machine = &mut self.machines[member];
        let Some(life) = &machine.life else { return Ok(()) };
        let state = life.state.read();
        let (revision, compact) = (state.store().revision(), state.store().compact_revision());
        if revision < machine.last_revision || compact < machine.last_compact {
            return Err(Failure::Violation(format!("{:x} goes back in time", machine.id)));
        }
        (machine.last_revision, machine.last_compact) = (revision, compact);
        if state.applied().index != machine.applied_seen {
            machine.applied_seen = state.applied().index;
            self.judge.compare(machine.id, &state)?;
        }
        Ok(())
    }

    // The network.

    fn send(&mut self, packet: Packet) {
        let lossless = self.calm;
        let mut delay = self.nature.min_delay_us + self.random.below(self.nature.delay_us);
        if !lossless {
            delay += packet.to().map_or(0, |(from, to)| self.lag[from][to]);
            if self.random.chance(self.nature.loss) {
                return;
            }
            if self.random.chance(self.nature.strays) {
                delay += self.random.below(600 * MS);
            }
        }
        self.schedule(delay, Event::Packet(packet));
    }

    /// An image goes out with raft's message, or does not.
    fn send_image(&mut self, member: usize, id: u64, mark: Mark, message: Bytes) {
        let to = self.member_of(id);
        let Some(life) = &mut self.machines[member].life else { return };
        let boot = life.boot;
        let fails = !self.calm && self.random.chance(200);
        let delay = self.random.between(1, 300) * MS;
        let image = life.image(id, mark).filter(|_| !fails);
        let packet = match to.zip(image) {
            Some((to, (image, chunks))) => {
                let Mark { index, term } = mark;
                let begin = SnapshotBegin { id: image, index, term, message };
                Packet::Image { from: member, boot, to, begin, chunks }
            }
            None => Packet::ImageSent { to: member, boot, id, is_in_force: false },
        };
        self.schedule(delay, Event::Packet(packet));
    }

    fn deliver(&mut self, packet: Packet) -> Result<(), Failure> {
        match packet {
            Packet::Raft { from, to, bytes } => {
                if self.cut[from][to] || self.refuses(to, from, true) {
                    return Ok(());
                }
                if let Some(life) = &self.machines[to].life {
                    let _ = life.to_raft.send(RaftInput::Message(bytes));
                    let after = self.random.below(MS / 4);
                    self.turn_later(to, Turn::Raft, after);
                }
            }
            Packet::Forward { from, boot, to, term, proposal } => {
                if self.cut[from][to] || self.refuses(to, from, false) {
                    return Ok(());
                }
                let from = self.machines[from].id;
                if let Some(life) = &mut self.machines[to].life {
                    let (refusals, receiver) = tokio::sync::mpsc::unbounded_channel();
                    let input = RaftInput::Forwarded { proposal, term, refusals };
                    let _ = life.to_raft.send(input);
                    life.refusals.push((from, boot, receiver));
                    self.turn_later(to, Turn::Raft, 0);
                }
            }
            Packet::Image { from, boot, to, begin, chunks } => {
                let (sender, id) = (self.machines[from].id, self.machines[to].id);
                let reaches =
                    !self.cut[from][to] && !self.cut[to][from] && !self.refuses(to, from, false);
                let life = self.machines[to].life.as_mut().filter(|_| reaches);
                let is_taken =
                    life.is_some_and(|life| life.receive_image((sender, boot), begin, chunks));
                if is_taken {
                    self.turn_later(to, Turn::Raft, 0);
                } else {
                    let packet = Packet::ImageSent { to: from, boot, id, is_in_force: false };
                    self.schedule(MS, Event::Packet(packet));
                }
            }
            Packet::Removed { to, boot } => {
                if self.machines[to].life.as_ref().is_some_and(|life| life.boot == boot) {
                    self.leave(to);
                }
            }
            Packet::ImageSent { to, boot, id, is_in_force } => {
                if let Some(life) = self.machines[to].life.as_ref().filter(|l| l.boot == boot) {
                    let _ = life.to_raft.send(RaftInput::SnapshotSent { to: id, is_in_force });
                    self.turn_later(to, Turn::Raft, 0);
                }
            }
            Packet::Refusal { to, boot, refusal } => {
                if let Some(life) = self.machines[to].life.as_ref().filter(|l| l.boot == boot) {
                    life.waiters.refuse(refusal.sequence, forwarder::reason(refusal.reason()));
                    self.turn_later(to, Turn::Tasks, 0);
                }
            }
        }
        Ok(())
    }

    // What goes wrong.

    fn fault(&mut self) -> Result<(), Failure> {
        if self.calm {
            return Ok(());
        }
        let next = self.random.below(self.nature.fault_us * 2);
        self.schedule(next, Event::Fault);
        let members = self.machines.len();
        let member = self.random.index(members);
        self.judge.note(9);
        match self.random.below(22) {
            20..=21 => {
                // A way that is long for a while, there or back.
                let other = self.random.index(members);
                self.lag[member][other] = self.random.between(20, 400) * MS;
                let after = self.random.between(200, 2500) * MS;
                self.schedule(after, Event::Heal);
            }
            0..=3 => self.crash(member),
            4 => (0..members).for_each(|member| self.crash(member)),
            5..=6 => self.sleep(member),
            // The one that matters most.
            7..=9 => {
                let leads = |machine: &Machine| {
                    machine.life.as_ref().is_some_and(|life| life.role().is_leader)
                };
                if let Some(leader) = self.machines.iter().position(leads) {
                    match self.random.below(3) {
                        0 => self.crash(leader),
                        1 => self.sleep(leader),
                        _ => self.isolate(leader),
                    }
                }
            }
            10 => self.isolate(member),
            11 => {
                // Two parts.
                let parts = self.random.next();
                self.cut_where(|a, b| (parts >> a ^ parts >> b) & 1 == 1);
            }
            12 => {
                // One sees all, and the others fall into two parts.
                let parts = self.random.next();
                let bridge = member;
                self.cut_where(|a, b| {
                    a != bridge && b != bridge && (parts >> a ^ parts >> b) & 1 == 1
                });
            }
            13 => {
                // One way.
                let to_it = self.random.chance(500);
                self.cut_where(|a, b| if to_it { b == member } else { a == member });
            }
            14 => {
                let other = self.random.index(members);
                self.cut_where(|a, b| a == member && b == other);
            }
            15..=16 => {
                self.machines[member].slowness = self.random.between(5, 200);
                let after = self.random.between(50, 2000) * MS;
                self.schedule(after, Event::FastAgain(member));
            }
            17 => {
                let to = self.machines[self.random.index(members)].id;
                self.tell(member, RaftInput::Transfer(to));
            }
            18 => self.tell(member, RaftInput::Resign),
            _ => {
                let id = self.machines[self.random.index(members)].id;
                let is_broken = self.random.chance(500);
                self.tell(member, RaftInput::Unreachable { id, is_broken });
            }
        }
        Ok(())
    }

    fn tell(&mut self, member: usize, input: RaftInput) {
        if let Some(life) = &self.machines[member].life {
            let _ = life.to_raft.send(input);
            self.turn_later(member, Turn::Raft, 0);
        }
    }

    fn isolate(&mut self, member: usize) {
        self.cut_where(|a, b| a == member || b == member);
    }

    fn cut_where(&mut self, is_cut: impl Fn(usize, usize) -> bool) {
        for (a, row) in self.cut.iter_mut().enumerate() {
            for (b, cut) in row.iter_mut().enumerate() {
                *cut = is_cut(a, b);
            }
        }
        let after = self.random.between(50, 2500) * MS;
        self.schedule(after, Event::Heal);
    }

    fn heal(&mut self) {
        self.lag.iter_mut().flatten().for_each(|lag| *lag = 0);
        self.cut.iter_mut().flatten().for_each(|cut| *cut = false);
    }

    /// Stops for a while: as a process whose clock goes on, or as a machine that has none.
    fn sleep(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        if machine.asleep.is_some() || machine.life.is_none() {
            return;
        }
        machine.asleep = Some(self.now);
        let suspended = self.random.chance(300);
        let after = self.random.between(20, 4000) * MS;
        self.schedule(after, Event::Wake { member, suspended });
    }

    fn wake(&mut self, member: usize, suspended: bool) {
        let now = self.now;
        let machine = &mut self.machines[member];
        let Some(since) = machine.asleep.take() else { return };
        if suspended && let Some(life) = &mut machine.life {
            life.suspended(now - since);
        }
        for event in mem::take(&mut machine.deferred) {
            let after = self.random.below(MS);
            self.schedule(after, event);
        }
    }

    /// Nothing goes wrong from now on.
    fn calm_down(&mut self) -> Result<(), Failure> {
        self.calm = true;
        self.heal();
        for member in 0..self.machines.len() {
            self.wake(member, false);
            let machine = &mut self.machines[member];
            machine.slowness = 1;
            if let Some(life) = &machine.life {
                life.spare_disk(&machine.disk);
            } else {
                self.schedule(10 * MS, Event::Start(member));
            }
        }
        self.start_the_added();
        // Time for those that have just woken.
        self.schedule(SECOND, Event::Client);
        Ok(())
    }

    // Clients.

    fn client(&mut self) -> Result<(), Failure> {
        if self.calm {
            return self.write_last();
        }
        let next = self.random.below(self.nature.op_us * 2);
        self.schedule(next, Event::Client);
        let member = self.random.index(self.machines.len());
        if self.machines[member].life.is_none() {
            return Ok(());
        }
        let key = Bytes::from(format!("k{}", self.random.below(self.nature.keys)));
        if self.random.chance(self.nature.reads) {
            self.read(member, key, true);
            return Ok(());
        }
        let tag = self.next_tag;
        match self.random.below(80) {
            0..=29 => {
                let lease = match self.leases.last() {
                    Some((id, _)) if self.random.chance(200) => *id,
                    _ => 0,
                };
                self.propose(member, Asked::Write, Request::Put(put(key, tag, lease)));
            }
            30..=39 => self.propose(member, Asked::Write, Request::Txn(compare_and_put(key, tag))),
            40..=45 => self.propose(member, Asked::Write, Request::Txn(delete(key, tag))),
            46..=49 => self.read(member, key, false),
            50..=54 => {
                let (id, ttl) = (tag as i64, self.random.between(1, 4) as i64);
                self.leases.push((id, ttl));
                let asked = Asked::Grant { id, ttl };
                self.propose(member, asked, Request::LeaseGrant(LeaseGrantRequest { ttl, id }));
            }
            55..=63 => self.keep_alive(member),
            64 => {
                if let Some(&(id, _)) = self.leases.last() {
                    let request = Request::LeaseRevoke(LeaseRevokeRequest { id });
                    self.propose(member, Asked::Untagged, request);
                }
            }
            65..=66 => {
                let back = self.random.below(20) as i64;
                let revision = (self.judge.revision() - back).max(1);
                let request = CompactionRequest { revision, physical: false };
                self.propose(member, Asked::Untagged, Request::Compaction(request));
            }
            67..=70 => self.watch(member),
            71 => {
                if let Some(life) = &mut self.machines[member].life {
                    life.defragment();
                    self.turn_later(member, Turn::Checkpoint, 0);
                }
            }
            _ => self.ask_for_progress(member),
        }
        Ok(())
    }

    /// Once nothing fails, a write and a read succeed through every member.
    fn write_last(&mut self) -> Result<(), Failure> {
        let end = self.judge.last_index();
        let has_leader = self
            .members()
            .all(|machine| machine.life.as_ref().is_some_and(|life| life.role().leader != 0));
        if self.wrote_last && self.last_writes.is_empty() {
            return Ok(());
        }
        if !has_leader || !self.ops.is_empty() {
            self.judge.note(end);
            self.schedule(200 * MS, Event::Client);
            return Ok(());
        }
        self.wrote_last = true;
        let is_member = |member: &usize| self.is_member(&self.machines[*member]);
        let members: Vec<usize> = (0..self.machines.len()).filter(is_member).collect();
        for member in members {
            let tag = self.next_tag;
            self.last_writes.push(tag);
            let request = Request::Put(put(Bytes::from_static(b"last"), tag, 0));
            self.propose(member, Asked::Write, request);
            self.last_writes.push(self.next_tag);
            self.read(member, Bytes::from_static(b"last"), true);
        }
        Ok(())
    }

    /// Begins an operation; how it ends arrives in `done`.
    fn begin(&mut self, member: usize, asked: Asked) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        let at = (member, self.machines[member].boots);
        let after = self.judge.acknowledged;
        let unheard = self.is_unheard(member).then_some(self.crashes);
        self.ops.insert(tag, Op { tag, asked, began_us: self.now, after, at, unheard });
        let wait = self.random.below(MS);
        self.turn_later(member, Turn::Tasks, wait);
        tag
    }

    fn patience(&mut self) -> Duration {
        if self.calm {
            return LAST_WRITE;
        }
        Duration::from_millis(self.random.between(50, 4000))
    }

    fn propose(&mut self, member: usize, asked: Asked, request: Request) {
        let Some(life) = &self.machines[member].life else { return };
        let proposer = Arc::clone(&life.proposer);
        self.ask(member, asked, async move { proposer.propose(request).await });
    }

    /// Has a member do what ends in an outcome.
    fn ask(
        &mut self,
        member: usize,
        asked: Asked,
        answer: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let tag = self.begin(member, asked);
        let patience = self.patience();
        let done = Arc::clone(&self.done);
        let Some(life) = &mut self.machines[member].life else { return };
        life.spawn(async move {
            let ended = match tokio::time::timeout(patience, answer).await {
                Err(_) => Ended::GaveUp,
                Ok(Ok(response)) => Ended::Outcome(Ok(response)),
                Ok(Err(error)) if error.is_ambiguous() => Ended::GaveUp,
                Ok(Err(Error::TooManyRequests | Error::DeadlineExceeded)) => Ended::Failed,
                Ok(Err(error)) => Ended::Outcome(Err(error)),
            };
            done.lock().push((tag, ended));
        });
    }

    fn read(&mut self, member: usize, key: Bytes, linearizable: bool) {
        let tag = self.begin(member, Asked::Read { key: key.clone(), linearizable });
        let patience = self.patience();
        let done = Arc::clone(&self.done);
        let Some(life) = &mut self.machines[member].life else { return };
        let (proposer, state) = (Arc::clone(&life.proposer), Arc::clone(&life.state));
        life.spawn(async move {
            let barrier =
                async { if linearizable { proposer.read_barrier().await } else { Ok(()) } };
            let ended = match tokio::time::timeout(patience, barrier).await {
                Ok(Ok(())) => {
                    let state = state.read();
                    let revision = state.store().revision();
                    let version = state.store().get(&key, revision);
                    let value = version.and_then(|version| {
                        KeyValue::decode(version.kv.clone()).ok().map(|record| record.value)
                    });
                    Ended::Read { applied: state.applied().index, revision, value }
                }
                _ => Ended::GaveUp,
            };
            done.lock().push((tag, ended));
        });
    }

    /// Where its client takes the leader to be.
    fn keep_alive(&mut self, member: usize) {
        let Some(life) = &self.machines[member].life else { return };
        let role = life.role();
        let leader = if self.random.chance(800) { self.member_of(role.leader) } else { None };
        let member = leader.unwrap_or(member);
        if self.leases.is_empty() || self.machines[member].life.is_none() {
            return;
        }
        let recent = self.random.index(self.leases.len().min(3));
        let (id, ttl) = self.leases[self.leases.len() - 1 - recent];
        let tag = self.begin(member, Asked::KeepAlive { id, ttl });
        let patience = self.patience();
        let done = Arc::clone(&self.done);
        let Some(life) = &mut self.machines[member].life else { return };
        let (proposer, leases) = (Arc::clone(&life.proposer), Arc::clone(&life.leases));
        life.spawn(async move {
            let kept = async { leases.keep_alive(id, &proposer).await };
            let ended = match tokio::time::timeout(patience, kept).await {
                Ok(Ok(ttl)) => Ended::KeptAlive(ttl > 0),
                _ => Ended::GaveUp,
            };
            done.lock().push((tag, ended));
        });
    }

    /// Watches all keys, from where the last watch of this member ended, or from the past, or
    /// from now on.
    fn watch(&mut self, member: usize) {
        let compact = self.judge.compact_revision();
        let revision = self.judge.revision();
        let start = match self.random.below(4) {
            0 => 0,
            1 => revision + 1,
            _ => self.random.between(0, revision.unsigned_abs() + 1) as i64,
        };
        let start = if self.random.chance(900) && start != 0 { start.max(compact) } else { start };
        let start = start.max(0);
        let progress_notify = self.random.chance(500);
        let machine = &mut self.machines[member];
        let Some(life) = &mut machine.life else { return };
        let stream = life.hub.open_stream();
        let everything = Bytes::from_static(b"\0");
        let create = WatchCreateRequest {
            key: everything.clone(),
            range_end: everything,
            start_revision: start,
            progress_notify,
            ..WatchCreateRequest::default()
        };
        let requests = stream.requests.clone();
        life.spawn(async move {
            let request_union = Some(RequestUnion::CreateRequest(create));
            let _ = requests.send(WatchRequest { request_union }).await;
        });
        machine.watching = Some(Watching { stream, start, cursor: Cursor::default() });
        let wait = self.random.below(MS);
        self.turn_later(member, Turn::Tasks, wait);
    }

    fn ask_for_progress(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        let (Some(life), Some(watching)) = (&mut machine.life, &machine.watching) else { return };
        let requests = watching.stream.requests.clone();
        life.spawn_now(async move {
            let request_union = Some(RequestUnion::ProgressRequest(WatchProgressRequest {}));
            let _ = requests.send(WatchRequest { request_union }).await;
        });
        let wait = self.random.below(5 * MS);
        self.turn_later(member, Turn::Tasks, wait);
    }

    /// What the clients of a member were told.
    fn hear(&mut self, member: usize) -> Result<(), Failure> {
        let now = self.now;
        let machine = &mut self.machines[member];
        if let Some(Watching { stream, start, cursor }) = &mut machine.watching {
            while let Some(response) = stream.responses.try_recv() {
                self.judge.watched(cursor, *start, &response)?;
            }
            if cursor.ended {
                machine.watching = None;
            }
        }
        let done = mem::take(&mut *self.done.lock());
        for (tag, ended) in done {
            let Some(op) = self.ops.remove(&tag) else { continue };
            if let Some(position) = self.last_writes.iter().position(|last| *last == tag) {
                if !matches!(ended, Ended::Outcome(Ok(_)) | Ended::Read { .. }) {
                    // A member that is sent a snapshot gives up what waits: once more.
                    self.wrote_last = false;
                    self.schedule(200 * MS, Event::Client);
                }
                self.last_writes.remove(position);
            }
            self.judge.ended(&op, ended, now, self.crashes)?;
        }
        Ok(())
    }
}

/// A value that has the operation's tag in it.
fn value(tag: u64) -> Bytes {
    Bytes::copy_from_slice(&tag.to_be_bytes())
}

fn put(key: Bytes, tag: u64, lease: i64) -> PutRequest {
    PutRequest {
        key,
        value: value(tag),
        lease,
        prev_kv: tag.is_multiple_of(3),
        ..Default::default()
    }
}

fn op(request: request_op::Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// Puts, if the key has few versions; else reads it.
fn compare_and_put(key: Bytes, tag: u64) -> TxnRequest {
    let compare = Compare {
        result: CompareResult::Less as i32,
        target: CompareTarget::Version as i32,
        key: key.clone(),
        target_union: Some(TargetUnion::Version(3)),
        ..Compare::default()
    };
    let range = RangeRequest { key: key.clone(), ..RangeRequest::default() };
    TxnRequest {
        compare: vec![compare],
        success: vec![op(request_op::Request::RequestPut(put(key, tag, 0)))],
        failure: vec![op(request_op::Request::RequestRange(range))],
    }
}

/// Deletes, and leaves its tag at another key.
fn delete(key: Bytes, tag: u64) -> TxnRequest {
    let gone = DeleteRangeRequest { key, prev_kv: true, ..DeleteRangeRequest::default() };
    let mark = put(Bytes::from_static(b"deleted"), tag, 0);
    TxnRequest {
        compare: Vec::new(),
        success: vec![
            op(request_op::Request::RequestDeleteRange(gone)),
            op(request_op::Request::RequestPut(mark)),
        ],
        failure: Vec::new(),
    }
}
