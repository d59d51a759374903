//! Rules of the house that no compiler knows: what the pure rooms must not name, how a
//! file begins, what is not left lying about, and that documents speak of what exists.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod sources;

use std::collections::BTreeSet;
use std::fs;

use sources::{Source, below, library, root};

/// Rooms that are functions of what they are handed, on every member alike.
const PURE: &[&str] = &["mvcc", "lease", "state", "raft"];

/// Names a pure room has no use for.
const IMPURE: &[(&str, &str)] = &[
    ("Instant", "time is handed in"),
    ("SystemTime", "time is handed in"),
    ("thread", "threads are the runtime's"),
    ("Mutex", "whoever owns a value locks it"),
    ("RwLock", "whoever owns a value locks it"),
    ("parking_lot", "whoever owns a value locks it"),
    ("tokio", "what waits is the runtime's"),
    ("async", "what waits is the runtime's"),
    ("await", "what waits is the runtime's"),
    ("getrandom", "random numbers are made before a command is proposed"),
    ("rand", "random numbers are made before a command is proposed"),
    ("fs", "files are of `log` and `storage`"),
    ("File", "files are of `log` and `storage`"),
    ("net", "sockets are the API's"),
    ("env", "the environment is read by `config`"),
    ("HashMap", "its order is random: take a BTreeMap"),
    ("HashSet", "its order is random: take a BTreeSet"),
];

/// Where one of these names is harmless, and why.
const HARMLESS: &[(&str, &str, &str)] = &[(
    "src/mvcc/watch/index.rs",
    "HashMap",
    "looked up by key for every change, and never iterated",
)];

/// Documents in which paths, commands, flags and constants are looked up.
const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/chaos.md",
    "docs/compatibility.md",
    "docs/flags.md",
    "docs/history.md",
];

/// A table of mistakes of others, each with the tests that show it is not made here.
const HISTORY: &str = "docs/history.md";

/// Impure names outside tests.
fn impurities(source: &Source) -> Vec<String> {
    if !PURE.contains(&source.room()) {
        return Vec::new();
    }
    let harmless = |name: &str| HARMLESS.iter().any(|(p, n, _)| (*p, *n) == (&source.path, name));
    let words = source.words();
    let words = words.iter().filter(|word| !word.in_test && !harmless(&word.text));
    let found = words.filter_map(|word| {
        let (name, why) = IMPURE.iter().find(|(name, _)| *name == word.text)?;
        Some(format!("{}:{}: `{name}` in a pure room: {why}", source.path, word.line))
    });
    found.collect()
}

/// What was meant to be cleaned up, and is not.
fn litter(source: &Source) -> Vec<String> {
    // In two pieces, so that this file is not found.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let mut found = Vec::new();
    for (at, line) in source.text.lines().enumerate() {
        let is_mark = |word: &str| marks.contains(&word);
        for mark in line.split(|c: char| !c.is_alphanumeric()).filter(|word| is_mark(word)) {
            found.push(format!("{}:{}: {mark}: do it, or file it", source.path, at + 1));
        }
    }
    if !source.path.starts_with("src/") {
        return found;
    }
    let words = source.words();
    for pair in words.windows(2).filter(|pair| pair.iter().all(|word| !word.in_test)) {
        let [a, b] = pair else { continue };
        let what = match (a.text.as_str(), b.text.as_str()) {
            (".", "unwrap") => "say what to do without a value",
            ("dbg" | "todo" | "unimplemented", "!") => "not meant to stay",
            _ => continue,
        };
        found.push(format!("{}:{}: `{}{}`: {what}", source.path, a.line, a.text, b.text));
    }
    found
}

/// A file that does not begin by saying what it is for.
fn without_essay(source: &Source) -> Option<String> {
    let is_unit_test = source.path.starts_with("src/") && source.is_test();
    let missing = !is_unit_test && !source.text.starts_with("//! ");
    missing.then(|| format!("{}: begins without an essay (`//!`)", source.path))
}

/// What a document has between backticks on one line, and all of its code blocks.
fn quoted(text: &str) -> (Vec<&str>, Vec<&str>) {
    let (mut spans, mut blocks) = (Vec::new(), Vec::new());
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            blocks.push(line.trim());
        } else {
            spans.extend(line.split('`').skip(1).step_by(2));
        }
    }
    (spans, blocks)
}

/// Files that a document names and that are not there.
fn dead_paths(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let beside = root().join(name);
    for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        let file = target.split('#').next().unwrap();
        let external = target.contains("://") || file.is_empty();
        if !external && !beside.with_file_name(file).exists() {
            found.push(format!("{name}: the link to {target} leads nowhere"));
        }
    }
    let directories =
        ["src/", "tests/", "docs/", "config/", "proto/", "bench/", "examples/", ".ci/"];
    for path in quoted(text).0 {
        let is_path = directories.iter().any(|directory| path.starts_with(directory))
            && path.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
        if is_path && !root().join(path).exists() {
            found.push(format!("{name}: there is no {path}"));
        }
    }
    found
}

