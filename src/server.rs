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
//! Shutting down goes front to back: leadership is handed over; no new connections, streams end,
//! calls under way get a moment, in which peers are still heard; then raft, the log (synced), the apply and the checkpoint threads.

#[cfg(test)]
mod corruption_tests;
pub mod discover;
mod face;
pub mod heal;
mod member;
mod sockets;
mod stop;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::face::PeerFace;
use self::member::Member;
use self::sockets::{
    Bound, advertised, bind_peers, peer_connector, peer_serve_options, serve_options,
};
use self::stop::Stop;
use crate::api;
use crate::api::gateway::{self, GatewayOptions};
use crate::api::http::{self, AccessControl, HealthSource};
use crate::api::listener;
use crate::api::peer::max_peer_message_bytes;
use crate::api::tls::TlsError;
use crate::client::Client;
use crate::config::{Config, ConfigErrors, Gate};
use crate::engine::{Engine, Inconsistent};
use crate::error::Error;
use crate::runtime::fault::Fault;
use crate::runtime::recover::OpenError;

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
    /// Nobody tells a member that joins who its peers are.
    #[error(transparent)]
    Discover(#[from] discover::NobodyAnswered),
    /// The checkpoint is damaged, and no peer has given this member another.
    #[error(transparent)]
    NotHealed(#[from] heal::NotHealed),
    /// The directory for snapshots cannot be used.
    #[error("cannot use the directory for snapshots, member/snap in --data-dir: {0}")]
    Snapshots(std::io::Error),
    /// The initial corruption check has found a difference.
    #[error(transparent)]
    Inconsistent(#[from] Inconsistent),
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
    /// Ends what peers are served: later than what clients are, whose calls need it.
    peers_stop: watch::Sender<bool>,
    peer_listeners: Vec<JoinHandle<()>>,
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
        let member = Member::start(&config, peer_connector(&config)?).await?;
        let engine = member.engine.clone();
        if config.feature_gates.enabled(Gate::InitialCorruptCheck)
            && let Err(error) = member.check().await
        {
            member.stop.finish().await;
            return Err(error);
        }
        let peers = match bind_peers(&config) {
            Ok(peers) => peers,
            Err(error) => {
                member.stop.finish().await;
                return Err(error);
            }
        };
        let peers_stop = watch::Sender::new(false);
        let mut peer_listeners = Vec::new();
        let router = peer_router(&engine, Arc::clone(&member.face), peers_stop.subscribe());
        for listener in peers {
            let url = listener.local_url().to_string();
            tracing::info!(url, "serving peer traffic");
            let mut stop = peers_stop.subscribe();
            let stopped = async move {
                // A sender that is gone has stopped, too.
                let _ = stop.wait_for(|stop| *stop).await;
            };
            let (router, options) = (router.clone(), peer_serve_options());
            peer_listeners.push(listener::serve(listener, router, options, stopped));
        }
        let ready = member.ready(&config, advertised(&config, &bound)).await;
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
        Ok(Server {
            engine,
            client_urls,
            metrics_urls,
            router: all,
            fault,
            stop,
            listeners,
            peers_stop,
            peer_listeners,
        })
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
        self.engine.resign().await;
        self.stop.begin();
        for listener in self.listeners.drain(..) {
            // A listener's task that panicked serves nobody any more.
            let _ = listener.await;
        }
        // Calls of clients that were under way needed the other members until now.
        self.peers_stop.send_replace(true);
        for listener in self.peer_listeners.drain(..) {
            let _ = listener.await;
        }
        self.stop.finish().await;
        match self.fault.get() {
            Some(fatal) => Err(fatal),
            None => Ok(()),
        }
    }
}

/// What peers are served.
fn peer_router(
    engine: &Engine,
    face: Arc<PeerFace>,
    stopping: watch::Receiver<bool>,
) -> axum::Router {
    let versions = {
        let engine = engine.clone();
        move || HealthSource::versions(&engine)
    };
    let max_message_bytes = max_peer_message_bytes(engine.limits());
    let metrics = Arc::clone(engine.metrics());
    api::peer::peer_router(face, metrics, versions, max_message_bytes, stopping)
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
            grpc: http::grpc_only(grpc),
            http: http::guarded(http, access),
            monitoring: http::metrics_router(source, Arc::clone(metrics), timeout),
        })
    }
}
