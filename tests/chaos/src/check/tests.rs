//! Histories in which all is well, and what is found when they are spoiled in one place.

use super::{Checks, Guarantee, check};
use crate::history::{
    Action, Answer, Compare, Content, Event, Final, History, Kv, Message, Operation, Outcome,
    Request, Target, Watch,
};

// A history in which all is well is written by a little store; each test then spoils it in
// one place, and the checks must find just that.

/// A store with one client a operation, a millisecond each.
#[derive(Default)]
struct Store {
    history: History,
    state: std::collections::BTreeMap<String, Kv>,
    events: Vec<(u64, Vec<Event>)>,
    revision: i64,
    now_us: u64,
}

const TICK_US: u64 = 1_000;

impl Store {
    fn new() -> Store {
        Store { revision: 1, ..Store::default() }
    }

    fn apply(&mut self, changes: &[super::truth::Change]) {
        if changes.is_empty() {
            return;
        }
        self.revision += 1;
        let events = changes.iter().map(|change| {
            let gone = Kv {
                key: change.key.clone(),
                value: String::new(),
                create_revision: 0,
                mod_revision: self.revision,
                version: 0,
                lease: 0,
            };
            Event {
                is_delete: change.kv.is_none(),
                kv: change.kv.clone().unwrap_or(gone),
                prev: self.state.get(&change.key).cloned(),
            }
        });
        self.events.push((self.now_us, events.collect()));
        super::truth::apply(&mut self.state, changes);
    }

    fn record(&mut self, call_us: u64, request: Request, outcome: Outcome) -> usize {
        self.history.operations.push(Operation {
            kind: "test".to_owned(),
            client: 0,
            member: Some(0),
            life: 1,
            call_us,
            return_us: self.now_us,
            request,
            outcome,
        });
        self.history.operations.len() - 1
    }

    fn txn(&mut self, compares: Vec<Compare>, then: Vec<Action>, otherwise: Vec<Action>) -> usize {
        let call_us = self.now_us + TICK_US / 4;
        self.now_us += TICK_US;
        let done =
            super::truth::evaluate(&self.state, self.revision + 1, &compares, &then, &otherwise);
        self.apply(&done.changes);
        let (revision, succeeded, answers) = (self.revision, done.succeeded, done.answers);
        let outcome = Outcome::Done { revision, succeeded, answers, ttl_secs: 0 };
        let request = Request::Txn { compares, then, otherwise, serializable: false };
        self.record(call_us, request, outcome)
    }

    fn one(&mut self, action: Action) -> usize {
        self.txn(Vec::new(), vec![action], Vec::new())
    }

    fn put_leased(&mut self, key: &str, value: &str, lease: i64) -> usize {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.one(Action::Put { key, value, lease, prev: true })
    }

    fn put(&mut self, key: &str, value: &str) -> usize {
        self.put_leased(key, value, 0)
    }

    fn get(&mut self, key: &str) -> usize {
        self.one(Action::Range { key: key.to_owned(), end: None, revision: 0, limit: 0 })
    }

    fn delete(&mut self, key: &str) -> usize {
        self.one(Action::Delete { key: key.to_owned(), end: None, prev: true })
    }

    /// An operation of a lease.
    fn lease(&mut self, request: Request, ttl_secs: i64) -> usize {
        let call_us = self.now_us + TICK_US / 4;
        self.now_us += TICK_US;
        let (revision, answers) = (self.revision, Vec::new());
        let outcome = Outcome::Done { revision, succeeded: true, answers, ttl_secs };
        self.record(call_us, request, outcome)
    }

    /// Ends a lease after a while.
    fn end_lease(&mut self, id: i64, after_us: u64) {
        self.now_us += after_us;
        let keys = self.state.values().filter(|kv| kv.lease == id);
        let changes: Vec<_> =
            keys.map(|kv| super::truth::Change { key: kv.key.clone(), kv: None }).collect();
        self.apply(&changes);
    }

