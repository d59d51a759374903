//! What a client sees of a started server without speaking gRPC: the plain endpoints, the
//! command lines that other projects start etcd with, and the log they wait for.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::ports::free_port;
use common::process::{PATIENCE, Started, messages, strings, until};
use common::server::{TestServer, kvorum};
use common::{http, judge};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The requests whose answers are compared: method, path.
const REQUESTS: &[(&str, &str)] = &[
    ("GET", "/health"),
    ("GET", "/health?serializable=true"),
    ("GET", "/health?exclude=NOSPACE&serializable=true"),
    ("POST", "/health"),
    ("GET", "/livez"),
    ("GET", "/livez?verbose"),
    ("GET", "/livez/serializable_read"),
    ("GET", "/livez/nonsense"),
    ("HEAD", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/readyz?verbose"),
    ("GET", "/readyz?verbose&exclude=linearizable_read"),
    ("GET", "/readyz/data_corruption"),
    ("GET", "/readyz/non_learner?verbose"),
    ("PUT", "/readyz"),
    ("GET", "/version"),
    ("POST", "/version"),
    ("GET", "/"),
    ("GET", "/nonsense"),
    ("GET", "/v2/keys"),
    ("POST", "/debug/vars"),
];

#[test]
fn plain_endpoints_answer_as_etcd_does_on_both_listeners() {
    let test = "plain_endpoints_answer_as_etcd_does_on_both_listeners";
    let Some(judges) = judge::find(test) else { return };
    let metrics = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let urls = metrics.clone().map(|address| format!("--listen-metrics-urls=http://{address}"));
    let etcd = TestServer::start(&judges.etcd, &[&urls[0]]);
    let kvorum = TestServer::start(&kvorum(), &[&urls[1]]);
    let clients = [etcd.client_address(), kvorum.client_address()];

    let mut differences = Vec::new();
    for [theirs, ours] in [&clients, &metrics] {
        for (method, path) in REQUESTS {
            let ask = |address: &str| {
                let answer = http::request(address, method, path, &[], b"").unwrap();
                let headers = ["content-type", "x-content-type-options", "allow"];
                let headers = headers.map(|name| answer.header(name).to_owned());
                // etcd lists checks in no particular order.
                let mut lines: Vec<String> = answer.text().lines().map(str::to_owned).collect();
                lines.sort_unstable();
                (answer.status, headers, answer.body.last() == Some(&b'\n'), lines)
            };
            let (theirs, ours) = (ask(theirs), ask(ours));
            if theirs != ours {
                differences
                    .push(format!("{method} {path}:\n  etcd   {theirs:?}\n  kvorum {ours:?}"));
            }
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // Both are asked the same, so what both answer is looked at once.
    let body = |path: &str| http::get(&clients[1], path).unwrap().text();
    assert_eq!(body("/health"), r#"{"health":"true","reason":""}"#);
    assert_eq!(body("/livez"), "ok\n");
    let version: Value = serde_json::from_str(&body("/version")).unwrap();
    let version_etcd = json!({ "etcdserver": "3.7.1", "etcdcluster": "3.7.0", "storage": "3.7.0" });
    assert_eq!(version, version_etcd);
    for address in [&clients[1], &metrics[1]] {
        let scrape = http::get(address, "/metrics").unwrap();
        assert!(scrape.text().contains("\netcd_server_has_leader 1\n"));
    }
    // Nothing that clients do is possible there.
    assert_eq!(http::request(&metrics[1], "POST", "/v3/kv/range", &[], b"{}").unwrap().status, 404);
}

/// controller-runtime's envtest: sorted flags, no name, no cluster, and the default
/// `--initial-advertise-peer-urls` although peers are listened for elsewhere.
#[test]
fn envtest_starts_it_and_finds_it_healthy_at_once() {
    let directory = TempDir::new().unwrap();
    // envtest looks for a program called etcd.
    let etcd = directory.path().join("etcd");
    std::os::unix::fs::symlink(kvorum(), &etcd).unwrap();
    let help = Command::new(&etcd).arg("--help").output().unwrap();
    assert!(help.status.success());
    let text = [help.stdout, help.stderr].concat();
    let offers_no_fsync = String::from_utf8(text)
        .unwrap()
        .lines()
        .any(|line| line.trim_start().starts_with("--unsafe-no-fsync"));
    assert!(offers_no_fsync, "envtest passes the flag when the help has it");

    for run in 0..2 {
        let (client, peer) = (free_port(), free_port());
        let data = directory.path().join(format!("data-{run}"));
        std::fs::create_dir(&data).unwrap();
        let arguments = [
            format!("--advertise-client-urls=http://127.0.0.1:{client}"),
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls=http://127.0.0.1:{client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            "--unsafe-no-fsync=true".to_owned(),
        ];
        let began = Instant::now();
        let mut started = Started::new(&etcd, directory.path(), &arguments);
        let address = format!("127.0.0.1:{client}");
        until("/health", || {
            http::get(&address, "/health").ok().filter(|answer| answer.status == 200)
        });
        let took = began.elapsed();
        assert!(took < Duration::from_secs(5), "healthy after {took:?}");
        assert_eq!(started.terminate().code(), Some(0));
        let took_until_stopped = began.elapsed() - took;
        assert!(
            took_until_stopped < Duration::from_secs(5),
            "stopped after {took_until_stopped:?}"
        );
    }
}

/// Older controller-runtimes, and `hack/local-up-cluster.sh`, have peers listen anywhere.
#[test]
fn peer_port_zero_is_accepted() {
    let directory = TempDir::new().unwrap();
    let client = free_port();
    let url = format!("http://127.0.0.1:{client}");
    let arguments = strings(&[
        "--advertise-client-urls",
        &url,
        "--data-dir",
        "data",
        "--listen-client-urls",
        &url,
        "--listen-peer-urls",
        "http://localhost:0",
        "--log-level=warn",
    ]);
    let mut started = Started::new(&kvorum(), directory.path(), &arguments);
    until("/health", || http::get(&format!("127.0.0.1:{client}"), "/health").ok());
    assert_eq!(started.terminate().code(), Some(0));
}

/// Kubernetes' `test/integration/framework`: clients over a unix socket below the data
/// directory, an advertised URL that nobody can reach, one dash before `log-level`.
#[test]
fn the_integration_tests_of_kubernetes_start_it() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let socket = data.join("etcd.sock");
    let arguments = strings(&[
        "--data-dir",
        data.to_str().unwrap(),
        "--listen-client-urls",
        &format!("unix://{}", socket.display()),
        "--advertise-client-urls",
        "http://127.0.0.111:0",
        "--listen-peer-urls",
        "http://127.0.0.1:0",
        "-log-level",
        "warn",
        "--quota-backend-bytes",
        "8589934592",
    ]);
    let mut started = Started::new(&kvorum(), directory.path(), &arguments);
    let mut stream = until("the socket", || UnixStream::connect(&socket).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with(r#"{"health":"true","reason":""}"#), "{answer}");

    if let Some(judges) = judge::find("the_integration_tests_of_kubernetes_start_it") {
        let endpoint = format!("unix://{}", socket.display());
        let put = Command::new(&judges.etcdctl)
            .args(["--endpoints", &endpoint, "put", "k", "v"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&put.stdout), "OK\n", "{put:?}");
    }
    assert_eq!(started.terminate().code(), Some(0));
    for line in messages(&started.log()) {
        assert!(["warn", "error"].contains(&line["level"].as_str().unwrap()), "{line}");
    }
}

#[test]
fn the_log_says_when_it_is_ready_and_nothing_twice() {
    let mut server = TestServer::start(&kvorum(), &[]);
    server.terminate();
    let log = server.log();
    let lines = messages(&log);
    let ready: Vec<&Value> =
        lines.iter().filter(|line| line["msg"] == "ready to serve client requests").collect();
    assert_eq!(ready.len(), 1, "{log}");
    assert_eq!(ready[0]["level"], "info");
    for field in ["ts", "caller"] {
        assert!(ready[0][field].is_string(), "{}", ready[0]);
    }
    let start = lines.iter().find(|line| line["msg"] == "starting a member").unwrap();
    assert_eq!(start["heartbeat_interval"], "100ms");
    assert_eq!(start["election_timeout"], "1s");
    assert_eq!(start["snapshot_count"], 10_000);

    let mut seen = Vec::new();
    for line in &lines {
        let mut line = line.clone();
        line.as_object_mut().unwrap().remove("ts");
        assert!(!seen.contains(&line), "twice: {line}");
        seen.push(line);
    }
}
