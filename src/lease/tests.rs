use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::error::Error;
use crate::pb::leasepb;

const NEVER: Duration = Duration::ZERO;
const INTERVAL: Duration = Duration::from_secs(300);

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// A lessor with leases of `(id, ttl)`.
fn lessor(leases: &[(i64, i64)]) -> Lessor {
    let mut lessor = Lessor::new();
    for (id, ttl) in leases {
        lessor.grant(*id, *ttl).unwrap();
    }
    lessor
}

/// A leader's expiry at time zero, holding all leases of `lessor`.
fn leading(lessor: &Lessor, interval: Duration) -> Expiry {
    let mut expiry = Expiry::new(interval);
    expiry.promote();
    for lease in lessor.iter() {
        expiry.schedule(lease, Duration::ZERO, Duration::ZERO);
    }
    expiry
}

#[test]
fn the_shortest_ttl_outlives_an_election() {
    let with = |heartbeat_ms, ticks| min_ttl_secs(Duration::from_millis(heartbeat_ms), ticks);
    assert_eq!(with(100, 10), 2);
    assert_eq!(with(100, 7), 1);
    assert_eq!(with(500, 10), 8);
    assert_eq!(with(10, 3), 1);
}

#[test]
fn a_grant_needs_a_free_id() {
    let mut lessor = lessor(&[(7, 60)]);
    assert_eq!(lessor.grant(7, 60), Err(Error::LeaseExists));
    assert_eq!(lessor.grant(0, 60), Err(Error::LeaseNotFound));
    assert_eq!(lessor.grant(8, MAX_TTL_SECS + 1), Err(Error::LeaseTtlTooLarge));
    assert_eq!(lessor.grant(-8, 60), Ok(()));
    assert_eq!(lessor.iter().map(Lease::id).collect::<Vec<_>>(), [-8, 7]);
    assert_eq!(lessor.iter_after(-8).map(Lease::id).collect::<Vec<_>>(), [7]);
}

#[test]
fn a_key_hangs_on_one_lease() {
    let mut lessor = lessor(&[(7, 60), (8, 60)]);
    lessor.attach(&key("b"), 7).unwrap();
    lessor.attach(&key("a"), 7).unwrap();
    lessor.attach(&key("c"), 7).unwrap();
    lessor.attach(&key("b"), 8).unwrap();
    assert_eq!(lessor.attach(&key("a"), 9), Err(Error::LeaseNotFound));
    assert_eq!(lessor.lease_of(b"a"), 7);
    assert_eq!(lessor.lease_of(b"b"), 8);
    lessor.attach(&key("c"), 0).unwrap();
    assert_eq!(lessor.lease_of(b"c"), 0);
    assert_eq!(lessor.revoke(7), Ok(vec![key("a")]));
    assert_eq!(lessor.revoke(7), Err(Error::LeaseNotFound));
    assert_eq!(lessor.lease_of(b"a"), 0);
    assert_eq!(lessor.revoke(8), Ok(vec![key("b")]));
    assert_eq!(lessor, Lessor::new());
}

#[test]
fn what_is_stored_comes_back() {
    let mut before = lessor(&[(7, 60), (-8, 90)]);
    before.attach(&key("a"), 7).unwrap();
    assert!(before.set_remaining(-8, 30).is_some());
    assert!(before.set_remaining(9, 30).is_none());
    let records: Vec<leasepb::Lease> = before.iter().map(Lease::to_record).collect();
    let mut after = Lessor::restore(records);
    assert_eq!(after.lease_of(b"a"), 0);
    after.attach(&key("a"), 7).unwrap();
    assert_eq!(after, before);
}

