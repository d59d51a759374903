//! Runs `tests/chaos`, which breaks clusters of real processes: its own tests, that its checks
//! find what is wrong and nothing wrong with etcd, and a campaign against kvorum.
//!
//! `KVORUM_CHAOS_SECONDS` makes the campaign longer, `KVORUM_CHAOS_SEED` repeats the faults of
//! one that failed, and `KVORUM_CHAOS_MEMBERS` is 3 or 5. `docs/chaos.md` has the rest.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is test code")]

use std::env;
use std::path::Path;

#[path = "common/apart.rs"]
mod apart;

#[test]
fn the_harness_finds_what_is_wrong_and_nothing_wrong_with_etcd() {
    if let Some(command) = apart::cargo("test", "chaos") {
        apart::succeeds(command);
    }
}

#[test]
fn kvorum_keeps_its_promises() {
    let Some(mut command) = apart::cargo("run", "chaos") else { return };
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
    apart::succeeds(command);
}
