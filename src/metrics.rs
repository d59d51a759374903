//! etcd's Prometheus metrics, under etcd's names.
//!
//! Alerts and dashboards written for etcd must work unchanged, so names, types
//! (gauges that end in `_total` included), label names and buckets are etcd's.
//! The field of a metric is its name without `etcd_`:
//!
//! ```text
//! etcd_disk_wal_fsync_duration_seconds   →  metrics.disk_wal_fsync_duration_seconds.observe(0.002)
//! etcd_server_has_leader                 →  metrics.server_has_leader.set(1)
//! ```
//!
//! What etcd has no name for begins with `kvorum_`, in the field's name too.
//!
//! One [`Metrics`] belongs to one server and is shared as an `Arc`; nothing is
//! process-global, so several servers in one process keep separate books.
//!
//! Invariants:
//! - A series an alert reads exists from the start with the value zero, because
//!   "absent" and "zero" are different answers to Prometheus. Series of a peer exist
//!   from [`Metrics::peer`] on.
//! - What is counted per request costs plain atomics: handles of labelled series are
//!   resolved once ([`GrpcMethod`], [`OpDurations`], [`PeerMetrics`]).
//! - Label values that clients choose are bounded ([`MAX_CLIENT_API_VERSIONS`]).
//!
//! Names that describe parts kvorum does not have (the v2 store, bbolt's pages, the
//! gRPC proxy, etcd's raft snapshot files) are exported as zero and have no field.
//! `go_*` is not exported: there is no Go runtime to describe.

mod process;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use prost_reflect::DescriptorPool;

use crate::pb::kvorumpb::command::Request;

/// Values of `client_api_version` kept apart; clients choose that label. Calls of
/// further versions are counted as `other`.
pub const MAX_CLIENT_API_VERSIONS: usize = 64;

