//! The end: all members have the state that the history leads to, and equal hashes.

use super::truth::{State, Truth, apply};
use super::{Checks, Guarantee};
use crate::history::History;

/// Checks it.
pub(super) fn check(history: &History, truth: &Truth, checks: &mut Checks) {
    let mut state = State::new();
    for revision in 0..=truth.last() {
        apply(&mut state, truth.changes(revision));
    }
    let expected: Vec<_> = state.into_values().collect();
    for last in &history.finals {
        checks.check(Guarantee::MembersEqual, last.revision == truth.last(), || {
            let (member, revision) = (last.member, last.revision);
            format!("member {member} is at revision {revision}, the history at {}", truth.last())
        });
        checks.check(Guarantee::MembersEqual, last.kvs == expected, || {
            let extra = last.kvs.iter().find(|kv| !expected.contains(kv));
            let missing = expected.iter().find(|kv| !last.kvs.contains(kv));
            format!("member {} has {extra:?} and lacks {missing:?}", last.member)
        });
    }
    for pair in history.finals.windows(2) {
        let [a, b] = pair else { continue };
        checks.check(Guarantee::MembersEqual, a.hash == b.hash, || {
            format!("hashes: member {} {:?}, member {} {:?}", a.member, a.hash, b.member, b.hash)
        });
    }
}
