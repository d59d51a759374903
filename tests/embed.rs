//! Servers inside a program: several at a time, through the typed handle and through
//! channels without sockets, and nothing left of them afterwards.
//!
//! The tests look at the process as a whole (threads, descriptors, the panic hook), so they
//! run one after the other, whatever the test runner does.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(clippy::print_stderr, reason = "a measurement is shown")]

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvorum::client::{Changes, Compare, Event, OpResponse};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use kvorum::pb::etcdserverpb::watch_request::RequestUnion;
use kvorum::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, MemberListRequest, PutRequest, RangeRequest,
    WatchCreateRequest, WatchRequest,
};
use kvorum::pb::health::HealthCheckRequest;
use kvorum::pb::health::health_client::HealthClient;
use kvorum::{Client, Config, Error, Server, StartError};
use tokio_stream::StreamExt as _;
use tonic::Code;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Well below what a request waits for the cluster (7 s) or a shutdown for connections (5 s).
const PROMPTLY: Duration = Duration::from_secs(3);

/// Runs a test alone in the process, on a runtime of its own, and asserts that nothing is
/// left when it is over: no thread of a server, no descriptor.
fn alone<F: Future>(test: impl FnOnce() -> F) {
    alone_on(tokio::runtime::Builder::new_multi_thread().worker_threads(2), test);
}

fn alone_on<F: Future>(builder: &mut tokio::runtime::Builder, test: impl FnOnce() -> F) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // The first runtime of a process makes a pair of sockets for signals, which stays.
    drop(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let before = descriptors();
    let runtime = builder.enable_all().build().unwrap();
    runtime.block_on(async { soon("the test", test()).await });
    drop(runtime);
    eventually("all threads of servers have ended", || server_threads().is_empty());
    // A thread is gone from the list a moment before what it held.
    eventually(&format!("no descriptor is open beyond {before:?}"), || {
        descriptors().len() <= before.len()
    });
}

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The names of this process's threads that belong to servers.
fn server_threads() -> Vec<String> {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        // A thread may end while it is looked at.
        fs::read_to_string(task.unwrap().path().join("comm")).ok()
    });
    names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("kvorum-")).collect()
}

/// What the descriptors of this process point to.
fn descriptors() -> Vec<String> {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|descriptor| {
        // That of this very listing is closed by the time it is looked at.
        fs::read_link(descriptor.unwrap().path()).ok()
    });
    links.map(|link| link.display().to_string()).collect()
}

async fn start(config: Config) -> Server {
    soon("the server to start", Server::start(config)).await.unwrap()
}

async fn stop(server: Server) {
    let began = Instant::now();
    soon("the server to stop", server.shutdown()).await.unwrap();
    assert!(began.elapsed() < PROMPTLY, "the shutdown took {:?}", began.elapsed());
}

/// The address of a server's first listener.
fn address(server: &Server) -> String {
    let url = &server.client_urls()[0];
    format!("{}:{}", url.host_str().unwrap(), url.port().unwrap())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn put_request(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..PutRequest::default()
    }
}

/// Uses a server in each of the ways there are, as `name`.
async fn use_all_ways(server: &Server, name: &str) {
    let client = server.client();
    client.put("name", name.to_owned()).await.unwrap();

    let mut in_process = KvClient::new(server.channel());
    in_process.put(put_request("channel", name)).await.unwrap();

    let over_tcp = tonic::transport::Endpoint::from_shared(format!("http://{}", address(server)));
    let mut over_tcp = KvClient::new(over_tcp.unwrap().connect().await.unwrap());
    over_tcp.put(put_request("tcp", name)).await.unwrap();

    for key in ["name", "channel", "tcp"] {
        assert_eq!(client.get(key).await.unwrap().unwrap().value, name.to_owned(), "{key}");
        let range = RangeRequest { key: key.into(), ..RangeRequest::default() };
        assert_eq!(in_process.range(range.clone()).await.unwrap().into_inner().count, 1);
        assert_eq!(over_tcp.range(range).await.unwrap().into_inner().count, 1);
    }
}

