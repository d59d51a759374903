//! Watchers against a naive model.
//!
//! The model of a watcher is its definition: filter the whole history. [`Client`] holds
//! every response a stream gets against it, so that it sees whatever breaks one of the
//! promises of a watch: ordered, unique, atomic, reliable, resumable, bookmarkable,
//! filtered, with the previous record, also after compaction.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use prost::Message;

use super::*;
use crate::mvcc::Revision;
use crate::pb::mvccpb::event::EventType;
use crate::pb::mvccpb::{Event, KeyValue};

/// SplitMix64: the same numbers for the same seed, everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A store's history, and what was compacted from it.
pub(crate) struct Past {
    /// Everything that ever happened.
    pub(crate) all: Vec<Change>,
    live: BTreeMap<Bytes, KeyValue>,
    pub(crate) revision: i64,
    pub(crate) compact_revision: i64,
}

impl Past {
    pub(crate) fn new() -> Past {
        Past { all: Vec::new(), live: BTreeMap::new(), revision: 1, compact_revision: -1 }
    }

    /// Writes one revision: each key is put, or deleted if it has no value and exists.
    pub(crate) fn write(&mut self, changes: &[(&str, Option<&[u8]>)]) -> Vec<Change> {
        let main = self.revision + 1;
        let mut made = Vec::new();
        for &(key, value) in changes {
            let key = Bytes::copy_from_slice(key.as_bytes());
            let prev = self.live.get(&key).cloned();
            let kv = match (value, &prev) {
                (None, None) => continue,
                (None, Some(_)) => {
                    self.live.remove(&key);
                    KeyValue { key: key.clone(), mod_revision: main, ..KeyValue::default() }
                }
                (Some(value), prev) => {
                    let kv = KeyValue {
                        key: key.clone(),
                        create_revision: prev.as_ref().map_or(main, |prev| prev.create_revision),
                        mod_revision: main,
                        version: prev.as_ref().map_or(1, |prev| prev.version + 1),
                        value: Bytes::copy_from_slice(value),
                        lease: 0,
                    };
                    self.live.insert(key.clone(), kv.clone());
                    kv
                }
            };
            made.push(Change {
                revision: Revision::new(main, made.len() as i64),
                key,
                deleted: value.is_none(),
                kv: kv.encode_to_vec().into(),
                created: value.is_some() && prev.is_none(),
                prev: prev.map(|prev| prev.encode_to_vec().into()),
            });
        }
        if !made.is_empty() {
            self.revision = main;
            self.all.extend(made.iter().cloned());
        }
        made
    }

    /// Writes one revision of one to three changes to six keys.
    pub(crate) fn write_at_random(&mut self, random: &mut Random) -> Vec<Change> {
        let keys = ["a", "aa", "b", "ba", "c", "d"];
        let first = random.below(keys.len());
        let value = random.below(1000).to_string();
        let changes: Vec<_> = (0..1 + random.below(3))
            .map(|i| {
                let put = !random.one_in(3);
                (keys[(first + i) % keys.len()], put.then_some(value.as_bytes()))
            })
            .collect();
        self.write(&changes)
    }
}

impl History for Past {
    fn revision(&self) -> i64 {
        self.revision
    }

    fn changes(&self, from: i64, max_changes: usize, max_bytes: usize) -> Result<Page, Compacted> {
        if from < self.compact_revision {
            return Err(Compacted { compact_revision: self.compact_revision });
        }
        let at = self.all.partition_point(|change| change.revision.main < from);
        Ok(Page::collect(&self.all[at..], self.revision, max_changes, max_bytes))
    }
}

/// What a watcher of the model has and waits for.
#[derive(Debug)]
struct Watch {
    request: WatchCreateRequest,
    range: KeyRange,
    /// Everything before this revision was received, or is not wanted.
    next: i64,
    fragments: Vec<Bytes>,
}

impl Watch {
    /// The events of `[self.next, through]`, by definition.
    fn expected(&self, all: &[Change], through: i64) -> Vec<Event> {
        let from = all.partition_point(|change| change.revision.main < self.next);
        let until = all.partition_point(|change| change.revision.main <= through);
        let filtered = |deleted| {
            let filter = if deleted { FilterType::Nodelete } else { FilterType::Noput };
            self.request.filters.contains(&(filter as i32))
        };
        let wanted = all[from.min(until)..until]
            .iter()
            .filter(|change| self.range.contains(&change.key) && !filtered(change.deleted));
        wanted
            .map(|change| Event {
                r#type: if change.deleted { EventType::Delete } else { EventType::Put }.into(),
                kv: Some(KeyValue::decode(change.kv.clone()).unwrap()),
                prev_kv: match &change.prev {
                    Some(prev) if self.request.prev_kv => {
                        Some(KeyValue::decode(prev.clone()).unwrap())
                    }
                    _ => None,
                },
            })
            .collect()
    }
}

