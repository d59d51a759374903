//! Crashes of every kind, against the real binary, real sockets and real disks: what
//! was acknowledged is there afterwards, and a watcher goes on without a gap.
//!
//! ```text
//! cargo test --test crash                                       a few rounds of each
//! KVORUM_CRASH_ROUNDS=200 cargo test --test crash killed        the campaign of kill -9
//! KVORUM_CRASH_ROUNDS_SPACE=100 cargo test --test crash space   that of compaction, checkpoint, defragmentation
//! KVORUM_CRASH_ROUNDS_SNAPSHOT=100 cargo test --test crash snapshot   that of save, restore and import
//! KVORUM_CRASH_ROUNDS_POWER=50 cargo test --test crash power    the campaign of power cuts
//! KVORUM_CRASH_SEED=… cargo test --test crash killed            the same decisions again
//! ```
//!
//! * [`killed`]: SIGKILL under load, during start-up, in the middle of checkpoints.
//! * [`orderly`]: SIGTERM under load, and how long a start takes.
//! * [`space`]: SIGKILL in the middle of compactions, checkpoints and defragmentations.
//! * [`snapshot`]: SIGKILL in the middle of saves, restores and imports.
//! * [`power_cut`]: what the block device holds at some moment is all that is left.
//! * [`damage`]: files torn, flipped, swapped and missing.
//! * [`full_disk`]: no space left, slowly or at once.
//! * [`history`]: what clients were told and a watcher saw, and the comparison with it.

#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "test code"
)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

#[path = "../common/mod.rs"]
mod common;

mod damage;
mod disk;
mod full_disk;
mod history;
mod killed;
mod load;
mod node;
mod orderly;
mod power_cut;
mod snapshot;
mod space;
mod watcher;

use std::str::FromStr;

use common::rng::Rng;

/// A number from the environment, or the default.
fn setting<T: FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")),
        Err(_) => default,
    }
}

/// Random numbers; says how to have them again.
fn seeded(test: &str) -> Rng {
    let seed = setting("KVORUM_CRASH_SEED", getrandom::u64().expect("random numbers"));
    println!("{test}: KVORUM_CRASH_SEED={seed}");
    Rng::new(seed)
}
