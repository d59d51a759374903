//! `/metrics` of a server that has served: every name that alerts, dashboards and
//! scripts made for etcd ask for is there, with etcd's type and labels, and says what
//! happened. Compared with a real etcd that was given the same traffic.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::time::{Duration, Instant};

use common::scrape::Scrape;
use common::server::{TestServer, kvorum};
use common::{http, judge};
use kvorum::pb::etcdserverpb::alarm_request::AlarmAction;
use kvorum::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use kvorum::pb::etcdserverpb::watch_request::RequestUnion;
use kvorum::pb::etcdserverpb::{
    AlarmRequest, AlarmType, CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest,
    LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest,
    WatchRequest, WatchResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const PATIENCE: Duration = Duration::from_secs(20);

/// Every series name in the alerts (`alerts/`) and the dashboards (`dashboards/`) of
/// etcd's `contrib/mixin`, except those about a peer, of which a single node has none.
const MIXIN: &[&str] = &[
    "etcd_disk_backend_commit_duration_seconds_bucket",
    "etcd_disk_wal_fsync_duration_seconds_bucket",
    "etcd_mvcc_db_total_size_in_bytes",
    "etcd_mvcc_db_total_size_in_use_in_bytes",
    "etcd_network_client_grpc_received_bytes_total",
    "etcd_network_client_grpc_sent_bytes_total",
    "etcd_server_has_leader",
    "etcd_server_leader_changes_seen_total",
    "etcd_server_proposals_applied_total",
    "etcd_server_proposals_committed_total",
    "etcd_server_proposals_failed_total",
    "etcd_server_proposals_pending",
    "etcd_server_quota_backend_bytes",
    "grpc_server_handled_total",
    "grpc_server_handling_seconds_bucket",
    "grpc_server_started_total",
    "process_resident_memory_bytes",
];

/// The labels that the mixin's rules select and sum by.
const MIXIN_LABELS: &[(&str, &[&str])] = &[
    ("grpc_server_handled_total", &["grpc_code", "grpc_method", "grpc_service", "grpc_type"]),
    ("grpc_server_started_total", &["grpc_method", "grpc_service", "grpc_type"]),
    ("grpc_server_handling_seconds", &["grpc_method", "grpc_service", "grpc_type"]),
];

/// Names of etcd's that are not here, and why.
const NOT_HERE: &[(&str, &str)] = &[("go_", "there is no Go runtime to describe")];

fn key(key: &str) -> bytes::Bytes {
    key.to_owned().into()
}

fn put(name: &str, value: &str) -> PutRequest {
    PutRequest { key: key(name), value: key(value), ..PutRequest::default() }
}

fn range(name: &str) -> RangeRequest {
    RangeRequest { key: key(name), ..RangeRequest::default() }
}

fn op(request: Op) -> RequestOp {
    RequestOp { request: Some(request) }
}

/// A watch of everything from `from` on that has been created.
async fn watch(
    server: &TestServer,
    from: i64,
) -> (mpsc::Sender<WatchRequest>, Streaming<WatchResponse>) {
    let create = WatchCreateRequest {
        key: key("\0"),
        range_end: key("\0"),
        start_revision: from,
        ..WatchCreateRequest::default()
    };
    let (requests, receiver) = mpsc::channel(1);
    let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    requests.send(request).await.unwrap();
    let mut client = WatchClient::new(server.channel());
    let mut responses = client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    assert!(responses.message().await.unwrap().unwrap().created);
    (requests, responses)
}

/// Reads from a watch until it has told this many events.
async fn events(responses: &mut Streaming<WatchResponse>, count: usize) {
    let mut seen = 0;
    while seen < count {
        seen += responses.message().await.unwrap().unwrap().events.len();
    }
    assert_eq!(seen, count);
}

/// Gives a new server some of everything: revisions 2 to 10, compacted to 5.
async fn traffic(server: &TestServer) {
    let mut kv = KvClient::new(server.channel());
    let mut leases = LeaseClient::new(server.channel());
    let (_requests, mut responses) = watch(server, 0).await;
    kv.put(put("a", "1")).await.unwrap();
    kv.put(put("a", "22")).await.unwrap();
    kv.put(put("b", "333")).await.unwrap();
    kv.put(put("c", &"4".repeat(1000))).await.unwrap();
    kv.range(range("a")).await.unwrap();
    kv.range(RangeRequest { serializable: true, ..range("b") }).await.unwrap();
    kv.range(RangeRequest { revision: 1000, ..range("b") }).await.unwrap_err();
    let delete =
        DeleteRangeRequest { key: key("a"), range_end: key("c"), ..DeleteRangeRequest::default() };
    assert_eq!(kv.delete_range(delete).await.unwrap().into_inner().deleted, 2);
    let compare = Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Version as i32,
        key: key("d"),
        target_union: Some(TargetUnion::Version(0)),
        ..Compare::default()
    };
    let remove = DeleteRangeRequest { key: key("c"), ..DeleteRangeRequest::default() };
    let txn = TxnRequest {
        compare: vec![compare],
        success: vec![
            op(Op::RequestPut(put("d", "55555"))),
            op(Op::RequestPut(put("e", ""))),
            op(Op::RequestDeleteRange(remove)),
        ],
        failure: vec![],
    };
    assert!(kv.txn(txn).await.unwrap().into_inner().succeeded);
    let reads = vec![op(Op::RequestRange(range("d")))];
    kv.txn(TxnRequest { success: reads, ..TxnRequest::default() }).await.unwrap();
    for id in [7, 8] {
        leases.lease_grant(LeaseGrantRequest { ttl: 100, id }).await.unwrap();
    }
    leases.lease_grant(LeaseGrantRequest { ttl: 100, id: 8 }).await.unwrap_err();
    for name in ["x", "y"] {
        kv.put(PutRequest { lease: 7, ..put(name, "leased") }).await.unwrap();
    }
    leases.lease_revoke(LeaseRevokeRequest { id: 7 }).await.unwrap();
    kv.put(put("z", "last")).await.unwrap();
    events(&mut responses, 4 + 2 + 3 + 2 + 2 + 1).await;
    let compaction = CompactionRequest { revision: 5, physical: true };
    kv.compact(compaction).await.unwrap();
    kv.compact(compaction).await.unwrap_err();
}

