//! Connections to peer URLs.
//!
//! ```text
//! http://host:port ── TCP ──────────┐
//! https://host:port ─ TCP ── TLS ───┼── HTTP/2 with pings ──▶ a tonic channel
//! unix://path ─────── socket file ──┘
//! ```
//!
//! The other side of what [`listener`](super::listener) binds, for [`crate::net`], which does
//! not know how a connection is made. A connection that leads nowhere is noticed soon: by
//! [`CONNECT_TIMEOUT`] while it is made, later by pings, and by the kernel when what was
//! written is not acknowledged.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};
use url::{Host, Url};

use super::listener::{Stream, unix_path};
use super::tls::client::ClientTls;
use crate::net::{BadUrl, Connector};

/// Time for a connection to come up: the name, TCP and TLS.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two pings on a connection to a peer, used or not.
pub const PING_INTERVAL: Duration = Duration::from_secs(1);
/// How long a ping may go unanswered before the connection is given up.
pub const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// What a Unix socket's peer is called when it shows a certificate.
const LOCALHOST: &str = "localhost";

/// Where a peer URL leads.
#[derive(Clone)]
struct Target {
    place: Place,
    /// Whom the certificate must be for.
    host: String,
    tls: Option<ClientTls>,
}

#[derive(Clone)]
enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// What makes channels to peer URLs; `tls` is needed for `https` and `unixs`. A channel must
/// be made within a tokio runtime, where its tasks run.
pub fn connector(tls: Option<ClientTls>) -> Connector {
    connector_within(CONNECT_TIMEOUT, tls)
}

/// As [`connector`], with another time for a connection to come up.
pub fn connector_within(connect_timeout: Duration, tls: Option<ClientTls>) -> Connector {
    std::sync::Arc::new(move |url| {
        let target = target(url, tls.as_ref())
            .map_err(|reason| BadUrl { url: url.to_owned(), reason: reason.to_owned() })?;
        Ok(channel(target, connect_timeout))
    })
}

fn target(url: &str, tls: Option<&ClientTls>) -> Result<Target, &'static str> {
    let url = Url::parse(url).map_err(|_| "it is no URL")?;
    let secure = match url.scheme() {
        "http" | "unix" => false,
        "https" | "unixs" => true,
        _ => return Err("the scheme must be http, https, unix or unixs"),
    };
    let tls = if secure {
        let needed = "TLS needs --peer-cert-file and --peer-trusted-ca-file, or --peer-auto-tls";
        Some(tls.ok_or(needed)?.clone())
    } else {
        None
    };
    if url.scheme().starts_with("unix") {
        let path = unix_path(&url).ok_or("the path of the socket is missing")?;
        return Ok(Target { place: Place::Unix(path), host: LOCALHOST.to_owned(), tls });
    }
    // IPv6 without its brackets, as the resolver and certificates have it.
    let host = match url.host().ok_or("the host is missing")? {
        Host::Ipv6(address) => address.to_string(),
        host => host.to_string(),
    };
    let port = url.port_or_known_default().ok_or("the port is missing")?;
    Ok(Target { place: Place::Tcp { host: host.clone(), port }, host, tls })
}

fn channel(target: Target, connect_timeout: Duration) -> Channel {
    let connect = tower::service_fn(move |_: Uri| {
        let target = target.clone();
        async move { target.connect().await.map(TokioIo::new) }
    });
    // The name is never resolved: the connector goes elsewhere.
    Endpoint::from_static("http://peer.kvorum.invalid")
        .connect_timeout(connect_timeout)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(connect)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Target {
    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        let stream = match &self.place {
            Place::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                #[cfg(target_os = "linux")]
                SockRef::from(&stream).set_tcp_user_timeout(Some(PING_INTERVAL + PING_TIMEOUT))?;
                Stream::Tcp(stream)
            }
            Place::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
        };
        match &self.tls {
            None => Ok(Box::new(stream)),
            Some(tls) => Ok(Box::new(tls.connect(&self.host, stream).await?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_lead_to_sockets() {
        let place = |url: &str| match target(url, None).map(|target| target.place) {
            Ok(Place::Tcp { host, port }) => format!("{host} {port}"),
            Ok(Place::Unix(path)) => path.display().to_string(),
            Err(reason) => reason.to_owned(),
        };
        assert_eq!(place("http://10.0.0.1:2380"), "10.0.0.1 2380");
        assert_eq!(place("http://[::1]:2380"), "::1 2380");
        assert_eq!(place("http://member.example:80"), "member.example 80");
        assert_eq!(place("unix:///run/peer.sock"), "/run/peer.sock");
        assert!(place("https://10.0.0.1:2380").contains("--peer-cert-file"));
        assert!(place("ftp://10.0.0.1:2380").contains("scheme"));
        assert!(place("10.0.0.1").contains("no URL"));
    }
}
