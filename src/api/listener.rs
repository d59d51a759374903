//! Listening, accepting, and one HTTP connection after the other.
//!
//! ```text
//!             slot free?          first bytes                ┌ HTTP/1.1 ┐
//! accept ──▶ (Semaphore) ──▶ TLS or not, h1 or h2 ──▶ hyper ─┤          ├──▶ axum::Router
//!                                                            └ HTTP/2   ┘
//! ```
//!
//! One port serves everything: gRPC over HTTP/2 (with prior knowledge where there is no
//! TLS), and health probes, metrics and the JSON gateway over HTTP/1.1 or HTTP/2.
//!
//! - The accept loop ends on shutdown and for no other reason: an error of `accept` is
//!   logged, and running out of descriptors is waited out.
//! - Nagle's algorithm is off on every accepted socket: with it a call takes 40 ms.
//! - The time until a connection has said which protocol it speaks is limited, and so is
//!   the number of connections ([`ServeOptions::max_connections`]).
//! - Shutdown stops accepting at once, sends GOAWAY or `Connection: close`, waits for
//!   requests under way no longer than [`ServeOptions::drain_timeout`], then drops them.
//! - Every request carries an `Arc<`[`Connection`]`>` in its extensions.
//!
//! It does not know what it serves: that is the router's.

#[cfg(test)]
mod tests;

use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::Service as _;
use url::Url;

use super::authority::PlainAuthority;
use super::gather::Gather;
use super::tls::{Tls, common_name};
use super::writes_pass::writes_pass;

/// Descriptors kept back from client connections, for the log, the checkpoint and peers.
pub const RESERVED_DESCRIPTORS: u64 = 150;
/// Connections when the system does not say how many descriptors there may be.
const DEFAULT_MAX_CONNECTIONS: usize = 10_000;
/// Connections the kernel holds until they are accepted; it caps this itself.
const BACKLOG: i32 = 4096;
/// Time between TCP keepalive probes on an idle connection.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// Pause after `accept` failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Least time between two warnings of the accept loop about the same thing.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// What HTTP/2 begins with, before any frame.
pub(super) const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of TLS: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// The answer to HTTP where TLS is expected, as Go's server words it.
const PLAINTEXT_REFUSAL: &[u8] =
    b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
/// How long, and for how many bytes, the rest of a refused request is read: closing a
/// socket with unread data would take the answer back.
const REFUSAL_LINGER: Duration = Duration::from_secs(1);
const REFUSAL_LINGER_BYTES: u64 = 64 * 1024;

/// Streams reset before they were accepted, per connection, until it is closed. Clients
/// that cancel many calls at once reach the library's own 20.
const MAX_PENDING_RESET_STREAMS: usize = 10_000;
/// Bytes one request stream may have under way: enough for the largest request.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Bytes all request streams of a connection may have under way.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Bytes of a reply buffered per stream before its producer waits. Lists are tens of
/// megabytes: larger steps mean fewer wake-ups.
const SEND_BUFFER_BYTES: usize = 1024 * 1024;

/// `--socket-reuse-port` and `--socket-reuse-address`.
#[derive(Debug, Clone, Copy, Default)]
pub struct SocketOptions {
    /// Let several sockets listen on the port.
    pub reuse_port: bool,
    /// Bind although old connections of the port linger. On Unix this is always so, as
    /// it is in Go.
    pub reuse_address: bool,
}

/// Limits of a listener's connections.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Connections at a time; more wait in the kernel's backlog. The default is the limit
    /// of descriptors less [`RESERVED_DESCRIPTORS`].
    pub max_connections: usize,
    /// `--max-concurrent-streams`: calls at a time per HTTP/2 connection.
    pub max_concurrent_streams: u32,
    /// `--grpc-keepalive-interval`: time between pings on an HTTP/2 connection; zero sends
    /// none.
    pub keepalive_interval: Duration,
    /// `--grpc-keepalive-timeout`: how long a ping may go unanswered.
    pub keepalive_timeout: Duration,
    /// Time for a connection to name its protocol, and for a request's headers to arrive.
    pub header_read_timeout: Duration,
    /// Time for a TLS handshake.
    pub handshake_timeout: Duration,
    /// Time that requests under way get on shutdown.
    pub drain_timeout: Duration,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        let descriptors = getrlimit(Resource::Nofile).current;
        let max_connections = descriptors
            .and_then(|limit| usize::try_from(limit.saturating_sub(RESERVED_DESCRIPTORS)).ok())
            .map_or(DEFAULT_MAX_CONNECTIONS, |limit| limit.clamp(1, Semaphore::MAX_PERMITS));
        ServeOptions {
            max_connections,
            max_concurrent_streams: u32::MAX,
            keepalive_interval: Duration::from_secs(2 * 60 * 60),
            keepalive_timeout: Duration::from_secs(20),
            header_read_timeout: Duration::from_secs(5 * 60),
            handshake_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// The connection a request came on; handlers find it in the request's extensions as
/// `Arc<Connection>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// The client's address; `None` on a Unix socket.
    pub remote: Option<SocketAddr>,
    /// Whether it is encrypted.
    pub tls: bool,
    /// The common name of the client's verified certificate: etcd's user when clients
    /// authenticate by certificate.
    pub peer_common_name: Option<String>,
}

