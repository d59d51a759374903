//! Who watches what, and what each of them gets.
//!
//! [`Watchers`] is the whole watch protocol as a state machine: requests and changes go
//! in, [`WatchResponse`]s come out through one [`Outbox`] per stream. Around it,
//! `runtime::watch_hub` is tasks, queues and clocks.
//!
//! The registry has a *position*: the revision up to which it was handed changes.
//!
//! ```text
//!            compacted          position   store
//!   ------------|------------------|--------|------> revisions
//!                  ^ Behind: reads    ^ Live: is handed what
//!                    history            comes after the position
//! ```
//!
//! * A watcher is **Live** when the next revision it wants lies after the position. It is
//!   found by key when a change comes ([`Watchers::deliver`]). A start in the future is
//!   nothing special: earlier changes are not for it.
//! * A watcher is **Behind** when that revision is not after the position: it started in
//!   the past, or its stream had no room. It waits for its turn to read history
//!   ([`Watchers::catch_up`]) and becomes Live when it has read up to the position.
//!
//! History is the truth. A change for which a stream has no room is forgotten, not kept:
//! the watcher only remembers the revision from which it must read again. So a slow
//! client costs the server its queue and nothing else, and loses nothing.
//!
//! Invariants, for every watcher:
//!
//! * The responses hold exactly the changes of its range that pass its filters, from its
//!   start on, in order, each once. A revision is never split over two responses, unless
//!   the watcher asked for `fragment`.
//! * `header.revision` of a response with events is the revision of the last event or, when
//!   they were read from history, the position; as in etcd. One without events that says R
//!   follows every event up to R.
//! * `created` is the first response, and nothing follows `canceled`.
//!
//! Equal calls on equal registries give equal responses in equal order. There is no clock
//! and no thread here; reading history is a call of the [`History`] passed in.

mod event;
mod index;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use self::event::{SharedEvent, field_len};
use self::index::{Index, Slot};
use super::{Change, KeyRange, Store};
use crate::error::Error;
use crate::pb::etcdserverpb::watch_create_request::FilterType;
use crate::pb::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchResponse};

/// Up to how many bytes of events a response goes on to the next revision. The events of
/// one revision always share a response, however many bytes they are.
pub const RESPONSE_BYTES: usize = 1 << 20;

/// What one step reads from history at most, in changes (whole revisions are read).
pub const READ_CHANGES: usize = 1024;

/// What one step reads from history at most, in bytes of records (whole revisions).
pub const READ_BYTES: usize = 4 << 20;

/// How many watchers share one read of history at most.
pub const READ_WATCHERS: usize = 256;

/// The `watch_id` of a response that is about no watcher, or about all of the stream.
pub const NO_WATCH_ID: i64 = -1;

/// What a header grows by, in bytes, when the cluster, member and term are filled in.
const HEADER_BYTES: usize = 48;

const REASON_DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";
const REASON_EMPTY_RANGE: &str = "mvcc: watcher range is empty";

/// Names a stream of watchers; unique for the life of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// Where the responses of one stream go: a queue with a limit. A handle: clones are the
/// same queue.
pub trait Outbox: Clone {
    /// Whether a response may be pushed. `false` is a promise: [`Watchers::room`] will be
    /// called for this stream when there is room again.
    fn has_room(&self) -> bool;

    /// Queues `response`, whose header has the revision only. Never refused: whoever calls
    /// it has asked for room and queues one answer, in one or more fragments.
    fn push(&self, response: WatchResponse);
}

/// The changes of the store since its compaction.
pub trait History {
    /// The latest revision.
    fn revision(&self) -> i64;

    /// The changes from revision `from` on: all of them, or as many whole revisions as
    /// `max_changes` and `max_bytes` allow, but at least one. `from` may be one more than
    /// the latest revision, and the page is empty then.
    ///
    /// The compaction and the changes are of the same moment.
    fn changes(&self, from: i64, max_changes: usize, max_bytes: usize) -> Result<Page, Compacted>;
}

