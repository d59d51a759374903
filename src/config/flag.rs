//! The table of flags, and the [`Config`] it fills.
//!
//! One entry is one flag: the lines above it are its documentation *and* its help
//! text, its name is the field's with dashes, its default is the field's default.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::features::{FeatureGates, Gate};
use super::url::Url;
use super::value::{
    AutoCompactionMode, ClusterState, LogFormat, LogLevel, LogOutput, MetricsLevel, TlsVersion,
    Value,
};

/// The heading under which `--help` shows a flag; in etcd's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    Member,
    Clustering,
    Security,
    Auth,
    Monitoring,
    Logging,
    Tracing,
    Features,
    Unsafe,
    General,
}

impl Group {
    pub(crate) const ALL: [Group; 10] = [
        Group::Member,
        Group::Clustering,
        Group::Security,
        Group::Auth,
        Group::Monitoring,
        Group::Logging,
        Group::Tracing,
        Group::Features,
        Group::Unsafe,
        Group::General,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Group::Member => "Member",
            Group::Clustering => "Clustering",
            Group::Security => "Security",
            Group::Auth => "Auth",
            Group::Monitoring => "Profiling and Monitoring",
            Group::Logging => "Logging",
            Group::Tracing => "Distributed tracing",
            Group::Features => "Features",
            Group::Unsafe => "Unsafe feature",
            Group::General => "General",
        }
    }
}

/// Where a configuration file has the flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum YamlKey {
    /// Under the flag's own name.
    Same,
    /// At this path, with dots between the levels.
    At(&'static str),
    /// Nowhere.
    Absent,
}

/// What setting a flag does in this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// What it does in etcd.
    Works,
    /// Nothing; why. Said in the log when the value is not the default.
    Nothing(&'static str),
    /// It prevents the start when the value is not the default; why.
    Refused(&'static str),
}

/// One flag.
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    pub(crate) group: Group,
    pub(crate) help: &'static [&'static str],
    pub(crate) yaml: YamlKey,
    pub(crate) effect: Effect,
    /// The field it sets; `None` for the flags that are about the process itself.
    pub(crate) field: Option<fn(&mut Config) -> &mut dyn Value>,
}

impl Flag {
    /// The flag of this name.
    pub(crate) fn named(name: &str) -> Option<&'static Flag> {
        all().find(|flag| flag.name == name)
    }

    /// The path of its key in a configuration file.
    pub(crate) fn yaml_path(&self) -> Option<&'static str> {
        match self.yaml {
            YamlKey::Same => Some(self.name),
            YamlKey::At(path) => Some(path),
            YamlKey::Absent => None,
        }
    }

    /// The value a configuration has, as the flag would be written. Takes the
    /// configuration by `&mut` because fields are reached that way; changes nothing.
    pub(crate) fn text(&self, config: &mut Config) -> String {
        self.field.map(|field| field(config).text()).unwrap_or_default()
    }
}

/// `heartbeat-interval` → `ETCD_HEARTBEAT_INTERVAL`.
pub(crate) fn env_name(flag: &str) -> String {
    format!("ETCD_{}", flag.to_ascii_uppercase().replace('-', "_"))
}

/// Every flag: those that set a field of [`Config`], then those about the process.
pub(crate) fn all() -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter().chain(PROCESS_FLAGS)
}

/// Flags that set no field.
pub(crate) const PROCESS_FLAGS: &[Flag] = &[
    Flag {
        name: "version",
        group: Group::General,
        help: &["Print the version and exit."],
        yaml: YamlKey::Absent,
        effect: Effect::Works,
        field: None,
    },
    Flag {
        name: "config-file",
        group: Group::General,
        help: &[
            "Path to the configuration file, in YAML. When it is given, every other flag and",
            "environment variable is ignored.",
        ],
        yaml: YamlKey::Absent,
        effect: Effect::Works,
        field: None,
    },
];

