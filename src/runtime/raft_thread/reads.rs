//! Linearizable reads, that wait for an index which a majority confirms.
//!
//! All reads that wait when a round is started share it; nobody joins a round later, because
//! its index may predate the write they must see. A change of leader or term throws the
//! round's answer away and asks again, with a context that was never used (etcd's stale reads
//! of 2026 came from reusing them).

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::raft::Node;
use crate::runtime::boot_clock::BootClock;

/// A round of ReadIndex that got no answer is asked again after this. etcd waits 500 ms; a
/// new leader drops what it is asked before it has committed, and reads need not wait for
/// that half a second. Where the members are far apart an answer takes longer, so each time in
/// vain doubles it, up to an election timeout.
const READ_INDEX_RETRY: Duration = Duration::from_millis(100);

#[cfg(test)]
thread_local! {
    /// A mistake for the simulator to find: a round that starts over has the context of the one before.
    pub(crate) static REUSES_CONTEXTS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A round of ReadIndex that is under way.
struct Round {
    context: [u8; 24],
    waiting: Vec<oneshot::Sender<u64>>,
    since: Instant,
    /// The same, by the clock that goes on while the machine is suspended.
    since_boot: Duration,
}

/// Reads that wait for an index, and from when on none need wait.
pub(crate) struct Reads {
    /// While this member leads: an index whose entry is of its term and committed.
    pub(super) term_index: Option<u64>,
    /// While this member leads and nobody else belongs to the cluster: what was committed when
    /// that began. Up to there others may have told their clients what this one has yet to apply.
    pub(super) alone_index: Option<u64>,
    /// Not asked for yet.
    pub(super) queue: Vec<oneshot::Sender<u64>>,
    round: Option<Round>,
    member: u64,
    boot: u64,
    /// A round that takes longer is asked again.
    patience: Duration,
    patience_max: Duration,
    /// Rounds so far. With member and boot it makes a context that is never used again.
    rounds: u64,
}

impl Reads {
    pub(super) fn new(member: u64, boot: u64, patience_max: Duration) -> Reads {
        Reads {
            term_index: None,
            alone_index: None,
            queue: Vec::new(),
            round: None,
            patience: READ_INDEX_RETRY,
            patience_max: patience_max.max(READ_INDEX_RETRY),
            member,
            boot,
            rounds: 0,
        }
    }

    /// Starts a round for all who wait, when none is under way. Whether one took too long and
    /// was given up for that.
    pub(super) fn ask(&mut self, node: &mut Node, now: Instant, boot_clock: &BootClock) -> bool {
        let is_late = |round: &Round| now - round.since >= self.patience;
        let gave_up = self.round.as_ref().is_some_and(is_late);
        if gave_up {
            self.patience = (2 * self.patience).min(self.patience_max);
            self.start_over();
        }
        if self.round.is_some() {
            return gave_up;
        }
        self.queue.retain(|reply| !reply.is_closed());
        if self.queue.is_empty() {
            return gave_up;
        }
        self.rounds += 1;
        let context = context(self.member, self.boot, self.rounds);
        let since_boot = boot_clock.now();
        if node.read_index(context) {
            let waiting = std::mem::take(&mut self.queue);
            self.round = Some(Round { context, waiting, since: now, since_boot });
        }
        gave_up
    }

    /// The round's answer, should it come, is not to be used.
    pub(super) fn start_over(&mut self) {
        if let Some(round) = self.round.take() {
            self.queue.extend(round.waiting);
            #[cfg(test)]
            if REUSES_CONTEXTS.get() {
                self.rounds -= 1;
            }
        }
    }

    /// A round has its answer; returns when it was asked for, by the [`BootClock`].
    pub(super) fn confirm(
        &mut self,
        context: [u8; 24],
        index: u64,
        now: Instant,
    ) -> Option<Duration> {
        let round = self.round.take_if(|round| round.context == context)?;
        let took = now.saturating_duration_since(round.since);
        self.patience = (2 * took).clamp(READ_INDEX_RETRY, self.patience_max);
        for reply in round.waiting {
            let _ = reply.send(index);
        }
        Some(round.since_boot)
    }
}

fn context(member: u64, boot: u64, round: u64) -> [u8; 24] {
    let mut context = [0; 24];
    let numbers = [member, boot, round];
    for (bytes, number) in context.chunks_exact_mut(8).zip(numbers) {
        bytes.copy_from_slice(&number.to_be_bytes());
    }
    context
}