impl History for Store {
    fn revision(&self) -> i64 {
        self.revision()
    }

    fn changes(&self, from: i64, max_changes: usize, max_bytes: usize) -> Result<Page, Compacted> {
        let compact_revision = self.compact_revision();
        if from < compact_revision {
            return Err(Compacted { compact_revision });
        }
        // The page says where to stop: it has to know whether there would have been more.
        let changes = self.changes(from, usize::MAX);
        Ok(Page::collect(changes, self.revision(), max_changes, max_bytes))
    }
}

impl<H: History + ?Sized> History for Arc<H> {
    fn revision(&self) -> i64 {
        (**self).revision()
    }

    fn changes(&self, from: i64, max_changes: usize, max_bytes: usize) -> Result<Page, Compacted> {
        (**self).changes(from, max_changes, max_bytes)
    }
}

/// A piece of history, from the revision that was asked for on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The changes, in revision order.
    pub changes: Vec<Change>,
    /// Every change up to this revision is in `changes`.
    pub through: i64,
}

impl Page {
    /// Takes whole revisions from `changes`, the history from some revision on up to
    /// `revision`, until the next change would be more than `max_changes` or `max_bytes`.
    pub fn collect<'a>(
        changes: impl IntoIterator<Item = &'a Change>,
        revision: i64,
        max_changes: usize,
        max_bytes: usize,
    ) -> Page {
        let mut page: Vec<Change> = Vec::new();
        let mut bytes = 0;
        for change in changes {
            if let Some(last) = page.last()
                && last.revision.main != change.revision.main
                && (page.len() >= max_changes || bytes >= max_bytes)
            {
                let through = last.revision.main;
                return Page { changes: page, through };
            }
            bytes += change_bytes(change);
            page.push(change.clone());
        }
        Page { changes: page, through: revision }
    }

    /// Forgets what comes after `revision`.
    fn cut(&mut self, revision: i64) {
        if self.through > revision {
            let keep = self.changes.partition_point(|change| change.revision.main <= revision);
            self.changes.truncate(keep);
            self.through = revision;
        }
    }
}

/// What a change holds of records, in bytes.
pub fn change_bytes(change: &Change) -> usize {
    change.kv.len() + change.prev.as_ref().map_or(0, Bytes::len)
}

/// The history asked for begins before the compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// The revision that was compacted: history before it is gone.
    pub compact_revision: i64,
}

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: progress is answered before the events that it speaks of.
    pub(crate) static PROGRESS_AT_ONCE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Every watcher of every stream. See the module.
#[derive(Debug)]
pub struct Watchers<O> {
    /// Changes up to this revision were handed over.
    position: i64,
    /// Watchers with `fragment` get responses smaller than this, in bytes, if they have
    /// more than one event.
    fragment_bytes: usize,
    streams: BTreeMap<StreamId, Stream<O>>,
    slab: Slab<O>,
    /// The Live watchers, by key.
    live: Index,
    /// Streams with Behind watchers and room; the first one has the next turn.
    turns: VecDeque<StreamId>,
    /// Streams that wait for an answer to a progress request.
    asking: BTreeSet<StreamId>,
    behind: usize,
    events: u64,
}

#[derive(Debug)]
struct Stream<O> {
    outbox: O,
    watchers: BTreeMap<i64, Slot>,
    /// The id to try first when the client leaves the choice to us.
    next_id: i64,
    /// The Behind watchers, by the revision each has to read from.
    behind: BTreeSet<(i64, Slot)>,
    /// The outbox was full: no turns until there is room.
    blocked: bool,
    /// Whether the stream stands in `turns`.
    in_turns: bool,
    /// A progress request is open: answered once the position has come this far.
    progress: Option<i64>,
}

#[derive(Debug)]
struct Watcher<O> {
    stream: StreamId,
    id: i64,
    outbox: O,
    range: KeyRange,
    /// Changes before this revision are not for this watcher, or it has them. Live
    /// watchers have, besides, everything up to the position.
    next: i64,
    /// The `start_revision` it was created with. Nothing is said of earlier revisions.
    start: i64,
    behind: bool,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// No event was sent since the last tick.
    quiet: bool,
    batch: Batch,
}

