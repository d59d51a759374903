//! The state machine: all that a member holds, and the one way to change it.
//!
//! [`StateMachine::apply`] takes a committed command and gives its outcome. It is a
//! function of the state and the entry alone, so all members that applied the same
//! log are equal, and applying an entry again after a crash leads to the same state.
//! An entry either changes everything it means to, or nothing: what can fail is
//! checked before the first change.
//!
//! What an entry changed is also noted for the checkpoint ([`Dirty`]). The apply
//! thread takes those notes away in one move ([`StateMachine::cut`]); they are then
//! a consistent picture of everything that changed up to one index.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use super::members::Members;
use super::rolling::RollingHash;
use super::txn;
use crate::error::Error;
use crate::lease::{Lease, Lessor};
use crate::log::{BOOTSTRAP, Mark};
use crate::mvcc::{Change, HashKv, KeyRange, RangeEnd, Revision, Store};
use crate::pb::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse,
    DeleteRangeResponse, LeaseCheckpoint, LeaseGrantRequest, LeaseGrantResponse,
    LeaseRevokeResponse, Member, PutResponse, ResponseHeader, TxnResponse,
    alarm_request::AlarmAction,
};
use crate::pb::kvorumpb::{CheckpointHead, Command, MemberRecord, command::Request};
use crate::pb::leasepb;

/// What a command led to, for whoever proposed it.
pub type Outcome = Result<Response, Error>;

/// The answer to a command. Headers carry the revision; the engine adds the rest.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// To a put.
    Put(PutResponse),
    /// To a delete.
    DeleteRange(DeleteRangeResponse),
    /// To a transaction.
    Txn(TxnResponse),
    /// To a compaction: it is in force, and superseded versions are yet to be removed.
    Compact(CompactionResponse),
    /// To a lease grant.
    LeaseGrant(LeaseGrantResponse),
    /// To a lease revoke.
    LeaseRevoke(LeaseRevokeResponse),
    /// To an alarm request.
    Alarm(AlarmResponse),
    /// To a change of the members: all of them, as they are then.
    Members(Vec<Member>),
    /// To a command that no client sent.
    Done,
}

impl Response {
    /// The header, of which the revision alone is filled in. [`Response::Members`],
    /// which etcd answers without a revision, and [`Response::Done`] have none.
    pub fn header_mut(&mut self) -> Option<&mut Option<ResponseHeader>> {
        match self {
            Response::Put(response) => Some(&mut response.header),
            Response::DeleteRange(response) => Some(&mut response.header),
            Response::Txn(response) => Some(&mut response.header),
            Response::Compact(response) => Some(&mut response.header),
            Response::LeaseGrant(response) => Some(&mut response.header),
            Response::LeaseRevoke(response) => Some(&mut response.header),
            Response::Alarm(response) => Some(&mut response.header),
            Response::Members(_) | Response::Done => None,
        }
    }
}

/// A lease came or went: the leader keeps its deadline accordingly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// The lease of this id was granted.
    Granted(i64),
    /// The lease of this id was revoked.
    Revoked(i64),
}

/// What applying led to besides outcomes. Collected over many entries.
#[derive(Default)]
pub struct Effects {
    /// Changes of keys in revision order, for watchers.
    pub changes: Vec<Change>,
    /// Leases that came or went.
    pub leases: Vec<LeaseChange>,
    /// Hashes of compactions, begun just before these took effect.
    pub compactions: Vec<HashKv>,
    /// Whether there is something new to know about the members: who they are, which of
    /// them vote, or where they are reached.
    pub members_changed: bool,
}

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: what a leader of an earlier term decided is carried out.
    pub(crate) static TRUSTS_STALE_LEADERS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What changed since the last cut, for the checkpoint.
#[derive(Debug, Default)]
pub struct Dirty {
    /// New records: revision, whether it is a tombstone, and the stored bytes.
    pub records: Vec<(Revision, bool, Bytes)>,
    /// Bytes of `records`.
    pub records_bytes: usize,
    /// Records that compaction removed. To be deleted only after the checkpoint
    /// holds the compaction itself.
    pub removed: Vec<Revision>,
    /// Leases that changed: the new content, or `None` when revoked.
    pub leases: BTreeMap<i64, Option<leasepb::Lease>>,
    /// Something in the head or the members changed.
    pub rest: bool,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.removed.is_empty() && self.leases.is_empty() && !self.rest
    }
}

