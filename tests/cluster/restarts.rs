//! Clusters that are stopped and started, as a whole and one after the other; also three
//! members in one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvorum::config::Url;
use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::{Config, Server};
use prost::Message as _;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::common::ports::free_port;
use crate::rig::{Cluster, PATIENCE, get, put, soon, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_all_members_were_stopped_or_killed() {
    let mut cluster = Cluster::start(&[]).await;
    let ids = [cluster[0].id().await, cluster[1].id().await, cluster[2].id().await];
    let lease = pb::LeaseGrantRequest { ttl: 600, id: 7 };
    cluster[0].leases().lease_grant(lease).await.unwrap();
    for round in 0..4 {
        let mut last = 0;
        for write in 0..30 {
            let key = format!("k{write}");
            last = cluster[write % 3].put(&key, &round.to_string()).await.unwrap();
        }
        if round % 2 == 0 {
            for member in &cluster.members {
                member.signal(rustix::process::Signal::TERM);
            }
            for member in &mut cluster.members {
                assert_eq!(member.ended().await.code(), Some(0));
            }
        } else {
            for member in &mut cluster.members {
                member.kill();
            }
        }
        cluster.start_all().await;
        cluster.equal().await;
        assert_eq!(cluster[0].hash().await.unwrap().0, last);
        for write in 0..30 {
            let kv = cluster[write % 3].read(&format!("k{write}")).await.unwrap().unwrap();
            assert_eq!((kv.value, kv.version), (round.to_string().into(), round + 1));
        }
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(cluster[at].id().await, *id);
        }
        let all = cluster[1].leases().lease_leases(pb::LeaseLeasesRequest {}).await.unwrap();
        assert_eq!(all.into_inner().leases.len(), 1);
    }
}

/// Puts until told to stop, through any member that takes it. A patient client: it asks the
/// next member when it is told that one is not available, as etcd's client does.
async fn load(channels: Vec<Channel>, key: String, stop: Arc<AtomicBool>) -> i64 {
    let mut clients: Vec<_> = channels.into_iter().map(KvClient::new).collect();
    let (mut acknowledged, mut at) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let next = acknowledged + 1;
        // Only if it was not carried out before: then an answer that was lost does no harm.
        let compare = pb::Compare {
            result: pb::compare::CompareResult::Equal.into(),
            target: pb::compare::CompareTarget::Version.into(),
            key: key.clone().into(),
            target_union: Some(pb::compare::TargetUnion::Version(acknowledged)),
            ..pb::Compare::default()
        };
        let write = pb::request_op::Request::RequestPut(put(&key, &next.to_string()));
        let txn = pb::TxnRequest {
            compare: vec![compare],
            success: vec![pb::RequestOp { request: Some(write) }],
            failure: Vec::new(),
        };
        let count = clients.len();
        let asked = clients[at % count].txn(txn);
        match tokio::time::timeout(Duration::from_secs(10), asked).await {
            Ok(Ok(_)) => acknowledged = next,
            Ok(Err(status)) => {
                // The last is the client's own, of a connection that ended before the request
                // was sent.
                let expected = [Code::Unavailable, Code::Unknown, Code::Cancelled];
                let is_expected = expected.contains(&status.code()) || met_goaway(&status);
                assert!(is_expected, "{status:?}");
                at += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(_) => panic!("no answer for ten seconds"),
        }
    }
    acknowledged
}

