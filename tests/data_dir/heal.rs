//! A member whose checkpoint is damaged comes back with its peers' state and its own promises.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use kvorum::config::ClusterState;
use kvorum::log::{HardState, Log, Options, Recovered};
use kvorum::pb::etcdserverpb as pb;
use kvorum::{Config, Server};
use tempfile::TempDir;

use crate::rig::{checkpoint, configs, everything, hash, named, put, soon, start};

/// Keys, a lease, a deletion, a compaction, and so much that the logs were truncated.
async fn fill(server: &Server, round: usize) {
    let grant = pb::LeaseGrantRequest { ttl: 3600, id: 1000 + round as i64 };
    let lease = server.engine().lease_grant(grant).await.unwrap().id;
    let request = pb::PutRequest {
        key: format!("leased {round}").into(),
        lease,
        ..pb::PutRequest::default()
    };
    server.engine().put(request).await.unwrap();
    for number in 0..60 {
        put(server, &format!("key {}", number % 40), &format!("{round} {number}")).await;
    }
    let delete =
        pb::DeleteRangeRequest { key: "key 7".into(), ..pb::DeleteRangeRequest::default() };
    let answer = server.engine().delete_range(delete).await.unwrap();
    let revision = answer.header.unwrap().revision;
    let compaction = pb::CompactionRequest { revision: revision - 5, physical: true };
    server.engine().compact(compaction).await.unwrap();
}

/// What the log of a stopped member holds.
fn log_of(data_dir: &Path) -> Recovered {
    let options = Options {
        dir: data_dir.join("member/wal"),
        segment_bytes: 64 << 20,
        fsync: false,
        identity: kvorum::log::Identity::default(),
        reaches: 0,
    };
    Log::open(options).unwrap().1
}