/// Events on their way into one response.
#[derive(Debug, Default)]
struct Batch {
    events: Vec<Bytes>,
    bytes: usize,
    /// The first and last revision of the events.
    first: i64,
    last: i64,
    /// There was no room for this batch: it is forgotten, with what would follow.
    refused: bool,
}

/// How a batch becomes responses.
#[derive(Clone, Copy)]
struct Sending {
    /// From this size on a response is split, if its watcher asked for that.
    fragment_bytes: usize,
    /// What the header says; `None`: the revision of the last event.
    header_revision: Option<i64>,
}

impl<O: Outbox> Watchers<O> {
    /// A registry without streams, to be handed the changes after `position`.
    ///
    /// Responses of watchers with `fragment` are split when they reach `fragment_bytes`.
    pub fn new(position: i64, fragment_bytes: usize) -> Self {
        Watchers {
            position,
            fragment_bytes,
            streams: BTreeMap::new(),
            slab: Slab { slots: Vec::new(), free: Vec::new() },
            live: Index::default(),
            turns: VecDeque::new(),
            asking: BTreeSet::new(),
            behind: 0,
            events: 0,
        }
    }

    /// The revision up to which changes were handed over.
    pub fn position(&self) -> i64 {
        self.position
    }

    /// How many watchers there are.
    pub fn watcher_count(&self) -> usize {
        self.slab.len()
    }

    /// How many of them are Behind.
    pub fn behind_count(&self) -> usize {
        self.behind
    }

    /// How many streams there are.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// How many events were pushed, ever, counted once per watcher.
    pub fn event_count(&self) -> u64 {
        self.events
    }

    // Streams.

    /// Adds a stream without watchers. `stream` must be new.
    pub fn open(&mut self, stream: StreamId, outbox: O) {
        let state = Stream {
            outbox,
            watchers: BTreeMap::new(),
            next_id: 0,
            behind: BTreeSet::new(),
            blocked: false,
            in_turns: false,
            progress: None,
        };
        self.streams.insert(stream, state);
    }

    /// Ends a stream with all its watchers. No response.
    pub fn close(&mut self, stream: StreamId) {
        let Some(state) = self.streams.remove(&stream) else { return };
        self.asking.remove(&stream);
        // Its turn, if any, is skipped when it comes.
        for slot in state.watchers.into_values() {
            self.forget(slot);
        }
    }

    /// The outbox of the stream, which had none, has room again.
    pub fn room(&mut self, stream: StreamId) {
        if let Some(state) = self.streams.get_mut(&stream) {
            state.blocked = false;
            self.queue_turn(stream);
            self.answer_progress();
        }
    }

    // Requests. The caller has made sure that the outbox has room.

