//! kvorum: an embedded, etcd-compatible key-value store.
//!
//! [`Server::start`] takes a [`Config`] and gives a running server, which etcd's clients
//! reach on its ports. In the same process it is called through [`Client`], in Rust's
//! terms; through [`Engine`], in etcd's messages; or through [`Server::channel`], by any
//! etcd client that is built on tonic.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = kvorum::Server::start(kvorum::Config::in_memory()).await?;
//! let client = server.client();
//! client.put("greeting", "hello").await?;
//! assert_eq!(client.get("greeting").await?.expect("it was put").value, "hello");
//! server.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # A tour of the house
//!
//! From the top down; a module uses only what is below it. `ARCHITECTURE.md` draws the
//! whole picture, and each module begins with an essay.
//!
//! - [`server`] puts everything together, starts and stops it; [`config`] is what it is told.
//! - [`api`] and [`client`] are the two faces of [`engine`], the handle everybody calls.
//! - [`runtime`] is threads, clocks and queues around what follows.
//! - [`raft`], [`state`], [`mvcc`] and [`lease`] are pure: consensus, the one function that
//!   changes data, the keys with their history, and leases. They have no clock, thread or file.
//! - [`log`] holds what was acknowledged, [`storage`] the checkpoint.
//! - [`metrics`], [`error`], [`pb`] and [`version`] are words that all of them share.

pub mod api;
pub mod client;
pub mod config;
pub mod engine;
pub mod error;
pub mod lease;
pub mod log;
pub mod metrics;
pub mod mvcc;
pub mod pb;
pub mod raft;
pub mod runtime;
pub mod server;
pub mod state;
pub mod storage;
pub mod version;

pub use client::Client;
pub use config::Config;
pub use engine::Engine;
pub use error::Error;
pub use server::{Server, StartError};

/// The examples in README.md compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
