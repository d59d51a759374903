//! Snapshot files that kvorum saves, as etcd takes them: etcd's own tools save, judge and
//! restore them, and etcd 3.5, 3.6 and 3.7 serve every key at every revision that was not
//! compacted, the leases, and the same hash.
//!
//! And a state that goes from etcd to kvorum and back, or the other way round, is the same at each
//! end. `KVORUM_ROUND_TRIP_KEYS=1000000` adds as many keys of 1 KiB to it.
//!
//! The seed is printed; `KVORUM_SNAPSHOT_SEED=7` gives the same again.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseLeasesRequest,
    LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, SnapshotRequest, TxnRequest,
    request_op::Request,
};
use serde_json::Value;
use tonic::transport::Channel;

use common::judge::{self, Judges};
use common::rng::Rng;
use common::server::{self, TestServer};

/// A lease that does not end during the test, in seconds.
const TTL_SECS: i64 = 100_000;

/// All that a server shows of its keys and leases.
#[derive(Debug, PartialEq)]
struct Shown {
    revision: i64,
    /// By revision: all keys, encoded.
    keys: BTreeMap<i64, Vec<bytes::Bytes>>,
    /// By revision: the hash, and the compaction it starts at.
    hashes: BTreeMap<i64, (u32, i64)>,
    /// By id: the TTL, and the keys.
    leases: BTreeMap<i64, (i64, Vec<bytes::Bytes>)>,
}

async fn shown(channel: Channel, from_revision: i64) -> Shown {
    shown_up_to(channel, from_revision, 0).await
}

/// Up to a revision, or to the newest one if it is 0.
async fn shown_up_to(channel: Channel, from_revision: i64, last: i64) -> Shown {
    let mut kv = KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let mut lease = LeaseClient::new(channel);
    let everything = |revision| RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        revision,
        ..Default::default()
    };
    let now = RangeRequest { count_only: true, ..everything(0) };
    let newest = kv.range(now).await.unwrap().into_inner().header.unwrap().revision;
    let revision = if last == 0 { newest } else { last };
    let (mut keys, mut hashes) = (BTreeMap::new(), BTreeMap::new());
    for at in from_revision..=revision {
        keys.insert(at, kv.range(everything(at)).await.unwrap().into_inner().kvs);
        // At the compact revision itself the hash is the one of the compaction, which only those
        // have who carried it out.
        if at > from_revision {
            let request = HashKvRequest { revision: at };
            let hash = maintenance.hash_kv(request).await.unwrap().into_inner();
            hashes.insert(at, (hash.hash, hash.compact_revision));
        }
    }
    let mut leases = BTreeMap::new();
    for id in lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner().leases {
        let request = LeaseTimeToLiveRequest { id: id.id, keys: true };
        let mut found = lease.lease_time_to_live(request).await.unwrap().into_inner();
        found.keys.sort();
        leases.insert(id.id, (found.granted_ttl, found.keys));
    }
    Shown { revision, keys, hashes, leases }
}

/// Says what differs, and not all that there is.
#[track_caller]
fn assert_equal(minor: &str, theirs: &Shown, ours: &Shown) {
    assert_eq!(theirs.revision, ours.revision, "{minor}");
    for (revision, keys) in &ours.keys {
        assert!(theirs.keys[revision] == *keys, "{minor}: the keys at {revision} differ");
    }
    assert_eq!(theirs.hashes, ours.hashes, "{minor}");
    assert_eq!(theirs.leases, ours.leases, "{minor}");
}

/// Random operations of all kinds, and a compaction in between. The compact revision.
async fn traffic(channel: Channel, rng: &mut Rng, operations: usize) -> i64 {
    let mut kv = KvClient::new(channel.clone());
    let mut lease = LeaseClient::new(channel);
    let (mut revision, mut compacted, mut leases) = (1, -1, vec![0]);
    for number in 0..operations {
        let put = |rng: &mut Rng, leases: &[i64]| {
            let len = [0, 3, 100, 1000, 5000, 70_000][rng.below(6)];
            PutRequest {
                key: format!("key/{}", rng.below(60)).into(),
                value: vec![number as u8; len].into(),
                lease: leases[rng.below(leases.len())],
                ..Default::default()
            }
        };
        match rng.below(12) {
            0 => {
                let id = rng.between(1, i64::MAX);
                let request = LeaseGrantRequest { id, ttl: TTL_SECS + number as i64 };
                lease.lease_grant(request).await.unwrap();
                leases.push(id);
            }
            1 | 2 => {
                let key = format!("key/{}", rng.below(60)).into();
                let request = DeleteRangeRequest { key, ..Default::default() };
                kv.delete_range(request).await.unwrap();
            }
            3 => {
                let (key, range_end) = ("key/1".into(), "key/3".into());
                let request = DeleteRangeRequest { key, range_end, prev_kv: false };
                kv.delete_range(request).await.unwrap();
            }
            4 | 5 => {
                let keys = (0..4).map(|place| {
                    let key = format!("key/{}", (number * 7 + place * 13) % 60).into();
                    PutRequest { key, ..put(rng, &leases) }
                });
                let success = keys.map(|put| RequestOp { request: Some(Request::RequestPut(put)) });
                let request = TxnRequest { success: success.collect(), ..Default::default() };
                kv.txn(request).await.unwrap();
            }
            _ => {
                let put = put(rng, &leases);
                revision = kv.put(put).await.unwrap().into_inner().header.unwrap().revision;
            }
        }
        if number == operations / 2 {
            compacted = revision;
            let request = CompactionRequest { revision, physical: number % 2 == 0 };
            kv.compact(request).await.unwrap();
        }
    }
    compacted
}

fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).env("ETCDCTL_API", "3").output().unwrap()
}

#[track_caller]
fn succeeds(program: &Path, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {stdout}\n{stderr}");
    stdout.into_owned()
}

fn seed() -> u64 {
    let given = std::env::var("KVORUM_SNAPSHOT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| getrandom::u64().unwrap());
    eprintln!("KVORUM_SNAPSHOT_SEED={seed}");
    seed
}

/// An etcd that was restored from a file by its etcdutl.
fn restored(judges: &Judges, file: &Path) -> TestServer {
    restored_by(&judges.etcdutl, &judges.etcd, file)
}

/// A server that was restored from a file, each by its own program.
fn restored_by(restorer: &Path, program: &Path, file: &Path) -> TestServer {
    TestServer::start_prepared(program, &[], |server| {
        let (data_dir, peer) = (server.data_dir(), server.peer_url());
        let cluster = format!("default={peer}");
        succeeds(
            restorer,
            &[
                "snapshot",
                "restore",
                file.to_str().unwrap(),
                "--data-dir",
                data_dir.to_str().unwrap(),
                "--name",
                "default",
                "--initial-cluster",
                &cluster,
                "--initial-advertise-peer-urls",
                &peer,
            ],
        );
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_etcd_serves_what_kvorum_saved() {
    let Some(all) = judge::find_minors("every_etcd_serves_what_kvorum_saved", &["v3.5", "v3.6"])
    else {
        return;
    };
    let mut rng = Rng::new(seed());
    let server = TestServer::start(&server::kvorum(), &[]);
    let compacted = traffic(server.channel(), &mut rng, 300).await;
    let ours = shown(server.channel(), compacted).await;
    assert!(ours.leases.len() > 5 && ours.keys[&ours.revision].len() > 20);
    let directory = tempfile::tempdir().unwrap();
    for (minor, judges) in &all {
        let file = directory.path().join(format!("{minor}.db"));
        let path = file.to_str().unwrap();
        let url = server.client_url();
        succeeds(&judges.etcdctl, &["snapshot", "save", path, "--endpoints", &url]);
        let size = std::fs::metadata(&file).unwrap().len();
        assert_eq!(size % 512, 32, "a database and its SHA-256");

        let status = succeeds(&judges.etcdutl, &["snapshot", "status", path, "-w", "json"]);
        let status: Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["revision"], ours.revision, "{minor}: {status}");
        // 3.5 counts the rows of all buckets.
        if *minor != "v3.5" {
            let keys = ours.keys[&ours.revision].len();
            assert_eq!(status["totalKey"], keys, "{minor}: {status}");
        }
        assert_eq!(status["totalSize"], size - 32, "{minor}: {status}");

        let etcd = restored(judges, &file);
        let theirs = shown(etcd.channel(), compacted).await;
        assert_equal(minor, &theirs, &ours);
        // It goes on from there: bbolt changes the trees that were written here.
        let compacted = traffic(etcd.channel(), &mut rng, 200).await;
        succeeds(&judges.etcdctl, &["defrag", "--endpoints", &etcd.client_url()]);
        assert!(shown(etcd.channel(), compacted).await.revision > ours.revision + 50);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_are_as_etcd_sends_them() {
    let server = TestServer::start(&server::kvorum(), &[]);
    let mut kv = KvClient::new(server.channel());
    for number in 0..20 {
        let (key, value) = (format!("{number}").into(), vec![7; 10_000].into());
        kv.put(PutRequest { key, value, ..Default::default() }).await.unwrap();
    }
    let mut maintenance = MaintenanceClient::new(server.channel());
    let stream = maintenance.snapshot(SnapshotRequest {}).await.unwrap();
    let mut stream = stream.into_inner();
    let mut blobs = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        assert_eq!((response.header, response.version.as_str()), (None, "3.7.0"));
        blobs.push((response.blob, response.remaining_bytes));
    }
    let (trailer, remaining) = blobs.pop().unwrap();
    assert_eq!((trailer.len(), remaining), (32, 0));
    let mut left: u64 = blobs.iter().map(|(blob, _)| blob.len() as u64).sum();
    assert!(left > 200_000 && left.is_multiple_of(4096));
    let last = blobs.len() - 1;
    for (number, (blob, remaining)) in blobs.iter().enumerate() {
        assert!(blob.len() == 32 * 1024 || (number == last && !blob.is_empty()));
        left -= blob.len() as u64;
        assert_eq!(*remaining, left);
    }
    assert_eq!(left, 0);
    // The gateway sends the same, a line for each.
    let address = server.client_address();
    let path = "/v3/maintenance/snapshot";
    let answer = common::http::request(&address, "POST", path, &[], b"{}").unwrap();
    let lines: Vec<Value> =
        answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((answer.status, lines.len()), (200, blobs.len() + 1));
    assert_eq!(lines[0]["result"]["remaining_bytes"], blobs[0].1.to_string());
    assert!(lines[0]["result"]["blob"].as_str().unwrap().len() > 32 * 1024);
    let metrics = common::http::get(&server.client_address(), "/metrics").unwrap().text();
    let count = "etcd_disk_backend_snapshot_duration_seconds_count 2";
    assert!(metrics.contains(count), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kvorum_saves_as_etcdctl_does_from_either_server() {
    let Some(judges) = judge::find("kvorum_saves_as_etcdctl_does_from_either_server") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    for program in [&server::kvorum(), &judges.etcd] {
        let server = TestServer::start(program, &[]);
        traffic(server.channel(), &mut rng, 100).await;
        let url = server.client_url();
        let [by_etcdctl, by_kvorum] = [&judges.etcdctl, &server::kvorum()].map(|client| {
            let file = directory.path().join("db");
            let path = file.to_str().unwrap();
            let said = succeeds(client, &["snapshot", "save", path, "--endpoints", &url]);
            assert_eq!(said, format!("Snapshot saved at {path}\nServer version 3.7.0\n"));
            succeeds(&judges.etcdutl, &["snapshot", "status", path]);
            let bytes = std::fs::read(&file).unwrap();
            std::fs::remove_file(&file).unwrap();
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
            bytes
        });
        // etcd's file also counts its transactions, of which a save is one.
        assert!(by_etcdctl == by_kvorum || program == &judges.etcd, "one state makes one file");
    }
}

#[test]
fn saving_fails_as_etcdctl_does() {
    let Some(judges) = judge::find("saving_fails_as_etcdctl_does") else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("db");
    let path = file.to_str().unwrap();
    let nobody = "http://127.0.0.1:1";
    for arguments in [
        &["snapshot", "save"][..],
        &["snapshot", "save", path, "other"],
        &["snapshot", "save", path, "--endpoints", "http://127.0.0.1:1,http://127.0.0.1:2"],
        &["snapshot", "save", path, "--bogus"],
        // Without a timeout etcdctl waits for ever.
        &["snapshot", "save", path, "--endpoints", nobody, "--command-timeout", "2s"],
        &["snapshot", "save", path, "--endpoints", nobody, "--dial-timeout", "abc"],
    ] {
        let [theirs, ours] =
            [&judges.etcdctl, &server::kvorum()].map(|program| run(program, arguments));
        assert_eq!(ours.status.code(), theirs.status.code(), "{arguments:?}");
        let ours = String::from_utf8(ours.stderr).unwrap();
        assert!(ours.starts_with("Error: "), "{ours}");
        // That nobody listens is said in other words.
        let theirs = String::from_utf8(theirs.stderr).unwrap();
        let error = theirs.lines().find(|line| line.starts_with("Error: ")).unwrap();
        if !arguments.contains(&nobody) {
            assert_eq!(ours.lines().next(), Some(error), "{arguments:?}");
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "{arguments:?}");
    }
}

/// Keys of 1 KiB that are put in transactions of so many.
const PUTS_PER_TXN: usize = 100;
/// Transactions under way at once.
const TXNS_AT_ONCE: usize = 32;

/// How many keys are added to what `traffic` makes.
fn keys_added() -> usize {
    let given = std::env::var("KVORUM_ROUND_TRIP_KEYS").ok();
    given.map_or(2000, |keys| keys.parse().expect("KVORUM_ROUND_TRIP_KEYS is a number"))
}

async fn add_keys(channel: Channel, count: usize) {
    let mut under_way = tokio::task::JoinSet::new();
    for first in (0..count).step_by(PUTS_PER_TXN) {
        let mut kv = KvClient::new(channel.clone());
        let puts = (first..count.min(first + PUTS_PER_TXN)).map(|number| {
            let (key, value) =
                (format!("many/{number:08}").into(), vec![number as u8; 1024].into());
            let put = PutRequest { key, value, ..Default::default() };
            RequestOp { request: Some(Request::RequestPut(put)) }
        });
        let request = TxnRequest { success: puts.collect(), ..Default::default() };
        if under_way.len() == TXNS_AT_ONCE {
            under_way.join_next().await.unwrap().unwrap();
        }
        under_way.spawn(async move { kv.txn(request).await.unwrap() });
    }
    under_way.join_all().await;
}

/// What is compared of all keys.
#[derive(Debug, PartialEq)]
struct End {
    revision: i64,
    keys: i64,
    hash: u32,
    compact_revision: i64,
}

async fn end(channel: Channel) -> End {
    let all = RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        count_only: true,
        ..Default::default()
    };
    let found = KvClient::new(channel.clone()).range(all).await.unwrap().into_inner();
    let hash = MaintenanceClient::new(channel).hash_kv(HashKvRequest { revision: 0 }).await;
    let hash = hash.unwrap().into_inner();
    End {
        revision: found.header.unwrap().revision,
        keys: found.count,
        hash: hash.hash,
        compact_revision: hash.compact_revision,
    }
}

/// What an etcd knows of users and roles.
fn users_and_roles(judges: &Judges, etcd: &TestServer) -> Vec<String> {
    let url = etcd.client_url();
    let ask =
        |question: &[&str]| succeeds(&judges.etcdctl, &[&["--endpoints", &url], question].concat());
    vec![ask(&["user", "get", "alice"]), ask(&["role", "get", "readers"]), ask(&["user", "list"])]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_trip_changes_nothing() {
    let test = "a_round_trip_changes_nothing";
    let Some(all) = judge::find_minors(test, &["v3.5", "v3.6"]) else { return };
    let mut rng = Rng::new(seed());
    let (kvorum, keys) = (server::kvorum(), keys_added());
    let quota = ["--quota-backend-bytes", "8589934592"];
    for (minor, judges) in &all {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        let save = |program: &Path, from: &TestServer, to: &Path| {
            let (url, to) = (from.client_url(), to.to_str().unwrap());
            succeeds(program, &["snapshot", "save", to, "--endpoints", &url]);
        };

        eprintln!("{minor}: etcd, kvorum, etcd");
        let first = TestServer::start(&judges.etcd, &quota);
        let compacted = traffic(first.channel(), &mut rng, 200).await;
        let url = first.client_url();
        for asked in [
            &["user", "add", "alice:secret"][..],
            &["role", "add", "readers"],
            &["role", "grant-permission", "readers", "--prefix=true", "read", "key/"],
            &["user", "grant-role", "alice", "readers"],
        ] {
            succeeds(&judges.etcdctl, &[&["--endpoints", &url], asked].concat());
        }
        let users = users_and_roles(judges, &first);
        let detail = shown(first.channel(), compacted).await;
        add_keys(first.channel(), keys).await;
        let due = end(first.channel()).await;
        save(&judges.etcdctl, &first, &file("1.db"));
        drop(first);
        let second = restored_by(&kvorum, &kvorum, &file("1.db"));
        assert_eq!(end(second.channel()).await, due, "{minor}: etcd to kvorum");
        save(&kvorum, &second, &file("2.db"));
        drop(second);
        let third = restored(judges, &file("2.db"));
        assert_eq!(end(third.channel()).await, due, "{minor}: and back");
        assert_eq!(users_and_roles(judges, &third), users, "{minor}");
        let found = shown_up_to(third.channel(), compacted, detail.revision).await;
        assert_equal(minor, &found, &detail);
        drop(third);

        eprintln!("{minor}: kvorum, etcd, kvorum");
        let first = TestServer::start(&kvorum, &quota);
        let compacted = traffic(first.channel(), &mut rng, 200).await;
        let detail = shown(first.channel(), compacted).await;
        add_keys(first.channel(), keys).await;
        let due = end(first.channel()).await;
        save(&judges.etcdctl, &first, &file("3.db"));
        drop(first);
        let second = restored(judges, &file("3.db"));
        assert_eq!(end(second.channel()).await, due, "{minor}: kvorum to etcd");
        save(&judges.etcdctl, &second, &file("4.db"));
        drop(second);
        let third = restored_by(&kvorum, &kvorum, &file("4.db"));
        assert_eq!(end(third.channel()).await, due, "{minor}: and back");
        let found = shown_up_to(third.channel(), compacted, detail.revision).await;
        assert_equal(minor, &found, &detail);
    }
}
