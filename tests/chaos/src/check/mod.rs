//! Whether a history keeps what etcd promises. Pure: a history goes in, violations come out.
//!
//! ```text
//!  watches of all keys ──▶ truth: what each revision changed, the same on all members
//!        operations ──▶ kv:     every answer is that of the state at its revision, in real time
//!                        general: the same for each key, without believing revisions
//!        watches    ──▶ watch:  each got all that it asked for, once, in order, whole
//!        leases     ──▶ lease:  none ended before its time, all ended
//!        the end    ──▶ ends:   all members have the same
//! ```
//!
//! Why revisions may be believed as a witness: linearizability asks whether *some* order of
//! the operations, which respects real time, explains all answers. Revisions propose one.
//! If it explains everything it is such an order, whoever proposed it; and an etcd whose
//! answers do not fit its own revisions has broken its promise as well.

mod ends;
mod general;
mod kv;
mod lease;
#[cfg(test)]
mod tests;
pub mod truth;
mod watch;

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use crate::history::{History, Operation, Outcome};
use truth::Truth;

/// How many violations of a guarantee are spelled out; the rest are counted.
const EXAMPLES_MAX: usize = 5;

/// What is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guarantee {
    /// All members tell one history, in which each revision can follow the one before.
    OneHistory,
    /// No revision is missing from it.
    NoHole,
    /// A write is in the history as it was asked for, where its answer says.
    WriteIsThere,
    /// A write is there once, and only if it was not refused.
    AtMostOnce,
    /// What is in the history was asked for by somebody, or was the end of a lease.
    NothingFromNowhere,
    /// An answer is that of the state at its revision.
    AnswerFits,
    /// What began after something else had ended comes later.
    RealTime,
    /// A read that any member may answer is of a state that was.
    Serializable,
    /// What one member says never goes back while it runs.
    MemberMonotonic,
    /// Each key's operations are linearizable, whatever the revisions are.
    General,
    /// Events match what the watch asked for.
    WatchFilter,
    /// Events come in the order of revisions.
    WatchOrdered,
    /// An event comes once.
    WatchUnique,
    /// The events of a revision come together.
    WatchAtomic,
    /// No event is missing between the first and the last.
    WatchReliable,
    /// A watch begins with the first event at or after the revision it asked for.
    WatchResumable,
    /// Progress is told only when everything before it was.
    WatchBookmarkable,
    /// The previous value is the one that was there.
    WatchPrevKv,
    /// A watch is ended as compacted only if that is so.
    WatchCompacted,
    /// No lease ends before its time.
    LeaseNeverEarly,
    /// A lease takes all of its keys with it, and does not come back.
    LeaseComplete,
    /// Every lease ends at last.
    LeaseEnds,
    /// All members have the same in the end.
    MembersEqual,
    /// The cluster works again when nothing is broken any more.
    Recovers,
    /// A member runs until it is stopped.
    MembersStayUp,
}

/// Counts what was checked, and keeps what was broken.
#[derive(Debug, Default)]
pub struct Checks {
    /// How often each guarantee was checked.
    pub counts: BTreeMap<Guarantee, u64>,
    /// How often each was broken.
    pub broken: BTreeMap<Guarantee, u64>,
    /// Examples of what broke it.
    pub examples: Vec<(Guarantee, String)>,
    /// What could not be decided, and why.
    pub undecided: Vec<String>,
}

impl Checks {
    /// Checks one thing.
    pub fn check(&mut self, guarantee: Guarantee, holds: bool, tell: impl FnOnce() -> String) {
        *self.counts.entry(guarantee).or_default() += 1;
        if !holds {
            let broken = self.broken.entry(guarantee).or_default();
            *broken += 1;
            if *broken <= EXAMPLES_MAX as u64 {
                self.examples.push((guarantee, tell()));
            }
        }
    }

    /// Whether nothing is broken.
    pub fn passed(&self) -> bool {
        self.broken.is_empty()
    }
}

impl Operation {
    /// The header's revision, if it was done.
    pub fn revision(&self) -> Option<i64> {
        match &self.outcome {
            Outcome::Done { revision, .. } => Some(*revision),
            _ => None,
        }
    }
}

/// Checks everything.
pub fn check(history: &History) -> Checks {
    let mut checks = Checks::default();
    let truth = Truth::new(history, &mut checks);
    let leases = lease::Leases::new(history);
    let by_clients = kv::check(history, &truth, &leases, &mut checks);
    lease::check(history, &truth, &leases, &by_clients, &mut checks);
    watch::check(history, &truth, &mut checks);
    general::check(history, &truth, &mut checks);
    ends::check(history, &truth, &mut checks);
    checks
}

/// Revisions that a client's operation explains.
type ByClients = HashSet<i64>;