#[test]
fn three_servers_in_one_process_keep_to_themselves_in_memory_and_on_disk() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let on_disk = || dirs.iter().map(|dir| Config::for_test(dir.path())).collect::<Vec<_>>();
    let in_memory: Vec<_> = (0..3).map(|_| Config::in_memory()).collect();
    for configs in [in_memory, on_disk()] {
        alone(|| async {
            let servers = together(configs.into_iter().map(start)).await;
            let names = ["red", "green", "blue"];
            let uses = servers.iter().zip(names);
            together(uses.map(|(server, name)| use_all_ways(server, name))).await;
            for (server, name) in servers.iter().zip(names) {
                assert_eq!(server.client().get("name").await.unwrap().unwrap().value, name);
            }
            let addresses: Vec<_> = servers.iter().map(address).collect();
            together(servers.into_iter().map(stop)).await;
            assert_eq!(server_threads(), Vec::<String>::new());
            for address in addresses {
                assert!(TcpStream::connect(&address).is_err(), "{address} is closed");
            }
        });
    }
    alone(|| async {
        for (config, name) in on_disk().into_iter().zip(["red", "green", "blue"]) {
            let server = start(config).await;
            let list = server.client().get_prefix("").await.unwrap();
            let values: Vec<_> = list.kvs.iter().map(|kv| text(&kv.value)).collect();
            assert_eq!(values, [name; 3], "what was on disk is there again");
            assert_eq!(list.revision, 4);
            stop(server).await;
        }
    });
}

/// Runs futures at the same time; their outputs in order.
async fn together<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(move |context| {
        let mut is_done = true;
        for (future, output) in futures.iter_mut().zip(&mut outputs) {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => is_done = false,
                }
            }
        }
        if is_done {
            let outputs = outputs.iter_mut().map(|output| output.take().unwrap());
            std::task::Poll::Ready(outputs.collect())
        } else {
            std::task::Poll::Pending
        }
    })
    .await
}

#[test]
fn the_typed_handle_reads_and_writes() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let client = server.client();

        assert_eq!(client.get("a/1").await.unwrap(), None);
        assert_eq!(client.put("a/1", "one").await.unwrap().revision, 2);
        let put = client.put(String::from("a/1"), b"uno".to_vec()).prev_kv().await.unwrap();
        assert_eq!((put.revision, text(&put.prev_kv.unwrap().value)), (3, "one".to_owned()));
        assert_eq!(client.get("a/1").revision(2).await.unwrap().unwrap().value, "one");
        assert_eq!(client.get("a/1").serializable().await.unwrap().unwrap().value, "uno");
        assert_eq!(client.get("a/1").revision(9).await, Err(Error::FutureRevision));
        assert_eq!(client.get("").await, Err(Error::EmptyKey));

        for key in ["a/2", "a/3", "a/4", "b/1"] {
            client.put(key, key).await.unwrap();
        }
        // A list by pages, all of one moment.
        let first = client.get_prefix("a/").limit(3).await.unwrap();
        assert_eq!((first.kvs.len(), first.count, first.more, first.revision), (3, 4, true, 7));
        client.put("a/5", "too late").await.unwrap();
        let next = client.get_prefix("a/").revision(first.revision).after(&first.kvs[2].key);
        let next = next.keys_only().await.unwrap();
        assert_eq!((next.kvs.len(), next.more), (1, false));
        assert_eq!((&next.kvs[0].key[..], &next.kvs[0].value[..]), (&b"a/4"[..], &b""[..]));
        let from_the_start = client.get_prefix("b/").after(b"a/7").await.unwrap();
        assert_eq!(from_the_start.kvs.len(), 1, "a page does not begin before its prefix");

        let deleted = client.delete("a/1").prev_kv().await.unwrap();
        assert_eq!((deleted.deleted, text(&deleted.prev_kvs[0].value)), (1, "uno".to_owned()));
        assert_eq!(client.delete("a/1").await.unwrap().deleted, 0);
        assert_eq!(client.delete_prefix("a/").await.unwrap().deleted, 4);
        assert_eq!(client.get_prefix("").keys_only().await.unwrap().kvs.len(), 1);

        let now = client.get_prefix("").await.unwrap().revision;
        client.compact(now).await.unwrap();
        assert_eq!(client.compact(now).await, Err(Error::Compacted));
        assert_eq!(client.get("b/1").revision(2).await, Err(Error::Compacted));
        stop(server).await;
    });
}

