//! What must be true, whatever happens.
//!
//! The judge sees every entry that any member takes for committed. The first to hand one out
//! decides what it is; everybody else must have the same. A state machine of its own applies
//! them once and in order, and says what every member's state, every answer, every read and
//! every event has to be. Who belongs to the cluster is in [`super::roll`].
//!
//! **A member that was removed** hears nothing more, once the leader knows it, and need not
//! learn why. A leader that has yet to apply the change still takes what it asks, and rightly:
//! what comes of that is committed by those who are left. So whatever it answers is judged as
//! everybody's answers are: a write has to be in the log of the others, a read must not miss
//! one. What is asked of it when all who vote have applied its removal, and none of them is
//! set back by a crash meanwhile, it must not answer at all, right or wrong
//! ([`Op::unheard`]).

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message as _;

use super::Failure;
use super::random::mix;
use super::roll::{Changes, Roll};
use crate::log::{Entry, Mark};
use crate::pb::etcdserverpb::request_op;
use crate::pb::etcdserverpb::{RequestOp, WatchResponse};
use crate::pb::kvorumpb::{Command, command::Request, member_change::Change};
use crate::pb::mvccpb::{Event, KeyValue};
use crate::raft::{self, Configuration, Role};
use crate::state::{Effects, LeaseChange, Outcome, Response, StateMachine};

/// States are compared at indexes that are multiples of this, and after every start.
const COMPARED_EVERY: u64 = 16;
/// What only some seeds do is done so many times less often.
const SELDOM: u64 = 10;

/// One change of a key, as every watcher must see it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    revision: i64,
    key: Bytes,
    /// `None`: deleted.
    value: Option<Bytes>,
}

/// What a client keeps of a lease.
#[derive(Debug, Default, Clone, Copy)]
struct LeaseView {
    /// It lives until then at least, in microseconds of the world's time.
    until_us: u64,
    /// It was ended because its time was up.
    expired_us: Option<u64>,
}

/// What an operation asked for.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Write,
    Read { key: Bytes, linearizable: bool },
    Grant { id: i64, ttl: i64 },
    KeepAlive { id: i64, ttl: i64 },
    Change(Change),
    Untagged,
}

/// An operation under way.
#[derive(Debug, Clone)]
pub(super) struct Op {
    pub(super) tag: u64,
    pub(super) asked: Asked,
    pub(super) began_us: u64,
    /// Everything up to this index was acknowledged to somebody before it began.
    pub(super) after: u64,
    /// Through which member, in which of its lives.
    pub(super) at: (usize, u64),
    /// Everybody who votes knew already that this member was removed; and how many crashes
    /// there had been by then, after which somebody may have forgotten it for a while.
    pub(super) unheard: Option<u64>,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Ended {
    Outcome(Outcome),
    Read {
        applied: u64,
        revision: i64,
        value: Option<Bytes>,
    },
    /// Whether there is such a lease.
    KeptAlive(bool),
    /// Nobody knows.
    GaveUp,
    /// It certainly has not happened.
    Failed,
}

impl Ended {
    /// Whether a member cannot know it of itself.
    fn is_of_the_cluster(&self, op: &Op) -> bool {
        match self {
            Ended::Outcome(outcome) => outcome.is_ok(),
            Ended::Read { .. } => matches!(op.asked, Asked::Read { linearizable: true, .. }),
            // A leader needs to have been confirmed lately, not now; what that is worth is judged
            // with the leases.
            Ended::KeptAlive(_) | Ended::GaveUp | Ended::Failed => false,
        }
    }
}

/// Where a watcher is.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    /// Position in the list of all changes.
    at: Option<usize>,
    /// Told so far.
    pub(super) revision: i64,
    pub(super) ended: bool,
}

