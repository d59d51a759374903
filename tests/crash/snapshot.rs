//! `kill -9` while data moves: of `kvorum snapshot save`, of the server that it saves from, of
//! `kvorum snapshot restore`, and of a start that imports an etcd's directory.
//!
//! Each is first let through once, to see how long it takes; kills fall within that time. What
//! must be afterwards:
//!
//! | killed  | what is there                      | and then                                  |
//! |---------|------------------------------------|-------------------------------------------|
//! | save    | a whole file, or none of that name | the next save makes it, and leaves no part |
//! | server  | all that it acknowledged           | a new save works                          |
//! | restore | all of the file, or no member      | a start says so; restoring again works    |
//! | import  | all of etcd's files, byte for byte | a start with the flag completes it        |
//!
//! "All" is told by HashKV, which covers every key at every revision that was not compacted. What a
//! server saved in one round is restored in the next.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvorum::backup::file::SnapshotFile;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, HashKvRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp,
    TxnRequest, request_op::Request,
};
use tonic::transport::Channel;

use crate::common::judge::{self, Judges};
use crate::common::rng::Rng;
use crate::common::server;
use crate::node::{Node, PATIENCE, POLL};
use crate::{seeded, setting};

/// Kills in an ordinary run: each of the four once.
const ROUNDS: u64 = 4;
/// What is moved: some 40 MiB, in values that take pages of their own and in small ones.
const TRANSACTIONS: usize = 96;
const PUTS: usize = 64;
const VALUE_BYTES: [usize; 4] = [100, 2_000, 14_000, 16_668];
/// A lease that does not end during the test, in seconds.
const TTL_SECS: i64 = 100_000;
/// Of so many rounds at least [`PERCENT_WITHIN`] must have met something that was under way.
const ROUNDS_COUNTED: u64 = 20;
const PERCENT_WITHIN: u64 = 50;

/// What HashKV says of all that there is: the hash, the revision, and that of the compaction.
type Hash = (u32, i64, i64);

async fn hash_kv(channel: Channel, revision: i64) -> Hash {
    let mut maintenance = MaintenanceClient::new(channel);
    let answer = maintenance.hash_kv(HashKvRequest { revision }).await.unwrap().into_inner();
    (answer.hash, answer.hash_revision, answer.compact_revision)
}

/// Random keys with a history, some of them with a lease.
async fn fill(channel: Channel, rng: &mut Rng) {
    let mut kv = KvClient::new(channel.clone()).max_encoding_message_size(64 << 20);
    let lease = LeaseGrantRequest { id: 7, ttl: TTL_SECS };
    LeaseClient::new(channel).lease_grant(lease).await.unwrap();
    let mut revision = 0;
    for at in 0..TRANSACTIONS {
        let puts = (0..PUTS).map(|number| {
            let words = rng.pick(&VALUE_BYTES) / 8;
            let value: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
            let put = PutRequest {
                // Half of the keys are written twice.
                key: format!("bulk/{:02}/{number}", at % (TRANSACTIONS * 2 / 3)).into(),
                value: value.into(),
                lease: if number == 0 { 7 } else { 0 },
                ..PutRequest::default()
            };
            RequestOp { request: Some(Request::RequestPut(put)) }
        });
        let request = TxnRequest { success: puts.collect(), ..TxnRequest::default() };
        revision = kv.txn(request).await.unwrap().into_inner().header.unwrap().revision;
    }
    let compaction = CompactionRequest { revision: revision - 5, physical: true };
    kv.compact(compaction).await.unwrap();
}

/// Writes one key after the other, and counts what was acknowledged.
async fn write(channel: Channel, acknowledged: Arc<AtomicU64>) {
    let mut kv = KvClient::new(channel);
    loop {
        let number = acknowledged.load(Ordering::Relaxed);
        let key = format!("written/{number:08}");
        let put =
            PutRequest { value: key.clone().into(), key: key.into(), ..PutRequest::default() };
        if kv.put(put).await.is_ok() {
            acknowledged.store(number + 1, Ordering::Relaxed);
        } else {
            tokio::time::sleep(POLL).await;
        }
    }
}

/// How many keys of those are there.
async fn written(channel: Channel) -> u64 {
    let range = RangeRequest {
        key: "written/".into(),
        range_end: "written0".into(),
        count_only: true,
        ..RangeRequest::default()
    };
    KvClient::new(channel).range(range).await.unwrap().into_inner().count as u64
}