#[test]
fn a_lease_is_due_at_its_deadline_and_again_until_forgotten() {
    let lessor = lessor(&[(7, 10), (8, 5)]);
    let mut expiry = leading(&lessor, NEVER);
    assert_eq!(expiry.expired(secs(5) - Duration::from_nanos(1), 9), Vec::<i64>::new());
    assert_eq!(expiry.remaining(7, secs(4)), Some(secs(6)));
    assert_eq!(expiry.expired(secs(10), 1), [8]);
    assert_eq!(expiry.expired(secs(10), 9), [7]);
    assert_eq!(expiry.remaining(8, secs(10)), Some(Duration::ZERO));
    assert_eq!(expiry.renew(8, secs(10)), Renewal::Expired);
    assert_eq!(expiry.expired(secs(12), 9), Vec::<i64>::new());
    expiry.forget(8);
    assert_eq!(expiry.expired(secs(13), 9), [7]);
    assert_eq!(expiry.renew(8, secs(13)), Renewal::NotFound);
    assert_eq!(expiry.remaining(8, secs(13)), None);
    expiry.forget(7);
    assert_eq!(expiry.len(), 0);
}

#[test]
fn a_keepalive_starts_the_ttl_afresh() {
    let lessor = lessor(&[(7, 10)]);
    let mut expiry = leading(&lessor, NEVER);
    assert_eq!(expiry.renew(7, secs(9)), Renewal::Renewed { ttl_secs: 10 });
    assert_eq!(expiry.expired(secs(18), 9), Vec::<i64>::new());
    assert_eq!(expiry.expired(secs(19), 9), [7]);
}

#[test]
fn only_the_leader_expires_and_renews() {
    let lessor = lessor(&[(7, 10)]);
    let mut expiry = Expiry::new(INTERVAL);
    let lease = lessor.get(7).unwrap();
    expiry.schedule(lease, secs(0), secs(0));
    assert_eq!(expiry.renew(7, secs(1)), Renewal::NotPrimary);
    assert!(expiry.is_empty());

    expiry.promote();
    assert_eq!(expiry.renew(7, secs(1)), Renewal::NotFound);
    expiry.schedule(lease, secs(100), secs(1));
    // Once only: a second call moves nothing.
    expiry.schedule(lease, secs(105), secs(1));
    assert_eq!(expiry.remaining(7, secs(100)), Some(secs(11)));
    expiry.demote();
    assert_eq!(expiry.expired(secs(1000), 9), Vec::<i64>::new());
    assert_eq!(expiry.renew(7, secs(100)), Renewal::NotPrimary);
    assert_eq!(expiry.remaining(7, secs(100)), None);
}

#[test]
fn a_keepalive_right_after_taking_over_takes_nothing_back() {
    let lessor = lessor(&[(7, 10)]);
    let mut expiry = Expiry::new(INTERVAL);
    expiry.promote();
    // The leader before may have told a client at 100.9 that it has ten seconds.
    expiry.schedule(lessor.get(7).unwrap(), secs(100), secs(1));
    assert_eq!(expiry.renew(7, secs(100)), Renewal::Renewed { ttl_secs: 10 });
    assert_eq!(expiry.expired(Duration::from_millis(110_999), 9), Vec::<i64>::new());
    assert_eq!(expiry.renew(7, secs(105)), Renewal::Renewed { ttl_secs: 10 });
    assert_eq!(expiry.expired(Duration::from_millis(114_999), 9), Vec::<i64>::new());
    assert_eq!(expiry.expired(secs(115), 9), [7]);
}

#[test]
fn long_leases_have_their_remainder_committed() {
    let lessor = lessor(&[(7, 300), (8, 1000)]);
    let mut expiry = leading(&lessor, INTERVAL);
    assert_eq!(expiry.due_checkpoints(secs(299), 9), []);
    assert_eq!(expiry.due_checkpoints(secs(300) + Duration::from_millis(1), 9), [(8, 700)]);
    assert_eq!(expiry.due_checkpoints(secs(599), 9), []);
    assert_eq!(expiry.due_checkpoints(secs(601), 9), [(8, 399)]);
    assert_eq!(expiry.due_checkpoints(secs(901), 9), [(8, 99)]);
    assert_eq!(expiry.due_checkpoints(secs(5000), 9), []);
}

#[test]
fn no_checkpoints_without_an_interval() {
    let lessor = lessor(&[(7, MAX_TTL_SECS)]);
    let mut expiry = leading(&lessor, NEVER);
    assert_eq!(expiry.due_checkpoints(secs(1_000_000), 9), []);
    assert_eq!(expiry.renew(7, secs(1_000_000)), Renewal::Renewed { ttl_secs: MAX_TTL_SECS });
}