/// A bound socket that does not accept yet. Dropping it closes it.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<Tls>,
    url: Url,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _path: UnixPath },
}

/// The file of a Unix socket, removed on drop while it is still the one that was bound.
#[derive(Debug)]
struct UnixPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for UnixPath {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket's file");
        }
    }
}

impl Listener {
    /// Binds what a listen URL names: `http://host:port`, `https://host:port`,
    /// `unix://path` or `unixs://path`. Port 0 takes a free one; a socket file that an
    /// earlier run left behind is removed. `tls` is used by `https` and `unixs` and may be
    /// given to the others, which ignore it.
    ///
    /// Call it within a tokio runtime with I/O enabled.
    ///
    /// # Errors
    ///
    /// Each says the URL and what to change: no TLS for a TLS URL, another scheme, a host
    /// that does not resolve, an address in use or not ours, a file in the way.
    pub fn bind(url: &Url, tls: Option<Tls>, options: &SocketOptions) -> io::Result<Listener> {
        let invalid = |reason: &str| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("cannot listen on {url}: {reason}"))
        };
        let secure = match url.scheme() {
            "http" | "unix" => false,
            "https" | "unixs" => true,
            _ => return Err(invalid("the scheme must be http, https, unix or unixs")),
        };
        if secure && tls.is_none() {
            return Err(invalid("TLS needs --cert-file and --key-file, or --auto-tls"));
        }
        let explain = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot listen on {url}: {error}"))
        };

        let mut local = url.clone();
        let socket = if url.scheme().starts_with("unix") {
            let path =
                unix_path(url).ok_or_else(|| invalid("the path of the socket is missing"))?;
            bind_unix(&path).map_err(explain)?
        } else {
            let port = url.port_or_known_default().ok_or_else(|| invalid("no port"))?;
            let listener = bind_tcp(url, port, options).map_err(explain)?;
            let port = listener.local_addr()?.port();
            local.set_port(Some(port)).map_err(|()| invalid("it takes no port"))?;
            Socket::Tcp(listener)
        };
        Ok(Listener { socket, tls: tls.filter(|_| secure), url: local })
    }

    /// The URL that was bound, with the port that was taken.
    pub fn local_url(&self) -> &Url {
        &self.url
    }

    async fn accept(&self) -> io::Result<(Stream, Option<SocketAddr>)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, remote) = listener.accept().await?;
                let keepalive =
                    TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
                let set = stream
                    .set_nodelay(true)
                    .and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
                if let Err(error) = set {
                    // The client is gone already; reading will say so.
                    tracing::debug!(%remote, %error, "cannot set socket options");
                }
                Ok((Stream::Tcp(stream), Some(remote)))
            }
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Ok((Stream::Unix(stream), None))
            }
        }
    }
}

/// `unix:///run/kvorum.sock` is absolute, `unix://kvorum.sock` relative; a colon may be
/// part of the name, as in etcd's `unix://localhost:2379`.
pub(super) fn unix_path(url: &Url) -> Option<PathBuf> {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let path = format!("{host}{port}{}", url.path());
    (!path.is_empty()).then(|| PathBuf::from(path))
}