async fn same_as(server: &Server, other: &Server) {
    let same = async {
        while hash(server).await != hash(other).await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("equal hashes", same).await;
    let (left, right) = (everything(server).await, everything(other).await);
    assert_eq!((left.kvs, left.count), (right.kvs, right.count));
    assert_eq!(leases(server).await, leases(other).await);
}

async fn leases(server: &Server) -> BTreeSet<i64> {
    let answer = server.engine().lease_leases(pb::LeaseLeasesRequest {});
    let leases = soon("the leases", answer).await.expect("leases").leases;
    leases.iter().map(|lease| lease.id).collect()
}

/// A way to damage a data directory's checkpoint.
type Harm = (&'static str, fn(&Path));

const HARMS: &[Harm] = &[
    ("the mark is gone", |dir| fs::remove_file(checkpoint(dir).join("synced")).unwrap()),
    ("all of it is gone", |dir| fs::remove_dir_all(checkpoint(dir)).unwrap()),
    ("CURRENT is gone", |dir| fs::remove_file(dir.join("member/CURRENT")).unwrap()),
    ("CURRENT is nonsense", |dir| fs::write(dir.join("member/CURRENT"), [0xff; 30]).unwrap()),
    ("another program's file", |dir| {
        fs::remove_dir_all(checkpoint(dir)).unwrap();
        fs::create_dir(checkpoint(dir)).unwrap();
        fs::write(checkpoint(dir).join("db"), "SQLite format 3").unwrap();
    }),
    ("half of it is zeros", |dir| {
        let db = checkpoint(dir).join("db");
        let mut bytes = fs::read(&db).unwrap();
        let used = bytes.iter().rposition(|&byte| byte != 0).unwrap();
        bytes[..used / 2].fill(0);
        fs::write(&db, bytes).unwrap();
    }),
];

struct Cluster {
    dir: TempDir,
    configs: Vec<Config>,
    servers: Vec<Option<Server>>,
}

impl Cluster {
    async fn start() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let configs = configs(3, dir.path());
        let servers = start(&configs).await.into_iter().map(Some).collect();
        Cluster { dir, configs, servers }
    }

    fn server(&self, number: usize) -> &Server {
        self.servers[number].as_ref().unwrap()
    }

    async fn stop(&mut self, number: usize) {
        soon("a shutdown", self.servers[number].take().unwrap().shutdown()).await.unwrap();
    }

    async fn start_one(&mut self, number: usize) {
        let server = start(&self.configs[number..=number]).await.remove(0);
        self.servers[number] = Some(server);
    }

    async fn end(mut self) {
        for number in 0..3 {
            self.stop(number).await;
        }
        drop(self.dir);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_checkpoint_is_fetched_from_a_peer() {
    let mut cluster = Cluster::start().await;
    let data_dir = cluster.configs[0].data_dir.clone();
    fill(cluster.server(0), 100).await;
    let flags = cluster.configs[0].clone();
    for (round, (name, harm)) in HARMS.iter().enumerate() {
        eprintln!("{name}");
        fill(cluster.server(1), round).await;
        cluster.stop(0).await;
        let before = log_of(&data_dir);
        assert!(before.start.index > 1, "{name}: the log was truncated, so it is not enough");
        let set_aside = named(&data_dir, "damaged-").len();
        let was_there = checkpoint(&data_dir).is_dir();
        harm(&data_dir);
        cluster.configs[0] = if *name == "CURRENT is gone" {
            // Who the others are is known, and how the member was made is true no more.
            let gone = ("gone".to_owned(), vec!["http://127.0.0.1:1".parse().unwrap()]);
            let own = flags.initial_cluster.clone().into_iter().take(1);
            Config {
                initial_cluster_state: ClusterState::Existing,
                initial_cluster: own.chain([gone]).collect(),
                ..flags.clone()
            }
        } else {
            flags.clone()
        };
        let is_there = !named(&data_dir, "ckpt-").is_empty();
        // What the member missed meanwhile comes with the state, or behind it.
        put(cluster.server(1), "meanwhile", name).await;
        cluster.start_one(0).await;
        same_as(cluster.server(0), cluster.server(1)).await;
        let kept = named(&data_dir, "damaged-").len() - set_aside;
        assert_eq!((was_there, kept), (true, usize::from(is_there)), "{name}: it is set aside");
        // It takes part: with it alone of the two others there is a majority.
        cluster.stop(2).await;
        put(cluster.server(0), "afterwards", name).await;
        cluster.start_one(2).await;
        same_as(cluster.server(0), cluster.server(2)).await;
        // What it is now outlives a restart.
        cluster.stop(0).await;
        let HardState { term, .. } = log_of(&data_dir).hard_state;
        assert!(term >= before.hard_state.term, "{name}: the member knows its term");
        cluster.start_one(0).await;
        same_as(cluster.server(0), cluster.server(1)).await;
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_starts_anew_heals_its_members() {
    let mut cluster = Cluster::start().await;
    fill(cluster.server(0), 0).await;
    let revision = put(cluster.server(0), "last", "acknowledged").await;
    for number in 0..3 {
        cluster.stop(number).await;
    }
    // Two of three: with the third, everything is there.
    for number in 0..2 {
        fs::remove_dir_all(checkpoint(&cluster.configs[number].data_dir)).unwrap();
    }
    cluster.servers = start(&cluster.configs).await.into_iter().map(Some).collect();
    for number in 0..3 {
        soon("a leader", cluster.server(number).engine().linearizable_barrier()).await.unwrap();
        let found = everything(cluster.server(number)).await;
        assert_eq!(found.header.unwrap().revision, revision);
        same_as(cluster.server(number), cluster.server((number + 1) % 3)).await;
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_no_peer_answers_nothing_is_changed() {
    let mut cluster = Cluster::start().await;
    fill(cluster.server(0), 0).await;
    for number in 0..3 {
        cluster.stop(number).await;
    }
    let config = cluster.configs[0].clone();
    let db = checkpoint(&config.data_dir).join("db");
    fs::write(&db, "not what it was").unwrap();
    // It asks until it is told to stop.
    let asking = Server::start(config.clone());
    assert!(tokio::time::timeout(Duration::from_secs(2), asking).await.is_err(), "it waits");
    assert!(db.exists());
    assert_eq!(named(&config.data_dir, "damaged-"), Vec::<std::path::PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_not_healed() {
    let mut cluster = Cluster::start().await;
    fill(cluster.server(0), 0).await;
    cluster.stop(0).await;
    let config = cluster.configs[0].clone();
    fs::write(checkpoint(&config.data_dir).join("db"), "not what it was").unwrap();
    let wal = config.data_dir.join("member/wal");
    let segment = fs::read_dir(&wal).unwrap().map(|entry| entry.unwrap().path());
    let segment = segment.filter(|path| path.extension().is_some_and(|end| end == "log")).max();
    let segment = segment.unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    // Its last record: with the checkpoint's help it would be known to have been there.
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    for _ in 0..2 {
        let refused = soon("a refusal", Server::start(config.clone())).await;
        let error = refused.err().expect("it is refused").to_string();
        for word in [segment.to_str().unwrap(), "ckpt-", "etcdctl member remove", "member add"] {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    }
    assert!(fs::read(&segment).unwrap() == bytes, "nothing is changed");
    for number in 1..3 {
        cluster.stop(number).await;
    }
}
