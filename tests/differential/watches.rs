//! Watchers on both servers.
//!
//! How events are spread over responses depends on time, so events are collected
//! per watcher and compared as sequences; `created` and `canceled` are compared as
//! they are. A watcher over all keys is the reference: from its events follows
//! how many each other watcher must get, so that it is known when to compare.
//!
//! Watchers live on three streams, by how they start, because a stream answers a
//! progress request only when all its watchers are up to date:
//!
//! * `present`: from now, or from a revision that is there. A progress request
//!   is answered when all have caught up, and is the barrier before a compaction.
//! * `ahead`: from a revision that is not there yet. A progress request must not
//!   be answered until all have come into their own.
//! * `refused`: from before the compacted revision.
//!
//! Every response is also checked for itself: `created` before events, revisions
//! ascending and not split over responses unless fragments were asked for, and no
//! progress beyond what was delivered.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    watch_request::RequestUnion,
};
use kvorum::pb::mvccpb::Event;
use prost::Message as _;
use serde_json::{Value, json};

use crate::common::accepted::PREV_KV_COMPACTED;
use crate::common::grpc::{RawStream, Wire};
use crate::common::mask::Identity;
use crate::generate::Known;
use crate::lockstep::{Mismatch, PATIENCE, Side, readable, same};

const METHOD: &str = "etcdserverpb.Watch/Watch";
/// Watchers per stream; beyond, none are created.
const MAX_WATCHERS: usize = 32;
/// How long a progress request is given before the next one.
const PROGRESS_RETRY: Duration = Duration::from_millis(20);

/// All watchers of a run.
pub(crate) struct Watches {
    present: Stream,
    ahead: Stream,
    refused: Stream,
    /// All events so far, as the reference watcher of the judge got them.
    log: Vec<Event>,
    /// How much of it is from before the reference watcher.
    log_before: usize,
    reference: i64,
    /// The revision up to which all watchers of the present are known to have
    /// everything.
    settled: i64,
}

/// One stream on each server.
struct Stream {
    name: &'static str,
    sides: [Half; 2],
    watchers: BTreeMap<i64, Watcher>,
}

struct Watcher {
    request: WatchCreateRequest,
    /// The first revision it is to see.
    first: i64,
    /// The revision, and the compacted revision, when it was created.
    born: i64,
    compacted: i64,
    /// How much of the log was looked at, and how many events of it are its own.
    looked_at: usize,
    expected: usize,
    /// How many of its events were compared.
    compared: usize,
}

/// A stream of one server, and what came from it.
struct Half {
    stream: RawStream,
    control: VecDeque<Bytes>,
    watchers: BTreeMap<i64, Delivered>,
    progress: Vec<i64>,
    fault: Option<String>,
}

#[derive(Default)]
struct Delivered {
    events: Vec<Event>,
    fragment_open: bool,
    /// Whether progress, given since it was created, includes it.
    in_progress: bool,
}

impl Watches {
    /// Opens the streams and creates the reference watcher.
    pub(crate) async fn open(
        wire: &Wire,
        left: &Side,
        right: &Side,
        log: Vec<Event>,
    ) -> Result<Watches, Mismatch> {
        let mut watches = Watches {
            present: Stream::open("present", left, right),
            ahead: Stream::open("ahead", left, right),
            refused: Stream::open("refused", left, right),
            log_before: log.len(),
            log,
            reference: 0,
            settled: 0,
        };
        let everything = WatchCreateRequest {
            key: Bytes::from_static(b"\0"),
            range_end: Bytes::from_static(b"\0"),
            prev_kv: true,
            ..Default::default()
        };
        let created = watches.present.create(wire, left, right, &everything).await?;
        watches.reference = created.watch_id;
        let watcher = Watcher::new(everything, &created, 0);
        watches.present.watchers.insert(created.watch_id, watcher);
        Ok(watches)
    }