macro_rules! flags {
    ($($group:ident {
        $($(#[doc = $help:literal])+ $name:literal $field:ident: $kind:ty = $default:expr, $yaml:expr, $effect:expr;)*
    })*) => {
        /// Everything a server can be told, one field per flag of etcd.
        ///
        /// Plain data: change what you need of [`Config::default`] (etcd's defaults),
        /// [`Config::in_memory`] or [`Config::for_test`].
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Config {
            $($($(#[doc = $help])+ pub $field: $kind,)*)*
            /// Keep everything in memory and touch no file: for tests and for programs that
            /// embed the server. Everything is lost when it stops. It has no flag.
            pub in_memory: bool,
            /// Bytes per second that are sent of a snapshot to one member that fell behind; 0: as
            /// fast as it goes. It has no flag, since etcd has none; the binary takes it from
            /// `KVORUM_SNAPSHOT_SEND_BYTES_PER_SEC`.
            pub snapshot_send_bytes_per_sec: u64,
        }

        impl Default for Config {
            /// What etcd does when it is told nothing.
            fn default() -> Config {
                Config { $($($field: $default,)*)* in_memory: false, snapshot_send_bytes_per_sec: 0 }
            }
        }

        /// The flags that set a field.
        pub(crate) static FLAGS: &[Flag] = &[$($(Flag {
            name: $name,
            group: Group::$group,
            help: &[$($help),+],
            yaml: $yaml,
            effect: $effect,
            field: Some(|config| &mut config.$field),
        },)*)*];
    };
}

use Effect::{Nothing, Refused, Works};
use YamlKey::{Absent, At, Same};

fn urls(text: &str) -> Vec<Url> {
    text.parse().into_iter().collect()
}

fn default_cluster(name: &str, peer_urls: &[Url]) -> BTreeMap<String, Vec<Url>> {
    BTreeMap::from([(name.to_owned(), peer_urls.to_vec())])
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(super) const DEFAULT_NAME: &str = "default";
const PEER_URL: &str = "http://localhost:2380";
const CLIENT_URL: &str = "http://localhost:2379";
const ROTATION: &str =
    r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#;

const PINGED: &str =
    "connections to peers are watched by pings, and not by the time of a single read or write";
const NO_BBOLT: &str = "there is no bbolt database";
const NO_AUTH: &str = "users and roles are not available in this version";
const NO_DISCOVERY: &str =
    "neither discovery services nor DNS are asked for members; name them in --initial-cluster";
const NO_TRACING: &str = "distributed tracing is not available in this version";
const NO_CRL: &str = "certificate revocation lists are not honoured by this version yet, and ignoring one would admit revoked certificates";
const NO_ALLOW_LIST: &str = "allow-lists for certificates are not honoured by this version yet, and ignoring one would admit everybody the CA has signed";

flags! {
    Member {
        /// Human-readable name for this member; also its key in `--initial-cluster`.
        "name" name: String = DEFAULT_NAME.to_owned(), Same, Works;
        /// Path to the data directory. When not set it is the member's name with `.etcd`
        /// appended, in the working directory.
        "data-dir" data_dir: PathBuf = PathBuf::from(format!("{DEFAULT_NAME}.etcd")), Same, Works;
        /// Path to a dedicated directory for the raft log; when not set it is inside the data
        /// directory.
        "wal-dir" wal_dir: Option<PathBuf> = None, Same, Works;
        /// Number of applied entries that trigger a checkpoint, after which the raft log is
        /// truncated.
        "snapshot-count" snapshot_count: u64 = 10_000, Same, Works;
        /// Number of entries kept in the raft log after it has been truncated, for followers
        /// that lag.
        "snapshot-catchup-entries" snapshot_catchup_entries: u64 = 5_000, Same, Works;
        /// Time between two heartbeats of the leader, in milliseconds.
        "heartbeat-interval" heartbeat_interval: u64 = 100, Same, Works;
        /// Time without a leader after which an election begins, in milliseconds: at least five
        /// heartbeats, at most 50000.
        "election-timeout" election_timeout: u64 = 1_000, Same, Works;
        /// Fast-forward the first election on boot.
        "initial-election-tick-advance" initial_election_tick_advance: bool = true, Same,
            Nothing("the first election takes as long as any other; a member that is alone elects itself at once");
        /// URLs to listen on for peers.
        "listen-peer-urls" listen_peer_urls: Vec<Url> = urls(PEER_URL), Same, Works;
        /// URLs to listen on for clients: gRPC, and HTTP unless `--listen-client-http-urls` is set.
        "listen-client-urls" listen_client_urls: Vec<Url> = urls(CLIENT_URL), Same, Works;
        /// URLs to listen on for HTTP clients only; `--listen-client-urls` then serve gRPC only.
        "listen-client-http-urls" listen_client_http_urls: Vec<Url> = Vec::new(), Same, Works;
        /// Number of old raft log files to keep.
        "max-wals" max_wals: u64 = 5, Same,
            Nothing("the raft log keeps what the checkpoint and lagging followers need, and recycles the rest");
        /// Lock the server's memory, so that it is never swapped out.
        "memory-mlock" memory_mlock: bool = false, Same, Nothing("memory is not locked by this version");
        /// Size of the data in bytes above which writes are refused and an alarm is raised.
        /// 0 means 2 GiB, a negative number no limit.
        "quota-backend-bytes" quota_backend_bytes: i64 = 0, Same, Works;
        /// Free list of the bbolt database: array or map.
        "backend-bbolt-freelist-type" backend_bbolt_freelist_type: String = "map".to_owned(), Same, Nothing(NO_BBOLT);
        /// Time between two commits of the bbolt database; 0 means 100ms.
        "backend-batch-interval" backend_batch_interval: Duration = Duration::ZERO, Same, Nothing(NO_BBOLT);
        /// Operations between two commits of the bbolt database; 0 means 10000.
        "backend-batch-limit" backend_batch_limit: u64 = 0, Same, Nothing(NO_BBOLT);
        /// Number of operations a transaction may have.
        "max-txn-ops" max_txn_ops: u64 = 128, Same, Works;
        /// Size of a request in bytes above which it is refused.
        "max-request-bytes" max_request_bytes: u64 = 1_572_864, Same, Works;
        /// Number of streams a client may have open at a time on one connection.
        "max-concurrent-streams" max_concurrent_streams: u32 = u32::MAX, Same, Works;
        /// Shortest interval at which a client may ping; a client that does it more often is
        /// disconnected. 0 means any.
        "grpc-keepalive-min-time" grpc_keepalive_min_time: Duration = secs(5), Same, Works;
        /// Interval at which the server pings clients; 0 means never.
        "grpc-keepalive-interval" grpc_keepalive_interval: Duration = secs(7200), Same, Works;
        /// Time a client has to answer a ping before it is disconnected; 0 means never.
        "grpc-keepalive-timeout" grpc_keepalive_timeout: Duration = secs(20), Same, Works;
        /// Set SO_REUSEPORT on listeners.
        "socket-reuse-port" socket_reuse_port: bool = false, At("socket-options.reuse-port"), Works;
        /// Set SO_REUSEADDR on listeners.
        "socket-reuse-address" socket_reuse_address: bool = false, At("socket-options.reuse-address"), Works;
        /// Serve the JSON API under `/v3/`.
        "enable-grpc-gateway" enable_grpc_gateway: bool = true, Same, Works;
        /// Read timeout of a connection to a peer; never less than 5s.
        "raft-read-timeout" raft_read_timeout: Duration = secs(5), Absent, Nothing(PINGED);
        /// Write timeout of a connection to a peer; never less than 5s.
        "raft-write-timeout" raft_write_timeout: Duration = secs(5), Absent, Nothing(PINGED);
        /// Feature gates, as `Gate=true,OtherGate=false`. Gates:
        "feature-gates" feature_gates: FeatureGates = FeatureGates::default(), Same, Works;
    }

    Clustering {
        /// This member's peer URLs, as published to the cluster.
        "initial-advertise-peer-urls" initial_advertise_peer_urls: Vec<Url> = urls(PEER_URL), Same, Works;
        /// Members of the cluster that is to be made, as name=peer-url pairs. Ignored once the
        /// data directory holds a member.
        "initial-cluster" initial_cluster: BTreeMap<String, Vec<Url>> = default_cluster(DEFAULT_NAME, &urls(PEER_URL)),
            Same, Works;
        /// 'new' to make a cluster, 'existing' to join one. Ignored once the data directory
        /// holds a member.
        "initial-cluster-state" initial_cluster_state: ClusterState = ClusterState::New, Same, Works;
        /// Distinguishes clusters made from the same `--initial-cluster`: their ids differ.
        "initial-cluster-token" initial_cluster_token: String = "etcd-cluster".to_owned(), Same, Works;
        /// This member's client URLs, as published to clients. Required when
        /// `--listen-client-urls` is set.
        "advertise-client-urls" advertise_client_urls: Vec<Url> = urls(CLIENT_URL), Same, Works;
        /// Refuse changes of membership that would lose the quorum.
        "strict-reconfig-check" strict_reconfig_check: bool = true, Same, Works;
        /// Ask for votes before an election, so that a member that was cut off does not disturb
        /// when it comes back.
        "pre-vote" pre_vote: bool = true, Same, Works;
        /// How much history to keep. 0 means all of it; see `--auto-compaction-mode`.
        "auto-compaction-retention" auto_compaction_retention: String = "0".to_owned(), Same, Works;
        /// How `--auto-compaction-retention` is read: 'periodic' as a duration (a bare number is
        /// hours), 'revision' as a number of revisions (not a duration, of which etcd makes that many
        /// nanoseconds of revisions and so never compacts).
        "auto-compaction-mode" auto_compaction_mode: AutoCompactionMode = AutoCompactionMode::Periodic, Same, Works;
        /// DNS domain whose SRV records name the members.
        "discovery-srv" discovery_srv: String = String::new(), Same, Refused(NO_DISCOVERY);
        /// Suffix of the SRV service names.
        "discovery-srv-name" discovery_srv_name: String = String::new(), Same, Refused(NO_DISCOVERY);
        /// What to do when discovery fails: 'exit'.
        "discovery-fallback" discovery_fallback: String = "exit".to_owned(), Absent, Refused(NO_DISCOVERY);
        /// Endpoints of the discovery service.
        "discovery-endpoints" discovery_endpoints: Vec<String> = Vec::new(), At("discovery-config.client.endpoints"),
            Refused(NO_DISCOVERY);
        /// Token of the cluster at the discovery service.
        "discovery-token" discovery_token: String = String::new(), At("discovery-config.token"), Refused(NO_DISCOVERY);
        /// Dial timeout of discovery.
        "discovery-dial-timeout" discovery_dial_timeout: Duration = secs(2), At("discovery-config.client.dial-timeout"),
            Refused(NO_DISCOVERY);
        /// Request timeout of discovery.
        "discovery-request-timeout" discovery_request_timeout: Duration = secs(5),
            At("discovery-config.client.request-timeout"), Refused(NO_DISCOVERY);
        /// Interval of discovery's pings.
        "discovery-keepalive-time" discovery_keepalive_time: Duration = secs(2),
            At("discovery-config.client.keepalive-time"), Refused(NO_DISCOVERY);
        /// Timeout of discovery's pings.
        "discovery-keepalive-timeout" discovery_keepalive_timeout: Duration = secs(6),
            At("discovery-config.client.keepalive-timeout"), Refused(NO_DISCOVERY);
        /// Do without TLS in discovery.
        "discovery-insecure-transport" discovery_insecure_transport: bool = true,
            At("discovery-config.client.secure.insecure-transport"), Refused(NO_DISCOVERY);
        /// Do not verify the certificate of the discovery service.
        "discovery-insecure-skip-tls-verify" discovery_insecure_skip_tls_verify: bool = false,
            At("discovery-config.client.secure.insecure-skip-tls-verify"), Refused(NO_DISCOVERY);
        /// Client certificate for discovery.
        "discovery-cert" discovery_cert: Option<PathBuf> = None, At("discovery-config.client.secure.cert"),
            Refused(NO_DISCOVERY);
        /// Key of the client certificate for discovery.
        "discovery-key" discovery_key: Option<PathBuf> = None, At("discovery-config.client.secure.key"),
            Refused(NO_DISCOVERY);
        /// CA bundle for discovery.
        "discovery-cacert" discovery_cacert: Option<PathBuf> = None, At("discovery-config.client.secure.cacert"),
            Refused(NO_DISCOVERY);
        /// User for discovery, as name or name:password.
        "discovery-user" discovery_user: String = String::new(), At("discovery-config.client.auth.username"),
            Refused(NO_DISCOVERY);
        /// Password for discovery.
        "discovery-password" discovery_password: String = String::new(), At("discovery-config.client.auth.password"),
            Refused(NO_DISCOVERY);
    }

    Security {
        /// Path to the certificate clients are shown.
        "cert-file" cert_file: Option<PathBuf> = None, At("client-transport-security.cert-file"), Works;
        /// Path to the key of `--cert-file`.
        "key-file" key_file: Option<PathBuf> = None, At("client-transport-security.key-file"), Works;
        /// Admit only clients with a certificate that `--trusted-ca-file` has signed.
        "client-cert-auth" client_cert_auth: bool = false, At("client-transport-security.client-cert-auth"), Works;
        /// Path to a certificate for the server's own connections to itself.
        "client-cert-file" client_cert_file: Option<PathBuf> = None, At("client-transport-security.client-cert-file"),
            Nothing("the server makes no connection to itself");
        /// Path to the key of `--client-cert-file`.
        "client-key-file" client_key_file: Option<PathBuf> = None, At("client-transport-security.client-key-file"),
            Nothing("the server makes no connection to itself");
        /// Path to a revocation list for clients' certificates.
        "client-crl-file" client_crl_file: Option<PathBuf> = None, Absent, Refused(NO_CRL);
        /// Host names of which a client's certificate must carry one.
        "client-cert-allowed-hostname" client_cert_allowed_hostname: Vec<String> = Vec::new(),
            At("client-transport-security.allowed-hostname"), Refused(NO_ALLOW_LIST);
        /// Path to the CA certificates that sign clients' certificates. Clients then need one.
        "trusted-ca-file" trusted_ca_file: Option<PathBuf> = None, At("client-transport-security.trusted-ca-file"), Works;
        /// Serve clients with a certificate made at start, when none is given.
        "auto-tls" auto_tls: bool = false, At("client-transport-security.auto-tls"), Works;
        /// Path to the certificate peers are shown.
        "peer-cert-file" peer_cert_file: Option<PathBuf> = None, At("peer-transport-security.cert-file"), Works;
        /// Path to the key of `--peer-cert-file`.
        "peer-key-file" peer_key_file: Option<PathBuf> = None, At("peer-transport-security.key-file"), Works;
        /// Admit only peers with a certificate that `--peer-trusted-ca-file` has signed.
        "peer-client-cert-auth" peer_client_cert_auth: bool = false, At("peer-transport-security.client-cert-auth"), Works;
        /// Path to a certificate for connections to peers.
        "peer-client-cert-file" peer_client_cert_file: Option<PathBuf> = None,
            At("peer-transport-security.client-cert-file"), Works;
        /// Path to the key of `--peer-client-cert-file`.
        "peer-client-key-file" peer_client_key_file: Option<PathBuf> = None,
            At("peer-transport-security.client-key-file"), Works;
        /// Path to the CA certificates that sign peers' certificates.
        "peer-trusted-ca-file" peer_trusted_ca_file: Option<PathBuf> = None,
            At("peer-transport-security.trusted-ca-file"), Works;
        /// Common names of which a peer's certificate must carry one.
        "peer-cert-allowed-cn" peer_cert_allowed_cn: Vec<String> = Vec::new(), At("peer-transport-security.allowed-cn"),
            Refused(NO_ALLOW_LIST);
        /// Host names of which a peer's certificate must carry one.
        "peer-cert-allowed-hostname" peer_cert_allowed_hostname: Vec<String> = Vec::new(),
            At("peer-transport-security.allowed-hostname"), Refused(NO_ALLOW_LIST);
        /// Talk to peers with a certificate made at start, when none is given.
        "peer-auto-tls" peer_auto_tls: bool = false, At("peer-transport-security.auto-tls"), Works;
        /// Years for which `--auto-tls` certificates are valid.
        "self-signed-cert-validity" self_signed_cert_validity: u64 = 1, Same, Works;
        /// Path to a revocation list for peers' certificates.
        "peer-crl-file" peer_crl_file: Option<PathBuf> = None, Absent, Refused(NO_CRL);
        /// Do not compare a peer's address with the names in its certificate.
        "peer-skip-client-san-verification" peer_skip_client_san_verification: bool = false,
            At("peer-transport-security.skip-client-san-verification"),
            Nothing("a peer's certificate is checked against the CA; its address is never compared with the names in it");
        /// Cipher suites of TLS 1.2 to offer, by Go's names; empty means all there are. Those of
        /// TLS 1.3 are always offered.
        "cipher-suites" cipher_suites: Vec<String> = Vec::new(), Same, Works;
        /// Origins that may use the HTTP API from a browser; empty or * means all.
        "cors" cors: Vec<String> = vec!["*".to_owned()], Same, Works;
        /// Host names by which HTTP clients may address a server without TLS; empty or * means all.
        "host-whitelist" host_whitelist: Vec<String> = vec!["*".to_owned()], Same,
            Refused("the Host header is not checked by this version yet, and ignoring the list would admit every host");
        /// Lowest version of TLS to accept: TLS1.2 or TLS1.3.
        "tls-min-version" tls_min_version: TlsVersion = TlsVersion::Tls12, Same, Works;
        /// Highest version of TLS to accept: TLS1.2 or TLS1.3; empty means the highest there is.
        "tls-max-version" tls_max_version: Option<TlsVersion> = None, Same, Works;
    }

    Auth {
        /// Kind of token for users, and its options: 'simple' or 'jwt,…'.
        "auth-token" auth_token: String = "simple".to_owned(), Same, Refused(NO_AUTH);
        /// Cost of hashing passwords, from 4 to 31.
        "bcrypt-cost" bcrypt_cost: u64 = 10, Same, Nothing(NO_AUTH);
        /// Lifetime of a simple token, in seconds.
        "auth-token-ttl" auth_token_ttl: u64 = 300, Same, Nothing(NO_AUTH);
    }

    Monitoring {
        /// Serve the profiles of Go's runtime under `/debug/pprof/`.
        "enable-pprof" enable_pprof: bool = false, Same, Nothing("there is no Go runtime to profile");
        /// Detail of the exported metrics: 'basic', or 'extensive' for histograms of gRPC methods.
        "metrics" metrics: MetricsLevel = MetricsLevel::Basic, Same, Works;
        /// URLs to listen on for metrics and health only. HTTPS uses the certificate for clients.
        "listen-metrics-urls" listen_metrics_urls: Vec<Url> = Vec::new(), Same, Works;
    }

    Logging {
        /// Kind of log: 'zap'.
        "logger" logger: String = "zap".to_owned(), Same, Works;
        /// Where the log goes: 'default' and 'stderr' to standard error, 'stdout' to standard
        /// output, 'systemd/journal' to standard error, anything else to the file of that name.
        "log-outputs" log_outputs: Vec<LogOutput> = vec![LogOutput::Default], Same, Works;
        /// Least level to log: debug, info, warn, error, panic or fatal.
        "log-level" log_level: LogLevel = LogLevel::Info, Same, Works;
        /// Format of the log: json or console.
        "log-format" log_format: LogFormat = LogFormat::Json, Same, Works;
        /// Rotate the log file.
        "enable-log-rotation" enable_log_rotation: bool = false, Same,
            Nothing("log files are not rotated; use logrotate with copytruncate, or log to standard error");
        /// How to rotate the log file, in JSON.
        "log-rotation-config-json" log_rotation_config_json: String = ROTATION.to_owned(), Same,
            Nothing("log files are not rotated; use logrotate with copytruncate, or log to standard error");
        /// Time after which a request is logged as slow; 0 means 300ms.
        "warning-unary-request-duration" warning_unary_request_duration: Duration = Duration::from_millis(300), Same, Works;
    }

    Tracing {
        /// Send spans to a collector.
        "enable-distributed-tracing" enable_distributed_tracing: bool = false, Same, Nothing(NO_TRACING);
        /// Address of the collector.
        "distributed-tracing-address" distributed_tracing_address: String = "localhost:4317".to_owned(), Same,
            Nothing(NO_TRACING);
        /// Name of the service, the same for all members.
        "distributed-tracing-service-name" distributed_tracing_service_name: String = "etcd".to_owned(), Same,
            Nothing(NO_TRACING);
        /// Name of this member, different for each.
        "distributed-tracing-instance-id" distributed_tracing_instance_id: String = String::new(), Same,
            Nothing(NO_TRACING);
        /// Samples to collect per million spans.
        "distributed-tracing-sampling-rate" distributed_tracing_sampling_rate: u64 = 0, Same, Nothing(NO_TRACING);
    }

    Features {
        /// Time between two comparisons of all data with the peers; 0 means never.
        "corrupt-check-time" corrupt_check_time: Duration = Duration::ZERO, Same, Works;
        /// Time between two comparisons of compacted data with the peers, if the feature gate
        /// CompactHashCheck is on.
        "compact-hash-check-time" compact_hash_check_time: Duration = secs(60), Same, Works;
        /// Revisions removed in one step of a compaction; 0 means 1000.
        "compaction-batch-limit" compaction_batch_limit: u64 = 0, Same, Works;
        /// Pause between two steps of a compaction; 0 means 10ms.
        "compaction-sleep-interval" compaction_sleep_interval: Duration = Duration::ZERO, Same, Works;
        /// Interval of progress notifications to idle watchers that ask for them, at least 100ms;
        /// 0 means 10m.
        "watch-progress-notify-interval" watch_progress_notify_interval: Duration = Duration::ZERO, Same, Works;
        /// Time after which applying a request is logged as slow.
        "warning-apply-duration" warning_apply_duration: Duration = Duration::from_millis(100), Same, Works;
        /// Megabytes that must be gained for the data to be defragmented at start; 0 means never.
        "bootstrap-defrag-threshold-megabytes" bootstrap_defrag_threshold_megabytes: u64 = 0, Same, Nothing(NO_BBOLT);
        /// Number of learners the cluster may have.
        "max-learners" max_learners: u64 = 1, Same, Works;
        /// Time between two looks at whether the cluster is being downgraded.
        "downgrade-check-time" downgrade_check_time: Duration = secs(5), Same,
            Nothing("there is no earlier release to go back to");
    }

    Unsafe {
        /// Make a cluster of one out of the data of a larger one, when its majority is lost. All
        /// other members are removed; start without it afterwards.
        "force-new-cluster" force_new_cluster: bool = false, Same, Works;
        /// Go on with the data of a stopped etcd, a cluster's only member, that lies in the data
        /// directory. Its files are kept aside. Without it such a directory is refused.
        "import-etcd-data" import_etcd_data: bool = false, Same, Works;
        /// Do not wait for the disk: faster, and a power cut loses data. For tests.
        "unsafe-no-fsync" unsafe_no_fsync: bool = false, Same, Works;
    }
}

/// The gates as `--help` lists them under `--feature-gates`.
pub(super) fn gate_lines() -> Vec<String> {
    let line = |gate: &Gate| {
        format!(
            "{}=true|false ({} - default={})",
            gate.name(),
            gate.stage().as_str(),
            gate.default_state()
        )
    };
    Gate::ALL.iter().map(line).collect()
}
