//! The imperative shell: the threads and tasks that run the pure parts.

pub mod watch_hub;