#[test]
fn a_new_leader_goes_by_the_committed_remainder() {
    let mut lessor = lessor(&[(7, 1000)]);
    lessor.set_remaining(7, 400);
    let mut expiry = Expiry::new(INTERVAL);
    expiry.promote();
    expiry.schedule(lessor.get(7).unwrap(), secs(50), secs(1));
    assert_eq!(expiry.remaining(7, secs(50)), Some(secs(401)));
    assert!(matches!(expiry.renew(7, secs(60)), Renewal::CommitFirst { .. }));
}

#[test]
fn the_committed_remainder_outlives_any_number_of_leaders() {
    let mut lessor = lessor(&[(7, 1000)]);
    lessor.set_remaining(7, 400);
    for leader in 1..=4 {
        let now = secs(50 * leader);
        let mut expiry = Expiry::new(INTERVAL);
        expiry.promote();
        expiry.schedule(lessor.get(7).unwrap(), now, secs(1));
        assert_eq!(expiry.remaining(7, now), Some(secs(401)), "leader {leader}");
        lessor = Lessor::restore(lessor.iter().map(Lease::to_record));
    }
}

#[test]
fn a_renewal_takes_back_what_the_log_holds() {
    let lessor = lessor(&[(7, 1000)]);
    let mut expiry = leading(&lessor, INTERVAL);
    assert_eq!(expiry.due_checkpoints(secs(300), 9), [(7, 700)]);
    let Renewal::CommitFirst { token } = expiry.renew(7, secs(400)) else { panic!() };
    assert_eq!(expiry.remaining(7, secs(400)), Some(secs(600)), "nothing has changed yet");
    // Another remainder is on its way before the first is taken back.
    assert_eq!(expiry.due_checkpoints(secs(600), 9), [(7, 400)]);
    expiry.renewal_committed(7, token);
    let Renewal::CommitFirst { token: second } = expiry.renew(7, secs(601)) else { panic!() };
    assert_ne!(token, second);
    expiry.renewal_committed(7, second);
    expiry.renewal_committed(7, token);
    assert_eq!(expiry.renew(7, secs(602)), Renewal::Renewed { ttl_secs: 1000 });
    assert_eq!(expiry.remaining(7, secs(602)), Some(secs(1000)));
}

#[test]
fn a_token_of_an_earlier_leadership_means_nothing() {
    let mut lessor = lessor(&[(7, 1000)]);
    let mut expiry = leading(&lessor, INTERVAL);
    expiry.due_checkpoints(secs(300), 9);
    let Renewal::CommitFirst { token } = expiry.renew(7, secs(400)) else { panic!() };
    lessor.set_remaining(7, 700);
    expiry.promote();
    expiry.schedule(lessor.get(7).unwrap(), secs(500), secs(1));
    expiry.renewal_committed(7, token);
    assert!(matches!(expiry.renew(7, secs(501)), Renewal::CommitFirst { .. }));
}

#[derive(Debug, Clone)]
enum Action {
    Grant(i64),
    Revoke(i64),
    Attach(u8, i64),
    Detach(u8),
}

fn any_action() -> impl Strategy<Value = Action> {
    let id = || 0..6_i64;
    prop_oneof![
        2 => id().prop_map(Action::Grant),
        1 => id().prop_map(Action::Revoke),
        6 => (0..8_u8, id()).prop_map(|(key, id)| Action::Attach(key, id)),
        2 => (0..8_u8).prop_map(Action::Detach),
    ]
}

#[derive(Debug, Clone)]
enum Tick {
    /// Grants or schedules a lease of this TTL.
    Grant(i64, i64),
    Renew(i64),
    Forget(i64),
    Pass(u64),
    Expired(usize),
}

fn any_tick() -> impl Strategy<Value = Tick> {
    let id = || 1..8_i64;
    prop_oneof![
        3 => (id(), 2..30_i64).prop_map(|(id, ttl)| Tick::Grant(id, ttl)),
        3 => id().prop_map(Tick::Renew),
        1 => id().prop_map(Tick::Forget),
        4 => (0..5000_u64).prop_map(Tick::Pass),
        3 => (1..4_usize).prop_map(Tick::Expired),
    ]
}

