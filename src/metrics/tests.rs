use std::collections::BTreeMap;

use super::*;

/// Every metric name in the alerts and dashboards of etcd's `contrib/mixin`.
const MIXIN: &[&str] = &[
    "etcd_disk_backend_commit_duration_seconds_bucket",
    "etcd_disk_wal_fsync_duration_seconds_bucket",
    "etcd_mvcc_db_total_size_in_bytes",
    "etcd_mvcc_db_total_size_in_use_in_bytes",
    "etcd_network_client_grpc_received_bytes_total",
    "etcd_network_client_grpc_sent_bytes_total",
    "etcd_network_peer_received_bytes_total",
    "etcd_network_peer_round_trip_time_seconds_bucket",
    "etcd_network_peer_sent_bytes_total",
    "etcd_network_peer_sent_failures_total",
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

/// The names etcd's own end-to-end test demands of a member that has served a put and
/// a get, without those of the Go runtime.
const ALWAYS: &[&str] = &[
    "etcd_cluster_version",
    "etcd_debugging_auth_revision",
    "etcd_debugging_disk_backend_commit_rebalance_duration_seconds",
    "etcd_debugging_disk_backend_commit_spill_duration_seconds",
    "etcd_debugging_disk_backend_commit_write_duration_seconds",
    "etcd_debugging_lease_granted_total",
    "etcd_debugging_lease_renewed_total",
    "etcd_debugging_lease_revoked_total",
    "etcd_debugging_lease_ttl_total",
    "etcd_debugging_mvcc_compact_revision",
    "etcd_debugging_mvcc_current_revision",
    "etcd_debugging_mvcc_db_compaction_keys_total",
    "etcd_debugging_mvcc_db_compaction_last",
    "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds",
    "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
    "etcd_debugging_mvcc_events_total",
    "etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds",
    "etcd_debugging_mvcc_keys_total",
    "etcd_debugging_mvcc_pending_events_total",
    "etcd_debugging_mvcc_slow_watcher_total",
    "etcd_debugging_mvcc_total_put_size_in_bytes",
    "etcd_debugging_mvcc_watch_stream_total",
    "etcd_debugging_mvcc_watcher_total",
    "etcd_debugging_server_lease_expired_total",
    "etcd_debugging_server_watch_send_loop_control_stream_duration_seconds",
    "etcd_debugging_server_watch_send_loop_progress_duration_seconds",
    "etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds",
    "etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds",
    "etcd_debugging_snap_save_marshalling_duration_seconds",
    "etcd_debugging_snap_save_total_duration_seconds",
    "etcd_debugging_store_expires_total",
    "etcd_debugging_store_watch_requests_total",
    "etcd_debugging_store_watchers",
    "etcd_disk_backend_commit_duration_seconds",
    "etcd_disk_backend_defrag_duration_seconds",
    "etcd_disk_backend_snapshot_duration_seconds",
    "etcd_disk_defrag_inflight",
    "etcd_disk_wal_fsync_duration_seconds",
    "etcd_disk_wal_write_bytes_total",
    "etcd_disk_wal_write_duration_seconds",
    "etcd_grpc_proxy_cache_hits_total",
    "etcd_grpc_proxy_cache_keys_total",
    "etcd_grpc_proxy_cache_misses_total",
    "etcd_grpc_proxy_events_coalescing_total",
    "etcd_grpc_proxy_watchers_coalescing_total",
    "etcd_mvcc_db_open_read_transactions",
    "etcd_mvcc_db_total_size_in_bytes",
    "etcd_mvcc_db_total_size_in_use_in_bytes",
    "etcd_mvcc_delete_total",
    "etcd_mvcc_hash_duration_seconds",
    "etcd_mvcc_hash_rev_duration_seconds",
    "etcd_mvcc_put_total",
    "etcd_mvcc_range_total",
    "etcd_mvcc_txn_total",
    "etcd_network_client_grpc_received_bytes_total",
    "etcd_network_client_grpc_sent_bytes_total",
    "etcd_network_known_peers",
    "etcd_server_apply_duration_seconds",
    "etcd_server_client_requests_total",
    "etcd_server_go_version",
    "etcd_server_has_leader",
    "etcd_server_health_failures",
    "etcd_server_health_success",
    "etcd_server_heartbeat_send_failures_total",
    "etcd_server_id",
    "etcd_server_is_leader",
    "etcd_server_is_learner",
    "etcd_server_leader_changes_seen_total",
    "etcd_server_learner_promote_successes",
    "etcd_server_proposals_applied_total",
    "etcd_server_proposals_committed_total",
    "etcd_server_proposals_failed_total",
    "etcd_server_proposals_pending",
    "etcd_server_quota_backend_bytes",
    "etcd_server_range_duration_seconds",
    "etcd_server_read_indexes_failed_total",
    "etcd_server_request_duration_seconds",
    "etcd_server_slow_apply_total",
    "etcd_server_slow_read_indexes_total",
    "etcd_server_snapshot_apply_in_progress_total",
    "etcd_server_version",
    "etcd_snap_db_fsync_duration_seconds",
    "etcd_snap_db_save_total_duration_seconds",
    "etcd_snap_fsync_duration_seconds",
    "grpc_server_handled_total",
    "grpc_server_msg_received_total",
    "grpc_server_msg_sent_total",
    "grpc_server_started_total",
    "os_fd_limit",
    "os_fd_used",
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
    "promhttp_metric_handler_requests_in_flight",
    "promhttp_metric_handler_requests_total",
];

/// Series of a text exposition: name and labels → value.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            (series.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

/// Metric name → its type.
fn types(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .inspect(|(name, _)| assert!(!name.is_empty()))
        .collect()
}

fn name_of(series: &str) -> &str {
    series.split('{').next().expect("split yields at least one")
}

#[test]
fn every_name_of_the_mixin_is_there_before_anything_happened() {
    let metrics = Metrics::extensive().unwrap();
    metrics.peer(1, 2);
    let text = metrics.render().unwrap();
    let series = series(&text);
    for name in MIXIN {
        assert!(series.keys().any(|key| name_of(key) == *name), "{name} is missing");
    }
}

#[test]
fn every_name_of_a_serving_member_is_there() {
    let metrics = Metrics::new().unwrap();
    metrics.identify("3.6.0", "3.6.0", 0x8e9e_05c5_2164_694d);
    metrics.peer(1, 1);
    metrics.count_client_request(false, None);
    metrics.server_apply_duration_seconds.observe(Op::Put, true, Duration::from_millis(1));
    metrics.server_request_duration_seconds.observe(Op::Put, true, Duration::from_millis(1));
    let text = metrics.render().unwrap();
    let types = types(&text);
    for name in ALWAYS {
        assert!(types.contains_key(name), "{name} is missing");
    }
    assert!(!text.contains("grpc_server_handling_seconds"), "only with --metrics=extensive");
    assert!(!text.contains("\ngo_"), "there is no Go runtime to describe");
}

#[test]
fn types_keep_the_quirks_of_etcd() {
    let metrics = Metrics::new().unwrap();
    metrics.peer(1, 2);
    let text = metrics.render().unwrap();
    let types = types(&text);
    for name in [
        "etcd_server_proposals_committed_total",
        "etcd_server_proposals_applied_total",
        "etcd_disk_wal_write_bytes_total",
        "etcd_debugging_mvcc_keys_total",
        "etcd_debugging_mvcc_slow_watcher_total",
        "etcd_debugging_mvcc_watcher_total",
        "etcd_debugging_mvcc_watch_stream_total",
        "etcd_debugging_mvcc_pending_events_total",
        "etcd_network_snapshot_send_inflights_total",
        "etcd_network_snapshot_receive_inflights_total",
        "etcd_debugging_mvcc_total_put_size_in_bytes",
    ] {
        assert_eq!(types[name], "gauge", "{name}");
    }
    for name in [
        "etcd_server_proposals_failed_total",
        "etcd_network_snapshot_send_success",
        "process_cpu_seconds_total",
    ] {
        assert_eq!(types[name], "counter", "{name}");
    }
    assert_eq!(types["etcd_debugging_lease_ttl_total"], "histogram");
}

#[test]
fn buckets_double_from_the_first_to_the_last_of_etcd() {
    let metrics = Metrics::new().unwrap();
    metrics.peer(1, 2);
    metrics.server_apply_duration_seconds.observe(Op::Put, true, Duration::ZERO);
    let series = series(&metrics.render().unwrap());
    let bounds = |name: &str| -> Vec<f64> {
        let mut bounds: Vec<f64> = series
            .keys()
            .filter(|key| name_of(key) == format!("{name}_bucket"))
            .filter_map(|key| key.split("le=\"").nth(1)?.split('"').next()?.parse().ok())
            .filter(|bound: &f64| bound.is_finite())
            .collect();
        bounds.sort_by(f64::total_cmp);
        bounds
    };
    for (name, first, last, count) in [
        ("etcd_disk_wal_fsync_duration_seconds", 0.001, 8.192, 14),
        ("etcd_disk_backend_commit_duration_seconds", 0.001, 8.192, 14),
        ("etcd_disk_backend_defrag_duration_seconds", 0.1, 409.6, 13),
        ("etcd_disk_backend_snapshot_duration_seconds", 0.01, 655.36, 17),
        ("etcd_network_peer_round_trip_time_seconds", 0.0001, 3.2768, 16),
        ("etcd_server_apply_duration_seconds", 0.0001, 52.4288, 20),
        ("etcd_debugging_lease_ttl_total", 1.0, 8_388_608.0, 24),
        ("etcd_mvcc_hash_duration_seconds", 0.01, 163.84, 15),
    ] {
        let bounds = bounds(name);
        assert_eq!(bounds.len(), count, "{name}: {bounds:?}");
        assert_eq!((bounds[0], bounds[count - 1]), (first, last), "{name}");
    }
}

#[test]
fn a_call_is_counted_under_its_method_and_code() {
    let metrics = Metrics::extensive().unwrap();
    let watch = metrics.grpc.method("/etcdserverpb.Watch/Watch").unwrap();
    assert!(watch.streaming);
    watch.started.inc();
    watch.handled(tonic::Code::Cancelled, Duration::from_secs(3));
    let put = metrics.grpc.method("/etcdserverpb.KV/Put").unwrap();
    assert!(!put.streaming);
    assert!(metrics.grpc.method("/etcdserverpb.KV/Nope").is_none());

    let series = series(&metrics.render().unwrap());
    // The line etcd's end-to-end test looks for, to the letter.
    let line = "grpc_server_handled_total{grpc_code=\"Canceled\",grpc_method=\"Watch\",\
                grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"}";
    assert_eq!(series[line], 1.0);
    let started = "grpc_server_started_total{grpc_method=\"Watch\",\
                   grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"}";
    assert_eq!(series[started], 1.0);
    assert_eq!(series[&line.replace("Canceled", "OK")], 0.0);
    assert_eq!(series[&started.replace("started_total", "handling_seconds_sum")], 3.0);
}

