//! etcd's plain HTTP endpoints: health, version, metrics.
//!
//! | path | answer |
//! |---|---|
//! | `/health` | `{"health":"true","reason":""}`, or 503 with the reason |
//! | `/livez`, `/readyz` and one path per check below them | `ok`, or 503 with the checks |
//! | `/version` | the versions of server, cluster and storage |
//! | `/metrics` | Prometheus' text format |
//! | `/debug/vars` | the limit of descriptors and raft's status |
//!
//! Kubernetes' probes, load balancers and scripts compare these bodies as text, so codes,
//! bodies, headers and even the final newlines are etcd's.
//!
//! [`client_router`] is for the clients' port and [`metrics_router`] for
//! `--listen-metrics-urls`. [`one_port`] puts gRPC and HTTP on one port and guards the
//! HTTP half with [`AccessControl`].
//!
//! It does not know the engine: [`HealthSource`] is all it asks of it.

#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use http::header::{ALLOW, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN};
use http::{Method, StatusCode, Version};
use rustix::process::{Resource, getrlimit};
use tokio::sync::Semaphore;
use tower::Service;
use url::form_urlencoded;

use super::listener::Connection;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::pb::etcdserverpb::{AlarmMember, AlarmType};

/// Scrapes answered at a time; more get 503.
pub const MAX_SCRAPES: usize = 8;

const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS_TEXT: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8; escaping=underscores");
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");
const JSON_UTF8: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");
const CONTENT_TYPE_OPTIONS: HeaderName = HeaderName::from_static("x-content-type-options");
const NOSNIFF: HeaderValue = HeaderValue::from_static("nosniff");

/// What the endpoints ask of the server behind them. Reads are made as root.
pub trait HealthSource: Send + Sync + 'static {
    /// Reads one key through the cluster's agreement.
    fn linearizable_read(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// Reads one key of this member.
    fn serializable_read(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// Whether this member knows a leader.
    fn has_leader(&self) -> bool;
    /// The alarms raised in the cluster.
    fn alarms(&self) -> Vec<AlarmMember>;
    /// Whether this member is a learner.
    fn is_learner(&self) -> bool;
    /// The versions as they are now.
    fn versions(&self) -> Versions;
    /// `raft.status` of `/debug/vars`.
    fn raft_status(&self) -> serde_json::Value;
    /// Brings those metrics up to date that are only written for a scrape.
    fn refresh_metrics(&self);
}

/// What `/version` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions {
    /// This server, as `3.6.0`.
    pub server: String,
    /// The cluster; `None` until it is decided.
    pub cluster: Option<String>,
    /// The format of the storage; `None` until it is known.
    pub storage: Option<String>,
}

/// What the endpoints share.
struct Endpoints<H> {
    source: Arc<H>,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
    scrapes: Arc<Semaphore>,
}

/// The endpoints of a client port. Anything else is 404; merge the gateway's router into
/// this one. `request_timeout` bounds one read of a health check: etcd's is 5 seconds and
/// two election timeouts.
pub fn client_router<H: HealthSource>(
    source: Arc<H>,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
) -> Router {
    let endpoints = endpoints(source, metrics, request_timeout);
    monitoring(&endpoints)
        .merge(
            Router::new()
                .route("/version", any(version))
                .route("/debug/vars", any(debug_vars))
                .with_state(endpoints),
        )
        .fallback(not_found)
}

/// The endpoints of `--listen-metrics-urls`: health and metrics. Anything else is 404.
pub fn metrics_router<H: HealthSource>(
    source: Arc<H>,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
) -> Router {
    monitoring(&endpoints(source, metrics, request_timeout)).fallback(not_found)
}

fn endpoints<H: HealthSource>(
    source: Arc<H>,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
) -> Arc<Endpoints<H>> {
    let scrapes = Arc::new(Semaphore::new(MAX_SCRAPES));
    Arc::new(Endpoints { source, metrics, request_timeout, scrapes })
}

fn monitoring<H: HealthSource>(endpoints: &Arc<Endpoints<H>>) -> Router {
    let mut router =
        Router::new().route("/health", any(health)).route("/metrics", any(metrics_text));
    for probe in [LIVEZ, READYZ] {
        let all = move |State(endpoints): State<Arc<Endpoints<H>>>, request: Request| {
            let excluded = Query::of(&request).all("exclude");
            let checks = probe.checks.iter().filter(|check| !excluded.contains(check.name()));
            run(endpoints, probe.name, checks.copied().collect(), request)
        };
        router = router.route(&format!("/{}", probe.name), any(all));
        for &check in probe.checks {
            let one = move |State(endpoints): State<Arc<Endpoints<H>>>, request: Request| {
                run(endpoints, probe.name, vec![check], request)
            };
            router = router.route(&format!("/{}/{}", probe.name, check.name()), any(one));
        }
    }
    router.with_state(Arc::clone(endpoints))
}

