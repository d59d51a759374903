//! A server: everything above, put together, started and stopped.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = kvorum::Server::start(kvorum::Config::in_memory()).await?;
//! let urls = server.client_urls(); // any etcd client can connect there
//! server.client().put("key", "value").await?; // or call it directly
//! server.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here is process-global, and nothing exits or panics the process: what a
//! server cannot survive ends that server, and [`Server::wait_for_failure`] says why.
//!
//! Shutting down goes front to back: no new connections, streams end, calls under way
//! get a moment; then raft, the log (synced), the apply and the checkpoint threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle as ThreadHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api;
use crate::api::gateway::{self, GatewayOptions};
use crate::api::http::{self, AccessControl};
use crate::api::listener::{self, Listener, ServeOptions, SocketOptions};
use crate::api::tls::{AutoTls, Side, Tls, TlsError, TlsSettings, TlsVersion};
use crate::client::Client;
use crate::config::{AutoCompaction, Config, ConfigErrors, Gate, MetricsLevel};
use crate::engine::{Engine, Limits, Parts, Versions};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::ResponseHeader;
use crate::raft::Node;
use crate::runtime::apply_thread::{ApplyThread, CompactionPace};
use crate::runtime::auto_compact::{Retention, Schedule};
use crate::runtime::checkpoint_thread::{CheckpointTask, CheckpointThread, Checkpointer};
use crate::runtime::fault::Fault;
use crate::runtime::gauges::Gauges;
use crate::runtime::hashes::{self, CompactionHashes};
use crate::runtime::history::StateHistory;
use crate::runtime::leases::{LeaseClock, LeaseDuty};
use crate::runtime::log_thread::LogThread;
use crate::runtime::pins::Pins;
use crate::runtime::proposer::Proposer;
use crate::runtime::published::Published;
use crate::runtime::raft_thread::{RaftInput, RaftThread};
use crate::runtime::recover::{self, Bootstrap, OpenError, Place, Recovery};
use crate::runtime::space::Space;
use crate::runtime::waiters::Waiters;
use crate::runtime::watch_hub::{HubHandle, WatchConfig, WatchHub};
use crate::version::{ETCD_STORAGE_VERSION, ETCD_VERSION};

pub use crate::runtime::fault::Fatal;