/// A client that checks what it gets on one stream.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// Creates sent and not answered.
    creating: VecDeque<WatchCreateRequest>,
    watches: BTreeMap<i64, Watch>,
    pub(crate) seen: Seen,
}

/// How often something was seen, so that a test can tell that it tested anything.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) events: usize,
    pub(crate) fragments: usize,
    pub(crate) progress: usize,
    pub(crate) periodic: usize,
    pub(crate) compacted: usize,
    pub(crate) refused: usize,
    pub(crate) canceled: usize,
}

impl Seen {
    pub(crate) fn add(&mut self, other: Seen) {
        self.events += other.events;
        self.fragments += other.fragments;
        self.progress += other.progress;
        self.periodic += other.periodic;
        self.compacted += other.compacted;
        self.refused += other.refused;
        self.canceled += other.canceled;
    }
}

impl Client {
    /// The request is about to be sent.
    pub(crate) fn creates(&mut self, request: &WatchCreateRequest) {
        self.creating.push_back(request.clone());
    }

    pub(crate) fn got(&mut self, response: WatchResponse, past: &Past) {
        let revision = response.header.expect("every response has a header").revision;
        let id = response.watch_id;
        if response.created {
            let request = self.creating.pop_front().expect("one answer per create");
            if response.canceled {
                assert_eq!(id, NO_WATCH_ID);
                assert!(!response.cancel_reason.is_empty());
                self.seen.refused += 1;
                return;
            }
            let key = if request.key.is_empty() {
                Bytes::from_static(b"\0")
            } else {
                request.key.clone()
            };
            let range = KeyRange::from_wire(key, request.range_end.clone());
            let next = match request.start_revision {
                0 => revision + 1,
                start => start,
            };
            let watch = Watch { request, range, next, fragments: Vec::new() };
            assert!(self.watches.insert(id, watch).is_none(), "id {id} is taken");
        } else if response.canceled {
            let watch = self.watches.remove(&id).expect("what is canceled was there");
            assert!(watch.fragments.is_empty(), "all fragments come first");
            assert_eq!(response.cancel_reason, "");
            if response.compact_revision != 0 {
                assert_eq!(revision, 0);
                assert!(watch.next < response.compact_revision, "nothing it wants was compacted");
                assert!(response.compact_revision <= past.compact_revision);
                self.seen.compacted += 1;
            } else {
                self.seen.canceled += 1;
            }
        } else if response.events.is_empty() {
            assert!(revision > 0, "revision 0 is about compaction");
            if id == NO_WATCH_ID {
                self.seen.progress += 1;
                assert!(!self.watches.is_empty(), "silent without watchers");
                self.watches.iter_mut().for_each(|(id, watch)| mark(*id, watch, revision, past));
            } else {
                self.seen.periodic += 1;
                let watch = self.watches.get_mut(&id).expect("progress of a known watch");
                assert!(watch.request.progress_notify);
                mark(id, watch, revision, past);
            }
        } else {
            let watch = self.watches.get_mut(&id).expect("events of a known watch");
            assert!(watch.request.fragment || !response.fragment);
            watch.fragments.extend(response.events);
            if response.fragment {
                self.seen.fragments += 1;
                return;
            }
            let events = std::mem::take(&mut watch.fragments);
            self.seen.events += events.len();
            let events: Vec<Event> =
                events.into_iter().map(|e| Event::decode(e).unwrap()).collect();
            let last = events.last().unwrap().kv.as_ref().unwrap().mod_revision;
            assert!(revision >= last, "the header is not behind its events");
            // All of the revisions up to the last one, so no gap, no duplicate and no part.
            assert_eq!(events, watch.expected(&past.all, last), "watch {id} {watch:?}");
            watch.next = last + 1;
        }
    }

    /// There is nothing more to come: everything up to `position` is here.
    pub(crate) fn finished(&self, past: &Past, position: i64) {
        assert!(self.creating.is_empty(), "every create is answered");
        for (id, watch) in &self.watches {
            assert!(watch.fragments.is_empty());
            assert_eq!(watch.expected(&past.all, position), [], "watch {id} {watch:?}");
        }
    }

