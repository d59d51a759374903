//! Seeds of damage to the directory of a single member.
//!
//! ```text
//! a server writes, and stops ──▶ a copy of its directory ──▶ mutated ──▶ started
//!                                                refused, naming what it is about ◀─┤
//!                                    or everything that was acknowledged is there ◀─┘
//! ```
//!
//! Two directories are mutated: one whose log reaches back to its beginning, from which a lost
//! checkpoint can be built again, and one whose log was truncated, where the checkpoint alone has the
//! rest. The servers stopped in an orderly way, so that everything in the log is known to have
//! been synced; what a kill leaves in doubt is `tests/crash`'s.
//!
//! When only `CURRENT` is damaged, the checkpoint is served that it named.
//!
//! A start never panics: sled does, on damage it did not expect, and that is caught.

use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvorum::pb::etcdserverpb as pb;
use kvorum::{Config, Server};
use tempfile::TempDir;

use crate::common::rng::Rng;
use crate::common::server;
use crate::rig::{checkpoint, config, copy_dir, everything, hash, named, put, soon};

/// Seeds of an ordinary run.
const SEEDS: Range<u64> = 0..200;
/// Of so many seeds one is started with the real binary as well.
const WITH_BINARY: u64 = 50;

/// `KVORUM_MUTATION_SEEDS=start..end`.
fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("KVORUM_MUTATION_SEEDS") else { return SEEDS };
    let range = text
        .split_once("..")
        .and_then(|(start, end)| Some(start.trim().parse().ok()?..end.trim().parse().ok()?));
    range.unwrap_or_else(|| panic!("KVORUM_MUTATION_SEEDS is {text:?}, not like 0..200"))
}

/// What a server left behind, and what was in it.
struct Remains {
    dir: TempDir,
    truncates: bool,
    found: pb::RangeResponse,
    hash: (u32, i64, i64),
    leases: Vec<i64>,
}

fn configured(data_dir: &Path, truncates: bool) -> Config {
    let config = config(data_dir);
    if truncates {
        Config { snapshot_count: 20, snapshot_catchup_entries: 5, ..config }
    } else {
        config
    }
}

async fn leases(server: &Server) -> Vec<i64> {
    let answer = server.engine().lease_leases(pb::LeaseLeasesRequest {}).await.unwrap();
    let mut ids: Vec<i64> = answer.leases.iter().map(|lease| lease.id).collect();
    ids.sort_unstable();
    ids
}

impl Remains {
    async fn of_a_server(truncates: bool) -> Remains {
        let dir = tempfile::tempdir().unwrap();
        let config = configured(&dir.path().join("data"), truncates);
        let mut before = None;
        // A second life, so that there is a checkpoint that was read and written again.
        for life in 0..2 {
            let server = soon("a start", Server::start(config.clone())).await.expect("it starts");
            for number in 0..80 {
                let value = format!("{life} {number} ").repeat(number * 4);
                put(&server, &format!("key {}", number % 50), &value).await;
            }
            // More than sled gets to see in one piece.
            put(&server, &format!("large {life}"), &"large ".repeat(20_000)).await;
            let grant = pb::LeaseGrantRequest { ttl: 3600, id: 7 + life };
            server.engine().lease_grant(grant).await.unwrap();
            let delete = pb::DeleteRangeRequest { key: "key 9".into(), ..Default::default() };
            let revision = server.engine().delete_range(delete).await.unwrap();
            let revision = revision.header.unwrap().revision - 20;
            let compaction = pb::CompactionRequest { revision, physical: true };
            server.engine().compact(compaction).await.unwrap();
            before = Some((everything(&server).await, hash(&server).await, leases(&server).await));
            soon("a shutdown", server.shutdown()).await.unwrap();
        }
        let (found, hash, leases) = before.unwrap();
        Remains { dir, truncates, found, hash, leases }
    }

