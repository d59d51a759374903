use super::*;
use crate::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, request_op,
};
use crate::pb::kvorumpb::{
    AutoCompact, LeaseExpire, LeaseRemainders, MemberChange, MemberPublish, member_change::Change,
};

const TERM: u64 = 3;

/// A state machine, and the last index of its log.
struct Member {
    state: StateMachine,
    index: u64,
    effects: Effects,
}

impl Member {
    fn new() -> Member {
        let urls = vec!["http://localhost:2380".to_owned()];
        let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
        let id = members.list()[0].id;
        let state = StateMachine::bootstrap(id, members, "3.7.0".to_owned());
        Member { index: state.applied().index, state, effects: Effects::default() }
    }

    fn apply(&mut self, request: Request) -> Outcome {
        self.index += 1;
        let entry = Mark { index: self.index, term: TERM };
        let command = Command { header: None, request: Some(request) };
        self.state.apply(entry, command, &mut self.effects)
    }

    fn done(&mut self, request: Request) -> Response {
        self.apply(request).expect("it is carried out")
    }

    fn revision(&self) -> i64 {
        self.state.store().revision()
    }

    fn keys(&self) -> Vec<Bytes> {
        let mut keys = Vec::new();
        let everything = KeyRange { start: Bytes::new(), end: RangeEnd::Open };
        self.state.store().scan(&everything, self.revision(), usize::MAX, &mut |key, _| {
            keys.push(Bytes::copy_from_slice(key));
        });
        keys
    }
}

fn put(key: &'static str, lease: i64) -> Request {
    Request::Put(PutRequest { key: key.into(), value: "v".into(), lease, ..PutRequest::default() })
}

fn delete(key: &'static str) -> Request {
    Request::DeleteRange(DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() })
}

fn txn(operation: request_op::Request) -> Request {
    let success = vec![RequestOp { request: Some(operation) }];
    Request::Txn(TxnRequest { compare: Vec::<Compare>::new(), success, failure: Vec::new() })
}

fn txn_put(key: &'static str) -> Request {
    let put = PutRequest { key: key.into(), ..PutRequest::default() };
    txn(request_op::Request::RequestPut(put))
}

fn txn_range(key: &'static str) -> Request {
    let range = RangeRequest { key: key.into(), ..RangeRequest::default() };
    txn(request_op::Request::RequestRange(range))
}

fn grant(id: i64) -> Request {
    Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id })
}

fn revoke(id: i64) -> Request {
    Request::LeaseRevoke(LeaseRevokeRequest { id })
}

fn expire(term: u64, ids: &[i64]) -> Request {
    Request::LeaseExpire(LeaseExpire { term, ids: ids.to_vec() })
}

fn remainders(term: u64, left: &[(i64, i64)]) -> Request {
    let checkpoints =
        left.iter().map(|&(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl }).collect();
    Request::LeaseRemainders(LeaseRemainders { term, checkpoints })
}

fn change(change: Change) -> Request {
    Request::MemberChange(MemberChange { change: Some(change) })
}

/// A member that is to be added.
fn added(id: u64, is_learner: bool) -> MemberRecord {
    let peer_urls = vec![format!("http://127.0.0.1:{id}")];
    MemberRecord { id, peer_urls, is_learner, ..MemberRecord::default() }
}

fn compaction(revision: i64) -> Request {
    Request::Compaction(CompactionRequest { revision, physical: false })
}

fn alarm(action: AlarmAction, alarm: AlarmType) -> Request {
    let (action, alarm) = (action as i32, alarm as i32);
    Request::Alarm(AlarmRequest { action, member_id: 9, alarm })
}

fn publish(id: u64) -> Request {
    let client_urls = vec!["http://localhost:2379".to_owned()];
    Request::MemberPublish(MemberPublish { id, name: "one".to_owned(), client_urls })
}

#[test]
fn each_write_is_a_revision_and_an_event() {
    let mut member = Member::new();
    assert_eq!(member.revision(), 1);
    let Response::Put(response) = member.done(put("a", 0)) else { panic!("a put's response") };
    assert_eq!(response.header.expect("a header").revision, 2);
    member.done(txn_put("b"));
    let Response::DeleteRange(response) = member.done(delete("a")) else {
        panic!("a delete's response")
    };
    assert_eq!((response.deleted, member.revision()), (1, 4));
    member.done(delete("a"));
    member.done(txn_range("a"));
    assert_eq!(member.revision(), 4, "what changes nothing is no revision");
    let events: Vec<_> = member
        .effects
        .changes
        .iter()
        .map(|change| (change.revision.main, change.key.as_ref(), change.deleted))
        .collect();
    assert_eq!(events, [(2, &b"a"[..], false), (3, b"b", false), (4, b"a", true)]);
    assert_eq!(member.state.applied(), Mark { index: BOOTSTRAP.index + 5, term: TERM });
}

