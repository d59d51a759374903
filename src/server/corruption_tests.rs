//! Members that differ: in their states, who is named, who stops, who refuses to start; and in their
//! quotas.

use std::time::Duration;

use prost::Message as _;
use tokio::time::{sleep, timeout};

use super::{Server, StartError};
use crate::config::{ClusterState, Config, Gate, Url};
use crate::error::Error;
use crate::mvcc::{Revision, Store};
use crate::pb::etcdserverpb::{
    AlarmMember, AlarmType, CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest,
    MemberAddRequest, PutRequest,
};
use crate::pb::kvorumpb::{Command, command::Request};
use crate::pb::mvccpb::KeyValue;
use crate::state::Effects;

/// Far more than anything here takes; a limit for what hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The configurations of a new cluster's members, in memory unless directories are given.
fn configs(count: usize) -> Vec<Config> {
    // Kept open until all are known, so that no two are the same.
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let url = |listener: &std::net::TcpListener| -> Url {
        format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
    };
    let peers: Vec<Url> = listeners.iter().map(url).collect();
    let cluster: std::collections::BTreeMap<String, Vec<Url>> = peers
        .iter()
        .enumerate()
        .map(|(number, url)| (format!("m{number}"), vec![url.clone()]))
        .collect();
    let config = |(number, peer): (usize, &Url)| Config {
        name: format!("m{number}"),
        listen_peer_urls: vec![peer.clone()],
        initial_advertise_peer_urls: vec![peer.clone()],
        initial_cluster: cluster.clone().into_iter().collect(),
        ..Config::in_memory()
    };
    peers.iter().enumerate().map(config).collect()
}

async fn start(configs: &[Config]) -> Vec<Server> {
    let starting: Vec<_> =
        configs.iter().map(|config| tokio::spawn(Server::start(config.clone()))).collect();
    let mut servers = Vec::new();
    for server in starting {
        servers.push(timeout(PATIENCE, server).await.expect("in time").unwrap().expect("started"));
    }
    servers
}

async fn put(server: &Server, key: &str) -> Result<(), Error> {
    let request = PutRequest { key: key.to_owned().into(), ..PutRequest::default() };
    server.engine().put(request).await.map(drop)
}

/// Has one member apply what was never committed.
fn plant(server: &Server) {
    let mut state = server.engine().state().write();
    let put = PutRequest { key: "planted".into(), ..PutRequest::default() };
    let command = Command { header: None, request: Some(Request::Put(put)) };
    let applied = state.applied();
    state.apply(applied, command, &mut Effects::default()).expect("applied");
}

/// Gives the key "before", all that there is, another value: as if memory had changed.
async fn tamper(server: &Server) {
    server.engine().linearizable_barrier().await.expect("it has a leader");
    let mut state = server.engine().state().write();
    let revision = Revision { main: 2, sub: 0 };
    let kv = KeyValue {
        key: "before".into(),
        value: "tampered".into(),
        create_revision: revision.main,
        mod_revision: revision.main,
        version: 1,
        lease: 0,
    };
    let record = (revision, false, kv.encode_to_vec().into());
    let (newest, compacted) = (state.store().revision(), state.store().compact_revision());
    assert_eq!(newest, revision.main);
    *state.store_mut() = Store::restore(vec![record], newest, compacted).expect("a store");
}

