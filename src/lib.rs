//! An embedded, etcd-compatible key-value store.
//!
//! kvorum is what etcd is, its API, its flags and its guarantees, as a library: any etcd
//! client can connect to it, and the program it runs in need not connect at all.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use kvorum::{Config, Server};
//!
//! let server = Server::start(Config::in_memory()).await?;
//! let client = server.client();
//!
//! let put = client.put("greeting", "hello").await?;
//! assert_eq!(client.get("greeting").await?.unwrap().value, "hello");
//!
//! let mut watcher = client.watch_prefix("greet").start_revision(put.revision).await?;
//! assert_eq!(watcher.recv().await?.events.len(), 1);
//!
//! println!("etcdctl --endpoints={} get greeting", server.client_urls()[0]);
//! server.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Ways in
//!
//! | Way | For |
//! |---|---|
//! | [`Server::client`] | Rust code that wants [keys, values and events](client). |
//! | [`Server::engine`] | Rust code that wants [etcd's messages](pb::etcdserverpb), records still encoded. |
//! | [`Server::channel`] | Any etcd client crate built on tonic, without a socket. |
//! | [`Server::client_urls`] | Everybody else: gRPC, JSON under `/v3/`, `/health` and `/metrics` on one port. |
//!
//! # Configuration
//!
//! A [`Config`] has a field for every flag of etcd. [`Config::in_memory`] touches no file and
//! takes any free port; [`Config::for_test`] does the same with a directory;
//! [`Config::default`] is etcd's. [`config::parse`] reads a command line, `ETCD_*` variables
//! and etcd's YAML file.
//!
//! ```no_run
//! # async fn example() -> Result<(), kvorum::StartError> {
//! let config = kvorum::Config {
//!     data_dir: "/var/lib/my-program".into(),
//!     auto_compaction_retention: "1h".to_owned(),
//!     ..kvorum::Config::default()
//! };
//! let server = kvorum::Server::start(config).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is durable, and when
//!
//! | | When a write returns `Ok` |
//! |---|---|
//! | On disk | It is in the raft log, and the log is synced: it survives a crash of the program and of the machine. |
//! | `unsafe_no_fsync` | It is with the operating system: it survives a crash of the program, not of the machine. |
//! | In memory | It is gone with the server. |
//!
//! In each case it is visible to every read that begins afterwards, and on its way to
//! watchers. A write that returns an error has not happened, unless
//! [`Error::is_ambiguous`] says that it may have. Dropping the future of a write gives up
//! the answer, and not the write.
//!
//! # In your process
//!
//! - A server is its own: several run side by side in one process, each with its state,
//!   threads (four, named `kvorum-…`), sockets and metrics. A data directory belongs to one of
//!   them at a time. What sled, below the checkpoints, shares in a process costs time only.
//! - [`Server::start`] is called within a tokio runtime of either
//!   flavor, with I/O and time enabled, and the server's tasks run there.
//! - [`Server::shutdown`] leaves no thread, socket or open file. Dropping a server stops it
//!   too, without waiting. Handles may outlive it: their calls fail with [`Error::Stopped`].
//! - Nothing here exits, aborts or installs handlers: no signal handler, panic hook or
//!   logger. A failing disk ends the server, not the program: see
//!   [`Server::wait_for_failure`].
//! - Logs are `tracing` events, for whatever subscriber the
//!   program has.
//! - Panics must unwind (no `panic = "abort"`): sled's, on a damaged file, are caught and
//!   become errors.
//!
//! # What there is
//!
//! | etcd's | Here |
//! |---|---|
//! | KV, transactions, history, compaction | yes |
//! | Watch: history, progress, fragments, `prev_kv` | yes |
//! | Leases, Lock, Election | yes |
//! | Maintenance: status, alarms, hashes, defragment, snapshots | yes |
//! | JSON gateway, health, metrics, TLS | yes |
//! | Clusters: members that come and go, learners, snapshots to those behind | yes |
//! | Users and roles | not yet |
//!
//! `docs/compatibility.md` in the repository has the details.
//!
//! # The house
//!
//! The modules shown here are for programs. Behind them, and from the top down: `api`
//! (gRPC, HTTP), [`engine`], `runtime` (threads and queues), `net` (peers), `raft` and `state` (what a
//! command does), `mvcc` and `lease` (pure data structures), `log` and `storage` (files). A
//! module uses only those below it. `ARCHITECTURE.md` in the repository shows the way of a
//! write and of a read through them.

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod engine;
pub mod error;
pub mod pb;
pub mod server;
pub mod version;

// Public for the binary, the tests and the tools of this repository, which look into the
// rooms one by one. Not for programs: they change with any release.
#[doc(hidden)]
pub mod api;
#[doc(hidden)]
pub mod backup;
#[doc(hidden)]
pub mod bolt;
mod file_lock;
mod large_file;
#[doc(hidden)]
pub mod lease;
#[doc(hidden)]
pub mod log;
#[doc(hidden)]
pub mod metrics;
#[doc(hidden)]
pub mod mvcc;
#[doc(hidden)]
pub mod net;
#[doc(hidden)]
pub mod raft;
#[doc(hidden)]
pub mod runtime;
#[cfg(test)]
mod simulation;
#[doc(hidden)]
pub mod state;
#[doc(hidden)]
pub mod storage;

pub use client::Client;
pub use config::Config;
pub use engine::Engine;
pub use error::Error;
pub use server::{Fatal, Server, StartError};

/// The examples in README.md compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
