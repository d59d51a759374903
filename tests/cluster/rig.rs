//! Members of a cluster as processes, and what tests do with them.
//!
//! The same rig starts kvorum and etcd, so that a test can carry out its steps on both and
//! compare what a client was told.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::etcdserverpb::cluster_client::ClusterClient;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::mvccpb::KeyValue;
use prost::Message as _;
use rustix::process::{Pid, Signal};
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::common::ca::Ca;
use crate::common::ports::free_port;
use crate::common::{http, judge, server};

/// How long anything may take before the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition outside this process is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How much of a failing member's log is printed, in lines.
const LOG_SHOWN_LINES: usize = 30;

/// Waits for `future`, but not for ever.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

/// Waits until `condition` gives something.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    soon(what, async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(POLL).await;
        }
    })
    .await
}

/// What etcdctl said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) code: Option<i32>,
}

impl Said {
    /// The text of the error without the time and place that etcdctl's logger puts before it.
    pub(crate) fn error(&self) -> String {
        let lines = self.err.lines().filter(|line| line.starts_with("Error: "));
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// A member: flags, a directory, and now and then a process.
pub(crate) struct Member {
    program: PathBuf,
    pub(crate) name: String,
    directory: PathBuf,
    scheme: &'static str,
    pub(crate) client_port: u16,
    pub(crate) peer_port: u16,
    /// Plain HTTP for `/health` and `/metrics`, if clients need a certificate.
    metrics_port: Option<u16>,
    /// `--initial-cluster` and the like, and what the test wants besides.
    pub(crate) flags: Vec<String>,
    child: Option<Child>,
}

impl Member {
    pub(crate) fn client_url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.client_port)
    }

    pub(crate) fn peer_url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.peer_port)
    }

    /// `host:port` that answers plain HTTP.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.metrics_port.unwrap_or(self.client_port))
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    /// Everything that it has said.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_SHOWN_LINES)..].join("\n")
    }

    /// Starts the process and returns at once.
    pub(crate) fn spawn(&mut self) {
        self.spawn_with(&[]);
    }

    /// The same with flags for this time only.
    pub(crate) fn spawn_with(&mut self, flags: &[&str]) {
        assert!(self.child.is_none(), "{} is running already", self.name);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = log.unwrap();
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &self.name, "--data-dir"])
            .arg(self.data_dir())
            .args(["--listen-client-urls", &self.client_url()])
            .args(["--advertise-client-urls", &self.client_url()])
            .args(["--listen-peer-urls", &self.peer_url()])
            .args(["--initial-advertise-peer-urls", &self.peer_url()])
            .args(&self.flags)
            .args(flags);
        if let Some(port) = self.metrics_port {
            command.arg(format!("--listen-metrics-urls=http://127.0.0.1:{port}"));
        }
        let child = command
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap());
    }

    /// Starts the process and waits until it is healthy.
    pub(crate) async fn start(&mut self) {
        self.spawn();
        self.healthy().await;
    }

    /// Waits for `GET /health` to answer 200.
    pub(crate) async fn healthy(&mut self) {
        let began = Instant::now();
        while self.get("/health").await.is_none_or(|(status, _)| status != 200) {
            if let Some(status) = self.exit_status() {
                panic!("{} ended with {status}:\n{}", self.name, self.log_tail());
            }
            assert!(began.elapsed() < PATIENCE, "{} unhealthy:\n{}", self.name, self.log_tail());
            tokio::time::sleep(POLL).await;
        }
    }

    /// `GET path`: status and body; `None` when nobody answers.
    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        let (address, path) = (self.address(), path.to_owned());
        let answer = tokio::task::spawn_blocking(move || http::get(&address, &path)).await.unwrap();
        answer.ok().map(|answer| (answer.status, answer.text()))
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exit_status().is_none()
    }

    fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().unwrap()
    }

    /// SIGKILL. Nothing happens if it has ended.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; how it ended.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// Waits for it to end by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                self.child = None;
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "{} still runs:\n{}", self.name, self.log_tail());
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it is running");
        rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// A connection that is made when it is needed, and again when it is lost.
    pub(crate) fn channel(&self) -> Channel {
        let mut endpoint = Endpoint::from_shared(self.client_url()).unwrap().tcp_nodelay(true);
        if self.scheme == "https" {
            let read = |name: &str| std::fs::read(self.directory.join(name)).unwrap();
            let tls = ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(read("ca.pem")))
                .identity(Identity::from_pem(read("client.pem"), read("client.key")));
            endpoint = endpoint.tls_config(tls).unwrap();
        }
        endpoint.connect_lazy()
    }

    pub(crate) fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel())
    }

    pub(crate) fn leases(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel())
    }

    pub(crate) fn members(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel())
    }

    pub(crate) fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel())
    }

    /// What it says of itself; `None` if it does not answer.
    pub(crate) async fn status(&self) -> Option<pb::StatusResponse> {
        let mut client = self.maintenance();
        let answer = client.status(pb::StatusRequest {});
        let answer = tokio::time::timeout(Duration::from_secs(5), answer).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    /// Its id.
    pub(crate) async fn id(&self) -> u64 {
        let status = until("its status", || self.status()).await;
        status.header.unwrap().member_id
    }

    /// Puts and returns the revision.
    pub(crate) async fn put(&self, key: &str, value: &str) -> Result<i64, Status> {
        let answer = self.kv().put(put(key, value)).await?;
        Ok(answer.into_inner().header.unwrap().revision)
    }

    /// A linearizable read.
    pub(crate) async fn read(&self, key: &str) -> Result<Option<KeyValue>, Status> {
        let answer = self.kv().range(get(key)).await?.into_inner();
        Ok(answer.kvs.first().map(|kv| KeyValue::decode(kv.clone()).unwrap()))
    }

    /// Its hash of everything, with the revision it is of.
    pub(crate) async fn hash(&self) -> Option<(i64, u32, i64)> {
        let mut client = self.maintenance();
        let answer = client.hash_kv(pb::HashKvRequest { revision: 0 }).await.ok()?.into_inner();
        Some((answer.header?.revision, answer.hash, answer.compact_revision))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of {}'s log ---\n{}\n---", self.name, self.log_tail());
        }
        self.kill();
    }
}

