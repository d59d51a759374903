//! From etcd to kvorum: snapshot files are restored, data directories are imported, and what is
//! neither is refused. The real etcd makes the files, and is asked what must come out of them.
//!
//! * What etcd saved is served with every revision and lease; three members come of one file.
//! * `--bump-revision` and `snapshot status` do what etcdutl does.
//! * A stopped etcd's directory is imported, a killed one's refused.
//! * Mutated files and directories are refused with their name and the reason, and leave nothing
//!   behind. `KVORUM_RESTORE_SEED=7` repeats a run.
//!
//! Connections are served by a thread of their own, while the tests wait for processes: an etcd or
//! kvorum that is asked to stop waits some seconds for clients that do not hear of it.
//!
//! What kills leave of saves, restores and imports is looked at in `tests/crash/snapshot.rs`.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::judge::{self, Judges};
use common::ports::free_port;
use common::process::{Started, strings, until};
use common::rng::Rng;
use common::{http, server};
use kvorum::bolt::format::fnv1a;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseLeasesRequest,
    LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op,
};
use kvorum::pb::mvccpb::KeyValue;
use kvorum::runtime::claim::Claim;
use kvorum::runtime::recover::{self, Bootstrap, OpenError, Place};
use kvorum::runtime::restore::{Restore, RestoreError, restore};
use kvorum::runtime::stage::StageError;
use prost::Message as _;
use prost::bytes::Bytes;
use tonic::transport::Channel;

/// Changes made before a snapshot is saved.
const CHANGES: usize = 300;
/// A value that takes many pages, in bytes.
const LARGE_BYTES: usize = 200_000;
/// Starts and restores that begin at the same time.
const ROUNDS_AT_ONCE: usize = 40;
/// Files and directories that are mutated.
const MUTATIONS: u64 = 200;

/// A single member of etcd or kvorum in a directory of its own.
struct Node {
    started: Started,
    port: u16,
}

impl Node {
    fn start(program: &Path, directory: &Path, data: &str, more: &[&str]) -> Node {
        let node = Node::spawn(program, directory, data, more);
        let path = "/health?serializable=true";
        let address = format!("127.0.0.1:{}", node.port);
        until("a healthy server", || {
            http::get(&address, path).is_ok_and(|answer| answer.status == 200).then_some(())
        });
        node
    }

