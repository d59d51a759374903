//! The checks of a [`Config`], and the values that follow from it.
//!
//! Where etcd refuses a configuration the text is etcd's. All checks run, whatever
//! the earlier ones found.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::duration;
use super::features::Gate;
use super::flag::{self, Config, DEFAULT_NAME, Effect, Flag};
use super::report::{ConfigErrors, Notice, Origin, Problem, Warnings};
use super::tls::{self, CipherSuite};
use super::url::{self, Url};
use super::value::{AutoCompactionMode, ClusterState, LogOutput, TlsVersion, Value};

/// `--quota-backend-bytes=0`.
const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
/// Above it a quota is unusually large.
const LARGE_QUOTA_BYTES: i64 = 8 << 30;
/// Above it requests are unusually large.
const LARGE_REQUEST_BYTES: u64 = 10 << 20;
/// `--snapshot-count=0`.
const DEFAULT_SNAPSHOT_COUNT: u64 = 10_000;
/// `--snapshot-catchup-entries=0`.
const DEFAULT_SNAPSHOT_CATCHUP_ENTRIES: u64 = 5_000;
const MAX_ELECTION_TIMEOUT_MS: u64 = 50_000;
const MIN_WATCH_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
const DEFAULT_WATCH_PROGRESS_INTERVAL: Duration = Duration::from_secs(600);
const DEFAULT_SLOW_REQUEST: Duration = Duration::from_millis(300);
const DEFAULT_COMPACTION_BATCH_LIMIT: u64 = 1_000;
const DEFAULT_COMPACTION_SLEEP_INTERVAL: Duration = Duration::from_millis(10);

/// What the server compacts by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Keep the history of this time.
    Periodic(Duration),
    /// Keep this many revisions.
    Revision(i64),
}

/// Making a configuration.
impl Config {
    /// For programs and tests that need a server and no files: everything in memory,
    /// client and peer listeners on any free port of 127.0.0.1.
    pub fn in_memory() -> Config {
        Config { in_memory: true, ..Config::for_test(Path::new("")) }
    }

    /// For tests that look at files: data under `directory`, client and peer listeners on
    /// any free port of 127.0.0.1.
    pub fn for_test(directory: &Path) -> Config {
        let any_port: Vec<Url> = "http://127.0.0.1:0".parse().into_iter().collect();
        Config {
            data_dir: directory.to_path_buf(),
            listen_client_urls: any_port.clone(),
            advertise_client_urls: any_port.clone(),
            listen_peer_urls: any_port.clone(),
            initial_advertise_peer_urls: any_port.clone(),
            initial_cluster: BTreeMap::from([(DEFAULT_NAME.to_owned(), any_port)]),
            ..Config::default()
        }
    }
}

/// Values as the server uses them, with the defaults behind a 0 filled in.
impl Config {
    /// Where the member keeps its data, below the data directory.
    pub fn member_dir(&self) -> PathBuf {
        self.data_dir.join("member")
    }