    /// A watch that was told all it asked for, as soon as it happened.
    fn watch(&self, member: usize, key: &str, end: Option<&str>, start: i64) -> Watch {
        let mut watch = Watch {
            member,
            call_us: 0,
            key: key.to_owned(),
            end: end.map(str::to_owned),
            start,
            prev_kv: true,
            no_put: false,
            no_delete: false,
            messages: Vec::new(),
        };
        watch.messages.push(Message { at_us: 0, revision: 1, content: Content::Created });
        for (at_us, events) in &self.events {
            let wanted = |event: &&Event| {
                crate::history::contains(key, end, &event.kv.key) && event.kv.mod_revision >= start
            };
            let events: Vec<Event> = events.iter().filter(wanted).cloned().collect();
            if let Some(revision) = events.first().map(|event| event.kv.mod_revision) {
                let content = Content::Events(events);
                watch.messages.push(Message { at_us: at_us + 1, revision, content });
            }
        }
        watch
    }

    /// The whole history: three members that told everything and have the same.
    fn finish(mut self) -> History {
        for member in 0..3 {
            self.history.watches.push(self.watch(member, "\0", Some("\0"), 2));
            self.history.finals.push(Final {
                member,
                revision: self.revision,
                hash: (7, 0),
                kvs: self.state.values().cloned().collect(),
            });
        }
        self.history.watches.push(self.watch(1, "a", None, 2));
        self.history
    }
}

/// Puts, gets, deletes and a transaction.
fn sound() -> Store {
    let mut store = Store::new();
    store.put("a", "1");
    store.get("a");
    store.put("b", "2");
    store.put("a", "3");
    store.get("a");
    let guard = Compare { key: "a".to_owned(), target: Target::Value("3".to_owned()) };
    let put = |key: &str, value: &str| Action::Put {
        key: key.to_owned(),
        value: value.to_owned(),
        lease: 0,
        prev: false,
    };
    store.txn(vec![guard.clone()], vec![put("a", "4"), put("c", "5")], Vec::new());
    store.txn(vec![guard], vec![put("a", "6")], vec![put("d", "7")]);
    store.delete("b");
    store.get("b");
    store.put("a", "8");
    store.get("a");
    store
}

fn broken(history: &History) -> Checks {
    let checks = check(history);
    assert!(!checks.passed(), "nothing was found");
    assert_eq!(checks.broken.values().sum::<u64>() > 0, !checks.examples.is_empty());
    checks
}

#[track_caller]
fn finds(history: &History, guarantee: Guarantee) {
    let checks = broken(history);
    assert!(checks.broken.contains_key(&guarantee), "not {guarantee:?}: {:?}", checks.examples);
}

fn passes(history: &History) {
    let checks = check(history);
    assert!(checks.passed() && checks.undecided.is_empty(), "{:?}", checks.examples);
}

fn events(watch: &mut Watch, nth: usize) -> &mut Vec<Event> {
    let of_message = |message: &mut Message| match message.content {
        Content::Events(_) => Some(()),
        _ => None,
    };
    let at = (0..watch.messages.len()).filter(|at| of_message(&mut watch.messages[*at]).is_some());
    let at = at.collect::<Vec<_>>()[nth];
    match &mut watch.messages[at].content {
        Content::Events(events) => events,
        _ => panic!("no events"),
    }
}

fn set_revision(operation: &mut Operation, to: i64) {
    if let Outcome::Done { revision, .. } = &mut operation.outcome {
        *revision = to;
    }
}

/// Takes the answer away.
fn lose_answer(operation: &mut Operation) {
    operation.outcome = Outcome::Unknown("timed out".to_owned());
}

#[test]
fn a_sound_history_passes() {
    passes(&sound().finish());
}

#[test]
fn a_history_is_the_same_after_it_was_written_and_read() {
    let history = sound().finish();
    let path = std::env::temp_dir().join(format!("kvorum-chaos-history-{}", std::process::id()));
    history.write(&path).unwrap();
    let again = History::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(again, history);
}

