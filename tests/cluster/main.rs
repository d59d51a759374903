//! A cluster as its users see it: three members as processes, etcdctl and clients of every
//! member, and what operators do to a cluster or what happens to it.
//!
//! Each test has a cluster of its own on free ports, and waits for conditions. Where it says
//! "as etcd", the same steps are carried out on a cluster of etcd and the answers compared.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod behind;
#[path = "../common/mod.rs"]
mod common;
mod every_member;
mod faults;
mod heal;
mod membership;
mod restarts;
mod restored;
mod rig;
mod watched;