/// Why a server does not start. Each text says what to change.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration has mistakes; all of them are named.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The data cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A URL cannot be listened on.
    #[error(transparent)]
    Listen(std::io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The metrics contradict each other.
    #[error("cannot set up metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The JSON gateway's descriptors contradict each other.
    #[error(transparent)]
    Gateway(#[from] prost_reflect::DescriptorError),
    /// The system has no randomness.
    #[error("cannot get random numbers: {0}")]
    Random(#[from] getrandom::Error),
    /// Something failed for good while the member came up.
    #[error(transparent)]
    Fatal(#[from] Fatal),
    /// The member came up and could not tell the cluster so.
    #[error("cannot publish the member: {0}")]
    Publish(Error),
}

/// A running server. Dropping it stops it too, without waiting for anything;
/// [`Server::shutdown`] is the orderly way.
pub struct Server {
    engine: Engine,
    client_urls: Vec<url::Url>,
    metrics_urls: Vec<url::Url>,
    router: axum::Router,
    fault: Fault,
    stop: Stop,
    listeners: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts a server and waits until it serves: its data is read back, it has a
    /// leader, and its sockets accept.
    ///
    /// To be called within a tokio runtime with I/O and time enabled; the server's
    /// tasks run there. Dropping the future while it starts stops what has started.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running.
    pub async fn start(config: Config) -> Result<Server, StartError> {
        let began = Instant::now();
        for notice in config.validate()? {
            notice.log();
        }
        let bound = Bound::bind(&config)?;
        let member = Member::start(&config).await?;
        let engine = member.engine.clone();
        let ready = member.ready(&config, &bound).await;
        let routers = match ready.and_then(|()| Routers::new(&engine, &config)) {
            Ok(routers) => routers,
            Err(error) => {
                member.stop.finish().await;
                return Err(error);
            }
        };
        let Routers { all, grpc, http, monitoring } = routers;
        let on_client_port = if bound.http_only.is_empty() { all.clone() } else { grpc };
        let options = serve_options(&config);
        let client_urls: Vec<_> =
            bound.clients.iter().map(|listener| listener.local_url().clone()).collect();
        let metrics_urls: Vec<_> =
            bound.metrics.iter().map(|listener| listener.local_url().clone()).collect();
        let mut listeners = Vec::new();
        for (bound, router) in
            [(bound.clients, on_client_port), (bound.http_only, http), (bound.metrics, monitoring)]
        {
            for listener in bound {
                let url = listener.local_url().to_string();
                tracing::info!(url, "serving client traffic");
                let stopped = member.stop.stopped();
                listeners.push(listener::serve(listener, router.clone(), options.clone(), stopped));
            }
        }
        tracing::info!(took = ?began.elapsed(), "ready to serve client requests");
        let Member { fault, stop, .. } = member;
        Ok(Server { engine, client_urls, metrics_urls, router: all, fault, stop, listeners })
    }

    /// The handle that speaks etcd's messages, for calls that need no socket.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The same server as typed calls with decoded answers, for Rust programs.
    pub fn client(&self) -> Client {
        Client::new(self.engine.clone())
    }

    /// Where clients connect, with the ports that were taken for port 0.
    pub fn client_urls(&self) -> &[url::Url] {
        &self.client_urls
    }

    /// Where `--listen-metrics-urls` listen, likewise.
    pub fn metrics_urls(&self) -> &[url::Url] {
        &self.metrics_urls
    }

    /// A gRPC channel to this server that uses no socket: for any etcd client crate built on
    /// tonic. It connects with its first call, within a tokio runtime. When the server has
    /// stopped, streams end and calls are answered with `Unavailable`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use kvorum::pb::etcdserverpb::{RangeRequest, kv_client::KvClient};
    ///
    /// # let server = kvorum::Server::start(kvorum::Config::in_memory()).await?;
    /// let mut kv = KvClient::new(server.channel());
    /// let range = RangeRequest { key: "k".into(), ..Default::default() };
    /// assert_eq!(kv.range(range).await?.into_inner().count, 0);
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn channel(&self) -> tonic::transport::Channel {
        api::in_process_channel(self.router.clone())
    }

    /// Waits for something that this server cannot survive. It serves no more then, but
    /// is still to be shut down. Dropping the future has no effect.
    pub async fn wait_for_failure(&self) -> Fatal {
        self.fault.wait().await
    }

    /// Stops. Everything acknowledged is on disk when this returns.
    ///
    /// # Errors
    /// What had stopped the server before, if anything had.
    pub async fn shutdown(mut self) -> Result<(), Fatal> {
        self.stop.begin();
        for listener in self.listeners.drain(..) {
            // A listener's task that panicked serves nobody any more.
            let _ = listener.await;
        }
        self.stop.finish().await;
        match self.fault.get() {
            Some(fatal) => Err(fatal),
            None => Ok(()),
        }
    }
}

/// What is served where.
struct Routers {
    /// gRPC and HTTP on one port.
    all: axum::Router,
    grpc: axum::Router,
    http: axum::Router,
    monitoring: axum::Router,
}

impl Routers {
    fn new(engine: &Engine, config: &Config) -> Result<Routers, StartError> {
        let metrics = engine.metrics();
        let source = Arc::new(engine.clone());
        let timeout = engine.request_timeout();
        let access = AccessControl {
            cors: config.cors.iter().cloned().collect(),
            host_whitelist: config.host_whitelist.iter().cloned().collect(),
        };
        let grpc = api::grpc_router(engine.clone(), Arc::clone(metrics));
        let mut http = http::client_router(Arc::clone(&source), Arc::clone(metrics), timeout);
        if config.enable_grpc_gateway {
            let max_message_bytes = api::max_message_bytes(engine.limits());
            http = http.merge(gateway::router(grpc.clone(), GatewayOptions { max_message_bytes })?);
        }
        Ok(Routers {
            all: http::one_port(grpc.clone(), http.clone(), access.clone()),
            grpc,
            http: http::guarded(http, access),
            monitoring: http::metrics_router(source, Arc::clone(metrics), timeout),
        })
    }
}

/// Sockets, bound before anything is written: an address in use is the most likely
/// mistake.
struct Bound {
    clients: Vec<Listener>,
    http_only: Vec<Listener>,
    metrics: Vec<Listener>,
}

impl Bound {
    fn bind(config: &Config) -> Result<Bound, StartError> {
        let settings = tls_settings(config);
        let tls = if settings.is_empty() { None } else { Some(Tls::load(settings)?) };
        let options = SocketOptions {
            reuse_port: config.socket_reuse_port,
            reuse_address: config.socket_reuse_address,
        };
        let bind = |urls: &[crate::config::Url]| -> Result<Vec<Listener>, StartError> {
            urls.iter()
                .map(|url| {
                    let url = listen_url(url)?;
                    Listener::bind(&url, tls.clone(), &options).map_err(StartError::Listen)
                })
                .collect()
        };
        Ok(Bound {
            clients: bind(&config.listen_client_urls)?,
            http_only: bind(&config.listen_client_http_urls)?,
            metrics: bind(&config.listen_metrics_urls)?,
        })
    }
}

fn listen_url(url: &crate::config::Url) -> Result<url::Url, StartError> {
    url::Url::parse(url.as_str()).map_err(|error| {
        let text = format!("cannot listen on {url}: {error}");
        StartError::Listen(std::io::Error::new(std::io::ErrorKind::InvalidInput, text))
    })
}

fn tls_settings(config: &Config) -> TlsSettings {
    let hosts = config.listen_client_urls.iter().filter_map(|url| url.host().map(str::to_owned));
    TlsSettings {
        side: Side::Client,
        cert_file: config.cert_file.clone(),
        key_file: config.key_file.clone(),
        trusted_ca_file: config.trusted_ca_file.clone(),
        client_cert_auth: config.client_cert_auth,
        min_version: Some(tls_version(config.tls_min_version)),
        max_version: config.tls_max_version.map(tls_version),
        cipher_suites: config.cipher_suites.clone(),
        auto: config.auto_tls.then(|| AutoTls {
            dir: config.data_dir.join("fixtures").join("client"),
            hosts: hosts.collect(),
            validity_years: u32::try_from(config.self_signed_cert_validity).unwrap_or(u32::MAX),
        }),
    }
}

fn tls_version(version: crate::config::TlsVersion) -> TlsVersion {
    match version {
        crate::config::TlsVersion::Tls12 => TlsVersion::Tls12,
        crate::config::TlsVersion::Tls13 => TlsVersion::Tls13,
    }
}

fn serve_options(config: &Config) -> ServeOptions {
    ServeOptions {
        max_concurrent_streams: config.max_concurrent_streams,
        keepalive_interval: config.grpc_keepalive_interval,
        keepalive_timeout: config.grpc_keepalive_timeout,
        ..ServeOptions::default()
    }
}

/// A member without its sockets.
struct Member {
    engine: Engine,
    published: Arc<Published>,
    fault: Fault,
    stop: Stop,
}

impl Member {
    async fn start(config: &Config) -> Result<Member, StartError> {
        let metrics = match config.metrics {
            MetricsLevel::Extensive => Metrics::extensive()?,
            MetricsLevel::Basic => Metrics::new()?,
        };
        let place = place(config);
        let bootstrap = bootstrap(config);
        let opening = {
            let place = place.clone();
            tokio::task::spawn_blocking(move || recover::open(&place, &bootstrap))
        };
        let recovery = opening.await.map_err(|error| Fatal::new(error.to_string()))??;
        let Recovery { state, mut start, log, storage, generations, identity, is_new } = recovery;

        let limits = limits(config);
        start.election_ticks = limits.election_ticks() as usize;
        start.pre_vote = config.pre_vote;
        start.catch_up_entries = config.snapshot_catchup_entries;
        let applied = state.applied();
        tracing::info!(
            member_id = format!("{:x}", identity.member_id),
            cluster_id = format!("{:x}", identity.cluster_id),
            name = config.name,
            data_dir = %config.data_dir.display(),
            is_new,
            applied_index = applied.index,
            log_start = start.start.index,
            log_entries = start.entries.len(),
            revision = state.store().revision(),
            heartbeat_interval = ?limits.heartbeat,
            election_timeout = ?limits.election_timeout,
            snapshot_count = config.snapshot_entries(),
            snapshot_catchup_entries = config.snapshot_catchup(),
            quota_backend_bytes = limits.quota_bytes,
            "starting a member"
        );
        let recovered_index = start.entries.last().map_or(start.start.index, |entry| entry.index);
        // The checkpoint just read is as good as a snapshot. When the last one was made
        // before that is not known, but the log was cut behind it: were it made at the
        // checkpoint, a member that is often restarted would never make another.
        let snapshot_index =
            applied.index.min(start.start.index.saturating_add(config.snapshot_catchup()));
        let first_index = i64::try_from(start.start.index + 1).unwrap_or(i64::MAX);
        metrics.kvorum_raft_log_first_index.set(first_index);
        tell_settings(&metrics, config, &limits);
        let node = Node::new(start).map_err(|error| Fatal::new(error.to_string()))?;
        metrics.identify(ETCD_VERSION, state.cluster_version(), identity.member_id);

        let fault = Fault::default();
        let full = Arc::new(AtomicBool::new(false));
        let state = Arc::new(RwLock::new(state));
        let published = Arc::new(Published::new(applied.index, applied.term));
        published.set_size(state.read().store().size_bytes());
        published.set_checkpoint_bytes(storage.size_on_disk().map_err(OpenError::from)?);
        let waiters = Arc::new(Waiters::new(identity.member_id, getrandom::u64()?));
        let leases = Arc::new(LeaseClock::default());
        let pins = Arc::new(Pins::default());
        let (raft_sender, raft_mailbox) = mpsc::channel();
        let (log_sender, log_tasks) = mpsc::channel();
        let (apply_sender, apply_tasks) = mpsc::channel();
        let (checkpoint_sender, checkpoint_tasks) = mpsc::channel();
        let signal = watch::Sender::new(false);
        let busy = Arc::new(AtomicBool::new(false));
        let stopping = Arc::new(AtomicBool::new(false));

        let header_source = {
            let published = Arc::clone(&published);
            Arc::new(move |revision| ResponseHeader {
                cluster_id: identity.cluster_id,
                member_id: identity.member_id,
                revision,
                raft_term: published.applied_term(),
            })
        };
        let watch_config = WatchConfig {
            progress_interval: config.watch_progress_interval(),
            max_request_bytes: limits.max_request_bytes,
            seed: getrandom::u64()?,
        };
        let history = StateHistory(Arc::clone(&state));
        let (hub, hub_handle, feed) = WatchHub::new(history, header_source, watch_config);

        let hashes = Arc::new(CompactionHashes::default());
        let (hash_queue, hash_work) = hashes::hasher(Arc::clone(&state), Arc::clone(&hashes));

        let proposer = Arc::new(Proposer::new(
            raft_sender.clone(),
            Arc::clone(&waiters),
            Arc::clone(&published),
            Arc::clone(&metrics),
            limits.max_request_bytes,
            limits.election_timeout,
        ));
        let engine = Engine::new(Parts {
            member_id: identity.member_id,
            cluster_id: identity.cluster_id,
            state: Arc::clone(&state),
            proposer: Arc::clone(&proposer),
            published: Arc::clone(&published),
            leases: Arc::clone(&leases),
            pins: Arc::clone(&pins),
            hub: hub_handle.clone(),
            hashes,
            checkpoint: checkpoint_sender.clone(),
            metrics: Arc::clone(&metrics),
            gauges: Gauges {
                member: identity.member_id,
                state: Arc::clone(&state),
                published: Arc::clone(&published),
                pins: Arc::clone(&pins),
                hub: hub_handle.clone(),
                metrics: Arc::clone(&metrics),
                seen: Mutex::default(),
            },
            fault: fault.clone(),
            stopping: signal.subscribe(),
            full: Arc::clone(&full),
            limits: limits.clone(),
            versions: Versions { server: ETCD_VERSION, storage: ETCD_STORAGE_VERSION },
        });

        let mut threads = Threads {
            raft: raft_sender.clone(),
            checkpoint: checkpoint_sender.clone(),
            waiters: Arc::clone(&waiters),
            stopping: Arc::clone(&stopping),
            front: Vec::new(),
            checkpointer: None,
        };
        let checkpointer = Checkpointer::new(
            checkpoint_sender,
            Arc::clone(&busy),
            config.snapshot_entries(),
            snapshot_index,
        );
        let checkpoint_thread = CheckpointThread {
            storage: Some(storage),
            generations,
            state: Arc::clone(&state),
            pins: Arc::clone(&pins),
            tasks: checkpoint_tasks,
            log: log_sender.clone(),
            durable_index: applied.index,
            published: Arc::clone(&published),
            busy,
            full: Arc::clone(&full),
            catch_up_entries: config.snapshot_catchup(),
            snapshots: VecDeque::from([applied]),
            stopping,
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        threads.checkpointer = Some(spawn("checkpoint", &fault, move || checkpoint_thread.run())?);
        let log_thread = LogThread {
            log,
            tasks: log_tasks,
            raft: raft_sender.clone(),
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        threads.front.push(spawn("log", &fault, move || log_thread.run())?);
        let apply_thread = ApplyThread {
            state: Arc::clone(&state),
            tasks: apply_tasks,
            raft: raft_sender.clone(),
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            feed,
            leases: Arc::clone(&leases),
            pins,
            recovered_index,
            hashes: hash_queue,
            checkpointer,
            pace: CompactionPace {
                keys_per_step: usize::try_from(config.compaction_batch()).unwrap_or(usize::MAX),
                pause: config.compaction_sleep(),
            },
            slow_apply: config.warning_apply_duration,
            fault: fault.clone(),
            metrics: Arc::clone(&metrics),
        };
        threads.front.push(spawn("apply", &fault, move || apply_thread.run())?);
        let raft_thread = RaftThread {
            node,
            mailbox: raft_mailbox,
            log: log_sender,
            apply: apply_sender,
            published: Arc::clone(&published),
            waiters: Arc::clone(&waiters),
            metrics: Arc::clone(&metrics),
            fault: fault.clone(),
            tick: limits.heartbeat,
            member: identity.member_id,
            term_index: None,
        };
        threads.front.push(spawn("raft", &fault, move || raft_thread.run())?);

        let duty = LeaseDuty {
            clock: leases,
            state,
            proposer,
            published: Arc::clone(&published),
            election_timeout: limits.election_timeout,
            metrics,
        };
        let mut tasks =
            vec![tokio::spawn(hub.run()), tokio::spawn(duty.run()), tokio::spawn(hash_work)];
        if let Some(retention) = retention(config) {
            tasks.push(tokio::spawn(auto_compact(engine.clone(), retention)));
        }
        if let Place::Disk { data_dir, wal_dir, .. } = place {
            let directories = std::iter::once(data_dir).chain(wal_dir).collect();
            tasks.push(tokio::spawn(Space { directories, low: full }.watch()));
        }
        let stop = Stop { signal, hub: hub_handle.clone(), tasks, threads: Some(threads) };
        let end =
            end_on_fault(fault.clone(), waiters, hub_handle, raft_sender, stop.signal.clone());
        tokio::spawn(end);
        Ok(Member { engine, published, fault, stop })
    }

    /// Waits until the member has a leader and has told the cluster who it is.
    async fn ready(&self, config: &Config, bound: &Bound) -> Result<(), StartError> {
        let mut role = self.published.role.subscribe();
        let leader = role.wait_for(|role| role.leader != 0);
        tokio::select! {
            _ = leader => {}
            fatal = self.fault.wait() => return Err(fatal.into()),
        }
        let client_urls = advertised(config, bound);
        self.engine.publish(config.name.clone(), client_urls).await.map_err(StartError::Publish)
    }
}

/// `--advertise-client-urls`. Nobody can connect to a port 0: instead, the port is told
/// that the listener of the same place in `--listen-client-urls` was given.
fn advertised(config: &Config, bound: &Bound) -> Vec<String> {
    let ports = bound.clients.iter().map(|listener| listener.local_url().port_or_known_default());
    let mut ports = ports.chain(std::iter::repeat(None));
    let urls = config.advertise_client_urls.iter().map(|url| {
        let port = ports.next().flatten().filter(|_| url.port() == Some(0));
        port.map_or_else(|| url.clone(), |port| url.with_port(port)).as_str().to_owned()
    });
    urls.collect()
}

fn place(config: &Config) -> Place {
    if config.in_memory {
        return Place::Memory;
    }
    Place::Disk {
        data_dir: config.data_dir.clone(),
        wal_dir: config.wal_dir.clone(),
        fsync: !config.unsafe_no_fsync,
    }
}

fn bootstrap(config: &Config) -> Bootstrap {
    let initial_cluster = config.initial_cluster.iter().map(|(name, urls)| {
        (name.clone(), urls.iter().map(|url| url.as_str().to_owned()).collect())
    });
    Bootstrap {
        initial_cluster: initial_cluster.collect(),
        cluster_token: config.initial_cluster_token.clone(),
        name: config.name.clone(),
        cluster_version: ETCD_STORAGE_VERSION.to_owned(),
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        max_request_bytes: usize::try_from(config.max_request_bytes).unwrap_or(usize::MAX),
        max_txn_ops: usize::try_from(config.max_txn_ops).unwrap_or(usize::MAX),
        quota_bytes: config.quota_bytes(),
        heartbeat: config.heartbeat(),
        election_timeout: config.election(),
        warning_unary_request_duration: config.warning_unary_request_duration,
    }
}

/// Settings that show in the metrics.
fn tell_settings(metrics: &Metrics, config: &Config, limits: &Limits) {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    metrics.server_quota_backend_bytes.set(signed(limits.quota_bytes.unwrap_or(0)));
    metrics.kvorum_server_heartbeat_interval_seconds.set(limits.heartbeat.as_secs_f64());
    metrics.kvorum_server_election_timeout_seconds.set(limits.election_timeout.as_secs_f64());
    metrics.kvorum_server_snapshot_count.set(signed(config.snapshot_entries()));
    metrics.kvorum_server_snapshot_catchup_entries.set(signed(config.snapshot_catchup()));
    for gate in Gate::ALL {
        let labels = [gate.name(), gate.stage().as_str()];
        let enabled = config.feature_gates.enabled(*gate);
        metrics.server_feature_enabled.with_label_values(&labels).set(enabled.into());
    }
}

fn retention(config: &Config) -> Option<Retention> {
    // A retention that is none has been refused by the configuration's check.
    match config.auto_compaction().ok().flatten()? {
        AutoCompaction::Periodic(period) => Some(Retention::Period(period)),
        AutoCompaction::Revision(kept) => Some(Retention::Revisions(kept)),
    }
}

/// Compacts by the clock while this member leads.
async fn auto_compact(engine: Engine, retention: Retention) {
    let began = Instant::now();
    let mut schedule = Schedule::new(retention, Duration::ZERO);
    let mut ticks = tokio::time::interval(schedule.interval().max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let Some(revision) = schedule.step(began.elapsed(), engine.revision()) else { continue };
        let Some(term) = engine.leads_in_term() else { continue };
        match engine.auto_compact(term, revision).await {
            Ok(()) | Err(Error::Compacted) => {
                tracing::info!(revision, "completed auto compaction");
                schedule.compacted(began.elapsed(), revision);
            }
            Err(error) => tracing::warn!(revision, %error, "failed auto compaction"),
        }
    }
}

/// After a fatal error: nobody is left waiting, and nothing new is taken.
async fn end_on_fault(
    fault: Fault,
    waiters: Arc<Waiters>,
    hub: HubHandle,
    raft: mpsc::Sender<RaftInput>,
    stop: watch::Sender<bool>,
) {
    let mut stopped = stop.subscribe();
    tokio::select! {
        _ = fault.wait() => {
            hub.close();
            // It ends the threads that have not, and has all questions refused.
            let _ = raft.send(RaftInput::Stop);
            waiters.fail_all(&Error::Stopped);
            stop.send_replace(true);
        }
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

/// Starts a thread. Should it panic, the server stops as after any other fatal error.
fn spawn(
    name: &'static str,
    fault: &Fault,
    run: impl FnOnce() + Send + 'static,
) -> Result<ThreadHandle<()>, StartError> {
    let guard = PanicGuard { thread: name, fault: fault.clone() };
    let run = move || {
        let _guard = guard;
        run();
    };
    std::thread::Builder::new()
        .name(format!("kvorum-{name}"))
        .spawn(run)
        .map_err(StartError::Thread)
}

struct PanicGuard {
    thread: &'static str,
    fault: Fault,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fault.raise(self.thread, "its thread panicked; please report the panic's message");
        }
    }
}

/// How everything is told to stop.
struct Stop {
    signal: watch::Sender<bool>,
    hub: HubHandle,
    tasks: Vec<JoinHandle<()>>,
    threads: Option<Threads>,
}

impl Stop {
    /// Completes once the stop has begun.
    fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stopped = self.signal.subscribe();
        async move {
            // A sender that is gone has stopped, too.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    }

    /// No new work; streams end.
    fn begin(&self) {
        self.signal.send_replace(true);
        self.hub.close();
    }

    /// Stops everything and waits for it.
    async fn finish(mut self) {
        self.begin();
        if let Some(threads) = self.take_threads() {
            // Joining threads blocks; that they panicked is no reason to panic here.
            let _ = tokio::task::spawn_blocking(move || threads.join()).await;
        }
    }

    /// The threads, to be told and joined; `None` the second time.
    fn take_threads(&mut self) -> Option<Threads> {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        self.threads.take()
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.begin();
        if let Some(threads) = self.take_threads() {
            threads.tell();
        }
    }
}

/// The threads, and how they are told to stop.
struct Threads {
    raft: mpsc::Sender<RaftInput>,
    checkpoint: mpsc::Sender<CheckpointTask>,
    waiters: Arc<Waiters>,
    stopping: Arc<AtomicBool>,
    /// Raft, log and apply: the first tells the others.
    front: Vec<ThreadHandle<()>>,
    checkpointer: Option<ThreadHandle<()>>,
}

impl Threads {
    /// Begins the end. A thread that is gone already needs no telling.
    fn tell(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.raft.send(RaftInput::Stop);
        let _ = self.checkpoint.send(CheckpointTask::Stop);
    }

    /// Stops the threads and waits for them. What they acknowledged is on disk then.
    /// Blocks.
    fn join(self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.raft.send(RaftInput::Stop);
        for thread in self.front {
            // One that panicked has ended, too.
            let _ = thread.join();
        }
        self.waiters.fail_all(&Error::Stopped);
        let _ = self.checkpoint.send(CheckpointTask::Stop);
        if let Some(checkpointer) = self.checkpointer {
            let _ = checkpointer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_is_a_fatal_error_and_one_that_ends_is_not() {
        let fault = Fault::default();
        spawn("calm", &fault, || {}).unwrap().join().unwrap();
        assert!(fault.get().is_none());
        spawn("test", &fault, || panic!("on purpose")).unwrap().join().unwrap_err();
        let fatal = fault.get().unwrap().to_string();
        assert!(fatal.starts_with("test: ") && fatal.contains("panicked"), "{fatal}");
    }
}
