//! kvorum: an embedded, etcd-compatible key-value store.

pub mod api;
pub mod error;
pub mod metrics;
pub mod pb;

pub use error::Error;