#[test]
fn the_typed_handle_has_transactions() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let client = server.client();
        let register = || {
            client
                .txn()
                .when(Compare::create_revision("k").equal(0))
                .then(client.put("k", "v"))
                .then(client.get("k"))
                .otherwise(client.delete("k").prev_kv())
                .otherwise(client.txn().then(client.get_prefix("")))
        };
        let first = register().await.unwrap();
        assert!(first.succeeded);
        let [OpResponse::Put(put), OpResponse::Get(get)] = &first.responses[..] else {
            panic!("{first:?}")
        };
        assert_eq!((put.revision, &get.kvs[0].value[..]), (2, &b"v"[..]), "it reads its write");

        let second = register().await.unwrap();
        assert!(!second.succeeded);
        let [OpResponse::Delete(delete), OpResponse::Txn(inner)] = &second.responses[..] else {
            panic!("{second:?}")
        };
        assert_eq!((delete.deleted, &delete.prev_kvs[0].value[..]), (1, &b"v"[..]));
        assert!(inner.succeeded, "there was no condition");
        assert!(matches!(&inner.responses[..], [OpResponse::Get(get)] if get.kvs.is_empty()));

        client.put("n", "5").lease(0).await.unwrap();
        for (compare, holds) in [
            (Compare::value("n").equal("5"), true),
            (Compare::value("n").not_equal("5"), false),
            (Compare::value("n").greater("4"), true),
            (Compare::value("n").less("4"), false),
            (Compare::version("n").equal(1), true),
            (Compare::mod_revision("n").greater(3), true),
            (Compare::lease("n").equal(0), true),
            (Compare::value("none").not_equal("5"), false),
        ] {
            let compared = client.txn().when(compare.clone()).await.unwrap();
            assert_eq!(compared.succeeded, holds, "{compare:?}");
        }
        let twice = client.txn().then(client.put("k", "1")).then(client.put("k", "2")).await;
        assert_eq!(twice, Err(Error::DuplicateKey));
        stop(server).await;
    });
}

#[test]
fn the_typed_handle_watches() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let client = server.client();
        client.put("w/1", "before").await.unwrap();
        let mut live = client.watch_prefix("w/").prev_kv().await.unwrap();
        assert_eq!(live.revision(), 2);

        client.put("x", "elsewhere").await.unwrap();
        let both = client.txn().then(client.put("w/1", "a")).then(client.put("w/2", "b"));
        both.await.unwrap();
        client.delete("w/1").await.unwrap();

        let changes = live.recv().await.unwrap();
        assert_eq!((changes.revision, changes.events.len()), (4, 2), "one revision, not split");
        assert!(matches!(&changes.events[0],
            Event::Put { kv, prev_kv: Some(prev) } if kv.value == "a" && prev.value == "before"));
        assert!(matches!(&changes.events[1], Event::Put { kv, prev_kv: None } if kv.value == "b"));
        let changes = live.recv().await.unwrap();
        assert_eq!((changes.revision, changes.events[0].key()), (5, &"w/1".into()));
        assert!(matches!(&changes.events[..],
            [Event::Delete { prev_kv: Some(prev), .. }] if prev.value == "a"));

        // The past comes in one response, and is told revision by revision all the same.
        let past = client.watch_prefix("w/").start_revision(2).await.unwrap();
        let past: Vec<Changes> = past.take(3).map(Result::unwrap).collect().await;
        let revisions: Vec<_> = past.iter().map(|changes| changes.revision).collect();
        assert_eq!(revisions, [2, 4, 5]);

        // A future that is dropped has taken nothing.
        let mut one = client.watch("w/9").await.unwrap();
        for _ in 0..100 {
            assert!(tokio::time::timeout(Duration::ZERO, one.recv()).await.is_err());
        }
        client.put("w/9", "nine").await.unwrap();
        assert_eq!(one.recv().await.unwrap().events.len(), 1);

        client.compact(5).await.unwrap();
        let mut gone = client.watch("w/1").start_revision(2).await.unwrap();
        assert_eq!(gone.recv().await, Err(Error::Compacted));
        assert_eq!(gone.next().await, Some(Err(Error::Compacted)));
        assert_eq!(gone.next().await, None, "a stream ends");

        let often = Config {
            watch_progress_notify_interval: Duration::from_millis(100),
            ..Config::in_memory()
        };
        let other = start(often).await;
        let mut idle = other.client().watch("k").progress_notify().await.unwrap();
        let progress = idle.recv().await.unwrap();
        assert_eq!(progress, Changes { revision: 1, events: Vec::new() });
        stop(other).await;
        stop(server).await;
    });
}