proptest! {
    #[test]
    fn the_lessor_does_what_two_plain_maps_do(actions in prop::collection::vec(any_action(), 0..80)) {
        let mut lessor = Lessor::new();
        let mut ids = BTreeSet::new();
        let mut owner: BTreeMap<u8, i64> = BTreeMap::new();
        for action in actions {
            match action {
                Action::Grant(id) => {
                    prop_assert_eq!(lessor.grant(id, 10).is_ok(), id != 0 && ids.insert(id));
                }
                Action::Revoke(id) => {
                    let known = ids.remove(&id);
                    let keys: Vec<Bytes> = owner
                        .iter()
                        .filter(|(_, lease)| **lease == id)
                        .map(|(key, _)| Bytes::from(vec![*key]))
                        .collect();
                    owner.retain(|_, lease| *lease != id);
                    prop_assert_eq!(lessor.revoke(id).ok(), known.then_some(keys));
                }
                Action::Attach(key, id) => {
                    let known = id == 0 || ids.contains(&id);
                    prop_assert_eq!(lessor.attach(&Bytes::from(vec![key]), id).is_ok(), known);
                    if id == 0 {
                        owner.remove(&key);
                    } else if known {
                        owner.insert(key, id);
                    }
                }
                Action::Detach(key) => {
                    lessor.detach(&[key]);
                    owner.remove(&key);
                }
            }
            for key in 0..8_u8 {
                prop_assert_eq!(lessor.lease_of(&[key]), owner.get(&key).copied().unwrap_or(0));
            }
            prop_assert_eq!(lessor.iter().map(|lease| lease.keys().len()).sum::<usize>(), owner.len());
            prop_assert!(lessor.iter().map(Lease::id).eq(ids.iter().copied()));
            prop_assert_eq!((lessor.len(), lessor.is_empty()), (ids.len(), ids.is_empty()));
        }
    }

    /// Deadlines in a plain map, searched from end to end.
    #[test]
    fn expiry_does_what_a_plain_map_does(ticks in prop::collection::vec(any_tick(), 0..120)) {
        let mut now = Duration::ZERO;
        let mut expiry = Expiry::new(NEVER);
        expiry.promote();
        // id -> (ttl, deadline, when to report next)
        let mut plain: BTreeMap<i64, (i64, Duration, Duration)> = BTreeMap::new();
        for tick in ticks {
            match tick {
                Tick::Grant(id, ttl) => {
                    expiry.schedule(lessor(&[(id, ttl)]).get(id).unwrap(), now, Duration::ZERO);
                    let deadline = now + secs(ttl.unsigned_abs());
                    plain.entry(id).or_insert((ttl, deadline, deadline));
                }
                Tick::Renew(id) => {
                    let expected = match plain.get_mut(&id) {
                        None => Renewal::NotFound,
                        Some((_, deadline, _)) if *deadline <= now => Renewal::Expired,
                        Some((ttl, deadline, report)) => {
                            *deadline = now + secs(ttl.unsigned_abs());
                            *report = *deadline;
                            Renewal::Renewed { ttl_secs: *ttl }
                        }
                    };
                    prop_assert_eq!(expiry.renew(id, now), expected);
                }
                Tick::Forget(id) => {
                    expiry.forget(id);
                    plain.remove(&id);
                }
                Tick::Pass(millis) => now += Duration::from_millis(millis),
                Tick::Expired(max) => {
                    let mut due: Vec<(Duration, i64)> = plain
                        .iter()
                        .filter(|(_, (_, _, report))| *report <= now)
                        .map(|(id, (_, _, report))| (*report, *id))
                        .collect();
                    due.sort();
                    due.truncate(max);
                    let due: Vec<i64> = due.into_iter().map(|(_, id)| id).collect();
                    for id in &due {
                        plain.get_mut(id).unwrap().2 = now + REVOKE_RETRY;
                    }
                    prop_assert_eq!(expiry.expired(now, max), due);
                }
            }
            prop_assert_eq!(expiry.len(), plain.len());
            for (id, (_, deadline, _)) in &plain {
                prop_assert_eq!(expiry.remaining(*id, now), Some(deadline.saturating_sub(now)));
            }
        }
    }
}