    /// Creates a watcher on the stream that is for its kind.
    pub(crate) async fn create(
        &mut self,
        wire: &Wire,
        left: &Side,
        right: &Side,
        known: &Known,
        request: &WatchCreateRequest,
    ) -> Result<(), Mismatch> {
        let start = request.start_revision;
        let refused = start < 0 || (start > 0 && start < known.compacted);
        let stream = if refused {
            &mut self.refused
        } else if start > known.revision {
            &mut self.ahead
        } else {
            &mut self.present
        };
        if stream.watchers.len() >= MAX_WATCHERS {
            return Ok(());
        }
        let mut request = request.clone();
        if refused {
            // What becomes of an explicit id after the refusal is not compared.
            request.watch_id = 0;
        }
        let created = stream.create(wire, left, right, &request).await?;
        if created.canceled {
            return Ok(());
        }
        if refused {
            let canceled = stream.control(wire, left, right, &format!("{request:?}")).await?;
            return if canceled.canceled {
                Ok(())
            } else {
                Err(stream.mismatch("a watcher in the past is to be refused", &request))
            };
        }
        let watcher = Watcher::new(request, &created, known.compacted);
        stream.watchers.insert(created.watch_id, watcher);
        Ok(())
    }

    /// Cancels one of the watchers, or one that does not exist.
    pub(crate) async fn cancel(
        &mut self,
        wire: &Wire,
        left: &Side,
        right: &Side,
        choice: u64,
    ) -> Result<(), Mismatch> {
        let stream = if choice.is_multiple_of(3) { &mut self.ahead } else { &mut self.present };
        let ids: Vec<i64> =
            stream.watchers.keys().copied().filter(|id| *id != self.reference).collect();
        // One past the end: a watcher that never was, which is not answered.
        let choice = (choice / 3) as usize % (ids.len() + 1);
        let id = ids.get(choice).copied().unwrap_or(4_711);
        if stream.name == "ahead" && self.reference == id {
            return Ok(());
        }
        stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id })).await;
        if choice < ids.len() {
            stream.control(wire, left, right, &format!("cancel {id}")).await?;
            stream.watchers.remove(&id);
            for half in &mut stream.sides {
                half.watchers.remove(&id);
            }
        }
        Ok(())
    }

    /// Asks for progress on the stream that must not give any while one of its
    /// watchers is ahead of time.
    pub(crate) async fn progress_ahead(&mut self, known: &Known) -> Result<(), Mismatch> {
        let watchers = &self.ahead.watchers;
        let answered = !watchers.is_empty()
            && watchers.values().all(|watcher| watcher.first <= known.revision);
        let before = self.ahead.sides.each_ref().map(|half| half.progress.len());
        self.ahead.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        if !answered {
            return Ok(());
        }
        self.ahead.wait(|half| before.iter().all(|before| half.progress.len() > *before)).await;
        let [left, right] = [0, 1].map(|side| {
            let half = &self.ahead.sides[side];
            json!({ "progress": half.progress, "fault": half.fault })
        });
        same(|| "progress of watchers that were ahead of time".to_owned(), left, right).map(drop)
    }

    /// Whether progress to `revision` would not tell that all watchers of the
    /// present have caught up: one was created at that revision, and the progress
    /// may answer a request from before it.
    pub(crate) fn may_lag(&self, revision: i64) -> bool {
        let mut past =
            self.present.watchers.values().filter(|watcher| watcher.first <= watcher.born);
        past.any(|watcher| watcher.born >= revision)
    }

    /// Whether all watchers of the present are known to have caught up.
    pub(crate) fn settled(&self) -> bool {
        !self.may_lag(self.settled)
    }

    /// Waits until every watcher has all events up to the current revision, then
    /// compares what they got.
    pub(crate) async fn settle(&mut self, known: &Known) -> Result<(), Mismatch> {
        let reference = self.reference;
        let reached = |half: &Half| {
            let events = half.watchers.get(&reference).map(|delivered| &delivered.events);
            let last = events.and_then(|events| events.last()).map_or(0, revision_of);
            last >= known.revision
        };
        if known.revision > self.log.last().map_or(1, revision_of) {
            self.present.wait(reached).await;
            let delivered = self.present.sides[0].watchers.get(&reference);
            let events = delivered.map_or(&[][..], |delivered| &delivered.events);
            let new = self.log.len() - self.log_before;
            self.log.extend_from_slice(events.get(new..).unwrap_or_default());
        }
        self.present.settle(&self.log).await?;
        self.ahead.settle(&self.log).await?;
        self.present.barrier(known.revision).await?;
        self.settled = known.revision;
        Ok(())
    }

    /// The end of the streams: nothing may have come that was not asked for.
    pub(crate) fn finish(&self) -> Result<(), Mismatch> {
        for stream in [&self.present, &self.ahead, &self.refused] {
            let left = stream.sides[0].summary();
            let right = stream.sides[1].summary();
            same(|| format!("watch stream {:?} at its end", stream.name), left, right)?;
        }
        Ok(())
    }

    /// The events so far, for the watches after a restart.
    pub(crate) fn take_log(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.log)
    }
}

