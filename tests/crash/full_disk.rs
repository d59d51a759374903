//! The disk is full: writes that take space are refused, or the server stops and says
//! why; nothing is lost, and it goes on once there is space again.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, DefragmentRequest, DeleteRangeRequest, PutRequest, RangeRequest,
    StatusRequest,
};
use kvorum::storage::{Batch, SledStorage, Storage as _, StorageError, Table};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::common::rng::Rng;
use crate::common::server;
use crate::disk::{self, Disk};
use crate::history::{Changes, History, PREFIX};
use crate::load::{Load, Mix};
use crate::node::{Node, PATIENCE, POLL};
use crate::{seeded, watcher};

/// The reserve is 96 MiB, the log's segment 64 MiB.
const DISK_BYTES: u64 = 256 << 20;
/// Room for three segments and a checkpoint worth making smaller.
const FILLED_DISK_BYTES: u64 = 448 << 20;
/// What is to be written anew when the disk fills meanwhile.
const DEFRAGMENTED_BYTES: i64 = 80 << 20;
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";
/// What the member's status says while its disk is short of space.
const DISK_FULL: &str = "kvorum: the disk is almost full: writes that take space are refused";
/// Much of this and there is no space left on the disk.
const FILL_VALUE_BYTES: usize = 256 << 10;
/// How long a disk stays full while checkpoints are due every second.
const FULL_FOR: Duration = Duration::from_millis(2500);

/// Free bytes on a disk on which what is restored has no room: not for the first of its keys, not
/// for the last, not for the log.
const TOO_FEW_BYTES: [u64; 3] = [1 << 20, 12 << 20, 17 << 20];
/// And on which it has.
const ENOUGH_BYTES: u64 = 64 << 20;

/// A server on a small disk, clients' memory of it, and a watcher.
struct Rig {
    node: Node,
    history: Arc<History>,
    follower: JoinHandle<()>,
    rng: Rng,
    disk: Disk,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(test: &str, disk: impl FnOnce() -> Disk) -> Option<Rig> {
        if let Some(reason) = disk::unavailable() {
            println!("{test}: skipped: {reason}");
            return None;
        }
        let rng = seeded(test);
        let directory = tempfile::tempdir().unwrap();
        let disk = disk();
        let log = directory.path().join("log");
        let flags = ["--snapshot-count=200", "--snapshot-catchup-entries=10"];
        let node = Node::new(&disk.path().join("data"), &log, &flags);
        let history = Arc::new(History::new());
        let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
        Some(Rig { node, history, follower, rng, disk, _directory: directory })
    }

    async fn load_for(&mut self, time: Duration, mix: Mix) {
        let load = Load::start(&self.node.channel(), &self.history, mix, &mut self.rng);
        tokio::time::sleep(time).await;
        load.finish().await;
    }

    async fn verify(&mut self) {
        self.history.verify(self.node.channel(), &mut self.rng).await;
        assert!(!self.follower.is_finished(), "the watcher has failed");
        assert!(!self.node.log().contains("panicked"), "{}", self.node.log_tail());
    }

    async fn put(&self) -> Result<(), Status> {
        let put = PutRequest {
            key: format!("{PREFIX}-probe").into(),
            value: format!("{:?}", Instant::now()).into(),
            ..Default::default()
        };
        self.history.attempt(&put.value);
        let floor = self.history.told();
        let changes = Changes::from([(put.key.clone(), Some(put.value.clone()))]);
        let told = KvClient::new(self.node.channel()).put(put).await?.into_inner();
        self.history.acknowledge(told.header.expect("a header").revision, floor, changes);
        Ok(())
    }

