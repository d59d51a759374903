//! The layers of the house: a module uses only what is below it.
//!
//! Every `crate::…` in `src/` is read and compared with [`LEVELS`]. [`ABSENCES`] says
//! what a room must not know although it lies below, and [`HOMES`] which rooms alone
//! name a crate. ARCHITECTURE.md draws the picture; this keeps it true.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod sources;

use sources::{Source, library};

/// From the top down. A room may name those on lower levels, none on its own.
const LEVELS: &[&[&str]] = &[
    &["main", "cli", "logging", "memory", "systemd"],
    &["server", "simulation"],
    &["api", "client"],
    &["engine"],
    &["runtime"],
    &["backup"],
    &["net", "raft", "state"],
    &["mvcc", "lease"],
    &["bolt", "config", "metrics", "log", "storage"],
    &["error", "file_lock", "large_file", "pb", "version"],
];

/// A room, rooms it never names though they lie below it, and why.
const ABSENCES: &[(&str, &[&str], &str)] = &[
    ("api", &["raft", "log", "storage"], "the API knows an engine and what it says"),
    ("engine", &["raft", "log", "storage"], "the engine asks; how it is done is the runtime's"),
    ("client", &["raft", "log", "storage"], "the client knows an engine and what it says"),
    ("api", &["config"], "flags become plain values in `server`"),
    ("engine", &["config"], "flags become plain values in `server`"),
    ("runtime", &["config"], "flags become plain values in `server`"),
    (
        "net",
        &["mvcc", "lease", "log", "config"],
        "peers are sent bytes and calls, and spool images",
    ),
    ("raft", &["storage", "metrics", "config"], "the node is a pure stepper"),
    ("state", &["storage", "metrics", "config"], "the state machine is pure"),
    ("bolt", &["pb"], "a file format knows nothing of what is in the files"),
    ("mvcc", &["log", "storage", "metrics", "config"], "the store is pure"),
    ("lease", &["log", "storage", "metrics", "config"], "leases are pure"),
];

/// A crate, and the rooms that alone name it: so much is to be changed to replace it.
const HOMES: &[(&str, &[&str])] = &[
    ("raft", &["raft"]),
    ("protobuf", &["raft"]),
    ("slog", &["raft"]),
    ("sled", &["storage"]),
    ("ring", &["api", "backup"]),
    ("serde", &["api", "config"]),
    ("prometheus", &["metrics", "server"]),
    ("serde_yaml_ng", &["config"]),
    ("tonic", &["api", "cli", "server", "metrics", "net", "pb"]),
    ("axum", &["api", "server"]),
    ("hyper", &["api"]),
    ("tokio_rustls", &["api"]),
    ("rcgen", &["api"]),
    ("tracing_subscriber", &["logging", "main"]),
];

fn level(room: &str) -> Option<usize> {
    LEVELS.iter().position(|rooms| rooms.contains(&room))
}

/// What is wrong with the rooms a file names.
fn violations(source: &Source) -> Vec<String> {
    let (path, room) = (&source.path, source.room());
    if room == "lib" {
        // The crate's root names everything: it is the map.
        return Vec::new();
    }
    let Some(own) = level(room) else {
        return vec![format!("{path}: `{room}` has no level; give it one in tests/layers.rs")];
    };
    let mut found = Vec::new();
    for (line, named) in source.named_rooms() {
        // What is no module (a re-export, a macro) belongs to none.
        let Some(other) = level(&named).filter(|_| named != room) else { continue };
        if other < own {
            found.push(format!("{path}:{line}: `{room}` names `{named}`, which is above it"));
        } else if other == own {
            found.push(format!("{path}:{line}: `{room}` names `{named}`, which is beside it"));
        }
        for (from, absent, why) in ABSENCES {
            if *from == room && absent.contains(&named.as_str()) {
                found.push(format!("{path}:{line}: `{room}` must not know `{named}`: {why}"));
            }
        }
    }
    found
}

