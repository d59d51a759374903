//! Linearizability of each key, without believing revisions: Wing and Gong's search with
//! Lowe's memory of where it has been.
//!
//! A second opinion on the witness of `super::kv`, which had to guess which deletes of unknown
//! outcome took place. The model is one key: a value or none. A transaction of
//! several keys is looked at key by key, as what it did to that key.
//!
//! An operation of unknown outcome never returns, and each such one doubles the search. So
//! one whose value nobody ever saw is left out (it did nothing that can be told from
//! nothing), one whose value was seen returned at the latest then, and a delete is left out
//! that began after the last delete of the key that has no other owner. The search of a key
//! that takes more than [`STEPS_MAX`] steps is given up and reported as undecided.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::truth::Truth;
use super::{Checks, Guarantee};
use crate::history::{Action, Answer, History, Operation, Outcome, Request, Target, contains};

/// How many steps the search of one key may take.
const STEPS_MAX: usize = 3_000_000;

/// What an operation did to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// It saw the value.
    Read(Option<String>),
    /// It put a value.
    Put(String),
    /// It deleted it; whether it was there is known if there was an answer.
    Delete(Option<bool>),
    /// It found that the value was one thing, and put another, or nothing.
    Swap(String, Option<String>),
}

/// Such a step in time.
#[derive(Debug, Clone)]
pub(super) struct Call {
    /// When it began.
    pub(super) call_us: u64,
    /// When it ended, or the end of time.
    pub(super) return_us: u64,
    /// What it did.
    pub(super) step: Step,
}

/// What was seen to have happened, and when at the latest.
#[derive(Default)]
struct Seen<'a> {
    /// By value, that it was put.
    values: HashMap<&'a str, u64>,
    /// By key, the last delete that no answered operation claims.
    deletes: HashMap<&'a str, u64>,
}

/// Checks every key that was operated on.
pub(super) fn check(history: &History, truth: &Truth, checks: &mut Checks) {
    // A lease ends its keys without a call, so that such keys are left to the witness, as are
    // those that were deleted by the range.
    let owned = history.operations.iter().filter(|operation| operation.says_it_wrote());
    let owned: HashSet<i64> = owned.filter_map(Operation::revision).collect();
    let (mut seen, mut leased) = (Seen::default(), HashSet::new());
    for revision in 1..=truth.last() {
        for change in truth.changes(revision) {
            let seen_us = truth.seen_us(revision);
            let Some(kv) = &change.kv else {
                if !owned.contains(&revision) {
                    seen.deletes.insert(&change.key, seen_us);
                }
                continue;
            };
            seen.values.insert(&kv.value, seen_us);
            if kv.lease != 0 {
                leased.insert(kv.key.as_str());
            }
        }
    }
    let mut keys: BTreeMap<&str, Vec<Call>> = BTreeMap::new();
    for operation in &history.operations {
        for (key, call) in steps(operation, &seen) {
            keys.entry(key).or_default().push(call);
        }
    }
    let ranges = deleted_ranges(history);
    let is_simple = |key: &str| {
        !leased.contains(key) && !ranges.iter().any(|(first, end)| contains(first, Some(end), key))
    };
    for (key, calls) in keys.into_iter().filter(|(key, _)| is_simple(key)) {
        match linearizable(calls) {
            Some(is_linearizable) => checks.check(Guarantee::General, is_linearizable, || {
                format!("no order of the operations on {key:?} explains their answers")
            }),
            None => checks.undecided.push(format!("general search of {key:?} takes too long")),
        }
    }
}

