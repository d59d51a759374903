//! What happens to every gRPC call before and after its service sees it.
//!
//! ```text
//!            ┌────────────────────────── Intercept ──────────────────────────┐
//! request ──>│ known method? · count · learner · client-api-version · hasleader│
//!            │   └─ RequestBody: counts messages and bytes, refuses large ones ──> service
//! response <─│ ResponseBody: counts, and ends the stream at the deadline or  │<── service
//!            │   when the leader is lost                                     │
//!            └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! etcd does this in grpc-go and its interceptors, and a client can tell: by the
//! text of "unknown service", by the code of a message that is too large, by
//! `context deadline exceeded`, by a stream with `hasleader: true` that ends when
//! there is no leader. So the texts and the order of the checks are theirs.
//!
//! Invariants:
//! - Each call of a known method is counted as handled exactly once, with the code
//!   the client was sent, or `Canceled` when it went away first.
//! - A unary call costs no allocation here: messages are counted by looking at
//!   their five-byte prefixes as they pass. A deadline costs one, as does the leader
//!   watch of a stream.
//! - The layer never looks inside a message.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use tokio::sync::watch;
use tokio::time::Sleep;
use tokio_stream::Stream as _;
use tokio_stream::wrappers::WatchStream;
use tonic::codegen::BoxFuture;
use tonic::{Code, Status};

use super::listener::Connection;
use super::status::status;
use crate::error::Error;
use crate::metrics::{GrpcMethod, Metrics};

#[cfg(test)]
mod tests;

/// How often in a row, one election timeout apart, there must be no leader
/// before running streams that asked for one are ended. New calls are refused at
/// once; a stream is dearer to set up again.
const LEADERLESS_CHECKS: u32 = 3;

/// What a member answers that only listens, as far as a path tells: of ranges, those alone
/// that are serializable, which the KV service sees to.
const ANSWERED_BY_LEARNERS: [&str; 3] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.Maintenance/Status",
    "/etcdserverpb.Maintenance/Snapshot",
];

/// A response before [`Intercept`] has seen it.
pub(super) type Response = http::Response<tonic::body::Body>;

/// The services behind the layer.
pub(super) trait Dispatch: Send + Sync + 'static {
    /// Hands a request to its service; `None` when no service has that path.
    fn dispatch(
        &self,
        request: http::Request<RequestBody>,
    ) -> Option<BoxFuture<Response, Infallible>>;

    /// Whether a service has this full name, such as `etcdserverpb.KV`.
    fn has_service(&self, name: &str) -> bool;
}

/// What the layer has to know about its server.
pub(super) struct Settings {
    /// Largest message a client may send, in bytes.
    pub(super) max_message_bytes: u32,
    /// Time between two looks for a leader.
    pub(super) election_timeout: Duration,
    /// A unary call that takes longer is worth a warning.
    pub(super) slow_unary: Duration,
    /// Whether this member knows a leader.
    pub(super) has_leader: Box<dyn Fn() -> bool + Send + Sync>,
    /// Whether this member only listens.
    pub(super) is_learner: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The layer with the services inside.
pub(super) struct Intercept<D> {
    services: Arc<D>,
    shared: Arc<Shared>,
}

/// What calls share. No call changes it, apart from starting the leader watch.
struct Shared {
    settings: Settings,
    metrics: Arc<Metrics>,
    /// Sends a value each time the streams that need a leader have to end.
    leader_lost: watch::Sender<()>,
    watching_leader: AtomicBool,
}

impl<D> Clone for Intercept<D> {
    fn clone(&self) -> Self {
        Intercept { services: self.services.clone(), shared: self.shared.clone() }
    }
}

impl<D: Dispatch> Intercept<D> {
    pub(super) fn new(services: D, settings: Settings, metrics: Arc<Metrics>) -> Intercept<D> {
        let shared = Shared {
            settings,
            metrics,
            leader_lost: watch::Sender::new(()),
            watching_leader: AtomicBool::new(false),
        };
        Intercept { services: Arc::new(services), shared: Arc::new(shared) }
    }