    /// Whether a progress request at `position` must be answered.
    fn may_ask(&self, position: i64) -> bool {
        let told =
            |watch: &Watch| watch.request.start_revision <= position && watch.next <= position + 1;
        !self.watches.is_empty() && self.watches.values().all(told)
    }
}

/// A bookmark: everything up to `revision` must be here.
fn mark(id: i64, watch: &mut Watch, revision: i64, past: &Past) {
    assert!(watch.fragments.is_empty(), "watch {id}: between fragments");
    assert_eq!(
        watch.expected(&past.all, revision),
        [],
        "watch {id} {watch:?}: progress {revision}"
    );
    assert!(revision >= watch.request.start_revision, "watch {id} {watch:?}: told of {revision}");
    assert!(revision + 1 >= watch.next, "watch {id} {watch:?}: progress {revision} goes back");
    watch.next = revision + 1;
}

pub(crate) fn create_at_random(random: &mut Random, revision: i64) -> WatchCreateRequest {
    let keys: [&'static str; 6] = ["", "a", "aa", "b", "c", "d"];
    let ends: [&'static str; 6] = ["", "", "\0", "b", "c", "e"];
    let filter = |filter| if random_bit(filter, revision) { vec![filter as i32] } else { vec![] };
    let filters = match random.below(6) {
        0 => filter(FilterType::Noput),
        1 => filter(FilterType::Nodelete),
        2 => vec![FilterType::Noput as i32, FilterType::Nodelete as i32],
        _ => vec![],
    };
    WatchCreateRequest {
        key: keys[random.below(keys.len())].into(),
        range_end: ends[random.below(ends.len())].into(),
        start_revision: match random.below(4) {
            0 => 0,
            1 => revision + 1 + random.below(4) as i64,
            2 => (revision - random.below(10) as i64).max(-1),
            _ => 1 + random.below(revision as usize) as i64,
        },
        progress_notify: random.one_in(2),
        filters,
        prev_kv: random.one_in(2),
        watch_id: if random.one_in(3) { random.below(5) as i64 } else { 0 },
        fragment: random.one_in(3),
    }
}

fn random_bit(filter: FilterType, revision: i64) -> bool {
    (revision + filter as i64) % 2 == 0
}

/// A queue of a few responses.
#[derive(Debug, Clone, Default)]
struct Mailbox(Rc<RefCell<Mail>>);

#[derive(Debug, Default)]
struct Mail {
    responses: VecDeque<WatchResponse>,
    capacity: usize,
    blocked: bool,
}

impl Mailbox {
    fn with_capacity(capacity: usize) -> Mailbox {
        Mailbox(Rc::new(RefCell::new(Mail { capacity, ..Mail::default() })))
    }

    fn take(&self) -> Option<WatchResponse> {
        self.0.borrow_mut().responses.pop_front()
    }

    fn take_all(&self) -> Vec<WatchResponse> {
        self.0.borrow_mut().responses.drain(..).collect()
    }

    /// Whether the promise of room is due.
    fn unblock(&self) -> bool {
        let mut mail = self.0.borrow_mut();
        mail.responses.len() < mail.capacity && std::mem::take(&mut mail.blocked)
    }
}

impl Outbox for Mailbox {
    fn has_room(&self) -> bool {
        let mut mail = self.0.borrow_mut();
        mail.blocked |= mail.responses.len() >= mail.capacity;
        mail.responses.len() < mail.capacity
    }

    fn push(&self, response: WatchResponse) {
        assert_eq!(response.header.unwrap().cluster_id, 0);
        self.0.borrow_mut().responses.push_back(response);
    }
}

const FRAGMENT_BYTES: usize = 150;

/// A registry with its history, its streams and their clients, all under random load.
struct World {
    random: Random,
    past: Past,
    watchers: Watchers<Mailbox>,
    streams: BTreeMap<StreamId, (Mailbox, Client)>,
    next_stream: u64,
    seen: Seen,
    advanced: usize,
    caught_up: usize,
}

impl World {
    fn new(seed: u64) -> World {
        World {
            random: Random::new(seed),
            past: Past::new(),
            watchers: Watchers::new(1, FRAGMENT_BYTES),
            streams: BTreeMap::new(),
            next_stream: 0,
            seen: Seen::default(),
            advanced: 0,
            caught_up: 0,
        }
    }

    fn pick(&mut self) -> Option<StreamId> {
        let nth = self.random.below(self.streams.len().max(1));
        self.streams.keys().nth(nth).copied()
    }

    fn step(&mut self) {
        let revision = self.past.revision;
        match self.random.below(20) {
            0..=5 => {
                let changes = self.past.write_at_random(&mut self.random);
                // The feed: at times a message is dropped, and so is what follows.
                if self.watchers.position() == revision && !self.random.one_in(6) {
                    self.watchers.deliver(&changes, self.past.revision);
                }
            }
            6 if self.streams.len() < 4 => {
                let id = StreamId(self.next_stream);
                self.next_stream += 1;
                let mailbox = Mailbox::with_capacity(1 + self.random.below(6));
                self.watchers.open(id, mailbox.clone());
                self.streams.insert(id, (mailbox, Client::default()));
            }
            7..=9 => {
                let request = create_at_random(&mut self.random, revision);
                let Some(id) = self.pick() else { return };
                let (mailbox, client) = self.streams.get_mut(&id).unwrap();
                if mailbox.has_room() {
                    client.creates(&request);
                    self.watchers.create(id, request, revision);
                }
            }
            10 => {
                let watch_id = self.random.below(6) as i64;
                let Some(id) = self.pick() else { return };
                if self.streams[&id].0.has_room() {
                    self.watchers.cancel(id, watch_id, revision);
                }
            }
            11 => {
                let Some(id) = self.pick() else { return };
                if self.streams[&id].0.has_room() {
                    self.watchers.progress(id, revision);
                }
            }
            12 => {
                if let Some(id) = self.pick() {
                    self.watchers.tick(id);
                }
            }
            13 if self.random.one_in(10) => {
                if let Some(id) = self.pick() {
                    self.watchers.close(id);
                    self.seen.add(self.streams.remove(&id).unwrap().1.seen);
                }
            }
            14 if self.random.one_in(2) && revision > self.past.compact_revision => {
                let span = (revision - self.past.compact_revision.max(0)) as usize;
                self.past.compact_revision = revision - self.random.below(span) as i64;
            }
            15 => self.advanced += usize::from(self.watchers.advance(&self.past)),
            16 => self.caught_up += usize::from(self.watchers.catch_up(&self.past)),
            _ => {
                let Some(id) = self.pick() else { return };
                let (mailbox, client) = self.streams.get_mut(&id).unwrap();
                for _ in 0..1 + self.random.below(4) {
                    let Some(response) = mailbox.take() else { break };
                    client.got(response, &self.past);
                }
                if mailbox.unblock() {
                    self.watchers.room(id);
                }
            }
        }
    }

    /// Reads and does all there is to read and do.
    fn settle(&mut self) {
        loop {
            let mut moved = self.watchers.advance(&self.past) | self.watchers.catch_up(&self.past);
            for (id, (mailbox, client)) in &mut self.streams {
                for response in mailbox.take_all() {
                    client.got(response, &self.past);
                    moved = true;
                }
                if mailbox.unblock() {
                    self.watchers.room(*id);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        assert_eq!(self.watchers.position(), self.past.revision);
        assert_eq!(self.watchers.behind_count(), 0);
        let watches = self.streams.values().map(|(_, client)| client.watches.len());
        assert_eq!(self.watchers.watcher_count(), watches.sum::<usize>());
        for (id, (mailbox, client)) in &mut self.streams {
            client.finished(&self.past, self.past.revision);
            let answers = usize::from(client.may_ask(self.past.revision));
            self.watchers.progress(*id, self.past.revision);
            let responses = mailbox.take_all();
            assert_eq!(responses.len(), answers, "one answer, at once");
            responses.into_iter().for_each(|response| client.got(response, &self.past));
        }
    }
}

#[test]
fn watches_are_what_they_promise_under_random_load() {
    let (mut seen, mut advanced, mut caught_up) = (Seen::default(), 0, 0);
    for seed in 0..300 {
        println!("seed {seed}");
        let mut world = World::new(seed);
        for step in 0..600 {
            world.step();
            if step % 200 == 199 {
                world.settle();
            }
        }
        world.streams.values().for_each(|(_, client)| seen.add(client.seen));
        seen.add(world.seen);
        advanced += world.advanced;
        caught_up += world.caught_up;
    }
    println!("{seen:?}, {advanced} advanced, {caught_up} caught up");
    let Seen { events, fragments, progress, periodic, compacted, refused, canceled } = seen;
    for count in [fragments, progress, periodic, compacted, refused, canceled, advanced, caught_up]
    {
        assert!(count > 300, "all of it happened, and often");
    }
    assert!(events > 50_000);
}

#[test]
fn the_same_steps_give_the_same_responses() {
    let run = |seed| {
        let mut world = World::new(seed);
        let mut responses = Vec::new();
        for _ in 0..2000 {
            world.step();
            let mailboxes = world.streams.values().map(|(mailbox, _)| mailbox.0.borrow());
            responses.push(mailboxes.map(|mail| mail.responses.clone()).collect::<Vec<_>>());
        }
        responses
    };
    assert!(run(7) == run(7));
}

/// The same with the real store as history, which forgets what was compacted.
#[test]
fn the_store_is_a_history_to_watch() {
    let mut seen = Seen::default();
    for seed in 0..40 {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let (mut store, mut past) = (Store::new(), Past::new());
        let mut watchers = Watchers::new(1, FRAGMENT_BYTES);
        let mailbox = Mailbox::with_capacity(8);
        let mut client = Client::default();
        watchers.open(STREAM, mailbox.clone());
        for _ in 0..400 {
            match random.below(12) {
                0..=4 => {
                    let mut write = store.write();
                    let key =
                        |random: &mut Random| Bytes::from(["a", "aa", "b", "c"][random.below(4)]);
                    if random.one_in(3) {
                        let (from, to) = (key(&mut random), key(&mut random));
                        write.delete_range(&KeyRange::from_wire(from, to));
                    } else {
                        write.put(key(&mut random), random.below(1000).to_string().into(), 0);
                    }
                    let (revision, changes) = write.commit();
                    if past.revision == watchers.position() && !random.one_in(3) {
                        watchers.deliver(&changes, revision);
                    }
                    past.revision = revision;
                    past.all.extend(changes);
                }
                5 if random.one_in(4) => {
                    let revision = past.revision - random.below(past.revision as usize) as i64;
                    if store.compact(revision).is_ok() {
                        past.compact_revision = revision;
                    }
                }
                6 => {
                    store.compact_step(i64::MAX, 3);
                }
                7 if mailbox.has_room() => {
                    let request = create_at_random(&mut random, past.revision);
                    client.creates(&request);
                    watchers.create(STREAM, request, store.revision());
                }
                8 => {
                    watchers.advance(&store);
                }
                9 => {
                    watchers.catch_up(&store);
                }
                _ => {
                    for response in mailbox.take_all() {
                        client.got(response, &past);
                    }
                    if mailbox.unblock() {
                        watchers.room(STREAM);
                    }
                }
            }
        }
        while watchers.advance(&store)
            | watchers.catch_up(&store)
            | !mailbox.0.borrow().responses.is_empty()
        {
            for response in mailbox.take_all() {
                client.got(response, &past);
            }
            if mailbox.unblock() {
                watchers.room(STREAM);
            }
        }
        client.finished(&past, store.revision());
        seen.add(client.seen);
    }
    println!("{seen:?}");
    assert!(seen.events > 5000 && seen.compacted > 20);
}

// One thing at a time.

struct Bench {
    past: Past,
    watchers: Watchers<Mailbox>,
    mailbox: Mailbox,
}

const STREAM: StreamId = StreamId(1);

impl Bench {
    fn new() -> Bench {
        let mut watchers = Watchers::new(1, 2 << 20);
        let mailbox = Mailbox::with_capacity(100);
        watchers.open(STREAM, mailbox.clone());
        Bench { past: Past::new(), watchers, mailbox }
    }

    fn put(&mut self, key: &str, value: &[u8]) {
        let changes = self.past.write(&[(key, Some(value))]);
        self.watchers.deliver(&changes, self.past.revision);
    }

    fn create(&mut self, request: WatchCreateRequest) -> Vec<WatchResponse> {
        self.watchers.create(STREAM, request, self.past.revision);
        while self.watchers.catch_up(&self.past) {}
        self.mailbox.take_all()
    }

    fn progress(&mut self) -> Vec<WatchResponse> {
        self.watchers.progress(STREAM, self.past.revision);
        self.mailbox.take_all()
    }
}

fn watch(key: &'static str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { key: key.into(), start_revision, ..WatchCreateRequest::default() }
}

fn revisions(response: &WatchResponse) -> Vec<i64> {
    let events = response.events.iter().map(|event| Event::decode(event.clone()).unwrap());
    events.map(|event| event.kv.unwrap().mod_revision).collect()
}

#[test]
fn ids_are_counted_from_zero_and_skip_those_in_use() {
    let mut bench = Bench::new();
    let mut create = |watch_id| {
        let request = WatchCreateRequest { watch_id, ..watch("a", 0) };
        let responses = bench.create(request);
        let [response] = &responses[..] else { panic!("{responses:?}") };
        assert!(response.created);
        (response.watch_id, response.canceled, response.cancel_reason.clone())
    };
    let ok = |id| (id, false, String::new());
    assert_eq!(create(0), ok(0));
    assert_eq!(create(1), ok(1));
    assert_eq!(create(7), ok(7));
    assert_eq!(create(0), ok(2));
    let reason = "mvcc: duplicate watch ID provided on the WatchStream".to_owned();
    assert_eq!(create(7), (-1, true, reason));
    bench.watchers.cancel(STREAM, 7, 1);
    let canceled = bench.mailbox.take_all();
    assert_eq!((canceled.len(), canceled[0].watch_id, canceled[0].canceled), (1, 7, true));
    bench.watchers.cancel(STREAM, 7, 1);
    assert_eq!(bench.mailbox.take_all(), [], "silent about an unknown id");
}

#[test]
fn what_cannot_be_watched_is_refused_with_the_reason() {
    let mut bench = Bench::new();
    bench.put("a", b"1");
    let range = |start: &'static str, end: &'static str| WatchCreateRequest {
        range_end: end.into(),
        ..watch(start, 0)
    };
    let cases = [
        (range("b", "b"), "mvcc: watcher range is empty"),
        (range("b", "a"), "mvcc: watcher range is empty"),
        (watch("a", -1), "etcdserver: mvcc: required revision has been compacted"),
    ];
    for (request, reason) in cases {
        let expected = WatchResponse {
            header: header(2),
            watch_id: -1,
            created: true,
            canceled: true,
            cancel_reason: reason.to_owned(),
            ..WatchResponse::default()
        };
        assert_eq!(bench.create(request), [expected]);
    }
    assert_eq!(bench.watchers.watcher_count(), 0);
}

#[test]
fn a_start_in_the_future_waits_for_it_without_a_word() {
    let mut bench = Bench::new();
    let request = WatchCreateRequest { progress_notify: true, ..watch("a", 4) };
    assert_eq!(bench.create(request).len(), 1);
    bench.put("a", b"2");
    assert_eq!(bench.progress(), [], "a bookmark below the start would be wrong");
    assert!(bench.watchers.tick(STREAM));
    assert_eq!(bench.mailbox.take_all(), []);
    bench.put("a", b"3");
    assert_eq!(bench.progress(), [], "just before the start is before it");
    bench.put("a", b"4");
    let responses = bench.mailbox.take_all();
    assert_eq!(responses.iter().map(revisions).collect::<Vec<_>>(), [[4]]);
    assert_eq!(bench.progress().len(), 1);
}

#[test]
fn compaction_ends_those_who_want_what_is_gone() {
    let mut bench = Bench::new();
    bench.put("a", b"2");
    bench.put("a", b"3");
    let gone = bench.past.write(&[("a", None)]);
    bench.watchers.deliver(&gone, 4);
    bench.past.compact_revision = 4;

    let responses = bench.create(watch("a", 3));
    assert!(responses[0].created && !responses[0].canceled);
    let canceled = WatchResponse {
        header: header(0),
        watch_id: 0,
        canceled: true,
        compact_revision: 4,
        ..WatchResponse::default()
    };
    assert_eq!(responses[1..], [canceled]);

    // The compaction's own revision is still there, and what it replaced.
    let responses = bench.create(WatchCreateRequest { prev_kv: true, ..watch("a", 4) });
    assert_eq!(responses.len(), 2);
    let event = Event::decode(responses[1].events[0].clone()).unwrap();
    assert_eq!(event.r#type(), EventType::Delete);
    assert_eq!(event.prev_kv.unwrap().value, "3");
}

#[test]
fn a_live_watcher_is_not_ended_by_compaction() {
    let mut bench = Bench::new();
    bench.create(watch("z", 0));
    for _ in 0..5 {
        bench.put("a", b"");
    }
    bench.past.compact_revision = 6;
    bench.put("z", b"");
    let responses = bench.mailbox.take_all();
    assert_eq!(responses.iter().map(revisions).collect::<Vec<_>>(), [[7]]);
}

#[test]
fn a_gap_over_a_compaction_ends_only_those_it_concerns() {
    let mut bench = Bench::new();
    bench.create(watch("a", 0));
    bench.create(watch("a", 5));
    for _ in 2..=6 {
        bench.past.write(&[("a", Some(b""))]);
    }
    bench.past.compact_revision = 5;
    while bench.watchers.advance(&bench.past) | bench.watchers.catch_up(&bench.past) {}
    let responses = bench.mailbox.take_all();
    assert_eq!(bench.watchers.position(), 6);
    let (canceled, events): (Vec<_>, Vec<_>) = responses.iter().partition(|r| r.canceled);
    assert_eq!((canceled.len(), canceled[0].watch_id, canceled[0].compact_revision), (1, 0, 5));
    assert_eq!(
        events.iter().map(|r| (r.watch_id, revisions(r))).collect::<Vec<_>>(),
        [(1, vec![5, 6])]
    );
}

#[test]
fn progress_waits_behind_events_and_for_those_who_lag() {
    let mut bench = Bench::new();
    assert_eq!(bench.progress(), [], "silent without watchers");
    bench.put("a", b"2");
    bench.create(watch("b", 0));
    bench.watchers.create(STREAM, watch("a", 2), 2);
    bench.watchers.progress(STREAM, 2);
    assert_eq!(bench.mailbox.take_all().len(), 1, "created, and no progress yet");
    while bench.watchers.catch_up(&bench.past) {}
    let responses = bench.mailbox.take_all();
    assert_eq!(responses.iter().map(revisions).collect::<Vec<_>>(), [vec![2], vec![]]);
    let expected = WatchResponse { header: header(2), watch_id: -1, ..WatchResponse::default() };
    assert_eq!(responses[1], expected);

    // The store is ahead of what the registry was handed: the answer is not.
    let changes = bench.past.write(&[("a", Some(b"3"))]);
    bench.watchers.progress(STREAM, 3);
    assert_eq!(bench.mailbox.take_all(), []);
    bench.watchers.deliver(&changes, 3);
    let responses = bench.mailbox.take_all();
    assert_eq!(responses.len(), 2);
    assert_eq!((responses[1].watch_id, responses[1].header), (-1, header(3)));
}

#[test]
fn a_watch_of_the_past_that_finds_nothing_is_told_progress() {
    let mut bench = Bench::new();
    bench.put("a", b"2");
    bench.put("a", b"3");
    bench.watchers.create(STREAM, watch("b", 2), 3);
    bench.watchers.progress(STREAM, 3);
    while bench.watchers.catch_up(&bench.past) {}
    let responses = bench.mailbox.take_all();
    assert_eq!((responses.len(), responses[0].created), (2, true));
    assert_eq!((responses[1].watch_id, responses[1].header), (-1, header(3)));
}

#[test]
fn periodic_progress_is_for_the_quiet() {
    let mut bench = Bench::new();
    bench.create(WatchCreateRequest { progress_notify: true, ..watch("a", 0) });
    bench.create(watch("b", 0));
    let mut tick = |put: bool| {
        if put {
            bench.put("a", b"");
        }
        bench.mailbox.take_all();
        assert!(bench.watchers.tick(STREAM));
        let responses = bench.mailbox.take_all();
        responses.iter().map(|r| (r.watch_id, r.header)).collect::<Vec<_>>()
    };
    assert_eq!(tick(false), [(0, header(1))]);
    assert_eq!(tick(true), []);
    assert_eq!(tick(false), [(0, header(2))]);
    bench.watchers.cancel(STREAM, 0, 2);
    assert!(!bench.watchers.tick(STREAM), "nobody asks any more");
}

#[test]
fn responses_end_at_a_revision_before_they_are_too_large() {
    let mut bench = Bench::new();
    let value = vec![1; 300 << 10];
    for _ in 0..3 {
        bench.past.write(&[("a", Some(&value)), ("b", Some(&value)), ("c", Some(&value))]);
    }
    for _ in 0..5 {
        bench.past.write(&[("a", Some(&value))]);
    }
    while bench.watchers.advance(&bench.past) {}
    let all = WatchCreateRequest { range_end: "\0".into(), ..watch("", 1) };
    let responses = bench.create(all.clone());
    let parts: Vec<_> = responses[1..].iter().map(revisions).collect();
    assert_eq!(parts, [vec![2, 2, 2], vec![3, 3, 3], vec![4, 4, 4], vec![5, 6, 7], vec![8, 9]]);
}

#[test]
fn what_finds_no_room_in_the_middle_of_a_page_is_read_again() {
    let mut bench = Bench::new();
    let value = vec![1; 700 << 10];
    for _ in 0..5 {
        bench.past.write(&[("a", Some(&value))]);
    }
    while bench.watchers.advance(&bench.past) {}
    let (id, mailbox) = (StreamId(2), Mailbox::with_capacity(3));
    bench.watchers.open(id, mailbox.clone());
    bench.watchers.create(id, watch("a", 1), 6);
    let mut got = Vec::new();
    for _ in 0..3 {
        while bench.watchers.catch_up(&bench.past) {}
        let responses = mailbox.take_all();
        assert!(responses.len() <= 3);
        got.extend(responses.iter().skip(usize::from(got.is_empty())).map(revisions));
        if mailbox.unblock() {
            bench.watchers.room(id);
        }
    }
    assert_eq!(got, [[2], [3], [4], [5], [6]]);
}

#[test]
fn catching_up_stops_at_the_position() {
    let mut bench = Bench::new();
    bench.put("a", b"2");
    bench.watchers.create(STREAM, watch("a", 2), 2);
    bench.watchers.progress(STREAM, 2);
    let changes = bench.past.write(&[("a", Some(b"3"))]);
    while bench.watchers.catch_up(&bench.past) {}
    let responses = bench.mailbox.take_all();
    assert_eq!(responses[1..].iter().map(|r| r.header).collect::<Vec<_>>(), [header(2), header(2)]);
    bench.watchers.deliver(&changes, 3);
    assert_eq!(bench.mailbox.take_all().iter().map(revisions).collect::<Vec<_>>(), [[3]]);
}

#[test]
fn fragments_are_smaller_than_the_limit_and_marked() {
    let mut bench = Bench::new();
    let (large, small) = (vec![1; 900 << 10], vec![1; 10]);
    bench.past.write(&[
        ("a", Some(&large)),
        ("b", Some(&large)),
        ("c", Some(&large)),
        ("d", Some(&small)),
    ]);
    while bench.watchers.advance(&bench.past) {}
    let all = WatchCreateRequest { range_end: "\0".into(), fragment: true, ..watch("", 1) };
    let responses = bench.create(all.clone());
    let parts: Vec<_> = responses[1..].iter().map(|r| (r.fragment, r.events.len())).collect();
    assert_eq!(parts, [(true, 2), (false, 2)]);
    for response in &responses[1..] {
        assert!(response.encoded_len() < 2 << 20);
        assert_eq!((response.watch_id, response.header), (0, header(2)));
    }
    let responses = bench.create(WatchCreateRequest { fragment: false, ..all });
    assert_eq!(responses.len(), 2, "whole, unless asked for");
}

#[test]
fn a_read_of_history_is_shared_by_those_on_the_way() {
    struct Counted<'a>(&'a Past, std::cell::Cell<usize>);
    impl History for Counted<'_> {
        fn revision(&self) -> i64 {
            self.0.revision()
        }
        fn changes(&self, from: i64, changes: usize, bytes: usize) -> Result<Page, Compacted> {
            self.1.set(self.1.get() + 1);
            self.0.changes(from, changes, bytes)
        }
    }
    let mut bench = Bench::new();
    for _ in 0..50 {
        bench.put("a", b"");
    }
    for stream in 2..40 {
        let (id, mailbox) = (StreamId(stream), Mailbox::with_capacity(100));
        bench.watchers.open(id, mailbox);
        bench.watchers.create(id, watch("a", 2 + stream as i64), 51);
    }
    assert_eq!(bench.watchers.behind_count(), 38);
    let history = Counted(&bench.past, std::cell::Cell::new(0));
    while bench.watchers.catch_up(&history) {}
    assert_eq!(bench.watchers.behind_count(), 0);
    assert_eq!(history.1.get(), 1);
}

#[test]
fn a_stream_far_behind_does_not_keep_the_others_waiting() {
    let mut bench = Bench::new();
    for _ in 0..10 * READ_CHANGES {
        bench.past.write(&[("a", Some(b""))]);
    }
    while bench.watchers.advance(&bench.past) {}
    let other = Mailbox::with_capacity(100);
    bench.watchers.open(StreamId(2), other.clone());
    bench.watchers.create(STREAM, watch("a", 1), bench.past.revision);
    bench.watchers.create(StreamId(2), watch("a", bench.past.revision), bench.past.revision);
    bench.watchers.catch_up(&bench.past);
    bench.watchers.catch_up(&bench.past);
    assert_eq!(other.take_all().len(), 2, "created and events, in the second turn");
    assert_eq!(bench.watchers.behind_count(), 1);
}