#[test]
fn a_lost_write_is_found() {
    let mut store = sound();
    let call_us = store.now_us;
    store.now_us += TICK_US;
    let put = Action::Put { key: "x".into(), value: "lost".into(), lease: 0, prev: false };
    let request =
        Request::Txn { compares: vec![], then: vec![put], otherwise: vec![], serializable: false };
    let answers = vec![Answer::Put { prev: None }];
    let revision = store.revision + 1;
    store.record(
        call_us,
        request,
        Outcome::Done { revision, succeeded: true, answers, ttl_secs: 0 },
    );
    finds(&store.finish(), Guarantee::WriteIsThere);
}

#[test]
fn a_stale_read_is_found_by_its_revision_and_without_it() {
    let mut store = Store::new();
    store.put("a", "1");
    let early = store.get("a");
    store.put("a", "2");
    let stale = store.history.operations[early].outcome.clone();
    let late = store.get("a");
    store.history.operations[late].outcome = stale;
    let history = store.finish();
    finds(&history, Guarantee::RealTime);
    finds(&history, Guarantee::MemberMonotonic);
    finds(&history, Guarantee::General);
}

#[test]
fn a_read_of_what_was_not_at_its_revision_is_found() {
    let mut store = sound();
    let read = store.get("a");
    if let Outcome::Done { answers, .. } = &mut store.history.operations[read].outcome {
        *answers = vec![Answer::Range { kvs: Vec::new(), count: 0 }];
    }
    finds(&store.finish(), Guarantee::AnswerFits);
}

#[test]
fn a_serializable_read_may_be_old_but_not_wrong() {
    let mut store = Store::new();
    store.put("a", "1");
    let early = store.get("a");
    store.put("a", "2");
    let mut read = store.history.operations[early].clone();
    read.member = Some(1);
    (read.call_us, read.return_us) = (store.now_us + 1, store.now_us + 2);
    if let Request::Txn { serializable, .. } = &mut read.request {
        *serializable = true;
    }
    let mut wrong = read.clone();
    store.history.operations.push(read);
    let mut history = store.finish();
    passes(&history);
    set_revision(&mut wrong, 3);
    history.operations.push(wrong);
    finds(&history, Guarantee::Serializable);
}

#[test]
fn a_member_that_goes_back_is_found_unless_it_was_started_again() {
    let mut store = Store::new();
    store.put("a", "1");
    let early = store.get("a");
    store.put("a", "2");
    let mut read = store.history.operations[early].clone();
    (read.call_us, read.return_us) = (store.now_us + 1, store.now_us + 2);
    if let Request::Txn { serializable, .. } = &mut read.request {
        *serializable = true;
    }
    read.life = 2;
    store.history.operations.push(read);
    let mut history = store.finish();
    passes(&history);
    history.operations.last_mut().unwrap().life = 1;
    finds(&history, Guarantee::MemberMonotonic);
}

#[test]
fn an_unknown_write_may_have_happened_or_not() {
    let mut store = sound();
    let put = store.put("u", "unknown");
    lose_answer(&mut store.history.operations[put]);
    let delete = store.delete("u");
    lose_answer(&mut store.history.operations[delete]);
    let mut absent = store.history.operations[delete].clone();
    store.get("u");
    absent.call_us = store.now_us + 1;
    store.history.operations.push(absent);
    passes(&store.finish());
}

#[test]
fn a_write_that_happened_twice_is_found() {
    let mut store = sound();
    let put = store.put("u", "again");
    lose_answer(&mut store.history.operations[put]);
    store.put("u", "between");
    let again = store.put("u", "again");
    store.history.operations.remove(again);
    finds(&store.finish(), Guarantee::AtMostOnce);
}

#[test]
fn a_delete_that_happened_twice_is_found() {
    let mut store = sound();
    store.put("u", "first");
    let delete = store.delete("u");
    lose_answer(&mut store.history.operations[delete]);
    store.put("u", "second");
    let again = store.delete("u");
    store.history.operations.remove(again);
    finds(&store.finish(), Guarantee::NothingFromNowhere);
}