/// Commands that a document names and that would not run.
fn dead_commands(name: &str, text: &str, sources: &[Source], recipes: &str) -> Vec<String> {
    let (spans, blocks) = quoted(text);
    let mut found = Vec::new();
    for command in spans.into_iter().chain(blocks) {
        let without_comment = command.split(" #").next().unwrap();
        let words: Vec<&str> =
            without_comment.split_whitespace().skip_while(|word| word.contains('=')).collect();
        let after = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1).copied();
        let mut complain = |what: String| found.push(format!("{name}: `{command}`: {what}"));
        match words.as_slice() {
            ["just", recipe, ..] => {
                let there = recipes.lines().any(|line| {
                    line.strip_prefix(recipe).is_some_and(|rest| rest.starts_with([':', ' ']))
                });
                if !there {
                    complain(format!("the justfile has no recipe {recipe}"));
                }
            }
            ["cargo", "test" | "run", ..] => {
                if let Some(example) = after("--example") {
                    let path = format!("examples/{example}.rs");
                    if !sources.iter().any(|source| source.path == path) {
                        complain(format!("there is no {path}"));
                    }
                }
                let filter_follows = |flag: &str| {
                    let mut rest = words.iter().skip_while(|word| **word != flag).skip(1);
                    if flag == "--test" {
                        rest.next();
                    }
                    rest.copied().find(|word| !word.starts_with('-')).map(str::to_owned)
                };
                let (files, filter): (Vec<&Source>, _) = if let Some(test) = after("--test") {
                    let file = format!("tests/{test}.rs");
                    let directory = format!("tests/{test}/");
                    let of_test = |path: &str| path == file || path.starts_with(&directory);
                    let files = sources.iter().filter(|source| of_test(&source.path)).collect();
                    (files, filter_follows("--test"))
                } else if words.contains(&"--lib") {
                    let files = sources.iter().filter(|source| source.path.starts_with("src/"));
                    (files.collect(), filter_follows("--lib"))
                } else {
                    continue;
                };
                if files.is_empty() {
                    complain("there is no such test".to_owned());
                } else if let Some(filter) = filter
                    && !files.iter().any(|source| has_test(source, &filter))
                {
                    complain(format!("no test is called {filter}"));
                }
            }
            _ => {}
        }
    }
    found
}

/// Whether a filter of `cargo test` finds something in the file.
fn has_test(source: &Source, filter: &str) -> bool {
    let module = source.path.trim_end_matches(".rs").replace('/', "::");
    let last = filter.rsplit("::").next().unwrap_or(filter);
    let function = |line: &str| line.split("fn ").nth(1).is_some_and(|rest| rest.contains(last));
    module.contains(filter) || source.text.lines().any(function)
}

/// What is wrong with the table of mistakes: rows without a test or a reason, tests that do
/// not exist (`file.rs::function`), a number that is there twice, and counts that are not the
/// table's.
fn unfounded(name: &str, text: &str, sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    let (mut by_test, mut by_structure, mut by_nothing) = (0, 0, 0);
    let mut seen = BTreeSet::new();
    for row in text.lines().filter(|line| line.starts_with("| [")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [number, _, _, shown] = cells[..] else {
            found.push(format!("{name}: not four columns: {row}"));
            continue;
        };
        if !seen.insert(number) {
            found.push(format!("{name}: {number} is there twice"));
        }
        let (spans, _) = quoted(shown);
        let names_a_test = spans.iter().any(|span| span.contains(".rs::"));
        if shown.starts_with("cannot occur: ") {
            by_structure += 1;
            if !spans.iter().any(|span| span.starts_with("src/")) {
                found.push(format!("{name}: {number} names no file in which it cannot occur"));
            }
        } else if shown.starts_with("not shown: ") {
            by_nothing += 1;
        } else if names_a_test {
            by_test += 1;
        } else {
            found.push(format!("{name}: {number} has neither a test nor a reason"));
        }
    }
    for span in quoted(text).0 {
        let Some((file, function)) =
            span.split_once("::").filter(|(file, _)| file.ends_with(".rs"))
        else {
            continue;
        };
        if !sources.iter().any(|source| source.path == file && is_test_of(source, function)) {
            found.push(format!("{name}: there is no test {span}"));
        }
    }
    let counts = format!(
        "{by_test} are shown by tests, {by_structure} cannot occur, {by_nothing} are not shown"
    );
    if !text.contains(&counts) {
        found.push(format!("{name}: it does not say that {counts}"));
    }
    found
}