impl Watcher {
    fn new(request: WatchCreateRequest, created: &WatchResponse, compacted: i64) -> Watcher {
        let now = created.header.as_ref().map_or(0, |header| header.revision);
        let first = if request.start_revision > 0 { request.start_revision } else { now + 1 };
        Watcher { request, first, born: now, compacted, looked_at: 0, expected: 0, compared: 0 }
    }

    fn wants(&self, event: &Event) -> bool {
        let Some(kv) = &event.kv else { return false };
        let start: &[u8] = if self.request.key.is_empty() { b"\0" } else { &self.request.key };
        let end = &self.request.range_end;
        let inside = match end.as_ref() {
            b"" => kv.key == start,
            b"\0" => kv.key >= start,
            end => kv.key >= start && kv.key < end,
        };
        inside && kv.mod_revision >= self.first && !self.request.filters.contains(&event.r#type)
    }

    fn count(&mut self, log: &[Event]) {
        let new = log.get(self.looked_at..).unwrap_or_default();
        self.expected += new.iter().filter(|event| self.wants(event)).count();
        self.looked_at = log.len();
    }

    /// An event as it is compared.
    fn normal(&self, event: &Event) -> Value {
        let mut event = event.clone();
        let revision = revision_of(&event);
        let mut note = "";
        if self.request.start_revision > 0 && revision <= self.compacted {
            event.prev_kv = None;
            note = PREV_KV_COMPACTED.name;
        }
        json!([format!("{event:?}"), note])
    }
}

impl Stream {
    fn open(name: &'static str, left: &Side, right: &Side) -> Stream {
        let sides = [Half::open(left), Half::open(right)];
        Stream { name, sides, watchers: BTreeMap::new() }
    }

    async fn send(&mut self, request: RequestUnion) {
        let request = Bytes::from(WatchRequest { request_union: Some(request) }.encode_to_vec());
        for half in &mut self.sides {
            half.send(request.clone()).await;
        }
    }

    async fn create(
        &mut self,
        wire: &Wire,
        left: &Side,
        right: &Side,
        request: &WatchCreateRequest,
    ) -> Result<WatchResponse, Mismatch> {
        self.send(RequestUnion::CreateRequest(request.clone())).await;
        self.control(wire, left, right, &format!("create {request:?}")).await
    }