/// What is wrong with the crates a file names.
fn strangers(source: &Source) -> Vec<String> {
    let (path, room) = (&source.path, source.room());
    let rooms = source.named_rooms();
    let mut found = Vec::new();
    for (line, head) in source.path_heads() {
        // `raft::…` after `use crate::raft` is the room, not the crate.
        let is_room = rooms.iter().any(|(_, named)| *named == head);
        for (name, homes) in HOMES {
            if *name == head && !is_room && !homes.contains(&room) {
                found.push(format!("{path}:{line}: the crate `{head}` is for {homes:?} alone"));
            }
        }
    }
    found
}

#[test]
fn every_module_uses_only_what_is_below_it() {
    let found: Vec<String> = library().iter().flat_map(violations).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_level_has_its_rooms() {
    let sources = library();
    for room in LEVELS.iter().copied().flatten() {
        let there = *room == "pb" || sources.iter().any(|source| source.room() == *room);
        assert!(there, "`{room}` is gone; remove it from tests/layers.rs");
    }
}

#[test]
fn a_crate_is_named_in_its_home_only() {
    let found: Vec<String> = library().iter().flat_map(strangers).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_picture_in_the_documentation_has_these_levels() {
    let path = sources::root().join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).expect("ARCHITECTURE.md is readable");
    // The last levels are shown as one; the program's parts as `main`.
    let drawn = LEVELS.iter().map(|rooms| match *rooms {
        ["main", ..] => "main".to_owned(),
        [room] => (*room).to_owned(),
        rooms => format!("{{{}}}", rooms.join(", ")),
    });
    let drawn = drawn.collect::<Vec<_>>().join(" → ");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(&text).contains(&words(&drawn)), "ARCHITECTURE.md does not say: {drawn}");
}

// The checks themselves, on code that must not pass.

fn wrong(path: &str, text: &str) -> usize {
    let source = Source::new(path, text);
    violations(&source).len() + strangers(&source).len()
}

#[test]
fn a_name_above_is_found_however_it_is_written() {
    for text in [
        "use crate::engine::Engine;",
        "use crate::{error::Error, engine::Engine};",
        "use crate::{error::Error, engine};",
        "fn f() { crate::engine::g() }",
        "fn f() -> Vec<crate::engine::Engine> { vec![] }",
        "use super::engine;",
        "mod inner { use super::super::engine; }",
        "fn f() { select! { a = crate::engine::g() => {} } }",
    ] {
        assert_eq!(wrong("src/lease.rs", text), 1, "{text}");
    }
    assert_eq!(wrong("src/mvcc/tree.rs", "use super::super::server::Server;"), 1);
    assert_eq!(wrong("src/mvcc/mod.rs", "use super::server::Server;"), 1);
}

#[test]
fn a_name_below_or_within_passes() {
    for text in [
        "use crate::error::Error;",
        "use crate::lease::expiry;",
        "use super::error::Error;",
        "// use crate::engine::Engine;",
        "//! [`crate::engine::Engine`]",
        "const TEXT: &str = \"use crate::engine::Engine\";",
        "mod inner { use super::engine; }",
        "pub(super) fn f() {}",
        "use crate::error::{Error, engine::x};",
    ] {
        assert_eq!(wrong("src/lease.rs", text), 0, "{text}");
    }
    assert_eq!(wrong("src/mvcc/tree.rs", "use super::server::Server;"), 0);
}

#[test]
fn neighbours_absences_and_strangers_are_found() {
    assert_eq!(wrong("src/state/txn.rs", "use crate::raft::Node;"), 1);
    assert_eq!(wrong("src/api/kv.rs", "use crate::raft::Node;"), 1);
    assert_eq!(wrong("src/api/kv.rs", "use crate::storage::Storage;"), 1);
    assert_eq!(wrong("src/runtime/pins.rs", "use sled::Db;"), 1);
    assert_eq!(wrong("src/runtime/pins.rs", "use raft::RawNode;"), 1);
    assert_eq!(wrong("src/runtime/pins.rs", "use crate::raft; fn f() { raft::g() }"), 0);
    assert_eq!(wrong("src/storage/sled_storage.rs", "use sled::Db;"), 0);
    assert_eq!(wrong("src/cellar/wine.rs", ""), 1, "a room without a level");
}
