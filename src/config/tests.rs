//! Tables of command lines, environments and files, and what becomes of them.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::deprecated::{DEPRECATED, IGNORED};
use super::flag::{self, Effect, FLAGS};
use super::parse::parse_with;
use super::value::Value;
use super::*;

/// As for a member that exists already.
fn run_with(args: &[&str], env: &[(&str, &str)], file: Option<&str>) -> Outcome {
    run_member(args, env, file, true)
}

fn run_member(args: &[&str], env: &[(&str, &str)], file: Option<&str>, exists: bool) -> Outcome {
    let env = env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let file = file.map(str::to_owned);
    let read_file =
        |_: &Path| file.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"));
    parse_with(args.iter().map(OsString::from), env, read_file, |_| exists)
}

/// A configuration that is used, and all that the log of its server says about it.
fn accepted(outcome: Outcome) -> (Config, Vec<Notice>) {
    match outcome {
        Outcome::Run { config, mut notices } => {
            notices.extend(config.validate().unwrap());
            (*config, notices)
        }
        other => panic!("not accepted: {other:?}"),
    }
}

fn config(args: &[&str]) -> Config {
    accepted(run_with(args, &[], None)).0
}

fn refused(outcome: Outcome) -> (String, u8) {
    match outcome {
        Outcome::Fail { message, exit_code } => (message, exit_code),
        other => panic!("not refused: {other:?}"),
    }
}

fn refusal(args: &[&str]) -> (String, u8) {
    refused(run_with(args, &[], None))
}

fn from_yaml(text: &str) -> Config {
    accepted(run_with(&["--config-file=x.yml"], &[], Some(text))).0
}

/// The flags of etcd 3.7.1, less those it only keeps to say that they are deprecated.
const ETCD_FLAGS: &str = "
advertise-client-urls auth-token auth-token-ttl auto-compaction-mode auto-compaction-retention auto-tls
backend-batch-interval backend-batch-limit backend-bbolt-freelist-type bcrypt-cost
bootstrap-defrag-threshold-megabytes cert-file cipher-suites client-cert-allowed-hostname client-cert-auth
client-cert-file client-crl-file client-key-file compact-hash-check-time compaction-batch-limit
compaction-sleep-interval config-file corrupt-check-time cors data-dir discovery-cacert discovery-cert
discovery-dial-timeout discovery-endpoints discovery-fallback discovery-insecure-skip-tls-verify
discovery-insecure-transport discovery-keepalive-time discovery-keepalive-timeout discovery-key
discovery-password discovery-request-timeout discovery-srv discovery-srv-name discovery-token discovery-user
distributed-tracing-address distributed-tracing-instance-id distributed-tracing-sampling-rate
distributed-tracing-service-name downgrade-check-time election-timeout enable-distributed-tracing
enable-grpc-gateway enable-log-rotation enable-pprof feature-gates force-new-cluster grpc-keepalive-interval
grpc-keepalive-min-time grpc-keepalive-timeout heartbeat-interval host-whitelist initial-advertise-peer-urls
initial-cluster initial-cluster-state initial-cluster-token initial-election-tick-advance key-file
listen-client-http-urls listen-client-urls listen-metrics-urls listen-peer-urls log-format log-level
log-outputs log-rotation-config-json logger max-concurrent-streams max-learners max-request-bytes max-txn-ops
max-wals memory-mlock metrics name peer-auto-tls peer-cert-allowed-cn peer-cert-allowed-hostname
peer-cert-file peer-client-cert-auth peer-client-cert-file peer-client-key-file peer-crl-file peer-key-file
peer-skip-client-san-verification peer-trusted-ca-file pre-vote quota-backend-bytes raft-read-timeout
raft-write-timeout self-signed-cert-validity snapshot-catchup-entries snapshot-count socket-reuse-address
socket-reuse-port strict-reconfig-check tls-max-version tls-min-version trusted-ca-file unsafe-no-fsync
version wal-dir warning-apply-duration warning-unary-request-duration watch-progress-notify-interval";

/// Flags that etcd has not.
const OWN_FLAGS: [&str; 1] = ["import-etcd-data"];

#[test]
fn the_table_has_every_flag_of_etcd_once() {
    let mut table: Vec<&str> = flag::all().map(|flag| flag.name).collect();
    table.sort_unstable();
    let mut etcd: Vec<&str> = ETCD_FLAGS.split_whitespace().collect();
    assert_eq!(etcd.len(), 111);
    etcd.extend(OWN_FLAGS);
    etcd.sort_unstable();
    assert_eq!(table, etcd);
}

#[test]
fn a_flags_name_is_its_fields_name() {
    // The field is named by the debug output of the struct, in the order of the table.
    let debug = format!("{:#?}", Config::default());
    let fields: Vec<&str> = debug
        .lines()
        .filter(|line| line.starts_with("    ") && !line.starts_with("     "))
        .filter_map(|line| line.trim().split_once(": ").map(|(field, _)| field))
        .collect();
    let names: Vec<String> = FLAGS.iter().map(|flag| flag.name.replace('-', "_")).collect();
    let own = ["in_memory", "snapshot_send_bytes_per_sec"];
    let names: Vec<&str> = names.iter().map(String::as_str).chain(own).collect();
    assert_eq!(fields, names);
}

#[test]
fn every_flag_takes_its_own_default_in_every_form() {
    let mut defaults = Config::default();
    for flag in FLAGS {
        let text = flag.text(&mut defaults);
        let forms: [Vec<String>; 4] = [
            vec![format!("--{}={text}", flag.name)],
            vec![format!("-{}={text}", flag.name)],
            vec![format!("--{}", flag.name), text.clone()],
            vec![format!("-{}", flag.name), text.clone()],
        ];
        let is_bool = flag.field.is_some_and(|field| field(&mut defaults).is_bool());
        for form in &forms[..if is_bool { 2 } else { 4 }] {
            let mut args: Vec<&str> = form.iter().map(String::as_str).collect();
            if flag.name == "listen-client-urls" {
                args.push("--advertise-client-urls=http://localhost:2379");
            }
            let (mut got, _) = accepted(run_with(&args, &[], None));
            assert_eq!(flag.text(&mut got), text, "{form:?}");
        }
        let env_name = flag::env_name(flag.name);
        let env = [
            (env_name.as_str(), text.as_str()),
            ("ETCD_ADVERTISE_CLIENT_URLS", "http://localhost:2379"),
        ];
        let (mut got, notices) = accepted(run_with(&[], &env, None));
        assert_eq!(flag.text(&mut got), text, "{env_name}");
        assert_eq!(
            notices.iter().any(
                |notice| matches!(notice, Notice::EnvironmentUsed { name, .. } if *name == env_name)
            ),
            !text.is_empty(),
            "{env_name}"
        );
    }
}

