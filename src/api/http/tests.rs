use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use serde_json::json;
use tower::ServiceExt as _;

use super::*;

/// A server in whatever state a test wants.
#[derive(Default)]
pub(in crate::api) struct FakeSource {
    linearizable: Mutex<Option<Error>>,
    serializable: Mutex<Option<Error>>,
    hangs: AtomicBool,
    leaderless: AtomicBool,
    learner: AtomicBool,
    undecided: AtomicBool,
    alarms: Mutex<Vec<i32>>,
    reads: AtomicUsize,
    refreshes: AtomicUsize,
}

impl FakeSource {
    async fn read(&self, failure: &Mutex<Option<Error>>) -> Result<(), Error> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        failure.lock().clone().map_or(Ok(()), Err)
    }
}

impl HealthSource for FakeSource {
    async fn linearizable_read(&self) -> Result<(), Error> {
        self.read(&self.linearizable).await
    }
    async fn serializable_read(&self) -> Result<(), Error> {
        self.read(&self.serializable).await
    }
    fn has_leader(&self) -> bool {
        !self.leaderless.load(Ordering::Relaxed)
    }
    fn alarms(&self) -> Vec<AlarmMember> {
        let alarms = self.alarms.lock();
        alarms.iter().map(|&alarm| AlarmMember { member_id: 1, alarm }).collect()
    }
    fn is_learner(&self) -> bool {
        self.learner.load(Ordering::Relaxed)
    }
    fn versions(&self) -> Versions {
        let decided = (!self.undecided.load(Ordering::Relaxed)).then(|| "3.6.0".to_owned());
        Versions { server: "3.6.8".to_owned(), cluster: decided.clone(), storage: decided }
    }
    fn raft_status(&self) -> serde_json::Value {
        json!({ "id": "1", "raftState": "StateLeader" })
    }
    fn refresh_metrics(&self) {
        self.refreshes.fetch_add(1, Ordering::Relaxed);
    }
}

struct Fixture {
    source: Arc<FakeSource>,
    metrics: Arc<Metrics>,
    router: Router,
}

fn fixture() -> Fixture {
    let (source, metrics) = (Arc::new(FakeSource::default()), Metrics::new().unwrap());
    let timeout = Duration::from_millis(20);
    let router = client_router(Arc::clone(&source), Arc::clone(&metrics), timeout);
    Fixture { source, metrics, router }
}

/// An answer: status, content type and body.
type Answer = (u16, String, String);

async fn ask(router: &Router, method: &str, path: &str) -> Answer {
    let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
    answer(router.clone().oneshot(request).await.unwrap()).await
}

async fn answer(response: Response) -> Answer {
    let status = response.status().as_u16();
    let kind = response.headers().get(CONTENT_TYPE).map(|kind| kind.to_str().unwrap().to_owned());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, kind.unwrap_or_default(), String::from_utf8(body.to_vec()).unwrap())
}

/// Status and body only.
async fn get(router: &Router, path: &str) -> (u16, String) {
    let (status, _, body) = ask(router, "GET", path).await;
    (status, body)
}

// The expected texts below are what etcd 3.7.1 answered to curl.
const TEXT: &str = "text/plain; charset=utf-8";