/// `/livez` or `/readyz`.
#[derive(Clone, Copy)]
struct Probe {
    name: &'static str,
    checks: &'static [Check],
}

const LIVEZ: Probe = Probe { name: "livez", checks: &[Check::SerializableRead] };
const READYZ: Probe = Probe {
    name: "readyz",
    // A full database is not among them: such a member still serves reads and deletes.
    checks: &[
        Check::DataCorruption,
        Check::SerializableRead,
        Check::LinearizableRead,
        Check::NonLearner,
    ],
};

#[derive(Debug, Clone, Copy)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run<H: HealthSource>(self, endpoints: &Endpoints<H>) -> Result<(), String> {
        match self {
            Check::DataCorruption => {
                let corrupt = |alarm: &AlarmMember| alarm.alarm() == AlarmType::Corrupt;
                if endpoints.source.alarms().iter().any(corrupt) {
                    return Err("alarm activated: CORRUPT".to_owned());
                }
                Ok(())
            }
            Check::SerializableRead => endpoints.read(true).await,
            Check::LinearizableRead => endpoints.read(false).await,
            Check::NonLearner => {
                if endpoints.source.is_learner() {
                    return Err("not supported for learner".to_owned());
                }
                Ok(())
            }
        }
    }
}

impl<H: HealthSource> Endpoints<H> {
    /// One read, or why it failed in the words etcd has for it.
    async fn read(&self, serializable: bool) -> Result<(), String> {
        let read = async {
            if serializable {
                self.source.serializable_read().await
            } else {
                self.source.linearizable_read().await
            }
        };
        match tokio::time::timeout(self.request_timeout, read).await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("context deadline exceeded".to_owned()),
        }
    }

    /// Why `/health` is false, if it is.
    async fn ailment(&self, excluded: &BTreeSet<String>, serializable: bool) -> Option<String> {
        for alarm in self.source.alarms() {
            let kind = AlarmType::try_from(alarm.alarm);
            // Go's name of an enum's value that has none is its number.
            let name = kind.map_or(alarm.alarm.to_string(), |kind| kind.as_str_name().to_owned());
            if excluded.contains(&name) {
                continue;
            }
            let known = matches!(kind, Ok(AlarmType::Nospace | AlarmType::Corrupt));
            return Some(format!("ALARM {}", if known { &name } else { "UNKNOWN" }));
        }
        if !serializable && !self.source.has_leader() {
            return Some("RAFT NO LEADER".to_owned());
        }
        self.read(serializable).await.err().map(|error| format!("RANGE ERROR:{error}"))
    }
}