    async fn assert_complete(&self, server: &Server, what: &str) {
        assert_eq!(hash(server).await, self.hash, "{what}");
        let found = everything(server).await;
        assert!(found.kvs == self.found.kvs, "{what}: the keys differ");
        assert_eq!(leases(server).await, self.leases, "{what}");
        // It goes on from there.
        let revision = put(server, "afterwards", "").await;
        assert_eq!(revision, self.hash.1 + 1, "{what}");
    }
}

/// Does some damage and says which.
fn mutate(data_dir: &Path, other: &Path, rng: &mut Rng) -> String {
    let member = data_dir.join("member");
    let (ckpt, wal) = (checkpoint(data_dir), member.join("wal"));
    let segments = files(&wal, ".log");
    let segment = segments[rng.below(segments.len())].clone();
    let in_ckpt = ["db", "conf", "synced"].map(|name| ckpt.join(name));
    // Most of the checkpoint's bytes are in `db`.
    let part = in_ckpt[rng.weighted(&[6, 1, 2])].clone();
    let file = match rng.weighted(&[5, 6, 2]) {
        0 => segment.clone(),
        1 => part,
        _ => member.join("CURRENT"),
    };
    let name = |path: &Path| path.strip_prefix(data_dir).unwrap().display().to_string();
    match rng.below(10) {
        0..4 => {
            let at = rng.next() % used(&file).max(1);
            let mask = 1 << rng.below(8);
            change(&file, at, 1, |byte| byte ^ mask);
            format!("bit {mask:#x} of byte {at} of {} is flipped", name(&file))
        }
        4 => {
            let at = rng.next() % used(&file).max(1);
            OpenOptions::new().write(true).open(&file).unwrap().set_len(at).unwrap();
            format!("{} is cut at byte {at}", name(&file))
        }
        5 => {
            let at = rng.next() % used(&file).max(1);
            let bytes = 1 + rng.next() % 5000;
            change(&file, at, bytes, |_| 0);
            format!("{bytes} bytes from {at} of {} are zeros", name(&file))
        }
        6 => {
            let gone = match rng.below(5) {
                0 => ckpt,
                1 => wal,
                _ => file,
            };
            let removed =
                if gone.is_dir() { fs::remove_dir_all(&gone) } else { fs::remove_file(&gone) };
            removed.unwrap();
            format!("{} is gone", name(&gone))
        }
        7 => {
            fs::write(&file, ["", "SQLite format 3\0", "{}\n", "ckpt-9\n"][rng.below(4)]).unwrap();
            format!("{} is another program's", name(&file))
        }
        8 => {
            // What belongs to another member, whole and intact.
            let (from, to) = match rng.below(2) {
                0 => (checkpoint(other), ckpt),
                _ => (other.join("member/wal"), wal),
            };
            fs::remove_dir_all(&to).unwrap();
            copy_dir(&from, &to);
            format!("{} is another member's", name(&to))
        }
        _ if rng.chance(50) => {
            // The format's number in the first page, with a checksum that holds.
            let mut page = fs::read(&segment).unwrap();
            page[8] = 2;
            let checksum = crc32c::crc32c(&page[..4092]).to_le_bytes();
            page[4092..4096].copy_from_slice(&checksum);
            fs::write(&segment, page).unwrap();
            format!("{} is of format 2", name(&segment))
        }
        _ => {
            let text = "ckpt-1\nformat 2\n";
            let checksum = crc32c::crc32c(text.as_bytes());
            let current = member.join("CURRENT");
            fs::write(&current, format!("{text}crc32c {checksum:08x}\n")).unwrap();
            "member/CURRENT is of format 2".to_owned()
        }
    }
}

fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.to_str().unwrap().ends_with(suffix));
    found.sort();
    found
}

/// How much of a file is in use: the rest was reserved.
fn used(path: &Path) -> u64 {
    fs::read(path).unwrap().iter().rposition(|&byte| byte != 0).map_or(0, |last| last as u64 + 1)
}

