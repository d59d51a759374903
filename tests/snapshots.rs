//! Raft snapshots as an operator sees them: `--snapshot-count` in each of its forms leads
//! to them, the log is cut behind them and stays small, and a restart has everything and
//! reads only the rest of the log. Also the timing flags: what they lead to, and which
//! pairs are refused.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use common::ports::free_port;
use common::process::{Started, messages, strings, until};
use common::scrape::Scrape;
use common::server::kvorum;
use common::{http, judge};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::{CompactionRequest, PutRequest, RangeRequest};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

/// Clients that put at the same time.
const CLIENTS: usize = 64;

/// A directory for a server, and how it is started there.
struct Home {
    directory: TempDir,
    port: u16,
    arguments: Vec<String>,
    environment: Vec<(&'static str, &'static str)>,
}

impl Home {
    /// With etcd's flags for a single node, and these.
    fn new(flags: &[&str]) -> Home {
        let directory = TempDir::new().unwrap();
        let port = free_port();
        let url = format!("http://127.0.0.1:{port}");
        let mut arguments = strings(&[
            "--name=n1",
            "--data-dir=data",
            "--listen-client-urls",
            &url,
            "--advertise-client-urls",
            &url,
            "--listen-peer-urls=http://127.0.0.1:0",
        ]);
        arguments.extend(strings(flags));
        Home { directory, port, arguments, environment: Vec::new() }
    }

    fn start(&self) -> Started {
        let program = kvorum();
        let started = Started::with_environment(
            &program,
            self.directory.path(),
            &self.arguments,
            &self.environment,
        );
        until("/health", || {
            http::get(&self.address(), "/health").ok().filter(|answer| answer.status == 200)
        });
        started
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn kv(&self) -> KvClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address())).unwrap();
        KvClient::new(endpoint.connect_lazy())
    }

    fn scrape(&self) -> Scrape {
        Scrape::of(&self.address())
    }

    fn wal_dir(&self) -> PathBuf {
        self.directory.path().join("data/member/wal")
    }
}

fn name(number: usize) -> String {
    format!("key-{number:06}")
}