#[test]
fn a_command_that_fails_changes_nothing_but_the_applied_index() {
    let mut member = Member::new();
    member.done(put("a", 0));
    let hash = member.state.hash();
    member.state.cut();
    for (request, error) in [
        (put("a", 5), Error::LeaseNotFound),
        (revoke(5), Error::LeaseNotFound),
        (compaction(9), Error::FutureRevision),
    ] {
        assert_eq!(member.apply(request), Err(error));
    }
    assert_eq!(member.state.hash(), hash);
    assert!(member.state.dirty().is_empty());
    assert_eq!(member.state.applied().index, BOOTSTRAP.index + 4);
}

#[test]
fn revoking_a_lease_deletes_its_keys_in_one_revision() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(put("b", 7));
    member.done(put("a", 7));
    member.done(put("other", 0));
    let before = member.revision();
    member.effects = Effects::default();
    member.done(revoke(7));
    assert_eq!(member.revision(), before + 1);
    let events: Vec<_> = member
        .effects
        .changes
        .iter()
        .map(|change| (change.revision, change.key.as_ref(), change.deleted))
        .collect();
    let main = before + 1;
    let (first, second) = (Revision { main, sub: 0 }, Revision { main, sub: 1 });
    assert_eq!(events, [(first, &b"a"[..], true), (second, b"b", true)]);
    assert_eq!(member.effects.leases, [LeaseChange::Revoked(7)]);
    assert_eq!(member.keys(), ["other"]);
    assert!(!member.state.lessor().exists(7));
}

#[test]
fn a_key_belongs_to_the_lease_it_was_last_put_with() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(grant(8));
    member.done(put("a", 7));
    member.done(put("a", 8));
    member.done(revoke(7));
    assert_eq!(member.keys(), ["a"]);
    member.done(put("a", 0));
    member.done(revoke(8));
    assert_eq!(member.keys(), ["a"]);
}

#[test]
fn what_a_leader_of_another_term_decided_is_ignored() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(put("a", 7));
    member.done(put("b", 0));
    for term in [TERM - 1, TERM + 1] {
        assert_eq!(member.done(expire(term, &[7])), Response::Done);
        assert_eq!(
            member.done(Request::AutoCompact(AutoCompact { term, revision: 3 })),
            Response::Done
        );
        assert_eq!(member.done(remainders(term, &[(7, 20)])), Response::Done);
    }
    let lease = member.state.lessor().get(7).expect("the lease");
    assert_eq!(lease.remaining_ttl_secs(), 0, "all of it");
    assert_eq!((member.keys().len(), member.state.store().compact_revision()), (2, -1));

    member.done(Request::AutoCompact(AutoCompact { term: TERM, revision: 3 }));
    assert_eq!(member.state.store().compact_revision(), 3);
    // 6 was revoked by its client meanwhile.
    member.done(expire(TERM, &[6, 7]));
    assert!(!member.state.lessor().exists(7));
    assert_eq!(member.keys(), ["b"]);
}

#[test]
fn a_remainder_is_kept_for_a_lease_there_is() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(remainders(TERM, &[(6, 20), (7, 20)]));
    let lease = member.state.lessor().get(7).expect("the lease");
    assert_eq!((lease.ttl_secs(), lease.remaining_ttl_secs()), (60, 20));
    assert!(!member.state.lessor().exists(6));
    assert_eq!(member.state.cut().dirty.leases.len(), 1);
}

/// It takes nothing from a lease, so that a keepalive may ask for it without knowing the term.
#[test]
fn a_renewal_is_carried_out_in_any_term() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(remainders(TERM, &[(7, 20)]));
    let whole = LeaseCheckpoint { id: 7, remaining_ttl: 0 };
    member.done(Request::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints: vec![whole] }));
    let lease = member.state.lessor().get(7).expect("the lease");
    assert_eq!(lease.remaining_ttl_secs(), 0, "all of it");
}

