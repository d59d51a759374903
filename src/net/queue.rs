//! What waits to be sent to one peer.
//!
//! ```text
//! push ──▶ urgent ┐
//! push ──▶ bulk   ┴─▶ Outgoing: all that waits, as one message of up to BATCH_BYTES
//! ```
//!
//! The raft thread pushes and never waits: a full lane drops what comes. The stream of a
//! connection ([`Outgoing`]) takes. There is one at a time: [`Queue::connect`] makes it, and
//! one that an earlier connection still holds ends then, lest it take messages along.
//! [`Queue::disconnect`] drops what waits: raft sends again what still matters.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio_stream::Stream;

use super::Lane;
use crate::metrics::PeerMetrics;
use crate::pb::kvorumpb::RaftMessages;

/// Raft messages sent as one, in bytes; a single message may be larger.
pub const BATCH_BYTES: usize = 1024 * 1024;
/// Entries and acknowledgements that wait for one peer; the next one is dropped.
pub const BULK_QUEUE_MESSAGES: usize = 4096;
/// The same in bytes. A message that finds the lane empty is taken whatever its size.
pub const BULK_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Urgent messages that wait for one peer; the next one is dropped.
pub const URGENT_QUEUE_MESSAGES: usize = 1024;
/// The same in bytes.
pub const URGENT_QUEUE_BYTES: usize = 1024 * 1024;

/// The messages for one peer.
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
}

struct Waiting {
    urgent: Messages,
    bulk: Messages,
    /// A probe to be sent; 0 is none.
    probe: u64,
    /// The number of the connection that takes.
    connection: u64,
    /// Nothing is pushed any more, and the stream ends with the last message.
    closed: bool,
    /// The stream, while it waits for messages.
    taker: Option<Waker>,
}

impl Queue {
    pub(super) fn new() -> Queue {
        let waiting = Waiting {
            urgent: Messages::new(URGENT_QUEUE_MESSAGES, URGENT_QUEUE_BYTES),
            bulk: Messages::new(BULK_QUEUE_MESSAGES, BULK_QUEUE_BYTES),
            probe: 0,
            connection: 0,
            closed: false,
            taker: None,
        };
        Queue { waiting: Mutex::new(waiting) }
    }

    /// Whether there was room.
    pub(super) fn push(&self, message: Bytes, lane: Lane) -> bool {
        let taker = {
            let mut waiting = self.waiting.lock();
            let messages = match lane {
                Lane::Urgent => &mut waiting.urgent,
                Lane::Bulk => &mut waiting.bulk,
            };
            if !messages.push(message) {
                return false;
            }
            waiting.taker.take()
        };
        // The lock is free by now: the one that wakes up wants it.
        wake(taker);
        true
    }

    /// Has `probe`, which is not 0, sent with the next messages, or alone.
    pub(super) fn probe(&self, probe: u64) {
        let taker = {
            let mut waiting = self.waiting.lock();
            waiting.probe = probe;
            waiting.taker.take()
        };
        wake(taker);
    }

    /// The stream for a new connection; an earlier one ends.
    pub(super) fn connect(self: &Arc<Queue>, metrics: PeerMetrics) -> Outgoing {
        let (connection, taker) = {
            let mut waiting = self.waiting.lock();
            waiting.connection += 1;
            (waiting.connection, waiting.taker.take())
        };
        wake(taker);
        Outgoing { queue: Arc::clone(self), connection, metrics }
    }

    /// Ends the stream of the connection and drops what waits: how many messages those were.
    pub(super) fn disconnect(&self) -> usize {
        let (dropped, taker) = {
            let mut waiting = self.waiting.lock();
            waiting.connection += 1;
            waiting.probe = 0;
            (waiting.urgent.clear() + waiting.bulk.clear(), waiting.taker.take())
        };
        wake(taker);
        dropped
    }

    /// The stream ends when what waits has been taken.
    pub(super) fn close(&self) {
        let taker = {
            let mut waiting = self.waiting.lock();
            waiting.closed = true;
            waiting.taker.take()
        };
        wake(taker);
    }
}

fn wake(taker: Option<Waker>) {
    if let Some(taker) = taker {
        taker.wake();
    }
}

/// One lane.
struct Messages {
    messages: VecDeque<Bytes>,
    bytes: usize,
    max_messages: usize,
    max_bytes: usize,
}

impl Messages {
    fn new(max_messages: usize, max_bytes: usize) -> Messages {
        Messages { messages: VecDeque::new(), bytes: 0, max_messages, max_bytes }
    }

    fn push(&mut self, message: Bytes) -> bool {
        let full = self.messages.len() >= self.max_messages
            || self.bytes.saturating_add(message.len()) > self.max_bytes;
        if full && !self.messages.is_empty() {
            return false;
        }
        self.bytes += message.len();
        self.messages.push_back(message);
        true
    }