#[tokio::test]
async fn a_healthy_server_says_so_in_etcds_words() {
    let Fixture { router, .. } = fixture();
    let expected = (200, TEXT.to_owned(), r#"{"health":"true","reason":""}"#.to_owned());
    assert_eq!(ask(&router, "GET", "/health").await, expected);
    assert_eq!(get(&router, "/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(
        get(&router, "/livez?verbose").await,
        (200, "[+]serializable_read ok\nok\n".to_owned())
    );
    let all = "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n\
               [+]non_learner ok\nok\n";
    assert_eq!(get(&router, "/readyz?verbose").await, (200, all.to_owned()));
    let some = "[+]data_corruption ok\n[+]linearizable_read ok\n[+]non_learner ok\nok\n";
    let excluding = "/readyz?verbose=1&exclude=serializable_read&exclude=nonsense&exclude=";
    assert_eq!(get(&router, excluding).await, (200, some.to_owned()));
    for check in ["data_corruption", "serializable_read", "linearizable_read", "non_learner"] {
        assert_eq!(get(&router, &format!("/readyz/{check}")).await, (200, "ok\n".to_owned()));
    }
    let one = get(&router, "/readyz/data_corruption?verbose").await;
    assert_eq!(one, (200, "[+]data_corruption ok\nok\n".to_owned()));
}

#[tokio::test]
async fn an_alarm_makes_health_false_unless_excluded() {
    let Fixture { source, router, .. } = fixture();
    source.alarms.lock().push(AlarmType::Nospace.into());
    let no_space = "{\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n";
    let expected = (503, TEXT.to_owned(), no_space.to_owned());
    assert_eq!(ask(&router, "GET", "/health").await, expected);
    assert_eq!(get(&router, "/health?serializable=true").await.0, 503);
    assert_eq!(get(&router, "/health?exclude=NOSPACE").await.0, 200);
    assert_eq!(get(&router, "/health?exclude=CORRUPT").await.0, 503);
    assert_eq!(get(&router, "/readyz").await.0, 200, "a full server is still ready");

    source.alarms.lock().push(AlarmType::Corrupt.into());
    let body = get(&router, "/health?exclude=NOSPACE").await.1;
    assert_eq!(body, "{\"health\":\"false\",\"reason\":\"ALARM CORRUPT\"}\n");
    assert_eq!(get(&router, "/health?exclude=NOSPACE&exclude=CORRUPT").await.0, 200);
    let report = "[-]data_corruption failed: alarm activated: CORRUPT\n\
                  [+]serializable_read ok\n[+]linearizable_read ok\n[+]non_learner ok\n\n";
    assert_eq!(get(&router, "/readyz").await, (503, report.to_owned()));
    assert_eq!(get(&router, "/readyz?exclude=data_corruption").await.0, 200);
    assert_eq!(get(&router, "/livez").await.0, 200);
    let one = "[-]data_corruption failed: alarm activated: CORRUPT\n\n";
    assert_eq!(get(&router, "/readyz/data_corruption").await, (503, one.to_owned()));

    *source.alarms.lock() = vec![9];
    let unknown = "{\"health\":\"false\",\"reason\":\"ALARM UNKNOWN\"}\n";
    assert_eq!(get(&router, "/health?exclude=NONE").await, (503, unknown.to_owned()));
    assert_eq!(get(&router, "/health?exclude=9").await.0, 200);
}

#[tokio::test]
async fn without_a_leader_only_serializable_health_is_true() {
    let Fixture { source, router, .. } = fixture();
    source.leaderless.store(true, Ordering::Relaxed);
    *source.linearizable.lock() = Some(Error::NoLeader);
    let body = "{\"health\":\"false\",\"reason\":\"RAFT NO LEADER\"}\n".to_owned();
    assert_eq!(get(&router, "/health").await, (503, body));
    assert_eq!(get(&router, "/health?serializable=true").await.0, 200);
    assert_eq!(get(&router, "/health?serializable=1").await.0, 503, "only the word true counts");
    let report = "[-]linearizable_read failed: etcdserver: no leader\n\n".to_owned();
    assert_eq!(get(&router, "/readyz/linearizable_read").await, (503, report));
    assert_eq!(get(&router, "/livez").await.0, 200);
}

#[tokio::test]
async fn a_read_that_fails_or_hangs_is_told() {
    let Fixture { source, router, .. } = fixture();
    *source.linearizable.lock() = Some(Error::Timeout);
    let body = "{\"health\":\"false\",\"reason\":\"RANGE ERROR:etcdserver: request timed out\"}\n";
    assert_eq!(get(&router, "/health").await, (503, body.to_owned()));
    source.hangs.store(true, Ordering::Relaxed);
    let body = "{\"health\":\"false\",\"reason\":\"RANGE ERROR:context deadline exceeded\"}\n";
    assert_eq!(get(&router, "/health?serializable=true").await, (503, body.to_owned()));
    assert_eq!(get(&router, "/livez").await.0, 503);
}

#[tokio::test]
async fn a_learner_is_alive_but_not_ready() {
    let Fixture { source, router, .. } = fixture();
    source.learner.store(true, Ordering::Relaxed);
    assert_eq!(get(&router, "/livez").await.0, 200);
    let report = "[-]non_learner failed: not supported for learner\n\n".to_owned();
    assert_eq!(get(&router, "/readyz/non_learner").await, (503, report));
}

#[tokio::test]
async fn each_probe_is_counted() {
    let Fixture { source, metrics, router } = fixture();
    get(&router, "/health").await;
    get(&router, "/readyz").await;
    *source.linearizable.lock() = Some(Error::NoLeader);
    get(&router, "/health").await;
    get(&router, "/readyz").await;
    ask(&router, "POST", "/health").await;
    assert_eq!(metrics.server_health_success.get(), 1);
    assert_eq!(metrics.server_health_failures.get(), 1);
    let last = |name| metrics.server_healthcheck.with_label_values(&["readyz", name]).get();
    assert_eq!((last("linearizable_read"), last("serializable_read")), (0, 1));
    let count = |status: &str| {
        let labels = ["readyz", "linearizable_read", status];
        metrics.server_healthchecks_total.with_label_values(&labels).get()
    };
    assert_eq!((count("success"), count("error")), (1, 1));
}

#[tokio::test]
async fn other_methods_are_refused_and_other_paths_not_found() {
    let Fixture { source, router, .. } = fixture();
    for path in ["/health", "/livez", "/readyz", "/readyz/non_learner", "/version", "/debug/vars"] {
        for method in ["POST", "HEAD", "PUT", "DELETE"] {
            let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.headers()[ALLOW], "GET", "{method} {path}");
            assert_eq!(response.headers()[CONTENT_TYPE_OPTIONS], "nosniff", "{method} {path}");
            let (status, kind, body) = answer(response).await;
            assert_eq!((status, kind.as_str()), (405, TEXT), "{method} {path}");
            let text = if method == "HEAD" { "" } else { "Method Not Allowed\n" };
            assert_eq!(body, text, "{method} {path}");
        }
    }
    assert_eq!(source.reads.load(Ordering::Relaxed), 0, "a refused probe reads nothing");
    for path in ["/", "/nope", "/readyz/nope", "/health/", "/v2/keys"] {
        let expected = (404, TEXT.to_owned(), "404 page not found\n".to_owned());
        assert_eq!(ask(&router, "GET", path).await, expected, "{path}");
    }
}

#[tokio::test]
async fn versions_are_told_before_and_after_they_are_decided() {
    let Fixture { source, router, .. } = fixture();
    let body = r#"{"etcdserver":"3.6.8","etcdcluster":"3.6.0","storage":"3.6.0"}"#;
    let expected = (200, "application/json".to_owned(), body.to_owned());
    assert_eq!(ask(&router, "GET", "/version").await, expected);
    source.undecided.store(true, Ordering::Relaxed);
    let body = r#"{"etcdserver":"3.6.8","etcdcluster":"not_decided","storage":"unknown"}"#;
    assert_eq!(get(&router, "/version").await.1, body);
}

#[tokio::test]
async fn debug_vars_are_json() {
    let Fixture { router, .. } = fixture();
    let (status, kind, body) = ask(&router, "GET", "/debug/vars").await;
    assert_eq!((status, kind.as_str()), (200, "application/json; charset=utf-8"));
    assert!(body.starts_with("{\n") && body.ends_with("\n}\n"), "{body}");
    let vars: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(vars["raft.status"]["raftState"], "StateLeader");
    assert!(vars["file_descriptor_limit"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn metrics_are_served_on_both_ports_and_the_rest_on_one() {
    let Fixture { source, metrics, router } = fixture();
    metrics.server_has_leader.set(1);
    let other = metrics_router(Arc::clone(&source), Arc::clone(&metrics), Duration::from_secs(1));
    for router in [&router, &other] {
        let (status, kind, body) = ask(router, "GET", "/metrics").await;
        assert_eq!(status, 200);
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        assert!(body.contains("\netcd_server_has_leader 1\n"));
        for path in ["/health", "/livez", "/readyz", "/readyz/non_learner"] {
            assert_eq!(get(router, path).await.0, 200, "{path}");
        }
    }
    let answered = metrics.promhttp_metric_handler_requests_total.with_label_values(&["200"]);
    assert_eq!(answered.get(), 2);
    assert_eq!(source.refreshes.load(Ordering::Relaxed), 2, "once a scrape");
    assert_eq!(metrics.promhttp_metric_handler_requests_in_flight.get(), 0);
    assert_eq!(get(&router, "/version").await.0, 200);
    for path in ["/version", "/debug/vars", "/v3/kv/range"] {
        assert_eq!(get(&other, path).await.0, 404, "{path}");
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

async fn from(
    router: &Router,
    method: &str,
    host: &str,
    origin: Option<&str>,
) -> (u16, Option<String>) {
    let mut request = Request::builder().method(method).uri("/health").header(HOST, host);
    if let Some(origin) = origin {
        request = request.header(ORIGIN, origin);
    }
    let request = request.body(Body::empty()).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let allowed = response.headers().get("access-control-allow-origin");
    let allowed = allowed.map(|origin| origin.to_str().unwrap().to_owned());
    assert_eq!(allowed.is_some(), response.headers().contains_key("access-control-allow-methods"));
    (response.status().as_u16(), allowed)
}

#[tokio::test]
async fn cors_headers_go_to_the_origins_allowed() {
    let open = guarded(fixture().router, AccessControl::default());
    let star = Some("*".to_owned());
    assert_eq!(from(&open, "GET", "a", None).await, (200, star.clone()));
    assert_eq!(from(&open, "OPTIONS", "a", Some("http://b")).await, (200, star.clone()));
    assert_eq!(from(&open, "POST", "a", None).await, (405, star), "errors too");

    let access = AccessControl { cors: set(&["http://a", "http://b"]), ..Default::default() };
    let some = guarded(fixture().router, access);
    let b = Some("http://b".to_owned());
    assert_eq!(from(&some, "GET", "h", Some("http://b")).await, (200, b));
    assert_eq!(from(&some, "GET", "h", Some("http://c")).await, (200, None));
    assert_eq!(from(&some, "GET", "h", None).await, (200, None));
}

#[tokio::test]
async fn a_host_that_is_not_named_is_misdirected_unless_there_is_tls() {
    let access = AccessControl { host_whitelist: set(&["a", "::1"]), ..Default::default() };
    let router = guarded(fixture().router, access);
    for (host, status) in
        [("a", 200), ("a:2379", 200), ("[::1]:2379", 200), ("b", 421), ("b:2379", 421), ("", 421)]
    {
        assert_eq!(from(&router, "GET", host, None).await.0, status, "{host}");
    }
    let mut request =
        Request::builder().uri("/health").header(HOST, "b").body(Body::empty()).unwrap();
    let connection = Connection { remote: None, tls: true, peer_common_name: None };
    request.extensions_mut().insert(Arc::new(connection));
    assert_eq!(router.oneshot(request).await.unwrap().status(), 200);
}

#[tokio::test]
async fn grpc_and_http_share_a_port() {
    let grpc = Router::new().fallback(|| async { "grpc" });
    let router = one_port(grpc, fixture().router, AccessControl::default());
    let ask = async |version: Version, kind: Option<&str>| {
        let mut request = Request::builder().version(version).uri("/health");
        if let Some(kind) = kind {
            request = request.header(CONTENT_TYPE, kind);
        }
        let request = request.body(Body::empty()).unwrap();
        answer(router.clone().oneshot(request).await.unwrap()).await.2
    };
    assert_eq!(ask(Version::HTTP_2, Some("application/grpc")).await, "grpc");
    assert_eq!(ask(Version::HTTP_2, Some("application/grpc+proto")).await, "grpc");
    assert!(ask(Version::HTTP_2, None).await.contains("health"));
    assert!(ask(Version::HTTP_2, Some("application/json")).await.contains("health"));
    assert!(ask(Version::HTTP_11, Some("application/grpc")).await.contains("health"));
}
