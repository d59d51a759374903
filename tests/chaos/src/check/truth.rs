//! What happened, revision by revision, as the watches of all members told it.
//!
//! Every revision of the store from 2 on changed something, so that together the events of
//! a watch of all keys are the whole history, and a hole is a violation by itself. Members
//! that tell of one revision differently have split. What is left is one sequence of
//! changes, which is itself checked: versions count up, creations are creations.

use std::collections::BTreeMap;

use super::{Checks, Guarantee};
use crate::history::{Action, Answer, Compare, Content, Event, History, Kv, Target, contains};

/// A key that was changed: what it is now, or that it is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// What it is now.
    pub kv: Option<Kv>,
}

impl Change {
    /// The change that an event tells of.
    pub fn of(event: &Event) -> Change {
        let kv = (!event.is_delete).then(|| event.kv.clone());
        Change { key: event.kv.key.clone(), kv }
    }
}

/// All keys at one revision.
pub type State = BTreeMap<String, Kv>;

/// Applies the changes of one revision.
pub fn apply(state: &mut State, changes: &[Change]) {
    for change in changes {
        match &change.kv {
            Some(kv) => state.insert(change.key.clone(), kv.clone()),
            None => state.remove(&change.key),
        };
    }
}

/// The history of the store.
#[derive(Debug, Default)]
pub struct Truth {
    /// What each revision changed; it is their index.
    changes: Vec<Vec<Change>>,
    /// When somebody first knew that the revision exists.
    seen_us: Vec<u64>,
}

impl Truth {
    /// Puts together what watches of all keys told, and names what does not fit together.
    pub fn new(history: &History, checks: &mut Checks) -> Truth {
        let mut told: BTreeMap<i64, (Vec<Change>, usize)> = BTreeMap::new();
        let watches = history.watches.iter();
        for watch in watches.filter(|w| w.end.as_deref() == Some("\0") && !w.no_put && !w.no_delete)
        {
            for message in &watch.messages {
                let Content::Events(events) = &message.content else { continue };
                let mut rest = events.as_slice();
                while let Some(first) = rest.first() {
                    let revision = first.kv.mod_revision;
                    let same = rest.iter().take_while(|event| event.kv.mod_revision == revision);
                    let (these, others) = rest.split_at(same.count());
                    rest = others;
                    let changes: Vec<Change> = these.iter().map(Change::of).collect();
                    let (known, member) =
                        told.entry(revision).or_insert_with(|| (changes.clone(), watch.member));
                    checks.check(Guarantee::OneHistory, *known == changes, || {
                        format!(
                            "revision {revision} is {known:?} on member {member} and {changes:?} on \
                             member {}",
                            watch.member
                        )
                    });
                }
            }
        }
        let last = told.keys().next_back().copied().unwrap_or(1);
        let mut truth = Truth::default();
        for revision in 0..=last {
            let changes = told.remove(&revision).map(|(changes, _)| changes).unwrap_or_default();
            if revision > 1 {
                checks.check(Guarantee::NoHole, !changes.is_empty(), || {
                    format!("no member's watch of all keys told of revision {revision}")
                });
            }
            truth.changes.push(changes);
        }
        truth.seen_us = first_seen(history, last);
        truth.check_itself(checks);
        truth
    }

    /// Versions, and revisions of creations and changes, follow from what was before.
    fn check_itself(&self, checks: &mut Checks) {
        let mut state = State::new();
        for (revision, changes) in self.changes.iter().enumerate() {
            let revision = revision as i64;
            for change in changes {
                let before = state.get(&change.key);
                let fits = match &change.kv {
                    None => before.is_some(),
                    Some(kv) => {
                        let (created, version) =
                            before.map_or((revision, 1), |kv| (kv.create_revision, kv.version + 1));
                        (kv.create_revision, kv.version) == (created, version)
                            && kv.mod_revision == revision
                    }
                };
                checks.check(Guarantee::OneHistory, fits, || {
                    format!("revision {revision}: {change:?} cannot follow {before:?}")
                });
            }
            apply(&mut state, changes);
        }
    }

    /// The newest revision.
    pub fn last(&self) -> i64 {
        (self.changes.len() as i64 - 1).max(1)
    }

    /// What a revision changed.
    pub fn changes(&self, revision: i64) -> &[Change] {
        let index = usize::try_from(revision).ok();
        index.and_then(|index| self.changes.get(index)).map_or(&[], Vec::as_slice)
    }

    /// When somebody first knew that the revision exists.
    pub fn seen_us(&self, revision: i64) -> u64 {
        let index = usize::try_from(revision).ok();
        index.and_then(|index| self.seen_us.get(index)).copied().unwrap_or(u64::MAX)
    }
}

