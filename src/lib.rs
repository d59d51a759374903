//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod mvcc;
pub mod pb;
pub mod runtime;

pub use error::Error;
