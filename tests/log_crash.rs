//! The raft log against `kill -9`: a process that writes one is killed at some moment,
//! again and again, and what it had reported as synced must be there each time.
//!
//! The writer is this test binary, started again with [`WRITER_DIR`] set. That the page
//! cache survives makes this weaker than a power cut; what it adds to the tests beside the
//! code is a real process, real threads and kernel calls cut short in the middle.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use kvorum::log::{Entry, HardState, Identity, Log, LogError, LogStore, Mark, Options, Recovered};

const WRITER_DIR: &str = "KVORUM_TEST_LOG_CRASH_DIR";
const ROUNDS: u64 = 25;

fn open(dir: &Path) -> Result<(Log, Recovered), LogError> {
    let identity = Identity { cluster_id: 1, member_id: 2 };
    let options =
        Options { dir: dir.to_owned(), segment_bytes: 64 << 10, fsync: true, identity, reaches: 0 };
    Log::open(options)
}

/// The entry everybody expects at `index`: between 0 and 4 KiB, told by the index alone.
fn entry(index: u64) -> Entry {
    let size = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    Entry {
        index,
        term: 1,
        kind: 0,
        data: Bytes::from(vec![index as u8; size as usize]),
        context: Bytes::new(),
    }
}

/// Writes until it is killed; tells `synced <last> <start>` after each sync.
#[test]
#[ignore = "started by `killed_at_any_moment`"]
fn writer() {
    let Some(dir) = std::env::var_os(WRITER_DIR) else { return };
    let (mut log, found) = open(Path::new(&dir)).unwrap();
    let mut start = found.start.index;
    let mut last = start + found.entries.len() as u64;
    let mut out = std::io::stdout();
    loop {
        for _ in 0..=last % 3 {
            let batch: Vec<Entry> = (last + 1..=last + 1 + last % 7).map(entry).collect();
            last += batch.len() as u64;
            log.append(&batch, Some(HardState { term: 1, vote: last, commit: last })).unwrap();
        }
        log.sync().unwrap();
        if last > start + 300 {
            start = last - 100;
            log.truncate_prefix(Mark { index: start, term: 1 }).unwrap();
        }
        writeln!(out, "synced {last} {start}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut seed = getrandom::u64().unwrap();
    println!("seed {seed}");
    let (mut last, mut start) = (0, 0);
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--ignored", "--nocapture"])
            .env(WRITER_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut left = 1 + (seed >> 33) % 60;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut heed = |line: String| {
            // The test harness has lines of its own, and its first may share one of ours.
            let Some((_, numbers)) = line.split_once("synced ") else { return false };
            let Some((l, s)) = numbers.split_once(' ') else { return false };
            let (Ok(l), Ok(s)) = (l.parse::<u64>(), s.parse::<u64>()) else { return false };
            (last, start) = (l, s);
            true
        };
        while left > 0 {
            let line = lines.next().expect("the writer stopped by itself").unwrap();
            left -= u64::from(heed(line));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What was said between the last line read and the kill counts as well, if the
        // line is whole.
        while let Some(Ok(line)) = lines.next() {
            heed(line);
        }

        let (_log, found) = open(dir.path()).unwrap();
        let recovered = found.start.index + found.entries.len() as u64;
        assert!(recovered >= last, "round {round}: {recovered} < {last}, which was synced");
        assert!(found.start.index >= start, "round {round}");
        assert_eq!(found.hard_state.vote, recovered, "round {round}");
        for (got, index) in found.entries.iter().zip(found.start.index + 1..) {
            assert_eq!(*got, entry(index), "round {round}");
        }
        (last, start) = (recovered, found.start.index);
    }
    assert!(last > ROUNDS);
}
