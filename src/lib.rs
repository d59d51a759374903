//! kvorum: an embedded, etcd-compatible key-value store.

pub mod config;
pub mod error;
pub mod pb;
pub mod version;

pub use config::Config;
pub use error::Error;