pub(crate) fn put(key: &str, value: &str) -> pb::PutRequest {
    pb::PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..pb::PutRequest::default()
    }
}

pub(crate) fn get(key: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.to_owned().into(), ..pb::RangeRequest::default() }
}

/// Some members, in a directory that goes away with them.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    program: PathBuf,
    flags: Vec<String>,
    is_encrypted: bool,
    pub(crate) directory: tempfile::TempDir,
}

impl std::ops::Index<usize> for Cluster {
    type Output = Member;

    fn index(&self, index: usize) -> &Member {
        &self.members[index]
    }
}

impl std::ops::IndexMut<usize> for Cluster {
    fn index_mut(&mut self, index: usize) -> &mut Member {
        &mut self.members[index]
    }
}

impl Cluster {
    /// Three members of kvorum that serve.
    pub(crate) async fn start(flags: &[&str]) -> Cluster {
        Cluster::of(&server::kvorum(), flags).await
    }

    /// Three members of `program` that serve.
    pub(crate) async fn of(program: &Path, flags: &[&str]) -> Cluster {
        let mut cluster = Cluster::new(program, 3, flags, false);
        cluster.start_all().await;
        cluster
    }

    /// Three members where every connection needs a certificate.
    pub(crate) async fn encrypted(program: &Path, flags: &[&str]) -> Cluster {
        let mut cluster = Cluster::new(program, 3, flags, true);
        cluster.start_all().await;
        cluster
    }

    /// `size` members that are not started yet.
    pub(crate) fn new(program: &Path, size: usize, flags: &[&str], is_encrypted: bool) -> Cluster {
        let directory = tempfile::Builder::new().prefix("kvorum-cluster-").tempdir().unwrap();
        let mut flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        if is_encrypted {
            let ca = Ca::new("cluster");
            let write = |name: &str, content: &str| {
                std::fs::write(directory.path().join(name), content).unwrap();
            };
            write("ca.pem", &ca.pem);
            for name in ["server", "peer", "client"] {
                let (certificate, key) = ca.issue(name);
                write(&format!("{name}.pem"), &certificate);
                write(&format!("{name}.key"), &key);
            }
            for (prefix, name) in [("", "server"), ("peer-", "peer")] {
                flags.push(format!("--{prefix}cert-file={name}.pem"));
                flags.push(format!("--{prefix}key-file={name}.key"));
                flags.push(format!("--{prefix}trusted-ca-file=ca.pem"));
                flags.push(format!("--{prefix}client-cert-auth"));
            }
        }
        let members = Vec::new();
        let program = program.to_owned();
        let mut cluster = Cluster { members, program, flags, is_encrypted, directory };
        for index in 1..=size {
            cluster.members.push(cluster.member(&format!("m{index}")));
        }
        let initial = cluster.initial();
        for member in &mut cluster.members {
            member.flags.push(format!("--initial-cluster={initial}"));
        }
        cluster
    }

    /// A member that does not belong to the cluster yet.
    fn member(&self, name: &str) -> Member {
        Member {
            program: self.program.clone(),
            name: name.to_owned(),
            directory: self.directory.path().to_owned(),
            scheme: if self.is_encrypted { "https" } else { "http" },
            client_port: free_port(),
            peer_port: free_port(),
            metrics_port: self.is_encrypted.then(free_port),
            flags: self.flags.clone(),
            child: None,
        }
    }

