//! What a server makes of a data directory that is not as it left it: damaged, of another version,
//! or partly gone.
//!
//! * [`heal`]: a member of a cluster whose checkpoint is damaged fetches the state from a peer.
//! * [`mutated`]: 200 seeds of damage to a single member's directory; each is refused by name, or
//!   nothing is lost. `KVORUM_MUTATION_SEEDS=7..8` shows one again.
//! * [`current`]: the file that names the checkpoint that counts is made anew, or the start refused.
//! * [`etcds`]: an etcd that is started there by mistake refuses, and changes nothing.
//! * [`formats`]: directories of released versions, kept here, are opened.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]
#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]

#[path = "../common/mod.rs"]
mod common;

mod current;
mod etcds;
mod formats;
mod heal;
mod mutated;
mod rig;
