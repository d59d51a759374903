//! Operations against the truth: linearizability with revisions as the witness.
//!
//! The truth is walked once. At each revision the transaction that claims it is done again
//! on the state before, and must answer and change what was answered and changed; then
//! everything that only read there must fit. A revision that nobody claims belongs to an
//! operation whose outcome is unknown, which its value names, or it is a delete, which
//! names nobody: those are matched with the deletes of unknown outcome that could have been
//! it, each at most once, and what is left must be the end of a lease.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::lease::Leases;
use super::truth::{Change, Evaluation, State, Truth, apply, evaluate};
use super::{ByClients, Checks, Guarantee};
use crate::history::{Action, Answer, History, Operation, Outcome, Request};

/// Checks all operations; says which revisions were clients' own.
pub(super) fn check(
    history: &History,
    truth: &Truth,
    leases: &Leases,
    checks: &mut Checks,
) -> ByClients {
    let operations = &history.operations;
    let floors = floors(history);
    let mut walk = Walk::new(operations, floors);
    let mut state = State::new();
    for revision in 1..=truth.last() {
        let changes = truth.changes(revision);
        if !changes.is_empty() {
            walk.explain(&state, revision, changes, checks);
        }
        apply(&mut state, changes);
        walk.read(&state, revision, checks);
    }
    walk.leftovers(truth, checks);
    walk.match_deletes(truth, leases, checks);
    walk.real_time(checks);
    member_monotonic(operations, checks);
    walk.by_clients
}

/// A revision of deletes that no answered operation claims.
struct Orphan {
    revision: i64,
    /// The lease whose keys they were.
    lease: Option<i64>,
    /// Operations of unknown outcome that would have done just that.
    candidates: Vec<usize>,
}

struct Walk<'a> {
    operations: &'a [Operation],
    /// What was known to exist when the operation began.
    floors: Vec<i64>,
    /// Who says that it wrote a revision.
    writers: HashMap<i64, Vec<usize>>,
    /// Who read at a revision.
    readers: BTreeMap<i64, Vec<usize>>,
    /// Who put a value.
    authors: HashMap<&'a str, usize>,
    /// Operations of unknown outcome that delete.
    unknown_deletes: Vec<usize>,
    /// Where operations of unknown outcome took place.
    placed: BTreeMap<usize, i64>,
    orphans: Vec<Orphan>,
    by_clients: ByClients,
}

/// The parts of a transaction.
struct Txn<'a> {
    request: (&'a [crate::history::Compare], &'a [Action], &'a [Action]),
    is_serializable: bool,
}

impl Operation {
    fn txn(&self) -> Option<Txn<'_>> {
        match &self.request {
            Request::Txn { compares, then, otherwise, serializable } => {
                Some(Txn { request: (compares, then, otherwise), is_serializable: *serializable })
            }
            _ => None,
        }
    }

    /// Whether it says that it changed something.
    pub fn says_it_wrote(&self) -> bool {
        let Outcome::Done { answers, .. } = &self.outcome else { return false };
        answers.iter().any(|answer| match answer {
            Answer::Put { .. } => true,
            Answer::Delete { deleted, .. } => *deleted > 0,
            Answer::Range { .. } => false,
        })
    }

    /// The revision that it reads at: its own choice, or that of its header.
    fn reads_at(&self) -> Option<i64> {
        match self.txn()?.request.1 {
            [Action::Range { revision, .. }] if *revision > 0 => self.revision().map(|_| *revision),
            _ => self.revision(),
        }
    }
}

impl<'a> Txn<'a> {
    fn evaluate(&self, state: &State, revision: i64) -> Evaluation {
        let (compares, then, otherwise) = self.request;
        evaluate(state, revision, compares, then, otherwise)
    }

    fn actions(&self) -> impl Iterator<Item = &'a Action> + use<'a> {
        self.request.1.iter().chain(self.request.2)
    }
}

/// For each operation the newest revision that somebody knew of before it was called.
fn floors(history: &History) -> Vec<i64> {
    let mut known: Vec<(u64, i64)> = Vec::new();
    for operation in &history.operations {
        known.extend(operation.revision().map(|revision| (operation.return_us, revision)));
    }
    for message in history.watches.iter().flat_map(|watch| &watch.messages) {
        known.push((message.at_us, message.revision));
    }
    known.sort_unstable();
    let mut highest = 0;
    for (_, revision) in &mut known {
        highest = highest.max(*revision);
        *revision = highest;
    }
    let floor = |operation: &Operation| {
        let before = known.partition_point(|(at_us, _)| *at_us < operation.call_us);
        before.checked_sub(1).map_or(0, |index| known[index].1)
    };
    history.operations.iter().map(floor).collect()
}