/// Declares [`Metrics`]: one field per line, its documentation is the metric's HELP.
macro_rules! metrics {
    ($( $(#[doc = $help:literal])+ $field:ident: $type:ty = $make:ident($name:literal $(, $arg:expr)*); )+) => {
        /// Every metric a server fills. See the module's documentation for the naming.
        #[derive(Debug)]
        pub struct Metrics {
            $( $(#[doc = $help])+ pub $field: $type, )+
            /// Counters of gRPC calls by method.
            pub grpc: Grpc,
            /// `etcd_server_apply_duration_seconds`: time to apply one request.
            pub server_apply_duration_seconds: OpDurations,
            /// `etcd_server_request_duration_seconds`: time from receiving a request to its answer.
            pub server_request_duration_seconds: OpDurations,
            /// `etcd_server_range_duration_seconds`: time to read a range.
            pub server_range_duration_seconds: OutcomeDurations,
            client_requests: ClientRequests,
            registry: Registry,
        }

        impl Metrics {
            fn build(extensive: bool) -> Result<Metrics, prometheus::Error> {
                let registry = Registry::new();
                let r = &registry;
                let metrics = Metrics {
                    $( $field: $make(r, $name, concat!($($help),+).trim() $(, $arg)*)?, )+
                    grpc: Grpc::new(r, extensive)?,
                    server_apply_duration_seconds: OpDurations::new(
                        histogram_vec(
                            r,
                            "etcd_server_apply_duration_seconds",
                            "Time to apply one request.",
                            &["version", "op", "success"],
                            exponential(0.0001, 20),
                        )?,
                        &["v3"],
                    ),
                    server_request_duration_seconds: OpDurations::new(
                        histogram_vec(
                            r,
                            "etcd_server_request_duration_seconds",
                            "Time from receiving a request to its answer.",
                            &["type", "success"],
                            exponential(0.001, 14),
                        )?,
                        &[],
                    ),
                    server_range_duration_seconds: OutcomeDurations::new(&histogram_vec(
                        r,
                        "etcd_server_range_duration_seconds",
                        "Time to read a range.",
                        &["success"],
                        exponential(0.0001, 20),
                    )?)?,
                    client_requests: ClientRequests::new(r)?,
                    registry,
                };
                metrics.prepare()?;
                Ok(metrics)
            }
        }
    };
}

metrics! {
    // The server.
    /// 1 with the cluster version as label, once it is decided.
    cluster_version: IntGaugeVec = gauge_vec("etcd_cluster_version", &["cluster_version"]);
    /// 1 with this server's version as label.
    server_version: IntGaugeVec = gauge_vec("etcd_server_version", &["server_version"]);
    /// 1 with the runtime's name as label; not a Go version here.
    server_go_version: IntGaugeVec = gauge_vec("etcd_server_go_version", &["server_go_version"]);
    /// 1 with this member's id, in hexadecimal, as label.
    server_id: IntGaugeVec = gauge_vec("etcd_server_id", &["server_id"]);
    /// 1 for a feature gate that is on, 0 for one that is off.
    server_feature_enabled: IntGaugeVec = gauge_vec("etcd_server_feature_enabled", &["name", "stage"]);
    /// 1 while this member knows a leader, else 0.
    server_has_leader: IntGauge = gauge("etcd_server_has_leader");
    /// 1 while this member is the leader, else 0.
    server_is_leader: IntGauge = gauge("etcd_server_is_leader");
    /// 1 while this member is a learner, else 0.
    server_is_learner: IntGauge = gauge("etcd_server_is_learner");
    /// Times this member saw another leader than before, the first included.
    server_leader_changes_seen_total: IntCounter = counter("etcd_server_leader_changes_seen_total");
    /// Heartbeats the leader could not send in time.
    server_heartbeat_send_failures_total: IntCounter = counter("etcd_server_heartbeat_send_failures_total");
    /// Learner promotions refused while this member led, by reason.
    server_learner_promote_failures: IntCounterVec = counter_vec("etcd_server_learner_promote_failures", &["Reason"]);
    /// Learner promotions done while this member led.
    server_learner_promote_successes: IntCounter = counter("etcd_server_learner_promote_successes");
    /// Raft index up to which entries are applied.
    server_proposals_applied_total: IntGauge = gauge("etcd_server_proposals_applied_total");
    /// Raft index up to which entries are committed.
    server_proposals_committed_total: IntGauge = gauge("etcd_server_proposals_committed_total");
    /// Proposals of this member that timed out, were dropped or cancelled.
    server_proposals_failed_total: IntCounter = counter("etcd_server_proposals_failed_total");
    /// Proposals of this member that wait for their result.
    server_proposals_pending: IntGauge = gauge("etcd_server_proposals_pending");
    /// Storage quota in effect, in bytes.
    server_quota_backend_bytes: IntGauge = gauge("etcd_server_quota_backend_bytes");
    /// Linearizable reads whose read index did not come.
    server_read_indexes_failed_total: IntCounter = counter("etcd_server_read_indexes_failed_total");
    /// Linearizable reads whose read index came late.
    server_slow_read_indexes_total: IntCounter = counter("etcd_server_slow_read_indexes_total");
    /// Requests that took longer to apply than the warning threshold.
    server_slow_apply_total: IntCounter = counter("etcd_server_slow_apply_total");
    /// 1 while a snapshot from the leader is being installed, else 0.
    server_snapshot_apply_in_progress_total: IntGauge = gauge("etcd_server_snapshot_apply_in_progress_total");
    /// Health requests answered with failure.
    server_health_failures: IntCounter = counter("etcd_server_health_failures");
    /// Health requests answered with success.
    server_health_success: IntCounter = counter("etcd_server_health_success");
    /// Last result of each health check: 1 passed, 0 failed.
    server_healthcheck: IntGaugeVec = gauge_vec("etcd_server_healthcheck", &["type", "name"]);
    /// Runs of each health check by result.
    server_healthchecks_total: IntCounterVec = counter_vec("etcd_server_healthchecks_total", &["type", "name", "status"]);

    // Keys and revisions.
    /// Reads that hold a revision at the moment.
    mvcc_db_open_read_transactions: IntGauge = gauge("etcd_mvcc_db_open_read_transactions");
    /// Bytes the database takes, reusable space included.
    mvcc_db_total_size_in_bytes: IntGauge = gauge("etcd_mvcc_db_total_size_in_bytes");
    /// Bytes of the database that hold data.
    mvcc_db_total_size_in_use_in_bytes: IntGauge = gauge("etcd_mvcc_db_total_size_in_use_in_bytes");
    /// Deletes applied by this member.
    mvcc_delete_total: IntCounter = counter("etcd_mvcc_delete_total");
    /// Time to hash the whole database.
    mvcc_hash_duration_seconds: Histogram = histogram("etcd_mvcc_hash_duration_seconds", exponential(0.01, 15));
    /// Time to hash the keys up to a revision.
    mvcc_hash_rev_duration_seconds: Histogram = histogram("etcd_mvcc_hash_rev_duration_seconds", exponential(0.01, 15));
    /// Puts applied by this member.
    mvcc_put_total: IntCounter = counter("etcd_mvcc_put_total");
    /// Ranges read by this member.
    mvcc_range_total: IntCounter = counter("etcd_mvcc_range_total");
    /// Transactions applied by this member.
    mvcc_txn_total: IntCounter = counter("etcd_mvcc_txn_total");

    // Disk.
    /// Time of one batch written to the checkpoint.
    disk_backend_commit_duration_seconds: Histogram = histogram("etcd_disk_backend_commit_duration_seconds", exponential(0.001, 14));
    /// Time of one defragmentation.
    disk_backend_defrag_duration_seconds: Histogram = histogram("etcd_disk_backend_defrag_duration_seconds", exponential(0.1, 13));
    /// Time to produce one snapshot of the database.
    disk_backend_snapshot_duration_seconds: Histogram = histogram("etcd_disk_backend_snapshot_duration_seconds", exponential(0.01, 17));
    /// 1 while a defragmentation runs, else 0.
    disk_defrag_inflight: IntGauge = gauge("etcd_disk_defrag_inflight");
    /// Time of one fsync of the raft log.
    disk_wal_fsync_duration_seconds: Histogram = histogram("etcd_disk_wal_fsync_duration_seconds", exponential(0.001, 14));
    /// Bytes written to the raft log.
    disk_wal_write_bytes_total: IntGauge = gauge("etcd_disk_wal_write_bytes_total");
    /// Time of one write to the raft log, without the fsync.
    disk_wal_write_duration_seconds: Histogram = histogram("etcd_disk_wal_write_duration_seconds", exponential(0.001, 14));
    /// Time to fsync a received snapshot.
    snap_db_fsync_duration_seconds: Histogram = histogram("etcd_snap_db_fsync_duration_seconds", exponential(0.001, 14));
    /// Time to save a received snapshot.
    snap_db_save_total_duration_seconds: Histogram = histogram("etcd_snap_db_save_total_duration_seconds", exponential(0.1, 10));

    // Network.
    /// Peers a connection is up to.
    network_active_peers: IntGaugeVec = gauge_vec("etcd_network_active_peers", &["Local", "Remote"]);
    /// Connections to a peer that were lost.
    network_disconnected_peers_total: IntCounterVec = counter_vec("etcd_network_disconnected_peers_total", &["Local", "Remote"]);
    /// 1 for each other member of the cluster, 0 for one that was removed.
    network_known_peers: IntGaugeVec = gauge_vec("etcd_network_known_peers", &["Local", "Remote"]);
    /// Bytes received from gRPC clients.
    network_client_grpc_received_bytes_total: IntCounter = counter("etcd_network_client_grpc_received_bytes_total");
    /// Bytes sent to gRPC clients.
    network_client_grpc_sent_bytes_total: IntCounter = counter("etcd_network_client_grpc_sent_bytes_total");
    /// Bytes received from a peer.
    network_peer_received_bytes_total: IntCounterVec = counter_vec("etcd_network_peer_received_bytes_total", &["From"]);
    /// Messages of a peer that could not be received.
    network_peer_received_failures_total: IntCounterVec = counter_vec("etcd_network_peer_received_failures_total", &["From"]);
    /// Round trip time to a peer.
    network_peer_round_trip_time_seconds: HistogramVec = histogram_vec("etcd_network_peer_round_trip_time_seconds", &["To"], exponential(0.0001, 16));
    /// Bytes sent to a peer.
    network_peer_sent_bytes_total: IntCounterVec = counter_vec("etcd_network_peer_sent_bytes_total", &["To"]);
    /// Messages to a peer that could not be sent.
    network_peer_sent_failures_total: IntCounterVec = counter_vec("etcd_network_peer_sent_failures_total", &["To"]);
    /// Client streams that broke, by direction (`receive`, `send`) and API (`watch`, `lease-keepalive`).
    network_server_stream_failures_total: IntCounterVec = counter_vec("etcd_network_server_stream_failures_total", &["Type", "API"]);
    /// Snapshots of a peer that could not be received.
    network_snapshot_receive_failures: IntCounterVec = counter_vec("etcd_network_snapshot_receive_failures", &["From"]);
    /// Snapshots of a peer being received.
    network_snapshot_receive_inflights_total: IntGaugeVec = gauge_vec("etcd_network_snapshot_receive_inflights_total", &["From"]);
    /// Snapshots received from a peer.
    network_snapshot_receive_success: IntCounterVec = counter_vec("etcd_network_snapshot_receive_success", &["From"]);
    /// Time to receive a snapshot.
    network_snapshot_receive_total_duration_seconds: HistogramVec = histogram_vec("etcd_network_snapshot_receive_total_duration_seconds", &["From"], exponential(0.1, 10));
    /// Snapshots to a peer that could not be sent.
    network_snapshot_send_failures: IntCounterVec = counter_vec("etcd_network_snapshot_send_failures", &["To"]);
    /// Snapshots being sent to a peer.
    network_snapshot_send_inflights_total: IntGaugeVec = gauge_vec("etcd_network_snapshot_send_inflights_total", &["To"]);
    /// Snapshots sent to a peer.
    network_snapshot_send_success: IntCounterVec = counter_vec("etcd_network_snapshot_send_success", &["To"]);
    /// Time to send a snapshot.
    network_snapshot_send_total_duration_seconds: HistogramVec = histogram_vec("etcd_network_snapshot_send_total_duration_seconds", &["To"], exponential(0.1, 10));

    // Debugging: etcd promises no stability for these.
    /// Revision of users and roles.
    debugging_auth_revision: IntGauge = gauge("etcd_debugging_auth_revision");
    /// Time of the writing part of one checkpoint batch.
    debugging_disk_backend_commit_write_duration_seconds: Histogram = histogram("etcd_debugging_disk_backend_commit_write_duration_seconds", exponential(0.001, 14));
    /// Leases granted.
    debugging_lease_granted_total: IntCounter = counter("etcd_debugging_lease_granted_total");
    /// Leases renewed by this member while it led.
    debugging_lease_renewed_total: IntCounter = counter("etcd_debugging_lease_renewed_total");
    /// Leases revoked, the expired included.
    debugging_lease_revoked_total: IntCounter = counter("etcd_debugging_lease_revoked_total");
    /// TTL of the leases granted, in seconds.
    debugging_lease_ttl_total: Histogram = histogram("etcd_debugging_lease_ttl_total", exponential(1.0, 24));
    /// Revision up to which history is compacted.
    debugging_mvcc_compact_revision: IntGauge = gauge("etcd_debugging_mvcc_compact_revision");
    /// Current revision.
    debugging_mvcc_current_revision: IntGauge = gauge("etcd_debugging_mvcc_current_revision");
    /// Key versions removed by compactions.
    debugging_mvcc_db_compaction_keys_total: IntCounter = counter("etcd_debugging_mvcc_db_compaction_keys_total");
    /// Unix time at which the last compaction finished, in seconds.
    debugging_mvcc_db_compaction_last: IntGauge = gauge("etcd_debugging_mvcc_db_compaction_last");
    /// Time of one step of removing compacted records, in milliseconds.
    debugging_mvcc_db_compaction_pause_duration_milliseconds: Histogram = histogram("etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds", exponential(1.0, 13));
    /// Time of one compaction from start to end, in milliseconds.
    debugging_mvcc_db_compaction_total_duration_milliseconds: Histogram = histogram("etcd_debugging_mvcc_db_compaction_total_duration_milliseconds", exponential(100.0, 14));
    /// Events sent to watchers by this member.
    debugging_mvcc_events_total: IntCounter = counter("etcd_debugging_mvcc_events_total");
    /// Time of one step of compacting the key index, in milliseconds.
    debugging_mvcc_index_compaction_pause_duration_milliseconds: Histogram = histogram("etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds", exponential(0.5, 14));
    /// Keys that exist.
    debugging_mvcc_keys_total: IntGauge = gauge("etcd_debugging_mvcc_keys_total");
    /// Events that watchers have not received yet.
    debugging_mvcc_pending_events_total: IntGauge = gauge("etcd_debugging_mvcc_pending_events_total");
    /// Watchers that are behind the current revision.
    debugging_mvcc_slow_watcher_total: IntGauge = gauge("etcd_debugging_mvcc_slow_watcher_total");
    /// Bytes of keys and values put.
    debugging_mvcc_total_put_size_in_bytes: IntGauge = gauge("etcd_debugging_mvcc_total_put_size_in_bytes");
    /// Watch streams that are open.
    debugging_mvcc_watch_stream_total: IntGauge = gauge("etcd_debugging_mvcc_watch_stream_total");
    /// Watchers that exist.
    debugging_mvcc_watcher_total: IntGauge = gauge("etcd_debugging_mvcc_watcher_total");
    /// Time of one raft snapshot: a checkpoint after which the raft log is truncated.
    debugging_snap_save_total_duration_seconds: Histogram = histogram("etcd_debugging_snap_save_total_duration_seconds", exponential(0.001, 14));
    /// Alarms that are raised, by member and type.
    debugging_server_alarms: IntGaugeVec = gauge_vec("etcd_debugging_server_alarms", &["server_id", "alarm_type"]);
    /// Leases this member revoked because they had expired.
    debugging_server_lease_expired_total: IntCounter = counter("etcd_debugging_server_lease_expired_total");
    /// Time to send a watch's created or cancelled answer.
    debugging_server_watch_send_loop_control_stream_duration_seconds: Histogram = histogram("etcd_debugging_server_watch_send_loop_control_stream_duration_seconds", exponential(0.001, 14));
    /// Time to send a progress notification.
    debugging_server_watch_send_loop_progress_duration_seconds: Histogram = histogram("etcd_debugging_server_watch_send_loop_progress_duration_seconds", exponential(0.001, 14));
    /// Time to send a watch answer, divided by its events.
    debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds: Histogram = histogram("etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds", exponential(0.001, 14));
    /// Time to send a watch answer with events.
    debugging_server_watch_send_loop_watch_stream_duration_seconds: Histogram = histogram("etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds", exponential(0.001, 14));

    // What etcd does not tell.
    /// Interval of the leader's heartbeats, in seconds: `--heartbeat-interval`.
    kvorum_server_heartbeat_interval_seconds: Gauge = float_gauge("kvorum_server_heartbeat_interval_seconds");
    /// Time without a heartbeat after which a member stands for election, in seconds: `--election-timeout`.
    kvorum_server_election_timeout_seconds: Gauge = float_gauge("kvorum_server_election_timeout_seconds");
    /// Entries applied between two raft snapshots: `--snapshot-count`.
    kvorum_server_snapshot_count: IntGauge = gauge("kvorum_server_snapshot_count");
    /// Entries kept in the raft log behind a raft snapshot: `--snapshot-catchup-entries`.
    kvorum_server_snapshot_catchup_entries: IntGauge = gauge("kvorum_server_snapshot_catchup_entries");
    /// Index of the oldest entry in the raft log.
    kvorum_raft_log_first_index: IntGauge = gauge("kvorum_raft_log_first_index");
    /// Times the beginning of the raft log was cut off, because a snapshot holds it.
    kvorum_raft_log_truncations_total: IntCounter = counter("kvorum_raft_log_truncations_total");

    // The scrape itself.
    /// Scrapes by HTTP status.
    promhttp_metric_handler_requests_total: IntCounterVec = counter_vec("promhttp_metric_handler_requests_total", &["code"]);
    /// Scrapes being answered.
    promhttp_metric_handler_requests_in_flight: IntGauge = gauge("promhttp_metric_handler_requests_in_flight");
}

/// Gauges of parts that kvorum does not have: always zero.
const ABSENT_GAUGES: &[&str] = &[
    "etcd_debugging_store_watchers",
    "etcd_grpc_proxy_cache_hits_total",
    "etcd_grpc_proxy_cache_keys_total",
    "etcd_grpc_proxy_cache_misses_total",
    "etcd_grpc_proxy_watchers_coalescing_total",
];

/// Counters of parts that kvorum does not have: always zero.
const ABSENT_COUNTERS: &[&str] = &[
    "etcd_debugging_store_expires_total",
    "etcd_debugging_store_watch_requests_total",
    "etcd_grpc_proxy_events_coalescing_total",
];

/// Counters by `action` of the v2 store, which kvorum does not have: no series.
const ABSENT_ACTION_COUNTERS: &[&str] = &[
    "etcd_debugging_store_reads_failed_total",
    "etcd_debugging_store_reads_total",
    "etcd_debugging_store_writes_failed_total",
    "etcd_debugging_store_writes_total",
];

/// Histograms of parts that kvorum does not have, buckets from 1 ms: always empty.
const ABSENT_HISTOGRAMS: &[&str] = &[
    "etcd_debugging_disk_backend_commit_rebalance_duration_seconds",
    "etcd_debugging_disk_backend_commit_spill_duration_seconds",
    "etcd_debugging_snap_save_marshalling_duration_seconds",
    "etcd_snap_fsync_duration_seconds",
];

const ABSENT_HELP: &str = "Always zero: this server has no such part.";

impl Metrics {
    /// The metrics of `--metrics=basic`.
    ///
    /// # Errors
    ///
    /// Never with the names of this module; the type is the registry's.
    pub fn new() -> Result<Arc<Metrics>, prometheus::Error> {
        Metrics::build(false).map(Arc::new)
    }

    /// The metrics of `--metrics=extensive`: those of [`Metrics::new`] and a latency
    /// histogram per gRPC method, `grpc_server_handling_seconds`.
    ///
    /// # Errors
    ///
    /// As [`Metrics::new`].
    pub fn extensive() -> Result<Arc<Metrics>, prometheus::Error> {
        Metrics::build(true).map(Arc::new)
    }

    /// Everything in Prometheus' text format 0.0.4, the process' own numbers included:
    /// those are read now, so call it off the threads that must not wait for `/proc`.
    ///
    /// # Errors
    ///
    /// When a metric cannot be written as text, which the names of this module can.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text)?;
        process::write(&mut text);
        Ok(text)
    }

    /// Handles of all series about the peer `remote`, which start at zero here.
    /// `local` is this member.
    pub fn peer(&self, local: u64, remote: u64) -> PeerMetrics {
        let both = &[hex(local), hex(remote)];
        let one = &[hex(remote)];
        PeerMetrics {
            active: self.network_active_peers.with_label_values(both),
            disconnected: self.network_disconnected_peers_total.with_label_values(both),
            known: self.network_known_peers.with_label_values(both),
            received_bytes: self.network_peer_received_bytes_total.with_label_values(one),
            received_failures: self.network_peer_received_failures_total.with_label_values(one),
            round_trip_time_seconds: self
                .network_peer_round_trip_time_seconds
                .with_label_values(one),
            sent_bytes: self.network_peer_sent_bytes_total.with_label_values(one),
            sent_failures: self.network_peer_sent_failures_total.with_label_values(one),
            snapshot_receive_failures: self
                .network_snapshot_receive_failures
                .with_label_values(one),
            snapshot_receive_inflights: self
                .network_snapshot_receive_inflights_total
                .with_label_values(one),
            snapshot_receive_success: self.network_snapshot_receive_success.with_label_values(one),
            snapshot_receive_seconds: self
                .network_snapshot_receive_total_duration_seconds
                .with_label_values(one),
            snapshot_send_failures: self.network_snapshot_send_failures.with_label_values(one),
            snapshot_send_inflights: self
                .network_snapshot_send_inflights_total
                .with_label_values(one),
            snapshot_send_success: self.network_snapshot_send_success.with_label_values(one),
            snapshot_send_seconds: self
                .network_snapshot_send_total_duration_seconds
                .with_label_values(one),
        }
    }

    /// Says who this server is: its versions and its id. `cluster_version` is empty
    /// while it is not decided; a later call replaces it. Its label is `X.Y`, as in etcd.
    pub fn identify(&self, server_version: &str, cluster_version: &str, member_id: u64) {
        self.server_version.with_label_values(&[server_version]).set(1);
        self.server_id.with_label_values(&[hex(member_id)]).set(1);
        self.cluster_version.reset();
        if !cluster_version.is_empty() {
            let minor = cluster_version.match_indices('.').nth(1).map(|(at, _)| at);
            let minor = minor.and_then(|at| cluster_version.get(..at)).unwrap_or(cluster_version);
            self.cluster_version.with_label_values(&[minor]).set(1);
        }
    }

    /// Counts a call in `etcd_server_client_requests_total`. `client_api_version` is the
    /// metadata of that name; `None` when the client sent none.
    pub fn count_client_request(&self, stream: bool, client_api_version: Option<&str>) {
        self.client_requests.count(stream, client_api_version.unwrap_or("unknown"));
    }

    /// Creates the zero series, and the metrics nothing fills.
    fn prepare(&self) -> Result<(), prometheus::Error> {
        let r = &self.registry;
        for name in ABSENT_GAUGES {
            gauge(r, name, ABSENT_HELP)?;
        }
        for name in ABSENT_COUNTERS {
            counter(r, name, ABSENT_HELP)?;
        }
        for name in ABSENT_ACTION_COUNTERS {
            counter_vec(r, name, ABSENT_HELP, &["action"])?;
        }
        for name in ABSENT_HISTOGRAMS {
            histogram(r, name, ABSENT_HELP, exponential(0.001, 14))?;
        }
        self.server_go_version.get_metric_with_label_values(&["rust"])?.set(1);
        for (direction, api) in [
            ("receive", "watch"),
            ("send", "watch"),
            ("receive", "lease-keepalive"),
            ("send", "lease-keepalive"),
        ] {
            self.network_server_stream_failures_total
                .get_metric_with_label_values(&[direction, api])?;
        }
        for code in ["200", "500", "503"] {
            self.promhttp_metric_handler_requests_total.get_metric_with_label_values(&[code])?;
        }
        Ok(())
    }
}

/// Handles of the series about one peer; see [`Metrics::peer`].
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each field is the metric of that name in `Metrics`")]
pub struct PeerMetrics {
    pub active: IntGauge,
    pub disconnected: IntCounter,
    pub known: IntGauge,
    pub received_bytes: IntCounter,
    pub received_failures: IntCounter,
    pub round_trip_time_seconds: Histogram,
    pub sent_bytes: IntCounter,
    pub sent_failures: IntCounter,
    pub snapshot_receive_failures: IntCounter,
    pub snapshot_receive_inflights: IntGauge,
    pub snapshot_receive_success: IntCounter,
    pub snapshot_receive_seconds: Histogram,
    pub snapshot_send_failures: IntCounter,
    pub snapshot_send_inflights: IntGauge,
    pub snapshot_send_success: IntCounter,
    pub snapshot_send_seconds: Histogram,
}

/// The `grpc_server_*` family: one [`GrpcMethod`] per method of the descriptor set.
#[derive(Debug)]
pub struct Grpc {
    by_path: HashMap<String, Arc<GrpcMethod>>,
}

/// Counters of one gRPC method.
#[derive(Debug)]
pub struct GrpcMethod {
    /// Calls begun.
    pub started: IntCounter,
    /// Messages received from clients.
    pub msg_received: IntCounter,
    /// Messages sent to clients.
    pub msg_sent: IntCounter,
    /// Whether the client, or the server, streams.
    pub streaming: bool,
    handled: Vec<IntCounter>,
    handling_seconds: Option<Histogram>,
}

impl GrpcMethod {
    /// Counts a finished call and, with `--metrics=extensive`, the time it took.
    pub fn handled(&self, code: tonic::Code, elapsed: Duration) {
        if let Some(counter) = self.handled.get(code as usize) {
            counter.inc();
        }
        if let Some(histogram) = &self.handling_seconds {
            histogram.observe(elapsed.as_secs_f64());
        }
    }
}

/// gRPC's codes by number, under the names grpc-go gives them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Prometheus' default buckets, which the gRPC middleware uses.
const HANDLING_BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

impl Grpc {
    fn new(r: &Registry, extensive: bool) -> Result<Grpc, prometheus::Error> {
        let labels = ["grpc_method", "grpc_service", "grpc_type"];
        let with_code = ["grpc_code", "grpc_method", "grpc_service", "grpc_type"];
        let started = counter_vec(r, "grpc_server_started_total", "Calls begun.", &labels)?;
        let handled = counter_vec(r, "grpc_server_handled_total", "Calls ended.", &with_code)?;
        let received = counter_vec(
            r,
            "grpc_server_msg_received_total",
            "Messages received from clients.",
            &labels,
        )?;
        let sent =
            counter_vec(r, "grpc_server_msg_sent_total", "Messages sent to clients.", &labels)?;
        let seconds = extensive
            .then(|| {
                histogram_vec(
                    r,
                    "grpc_server_handling_seconds",
                    "Time from the begin of a call to its end.",
                    &labels,
                    HANDLING_BUCKETS.to_vec(),
                )
            })
            .transpose()?;

        let pool = DescriptorPool::decode(crate::pb::DESCRIPTORS)
            .map_err(|error| prometheus::Error::Msg(error.to_string()))?;
        let mut by_path = HashMap::new();
        for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
            let service = method.parent_service().full_name();
            let kind = match (method.is_client_streaming(), method.is_server_streaming()) {
                (false, false) => "unary",
                (true, false) => "client_stream",
                (false, true) => "server_stream",
                (true, true) => "bidi_stream",
            };
            let values = [method.name(), service, kind];
            let entry = GrpcMethod {
                started: started.get_metric_with_label_values(&values)?,
                msg_received: received.get_metric_with_label_values(&values)?,
                msg_sent: sent.get_metric_with_label_values(&values)?,
                streaming: kind != "unary",
                handled: CODES
                    .iter()
                    .map(|code| {
                        handled.get_metric_with_label_values(&[code, method.name(), service, kind])
                    })
                    .collect::<Result<_, _>>()?,
                handling_seconds: seconds
                    .as_ref()
                    .map(|vec| vec.get_metric_with_label_values(&values))
                    .transpose()?,
            };
            by_path.insert(format!("/{service}/{}", method.name()), Arc::new(entry));
        }
        Ok(Grpc { by_path })
    }

    /// The counters of the method with this HTTP/2 path, such as `/etcdserverpb.KV/Put`;
    /// `None` for a method no service has. Resolve it once where possible.
    pub fn method(&self, path: &str) -> Option<&Arc<GrpcMethod>> {
        self.by_path.get(path)
    }
}

/// What a request does, as the labels `op` and `type` name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the request of that name")]
pub enum Op {
    Range,
    Put,
    DeleteRange,
    Txn,
    ReadonlyTxn,
    Compaction,
    LeaseGrant,
    LeaseRevoke,
    LeaseCheckpoint,
    Alarm,
    Authenticate,
    AuthEnable,
    AuthDisable,
    AuthStatus,
    AuthUserAdd,
    AuthUserDelete,
    AuthUserChangePassword,
    AuthUserGrantRole,
    AuthUserGet,
    AuthUserRevokeRole,
    AuthUserList,
    AuthRoleAdd,
    AuthRoleGrantPermission,
    AuthRoleGet,
    AuthRoleRevokePermission,
    AuthRoleDelete,
    AuthRoleList,
    ClusterVersionSet,
    ClusterMemberAttrSet,
    DowngradeInfoSet,
}

impl From<&Request> for Op {
    /// What etcd calls the command; those of this server alone count as the one they do
    /// the work of.
    fn from(request: &Request) -> Op {
        match request {
            Request::Put(_) => Op::Put,
            Request::DeleteRange(_) => Op::DeleteRange,
            Request::Txn(_) => Op::Txn,
            Request::Compaction(_) | Request::AutoCompact(_) => Op::Compaction,
            Request::LeaseGrant(_) => Op::LeaseGrant,
            Request::LeaseRevoke(_) | Request::LeaseExpire(_) => Op::LeaseRevoke,
            Request::LeaseCheckpoint(_) | Request::LeaseRemainders(_) => Op::LeaseCheckpoint,
            Request::Alarm(_) => Op::Alarm,
            Request::MemberPublish(_) | Request::MemberChange(_) => Op::ClusterMemberAttrSet,
        }
    }
}

/// The number of [`Op`]s.
const OPS: usize = Op::DowngradeInfoSet as usize + 1;

/// A histogram by [`Op`] and success. A series appears when it is first filled, as in
/// etcd; after that an observation looks no label up.
#[derive(Debug)]
pub struct OpDurations {
    vec: HistogramVec,
    prefix: &'static [&'static str],
    series: [[OnceLock<Histogram>; 2]; OPS],
}

impl OpDurations {
    fn new(vec: HistogramVec, prefix: &'static [&'static str]) -> OpDurations {
        OpDurations { vec, prefix, series: [const { [const { OnceLock::new() }; 2] }; OPS] }
    }

    /// Adds a request that took `elapsed`.
    pub fn observe(&self, op: Op, success: bool, elapsed: Duration) {
        let cell =
            self.series.get(op as usize).and_then(|outcomes| outcomes.get(usize::from(success)));
        let Some(cell) = cell else { return };
        cell.get_or_init(|| {
            let mut labels = self.prefix.to_vec();
            let op = format!("{op:?}");
            labels.extend([op.as_str(), bool_label(success)]);
            self.vec.with_label_values(&labels)
        })
        .observe(elapsed.as_secs_f64());
    }
}