#[test]
fn the_typed_handle_has_leases() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let client = server.client();
        let lease = client.lease_grant(100).await.unwrap();
        assert_eq!(lease.ttl_secs(), 100);
        client.put("l/1", "v").lease(lease.id()).await.unwrap();
        client.put("l/2", "v").lease(lease.id()).await.unwrap();
        let again = client.lease(lease.id());
        assert_eq!(again.keep_alive().await, Ok(100));
        let left = again.time_to_live().await.unwrap();
        assert!((1..=100).contains(&left.ttl_secs), "{left:?}");
        assert_eq!((left.granted_ttl_secs, left.keys.len()), (100, 2));
        assert_eq!(lease.revoke().await, Ok(4));
        assert_eq!(client.get_prefix("l/").await.unwrap().kvs, []);
        assert_eq!(lease.revoke().await, Err(Error::LeaseNotFound));
        assert_eq!(lease.keep_alive().await, Err(Error::LeaseNotFound));
        assert_eq!(lease.time_to_live().await, Err(Error::LeaseNotFound));
        assert_eq!(client.put("k", "v").lease(7).await, Err(Error::LeaseNotFound));
        assert!(client.lease_grant(1).await.unwrap().ttl_secs() > 1, "too short, and raised");
        stop(server).await;
    });
}

