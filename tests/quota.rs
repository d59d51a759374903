//! Limits: the database's quota and the way back from it, the size of requests and
//! transactions, and the compaction that keeps a database below its quota. The same
//! script is given to a real etcd, and what both answer is compared.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]
#![allow(clippy::unreachable, reason = "this is test code")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::process::{PATIENCE, until};
use common::scrape::Scrape;
use common::server::{TestServer, kvorum};
use common::{http, judge};
use kvorum::pb::etcdserverpb::alarm_request::AlarmAction;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::{
    AlarmRequest, AlarmType, CompactionRequest, DefragmentRequest, DeleteRangeRequest,
    LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, StatusRequest,
    TxnRequest,
};
use kvorum::{Config, Server, config};
use tonic::transport::Channel;
use tonic::{Code, Status};

const MIB: usize = 1 << 20;

/// An answer in a line: `ok`, or the code and the text.
fn told<T>(answer: Result<T, Status>) -> String {
    match answer {
        Ok(_) => "ok".to_owned(),
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put(key: &str, value: impl Into<Bytes>) -> PutRequest {
    PutRequest { key: bytes(key), value: value.into(), ..PutRequest::default() }
}

fn get(key: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), ..RangeRequest::default() }
}

fn txn_put(key: &str) -> TxnRequest {
    let request = Some(Op::RequestPut(put(key, "v")));
    TxnRequest { success: vec![RequestOp { request }], ..TxnRequest::default() }
}

/// Clients of one server that take messages of any size.
struct Clients {
    address: String,
    kv: KvClient<Channel>,
    lease: LeaseClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
}

impl Clients {
    fn new(server: &TestServer) -> Clients {
        let kv = KvClient::new(server.channel());
        Clients {
            address: server.client_address(),
            kv: kv.max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(server.channel()),
            maintenance: MaintenanceClient::new(server.channel()),
        }
    }

    async fn put(&mut self, key: &str, value: impl Into<Bytes>) -> Result<i64, Status> {
        let answer = self.kv.put(put(key, value)).await?;
        Ok(answer.into_inner().header.unwrap().revision)
    }

    async fn alarm(&mut self, action: AlarmAction) -> Vec<i32> {
        let request =
            AlarmRequest { action: action as i32, member_id: 0, alarm: AlarmType::None as i32 };
        let answer = self.maintenance.alarm(request).await.unwrap().into_inner();
        answer.alarms.iter().map(|alarm| alarm.alarm).collect()
    }

    /// Every alarm there is, disarmed as etcdctl does it.
    async fn disarm(&mut self) {
        let get = AlarmRequest { action: AlarmAction::Get as i32, ..AlarmRequest::default() };
        for alarm in self.maintenance.alarm(get).await.unwrap().into_inner().alarms {
            let request = AlarmRequest {
                action: AlarmAction::Deactivate as i32,
                member_id: alarm.member_id,
                alarm: alarm.alarm,
            };
            self.maintenance.alarm(request).await.unwrap();
        }
    }

    fn get_http(&self, path: &str) -> String {
        let answer = http::get(&self.address, path).unwrap();
        format!("{} {}", answer.status, answer.text())
    }
}

