//! The watch hub: the one task that serves every watch stream of this member.
//!
//! ```text
//!   apply thread ── Feed::publish ──> feed queue ─┐
//!                                                 ├─> hub task ──> queue of a stream ──> Responses
//!   Requests::send ──> queue of a stream ─────────┘      │
//!                                                        └── History: what was missed
//! ```
//!
//! What a request or a change leads to is decided by the pure [`Watchers`]; here are the
//! queues around it, and who waits for whom:
//!
//! * Nobody waits for the hub but the client that asks it something. The feed takes what
//!   it has room for and drops the rest. Every message says which revision it follows, so
//!   the hub sees the gap and reads history instead: a dropped message costs time, never
//!   an event.
//! * The hub waits for no client. A stream whose queue is full gets nothing more until its
//!   reader has emptied half of it, which wakes the hub; its watchers then read history.
//!   Requests of a stream are served while its queue has room, so an answer always has a
//!   place, behind the events that were sent before it.
//! * Nothing is polled. The hub sleeps until someone has something for it, or until the
//!   next periodic progress notification.
//!
//! The hub works in turns of bounded size: some requests, some messages of the feed, one
//! read of history for streams that lag. No kind of work can keep the others waiting for
//! longer than a turn.
//!
//! Watches are answered from this member's own state, like serializable reads: a member
//! that lags sends its events later.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;

use crate::mvcc::Change;
pub use crate::mvcc::watch::{Compacted, History, Page};
use crate::mvcc::watch::{Outbox, StreamId, Watchers, change_bytes};
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{ResponseHeader, WatchRequest, WatchResponse};

/// How many messages of the apply thread wait for the hub at most. A message holds handles
/// to records that the store holds too.
pub const FEED_MESSAGES: usize = 1024;

/// How many changes of the feed the hub hands out in one turn, at most or in one message.
pub const TURN_CHANGES: usize = 512;

/// How many bytes of records of the feed the hub hands out in one turn, at most or in one
/// message.
pub const TURN_BYTES: usize = 1 << 20;

/// How many streams the hub attends to in one turn, at most.
pub const TURN_STREAMS: usize = 256;

/// How many requests of one stream the hub serves in one turn, at most.
pub const TURN_REQUESTS: usize = 64;

/// How many requests of one stream wait for the hub at most.
pub const STREAM_REQUESTS: usize = 16;

/// How many responses wait for the reader of one stream, before its watchers fall behind.
pub const STREAM_RESPONSES: usize = 4096;

/// How many bytes of responses wait for the reader of one stream, before its watchers fall
/// behind. The last response before that may go beyond.
pub const STREAM_BYTES: usize = 2 << 20;

/// What a waiting response takes besides its events, in bytes, about.
const RESPONSE_OVERHEAD_BYTES: usize = 256;

/// How much larger than the largest request a response may get before it is split, in
/// bytes, if the client allows that; as in etcd.
const FRAGMENT_OVERHEAD_BYTES: usize = 512 << 10;

/// The shortest interval of periodic progress notifications; as in etcd.
pub const MIN_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Makes the header that says a revision: cluster, member and term are its own business.
/// Called once per response; must be quick and must not block.
pub type HeaderSource = Arc<dyn Fn(i64) -> ResponseHeader + Send + Sync>;

/// What can be chosen about the hub.
#[derive(Debug, Clone)]
pub struct WatchConfig {
    /// How often watchers with `progress_notify` hear how far they are when they get no
    /// events; 10 % more or less, so that streams that were opened together do not stay
    /// together. At least [`MIN_PROGRESS_INTERVAL`].
    pub progress_interval: Duration,
    /// The largest request a client may send, in bytes. Responses are split when they are
    /// 512 KiB larger, if the client allows that.
    pub max_request_bytes: usize,
    /// Where the randomness of the intervals comes from.
    pub seed: u64,
}

