//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod metrics;
pub mod mvcc;
pub mod pb;

pub use error::Error;