    /// Adds a watcher and answers `created`, or says why not. `revision` is the store's
    /// latest: a watcher without `start_revision` begins just after it.
    pub fn create(&mut self, stream: StreamId, request: WatchCreateRequest, revision: i64) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        let admitted = admit(state, &request);
        let header = header(revision);
        let (id, range) = match admitted {
            Ok(admitted) => admitted,
            Err(cancel_reason) => {
                return state.outbox.push(WatchResponse {
                    header,
                    watch_id: NO_WATCH_ID,
                    created: true,
                    canceled: true,
                    cancel_reason,
                    ..WatchResponse::default()
                });
            }
        };
        let next = match request.start_revision {
            0 => revision + 1,
            start => start,
        };
        let behind = next <= self.position;
        let filters = |filter: FilterType| request.filters.contains(&i32::from(filter));
        let slot = self.slab.insert(Watcher {
            stream,
            id,
            outbox: state.outbox.clone(),
            range: range.clone(),
            next,
            start: request.start_revision,
            behind,
            no_put: filters(FilterType::Noput),
            no_delete: filters(FilterType::Nodelete),
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            quiet: true,
            batch: Batch::default(),
        });
        state.watchers.insert(id, slot);
        let created = WatchResponse { header, watch_id: id, created: true, ..Default::default() };
        state.outbox.push(created);
        if behind {
            state.behind.insert((next, slot));
            self.behind += 1;
            self.queue_turn(stream);
        } else {
            self.live.insert(&range, slot);
        }
    }

    /// Ends a watcher and says so, with the store's latest `revision`. Silent when there is
    /// no such watcher.
    pub fn cancel(&mut self, stream: StreamId, watch_id: i64, revision: i64) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        let Some(&slot) = state.watchers.get(&watch_id) else { return };
        state.outbox.push(WatchResponse {
            header: header(revision),
            watch_id,
            canceled: true,
            ..WatchResponse::default()
        });
        self.remove(slot);
        // It may have been the one that the others' progress waited for.
        self.answer_progress();
    }

    /// Answers how far the watchers of the stream are, with one response for all, once all
    /// of them are Live and the position has reached `revision`, the store's latest.
    ///
    /// Silent, as etcd is, when there are no watchers, or one of them starts in the future,
    /// be it with the very next revision: the answer would be about revisions it does not
    /// want (`progressIfSync` in server/storage/mvcc/watchable_store.go). Requests that
    /// come while one is open get one answer.
    pub fn progress(&mut self, stream: StreamId, revision: i64) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        #[cfg(test)]
        if PROGRESS_AT_ONCE.get() {
            let (header, watch_id) = (header(revision), NO_WATCH_ID);
            state.outbox.push(WatchResponse { header, watch_id, ..Default::default() });
            return;
        }
        if state.progress.is_none() {
            state.progress = Some(revision);
            self.asking.insert(stream);
        }
        self.answer_progress();
    }

    /// Tells the Live watchers of the stream that asked for `progress_notify`, and got no
    /// event since the last tick, how far they are. Returns whether any asked.
    pub fn tick(&mut self, stream: StreamId) -> bool {
        let Some(state) = self.streams.get(&stream) else { return false };
        let mut asked = false;
        for &slot in state.watchers.values() {
            let Some(watcher) = self.slab.get_mut(slot) else { continue };
            if watcher.progress_notify {
                asked = true;
                let quiet = std::mem::replace(&mut watcher.quiet, true);
                let up_to_date = !watcher.behind && watcher.may_hear_of(self.position);
                if quiet && up_to_date && watcher.outbox.has_room() {
                    let header = header(self.position);
                    let watch_id = watcher.id;
                    watcher.outbox.push(WatchResponse { header, watch_id, ..Default::default() });
                }
            }
        }
        asked
    }

    // Changes.

    /// Hands `changes`, which are all of those after the position and up to `through`, to
    /// the Live watchers. Earlier ones among them do no harm: every Live watcher that wants
    /// them has them.
    pub fn deliver<'a>(&mut self, changes: impl IntoIterator<Item = &'a Change>, through: i64) {
        let refused = self.fan_out(None, changes, None);
        self.position = self.position.max(through);
        for slot in refused {
            self.fall_behind(slot);
        }
        self.answer_progress();
    }

    /// Brings the position forward by one read of history, when changes were missed.
    /// Returns whether it moved.
    pub fn advance<H: History + ?Sized>(&mut self, history: &H) -> bool {
        match history.changes(self.position + 1, READ_CHANGES, READ_BYTES) {
            Ok(page) if page.through > self.position => {
                self.deliver(&page.changes, page.through);
                true
            }
            Ok(_) => false,
            Err(Compacted { compact_revision }) => {
                // Watchers who want what is gone find that out when they read it.
                for slot in 0..self.slab.slots.len() {
                    if let Some(watcher) = self.slab.get_mut(slot)
                        && !watcher.behind
                        && watcher.next < compact_revision
                    {
                        self.fall_behind(slot);
                    }
                }
                let moved = compact_revision > self.position + 1;
                self.position = self.position.max(compact_revision - 1);
                moved
            }
        }
    }

    /// Whether [`Watchers::catch_up`] has something to do.
    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Gives one stream its turn: one read of history for its Behind watcher that is
    /// furthest behind, shared with all others, of any stream, that are on the way. Returns
    /// whether anything came of it.
    pub fn catch_up<H: History + ?Sized>(&mut self, history: &H) -> bool {
        while let Some(stream) = self.turns.pop_front() {
            let Some(state) = self.streams.get_mut(&stream) else { continue };
            state.in_turns = false;
            if state.blocked {
                continue;
            }
            let Some(&(from, _)) = state.behind.first() else { continue };
            let moved = match history.changes(from, READ_CHANGES, READ_BYTES) {
                Ok(mut page) => {
                    // What comes after the position will be delivered.
                    page.cut(self.position);
                    page.through >= from && self.share(stream, from, &page)
                }
                Err(Compacted { compact_revision }) => {
                    self.cancel_compacted(stream, compact_revision);
                    true
                }
            };
            self.queue_turn(stream);
            self.answer_progress();
            return moved;
        }
        false
    }

    /// Hands a page that was read from `from` to the Behind watchers it is of use to, those
    /// of `stream` first.
    fn share(&mut self, stream: StreamId, from: i64, page: &Page) -> bool {
        let on_the_way = (from, Slot::MIN)..=(page.through, Slot::MAX);
        let streams = std::iter::once(&stream).chain(&self.turns);
        let ready = streams.filter_map(|stream| self.streams.get(stream)).filter(|s| !s.blocked);
        let behind = ready.flat_map(|state| state.behind.range(on_the_way.clone()).copied());
        let group: Vec<(i64, Slot)> = behind.take(READ_WATCHERS).collect();

        let mut index = Index::default();
        for &(_, slot) in &group {
            if let Some(watcher) = self.slab.get(slot) {
                index.insert(&watcher.range, slot);
            }
        }
        let refused: BTreeSet<Slot> =
            self.fan_out(Some(&index), &page.changes, Some(self.position)).into_iter().collect();

        for &(was, slot) in &group {
            let Some(watcher) = self.slab.get_mut(slot) else { continue };
            let Some(state) = self.streams.get_mut(&watcher.stream) else { continue };
            state.behind.remove(&(was, slot));
            if refused.contains(&slot) {
                state.blocked = true;
            } else {
                watcher.next = page.through + 1;
            }
            if watcher.next > self.position {
                watcher.behind = false;
                self.behind -= 1;
                self.live.insert(&watcher.range, slot);
            } else {
                state.behind.insert((watcher.next, slot));
            }
        }
        !group.is_empty()
    }

    /// Ends the watchers of the stream that want what is gone.
    fn cancel_compacted(&mut self, stream: StreamId, compact_revision: i64) {
        while let Some(state) = self.streams.get_mut(&stream)
            && let Some(&(next, slot)) = state.behind.first()
            && next < compact_revision
        {
            if !state.outbox.has_room() {
                state.blocked = true;
                return;
            }
            let Some(watcher) = self.slab.get(slot) else { return };
            // Revision 0 and no reason: by this, clients know it is about compaction.
            state.outbox.push(WatchResponse {
                header: header(0),
                watch_id: watcher.id,
                canceled: true,
                compact_revision,
                ..WatchResponse::default()
            });
            self.remove(slot);
        }
    }

    /// Pushes `changes` to those watchers of `index` (the Live ones, if `None`) that want
    /// them, and returns those that had no room: their `next` says what they missed. The
    /// responses say `header_revision`, or the revision of their last event.
    fn fan_out<'a>(
        &mut self,
        index: Option<&Index>,
        changes: impl IntoIterator<Item = &'a Change>,
        header_revision: Option<i64>,
    ) -> Vec<Slot> {
        let Watchers { slab, live, events, fragment_bytes, .. } = self;
        let how = Sending { fragment_bytes: *fragment_bytes, header_revision };
        let index = index.unwrap_or(&*live);
        let mut filling: Vec<Slot> = Vec::new();
        for change in changes {
            let mut event = SharedEvent::new(change);
            index.visit(&change.key, &mut |slot| {
                let Some(watcher) = slab.get_mut(slot) else { return };
                if watcher.wants(change) {
                    if watcher.batch.events.is_empty() {
                        filling.push(slot);
                    }
                    let event = event.encoded(watcher.prev_kv);
                    *events += watcher.fill(event, change.revision.main, how);
                }
            });
        }
        filling.retain(|&slot| {
            let Some(watcher) = slab.get_mut(slot) else { return false };
            *events += watcher.flush(how);
            std::mem::take(&mut watcher.batch.refused)
        });
        filling
    }

    /// A Live watcher has missed what comes from its `next` on.
    fn fall_behind(&mut self, slot: Slot) {
        let Some(watcher) = self.slab.get_mut(slot) else { return };
        let Some(state) = self.streams.get_mut(&watcher.stream) else { return };
        self.live.remove(&watcher.range, slot);
        watcher.behind = true;
        self.behind += 1;
        state.behind.insert((watcher.next, slot));
        // Unless it fell behind for want of room, in which case it has to wait for that.
        state.blocked = !watcher.outbox.has_room();
        let stream = watcher.stream;
        self.queue_turn(stream);
    }

    fn queue_turn(&mut self, stream: StreamId) {
        if let Some(state) = self.streams.get_mut(&stream)
            && !state.blocked
            && !state.in_turns
            && !state.behind.is_empty()
        {
            state.in_turns = true;
            self.turns.push_back(stream);
        }
    }

    /// Answers the progress requests whose time has come.
    fn answer_progress(&mut self) {
        let Watchers { streams, slab, asking, position, .. } = self;
        asking.retain(|stream| {
            let Some(state) = streams.get_mut(stream) else { return false };
            let Some(revision) = state.progress else { return false };
            if state.blocked || !state.behind.is_empty() || *position < revision {
                return true;
            }
            let mut watchers = state.watchers.values().filter_map(|&slot| slab.get(slot));
            let told = watchers.all(|watcher| watcher.may_hear_of(*position));
            if told && !state.watchers.is_empty() {
                if !state.outbox.has_room() {
                    state.blocked = true;
                    return true;
                }
                let (header, watch_id) = (header(*position), NO_WATCH_ID);
                state.outbox.push(WatchResponse { header, watch_id, ..Default::default() });
            }
            state.progress = None;
            false
        });
    }

    /// Takes a watcher out of its stream and everything else.
    fn remove(&mut self, slot: Slot) {
        if let Some(watcher) = self.forget(slot)
            && let Some(state) = self.streams.get_mut(&watcher.stream)
        {
            state.watchers.remove(&watcher.id);
            state.behind.remove(&(watcher.next, slot));
        }
    }

    /// Takes a watcher out of everything but its stream.
    fn forget(&mut self, slot: Slot) -> Option<Watcher<O>> {
        let watcher = self.slab.remove(slot)?;
        if watcher.behind {
            self.behind -= 1;
        } else {
            self.live.remove(&watcher.range, slot);
        }
        Some(watcher)
    }
}