#[test]
fn every_code_of_tonic_has_its_counter() {
    for number in 0..i32::try_from(CODES.len()).unwrap() {
        let code = tonic::Code::from_i32(number);
        assert_eq!(code as usize, usize::try_from(number).unwrap());
        let ours = CODES[code as usize].to_lowercase();
        let theirs = format!("{code:?}").to_lowercase().replace("cancelled", "canceled");
        assert_eq!(ours, theirs);
    }
}

#[test]
fn an_observation_lands_in_the_series_of_its_operation() {
    let metrics = Metrics::new().unwrap();
    for _ in 0..2 {
        metrics.server_apply_duration_seconds.observe(Op::Txn, false, Duration::from_secs(1));
    }
    metrics.server_request_duration_seconds.observe(Op::Range, true, Duration::from_secs(1));
    metrics.server_range_duration_seconds.observe(true, Duration::from_secs(2));
    let series = series(&metrics.render().unwrap());
    let count = |name: &str| series[name];
    let txn = r#"etcd_server_apply_duration_seconds_count{op="Txn",success="false",version="v3"}"#;
    assert_eq!(count(txn), 2.0);
    assert_eq!(
        count(r#"etcd_server_request_duration_seconds_count{success="true",type="Range"}"#),
        1.0
    );
    assert_eq!(count(r#"etcd_server_range_duration_seconds_sum{success="true"}"#), 2.0);
    assert_eq!(count(r#"etcd_server_range_duration_seconds_sum{success="false"}"#), 0.0);
}

#[test]
fn versions_that_clients_invent_do_not_grow_without_bound() {
    let metrics = Metrics::new().unwrap();
    let calls = MAX_CLIENT_API_VERSIONS + 100;
    for number in 0..calls {
        metrics.count_client_request(number % 2 == 0, Some(&format!("0.0.{number}")));
    }
    let series = series(&metrics.render().unwrap());
    let ours: Vec<f64> = series
        .iter()
        .filter(|(key, _)| name_of(key) == "etcd_server_client_requests_total")
        .map(|(_, value)| *value)
        .collect();
    assert_eq!(ours.len(), 2 * (MAX_CLIENT_API_VERSIONS + 1));
    assert_eq!(ours.iter().sum::<f64>(), calls as f64, "no call is lost");
}

#[test]
fn a_new_cluster_version_replaces_the_old() {
    let metrics = Metrics::new().unwrap();
    metrics.identify("3.6.1", "", 255);
    assert!(!metrics.render().unwrap().contains("etcd_cluster_version{"));
    metrics.identify("3.6.1", "3.5.0", 255);
    metrics.identify("3.6.1", "3.6.0", 255);
    let series = series(&metrics.render().unwrap());
    let of =
        |name: &str| -> Vec<&String> { series.keys().filter(|key| name_of(key) == name).collect() };
    assert_eq!(of("etcd_cluster_version"), [r#"etcd_cluster_version{cluster_version="3.6"}"#]);
    assert_eq!(of("etcd_server_id"), [r#"etcd_server_id{server_id="ff"}"#]);
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_is_measured_at_each_scrape() {
    let metrics = Metrics::new().unwrap();
    let before = series(&metrics.render().unwrap());
    let files: Vec<_> = (0..20).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    let after = series(&metrics.render().unwrap());
    // Other tests of this process open and close files meanwhile, so not exactly 20.
    assert!(after["process_open_fds"] >= files.len() as f64);
    assert!(after["process_max_fds"] >= after["process_open_fds"]);
    assert_eq!(after["os_fd_limit"], after["process_max_fds"]);
    assert!(before["process_resident_memory_bytes"] > 1e6);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - after["process_start_time_seconds"];
    assert!((-5.0..3600.0 * 24.0).contains(&age), "started {age} seconds ago");
}