fn bind_unix(path: &Path) -> io::Result<Socket> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => {
            let reason = format!("{} exists and is not a socket; remove it", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    let meta = fs::symlink_metadata(path)?;
    let path = UnixPath { path: path.to_owned(), inode: (meta.dev(), meta.ino()) };
    Ok(Socket::Unix { listener, _path: path })
}

fn bind_tcp(url: &Url, port: u16, options: &SocketOptions) -> io::Result<TcpListener> {
    let mut addresses = url.socket_addrs(|| Some(port))?;
    // Go takes the IPv4 address of a name that has both.
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let Some(&address) = addresses.first() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    };
    let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Go sets it on every listener, so that a restart need not wait for old connections.
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves `router` on `listener` until `shutdown` completes and connections are drained;
/// the task ends then and the socket is closed.
///
/// Call it within a tokio runtime. Aborting the task drops all connections.
pub fn serve(
    listener: Listener,
    router: Router,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(run(listener, router, options, shutdown))
}

async fn run(
    listener: Listener,
    router: Router,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) {
    let url = listener.url.clone();
    let (stop, stopped) = watch::channel(false);
    let builder = builder(&options);
    let shared = Arc::new(Shared { router, builder, options, stopped, kept_out: Mutex::default() });
    let slots = Arc::new(Semaphore::new(shared.options.max_connections));
    let mut connections = JoinSet::new();
    let mut warned = Warnings::default();
    let mut shutdown = pin!(shutdown);

    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
            accepted = accept(&listener, &slots) => accepted,
        };
        match accepted {
            Ok((stream, remote, slot)) => {
                if slots.available_permits() == 0 && warned.due() {
                    tracing::warn!(
                        %url,
                        max_connections = shared.options.max_connections,
                        "all connections are taken: new clients wait; raise the limit of open \
                         files (ulimit -n)"
                    );
                }
                let (shared, tls) = (Arc::clone(&shared), listener.tls.clone());
                connections.spawn(async move {
                    shared.connection(stream, remote, tls).await;
                    drop(slot);
                });
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                if warned.due() {
                    tracing::warn!(%url, %error, "cannot accept connections, trying again");
                }
                // The sockets of the connections that end meanwhile are what is waited for.
                tokio::select! {
                    () = &mut shutdown => break,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }

    drop(listener);
    // Fails only when no connection is left to hear it.
    let _ = stop.send(true);
    let drained = timeout(shared.options.drain_timeout, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    });
    if drained.await.is_err() {
        tracing::info!(%url, connections = connections.len(), "dropping connections in use");
        connections.shutdown().await;
    }
}

/// A connection and its slot; cancelling it loses neither.
async fn accept(
    listener: &Listener,
    slots: &Arc<Semaphore>,
) -> io::Result<(Stream, Option<SocketAddr>, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, remote) = listener.accept().await?;
    Ok((stream, remote, slot))
}

/// Whether somebody who speaks TLS was turned away, or turned this server away, for their
/// certificates or what they can encrypt. Others went away, or speak something else.
fn is_kept_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData)
}

/// Whether `accept` failed because of the connection it would have returned.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection was dropped because its handler panicked");
    }
}

/// Lets a warning through now and then.
#[derive(Default)]
struct Warnings(Option<Instant>);

impl Warnings {
    fn due(&mut self) -> bool {
        let due = self.0.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// What the connections of a listener have in common.
struct Shared {
    router: Router,
    builder: auto::Builder<TokioExecutor>,
    options: ServeOptions,
    stopped: watch::Receiver<bool>,
    /// About certificates that are signed and not allowed.
    kept_out: Mutex<Warnings>,
}

fn builder(options: &ServeOptions) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).title_case_headers(true);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(options.header_read_timeout);
    let interval = options.keepalive_interval;
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(options.max_concurrent_streams)
        .max_pending_accept_reset_streams(MAX_PENDING_RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval((!interval.is_zero()).then_some(interval))
        .keep_alive_timeout(options.keepalive_timeout);
    builder
}

impl Shared {
    /// Serves one connection to its end. What goes wrong concerns its client alone.
    async fn connection(&self, stream: Stream, remote: Option<SocketAddr>, tls: Option<Tls>) {
        let mut stopped = self.stopped.clone();
        let opened = tokio::select! {
            // Nothing has been asked yet that a shutdown would have to wait for.
            () = raised(&mut stopped) => return,
            opened = self.open(stream, remote, tls) => opened,
        };
        match opened {
            Ok(None) => {}
            Ok(Some((Opened::Plain(stream), http2, connection))) => {
                self.requests(stream, http2, connection).await;
            }
            Ok(Some((Opened::Tls(stream), http2, connection))) => {
                self.requests(*stream, http2, connection).await;
            }
            // A member that is kept out tries ten times a second.
            Err(error) if is_kept_out(&error) && self.kept_out.lock().due() => {
                tracing::warn!(?remote, %error, "connection rejected");
            }
            Err(error) => tracing::debug!(?remote, %error, "connection rejected"),
        }
    }