/// What a row of authentication is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AuthTable {
    /// Whether it is on, and its revision.
    Auth,
    /// Users by name.
    User,
    /// Roles by name.
    Role,
}

/// A row of etcd's buckets of authentication, as a snapshot file brought it. There is no
/// authentication yet: the rows are carried, so that they are there when a snapshot is saved.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AuthRow {
    /// What it is about.
    pub table: AuthTable,
    /// The row's key.
    pub key: Bytes,
    /// The row's value.
    pub value: Bytes,
}

/// Everything that changed up to one index, with what is written whole.
#[derive(Debug)]
pub struct Cut {
    /// How far it goes, and the small state.
    pub head: CheckpointHead,
    /// All members.
    pub members: Vec<MemberRecord>,
    /// The rows of authentication. They do not change: a checkpoint that has them keeps them.
    pub auth: Arc<[AuthRow]>,
    /// The changes since the cut before.
    pub dirty: Dirty,
}

/// The parts a checkpoint holds, read back.
pub struct Restored {
    /// As written.
    pub head: CheckpointHead,
    /// As written.
    pub members: Vec<MemberRecord>,
    /// As written.
    pub leases: Vec<leasepb::Lease>,
    /// As written, in order.
    pub auth: Vec<AuthRow>,
    /// The keys and their history.
    pub store: Store,
}

/// The checksum of leases, members, alarms and the cluster's version.
#[derive(Debug)]
pub struct RestHash {
    crc: u32,
    bytes: usize,
}

impl RestHash {
    /// The checksum of everything, given that of the keys.
    pub fn after(&self, keys: u32) -> u32 {
        crc32c::crc32c_combine(keys, self.crc, self.bytes)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.bytes += bytes.len();
    }
}

/// See the module documentation.
pub struct StateMachine {
    store: Store,
    lessor: Lessor,
    members: Members,
    member_id: u64,
    cluster_version: String,
    alarms: BTreeSet<(u64, i32)>,
    auth: Arc<[AuthRow]>,
    applied: Mark,
    rolling: RollingHash,
    dirty: Dirty,
}

impl StateMachine {
    /// The state of a new cluster with these members, where its log begins.
    /// `member_id` is the member that holds this state.
    pub fn bootstrap(member_id: u64, members: Members, cluster_version: String) -> StateMachine {
        StateMachine::empty(member_id, members, cluster_version, BOOTSTRAP)
    }

    /// The state of a member that joins a cluster, before it has any of the cluster's log: a
    /// snapshot comes first and replaces all this. The members are there to be reached, and
    /// for the cluster's id; none of them counts yet
    /// ([`StateMachine::configuration_members`]).
    pub fn joining(
        member_id: u64,
        cluster_id: u64,
        members: Vec<MemberRecord>,
        cluster_version: String,
    ) -> StateMachine {
        let members = Members::restore(cluster_id, members, Vec::new());
        StateMachine::empty(member_id, members, cluster_version, Mark::default())
    }

    fn empty(
        member_id: u64,
        members: Members,
        cluster_version: String,
        applied: Mark,
    ) -> StateMachine {
        StateMachine {
            store: Store::new(),
            lessor: Lessor::default(),
            members,
            member_id,
            cluster_version,
            alarms: BTreeSet::new(),
            auth: Arc::default(),
            applied,
            rolling: RollingHash::default(),
            dirty: Dirty { rest: true, ..Dirty::default() },
        }
    }

    /// The state that a checkpoint holds.
    pub fn restore(restored: Restored) -> StateMachine {
        let Restored { head, members, leases, auth, store } = restored;
        let mut lessor = Lessor::restore(leases);
        let everything = KeyRange { start: Bytes::new(), end: RangeEnd::Open };
        store.scan(&everything, store.revision(), usize::MAX, &mut |key, version| {
            txn::attach_lease(&mut lessor, &Bytes::copy_from_slice(key), &version.kv);
        });
        StateMachine {
            store,
            lessor,
            members: Members::restore(head.cluster_id, members, head.removed_members),
            member_id: head.member_id,
            cluster_version: head.cluster_version,
            alarms: head.alarms.iter().map(|alarm| (alarm.member_id, alarm.alarm)).collect(),
            auth: auth.into(),
            applied: Mark { index: head.applied_index, term: head.applied_term },
            rolling: RollingHash::restore(head.rolling_hash),
            dirty: Dirty::default(),
        }
    }

