//! The outside: listeners, HTTP and gRPC.

pub mod gateway;
pub mod http;
pub mod listener;
pub mod tls;