/// Whether the client took a connection for its request just when the server said that it takes
/// no more of them there. Nothing was sent; etcd's client would go on by itself, tonic's calls it
/// [`Code::Internal`], which from the server would be a fault.
fn met_goaway(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_go_away()
                && error.is_remote()
                && error.reason() == Some(h2::Reason::NO_ERROR);
        }
        source = error.source();
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_patient_client() {
    let mut cluster = Cluster::start(&[]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut loads = Vec::new();
    for client in 0..4 {
        let mut channels: Vec<_> = cluster.members.iter().map(|member| member.channel()).collect();
        channels.rotate_left(client % 3);
        loads.push(tokio::spawn(load(channels, format!("k{client}"), Arc::clone(&stop))));
    }
    for at in 0..3 {
        assert_eq!(cluster[at].terminate().await.code(), Some(0));
        cluster[at].start().await;
        cluster.leader().await;
    }
    stop.store(true, Ordering::Relaxed);
    for (client, load) in loads.into_iter().enumerate() {
        let acknowledged = soon("the load to end", load).await.unwrap();
        assert!(acknowledged > 10, "{acknowledged}");
        let kv = cluster[client % 3].read(&format!("k{client}")).await.unwrap().unwrap();
        assert_eq!((kv.version, kv.value), (acknowledged, acknowledged.to_string().into()));
    }
    cluster.equal().await;
}

/// The configurations of three members that embed a server each.
fn configurations(directory: &std::path::Path) -> Vec<Config> {
    let ports = [free_port(), free_port(), free_port()];
    let url = |port: u16| format!("http://127.0.0.1:{port}").parse::<Url>().unwrap();
    let initial_cluster: std::collections::BTreeMap<_, _> = ports
        .iter()
        .enumerate()
        .map(|(index, port)| (format!("m{index}"), vec![url(*port)]))
        .collect();
    let each = ports.iter().enumerate().map(|(index, port)| Config {
        name: format!("m{index}"),
        data_dir: directory.join(format!("m{index}")),
        listen_client_urls: vec![url(0)],
        advertise_client_urls: vec![url(0)],
        listen_peer_urls: vec![url(*port)],
        initial_advertise_peer_urls: vec![url(*port)],
        initial_cluster: initial_cluster.clone().into_iter().collect(),
        ..Config::default()
    });
    each.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_in_one_process_are_a_cluster() {
    let directory = tempfile::TempDir::new().unwrap();
    let configs = configurations(directory.path());
    let start = async |config: &Config| {
        let started = tokio::time::timeout(PATIENCE, Server::start(config.clone())).await;
        started.expect("the server to start").unwrap()
    };
    let (one, two, three) =
        tokio::join!(start(&configs[0]), start(&configs[1]), start(&configs[2]));
    let mut servers = vec![Some(one), Some(two), Some(three)];
    for (at, server) in servers.iter().enumerate() {
        let client = server.as_ref().unwrap().client();
        client.put(format!("k{at}"), "v").await.unwrap();
    }
    for round in 0..3 {
        let stopped = servers[round].take().unwrap();
        soon("the server to stop", stopped.shutdown()).await.unwrap();
        let client = servers[(round + 1) % 3].as_ref().unwrap().client();
        soon("a put", client.put("k", round.to_string()).into_future()).await.unwrap();
        servers[round] = Some(start(&configs[round]).await);
        let client = servers[round].as_ref().unwrap().client();
        let found = soon("a get", client.get("k").into_future()).await.unwrap().unwrap();
        assert_eq!(found.value, round.to_string());
    }
    for server in &servers {
        let mut kv = KvClient::new(server.as_ref().unwrap().channel());
        for key in ["k0", "k1", "k2"] {
            let kvs = kv.range(get(key)).await.unwrap().into_inner().kvs;
            let kv = kvorum::pb::mvccpb::KeyValue::decode(kvs[0].clone()).unwrap();
            assert_eq!(kv.value, "v");
        }
    }
    for server in servers.into_iter().flatten() {
        soon("the server to stop", server.shutdown()).await.unwrap();
    }
}

/// One that is dropped, not shut down, leaves nothing behind that keeps its peers from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_server_can_be_started_again_in_the_same_process() {
    let directory = tempfile::TempDir::new().unwrap();
    let configs = configurations(directory.path());
    let start = |config: &Config| tokio::spawn(Server::start(config.clone()));
    let starting: Vec<_> = configs.iter().map(start).collect();
    let mut servers = Vec::new();
    for server in starting {
        servers.push(soon("the server to start", server).await.unwrap().unwrap());
    }
    drop(servers.remove(0));
    soon("a put", servers[0].client().put("k", "v").into_future()).await.unwrap();
    let server = until("the server to start again", || async {
        // Its port and its directory are free a moment after the drop.
        tokio::time::timeout(PATIENCE, Server::start(configs[0].clone())).await.unwrap().ok()
    })
    .await;
    let found = soon("a get", server.client().get("k").into_future()).await.unwrap().unwrap();
    assert_eq!(found.value, "v");
}
