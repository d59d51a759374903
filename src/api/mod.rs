//! The outside of the server: etcd's gRPC services over one [`Engine`].
//!
//! ```text
//! http::Request ─> intercept (count, check, limit) ─> kv · watch · lease · cluster ·
//!                                                     maintenance · auth · election ·
//!                                                     lock · health ─> Engine
//! ```
//!
//! Each service is a thin skin: it hands the request to the engine and turns the
//! engine's error into a status by the one table in [`status`]. What concerns all
//! calls alike is in `intercept`. Only Lock and Election have an algorithm of
//! their own, because etcd runs those on top of its client, not inside its state.
//!
//! The services come as an [`axum::Router`], to be served on a listener next to
//! HTTP or, by [`in_process_channel`], without any network.

mod auth;
mod authority;
mod cluster;
mod concurrency;
pub mod connector;
mod election;
pub mod gateway;
mod gather;
mod health;
pub mod http;
mod intercept;
mod kv;
mod lease;
pub mod listener;
mod lock;
mod maintenance;
pub mod peer;
mod probe;
pub mod status;
pub mod tls;
mod until_stopped;
mod watch;
mod writes_pass;

use std::convert::Infallible;
use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tonic::codec::CompressionEncoding;
use tonic::codegen::{BoxFuture, Service as _};
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint, Uri};

use self::intercept::{Dispatch, Intercept, RequestBody, Response, Settings};
use crate::engine::{Engine, Limits};
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::auth_server::AuthServer;
use crate::pb::etcdserverpb::cluster_server::ClusterServer;
use crate::pb::etcdserverpb::kv_server::KvServer;
use crate::pb::etcdserverpb::lease_server::LeaseServer;
use crate::pb::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::pb::etcdserverpb::watch_server::WatchServer;
use crate::pb::health::health_server::HealthServer;
use crate::pb::v3electionpb::election_server::ElectionServer;
use crate::pb::v3lockpb::lock_server::LockServer;

/// Room for gRPC's own fields above `--max-request-bytes`, in bytes: a message
/// larger than both together is refused before it is read.
const GRPC_OVERHEAD_BYTES: usize = 512 * 1024;

/// Declares [`Services`] from its fields, so that the services built, named and
/// dispatched to are the same ones.
macro_rules! services {
    ($($field:ident: $server:ident<$service:ty> = $make:expr;)+) => {
        struct Services {
            $($field: $server<$service>,)+
        }

        impl Services {
            fn new(engine: &Engine, max_message_bytes: usize) -> Services {
                Services {
                    $($field: {
                        let make: fn(Engine) -> $service = $make;
                        $server::new(make(engine.clone()))
                            .max_decoding_message_size(max_message_bytes)
                            // Taken, as etcd does; answers are not compressed, which
                            // would cost more than it saves.
                            .accept_compressed(CompressionEncoding::Gzip)
                    },)+
                }
            }
        }

        impl Dispatch for Services {
            fn dispatch(
                &self,
                request: ::http::Request<RequestBody>,
            ) -> Option<BoxFuture<Response, Infallible>> {
                let (service, _method) = request.uri().path().strip_prefix('/')?.split_once('/')?;
                match service {
                    // A server is a handle; a clone of it costs a reference count.
                    $(<$server<$service>>::NAME => Some(self.$field.clone().call(request)),)+
                    _ => None,
                }
            }

            fn has_service(&self, name: &str) -> bool {
                matches!(name, $(<$server<$service>>::NAME)|+)
            }
        }
    };
}

services! {
    kv: KvServer<kv::Kv> = kv::Kv::new;
    watch: WatchServer<watch::Watch> = watch::Watch::new;
    lease: LeaseServer<lease::Lease> = lease::Lease::new;
    cluster: ClusterServer<cluster::Cluster> = cluster::Cluster::new;
    maintenance: MaintenanceServer<maintenance::Maintenance> = maintenance::Maintenance::new;
    auth: AuthServer<auth::Auth> = auth::Auth::new;
    election: ElectionServer<election::Election> = election::Election::new;
    lock: LockServer<lock::Lock> = lock::Lock::new;
    health: HealthServer<health::Health> = |engine| health::Health::new(engine.stopping());
}

/// The largest message a client may send, in bytes.
pub fn max_message_bytes(limits: &Limits) -> usize {
    limits.max_request_bytes.saturating_add(GRPC_OVERHEAD_BYTES)
}

/// All gRPC services of `engine` as a router that answers every path, unknown
/// services in gRPC's way.
///
/// Serve it over HTTP/2 only. Requests are answered as long as the engine
/// lives; streams end with the engine, or when their connection does.
pub fn grpc_router(engine: Engine, metrics: Arc<Metrics>) -> axum::Router {
    let limits = engine.limits();
    let max_message_bytes = max_message_bytes(limits);
    let settings = Settings {
        max_message_bytes: u32::try_from(max_message_bytes).unwrap_or(u32::MAX),
        election_timeout: limits.election_timeout,
        slow_unary: limits.warning_unary_request_duration,
        has_leader: {
            let engine = engine.clone();
            Box::new(move || engine.has_leader())
        },
        is_learner: {
            let engine = engine.clone();
            Box::new(move || engine.is_learner())
        },
    };
    let services = Services::new(&engine, max_message_bytes);
    axum::Router::new().fallback_service(Intercept::new(services, settings, metrics))
}

/// Bytes an in-process connection holds between client and server, each way.
const IN_PROCESS_BUFFER_BYTES: usize = 256 * 1024;

/// Cancelled streams waiting to be noticed, per connection. The default of 20 makes
/// the server hang up on a client that cancels many watches at once.
const PENDING_RESETS: usize = 10_000;

/// A channel to the services of [`grpc_router`] that uses no network: for any
/// etcd client built on tonic, inside the same process.
///
/// It connects with the first call, and must be used inside a tokio runtime. The
/// connection is HTTP/2, as over TCP, so that nothing behaves differently; it ends
/// when the last clone of the channel is dropped.
pub fn in_process_channel(router: axum::Router) -> Channel {
    let connector = tower::service_fn(move |_: Uri| {
        let (client, server) = tokio::io::duplex(IN_PROCESS_BUFFER_BYTES);
        let service = TowerToHyperService::new(router.clone());
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .max_concurrent_streams(None)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(None)
            .serve_connection(TokioIo::new(server), service);
        // It ends when the client hangs up; how is of no interest to the server.
        tokio::spawn(async move { connection.await.ok() });
        std::future::ready(Ok::<_, Infallible>(TokioIo::new(client)))
    });
    // The name is never resolved: the connector goes elsewhere.
    Endpoint::from_static("http://in-process.kvorum.invalid").connect_with_connector_lazy(connector)
}