/// When each revision up to `last` was first heard of, by a watch or an answer.
fn first_seen(history: &History, last: i64) -> Vec<u64> {
    let mut seen = vec![u64::MAX; last as usize + 1];
    let mut hear = |revision: i64, at_us: u64| {
        let index = revision.clamp(0, last) as usize;
        if let Some(seen) = seen.get_mut(index) {
            *seen = at_us.min(*seen);
        }
    };
    for operation in &history.operations {
        if let Some(revision) = operation.revision() {
            hear(revision, operation.return_us);
        }
    }
    for message in history.watches.iter().flat_map(|watch| &watch.messages) {
        hear(message.revision, message.at_us);
        if let Content::Events(events) = &message.content
            && let Some(event) = events.last()
        {
            hear(event.kv.mod_revision, message.at_us);
        }
    }
    // Who knows of a revision knows that the ones before it exist.
    for index in (0..last as usize).rev() {
        seen[index] = seen[index].min(seen[index + 1]);
    }
    seen
}

/// What a transaction does and answers, on top of `state`, if it becomes `revision`.
pub struct Evaluation {
    /// Whether its compares hold.
    pub succeeded: bool,
    /// What its actions come back with.
    pub answers: Vec<Answer>,
    /// What it changes.
    pub changes: Vec<Change>,
}

/// The state with what a transaction has changed so far.
struct View<'a> {
    state: &'a State,
    changes: Vec<Change>,
}

impl View<'_> {
    fn get(&self, key: &str) -> Option<&Kv> {
        match self.changes.iter().rev().find(|change| change.key == key) {
            Some(change) => change.kv.as_ref(),
            None => self.state.get(key),
        }
    }

    fn range(&self, first: &str, end: Option<&str>) -> Vec<Kv> {
        if end.is_none() {
            return self.get(first).cloned().into_iter().collect();
        }
        let is_meant = |key: &str| contains(first, end, key);
        let from = self
            .state
            .range::<str, _>((std::ops::Bound::Included(first), std::ops::Bound::Unbounded));
        let mut found: State = from
            .take_while(|(key, _)| is_meant(key))
            .map(|(key, kv)| (key.clone(), kv.clone()))
            .collect();
        for change in self.changes.iter().filter(|change| is_meant(&change.key)) {
            apply(&mut found, std::slice::from_ref(change));
        }
        found.into_values().collect()
    }
}

fn holds(state: &State, compare: &Compare) -> bool {
    let kv = state.get(&compare.key);
    match &compare.target {
        Target::Version(version) => kv.map_or(0, |kv| kv.version) == *version,
        Target::ModRevision(revision) => kv.map_or(0, |kv| kv.mod_revision) == *revision,
        Target::Value(value) => kv.is_some_and(|kv| kv.value == *value),
    }
}

/// Does a transaction.
pub fn evaluate(
    state: &State,
    revision: i64,
    compares: &[Compare],
    then: &[Action],
    otherwise: &[Action],
) -> Evaluation {
    let succeeded = compares.iter().all(|compare| holds(state, compare));
    let mut view = View { state, changes: Vec::new() };
    let mut answers = Vec::new();
    for action in if succeeded { then } else { otherwise } {
        answers.push(match action {
            Action::Range { key, end, limit, .. } => {
                let mut kvs = view.range(key, end.as_deref());
                let count = kvs.len() as i64;
                if *limit > 0 {
                    kvs.truncate(*limit as usize);
                }
                Answer::Range { kvs, count }
            }
            Action::Put { key, value, lease, prev } => {
                let before = view.get(key).cloned();
                let (create_revision, version) = before
                    .as_ref()
                    .map_or((revision, 1), |kv| (kv.create_revision, kv.version + 1));
                let (key, value) = (key.clone(), value.clone());
                let kv = Kv {
                    key,
                    value,
                    create_revision,
                    mod_revision: revision,
                    version,
                    lease: *lease,
                };
                view.changes.push(Change { key: kv.key.clone(), kv: Some(kv) });
                Answer::Put { prev: before.filter(|_| *prev) }
            }
            Action::Delete { key, end, prev } => {
                let gone = view.range(key, end.as_deref());
                let deleted = gone.len() as i64;
                view.changes.extend(gone.iter().map(|kv| Change { key: kv.key.clone(), kv: None }));
                Answer::Delete { deleted, prev: if *prev { gone } else { Vec::new() } }
            }
        });
    }
    Evaluation { succeeded, answers, changes: view.changes }
}
