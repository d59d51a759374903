//! etcd itself, broken for some seconds: what it promises is kept, so what the harness
//! finds wrong with it is wrong with the harness.
//!
//! The program is that of `KVORUM_CHAOS_SERVER`, else the etcd that kvorum is compared with
//! (`tests/judge/build.sh`); without it the test says so and passes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// How long things are broken.
const SECONDS: &str = "20";

fn server() -> Option<PathBuf> {
    if let Some(server) = env::var_os("KVORUM_CHAOS_SERVER") {
        return Some(server.into());
    }
    let etcd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/judge/etcd");
    etcd.is_file().then_some(etcd)
}

#[test]
fn etcd_keeps_its_promises() {
    let Some(server) = server() else {
        eprintln!("skipped: there is no etcd in target/judge");
        return;
    };
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("etcd-{}", std::process::id()));
    let report = dir.with_extension("json");
    let mut campaign = Command::new(env!("CARGO_BIN_EXE_kvorum-chaos"));
    campaign.arg("--server").arg(server).arg("--dir").arg(&dir).arg("--report").arg(&report);
    campaign.args(["--duration", SECONDS, "--without", "snapshot,replace"]);
    let output = campaign.output().unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let (stdout, stderr) = (String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    assert!(output.status.success(), "{campaign:?}: {}\n{stdout}\n{stderr}", output.status);

    // That nothing was found means something only if something was done.
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert!(report["revision"].as_i64() > Some(100), "{stdout}");
    assert!(report["events"].as_u64() > Some(300), "{stdout}");
    assert!(!report["faults"].as_object().unwrap().is_empty(), "{stdout}");
    for guarantee in ["real-time", "answer-fits", "watch-reliable", "members-equal", "general"] {
        assert!(report["checks"][guarantee].as_u64() > Some(0), "{guarantee}: {stdout}");
    }
}