#[test]
fn deletes_of_unknown_outcome_are_given_out_so_that_all_are_explained() {
    // The first can explain both, the second only the later: a greedy choice of the first for
    // the later would leave the earlier unexplained.
    let mut store = sound();
    store.put("u", "first");
    let one = store.delete("u");
    store.put("u", "second");
    let two = store.delete("u");
    for index in [one, two] {
        lose_answer(&mut store.history.operations[index]);
    }
    store.history.operations.swap(one, two);
    passes(&store.finish());
}

#[test]
fn a_delete_that_began_too_late_explains_nothing() {
    let mut store = sound();
    store.put("u", "first");
    let delete = store.delete("u");
    store.get("u");
    lose_answer(&mut store.history.operations[delete]);
    store.history.operations[delete].call_us = store.now_us + 1;
    finds(&store.finish(), Guarantee::NothingFromNowhere);
}

#[test]
fn a_refused_write_that_happened_is_found() {
    let mut store = sound();
    let put = store.put("u", "refused");
    store.history.operations[put].outcome = Outcome::Refused("no".to_owned());
    finds(&store.finish(), Guarantee::AtMostOnce);
}

#[test]
fn a_write_that_nobody_asked_for_is_found() {
    let mut store = sound();
    let put = store.put("u", "nobody's");
    store.history.operations.remove(put);
    finds(&store.finish(), Guarantee::NothingFromNowhere);
}

#[test]
fn a_transaction_that_took_the_wrong_branch_is_found() {
    let mut history = sound().finish();
    let guarded = history.operations.iter_mut().find(|operation| {
        matches!(&operation.request, Request::Txn { compares, .. } if !compares.is_empty())
    });
    if let Request::Txn { compares, .. } = &mut guarded.unwrap().request {
        compares[0].target = Target::Version(99);
    }
    finds(&history, Guarantee::WriteIsThere);
}

#[test]
fn two_writes_of_one_revision_are_found() {
    let mut history = sound().finish();
    set_revision(&mut history.operations[2], 2);
    finds(&history, Guarantee::AtMostOnce);
}

#[test]
fn a_split_revision_is_found() {
    let mut history = sound().finish();
    events(&mut history.watches[2], 3)[0].kv.value = "other".to_owned();
    finds(&history, Guarantee::OneHistory);
}

#[test]
fn a_hole_that_all_members_share_is_found() {
    let mut history = sound().finish();
    for watch in &mut history.watches {
        watch.messages.retain(|message| message.revision != 5);
    }
    finds(&history, Guarantee::NoHole);
}

#[test]
fn versions_that_do_not_count_up_are_found() {
    let mut history = sound().finish();
    for watch in &mut history.watches {
        for message in &mut watch.messages {
            if let Content::Events(events) = &mut message.content {
                for event in events.iter_mut().filter(|event| event.kv.version == 3) {
                    event.kv.version = 2;
                }
            }
        }
    }
    finds(&history, Guarantee::OneHistory);
}

#[test]
fn a_missing_event_is_found() {
    let mut history = sound().finish();
    history.watches[1].messages.remove(4);
    finds(&history, Guarantee::WatchReliable);
}

#[test]
fn a_missing_first_event_is_found() {
    let mut history = sound().finish();
    history.watches[1].messages.remove(1);
    finds(&history, Guarantee::WatchResumable);
}

#[test]
fn an_event_that_was_dropped_from_a_revision_is_found() {
    let mut history = sound().finish();
    events(&mut history.watches[1], 3).pop();
    finds(&history, Guarantee::WatchReliable);
}

#[test]
fn a_duplicate_event_is_found() {
    let mut history = sound().finish();
    let event = events(&mut history.watches[3], 1)[0].clone();
    events(&mut history.watches[3], 1).push(event);
    finds(&history, Guarantee::WatchUnique);
}

#[test]
fn events_out_of_order_are_found() {
    let mut history = sound().finish();
    history.watches[3].messages.swap(2, 3);
    finds(&history, Guarantee::WatchOrdered);
}

