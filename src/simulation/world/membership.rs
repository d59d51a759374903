//! Members come and go while everything else goes wrong.
//!
//! ```text
//!   operator  ── add ──▶ committed ── starts it ──▶ a machine with an empty disk ◀── an image
//!             ── promote, update ──▶
//!             ── remove ──▶ committed ─▶ applied there, or told by others ── a while ──▶ gone
//! ```
//!
//! An operator asks any member, with the checks of `engine/members.rs` before the proposal
//! (which is above this room's clock, and takes ids from the time of day). Whoever was added
//! is started, whether the operator was told or not: to list the members tells. It is made as
//! the server makes one that joins, from what a majority knows.
//!
//! A member that was removed goes on until it has applied that, or is told, and for a while
//! then. Who has applied it refuses what it says, as `api/peer.rs` does; in some seeds raft
//! hears its messages all the same, and has to stand them.

use std::mem;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::super::judge::Asked;
use super::{Event, MS, Machine, Packet, SECOND, World, bootstrap};
use crate::error::Error;
use crate::pb::kvorumpb::{
    MemberChange, MemberPublish, MemberRecord, MembersResponse, command::Request,
    member_change::Change,
};
use crate::runtime::recover::{self, Bootstrap};
use crate::state::StateMachine;
use crate::state::members::{Members, member_id};
use crate::state::reconfig::{self, HEALTHY_AFTER, View};

/// A seed has so many machines at most, the removed ones included: nobody is added then.
const MACHINES_MAX: usize = 12;
/// A cluster of the simulator has so many voters at most.
const VOTERS_MAX: usize = 5;
/// `--max-learners`, of whoever is asked.
const LEARNERS_MAX: u64 = 2;
/// A member that knows that it was removed goes on for less than this.
const FAREWELL_US: u64 = 3 * SECOND;

impl World {
    /// The machines of those who belong to the cluster now.
    pub(super) fn members(&self) -> impl Iterator<Item = &Machine> {
        self.machines.iter().filter(|machine| self.is_member(machine))
    }

    pub(super) fn is_member(&self, machine: &Machine) -> bool {
        self.judge.roll.last().get(machine.id).is_some()
    }

    /// The operator does something, and will again.
    pub(super) fn change(&mut self) {
        let Some(change_us) = self.nature.change_us.filter(|_| !self.calm) else { return };
        let next = self.random.below(change_us * 2);
        self.schedule(next, Event::Change);
        if self.random.chance(700) {
            self.start_the_added();
        }
        let member = self.random.index(self.machines.len());
        let Some(life) = &self.machines[member].life else { return };
        let members = life.state.read().members().clone();
        let leader = self.member_of(life.role().leader);
        let voters = members.voters().count();
        let records = members.records();
        let Some(any) = records.get(self.random.index(records.len().max(1))) else { return };
        let learner = members.learners().next().map(|learner| learner.id);
        let kind = self.random.below(100);
        match (kind, learner) {
            // Twice is once too often.
            (0..=4, _) => self.make(member, Change::Promote(any.id)),
            (5..=34, Some(id)) => self.promote(leader.unwrap_or(member), id),
            (72..=75, _) => {
                let peer_urls = self.urls(&members);
                let record = MemberRecord { id: any.id, peer_urls, ..MemberRecord::default() };
                self.make(member, Change::Update(record));
            }
            (5..=71, _) if voters < VOTERS_MAX && self.named < MACHINES_MAX => {
                self.add(member, &members);
            }
            (76..=99, _) => {
                let id = match leader.map(|leader| self.machines[leader].id) {
                    Some(id) if self.random.chance(300) => id,
                    _ => any.id,
                };
                if self.is_safe(member, &members, |view| view.may_remove(id)) {
                    self.make(member, Change::Remove(id));
                }
            }
            _ => {}
        }
    }

    /// New URLs, or now and then some that are taken.
    fn urls(&mut self, members: &Members) -> Vec<String> {
        self.named += 1;
        let taken = members.records().pop().filter(|_| self.random.chance(100));
        taken.map_or_else(
            || vec![format!("http://10.0.0.{}:2380", self.named)],
            |member| member.peer_urls,
        )
    }

    fn add(&mut self, member: usize, members: &Members) {
        let peer_urls = self.urls(members);
        let is_learner = self.random.chance(600);
        let id = member_id(&peer_urls, &(self.now / SECOND).to_string());
        let change = Change::Add(MemberRecord { id, peer_urls, is_learner, ..Default::default() });
        if !self.is_safe(member, members, |view| view.may_add(is_learner)) {
            return;
        }
        if !is_learner {
            return self.make(member, change);
        }
        let Some(life) = &self.machines[member].life else { return };
        let (proposer, state) = (Arc::clone(&life.proposer), Arc::clone(&life.state));
        self.ask(member, Asked::Change(change.clone()), async move {
            proposer.read_barrier().await?;
            {
                let state = state.read();
                state.members().check(&change)?;
                reconfig::check_learner_limit(state.members(), LEARNERS_MAX)?;
            }
            proposer.propose(request(change)).await
        });
    }