/// Whether a function of exactly this name is a test of the file.
fn is_test_of(source: &Source, function: &str) -> bool {
    let declaration = format!("fn {function}(");
    let mut is_next = false;
    for line in source.text.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_next = true;
        } else if line.contains("fn ") && !line.starts_with("//") {
            if is_next && line.contains(&declaration) {
                return true;
            }
            is_next = false;
        }
    }
    false
}

/// Flags and constants that a document names and that nothing else knows.
fn dead_names(name: &str, text: &str, flags: &str, known: &BTreeSet<String>) -> Vec<String> {
    let mut found = Vec::new();
    for span in quoted(text).0 {
        let flag = span.split(['=', ' ']).next().unwrap();
        let is_flag = flag.len() > 3
            && flag.starts_with("--")
            && flag.chars().all(|c| c.is_ascii_lowercase() || c == '-');
        let is_flag = is_flag && !["--help", "--version"].contains(&flag);
        if is_flag && !flags.contains(&format!("`{flag}`")) {
            found.push(format!("{name}: there is no flag {flag}"));
        }
        let last = span.rsplit("::").next().unwrap();
        let is_constant = last.contains('_')
            && last.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
            && !last.starts_with("ETCD_")
            && !last.starts_with("KVORUM_");
        if is_constant && !known.contains(last) {
            found.push(format!("{name}: there is no constant {last}"));
        }
    }
    found
}

fn none(found: &[String]) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

fn everything() -> Vec<Source> {
    let mut sources = library();
    for directory in ["tests", "bench/src", "examples"] {
        if root().join(directory).exists() {
            sources.extend(below(directory));
        }
    }
    sources
}

#[test]
fn pure_rooms_have_no_clock_thread_randomness_file_or_socket() {
    none(&library().iter().flat_map(impurities).collect::<Vec<_>>());
}

#[test]
fn exceptions_are_needed() {
    for (path, name, _) in HARMLESS {
        let source = Source::new(path, &document(path));
        let used = source.words().iter().any(|word| word.text == *name);
        assert!(used, "{path} needs no exception for {name} any more");
    }
}

#[test]
fn nothing_is_left_lying_about() {
    none(&everything().iter().flat_map(litter).collect::<Vec<_>>());
}

#[test]
fn every_file_begins_by_saying_what_it_is_for() {
    none(&everything().iter().filter_map(without_essay).collect::<Vec<_>>());
}

#[test]
fn documents_name_files_that_exist() {
    let found = DOCUMENTS.iter().flat_map(|name| dead_paths(name, &document(name)));
    none(&found.collect::<Vec<_>>());
}

#[test]
fn documents_name_commands_that_run() {
    let (sources, recipes) = (everything(), document("justfile"));
    let found =
        DOCUMENTS.iter().flat_map(|name| dead_commands(name, &document(name), &sources, &recipes));
    none(&found.collect::<Vec<_>>());
}

#[test]
fn every_mistake_in_the_history_has_a_test_or_a_reason() {
    none(&unfounded(HISTORY, &document(HISTORY), &everything()));
}

#[test]
fn documents_name_flags_and_constants_that_exist() {
    let known: BTreeSet<String> =
        library().iter().flat_map(Source::words).map(|word| word.text).collect();
    let flags = document("docs/flags.md");
    // How to contribute is told in other programs' flags, docs/flags.md is made from the code,
    // and etcd's names are not ours.
    let of_kvorum = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"];
    let found = of_kvorum.iter().flat_map(|name| dead_names(name, &document(name), &flags, &known));
    none(&found.collect::<Vec<_>>());
}

#[test]
fn the_readmes_commands_are_what_ci_runs() {
    let (readme, ci) = (document("README.md"), document(".ci/run"));
    let (_, commands) = quoted(&readme);
    for command in ["cargo run --release", "cargo test --workspace"] {
        assert!(
            commands.iter().any(|line| line.split('#').next().unwrap().trim() == command),
            "README.md does not give the command `{command}`"
        );
    }
    assert!(ci.lines().any(|line| line.trim() == "cargo test --workspace"), ".ci/run runs others");
}

// The checks themselves, on what must not pass.

#[test]
fn impurities_are_found_outside_tests_and_comments() {
    let count = |path, text| impurities(&Source::new(path, text)).len();
    for text in [
        "use std::time::Instant;",
        "use std::{fs, io};",
        "fn f() { std::thread::sleep(D) }",
        "async fn f() {}",
        "struct S { map: std::collections::HashMap<u8, u8> }",
    ] {
        assert_eq!(count("src/mvcc/tree.rs", text), 1, "{text}");
        assert_eq!(count("src/runtime/pins.rs", text), 0, "{text}");
    }
    assert_eq!(count("src/state/txn.rs", "// an Instant\n/// a thread\nfn f() {}"), 0);
    let test = "#[cfg(test)] mod tests { use std::fs; } use std::net::IpAddr;";
    assert_eq!(count("src/lease.rs", test), 1, "only the one behind the tests");
    assert_eq!(count("src/mvcc/watch/index.rs", "use std::collections::HashMap;"), 0);
}