/// Counts, for metrics. Gauges are brought up to date after every turn of the hub.
#[derive(Debug, Default)]
pub struct WatchStats {
    /// Watchers, now.
    pub watchers: AtomicUsize,
    /// Open streams, now.
    pub streams: AtomicUsize,
    /// Watchers that are behind and have to read history, now.
    pub slow_watchers: AtomicUsize,
    /// Events that wait for the reader of their stream, now.
    pub pending_events: AtomicUsize,
    /// Events sent, ever; an event counts once per watcher that got it.
    pub events_total: AtomicU64,
    /// Messages of the apply thread that found the feed full, ever.
    pub feed_dropped_total: AtomicU64,
}

/// What the apply thread tells the hub.
struct Published {
    previous: i64,
    revision: i64,
    changes: Arc<[Change]>,
}

/// What may wait for the reader of one stream.
#[derive(Debug, Clone, Copy)]
struct Limits {
    responses: usize,
    bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { responses: STREAM_RESPONSES, bytes: STREAM_BYTES }
    }
}

/// What all ends of the hub share.
#[derive(Debug, Default)]
struct Shared {
    limits: Limits,
    /// Someone has something for the hub.
    wake: Notify,
    closed: AtomicBool,
    /// The latest revision published, in the feed or dropped.
    latest: AtomicI64,
    next_stream: AtomicU64,
    stats: WatchStats,
}

impl Shared {
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }
}

/// The apply thread's end of the hub. Dropping it closes the hub: there is nothing more
/// to watch.
#[derive(Debug)]
pub struct Feed {
    queue: mpsc::Sender<Published>,
    shared: Arc<Shared>,
}

impl Feed {
    /// Announces `changes`, which made `revision` out of revision `previous`.
    ///
    /// The store that the hub's [`History`] reads must show `revision` already. To announce
    /// that a store was replaced as a whole, pass the new revision twice and no changes:
    /// the hub reads what it has missed.
    ///
    /// Never blocks and never fails. What the queue has no room for is dropped, and read
    /// from history by the hub.
    pub fn publish(&self, previous: i64, revision: i64, changes: Arc<[Change]>) {
        if self.queue.try_send(Published { previous, revision, changes }).is_err() {
            self.shared.stats.feed_dropped_total.fetch_add(1, Ordering::Relaxed);
        }
        // After the message is in the queue: what is announced and in no message was dropped.
        self.shared.latest.fetch_max(revision, Ordering::SeqCst);
        self.shared.wake.notify_one();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Opens streams on the hub, and closes it. Clones are the same hub.
#[derive(Debug, Clone)]
pub struct HubHandle {
    control: mpsc::UnboundedSender<Control>,
    shared: Arc<Shared>,
}

impl HubHandle {
    /// Opens a stream without watchers. On a closed hub, a stream that has ended.
    pub fn open_stream(&self) -> WatchStream {
        let (stream, hub_end) = self.new_stream();
        // Fails when the hub has ended; then the stream's ends find each other gone.
        let _ = self.control.send(Control::Open(hub_end));
        self.shared.wake.notify_one();
        stream
    }

    fn new_stream(&self) -> (WatchStream, HubEnd) {
        let gate = Arc::new(Gate {
            stream: StreamId(self.shared.next_stream.fetch_add(1, Ordering::Relaxed)),
            responses: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            blocked: AtomicBool::new(false),
            attention: AtomicBool::new(false),
            control: self.control.clone(),
            shared: Arc::clone(&self.shared),
        });
        let (request_sender, requests) = mpsc::channel(STREAM_REQUESTS);
        // The gate is the bound.
        let (responses, response_receiver) = mpsc::unbounded_channel();
        let stream = WatchStream {
            requests: Requests { queue: request_sender, gate: Arc::clone(&gate) },
            responses: Responses { queue: response_receiver, gate: Arc::clone(&gate) },
        };
        (stream, HubEnd { gate, requests, responses })
    }

    /// Ends the hub and all streams. Responses that are queued can still be read.
    pub fn close(&self) {
        self.shared.close();
    }

    /// The counts.
    pub fn stats(&self) -> &WatchStats {
        &self.shared.stats
    }
}

/// One client's watches.
#[derive(Debug)]
pub struct WatchStream {
    /// What the client asks. May be dropped before `responses`: the watches go on.
    pub requests: Requests,
    /// What the client gets. Dropping it ends the stream.
    pub responses: Responses,
}

/// The way of a stream's requests to the hub.
#[derive(Debug, Clone)]
pub struct Requests {
    queue: mpsc::Sender<WatchRequest>,
    gate: Arc<Gate>,
}

/// The stream has ended: the hub was closed, or the responses were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the watch stream has ended")]
pub struct StreamEnded;

impl Requests {
    /// Sends a request. Waits while the client does not read its responses.
    ///
    /// Cancel-safe: a request whose future was dropped was not sent.
    pub async fn send(&self, request: WatchRequest) -> Result<(), StreamEnded> {
        self.queue.send(request).await.map_err(|_| StreamEnded)?;
        self.gate.ask_for_attention();
        Ok(())
    }
}

/// The responses of a stream, each with its header complete.
#[derive(Debug)]
pub struct Responses {
    queue: mpsc::UnboundedReceiver<Queued>,
    gate: Arc<Gate>,
}

impl Responses {
    /// The next response; `None` when the hub was closed. Cancel-safe.
    pub async fn recv(&mut self) -> Option<WatchResponse> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    /// The next response, if there is one now.
    pub fn try_recv(&mut self) -> Option<WatchResponse> {
        self.queue.try_recv().ok().map(|queued| self.gate.passed(queued))
    }

    /// Polls for the next response.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<WatchResponse>> {
        let queued = std::task::ready!(self.queue.poll_recv(context));
        Poll::Ready(queued.map(|queued| self.gate.passed(queued)))
    }
}

impl Stream for Responses {
    type Item = WatchResponse;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_recv(context)
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.queue.close();
        while self.try_recv().is_some() {}
        let _ = self.gate.control.send(Control::Close(self.gate.stream));
        self.gate.shared.wake.notify_one();
    }
}