#[test]
fn a_change_of_the_members_is_answered_with_all_of_them() {
    let mut member = Member::new();
    let first = member.state.member_id();
    member.state.cut();
    let response = member.done(change(Change::Add(added(5, true))));
    assert_eq!(response, Response::Members(member.state.members().list()));
    assert_eq!(member.state.configuration_members(), (vec![first], vec![5]));
    assert!(member.effects.members_changed && !member.state.is_learner());
    assert_eq!(member.state.cut().members.len(), 2);

    member.done(change(Change::Promote(5)));
    member.done(change(Change::Remove(first)));
    assert_eq!(member.state.configuration_members(), (vec![5], vec![]));
    let cut = member.state.cut();
    assert_eq!((cut.members.len(), cut.head.removed_members), (1, vec![first]));
    assert_eq!(member.revision(), 1);
}

#[test]
fn a_change_that_is_refused_changes_nothing() {
    let mut member = Member::new();
    let first = member.state.member_id();
    member.state.cut();
    let hash = member.state.hash();
    for (request, error) in [
        (Change::Add(added(first, false)), Error::MemberExists),
        (Change::Remove(first), Error::NotEnoughStartedMembers),
        (Change::Remove(9), Error::MemberNotFound),
        (Change::Promote(first), Error::MemberNotLearner),
        (Change::Update(added(9, false)), Error::MemberNotFound),
    ] {
        assert_eq!(member.apply(change(request)), Err(error));
    }
    let unknown = Request::MemberChange(MemberChange { change: None });
    assert_eq!(member.apply(unknown), Ok(Response::Done));
    assert!(!member.effects.members_changed && member.state.dirty().is_empty());
    assert_eq!(member.state.hash(), hash);
}

#[test]
fn a_member_that_joins_counts_for_nothing_until_it_has_the_state() {
    let records = vec![added(5, false), added(6, true)];
    let state = StateMachine::joining(6, 9, records, "3.7.0".to_owned());
    assert_eq!((state.applied(), state.members().cluster_id()), (Mark::default(), 9));
    assert_eq!(state.members().list().len(), 2, "they are there to be reached");
    assert_eq!(state.configuration_members(), (vec![], vec![]));
    assert!(state.is_learner());
}

#[test]
fn members_that_differ_in_who_left_have_other_hashes() {
    let mut member = Member::new();
    let hash = member.state.hash();
    member.done(change(Change::Add(added(5, true))));
    member.done(change(Change::Remove(5)));
    assert_ne!(member.state.hash(), hash);
}

#[test]
fn without_space_only_what_takes_space_is_refused() {
    let mut member = Member::new();
    member.done(grant(7));
    member.done(put("a", 0));
    member.done(alarm(AlarmAction::Activate, AlarmType::Nospace));
    assert!(member.state.has_alarm(AlarmType::Nospace));
    for request in [put("b", 0), txn_put("b"), grant(8)] {
        assert_eq!(member.apply(request), Err(Error::NoSpace));
    }
    for request in [delete("a"), txn_range("a"), compaction(2), revoke(7)] {
        member.done(request);
    }
    member.done(alarm(AlarmAction::Deactivate, AlarmType::Nospace));
    member.done(put("b", 0));
}

#[test]
fn a_corrupt_state_is_not_built_upon() {
    let mut member = Member::new();
    let id = member.state.member_id();
    member.done(grant(7));
    member.done(put("a", 0));
    member.done(alarm(AlarmAction::Activate, AlarmType::Corrupt));
    let refused = [
        put("b", 0),
        delete("a"),
        txn_range("a"),
        compaction(2),
        Request::AutoCompact(AutoCompact { term: TERM, revision: 2 }),
        grant(8),
        revoke(7),
        expire(TERM, &[7]),
    ];
    for request in refused {
        assert_eq!(member.apply(request), Err(Error::Corrupt));
    }
    member.done(publish(id));
    assert_eq!(member.state.members().get(id).expect("known").name, "one");
    member.done(change(Change::Add(added(5, true))));
    member.done(alarm(AlarmAction::Deactivate, AlarmType::Corrupt));
    member.done(put("b", 0));
}

#[test]
fn alarms_are_answered_as_etcd_does() {
    let mut member = Member::new();
    let mut alarms = |request| match member.done(request) {
        Response::Alarm(response) => response.alarms,
        other => panic!("{other:?}"),
    };
    let nospace = AlarmMember { member_id: 9, alarm: AlarmType::Nospace as i32 };
    let corrupt = AlarmMember { member_id: 9, alarm: AlarmType::Corrupt as i32 };
    let none = Vec::<AlarmMember>::new();
    assert_eq!(alarms(alarm(AlarmAction::Get, AlarmType::None)), none);
    assert_eq!(alarms(alarm(AlarmAction::Deactivate, AlarmType::Nospace)), none);
    assert_eq!(alarms(alarm(AlarmAction::Activate, AlarmType::None)), none);
    assert_eq!(alarms(alarm(AlarmAction::Activate, AlarmType::Nospace)), [nospace]);
    assert_eq!(alarms(alarm(AlarmAction::Activate, AlarmType::Corrupt)), [corrupt]);
    assert_eq!(alarms(alarm(AlarmAction::Get, AlarmType::None)), [nospace, corrupt]);
    assert_eq!(alarms(alarm(AlarmAction::Get, AlarmType::Corrupt)), [corrupt]);
    assert_eq!(alarms(alarm(AlarmAction::Deactivate, AlarmType::Nospace)), [nospace]);
    assert_eq!(alarms(alarm(AlarmAction::Get, AlarmType::None)), [corrupt]);
}