async fn health<H: HealthSource>(
    State(endpoints): State<Arc<Endpoints<H>>>,
    request: Request,
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let query = Query::of(&request);
    drop(request);
    let serializable = query.first("serializable") == Some("true");
    match endpoints.ailment(&query.all("exclude"), serializable).await {
        None => {
            endpoints.metrics.server_health_success.inc();
            plain(r#"{"health":"true","reason":""}"#)
        }
        Some(reason) => {
            endpoints.metrics.server_health_failures.inc();
            tracing::warn!(reason, "/health is false");
            // serde_json sorts the keys, which is the order etcd writes them in.
            let body = serde_json::json!({ "health": "false", "reason": reason });
            error(StatusCode::SERVICE_UNAVAILABLE, &body.to_string())
        }
    }
}

async fn run<H: HealthSource>(
    endpoints: Arc<Endpoints<H>>,
    probe: &'static str,
    checks: Vec<Check>,
    request: Request,
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let verbose = Query::of(&request).has("verbose");
    drop(request);
    let mut report = String::new();
    let mut healthy = true;
    for check in checks {
        let name = check.name();
        let result = check.run(&endpoints).await;
        let status = if result.is_ok() { "success" } else { "error" };
        let metrics = &endpoints.metrics;
        metrics.server_healthcheck.with_label_values(&[probe, name]).set(result.is_ok().into());
        metrics.server_healthchecks_total.with_label_values(&[probe, name, status]).inc();
        // Writing to a String cannot fail.
        let _ = match result {
            Ok(()) => writeln!(report, "[+]{name} ok"),
            Err(reason) => {
                healthy = false;
                writeln!(report, "[-]{name} failed: {reason}")
            }
        };
    }
    if !healthy {
        tracing::warn!(probe, report, "health check failed");
        return error(StatusCode::SERVICE_UNAVAILABLE, &report);
    }
    let mut body = if verbose { report } else { String::new() };
    body.push_str("ok\n");
    let mut response = plain(body);
    response.headers_mut().insert(CONTENT_TYPE_OPTIONS, NOSNIFF);
    response
}

async fn version<H: HealthSource>(
    State(endpoints): State<Arc<Endpoints<H>>>,
    request: Request,
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    version_answer(endpoints.source.versions())
}

/// What `/version` answers, on the clients' port and on the peers'.
pub(super) fn version_answer(versions: Versions) -> Response {
    let Versions { server, cluster, storage } = versions;
    let quote = serde_json::Value::from;
    // In the order etcd writes them.
    let body = format!(
        r#"{{"etcdserver":{},"etcdcluster":{},"storage":{}}}"#,
        quote(server),
        quote(cluster.unwrap_or_else(|| "not_decided".to_owned())),
        quote(storage.unwrap_or_else(|| "unknown".to_owned())),
    );
    ([(CONTENT_TYPE, JSON)], body).into_response()
}

async fn debug_vars<H: HealthSource>(
    State(endpoints): State<Arc<Endpoints<H>>>,
    request: Request,
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let limit = getrlimit(Resource::Nofile).current;
    let vars = BTreeMap::from([
        ("file_descriptor_limit", serde_json::Value::from(limit)),
        ("raft.status", endpoints.source.raft_status()),
    ]);
    let vars: Vec<String> =
        vars.into_iter().map(|(name, value)| format!("{name:?}: {value}")).collect();
    ([(CONTENT_TYPE, JSON_UTF8)], format!("{{\n{}\n}}\n", vars.join(",\n"))).into_response()
}

async fn metrics_text<H: HealthSource>(State(endpoints): State<Arc<Endpoints<H>>>) -> Response {
    let count = |code: StatusCode| {
        let metrics = &endpoints.metrics;
        metrics.promhttp_metric_handler_requests_total.with_label_values(&[code.as_str()]).inc();
    };
    let Ok(slot) = Arc::clone(&endpoints.scrapes).try_acquire_owned() else {
        count(StatusCode::SERVICE_UNAVAILABLE);
        let text =
            format!("Limit of concurrent requests reached ({MAX_SCRAPES}), try again later.");
        return error(StatusCode::SERVICE_UNAVAILABLE, &text);
    };
    let (source, metrics) = (Arc::clone(&endpoints.source), Arc::clone(&endpoints.metrics));
    // Writing a few thousand lines and reading /proc is not for a thread that serves
    // requests.
    let render = tokio::task::spawn_blocking(move || {
        metrics.promhttp_metric_handler_requests_in_flight.inc();
        source.refresh_metrics();
        let text = metrics.render();
        metrics.promhttp_metric_handler_requests_in_flight.dec();
        drop(slot);
        text
    });
    let failure = match render.await {
        Ok(Ok(text)) => {
            count(StatusCode::OK);
            return ([(CONTENT_TYPE, METRICS_TEXT)], text).into_response();
        }
        Ok(Err(failure)) => failure.to_string(),
        Err(failure) => failure.to_string(),
    };
    count(StatusCode::INTERNAL_SERVER_ERROR);
    let text = format!("An error has occurred while serving metrics:\n\n{failure}");
    error(StatusCode::INTERNAL_SERVER_ERROR, &text)
}

pub(super) async fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, "404 page not found")
}

pub(super) fn method_not_allowed() -> Response {
    let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    response
}

fn plain(body: impl Into<Body>) -> Response {
    ([(CONTENT_TYPE, PLAIN_TEXT)], body.into()).into_response()
}

/// An error as Go writes it: plain text and a newline.
pub(super) fn error(status: StatusCode, text: &str) -> Response {
    let headers = [(CONTENT_TYPE, PLAIN_TEXT), (CONTENT_TYPE_OPTIONS, NOSNIFF)];
    (status, headers, format!("{text}\n")).into_response()
}

