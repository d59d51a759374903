//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod metrics;
pub mod lease;
pub mod mvcc;
pub mod log;
pub mod pb;
pub mod state;

pub use error::Error;