#[test]
fn litter_is_found() {
    let count = |text: &str| litter(&Source::new("src/lease.rs", text)).len();
    assert_eq!(count(concat!("// TO", "DO: later")), 1);
    assert_eq!(count(concat!("fn f() {} // FIX", "ME")), 1);
    assert_eq!(count("fn f() { x.unwrap() }"), 1);
    assert_eq!(count("fn f() { dbg!(x) }"), 1);
    assert_eq!(count("fn f() { x.unwrap_or(1); \"x.unwrap()\"; }"), 0);
    assert_eq!(count("#[cfg(test)] mod tests { fn f() { x.unwrap() } }"), 0);
    assert_eq!(count("#[test] fn f() { x.unwrap() } fn g() { x.unwrap() }"), 1);
}

#[test]
fn a_missing_essay_is_found() {
    let missing = |path, text| without_essay(&Source::new(path, text)).is_some();
    assert!(missing("src/lease.rs", "use std::io;\n//! late"));
    assert!(missing("tests/proto.rs", ""));
    assert!(!missing("src/lease.rs", "//! Leases."));
    assert!(!missing("src/lease/tests.rs", "use super::*;"));
}

#[test]
fn dead_documents_are_found() {
    let paths = |text| dead_paths("README.md", text).len();
    assert_eq!(paths("[a](docs/flags.md) [b](docs/none.md#x) [c](https://x.y/z) [d](#here)"), 1);
    assert_eq!(paths("`src/lease.rs`, `src/leash.rs`, `src/a or b`"), 1);

    let sources = [
        Source::new("tests/crash.rs", "#[test]\nfn kill_nine() {}"),
        Source::new("src/lease/tests.rs", "fn never_early() {}"),
    ];
    let commands = |text| dead_commands("README.md", text, &sources, "check: fmt\nfix:\n").len();
    assert_eq!(commands("```\njust check\nKVORUM_SEED=1 cargo test --test crash kill\n```"), 0);
    assert_eq!(commands("`cargo test --lib lease` and `cargo test --lib never_early`"), 0);
    assert_eq!(commands("`just checks`"), 1);
    assert_eq!(commands("`cargo test --test smash`"), 1);
    assert_eq!(commands("`cargo test --test crash drown`"), 1);
    assert_eq!(commands("`cargo test --lib leash`"), 1);
    assert_eq!(commands("`cargo run --example embed`"), 1);

    let known = BTreeSet::from(["PIN_MAX".to_owned()]);
    let names = |text| dead_names("README.md", text, "| `--name` |", &known).len();
    assert_eq!(names("`--name`, `--name=x`, `PIN_MAX`, `pins::PIN_MAX`"), 0);
    assert_eq!(names("`--nome`, `PIN_MIN`"), 2);
}

#[test]
fn unfounded_history_is_found() {
    let tests = "#[test]\nfn kept() {}\n\nfn helper() {}\n#[tokio::test]\nasync fn told() {}";
    let sources = [Source::new("src/lease/tests.rs", tests)];
    let wrong = |counts: &str, rows: &[&str]| {
        let rows: Vec<String> = rows
            .iter()
            .enumerate()
            .map(|(at, row)| format!("| [{at}](x) | a | b | {row} |"))
            .collect();
        unfounded(HISTORY, &format!("{counts}.\n{}", rows.join("\n")), &sources).len()
    };
    let counts = "1 are shown by tests, 1 cannot occur, 1 are not shown";
    let test = "`src/lease/tests.rs::kept`, `src/lease/tests.rs::told`";
    let rows = [test, "cannot occur: see `src/lib.rs`", "not shown: too hard"];
    assert_eq!(wrong(counts, &rows), 0);
    assert_eq!(wrong("", &rows), 1);
    assert_eq!(wrong(counts, &["", rows[0], rows[1], rows[2]]), 1);
    assert_eq!(wrong(counts, &[test, "cannot occur: because", rows[2]]), 1);
    for name in ["helper", "kep", "gone"] {
        let row = format!("`src/lease/tests.rs::{name}`");
        assert_eq!(wrong(counts, &[&row, rows[1], rows[2]]), 1, "{name}");
    }
    assert_eq!(wrong(counts, &["`src/lease.rs::kept`", rows[1], rows[2]]), 1);
    let twice = "| [1](x) | a | b | not shown: x |\n| [1](x) | a | b | not shown: x |";
    let said = "0 are shown by tests, 0 cannot occur, 2 are not shown";
    assert_eq!(unfounded(HISTORY, &format!("{said}\n{twice}"), &sources).len(), 1);
}