    /// Through the leader, who knows how far the learner is; without asking it where nobody
    /// is strict.
    fn promote(&mut self, leader: usize, id: u64) {
        let Some(life) = &self.machines[leader].life else { return };
        let members = life.state.read().members().clone();
        let (proposer, published) = (Arc::clone(&life.proposer), Arc::clone(&life.published));
        if !self.is_safe(leader, &members, |view| view.may_promote()) {
            return;
        }
        let (is_strict, this) = (self.nature.strict, self.machines[leader].id);
        let change = Change::Promote(id);
        self.ask(leader, Asked::Change(change.clone()), async move {
            let progress = published.progress();
            let matched = |id| progress.iter().find(|of| of.id == id).map(|of| of.matched);
            let progress = matched(id)
                .zip(matched(this))
                .map(|(matched, leader_matched)| reconfig::Progress { matched, leader_matched });
            if is_strict && !progress.is_some_and(reconfig::Progress::is_in_sync) {
                return Err(Error::LearnerNotReady);
            }
            proposer.propose(request(change)).await
        });
    }

    fn make(&mut self, member: usize, change: Change) {
        self.propose(member, Asked::Change(change.clone()), request(change));
    }

    /// What `--strict-reconfig-check` asks, where it is set: a member takes for connected who
    /// lives and is not cut off from it.
    fn is_safe(
        &self,
        member: usize,
        members: &Members,
        may: impl FnOnce(&View) -> Result<(), Error>,
    ) -> bool {
        let connected = |id| {
            let other = self.member_of(id)?;
            let is_connected = self.machines[other].life.is_some()
                && !self.cut[member][other]
                && !self.cut[other][member];
            is_connected.then_some(HEALTHY_AFTER + Duration::from_secs(1))
        };
        let view = View { members, this: self.machines[member].id, connected: &connected };
        !self.nature.strict || may(&view).is_ok()
    }

    /// Starts whoever belongs to the cluster and has no machine.
    pub(super) fn start_the_added(&mut self) {
        for record in self.judge.roll.last().records() {
            if self.member_of(record.id).is_some() {
                continue;
            }
            let machine = Machine::new(self.joining(record.id), &mut self.random);
            self.machines.push(machine);
            let machines = self.machines.len();
            for (row, lag) in self.cut.iter_mut().zip(&mut self.lag) {
                row.push(false);
                lag.push(0);
            }
            self.cut.push(vec![false; machines]);
            self.lag.push(vec![0; machines]);
            let after = self.random.below(200 * MS);
            self.schedule(after, Event::Start(machines - 1));
        }
    }

    /// The first state of one that joins.
    fn joining(&self, id: u64) -> StateMachine {
        let members = self.judge.roll.last();
        let named = |member: &MemberRecord| (format!("{:x}", member.id), member.peer_urls.clone());
        let running =
            MembersResponse { cluster_id: members.cluster_id(), members: members.records() };
        let bootstrap = Bootstrap {
            initial_cluster: members.records().iter().map(named).collect(),
            name: format!("{id:x}"),
            joins: true,
            running: Some(running),
            max_learners: MACHINES_MAX as u64,
            ..bootstrap(0, 0)
        };
        recover::first_state(&bootstrap, Path::new("(none)")).expect("it was added")
    }

    /// One that has joined tells the others its name, as often as it starts.
    pub(super) fn publish(&mut self, member: usize) {
        let id = self.machines[member].id;
        let is_nameless = |members: &Members| members.get(id).is_some_and(|of| of.name.is_empty());
        if self.nature.change_us.is_some() && is_nameless(self.judge.roll.last()) {
            let name = format!("{id:x}");
            let publish = MemberPublish { id, name, client_urls: Vec::new() };
            self.propose(member, Asked::Untagged, Request::MemberPublish(publish));
        }
    }

    /// Whether a member refuses another, because it knows that it was removed.
    pub(super) fn refuses(&mut self, member: usize, from: usize, is_raft: bool) -> bool {
        let id = self.machines[from].id;
        let Some(life) = &self.machines[member].life else { return false };
        if !life.published.is_removed(id) || is_raft && self.hears_removed() {
            return false;
        }
        if let Some(life) = &self.machines[from].life
            && self.random.chance(300)
        {
            let packet = Packet::Removed { to: from, boot: life.boot };
            self.send(packet);
        }
        true
    }

    fn hears_removed(&self) -> bool {
        self.nature.hears_removed && !self.calm
    }

    /// Whether everybody who votes knows that a member was removed, and refuses it.
    pub(super) fn is_unheard(&self, member: usize) -> bool {
        let (members, id) = (self.judge.roll.last(), self.machines[member].id);
        let knows = |voter: &MemberRecord| {
            let life = self.member_of(voter.id).and_then(|of| self.machines[of].life.as_ref());
            life.is_some_and(|life| life.published.is_removed(id))
        };
        members.is_removed(id) && !self.hears_removed() && members.voters().all(knows)
    }

    /// A member that knows that it was removed has a while to live.
    pub(super) fn say_farewell(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        let Some(life) = &machine.life else { return };
        if life.published.is_removed(machine.id) && !mem::replace(&mut machine.leaves, true) {
            let boot = life.boot;
            let after = self.random.below(FAREWELL_US);
            self.schedule(after, Event::Farewell { member, boot });
        }
    }

    /// A member that was removed stops, for good, unless another cannot do without it yet.
    pub(super) fn leave(&mut self, member: usize) {
        let machine = &mut self.machines[member];
        if !self.judge.roll.is_needed(machine.id) {
            machine.gone = true;
            return self.crash(member);
        }
        machine.leaves = true;
        if let Some(life) = &machine.life {
            let boot = life.boot;
            self.schedule(SECOND, Event::Farewell { member, boot });
        }
    }
}

fn request(change: Change) -> Request {
    Request::MemberChange(MemberChange { change: Some(change) })
}
