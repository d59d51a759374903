//! The gRPC API, tested through a running server as a client sees it.
//!
//! Each test starts a server of its own, in memory, and talks to it through the
//! generated clients over a channel without network; a few go over TCP. What is
//! asserted is what etcd documents or does, down to the texts of the errors.

#![allow(clippy::indexing_slicing, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod cluster;
mod concurrency;
mod kubernetes;
mod lease;
mod long_calls;
mod rig;
mod watch;
mod wire;
