//! The binary as a script sees it, and the sample configurations through the real parser.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvorum::config::{self, Notice, Outcome};

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    // Variables of the machine that runs the tests must not matter.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCD_") {
            command.env_remove(name);
        }
    }
    command
}

fn kvorum(args: &[&str]) -> Output {
    command(Path::new(env!("CARGO_BIN_EXE_kvorum")), args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn version_has_etcds_four_lines() {
    let output = kvorum(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    let stdout = text(&output.stdout);
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], "etcd Version: 3.7.1");
    let keys: Vec<&str> = lines.iter().map(|line| line.split_once(": ").unwrap().0).collect();
    assert_eq!(keys, ["etcd Version", "Git SHA", "Go Version", "Go OS/Arch"]);
    assert!(lines[3].ends_with("/amd64") || lines[3].ends_with("/arm64"), "{}", lines[3]);
}

#[test]
fn help_has_each_flag_at_the_start_of_a_line() {
    for arg in ["--help", "-h"] {
        let output = kvorum(&[arg]);
        assert_eq!(output.status.code(), Some(0));
        let help = text(&output.stdout) + &text(&output.stderr);
        // As envtest looks for it: (?m)^\s*--unsafe-no-fsync\b
        let is_flag = |line: &str| {
            let rest = line.trim_start().strip_prefix("--unsafe-no-fsync");
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        };
        assert_eq!(help.lines().filter(|line| is_flag(line)).count(), 1);
    }
}

#[test]
fn exit_codes_tell_the_mistake() {
    for (args, exit_code, expected) in [
        (&["--nope"][..], 2, "flag provided but not defined: -nope\n"),
        (&["--max-txn-ops=x"], 2, "invalid value \"x\" for flag -max-txn-ops: parse error"),
        (&["stray"], 1, "\"stray\" is not a valid flag"),
        (&["grpc-proxy", "start"], 1, "\"grpc-proxy\" is not available"),
        (
            &["--listen-client-urls=http://127.0.0.1:0"],
            1,
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (
            &["--config-file=/no/such/file.yml"],
            1,
            "cannot read the configuration file /no/such/file.yml",
        ),
        (
            &["--initial-cluster-state=existing", "--data-dir=/no/such/directory"],
            1,
            "could not retrieve cluster information from the given URLs",
        ),
        (
            &["--log-outputs=/no/such/directory/log", "--data-dir=/no/such/directory"],
            1,
            "cannot open the log file /no/such/directory/log",
        ),
    ] {
        let output = kvorum(args);
        let stderr = text(&output.stderr);
        assert!(stderr.contains(expected), "{args:?}\n{stderr}");
        assert_eq!(output.status.code(), Some(exit_code), "{args:?}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
    }
}

#[test]
fn a_variable_conflicts_with_its_flag() {
    let output = command(Path::new(env!("CARGO_BIN_EXE_kvorum")), &["--name=a"])
        .env("ETCD_NAME", "b")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(
        "conflicting environment variable is shadowed by corresponding command-line flag"
    ));
}

#[cfg(unix)]
#[test]
fn the_name_etcd_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let etcd = directory.path().join("etcd");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kvorum"), &etcd).unwrap();
    for args in [&["--version"][..], &["--help"], &["--nope"]] {
        let (as_etcd, as_kvorum) = (command(&etcd, args).output().unwrap(), kvorum(args));
        assert_eq!(
            (as_etcd.status.code(), as_etcd.stdout, as_etcd.stderr),
            (as_kvorum.status.code(), as_kvorum.stdout, as_kvorum.stderr)
        );
    }
}

#[test]
fn a_closed_pipe_is_no_crash() {
    // Nobody reads: the help does not fit the pipe, or meets a closed end.
    let mut child = command(Path::new(env!("CARGO_BIN_EXE_kvorum")), &["--help"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
}

#[cfg(unix)]
#[test]
fn systemd_is_told_and_a_signal_ends_it_with_0() {
    let directory = tempfile::tempdir().unwrap();
    let notify = directory.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let data = format!("--data-dir={}", directory.path().join("data").display());
    let any = "http://127.0.0.1:0";
    let (listen, advertise) =
        (format!("--listen-client-urls={any}"), format!("--advertise-client-urls={any}"));
    let args =
        [&data, &listen, &advertise, "--listen-peer-urls=http://127.0.0.1:0", "--max-wals=7"];
    let child = command(Path::new(env!("CARGO_BIN_EXE_kvorum")), &args)
        .env("NOTIFY_SOCKET", &notify)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut buffer = [0; 64];
    let length = loop {
        // A child of another test that ends interrupts the call.
        match socket.recv(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            received => break received.unwrap(),
        }
    };
    assert_eq!(text(&buffer[..length]), "READY=1");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    // Whatever reads etcd's log reads this one.
    let stderr = text(&output.stderr);
    let lines: Vec<serde_json::Value> =
        stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().all(|line| line["level"].is_string()
        && line["ts"].is_string()
        && line["msg"].is_string()));
    assert!(
        lines.iter().any(|line| line["flag-name"] == "max-wals" && line["value"] == "7"),
        "{stderr}"
    );
}

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn parse(args: Vec<String>) -> Outcome {
    config::parse(args.into_iter().map(OsString::from), [])
}

#[test]
fn every_sample_file_is_read_without_complaint() {
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(sample("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match parse(vec![format!("--config-file={}", path.display())]) {
            Outcome::Run { config, mut notices } => {
                notices.extend(config.validate().unwrap());
                let complaints: Vec<&Notice> = notices
                    .iter()
                    .filter(|notice| {
                        matches!(
                            notice,
                            Notice::FileKeyUnknown { .. }
                                | Notice::Deprecated { .. }
                                | Notice::Advice { warning: true, .. }
                        )
                    })
                    .collect();
                assert!(complaints.is_empty(), "{name}: {complaints:?}");
                assert_eq!(config.validate_new_member(), Ok(()), "{name}");
                let members = if name == "single-node.yml" { 1 } else { 3 };
                assert_eq!(config.initial_cluster.len(), members, "{name}");
            }
            other => panic!("{name}: {other:?}"),
        }
        seen.push(name);
    }
    seen.sort();
    assert_eq!(
        seen,
        [
            "one-machine-1.yml",
            "one-machine-2.yml",
            "one-machine-3.yml",
            "single-node.yml",
            "three-nodes-1.yml",
            "three-nodes-2.yml",
            "three-nodes-3.yml"
        ]
    );
}

#[test]
fn the_static_pods_command_is_read() {
    let pod = std::fs::read_to_string(sample("kubernetes-static-pod.yaml")).unwrap();
    let pod: serde_yaml_ng::Value = serde_yaml_ng::from_str(&pod).unwrap();
    let command = pod["spec"]["containers"][0]["command"].as_sequence().unwrap();
    let args: Vec<String> = command.iter().map(|arg| arg.as_str().unwrap().to_owned()).collect();
    assert_eq!(args[0], "kvorum");
    match parse(args[1..].to_vec()) {
        Outcome::Run { config, .. } => assert_eq!(config.listen_metrics_urls[0].port(), Some(2381)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_unit_starts_a_sample_that_exists() {
    let unit = std::fs::read_to_string(sample("kvorum.service")).unwrap();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let file = start.split_once("--config-file=").unwrap().1.rsplit('/').next().unwrap();
    assert!(sample(file).exists(), "{file}");
    assert!(unit.contains("Type=notify"));
}
