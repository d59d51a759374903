//! Runs the tests of `tests/third-party`: someone else's etcd client against an embedded
//! server.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is test code")]

#[path = "common/apart.rs"]
mod apart;

#[test]
fn a_third_party_client_works_without_a_socket() {
    if let Some(command) = apart::cargo("test", "third-party") {
        apart::succeeds(command);
    }
}