/// A response on its way to the reader.
#[derive(Debug)]
struct Queued {
    response: WatchResponse,
    /// What it takes, in bytes.
    bytes: usize,
}

/// Counts what is queued for the reader of a stream, and wakes the hub for it.
struct Gate {
    stream: StreamId,
    responses: AtomicUsize,
    bytes: AtomicUsize,
    /// The hub found the queue full and waits for room.
    blocked: AtomicBool,
    /// The hub was told to look at the stream, and has not yet.
    attention: AtomicBool,
    control: mpsc::UnboundedSender<Control>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let responses = self.responses.load(Ordering::Relaxed);
        f.debug_struct("Gate").field("stream", &self.stream).field("responses", &responses).finish()
    }
}

impl Gate {
    /// Whether less than one `part`th of what may wait is waiting.
    fn is_below(&self, part: usize) -> bool {
        let Limits { responses, bytes } = self.shared.limits;
        self.responses.load(Ordering::SeqCst) < responses.div_ceil(part)
            && self.bytes.load(Ordering::SeqCst) < bytes.div_ceil(part)
    }

    fn has_room(&self) -> bool {
        self.is_below(1)
    }

    /// Whether so much is free that filling it is worth a turn.
    fn is_half_empty(&self) -> bool {
        self.is_below(2)
    }

    /// Has the hub look at the stream: for its requests, and for the room it has.
    fn ask_for_attention(&self) {
        if !self.attention.swap(true, Ordering::SeqCst) {
            let _ = self.control.send(Control::Attend(self.stream));
            self.shared.wake.notify_one();
        }
    }

    /// The reader has taken a response.
    fn passed(&self, queued: Queued) -> WatchResponse {
        let events = queued.response.events.len();
        self.shared.stats.pending_events.fetch_sub(events, Ordering::Relaxed);
        self.responses.fetch_sub(1, Ordering::SeqCst);
        self.bytes.fetch_sub(queued.bytes, Ordering::SeqCst);
        // The hub sets `blocked` and then looks at the counts; here it is the other way
        // round. So one of the two sees the other.
        if self.blocked.load(Ordering::SeqCst)
            && self.is_half_empty()
            && self.blocked.swap(false, Ordering::SeqCst)
        {
            self.ask_for_attention();
        }
        queued.response
    }
}

/// The hub's end of a stream's responses.
#[derive(Clone)]
struct Lane {
    queue: mpsc::UnboundedSender<Queued>,
    gate: Arc<Gate>,
    header: HeaderSource,
}

