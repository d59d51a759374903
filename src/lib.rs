//! kvorum: an embedded, etcd-compatible key-value store.

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