/// A histogram by success.
#[derive(Debug)]
pub struct OutcomeDurations {
    success: Histogram,
    failure: Histogram,
}

impl OutcomeDurations {
    fn new(vec: &HistogramVec) -> Result<OutcomeDurations, prometheus::Error> {
        Ok(OutcomeDurations {
            success: vec.get_metric_with_label_values(&[bool_label(true)])?,
            failure: vec.get_metric_with_label_values(&[bool_label(false)])?,
        })
    }

    /// Adds a request that took `elapsed`.
    pub fn observe(&self, success: bool, elapsed: Duration) {
        let histogram = if success { &self.success } else { &self.failure };
        histogram.observe(elapsed.as_secs_f64());
    }
}

/// `etcd_server_client_requests_total`: by kind of call and the client's API version.
#[derive(Debug)]
struct ClientRequests {
    vec: IntCounterVec,
    /// By version: the counters of unary calls and of streams.
    seen: RwLock<BTreeMap<String, [IntCounter; 2]>>,
}

impl ClientRequests {
    fn new(r: &Registry) -> Result<ClientRequests, prometheus::Error> {
        let vec = counter_vec(
            r,
            "etcd_server_client_requests_total",
            "Calls by the API version the client says it speaks.",
            &["type", "client_api_version"],
        )?;
        Ok(ClientRequests { vec, seen: RwLock::default() })
    }