    /// The next `created` or `canceled` of both sides, compared.
    async fn control(
        &mut self,
        wire: &Wire,
        left: &Side,
        right: &Side,
        operation: &str,
    ) -> Result<WatchResponse, Mismatch> {
        self.wait(|half| !half.control.is_empty()).await;
        let responses = [0, 1].map(|side| self.sides[side].control.pop_front());
        let shown = [&left.identity, &right.identity];
        let [shown_left, shown_right] = [0, 1].map(|side| match &responses[side] {
            Some(response) => shown_response(wire, shown[side], response),
            None => self.sides[side].summary(),
        });
        same(|| format!("watch stream {:?}: {operation}", self.name), shown_left, shown_right)?;
        let [Some(response), _] = responses else {
            return Err(self.mismatch("a watch request is not answered", operation));
        };
        Ok(WatchResponse::decode(response).expect("it was decoded before"))
    }

    /// Reads from both sides until `done` holds for both, or nothing comes.
    async fn wait(&mut self, done: impl Fn(&Half) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let [left, right] = &mut self.sides;
        tokio::join!(left.wait(&done, deadline), right.wait(&done, deadline));
    }

    async fn settle(&mut self, log: &[Event]) -> Result<(), Mismatch> {
        for watcher in self.watchers.values_mut() {
            watcher.count(log);
        }
        let watchers = std::mem::take(&mut self.watchers);
        self.wait(|half| watchers.iter().all(|(id, watcher)| half.count(*id) >= watcher.expected))
            .await;
        self.watchers = watchers;
        let name = self.name;
        for (id, watcher) in &mut self.watchers {
            let [left, right] = [0, 1].map(|side| {
                let half = &self.sides[side];
                let events = half.watchers.get(id).map_or(&[][..], |watcher| &watcher.events);
                let new = events.get(watcher.compared..).unwrap_or_default();
                let new: Vec<Value> = new.iter().map(|event| watcher.normal(event)).collect();
                json!({ "events": new, "count": events.len(), "fault": half.fault })
            });
            let request = &watcher.request;
            let expected = watcher.expected;
            let operation =
                || format!("watch stream {name:?}: events of watcher {id}, {request:?}");
            if left["count"] != json!(expected) && left == right {
                let operation = operation();
                return Err(Mismatch { operation, left, right: json!({ "expected": expected }) });
            }
            same(operation, left, right)?;
            watcher.compared = expected;
        }
        Ok(())
    }

    /// Waits until both sides say that all watchers have everything up to
    /// `revision`.
    async fn barrier(&mut self, revision: i64) -> Result<(), Mismatch> {
        let deadline = Instant::now() + PATIENCE;
        let request = RequestUnion::ProgressRequest(WatchProgressRequest {});
        let request = Bytes::from(WatchRequest { request_union: Some(request) }.encode_to_vec());
        let [left, right] = &mut self.sides;
        tokio::join!(
            left.barrier(&request, revision, deadline),
            right.barrier(&request, revision, deadline)
        );
        let [left, right] = [0, 1].map(|side| {
            let half = &self.sides[side];
            json!({ "progress": half.progress.last(), "fault": half.fault })
        });
        let wanted = json!({ "progress": revision, "fault": null });
        let operation = || format!("watch stream {:?}: progress to {revision}", self.name);
        if left == right && left != wanted {
            return Err(Mismatch { operation: operation(), left, right: wanted });
        }
        same(operation, left, right).map(drop)
    }

    fn mismatch(&self, what: &str, request: impl std::fmt::Debug) -> Mismatch {
        Mismatch {
            operation: format!("watch stream {:?}: {what}: {request:?}", self.name),
            left: self.sides[0].summary(),
            right: self.sides[1].summary(),
        }
    }
}

impl Half {
    fn open(side: &Side) -> Half {
        Half {
            stream: side.client.open(METHOD),
            control: VecDeque::new(),
            watchers: BTreeMap::new(),
            progress: Vec::new(),
            fault: None,
        }
    }

    async fn send(&mut self, request: Bytes) {
        if self.stream.requests.send(request).await.is_err() {
            // Why is in what comes from it.
            self.wait(|_| false, Instant::now() + PROGRESS_RETRY).await;
            self.fault("the stream takes no requests".to_owned());
        }
    }

