//! kvorum: an embedded, etcd-compatible key-value store.

pub mod error;
pub mod log;
pub mod pb;

pub use error::Error;