    fn spawn(program: &Path, directory: &Path, data: &str, more: &[&str]) -> Node {
        let (port, peer_port) = (free_port(), free_port());
        let (client, peer) =
            (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
        let mut arguments = strings(&["--data-dir", data, "--log-level=warn"]);
        arguments.extend(strings(&["--listen-client-urls", &client]));
        arguments.extend(strings(&["--advertise-client-urls", &client]));
        if !more.contains(&"--listen-peer-urls") {
            arguments.extend(strings(&["--listen-peer-urls", &peer]));
        }
        arguments.extend(strings(more));
        Node { started: Started::new(program, directory, &arguments), port }
    }

    fn channel(&self) -> Channel {
        let url = format!("http://127.0.0.1:{}", self.port);
        Channel::from_shared(url).unwrap().connect_lazy()
    }

    /// The hash of the keys up to a revision, 0 for all; the revision it is of, and of the
    /// compaction.
    async fn hash_kv(&self, revision: i64) -> (u32, i64, i64) {
        let mut client = MaintenanceClient::new(self.channel());
        let request = HashKvRequest { revision };
        let answer = client.hash_kv(request).await.unwrap().into_inner();
        (answer.hash, answer.hash_revision, answer.compact_revision)
    }

    /// All keys at each revision from `first` to `last`, encoded as they are stored.
    async fn history(&self, first: i64, last: i64) -> Vec<Vec<KeyValue>> {
        let mut client = KvClient::new(self.channel()).max_decoding_message_size(64 << 20);
        let mut all = Vec::new();
        for revision in first..=last {
            let request = RangeRequest {
                key: b"\0".as_slice().into(),
                range_end: b"\0".as_slice().into(),
                revision,
                ..RangeRequest::default()
            };
            let answer = client.range(request).await.unwrap().into_inner();
            let decode = |kv: Bytes| KeyValue::decode(kv).unwrap();
            all.push(answer.kvs.into_iter().map(decode).collect());
        }
        all
    }

    /// Each lease with the TTL that was granted, and its keys.
    async fn leases(&self) -> Vec<(i64, i64, Vec<Vec<u8>>)> {
        let mut client = LeaseClient::new(self.channel());
        let mut found = Vec::new();
        let leases = client.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
        for lease in leases.leases {
            let request = LeaseTimeToLiveRequest { id: lease.id, keys: true };
            let answer = client.lease_time_to_live(request).await.unwrap().into_inner();
            assert!(answer.ttl <= answer.granted_ttl && answer.ttl > answer.granted_ttl - 60);
            let mut keys: Vec<Vec<u8>> = answer.keys.iter().map(|key| key.to_vec()).collect();
            keys.sort();
            found.push((lease.id, answer.granted_ttl, keys));
        }
        found.sort();
        found
    }
}

/// Changes keys at random: puts, deletes, transactions, leases, large values; and compacts.
async fn fill(node: &Node, rng: &mut Rng) {
    let mut kv = KvClient::new(node.channel());
    let mut lease = LeaseClient::new(node.channel());
    for (id, ttl) in [(7, 3600), (1 << 40, 7200), (8, 1800)] {
        lease.lease_grant(LeaseGrantRequest { id, ttl }).await.unwrap();
    }
    for at in 0..CHANGES {
        let key = format!("key/{:02}", rng.below(40));
        let put = |value: Vec<u8>, lease| PutRequest {
            key: key.clone().into(),
            value: value.into(),
            lease,
            ..PutRequest::default()
        };
        let value_len = rng.below(2000);
        let value: Vec<u8> = (0..value_len).map(|_| rng.next() as u8).collect();
        let revision = match rng.below(10) {
            0 | 1 => {
                let request = DeleteRangeRequest { key: key.into(), ..Default::default() };
                kv.delete_range(request).await.unwrap().into_inner().header.unwrap().revision
            }
            2 => {
                let operations = (0..4).map(|sub| {
                    let put = PutRequest {
                        key: format!("txn/{sub}").into(),
                        value: value.clone().into(),
                        ..PutRequest::default()
                    };
                    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
                });
                let request = TxnRequest { success: operations.collect(), ..Default::default() };
                kv.txn(request).await.unwrap().into_inner().header.unwrap().revision
            }
            3 => {
                let lease = rng.pick(&[7, 1 << 40, 8]);
                kv.put(put(value, lease)).await.unwrap().into_inner().header.unwrap().revision
            }
            4 if at % 3 == 0 => {
                let large = vec![at as u8; LARGE_BYTES];
                kv.put(put(large, 0)).await.unwrap().into_inner().header.unwrap().revision
            }
            _ => kv.put(put(value, 0)).await.unwrap().into_inner().header.unwrap().revision,
        };
        if at == CHANGES / 3 {
            let revision = revision - 10;
            kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
        }
    }
}

/// Where a test happens: a directory of its own, and random numbers.
struct Stage {
    directory: tempfile::TempDir,
    judges: Judges,
    rng: Rng,
}

impl Stage {
    fn new(test: &str) -> Option<Stage> {
        let judges = judge::find(test)?;
        let seed = std::env::var("KVORUM_RESTORE_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| getrandom::u64().unwrap() % 1_000_000);
        eprintln!("{test}: KVORUM_RESTORE_SEED={seed}");
        let directory = tempfile::Builder::new().prefix("kvorum-test-").tempdir().unwrap();
        Some(Stage { directory, judges, rng: Rng::new(seed) })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn etcd(&self, data: &str, more: &[&str]) -> Node {
        Node::start(&self.judges.etcd, self.directory.path(), data, more)
    }

    fn kvorum(&self, data: &str, more: &[&str]) -> Node {
        Node::start(&server::kvorum(), self.directory.path(), data, more)
    }

    /// Starts kvorum where it must not start, and returns what it says.
    fn refused(&self, data: &str, more: &[&str]) -> String {
        let mut node = Node::spawn(&server::kvorum(), self.directory.path(), data, more);
        assert!(!node.started.ended().success());
        node.started.log()
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.directory.path()).output().unwrap()
    }

    fn succeeds(&self, program: &Path, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn snapshot(&self, node: &Node, file: &str) {
        let endpoints = format!("--endpoints=127.0.0.1:{}", node.port);
        self.succeeds(&self.judges.etcdctl, &[&endpoints, "snapshot", "save", file]);
    }

    fn restore(&self, arguments: &[&str]) {
        self.succeeds(&server::kvorum(), &[&["snapshot", "restore"], arguments].concat());
    }

    /// A file that an etcd saved, and the hash of its keys.
    async fn saved(&mut self, file: &str) -> (u32, i64, i64) {
        let etcd = self.etcd("etcd-saved", &[]);
        fill(&etcd, &mut self.rng).await;
        self.snapshot(&etcd, file);
        etcd.hash_kv(0).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_etcd_saved_is_served_with_every_revision_and_lease() {
    let Some(mut stage) = Stage::new("restore") else { return };
    let mut etcd = stage.etcd("etcd", &[]);
    fill(&etcd, &mut stage.rng).await;
    let etcdctl = stage.judges.etcdctl.clone();
    let endpoints = format!("--endpoints=127.0.0.1:{}", etcd.port);
    stage.succeeds(&etcdctl, &[&endpoints, "user", "add", "alice:secret"]);
    stage.succeeds(&etcdctl, &[&endpoints, "role", "add", "reader"]);
    stage.snapshot(&etcd, "saved");
    let hash = etcd.hash_kv(0).await;
    let (_, last, first) = hash;
    let (history, leases) = (etcd.history(first, last).await, etcd.leases().await);
    let half = etcd.hash_kv((first + last) / 2).await;
    assert!(first > 1 && leases.len() == 3 && history.len() > CHANGES / 2);
    assert!(etcd.started.terminate().code().is_none_or(|code| code == 0));

    for format in ["simple", "json", "table", "fields"] {
        let arguments = ["snapshot", "status", "saved", "-w", format];
        let ours = stage.succeeds(&server::kvorum(), &arguments);
        assert_eq!(ours, stage.succeeds(&stage.judges.etcdutl, &arguments));
    }
    stage.restore(&["saved", "--data-dir", "from-saved"]);
    stage.restore(&["etcd/member/snap/db", "--data-dir", "from-db", "--skip-hash-check"]);
    for data in ["from-saved", "from-db"] {
        let mut kvorum = stage.kvorum(data, &[]);
        assert_eq!(kvorum.hash_kv(0).await, hash);
        assert_eq!(kvorum.hash_kv((first + last) / 2).await, half);
        assert!(kvorum.history(first, last).await == history, "{data}: the history differs");
        assert_eq!(kvorum.leases().await, leases);
        let mut kv = KvClient::new(kvorum.channel());
        let put = PutRequest { key: "new".into(), ..PutRequest::default() };
        let header = kv.put(put).await.unwrap().into_inner().header.unwrap();
        assert_eq!(header.revision, last + 1);
        assert!(kvorum.started.terminate().success());
        let again = stage.kvorum(data, &[]);
        assert_eq!(again.hash_kv(last).await.0, hash.0);

        // And on, into a kvorum and back into an etcd.
        let endpoints = format!("--endpoints=127.0.0.1:{}", again.port);
        let saved = format!("{data}-saved");
        stage.succeeds(&server::kvorum(), &["snapshot", "save", &saved, &endpoints]);
        let (ours, theirs) = (format!("{data}-ours"), format!("{data}-theirs"));
        stage.restore(&[&saved, "--data-dir", &ours]);
        let restore = ["snapshot", "restore", &saved, "--data-dir", &theirs];
        stage.succeeds(&stage.judges.etcdutl, &restore);
        let (kvorum, etcd) = (stage.kvorum(&ours, &[]), stage.etcd(&theirs, &[]));
        for node in [&kvorum, &etcd] {
            assert_eq!(node.hash_kv(0).await, again.hash_kv(0).await);
            assert!(node.history(first, last).await == history, "{data}: the history differs");
            assert_eq!(node.leases().await, leases);
        }
        let endpoints = format!("--endpoints=127.0.0.1:{}", etcd.port);
        assert_eq!(stage.succeeds(&etcdctl, &[&endpoints, "user", "list"]), "alice\n");
        assert_eq!(stage.succeeds(&etcdctl, &[&endpoints, "role", "list"]), "reader\n");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn three_members_are_restored_from_one_file() {
    let Some(mut stage) = Stage::new("three members") else { return };
    let (hash, ..) = stage.saved("saved").await;
    let names = ["a", "b", "c"];
    let urls = names.map(|_| format!("http://127.0.0.1:{}", free_port()));
    let cluster = names.iter().zip(&urls).map(|(name, url)| format!("{name}={url}"));
    let cluster = cluster.collect::<Vec<_>>().join(",");
    let mut nodes = Vec::new();
    for (name, url) in names.iter().zip(&urls) {
        let flags = ["--name", name, "--initial-cluster", &cluster];
        let flags = [&flags[..], &["--initial-advertise-peer-urls", url]].concat();
        stage.restore(&[&["saved", "--data-dir", name][..], &flags].concat());
        let listen = [&flags[..], &["--listen-peer-urls", url]].concat();
        let directory = stage.directory.path();
        nodes.push(Node::spawn(&server::kvorum(), directory, name, &listen));
    }
    for node in &nodes {
        let address = format!("127.0.0.1:{}", node.port);
        until("a member of three", || {
            http::get(&address, "/health").is_ok_and(|answer| answer.status == 200).then_some(())
        });
        assert_eq!(node.hash_kv(0).await.0, hash);
    }
    let mut kv = KvClient::new(nodes[1].channel());
    let put = PutRequest { key: "new".into(), ..PutRequest::default() };
    kv.put(put).await.unwrap();
    let all = format!("--endpoints=127.0.0.1:{},127.0.0.1:{}", nodes[0].port, nodes[2].port);
    let members = stage.succeeds(&stage.judges.etcdctl, &[&all, "member", "list"]);
    assert_eq!(members.lines().count(), 3, "{members}");
    for node in &nodes {
        assert!(!node.started.log().contains("differ"), "{}", node.started.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn revisions_are_bumped_and_marked_compacted_as_by_etcdutl() {
    let Some(mut stage) = Stage::new("bump") else { return };
    let (_, last, _) = stage.saved("saved").await;
    let bump = ["--bump-revision", "1000000", "--mark-compacted"];
    stage.restore(&[&["saved", "--data-dir", "ours"][..], &bump].concat());
    let theirs = [&["snapshot", "restore", "saved", "--data-dir", "theirs"][..], &bump].concat();
    stage.succeeds(&stage.judges.etcdutl, &theirs);
    let (kvorum, etcd) = (stage.kvorum("ours", &[]), stage.etcd("theirs", &[]));
    let revision = last + 1_000_000;
    assert_eq!(kvorum.hash_kv(0).await, etcd.hash_kv(0).await);
    assert_eq!(kvorum.hash_kv(0).await.2, revision);
    assert!(kvorum.history(revision, revision).await == etcd.history(revision, revision).await);
    for node in [&kvorum, &etcd] {
        let mut kv = KvClient::new(node.channel());
        let old = RangeRequest { key: "a".into(), revision: last, ..RangeRequest::default() };
        let error = kv.range(old).await.unwrap_err();
        assert!(error.message().contains("compacted"), "{error}");
        let put = PutRequest { key: "new".into(), ..PutRequest::default() };
        kv.put(put).await.unwrap();
        let physical = CompactionRequest { revision: revision + 1, physical: true };
        kv.compact(physical).await.unwrap();
    }
    assert_eq!(kvorum.hash_kv(0).await, etcd.hash_kv(0).await);
    // What was restored with a bump can be saved and restored once more, by each.
    for (node, file) in [(&etcd, "again"), (&kvorum, "once-more")] {
        stage.snapshot(node, file);
        let data = format!("{file}-ours");
        stage.restore(&[file, "--data-dir", &data]);
        assert_eq!(stage.kvorum(&data, &[]).hash_kv(0).await, etcd.hash_kv(0).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_etcds_directory_is_imported_with_one_flag() {
    let Some(mut stage) = Stage::new("import") else { return };
    let mut etcd = stage.etcd("data", &[]);
    fill(&etcd, &mut stage.rng).await;
    let hash = etcd.hash_kv(0).await;
    let (history, leases) = (etcd.history(hash.2, hash.1).await, etcd.leases().await);
    let list = |node: &Node| {
        let endpoints = format!("--endpoints=127.0.0.1:{}", node.port);
        let list = stage.succeeds(&stage.judges.etcdctl, &[&endpoints, "endpoint", "status"]);
        list.split(", ").nth(1).unwrap().to_owned()
    };
    let id = list(&etcd);
    let running = stage.refused("data", &["--import-etcd-data"]);
    assert!(running.contains("stop it first"), "{running}");
    etcd.started.terminate();

    let without = stage.refused("data", &[]);
    assert!(without.contains("--import-etcd-data"), "{without}");
    assert!(stage.path("data/member/snap/db").exists());
    let mut kvorum = stage.kvorum("data", &["--import-etcd-data"]);
    assert_eq!(kvorum.hash_kv(0).await, hash);
    assert!(kvorum.history(hash.2, hash.1).await == history);
    assert_eq!(kvorum.leases().await, leases);
    assert_eq!(list(&kvorum), id);
    assert!(stage.path("data/member.etcd/snap/db").exists());
    assert!(!stage.path("data/member.new").exists());
    kvorum.started.terminate();
    for flags in [&[][..], &["--import-etcd-data"]] {
        let mut again = stage.kvorum("data", flags);
        assert_eq!(again.hash_kv(0).await, hash);
        again.started.terminate();
    }
    // And back.
    fs::rename(stage.path("data/member"), stage.path("data/member.kvorum")).unwrap();
    fs::rename(stage.path("data/member.etcd"), stage.path("data/member")).unwrap();
    assert_eq!(stage.etcd("data", &[]).hash_kv(0).await, hash);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_directory_that_etcdutl_restored_is_imported_with_a_log_elsewhere_too() {
    let Some(mut stage) = Stage::new("import of restored") else { return };
    let hash = stage.saved("saved").await;
    let restored = ["snapshot", "restore", "saved", "--data-dir"];
    stage.succeeds(&stage.judges.etcdutl, &[&restored[..], &["one"]].concat());
    assert_eq!(stage.kvorum("one", &["--import-etcd-data"]).hash_kv(0).await, hash);

    let apart = [&restored[..], &["two", "--wal-dir", "wal"]].concat();
    stage.succeeds(&stage.judges.etcdutl, &apart);
    let missing = stage.refused("two", &["--import-etcd-data"]);
    assert!(missing.contains("correct --wal-dir"), "{missing}");
    let mut kvorum = stage.kvorum("two", &["--import-etcd-data", "--wal-dir", "wal"]);
    assert_eq!(kvorum.hash_kv(0).await, hash);
    kvorum.started.terminate();
    assert_eq!(stage.kvorum("two", &["--wal-dir", "wal"]).hash_kv(0).await, hash);
    assert_eq!(fs::read_dir(stage.path("wal/wal.etcd")).unwrap().count(), 1);

    let urls = [free_port(), free_port()].map(|port| format!("http://127.0.0.1:{port}"));
    let cluster = format!("default={},other={}", urls[0], urls[1]);
    let cluster = ["--initial-cluster", &cluster, "--initial-advertise-peer-urls", &urls[0]];
    let several = [&restored[..], &["several"], &cluster].concat();
    stage.succeeds(&stage.judges.etcdutl, &several);
    let refused = stage.refused("several", &["--import-etcd-data"]);
    assert!(refused.contains("cluster with 2 members"), "{refused}");
    assert!(refused.contains("kvorum snapshot restore"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_etcd_whose_database_lacks_changes_is_refused() {
    let Some(stage) = Stage::new("killed") else { return };
    // Its database is written when it is stopped, and not before.
    let lazy = ["--backend-batch-interval=1h", "--backend-batch-limit=1000000"];
    let mut etcd = stage.etcd("data", &lazy);
    let mut kv = KvClient::new(etcd.channel());
    let put = PutRequest { key: "a".into(), value: "b".into(), ..PutRequest::default() };
    kv.put(put).await.unwrap();
    let hash = etcd.hash_kv(0).await;
    etcd.started.kill();
    let refused = stage.refused("data", &["--import-etcd-data"]);
    assert!(refused.contains("was not stopped cleanly"), "{refused}");
    assert!(!stage.path("data/member.new").exists() && !stage.path("data/member.etcd").exists());
    // What the message says. It has applied its log when it answers what it must be elected for.
    let mut etcd = stage.etcd("data", &lazy);
    let range = RangeRequest { key: "a".into(), ..RangeRequest::default() };
    KvClient::new(etcd.channel()).range(range).await.unwrap();
    etcd.started.terminate();
    assert_eq!(stage.kvorum("data", &["--import-etcd-data"]).hash_kv(0).await, hash);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn authentication_is_not_switched_off_by_accident() {
    let Some(stage) = Stage::new("auth") else { return };
    let mut etcd = stage.etcd("data", &[]);
    let endpoints = format!("--endpoints=127.0.0.1:{}", etcd.port);
    for command in ["user add root:secret", "user grant-role root root", "auth enable"] {
        let words = std::iter::once(endpoints.as_str()).chain(command.split(' '));
        stage.succeeds(&stage.judges.etcdctl, &words.collect::<Vec<_>>());
    }
    let user = [&endpoints, "--user=root:secret", "snapshot", "save", "saved"];
    stage.succeeds(&stage.judges.etcdctl, &user);
    etcd.started.terminate();
    let restore = ["snapshot", "restore", "saved", "--data-dir", "ours"];
    let refused = stage.run(&server::kvorum(), &restore);
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("authentication is enabled in saved"), "{text}");
    assert!(text.contains("--disable-auth") && !stage.path("ours").exists(), "{text}");
    stage.restore(&["saved", "--data-dir", "ours", "--disable-auth"]);
    drop(stage.kvorum("ours", &[]));
    let place = disk(&stage.path("ours"));
    let state = recover::open(&place, &Bootstrap::default()).unwrap().state;
    let keys: Vec<_> = state.auth_rows().iter().map(|row| row.key.clone()).collect();
    assert!(
        ["root", "authEnabled"].iter().all(|key| keys.iter().any(|row| row == key)),
        "{keys:?}"
    );
    let refused = stage.refused("data", &["--import-etcd-data"]);
    assert!(refused.contains("authentication is enabled"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_cannot_be_restored_is_refused_as_by_etcdutl() {
    let Some(mut stage) = Stage::new("refusals") else { return };
    stage.saved("saved").await;
    fs::create_dir(stage.path("full")).unwrap();
    fs::write(stage.path("full/file"), "").unwrap();
    fs::create_dir(stage.path("empty")).unwrap();
    for arguments in [
        &["status"][..],
        &["status", "missing"],
        &["status", "saved", "-w", "yaml"],
        &["status", "saved", "--bla"],
        &["restore"],
        &["restore", "missing", "--data-dir", "new"],
        &["restore", "saved", "--data-dir", "full"],
        &["restore", "saved", "--data-dir", "new", "--wal-dir", "empty"],
        &["restore", "saved", "--data-dir", "new", "--name", "other"],
        &["restore", "saved", "--data-dir", "new", "--bump-revision", "5"],
        &["restore", "saved", "--data-dir", "new", "--mark-compacted"],
        &[
            "restore",
            "saved",
            "--data-dir",
            "new",
            "--initial-advertise-peer-urls=http://127.0.0.1:1",
        ],
        &["restore", "etcd-saved/member/snap/db", "--data-dir", "new"],
    ] {
        let arguments = [&["snapshot"], arguments].concat();
        let ours = stage.run(&server::kvorum(), &arguments);
        assert!(!stage.path("new").exists(), "{arguments:?} left something");
        let theirs = stage.run(&stage.judges.etcdutl, &arguments);
        let _ = fs::remove_dir_all(stage.path("new"));
        assert_eq!(ours.status.code(), theirs.status.code(), "{arguments:?}");
        let text = |output: &Output| {
            let text = String::from_utf8(output.stderr.clone()).unwrap();
            text.lines().find_map(|line| line.strip_prefix("Error: ")).unwrap().to_owned()
        };
        let (ours, theirs) = (text(&ours), text(&theirs));
        // Where kvorum says more, it begins with what etcd says; but for the system call.
        let common = ours.bytes().zip(theirs.bytes()).take_while(|(a, b)| a == b).count();
        let is_missing = ours.contains("No such file") && theirs.contains("no such file");
        assert!(common >= 5 || is_missing, "{arguments:?}: {ours:?}, and etcd: {theirs:?}");
    }
    stage.restore(&["saved", "--data-dir", "empty"]);
    // An attempt that was killed is no member, and in nobody's way.
    fs::create_dir_all(stage.path("killed/member.new/ckpt-1")).unwrap();
    let refused = stage.refused("killed", &[]);
    assert!(refused.contains("a restore was cut short"), "{refused}");
    stage.restore(&["saved", "--data-dir", "killed"]);
    // One that was killed just before the end is completed.
    fs::rename(stage.path("killed/member"), stage.path("killed/member.new")).unwrap();
    drop(stage.kvorum("killed", &[]));
    // One whose log is elsewhere may have begun it, which nobody else's is taken for.
    let apart = ["saved", "--data-dir", "apart", "--wal-dir", "apart-wal"];
    stage.restore(&apart);
    let cut_short = || {
        fs::rename(stage.path("apart/member"), stage.path("apart/member.new")).unwrap();
        fs::remove_file(stage.path("apart/member.new/CURRENT")).unwrap();
    };
    cut_short();
    let refused = stage.refused("apart", &["--wal-dir", "apart-wal"]);
    assert!(refused.contains("a restore was cut short"), "{refused}");
    stage.restore(&apart);
    cut_short();
    fs::write(stage.path("apart-wal/other"), "").unwrap();
    let refused = stage.run(&server::kvorum(), &[&["snapshot", "restore"], &apart[..]].concat());
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("wal-dir") && text.contains("exists"), "{text}");
    fs::remove_file(stage.path("apart-wal/other")).unwrap();
    stage.restore(&apart);
    drop(stage.kvorum("apart", &["--wal-dir", "apart-wal"]));
}

fn disk(data_dir: &Path) -> Place {
    Place::Disk { data_dir: data_dir.to_owned(), wal_dir: None, fsync: false }
}

fn as_default(file: &Path, data_dir: &Path, skip_hash_check: bool) -> Restore {
    Restore {
        file: file.to_owned(),
        data_dir: data_dir.to_owned(),
        wal_dir: None,
        name: "default".to_owned(),
        initial_cluster: vec![("default".to_owned(), vec!["http://localhost:2380".to_owned()])],
        cluster_token: "etcd-cluster".to_owned(),
        skip_hash_check,
        bump_revision: 0,
        disable_auth: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_start_and_a_restore_exclude_each_other() {
    let Some(mut stage) = Stage::new("start and restore") else { return };
    stage.saved("saved").await;
    let (file, data_dir) = (stage.path("saved"), stage.path("data"));
    let alone = Bootstrap {
        initial_cluster: as_default(&file, &data_dir, false).initial_cluster,
        cluster_token: "etcd-cluster".to_owned(),
        name: "default".to_owned(),
        cluster_version: "3.7.0".to_owned(),
        ..Bootstrap::default()
    };
    let start = || recover::open(&disk(&data_dir), &alone);
    // A start in the middle of a restore.
    let mut refused = None;
    let restored = restore(&as_default(&file, &data_dir, false), &mut |_, _| {
        let error = start().err().expect("it must not start").to_string();
        assert_eq!(fs::read_dir(&data_dir).unwrap().count(), 1, "nothing was made");
        refused = Some(error);
    });
    let (restored, refused) = (restored.unwrap(), refused.unwrap());
    for word in [data_dir.to_str().unwrap(), "kvorum snapshot restore", "start again"] {
        assert!(refused.contains(word), "{word:?} is not in {refused}");
    }
    let recovered = start().unwrap();
    assert_eq!(recovered.state.store().revision(), restored.revision);
    // A restore under a server, or behind one.
    for server in [Some(recovered), None] {
        let runs = server.is_some();
        let error = restore(&as_default(&file, &data_dir, false), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("not empty"), "{runs}: {error}");
    }
    // A start that waits for a restore serves what was restored.
    fs::remove_dir_all(&data_dir).unwrap();
    let (opened, restored) = std::thread::scope(|scope| {
        let mut starting = None;
        let restored = restore(&as_default(&file, &data_dir, false), &mut |_, _| {
            // However long the restore takes.
            let until_free = || loop {
                match start() {
                    Err(OpenError::InUse(_)) => {}
                    opened => break opened.map(|recovery| recovery.state.store().revision()),
                }
            };
            starting.get_or_insert_with(|| scope.spawn(until_free));
        });
        (starting.unwrap().join().unwrap(), restored)
    });
    assert_eq!(opened.unwrap(), restored.unwrap().revision);
    // A restore that waits for a start is refused.
    fs::remove_dir_all(&data_dir).unwrap();
    let claim = Claim::of(&data_dir, false).unwrap().unwrap();
    std::thread::scope(|scope| {
        let until_free = || loop {
            match restore(&as_default(&file, &data_dir, false), &mut |_, _| {}) {
                Err(RestoreError::Stage(StageError::InUse(_))) => {}
                restored => break restored,
            }
        };
        let restoring = scope.spawn(until_free);
        // What a start does in between.
        fs::create_dir(data_dir.join("member")).unwrap();
        drop(claim);
        let error = restoring.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("not empty"), "{error}");
    });
    // Both at once: whichever is first, what was restored is what is served.
    let (mut served, mut empty) = (0, 0);
    for round in 0..ROUNDS_AT_ONCE {
        fs::remove_dir_all(&data_dir).unwrap();
        let mut later = |most_us| Duration::from_micros(stage.rng.below(most_us) as u64);
        let (start_later, restore_later) = (later(3000), later(1000));
        let (opened, restored) = std::thread::scope(|scope| {
            let restoring = scope.spawn(|| {
                std::thread::sleep(restore_later);
                restore(&as_default(&file, &data_dir, false), &mut |_, _| {})
            });
            std::thread::sleep(start_later);
            let opened = start().map(|recovery| recovery.state.store().revision());
            (opened, restoring.join().unwrap())
        });
        match (opened, &restored) {
            (Ok(revision), Ok(restored)) => {
                assert_eq!(revision, restored.revision, "{round}");
                served += 1;
            }
            (Ok(1), Err(_)) => empty += 1,
            (Err(OpenError::InUse(_)), Ok(_)) => {}
            (opened, restored) => panic!("{round}: {opened:?}, and {restored:?}"),
        }
        if let Ok(restored) = restored {
            assert_eq!(start().unwrap().state.store().revision(), restored.revision);
        }
        assert!(!stage.path("data/member.new").exists(), "{round}: nothing is left half made");
    }
    eprintln!("of {ROUNDS_AT_ONCE}, {served} served what was restored, {empty} were first");
}

/// Changes a file in a way that its number says.
fn mutate(bytes: &mut Vec<u8>, number: u64, rng: &mut Rng) -> String {
    let pages = bytes.len() / 4096;
    // Those with a header of their own: not the inside of a large value.
    let is_head = |page: &usize| bytes[page * 4096..][..8] == (*page as u64).to_le_bytes();
    let heads: Vec<usize> = (0..pages).filter(is_head).collect();
    match number % 10 {
        0 => {
            bytes.truncate(rng.below(bytes.len()));
            format!("cut to {} bytes", bytes.len())
        }
        1 => {
            bytes.truncate(rng.below(pages) * 4096);
            format!("cut to {} bytes", bytes.len())
        }
        2 => {
            let page = rng.pick(&heads);
            bytes[page * 4096..][..4096].fill(0);
            format!("page {page} is zeros")
        }
        3 => {
            let (from, to) = (rng.below(pages), rng.pick(&heads));
            bytes.copy_within(from * 4096..(from + 1) * 4096, to * 4096);
            format!("page {to} is page {from}")
        }
        4 => {
            // A meta with other numbers, whose checksum is right.
            let (meta, field) = (rng.below(2) * 4096 + 16, rng.pick(&[4, 8, 16, 32, 40]));
            bytes[meta + field] ^= 1 << rng.below(8);
            let sum = fnv1a(&bytes[meta..meta + 56]);
            bytes[meta + 56..meta + 64].copy_from_slice(&sum.to_le_bytes());
            format!("field {field} of the meta at {meta}")
        }
        5 => {
            *bytes = (0..rng.below(20_000)).map(|_| rng.next() as u8).collect();
            "random bytes".to_owned()
        }
        6 => {
            *bytes = b"SQLite format 3\0".iter().copied().cycle().take(8192 + 32).collect();
            "another program's file".to_owned()
        }
        // Bits of headers and elements, where pages refer to each other and to their rows.
        _ => {
            let (page, bit) = (rng.pick(&heads), rng.below(8));
            let count = usize::from(bytes[page * 4096 + 10]);
            let at = rng.below((16 + count * 16).min(4096));
            bytes[page * 4096 + at] ^= 1 << bit;
            format!("bit {bit} of byte {at} of page {page}")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn mutated_files_are_refused_or_can_be_served() {
    let Some(mut stage) = Stage::new("mutated files") else { return };
    stage.saved("saved").await;
    let original = fs::read(stage.path("saved")).unwrap();
    let (file, data_dir) = (stage.path("mutated"), stage.path("data"));
    restore(&as_default(&stage.path("saved"), &data_dir, false), &mut |_, _| {}).unwrap();
    let whole = recover::open(&disk(&data_dir), &Bootstrap::default()).unwrap().state.hash();
    fs::remove_dir_all(&data_dir).unwrap();
    let (mut refused, mut equal) = (0, 0);
    for number in 0..MUTATIONS {
        let mut bytes = original.clone();
        let what = mutate(&mut bytes, number, &mut stage.rng);
        fs::write(&file, &bytes).unwrap();
        let is_equal = bytes == original;
        if let Err(error) = restore(&as_default(&file, &data_dir, false), &mut |_, _| {}) {
            let text = error.to_string();
            assert!(text.contains(file.to_str().unwrap()), "{what}: {text}");
        } else {
            assert!(is_equal, "{what}: the hash did not notice");
            fs::remove_dir_all(&data_dir).unwrap();
        }
        assert!(!data_dir.exists(), "{what}: something was left");
        match restore(&as_default(&file, &data_dir, true), &mut |_, _| {}) {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(file.to_str().unwrap()), "{what}: {text}");
                refused += 1;
            }
            Ok(_) => {
                // bbolt has no checksums: a changed byte of a value is a value. It has to be
                // one that can be served, and the same in pages that do not matter.
                let recovered = recover::open(&disk(&data_dir), &Bootstrap::default());
                let state = recovered.unwrap_or_else(|error| panic!("{what}: {error}")).state;
                equal += u64::from(state.hash() == whole);
                drop(state);
                fs::remove_dir_all(&data_dir).unwrap();
            }
        }
        assert!(!data_dir.exists(), "{what}: something was left");
    }
    eprintln!("without their hash: {refused} of {MUTATIONS} refused, {equal} restored equal");
    assert!(refused > MUTATIONS / 2, "only {refused} of {MUTATIONS} were refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn mutated_directories_are_refused_and_stay_as_they_were() {
    let Some(mut stage) = Stage::new("mutated directories") else { return };
    stage.saved("saved").await;
    let restored = ["snapshot", "restore", "saved", "--data-dir", "one"];
    stage.succeeds(&stage.judges.etcdutl, &restored);
    let member = stage.path("one/member");
    let wal = fs::read_dir(member.join("wal")).unwrap().next().unwrap().unwrap().path();
    let (log, db) = (fs::read(&wal).unwrap(), fs::read(member.join("snap/db")).unwrap());
    let used = log.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let bootstrap = Bootstrap { import_etcd_data: true, ..Bootstrap::default() };
    let data_dir = stage.path("data");
    for number in 0..MUTATIONS / 5 {
        let (mut log, mut db) = (log[..used + 4096].to_vec(), db.clone());
        let what = if number % 2 == 0 {
            mutate(&mut db, number / 2, &mut stage.rng)
        } else {
            let at = stage.rng.below(used);
            log[at] ^= 1 << stage.rng.below(8);
            format!("byte {at} of the log")
        };
        let files =
            [("wal", wal.file_name().unwrap().to_str().unwrap(), &log), ("snap", "db", &db)];
        for (directory, name, bytes) in files {
            let directory = data_dir.join("member").join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join(name), bytes).unwrap();
        }
        match recover::open(&disk(&data_dir), &bootstrap) {
            Err(OpenError::Import(error)) => {
                let text = error.to_string();
                assert!(text.contains(data_dir.to_str().unwrap()), "{what}: {text}");
                for (directory, name, bytes) in files {
                    let path = data_dir.join("member").join(directory).join(name);
                    assert!(fs::read(path).unwrap() == *bytes, "{what}: {name} was changed");
                }
                let entries = fs::read_dir(&data_dir).unwrap().count();
                assert_eq!(entries, 1, "{what}: something was left");
            }
            Err(error) => panic!("{what}: {error}"),
            Ok(_) => assert!(data_dir.join("member.etcd/snap/db").exists()),
        }
        fs::remove_dir_all(&data_dir).unwrap();
    }
}
