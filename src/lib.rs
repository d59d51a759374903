//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod metrics;
pub mod lease;
pub mod mvcc;
pub mod log;
pub mod pb;
pub mod state;
pub mod runtime;

pub use error::Error;