impl Outbox for Lane {
    fn has_room(&self) -> bool {
        if self.gate.has_room() {
            return true;
        }
        self.gate.blocked.store(true, Ordering::SeqCst);
        self.gate.is_half_empty()
    }

    fn push(&self, mut response: WatchResponse) {
        let revision = response.header.map_or(0, |header| header.revision);
        response.header = Some((self.header)(revision));
        let events = response.events.len();
        let event_bytes: usize = response.events.iter().map(|event| event.len()).sum();
        let bytes = RESPONSE_OVERHEAD_BYTES + event_bytes;
        let gate = &self.gate;
        gate.shared.stats.pending_events.fetch_add(events, Ordering::Relaxed);
        gate.responses.fetch_add(1, Ordering::SeqCst);
        gate.bytes.fetch_add(bytes, Ordering::SeqCst);
        if let Err(unsent) = self.queue.send(Queued { response, bytes }) {
            // The stream's end is on its way to the hub.
            gate.passed(unsent.0);
        }
    }
}

/// The hub's end of a new stream.
struct HubEnd {
    gate: Arc<Gate>,
    requests: mpsc::Receiver<WatchRequest>,
    responses: mpsc::UnboundedSender<Queued>,
}

/// What the ends of streams tell the hub. A stream has one message of each kind under way
/// at most, so the queue is bounded by the number of streams.
enum Control {
    Open(HubEnd),
    Attend(StreamId),
    Close(StreamId),
}

/// A stream, as the hub holds it.
struct HubStream {
    lane: Lane,
    requests: mpsc::Receiver<WatchRequest>,
    /// Whether the stream has a time in `ticks`.
    ticking: bool,
}

/// The hub itself: [`WatchHub::run`] is the task.
pub struct WatchHub<H> {
    history: H,
    header: HeaderSource,
    config: WatchConfig,
    random: u64,
    shared: Arc<Shared>,
    feed: mpsc::Receiver<Published>,
    control: mpsc::UnboundedReceiver<Control>,
    watchers: Watchers<Lane>,
    streams: HashMap<StreamId, HubStream>,
    /// When which stream sends its next progress notifications.
    ticks: BTreeSet<(Instant, StreamId)>,
}

impl<H: History + Send> WatchHub<H> {
    /// A hub that starts at the latest revision of `history`, and its two other ends.
    pub fn new(history: H, header: HeaderSource, config: WatchConfig) -> (Self, HubHandle, Feed) {
        Self::with_limits(history, header, config, Limits::default())
    }

