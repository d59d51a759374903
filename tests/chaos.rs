//! Runs `tests/chaos`, which breaks clusters of real processes: its own tests, that its checks
//! find what is wrong and nothing wrong with etcd, and a campaign against kvorum.
//!
//! `KVORUM_CHAOS_SECONDS` makes the campaign longer, `KVORUM_CHAOS_SEED` repeats the faults of
//! one that failed, and `KVORUM_CHAOS_MEMBERS` is 3 or 5. `docs/chaos.md` has the rest.
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

#[test]
fn kvorum_keeps_its_promises() {
    let Some(mut command) = harness("run") else { return };
    command.args(["--", "--server", env!("CARGO_BIN_EXE_kvorum")]);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{}", std::process::id()));
    command.arg("--dir").arg(dir);
    let seconds = env::var("KVORUM_CHAOS_SECONDS").unwrap_or_else(|_| "20".to_owned());
    command.args(["--duration", &seconds]);
    let given = [("KVORUM_CHAOS_SEED", "--seed"), ("KVORUM_CHAOS_MEMBERS", "--members")];
    for (variable, flag) in given {
        if let Ok(value) = env::var(variable) {
            command.args([flag, &value]);
        }
    }
    succeeds(command);
}
