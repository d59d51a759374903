//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod lease;
pub mod mvcc;
pub mod pb;
pub mod state;
pub mod storage;

pub use error::Error;