    fn with_limits(
        history: H,
        header: HeaderSource,
        config: WatchConfig,
        limits: Limits,
    ) -> (Self, HubHandle, Feed) {
        let (feed_sender, feed) = mpsc::channel(FEED_MESSAGES);
        let (control_sender, control) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared { limits, ..Shared::default() });
        let fragment_bytes = config.max_request_bytes.saturating_add(FRAGMENT_OVERHEAD_BYTES);
        let hub = WatchHub {
            watchers: Watchers::new(history.revision(), fragment_bytes),
            random: config.seed,
            history,
            header,
            config,
            shared: Arc::clone(&shared),
            feed,
            control,
            streams: HashMap::new(),
            ticks: BTreeSet::new(),
        };
        let handle = HubHandle { control: control_sender, shared: Arc::clone(&shared) };
        (hub, handle, Feed { queue: feed_sender, shared })
    }

    /// Serves until the hub is closed or the [`Feed`] is dropped, and ends all streams then.
    pub async fn run(mut self) {
        while !self.shared.closed.load(Ordering::SeqCst) {
            if self.turn() {
                tokio::task::yield_now().await;
                continue;
            }
            let woken = self.shared.wake.notified();
            match self.ticks.first() {
                Some(&(at, _)) => {
                    // Woken or not, the next turn sees what there is to do.
                    let _ = timeout_at(at, woken).await;
                }
                None => woken.await,
            }
        }
    }

    /// Does a bounded part of what there is to do. Returns whether there may be more.
    fn turn(&mut self) -> bool {
        let mut more = self.attend();
        more |= self.drain_feed();
        // One that is not moved by a read waits for the next wake-up: history is not there
        // yet.
        more |= self.watchers.catch_up(&self.history) && self.watchers.has_turns();
        self.tick();
        let stats = &self.shared.stats;
        stats.watchers.store(self.watchers.watcher_count(), Ordering::Relaxed);
        stats.streams.store(self.watchers.stream_count(), Ordering::Relaxed);
        stats.slow_watchers.store(self.watchers.behind_count(), Ordering::Relaxed);
        stats.events_total.store(self.watchers.event_count(), Ordering::Relaxed);
        more
    }

    /// Streams: opens, closes, and serves those that asked for it.
    fn attend(&mut self) -> bool {
        for _ in 0..TURN_STREAMS {
            match self.control.try_recv() {
                Ok(Control::Open(HubEnd { gate, requests, responses })) => {
                    let (stream, header) = (gate.stream, Arc::clone(&self.header));
                    let lane = Lane { queue: responses, gate, header };
                    self.watchers.open(stream, lane.clone());
                    self.streams.insert(stream, HubStream { lane, requests, ticking: false });
                }
                Ok(Control::Attend(stream)) => self.serve(stream),
                Ok(Control::Close(stream)) => {
                    self.watchers.close(stream);
                    self.streams.remove(&stream);
                    // Its tick, if any, is skipped when it comes.
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Serves the requests of a stream while there is room for the answers.
    fn serve(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        // First of all: what comes from now on asks for attention again.
        stream.lane.gate.attention.store(false, Ordering::SeqCst);
        self.watchers.room(id);
        for _ in 0..TURN_REQUESTS {
            if !stream.lane.has_room() {
                return;
            }
            let Ok(request) = stream.requests.try_recv() else { return };
            match request.request_union {
                Some(RequestUnion::CreateRequest(create)) => {
                    if create.progress_notify && !stream.ticking {
                        stream.ticking = true;
                        let at = Instant::now() + interval(&self.config, &mut self.random);
                        self.ticks.insert((at, id));
                    }
                    self.watchers.create(id, create, self.history.revision());
                }
                Some(RequestUnion::CancelRequest(cancel)) => {
                    self.watchers.cancel(id, cancel.watch_id, self.history.revision());
                }
                Some(RequestUnion::ProgressRequest(_)) => {
                    self.watchers.progress(id, self.history.revision());
                }
                // A request of a later version of the protocol.
                None => {}
            }
        }
        stream.lane.gate.ask_for_attention();
    }

    /// Hands out what the apply thread has published, and reads what is missing from
    /// history.
    fn drain_feed(&mut self) -> bool {
        let mut batch: Vec<Published> = Vec::new();
        let (mut changes, mut bytes) = (0, 0);
        let mut through = self.watchers.position();
        let drained = loop {
            if changes >= TURN_CHANGES || bytes >= TURN_BYTES {
                break false;
            }
            let Ok(message) = self.feed.try_recv() else { break true };
            // A message after a gap is of no use: history has it, and what is before it.
            if message.previous <= through && message.revision > through {
                through = message.revision;
                changes += message.changes.len();
                bytes += message.changes.iter().map(change_bytes).sum::<usize>();
                batch.push(message);
            }
        };
        if !batch.is_empty() {
            let changes = batch.iter().flat_map(|message| message.changes.iter());
            self.watchers.deliver(changes, through);
        }
        if !drained {
            return true;
        }
        let latest = self.shared.latest.load(Ordering::SeqCst);
        self.watchers.position() < latest && self.watchers.advance(&self.history)
    }

    /// Sends the periodic progress notifications that are due.
    fn tick(&mut self) {
        let now = Instant::now();
        while let Some(&(at, id)) = self.ticks.first()
            && at <= now
        {
            self.ticks.pop_first();
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.ticking = self.watchers.tick(id);
            if stream.ticking {
                self.ticks.insert((now + interval(&self.config, &mut self.random), id));
            }
        }
    }
}

/// How long to the next progress notifications.
fn interval(config: &WatchConfig, random: &mut u64) -> Duration {
    // SplitMix64: any spread will do.
    *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *random;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    let per_mille = 900 + u32::try_from(mixed % 201).unwrap_or(0);
    config.progress_interval.max(MIN_PROGRESS_INTERVAL) / 1000 * per_mille
}