impl<O: Outbox> Watcher<O> {
    /// Whether a response may say that everything up to `revision` was sent.
    fn may_hear_of(&self, revision: i64) -> bool {
        self.start <= revision && self.next <= revision + 1
    }

    fn wants(&self, change: &Change) -> bool {
        let filtered = if change.deleted { self.no_delete } else { self.no_put };
        !filtered && !self.batch.refused && change.revision.main >= self.next
    }

    /// Adds an event to the batch, and sends what came before when there is enough of it.
    /// Returns how many events were sent.
    fn fill(&mut self, event: Bytes, revision: i64, how: Sending) -> u64 {
        let mut sent = 0;
        if !self.batch.events.is_empty()
            && self.batch.last != revision
            && self.batch.bytes + event.len() > RESPONSE_BYTES
        {
            sent = self.flush(how);
            if self.batch.refused {
                return sent;
            }
        }
        let batch = &mut self.batch;
        if batch.events.is_empty() {
            batch.first = revision;
            // Most responses carry one event, and there are many of them.
            batch.events.reserve_exact(1);
        }
        batch.last = revision;
        batch.bytes += event.len();
        batch.events.push(event);
        sent
    }

    /// Sends the batch, or forgets it if there is no room. Returns how many events were
    /// sent.
    fn flush(&mut self, how: Sending) -> u64 {
        if self.batch.events.is_empty() {
            return 0;
        }
        let Batch { events, first, last, .. } = std::mem::take(&mut self.batch);
        if !self.outbox.has_room() {
            self.next = first;
            self.batch.refused = true;
            return 0;
        }
        self.next = last + 1;
        self.quiet = false;
        let count = events.len() as u64;
        let header = header(how.header_revision.unwrap_or(last).max(last));
        let watch_id = self.id;
        let response = WatchResponse { header, watch_id, events, ..WatchResponse::default() };
        if self.fragment {
            split(response, how.fragment_bytes, |part| self.outbox.push(part));
        } else {
            self.outbox.push(response);
        }
        count
    }
}