    /// `--heartbeat-interval`.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval)
    }

    /// `--election-timeout`.
    pub fn election(&self) -> Duration {
        Duration::from_millis(self.election_timeout)
    }

    /// Entries applied between two raft snapshots.
    pub fn snapshot_entries(&self) -> u64 {
        match self.snapshot_count {
            0 => DEFAULT_SNAPSHOT_COUNT,
            entries => entries,
        }
    }

    /// Entries kept in the raft log behind a snapshot.
    pub fn snapshot_catchup(&self) -> u64 {
        match self.snapshot_catchup_entries {
            0 => DEFAULT_SNAPSHOT_CATCHUP_ENTRIES,
            entries => entries,
        }
    }

    /// The quota in bytes; `None` when there is no limit.
    pub fn quota_bytes(&self) -> Option<u64> {
        match self.quota_backend_bytes {
            0 => Some(DEFAULT_QUOTA_BYTES),
            bytes => u64::try_from(bytes).ok(),
        }
    }

    /// Interval of progress notifications: never below 100ms.
    pub fn watch_progress_interval(&self) -> Duration {
        match self.watch_progress_notify_interval {
            Duration::ZERO => DEFAULT_WATCH_PROGRESS_INTERVAL,
            interval => interval.max(MIN_WATCH_PROGRESS_INTERVAL),
        }
    }

    /// Revisions removed in one step of a compaction.
    pub fn compaction_batch(&self) -> u64 {
        match self.compaction_batch_limit {
            0 => DEFAULT_COMPACTION_BATCH_LIMIT,
            limit => limit,
        }
    }

    /// Pause between two steps of a compaction.
    pub fn compaction_sleep(&self) -> Duration {
        match self.compaction_sleep_interval {
            Duration::ZERO => DEFAULT_COMPACTION_SLEEP_INTERVAL,
            interval => interval,
        }
    }

    /// What is compacted automatically; `None` when nothing is. The error says what is
    /// wrong with `--auto-compaction-retention`.
    pub fn auto_compaction(&self) -> Result<Option<AutoCompaction>, String> {
        let retention = match self.auto_compaction_retention.as_str() {
            "" => "0",
            text => text,
        };
        match self.auto_compaction_mode {
            AutoCompactionMode::Revision => {
                let kept: i64 = retention
                    .parse()
                    .ok()
                    .filter(|kept| *kept >= 0)
                    .ok_or_else(|| format!("error parsing CompactionRetention: {retention:?} is not a number of revisions"))?;
                Ok((kept > 0).then_some(AutoCompaction::Revision(kept)))
            }
            AutoCompactionMode::Periodic => {
                let kept =
                    match retention.parse::<u64>() {
                        Ok(hours) => hours.checked_mul(3600).map(Duration::from_secs),
                        Err(_) => Some(duration::parse(retention).map_err(|error| {
                            format!("error parsing CompactionRetention: {error}")
                        })?),
                    };
                let kept = kept.ok_or_else(|| {
                    format!("error parsing CompactionRetention: {retention:?} is too long")
                })?;
                Ok((!kept.is_zero()).then_some(AutoCompaction::Periodic(kept)))
            }
        }
    }

    /// The suites of TLS 1.2 to offer, in the order given; all there are when none is
    /// named. Those of TLS 1.3 are always offered besides.
    pub fn tls_cipher_suites(&self) -> Vec<CipherSuite> {
        if self.cipher_suites.is_empty() {
            return tls::SUPPORTED.to_vec();
        }
        let suite = |name: &String| match tls::named(name) {
            tls::Named::Suite(suite) => Some(suite),
            _ => None,
        };
        self.cipher_suites.iter().filter_map(suite).collect()
    }

    /// Time after which a request is logged as slow.
    pub fn slow_request(&self) -> Duration {
        match self.warning_unary_request_duration {
            Duration::ZERO => DEFAULT_SLOW_REQUEST,
            duration => duration,
        }
    }

    /// Whether clients are served with a certificate from files.
    pub fn has_client_certificate(&self) -> bool {
        self.cert_file.is_some() || self.key_file.is_some()
    }

    /// Whether peers are shown a certificate from files.
    pub fn has_peer_certificate(&self) -> bool {
        self.peer_cert_file.is_some() || self.peer_key_file.is_some()
    }
}

impl Config {
    /// Checks everything that can be checked without touching the machine.
    ///
    /// The warnings are for the log; the errors are all there are, not the first.
    pub fn validate(&self) -> Result<Warnings, ConfigErrors> {
        self.validate_from(&BTreeMap::new(), false)
    }

    /// [`Config::validate`] with where each value came from, and together with
    /// [`Config::validate_new_member`] when the member is new.
    pub(super) fn validate_from(
        &self,
        origins: &BTreeMap<&'static str, Origin>,
        is_new: bool,
    ) -> Result<Warnings, ConfigErrors> {
        let mut check = Check::new(self, origins);
        check.effects();
        check.listeners();
        check.advertised();
        check.cluster();
        check.timing();
        check.limits();
        check.compaction();
        check.tls();
        check.logging();
        if is_new {
            check.new_member();
        }
        check.conclude()
    }

    /// Checks what matters only when the data directory holds no member yet and one is to
    /// be made: `--initial-cluster` and `--initial-cluster-state`. [`parse`](super::parse())
    /// has done it for configurations it made.
    pub fn validate_new_member(&self) -> Result<(), ConfigErrors> {
        let origins = BTreeMap::new();
        let mut check = Check::new(self, &origins);
        check.new_member();
        check.conclude().map(drop)
    }
}

