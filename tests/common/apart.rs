//! Packages below `tests/` that are not of the workspace, with lock files of their own:
//! someone else's etcd client, which they use, needs `protoc` to build, and the files that
//! belong to it. Without these a test says so and passes, unless `CI=true`: there it fails, so
//! that one that silently no longer runs is noticed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What protoc cannot do without, beside its program.
const DESCRIPTOR: &str = "google/protobuf/descriptor.proto";

/// A command of cargo for the package in `tests/` of this name, or `None` after printing why
/// there is none.
pub(crate) fn cargo(command: &str, package: &str) -> Option<Command> {
    if let Some(missing) = missing() {
        assert!(env::var("CI").as_deref() != Ok("true"), "{missing}");
        eprintln!("skipped: {missing}");
        return None;
    }
    // Kept between runs: only the first builds everything.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name(package);
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([command, "--locked", "--manifest-path", &format!("tests/{package}/Cargo.toml")]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", &target);
    Some(cargo)
}

/// Runs a command to its end, and shows what it printed.
pub(crate) fn succeeds(mut command: Command) {
    let output = command.output().unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let (stdout, stderr) = (String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    eprintln!("{stdout}");
}

fn missing() -> Option<String> {
    let Some(protoc) = protoc() else {
        return Some(
            "the third-party client needs protoc to build: install protobuf-compiler and \
             libprotobuf-dev, or set PROTOC"
                .to_owned(),
        );
    };
    // Where protoc itself looks.
    let beside = protoc.canonicalize().ok()?.parent()?.to_owned();
    let given = env::var_os("PROTOC_INCLUDE").map(PathBuf::from);
    let mut places = [beside.join("../include"), beside].into_iter().chain(given);
    let is_there = places.any(|place| place.join(DESCRIPTOR).is_file());
    (!is_there).then(|| {
        format!(
            "the third-party client needs {DESCRIPTOR} to build, and {} was installed without: \
             install libprotobuf-dev, or set PROTOC_INCLUDE",
            protoc.display()
        )
    })
}

fn protoc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("PROTOC") {
        return Some(path.into());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join("protoc")).find(|program| program.is_file())
}