    /// Waits until puts are refused for want of space; `false` if the server stopped.
    async fn wait_until_refused(&mut self) -> bool {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if self.node.exit_status().is_some() {
                return false;
            }
            match self.put().await {
                Ok(()) => {}
                Err(status) if status.message() == NO_SPACE => {
                    assert_eq!(status.code(), Code::ResourceExhausted);
                    return true;
                }
                Err(status) => println!("while the disk fills: {status}"),
            }
            tokio::time::sleep(POLL).await;
        }
        panic!("writes go on:\n{}", self.node.log_tail());
    }

    async fn wait_until_accepted(&mut self) {
        let began = Instant::now();
        while let Err(status) = self.put().await {
            assert!(began.elapsed() < PATIENCE, "{status}\n{}", self.node.log_tail());
            tokio::time::sleep(POLL).await;
        }
    }

    /// All that takes no space is served.
    async fn check_what_is_still_served(&mut self) {
        let mut kv = KvClient::new(self.node.channel());
        let range = RangeRequest { key: format!("{PREFIX}0001").into(), ..Default::default() };
        kv.range(range).await.expect("reads go on");
        let delete =
            DeleteRangeRequest { key: format!("{PREFIX}-none").into(), ..Default::default() };
        kv.delete_range(delete).await.expect("deletes go on");
        let revision = self.history.seen();
        self.history.ask_compaction(revision);
        let compaction = CompactionRequest { revision, physical: true };
        match kv.compact(compaction).await {
            Ok(_) => self.history.compacted(revision),
            // It went on the last time, and nothing was written since.
            Err(status) => assert_eq!(status.code(), Code::OutOfRange, "{status}"),
        }
        assert!(self.node.is_healthy());
        self.verify().await;
    }

    /// What `etcdctl endpoint status` has in its column of errors.
    async fn status_errors(&self) -> Vec<String> {
        let mut maintenance = MaintenanceClient::new(self.node.channel());
        let status = maintenance.status(StatusRequest {}).await.expect("answers");
        status.into_inner().errors
    }

    async fn db_size(&self) -> i64 {
        let mut maintenance = MaintenanceClient::new(self.node.channel());
        maintenance.status(StatusRequest {}).await.expect("answers").into_inner().db_size
    }

    /// Another program's file that leaves this much free.
    fn fill(&self, leave_bytes: u64) -> PathBuf {
        let path = self.disk.path().join("other");
        fill(&self.disk.path(), &path, leave_bytes);
        path
    }
}