#[test]
fn nothing_said_means_etcds_defaults() {
    let got = config(&[]);
    assert_eq!(got, Config::default());
    assert_eq!(got.name, "default");
    assert_eq!(got.data_dir, PathBuf::from("default.etcd"));
    assert_eq!(got.initial_cluster.text(), "default=http://localhost:2380");
    assert_eq!(
        (got.snapshot_count, got.max_txn_ops, got.max_request_bytes),
        (10_000, 128, 1_572_864)
    );
    assert_eq!(got.heartbeat(), Duration::from_millis(100));
    assert_eq!(got.election(), Duration::from_secs(1));
    assert_eq!(got.quota_bytes(), Some(2_147_483_648));
    assert_eq!(got.watch_progress_interval(), Duration::from_secs(600));
    assert_eq!(got.auto_compaction(), Ok(None));
    assert_eq!(
        config(&["--warning-unary-request-duration=0"]).slow_request(),
        Duration::from_millis(300)
    );
    assert_eq!((got.compaction_batch(), got.compaction_sleep()), (1000, Duration::from_millis(10)));
}

#[test]
fn the_syntax_is_that_of_gos_flag_package() {
    let got = config(&[
        "-name",
        "a",
        "--max-txn-ops",
        "0x20",
        "--unsafe-no-fsync",
        "--pre-vote=F",
        "-quota-backend-bytes=-1",
        "--",
    ]);
    assert_eq!(
        (got.name.as_str(), got.max_txn_ops, got.unsafe_no_fsync, got.pre_vote),
        ("a", 32, true, false)
    );
    assert_eq!(got.quota_bytes(), None);
    // The last of several wins; a value may begin with dashes when it stands alone.
    assert_eq!(config(&["--name=a", "--name", "--b"]).name, "--b");
    // An empty list of URLs is the default, as etcd has it.
    assert_eq!(config(&["--listen-metrics-urls="]).listen_metrics_urls, Vec::new());

    for (args, first_line, code) in [
        (&["--nope=1"][..], "flag provided but not defined: -nope", 2),
        (&["--nope", "1"], "flag provided but not defined: -nope", 2),
        (&["--name"], "flag needs an argument: -name", 2),
        (&["---name=x"], "bad flag syntax: ---name=x", 2),
        (&["--=x"], "bad flag syntax: --=x", 2),
        (&["--pre-vote=maybe"], "invalid boolean value \"maybe\" for -pre-vote: parse error", 2),
        (&["--version=maybe"], "invalid boolean value \"maybe\" for -version: parse error", 2),
        (
            &["--max-txn-ops=abc"],
            "invalid value \"abc\" for flag -max-txn-ops: parse error (expected a whole number, 0 or more)",
            2,
        ),
        (
            &["--snapshot-count=99999999999999999999"],
            "invalid value \"99999999999999999999\" for flag -snapshot-count: value out of range (expected a whole number, 0 or more)",
            2,
        ),
        (
            &["--max-concurrent-streams=x"],
            "invalid value \"x\" for flag -max-concurrent-streams: strconv.ParseUint: parsing \"x\": invalid syntax (expected a whole number from 0 to 4294967295)",
            2,
        ),
        (
            &["--initial-cluster-state=old"],
            "invalid value \"old\" for flag -initial-cluster-state: invalid value (expected new or existing)",
            2,
        ),
        (&["serve"], "\"serve\" is not a valid flag. See 'kvorum --help'.", 1),
        (&["--", "x"], "\"x\" is not a valid flag. See 'kvorum --help'.", 1),
    ] {
        let (message, exit_code) = refusal(args);
        assert_eq!(message.lines().next(), Some(first_line), "{args:?}");
        assert_eq!(exit_code, code, "{args:?}");
        assert_eq!(message.contains("Usage:"), code == 2, "{args:?}");
    }
}

#[test]
fn all_mistakes_are_named_at_once() {
    let (message, exit_code) =
        refusal(&["--nope", "v", "--max-txn-ops=x", "-what", "--grpc-keepalive-min-time=5"]);
    // Unknown names first: what follows them cannot be told apart from their values.
    assert_eq!(exit_code, 2);
    assert_eq!(
        message.lines().take(2).collect::<Vec<_>>(),
        ["flag provided but not defined: -nope", "flag provided but not defined: -what",]
    );
    let (message, _) =
        refusal(&["--max-txn-ops=x", "--grpc-keepalive-min-time=5", "--listen-peer-urls=http://a"]);
    assert_eq!(
        message.lines().filter(|line| line.starts_with("invalid value")).count(),
        3,
        "{message}"
    );

    let (message, exit_code) = refused(run_with(
        &[
            "--election-timeout=400",
            "--listen-client-urls=http://example.com:1",
            "--client-crl-file=/x",
        ],
        &[("ETCD_LOG_LEVEL", "loud"), ("ETCD_MAX_TXN_OPS", "many")],
        None,
    ));
    assert_eq!(exit_code, 1);
    for expected in [
        "6 mistakes",
        "--election-timeout[400ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        "where: --election-timeout=400 (the command line)",
        "fix:   raise --election-timeout to 500 or more",
        "expected IP in URL for binding (http://example.com:1)",
        "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        "where: --client-crl-file=/x (the command line)",
        "invalid value \"many\" for ETCD_MAX_TXN_OPS: parse error",
        "where: --log-level=loud (environment variable ETCD_LOG_LEVEL)",
    ] {
        assert!(message.contains(expected), "{expected}\nis not in\n{message}");
    }
}

