//! Who waits for which command to be applied.
//!
//! A proposal is registered here before it is proposed and leaves exactly once:
//! answered by the apply thread, refused by the raft thread, or given up by the
//! caller, whose receiver is then gone. The caller's end is a [`oneshot`], so a
//! dropped future costs nothing here; the command may still be carried out.
//!
//! This is also where the amount of work under way is bounded, because it is the one
//! place that a proposal enters once and leaves once: [`PENDING_MAX`] commands,
//! [`PENDING_BYTES_MAX`] bytes. Beyond that, etcd's "too many requests".

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::pb::kvorumpb::CommandHeader;
use crate::state::Outcome;

/// Commands proposed by this member and not yet answered.
pub const PENDING_MAX: usize = 100_000;
/// Their size in bytes.
pub const PENDING_BYTES_MAX: usize = 128 * 1024 * 1024;

/// What a proposer gets: the outcome of its command, or why there is none.
pub type Answer = Result<Outcome, Error>;

/// Proposals of this member that are not answered yet.
pub struct Waiters {
    member: u64,
    /// Random for each start, so that commands of an earlier life of this member
    /// find nobody here.
    boot: u64,
    sequence: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    senders: HashMap<u64, (oneshot::Sender<Answer>, usize)>,
    bytes: usize,
}

impl Waiting {
    fn remove(&mut self, sequence: u64) -> Option<oneshot::Sender<Answer>> {
        let (sender, bytes) = self.senders.remove(&sequence)?;
        self.bytes -= bytes;
        Some(sender)
    }
}

impl Waiters {
    /// Nobody waits. `boot` must differ from that of every other start.
    pub fn new(member: u64, boot: u64) -> Waiters {
        Waiters { member, boot, sequence: AtomicU64::new(1), waiting: Mutex::default() }
    }

    /// A header for the next command of this member.
    pub fn next_header(&self) -> CommandHeader {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        CommandHeader { member: self.member, boot: self.boot, sequence }
    }

    /// Registers a command of `bytes` bytes; where its answer arrives.
    ///
    /// # Errors
    /// [`Error::TooManyRequests`] when too much is under way already.
    pub fn register(
        &self,
        header: &CommandHeader,
        bytes: usize,
    ) -> Result<oneshot::Receiver<Answer>, Error> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.senders.len() >= PENDING_MAX || waiting.bytes + bytes > PENDING_BYTES_MAX {
            return Err(Error::TooManyRequests);
        }
        waiting.bytes += bytes;
        waiting.senders.insert(header.sequence, (sender, bytes));
        Ok(receiver)
    }

    /// Takes out whoever waits for the command with this header.
    pub fn take(&self, header: &CommandHeader) -> Option<oneshot::Sender<Answer>> {
        if header.member != self.member || header.boot != self.boot {
            return None;
        }
        self.waiting.lock().remove(header.sequence)
    }

    /// The proposal was not taken and never will be.
    pub fn refuse(&self, sequence: u64, error: Error) {
        let waiter = self.waiting.lock().remove(sequence);
        if let Some(waiter) = waiter {
            // Whoever does not wait any more does not want to know.
            let _ = waiter.send(Err(error));
        }
    }

    /// Answers everybody with `error`: the member stops.
    pub fn fail_all(&self, error: &Error) {
        let waiting = std::mem::take(&mut *self.waiting.lock());
        for (waiter, _) in waiting.senders.into_values() {
            let _ = waiter.send(Err(error.clone()));
        }
    }
}