impl<'a> Walk<'a> {
    fn new(operations: &'a [Operation], floors: Vec<i64>) -> Walk<'a> {
        let mut walk = Walk {
            operations,
            floors,
            writers: HashMap::new(),
            readers: BTreeMap::new(),
            authors: HashMap::new(),
            unknown_deletes: Vec::new(),
            placed: BTreeMap::new(),
            orphans: Vec::new(),
            by_clients: HashSet::new(),
        };
        for (index, operation) in operations.iter().enumerate() {
            let Some(txn) = operation.txn() else { continue };
            for action in txn.actions() {
                if let Action::Put { value, .. } = action {
                    walk.authors.insert(value, index);
                }
            }
            let deletes = txn.actions().any(|action| matches!(action, Action::Delete { .. }));
            match (&operation.outcome, operation.revision(), operation.reads_at()) {
                (Outcome::Unknown(_), ..) if deletes => walk.unknown_deletes.push(index),
                (_, Some(revision), _) if operation.says_it_wrote() => {
                    walk.writers.entry(revision).or_default().push(index);
                }
                (_, _, Some(revision)) => walk.readers.entry(revision).or_default().push(index),
                _ => {}
            }
        }
        walk
    }

    /// Finds who made a revision, on the state before it.
    fn explain(&mut self, state: &State, revision: i64, changes: &[Change], checks: &mut Checks) {
        let writers = self.writers.remove(&revision).unwrap_or_default();
        for (nth, index) in writers.iter().enumerate() {
            let operation = &self.operations[*index];
            checks.check(Guarantee::AtMostOnce, nth == 0, || {
                format!("revision {revision} is claimed by {:?} too", operation)
            });
            self.by_clients.insert(revision);
            let Some(txn) = operation.txn() else { continue };
            let again = txn.evaluate(state, revision);
            checks.check(Guarantee::WriteIsThere, again.changes == changes, || {
                format!("revision {revision} is {changes:?}, but its writer is {operation:?}")
            });
            check_answer(operation, &again, revision, checks);
        }
        let values = changes.iter().filter_map(|change| change.kv.as_ref()).map(|kv| &kv.value);
        let authors: Vec<Option<usize>> =
            values.map(|value| self.authors.get(value.as_str()).copied()).collect();
        if authors.is_empty() {
            if writers.is_empty() {
                self.adopt(state, revision, changes);
            }
            return;
        }
        for author in &authors {
            let Some(index) = *author else {
                checks.check(Guarantee::NothingFromNowhere, false, || {
                    format!("revision {revision} is {changes:?}, which nobody asked for")
                });
                continue;
            };
            let operation = &self.operations[index];
            let fits = match &operation.outcome {
                Outcome::Done { .. } => operation.revision() == Some(revision),
                Outcome::Refused(_) => false,
                Outcome::Unknown(_) => *self.placed.entry(index).or_insert(revision) == revision,
            };
            checks.check(Guarantee::AtMostOnce, fits, || {
                format!(
                    "revision {revision} is {changes:?}, not as answered or again: {operation:?}"
                )
            });
            if matches!(operation.outcome, Outcome::Unknown(_))
                && let Some(txn) = operation.txn()
            {
                self.by_clients.insert(revision);
                let again = txn.evaluate(state, revision);
                checks.check(Guarantee::WriteIsThere, again.changes == changes, || {
                    format!("revision {revision} is {changes:?}, but its writer is {operation:?}")
                });
            }
        }
    }

    /// Remembers deletes that nobody claims, with who may have done them.
    fn adopt(&mut self, state: &State, revision: i64, changes: &[Change]) {
        let mut leases = changes.iter().map(|c| state.get(&c.key).map_or(0, |kv| kv.lease));
        let lease = leases.next().filter(|first| *first != 0 && leases.all(|l| l == *first));
        let could = |index: &&usize| {
            let txn = self.operations[**index].txn();
            self.floors[**index] < revision
                && txn.is_some_and(|txn| txn.evaluate(state, revision).changes == changes)
        };
        let candidates = self.unknown_deletes.iter().filter(could).copied().collect();
        self.orphans.push(Orphan { revision, lease, candidates });
    }

    /// Compares what was read at a revision.
    fn read(&mut self, state: &State, revision: i64, checks: &mut Checks) {
        for index in self.readers.remove(&revision).unwrap_or_default() {
            let operation = &self.operations[index];
            if let Some(txn) = operation.txn() {
                check_answer(operation, &txn.evaluate(state, revision), revision, checks);
            }
        }
    }

    /// What was said of revisions that are not there.
    fn leftovers(&self, truth: &Truth, checks: &mut Checks) {
        let writers = self.writers.values().flatten();
        for index in writers.chain(self.readers.values().flatten()) {
            let operation = &self.operations[*index];
            let wrote = operation.says_it_wrote();
            let guarantee = if wrote { Guarantee::WriteIsThere } else { Guarantee::AnswerFits };
            checks.check(guarantee, false, || {
                format!("not in the history, which ends at {}: {operation:?}", truth.last())
            });
        }
    }

    /// Gives each delete that nobody claims and no lease explains to an operation of its own.
    fn match_deletes(&mut self, truth: &Truth, leases: &Leases, checks: &mut Checks) {
        let needs_client = |orphan: &&Orphan| {
            let seen_us = truth.seen_us(orphan.revision);
            !orphan.lease.is_some_and(|id| leases.may_have_ended(id, seen_us))
        };
        let orphans: Vec<&Orphan> = self.orphans.iter().filter(needs_client).collect();
        let mut owner: HashMap<usize, usize> = HashMap::new();
        for (at, orphan) in orphans.iter().enumerate() {
            let found = augment(at, &orphans, &mut owner, &mut HashSet::new());
            checks.check(Guarantee::NothingFromNowhere, found || orphan.lease.is_some(), || {
                let (revision, changes) = (orphan.revision, truth.changes(orphan.revision));
                format!("revision {revision} is {changes:?}, which nobody asked for")
            });
        }
        for (operation, at) in owner {
            self.by_clients.insert(orphans[at].revision);
            self.placed.insert(operation, orphans[at].revision);
        }
    }

    /// What began after something else ended has a later revision, or for reads the same.
    fn real_time(&self, checks: &mut Checks) {
        for (index, operation) in self.operations.iter().enumerate() {
            let is_ordered = match &operation.request {
                Request::Txn { serializable, .. } => !serializable,
                Request::KeepAlive { .. } => false,
                _ => true,
            };
            let placed = self.placed.get(&index).copied();
            let Some(revision) = operation.revision().or(placed).filter(|_| is_ordered) else {
                continue;
            };
            let wrote = placed.is_some() || operation.says_it_wrote();
            let least = self.floors[index] + i64::from(wrote);
            checks.check(Guarantee::RealTime, revision >= least, || {
                format!("revision {least} was due when this began: {operation:?}")
            });
        }
    }
}

/// Finds an operation for an orphan, if need be by giving others another one.
fn augment(
    at: usize,
    orphans: &[&Orphan],
    owner: &mut HashMap<usize, usize>,
    tried: &mut HashSet<usize>,
) -> bool {
    for candidate in &orphans[at].candidates {
        if !tried.insert(*candidate) {
            continue;
        }
        let current = owner.get(candidate).copied();
        if current.is_none_or(|other| augment(other, orphans, owner, tried)) {
            owner.insert(*candidate, at);
            return true;
        }
    }
    false
}

fn check_answer(operation: &Operation, again: &Evaluation, revision: i64, checks: &mut Checks) {
    let Outcome::Done { succeeded, answers, .. } = &operation.outcome else { return };
    let is_serializable = operation.txn().is_some_and(|txn| txn.is_serializable);
    let is_old = operation.reads_at() != operation.revision();
    let guarantee =
        if is_serializable || is_old { Guarantee::Serializable } else { Guarantee::AnswerFits };
    let fits = *succeeded == again.succeeded && *answers == again.answers;
    checks.check(guarantee, fits, || {
        format!("at revision {revision} the answer is {:?}: {operation:?}", again.answers)
    });
}

/// A member that runs never answers with an older revision than before.
fn member_monotonic(operations: &[Operation], checks: &mut Checks) {
    let mut lives: BTreeMap<(usize, u64), Vec<&Operation>> = BTreeMap::new();
    for operation in operations {
        if let (Some(member), Some(_)) = (operation.member, operation.revision())
            && operation.life > 0
        {
            lives.entry((member, operation.life)).or_default().push(operation);
        }
    }
    for of_life in lives.into_values() {
        let mut returned: Vec<(u64, i64)> =
            of_life.iter().filter_map(|o| Some((o.return_us, o.revision()?))).collect();
        returned.sort_unstable();
        let mut highest = 0;
        for (_, revision) in &mut returned {
            highest = highest.max(*revision);
            *revision = highest;
        }
        for operation in of_life {
            let before = returned.partition_point(|(at_us, _)| *at_us < operation.call_us);
            let least = before.checked_sub(1).map_or(0, |index| returned[index].1);
            let revision = operation.revision().unwrap_or(0);
            checks.check(Guarantee::MemberMonotonic, revision >= least, || {
                format!("the member had been at {least} before: {operation:?}")
            });
        }
    }
}