/// How often what was checked.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Writes that were answered with what came of them.
    pub(super) writes: u64,
    /// Linearizable reads that were answered.
    pub(super) reads: u64,
    pub(super) keepalives: u64,
    /// Leases whose time was up.
    pub(super) expired: u64,
    /// Events told to watchers.
    pub(super) watched: u64,
    /// Responses that say how far a watch is.
    pub(super) progress: u64,
    /// States that were compared with the judge's.
    pub(super) compared: u64,
    /// Members that were added, made voters, and removed.
    pub(super) added: u64,
    pub(super) promoted: u64,
    pub(super) removed: u64,
    /// Changes of the members that were answered.
    pub(super) changed: u64,
    /// Operations that were asked of a member when all knew that it was removed.
    pub(super) unheard: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Counts) {
        self.writes += other.writes;
        self.reads += other.reads;
        self.keepalives += other.keepalives;
        self.expired += other.expired;
        self.watched += other.watched;
        self.progress += other.progress;
        self.compared += other.compared;
        self.added += other.added;
        self.promoted += other.promoted;
        self.removed += other.removed;
        self.changed += other.changed;
        self.unheard += other.unheard;
    }

    /// Whether nothing was left out. Of what only some seeds do a part is enough.
    pub(super) fn all_above(&self, least: u64) -> bool {
        let Counts { writes, reads, keepalives, expired, watched, progress, compared, .. } = *self;
        let Counts { added, promoted, removed, changed, unheard, .. } = *self;
        let counts = [writes, reads, keepalives, expired, watched, progress, compared];
        let of_some = [added, promoted, removed, changed, unheard];
        counts.iter().all(|count| *count > least)
            && of_some.iter().all(|count| *count > least / SELDOM)
    }
}

/// See the module documentation.
pub(super) struct Judge {
    base: u64,
    entries: Vec<Entry>,
    model: StateMachine,
    hashes: BTreeMap<u64, u32>,
    /// The revision after each entry.
    revisions: Vec<i64>,
    changes: Vec<Seen>,
    history: BTreeMap<Bytes, Vec<(i64, Option<Bytes>)>>,
    /// What came of the operation of a tag, and at which index.
    applied: BTreeMap<u64, (u64, Outcome)>,
    /// Operations that were answered as not carried out.
    refuted: BTreeSet<u64>,
    leaders: BTreeMap<u64, u64>,
    leases: BTreeMap<i64, LeaseView>,
    pub(super) roll: Roll,
    /// The newest index that a client knows to be applied.
    pub(super) acknowledged: u64,
    pub(super) trace: u64,
    /// What was checked, to be sure that it was; what changed is in the roll.
    counts: Counts,
    first: Box<dyn Fn() -> StateMachine>,
}

fn violation<T>(what: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Violation(what.into()))
}

impl Judge {
    /// `first` makes the state that a new cluster begins with.
    pub(super) fn new(first: Box<dyn Fn() -> StateMachine>) -> Judge {
        let model = first();
        Judge {
            base: model.applied().index,
            roll: Roll::new(model.applied().index, model.members()),
            entries: Vec::new(),
            model,
            hashes: BTreeMap::new(),
            revisions: Vec::new(),
            changes: Vec::new(),
            history: BTreeMap::new(),
            applied: BTreeMap::new(),
            refuted: BTreeSet::new(),
            leaders: BTreeMap::new(),
            leases: BTreeMap::new(),
            acknowledged: 0,
            trace: 0,
            counts: Counts::default(),
            first,
        }
    }

    /// Adds a number to the hash of all that happened.
    pub(super) fn note(&mut self, number: u64) {
        self.trace = mix(self.trace.rotate_left(5) ^ number.wrapping_add(0x9e37_79b9_7f4a_7c15));
    }

