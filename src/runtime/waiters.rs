//! Who waits for which command to be applied.
//!
//! A proposal is registered here before it is proposed and leaves exactly once:
//! answered by the apply thread, refused by a leader, overtaken by a later term, or given
//! up by the caller, whose receiver is then gone. The caller's end is a [`oneshot`], so a
//! dropped future costs nothing here; the command may still be carried out.
//!
//! **Overtaken.** A command is proposed for one term: only the leader of that term appends
//! it. The log's terms never go back, so once an entry of a later term is applied, a command
//! of an earlier one that was not applied before it never will be. Whoever waits for it
//! may propose it again, and it is carried out once at most.
//!
//! This is also where the amount of work under way is bounded, because it is the one
//! place that a proposal enters once and leaves once: [`PENDING_MAX`] commands,
//! [`PENDING_BYTES_MAX`] bytes. Beyond that, etcd's "too many requests".

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::pb::kvorumpb::CommandHeader;
use crate::raft::Refused;
use crate::state::Outcome;

/// Commands proposed by this member and not yet answered.
pub const PENDING_MAX: usize = 100_000;
/// Their size in bytes.
pub const PENDING_BYTES_MAX: usize = 128 * 1024 * 1024;

/// What a proposer gets.
#[derive(Debug)]
pub enum Answer {
    /// The command was applied, and this came of it.
    Applied(Outcome),
    /// A leader has not taken it; it is in no log.
    Refused(Refused),
    /// It is in no log, or in one that lost: it was not carried out and never will be.
    Overtaken,
    /// Nobody will tell what became of it.
    Lost(Error),
}

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
    waiters: BTreeMap<u64, Waiter>,
    bytes: usize,
    /// The newest term of which an entry is applied.
    applied_term: u64,
}

struct Waiter {
    sender: oneshot::Sender<Answer>,
    bytes: usize,
    /// The term that the command is proposed for.
    term: u64,
}

impl Waiting {
    fn remove(&mut self, sequence: u64) -> Option<oneshot::Sender<Answer>> {
        let waiter = self.waiters.remove(&sequence)?;
        self.bytes -= waiter.bytes;
        Some(waiter.sender)
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

    /// What makes this member's contexts for read indexes differ from all others.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// Registers a command of `bytes` bytes that is to be proposed for `term`; where its
    /// answer arrives.
    ///
    /// # Errors
    /// [`Error::TooManyRequests`] when too much is under way already.
    pub fn register(
        &self,
        header: &CommandHeader,
        bytes: usize,
        term: u64,
    ) -> Result<oneshot::Receiver<Answer>, Error> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.waiters.len() >= PENDING_MAX || waiting.bytes + bytes > PENDING_BYTES_MAX {
            return Err(Error::TooManyRequests);
        }
        if term < waiting.applied_term {
            let _ = sender.send(Answer::Overtaken);
            return Ok(receiver);
        }
        waiting.bytes += bytes;
        waiting.waiters.insert(header.sequence, Waiter { sender, bytes, term });
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
    pub fn refuse(&self, sequence: u64, refused: Refused) {
        let waiter = self.waiting.lock().remove(sequence);
        if let Some(waiter) = waiter {
            // Whoever does not wait any more does not want to know.
            let _ = waiter.send(Answer::Refused(refused));
        }
    }

    /// An entry of this term is applied, and so is everything before it: what was proposed
    /// for earlier terms and still waits is overtaken.
    pub fn overtake(&self, term: u64) {
        let mut waiting = self.waiting.lock();
        if term <= waiting.applied_term {
            return;
        }
        waiting.applied_term = term;
        let overtaken: Vec<u64> = waiting
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.term < term)
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in overtaken {
            if let Some(sender) = waiting.remove(sequence) {
                let _ = sender.send(Answer::Overtaken);
            }
        }
    }

    /// Answers everybody with `error`: the member stops, or has skipped the entries that
    /// they wait for.
    pub fn fail_all(&self, error: &Error) {
        let mut waiting = self.waiting.lock();
        waiting.bytes = 0;
        let waiters = std::mem::take(&mut waiting.waiters);
        drop(waiting);
        for waiter in waiters.into_values() {
            let _ = waiter.sender.send(Answer::Lost(error.clone()));
        }
    }
}