/// Every call that waits is answered, with success or with [`Error::Stopped`], soon after.
async fn assert_answered(calls: Vec<tokio::task::JoinHandle<Result<(), Error>>>) {
    let began = Instant::now();
    for call in calls {
        match call.await.unwrap() {
            Ok(()) | Err(Error::Stopped) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(began.elapsed() < PROMPTLY, "somebody waited for {:?}", began.elapsed());
}

fn many_calls(client: &Client) -> Vec<tokio::task::JoinHandle<Result<(), Error>>> {
    let call = |number: usize| {
        let client = client.clone();
        tokio::spawn(async move {
            client.put(format!("k{number}"), vec![0; 1000]).await?;
            client.get(format!("k{number}")).await?;
            client.put(format!("k{number}"), "again").await.map(drop)
        })
    };
    (0..500).map(call).collect()
}

/// A server that has stopped says so, to everybody, at once.
async fn assert_stopped(client: &Client) {
    let began = Instant::now();
    assert_eq!(client.put("k", "v").await, Err(Error::Stopped));
    assert_eq!(client.get("k").await, Err(Error::Stopped));
    assert_eq!(client.get("k").serializable().await, Err(Error::Stopped));
    assert_eq!(client.get_prefix("").await, Err(Error::Stopped));
    assert_eq!(client.txn().then(client.get("k")).await, Err(Error::Stopped));
    assert_eq!(client.watch("k").await.err(), Some(Error::Stopped));
    assert_eq!(client.lease_grant(60).await.err(), Some(Error::Stopped));
    assert_eq!(client.lease(1).keep_alive().await, Err(Error::Stopped));
    assert!(began.elapsed() < PROMPTLY, "it took {:?} to say so", began.elapsed());
}

#[test]
fn a_shutdown_ends_watches_and_answers_everybody() {
    let dir = tempfile::tempdir().unwrap();
    for config in [Config::in_memory(), Config::for_test(dir.path())] {
        alone(|| async {
            let server = start(config).await;
            let client = server.client();
            let mut watcher = client.watch_prefix("").await.unwrap();
            let calls = many_calls(&client);
            assert_eq!(watcher.recv().await.unwrap().revision, 2, "they are under way");
            stop(server).await;
            assert_answered(calls).await;
            while watcher.recv().await.is_ok() {}
            assert_eq!(watcher.recv().await, Err(Error::Stopped));
            assert_stopped(&client).await;
        });
    }
}

#[test]
fn a_server_that_is_dropped_stops_too() {
    let dir = tempfile::tempdir().unwrap();
    let configs = || [Config::in_memory(), Config::for_test(dir.path())];
    for config in configs() {
        alone(|| async {
            let server = start(config).await;
            let address = address(&server);
            let client = server.client();
            client.put("kept", "yes").await.unwrap();
            let mut watcher = client.watch("k0").await.unwrap();
            let calls = many_calls(&client);
            drop(server);
            assert_answered(calls).await;
            while watcher.recv().await.is_ok() {}
            assert_eq!(watcher.recv().await, Err(Error::Stopped));
            soon("its threads to end", async {
                while !server_threads().is_empty() {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await;
            assert_stopped(&client).await;
            soon("its socket to close", async {
                while TcpStream::connect(&address).is_ok() {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await;
        });
    }
    alone(|| async {
        let server = start(Config::for_test(dir.path())).await;
        assert_eq!(server.client().get("kept").await.unwrap().unwrap().value, "yes");
        stop(server).await;
    });
}

#[test]
fn open_streams_do_not_hold_up_a_shutdown() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let over_tcp =
            tonic::transport::Endpoint::from_shared(format!("http://{}", address(&server)));
        let over_tcp = over_tcp.unwrap().connect().await.unwrap();
        for channel in [server.channel(), over_tcp] {
            let mut leases = LeaseClient::new(channel.clone());
            let grant = LeaseGrantRequest { ttl: 60, id: 0 };
            let id = leases.lease_grant(grant).await.unwrap().into_inner().id;
            let requests = tokio_stream::once(LeaseKeepAliveRequest { id });
            let requests = requests.chain(tokio_stream::pending());
            let mut alive = leases.lease_keep_alive(requests).await.unwrap().into_inner();
            assert_eq!(alive.message().await.unwrap().unwrap().ttl, 60);

            let mut health = HealthClient::new(channel.clone());
            let health = health.watch(HealthCheckRequest::default()).await;
            let mut health = health.unwrap().into_inner();
            assert!(health.message().await.unwrap().is_some());

            let create = WatchCreateRequest { key: "k".into(), ..WatchCreateRequest::default() };
            let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
            let requests = tokio_stream::once(create).chain(tokio_stream::pending());
            let watch = WatchClient::new(channel).watch(requests).await;
            let mut watch = watch.unwrap().into_inner();
            assert!(watch.message().await.unwrap().unwrap().created);

            tokio::spawn(async move {
                assert_eq!(alive.message().await.unwrap_err().code(), Code::Unavailable);
                assert_eq!(health.message().await.unwrap_err().code(), Code::Unavailable);
                assert_eq!(watch.message().await.unwrap_err().code(), Code::Unavailable);
            });
        }
        stop(server).await;
    });
}

#[test]
fn calls_that_are_dropped_do_no_harm() {
    alone(|| async {
        let server = start(Config::in_memory()).await;
        let client = server.client();
        const CALLS: usize = 200;
        for number in 0..CALLS {
            // Polled once, at different depths of the call, and dropped.
            let put = client.put(format!("k{number}"), "v");
            let _ = tokio::time::timeout(Duration::ZERO, put).await;
            let _ = tokio::time::timeout(Duration::ZERO, client.get_prefix("k")).await;
            let _ = tokio::time::timeout(Duration::ZERO, client.watch("k")).await;
            let _ = tokio::time::timeout(Duration::ZERO, client.lease_grant(60)).await;
        }
        // Behind all of them in the log.
        let last = client.put("last", "v").await.unwrap().revision;
        let kept = client.get_prefix("k").await.unwrap();
        assert!(kept.kvs.len() <= CALLS);
        assert_eq!(last, 2 + kept.count, "a put has happened wholly or not at all");
        for kv in &kept.kvs {
            assert_eq!((&kv.value[..], kv.version), (&b"v"[..], 1), "and once");
        }
        stop(server).await;
    });
}

/// What a start that must fail says.
async fn refused(config: Config) -> StartError {
    let threads = server_threads();
    let failed = soon("the server to fail", Server::start(config)).await;
    let error = failed.err().unwrap();
    assert_eq!(server_threads().len(), threads.len(), "nothing runs after: {error}");
    error
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    alone(|| async {
        let server = start(Config::for_test(&dir.path().join("taken"))).await;

        let url = format!("http://{}", address(&server));
        let taken = Config {
            listen_client_urls: vec![url.parse().unwrap()],
            ..Config::for_test(&dir.path().join("other"))
        };
        let error = refused(taken).await;
        assert!(matches!(error, StartError::Listen(_)), "{error:?}");
        assert!(error.to_string().contains(&url), "{error}");
        assert!(!dir.path().join("other").exists(), "nothing was written");

        let error = refused(Config::for_test(&dir.path().join("taken"))).await;
        assert!(matches!(error, StartError::Open(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("in use by another server") && text.contains("taken"), "{text}");
        use_all_ways(&server, "the first one").await;

        fs::write(dir.path().join("file"), "not a directory").unwrap();
        let error = refused(Config::for_test(&dir.path().join("file"))).await;
        assert!(error.to_string().contains("--data-dir"), "{error}");

        let wrong = Config { election_timeout: 1, ..Config::in_memory() };
        let error = refused(wrong).await;
        assert!(error.to_string().contains("election-timeout"), "{error}");

        let missing = Config {
            listen_client_urls: vec!["https://127.0.0.1:0".parse().unwrap()],
            cert_file: Some(dir.path().join("no.crt")),
            key_file: Some(dir.path().join("no.key")),
            ..Config::in_memory()
        };
        let error = refused(missing).await;
        assert!(error.to_string().contains("no.crt"), "{error}");
        stop(server).await;
    });
}

#[test]
fn a_start_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // Dropped at many depths: after 0, 100, 200 … microseconds.
    for step in 0..40 {
        let config = || Config::for_test(&dir.path().join(step.to_string()));
        alone(|| async {
            let patience = Duration::from_micros(100 * step);
            for config in [config(), Config::in_memory()] {
                drop(tokio::time::timeout(patience, Server::start(config)).await);
            }
        });
        if step % 10 == 0 {
            alone(|| async {
                let server = start(config()).await;
                server.client().put("k", "v").await.unwrap();
                stop(server).await;
            });
        }
    }
}

#[test]
fn one_thread_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    for config in [Config::in_memory(), Config::for_test(dir.path())] {
        alone_on(&mut tokio::runtime::Builder::new_current_thread(), || async {
            let server = start(config).await;
            use_all_ways(&server, "alone").await;
            stop(server).await;
        });
    }
}

#[test]
fn a_server_may_be_dropped_after_its_runtime() {
    let client = Mutex::new(None);
    alone_on(&mut tokio::runtime::Builder::new_current_thread(), || async {
        // Its tasks end with this runtime, which is shut down first.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let server = runtime.spawn(start(Config::in_memory())).await.unwrap();
        *client.lock().unwrap() = Some(server.client());
        runtime.shutdown_background();
        drop(server);
    });
    let client = client.into_inner().unwrap().unwrap();
    alone_on(&mut tokio::runtime::Builder::new_current_thread(), || async {
        assert_stopped(&client).await;
    });
}

#[test]
fn the_panic_hook_stays_the_programs() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let panic_once = || {
        let before = PANICS.load(Ordering::SeqCst);
        std::thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        assert_eq!(PANICS.load(Ordering::SeqCst), before + 1, "the hook is the one that was set");
    };
    alone(|| async {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {
            PANICS.fetch_add(1, Ordering::SeqCst);
        }));
        let server = start(Config::in_memory()).await;
        panic_once();
        use_all_ways(&server, "calm").await;
        stop(server).await;
        panic_once();
        std::panic::set_hook(before);
        assert_eq!(PANICS.load(Ordering::SeqCst), 2, "nothing else panicked");
    });
}

#[test]
fn in_memory_a_server_is_ready_at_once() {
    const STARTS: usize = 15;
    // Without optimization it takes longer, and the machine may be busy with other tests.
    let limit = Duration::from_millis(if cfg!(debug_assertions) { 300 } else { 30 });
    alone(|| async {
        let mut took = Vec::new();
        for _ in 0..STARTS {
            let began = Instant::now();
            let server = start(Config::in_memory()).await;
            took.push(began.elapsed());
            server.client().put("k", "v").await.unwrap();
            stop(server).await;
        }
        took.sort_unstable();
        let median = took[STARTS / 2];
        eprintln!("ready in memory after {median:?} (median of {STARTS}), {took:?}");
        assert!(median < limit, "{median:?} of {limit:?}");
    });
}

#[test]
fn clients_are_told_ports_they_can_connect_to() {
    let dir = tempfile::tempdir().unwrap();
    alone(|| async {
        for config in [Config::in_memory(), Config::for_test(dir.path())] {
            let server = start(config).await;
            assert_eq!(advertised(&server).await, [format!("http://{}", address(&server))]);
            stop(server).await;
        }
        // What is not port 0 is told as it is written.
        let config = Config {
            advertise_client_urls: ["http://db.example:2379", "http://localhost:0"]
                .map(|url| url.parse().unwrap())
                .to_vec(),
            listen_client_urls: vec!["http://127.0.0.1:0".parse().unwrap(); 2],
            ..Config::for_test(dir.path())
        };
        let server = start(config).await;
        let second = server.client_urls()[1].port().unwrap();
        let expected = ["http://db.example:2379".to_owned(), format!("http://localhost:{second}")];
        assert_eq!(advertised(&server).await, expected);
        stop(server).await;
    });
}

async fn advertised(server: &Server) -> Vec<String> {
    let members = server.engine().member_list(MemberListRequest::default()).await.unwrap();
    members.members[0].client_ur_ls.clone()
}

#[test]
fn a_directory_is_free_when_shutdown_returns() {
    let dir = tempfile::tempdir().unwrap();
    alone(|| async {
        for start_number in 1..=5 {
            let server = start(Config::for_test(dir.path())).await;
            let put = server.client().put("starts", start_number.to_string()).await.unwrap();
            assert_eq!(put.revision, 1 + start_number);
            stop(server).await;
            assert_eq!(open_below(dir.path()), Vec::<String>::new());
        }
    });
}

/// Descriptors of files below a directory.
fn open_below(dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    descriptors().into_iter().filter(|path| path.starts_with(&dir)).collect()
}

#[test]
fn handles_may_outlive_their_server() {
    alone(|| async {
        let server = Arc::new(start(Config::in_memory()).await);
        let (client, mut channel) = (server.client(), KvClient::new(server.channel()));
        channel.put(put_request("k", "v")).await.unwrap();
        stop(Arc::into_inner(server).unwrap()).await;
        assert_stopped(&client).await;
        let status = channel.put(put_request("k", "v")).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    });
}