/// Fills a quota of 2 MiB and finds the way out; what every step led to.
async fn fill_and_recover(program: &Path) -> Vec<(&'static str, String)> {
    let server = TestServer::start(program, &["--quota-backend-bytes=2097152"]);
    let mut clients = Clients::new(&server);
    let mut steps = Vec::new();
    let mut step = |what, answer: String| steps.push((what, answer));

    let granted = clients.lease.lease_grant(LeaseGrantRequest { ttl: 1000, id: 5 }).await;
    step("grant before", told(granted));
    let mut revision = 0;
    let mut puts = 0;
    let refusal = loop {
        match clients.put("big", vec![7; 64 << 10]).await {
            Ok(at) => revision = at,
            Err(status) => break told(Err::<(), _>(status)),
        }
        puts += 1;
        assert!(puts < 100, "the quota does not end anything");
    };
    // etcd looks at its file, which grows in steps and at its own time.
    assert!(puts >= 24, "only {puts} puts of 64 KiB fit into 2 MiB");
    step("put that is too much", refusal);
    step("alarms", format!("{:?}", clients.alarm(AlarmAction::Get).await));
    step("health", clients.get_http("/health"));
    step("health without NOSPACE", clients.get_http("/health?exclude=NOSPACE"));
    step("livez", clients.get_http("/livez"));
    step("readyz", clients.get_http("/readyz"));
    let errors = clients.maintenance.status(StatusRequest {}).await.unwrap().into_inner().errors;
    let errors: Vec<String> = errors
        .iter()
        .map(|error| {
            error.split_whitespace().filter(|word| !word.starts_with("memberID")).collect()
        })
        .collect();
    step("status", format!("{errors:?}"));

    step("put that would fit", told(clients.put("small", "v").await));
    step("txn that puts", told(clients.kv.txn(txn_put("small")).await));
    let read = Some(Op::RequestRange(get("big")));
    let read = TxnRequest { success: vec![RequestOp { request: read }], ..Default::default() };
    step("txn that reads", told(clients.kv.txn(read).await));
    let delete = DeleteRangeRequest { key: bytes("none"), ..DeleteRangeRequest::default() };
    let request = Some(Op::RequestDeleteRange(delete.clone()));
    let erase = TxnRequest { success: vec![RequestOp { request }], ..TxnRequest::default() };
    step("txn that deletes", told(clients.kv.txn(erase).await));
    step("read", told(clients.kv.range(get("big")).await));
    step("delete", told(clients.kv.delete_range(delete).await));
    let grant = LeaseGrantRequest { ttl: 1000, id: 6 };
    step("grant", told(clients.lease.lease_grant(grant).await));
    step("revoke", told(clients.lease.lease_revoke(LeaseRevokeRequest { id: 5 }).await));
    let compaction = CompactionRequest { revision, physical: true };
    step("compact", told(clients.kv.compact(compaction).await));
    step("put after compaction", told(clients.put("small", "v").await));
    let defragmented = clients.maintenance.defragment(DefragmentRequest {}).await;
    step("defragment", told(defragmented));
    step("put after defragmentation", told(clients.put("small", "v").await));
    step("alarms still", format!("{:?}", clients.alarm(AlarmAction::Get).await));
    clients.disarm().await;
    step("alarms disarmed", format!("{:?}", clients.alarm(AlarmAction::Get).await));
    step("put", told(clients.put("small", "v").await));
    step("txn", told(clients.kv.txn(txn_put("small")).await));
    step("grant after", told(clients.lease.lease_grant(grant).await));
    step("health after", clients.get_http("/health"));
    // Room for as much again as what was compacted.
    for _ in 0..20 {
        clients.put("big", vec![7; 64 << 10]).await.unwrap();
    }
    steps
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_database_refuses_and_recovers_as_etcd_does() {
    let ours = fill_and_recover(&kvorum()).await;
    let answer = |what: &str| &ours.iter().find(|(name, _)| *name == what).unwrap().1;
    let refused = "ResourceExhausted: etcdserver: mvcc: database space exceeded";
    assert_eq!(answer("put that is too much"), refused);
    assert_eq!(answer("grant"), refused);
    assert_eq!(answer("health"), "503 {\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n");
    for allowed in ["read", "delete", "compact", "put"] {
        assert_eq!(answer(allowed), "ok", "{allowed}");
    }
    let Some(judges) = judge::find("a_full_database_refuses_and_recovers_as_etcd_does") else {
        return;
    };
    assert_eq!(ours, fill_and_recover(&judges.etcd).await);
}

/// The quota is about what is held, so what compaction freed can be used at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_compacted_does_not_count() {
    let server = TestServer::start(&kvorum(), &["--quota-backend-bytes=2097152"]);
    let mut clients = Clients::new(&server);
    for _ in 0..28 {
        clients.put("big", vec![7; 64 << 10]).await.unwrap();
    }
    let revision = clients.put("small", "v").await.unwrap();
    let compaction = CompactionRequest { revision, physical: true };
    clients.kv.compact(compaction).await.unwrap();
    clients.put("large", vec![7; MIB]).await.unwrap();
    assert_eq!(clients.alarm(AlarmAction::Get).await, [0; 0]);
}