    /// Begins a call.
    fn begin(&self, request: http::Request<axum::body::Body>) -> Call {
        let path = request.uri().path();
        let Some(method) = self.shared.metrics.grpc.method(path).cloned() else {
            return Call::refused(&self.unknown(path), None);
        };
        method.started.inc();
        let streaming = method.streaming;
        let accounting = Accounting {
            shared: self.shared.clone(),
            method: method.clone(),
            path: request.uri().path_and_query().cloned(),
            connection: request.extensions().get().cloned(),
            started: Instant::now(),
            sent_bytes: 0,
            handled: false,
        };
        let (deadline, needs_leader) = match self.check(path, request.headers(), streaming) {
            Ok(wishes) => wishes,
            Err(status) => return Call::refused(&status, Some(accounting)),
        };
        let stops = Stops {
            deadline: deadline.map(|after| Box::pin(tokio::time::sleep(after))),
            leader_lost: (needs_leader && streaming).then(|| Shared::watch_leader(&self.shared)),
        };
        let shared = self.shared.clone();
        let messages = Messages::default();
        let request = request.map(|body| RequestBody { body, messages, shared, method });
        match self.services.dispatch(request) {
            Some(answer) => Call { answer, stops, accounting: Some(accounting) },
            None => Call::refused(&Status::unimplemented("unknown service"), Some(accounting)),
        }
    }

    /// What the client asks for in its metadata: a deadline, and whether it needs
    /// a leader. Refuses what etcd refuses, in etcd's order.
    fn check(
        &self,
        path: &str,
        headers: &HeaderMap,
        streaming: bool,
    ) -> Result<(Option<Duration>, bool), Status> {
        let deadline = deadline(headers)?;
        if (self.shared.settings.is_learner)() && !ANSWERED_BY_LEARNERS.contains(&path) {
            return Err(status(Error::LearnerUnsupported));
        }
        let version = headers
            .get("client-api-version")
            .map(|version| std::str::from_utf8(version.as_bytes()))
            .transpose()
            .map_err(|_| status(Error::InvalidClientApiVersion))?;
        self.shared.metrics.count_client_request(streaming, version);
        let needs_leader = headers.get("hasleader").is_some_and(|value| value == "true");
        if needs_leader && !(self.shared.settings.has_leader)() {
            return Err(status(Error::NoLeader));
        }
        Ok((deadline, needs_leader))
    }

    /// grpc-go's answer to a path that no method has.
    fn unknown(&self, path: &str) -> Status {
        let path = path.strip_prefix('/').unwrap_or(path);
        Status::unimplemented(match path.rsplit_once('/') {
            None => format!("malformed method name: {path:?}"),
            Some((service, method)) if self.services.has_service(service) => {
                format!("unknown method {method} for service {service}")
            }
            Some((service, _)) => format!("unknown service {service}"),
        })
    }
}

impl<D: Dispatch> tower::Service<http::Request<axum::body::Body>> for Intercept<D> {
    type Response = http::Response<ResponseBody>;
    type Error = Infallible;
    type Future = Call;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<axum::body::Body>) -> Call {
        self.begin(request)
    }
}

/// Reads `grpc-timeout`: up to eight digits and a unit.
fn deadline(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let malformed = || Status::internal(format!("malformed grpc-timeout: {value:?}"));
    let text = value.to_str().map_err(|_| malformed())?;
    let (digits, unit) = text
        .len()
        .checked_sub(1)
        .filter(|digits| (1..=8).contains(digits))
        .and_then(|digits| text.split_at_checked(digits))
        .ok_or_else(malformed)?;
    // At most eight digits, so that neither hours nor the sign of a number matter.
    let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>());
    let Some(Ok(number)) = number else { return Err(malformed()) };
    Ok(Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return Err(malformed()),
    }))
}

impl Shared {
    /// Yields when streams that need a leader have to end. The task that looks for
    /// the leader starts with the first such stream and ends with the layer.
    fn watch_leader(shared: &Arc<Shared>) -> WatchStream<()> {
        if !shared.watching_leader.swap(true, Ordering::Relaxed) {
            tokio::spawn(look_for_leader(Arc::downgrade(shared)));
        }
        WatchStream::from_changes(shared.leader_lost.subscribe())
    }
}