/// Checks a create request, in etcd's order, and says which id and range it gets, or what
/// is wrong with it.
fn admit<O>(
    state: &mut Stream<O>,
    request: &WatchCreateRequest,
) -> Result<(i64, KeyRange), String> {
    if request.start_revision < 0 {
        return Err(Error::Compacted.to_string());
    }
    // Copies: the request's bytes are slices of a network buffer that should not be kept.
    let key = match request.key.as_ref() {
        b"" => Bytes::from_static(b"\0"),
        key => Bytes::copy_from_slice(key),
    };
    let range = KeyRange::from_wire(key, Bytes::copy_from_slice(&request.range_end));
    if range.is_empty() {
        return Err(REASON_EMPTY_RANGE.to_owned());
    }
    let id = match request.watch_id {
        0 => {
            while state.watchers.contains_key(&state.next_id) {
                state.next_id += 1;
            }
            state.next_id += 1;
            state.next_id - 1
        }
        id if state.watchers.contains_key(&id) => return Err(REASON_DUPLICATE_ID.to_owned()),
        id => id,
    };
    Ok((id, range))
}

/// A header that says `revision`; who sends it is filled in by the outbox.
fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// Splits a response into parts smaller than `limit` bytes, except that a part has one
/// event at least. All but the last have `fragment` set.
fn split(mut response: WatchResponse, limit: usize, mut push: impl FnMut(WatchResponse)) {
    let events = std::mem::take(&mut response.events);
    let base = response.encoded_len() + HEADER_BYTES;
    let mut size = base;
    for event in events {
        let event_size = field_len(&event);
        if !response.events.is_empty() && size + event_size >= limit {
            let events = std::mem::take(&mut response.events);
            push(WatchResponse { events, fragment: true, ..response.clone() });
            size = base;
        }
        size += event_size;
        response.events.push(event);
    }
    push(response);
}

/// Watchers by slot. Slots of removed ones are used again.
#[derive(Debug)]
struct Slab<O> {
    slots: Vec<Option<Watcher<O>>>,
    free: Vec<Slot>,
}

impl<O> Slab<O> {
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn get(&self, slot: Slot) -> Option<&Watcher<O>> {
        self.slots.get(slot)?.as_ref()
    }

    fn get_mut(&mut self, slot: Slot) -> Option<&mut Watcher<O>> {
        self.slots.get_mut(slot)?.as_mut()
    }

    fn insert(&mut self, watcher: Watcher<O>) -> Slot {
        if let Some(slot) = self.free.pop()
            && let Some(place) = self.slots.get_mut(slot)
        {
            *place = Some(watcher);
            return slot;
        }
        self.slots.push(Some(watcher));
        self.slots.len() - 1
    }

    fn remove(&mut self, slot: Slot) -> Option<Watcher<O>> {
        let watcher = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(watcher)
    }
}