async fn wait_for_alarm(server: &Server, member_id: u64) {
    let wanted = AlarmMember { member_id, alarm: AlarmType::Corrupt as i32 };
    let raised = async {
        while !server.engine().alarms().contains(&wanted) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let alarms = || server.engine().alarms();
    assert!(timeout(PATIENCE, raised).await.is_ok(), "no alarm: {:?}", alarms());
}

fn leader(servers: &[Server]) -> usize {
    let is_leader = |server: &Server| server.engine().raft_status().is_leader;
    servers.iter().position(is_leader).expect("a leader")
}

/// Plants a difference in one of three; it has to be named and to stop, and the others go on.
async fn one_of_three(pick: impl Fn(usize) -> usize) {
    let servers = start(&configs(3)).await;
    put(&servers[0], "before").await.unwrap();
    let bad = pick(leader(&servers));
    plant(&servers[bad]);
    // What is written next lets the others see it.
    let good = (bad + 1) % 3;
    put(&servers[good], "after").await.unwrap();
    let id = servers[bad].engine().member_id();
    for server in servers.iter().filter(|server| server.engine().member_id() != id) {
        wait_for_alarm(server, id).await;
        assert!(server.engine().serializable_check().is_ok());
        assert_eq!(server.engine().alarms().len(), 1);
    }
    let fatal = timeout(PATIENCE, servers[bad].wait_for_failure()).await.expect("it stops");
    let fatal = fatal.to_string();
    assert!(fatal.starts_with("self-check: ") && fatal.contains(&format!("{id:x}")), "{fatal}");
    assert_eq!(servers[bad].engine().serializable_check(), Err(Error::Stopped));
    assert_eq!(put(&servers[good], "refused").await, Err(Error::Corrupt));
    for server in servers {
        let is_bad = server.engine().member_id() == id;
        assert_eq!(server.shutdown().await.is_err(), is_bad);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_differs_is_named_and_stops() {
    one_of_three(|leader| (leader + 1) % 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_differs_is_named_and_stops() {
    one_of_three(|leader| leader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_differ_none_is_named() {
    let servers = start(&configs(2)).await;
    plant(&servers[1]);
    put(&servers[0], "after").await.unwrap();
    for server in &servers {
        wait_for_alarm(server, 0).await;
    }
    assert_eq!(put(&servers[0], "refused").await, Err(Error::Corrupt));
    for server in servers {
        server.shutdown().await.expect("it goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_changed_in_memory_is_found_by_the_periodic_check() {
    let mut configs = configs(3);
    for config in &mut configs {
        config.corrupt_check_time = Duration::from_millis(300);
    }
    let servers = start(&configs).await;
    put(&servers[0], "before").await.unwrap();
    let bad = (leader(&servers) + 1) % 3;
    tamper(&servers[bad]).await;
    let id = servers[bad].engine().member_id();
    wait_for_alarm(&servers[(bad + 1) % 3], id).await;
    timeout(PATIENCE, servers[bad].wait_for_failure()).await.expect("it stops");
    for server in servers {
        let _ = server.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compactions_are_compared() {
    let mut configs = configs(3);
    for config in &mut configs {
        config.feature_gates.set(Gate::CompactHashCheck, true);
        config.compact_hash_check_time = Duration::from_millis(300);
    }
    let servers = start(&configs).await;
    put(&servers[0], "before").await.unwrap();
    let bad = (leader(&servers) + 1) % 3;
    tamper(&servers[bad]).await;
    let good = (bad + 1) % 3;
    put(&servers[good], "after").await.unwrap();
    let compaction = CompactionRequest { revision: 3, physical: false };
    servers[good].engine().compact(compaction).await.unwrap();
    wait_for_alarm(&servers[good], servers[bad].engine().member_id()).await;
    for server in servers {
        let _ = server.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_data_differs_does_not_start() {
    let directories: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut configs = configs(3);
    for (config, directory) in configs.iter_mut().zip(&directories) {
        config.in_memory = false;
        config.data_dir = directory.path().to_owned();
        config.feature_gates.set(Gate::InitialCorruptCheck, true);
    }
    let mut servers = start(&configs).await;
    let last = servers.pop().unwrap();
    put(&last, "before").await.unwrap();
    // The log says what is committed as of the append after it.
    for _ in 0..2 {
        last.engine().lease_grant(LeaseGrantRequest { ttl: 1000, id: 0 }).await.unwrap();
    }
    last.shutdown().await.unwrap();
    let last = Server::start(configs[2].clone()).await.expect("it has what the others have");
    // Those that are asked have something else now.
    for server in &servers {
        tamper(server).await;
    }
    last.shutdown().await.unwrap();
    let refused = Server::start(configs[2].clone()).await.err().expect("it does not start");
    assert!(matches!(refused, StartError::Inconsistent(_)), "{refused}");
    assert!(refused.to_string().contains(" found data inconsistency with peers"), "{refused}");
}

/// Each member judges what it is asked for by its own quota; the alarm is everybody's.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_one_member_has_reached_refuses_writes_at_all() {
    let mut configs = configs(3);
    configs[1].quota_backend_bytes = 600;
    let servers = start(&configs).await;
    put(&servers[0], "by another").await.expect("it has room");
    let request =
        PutRequest { key: "k".into(), value: vec![0; 1000].into(), ..PutRequest::default() };
    let refused = servers[1].engine().put(request).await;
    assert_eq!(refused.err(), Some(Error::NoSpace));
    for server in &servers {
        assert_eq!(put(server, "refused").await, Err(Error::NoSpace));
    }
    for server in servers {
        server.shutdown().await.expect("stopped");
    }
}

/// The same index and the same rolling hash on both.
async fn assert_alike(one: &Server, other: &Server) {
    let at = |server: &Server| {
        let state = server.engine().state().read();
        (state.applied(), state.rolling_hash())
    };
    let alike = async {
        while at(one).0 != at(other).0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, alike).await.expect("they come to the same index");
    assert_eq!(at(one), at(other));
    assert_ne!(at(one).1, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rolling_hash_survives_a_snapshot_and_restarts() {
    let directories: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut configs = configs(2);
    for (config, directory) in configs.iter_mut().zip(&directories) {
        config.in_memory = false;
        config.data_dir = directory.path().to_owned();
        config.snapshot_count = 20;
    }
    configs[0].initial_cluster.remove("m1");
    configs[1].initial_cluster_state = ClusterState::Existing;
    let first = Server::start(configs[0].clone()).await.expect("started");
    let lease = LeaseGrantRequest { ttl: 1000, id: 7 };
    first.engine().lease_grant(lease).await.unwrap();
    for number in 0..100 {
        put(&first, &format!("key {}", number % 10)).await.unwrap();
    }
    let compaction = CompactionRequest { revision: 50, physical: true };
    first.engine().compact(compaction).await.unwrap();
    let url = configs[1].listen_peer_urls[0].as_str().to_owned();
    let learner = MemberAddRequest { peer_ur_ls: vec![url], is_learner: true };
    first.engine().member_add(learner).await.unwrap();

    let second = Server::start(configs[1].clone()).await.expect("joined");
    assert_alike(&first, &second).await;
    first.engine().lease_revoke(LeaseRevokeRequest { id: 7 }).await.unwrap();
    second.shutdown().await.unwrap();
    for number in 0..30 {
        put(&first, &format!("key {number}")).await.unwrap();
    }
    let second = Server::start(configs[1].clone()).await.expect("started again");
    assert_alike(&first, &second).await;
    first.shutdown().await.unwrap();
    let first = Server::start(configs[0].clone()).await.expect("started again");
    put(&first, "after").await.unwrap();
    assert_alike(&first, &second).await;
    assert!(first.engine().alarms().is_empty());
    for server in [first, second] {
        server.shutdown().await.expect("nobody was accused");
    }
}
