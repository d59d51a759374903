//! Breaks a cluster of real processes on purpose, and checks what it promised.
//!
//! The server is a program that takes etcd's flags: etcd itself, which is how the checks are
//! known to be right, or kvorum. See `docs/chaos.md` for how it is used.

pub mod campaign;
pub mod check;
pub mod client;
pub mod cluster;
pub mod disk;
pub mod faults;
pub mod history;
pub mod observe;
pub mod proxy;
pub mod report;
pub mod rng;
pub mod traffic;