fn change(path: &Path, at: u64, bytes: u64, change: impl Fn(u8) -> u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len().saturating_sub(at).min(bytes);
    let mut piece = vec![0; len as usize];
    file.read_exact_at(&mut piece, at).unwrap();
    piece.iter_mut().for_each(|byte| *byte = change(*byte));
    file.write_all_at(&piece, at).unwrap();
}

/// Every refusal names a file below the data directory and says what to do.
fn assert_helpful(error: &str, data_dir: &Path, what: &str) {
    assert!(error.contains(data_dir.to_str().unwrap()), "{what}: no file is named in {error:?}");
    let advice = ["restore", "start the version", "correct --data-dir", "put it back", "Put back"];
    assert!(advice.iter().any(|words| error.contains(words)), "{what}: no advice in {error:?}");
    assert!(!error.contains("panicked at"), "{what}: {error:?}");
}

/// The same as a process: it says why, ends with status 1, and no panic but sled's is seen.
fn assert_refused_by_the_binary(data_dir: &Path, error: &str, what: &str) {
    let output = Command::new(server::kvorum())
        .arg("--data-dir")
        .arg(data_dir)
        .args(["--listen-client-urls", "http://127.0.0.1:0"])
        .args(["--advertise-client-urls", "http://127.0.0.1:0"])
        .args(["--listen-peer-urls", "http://127.0.0.1:0"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{what}: {said}");
    let panics = said.lines().filter(|line| line.contains("panicked at"));
    assert!(panics.into_iter().all(|line| line.contains("sled")), "{what}: {said}");
    let first = error.split(['(', ':', '"']).next().unwrap();
    assert!(said.contains(first), "{what}: {first:?} is not in {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_refused_by_name_or_loses_nothing() {
    let remains = [Remains::of_a_server(false).await, Remains::of_a_server(true).await];
    let (mut refused, mut unharmed, mut healed) = (0, 0, 0);
    for seed in seeds() {
        let mut rng = Rng::new(seed);
        let which = rng.below(2);
        let (whole, other) = (&remains[which], &remains[1 - which]);
        let copy = tempfile::tempdir().unwrap();
        let data_dir = copy.path().join("data");
        copy_dir(&whole.dir.path().join("data"), &data_dir);
        let what = mutate(&data_dir, &other.dir.path().join("data"), &mut rng);
        let what = format!(
            "KVORUM_MUTATION_SEEDS={seed}..{}: {what} (truncated: {})",
            seed + 1,
            whole.truncates
        );
        let config = configured(&data_dir, whole.truncates);
        // A name of a checkpoint that is not there is no nonsense; that of a later version is none, either.
        let is_nonsense = what.contains("member/CURRENT")
            && !what.contains("format 2")
            && fs::read(data_dir.join("member/CURRENT")).is_ok_and(|text| text != b"ckpt-9\n")
            || what.contains("member/CURRENT is gone");
        let starting = tokio::spawn(Server::start(config));
        match soon(&what, starting).await.unwrap_or_else(|error| panic!("{what}: {error}")) {
            Ok(server) => {
                whole.assert_complete(&server, &what).await;
                soon("a shutdown", server.shutdown()).await.unwrap();
                let aside = named(&data_dir, "damaged-").len();
                assert!(aside == 0 || !is_nonsense, "{what}: the checkpoint was intact");
                if aside == 0 {
                    unharmed += 1
                } else {
                    healed += 1
                }
                eprintln!("{what}: served, {aside} set aside");
            }
            Err(error) => {
                let error = error.to_string();
                eprintln!("{what}: {error}");
                assert!(!is_nonsense, "{what}: the checkpoint was intact");
                assert_helpful(&error, &data_dir, &what);
                if seed % WITH_BINARY == 0 {
                    assert_refused_by_the_binary(&data_dir, &error, &what);
                }
                refused += 1;
            }
        }
    }
    eprintln!("{refused} refused, {healed} healed, {unharmed} without harm");
    assert!(seeds() != SEEDS || (refused > 50 && healed > 5 && unharmed > 5));
}