/// Deleting everything and compacting to the deletion, as one does when a database is full,
/// makes room for as much again, though watchers from there on get what was deleted.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_at_the_compacted_revision_does_not_count() {
    let server = TestServer::start(&kvorum(), &["--quota-backend-bytes=2097152"]);
    let mut clients = Clients::new(&server);
    for round in 0..3 {
        let mut puts = 0;
        while clients.put(&format!("k{puts}"), vec![7; 64 << 10]).await.is_ok() {
            puts += 1;
        }
        assert!((28..=32).contains(&puts), "round {round}: {puts} puts of 64 KiB fit into 2 MiB");
        let all = DeleteRangeRequest {
            key: bytes("k"),
            range_end: bytes("l"),
            ..DeleteRangeRequest::default()
        };
        let deleted = clients.kv.delete_range(all).await.unwrap().into_inner();
        assert_eq!(deleted.deleted, puts);
        let revision = deleted.header.unwrap().revision;
        clients.kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
        clients.disarm().await;
        let status = clients.maintenance.status(StatusRequest {}).await.unwrap().into_inner();
        assert!(status.db_size_in_use < 64 << 10, "{} in use", status.db_size_in_use);
    }
}

/// The lengths of all checkpoints' files, but for those that go meanwhile.
fn checkpoint_bytes(member_dir: &Path) -> u64 {
    std::fs::read_dir(member_dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("ckpt-"))
        .flat_map(std::fs::read_dir)
        .flatten()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// Nobody asks for a defragmentation, and no server stops for one.
#[tokio::test(flavor = "multi_thread")]
async fn what_compaction_freed_goes_back_to_the_disk() {
    const WRITTEN: usize = 100 * MIB;
    let mut server = TestServer::start(&kvorum(), &[]);
    let mut clients = Clients::new(&server);
    let mut revision = 0;
    for _ in 0..WRITTEN / (256 << 10) {
        revision = clients.put("big", vec![7; 256 << 10]).await.unwrap();
    }
    let size = async |server: &TestServer| {
        let status = MaintenanceClient::new(server.channel()).status(StatusRequest {}).await;
        let status = status.unwrap().into_inner();
        let scrape = Scrape::of(&server.client_address());
        let total = scrape.value("etcd_mvcc_db_total_size_in_bytes") as usize;
        let in_use = scrape.value("etcd_mvcc_db_total_size_in_use_in_bytes") as usize;
        assert_eq!(in_use, status.db_size_in_use as usize);
        (total, in_use)
    };
    let began = Instant::now();
    while size(&server).await.0 < WRITTEN {
        assert!(began.elapsed() < PATIENCE, "the checkpoint is not written");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(size(&server).await.1 > WRITTEN);
    clients.kv.compact(CompactionRequest { revision, physical: true }).await.unwrap();
    let began = Instant::now();
    let in_use = loop {
        let (total, in_use) = size(&server).await;
        if total < 32 * MIB {
            break in_use;
        }
        assert!(began.elapsed() < PATIENCE, "{total} bytes are taken, {in_use} in use");
        clients.put("small", "v").await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(in_use < MIB, "{in_use} bytes in use");
    // The space of the checkpoint before is given back in steps.
    let member_dir = server.data_dir().join("member");
    until("the space to be given back", || {
        (checkpoint_bytes(&member_dir) < 40 << 20).then_some(())
    });
    server.kill();
    server.restart();
    let (total, in_use) = size(&server).await;
    assert!(total < 40 * MIB && in_use < MIB, "{total} bytes, {in_use} in use");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_and_the_quota_survive_a_restart() {
    let mut server = TestServer::start(&kvorum(), &["--quota-backend-bytes=2097152"]);
    let mut clients = Clients::new(&server);
    let mut puts = 0;
    while clients.put("big", vec![7; 64 << 10]).await.is_ok() {
        puts += 1;
    }
    assert!((28..=32).contains(&puts), "{puts} puts of 64 KiB fit into 2 MiB");
    let nospace = [AlarmType::Nospace as i32];
    assert_eq!(clients.alarm(AlarmAction::Get).await, nospace);
    server.kill();
    server.spawn();
    // Its health is bad, so only that it answers is waited for.
    until("an answer", || http::get(&server.client_address(), "/health").ok());
    let mut clients = Clients::new(&server);
    assert_eq!(clients.alarm(AlarmAction::Get).await, nospace);
    assert_eq!(clients.put("small", "v").await.unwrap_err().code(), Code::ResourceExhausted);
    clients.disarm().await;
    // Nothing was freed: the next large put raises it again.
    clients.put("big", vec![7; 64 << 10]).await.unwrap_err();
    assert_eq!(clients.alarm(AlarmAction::Get).await, nospace);
}

/// The largest value that a server takes for a key of one letter, by bisection.
async fn largest_value(clients: &mut Clients, mut fits: usize, mut too_large: usize) -> usize {
    while too_large - fits > 1 {
        let middle = fits.midpoint(too_large);
        match clients.put("k", vec![7; middle]).await {
            Ok(_) => fits = middle,
            Err(status) => {
                assert_eq!(status.code(), Code::InvalidArgument);
                assert_eq!(status.message(), "etcdserver: request is too large");
                too_large = middle;
            }
        }
    }
    fits
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_too_large_from_the_same_byte_on() {
    let Some(judges) = judge::find("requests_are_too_large_from_the_same_byte_on") else {
        return;
    };
    const LIMIT: usize = 100_000;
    let mut found = Vec::new();
    let flags = [format!("--max-request-bytes={LIMIT}")];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    for program in [&judges.etcd, &kvorum()] {
        let server = TestServer::start(program, &flags);
        let mut clients = Clients::new(&server);
        let largest = largest_value(&mut clients, LIMIT / 2, LIMIT).await;
        // A transaction that holds the same put is a little larger.
        let mut txn = txn_put("k");
        let padded = Op::RequestPut(put("k", vec![7; largest]));
        txn.success = vec![RequestOp { request: Some(padded) }];
        let mut answers = vec![told(clients.kv.txn(txn).await)];
        // Beyond 512 KiB more than the limit it is gRPC that refuses.
        for size in [2 * LIMIT, LIMIT + 500 * 1024, LIMIT + 520 * 1024] {
            answers.push(told(clients.put("k", vec![7; size]).await));
        }
        let member = clients.maintenance.status(StatusRequest {}).await.unwrap().into_inner();
        let member = member.header.unwrap().member_id;
        found.push((largest, answers, member));
    }
    let [(theirs, their_answers, their_id), (ours, our_answers, our_id)] = &found[..] else {
        panic!("two servers were asked")
    };
    // A request's id has the member's in its upper bits, so its length depends on that.
    let id_bytes = |member: u64| prost::length_delimiter_len((member << 48 | 1 << 47) as usize);
    assert_eq!(
        ours + id_bytes(*our_id),
        theirs + id_bytes(*their_id),
        "{ours} bytes fit here, {theirs} there"
    );
    assert_eq!(our_answers, their_answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_keys_and_values_come_back_as_they_were() {
    let server = TestServer::start(&kvorum(), &[]);
    let mut clients = Clients::new(&server);
    let value: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8).collect();
    let key = "k".repeat(100 << 10);
    clients.put("value", value.clone()).await.unwrap();
    clients.put(&key, value.clone()).await.unwrap();
    let mut server = server;
    for life in 0..2 {
        for name in ["value", &key] {
            let found = clients.kv.range(get(name)).await.unwrap().into_inner();
            assert_eq!(found.count, 1);
            let kv: kvorum::pb::mvccpb::KeyValue =
                prost::Message::decode(found.kvs[0].clone()).unwrap();
            assert!(kv.key == name.as_bytes() && kv.value == value, "changed in life {life}");
        }
        if life == 0 {
            server.kill();
            server.restart();
            clients = Clients::new(&server);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_have_as_many_operations_as_in_etcd() {
    let Some(judges) = judge::find("transactions_have_as_many_operations_as_in_etcd") else {
        return;
    };
    for (flags, limit) in [(&[][..], 128), (&["--max-txn-ops=5"], 5)] {
        let mut found = Vec::new();
        for program in [&judges.etcd, &kvorum()] {
            let server = TestServer::start(program, flags);
            let mut clients = Clients::new(&server);
            let gets = |count: usize| -> Vec<RequestOp> {
                let request = Op::RequestRange(get("k"));
                vec![RequestOp { request: Some(request) }; count]
            };
            let inner = TxnRequest { success: gets(limit + 1), ..TxnRequest::default() };
            let inner = vec![RequestOp { request: Some(Op::RequestTxn(inner)) }];
            let mut answers = Vec::new();
            for txn in [
                TxnRequest { success: gets(limit), failure: gets(limit), ..Default::default() },
                TxnRequest { success: gets(limit + 1), ..TxnRequest::default() },
                TxnRequest { failure: gets(limit + 1), ..TxnRequest::default() },
                TxnRequest { success: inner, ..TxnRequest::default() },
            ] {
                answers.push(told(clients.kv.txn(txn).await));
            }
            found.push(answers);
        }
        assert_eq!(found[1], found[0]);
        assert_eq!(found[1][0], "ok");
        assert_eq!(found[1][1], "InvalidArgument: etcdserver: too many operations in txn request");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_older_than_its_period_is_compacted() {
    let server = TestServer::start(
        &kvorum(),
        &["--auto-compaction-mode=periodic", "--auto-compaction-retention=1s"],
    );
    let mut clients = Clients::new(&server);
    let began = Instant::now();
    let mut last = 0;
    let compacted = loop {
        last = clients.put("k", format!("{last}")).await.unwrap();
        let scrape = Scrape::of(&server.client_address());
        let compacted = scrape.value("etcd_debugging_mvcc_compact_revision");
        if compacted > 2.0 {
            break compacted as i64;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for a compaction");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(began.elapsed() >= Duration::from_secs(1), "before the period was over");
    assert!(compacted < last, "nothing was kept: {compacted} of {last}");
    let at = |revision| RangeRequest { revision, ..get("k") };
    assert_eq!(
        told(clients.kv.range(at(2)).await),
        "OutOfRange: etcdserver: mvcc: required revision has been compacted"
    );
    assert_eq!(told(clients.kv.range(at(last)).await), "ok");
    // Superseded versions are gone, too.
    until("versions to be removed", || {
        let scrape = Scrape::of(&server.client_address());
        (scrape.value("etcd_debugging_mvcc_db_compaction_keys_total") > 0.0).then_some(())
    });
}

/// This mode looks every five minutes, so time is turned forward.
#[tokio::test]
async fn history_of_more_revisions_than_wanted_is_compacted() {
    // The clock stands still while a blocking task runs; then only `advance` moves it.
    tokio::time::pause();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let standstill = tokio::task::spawn_blocking(move || held.recv());

    let config = Config {
        auto_compaction_mode: config::AutoCompactionMode::Revision,
        auto_compaction_retention: "10".to_owned(),
        ..Config::in_memory()
    };
    let server = Server::start(config).await.unwrap();
    // What is due at once is only seen when the clock moves.
    tokio::time::advance(Duration::from_secs(1)).await;
    let engine = server.engine();
    for _ in 0..50 {
        engine.put(put("k", "v")).await.unwrap();
    }
    engine.range(RangeRequest { revision: 2, ..get("k") }).await.unwrap();
    tokio::time::advance(Duration::from_secs(301)).await;
    let began = Instant::now();
    let refusal = loop {
        match engine.range(RangeRequest { revision: 40, ..get("k") }).await {
            Err(refusal) => break refusal,
            Ok(_) => assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for a compaction"),
        }
        std::thread::sleep(Duration::from_millis(1));
        tokio::task::yield_now().await;
    };
    assert_eq!(refusal, kvorum::Error::Compacted);
    engine.range(RangeRequest { revision: 41, ..get("k") }).await.unwrap();
    drop(hold);
    standstill.await.unwrap().unwrap_err();
    tokio::time::resume();
    server.shutdown().await.unwrap();
}