/// The ranges that somebody deleted.
fn deleted_ranges(history: &History) -> Vec<(&str, &str)> {
    let mut ranges = Vec::new();
    for operation in &history.operations {
        let Request::Txn { then, otherwise, .. } = &operation.request else { continue };
        for action in then.iter().chain(otherwise) {
            if let Action::Delete { key, end: Some(end), .. } = action {
                ranges.push((key.as_str(), end.as_str()));
            }
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// What an operation did to single keys.
fn steps<'a>(operation: &'a Operation, seen: &Seen<'_>) -> Vec<(&'a str, Call)> {
    let Request::Txn { compares, then, otherwise, serializable: false } = &operation.request else {
        return Vec::new();
    };
    let call_us = operation.call_us;
    let at = |return_us: u64, step: Step| Call { call_us, return_us, step };
    match &operation.outcome {
        Outcome::Refused(_) => Vec::new(),
        Outcome::Done { succeeded, answers, .. } => {
            let mut found = Vec::new();
            let actions = if *succeeded { then } else { otherwise };
            for (action, answer) in actions.iter().zip(answers) {
                let (key, step) = match (action, answer) {
                    (
                        Action::Range { key, end: None, revision: 0, .. },
                        Answer::Range { kvs, .. },
                    ) => (key, Step::Read(kvs.first().map(|kv| kv.value.clone()))),
                    (Action::Put { key, value, .. }, _) => (key, Step::Put(value.clone())),
                    (Action::Delete { key, end: None, .. }, Answer::Delete { deleted, .. }) => {
                        (key, Step::Delete(Some(*deleted > 0)))
                    }
                    _ => continue,
                };
                found.push((key.as_str(), at(operation.return_us, step)));
            }
            found
        }
        Outcome::Unknown(_) => {
            let mut found = Vec::new();
            for action in then.iter().chain(otherwise) {
                let (key, step, return_us) = match action {
                    Action::Put { key, value, .. } => match seen.values.get(value.as_str()) {
                        Some(seen_us) => (key, Step::Put(value.clone()), *seen_us),
                        None => continue,
                    },
                    Action::Delete { key, end: None, .. } => {
                        if seen.deletes.get(key.as_str()).is_none_or(|last| *last < call_us) {
                            continue;
                        }
                        let guard = compares.iter().find_map(|compare| match &compare.target {
                            Target::Value(value) if compare.key == *key => Some(value),
                            _ => None,
                        });
                        let step = match guard {
                            Some(value) => Step::Swap(value.clone(), None),
                            None => Step::Delete(None),
                        };
                        (key, step, u64::MAX)
                    }
                    _ => continue,
                };
                found.push((key.as_str(), at(return_us.max(call_us), step)));
            }
            found
        }
    }
}

/// The value after a step, or `None` if the step cannot be taken here.
fn take(state: &Option<String>, step: &Step) -> Option<Option<String>> {
    match step {
        Step::Read(value) => (state == value).then(|| state.clone()),
        Step::Put(value) => Some(Some(value.clone())),
        Step::Delete(was_there) => {
            was_there.is_none_or(|was_there| was_there == state.is_some()).then_some(None)
        }
        Step::Swap(from, to) => match state {
            Some(value) if value == from => Some(to.clone()),
            _ => Some(state.clone()),
        },
    }
}

/// Whether some order that respects real time explains every step; `None` if that takes too
/// long to find out.
pub(super) fn linearizable(mut calls: Vec<Call>) -> Option<bool> {
    calls.sort_by_key(|call| (call.call_us, call.return_us));
    let mut done = vec![false; calls.len()];
    // All before `first` are done, none at or after `furthest` is.
    let (mut first, mut furthest) = (0, 0);
    let mut state: Option<String> = None;
    let mut been: HashSet<(usize, Vec<usize>, Option<String>)> = HashSet::new();
    // What was chosen, and the state before it.
    let mut path: Vec<(usize, Option<String>)> = Vec::new();
    let mut from = 0;
    for _ in 0..STEPS_MAX {
        while done.get(first) == Some(&true) {
            first += 1;
        }
        let mut chosen = None;
        let mut earliest_return = u64::MAX;
        let mut is_over = true;
        for index in first..calls.len() {
            if done[index] {
                continue;
            }
            let call = &calls[index];
            if call.call_us > earliest_return {
                is_over = false;
                break;
            }
            is_over &= call.return_us == u64::MAX;
            earliest_return = earliest_return.min(call.return_us);
            if index < from || chosen.is_some() {
                continue;
            }
            if let Some(next) = take(&state, &call.step) {
                done[index] = true;
                furthest = furthest.max(index + 1);
                let base = done.iter().skip(first).position(|done| !done);
                let base = base.map_or(calls.len(), |offset| first + offset);
                let beyond = (base..furthest).filter(|later| done[*later]).collect();
                if been.insert((base, beyond, next.clone())) {
                    chosen = Some((index, next));
                } else {
                    done[index] = false;
                }
            }
        }
        if is_over {
            return Some(true);
        }
        match chosen {
            Some((index, next)) => {
                path.push((index, std::mem::replace(&mut state, next)));
                from = 0;
            }
            None => {
                let Some((index, before)) = path.pop() else { return Some(false) };
                done[index] = false;
                first = first.min(index);
                state = before;
                from = index + 1;
            }
        }
    }
    None
}
