//! TLS and listeners as operators use them: etcdctl and curl with certificates from a CA,
//! clients without one, certificates that are renewed while the server runs, and the
//! other kinds of URLs.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use common::ca::Ca;
use common::ports::free_port;
use common::process::{Started, messages, strings, until};
use common::server::kvorum;
use common::{http, judge};
use serde_json::Value;
use tempfile::TempDir;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};

/// Any free port: the usual one may be taken by another test's server.
const NO_PEERS: &str = "--listen-peer-urls=http://127.0.0.1:0";

/// A directory with certificates and a server in it.
struct Home {
    directory: TempDir,
    port: u16,
}

impl Home {
    /// With `ca.pem`, and `server` and `client` signed by it.
    fn new() -> Home {
        let home = Home { directory: TempDir::new().unwrap(), port: free_port() };
        let ca = Ca::new("first");
        home.write("ca.pem", &ca.pem);
        home.issue(&ca, "server");
        home.issue(&ca, "client");
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts a file in its place in one step.
    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path("aside"), content).unwrap();
        std::fs::rename(self.path("aside"), self.path(name)).unwrap();
    }

    fn issue(&self, ca: &Ca, name: &str) {
        let (certificate, key) = ca.issue(name);
        self.write(&format!("{name}.pem"), &certificate);
        self.write(&format!("{name}.key"), &key);
    }

    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Starts a server that listens for clients on `url` and waits until it is ready.
    fn start(&self, url: &str, flags: &[&str]) -> Started {
        let mut arguments = strings(&["--name=n1", "--data-dir=data", NO_PEERS]);
        arguments.extend(strings(&["--listen-client-urls", url, "--advertise-client-urls", url]));
        arguments.extend(strings(flags));
        let started = Started::new(&kvorum(), self.directory.path(), &arguments);
        until("the server to be ready", || {
            started.log().contains("ready to serve client requests").then_some(())
        });
        started
    }

    /// Runs a program in the directory.
    fn run(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Output {
        let program = program.as_ref();
        Command::new(program)
            .args(arguments)
            .current_dir(self.directory.path())
            .env("ETCDCTL_API", "3")
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    /// Runs curl and gives what it printed, or nothing when it failed.
    fn curl(&self, arguments: &[&str]) -> Option<String> {
        let output = self.run("curl", &[&["--silent", "--show-error"], arguments].concat());
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }
}

const SERVER: [&str; 2] = ["--cert-file=server.pem", "--key-file=server.key"];
const MUTUAL: [&str; 4] = [
    "--cert-file=server.pem",
    "--key-file=server.key",
    "--trusted-ca-file=ca.pem",
    "--client-cert-auth",
];

/// Both ages of etcdctl, as far as they are there.
fn etcdctls(test: &str) -> Vec<PathBuf> {
    let judges = judge::find(test).map(|judges| judges.etcdctl);
    judges.into_iter().chain(judge::old_etcdctl()).collect()
}

fn has_curl(test: &str) -> bool {
    let there = Command::new("curl").arg("--version").output().is_ok();
    if !there {
        judge::skip(test, "there is no curl");
    }
    there
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn etcdctl_needs_a_certificate_under_mutual_tls() {
    let home = Home::new();
    let _started = home.start(&home.url("https"), &MUTUAL);
    let stranger = Ca::new("stranger");
    home.issue(&stranger, "stranger");
    let endpoint = home.url("https");
    for (round, etcdctl) in
        etcdctls("etcdctl_needs_a_certificate_under_mutual_tls").iter().enumerate()
    {
        let run = |files: &[&str], command: &[&str]| {
            let endpoint = ["--endpoints", &endpoint, "--command-timeout=10s", "--dial-timeout=1s"];
            home.run(etcdctl, &[&endpoint, files, command].concat())
        };
        let good = ["--cacert=ca.pem", "--cert=client.pem", "--key=client.key"];
        let value = format!("value {round}");
        assert_eq!(text(&run(&good, &["put", "k", &value])), "OK\n", "{}", etcdctl.display());
        let read = run(&good, &["get", "k", "--print-value-only"]);
        assert_eq!(text(&read), format!("{value}\n"));
        let health = run(&good, &["endpoint", "health"]);
        assert!(health.status.success(), "{health:?}");

        let refused = [
            &["--cacert=ca.pem"][..],
            &["--cacert=ca.pem", "--cert=stranger.pem", "--key=stranger.key"],
        ];
        for files in refused {
            let endpoint = ["--endpoints", &endpoint, "--command-timeout=1s", "--dial-timeout=1s"];
            let output = home.run(etcdctl, &[&endpoint, files, &["get", "k"]].concat());
            assert!(!output.status.success(), "{files:?}: {output:?}");
            assert_eq!(text(&output), "");
        }
    }
}

#[test]
fn snapshots_are_saved_under_mutual_tls() {
    let home = Home::new();
    let _started = home.start(&home.url("https"), &MUTUAL);
    let stranger = Ca::new("stranger");
    home.issue(&stranger, "stranger");
    home.write("stranger-ca.pem", &stranger.pem);
    let endpoint = home.url("https");
    let save = |files: &[&str]| {
        let save = ["snapshot", "save", "db", "--endpoints", &endpoint];
        home.run(kvorum(), &[&save, files].concat())
    };
    let shown = ["--cert=client.pem", "--key=client.key"];
    for trust in ["--cacert=ca.pem", "--insecure-skip-tls-verify"] {
        let saved = save(&[&[trust][..], &shown].concat());
        assert!(saved.status.success(), "{trust}: {saved:?}");
        assert!(text(&saved).starts_with("Snapshot saved at db\n"), "{saved:?}");
    }
    for (files, reason) in [
        (&["--cacert=ca.pem"][..], "--endpoints"),
        (&["--cacert=ca.pem", "--cert=stranger.pem", "--key=stranger.key"], "--endpoints"),
        (&["--cacert=stranger-ca.pem", "--cert=client.pem", "--key=client.key"], "certificate"),
        (&["--cacert=ca.pem", "--cert=client.pem"], "--key"),
        (&["--cacert=missing.pem"], "--cacert"),
        (&[], "--cacert"),
    ] {
        let refused = save(files);
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(5), "{files:?}: {told}");
        assert!(told.starts_with("Error: ") && told.contains(reason), "{files:?}: {told}");
    }
}

#[test]
fn curl_speaks_both_versions_of_http_on_the_port_of_grpc() {
    let test = "curl_speaks_both_versions_of_http_on_the_port_of_grpc";
    if !has_curl(test) {
        return;
    }
    let home = Home::new();
    let _started = home.start(&home.url("https"), &MUTUAL);
    let url = home.url("https");
    let good = ["--cacert", "ca.pem", "--cert", "client.pem", "--key", "client.key"];
    let curl = |arguments: &[&str]| home.curl(&[&good, arguments].concat());
    let mut versions = vec![("--http1.1", "1.1")];
    if text(&home.run("curl", &["--version"])).contains("HTTP2") {
        versions.push(("--http2", "2"));
    }
    for (flag, version) in versions {
        let report = ["--write-out", " %{http_version} %{http_code}", flag];
        let ask = |path: &str, more: &[&str]| {
            let url = format!("{url}{path}");
            curl(&[&report[..], more, &[url.as_str()]].concat()).expect(path)
        };
        let health = ask("/health", &[]);
        assert_eq!(health, format!("{{\"health\":\"true\",\"reason\":\"\"}} {version} 200"));
        let told = ask("/version", &[]);
        assert!(told.starts_with("{\"etcdserver\":\"3."), "{told}");
        // "k" and "v" in base64.
        let put = ask("/v3/kv/put", &["--data", r#"{"key":"aw==","value":"dg=="}"#]);
        assert!(put.contains("\"revision\":") && put.ends_with(" 200"), "{put}");
        let range = ask("/v3/kv/range", &["--data", r#"{"key":"aw=="}"#]);
        assert!(range.contains("\"value\":\"dg==\""), "{range}");
    }
    // Nobody comes in without a certificate, not even for their health.
    let health = format!("{url}/health");
    assert_eq!(home.curl(&["--cacert", "ca.pem", &health]), None);
    // And without TLS one is told what is wrong.
    let plain = http::get(&format!("127.0.0.1:{}", home.port), "/health").unwrap();
    assert_eq!(plain.status, 400);
    assert_eq!(plain.text(), "Client sent an HTTP request to an HTTPS server.\n");
}

/// The certificate a server shows, asked with the files `ca` and, if it is not empty, the
/// certificate `client`; or why there is none.
async fn served(home: &Home, ca: &str, client: &str) -> Result<Vec<u8>, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(home.path(ca)).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = if client.is_empty() {
        builder.with_no_client_auth()
    } else {
        let chain =
            vec![CertificateDer::from_pem_file(home.path(&format!("{client}.pem"))).unwrap()];
        let key = PrivateKeyDer::from_pem_file(home.path(&format!("{client}.key"))).unwrap();
        builder.with_client_auth_cert(chain, key).unwrap()
    };
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let fail = |error: std::io::Error| error.to_string();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", home.port)).await.map_err(fail)?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, stream).await.map_err(fail)?;
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    // Under TLS 1.3 a client learns only now that its certificate is not wanted.
    let request = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.map_err(fail)?;
    let mut answer = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer).await.map_err(fail)?;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
    Ok(certificate)
}

/// Asks until `good`.
async fn served_until(
    home: &Home,
    ca: &str,
    client: &str,
    what: &str,
    good: impl Fn(&Result<Vec<u8>, String>) -> bool,
) -> Result<Vec<u8>, String> {
    let began = std::time::Instant::now();
    loop {
        let answer = served(home, ca, client).await;
        if good(&answer) {
            return answer;
        }
        assert!(began.elapsed() < common::process::PATIENCE, "waited for {what}: {answer:?}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn renewed_certificates_are_used_without_a_restart() {
    let home = Home::new();
    let ca = Ca::new("kept");
    home.write("ca.pem", &ca.pem);
    home.issue(&ca, "server");
    home.issue(&ca, "client");
    let mut started = home.start(&home.url("https"), &MUTUAL);
    let first = served(&home, "ca.pem", "client").await.expect("the first certificate");
    served(&home, "ca.pem", "").await.expect_err("a client without a certificate");

    // A half-written renewal changes nothing.
    home.write("server.pem", "-----BEGIN CERTIFICATE-----\nnot yet");
    until("the warning", || {
        // It is looked at when somebody connects.
        let _ = std::net::TcpStream::connect(("127.0.0.1", home.port)).map(drop);
        started.log().contains("keeping the old ones").then_some(())
    });
    assert_eq!(served(&home, "ca.pem", "client").await.unwrap(), first);

    home.issue(&ca, "server");
    let renewed = served_until(&home, "ca.pem", "client", "the renewed certificate", |answer| {
        answer.as_ref().is_ok_and(|shown| *shown != first)
    });
    let renewed = renewed.await.unwrap();
    assert_ne!(renewed, first);

    // Another CA: its clients come in, those of the old one do not.
    let other = Ca::new("other");
    home.write("old-ca.pem", &ca.pem);
    home.issue(&other, "other-client");
    let refused = served(&home, "ca.pem", "other-client").await;
    refused.expect_err("a client of an unknown CA");
    home.write("ca.pem", &other.pem);
    served_until(&home, "old-ca.pem", "other-client", "the new CA", Result::is_ok).await.unwrap();
    served(&home, "old-ca.pem", "client").await.expect_err("a client of the old CA");

    let renewals: Vec<Value> = messages(&started.log())
        .into_iter()
        .filter(|line| line["msg"].as_str().unwrap().starts_with("TLS files have changed: new"))
        .collect();
    assert!(renewals.len() >= 2, "{renewals:?}");
    assert_eq!(started.terminate().code(), Some(0));
}

#[test]
fn a_ca_alone_demands_client_certificates_as_in_etcd() {
    let test = "a_ca_alone_demands_client_certificates_as_in_etcd";
    if !has_curl(test) {
        return;
    }
    let home = Home::new();
    let _started =
        home.start(&home.url("https"), &[SERVER[0], SERVER[1], "--trusted-ca-file=ca.pem"]);
    let url = format!("{}/health", home.url("https"));
    assert_eq!(home.curl(&["--cacert", "ca.pem", &url]), None);
    let good = ["--cacert", "ca.pem", "--cert", "client.pem", "--key", "client.key", &url];
    assert!(home.curl(&good).is_some());
}

#[test]
fn auto_tls_makes_a_certificate_and_keeps_it() {
    let test = "auto_tls_makes_a_certificate_and_keeps_it";
    if !has_curl(test) {
        return;
    }
    let home = Home::new();
    let url = home.url("https");
    let fixtures = home.path("data/fixtures/client");
    let mut kept = None;
    for _ in 0..2 {
        let mut started = home.start(&url, &["--auto-tls"]);
        let health = home.curl(&["--insecure", &format!("{url}/health")]);
        assert_eq!(health.as_deref(), Some(r#"{"health":"true","reason":""}"#));
        // The certificate is for the address that is listened on.
        let certificate = fixtures.join("cert.pem");
        let ca = ["--cacert", certificate.to_str().unwrap()];
        let health = home.curl(&[&ca[..], &[&format!("{url}/health")]].concat());
        assert_eq!(health.as_deref(), Some(r#"{"health":"true","reason":""}"#));
        let pem = std::fs::read_to_string(&certificate).unwrap();
        assert_eq!(*kept.get_or_insert_with(|| pem.clone()), pem, "another one after a restart");
        for etcdctl in etcdctls(test) {
            let flags = ["--endpoints", &url, "--insecure-skip-tls-verify"];
            let flags = [&flags[..], &["--insecure-transport=false", "put", "k", "v"]].concat();
            assert_eq!(text(&home.run(etcdctl, &flags)), "OK\n");
        }
        assert_eq!(started.terminate().code(), Some(0));
    }
}

#[test]
fn versions_of_tls_are_limited_as_asked() {
    let test = "versions_of_tls_are_limited_as_asked";
    if !has_curl(test) {
        return;
    }
    let home = Home::new();
    let url = home.url("https");
    let health = format!("{url}/health");
    let ask = |limits: &[&str]| {
        let base = ["--cacert", "ca.pem", "--output", "none"];
        home.curl(&[&base, limits, &[health.as_str()]].concat()).is_some()
    };
    const TLS_12: [&str; 3] = ["--tlsv1.2", "--tls-max", "1.2"];
    const TLS_13: [&str; 1] = ["--tlsv1.3"];
    for (flags, takes_12, takes_13) in [
        (&[][..], true, true),
        (&["--tls-min-version=TLS1.3"], false, true),
        (&["--tls-max-version=TLS1.2"], true, false),
        (&["--tls-min-version=TLS1.2", "--tls-max-version=TLS1.3"], true, true),
    ] {
        let mut started = home.start(&url, &[&SERVER, flags].concat());
        assert_eq!((ask(&TLS_12), ask(&TLS_13)), (takes_12, takes_13), "{flags:?}");
        started.terminate();
    }
}

#[test]
fn metrics_and_health_without_tls_while_clients_need_it() {
    let home = Home::new();
    let port = free_port();
    let metrics = format!("--listen-metrics-urls=http://127.0.0.1:{port}");
    let flags = [&MUTUAL[..], &[metrics.as_str()]].concat();
    let _started = home.start(&home.url("https"), &flags);
    let get = |path: &str| http::get(&format!("127.0.0.1:{port}"), path).unwrap();
    assert_eq!(get("/health").text(), r#"{"health":"true","reason":""}"#);
    assert_eq!(get("/livez").text(), "ok\n");
    assert_eq!(get("/readyz").text(), "ok\n");
    assert!(get("/metrics").text().contains("\netcd_server_has_leader 1\n"));
    assert_eq!(get("/version").status, 404);
}

#[test]
fn http_has_ports_of_its_own_when_it_is_given_some() {
    let test = "http_has_ports_of_its_own_when_it_is_given_some";
    let home = Home::new();
    let port = free_port();
    let separate = format!("--listen-client-http-urls=http://127.0.0.1:{port}");
    let _started = home.start(&home.url("http"), &[&separate]);
    let get = |port: u16, path: &str| http::get(&format!("127.0.0.1:{port}"), path);
    assert_eq!(get(port, "/health").unwrap().text(), r#"{"health":"true","reason":""}"#);
    assert!(get(port, "/version").unwrap().text().contains("etcdserver"));
    let range = |port: u16| {
        let address = format!("127.0.0.1:{port}");
        http::request(&address, "POST", "/v3/kv/range", &[], br#"{"key":"aw=="}"#)
    };
    assert_eq!(range(port).unwrap().status, 200);
    // The clients' port has gRPC alone.
    assert_eq!(get(home.port, "/health").unwrap().status, 415);
    assert_eq!(range(home.port).unwrap().status, 415);
    for etcdctl in etcdctls(test) {
        let run = |port: u16| {
            let endpoint = format!("127.0.0.1:{port}");
            let flags = ["--endpoints", &endpoint, "--command-timeout=2s", "put", "k", "v"];
            home.run(&etcdctl, &flags)
        };
        assert_eq!(text(&run(home.port)), "OK\n");
        assert_eq!(text(&run(port)), "");
    }
}

#[test]
fn a_socket_file_serves_curl_and_etcdctl() {
    let test = "a_socket_file_serves_curl_and_etcdctl";
    if !has_curl(test) {
        return;
    }
    let home = Home::new();
    let socket = home.path("etcd.sock");
    let url = format!("unix://{}", socket.display());
    // The second start finds the file that the first, killed, left behind.
    for _ in 0..2 {
        let mut arguments = strings(&["--name=n1", "--data-dir=data", NO_PEERS]);
        arguments.extend(strings(&["--listen-client-urls", &url]));
        arguments.extend(strings(&["--advertise-client-urls=http://127.0.0.1:2379"]));
        let mut started = Started::new(&kvorum(), home.directory.path(), &arguments);
        until("the server to be ready", || {
            started.log().contains("ready to serve client requests").then_some(())
        });
        let path = socket.to_str().unwrap();
        let health = home.curl(&["--unix-socket", path, "http://localhost/health"]);
        assert_eq!(health.as_deref(), Some(r#"{"health":"true","reason":""}"#));
        // That of 3.4 names the socket's path as the authority, slashes and all.
        let clients = judge::find(test).map(|judges| judges.etcdctl.clone());
        for etcdctl in clients.into_iter().chain(judge::old_etcdctl()) {
            let output = home.run(etcdctl, &["--endpoints", &url, "put", "k", "v"]);
            assert_eq!(text(&output), "OK\n", "{output:?}");
        }
        started.kill();
    }
}

#[test]
fn certificates_beside_http_are_ignored_with_a_warning() {
    let home = Home::new();
    let started = home.start(&home.url("http"), &SERVER);
    let health = http::get(&format!("127.0.0.1:{}", home.port), "/health").unwrap();
    assert_eq!(health.status, 200);
    assert!(started.log().contains("ignoring key and cert files"), "{}", started.log());
}

#[test]
fn files_that_cannot_be_used_are_named_and_nothing_starts() {
    let home = Home::new();
    let url = home.url("https");
    let listen = format!("--listen-client-urls={url}");
    let advertise = format!("--advertise-client-urls={url}");
    home.write("garbage.pem", "this is not a certificate");
    for (flags, expected) in [
        (&["--cert-file=none.pem", "--key-file=server.key"][..], "none.pem"),
        (&["--cert-file=server.pem", "--key-file=client.key"], "client.key"),
        (&["--cert-file=garbage.pem", "--key-file=server.key"], "garbage.pem"),
        (&[SERVER[0], SERVER[1], "--trusted-ca-file=garbage.pem"], "garbage.pem"),
        (&[SERVER[0], SERVER[1], "--trusted-ca-file=none.pem"], "none.pem"),
        (&["--cert-file=server.pem"], "key-file"),
        (&[], "TLS"),
    ] {
        let base = ["--name=n1", "--data-dir=data", &listen, &advertise];
        let output = home.run(kvorum(), &[&base, flags].concat());
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{flags:?}: {log}");
        assert!(log.contains(expected), "{flags:?}: {log}");
        assert!(!home.path("data").join("member").exists(), "{flags:?} made a member");
    }
}