/// Writes a file until no more than `leave_bytes` are free.
fn fill(disk: &Path, path: &Path, leave_bytes: u64) {
    let mut file = File::create(path).unwrap();
    // Something a file system does not compress away or keep in the inode.
    let piece = vec![0x5a; 1 << 20];
    loop {
        let stat = rustix::fs::statvfs(disk).unwrap();
        let spare = (stat.f_bavail * stat.f_frsize).saturating_sub(leave_bytes);
        let bytes = piece.len().min(usize::try_from(spare).unwrap());
        if bytes == 0 || file.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    // What could not be allocated need not be there.
    let _ = file.sync_all();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_space_is_refused_until_there_is_some() {
    let Some(mut rig) = Rig::new("outside", || Disk::ext4(DISK_BYTES)) else { return };
    rig.node.start();
    rig.load_for(Duration::from_millis(500), Mix::Everything).await;
    for leave_bytes in [64 << 20, 8 << 20] {
        let other = rig.fill(leave_bytes);
        assert!(rig.wait_until_refused().await, "{}", rig.node.log_tail());
        rig.load_for(Duration::from_millis(300), Mix::Everything).await;
        rig.check_what_is_still_served().await;
        // The other file is still there, so nothing ends the shortage meanwhile.
        assert_eq!(rig.status_errors().await, [DISK_FULL]);
        fs::remove_file(other).unwrap();
        rig.wait_until_accepted().await;
        assert_eq!(rig.status_errors().await, Vec::<String>::new());
        rig.load_for(Duration::from_millis(300), Mix::Everything).await;
        rig.verify().await;
    }
    rig.node.kill();
    rig.node.start();
    rig.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_filled_by_writing_is_emptied_by_defragmenting() {
    let Some(mut rig) = Rig::new("inside", || Disk::ext4(FILLED_DISK_BYTES)) else { return };
    rig.node.start();
    let mix = Mix::Fill(FILL_VALUE_BYTES);
    let load = Load::start(&rig.node.channel(), &rig.history, mix, &mut rig.rng);
    assert!(rig.wait_until_refused().await, "{}", rig.node.log_tail());
    load.finish().await;
    rig.check_what_is_still_served().await;
    let mut maintenance = MaintenanceClient::new(rig.node.channel());
    maintenance.defragment(DefragmentRequest {}).await.expect("defragments");
    rig.wait_until_accepted().await;
    rig.load_for(Duration::from_millis(300), Mix::Everything).await;
    rig.verify().await;
    rig.node.kill();
    rig.node.start();
    rig.verify().await;
}

/// Another program takes all there is while the checkpoint is written anew: the one before
/// goes on counting, whoever asked is told, and nobody has to restart anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_filled_during_defragmentation_loses_nothing() {
    let Some(mut rig) = Rig::new("defragmenting", || Disk::ext4(FILLED_DISK_BYTES)) else { return };
    rig.node.start();
    // So much that writing it takes a while, and so little that it would fit twice.
    let load = Load::start(&rig.node.channel(), &rig.history, Mix::Fill(64 << 10), &mut rig.rng);
    let began = Instant::now();
    while rig.db_size().await < DEFRAGMENTED_BYTES {
        assert!(began.elapsed() < PATIENCE, "{}", rig.node.log_tail());
        tokio::time::sleep(POLL).await;
    }
    load.finish().await;
    let mut maintenance = MaintenanceClient::new(rig.node.channel());
    let defragmented =
        tokio::spawn(async move { maintenance.defragment(DefragmentRequest {}).await });
    let checkpoints = || {
        let member = rig.disk.path().join("data/member");
        let names = fs::read_dir(member).unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with("ckpt-")).count()
    };
    while checkpoints() < 2 && !defragmented.is_finished() {
        tokio::time::sleep(POLL).await;
    }
    let other = rig.fill(0);
    match tokio::time::timeout(PATIENCE, defragmented).await.expect("an answer").unwrap() {
        Ok(_) => println!("done before the disk was full"),
        Err(status) => {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            assert_eq!(status.message(), NO_SPACE);
        }
    }
    assert!(rig.wait_until_refused().await, "{}", rig.node.log_tail());
    rig.check_what_is_still_served().await;
    fs::remove_file(other).unwrap();
    rig.wait_until_accepted().await;
    let mut maintenance = MaintenanceClient::new(rig.node.channel());
    maintenance.defragment(DefragmentRequest {}).await.expect("defragments");
    rig.load_for(Duration::from_millis(300), Mix::Everything).await;
    rig.verify().await;
    rig.node.kill();
    rig.node.start();
    rig.verify().await;
}

/// The disk is full to the last byte from one moment to the next.
async fn full_at_once(mut rig: Rig) {
    rig.node.start();
    rig.load_for(Duration::from_millis(300), Mix::Everything).await;
    let mix = Mix::Fill(64 << 10);
    let load = Load::start(&rig.node.channel(), &rig.history, mix, &mut rig.rng);
    let other = rig.fill(0);
    let refused = rig.wait_until_refused().await;
    if refused {
        tokio::time::sleep(FULL_FOR).await;
        load.finish().await;
        if rig.node.exit_status().is_none() {
            rig.verify().await;
        }
    } else {
        load.stop().await;
    }
    if rig.node.exit_status().is_some() {
        let status = rig.node.wait_for_exit();
        assert!(!status.success(), "{status}");
        assert!(rig.node.log_tail().contains("space"), "{}", rig.node.log_tail());
        println!("stopped");
    }
    fs::remove_file(other).unwrap();
    if !rig.node.is_running() {
        rig.node.start();
    }
    rig.wait_until_accepted().await;
    rig.load_for(Duration::from_millis(1500), Mix::Everything).await;
    rig.verify().await;
    rig.node.kill();
    rig.node.start();
    rig.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_full_at_once_loses_nothing() {
    let Some(rig) = Rig::new("at once", || Disk::ext4(DISK_BYTES)) else { return };
    full_at_once(rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_disk_full_at_once_loses_nothing() {
    let Some(rig) = Rig::new("at once in memory", || Disk::tmpfs(DISK_BYTES)) else { return };
    full_at_once(rig).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_started_on_a_full_disk_says_so_or_serves() {
    let Some(mut rig) = Rig::new("started full", || Disk::ext4(DISK_BYTES)) else { return };
    rig.node.start();
    rig.load_for(Duration::from_millis(1500), Mix::Everything).await;
    rig.node.kill();
    let other = rig.fill(0);
    rig.node.forget_log();
    rig.node.spawn();
    let began = Instant::now();
    while rig.node.exit_status().is_none() && !rig.node.is_healthy() {
        assert!(began.elapsed() < PATIENCE, "{}", rig.node.log_tail());
        std::thread::sleep(POLL);
    }
    if rig.node.exit_status().is_some() {
        assert!(!rig.node.wait_for_exit().success());
        assert!(rig.node.log().contains("space"), "{}", rig.node.log_tail());
        println!("refused to start");
    } else {
        assert!(rig.wait_until_refused().await, "{}", rig.node.log_tail());
        rig.verify().await;
    }
    fs::remove_file(other).unwrap();
    if !rig.node.is_running() {
        rig.node.start();
    }
    rig.wait_until_accepted().await;
    rig.verify().await;
}

/// sled itself runs into the end of the disk: nothing that was synced is lost, and once
/// there is space the same process goes on with the same file.
#[test]
fn a_checkpoint_that_ran_into_the_end_of_its_disk_is_opened_anew() {
    if let Some(reason) = disk::unavailable() {
        println!("skipped: {reason}");
        return;
    }
    for disk in [Disk::tmpfs(48 << 20), Disk::ext4(64 << 20)] {
        let path = disk.path().join("checkpoint");
        let mut storage = SledStorage::open(&path).unwrap();
        let put = |storage: &mut SledStorage, number: u32| {
            let mut batch = Batch::new();
            let value = vec![number as u8; 300 << 10];
            batch.put(Table::Mvcc, number.to_be_bytes().to_vec(), value);
            storage.write(batch)?;
            storage.sync()
        };
        for number in 0..10 {
            put(&mut storage, number).unwrap();
        }
        let other = disk.path().join("other");
        fill(&disk.path(), &other, 0);
        let mut synced = 10;
        let error = loop {
            match put(&mut storage, synced) {
                Ok(()) => synced += 1,
                Err(error) => break error,
            }
            assert!(synced < 1000);
        };
        println!("full after {synced} values: {error}");
        assert!(error.is_full(), "{error:?}");
        assert!(matches!(put(&mut storage, synced), Err(StorageError::Failed { .. })));
        let may_be_reopened = storage.may_be_reopened();
        drop(storage);
        fs::remove_file(other).unwrap();
        assert!(may_be_reopened);
        let mut storage = SledStorage::open(&path).unwrap();
        for number in 0..synced + 10 {
            if number >= synced {
                put(&mut storage, number).unwrap();
            }
            let value = storage.get(Table::Mvcc, &number.to_be_bytes()).unwrap().unwrap();
            assert!(value.len() == 300 << 10 && value.iter().all(|&byte| byte == number as u8));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_says_what_to_do_and_leaves_nothing() {
    if let Some(reason) = disk::unavailable() {
        println!("a restore on a full disk: skipped: {reason}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut node = Node::new(&at("data"), &at("log"), &[]);
    node.start();
    let mut kv = KvClient::new(node.channel());
    for number in 0..64 {
        let value = vec![number; FILL_VALUE_BYTES];
        let key = format!("key {number}");
        let put = PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() };
        kv.put(put).await.unwrap();
    }
    let run = |arguments: &[&str]| {
        let output = Command::new(server::kvorum()).arg("snapshot").args(arguments).output();
        let output = output.unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let saved = at("saved");
    let saved = saved.to_str().unwrap();
    let (is_saved, said) = run(&["save", saved, &format!("--endpoints={}", node.url())]);
    assert!(is_saved, "{said}");
    let disk = Disk::tmpfs(ENOUGH_BYTES);
    let data_dir = disk.path().join("data");
    let restore = ["restore", saved, "--data-dir", data_dir.to_str().unwrap()];
    let wal_dir = disk.path().join("wal");
    let with_wal_dir = [&restore[..], &["--wal-dir", wal_dir.to_str().unwrap()]].concat();
    let attempts = TOO_FEW_BYTES.into_iter().flat_map(|bytes| [(bytes, false), (bytes, true)]);
    for (free_bytes, has_wal_dir) in attempts {
        if has_wal_dir {
            // As an attempt leaves them that was killed before it began the log.
            fs::create_dir_all(data_dir.join("member.new")).unwrap();
            fs::create_dir(&wal_dir).unwrap();
        }
        let filler = disk.path().join("filler");
        fs::write(&filler, vec![1; (ENOUGH_BYTES - free_bytes) as usize]).unwrap();
        let (is_restored, said) = run(if has_wal_dir { &with_wal_dir } else { &restore });
        println!("{free_bytes} bytes free: {said}");
        assert!(!is_restored, "{free_bytes} bytes are enough");
        let of_disk = disk.path();
        for words in [of_disk.to_str().unwrap(), "No space left", "Free space", "run this again"] {
            assert!(said.contains(words), "{free_bytes}: {words:?} is not in {said}");
        }
        assert!(!said.contains("start the member") && !said.contains("panicked"), "{said}");
        fs::remove_file(&filler).unwrap();
        if has_wal_dir {
            // They were there before; this fails if anything is in them.
            fs::remove_dir(&data_dir).unwrap();
            fs::remove_dir(&wal_dir).unwrap();
        }
        assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0, "something is left");
    }
    let (is_restored, said) = run(&restore);
    assert!(is_restored, "{said}");
}