    /// `--initial-cluster` of all members.
    pub(crate) fn initial(&self) -> String {
        let members = self.members.iter();
        let members = members.map(|member| format!("{}={}", member.name, member.peer_url()));
        members.collect::<Vec<_>>().join(",")
    }

    /// A member that joins when it is started; `member add` is the caller's. Its index.
    pub(crate) fn join(&mut self, name: &str) -> usize {
        let member = self.member(name);
        self.members.push(member);
        let initial = self.initial();
        let last = self.members.len() - 1;
        let flags = &mut self.members[last].flags;
        flags.push(format!("--initial-cluster={initial}"));
        flags.push("--initial-cluster-state=existing".to_owned());
        last
    }

    /// Starts those that do not run and waits until all are healthy.
    pub(crate) async fn start_all(&mut self) {
        for member in &mut self.members {
            if !member.is_running() {
                member.kill();
                member.spawn();
            }
        }
        for member in &mut self.members {
            member.healthy().await;
        }
        self.leader().await;
    }

    /// The index of the leader, once all who run agree that it is one of them.
    pub(crate) async fn leader(&mut self) -> usize {
        let began = Instant::now();
        loop {
            if let Some(leader) = self.agreed_leader().await {
                return leader;
            }
            assert!(began.elapsed() < PATIENCE, "no leader that all agree on");
            tokio::time::sleep(POLL).await;
        }
    }

    async fn agreed_leader(&mut self) -> Option<usize> {
        let (mut leaders, mut ids) = (Vec::new(), Vec::new());
        for index in 0..self.members.len() {
            if self.members[index].is_running() {
                let status = self.members[index].status().await?;
                leaders.push((status.leader, status.raft_term));
                ids.push((status.header?.member_id, index));
            }
        }
        leaders.dedup();
        let [(leader, _)] = leaders[..] else { return None };
        ids.iter().find(|(id, _)| *id == leader).map(|(_, index)| *index)
    }

    /// The index of one that runs and does not lead.
    pub(crate) async fn follower(&mut self) -> usize {
        let leader = self.leader().await;
        let running: Vec<bool> = self.members.iter_mut().map(Member::is_running).collect();
        (0..running.len()).find(|index| *index != leader && running[*index]).unwrap()
    }

    /// Waits until all who run have the same data.
    pub(crate) async fn equal(&mut self) {
        let running: Vec<usize> =
            (0..self.members.len()).filter(|index| self.members[*index].is_running()).collect();
        let began = Instant::now();
        loop {
            let mut hashes = Vec::new();
            for index in &running {
                hashes.push(self.members[*index].hash().await);
            }
            if hashes.iter().all(|hash| hash.is_some() && *hash == hashes[0]) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "the members differ: {hashes:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Runs etcdctl against the member `at`. An argument with a space in it stays one.
    pub(crate) async fn etcdctl(&self, at: usize, arguments: &[&str]) -> Said {
        self.etcdctl_at(&self[at].client_url(), arguments).await
    }

    /// Runs etcdctl against these endpoints.
    pub(crate) async fn etcdctl_at(&self, endpoints: &str, arguments: &[&str]) -> Said {
        let etcdctl = judge::find("tests of a cluster").map(|judges| judges.etcdctl);
        let mut command = Command::new(etcdctl.expect("who needs it has asked for it"));
        command.args(["--endpoints", endpoints, "--command-timeout=20s"]).args(arguments);
        if self.is_encrypted {
            command.args(["--cacert=ca.pem", "--cert=client.pem", "--key=client.key"]);
        }
        command.current_dir(self.directory.path()).env("ETCDCTL_API", "3");
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Said { out: text(output.stdout), err: text(output.stderr), code: output.status.code() }
    }

    /// Runs etcdctl until it succeeds.
    pub(crate) async fn etcdctl_until(&self, at: usize, arguments: &[&str]) -> Said {
        let began = Instant::now();
        loop {
            let said = self.etcdctl(at, arguments).await;
            if said.code == Some(0) {
                return said;
            }
            assert!(began.elapsed() < PATIENCE, "{arguments:?}: {said:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Adds a member through member `at`, as soon as the cluster is willing.
    pub(crate) async fn add(
        &self,
        at: usize,
        peer_url: String,
        is_learner: bool,
    ) -> pb::MemberAddResponse {
        let request = pb::MemberAddRequest { peer_ur_ls: vec![peer_url], is_learner };
        until("the cluster to add a member", || async {
            let mut client = self[at].members();
            client.member_add(request.clone()).await.ok().map(tonic::Response::into_inner)
        })
        .await
    }
}
