//! Runs the tests of `tests/chaos`, which breaks clusters of real processes: that its checks
//! find what is wrong, and that they find nothing wrong with etcd.
//!
//! It is a package of its own, because the client's crate needs `protoc` to build. Without
//! it the test says so and passes, unless `CI=true`: there it fails, so that a test that
//! silently no longer runs is noticed.

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

/// A command of cargo for the harness, or `None` after printing why there is none.
fn harness(command: &str) -> Option<Command> {
    if protoc().is_none() {
        let why = "the third-party client needs protoc to build: install protobuf-compiler, \
                   or set PROTOC";
        assert!(env::var("CI").as_deref() != Ok("true"), "{why}");
        eprintln!("skipped: {why}");
        return None;
    }
    // Kept between runs: only the first builds everything.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("chaos");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([command, "--locked", "--manifest-path", "tests/chaos/Cargo.toml"]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", &target);
    Some(cargo)
}

fn succeeds(mut command: Command) {
    let output = command.output().unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let (stdout, stderr) = (String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    eprintln!("{stdout}");
}

#[test]
fn the_harness_finds_what_is_wrong_and_nothing_wrong_with_etcd() {
    if let Some(command) = harness("test") {
        succeeds(command);
    }
}
