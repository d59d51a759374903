//! Runs the tests of `tests/third-party`: someone else's etcd client against an embedded
//! server.
//!
//! They are a package of their own, because the client's crate needs `protoc` to build.
//! Without it the test says so and passes, unless `CI=true`: there it fails, so that a test
//! that silently no longer runs is noticed.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is test code")]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn protoc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("PROTOC") {
        return Some(path.into());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join("protoc")).find(|program| program.is_file())
}

#[test]
fn a_third_party_client_works_without_a_socket() {
    if protoc().is_none() {
        let why = "the third-party client needs protoc to build: install protobuf-compiler, \
                   or set PROTOC";
        assert!(env::var("CI").as_deref() != Ok("true"), "{why}");
        eprintln!("skipped: {why}");
        return;
    }
    // Kept between runs: only the first builds everything.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("third-party");
    let mut test = Command::new(env!("CARGO"));
    test.args(["test", "--locked", "--manifest-path", "tests/third-party/Cargo.toml"]);
    test.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", &target);
    let output = test.output().unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let (stdout, stderr) = (String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    assert!(output.status.success(), "{test:?}: {}\n{stdout}\n{stderr}", output.status);
    eprintln!("{stdout}");
}