    fn count(&self, stream: bool, version: &str) {
        let bump = |[unary, streams]: &[IntCounter; 2]| {
            if stream { streams } else { unary }.inc();
        };
        if let Some(counters) = self.seen.read().get(version) {
            return bump(counters);
        }
        let mut seen = self.seen.write();
        let version = if seen.len() < MAX_CLIENT_API_VERSIONS { version } else { "other" };
        let counters = seen.entry(version.to_owned()).or_insert_with(|| {
            ["unary", "stream"].map(|kind| self.vec.with_label_values(&[kind, version]))
        });
        bump(counters);
    }
}

fn register<C: Collector + Clone + 'static>(
    r: &Registry,
    collector: Result<C, prometheus::Error>,
) -> Result<C, prometheus::Error> {
    let collector = collector?;
    r.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counter(r: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    register(r, IntCounter::new(name, help))
}

fn counter_vec(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    register(r, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(r: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    register(r, IntGauge::new(name, help))
}

fn float_gauge(r: &Registry, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
    register(r, Gauge::new(name, help))
}

fn gauge_vec(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    register(r, IntGaugeVec::new(Opts::new(name, help), labels))
}

fn histogram(
    r: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> Result<Histogram, prometheus::Error> {
    register(r, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
}

fn histogram_vec(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: Vec<f64>,
) -> Result<HistogramVec, prometheus::Error> {
    register(r, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels))
}

/// `count` bounds, the first is `start` and each is twice the one before it.
fn exponential(start: f64, count: usize) -> Vec<f64> {
    std::iter::successors(Some(start), |bound| Some(bound * 2.0)).take(count).collect()
}

fn hex(id: u64) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "{id:x}");
    text
}

fn bool_label(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}