#[test]
fn the_environment_is_used_unless_a_flag_conflicts() {
    let (got, notices) = accepted(run_with(
        &["--max-txn-ops=7"],
        &[
            ("ETCD_NAME", "n"),
            ("ETCD_NMAE", "x"),
            ("ETCD_VERSION", "3"),
            ("ETCDCTL_API", "3"),
            ("ETCD_DATA_DIR", ""),
            ("PATH", "/bin"),
        ],
        None,
    ));
    assert_eq!((got.name.as_str(), got.max_txn_ops), ("n", 7));
    assert_eq!(got.initial_cluster.text(), "n=http://localhost:2380");
    assert_eq!(got.data_dir, PathBuf::from("n.etcd"));
    assert!(
        notices.contains(&Notice::EnvironmentUsed { name: "ETCD_NAME".into(), value: "n".into() })
    );
    assert!(notices.contains(&Notice::EnvironmentUnknown { variable: "ETCD_NMAE=x".into() }));
    assert!(notices.contains(&Notice::EnvironmentSpecial { value: "3".into() }));
    assert!(!format!("{notices:?}").contains("ETCDCTL_API"));

    for value in ["y", ""] {
        let (message, exit_code) = refused(run_with(&["--name=x"], &[("ETCD_NAME", value)], None));
        assert_eq!(exit_code, 1);
        for expected in [
            "conflicting environment variable is shadowed by corresponding command-line flag (either unset environment variable or disable flag))",
            "(environment variable ETCD_NAME)",
            "unset ETCD_NAME, or remove --name from the command line",
        ] {
            assert!(message.contains(expected), "{message}");
        }
    }
    let (message, _) = refused(run_with(&[], &[("ETCD_DISCOVERY_PASSWORD", "geheim")], None));
    assert!(
        message.contains("--discovery-password=(hidden)") && !message.contains("geheim"),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn what_is_not_utf8_is_a_mistake_and_no_panic() {
    use std::os::unix::ffi::OsStringExt;
    let broken = OsString::from_vec(vec![b'-', b'-', b'x', b'=', 0xff]);
    let outcome = parse_with([broken.clone()], [], |_| Ok(String::new()), |_| true);
    assert_eq!(refused(outcome).1, 2);
    let outcome = parse_with(
        [],
        [(OsString::from("ETCD_NAME"), broken.clone())],
        |_| Ok(String::new()),
        |_| true,
    );
    assert!(refused(outcome).0.contains("ETCD_NAME is not UTF-8"));
    let outcome = parse_with(
        [],
        [(OsString::from("OTHER"), broken.clone()), (broken, OsString::new())],
        |_| Ok(String::new()),
        |_| true,
    );
    accepted(outcome);
}

#[test]
fn a_file_replaces_flags_and_environment() {
    let yaml = "
name: n1
data-dir: /var/lib/x
snapshot-count: 5
heartbeat-interval: 200
election-timeout: 2000
watch-progress-notify-interval: 5000000000
grpc-keepalive-interval: 10m
listen-client-urls: http://127.0.0.1:2379,http://10.0.0.1:2379
listen-metrics-urls: [http://127.0.0.1:2381]
advertise-client-urls: http://10.0.0.1:2379
initial-advertise-peer-urls: http://10.0.0.1:2380
log-outputs: [stderr, /var/log/x]
feature-gates: InitialCorruptCheck=true
quota-backend-bytes: -1
cors:
client-transport-security:
  cert-file: /c.crt
  key-file: /c.key
  trusted-ca-file: /ca.crt
  client-cert-auth: true
peer-transport-security:
  cert-file: /p.crt
  key-file: /p.key
socket-options:
  reuse-port: true
experimental-initial-corrupt-check: true
experimental-warning-apply-duration: 7000000
max-snapshots: 3
unheard-of: 1
client-crl-file: /not/a/key
";
    let (got, notices) = accepted(run_with(
        &["--config-file", "x.yml", "--name=ignored", "--snapshot-count=9"],
        &[("ETCD_NAME", "ignored"), ("ETCD_OTHER", "x")],
        Some(yaml),
    ));
    assert_eq!((got.name.as_str(), got.snapshot_count, got.heartbeat_interval), ("n1", 5, 200));
    assert_eq!(got.watch_progress_interval(), Duration::from_secs(5));
    assert_eq!(got.grpc_keepalive_interval, Duration::from_secs(600));
    assert_eq!(got.listen_client_urls.len(), 2);
    assert_eq!(got.initial_cluster.text(), "n1=http://10.0.0.1:2380");
    assert_eq!(got.log_outputs, [LogOutput::Stderr, LogOutput::File(PathBuf::from("/var/log/x"))]);
    assert_eq!(got.cors, ["*"]);
    assert_eq!(got.key_file, Some(PathBuf::from("/c.key")));
    assert_eq!(got.peer_cert_file, Some(PathBuf::from("/p.crt")));
    assert!(got.client_cert_auth && got.socket_reuse_port && !got.peer_client_cert_auth);
    assert!(got.feature_gates.enabled(Gate::InitialCorruptCheck));
    assert_eq!(got.warning_apply_duration, Duration::from_millis(7));
    assert_eq!(got.quota_bytes(), None);
    for what in ["--name", "--snapshot-count", "ETCD_NAME"] {
        assert!(
            notices.contains(&Notice::IgnoredBesideFile { what: what.into() }),
            "{what}: {notices:?}"
        );
    }
    for key in ["unheard-of", "client-crl-file"] {
        assert!(
            notices.contains(&Notice::FileKeyUnknown { key: key.into() }),
            "{key}: {notices:?}"
        );
    }
    let old: Vec<&str> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Deprecated { flag, .. } => Some(flag.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(
        old,
        [
            "experimental-initial-corrupt-check",
            "experimental-warning-apply-duration",
            "max-snapshots"
        ]
    );

    let (got, _) = accepted(run_with(
        &[],
        &[("ETCD_CONFIG_FILE", "y.yml"), ("ETCD_NAME", "ignored")],
        Some("name: file"),
    ));
    assert_eq!(got.name, "file");
    assert_eq!(from_yaml("").name, "default");
    assert_eq!(from_yaml("{\"name\": \"json\", \"max-txn-ops\": 9}").max_txn_ops, 9);
}

#[test]
fn mistakes_in_a_file_name_the_file_and_the_key() {
    for (yaml, expected) in [
        ("max-txn-ops: many", "where: --max-txn-ops=many (file x.yml, key max-txn-ops)"),
        ("pre-vote: 3", "invalid value \"3\" for pre-vote"),
        ("grpc-keepalive-interval: -5", "not a whole number of nanoseconds"),
        ("grpc-keepalive-interval: 1.5", "not a whole number of nanoseconds"),
        ("name: [a, b]", "not a single value"),
        ("peer-transport-security: yes", "invalid peer-transport-security"),
        ("peer-transport-security:\n  allowed-cn: [a]", "key peer-transport-security.allowed-cn"),
        ("initial-cluster-state: old", "invalid value \"old\" for initial-cluster-state"),
        (
            "heartbeat-interval: 1000",
            "--election-timeout[1000ms] should be at least as 5 times as --heartbeat-interval[1000ms]",
        ),
        ("discovery: http://x/y", "--discovery=http://x/y is not supported"),
        ("- a", "the file does not consist of `key: value` lines"),
        ("1: a", "a key is not a text"),
        ("name: a\nname: b", "the file is not YAML"),
        ("a: [", "the file is not YAML"),
    ] {
        let (message, exit_code) = refused(run_with(&["--config-file=x.yml"], &[], Some(yaml)));
        assert_eq!(exit_code, 1);
        assert!(message.contains(expected), "{yaml}\n{message}");
    }
    let (message, _) = refused(run_with(&["--config-file=gone.yml"], &[], None));
    assert!(
        message.contains("cannot read the configuration file gone.yml: no such file"),
        "{message}"
    );
}

#[test]
fn etcds_own_sample_file_is_accepted() {
    let sample = "
name: 'default'
data-dir:
wal-dir:
snapshot-count: 10000
listen-peer-urls: http://localhost:2380
cors:
discovery:
discovery-fallback: 'proxy'
discovery-proxy:
discovery-srv:
initial-cluster:
initial-cluster-token: 'etcd-cluster'
initial-cluster-state: 'new'
strict-reconfig-check: false
enable-pprof: true
client-transport-security:
  cert-file:
  client-cert-auth: false
peer-transport-security:
  allowed-cn:
log-outputs: [stderr]
auto-compaction-mode: periodic
auto-compaction-retention: \"1\"
cipher-suites: [
  TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
  TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
]
tls-min-version: 'TLS1.2'
tls-max-version: 'TLS1.3'
";
    let got = from_yaml(sample);
    assert_eq!(
        got.auto_compaction(),
        Ok(Some(AutoCompaction::Periodic(Duration::from_secs(3600))))
    );
    assert_eq!(
        got.tls_cipher_suites().iter().map(|suite| suite.id).collect::<Vec<_>>(),
        [0xc02f, 0xc030]
    );
    assert_eq!(got.tls_max_version, Some(TlsVersion::Tls13));
    assert_eq!(got.wal_dir, None);
}

#[test]
fn what_tools_start_etcd_with_is_accepted() {
    for args in [
        // controller-runtime's envtest
        &[
            "--advertise-client-urls=http://127.0.0.1:41233",
            "--data-dir=/tmp/x",
            "--listen-client-urls=http://127.0.0.1:41233",
            "--listen-peer-urls=http://127.0.0.1:0",
            "--unsafe-no-fsync=true",
        ][..],
        // Kubernetes' integration tests
        &[
            "--data-dir",
            "/tmp/D",
            "--listen-client-urls",
            "unix:///tmp/D/etcd.sock",
            "--advertise-client-urls",
            "http://127.0.0.111:0",
            "--listen-peer-urls",
            "http://127.0.0.1:0",
            "-log-level",
            "warn",
            "--quota-backend-bytes",
            "8589934592",
        ],
        // kubeadm
        &[
            "--advertise-client-urls=https://10.0.0.1:2379",
            "--cert-file=/pki/server.crt",
            "--client-cert-auth=true",
            "--data-dir=/var/lib/etcd",
            "--feature-gates=InitialCorruptCheck=true",
            "--initial-advertise-peer-urls=https://10.0.0.1:2380",
            "--initial-cluster=node1=https://10.0.0.1:2380",
            "--key-file=/pki/server.key",
            "--listen-client-urls=https://127.0.0.1:2379,https://10.0.0.1:2379",
            "--listen-metrics-urls=http://127.0.0.1:2381",
            "--listen-peer-urls=https://10.0.0.1:2380",
            "--name=node1",
            "--peer-cert-file=/pki/peer.crt",
            "--peer-client-cert-auth=true",
            "--peer-key-file=/pki/peer.key",
            "--peer-trusted-ca-file=/pki/ca.crt",
            "--snapshot-count=10000",
            "--trusted-ca-file=/pki/ca.crt",
            "--watch-progress-notify-interval=5s",
        ],
        // kubeadm of etcd 3.5
        &[
            "--experimental-initial-corrupt-check=true",
            "--experimental-watch-progress-notify-interval=5s",
            "--enable-v2=false",
            "--max-snapshots=5",
        ],
        // Kubernetes' local-up-cluster
        &[
            "--advertise-client-urls",
            "http://127.0.0.1:2379",
            "--data-dir",
            "/tmp/x",
            "--listen-client-urls",
            "http://127.0.0.1:2379",
            "--listen-peer-urls",
            "http://localhost:0",
            "--log-level=warn",
        ],
    ] {
        accepted(run_member(args, &[], None, false));
    }
}

#[test]
fn old_names_are_mapped_and_reported() {
    let (got, notices) = accepted(run_with(
        &[
            "--experimental-max-learners=3",
            "--experimental-initial-corrupt-check",
            "--proxy=off",
            "--discovery=",
            "--proxy-read-timeout=1",
        ],
        &[("ETCD_EXPERIMENTAL_WARNING_APPLY_DURATION", "3s"), ("ETCD_ENABLE_V2", "true")],
        None,
    ));
    assert_eq!(got.max_learners, 3);
    assert!(got.feature_gates.enabled(Gate::InitialCorruptCheck));
    assert_eq!(got.warning_apply_duration, Duration::from_secs(3));
    assert_eq!(
        notices.iter().filter(|notice| matches!(notice, Notice::Deprecated { .. })).count(),
        7
    );
    // The new name wins, wherever it stands.
    for args in [
        ["--max-learners=5", "--experimental-max-learners=3"],
        ["--experimental-max-learners=3", "--max-learners=5"],
    ] {
        assert_eq!(config(&args).max_learners, 5);
    }
    assert_eq!(
        accepted(run_with(
            &[],
            &[("ETCD_MAX_LEARNERS", "5"), ("ETCD_EXPERIMENTAL_MAX_LEARNERS", "3")],
            None
        ))
        .0
        .max_learners,
        5
    );
    assert!(
        refusal(&["--proxy=on"])
            .0
            .contains("--proxy=on is not supported: the v2 proxy was removed")
    );
    assert_eq!(refusal(&["--experimental-initial-corrupt-check=maybe"]).1, 2);
    for old in DEPRECATED {
        assert!(flag::Flag::named(old.name).is_none(), "{} is both old and new", old.name);
        if let super::deprecated::Meaning::Flag(now) = old.meaning {
            let now = flag::Flag::named(now)
                .unwrap_or_else(|| panic!("{} points to {now}, which is none", old.name));
            let field = now.field.expect("sets a field");
            assert_eq!(field(&mut Config::default()).is_bool(), old.is_bool, "{}", old.name);
        }
    }
}

#[test]
fn the_fifteen_ignored_names_are_ignored_in_silence() {
    assert_eq!(IGNORED.len(), 15);
    let plain = accepted(run_with(&[], &[], None));
    for name in IGNORED {
        for arg in [format!("--{name}"), format!("-{name}=7")] {
            let got = accepted(run_with(&[&arg], &[], None));
            assert_eq!(got, plain, "{arg}");
        }
    }
}

#[test]
fn help_version_and_commands() {
    for args in [&["--help"][..], &["-h"], &["-help"], &["--name=x", "--help", "--nope"]] {
        let Outcome::Print(help) = run_with(args, &[], None) else { panic!("{args:?}") };
        for flag in flag::all() {
            let line = format!("  --{} '", flag.name);
            assert_eq!(help.lines().filter(|l| l.starts_with(&line)).count(), 1, "{}", flag.name);
        }
        assert!(help.contains("InitialCorruptCheck=true|false (ALPHA - default=false)"));
    }
    assert_eq!(refusal(&["--nope", "--help"]).1, 2);
    let Outcome::Print(version) = run_with(&["--version"], &[("ETCD_NAME", "x")], None) else {
        panic!("no version")
    };
    assert_eq!(version.lines().next(), Some("etcd Version: 3.7.1"));
    assert_eq!(version.lines().count(), 4);
    accepted(run_with(&["--version", "--version=false"], &[], None));
    for command in ["gateway", "grpc-proxy"] {
        let (message, exit_code) = refusal(&[command, "start"]);
        assert!(message.contains("server only"));
        assert_eq!(exit_code, 1);
    }
}

#[test]
fn promises_that_cannot_be_kept_prevent_the_start() {
    for (args, expected) in [
        (&["--client-crl-file=/x"][..], "--client-crl-file is refused"),
        (&["--peer-crl-file=/x"], "--peer-crl-file is refused"),
        (&["--client-cert-allowed-hostname=a"], "--client-cert-allowed-hostname is refused"),
        (&["--peer-cert-allowed-cn=a"], "--peer-cert-allowed-cn is refused"),
        (&["--peer-cert-allowed-hostname=a"], "--peer-cert-allowed-hostname is refused"),
        (
            &["--auth-token=jwt,pub-key=a,priv-key=b"],
            "--auth-token is refused: users and roles are not available",
        ),
        (&["--host-whitelist=localhost"], "--host-whitelist is refused"),
        (
            &["--discovery-srv=example.com"],
            "--discovery-srv is refused: neither discovery services nor DNS are asked for members; \
             name them in --initial-cluster",
        ),
        (&["--discovery-endpoints=a", "--discovery-token=b"], "--discovery-endpoints is refused"),
        (&["--discovery-token=b"], "both --discovery-token and --discovery-endpoints must be set"),
        (
            &["--discovery-fallback=proxy"],
            "v2 proxy is deprecated, and --discovery-fallback can't be configured as \"proxy\"",
        ),
        (
            &["--discovery-srv=a", "--initial-cluster=default=http://a:1"],
            "multiple discovery or bootstrap flags are set",
        ),
    ] {
        let (message, exit_code) = refusal(args);
        assert!(message.contains(expected), "{args:?}\n{message}");
        assert_eq!(exit_code, 1);
    }
    accepted(run_with(
        &["--host-whitelist=", "--force-new-cluster", "--auth-token=simple"],
        &[],
        None,
    ));
}

#[test]
fn checks_have_etcds_texts() {
    for (args, expected) in [
        (&["--heartbeat-interval=0"][..], "--heartbeat-interval must be >0 (set to 0ms)"),
        (&["--election-timeout=0"], "--election-timeout must be >0 (set to 0ms)"),
        (
            &["--election-timeout=499"],
            "--election-timeout[499ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        ),
        (
            &["--election-timeout=50001"],
            "--election-timeout[50001ms] is too long, and should be set less than 50000ms",
        ),
        (
            &["--listen-client-urls=http://127.0.0.1:1"],
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (
            &["--listen-peer-urls=http://example.com:1"],
            "expected IP in URL for binding (http://example.com:1)",
        ),
        (
            &["--listen-metrics-urls=http://example.com:1"],
            "expected IP in URL for binding (http://example.com:1)",
        ),
        (
            &["--advertise-client-urls=http://:1"],
            "--advertise-client-urls \"http://:1\" must be in the format",
        ),
        (
            &["--initial-advertise-peer-urls=http://:1"],
            "--initial-advertise-peer-urls \"http://:1\" must be \"host:port\"",
        ),
        (&["--auto-compaction-mode=never"], "unknown auto-compaction-mode \"never\""),
        (&["--auto-compaction-mode="], "undefined auto-compaction-mode"),
        (
            &["--auto-compaction-retention=5x"],
            "error parsing CompactionRetention: time: unknown unit \"x\" in duration \"5x\"",
        ),
        (&["--auto-compaction-retention=-1"], "error parsing CompactionRetention"),
        (
            &["--auto-compaction-mode=revision", "--auto-compaction-retention=5m"],
            "is not a number of revisions",
        ),
        (&["--compact-hash-check-time=0"], "--compact-hash-check-time must be >0 (set to 0s)"),
        (
            &["--feature-gates=LeaseCheckpointPersist=true"],
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint",
        ),
        (
            &["--tls-min-version=TLS1.1"],
            "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--tls-max-version=TLS1.2"],
            "min version (TLS1.3) is greater than max version (TLS1.2)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--cipher-suites=TLS_AES_128_GCM_SHA256"],
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
        (&["--cipher-suites=TLS_NONE"], "unexpected TLS cipher suite \"TLS_NONE\""),
        (
            &["--cipher-suites=TLS_RSA_WITH_AES_128_GCM_SHA256"],
            "none of the cipher suites is offered",
        ),
        (&["--cert-file=/c"], "KeyFile and CertFile must both be present[key: , cert: /c]"),
        (&["--peer-key-file=/k"], "KeyFile and CertFile must both be present[key: /k, cert: ]"),
        (
            &[
                "--listen-client-urls=https://127.0.0.1:1",
                "--advertise-client-urls=https://127.0.0.1:1",
            ],
            "TLS key/cert (--cert-file, --key-file) must be provided for client url https://127.0.0.1:1 with HTTPS scheme",
        ),
        (&["--listen-metrics-urls=https://127.0.0.1:1"], "must be provided for metrics secure url"),
        (&["--client-cert-auth"], "--client-cert-auth needs --trusted-ca-file"),
        (&["--peer-client-cert-auth"], "--peer-client-cert-auth needs --peer-trusted-ca-file"),
        (
            &["--listen-peer-urls=https://127.0.0.1:1"],
            "cannot listen on TLS for https://127.0.0.1:1: KeyFile and CertFile are not presented",
        ),
        (
            &["--listen-client-http-urls=http://localhost:2379"],
            "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url http://localhost:2379",
        ),
        (&["--logger=capnslog"], "--logger=capnslog is removed in v3.5"),
        (&["--logger=x"], "unknown logger option \"x\""),
        (&["--log-format=xml"], "unknown log format: xml, supported values json, console"),
        (&["--log-level=loud"], "unrecognized level: \"loud\""),
        (&["--log-outputs=default,stdout"], "multi logoutput for \"default\" is not supported yet"),
    ] {
        let (message, exit_code) = refusal(args);
        assert!(message.contains(expected), "{args:?}\n{message}");
        assert!(message.contains("fix:"), "{args:?}\n{message}");
        assert_eq!(exit_code, 1);
    }
    for args in [
        &["--election-timeout=500"][..],
        &["--election-timeout=50000"],
        &[
            "--listen-client-urls=https://[::1]:0",
            "--advertise-client-urls=https://a:0",
            "--auto-tls",
        ],
        &["--listen-client-http-urls=http://localhost:0"],
        &["--tls-min-version="],
    ] {
        accepted(run_with(args, &[], None));
    }
}

#[test]
fn a_new_member_must_be_in_its_cluster() {
    for (args, expected) in [
        (
            &["--name=a", "--initial-cluster=b=http://localhost:2380"][..],
            "couldn't find local name \"a\" in the initial cluster configuration",
        ),
        (
            &["--initial-advertise-peer-urls=http://10.0.0.1:2380"],
            "--initial-cluster has default=http://localhost:2380 but missing from --initial-advertise-peer-urls=http://10.0.0.1:2380",
        ),
        (
            &[
                "--initial-advertise-peer-urls=http://10.0.0.1:1,http://10.0.0.1:2",
                "--initial-cluster=default=http://10.0.0.1:1",
            ],
            "--initial-advertise-peer-urls has http://10.0.0.1:2 but missing from --initial-cluster=default=http://10.0.0.1:1",
        ),
        (
            &["--initial-cluster=default=http://localhost:2380,default=http://localhost:2380"],
            "has duplicate url",
        ),
        (
            &[
                "--initial-cluster=default=http://localhost:2380,b=http://b:1,c=http://c:1,c=http://b:1",
            ],
            "initial cluster b=http://b:1,c=http://b:1,c=http://c:1,default=http://localhost:2380 has duplicate url",
        ),
        (
            &["--initial-cluster-state=existing"],
            "could not retrieve cluster information from the given URLs",
        ),
        (
            &["--initial-cluster-state=existing", "--initial-cluster=b=http://b:1,c=http://c:1"],
            "couldn't find local name \"default\" in the initial cluster configuration",
        ),
    ] {
        // A member that exists ignores all of this, as in etcd.
        let error = config(args).validate_new_member().expect_err("must be refused");
        assert!(error.to_string().contains(expected), "{args:?}\n{error}");
        let (message, exit_code) = refused(run_member(args, &[], None, false));
        assert!(
            message.contains(expected) && !message.contains("the program's Config"),
            "{args:?}\n{message}"
        );
        assert_eq!(exit_code, 1);
    }
    assert_eq!(
        config(&["--name=a", "--initial-advertise-peer-urls=http://10.0.0.1:1"])
            .validate_new_member(),
        Ok(())
    );
    let three = "--initial-cluster=a=http://a:1,b=http://b:1,b=http://b:2,c=http://c:1";
    for args in [
        &["--name=b", three, "--initial-advertise-peer-urls=http://b:2,http://b:1"][..],
        // One that joins has told the cluster its URLs before.
        &["--name=b", three, "--initial-cluster-state=existing"],
    ] {
        accepted(run_member(args, &[], None, false));
        assert_eq!(config(args).validate_new_member(), Ok(()));
    }
}

#[test]
fn durations_are_gos() {
    // From Go's time.ParseDuration.
    for (text, nanos) in [
        ("0", 0),
        ("-0", 0),
        ("1h2m", 3_720_000_000_000),
        ("+1.5h", 5_400_000_000_000),
        (".5s", 500_000_000),
        ("1.s", 1_000_000_000),
        ("1ns", 1),
        ("1us", 1_000),
        ("1µs", 1_000),
        ("1μs", 1_000),
        ("300ms", 300_000_000),
        ("9223372036854775807ns", 9_223_372_036_854_775_807),
        ("1.0000000000000000000000001s", 1_000_000_000),
        ("2m0.5s", 120_500_000_000),
        ("0s", 0),
    ] {
        assert_eq!(duration::parse(text), Ok(Duration::from_nanos(nanos)), "{text}");
    }
    for (text, error) in [
        ("", "time: invalid duration \"\""),
        ("3000d", "time: unknown unit \"d\" in duration \"3000d\""),
        ("1", "time: missing unit in duration \"1\""),
        (".s", "time: invalid duration \".s\""),
        ("9223372036854775808ns", "time: invalid duration \"9223372036854775808ns\""),
        ("3000000h", "time: invalid duration \"3000000h\""),
        (
            "99999999999999999999999999999999999999999h",
            "time: invalid duration \"99999999999999999999999999999999999999999h\"",
        ),
        ("1e3s", "time: unknown unit \"e\" in duration \"1e3s\""),
        ("5 s", "time: unknown unit \" s\" in duration \"5 s\""),
        ("1h-2m", "time: unknown unit \"h-\" in duration \"1h-2m\""),
        ("-5s", "time: negative duration \"-5s\""),
    ] {
        assert_eq!(duration::parse(text), Err(error.to_owned()), "{text}");
    }
    for (nanos, text) in [
        (0, "0s"),
        (7_200_000_000_000, "2h"),
        (90_000_000_000, "1m30s"),
        (1_500_000_000, "1s500ms"),
        (1_001, "1µs1ns"),
    ] {
        assert_eq!(duration::format(Duration::from_nanos(nanos)), text);
    }
}

proptest::proptest! {
    #[test]
    fn a_duration_written_is_read_as_the_same(nanos in 0..=i64::MAX as u64) {
        let duration = Duration::from_nanos(nanos);
        proptest::prop_assert_eq!(duration::parse(&duration::format(duration)), Ok(duration));
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in ".{0,40}") {
        let _ = duration::parse(&text);
        let _ = go_number::unsigned(&text, u64::MAX);
        let _ = go_number::signed(&text);
        let _ = text.parse::<Url>().map(|url| (url.scheme(), url.port(), url.with_port(7).port()));
        let _ = run_with(&[&text], &[], None);
        let _ = run_with(&["--config-file=x"], &[], Some(&text));
        let _ = run_with(&[], &[("ETCD_LISTEN_PEER_URLS", &text), ("ETCD_FEATURE_GATES", &text), ("ETCD_INITIAL_CLUSTER", &text)], None);
    }

    #[test]
    fn a_number_written_is_read_as_the_same(number in proptest::prelude::any::<i64>()) {
        proptest::prop_assert_eq!(go_number::signed(&number.to_string()), Ok(number));
        let magnitude = number.unsigned_abs();
        proptest::prop_assert_eq!(go_number::unsigned(&format!("0x{magnitude:x}"), u64::MAX), Ok(magnitude));
    }
}

#[test]
fn numbers_are_gos() {
    // From Go's strconv with base 0.
    for (text, number) in [
        ("0x10", 16),
        ("0b11", 3),
        ("0o17", 15),
        ("017", 15),
        ("1_000", 1000),
        ("0", 0),
        ("0x_f", 15),
    ] {
        assert_eq!(go_number::unsigned(text, u64::MAX), Ok(number), "{text}");
    }
    for text in ["", "_1", "1_", "1__0", "+1", "-1", "1e3", " 1", "0x", "08"] {
        assert_eq!(
            go_number::unsigned(text, u64::MAX),
            Err(go_number::NumberError::Syntax),
            "{text}"
        );
    }
    assert_eq!(
        go_number::unsigned("18446744073709551616", u64::MAX),
        Err(go_number::NumberError::Range)
    );
    assert_eq!(go_number::signed("+1"), Ok(1));
    assert_eq!(go_number::signed("-9223372036854775808"), Ok(i64::MIN));
    assert_eq!(go_number::signed("9223372036854775808"), Err(go_number::NumberError::Range));
    assert_eq!(go_number::signed("--1"), Err(go_number::NumberError::Syntax));
}

#[test]
fn urls_keep_their_text() {
    for (text, kept, scheme, address) in [
        (
            "http://localhost:0",
            "http://localhost:0",
            Scheme::Http,
            Address::Tcp { host: "localhost", port: 0 },
        ),
        (" HTTP://Foo:80 ", "http://Foo:80", Scheme::Http, Address::Tcp { host: "Foo", port: 80 }),
        (
            "https://[::1]:443",
            "https://[::1]:443",
            Scheme::Https,
            Address::Tcp { host: "::1", port: 443 },
        ),
        ("http://:1", "http://:1", Scheme::Http, Address::Tcp { host: "", port: 1 }),
        (
            "unix:///tmp/x.sock",
            "unix:///tmp/x.sock",
            Scheme::Unix,
            Address::Unix(Path::new("/tmp/x.sock")),
        ),
        (
            "unix://D/etcd.sock",
            "unix://D/etcd.sock",
            Scheme::Unix,
            Address::Unix(Path::new("D/etcd.sock")),
        ),
        ("unix:/a/b", "unix:/a/b", Scheme::Unix, Address::Unix(Path::new("/a/b"))),
        (
            "unixs://localhost:123",
            "unixs://localhost:123",
            Scheme::Unixs,
            Address::Unix(Path::new("localhost:123")),
        ),
    ] {
        let url: Url = text.parse().unwrap();
        assert_eq!((url.as_str(), url.scheme(), url.address()), (kept, scheme, address), "{text}");
        assert_eq!(url.to_string().parse::<Url>(), Ok(url));
    }
    for (text, error) in [
        ("foo:1", "URL scheme must be http, https, unix, or unixs: foo:1"),
        ("", "URL scheme must be http, https, unix, or unixs: "),
        ("http://127.0.0.1", "URL address does not have the form \"host:port\": http://127.0.0.1"),
        (
            "http://127.0.0.1:",
            "URL address does not have the form \"host:port\": http://127.0.0.1:",
        ),
        ("http://::1:80", "URL address does not have the form \"host:port\": http://::1:80"),
        ("http://h:+1", "URL address does not have the form \"host:port\": http://h:+1"),
        ("http:x", "URL address does not have the form \"host:port\": http:x"),
        ("http://foo:80/", "URL must not contain a path: http://foo:80/"),
        ("http://foo:65536", "URL port must be at most 65535: http://foo:65536"),
        ("http://a b:1", "URL must be a scheme, a host and a port and nothing else: http://a b:1"),
        ("http://u@h:1", "URL must be a scheme, a host and a port and nothing else: http://u@h:1"),
        ("unix://", "URL does not name a socket file: unix://"),
    ] {
        assert_eq!(text.parse::<Url>(), Err(error.to_owned()), "{text}");
    }
    let url: Url = "http://[::]:0".parse().unwrap();
    assert_eq!(url.with_port(2379).as_str(), "http://[::]:2379");
    let socket: Url = "unix://localhost:0".parse().unwrap();
    assert_eq!(socket.with_port(2379), socket);
    assert_eq!(
        url::join(&url::parse_list("http://b:1,http://a:1, http://b:1").unwrap()),
        "http://a:1,http://b:1"
    );
}

#[test]
fn feature_gates_follow_etcd() {
    let gates = |text: &str| {
        let mut gates = FeatureGates::default();
        gates.merge(text).map(|()| gates)
    };
    let some = gates("AllAlpha=true, InitialCorruptCheck = F,").unwrap();
    assert!(!some.enabled(Gate::InitialCorruptCheck));
    assert!(some.enabled(Gate::PriorityRequest) && some.enabled(Gate::FastLeaseKeepAlive));
    let none = gates("AllBeta=false").unwrap();
    assert!(!none.enabled(Gate::FastLeaseKeepAlive) && !none.enabled(Gate::PriorityRequest));
    assert!(FeatureGates::default().enabled(Gate::TxnModeWriteWithSharedBuffer));
    for (text, error) in [
        ("Foo=true", "unrecognized feature gate: Foo"),
        ("InitialCorruptCheck", "missing bool value for InitialCorruptCheck"),
        (
            "CompactHashCheck=yes",
            "invalid value of CompactHashCheck=yes, err: strconv.ParseBool: parsing \"yes\": invalid syntax",
        ),
    ] {
        assert_eq!(gates(text), Err(error.to_owned()));
        let (message, exit_code) = refusal(&[&format!("--feature-gates={text}")]);
        assert!(
            message
                .starts_with(&format!("invalid value {text:?} for flag -feature-gates: {error}")),
            "{message}"
        );
        assert_eq!(exit_code, 2);
    }
    let both = config(&[
        "--feature-gates=InitialCorruptCheck=true",
        "--feature-gates=CompactHashCheck=true",
    ]);
    assert!(
        both.feature_gates.enabled(Gate::InitialCorruptCheck)
            && both.feature_gates.enabled(Gate::CompactHashCheck)
    );
}

#[test]
fn auto_compaction_is_read_by_its_mode() {
    let got = |mode: &str, retention: &str| {
        let args = [
            format!("--auto-compaction-mode={mode}"),
            format!("--auto-compaction-retention={retention}"),
        ];
        config(&[&args[0], &args[1]]).auto_compaction().unwrap()
    };
    let periodic = |secs| Some(AutoCompaction::Periodic(Duration::from_secs(secs)));
    assert_eq!(got("periodic", "0"), None);
    assert_eq!(got("periodic", ""), None);
    assert_eq!(got("periodic", "5"), periodic(5 * 3600));
    assert_eq!(got("periodic", "5m"), periodic(300));
    assert_eq!(got("revision", "0"), None);
    assert_eq!(got("revision", "1000"), Some(AutoCompaction::Revision(1000)));
    assert!(refusal(&["--auto-compaction-retention=9999999999999999999"]).0.contains("too long"));
}

#[test]
fn cipher_suites_that_only_go_has_are_left_out_with_a_warning() {
    let (got, notices) = accepted(run_with(
        &[
            "--cipher-suites=TLS_RSA_WITH_AES_256_GCM_SHA384,TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305,TLS_AES_128_GCM_SHA256",
        ],
        &[],
        None,
    ));
    assert_eq!(
        got.tls_cipher_suites().iter().map(|suite| suite.name).collect::<Vec<_>>(),
        ["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"]
    );
    assert!(notices.iter().any(|notice| {
        notice.to_string().contains("TLS_RSA_WITH_AES_256_GCM_SHA384 is not offered")
    }));
    assert_eq!(Config::default().tls_cipher_suites().len(), 6);
    // The numbers are those of the TLS library.
    let library = tokio_rustls::rustls::crypto::ring::ALL_CIPHER_SUITES;
    for ours in Config::default().tls_cipher_suites() {
        let suite =
            library.iter().find(|suite| u16::from(suite.suite()) == ours.id).expect(ours.name);
        assert_eq!(format!("{:?}", suite.suite()), ours.name);
    }
}

#[test]
fn values_outside_the_usual_are_pointed_out() {
    for (args, expected) in [
        (
            &["--auto-tls", "--cert-file=/c", "--key-file=/k"][..],
            "ignoring client auto TLS since certs given",
        ),
        (&["--quota-backend-bytes=8589934593"][..], "quota exceeds the maximum value"),
        (&["--max-request-bytes=10485761"], "exceeded recommended request limit"),
        (
            &["--watch-progress-notify-interval=99ms"],
            "watch progress interval 99ms is too short, using 100ms",
        ),
        (&["--unsafe-no-fsync"], "fsync is disabled"),
        (&[], "it isn't recommended to use default name"),
        (&[], "'data-dir' was empty; using default default.etcd"),
        (
            &["--cert-file=/c", "--key-file=/k"],
            "ignoring key and cert files for http://localhost:2379",
        ),
        (
            &["--peer-auto-tls", "--peer-cert-file=/c", "--peer-key-file=/k"],
            "ignoring peer auto TLS since certs given",
        ),
        (
            &["--peer-cert-file=/c", "--peer-key-file=/k"],
            "ignoring key and cert files for http://localhost:2380",
        ),
        (
            &["--peer-client-cert-auth", "--peer-trusted-ca-file=/c"],
            "scheme is HTTP while --peer-client-cert-auth is enabled; ignoring client cert auth for http://localhost:2380",
        ),
    ] {
        let (_, notices) = accepted(run_with(args, &[], None));
        assert!(
            notices.iter().any(|notice| notice.to_string().contains(expected)),
            "{args:?}\n{notices:?}"
        );
    }
    assert_eq!(
        config(&["--watch-progress-notify-interval=99ms"]).watch_progress_interval(),
        Duration::from_millis(100)
    );
}

#[test]
fn gates_without_effect_are_reported_when_they_are_switched() {
    for (gates, expected) in [
        ("InitialCorruptCheck=true", &[][..]),
        ("CompactHashCheck=false,FastLeaseKeepAlive=true", &[]),
        ("CompactHashCheck=true,FastLeaseKeepAlive=false", &["FastLeaseKeepAlive=false"]),
        ("AllBeta=false", &["FastLeaseKeepAlive=false", "TxnModeWriteWithSharedBuffer=false"]),
    ] {
        let warnings = config(&[&format!("--feature-gates={gates}")]).validate().unwrap();
        let idle: Vec<&str> = warnings
            .iter()
            .filter_map(|notice| match notice {
                Notice::NoEffect { flag, value, .. } if flag == "feature-gates" => {
                    Some(value.as_str())
                }
                _ => None,
            })
            .collect();
        assert_eq!(idle, expected, "{gates}");
    }
}

#[test]
fn flags_without_effect_are_reported_once_and_only_when_set() {
    for flag in FLAGS {
        let Effect::Nothing(why) = flag.effect else { continue };
        let mut changed = Config::default();
        let default = flag.text(&mut changed);
        let field = flag.field.expect("sets a field");
        // A value that any of the types takes, and that is not the default.
        let other =
            ["false", "true", "7", "7s", "/x", "http://127.0.0.1:7"].into_iter().find(|text| {
                field(&mut changed).set(text).is_ok() && flag.text(&mut changed) != default
            });
        assert!(other.is_some(), "{} cannot be changed", flag.name);
        let expected = Notice::NoEffect {
            flag: flag.name.into(),
            value: flag.text(&mut changed),
            reason: why.into(),
        };
        let mut check = changed.clone();
        // Complete pairs, so that nothing else is wrong.
        for path in [
            &mut check.client_cert_file,
            &mut check.client_key_file,
            &mut check.peer_cert_file,
            &mut check.peer_key_file,
            &mut check.peer_client_cert_file,
            &mut check.peer_client_key_file,
        ] {
            path.get_or_insert_with(|| PathBuf::from("/x"));
        }
        let warnings = check.validate().unwrap_or_else(|error| panic!("{}: {error}", flag.name));
        assert_eq!(
            warnings.iter().filter(|notice| **notice == expected).count(),
            1,
            "{}",
            flag.name
        );
    }
    let quiet = Config::default().validate().unwrap();
    assert!(!quiet.iter().any(|notice| matches!(notice, Notice::NoEffect { .. })));
}

#[test]
fn a_programs_mistakes_are_attributed_to_it() {
    let wrong = Config { election_timeout: 1, ..Config::in_memory() };
    let error = wrong.validate().expect_err("too short");
    assert_eq!(error.problems.len(), 1);
    assert_eq!(
        (error.problems[0].flag.as_str(), &error.problems[0].origin),
        ("election-timeout", &Origin::Program)
    );
    let none = Config { advertise_client_urls: Vec::new(), ..Config::in_memory() };
    assert!(
        none.validate()
            .expect_err("required")
            .to_string()
            .contains("--advertise-client-urls is required")
    );
}

#[test]
fn ready_made_configurations_are_valid() {
    for config in [Config::default(), Config::in_memory(), Config::for_test(Path::new("/tmp/x"))] {
        config.validate().unwrap();
        assert_eq!(config.validate_new_member(), Ok(()));
    }
    assert!(Config::in_memory().in_memory);
    assert_eq!(Config::for_test(Path::new("/tmp/x")).member_dir(), PathBuf::from("/tmp/x/member"));
    assert!(Config::in_memory().listen_client_urls.iter().all(|url| url.port() == Some(0)));
}

/// `docs/flags.md`, as the table has it.
fn documentation() -> String {
    let mut text = String::from(
        "# Flags\n\n\
         Every flag of etcd is understood, in all forms: `--flag=v`, `--flag v`, `-flag v`; as a variable, `ETCD_` and the\n\
         flag in capitals with `_` for `-`; and as a key of the YAML file that `--config-file` names.\n\n\
         This file is made from the table in `src/config/flag.rs`; after changing that, run\n\
         `KVORUM_UPDATE_DOCS=1 cargo test --lib config`.\n",
    );
    let mut defaults = Config::default();
    let mut row = |flag: &flag::Flag, last: &str| {
        let default = help::shown_default(flag, &mut defaults);
        let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
        let key = flag.yaml_path().map(|path| format!("`{path}`")).unwrap_or_default();
        format!("| `--{}` | {default} | {key} | {last} |\n", flag.name)
    };
    text.push_str(
        "\n## Flags that work\n\n| flag | default | key in a file | |\n|---|---|---|---|\n",
    );
    for flag in flag::all().filter(|flag| flag.effect == Effect::Works) {
        let help = flag.help.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ");
        text.push_str(&row(flag, &help));
    }
    text.push_str(
        "\n## Flags that have no effect\n\nThey are accepted, and the log says so when one is set to something else than its default.\n\n\
         | flag | default | key in a file | why |\n|---|---|---|---|\n",
    );
    for flag in flag::all() {
        if let Effect::Nothing(why) = flag.effect {
            text.push_str(&row(flag, why));
        }
    }
    text.push_str(
        "\n## Flags that prevent the start\n\nThey promise what this version cannot keep, so anything but the default is refused.\n\n\
         | flag | default | key in a file | why |\n|---|---|---|---|\n",
    );
    for flag in flag::all() {
        if let Effect::Refused(why) = flag.effect {
            text.push_str(&row(flag, why));
        }
    }
    text.push_str("\n## Names of older releases\n\nThey are accepted, and the log names what to write instead.\n\n| name | now |\n|---|---|\n");
    for old in DEPRECATED {
        use super::deprecated::Meaning;
        let now = match old.meaning {
            Meaning::Flag(now) => format!("`--{now}`"),
            Meaning::Gate(gate) => format!("`--feature-gates={}=…`", gate.name()),
            Meaning::Dropped(why) => format!("no effect: {why}"),
            Meaning::RefusedUnless(harmless, why) => {
                let harmless: Vec<String> =
                    harmless.iter().map(|text| format!("`{text:?}`")).collect();
                format!("refused unless it is {}: {why}", harmless.join(" or "))
            }
        };
        text.push_str(&format!("| `--{}` | {now} |\n", old.name));
    }
    text.push_str("\nAccepted without a word, as by etcd: ");
    text.push_str(&IGNORED.iter().map(|name| format!("`--{name}`")).collect::<Vec<_>>().join(", "));
    text.push_str(".\n");
    text
}

#[test]
fn the_documentation_lists_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/flags.md");
    if std::env::var_os("KVORUM_UPDATE_DOCS").is_some() {
        std::fs::write(&path, documentation()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(
        written == documentation(),
        "docs/flags.md is stale: run KVORUM_UPDATE_DOCS=1 cargo test --lib config"
    );
}

#[test]
fn an_origin_has_a_scheme() {
    let (message, _) = refusal(&["--cors=https://example.com,foo"]);
    assert!(message.contains("--cors") && message.contains("http or https: foo"), "{message}");
    for origins in ["*", "https://example.com,http://localhost:8080"] {
        let outcome = run_with(&[&format!("--cors={origins}")], &[], None);
        assert!(matches!(outcome, Outcome::Run { .. }), "{outcome:?}");
    }
}