    async fn wait(&mut self, done: impl Fn(&Half) -> bool, deadline: Instant) {
        while self.fault.is_none() && !done(self) {
            let message =
                tokio::time::timeout_at(deadline.into(), self.stream.responses.recv()).await;
            match message {
                Ok(Some(Ok(response))) => self.receive(response),
                Ok(None) => self.fault("the stream ended".to_owned()),
                Ok(Some(Err(status))) => self.fault(format!("the stream ended with {status}")),
                Err(_) => return,
            }
        }
    }

    async fn barrier(&mut self, request: &Bytes, revision: i64, deadline: Instant) {
        let reached = |half: &Half| half.progress.last().is_some_and(|last| *last >= revision);
        while self.fault.is_none() && !reached(self) && Instant::now() < deadline {
            self.send(request.clone()).await;
            self.wait(reached, deadline.min(Instant::now() + PROGRESS_RETRY)).await;
        }
        for delivered in self.watchers.values_mut() {
            delivered.in_progress = true;
        }
    }

    fn receive(&mut self, raw: Bytes) {
        let response = match WatchResponse::decode(raw.clone()) {
            Ok(response) => response,
            Err(error) => return self.fault(format!("not a WatchResponse: {error}")),
        };
        let Some(header) = &response.header else {
            return self.fault(format!("a response without header: {response:?}"));
        };
        if response.created || response.canceled {
            if response.created && !response.canceled {
                self.watchers.insert(response.watch_id, Delivered::default());
            }
            if !response.events.is_empty() {
                self.fault(format!("events in a control response: {response:?}"));
            }
            self.control.push_back(raw);
        } else if response.events.is_empty() {
            if response.watch_id != -1 {
                self.fault(format!("progress for one watcher: {response:?}"));
            }
            if self.progress.last().is_some_and(|last| *last > header.revision) {
                self.fault(format!("progress goes back: {response:?}"));
            }
            self.progress.push(header.revision);
        } else if let Err(fault) = self.deliver(&response) {
            self.fault(format!("{fault}: {response:?}"));
        }
    }

    fn deliver(&mut self, response: &WatchResponse) -> Result<(), String> {
        let progress = self.progress.last().copied().unwrap_or(0);
        let header = response.header.as_ref().map_or(0, |header| header.revision);
        let delivered = self.watchers.get_mut(&response.watch_id);
        let delivered = delivered.ok_or("events for a watcher that is not")?;
        let before = delivered.events.last().map_or(0, revision_of);
        for (index, event) in response.events.iter().enumerate() {
            let event = Event::decode(event.clone()).map_err(|error| error.to_string())?;
            let last = delivered.events.last().map_or(0, revision_of);
            let revision = revision_of(&event);
            if revision < last {
                return Err("events go back".to_owned());
            }
            if index == 0 && revision == before && !delivered.fragment_open {
                return Err("a revision is split over responses".to_owned());
            }
            if revision <= progress && delivered.in_progress {
                return Err("an event comes after progress has passed it".to_owned());
            }
            if header < revision {
                return Err("the header is older than the event".to_owned());
            }
            delivered.events.push(event);
        }
        delivered.fragment_open = response.fragment;
        Ok(())
    }

    fn count(&self, id: i64) -> usize {
        self.watchers.get(&id).map_or(0, |delivered| delivered.events.len())
    }

    fn fault(&mut self, fault: String) {
        self.fault.get_or_insert(fault);
    }

    fn summary(&self) -> Value {
        let watchers: BTreeMap<String, usize> = self
            .watchers
            .iter()
            .map(|(id, watcher)| (id.to_string(), watcher.events.len()))
            .collect();
        let unread = self.control.len();
        json!({ "watchers": watchers, "unread": unread, "fault": self.fault })
    }
}

fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

fn shown_response(wire: &Wire, identity: &Identity, response: &Bytes) -> Value {
    let mut shown = wire.response(METHOD, response);
    identity.mask(&mut shown);
    readable(shown)
}