/// Scrapes until `good`.
fn scrape_until(server: &TestServer, what: &str, good: impl Fn(&Scrape) -> bool) -> Scrape {
    let began = Instant::now();
    loop {
        let scrape = Scrape::of(&server.client_address());
        if good(&scrape) {
            return scrape;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_dashboards_made_for_etcd_find_what_they_ask_for() {
    let server = TestServer::start(&kvorum(), &["--metrics=extensive"]);
    traffic(&server).await;
    // The first checkpoint of what was written comes a second later.
    let scrape = scrape_until(&server, "a checkpoint", |scrape| {
        scrape.value("etcd_disk_backend_commit_duration_seconds_count") > 0.0
    });

    for name in MIXIN {
        let there = scrape.series.keys().any(|series| series.split('{').next() == Some(name));
        assert!(there, "{name} is missing");
    }
    for (name, labels) in MIXIN_LABELS {
        let names: Vec<&str> = scrape.labels[*name].iter().map(String::as_str).collect();
        assert_eq!(names, *labels, "{name}");
    }

    let value = |series: &str| scrape.value(series);
    assert_eq!(value("etcd_server_has_leader"), 1.0);
    assert_eq!(value("etcd_server_is_leader"), 1.0);
    assert_eq!(value("etcd_server_leader_changes_seen_total"), 1.0);
    assert_eq!(value("etcd_server_proposals_pending"), 0.0);
    assert_eq!(value("etcd_server_proposals_failed_total"), 0.0);
    let (committed, applied) = (
        value("etcd_server_proposals_committed_total"),
        value("etcd_server_proposals_applied_total"),
    );
    assert!(committed >= 14.0 && committed == applied, "{committed} {applied}");
    assert!(value("etcd_disk_wal_fsync_duration_seconds_count") >= 13.0);
    let fsync = r#"etcd_disk_wal_fsync_duration_seconds_bucket{le="+Inf"}"#;
    assert_eq!(value(fsync), value("etcd_disk_wal_fsync_duration_seconds_count"));
    assert!(value("etcd_disk_wal_write_bytes_total") > 1000.0);
    let (size, in_use) = (
        value("etcd_mvcc_db_total_size_in_bytes"),
        value("etcd_mvcc_db_total_size_in_use_in_bytes"),
    );
    assert!(0.0 < in_use && in_use <= size, "{in_use} of {size} bytes in use");
    assert_eq!(value("etcd_server_quota_backend_bytes"), 2.0 * 1024.0 * 1024.0 * 1024.0);
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("etcd_network_client_grpc_received_bytes_total") > 1000.0);
    assert!(value("etcd_network_client_grpc_sent_bytes_total") > 1000.0);

    let call = |code: &str, method: &str, service: &str, kind: &str| {
        value(&format!(
            "grpc_server_handled_total{{grpc_code=\"{code}\",grpc_method=\"{method}\",\
             grpc_service=\"etcdserverpb.{service}\",grpc_type=\"{kind}\"}}"
        ))
    };
    assert_eq!(call("OK", "Put", "KV", "unary"), 7.0);
    assert_eq!(call("OK", "Range", "KV", "unary"), 2.0);
    assert_eq!(call("OutOfRange", "Range", "KV", "unary"), 1.0);
    assert_eq!(call("OutOfRange", "Compact", "KV", "unary"), 1.0);
    assert_eq!(call("FailedPrecondition", "LeaseGrant", "Lease", "unary"), 1.0);
    assert_eq!(call("Unknown", "Put", "KV", "unary"), 0.0);
    let started = r#"grpc_server_started_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"}"#;
    assert_eq!(value(started), 1.0);
    let handling = r#"grpc_server_handling_seconds_bucket{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary",le="10"}"#;
    assert_eq!(value(handling), 7.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_etcd_is_here_with_its_type_and_labels() {
    let Some(judges) = judge::find("every_metric_of_etcd_is_here_with_its_type_and_labels") else {
        return;
    };
    let etcd = TestServer::start(&judges.etcd, &["--metrics=extensive"]);
    let kvorum = TestServer::start(&kvorum(), &["--metrics=extensive"]);
    traffic(&etcd).await;
    traffic(&kvorum).await;
    for server in [&etcd, &kvorum] {
        for path in ["/health", "/livez", "/readyz"] {
            assert_eq!(http::get(&server.client_address(), path).unwrap().status, 200);
        }
    }
    let scraped = |server: &TestServer| {
        scrape_until(server, "the watch's end", |scrape| {
            scrape.value("etcd_debugging_mvcc_watch_stream_total") == 0.0
        })
    };
    let (theirs, ours) = (scraped(&etcd), scraped(&kvorum));

    let mut differences = Vec::new();
    for (name, kind) in &theirs.types {
        if NOT_HERE.iter().any(|(prefix, _)| name.starts_with(prefix)) {
            continue;
        }
        match ours.types.get(name) {
            None => differences.push(format!("{name} is missing")),
            Some(here) if here != kind => differences.push(format!("{name}: {here}, not {kind}")),
            Some(_) if ours.labels.get(name) != theirs.labels.get(name) => {
                let (here, there) = (ours.labels.get(name), theirs.labels.get(name));
                differences.push(format!("{name}: labels {here:?}, not {there:?}"));
            }
            Some(_) => {}
        }
    }
    // Series of etcd whose labels do not depend on the member, on time or on Go.
    let fixed = |series: &str| {
        ["etcd_server_feature_enabled{", "etcd_cluster_version{", "etcd_server_version{"]
            .iter()
            .any(|name| series.starts_with(name))
    };
    for (series, value) in theirs.series.iter().filter(|(series, _)| fixed(series)) {
        if ours.series.get(series) != Some(value) {
            differences.push(format!("{series}: {:?}, not {value}", ours.series.get(series)));
        }
    }
    for (series, value) in &ours.series {
        if fixed(series) && !theirs.series.contains_key(series) {
            differences.push(format!("{series}: {value}, not there at all"));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));

    // What the same traffic led to. Ranges that succeed are not among it: etcd counts
    // those of health checks.
    let same = [
        "etcd_server_has_leader",
        "etcd_server_is_leader",
        "etcd_server_is_learner",
        "etcd_server_leader_changes_seen_total",
        "etcd_server_quota_backend_bytes",
        "etcd_server_proposals_failed_total",
        "etcd_server_proposals_pending",
        "etcd_server_health_success",
        "etcd_server_health_failures",
        "etcd_network_known_peers",
        "etcd_mvcc_put_total",
        "etcd_mvcc_delete_total",
        "etcd_debugging_auth_revision",
        "etcd_debugging_lease_granted_total",
        "etcd_debugging_lease_renewed_total",
        "etcd_debugging_lease_revoked_total",
        "etcd_debugging_lease_ttl_total_count",
        "etcd_debugging_lease_ttl_total_sum",
        "etcd_debugging_mvcc_compact_revision",
        "etcd_debugging_mvcc_current_revision",
        "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds_count",
        "etcd_debugging_mvcc_pending_events_total",
        "etcd_debugging_mvcc_slow_watcher_total",
        "etcd_debugging_mvcc_total_put_size_in_bytes",
        "etcd_debugging_mvcc_watch_stream_total",
        "etcd_debugging_mvcc_watcher_total",
        r#"etcd_server_apply_duration_seconds_count{op="Put",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="Txn",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="DeleteRange",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="LeaseGrant",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="LeaseGrant",success="false",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="LeaseRevoke",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="Compaction",success="true",version="v3"}"#,
        r#"etcd_server_apply_duration_seconds_count{op="ClusterMemberAttrSet",success="true",version="v3"}"#,
        r#"etcd_server_request_duration_seconds_count{success="true",type="Put"}"#,
        r#"etcd_server_request_duration_seconds_count{success="false",type="Range"}"#,
        r#"etcd_server_request_duration_seconds_count{success="true",type="ReadonlyTxn"}"#,
        r#"etcd_server_request_duration_seconds_count{success="true",type="Txn"}"#,
    ];
    let value = |scrape: &Scrape, series: &str| {
        if series.contains('{') { scrape.value(series) } else { scrape.sum(series) }
    };
    let differences: Vec<String> = same
        .iter()
        .map(|series| (series, value(&ours, series), value(&theirs, series)))
        .filter(|(_, ours, theirs)| ours != theirs)
        .map(|(series, ours, theirs)| format!("{series}: {ours}, not {theirs}"))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_and_their_events_are_counted() {
    let server = TestServer::start(&kvorum(), &[]);
    let mut kv = KvClient::new(server.channel());
    for _ in 0..10 {
        kv.put(put("k", "v")).await.unwrap();
    }
    let (first, mut first_responses) = watch(&server, 2).await;
    let (second, mut second_responses) = watch(&server, 0).await;
    events(&mut first_responses, 10).await;
    kv.put(put("k", "v")).await.unwrap();
    events(&mut first_responses, 1).await;
    events(&mut second_responses, 1).await;
    let scrape = scrape_until(&server, "12 events", |scrape| {
        scrape.value("etcd_debugging_mvcc_events_total") == 12.0
    });
    assert_eq!(scrape.value("etcd_debugging_mvcc_watcher_total"), 2.0);
    assert_eq!(scrape.value("etcd_debugging_mvcc_watch_stream_total"), 2.0);
    assert_eq!(scrape.value("etcd_debugging_mvcc_slow_watcher_total"), 0.0);
    assert_eq!(scrape.value("etcd_debugging_mvcc_pending_events_total"), 0.0);
    assert_eq!(scrape.value("etcd_debugging_mvcc_keys_total"), 1.0);
    drop((first, first_responses, second, second_responses));
    scrape_until(&server, "no watchers", |scrape| {
        scrape.value("etcd_debugging_mvcc_watcher_total") == 0.0
            && scrape.value("etcd_debugging_mvcc_watch_stream_total") == 0.0
            // A counter stays.
            && scrape.value("etcd_debugging_mvcc_events_total") == 12.0
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_shows_while_it_is_raised_and_is_zero_after() {
    let server = TestServer::start(&kvorum(), &[]);
    let maintenance = MaintenanceClient::new(server.channel());
    let alarm = |action: AlarmAction| {
        let request = AlarmRequest {
            action: action as i32,
            member_id: 0xabc,
            alarm: AlarmType::Nospace as i32,
        };
        let mut maintenance = maintenance.clone();
        async move { maintenance.alarm(request).await.unwrap() }
    };
    let series = r#"etcd_debugging_server_alarms{alarm_type="NOSPACE",server_id="abc"}"#;
    let scrape = || Scrape::of(&server.client_address());
    assert!(!scrape().series.contains_key(series));
    alarm(AlarmAction::Activate).await;
    assert_eq!(scrape().value(series), 1.0);
    alarm(AlarmAction::Deactivate).await;
    assert_eq!(scrape().value(series), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_counts_what_it_removes() {
    let server = TestServer::start(&kvorum(), &[]);
    let mut kv = KvClient::new(server.channel());
    for _ in 0..50 {
        kv.put(put("k", "v")).await.unwrap();
    }
    let scrape = Scrape::of(&server.client_address());
    let before = scrape.value("etcd_mvcc_db_total_size_in_use_in_bytes");
    assert_eq!(scrape.value("etcd_debugging_mvcc_compact_revision"), -1.0);
    assert_eq!(scrape.value("etcd_debugging_mvcc_db_compaction_last"), 0.0);
    kv.compact(CompactionRequest { revision: 51, physical: true }).await.unwrap();
    let scrape = Scrape::of(&server.client_address());
    assert_eq!(scrape.value("etcd_debugging_mvcc_compact_revision"), 51.0);
    // Of 50 versions the newest stays, and the one it replaced: the event at the compact
    // revision can still be watched, with its previous value.
    assert_eq!(scrape.value("etcd_debugging_mvcc_db_compaction_keys_total"), 48.0);
    let total = "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds_count";
    assert_eq!(scrape.value(total), 1.0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - scrape.value("etcd_debugging_mvcc_db_compaction_last");
    assert!((-2.0..60.0).contains(&age), "compacted {age} seconds ago");
    let after = scrape.value("etcd_mvcc_db_total_size_in_use_in_bytes");
    assert!(after < before / 10.0, "{before} bytes, then {after}");
}