async fn look_for_leader(shared: Weak<Shared>) {
    let mut leaderless = 0;
    while let Some(period) = shared.upgrade().map(|shared| shared.settings.election_timeout) {
        tokio::time::sleep(period).await;
        let Some(shared) = shared.upgrade() else { return };
        leaderless = if (shared.settings.has_leader)() { 0 } else { leaderless + 1 };
        if leaderless >= LEADERLESS_CHECKS {
            leaderless = 0;
            shared.leader_lost.send_replace(());
        }
    }
}

/// What ends a call from outside.
#[derive(Default)]
struct Stops {
    deadline: Option<Pin<Box<Sleep>>>,
    leader_lost: Option<WatchStream<()>>,
}

impl Stops {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Status::deadline_exceeded("context deadline exceeded"));
        }
        if let Some(lost) = &mut self.leader_lost
            && let Poll::Ready(Some(())) = Pin::new(lost).poll_next(cx)
        {
            return Poll::Ready(status(Error::NoLeader));
        }
        Poll::Pending
    }
}

/// The books of one call.
struct Accounting {
    shared: Arc<Shared>,
    method: Arc<GrpcMethod>,
    path: Option<http::uri::PathAndQuery>,
    /// `None` in process.
    connection: Option<Arc<Connection>>,
    started: Instant,
    sent_bytes: u64,
    handled: bool,
}

impl Accounting {
    fn sent(&mut self, passed: Passed) {
        self.method.msg_sent.inc_by(passed.messages);
        self.shared.metrics.network_client_grpc_sent_bytes_total.inc_by(passed.bytes);
        self.sent_bytes += passed.bytes;
    }

    /// The call is over.
    fn handled(&mut self, code: Code) {
        if std::mem::replace(&mut self.handled, true) {
            return;
        }
        let took = self.started.elapsed();
        self.method.handled(code, took);
        if !self.method.streaming && took > self.shared.settings.slow_unary {
            let remote = self.connection.as_ref().and_then(|connection| connection.remote);
            tracing::warn!(
                remote = remote.map(tracing::field::display),
                method = self.path.as_ref().map_or("", |path| path.as_str()),
                took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                threshold_ms = u64::try_from(self.shared.settings.slow_unary.as_millis())
                    .unwrap_or(u64::MAX),
                code = ?code,
                response_size_bytes = self.sent_bytes,
                "request took too long"
            );
        }
    }
}

impl Drop for Accounting {
    /// A call that nobody waits for any more was cancelled by its client.
    fn drop(&mut self) {
        self.handled(Code::Cancelled);
    }
}

/// A call until its response begins.
pub(super) struct Call {
    answer: BoxFuture<Response, Infallible>,
    stops: Stops,
    accounting: Option<Accounting>,
}

impl Call {
    fn refused(status: &Status, accounting: Option<Accounting>) -> Call {
        let response = status.clone().into_http();
        let answer = Box::pin(std::future::ready(Ok(response)));
        Call { answer, stops: Stops::default(), accounting }
    }
}

impl Future for Call {
    type Output = Result<http::Response<ResponseBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let call = &mut *self;
        let response = match call.answer.as_mut().poll(cx) {
            Poll::Ready(Ok(response)) => response,
            Poll::Ready(Err(never)) => match never {},
            Poll::Pending => ready!(call.stops.poll(cx)).into_http(),
        };
        // A response without body carries its status here.
        let code = response.headers().get(Status::GRPC_STATUS).map(code);
        let mut accounting = call.accounting.take();
        if let (Some(accounting), Some(code)) = (&mut accounting, code) {
            accounting.handled(code);
            return Poll::Ready(Ok(response.map(|body| ResponseBody { body, running: None })));
        }
        let running = accounting.map(|accounting| {
            // The answer of a unary call is complete, so nothing is left to stop.
            let stops = if accounting.method.streaming {
                std::mem::take(&mut call.stops)
            } else {
                Stops::default()
            };
            Running { accounting, stops, messages: Messages::default() }
        });
        Poll::Ready(Ok(response.map(|body| ResponseBody { body, running })))
    }
}