struct Check<'a> {
    config: &'a Config,
    /// A second copy, because the table reaches fields by `&mut`.
    scratch: Config,
    defaults: Config,
    origins: &'a BTreeMap<&'static str, Origin>,
    problems: Vec<Problem>,
    notices: Vec<Notice>,
}

impl<'a> Check<'a> {
    fn new(config: &'a Config, origins: &'a BTreeMap<&'static str, Origin>) -> Check<'a> {
        let (scratch, defaults) = (config.clone(), Config::default());
        Check { config, scratch, defaults, origins, problems: Vec::new(), notices: Vec::new() }
    }

    fn conclude(self) -> Result<Warnings, ConfigErrors> {
        if self.problems.is_empty() {
            Ok(self.notices)
        } else {
            Err(ConfigErrors { problems: self.problems })
        }
    }

    fn problem(&mut self, name: &'static str, message: impl Into<String>, fix: impl Into<String>) {
        let value = Flag::named(name).map(|flag| flag.text(&mut self.scratch)).unwrap_or_default();
        let default =
            Flag::named(name).map(|flag| flag.text(&mut self.defaults)).unwrap_or_default();
        let origin = match self.origins.get(name) {
            Some(origin) => origin.clone(),
            None if value == default => Origin::Default,
            None => Origin::Program,
        };
        self.problems.push(Problem {
            flag: name.to_owned(),
            value,
            origin,
            message: message.into(),
            fix: fix.into(),
        });
    }

    fn warn(&mut self, name: &'static str, message: impl Into<String>) {
        self.notices.push(Notice::Advice {
            warning: true,
            flag: name.to_owned(),
            message: message.into(),
        });
    }

    /// Flags that are not the default and cannot do what they promise.
    fn effects(&mut self) {
        for flag in flag::FLAGS {
            let value = flag.text(&mut self.scratch);
            if value == flag.text(&mut self.defaults) {
                continue;
            }
            match flag.effect {
                Effect::Works if flag.name == "feature-gates" => self.gates(),
                Effect::Works => {}
                Effect::Nothing(reason) => {
                    self.notices.push(Notice::NoEffect { flag: flag.name.to_owned(), value, reason: reason.to_owned() });
                }
                // An empty list admits every host, as the default does.
                Effect::Refused(_) if flag.name == "host-whitelist" && value.is_empty() => {}
                Effect::Refused(_) if flag.name == "discovery-fallback" && value == "proxy" => self.problem(
                    flag.name,
                    "v2 proxy is deprecated, and --discovery-fallback can't be configured as \"proxy\"",
                    "remove --discovery-fallback",
                ),
                Effect::Refused(reason) => {
                    let default = flag.text(&mut self.defaults);
                    let fix = match default.as_str() {
                        "" => format!("remove --{}", flag.name),
                        default => format!("remove --{} or set it to {default:?}", flag.name),
                    };
                    self.problem(flag.name, format!("--{} is refused: {reason}", flag.name), fix);
                }
            }
        }
    }

    /// Gates that are set to something else than their default, and switch nothing here.
    fn gates(&mut self) {
        let gates = &self.config.feature_gates;
        for gate in Gate::ALL {
            let enabled = gates.enabled(*gate);
            if let (Some(reason), true) = (gate.idle(), enabled != gate.default_state()) {
                self.notices.push(Notice::NoEffect {
                    flag: "feature-gates".to_owned(),
                    value: format!("{}={enabled}", gate.name()),
                    reason: reason.to_owned(),
                });
            }
        }
    }

    fn listeners(&mut self) {
        let config = self.config;
        let lists: [(&'static str, &[Url]); 4] = [
            ("listen-peer-urls", &config.listen_peer_urls),
            ("listen-client-urls", &config.listen_client_urls),
            ("listen-client-http-urls", &config.listen_client_http_urls),
            ("listen-metrics-urls", &config.listen_metrics_urls),
        ];
        for (name, urls) in lists {
            for url in urls {
                let Some(host) = url.host() else { continue };
                if host != "localhost" && host.parse::<IpAddr>().is_err() {
                    self.problem(
                        name,
                        format!("expected IP in URL for binding ({url})"),
                        "listen on an IP address of this machine, on 0.0.0.0 or [::] for all of them, or on localhost; \
                         host names belong into the advertised URLs",
                    );
                }
            }
        }
        let origins = config.cors.iter().filter(|origin| !["", "*"].contains(&origin.as_str()));
        for origin in origins {
            // etcd wants a port too, and so takes no origin that a browser sends.
            if !origin.starts_with("http://") && !origin.starts_with("https://") {
                self.problem(
                    "cors",
                    format!("URL scheme must be http or https: {origin}"),
                    "give origins as browsers send them, like https://example.com, or * for all",
                );
            }
        }
        if config.listen_client_urls.is_empty() {
            self.problem(
                "listen-client-urls",
                "there is no URL to listen on for clients",
                "give at least one URL",
            );
        }
        for url in &config.listen_client_http_urls {
            if url.port() != Some(0)
                && config.listen_client_urls.iter().any(|other| other.address() == url.address())
            {
                self.problem(
                    "listen-client-http-urls",
                    format!("cannot bind both --listen-client-urls and --listen-client-http-urls on the same url {url}"),
                    "give one of them another port",
                );
            }
        }
    }

    fn advertised(&mut self) {
        let config = self.config;
        let empty_host = |urls: &[Url]| urls.iter().find(|url| url.host() == Some("")).cloned();
        if let Some(url) = empty_host(&config.initial_advertise_peer_urls) {
            let all = url::join(&config.initial_advertise_peer_urls);
            self.problem(
                "initial-advertise-peer-urls",
                format!("--initial-advertise-peer-urls {all:?} must be \"host:port\" (unexpected empty host ({url}))"),
                "name the host under which the other members reach this one",
            );
        }
        if let Some(url) = empty_host(&config.advertise_client_urls) {
            let all = url::join(&config.advertise_client_urls);
            self.problem(
                "advertise-client-urls",
                format!(
                    "--advertise-client-urls {all:?} must be in the format \"host:port\", \"unix:/path/to/socket\" or \
                     \"unixs:/path/to/socket\" (unexpected empty host ({url}))"
                ),
                "name the host under which clients reach this member",
            );
        }
        if config.advertise_client_urls.is_empty() && !config.listen_client_urls.is_empty() {
            let suggestion = url::join(&config.listen_client_urls);
            self.problem(
                "advertise-client-urls",
                "--advertise-client-urls is required when --listen-client-urls is set explicitly",
                format!("add --advertise-client-urls with the URLs clients use, such as --advertise-client-urls={suggestion}"),
            );
        }
        if config.name == DEFAULT_NAME {
            self.warn(
                "name",
                "it isn't recommended to use default name, please set a value for --name. \
                 Note that etcd might run into issue when multiple members have the same default name",
            );
        }
    }

    fn cluster(&mut self) {
        let config = self.config;
        let sources = [
            !config.initial_cluster.is_empty(),
            !config.discovery_srv.is_empty(),
            !config.discovery_endpoints.is_empty(),
        ];
        if sources.iter().filter(|set| **set).count() > 1 {
            self.problem(
                "initial-cluster",
                "multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \
                 \"discovery-endpoints\" or \"discovery-srv\"",
                "remove the discovery flags",
            );
        }
        if config.discovery_token.is_empty() != config.discovery_endpoints.is_empty() {
            self.problem(
                "discovery-token",
                "both --discovery-token and --discovery-endpoints must be set",
                "remove the discovery flags",
            );
        }
    }

    fn new_member(&mut self) {
        let config = self.config;
        let joins = config.initial_cluster_state == ClusterState::Existing;
        if joins && config.initial_cluster.keys().all(|name| *name == config.name) {
            self.problem(
                "initial-cluster-state",
                "cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs: \
                 --initial-cluster-state=existing joins a running cluster, and --initial-cluster names no other member",
                "name the cluster's members in --initial-cluster, as `etcdctl member add` has printed them; or point \
                 --data-dir at this member's data; or remove --initial-cluster-state to make a new cluster",
            );
        }
        let mut seen = BTreeSet::new();
        if !config.initial_cluster.values().flatten().all(|url| seen.insert(url)) {
            self.problem(
                "initial-cluster",
                format!("initial cluster {} has duplicate url", config.initial_cluster.text()),
                "name each URL once",
            );
        }
        let Some(in_cluster) = config.initial_cluster.get(&config.name) else {
            self.problem(
                "initial-cluster",
                format!(
                    "couldn't find local name {:?} in the initial cluster configuration",
                    config.name
                ),
                format!(
                    "write {0}=<peer URL> in --initial-cluster, or --name as it stands there",
                    config.name
                ),
            );
            return;
        };
        let in_cluster: BTreeSet<&Url> = in_cluster.iter().collect();
        let advertised: BTreeSet<&Url> = config.initial_advertise_peer_urls.iter().collect();
        if joins {
            // The cluster was told the URLs when the member was added.
            return;
        }
        let advertised_text = url::join(&config.initial_advertise_peer_urls);
        let pairs = |urls: Vec<&&Url>| {
            urls.iter().map(|url| format!("{}={url}", config.name)).collect::<Vec<_>>().join(",")
        };
        let missing: Vec<&&Url> = in_cluster.difference(&advertised).collect();
        let unlisted: Vec<&&Url> = advertised.difference(&in_cluster).collect();
        if !missing.is_empty() {
            let missing = pairs(missing);
            self.problem(
                "initial-cluster",
                format!("--initial-cluster has {missing} but missing from --initial-advertise-peer-urls={advertised_text}"),
                format!("give the same URLs in both, such as --initial-cluster={}={advertised_text}", config.name),
            );
        } else if !unlisted.is_empty() {
            let unlisted = unlisted.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let cluster = pairs(in_cluster.iter().collect());
            self.problem(
                "initial-advertise-peer-urls",
                format!("--initial-advertise-peer-urls has {unlisted} but missing from --initial-cluster={cluster}"),
                format!("give the same URLs in both, such as --initial-cluster={}={advertised_text}", config.name),
            );
        }
    }

    fn timing(&mut self) {
        let (heartbeat, election) = (self.config.heartbeat_interval, self.config.election_timeout);
        if heartbeat == 0 {
            self.problem(
                "heartbeat-interval",
                "--heartbeat-interval must be >0 (set to 0ms)",
                "use the default, 100",
            );
        }
        if election == 0 {
            self.problem(
                "election-timeout",
                "--election-timeout must be >0 (set to 0ms)",
                "use the default, 1000",
            );
        } else if heartbeat.saturating_mul(5) > election {
            self.problem(
                "election-timeout",
                format!(
                    "--election-timeout[{election}ms] should be at least as 5 times as --heartbeat-interval[{heartbeat}ms]"
                ),
                format!("raise --election-timeout to {} or more, or lower --heartbeat-interval", heartbeat.saturating_mul(5)),
            );
        }
        if election > MAX_ELECTION_TIMEOUT_MS {
            self.problem(
                "election-timeout",
                format!(
                    "--election-timeout[{election}ms] is too long, and should be set less than {MAX_ELECTION_TIMEOUT_MS}ms"
                ),
                format!("lower --election-timeout to {MAX_ELECTION_TIMEOUT_MS} or less; it is in milliseconds"),
            );
        }
        if self.config.compact_hash_check_time.is_zero() {
            self.problem(
                "compact-hash-check-time",
                "--compact-hash-check-time must be >0 (set to 0s)",
                "use the default, 1m",
            );
        }
        let progress = self.config.watch_progress_notify_interval;
        if !progress.is_zero() && progress < MIN_WATCH_PROGRESS_INTERVAL {
            self.warn(
                "watch-progress-notify-interval",
                format!(
                    "watch progress interval {} is too short, using 100ms",
                    duration::format(progress)
                ),
            );
        }
    }

    fn limits(&mut self) {
        if self.config.quota_backend_bytes > LARGE_QUOTA_BYTES {
            self.warn(
                "quota-backend-bytes",
                "quota exceeds the maximum value of 8 GiB that is recommended",
            );
        }
        if self.config.max_request_bytes > LARGE_REQUEST_BYTES {
            self.warn("max-request-bytes", "exceeded recommended request limit of 10 MiB");
        }
        if self.config.unsafe_no_fsync {
            self.warn(
                "unsafe-no-fsync",
                "fsync is disabled: a power cut or a crash of the machine loses data",
            );
        }
    }

    fn compaction(&mut self) {
        if let Err(message) = self.config.auto_compaction() {
            let fix = match self.config.auto_compaction_mode {
                AutoCompactionMode::Periodic => {
                    "write hours, or a duration such as 30m or 2h; 0 switches it off"
                }
                AutoCompactionMode::Revision => {
                    "write a number of revisions such as 10000, or set --auto-compaction-mode=periodic; 0 switches it off"
                }
            };
            self.problem("auto-compaction-retention", message, fix);
        }
        let gates = &self.config.feature_gates;
        let checkpoint = gates.enabled(Gate::LeaseCheckpoint);
        if gates.enabled(Gate::LeaseCheckpointPersist) && !checkpoint {
            self.problem(
                "feature-gates",
                "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint",
                "add LeaseCheckpoint=true",
            );
        }
    }

    fn tls(&mut self) {
        let config = self.config;
        let pairs: [(&'static str, &Option<PathBuf>, &'static str, &Option<PathBuf>); 4] = [
            ("cert-file", &config.cert_file, "key-file", &config.key_file),
            (
                "client-cert-file",
                &config.client_cert_file,
                "client-key-file",
                &config.client_key_file,
            ),
            ("peer-cert-file", &config.peer_cert_file, "peer-key-file", &config.peer_key_file),
            (
                "peer-client-cert-file",
                &config.peer_client_cert_file,
                "peer-client-key-file",
                &config.peer_client_key_file,
            ),
        ];
        for (cert_flag, cert, key_flag, key) in pairs {
            let (given, missing) = match (cert, key) {
                (Some(_), None) => (cert_flag, key_flag),
                (None, Some(_)) => (key_flag, cert_flag),
                _ => continue,
            };
            let text = |path: &Option<PathBuf>| {
                path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
            };
            self.problem(
                given,
                format!(
                    "KeyFile and CertFile must both be present[key: {}, cert: {}]",
                    text(key),
                    text(cert)
                ),
                format!("add --{missing}, or remove --{given}"),
            );
        }
        let client_tls = config.has_client_certificate() || config.auto_tls;
        if config.auto_tls && config.has_client_certificate() {
            self.warn("auto-tls", "ignoring client auto TLS since certs given");
        }
        for (name, urls) in [
            ("listen-client-urls", &config.listen_client_urls),
            ("listen-client-http-urls", &config.listen_client_http_urls),
        ] {
            for url in urls {
                if url.scheme().is_tls() && !client_tls {
                    self.problem(
                        name,
                        format!(
                            "TLS key/cert (--cert-file, --key-file) must be provided for client url {url} with HTTPS scheme"
                        ),
                        "add --cert-file and --key-file (or --auto-tls for a certificate made at start), or use http",
                    );
                } else if !url.scheme().is_tls() && config.has_client_certificate() {
                    self.warn(
                        name,
                        format!("scheme is http or unix while key and cert files are present; ignoring key and cert files for {url}"),
                    );
                }
                if !url.scheme().is_tls() && config.client_cert_auth {
                    self.warn(
                        name,
                        format!(
                            "scheme is http or unix while --client-cert-auth is enabled; ignoring client cert auth for {url}"
                        ),
                    );
                }
            }
        }
        if config.listen_metrics_urls.iter().any(|url| url.scheme().is_tls())
            && !config.has_client_certificate()
        {
            self.problem(
                "listen-metrics-urls",
                "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url",
                "add --cert-file and --key-file, or use http",
            );
        }
        if config.client_cert_auth && config.trusted_ca_file.is_none() {
            self.problem(
                "client-cert-auth",
                "--client-cert-auth needs --trusted-ca-file: without it no client's certificate can be verified",
                "add --trusted-ca-file with the CA that signs the clients' certificates, or remove --client-cert-auth",
            );
        }
        if config.peer_client_cert_auth && config.peer_trusted_ca_file.is_none() {
            self.problem(
                "peer-client-cert-auth",
                "--peer-client-cert-auth needs --peer-trusted-ca-file: without it no peer's certificate can be verified",
                "add --peer-trusted-ca-file with the CA that signs the peers' certificates, or remove \
                 --peer-client-cert-auth",
            );
        }
        let has_peer_certificate = config.has_peer_certificate();
        let peer_tls = has_peer_certificate || config.peer_auto_tls;
        if config.peer_auto_tls && has_peer_certificate {
            self.warn("peer-auto-tls", "ignoring peer auto TLS since certs given");
        }
        for url in &config.listen_peer_urls {
            if url.scheme().is_tls() && !peer_tls {
                self.problem(
                    "listen-peer-urls",
                    format!(
                        "cannot listen on TLS for {url}: KeyFile and CertFile are not presented"
                    ),
                    "add --peer-cert-file and --peer-key-file (or --peer-auto-tls), or use http",
                );
            }
            if !url.scheme().is_tls() && has_peer_certificate {
                self.warn(
                    "listen-peer-urls",
                    format!("scheme is HTTP while key and cert files are present; ignoring key and cert files for {url}"),
                );
            }
            if !url.scheme().is_tls() && config.peer_client_cert_auth {
                self.warn(
                    "listen-peer-urls",
                    format!("scheme is HTTP while --peer-client-cert-auth is enabled; ignoring client cert auth for {url}"),
                );
            }
        }
        if config.tls_max_version.is_some_and(|max| config.tls_min_version > max) {
            let (min, max) =
                (config.tls_min_version, config.tls_max_version.unwrap_or(TlsVersion::Tls13));
            self.problem(
                "tls-min-version",
                format!("min version ({min}) is greater than max version ({max})"),
                "raise --tls-max-version or remove it",
            );
        }
        self.cipher_suites();
    }

    fn cipher_suites(&mut self) {
        let config = self.config;
        if config.cipher_suites.is_empty() {
            return;
        }
        if config.tls_min_version == TlsVersion::Tls13 {
            self.problem(
                "cipher-suites",
                "cipher suites cannot be configured when only TLS1.3 is enabled",
                "remove --cipher-suites; all suites of TLS 1.3 are safe",
            );
            return;
        }
        let known = tls::SUPPORTED.map(|suite| suite.name).join(",");
        let mut unknown = false;
        for name in &config.cipher_suites {
            match tls::named(name) {
                tls::Named::Suite(_) | tls::Named::Tls13 => {}
                tls::Named::GoOnly => self.warn(
                    "cipher-suites",
                    format!("cipher suite {name} is not offered by this server; the others of --cipher-suites are"),
                ),
                tls::Named::Unknown => {
                    unknown = true;
                    self.problem(
                        "cipher-suites",
                        format!("unexpected TLS cipher suite {name:?}"),
                        format!("choose from {known}"),
                    );
                }
            }
        }
        if !unknown && config.tls_cipher_suites().is_empty() {
            self.problem(
                "cipher-suites",
                "none of the cipher suites is offered by this server for TLS 1.2",
                format!("choose from {known}, or set --tls-min-version=TLS1.3 and remove --cipher-suites"),
            );
        }
    }

    fn logging(&mut self) {
        match self.config.logger.as_str() {
            "zap" => {}
            "capnslog" => {
                self.problem("logger", "--logger=capnslog is removed in v3.5", "remove --logger")
            }
            other => {
                let message = format!("unknown logger option {other:?}");
                self.problem("logger", message, "remove --logger");
            }
        }
        let outputs = &self.config.log_outputs;
        if outputs.len() > 1 && outputs.contains(&LogOutput::Default) {
            self.problem(
                "log-outputs",
                "multi logoutput for \"default\" is not supported yet",
                "write stderr instead of default",
            );
        }
        if outputs.len() > 1 && outputs.contains(&LogOutput::Journal) {
            self.problem(
                "log-outputs",
                "running with systemd/journal but other '--log-outputs' values are configured",
                "write stderr instead of systemd/journal; systemd connects it to the journal",
            );
        }
    }
}
