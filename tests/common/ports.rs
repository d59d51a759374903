//! Ports for the servers of tests.

use std::net::TcpListener;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port nobody listens on, below the range the kernel gives to outgoing connections, so that
/// nothing takes it between this look and the server's bind; nor another test of this process,
/// which is given another one.
pub(crate) fn free_port() -> u16 {
    // Where a process begins is by chance; then one after the other.
    static NEXT: LazyLock<AtomicU16> =
        LazyLock::new(|| AtomicU16::new(getrandom::u32().unwrap() as u16));
    loop {
        let port = 10_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 22_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