fn code(value: &http::HeaderValue) -> Code {
    Code::from_bytes(value.as_bytes())
}

/// A request's body on its way to the service: messages and bytes are counted, and a
/// message beyond the limit fails with grpc-go's words before it is read into memory.
pub(super) struct RequestBody {
    body: axum::body::Body,
    messages: Messages,
    shared: Arc<Shared>,
    method: Arc<GrpcMethod>,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        Poll::Ready(match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            None => None,
            Some(Err(error)) => Some(Err(Status::from_error(error.into()))),
            Some(Ok(frame)) => {
                let limit = this.shared.settings.max_message_bytes;
                let data = frame.data_ref().map_or(&[][..], |data| data);
                match this.messages.pass(data, limit) {
                    Ok(passed) => {
                        let metrics = &this.shared.metrics;
                        this.method.msg_received.inc_by(passed.messages);
                        metrics.network_client_grpc_received_bytes_total.inc_by(passed.bytes);
                        Some(Ok(frame))
                    }
                    Err(size) => Some(Err(Status::resource_exhausted(format!(
                        "grpc: received message larger than max ({size} vs. {limit})"
                    )))),
                }
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A response's body on its way to the client.
pub(super) struct ResponseBody {
    body: tonic::body::Body,
    /// `None` once the status is known.
    running: Option<Running>,
}

struct Running {
    accounting: Accounting,
    stops: Stops,
    messages: Messages,
}

impl ResponseBody {
    fn end(&mut self, code: Code) {
        if let Some(mut running) = self.running.take() {
            running.accounting.handled(code);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Some(running) = &mut this.running
            && let Poll::Ready(status) = running.stops.poll(cx)
        {
            // Dropping the service's stream is what tells the service.
            this.body = tonic::body::Body::empty();
            this.end(status.code());
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(
                status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)),
            ));
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    if let Some(running) = &mut this.running
                        && let Ok(passed) = running.messages.pass(data, u32::MAX)
                    {
                        running.accounting.sent(passed);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.end(trailers.get(Status::GRPC_STATUS).map_or(Code::Unknown, code));
                    // Nothing comes after trailers: the service may end its stream.
                    this.body = tonic::body::Body::empty();
                }
            }
            Some(Err(status)) => this.end(status.code()),
            None => this.end(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.running.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// Finds gRPC's messages in a body as its pieces pass: each is one byte of
/// flags, four of length (big endian), and as many bytes as they say.
#[derive(Default)]
struct Messages {
    /// The prefix so far, its unread bytes zero.
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    /// Bytes of the present message that are still to come.
    rest: u32,
}

const PREFIX_BYTES: usize = 5;

/// What [`Messages::pass`] saw go by.
#[derive(Debug, Default, PartialEq, Eq)]
struct Passed {
    /// Messages completed.
    messages: u64,
    /// Bytes of messages, without prefixes.
    bytes: u64,
}

impl Messages {
    /// Takes note of a piece. An error is the size of a message beyond `limit`.
    fn pass(&mut self, mut piece: &[u8], limit: u32) -> Result<Passed, u32> {
        let mut passed = Passed::default();
        loop {
            if self.rest > 0 {
                let take = piece.len().min(self.rest as usize);
                piece = piece.split_at_checked(take).map_or(&[], |(_, later)| later);
                passed.bytes += take as u64;
                self.rest -= u32::try_from(take).unwrap_or(self.rest);
                if self.rest > 0 {
                    return Ok(passed);
                }
                passed.messages += 1;
            }
            let Some((byte, later)) = piece.split_first() else { return Ok(passed) };
            piece = later;
            if let Some(slot) = self.prefix.get_mut(self.prefix_len) {
                *slot = *byte;
            }
            self.prefix_len += 1;
            if self.prefix_len == PREFIX_BYTES {
                let [_flags, length @ ..] = self.prefix;
                let length = u32::from_be_bytes(length);
                if length > limit {
                    return Err(length);
                }
                self.prefix_len = 0;
                self.rest = length;
                passed.messages += u64::from(length == 0);
            }
        }
    }
}
