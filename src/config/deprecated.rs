//! Names of older etcd releases, so that an older manifest starts.
//!
//! A name is another flag's former name, or a feature gate's, or is read and
//! dropped, or asks for something that no longer exists and then prevents the
//! start. Every use is a notice in the log.

use super::features::Gate;

/// What an old name means now.
#[derive(Debug, Clone, Copy)]
pub(super) enum Meaning {
    /// This flag.
    Flag(&'static str),
    /// This feature gate.
    Gate(Gate),
    /// Nothing; why.
    Dropped(&'static str),
    /// Nothing when it has one of these values, otherwise the start is refused; why.
    RefusedUnless(&'static [&'static str], &'static str),
}

/// One old name.
#[derive(Debug)]
pub(super) struct Deprecated {
    pub(super) name: &'static str,
    /// Whether the name alone, without a value, is allowed.
    pub(super) is_bool: bool,
    pub(super) meaning: Meaning,
}

const fn flag(name: &'static str, now: &'static str) -> Deprecated {
    Deprecated { name, is_bool: false, meaning: Meaning::Flag(now) }
}

const fn bool_flag(name: &'static str, now: &'static str) -> Deprecated {
    Deprecated { name, is_bool: true, meaning: Meaning::Flag(now) }
}

const fn gate(name: &'static str, now: Gate) -> Deprecated {
    Deprecated { name, is_bool: true, meaning: Meaning::Gate(now) }
}

const fn dropped(name: &'static str, is_bool: bool, why: &'static str) -> Deprecated {
    Deprecated { name, is_bool, meaning: Meaning::Dropped(why) }
}

const fn refused(
    name: &'static str,
    harmless: &'static [&'static str],
    why: &'static str,
) -> Deprecated {
    Deprecated { name, is_bool: false, meaning: Meaning::RefusedUnless(harmless, why) }
}

const V2_API: &str = "the v2 API was removed in etcd 3.6";
const V2_PROXY: &str = "the v2 proxy was removed in etcd 3.6";
const V2_DISCOVERY: &str = "v2 discovery was removed in etcd 3.7";

/// All of them, by name.
pub(super) const DEPRECATED: &[Deprecated] = &[
    refused("discovery", &[""], V2_DISCOVERY),
    dropped("discovery-proxy", false, V2_DISCOVERY),
    dropped("enable-v2", true, V2_API),
    flag(
        "experimental-bootstrap-defrag-threshold-megabytes",
        "bootstrap-defrag-threshold-megabytes",
    ),
    gate("experimental-compact-hash-check-enabled", Gate::CompactHashCheck),
    flag("experimental-compact-hash-check-time", "compact-hash-check-time"),
    flag("experimental-compaction-batch-limit", "compaction-batch-limit"),
    flag("experimental-compaction-sleep-interval", "compaction-sleep-interval"),
    flag("experimental-corrupt-check-time", "corrupt-check-time"),
    flag("experimental-distributed-tracing-address", "distributed-tracing-address"),
    flag("experimental-distributed-tracing-instance-id", "distributed-tracing-instance-id"),
    flag("experimental-distributed-tracing-sampling-rate", "distributed-tracing-sampling-rate"),
    flag("experimental-distributed-tracing-service-name", "distributed-tracing-service-name"),
    flag("experimental-downgrade-check-time", "downgrade-check-time"),
    bool_flag("experimental-enable-distributed-tracing", "enable-distributed-tracing"),
    gate("experimental-enable-lease-checkpoint", Gate::LeaseCheckpoint),
    gate("experimental-enable-lease-checkpoint-persist", Gate::LeaseCheckpointPersist),
    dropped("experimental-enable-v2v3", false, V2_API),
    gate("experimental-initial-corrupt-check", Gate::InitialCorruptCheck),
    flag("experimental-max-learners", "max-learners"),
    bool_flag("experimental-memory-mlock", "memory-mlock"),
    bool_flag(
        "experimental-peer-skip-client-san-verification",
        "peer-skip-client-san-verification",
    ),
    flag("experimental-snapshot-catchup-entries", "snapshot-catchup-entries"),
    gate("experimental-stop-grpc-service-on-defrag", Gate::StopGRPCServiceOnDefrag),
    gate("experimental-txn-mode-write-with-shared-buffer", Gate::TxnModeWriteWithSharedBuffer),
    flag("experimental-warning-apply-duration", "warning-apply-duration"),
    flag("experimental-warning-unary-request-duration", "warning-unary-request-duration"),
    flag("experimental-watch-progress-notify-interval", "watch-progress-notify-interval"),
    dropped(
        "max-snapshots",
        false,
        "deprecated in etcd 3.6 and removed in 3.8; old checkpoints are removed as soon as a newer one is durable",
    ),
    refused("proxy", &["", "off"], V2_PROXY),
    dropped("proxy-dial-timeout", false, V2_PROXY),
    dropped("proxy-failure-wait", false, V2_PROXY),
    dropped("proxy-read-timeout", false, V2_PROXY),
    dropped("proxy-refresh-interval", false, V2_PROXY),
    dropped("proxy-write-timeout", false, V2_PROXY),
    dropped("v2-deprecation", false, "deprecated and removed in etcd 3.8; there is no v2 store"),
];

/// Names etcd parses and says nothing about. Each may stand alone or with a value.
pub(super) const IGNORED: &[&str] = &[
    "cluster-active-size",
    "cluster-remove-delay",
    "cluster-sync-interval",
    "config",
    "force",
    "max-result-buffer",
    "max-retry-attempts",
    "peer-heartbeat-interval",
    "peer-election-timeout",
    "retry-interval",
    "snapshot",
    "v",
    "vv",
    "test.coverprofile",
    "test.outputdir",
];
