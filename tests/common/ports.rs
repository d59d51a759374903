//! Ports for the servers of tests.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port nobody listens on, below the range the kernel gives to outgoing connections, so that
/// nothing takes it between this look and the server's bind; nor another test of this process,
/// which is given another one.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Where a process begins is by chance; then one after the other.
    if NEXT.load(Ordering::Relaxed) == 0 {
        let first = 11_000 + (getrandom::u32().unwrap() % 20_000) as u16;
        let _ = NEXT.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
    }
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