    pub(super) fn last_index(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// What was checked, and how often.
    pub(super) fn checked(&self) -> Counts {
        let Changes { added, promoted, removed } = self.roll.changes;
        Counts { added, promoted, removed, ..self.counts }
    }

    pub(super) fn revision(&self) -> i64 {
        self.model.store().revision()
    }

    pub(super) fn compact_revision(&self) -> i64 {
        self.model.store().compact_revision()
    }

    pub(super) fn leader_count(&self) -> usize {
        self.leaders.len()
    }

    /// One leader per term.
    pub(super) fn leads(&mut self, member: u64, role: Role) -> Result<(), Failure> {
        if !role.is_leader {
            return Ok(());
        }
        match *self.leaders.entry(role.term).or_insert(member) {
            leader if leader == member => Ok(()),
            leader => {
                violation(format!("{leader:x} and {member:x} both lead in term {}", role.term))
            }
        }
    }

    /// Raft's configuration is that of the members, as of the same entry.
    pub(super) fn configured(
        &self,
        member: u64,
        index: u64,
        found: &Configuration,
    ) -> Result<(), Failure> {
        // One that has yet to be sent the state is part of no configuration.
        let is_due = if index < self.base {
            *found == Configuration::default()
        } else {
            self.roll.is_configuration(index, found)
        };
        if is_due {
            return Ok(());
        }
        violation(format!("raft's configuration of {member:x} at {index} is {found:x?}"))
    }

    /// A member takes these for committed; `holders` says on whose disks one is.
    pub(super) fn committed(
        &mut self,
        member: u64,
        entries: &[Entry],
        now_us: u64,
        holders: &dyn Fn(Mark) -> Vec<u64>,
    ) -> Result<(), Failure> {
        for entry in entries {
            let position = usize::try_from(entry.index - self.base - 1).unwrap_or(usize::MAX);
            match self.entries.get(position) {
                Some(known) if known == entry => {}
                Some(known) => {
                    return violation(format!(
                        "entry {} is of term {} for others, and of term {} for {member:x}, or has \
                         other content",
                        entry.index, known.term, entry.term
                    ));
                }
                None if position == self.entries.len() => {
                    let holders = holders(Mark { index: entry.index, term: entry.term });
                    if !self.roll.decide(&holders) {
                        return violation(format!(
                            "{member:x} takes entry {} for committed, which {holders:x?} have",
                            entry.index
                        ));
                    }
                    self.apply(entry, now_us)?;
                }
                None => {
                    return violation(format!(
                        "{member:x} applies entry {} before those that lead to it",
                        entry.index
                    ));
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, entry: &Entry, now_us: u64) -> Result<(), Failure> {
        self.note(entry.index ^ entry.term << 32);
        self.entries.push(entry.clone());
        let mark = Mark { index: entry.index, term: entry.term };
        let Some(command) = raft::command(entry) else {
            self.model.apply_empty(mark);
            self.applied_entry(entry.index);
            return Ok(());
        };
        let command = Command::decode(command.clone())
            .map_err(|error| Failure::Violation(error.to_string()))?;
        let tag = command.request.as_ref().and_then(tag_of);
        let expire = match &command.request {
            Some(Request::LeaseExpire(expire)) => Some(expire.term),
            _ => None,
        };
        let mut effects = Effects::default();
        let outcome = self.model.apply(mark, command, &mut effects);
        let roll = self.roll.applied(entry.index, raft::is_change(entry), self.model.members());
        roll.map_err(Failure::Violation)?;
        for change in &effects.changes {
            let record = KeyValue::decode(change.kv.clone())
                .map_err(|error| Failure::Violation(error.to_string()))?;
            let value = (!change.deleted).then_some(record.value);
            let revision = change.revision.main;
            self.history.entry(change.key.clone()).or_default().push((revision, value.clone()));
            self.changes.push(Seen { revision, key: change.key.clone(), value });
        }
        if let Some(term) = expire {
            for change in &effects.leases {
                if let LeaseChange::Revoked(id) = *change {
                    self.lease_expired(id, term, entry, now_us)?;
                }
            }
        }
        if let Some(tag) = tag {
            if self.refuted.contains(&tag) {
                return violation(format!(
                    "operation {tag} was answered as not carried out, and is at {}",
                    entry.index
                ));
            }
            if let Some((index, _)) = self.applied.insert(tag, (entry.index, outcome)) {
                return violation(format!(
                    "operation {tag} is carried out twice, at {index} and {}",
                    entry.index
                ));
            }
        }
        self.applied_entry(entry.index);
        Ok(())
    }

    fn applied_entry(&mut self, index: u64) {
        self.revisions.push(self.model.store().revision());
        if index.is_multiple_of(COMPARED_EVERY) {
            self.hashes.insert(index, self.model.hash());
        }
    }

    fn lease_expired(
        &mut self,
        id: i64,
        term: u64,
        entry: &Entry,
        now_us: u64,
    ) -> Result<(), Failure> {
        let view = self.leases.entry(id).or_default();
        view.expired_us = Some(now_us);
        self.counts.expired += 1;
        if now_us < view.until_us {
            return violation(format!(
                "lease {id} expired {} µs too early for its client",
                view.until_us - now_us
            ));
        }
        if term != entry.term {
            return violation(format!(
                "lease {id} is ended in term {} by the leader of term {term}",
                entry.term
            ));
        }
        Ok(())
    }

    /// A client is told that a lease has so much time, from when it asked on.
    fn lease_lives(&mut self, id: i64, until_us: u64, now_us: u64) -> Result<(), Failure> {
        let view = self.leases.entry(id).or_default();
        view.until_us = view.until_us.max(until_us);
        match view.expired_us {
            Some(expired_us) if expired_us < until_us => violation(format!(
                "lease {id} was ended at {expired_us} µs, and its client is told at {now_us} µs \
                 that it lives until {until_us} µs"
            )),
            _ => Ok(()),
        }
    }

    /// An operation has ended.
    pub(super) fn ended(
        &mut self,
        op: &Op,
        ended: Ended,
        now_us: u64,
        crashes: u64,
    ) -> Result<(), Failure> {
        if op.unheard == Some(crashes) {
            self.counts.unheard += 1;
            if ended.is_of_the_cluster(op) {
                return violation(format!(
                    "a member that all knew to be removed answers {:?} with {ended:?}",
                    op.asked
                ));
            }
        }
        match ended {
            Ended::GaveUp => self.note(1),
            Ended::Failed => {
                self.note(2);
                if !matches!(op.asked, Asked::Write | Asked::Grant { .. }) {
                    return Ok(());
                }
                if let Some((index, _)) = self.applied.get(&op.tag) {
                    return violation(format!(
                        "operation {} is answered as not carried out, and is at {index}",
                        op.tag
                    ));
                }
                self.refuted.insert(op.tag);
            }
            Ended::KeptAlive(lives) => {
                self.note(3);
                if let Asked::KeepAlive { id, ttl } = op.asked
                    && lives
                {
                    self.counts.keepalives += 1;
                    let until_us = op.began_us + ttl.unsigned_abs() * 1_000_000;
                    return self.lease_lives(id, until_us, now_us);
                }
            }
            Ended::Outcome(outcome) => {
                self.note(4);
                match &op.asked {
                    Asked::Untagged => {}
                    Asked::Change(change) => self.changed(op, change, outcome)?,
                    _ => self.written(op, outcome, now_us)?,
                }
            }
            Ended::Read { applied, revision, value } => {
                self.note(5 ^ applied);
                self.read(op, applied, revision, value)?;
            }
        }
        Ok(())
    }

    /// A change of the members that succeeded was made while it was asked for.
    fn changed(&mut self, op: &Op, change: &Change, outcome: Outcome) -> Result<(), Failure> {
        let Ok(Response::Members(members)) = outcome else { return Ok(()) };
        let Some(index) = self.roll.made_at(op.after, change, &members) else {
            return violation(format!("{change:x?} is acknowledged with {members:x?}"));
        };
        self.counts.changed += 1;
        self.acknowledged = self.acknowledged.max(index);
        Ok(())
    }

    fn written(&mut self, op: &Op, outcome: Outcome, now_us: u64) -> Result<(), Failure> {
        let Some((index, due)) = self.applied.get(&op.tag) else {
            return violation(format!("operation {} is acknowledged and nowhere", op.tag));
        };
        let index = *index;
        if *due != outcome {
            return violation(format!(
                "operation {} was answered with {outcome:?}, and {due:?} is right",
                op.tag
            ));
        }
        if index <= op.after {
            return violation(format!(
                "operation {} is at {index}, and began after {} was acknowledged",
                op.tag, op.after
            ));
        }
        self.counts.writes += 1;
        self.acknowledged = self.acknowledged.max(index);
        if let (Asked::Grant { id, ttl }, Ok(Response::LeaseGrant(_))) = (&op.asked, &outcome) {
            let until_us = op.began_us + ttl.unsigned_abs() * 1_000_000;
            return self.lease_lives(*id, until_us, now_us);
        }
        Ok(())
    }

    fn read(
        &mut self,
        op: &Op,
        applied: u64,
        revision: i64,
        value: Option<Bytes>,
    ) -> Result<(), Failure> {
        let Asked::Read { key, linearizable } = &op.asked else { return Ok(()) };
        if *linearizable && applied < op.after {
            return violation(format!(
                "a linearizable read is of index {applied}, and began after {} was acknowledged",
                op.after
            ));
        }
        let due = self.value_at(key, revision);
        if due != value.as_ref() {
            return violation(format!(
                "a read of {key:?} at revision {revision} gave {value:?}, and {due:?} is right"
            ));
        }
        let position = applied.checked_sub(self.base + 1).map(|position| position as usize);
        if let Some(right) = position.and_then(|position| self.revisions.get(position))
            && *right != revision
        {
            return violation(format!(
                "a read at index {applied} is of revision {revision}, and {right} is right"
            ));
        }
        if *linearizable {
            self.counts.reads += 1;
            self.acknowledged = self.acknowledged.max(applied);
        }
        Ok(())
    }

    fn value_at(&self, key: &Bytes, revision: i64) -> Option<&Bytes> {
        let versions = self.history.get(key)?;
        let end = versions.partition_point(|(at, _)| *at <= revision);
        versions.get(end.checked_sub(1)?)?.1.as_ref()
    }

    /// A member has applied so much.
    pub(super) fn compare(&mut self, member: u64, state: &StateMachine) -> Result<(), Failure> {
        let applied = state.applied().index;
        let Some(hash) = self.hashes.get(&applied) else { return Ok(()) };
        self.counts.compared += 1;
        if *hash != state.hash() {
            return violation(format!(
                "the state of {member:x} at {applied} is another than others'"
            ));
        }
        Ok(())
    }

    /// A member has started with this state.
    pub(super) fn recovered(&self, member: u64, state: &StateMachine) -> Result<(), Failure> {
        let applied = state.applied().index;
        if applied == 0 {
            // It joins, and is yet to be sent the state.
            return Ok(());
        }
        if applied > self.last_index() {
            return violation(format!("{member:x} has applied {applied}, which nobody committed"));
        }
        if applied == self.last_index() {
            return self.compare_with(member, state, &self.model);
        }
        let mut model = (self.first)();
        for entry in self.entries.iter().take_while(|entry| entry.index <= applied) {
            let mark = Mark { index: entry.index, term: entry.term };
            match raft::command(entry).map(|command| Command::decode(command.clone())) {
                Some(Ok(command)) => drop(model.apply(mark, command, &mut Effects::default())),
                _ => model.apply_empty(mark),
            }
        }
        self.compare_with(member, state, &model)
    }

    fn compare_with(
        &self,
        member: u64,
        state: &StateMachine,
        model: &StateMachine,
    ) -> Result<(), Failure> {
        let revisions =
            |state: &StateMachine| (state.store().revision(), state.store().compact_revision());
        if revisions(state) != revisions(model) || state.hash() != model.hash() {
            return violation(format!(
                "{member:x} has the state of no index: it says {:?}, revision and compaction {:?} \
                 instead of {:?}",
                state.applied(),
                revisions(state),
                revisions(model)
            ));
        }
        Ok(())
    }

    /// At the end: everybody is where the judge is.
    pub(super) fn is_at_end(&self, member: u64, state: &StateMachine) -> Result<(), Failure> {
        if state.applied() != self.model.applied() {
            return violation(format!("{member:x} does not catch up: {:?}", state.applied()));
        }
        self.compare_with(member, state, &self.model)
    }

    /// Whether a watcher was told everything.
    pub(super) fn is_told(&self, cursor: &Cursor) -> bool {
        cursor.ended || cursor.at.is_some_and(|at| at >= self.changes.len())
    }

    /// Whether there is a lease whose time has yet to come.
    pub(super) fn has_leases(&self) -> bool {
        !self.model.lessor().is_empty()
    }

    /// A watcher of all keys got this.
    pub(super) fn watched(
        &mut self,
        cursor: &mut Cursor,
        start: i64,
        response: &WatchResponse,
    ) -> Result<(), Failure> {
        let header = response.header.as_ref().map_or(0, |header| header.revision);
        self.note(6 ^ header.unsigned_abs() << 8 ^ (response.events.len() as u64) << 40);
        if response.canceled {
            cursor.ended = true;
            if cursor.at.is_some() && cursor.revision + 1 >= response.compact_revision {
                return violation(format!("a watch is canceled for no reason: {response:?}"));
            }
            return Ok(());
        }
        if response.created {
            let from = if start == 0 { header + 1 } else { start };
            cursor.at = Some(self.changes.partition_point(|seen| seen.revision < from));
            cursor.revision = from - 1;
            return Ok(());
        }
        let Some(at) = cursor.at.as_mut() else {
            return violation("a watch says something before it is created");
        };
        for event in &response.events {
            let event = Event::decode(event.clone())
                .map_err(|error| Failure::Violation(error.to_string()))?;
            let kv = event.kv.unwrap_or_default();
            let value = (event.r#type == 0).then_some(kv.value);
            let seen = Seen { revision: kv.mod_revision, key: kv.key, value };
            if self.changes.get(*at) != Some(&seen) {
                return violation(format!(
                    "a watch tells {seen:?}, and {:?} is next",
                    self.changes.get(*at)
                ));
            }
            *at += 1;
            self.counts.watched += 1;
            cursor.revision = seen.revision;
        }
        let next = self.changes.get(*at).map_or(i64::MAX, |seen| seen.revision);
        if !response.events.is_empty() {
            if next == cursor.revision {
                return violation(format!("a watch splits revision {next}"));
            }
        } else {
            self.counts.progress += 1;
        }
        if response.events.is_empty() && header >= next {
            return violation(format!(
                "a watch says that it is at revision {header}, and has not told {next}"
            ));
        }
        Ok(())
    }
}

/// The tag that an operation has in what it writes.
fn tag_of(request: &Request) -> Option<u64> {
    let of_value = |value: &[u8]| {
        let tag = value.get(..8)?;
        tag.try_into().ok().map(u64::from_be_bytes)
    };
    let of_op = |op: &RequestOp| match &op.request {
        Some(request_op::Request::RequestPut(put)) => of_value(&put.value),
        _ => None,
    };
    match request {
        Request::Put(put) => of_value(&put.value),
        Request::Txn(txn) => txn.success.iter().find_map(of_op),
        Request::LeaseGrant(grant) => Some(grant.id.unsigned_abs()),
        _ => None,
    }
}