/// Puts `key-000000` and on, many at the same time.
async fn put_many(kv: &KvClient<Channel>, numbers: std::ops::Range<usize>, value: &Bytes) {
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (mut kv, value, numbers) = (kv.clone(), value.clone(), numbers.clone());
        clients.spawn(async move {
            for number in numbers.skip(client).step_by(CLIENTS) {
                let key = name(number).into();
                let put = PutRequest { key, value: value.clone(), ..PutRequest::default() };
                kv.put(put).await.unwrap();
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
}

async fn count(kv: &KvClient<Channel>) -> i64 {
    let range = RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        count_only: true,
        ..RangeRequest::default()
    };
    kv.clone().range(range).await.unwrap().into_inner().count
}

/// The log lines with this message.
fn lines(started: &Started, message: &str) -> Vec<Value> {
    messages(&started.log()).into_iter().filter(|line| line["msg"] == message).collect()
}

/// 12 000 puts with a snapshot every 5000: two snapshots, and the log is cut.
async fn two_snapshots(home: Home) {
    const PUTS: usize = 12_000;
    let mut started = home.start();
    let kv = home.kv();
    assert_eq!(home.scrape().value("kvorum_server_snapshot_count"), 5000.0);
    assert_eq!(home.scrape().value("kvorum_raft_log_first_index"), 2.0);
    put_many(&kv, 0..PUTS, &Bytes::from_static(b"value")).await;

    until("the log to be cut", || {
        (home.scrape().value("kvorum_raft_log_truncations_total") > 0.0).then_some(())
    });
    let scrape = home.scrape();
    assert_eq!(scrape.value("etcd_debugging_snap_save_total_duration_seconds_count"), 2.0);
    assert_eq!(scrape.value("kvorum_raft_log_truncations_total"), 1.0);
    let first_index = scrape.value("kvorum_raft_log_first_index");
    assert!((5000.0..6000.0).contains(&first_index), "the log begins at {first_index}");

    let triggered = lines(&started, "triggering snapshot");
    assert_eq!(triggered.len(), 2, "{triggered:?}");
    let saved = lines(&started, "saved snapshot");
    let saved: Vec<u64> =
        saved.iter().map(|line| line["snapshot_index"].as_u64().unwrap()).collect();
    assert_eq!(saved.len(), 2);
    assert!((5000..6000).contains(&saved[0]) && (10_000..11_000).contains(&saved[1]), "{saved:?}");
    let cut = lines(&started, "compacted Raft logs");
    assert_eq!(cut.len(), 1);
    assert_eq!(cut[0]["index"].as_u64().unwrap() as f64, first_index - 1.0);

    // As by a power cut, so that nothing is tidied up.
    started.kill();
    let started = home.start();
    let kv = home.kv();
    assert_eq!(count(&kv).await, PUTS as i64);
    let last = RangeRequest { key: name(PUTS - 1).into(), ..RangeRequest::default() };
    assert_eq!(kv.clone().range(last).await.unwrap().into_inner().count, 1);
    let start = &lines(&started, "starting a member")[0];
    let field = |name: &str| start[name].as_u64().unwrap();
    assert_eq!(field("snapshot_count"), 5000);
    assert_eq!(field("log_start") as f64, first_index - 1.0);
    assert!(field("applied_index") >= saved[1], "{start}");
    assert!(field("log_entries") < 8000, "{start}");
    assert_eq!(start["is_new"], false);
    assert_eq!(home.scrape().value("kvorum_raft_log_first_index"), first_index);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_flag_leads_to_snapshots_and_a_short_log() {
    two_snapshots(Home::new(&["--snapshot-count=5000"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variable_leads_to_snapshots_and_a_short_log() {
    let environment = vec![("ETCD_SNAPSHOT_COUNT", "5000")];
    two_snapshots(Home { environment, ..Home::new(&[]) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_of_the_file_leads_to_snapshots_and_a_short_log() {
    let home = Home::new(&[]);
    let url = format!("http://{}", home.address());
    let file = format!(
        "name: n1\ndata-dir: data\nlisten-client-urls: {url}\nadvertise-client-urls: {url}\n\
         listen-peer-urls: http://127.0.0.1:0\nsnapshot-count: 5000\n"
    );
    std::fs::write(home.directory.path().join("kvorum.yml"), file).unwrap();
    two_snapshots(Home { arguments: strings(&["--config-file=kvorum.yml"]), ..home }).await;
}

#[test]
fn zero_is_the_default_as_in_etcd() {
    let home = Home::new(&["--snapshot-count=0", "--snapshot-catchup-entries=0"]);
    let _started = home.start();
    assert_eq!(home.scrape().value("kvorum_server_snapshot_count"), 10_000.0);
    assert_eq!(home.scrape().value("kvorum_server_snapshot_catchup_entries"), 5000.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn very_small_counts_work() {
    let home = Home::new(&["--snapshot-count=10", "--snapshot-catchup-entries=5"]);
    let mut started = home.start();
    put_many(&home.kv(), 0..3000, &Bytes::from_static(b"value")).await;
    let scrape = until("the log to be cut to its end", || {
        let scrape = home.scrape();
        (scrape.value("kvorum_raft_log_first_index") > 2000.0).then_some(scrape)
    });
    assert!(scrape.value("kvorum_raft_log_truncations_total") > 2.0);
    started.kill();
    let started = home.start();
    assert_eq!(count(&home.kv()).await, 3000);
    let start = &lines(&started, "starting a member")[0];
    assert!(start["log_entries"].as_u64().unwrap() < 1500, "{start}");
}

/// A member that is restarted more often than it makes snapshots cuts its log all the same.
#[tokio::test(flavor = "multi_thread")]
async fn restarts_do_not_let_the_log_grow() {
    for catch_up_entries in ["10", "100"] {
        many_lives(catch_up_entries).await;
    }
}

/// Lives of 60 puts each, with a snapshot every 100.
async fn many_lives(catch_up_entries: &str) {
    let home = Home::new(&["--snapshot-count=100", "--snapshot-catchup-entries", catch_up_entries]);
    let mut entries = Vec::new();
    for life in 0..8 {
        let mut started = home.start();
        put_many(&home.kv(), life * 60..(life + 1) * 60, &Bytes::from_static(b"v")).await;
        let start = &lines(&started, "starting a member")[0];
        entries.push(start["log_entries"].as_u64().unwrap());
        assert_eq!(started.terminate().code(), Some(0));
    }
    let started = home.start();
    assert_eq!(count(&home.kv()).await, 8 * 60);
    let start = &lines(&started, "starting a member")[0];
    let first_index = start["log_start"].as_u64().unwrap();
    assert!(first_index > 100, "the log still begins at {first_index}; entries: {entries:?}");
}

fn disk_usage_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).unwrap();
    let sizes = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    sizes.sum()
}

/// Many segments' worth of writes, and the log's directory stays at a few segments: what is kept
/// lies in two at most, two are ready to be written over, one is on its way out.
#[tokio::test(flavor = "multi_thread")]
async fn the_logs_files_are_used_again() {
    const SEGMENT_BYTES: u64 = 64 << 20;
    const SEGMENTS_MAX: u64 = 2 + 2 + 1;
    /// The file that keeps an etcd away, and the like.
    const BESIDES_BYTES: u64 = 64 << 10;
    const ROUNDS: usize = 32;
    const PUTS_PER_ROUND: usize = 64;
    // Without fsync, because this is about names and sizes, not about speed.
    let home =
        Home::new(&["--snapshot-count=20", "--snapshot-catchup-entries=5", "--unsafe-no-fsync"]);
    let _started = home.start();
    let kv = home.kv();
    let value = Bytes::from(vec![7; 256 << 10]);
    let mut most = 0;
    for _ in 0..ROUNDS {
        put_many(&kv, 0..PUTS_PER_ROUND, &value).await;
        let mut kv = kv.clone();
        let range = RangeRequest { key: "k".into(), ..RangeRequest::default() };
        let revision = kv.range(range).await.unwrap().into_inner().header.unwrap().revision;
        kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
        // Checkpoints are made in the background. Writers that outrun them leave a longer
        // log, so here they wait.
        until("the log to be cut", || {
            let scrape = home.scrape();
            let kept = scrape.value("etcd_server_proposals_applied_total")
                - scrape.value("kvorum_raft_log_first_index");
            (kept < 2.0 * PUTS_PER_ROUND as f64).then_some(())
        });
        most = most.max(disk_usage_bytes(&home.wal_dir()));
    }
    let written = home.scrape().value("etcd_disk_wal_write_bytes_total");
    assert!(written > 7.5 * SEGMENT_BYTES as f64, "only {written} bytes were written");
    let bound = SEGMENTS_MAX * SEGMENT_BYTES + BESIDES_BYTES;
    assert!(most <= bound, "the log took {most} bytes for {written} written");
}

#[test]
fn the_timing_shows_in_metrics_and_log() {
    let home = Home::new(&["--heartbeat-interval=50", "--election-timeout=550"]);
    let started = home.start();
    let scrape = home.scrape();
    assert_eq!(scrape.value("kvorum_server_heartbeat_interval_seconds"), 0.05);
    assert_eq!(scrape.value("kvorum_server_election_timeout_seconds"), 0.55);
    let start = &lines(&started, "starting a member")[0];
    assert_eq!(start["heartbeat_interval"], "50ms");
    assert_eq!(start["election_timeout"], "550ms");
}

#[test]
fn timing_that_cannot_work_is_refused_in_etcds_words() {
    let test = "timing_that_cannot_work_is_refused_in_etcds_words";
    let Some(judges) = judge::find(test) else { return };
    let directory = TempDir::new().unwrap();
    for flags in [
        &["--heartbeat-interval=100", "--election-timeout=499"][..],
        &["--heartbeat-interval=1000", "--election-timeout=1000"],
        &["--heartbeat-interval=500"],
        &["--heartbeat-interval=0"],
        &["--election-timeout=0"],
        &["--heartbeat-interval=10", "--election-timeout=50001"],
        &["--heartbeat-interval=1s"],
        &["--election-timeout=-1"],
        &["--snapshot-count=-1"],
        &["--snapshot-count=many"],
    ] {
        let run = |program: &Path| {
            let output = Command::new(program)
                .args(["--name=n1", "--data-dir=data"])
                .args(flags)
                .current_dir(directory.path())
                .output()
                .unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (expected_code, theirs) = run(&judges.etcd);
        let (code, ours) = run(&kvorum());
        // What etcd says is in the last line of its log, or its first line is no log.
        let text = match theirs.lines().next().map(serde_json::from_str::<Value>) {
            Some(Ok(_)) => {
                let last: Value = serde_json::from_str(theirs.lines().last().unwrap()).unwrap();
                assert_eq!(last["msg"], "failed to verify flags");
                last["error"].as_str().unwrap().to_owned()
            }
            _ => theirs.lines().next().unwrap().to_owned(),
        };
        assert!(!text.is_empty());
        assert_eq!(code, expected_code, "{flags:?}\n{ours}");
        assert!(ours.contains(&text), "{flags:?}: {text:?} is not in\n{ours}");
        assert!(!directory.path().join("data").exists(), "{flags:?} made a data directory");
    }
}
