//! What waits to be sent to one peer.
//!
//! ```text
//! push ─────▶ urgent   ┐
//! push ─────▶ bulk     ┼─▶ Outgoing: all that waits, as one message of up to BATCH_BYTES
//! propose ──▶ commands ┘
//! ```
//!
//! The raft thread pushes and never waits: a full lane drops what comes. The stream of a
//! connection ([`Outgoing`]) takes. There is one at a time: [`Queue::connect`] makes it, and
//! one that an earlier connection still holds ends then, lest it take messages along.
//! [`Queue::disconnect`] drops what waits: raft sends again what still matters, and commands
//! are given back to be proposed again.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio_stream::Stream;

use super::Lane;
use crate::metrics::PeerMetrics;
use crate::pb::kvorumpb::{Proposal, RaftMessages};

/// Messages and commands sent as one, in bytes; a single one may be larger.
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
    /// Commands for the leader.
    proposals: VecDeque<Proposal>,
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
            proposals: VecDeque::new(),
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

    /// Puts a command behind the others, and returns those of earlier terms, for which nobody leads any
    /// more. Who proposes bounds how many of one term are under way.
    pub(super) fn propose(&self, proposal: Proposal) -> Vec<Proposal> {
        let (stale, taker) = {
            let mut waiting = self.waiting.lock();
            let current = waiting.proposals.partition_point(|old| old.term < proposal.term);
            let stale = waiting.proposals.drain(..current).collect();
            waiting.proposals.push_back(proposal);
            (stale, waiting.taker.take())
        };
        wake(taker);
        stale
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

    /// Ends the stream of the connection and drops what waits.
    pub(super) fn disconnect(&self) -> Dropped {
        let (dropped, taker) = {
            let mut waiting = self.waiting.lock();
            waiting.connection += 1;
            waiting.probe = 0;
            let messages = waiting.urgent.clear() + waiting.bulk.clear();
            let proposals = std::mem::take(&mut waiting.proposals);
            (Dropped { messages, proposals }, waiting.taker.take())
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

/// What was never sent.
pub(super) struct Dropped {
    /// How many messages.
    pub(super) messages: usize,
    /// The commands.
    pub(super) proposals: VecDeque<Proposal>,
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

    /// Moves messages to `batch` while there is room.
    fn take(&mut self, batch: &mut Vec<Bytes>, room: &mut Room) {
        while self.messages.front().is_some_and(|message| room.fits(message.len())) {
            let Some(message) = self.messages.pop_front() else { break };
            self.bytes -= message.len();
            batch.push(message);
        }
    }

    fn clear(&mut self) -> usize {
        let dropped = self.messages.len();
        // The memory too: a peer that is away may be away for long.
        self.messages = VecDeque::new();
        self.bytes = 0;
        dropped
    }
}

/// What may still go into a batch.
struct Room {
    /// Bytes of what is in it.
    taken: usize,
    /// Something had to be left for the next batch.
    full: bool,
}

impl Room {
    /// Whether something of this size goes into the batch, which then counts as done. The first
    /// always does. Once something does not, nothing does, lest it be overtaken.
    fn fits(&mut self, bytes: usize) -> bool {
        self.full |= self.taken > 0 && self.taken.saturating_add(bytes) > BATCH_BYTES;
        if !self.full {
            self.taken += bytes;
        }
        !self.full
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
        let mut room = Room { taken: 0, full: false };
        let batch = {
            let waiting = &mut *self.queue.waiting.lock();
            if waiting.connection != self.connection {
                return Poll::Ready(None);
            }
            let all = waiting.urgent.messages.len() + waiting.bulk.messages.len();
            if all == 0 && waiting.proposals.is_empty() && waiting.probe == 0 {
                if waiting.closed {
                    return Poll::Ready(None);
                }
                waiting.taker = Some(context.waker().clone());
                return Poll::Pending;
            }
            let mut messages = Vec::with_capacity(all);
            waiting.urgent.take(&mut messages, &mut room);
            waiting.bulk.take(&mut messages, &mut room);
            let mut proposals = Vec::new();
            while waiting.proposals.front().is_some_and(|next| room.fits(next.command.len())) {
                proposals.extend(waiting.proposals.pop_front());
            }
            RaftMessages { messages, proposals, probe: std::mem::take(&mut waiting.probe) }
        };
        self.metrics.sent_bytes.inc_by(u64::try_from(room.taken).unwrap_or(u64::MAX));
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
        let proposal = Proposal { command: "command".into(), sequence: 1, term: 2 };
        queue.propose(proposal.clone());
        queue.probe(9);
        let sent = outgoing.next().await.unwrap();
        assert_eq!(sent.messages, ["heartbeat", "entry 1", "entry 2"]);
        assert_eq!(sent.proposals, [proposal]);
        assert_eq!(sent.probe, 9);
        assert_eq!(outgoing.metrics.sent_bytes.get(), 9 + 7 + 7 + 7);
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
        for length in [BATCH_BYTES - 1, 1, 2 * BATCH_BYTES, 1] {
            queue.propose(Proposal { command: bytes(length), ..Proposal::default() });
        }
        let mut sizes = Vec::new();
        for _ in 0..7 {
            let sent = outgoing.next().await.unwrap();
            let messages = sent.messages.iter().map(Bytes::len).sum::<usize>();
            sizes.push((messages, sent.proposals.iter().map(|p| p.command.len()).sum::<usize>()));
        }
        let expected = [
            (BATCH_BYTES, 0),
            (1, 0),
            (3 * BATCH_BYTES, 0),
            (1, BATCH_BYTES - 1),
            (0, 1),
            (0, 2 * BATCH_BYTES),
            (0, 1),
        ];
        assert_eq!(sizes, expected);
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
        let proposal = Proposal { sequence: 3, ..Proposal::default() };
        queue.propose(proposal.clone());
        let Dropped { messages, proposals } = queue.disconnect();
        assert_eq!((messages, proposals.into()), (5, vec![proposal]));
        for _ in 0..BULK_QUEUE_MESSAGES {
            assert!(queue.push(Bytes::new(), Lane::Bulk));
        }
        assert!(!queue.push(Bytes::new(), Lane::Bulk), "messages");
    }

    #[test]
    fn commands_of_earlier_terms_go_when_there_is_a_later_one() {
        let queue = Queue::new();
        let proposal = |sequence, term| Proposal { command: "".into(), sequence, term };
        for sequence in 1..=2 {
            assert_eq!(queue.propose(proposal(sequence, 4)), []);
        }
        assert_eq!(queue.propose(proposal(3, 5)), [proposal(1, 4), proposal(2, 4)]);
        assert_eq!(queue.disconnect().proposals, [proposal(3, 5)]);
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