    /// The keys.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The keys, for tests that tamper with them.
    #[cfg(test)]
    pub(crate) fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// The leases.
    pub fn lessor(&self) -> &Lessor {
        &self.lessor
    }

    /// The members.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Who votes and who only listens as of the applied index: raft's configuration. Nobody
    /// before anything is applied, since the members a joining one was told of may be others
    /// by the time a leader reaches it.
    pub fn configuration_members(&self) -> (Vec<u64>, Vec<u64>) {
        if self.applied.index == 0 {
            return (Vec::new(), Vec::new());
        }
        self.members.voters_and_learners()
    }

    /// The member that holds this state.
    pub fn member_id(&self) -> u64 {
        self.member_id
    }

    /// Whether that one only listens.
    pub fn is_learner(&self) -> bool {
        self.members.get(self.member_id).is_some_and(|member| member.is_learner)
    }

    /// A checksum of all that members must agree on, with every version there is; what
    /// etcd's `Hash` is for. In one go: see [`StateMachine::hash_of_rest`] for steps.
    pub fn hash(&self) -> u32 {
        self.hash_of_rest().after(self.store.hash_kv(self.store.revision()))
    }

    /// What [`StateMachine::hash`] is made of besides the keys, whose hash can be worked out
    /// in steps ([`Store::hash_kv_begin`]).
    pub fn hash_of_rest(&self) -> RestHash {
        let mut rest = RestHash { crc: 0, bytes: 0 };
        rest.add(self.cluster_version.as_bytes());
        for lease in self.lessor.iter() {
            rest.add(&lease.to_record().encode_to_vec());
        }
        for member in self.members.records() {
            rest.add(&member.encode_to_vec());
        }
        for id in self.members.removed() {
            rest.add(&id.to_be_bytes());
        }
        for alarm in self.alarms(AlarmType::None) {
            rest.add(&alarm.encode_to_vec());
        }
        for row in self.auth.iter() {
            rest.add(&row.key);
            rest.add(&row.value);
        }
        rest
    }

    /// The version all members have, as `X.Y.Z`.
    pub fn cluster_version(&self) -> &str {
        &self.cluster_version
    }

    /// The newest applied entry.
    pub fn applied(&self) -> Mark {
        self.applied
    }

    /// How the state came to be, up to the newest applied entry; to be compared with other
    /// members' at the same index.
    pub fn rolling_hash(&self) -> u64 {
        self.rolling.value()
    }

    /// What changed since the last cut.
    pub fn dirty(&self) -> &Dirty {
        &self.dirty
    }

    /// The rows of authentication that a snapshot file brought, in order.
    pub fn auth_rows(&self) -> Arc<[AuthRow]> {
        Arc::clone(&self.auth)
    }

    /// Active alarms of one type, or of all types for `NONE`, by member.
    pub fn alarms(&self, of: AlarmType) -> Vec<AlarmMember> {
        self.alarms
            .iter()
            .filter(|(_, alarm)| of == AlarmType::None || *alarm == of as i32)
            .map(|&(member_id, alarm)| AlarmMember { member_id, alarm })
            .collect()
    }

    /// Whether an alarm of this type is active at any member.
    pub fn has_alarm(&self, of: AlarmType) -> bool {
        self.alarms.iter().any(|(_, alarm)| *alarm == of as i32)
    }

    /// Applies an entry that holds no command: a leader's first of its term.
    pub fn apply_empty(&mut self, entry: Mark) {
        self.begin(entry);
    }

    fn begin(&mut self, entry: Mark) {
        self.applied = entry;
        self.rolling.entry(entry);
    }

