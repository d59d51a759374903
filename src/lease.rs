//! Leases: keys that vanish when their owner stops saying that it is alive.
//!
//! Two halves, because they live by different rules:
//!
//! - [`Lessor`] is replicated. Which leases exist, how long they were granted for and
//!   which keys hang on them changes only by committed requests, so every member
//!   holds the same. It knows no time.
//! - [`Expiry`] is the leader's own. It holds a deadline for every lease, moves it
//!   with each keepalive, and says which leases are due. It decides nothing: a lease
//!   ends when the revocation that the leader proposes has been committed.
//!
//! ```text
//!   grant 7, 60 s ──log──▶ Lessor {7: 60 s}  ──▶ Expiry {7: now + 60 s}   (leader only)
//!   keepalive 7   ─────────────────────────────▶ Expiry {7: now + 60 s}
//!   60 s of silence                              Expiry: 7 is due
//!   revoke 7      ◀────────────────────────────  leader proposes
//!   revoke 7      ──log──▶ Lessor {}, keys deleted ──▶ Expiry {}
//! ```
//!
//! No lease ends early, whoever leads: a new leader starts every deadline afresh,
//! with the whole TTL or with the remainder last committed ([`Lessor::set_remaining`])
//! and an election timeout on top. A remainder is therefore never committed behind
//! the back of a keepalive: see [`Renewal::CommitFirst`].
//!
//! Time is a [`Duration`] since any fixed moment, handed in by
//! the caller; it must not run backwards. It should go on while the machine sleeps.

mod expiry;
mod lessor;

pub use expiry::{Expiry, REVOKE_RETRY, Renewal};
pub use lessor::{Lease, Lessor};

use std::time::Duration;

/// The longest TTL that can be granted, in seconds (285 years).
pub const MAX_TTL_SECS: i64 = 9_000_000_000;

/// The shortest TTL that is granted, in seconds: one and a half election timeouts
/// (`election_ticks` heartbeats each), rounded up, so that a lease outlives the loss of
/// a leader. 2 s by default.
pub fn min_ttl_secs(heartbeat: Duration, election_ticks: u32) -> i64 {
    let ticks = election_ticks.saturating_mul(3) / 2;
    let millis = heartbeat.saturating_mul(ticks).as_millis();
    i64::try_from(millis.div_ceil(1000)).unwrap_or(MAX_TTL_SECS).min(MAX_TTL_SECS)
}

#[cfg(test)]
mod tests;
