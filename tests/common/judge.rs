//! The judges: etcd, etcdctl and etcdutl at the versions `tests/judge/go.mod`
//! pins, against which kvorum is compared.
//!
//! and, for what moves between versions, at those of `tests/judge/v3.5` and so on.
//!
//! They are looked for in `$KVORUM_JUDGE_DIR`, else in `target/judge`, and built
//! there when Go is at hand; older minors in a directory of their own below. Without them a test that needs them prints why and
//! passes, unless `CI=true`: there it fails, so that a comparison that silently
//! stopped running is noticed.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the judges are.
pub(crate) struct Judges {
    /// The etcd server.
    pub(crate) etcd: PathBuf,
    /// The client.
    pub(crate) etcdctl: PathBuf,
    /// The offline tool.
    pub(crate) etcdutl: PathBuf,
}

/// The judges, or `None` after printing why `test` is skipped.
///
/// # Panics
///
/// If there are none and `CI=true`.
pub(crate) fn find(test: &str) -> Option<Judges> {
    Some(find_minors(test, &[])?.remove(0).1)
}

/// As [`find`], of the judges' own version and of the minors given (`v3.5`): each with its name.
pub(crate) fn find_minors<'a>(test: &str, minors: &[&'a str]) -> Option<Vec<(&'a str, Judges)>> {
    match locate(minors) {
        Ok(judges) => Some(judges),
        Err(why) => {
            skip(test, &why);
            None
        }
    }
}

/// Says that `test` does not run because of `why`; under CI that is a failure.
pub(crate) fn skip(test: &str, why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} cannot run: {why}");
    eprintln!("skipped {test}: {why}");
}

/// An etcd 3.4 as distributions package it, if this machine has one: old enough
/// to differ from the judge.
pub(crate) fn old_etcd() -> Option<PathBuf> {
    let path = Path::new("/usr/bin/etcd");
    version_of(path, "--version")?.contains("3.4.").then(|| path.to_owned())
}

/// The etcdctl that goes with [`old_etcd`].
pub(crate) fn old_etcdctl() -> Option<PathBuf> {
    let path = Path::new("/usr/bin/etcdctl");
    version_of(path, "version")?.contains("3.4.").then(|| path.to_owned())
}

fn version_of(program: &Path, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).env("ETCDCTL_API", "3").output().ok()?;
    String::from_utf8(output.stdout).ok()
}

fn locate<'a>(minors: &[&'a str]) -> Result<Vec<(&'a str, Judges)>, String> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = match std::env::var_os("KVORUM_JUDGE_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let directory = target_directory().join("judge");
            let build = manifest.join("tests/judge/build.sh");
            let output = Command::new(&build)
                .arg(&directory)
                .args(minors)
                .output()
                .map_err(|error| format!("{} does not run: {error}", build.display()))?;
            if !output.status.success() {
                return Err(format!(
                    "tests/judge/build.sh failed (is Go installed?): {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
            }
            directory
        }
    };
    let newest = ("v3.7", directory.clone());
    let minors = minors.iter().map(|minor| (*minor, directory.join(minor)));
    std::iter::once(newest).chain(minors).map(|(name, at)| Ok((name, judges(&at)?))).collect()
}

fn judges(directory: &Path) -> Result<Judges, String> {
    let judges = Judges {
        etcd: directory.join("etcd"),
        etcdctl: directory.join("etcdctl"),
        etcdutl: directory.join("etcdutl"),
    };
    for program in [&judges.etcd, &judges.etcdctl, &judges.etcdutl] {
        if !program.is_file() {
            return Err(format!(
                "{} is missing; tests/judge/build.sh builds it",
                program.display()
            ));
        }
    }
    Ok(judges)
}

/// `target/`, wherever cargo was told to put it: the test binary is in
/// `target/<profile>/deps/`.
fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its own path");
    test.ancestors().nth(3).expect("a test binary is three levels below target/").to_owned()
}
