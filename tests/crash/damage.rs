//! Files that are not what they were: a torn end is what a crash leaves and is repaired;
//! everything else is refused in words that name the file, and nothing is changed. No
//! panic reaches the operator, and no server starts that has silently forgotten something.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvorum::log::{Identity, Log, LogError, Options, Recovered};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::{LeaseGrantRequest, PutRequest};
use tempfile::TempDir;

use crate::common::rng::Rng;
use crate::history::History;
use crate::load::{Load, Mix};
use crate::node::Node;
use crate::{seeded, setting, watcher};

/// Damaged copies that the server is started on in an ordinary run, for each kind of
/// damage; `KVORUM_CRASH_SAMPLES` for more.
const SAMPLES: usize = 4;
const SEGMENT_HEADER_BYTES: u64 = 4096;

/// What a server left behind, and what was in it.
struct Remains {
    directory: TempDir,
    history: Arc<History>,
}

impl Remains {
    /// Of a server that was killed, or stopped in an orderly way.
    async fn of_a_server(killed: bool, mix: Mix, rng: &mut Rng) -> Remains {
        let directory = tempfile::tempdir().unwrap();
        let mut node =
            Node::new(&directory.path().join("data"), &directory.path().join("log"), &[]);
        let history = Arc::new(History::new());
        let follower = tokio::spawn(watcher::follow(node.channel(), Arc::clone(&history)));
        node.start();
        if !killed {
            // So that there is a checkpoint with something in it.
            let load = Load::start(&node.channel(), &history, mix, rng);
            tokio::time::sleep(Duration::from_millis(1200)).await;
            load.finish().await;
            history.verify(node.channel(), rng).await;
        }
        let load = Load::start(&node.channel(), &history, mix, rng);
        tokio::time::sleep(Duration::from_millis(400)).await;
        load.finish().await;
        history.verify(node.channel(), rng).await;
        // The last record is always in doubt, and the load's last one may be most of the log.
        let mut leases = LeaseClient::new(node.channel());
        for _ in 0..2 {
            let grant = LeaseGrantRequest { ttl: 1000, id: 0 };
            leases.lease_grant(grant).await.expect("a lease");
        }
        if killed {
            node.kill();
        } else {
            assert!(node.terminate().0.success());
        }
        follower.abort();
        Remains { directory, history }
    }

    fn copy(&self) -> Copy {
        let directory = tempfile::tempdir().unwrap();
        copy_dir(&self.directory.path().join("data"), &directory.path().join("data"));
        Copy { directory }
    }
}

/// A copy to be damaged.
struct Copy {
    directory: TempDir,
}

impl Copy {
    fn member(&self) -> PathBuf {
        self.directory.path().join("data/member")
    }

    fn wal(&self) -> PathBuf {
        self.member().join("wal")
    }

    fn current(&self) -> PathBuf {
        self.member().join("CURRENT")
    }

    /// The checkpoint's name.
    fn counts(&self) -> String {
        fs::read_to_string(self.current()).unwrap().lines().next().unwrap().to_owned()
    }

    fn checkpoint(&self) -> PathBuf {
        self.member().join(self.counts())
    }

    /// Starts a server here. If it does not come up, what it says is checked for what
    /// every refusal must be, and returned.
    fn start(&self, flags: &[&str]) -> Result<Node, String> {
        let log = self.directory.path().join("log");
        let mut node = Node::new(&self.directory.path().join("data"), &log, flags);
        node.spawn();
        let serves = node.serves();
        // sled panics on damage that it did not expect, which is caught, but not unsaid.
        let log = node.log();
        let panics = log.lines().filter(|line| line.contains("panicked at"));
        assert!(panics.into_iter().all(|line| line.contains("sled")), "{}", node.log_tail());
        match serves {
            Ok(()) => Ok(node),
            Err(status) => {
                assert_eq!(status.code(), Some(1), "{}", node.log_tail());
                Err(node.log())
            }
        }
    }

    /// Starts a server that must refuse in these words, and changes nothing in doing so.
    fn assert_refused(&self, flags: &[&str], words: &[&str]) {
        for attempt in 0..2 {
            let said = self.start(flags).err().unwrap_or_else(|| panic!("starts: {words:?}"));
            for word in words {
                assert!(said.contains(word), "attempt {attempt}: {word:?} is not in {said}");
            }
        }
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

fn last_segment(wal: &Path) -> PathBuf {
    let segments = fs::read_dir(wal).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> = segments
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    segments.sort();
    segments.pop().unwrap()
}

/// Where its records end.
fn records_end(segment: &Path) -> u64 {
    let bytes = fs::read(segment).unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    // Records are padded to multiples of 8.
    (last as u64 + 1).next_multiple_of(8)
}

fn flip(path: &Path, offset: u64, mask: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
}

fn zero(path: &Path, offset: u64, bytes: usize) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0; bytes], offset).unwrap();
}