    /// The handshake, if any, and the choice of the protocol, which is made by what the
    /// client sends and not by what it negotiated. `None` when the client went away or was
    /// refused.
    async fn open(
        &self,
        stream: Stream,
        remote: Option<SocketAddr>,
        tls: Option<Tls>,
    ) -> io::Result<Option<(Opened, bool, Connection)>> {
        let mut stream = Sniffed::new(stream);
        let header_read_timeout = self.options.header_read_timeout;
        let Some(tls) = tls else {
            let http2 = timeout(header_read_timeout, stream.is_http2()).await??;
            let plain = !matches!(stream.seen(), [] | [TLS_HANDSHAKE, ..]);
            let connection = Connection { remote, tls: false, peer_common_name: None };
            return Ok(plain.then_some((Opened::Plain(stream), http2, connection)));
        };
        let config = tls.server_config().await;
        let handshake = async {
            stream.sniff().await?;
            match stream.seen() {
                [TLS_HANDSHAKE, ..] => {}
                // A method: someone speaks HTTP.
                [b'A'..=b'Z', ..] => return refuse_plaintext(stream).await.map(|()| None),
                _ => return Ok(None),
            }
            TlsAcceptor::from(config).accept(stream).await.map(Some)
        };
        let Some(stream) = timeout(self.options.handshake_timeout, handshake).await?? else {
            return Ok(None);
        };
        let (_, session) = stream.get_ref();
        let certificates = session.peer_certificates();
        if !tls.admits(certificates) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "client certificate authentication failed",
            ));
        }
        let peer_common_name =
            certificates.and_then(<[_]>::first).and_then(|certificate| common_name(certificate));
        let connection = Connection { remote, tls: true, peer_common_name };
        let mut stream = Sniffed::new(stream);
        let http2 = timeout(header_read_timeout, stream.is_http2()).await??;
        let any = !stream.seen().is_empty();
        Ok(any.then(|| (Opened::Tls(Box::new(stream)), http2, connection)))
    }

    async fn requests<S>(&self, stream: S, http2: bool, connection: Connection)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let builder = self.builder.clone();
        let service = Requests { router: self.router.clone(), connection: Arc::new(connection) };
        if http2 {
            let stream = Gather::new(PlainAuthority::new(stream));
            self.serve(builder.http2_only(), stream, service).await;
        } else {
            self.serve(builder.http1_only(), Gather::new(stream), service).await;
        }
    }

    async fn serve<S>(&self, builder: auto::Builder<TokioExecutor>, stream: S, service: Requests)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut stopped = self.stopped.clone();
        let ended = tokio::select! {
            ended = serving.as_mut() => ended,
            () = raised(&mut stopped) => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }
}

/// Waits until the listener is shut down, or gone.
async fn raised(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// A connection that is ready for requests.
enum Opened {
    Plain(Sniffed<Stream>),
    Tls(Box<Sniffed<TlsStream<Sniffed<Stream>>>>),
}

/// Hands requests to the router, marked with the connection they came on.
struct Requests {
    router: Router,
    connection: Arc<Connection>,
}

impl hyper::service::Service<http::Request<Incoming>> for Requests {
    type Response = <Router as tower::Service<http::Request<Incoming>>>::Response;
    type Error = <Router as tower::Service<http::Request<Incoming>>>::Error;
    type Future = <Router as tower::Service<http::Request<Incoming>>>::Future;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(Arc::clone(&self.connection));
        // A router is always ready.
        self.router.clone().call(request)
    }
}

async fn refuse_plaintext(mut stream: Sniffed<Stream>) -> io::Result<()> {
    stream.write_all(PLAINTEXT_REFUSAL).await?;
    stream.shutdown().await?;
    let (mut rest, mut sink) = (stream.take(REFUSAL_LINGER_BYTES), tokio::io::sink());
    // Either way the connection is closed.
    let _ = timeout(REFUSAL_LINGER, tokio::io::copy(&mut rest, &mut sink)).await;
    Ok(())
}

/// A stream whose first bytes have been looked at and are read again.
struct Sniffed<S> {
    stream: S,
    first: [u8; HTTP2_PREFACE.len()],
    filled: usize,
    replayed: usize,
}

impl<S: AsyncRead + Unpin> Sniffed<S> {
    fn new(stream: S) -> Sniffed<S> {
        Sniffed { stream, first: [0; HTTP2_PREFACE.len()], filled: 0, replayed: 0 }
    }

    /// The bytes looked at so far.
    fn seen(&self) -> &[u8] {
        self.first.get(..self.filled).unwrap_or_default()
    }

    /// Reads some more of the first bytes; whether there were any.
    async fn sniff(&mut self) -> io::Result<bool> {
        let space = self.first.get_mut(self.filled..).unwrap_or_default();
        let read = self.stream.read(space).await?;
        self.filled += read;
        Ok(read > 0)
    }

    /// Whether the client begins as HTTP/2 does; waits for no more than it takes to tell.
    async fn is_http2(&mut self) -> io::Result<bool> {
        loop {
            let seen = self.seen();
            if seen == HTTP2_PREFACE || !HTTP2_PREFACE.starts_with(seen) {
                return Ok(seen == HTTP2_PREFACE);
            }
            if !self.sniff().await? {
                return Ok(false);
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sniffed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.replayed == self.filled {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let this = &mut *self;
        let rest = this.first.get(this.replayed..this.filled).unwrap_or_default();
        let step = rest.get(..rest.len().min(buf.remaining())).unwrap_or_default();
        buf.put_slice(step);
        this.replayed += step.len();
        Poll::Ready(Ok(()))
    }
}

writes_pass!(Sniffed);

/// A connected socket.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
