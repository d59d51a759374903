//! What a watch is promised, under the names that etcd's documentation gives it.

use super::truth::{Change, State, Truth, apply};
use super::{Checks, Guarantee};
use crate::history::{Content, Event, History, Kv, Message, Outcome, Request, Watch, contains};

/// Checks all watches.
pub(super) fn check(history: &History, truth: &Truth, checks: &mut Checks) {
    let compactions = Compactions::new(history);
    for watch in &history.watches {
        check_order(watch, checks);
        check_against(watch, truth, checks);
        check_compacted(watch, &compactions, checks);
    }
    check_previous(history, truth, &compactions, checks);
}

/// The compactions that were asked for, by their revisions.
struct Compactions(Vec<(i64, u64)>);

impl Compactions {
    fn new(history: &History) -> Compactions {
        let asked = history.operations.iter().filter_map(|operation| match operation.request {
            Request::Compact { revision } if !matches!(operation.outcome, Outcome::Refused(_)) => {
                Some((revision, operation.call_us))
            }
            _ => None,
        });
        Compactions(asked.collect())
    }

    /// Whether it may be that by then everything before `revision` was forgotten.
    fn may_have_reached(&self, revision: i64, at_us: u64) -> bool {
        self.0.iter().any(|(compacted, call_us)| *compacted >= revision && *call_us <= at_us)
    }
}

impl Watch {
    fn name(&self) -> String {
        let Watch { member, key, end, start, .. } = self;
        format!("watch of {key:?}..{end:?} from {start} on member {member}")
    }

    /// Whether it asked for the change.
    fn wants(&self, key: &str, is_delete: bool) -> bool {
        contains(&self.key, self.end.as_deref(), key)
            && !(is_delete && self.no_delete || !is_delete && self.no_put)
    }

    /// The first revision that it must tell of, once that is known.
    fn first(&self) -> Option<i64> {
        let created = self.messages.iter().find(|message| message.content == Content::Created);
        match self.start {
            0 => created.map(|message| message.revision + 1),
            start => Some(start),
        }
    }
}

fn events(message: &Message) -> &[Event] {
    match &message.content {
        Content::Events(events) => events,
        _ => &[],
    }
}

/// Within the watch itself: filter, order, uniqueness, wholeness, progress.
fn check_order(watch: &Watch, checks: &mut Checks) {
    // The newest revision that was told, whether that was by progress, and the end of the
    // last message.
    let (mut told, mut promised) = (0, 0);
    let mut keys_of_revision: Vec<&str> = Vec::new();
    for message in &watch.messages {
        let name = || watch.name();
        if message.content == Content::Progress {
            let least = told.max(promised).max(watch.start - 1);
            checks.check(Guarantee::WatchBookmarkable, message.revision >= least, || {
                format!("{}: progress {} after {least}", name(), message.revision)
            });
            promised = promised.max(message.revision);
        }
        for (at, event) in events(message).iter().enumerate() {
            let (key, revision) = (event.kv.key.as_str(), event.kv.mod_revision);
            let is_wanted = watch.wants(key, event.is_delete) && revision >= watch.start;
            checks.check(Guarantee::WatchFilter, is_wanted, || {
                format!("{}: got {event:?}, which it did not ask for", name())
            });
            checks.check(Guarantee::WatchOrdered, revision >= told, || {
                format!("{}: revision {revision} after {told}", name())
            });
            if revision != told {
                keys_of_revision.clear();
            }
            checks.check(Guarantee::WatchUnique, !keys_of_revision.contains(&key), || {
                format!("{}: {key:?} at revision {revision} twice", name())
            });
            keys_of_revision.push(key);
            checks.check(Guarantee::WatchAtomic, at > 0 || revision != told, || {
                format!("{}: revision {revision} in two messages", name())
            });
            checks.check(Guarantee::WatchBookmarkable, revision > promised, || {
                format!("{}: event at {revision} after progress {promised}", name())
            });
            checks.check(Guarantee::WatchBookmarkable, revision <= message.revision, || {
                format!("{}: event at {revision} under header {}", name(), message.revision)
            });
            told = told.max(revision);
        }
    }
}

/// Against the truth: nothing is missing from the first revision to the last that was told.
fn check_against(watch: &Watch, truth: &Truth, checks: &mut Checks) {
    let Some(first) = watch.first() else { return };
    let got: Vec<(i64, Change)> = watch
        .messages
        .iter()
        .flat_map(events)
        .map(|event| (event.kv.mod_revision, Change::of(event)))
        .collect();
    let progress = watch.messages.iter().filter(|message| message.content == Content::Progress);
    let promised = progress.map(|message| message.revision).max().unwrap_or(0);
    let last_event = got.last().map_or(0, |(revision, _)| *revision);
    let until = promised.max(last_event);
    let mut rest = got.as_slice();
    for revision in first.max(1)..=until.min(truth.last()) {
        for change in truth.changes(revision) {
            if !watch.wants(&change.key, change.kv.is_none()) {
                continue;
            }
            let is_there = rest.first().is_some_and(|(r, c)| *r == revision && c == change);
            let guarantee = match (rest.len() == got.len(), revision > last_event) {
                (_, true) => Guarantee::WatchBookmarkable,
                (true, false) => Guarantee::WatchResumable,
                (false, false) => Guarantee::WatchReliable,
            };
            checks.check(guarantee, is_there, || {
                let next = rest.first();
                format!("{}: lacks {change:?} of revision {revision}; got {next:?}", watch.name())
            });
            if !is_there {
                return;
            }
            rest = &rest[1..];
        }
    }
    checks.check(Guarantee::WatchReliable, rest.is_empty(), || {
        format!("{}: got {:?}, which never happened", watch.name(), rest.first())
    });
}

/// A watch is refused as compacted only when its next revision is.
fn check_compacted(watch: &Watch, compactions: &Compactions, checks: &mut Checks) {
    for message in &watch.messages {
        let Content::Canceled { compact_revision, .. } = message.content else { continue };
        if compact_revision > 0 {
            let asked = compactions.may_have_reached(compact_revision, message.at_us);
            let needed = watch.start < compact_revision || watch.start == 0;
            checks.check(Guarantee::WatchCompacted, asked && needed, || {
                format!("{}: compacted at {compact_revision}, which nobody asked for", watch.name())
            });
        }
    }
}

/// Previous values are those of the state one revision before.
fn check_previous(
    history: &History,
    truth: &Truth,
    compactions: &Compactions,
    checks: &mut Checks,
) {
    let watches = history.watches.iter().filter(|watch| watch.prev_kv);
    let mut told: Vec<(&Event, u64, &Watch)> = watches
        .flat_map(|watch| {
            let messages = watch.messages.iter();
            messages.flat_map(move |m| events(m).iter().map(move |event| (event, m.at_us, watch)))
        })
        .collect();
    told.sort_by_key(|(event, ..)| event.kv.mod_revision);
    let mut state = State::new();
    let mut at = 0;
    for (event, at_us, watch) in told {
        let revision = event.kv.mod_revision;
        if revision > truth.last() {
            break;
        }
        while at + 1 < revision {
            at += 1;
            apply(&mut state, truth.changes(at));
        }
        let before: Option<&Kv> = state.get(&event.kv.key);
        let fits = event.prev.as_ref() == before
            || event.prev.is_none() && compactions.may_have_reached(revision, at_us);
        checks.check(Guarantee::WatchPrevKv, fits, || {
            let Event { prev, .. } = event;
            format!("{}: at {revision} the previous was {before:?}, not {prev:?}", watch.name())
        });
    }
}
