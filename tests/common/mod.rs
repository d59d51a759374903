//! What the black-box tests share: a server process to talk to, and ways to
//! talk to it.
//!
//! * [`server::TestServer`]: kvorum or etcd as a process, on free ports, in a
//!   directory of its own, killed and restarted at will.
//! * [`judge`]: finds or builds the etcd that kvorum is compared with.
//! * [`grpc`]: calls any method of `proto/` with encoded messages, and shows any
//!   message as JSON.
//! * [`http`]: an HTTP/1.1 client of a hundred lines.
//! * [`accepted`]: where kvorum differs from etcd on purpose.
//! * [`ca`]: makes certificates.
//! * [`process`]: any process, with exactly the arguments given.
//! * [`ports`]: where a server may listen.
//! * [`mask`]: takes out of an answer what two correct servers cannot agree on.
//! * [`scrape`]: reads `/metrics`.
//! * [`rng`]: the random numbers of the seeded tests.
//!
//! Nothing here sleeps to let time pass: everything polls a condition, and says
//! what it waited for when that does not come true.

#![allow(dead_code, reason = "every test binary uses a part of this")]
#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

pub(crate) mod accepted;
pub(crate) mod ca;
pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod judge;
pub(crate) mod mask;
pub(crate) mod ports;
pub(crate) mod process;
pub(crate) mod rng;
pub(crate) mod scrape;
pub(crate) mod server;