#[test]
fn a_revision_in_two_messages_is_found() {
    let mut history = sound().finish();
    let last = events(&mut history.watches[1], 3).pop().unwrap();
    let at = history.watches[1]
        .messages
        .iter()
        .position(|message| message.revision == last.kv.mod_revision)
        .unwrap();
    let mut second = history.watches[1].messages[at].clone();
    second.content = Content::Events(vec![last]);
    history.watches[1].messages.insert(at + 1, second);
    finds(&history, Guarantee::WatchAtomic);
}

#[test]
fn an_event_that_nobody_asked_for_is_found() {
    let mut history = sound().finish();
    let other = events(&mut history.watches[1], 1)[0].clone();
    events(&mut history.watches[3], 0).push(other);
    finds(&history, Guarantee::WatchFilter);
    let mut history = sound().finish();
    history.watches[3].start = 3;
    finds(&history, Guarantee::WatchFilter);
}

#[test]
fn progress_ahead_of_events_is_found() {
    let mut history = sound().finish();
    let progress = Message { at_us: 1, revision: 6, content: Content::Progress };
    history.watches[3].messages.insert(2, progress);
    finds(&history, Guarantee::WatchBookmarkable);
}

#[test]
fn progress_after_which_an_event_is_missing_is_found() {
    let mut history = sound().finish();
    let last = history.watches[3].messages.pop().unwrap();
    let progress = Message { content: Content::Progress, ..last };
    history.watches[3].messages.push(progress);
    finds(&history, Guarantee::WatchBookmarkable);
}

#[test]
fn progress_that_goes_back_is_found() {
    let mut history = sound().finish();
    let progress = Message { at_us: u64::MAX / 2, revision: 1, content: Content::Progress };
    history.watches[3].messages.push(progress);
    finds(&history, Guarantee::WatchBookmarkable);
}

#[test]
fn a_wrong_previous_value_is_found_and_a_missing_one_unless_compacted() {
    let mut history = sound().finish();
    events(&mut history.watches[3], 1)[0].prev.as_mut().unwrap().value = "other".to_owned();
    finds(&history, Guarantee::WatchPrevKv);
    let mut history = sound().finish();
    let event = &mut events(&mut history.watches[3], 1)[0];
    event.prev = None;
    let revision = event.kv.mod_revision;
    finds(&history, Guarantee::WatchPrevKv);
    let mut compaction = history.operations[0].clone();
    compaction.request = Request::Compact { revision };
    compaction.outcome = Outcome::Unknown("timed out".to_owned());
    compaction.call_us = 0;
    history.operations.push(compaction);
    passes(&history);
}

#[test]
fn a_watch_that_is_ended_as_compacted_without_reason_is_found() {
    let mut history = sound().finish();
    let content = Content::Canceled { compact_revision: 5, reason: String::new() };
    history.watches[3].messages.push(Message { at_us: u64::MAX / 2, revision: 8, content });
    finds(&history, Guarantee::WatchCompacted);
}

#[test]
fn the_general_search_finds_an_order_where_there_is_one() {
    use super::general::{Call, Step, linearizable};
    let call = |call_us, return_us, step| Call { call_us, return_us, step };
    let put = |value: &str| Step::Put(value.to_owned());
    let read = |value: &str| Step::Read(Some(value.to_owned()));
    // Two writes at once, each seen first by somebody.
    let at_once = vec![call(0, 10, put("a")), call(0, 10, put("b")), call(11, 12, read("a"))];
    assert_eq!(linearizable(at_once.clone()), Some(true));
    let mut both = at_once.clone();
    both.push(call(13, 14, read("b")));
    assert_eq!(linearizable(both.clone()), Some(false));
    // A delete of unknown outcome explains one disappearance, not two.
    let gone = |at| call(at, at + 1, Step::Read(None));
    let mut deleted = at_once.clone();
    deleted.extend([call(5, u64::MAX, Step::Delete(None)), gone(20)]);
    assert_eq!(linearizable(deleted.clone()), Some(true));
    deleted.extend([call(30, 31, put("c")), gone(40)]);
    assert_eq!(linearizable(deleted), Some(false));
    let swap = Step::Swap("a".to_owned(), None);
    let swapped =
        vec![call(0, 1, put("a")), call(2, u64::MAX, swap), call(3, 4, Step::Delete(Some(false)))];
    assert_eq!(linearizable(swapped), Some(true));
    assert_eq!(linearizable(vec![call(0, 1, Step::Delete(Some(true)))]), Some(false));
}