    /// Applies a committed command. An error is an outcome like any other: equal on
    /// all members, and nothing was changed.
    pub fn apply(&mut self, entry: Mark, command: Command, effects: &mut Effects) -> Outcome {
        self.begin(entry);
        let Some(request) = command.request else { return Ok(Response::Done) };
        if self.has_alarm(AlarmType::Corrupt) && is_refused_when_corrupt(&request) {
            return Err(Error::Corrupt);
        }
        if self.has_alarm(AlarmType::Nospace) && takes_space(&request) {
            return Err(Error::NoSpace);
        }
        match request {
            Request::Put(request) => {
                let lessor = &self.lessor;
                let mut write = self.store.write();
                let mut response = txn::apply_put(&mut write, &request, &|id| lessor.exists(id))?;
                let (revision, changes) = write.commit();
                response.header = header(revision);
                self.note(changes, effects);
                Ok(Response::Put(response))
            }
            Request::DeleteRange(request) => {
                let mut write = self.store.write();
                let mut response = txn::apply_delete_range(&mut write, &request);
                let (revision, changes) = write.commit();
                response.header = header(revision);
                self.note(changes, effects);
                Ok(Response::DeleteRange(response))
            }
            Request::Txn(request) => {
                let lessor = &self.lessor;
                let mut write = self.store.write();
                let exists = |id| lessor.exists(id);
                let mut response = txn::apply_txn(&mut write, &request, &exists)?;
                let (revision, changes) = write.commit();
                response.header = header(revision);
                self.note(changes, effects);
                Ok(Response::Txn(response))
            }
            Request::Compaction(CompactionRequest { revision, .. }) => {
                self.compact(revision, effects)
            }
            Request::AutoCompact(request) if request.term == entry.term => {
                self.compact(request.revision, effects)
            }
            Request::LeaseGrant(request) => self.grant(request, effects),
            Request::LeaseRevoke(request) => {
                self.revoke(request.id, effects)?;
                let response = LeaseRevokeResponse { header: header(self.store.revision()) };
                Ok(Response::LeaseRevoke(response))
            }
            Request::LeaseExpire(request) if is_decided_in(request.term, entry) => {
                for id in request.ids {
                    // One that a client revoked meanwhile has nothing left to expire.
                    let _ = self.revoke(id, effects);
                }
                Ok(Response::Done)
            }
            Request::LeaseCheckpoint(request) => {
                self.set_remaining(request.checkpoints);
                Ok(Response::Done)
            }
            Request::LeaseRemainders(request) if request.term == entry.term => {
                self.set_remaining(request.checkpoints);
                Ok(Response::Done)
            }
            // A leader of an earlier term decided this; it is not its to decide now.
            Request::AutoCompact(_) | Request::LeaseExpire(_) | Request::LeaseRemainders(_) => {
                Ok(Response::Done)
            }
            Request::Alarm(request) => Ok(Response::Alarm(self.alarm(request))),
            Request::MemberChange(request) => {
                // A change of a kind that this version does not know is none.
                let Some(change) = request.change else { return Ok(Response::Done) };
                let id = super::members::changed(&change);
                self.members.change(change)?;
                self.note_member(id, effects);
                Ok(Response::Members(self.members.list()))
            }
            Request::MemberPublish(request) => {
                self.members.publish(request.id, request.name, request.client_urls);
                self.note_member(request.id, effects);
                Ok(Response::Done)
            }
        }
    }

    /// Removes what compaction made unreachable: at most `budget` keys are looked at,
    /// and nothing that a reader at `floor` or later needs. Returns whether all is done.
    ///
    /// When this happens decides nothing that a client can see.
    pub fn compact_step(&mut self, floor: i64, budget: usize) -> bool {
        let step = self.store.compact_step(floor, budget);
        self.dirty.removed.extend(step.removed);
        step.done
    }

    /// Takes away what changed since the last cut.
    pub fn cut(&mut self) -> Cut {
        let dirty = std::mem::take(&mut self.dirty);
        Cut { head: self.head(), members: self.members.records(), auth: self.auth_rows(), dirty }
    }

    /// Everything but the records, as a cut. Takes nothing away.
    pub fn image_without_records(&self) -> Cut {
        let leases = self.lessor.iter().map(|lease| (lease.id(), Some(lease.to_record())));
        let dirty = Dirty { leases: leases.collect(), rest: true, ..Dirty::default() };
        Cut { head: self.head(), members: self.members.records(), auth: self.auth_rows(), dirty }
    }

    /// How far the state is, and the small things in it.
    pub fn head(&self) -> CheckpointHead {
        CheckpointHead {
            applied_index: self.applied.index,
            applied_term: self.applied.term,
            revision: self.store.revision(),
            compact_revision: self.store.compact_revision(),
            cluster_id: self.members.cluster_id(),
            member_id: self.member_id,
            cluster_version: self.cluster_version.clone(),
            alarms: self.alarms(AlarmType::None),
            removed_members: self.members.removed(),
            installed: false,
            rolling_hash: self.rolling.value(),
        }
    }

    fn compact(&mut self, revision: i64, effects: &mut Effects) -> Outcome {
        let hash = self.store.compaction_hash_begin(revision);
        self.store.compact(revision)?;
        effects.compactions.push(hash);
        self.rolling.compaction(revision);
        self.dirty.rest = true;
        let response = CompactionResponse { header: header(self.store.revision()) };
        Ok(Response::Compact(response))
    }

