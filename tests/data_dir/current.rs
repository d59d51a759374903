//! A single member whose `CURRENT` is damaged or missing: the one intact checkpoint that the log goes
//! on from is served; what cannot be told is refused, and never an old state served.

use std::fs;
use std::path::{Path, PathBuf};

use kvorum::log::{Identity, Log, Options, Recovered};
use kvorum::runtime::recover::{self, Bootstrap, Place};
use kvorum::storage::{Batch, DiskGenerations, Generations as _, Table};
use kvorum::{Config, Server};
use tempfile::TempDir;

use crate::rig::{checkpoint, config, copy_dir, everything, files_below, hash, named, put, soon};

/// In which the log is truncated, most often in the second.
const LIVES_MAX: u32 = 20;
/// Of records, at the log's end: with what the last checkpoint lacks, and more.
const TORN_BYTES: usize = 6000;
/// Between two places where it is torn.
const TORN_STEP_BYTES: usize = 397;

/// A stopped member, whose log was truncated.
struct Member {
    dir: TempDir,
    /// Its checkpoint.
    counts: PathBuf,
    /// As it was long before, when the log still reached back to it.
    old: PathBuf,
    hash: (u32, i64, i64),
}

/// A way in which nothing says any more which checkpoint counts.
type Loss = (&'static str, fn(&Path));

const LOSSES: &[Loss] = &[
    // It may be gone already.
    ("gone", |current| fs::write(current, "").and_then(|()| fs::remove_file(current)).unwrap()),
    ("nonsense", |current| fs::write(current, [0xff; 30]).unwrap()),
    ("empty", |current| fs::write(current, "").unwrap()),
];

fn truncated(data_dir: &Path) -> Config {
    Config { snapshot_count: 20, snapshot_catchup_entries: 5, ..config(data_dir) }
}

impl Member {
    async fn stopped() -> Member {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let old = dir.path().join("old");
        let (mut of_all, mut of_old) = ((0, 0, 0), u64::MAX);
        // A stop may come before the log is truncated.
        for life in 0.. {
            let server = start(&data_dir).await.expect("it starts");
            for number in 0..90 {
                put(&server, &format!("key {}", number % 30), &format!("{life} {number}")).await;
            }
            of_all = hash(&server).await;
            soon("a shutdown", server.shutdown()).await.unwrap();
            if life == 0 {
                copy_dir(&checkpoint(&data_dir), &old);
                of_old = log(&data_dir).entries.last().unwrap().index;
            } else if log(&data_dir).start.index > of_old {
                break;
            }
            assert!(life < LIVES_MAX, "the log is never truncated");
        }
        Member { counts: checkpoint(&data_dir), dir, old, hash: of_all }
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn current(&self) -> PathBuf {
        self.data_dir().join("member/CURRENT")
    }

    /// The name of the checkpoint after the one that counts.
    fn next(&self) -> PathBuf {
        let name = self.counts.file_name().unwrap().to_str().unwrap();
        let number: u64 = name.strip_prefix("ckpt-").unwrap().parse().unwrap();
        self.counts.with_file_name(format!("ckpt-{}", number + 1))
    }

    async fn assert_served(&self, what: &str) {
        let server =
            start(&self.data_dir()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(hash(&server).await, self.hash, "{what}");
        assert_eq!(everything(&server).await.count, 30, "{what}");
        soon("a shutdown", server.shutdown()).await.unwrap();
        assert_eq!(named(&self.data_dir(), "damaged-").len(), 0, "{what}");
        assert_eq!(checkpoint(&self.data_dir()), self.counts, "{what}");
    }

    async fn assert_refused(&self, words: &[&str], what: &str) {
        let there = named(&self.data_dir(), "ckpt-");
        let error = start(&self.data_dir()).await.err();
        let error = error.unwrap_or_else(|| panic!("{what}: it must not start"));
        for words in words {
            assert!(error.contains(words), "{what}: {words:?} is not in {error}");
        }
        assert_eq!(named(&self.data_dir(), "ckpt-"), there, "{what}: nothing is removed");
    }
}

fn log(data_dir: &Path) -> Recovered {
    let options = Options {
        dir: data_dir.join("member/wal"),
        segment_bytes: 1 << 20,
        fsync: false,
        identity: Identity::default(),
        reaches: 0,
    };
    Log::open(options).unwrap().1
}

async fn start(data_dir: &Path) -> Result<Server, String> {
    let started = soon("a start", Server::start(truncated(data_dir))).await;
    started.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_checkpoint_is_named_again() {
    let member = Member::stopped().await;
    for (what, lose) in LOSSES {
        lose(&member.current());
        member.assert_served(what).await;
        // Beside a copy that somebody keeps there, whose name is none of a checkpoint.
        copy_dir(&member.old, &member.counts.with_extension("bak"));
        lose(&member.current());
        member.assert_served(what).await;
        // Beside one that was begun, as a rewrite leaves it that was killed: with nothing in it yet, and with
        // some of the records.
        for records in [None, Some(7_u8)] {
            if let Some(records) = records {
                let (mut generations, _) =
                    DiskGenerations::open(&member.data_dir().join("member")).unwrap();
                let mut next = generations.begin().unwrap();
                let mut batch = Batch::new();
                for number in 0..records {
                    batch.put(Table::Mvcc, vec![number; 16], vec![0; 100]);
                }
                next.write(batch).unwrap();
            } else {
                fs::create_dir(member.next()).unwrap();
            }
            lose(&member.current());
            member.assert_served(&format!("{what}, {records:?} records of another")).await;
            assert!(!member.next().exists());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_the_operator_names_one() {
    let member = Member::stopped().await;
    let of_counts = member.counts.file_name().unwrap().to_str().unwrap().to_owned();
    let of_next = member.next().file_name().unwrap().to_str().unwrap().to_owned();
    let current = member.current();
    let echo = format!("echo {of_counts} > {}", current.display());
    for (what, lose) in LOSSES {
        // One that goes less far, and one that cannot be read: each may be what CURRENT named.
        copy_dir(&member.old, &member.next());
        for is_damaged in [false, true] {
            if is_damaged {
                fs::write(member.next().join("db"), "not what it was").unwrap();
            }
            lose(&current);
            let what = format!("{what}, damaged: {is_damaged}");
            for _ in 0..2 {
                member.assert_refused(&[&of_counts, &of_next, &echo, "copy"], &what).await;
            }
        }
        fs::write(&current, format!("{of_counts}\n")).unwrap();
        member.assert_served(what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_or_damaged_checkpoint_is_not_named() {
    let member = Member::stopped().await;
    let kept = member.dir.path().join("kept");
    fs::rename(&member.counts, &kept).unwrap();
    for (what, lose) in LOSSES {
        // The log does not reach back to it.
        copy_dir(&member.old, &member.counts);
        lose(&member.current());
        member.assert_refused(&["restore", "is an older one than this log's"], what).await;
        fs::write(member.counts.join("db"), "not what it was").unwrap();
        member.assert_refused(&["restore", "CURRENT"], what).await;
        fs::remove_dir_all(&member.counts).unwrap();
        member.assert_refused(&["restore", "CURRENT"], what).await;
        // Its own, put back, is.
        copy_dir(&kept, &member.counts);
        member.assert_served(what).await;
        fs::remove_dir_all(&member.counts).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_the_log_does_not_reach_back_to_costs_nothing() {
    let member = Member::stopped().await;
    let (of_counts, of_old) = (member.counts.join("db"), member.next());
    let name_old = || {
        let name = of_old.file_name().unwrap().to_str().unwrap();
        fs::write(member.current(), format!("{name}\n")).unwrap();
    };
    let intact = fs::read(&of_counts).unwrap();
    copy_dir(&member.old, &of_old);
    for (what, lose) in LOSSES {
        fs::write(&of_counts, "not what it was").unwrap();
        lose(&member.current());
        let error = start(&member.data_dir()).await.err().expect("it must not start");
        assert!(!error.contains("echo") && error.contains("restore"), "{what}: {error}");
        // Who names it nevertheless still has the other.
        for is_damaged in [true, false] {
            if !is_damaged {
                fs::write(&of_counts, &intact).unwrap();
            }
            let there = fs::read(&of_counts).unwrap();
            name_old();
            member.assert_refused(&["is an older one than this log's"], what).await;
            assert!(fs::read(&of_counts).unwrap() == there, "{what}: it was changed");
        }
    }
    let name = member.counts.file_name().unwrap().to_str().unwrap();
    fs::write(member.current(), format!("{name}\n")).unwrap();
    member.assert_served("the one that counts").await;
    assert!(!of_old.exists(), "now it is a leftover");
}

/// Opens a member, and returns what was logged.
fn opened(data_dir: &Path) -> (Result<i64, String>, String) {
    let said = tempfile::NamedTempFile::new().unwrap();
    let file = said.reopen().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || file.try_clone().unwrap())
        .finish();
    let place = Place::Disk { data_dir: data_dir.to_owned(), wal_dir: None, fsync: false };
    let alone = Bootstrap {
        initial_cluster: vec![("default".to_owned(), vec!["http://localhost:2380".to_owned()])],
        cluster_token: "etcd-cluster".to_owned(),
        name: "default".to_owned(),
        cluster_version: "3.7.0".to_owned(),
        ..Bootstrap::default()
    };
    let result = tracing::subscriber::with_default(subscriber, || recover::open(&place, &alone));
    let result = result.map(|recovery| recovery.state.store().revision());
    (result.map_err(|error| error.to_string()), fs::read_to_string(said.path()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_cut_only_above_what_its_checkpoint_holds_and_says_so() {
    let member = Member::stopped().await;
    let is_segment = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "log");
    let files = files_below(&member.data_dir().join("member/wal"));
    let segment = files.into_iter().rfind(is_segment).unwrap();
    let intact = fs::read(&segment).unwrap();
    let end = intact.iter().rposition(|&byte| byte != 0).unwrap();
    let (mut cut, mut refused) = (0, 0);
    // The closing record alone first.
    for back in (8..TORN_BYTES).step_by(TORN_STEP_BYTES) {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&member.data_dir(), copy.path());
        let segment = copy.path().join(segment.strip_prefix(member.data_dir()).unwrap());
        let mut torn = intact.clone();
        torn[end - back..].fill(0);
        torn[end - back] = 0xa5;
        fs::write(&segment, &torn).unwrap();
        fs::remove_file(copy.path().join("member/CURRENT")).unwrap();
        let (result, said) = opened(copy.path());
        let is_left = fs::read(&segment).unwrap() == torn;
        match result {
            Ok(_) => {
                assert!(!is_left && said.contains("cut a write"), "{back} bytes: {said}");
                cut += 1;
            }
            Err(error) => {
                assert!(error.contains("CURRENT is missing"), "{back} bytes: {error}");
                assert!(is_left && !copy.path().join("member/CURRENT").exists(), "{back} bytes");
                refused += 1;
            }
        }
    }
    assert!(cut > 0 && refused > 0, "{cut} cut, {refused} refused");
}