/// The parameters of a request's URL.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(request: &Request) -> Query {
        let query = request.uri().query().unwrap_or_default();
        Query(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn first(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn has(&self, name: &str) -> bool {
        self.first(name).is_some()
    }

    /// The values that are not empty.
    fn all(&self, name: &str) -> BTreeSet<String> {
        self.values(name).filter(|value| !value.is_empty()).map(str::to_owned).collect()
    }
}

/// Who may use HTTP from a browser: `--cors` and `--host-whitelist`. gRPC is not concerned.
#[derive(Debug, Clone, Default)]
pub struct AccessControl {
    /// Origins allowed to read answers; empty, or with `*` among them: all.
    pub cors: BTreeSet<String>,
    /// Names this server may be addressed by where there is no TLS; empty, or with `*`
    /// among them: all. Others are answered 421, against DNS rebinding.
    pub host_whitelist: BTreeSet<String>,
}

impl AccessControl {
    /// The value of `Access-Control-Allow-Origin`, if the origin is allowed.
    fn allow_origin(&self, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
        if allows_all(&self.cors) {
            return Some(HeaderValue::from_static("*"));
        }
        let origin = origin?;
        self.cors.contains(origin.to_str().ok()?).then(|| origin.clone())
    }

    fn allows_host(&self, host: &str) -> bool {
        allows_all(&self.host_whitelist) || self.host_whitelist.contains(host)
    }
}

fn allows_all(names: &BTreeSet<String>) -> bool {
    names.is_empty() || names.contains("*")
}

/// One router for gRPC and HTTP: what says it is gRPC goes to `grpc`, all else to `http`,
/// through `access`.
pub fn one_port(grpc: Router, http: Router, access: AccessControl) -> Router {
    Router::new().fallback_service(OnePort { grpc, http: guarded(http, access) })
}

/// `http` behind `access`: for a port without gRPC, as `--listen-client-http-urls` are.
pub fn guarded(http: Router, access: AccessControl) -> Router {
    http.layer(middleware::from_fn_with_state(Arc::new(access), control))
}

/// `grpc` alone: for a clients' port beside `--listen-client-http-urls`. What is not gRPC
/// is answered 415 as by grpc-go, and not 200 with an error only gRPC can read: a probe
/// of this port must not take the member for healthy.
pub fn grpc_only(grpc: Router) -> Router {
    let refusal = || async {
        error(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "this port serves gRPC; HTTP is served where --listen-client-http-urls says",
        )
    };
    Router::new().fallback_service(OnePort { grpc, http: Router::new().fallback(refusal) })
}

#[derive(Clone)]
struct OnePort {
    grpc: Router,
    http: Router,
}

impl Service<Request> for OnePort {
    type Response = Response;
    type Error = Infallible;
    type Future = <Router as Service<Request>>::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Routers always are.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let is_grpc = request.version() == Version::HTTP_2
            && request
                .headers()
                .get(CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if is_grpc { self.grpc.call(request) } else { self.http.call(request) }
    }
}

async fn control(
    State(access): State<Arc<AccessControl>>,
    request: Request,
    next: Next,
) -> Response {
    let secure =
        request.extensions().get::<Arc<Connection>>().is_some_and(|connection| connection.tls);
    if !secure {
        let host = hostname(&request);
        if !access.allows_host(host) {
            tracing::warn!(host, "HTTP request rejected: --host-whitelist does not name its host");
            return error(StatusCode::MISDIRECTED_REQUEST, &misdirected(host));
        }
    }
    let origin = access.allow_origin(request.headers().get(ORIGIN));
    let mut response = if request.method() == Method::OPTIONS {
        StatusCode::OK.into_response()
    } else {
        next.run(request).await
    };
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.append(
            HeaderName::from_static("access-control-allow-methods"),
            HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE"),
        );
        headers.append(HeaderName::from_static("access-control-allow-origin"), origin);
        headers.append(
            HeaderName::from_static("access-control-allow-headers"),
            HeaderValue::from_static("accept, content-type, authorization"),
        );
    }
    response
}

/// The host a request is addressed to, without the port.
fn hostname(request: &Request) -> &str {
    let host = match request.uri().authority() {
        Some(authority) => authority.as_str(),
        None => request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default(),
    };
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains(':') => name,
        // An IPv6 address stands in brackets when there is a port.
        Some((name, _)) => match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
            Some(address) => address,
            None => host,
        },
        None => host,
    }
}

/// Why a request is answered 421, for whoever looks at it with a browser.
fn misdirected(host: &str) -> String {
    format!(
        "\nThe request arrived, but the name in its Host header is not one of this server's.\n\n\
         Either enable TLS, where any name will do, or name it:\n  --host-whitelist {host:?}\n\n\
         This protects against DNS rebinding (CVE-2018-5702).\n"
    )
}
