//! The outside: listeners, HTTP and gRPC.

pub mod listener;
pub mod tls;