/// How long each takes when it is let through.
struct Took {
    save: Duration,
    restore: Duration,
    import: Duration,
}

struct Rig {
    directory: tempfile::TempDir,
    judges: Option<Judges>,
    rng: Rng,
    /// What is saved.
    source: Node,
    /// Started on what was restored or imported.
    target: Node,
    acknowledged: Arc<AtomicU64>,
    /// What the file `saved` holds.
    saved: Hash,
    /// What etcd's directory holds.
    etcds: Hash,
    took: Took,
    /// Kills that met something that was under way.
    within: u64,
}

impl Rig {
    async fn new() -> Rig {
        let mut rng = seeded("snapshot");
        let directory = tempfile::Builder::new().prefix("kvorum-test-").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut source = Node::new(&at("source"), &at("source-log"), &[]);
        let target = Node::new(&at("restored"), &at("target-log"), &[]);
        source.start();
        fill(source.channel(), &mut rng).await;
        let hash = hash_kv(source.channel(), 0).await;
        let none = Duration::ZERO;
        let took = Took { save: none, restore: none, import: none };
        let acknowledged = Arc::new(AtomicU64::new(0));
        let judges = judge::find("kills of an import");
        let (saved, etcds, within) = (hash, hash, 0);
        let mut rig = Rig {
            directory,
            judges,
            rng,
            source,
            target,
            acknowledged,
            saved,
            etcds,
            took,
            within,
        };
        rig.save("saved");
        rig.restore("restored", None);
        rig.target_serves(hash).await;
        if let Some(judges) = &rig.judges {
            let mut etcdutl = Command::new(&judges.etcdutl);
            let file = rig.path("saved");
            etcdutl.args(["snapshot", "restore", "--data-dir"]).args([&rig.path("etcds"), &file]);
            let output = etcdutl.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            rig.copy_etcds();
            rig.import(None).await;
        }
        rig.clean();
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A time within what would take `took`.
    fn moment(&mut self, took: Duration) -> Duration {
        Duration::from_micros(self.rng.next() % took.as_micros() as u64)
    }

    fn saving(&self, file: &str) -> Command {
        let mut command = Command::new(server::kvorum());
        command.args(["snapshot", "save", "--endpoints", &self.source.url()]).arg(self.path(file));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Saves, and looks at what comes of it.
    fn save(&mut self, file: &str) {
        let began = Instant::now();
        let output = self.saving(file).output().unwrap();
        self.took.save = began.elapsed();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.assert_whole(file);
        assert!(!self.path(&part(file)).exists());
    }

    #[track_caller]
    fn assert_whole(&self, file: &str) {
        let file = SnapshotFile::open(&self.path(file)).unwrap();
        assert!(file.has_hash());
        file.check_hash().unwrap();
    }

    fn restoring(&self, data: &str, wal: Option<&Path>) -> Command {
        let mut command = Command::new(server::kvorum());
        command.args(["snapshot", "restore"]).arg(self.path("saved"));
        command.arg("--data-dir").arg(self.path(data));
        command.args(wal_flag(wal));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn restore(&mut self, data: &str, wal: Option<&Path>) {
        let began = Instant::now();
        let output = self.restoring(data, wal).output().unwrap();
        self.took.restore = began.elapsed();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn copy_etcds(&self) {
        let mut copy = Command::new("cp");
        copy.arg("-r").args([self.path("etcds"), self.path("imported")]);
        assert!(copy.status().unwrap().success());
    }

    /// Lets an import through, or completes it, and looks at what comes of it.
    async fn import(&mut self, wal: Option<&Path>) {
        self.target.move_to(&self.path("imported"));
        self.target.set_arguments(importing(wal));
        let is_begun = !self.path("imported/member.etcd").exists();
        let took = self.target_serves(self.etcds).await;
        if is_begun {
            self.took.import = took;
        }
    }

    /// The target, started on what is there, serves just this, and goes on. How long it took to
    /// start.
    async fn target_serves(&mut self, all: Hash) -> Duration {
        self.target.forget_log();
        let began = Instant::now();
        self.target.start();
        let took = began.elapsed();
        assert_eq!(hash_kv(self.target.channel(), 0).await, all);
        let mut kv = KvClient::new(self.target.channel());
        let put = PutRequest { key: "new".into(), ..PutRequest::default() };
        let header = kv.put(put).await.unwrap().into_inner().header.unwrap();
        assert_eq!(header.revision, all.1 + 1);
        assert!(!self.target.log().contains("panicked"), "{}", self.target.log_tail());
        self.target.kill();
        took
    }

    /// The target does not start, and says these things.
    fn target_refuses(&mut self, parts: &[&str]) {
        self.target.forget_log();
        self.target.spawn();
        assert!(!self.target.wait_for_exit().success());
        let log = self.target.log();
        assert!(parts.iter().all(|part| log.contains(part)), "{parts:?}: {log}");
    }

    /// Lets a program run for that long, and kills it.
    async fn kill(&mut self, mut program: Command, moment: Duration) {
        let mut child = program.spawn().unwrap();
        tokio::time::sleep(moment).await;
        self.within += u64::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    async fn kill_save(&mut self) -> &'static str {
        let moment = self.moment(self.took.save);
        self.kill(self.saving("file"), moment).await;
        let (file, part) = (self.path("file"), self.path(&part("file")));
        let left = fs::read(&file).ok();
        let outcome = match (&left, part.exists()) {
            (Some(_), is_part) => {
                assert!(!is_part, "a file, and a part of one");
                self.assert_whole("file");
                "a whole file"
            }
            (None, true) => "a part",
            (None, false) => "nothing",
        };
        self.save("file");
        let file = fs::read(file).unwrap();
        assert!(left.is_none_or(|left| left == file), "two saves of one state differ");
        outcome
    }

    async fn kill_server(&mut self) -> &'static str {
        let before = hash_kv(self.source.channel(), 0).await;
        let acknowledged = Arc::clone(&self.acknowledged);
        let writer = tokio::spawn(write(self.source.channel(), acknowledged));
        let moment = self.moment(self.took.save);
        let mut client = self.saving("file").spawn().unwrap();
        tokio::time::sleep(moment).await;
        self.within += u64::from(self.path(&part("file")).exists());
        self.source.kill();
        let status = ended(&mut client).await;
        writer.abort();
        let _ = writer.await;
        assert!(!self.path(&part("file")).exists(), "a part is left");
        assert_eq!(self.path("file").exists(), status.success());
        if status.success() {
            self.assert_whole("file");
        }
        self.source.start();
        assert_eq!(hash_kv(self.source.channel(), before.1).await, before);
        let (told, found) =
            (self.acknowledged.load(Ordering::Relaxed), written(self.source.channel()).await);
        assert!(found == told || found == told + 1, "{told} acknowledged, {found} there");
        assert!(!self.source.log().contains("panicked"), "{}", self.source.log_tail());
        self.acknowledged.store(found, Ordering::Relaxed);
        self.save("saved");
        self.saved = hash_kv(self.source.channel(), 0).await;
        if status.success() { "a whole file" } else { "nothing" }
    }

    async fn kill_restore(&mut self) -> &'static str {
        let wal = self.a_wal_directory();
        let moment = self.moment(self.took.restore);
        self.kill(self.restoring("restored", wal.as_deref()), moment).await;
        let data_dir = self.path("restored");
        self.target.move_to(&data_dir);
        self.target.set_arguments(wal_flag(wal.as_deref()));
        let (member, staged) = (data_dir.join("member"), data_dir.join("member.new"));
        let outcome = if member.exists() || staged.join("CURRENT").exists() {
            self.target_serves(self.saved).await;
            // Perhaps the machine was busier when it was measured.
            self.clean();
            self.restore("restored", None);
            return "all";
        } else if staged.exists() {
            // Twice: the first start must have changed nothing.
            for _ in 0..2 {
                self.target_refuses(&[staged.to_str().unwrap(), "kvorum snapshot restore"]);
            }
            "a part"
        } else {
            // It was still checking the file.
            assert!(!data_dir.exists() || fs::read_dir(data_dir).unwrap().next().is_none());
            "nothing"
        };
        self.restore("restored", wal.as_deref());
        self.target_serves(self.saved).await;
        outcome
    }

    async fn kill_import(&mut self) -> &'static str {
        self.copy_etcds();
        let data_dir = self.path("imported");
        let wal = self.a_wal_directory();
        if let Some(wal) = &wal {
            fs::rename(data_dir.join("member/wal"), wal).unwrap();
        }
        self.target.move_to(&data_dir);
        self.target.set_arguments(importing(wal.as_deref()));
        self.target.forget_log();
        let moment = self.moment(self.took.import);
        self.target.spawn();
        tokio::time::sleep(moment).await;
        assert!(self.target.is_running(), "{}", self.target.log_tail());
        self.target.kill();
        let is_served = data_dir.join("member/CURRENT").exists();
        self.within += u64::from(!is_served);
        self.assert_etcds_files_are_there(wal.as_deref());
        let is_moved = data_dir.join("member.etcd").exists();
        if !is_moved {
            self.target.set_arguments(wal_flag(wal.as_deref()));
            self.target_refuses(&[data_dir.to_str().unwrap(), "--import-etcd-data"]);
            self.assert_etcds_files_are_there(wal.as_deref());
        }
        self.import(wal.as_deref()).await;
        self.assert_etcds_files_are_there(wal.as_deref());
        assert!(data_dir.join("member.etcd/snap/db").exists());
        assert!(!data_dir.join("member.new").exists());
        match (is_moved, is_served) {
            (_, true) => "all",
            (true, false) => "all, to be named",
            (false, false) => "etcd's",
        }
    }

    /// Half of the time a log's directory of its own.
    fn a_wal_directory(&mut self) -> Option<PathBuf> {
        self.rng.chance(50).then(|| self.path("wal"))
    }

    /// Each of etcd's files is there as it was, in one of the places that it may be in.
    fn assert_etcds_files_are_there(&self, wal: Option<&Path>) {
        let data_dir = self.path("imported");
        let members = [data_dir.join("member"), data_dir.join("member.etcd")];
        let (mut snaps, mut wals) = (Vec::new(), Vec::new());
        for member in members {
            snaps.push(member.join("snap"));
            wals.push(member.join("wal"));
        }
        if let Some(wal) = wal {
            wals = vec![wal.to_owned(), wal.join("wal.etcd")];
        }
        for (kind, places) in [("snap", snaps), ("wal", wals)] {
            for file in fs::read_dir(self.path("etcds/member").join(kind)).unwrap() {
                let file = file.unwrap();
                let found: Vec<PathBuf> = places
                    .iter()
                    .map(|place| place.join(file.file_name()))
                    .filter(|path| path.exists())
                    .collect();
                assert_eq!(found.len(), 1, "{}: {found:?}", file.path().display());
                let is_equal = fs::read(&found[0]).unwrap() == fs::read(file.path()).unwrap();
                assert!(is_equal, "{} was changed", found[0].display());
            }
        }
    }

    /// For the next round.
    fn clean(&self) {
        for name in ["restored", "imported", "wal"] {
            let _ = fs::remove_dir_all(self.path(name));
        }
        let _ = fs::remove_file(self.path("file"));
    }
}

/// What a save's file is called before it is whole.
fn part(file: &str) -> String {
    format!("{file}.part")
}

fn wal_flag(wal: Option<&Path>) -> Vec<String> {
    wal.map(|wal| format!("--wal-dir={}", wal.display())).into_iter().collect()
}

fn importing(wal: Option<&Path>) -> Vec<String> {
    [wal_flag(wal), vec!["--import-etcd-data".to_owned()]].concat()
}

/// Waits for a client that has lost its server.
async fn ended(client: &mut std::process::Child) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = client.try_wait().unwrap() {
            return status;
        }
        assert!(began.elapsed() < PATIENCE, "the client waits for a server that is gone");
        tokio::time::sleep(POLL).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_moved_is_there_as_a_whole_or_not_at_all() {
    let rounds = setting("KVORUM_CRASH_ROUNDS_SNAPSHOT", ROUNDS);
    let mut rig = Rig::new().await;
    let Took { save, restore, import } = rig.took;
    println!("unkilled: save {save:?}, restore {restore:?}, import {import:?}");
    let mut counted = 0;
    for round in 0..rounds {
        let (what, left) = match round % 4 {
            0 => ("save", rig.kill_save().await),
            1 => ("server", rig.kill_server().await),
            2 => ("restore", rig.kill_restore().await),
            _ if rig.judges.is_some() => ("import", rig.kill_import().await),
            _ => continue,
        };
        counted += 1;
        println!("round {round}: {what} killed, left {left}");
        rig.clean();
    }
    let within = rig.within;
    println!("{within} of {counted} kills met something that was under way");
    assert!(counted < ROUNDS_COUNTED || within * 100 >= counted * PERCENT_WITHIN);
}