/// A new leader's first entry is applied, and is nothing to write a checkpoint for.
#[test]
fn an_empty_entry_only_moves_the_applied_index() {
    let mut member = Member::new();
    member.state.cut();
    let entry = Mark { index: 2, term: TERM };
    member.state.apply_empty(entry);
    assert_eq!(member.state.applied(), entry);
    assert!(member.state.dirty().is_empty());
}

/// When physical compaction runs differs between members; what they hold does not.
#[test]
fn equal_logs_make_equal_states() {
    let log = || {
        vec![
            grant(7),
            put("a", 7),
            put("a", 0),
            txn_put("b"),
            compaction(3),
            delete("a"),
            expire(TERM, &[7]),
            change(Change::Add(added(5, true))),
            change(Change::Add(added(5, true))),
            change(Change::Remove(5)),
            alarm(AlarmAction::Activate, AlarmType::Nospace),
            put("refused", 0),
        ]
    };
    let (mut eager, mut late) = (Member::new(), Member::new());
    for (one, other) in log().into_iter().zip(log()) {
        assert_eq!(eager.apply(one), late.apply(other));
        while !eager.state.compact_step(i64::MAX, 1) {}
        assert_eq!(eager.state.hash(), late.state.hash());
        assert_eq!(eager.state.rolling_hash(), late.state.rolling_hash());
    }
    assert_eq!(eager.effects.changes.len(), late.effects.changes.len());
}

/// Whatever an entry does differently is seen after it, and goes on being seen.
#[test]
fn what_is_applied_differently_shows_in_the_rolling_hash() {
    let differing: Vec<[Request; 2]> = vec![
        [put("a", 0), put("b", 0)],
        [put("k", 0), delete("k")],
        [delete("k"), txn_range("k")],
        [grant(7), grant(8)],
        [revoke(1), delete("none")],
        [remainders(TERM, &[(1, 5)]), remainders(TERM, &[(1, 6)])],
        [compaction(2), compaction(3)],
        [
            alarm(AlarmAction::Activate, AlarmType::Nospace),
            alarm(AlarmAction::Get, AlarmType::None),
        ],
        [change(Change::Add(added(5, true))), change(Change::Add(added(5, false)))],
        [change(Change::Remove(9)), delete("none")],
    ];
    for (number, [one, other]) in differing.into_iter().enumerate() {
        let [mut member, mut different] = [Member::new(), Member::new()];
        for member in [&mut member, &mut different] {
            for request in [grant(1), put("k", 0), put("k", 0), change(Change::Add(added(9, true)))]
            {
                member.done(request);
            }
        }
        assert_eq!(member.state.rolling_hash(), different.state.rolling_hash());
        member.done(one);
        different.done(other);
        assert_ne!(member.state.rolling_hash(), different.state.rolling_hash(), "{number}");
        for member in [&mut member, &mut different] {
            // Refused by one of them, for want of space.
            let _ = member.apply(put("after", 0));
        }
        assert_ne!(member.state.rolling_hash(), different.state.rolling_hash(), "{number}");
    }
}

#[test]
fn the_rolling_hash_goes_on_after_a_restart() {
    let mut member = Member::new();
    member.done(put("a", 0));
    let Cut { head, members, dirty, .. } = member.state.cut();
    let store = Store::restore(dirty.records, head.revision, head.compact_revision).unwrap();
    let state = StateMachine::restore(Restored {
        head,
        members,
        leases: Vec::new(),
        auth: Vec::new(),
        store,
    });
    let mut restarted = Member { state, index: member.index, effects: Effects::default() };
    for member in [&mut member, &mut restarted] {
        member.done(put("b", 0));
    }
    assert_ne!(member.state.rolling_hash(), 0);
    assert_eq!(member.state.rolling_hash(), restarted.state.rolling_hash());
}