fn open_log(dir: &Path) -> Result<Recovered, LogError> {
    let identity = Identity::default();
    let options =
        Options { dir: dir.to_owned(), segment_bytes: 1 << 20, fsync: false, identity, reaches: 0 };
    Log::open(options).map(|(_, recovered)| recovered)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_torn_at_any_byte_is_repaired() {
    let mut rng = seeded("torn");
    let remains = Remains::of_a_server(true, Mix::Fill(40), &mut rng).await;
    let copy = remains.copy();
    let segment = last_segment(&copy.wal());
    let end = records_end(&segment);
    let intact = fs::read(&segment).unwrap();
    let whole = open_log(&copy.wal()).unwrap();
    assert_eq!(whole.repaired, None);

    // Every byte of the last records, by the log alone.
    let from = end.saturating_sub(500).max(SEGMENT_HEADER_BYTES);
    let mut fewest = whole.entries.len();
    for at in (from..end).rev() {
        zero(&segment, at, (end - at) as usize);
        let found = open_log(&copy.wal()).unwrap_or_else(|error| panic!("at {at}: {error}"));
        assert!(found.entries.len() <= fewest, "at {at}: entries are back");
        assert_eq!(found.entries, whole.entries[..found.entries.len()], "at {at}");
        fewest = found.entries.len();
        let file = OpenOptions::new().write(true).open(&segment).unwrap();
        file.write_all_at(&intact[at as usize..end as usize], at).unwrap();
    }
    assert!(fewest < whole.entries.len(), "nothing was torn");

    // Some of them by the server.
    let mut served = 0;
    for _ in 0..setting("KVORUM_CRASH_SAMPLES", SAMPLES) {
        let copy = remains.copy();
        let segment = last_segment(&copy.wal());
        let at = from + rng.next() % (end - from);
        zero(&segment, at, (end - at) as usize);
        match copy.start(&[]) {
            Ok(mut node) => {
                let revision = remains.history.assert_holds_a_past(node.channel()).await;
                println!("torn at {at} of {end}: at revision {revision}");
                assert!(node.terminate().0.success());
                served += 1;
            }
            Err(said) => assert!(said.contains("the checkpoint holds entries up to"), "{said}"),
        }
    }
    assert!(served > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_in_the_log_is_refused() {
    let mut rng = seeded("flipped");
    for killed in [true, false] {
        let remains = Remains::of_a_server(killed, Mix::Everything, &mut rng).await;
        for _ in 0..setting("KVORUM_CRASH_SAMPLES", SAMPLES) {
            let copy = remains.copy();
            let segment = last_segment(&copy.wal());
            let end = records_end(&segment);
            // After an orderly stop everything is known to have been there.
            let to = if killed { end / 2 } else { end };
            let offset = SEGMENT_HEADER_BYTES + rng.next() % (to - SEGMENT_HEADER_BYTES);
            flip(&segment, offset, 1 << rng.below(8));
            let name = segment.file_name().unwrap().to_str().unwrap();
            let said = copy.start(&[]).err().expect("it is refused");
            for word in ["raft log", name, "is damaged at byte", "restore a snapshot"] {
                assert!(said.contains(word), "{word:?} is not in {said}");
            }
            let (_, rest) = said.split_once("is damaged at byte ").unwrap();
            let told: u64 = rest.split(':').next().unwrap().parse().unwrap();
            assert!(told <= offset, "byte {offset} was flipped, and {told} is told");
        }
    }
}

/// Not only in the middle: once nothing was written for a moment, damage to the last record is no write
/// that kill -9 cut short.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_of_the_last_write_before_a_kill_is_refused() {
    const VALUE: &[u8] = b"acknowledged";
    let directory = tempfile::tempdir().unwrap();
    let copy = Copy { directory };
    let mut node = copy.start(&[]).expect("it starts");
    let request = PutRequest { key: "k".into(), value: VALUE.into(), ..PutRequest::default() };
    KvClient::new(node.channel()).put(request).await.unwrap();
    let segment = last_segment(&copy.wal());
    let find = || {
        let bytes = fs::read(&segment).unwrap();
        let value = bytes.windows(VALUE.len()).position(|window| window == VALUE);
        let behind = value.expect("it was acknowledged") + VALUE.len();
        (behind, bytes[behind..].iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1))
    };
    // The command's own header is behind the value, and then the next record's.
    let began = Instant::now();
    while find().1 < 40 {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing proves the last write");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.kill();
    flip(&segment, find().0 as u64 - 1, 1);
    copy.assert_refused(&[], &["raft log", "is damaged at byte", "later ones prove"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_checkpoint_is_refused_or_does_no_harm() {
    let mut rng = seeded("checkpoint");
    let remains = Remains::of_a_server(false, Mix::Everything, &mut rng).await;
    let (mut refused, mut served) = (0, 0);
    for _ in 0..2 * setting("KVORUM_CRASH_SAMPLES", SAMPLES) {
        let copy = remains.copy();
        let db = copy.checkpoint().join("db");
        let size = fs::metadata(&db).unwrap().len();
        let offset = rng.next() % size;
        match rng.below(4) {
            0 => zero(&db, offset, rng.below(5000).min((size - offset) as usize)),
            1 => OpenOptions::new().write(true).open(&db).unwrap().set_len(offset).unwrap(),
            _ => flip(&db, offset, 1 << rng.below(8)),
        }
        match copy.start(&[]) {
            Ok(node) => {
                remains.history.verify_copy(node.channel(), &mut rng).await;
                served += 1;
            }
            Err(said) => {
                let dir = copy.checkpoint();
                assert!(said.contains(dir.to_str().unwrap()), "{said}");
                assert!(said.contains("is damaged"), "{said}");
                refused += 1;
            }
        }
    }
    println!("{refused} refused, {served} served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_file_is_missed() {
    let mut rng = seeded("missing");
    let remains = Remains::of_a_server(false, Mix::Everything, &mut rng).await;

    // What the only checkpoint is called can be told without a file that says it.
    type Lose = fn(&Copy);
    let losses: [(Lose, &str); 2] = [
        (|copy| fs::remove_file(copy.current()).unwrap(), "CURRENT is missing"),
        (|copy| fs::write(copy.current(), "").unwrap(), "CURRENT does not name a checkpoint"),
    ];
    for (lose, words) in losses {
        let copy = remains.copy();
        let name = copy.counts();
        lose(&copy);
        let node = copy.start(&[]).unwrap();
        assert!(node.log().contains(words), "{words:?} is not in {}", node.log_tail());
        remains.history.verify_copy(node.channel(), &mut rng).await;
        drop(node);
        assert!(copy.counts() == name, "the checkpoint is the one that it was");
    }

    // What the log can bring back is brought back.
    let losses: [(Lose, &str); 4] = [
        (|copy| fs::write(copy.current(), "ckpt-99\n").unwrap(), "ckpt-99"),
        (|copy| fs::remove_dir_all(copy.checkpoint()).unwrap(), "it is missing"),
        (|copy| fs::remove_file(copy.checkpoint().join("synced")).unwrap(), "synced"),
        (|copy| fs::remove_file(copy.checkpoint().join("db")).unwrap(), "is damaged"),
    ];
    for (lose, words) in losses {
        let copy = remains.copy();
        lose(&copy);
        match copy.start(&[]) {
            Ok(node) => {
                assert!(node.log().contains(words), "{words:?} is not in {}", node.log_tail());
                remains.history.verify_copy(node.channel(), &mut rng).await;
            }
            // Under a heavy load the log was truncated.
            Err(said) => assert!(said.contains(words) && said.contains("restore"), "{said}"),
        }
    }

    let copy = remains.copy();
    let db = copy.checkpoint().join("db");
    fs::remove_dir_all(copy.wal()).unwrap();
    copy.assert_refused(&[], &["raft log", "is missing", "put the log back"]);
    fs::remove_file(copy.current()).unwrap();
    copy.assert_refused(&[], &["CURRENT is missing", "put it back"]);
    assert!(db.exists(), "the checkpoint is left alone");

    let copy = remains.copy();
    let elsewhere = copy.directory.path().join("elsewhere");
    let flag = format!("--wal-dir={}", elsewhere.display());
    copy.assert_refused(&[&flag], &["raft log", "is missing", "--wal-dir"]);

    let copy = remains.copy();
    fs::remove_file(last_segment(&copy.wal())).unwrap();
    copy.assert_refused(&[], &["raft log", "is missing"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_members_log_is_refused() {
    let mut rng = seeded("another");
    let remains = Remains::of_a_server(false, Mix::Everything, &mut rng).await;
    let copy = remains.copy();
    let other = tempfile::tempdir().unwrap();
    let mut node = Node::new(
        &other.path().join("data"),
        &other.path().join("log"),
        &["--initial-cluster-token=another"],
    );
    node.start();
    assert!(node.terminate().0.success());
    fs::remove_dir_all(copy.wal()).unwrap();
    copy_dir(&other.path().join("data/member/wal"), &copy.wal());
    let said = copy.start(&[]).err().expect("it is refused");
    assert!(said.contains("is of member") || said.contains("the log ends there"), "{said}");
}