    /// Moves messages to `batch` while it has `room`, and at least one if it is empty. Whether
    /// all could be moved.
    fn take(&mut self, batch: &mut Vec<Bytes>, room: &mut usize) -> bool {
        while let Some(message) = self.messages.front() {
            if message.len() > *room && !batch.is_empty() {
                return false;
            }
            *room = room.saturating_sub(message.len());
            self.bytes -= message.len();
            batch.extend(self.messages.pop_front());
        }
        true
    }

    fn clear(&mut self) -> usize {
        let dropped = self.messages.len();
        // The memory too: a peer that is away may be away for long.
        self.messages = VecDeque::new();
        self.bytes = 0;
        dropped
    }
}

/// What one connection sends: whatever waits, as soon as it can be written.
pub(super) struct Outgoing {
    queue: Arc<Queue>,
    connection: u64,
    metrics: PeerMetrics,
}

impl Stream for Outgoing {
    type Item = RaftMessages;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<RaftMessages>> {
        let mut room = BATCH_BYTES;
        let batch = {
            let waiting = &mut *self.queue.waiting.lock();
            if waiting.connection != self.connection {
                return Poll::Ready(None);
            }
            let all = waiting.urgent.messages.len() + waiting.bulk.messages.len();
            if all == 0 && waiting.probe == 0 {
                if waiting.closed {
                    return Poll::Ready(None);
                }
                waiting.taker = Some(context.waker().clone());
                return Poll::Pending;
            }
            let mut messages = Vec::with_capacity(all);
            if waiting.urgent.take(&mut messages, &mut room) {
                waiting.bulk.take(&mut messages, &mut room);
            }
            RaftMessages { messages, probe: std::mem::take(&mut waiting.probe) }
        };
        let bytes: usize = batch.messages.iter().map(Bytes::len).sum();
        self.metrics.sent_bytes.inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
        Poll::Ready(Some(batch))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::metrics::Metrics;

    fn metrics() -> PeerMetrics {
        Metrics::new().unwrap().peer(1, 2)
    }

    fn bytes(length: usize) -> Bytes {
        Bytes::from(vec![7; length])
    }

    #[tokio::test]
    async fn what_waits_is_one_message_and_the_urgent_part_comes_first() {
        let queue = Arc::new(Queue::new());
        let mut outgoing = queue.connect(metrics());
        assert!(queue.push("entry 1".into(), Lane::Bulk));
        assert!(queue.push("heartbeat".into(), Lane::Urgent));
        assert!(queue.push("entry 2".into(), Lane::Bulk));
        queue.probe(9);
        let sent = outgoing.next().await.unwrap();
        assert_eq!(sent.messages, ["heartbeat", "entry 1", "entry 2"]);
        assert_eq!(sent.probe, 9);
        assert_eq!(outgoing.metrics.sent_bytes.get(), 9 + 7 + 7);
        queue.close();
        assert_eq!(outgoing.next().await, None);
    }

    #[tokio::test]
    async fn a_batch_has_a_bound_and_a_single_message_has_none() {
        let queue = Arc::new(Queue::new());
        let mut outgoing = queue.connect(metrics());
        for length in [BATCH_BYTES / 2, BATCH_BYTES / 2, 1, 3 * BATCH_BYTES, 1] {
            assert!(queue.push(bytes(length), Lane::Bulk));
        }
        let mut sizes = Vec::new();
        for _ in 0..4 {
            let sent = outgoing.next().await.unwrap().messages;
            sizes.push(sent.iter().map(Bytes::len).sum::<usize>());
        }
        assert_eq!(sizes, [BATCH_BYTES, 1, 3 * BATCH_BYTES, 1]);
    }

    #[test]
    fn a_full_lane_drops_what_comes_and_leaves_the_other_alone() {
        let queue = Arc::new(Queue::new());
        let large = bytes(BULK_QUEUE_BYTES / 4);
        for _ in 0..4 {
            assert!(queue.push(large.clone(), Lane::Bulk));
        }
        assert!(!queue.push("one more".into(), Lane::Bulk), "bytes");
        assert!(queue.push("heartbeat".into(), Lane::Urgent));
        assert_eq!(queue.disconnect(), 5);
        for _ in 0..BULK_QUEUE_MESSAGES {
            assert!(queue.push(Bytes::new(), Lane::Bulk));
        }
        assert!(!queue.push(Bytes::new(), Lane::Bulk), "messages");
    }

    #[tokio::test]
    async fn a_new_connection_ends_the_stream_of_the_one_before() {
        let queue = Arc::new(Queue::new());
        let mut old = queue.connect(metrics());
        let waiting = tokio::spawn(async move { old.next().await });
        let mut new = queue.connect(metrics());
        queue.push("message".into(), Lane::Bulk);
        assert_eq!(waiting.await.unwrap(), None);
        assert_eq!(new.next().await.unwrap().messages, ["message"]);
    }
}