    fn grant(&mut self, request: LeaseGrantRequest, effects: &mut Effects) -> Outcome {
        let LeaseGrantRequest { id, ttl } = request;
        self.lessor.grant(id, ttl)?;
        self.note_lease(id);
        effects.leases.push(LeaseChange::Granted(id));
        Ok(Response::LeaseGrant(LeaseGrantResponse {
            header: header(self.store.revision()),
            id,
            ttl,
            error: String::new(),
        }))
    }

    /// Deletes the keys of a lease in one revision, and the lease.
    fn revoke(&mut self, id: i64, effects: &mut Effects) -> Result<(), Error> {
        let keys = self.lessor.revoke(id)?;
        let mut write = self.store.write();
        for key in keys {
            write.delete_range(&KeyRange::single(key));
        }
        let (_, changes) = write.commit();
        self.note(changes, effects);
        self.note_lease(id);
        effects.leases.push(LeaseChange::Revoked(id));
        Ok(())
    }

    fn set_remaining(&mut self, checkpoints: Vec<LeaseCheckpoint>) {
        for lease in checkpoints {
            if self.lessor.set_remaining(lease.id, lease.remaining_ttl).is_some() {
                self.note_lease(lease.id);
            }
        }
    }

    fn note_member(&mut self, id: u64, effects: &mut Effects) {
        self.rolling.member(id, self.members.get(id));
        self.dirty.rest = true;
        effects.members_changed = true;
    }

    fn note_lease(&mut self, id: i64) {
        let lease = self.lessor.get(id).map(Lease::to_record);
        self.rolling.lease(id, lease.as_ref());
        self.dirty.leases.insert(id, lease);
    }

    fn alarm(&mut self, request: AlarmRequest) -> AlarmResponse {
        let member = AlarmMember { member_id: request.member_id, alarm: request.alarm };
        let record = (member.member_id, member.alarm);
        let alarms = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => match AlarmType::try_from(request.alarm) {
                Ok(of) => self.alarms(of),
                Err(_) => Vec::new(),
            },
            Ok(AlarmAction::Activate) if request.alarm != AlarmType::None as i32 => {
                self.alarms.insert(record);
                self.rolling.alarm(record.0, record.1, true);
                vec![member]
            }
            Ok(AlarmAction::Deactivate) if self.alarms.remove(&record) => {
                self.rolling.alarm(record.0, record.1, false);
                vec![member]
            }
            _ => Vec::new(),
        };
        self.dirty.rest = true;
        AlarmResponse { header: header(self.store.revision()), alarms }
    }

    /// Takes note of changed keys: their leases, the checkpoint, the watchers.
    fn note(&mut self, changes: Vec<Change>, effects: &mut Effects) {
        txn::attach_leases(&mut self.lessor, &changes);
        for change in &changes {
            let record = change.record();
            self.rolling.record(change.revision, change.deleted, &record);
            self.dirty.records_bytes += record.len();
            self.dirty.records.push((change.revision, change.deleted, record));
        }
        effects.changes.extend(changes);
    }
}

/// Whether the leader of the entry's term decided it.
fn is_decided_in(term: u64, entry: Mark) -> bool {
    #[cfg(test)]
    if TRUSTS_STALE_LEADERS.get() {
        return true;
    }
    term == entry.term
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// etcd's capped applier: these wait until the NOSPACE alarm is disarmed.
fn takes_space(request: &Request) -> bool {
    match request {
        Request::Put(_) | Request::LeaseGrant(_) => true,
        Request::Txn(request) => super::check::txn_has_put(request),
        _ => false,
    }
}

/// etcd's corrupt applier: nothing that builds on the state.
fn is_refused_when_corrupt(request: &Request) -> bool {
    match request {
        Request::Put(_)
        | Request::DeleteRange(_)
        | Request::Txn(_)
        | Request::Compaction(_)
        | Request::AutoCompact(_)
        | Request::LeaseGrant(_)
        | Request::LeaseRevoke(_)
        | Request::LeaseExpire(_) => true,
        Request::LeaseCheckpoint(_)
        | Request::LeaseRemainders(_)
        | Request::Alarm(_)
        | Request::MemberPublish(_)
        | Request::MemberChange(_) => false,
    }
}

#[cfg(test)]
mod tests;
