//! What this build calls itself.
//!
//! Clients decide by the version which requests they may send, so the version on
//! the wire is that of the etcd release whose behaviour is implemented, and
//! `kvorum`'s own version appears where a person looks.

/// The etcd release whose API, flags and behaviour this build implements: what
/// `/version`, `Status.version` and `--version` answer.
pub const ETCD_VERSION: &str = "3.7.1";

/// The cluster and storage version that goes with it.
pub const ETCD_STORAGE_VERSION: &str = "3.7.0";

/// This package's own version.
pub const KVORUM_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit this was built from: `KVORUM_GIT_SHA` at build time, otherwise a
/// sentence that says it was not given.
pub const GIT_SHA: &str = match option_env!("KVORUM_GIT_SHA") {
    Some(sha) => sha,
    None => "Not provided (set KVORUM_GIT_SHA when building)",
};

/// The four lines `--version` prints, in the shape scripts expect of etcd.
pub fn text() -> String {
    let os = match std::env::consts::OS {
        "macos" => "darwin",
        other => other,
    };
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    };
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: {GIT_SHA}\nGo Version: none (kvorum {KVORUM_VERSION}, Rust)\nGo OS/Arch: {os}/{arch}\n"
    )
}