const SECOND_US: u64 = 1_000_000;

fn leased(kept_after_us: u64, ends_after_us: u64) -> Store {
    let mut store = sound();
    store.lease(Request::Grant { id: 7, ttl_secs: 2 }, 2);
    store.put_leased("l/1", "leased 1", 7);
    store.put_leased("l/2", "leased 2", 7);
    store.now_us += kept_after_us;
    store.lease(Request::KeepAlive { id: 7 }, 2);
    store.end_lease(7, ends_after_us);
    store
}

#[test]
fn a_lease_that_ends_in_time_passes() {
    passes(&leased(SECOND_US, 2 * SECOND_US).finish());
}

#[test]
fn a_lease_that_ends_early_is_found() {
    let mut store = sound();
    store.lease(Request::Grant { id: 7, ttl_secs: 2 }, 2);
    store.put_leased("l/1", "leased 1", 7);
    store.end_lease(7, SECOND_US);
    finds(&store.finish(), Guarantee::LeaseNeverEarly);
}

#[test]
fn a_lease_that_a_leader_ended_that_did_not_know_of_its_renewal_is_found() {
    // More than the time it was granted for, less than the time it was renewed for.
    finds(&leased(SECOND_US, SECOND_US + SECOND_US / 2).finish(), Guarantee::LeaseNeverEarly);
}

#[test]
fn a_renewal_that_came_late_is_told_apart() {
    let checks = check(&leased(3 * SECOND_US, SECOND_US).finish());
    assert!(checks.passed(), "{:?}", checks.examples);
    assert_eq!(checks.undecided.len(), 1);
}

#[test]
fn a_lease_that_was_asked_to_end_may_do_so() {
    let mut store = leased(SECOND_US, 3 * SECOND_US);
    store.lease(Request::Grant { id: 8, ttl_secs: 60 }, 60);
    store.put_leased("l/3", "leased 3", 8);
    let revoke = store.lease(Request::Revoke { id: 8 }, 0);
    store.end_lease(8, 0);
    set_revision(&mut store.history.operations[revoke], store.revision);
    passes(&store.finish());
}

#[test]
fn a_key_that_outlives_its_lease_is_found() {
    let mut store = leased(SECOND_US, 3 * SECOND_US);
    store.put_leased("l/9", "after the end", 7);
    let history = store.finish();
    finds(&history, Guarantee::LeaseComplete);
    finds(&history, Guarantee::LeaseEnds);
}

#[test]
fn a_lease_that_leaves_a_key_behind_is_found() {
    let mut store = sound();
    store.lease(Request::Grant { id: 7, ttl_secs: 1 }, 1);
    store.put_leased("l/1", "leased 1", 7);
    store.put_leased("l/2", "leased 2", 7);
    store.now_us += 2 * SECOND_US;
    store.apply(&[super::truth::Change { key: "l/1".to_owned(), kv: None }]);
    finds(&store.finish(), Guarantee::LeaseComplete);
}

#[test]
fn members_that_end_differently_are_found() {
    let mut history = sound().finish();
    history.finals[1].hash = (8, 0);
    finds(&history, Guarantee::MembersEqual);
    let mut history = sound().finish();
    history.finals[2].kvs.pop();
    finds(&history, Guarantee::MembersEqual);
    let mut history = sound().finish();
    history.finals[0].revision -= 1;
    finds(&history, Guarantee::MembersEqual);
}
