//! Leases: never early, with all of their keys, and at last.
//!
//! A lease that was granted or renewed with a time to live must live that long after the
//! request was *sent*: the server began to count later than that. Counting from the answer
//! would be wrong, since an answer may be long under way. A renewal counts if it was answered
//! before the lease was due: one that comes later may meet the end on its way, and etcd has
//! been seen to answer it and to end the lease all the same; that is told as undecided. When a lease ended is told by the
//! delete of its keys, and that it ended before some moment by who knew of it then.

use std::collections::{BTreeMap, BTreeSet};

use super::truth::{State, Truth, apply};
use super::{ByClients, Checks, Guarantee};
use crate::history::{History, Outcome, Request};

/// What clients know of a lease.
#[derive(Default)]
struct Lease {
    /// When its grant and its renewals were asked for and answered, and for how long.
    renewals: Vec<(u64, u64, u64)>,
    /// When its end was first asked for.
    revoke_us: Option<u64>,
}

/// All leases of a history.
pub(super) struct Leases(BTreeMap<i64, Lease>);

impl Leases {
    pub(super) fn new(history: &History) -> Leases {
        let mut leases: BTreeMap<i64, Lease> = BTreeMap::new();
        for operation in &history.operations {
            let call_us = operation.call_us;
            match (&operation.request, &operation.outcome) {
                (
                    Request::Grant { id, .. } | Request::KeepAlive { id },
                    Outcome::Done { ttl_secs, .. },
                ) if *ttl_secs > 0 => {
                    let ttl_us = u64::try_from(*ttl_secs).unwrap_or(0) * 1_000_000;
                    let renewal = (call_us, operation.return_us, ttl_us);
                    leases.entry(*id).or_default().renewals.push(renewal);
                }
                (Request::Revoke { id }, Outcome::Done { .. } | Outcome::Unknown(_)) => {
                    let lease = leases.entry(*id).or_default();
                    lease.revoke_us = Some(lease.revoke_us.map_or(call_us, |at| at.min(call_us)));
                }
                _ => {}
            }
        }
        for lease in leases.values_mut() {
            lease.renewals.sort_unstable();
        }
        Leases(leases)
    }

    /// Whether the lease may have ended by then.
    pub(super) fn may_have_ended(&self, id: i64, at_us: u64) -> bool {
        self.was_revoked(id, at_us) || self.due_us(id, at_us) <= at_us
    }

    /// Until when it lives, by what was asked for before `at_us` and answered in time.
    fn due_us(&self, id: i64, at_us: u64) -> u64 {
        let mut due_us = 0;
        for (call_us, return_us, ttl_us) in self.before(id, at_us) {
            if due_us == 0 || return_us <= due_us {
                due_us = due_us.max(call_us + ttl_us);
            }
        }
        due_us
    }

    /// The same with renewals that were answered late.
    fn hoped_us(&self, id: i64, at_us: u64) -> u64 {
        self.before(id, at_us).map(|(call_us, _, ttl_us)| call_us + ttl_us).max().unwrap_or(0)
    }

    fn before(&self, id: i64, at_us: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        let renewals = self.0.get(&id).map_or(&[][..], |lease| &lease.renewals);
        renewals.iter().copied().filter(move |(call_us, ..)| *call_us <= at_us)
    }

    /// Whether somebody asked for its end before.
    fn was_revoked(&self, id: i64, at_us: u64) -> bool {
        let revoke_us = self.0.get(&id).and_then(|lease| lease.revoke_us);
        revoke_us.is_some_and(|revoke_us| revoke_us <= at_us)
    }
}

/// Checks the ends of leases: the deletes that are no client's.
pub(super) fn check(
    history: &History,
    truth: &Truth,
    leases: &Leases,
    by_clients: &ByClients,
    checks: &mut Checks,
) {
    let mut revoked: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for operation in &history.operations {
        if let (Request::Revoke { id }, Some(revision)) = (&operation.request, operation.revision())
        {
            revoked.entry(revision).or_default().push(*id);
        }
    }
    let mut ended: BTreeSet<i64> = BTreeSet::new();
    let mut state = State::new();
    for revision in 1..=truth.last() {
        let changes = truth.changes(revision);
        for kv in changes.iter().filter_map(|change| change.kv.as_ref()) {
            checks.check(Guarantee::LeaseComplete, !ended.contains(&kv.lease), || {
                format!("revision {revision} hangs {kv:?} on a lease that had ended")
            });
        }
        let deleted = changes.iter().filter(|change| change.kv.is_none());
        let of_lease = |key: &str| state.get(key).map_or(0, |kv| kv.lease);
        let ends: BTreeSet<i64> = deleted.map(|change| of_lease(&change.key)).collect();
        if let (false, Some(id)) = (by_clients.contains(&revision), ends.first().copied())
            && id != 0
        {
            let keys = state.values().filter(|kv| kv.lease == id).count();
            checks.check(
                Guarantee::LeaseComplete,
                ends.len() == 1 && keys == changes.len(),
                || format!("revision {revision} is {changes:?}, but lease {id} had {keys} keys"),
            );
            let seen_us = truth.seen_us(revision);
            checks.check(Guarantee::LeaseNeverEarly, leases.may_have_ended(id, seen_us), || {
                let due_us = leases.due_us(id, seen_us);
                format!(
                    "revision {revision} ends lease {id}: known at {seen_us} us, due at {due_us} us"
                )
            });
            let due_us = leases.due_us(id, seen_us);
            if due_us <= seen_us
                && leases.hoped_us(id, seen_us) > seen_us
                && !leases.was_revoked(id, seen_us)
            {
                let late_us = leases.hoped_us(id, seen_us);
                checks.undecided.push(format!(
                    "lease {id}, due at {due_us} us, was renewed late until {late_us} us, and ended \
                     at {seen_us} us"
                ));
            }
            ended.insert(id);
        }
        apply(&mut state, changes);
        for id in revoked.remove(&revision).unwrap_or_default() {
            let left = state.values().find(|kv| kv.lease == id);
            checks.check(Guarantee::LeaseComplete, left.is_none(), || {
                format!("lease {id} was revoked by revision {revision}, which still has {left:?}")
            });
        }
    }
    if !history.finals.is_empty() {
        for id in leases.0.keys() {
            let left = state.values().find(|kv| kv.lease == *id);
            checks.check(Guarantee::LeaseEnds, left.is_none(), || {
                format!("lease {id} is over, and {left:?} is still there")
            });
        }
    }
}
