use std::net::Ipv4Addr;

use axum::body::Body;
use axum::extract::Request;
use axum::routing::{any, get};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::super::tls::{RELOAD_CHECK_INTERVAL, TlsSettings, tests::TestCa};
use super::*;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A listener that is served until this is dropped or stopped.
struct Server {
    url: Url,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    fn start(url: &str, tls: Option<Tls>, options: ServeOptions) -> Server {
        Server::serving(router(), url, tls, options)
    }

    fn serving(router: Router, url: &str, tls: Option<Tls>, options: ServeOptions) -> Server {
        let url = Url::parse(url).unwrap();
        let listener = Listener::bind(&url, tls, &SocketOptions::default()).unwrap();
        let url = listener.local_url().clone();
        let (stop, stopped) = oneshot::channel();
        let task = serve(listener, router, options, async {
            let _ = stopped.await;
        });
        Server { url, stop: Some(stop), task }
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.url.port().unwrap())).await.unwrap()
    }

    fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }
}

/// `/who` tells the connection, `/slow` answers never, anything else its version.
fn router() -> Router {
    Router::new()
        .route(
            "/who",
            get(|request: Request| async move {
                let connection = request.extensions().get::<Arc<Connection>>().unwrap();
                format!("{} {:?}", connection.tls, connection.peer_common_name)
            }),
        )
        .route("/slow", get(std::future::pending::<()>))
        .fallback(any(|request: Request| async move { format!("{:?}", request.version()) }))
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

fn request(path: &str) -> http::Request<Empty<Bytes>> {
    http::Request::get(format!("http://localhost{path}"))
        .header("host", "localhost")
        .body(Empty::new())
        .unwrap()
}

async fn body(response: http::Response<Incoming>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn get_h1(io: impl Io, path: &str) -> hyper::Result<String> {
    let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    tokio::spawn(connection);
    Ok(body(client.send_request(request(path)).await?).await)
}

type H2Client = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn connect_h2(io: impl Io) -> hyper::Result<H2Client> {
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn get_h2(io: impl Io, path: &str) -> hyper::Result<String> {
    let mut client = connect_h2(io).await?;
    Ok(body(client.send_request(request(path)).await?).await)
}

/// A TLS client that trusts `ca` and shows the certificate `name`, if any.
fn tls_client(ca: &TestCa, name: Option<&str>, alpn: &[&[u8]]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match name {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = CertificateDer::from_pem_file(ca.path(&format!("{name}.pem"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(ca.path(&format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(vec![chain], key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

type Secured = tokio_rustls::client::TlsStream<TcpStream>;

async fn secure(server: &Server, client: &TlsConnector) -> io::Result<Secured> {
    let name = ServerName::try_from("localhost").unwrap();
    client.connect(name, server.tcp().await).await
}

#[tokio::test]
async fn one_plain_port_speaks_both_versions_of_http() {
    let server = Server::start("http://127.0.0.1:0", None, ServeOptions::default());
    assert_eq!(get_h1(server.tcp().await, "/").await.unwrap(), "HTTP/1.1");
    assert_eq!(get_h2(server.tcp().await, "/").await.unwrap(), "HTTP/2.0");
    assert_eq!(get_h1(server.tcp().await, "/who").await.unwrap(), "false None");
}

#[tokio::test]
async fn the_protocol_is_told_however_the_bytes_are_cut() {
    let server = Server::start("http://127.0.0.1:0", None, ServeOptions::default());
    // "PUT" shares its first letter with what HTTP/2 begins with.
    let request = b"PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    for cut in [1, 2, 3, 20] {
        let mut stream = server.tcp().await;
        stream.set_nodelay(true).unwrap();
        stream.write_all(&request[..cut]).await.unwrap();
        tokio::task::yield_now().await;
        stream.write_all(&request[cut..]).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("HTTP/1.1"), "cut at {cut}: {answer}");
    }
}

#[tokio::test]
async fn a_unix_socket_is_served_and_its_file_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let url = format!("unix://{}", path.display());
    // What an earlier run left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());

    let mut server = Server::start(&url, None, ServeOptions::default());
    let stream = UnixStream::connect(&path).await.unwrap();
    assert_eq!(get_h1(stream, "/").await.unwrap(), "HTTP/1.1");
    server.stop();
    timeout(PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(!path.exists(), "the socket's file is left");
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let url = Url::parse(&format!("unix://{}", path.display())).unwrap();
    let error = Listener::bind(&url, None, &SocketOptions::default()).unwrap_err();
    assert!(error.to_string().contains("is not a socket"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn the_path_of_a_unix_url_may_be_relative() {
    for (url, path) in [
        ("unix:///run/a.sock", "/run/a.sock"),
        ("unix://a.sock", "a.sock"),
        ("unix://dir/a.sock", "dir/a.sock"),
        ("unix://localhost:2379", "localhost:2379"),
    ] {
        assert_eq!(unix_path(&Url::parse(url).unwrap()), Some(PathBuf::from(path)), "{url}");
    }
    assert_eq!(unix_path(&Url::parse("unix://").unwrap()), None);
}

#[tokio::test]
async fn what_cannot_be_bound_says_why() {
    let bind = |url: &str| {
        Listener::bind(&Url::parse(url).unwrap(), None, &SocketOptions::default())
            .expect_err("this cannot be bound")
            .to_string()
    };
    assert!(bind("https://127.0.0.1:0").contains("--cert-file"));
    assert!(bind("ftp://127.0.0.1:0").contains("scheme"));
    let taken = Server::start("http://127.0.0.1:0", None, ServeOptions::default());
    let text = bind(taken.url.as_str());
    assert!(text.contains(taken.url.as_str()) && text.contains("in use"), "{text}");
}

#[tokio::test]
async fn a_port_can_be_shared_when_asked_for() {
    let options = SocketOptions { reuse_port: true, reuse_address: true };
    let any = Url::parse("http://127.0.0.1:0").unwrap();
    let first = Listener::bind(&any, None, &options).unwrap();
    Listener::bind(first.local_url(), None, &options).expect("reuse-port on both");
    Listener::bind(first.local_url(), None, &SocketOptions::default()).unwrap_err();
}

#[tokio::test]
async fn one_tls_port_speaks_both_versions_of_http() {
    let ca = TestCa::new();
    ca.issue("server", "server");
    let tls = Tls::load(ca.settings("server")).unwrap();
    let server = Server::start("https://127.0.0.1:0", Some(tls), ServeOptions::default());

    let both: &[&[u8]] = &[b"h2", b"http/1.1"];
    let stream = secure(&server, &tls_client(&ca, None, both)).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]), "h2 is preferred");
    assert_eq!(get_h2(stream, "/").await.unwrap(), "HTTP/2.0");

    let stream = secure(&server, &tls_client(&ca, None, &[b"http/1.1"])).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(get_h1(stream, "/").await.unwrap(), "HTTP/1.1");

    let stream = secure(&server, &tls_client(&ca, None, &[])).await.unwrap();
    assert_eq!(get_h1(stream, "/who").await.unwrap(), "true None");
}

#[tokio::test]
async fn a_trusted_ca_demands_a_certificate_it_signed() {
    let (ca, stranger) = (TestCa::new(), TestCa::new());
    ca.issue("server", "server");
    ca.issue("client", "kube-apiserver");
    stranger.issue("client", "kube-apiserver");
    let settings =
        TlsSettings { trusted_ca_file: Some(ca.path("ca.pem")), ..ca.settings("server") };
    let tls = Tls::load(settings).unwrap();
    let server = Server::start("https://127.0.0.1:0", Some(tls), ServeOptions::default());

    let stream = secure(&server, &tls_client(&ca, Some("client"), &[b"h2"])).await.unwrap();
    assert_eq!(get_h2(stream, "/who").await.unwrap(), "true Some(\"kube-apiserver\")");

    // With TLS 1.3 the client learns that it was refused when it reads.
    let stream = secure(&server, &tls_client(&ca, None, &[b"http/1.1"])).await.unwrap();
    get_h1(stream, "/").await.expect_err("no certificate");

    let mut trusting = RootCertStore::empty();
    trusting.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let chain = CertificateDer::from_pem_file(stranger.path("client.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(stranger.path("client.key")).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(trusting)
        .with_client_auth_cert(vec![chain], key)
        .unwrap();
    let stream = secure(&server, &TlsConnector::from(Arc::new(config))).await.unwrap();
    get_h1(stream, "/").await.expect_err("a stranger's certificate");
}

#[tokio::test]
async fn http_on_a_tls_port_is_told_so() {
    let ca = TestCa::new();
    ca.issue("server", "server");
    let tls = Tls::load(ca.settings("server")).unwrap();
    let server = Server::start("https://127.0.0.1:0", Some(tls), ServeOptions::default());
    let mut stream = server.tcp().await;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(
        answer,
        "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    );
}

#[tokio::test]
async fn tls_on_a_plain_port_is_closed() {
    let ca = TestCa::new();
    let server = Server::start("http://127.0.0.1:0", None, ServeOptions::default());
    let client = tls_client(&ca, None, &[]);
    timeout(PATIENCE, secure(&server, &client))
        .await
        .unwrap()
        .expect_err("nobody speaks TLS there");
}

/// The certificate that new connections are shown.
async fn shown(server: &Server, client: &TlsConnector) -> Option<Vec<u8>> {
    let stream = secure(server, client).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}

#[tokio::test]
async fn changed_files_are_used_and_broken_ones_are_not() {
    let ca = TestCa::new();
    ca.issue("server", "one");
    ca.issue("client", "client");
    let settings =
        TlsSettings { trusted_ca_file: Some(ca.path("ca.pem")), ..ca.settings("server") };
    let tls = Tls::load(settings).unwrap();
    let server = Server::start("https://127.0.0.1:0", Some(tls.clone()), ServeOptions::default());
    let client = tls_client(&ca, Some("client"), &[b"http/1.1"]);
    let first = shown(&server, &client).await.unwrap();
    let mut old =
        connect_h2(secure(&server, &tls_client(&ca, Some("client"), &[b"h2"])).await.unwrap())
            .await
            .unwrap();

    // Broken: the old ones stay.
    fs::write(ca.path("server.key"), "no key").unwrap();
    tokio::time::sleep(RELOAD_CHECK_INTERVAL).await;
    assert_eq!(shown(&server, &client).await.as_ref(), Some(&first));

    // Whole again, with another name.
    ca.issue("server", "two");
    let second = timeout(PATIENCE, async {
        loop {
            match shown(&server, &client).await {
                Some(certificate) if certificate != first => break certificate,
                _ => tokio::time::sleep(RELOAD_CHECK_INTERVAL / 10).await,
            }
        }
    })
    .await
    .expect("the new certificate in time");
    assert_eq!(common_name(&second).as_deref(), Some("two"));
    let response = old.send_request(request("/who")).await.unwrap();
    assert_eq!(body(response).await, "true Some(\"client\")", "what was up stays up");

    // Another CA: the client's certificate is no longer good.
    fs::write(ca.path("ca.pem"), TestCa::new().pem()).unwrap();
    timeout(PATIENCE, async {
        loop {
            let stream = secure(&server, &client).await.unwrap();
            if get_h1(stream, "/").await.is_err() {
                break;
            }
            tokio::time::sleep(RELOAD_CHECK_INTERVAL / 10).await;
        }
    })
    .await
    .expect("the new CA in time");
}

#[tokio::test]
async fn shutdown_lets_requests_finish_and_says_goaway() {
    let (release, released) = watch::channel(false);
    let (entered, mut has_entered) = watch::channel(false);
    let router = Router::new().route(
        "/wait",
        get(move || async move {
            let _ = entered.send(true);
            raised(&mut released.clone()).await;
            "done"
        }),
    );
    let mut server = Server::serving(router, "http://127.0.0.1:0", None, ServeOptions::default());
    let mut client = connect_h2(server.tcp().await).await.unwrap();
    let waiting = tokio::spawn(client.send_request(request("/wait")));
    has_entered.wait_for(|entered| *entered).await.unwrap();
    server.stop();
    // GOAWAY: nothing new on this connection; and nobody accepts another.
    timeout(PATIENCE, async { while client.send_request(request("/")).await.is_ok() {} })
        .await
        .unwrap();
    let port = server.url.port().unwrap();
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err());
    assert!(!server.task.is_finished(), "a request is still under way");

    release.send(true).unwrap();
    let response = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(body(response).await, "done");
    timeout(PATIENCE, server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn shutdown_drops_requests_that_do_not_end() {
    let options =
        ServeOptions { drain_timeout: Duration::from_millis(50), ..ServeOptions::default() };
    let mut server = Server::start("http://127.0.0.1:0", None, options);
    let mut client = connect_h2(server.tcp().await).await.unwrap();
    client.send_request(request("/")).await.unwrap();
    let stuck = tokio::spawn(client.send_request(request("/slow")));
    server.stop();
    timeout(PATIENCE, &mut server.task).await.unwrap().unwrap();
    timeout(PATIENCE, stuck).await.unwrap().unwrap().expect_err("dropped");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_their_turn() {
    let options = ServeOptions { max_connections: 1, ..ServeOptions::default() };
    let server = Server::start("http://127.0.0.1:0", None, options);
    let mut first = connect_h2(server.tcp().await).await.unwrap();
    first.send_request(request("/")).await.unwrap();
    let second = server.tcp().await;
    let waiting = tokio::spawn(async move { get_h1(second, "/").await });
    // The first connection is served as long as it likes.
    for _ in 0..10 {
        first.send_request(request("/")).await.unwrap();
    }
    assert!(!waiting.is_finished(), "more connections than allowed");
    drop(first);
    let answer = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(answer.unwrap(), "HTTP/1.1");
}

#[tokio::test]
async fn a_client_that_says_nothing_is_closed() {
    let options = ServeOptions {
        header_read_timeout: Duration::from_millis(50),
        handshake_timeout: Duration::from_millis(50),
        ..ServeOptions::default()
    };
    let ca = TestCa::new();
    ca.issue("server", "server");
    let tls = Tls::load(ca.settings("server")).unwrap();
    let plain = Server::start("http://127.0.0.1:0", None, options.clone());
    let secured = Server::start("https://127.0.0.1:0", Some(tls), options);
    for (server, sent) in [
        (&plain, &b""[..]),
        (&plain, b"PRI * HTTP"),
        (&plain, b"GET / HTTP/1.1\r\nhost:"),
        (&secured, b""),
        (&secured, b"\x16\x03"),
    ] {
        let mut stream = server.tcp().await;
        stream.write_all(sent).await.unwrap();
        let mut rest = Vec::new();
        let closed = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        closed.expect("the server closes it").unwrap();
    }
}

#[tokio::test]
async fn a_handler_that_panics_takes_one_connection_and_no_more() {
    async fn panicking() {
        panic!("on purpose");
    }
    let router = Router::new().route("/panic", get(panicking)).route("/", get(|| async { "up" }));
    let server = Server::serving(router, "http://127.0.0.1:0", None, ServeOptions::default());
    get_h1(server.tcp().await, "/panic").await.expect_err("the connection ends");
    assert_eq!(get_h1(server.tcp().await, "/").await.unwrap(), "up");
}

#[tokio::test]
async fn many_streams_and_many_resets_do_not_close_a_connection() {
    let server = Server::start("http://127.0.0.1:0", None, ServeOptions::default());
    let mut client = connect_h2(server.tcp().await).await.unwrap();
    // Far above hyper's limit of 200 streams and h2's of 20 and 1024 resets.
    for _ in 0..3 {
        let mut calls: Vec<_> =
            (0..600).map(|_| Box::pin(client.send_request(request("/slow")))).collect();
        for call in &mut calls {
            let nothing = timeout(Duration::ZERO, call).await;
            assert!(nothing.is_err(), "it never answers");
        }
        drop(calls);
        let response = client.send_request(request("/")).await.unwrap();
        assert_eq!(body(response).await, "HTTP/2.0");
    }
}

#[tokio::test]
async fn large_replies_arrive_whole() {
    let large = Bytes::from(vec![7; 32 * 1024 * 1024]);
    let reply = large.clone();
    let router = Router::new().route("/", get(move || async move { Body::from(reply) }));
    let server = Server::serving(router, "http://127.0.0.1:0", None, ServeOptions::default());
    let mut client = connect_h2(server.tcp().await).await.unwrap();
    let response = client.send_request(request("/")).await.unwrap();
    let body = timeout(PATIENCE, response.into_body().collect()).await.unwrap().unwrap();
    assert_eq!(body.to_bytes(), large);
}

#[test]
fn the_default_leaves_descriptors_for_the_server_itself() {
    let options = ServeOptions::default();
    let limit = getrlimit(Resource::Nofile).current.unwrap();
    assert!(u64::try_from(options.max_connections).unwrap() < limit);
}
