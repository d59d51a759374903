//! Clusters of three members on this machine: started, looked at, killed, restarted.
//!
//! ```text
//! Cluster::start ──▶ kill(n) / stop(n) ──▶ restart(n) ──▶ settled() ──▶ … ──▶ drop
//! ```
//!
//! Members run with the defaults of their program: only names, addresses, directories
//! and the log level are given, and what a measurement is about. What is waited for is a
//! condition that the members themselves tell ([`Cluster::settled`]), never a time, and
//! never without an end. A cluster that goes out of scope is killed, and its directory
//! removed; that of a member that failed is in the error, as the end of its log.

use std::error::Error;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, CompactionResponse, HashKvRequest, HashKvResponse, RangeRequest,
    RangeResponse, StatusRequest, StatusResponse,
};
use prost::Message;

use crate::args::Args;
use crate::client::{Connection, frame};
use crate::workload;

/// Members of a cluster.
pub const MEMBERS: usize = 3;
/// How long a cluster may take to be as it is waited for.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long a member may take to end after SIGTERM.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long a member may take to say how it is.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a member may take for work on all it has.
const WORK_PATIENCE: Duration = Duration::from_secs(60);
const STATUS: &str = "etcdserverpb.Maintenance/Status";
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Bytes of a member's log that an error quotes.
const LOG_TAIL_BYTES: usize = 4_096;
/// Where ports are looked for: below those the kernel gives to outgoing connections, or
/// one of these could sit on a member's port while that is down.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

type Failure = Box<dyn Error>;

/// What all measurements of clusters are told.
pub struct Options {
    /// etcd and kvorum.
    pub programs: [PathBuf; 2],
    pub directory: PathBuf,
    pub assert: bool,
}

impl Options {
    /// Takes its flags out of `args`.
    pub fn from(args: &mut Args) -> Result<Options, Failure> {
        let options = Options {
            programs: [
                args.text("etcd", "target/judge/etcd").into(),
                args.text("kvorum", "target/release/kvorum").into(),
            ],
            directory: args.text("dir", "target/bench").into(),
            assert: args.flag("assert"),
        };
        std::fs::create_dir_all(&options.directory)?;
        Ok(options)
    }

    /// The programs whose names contain `only`, by name.
    pub fn sides(&self, only: &str) -> impl Iterator<Item = (&'static str, &Path)> {
        let programs = self.programs.iter().map(PathBuf::as_path);
        ["etcd", "kvorum"].into_iter().zip(programs).filter(move |(name, _)| name.contains(only))
    }
}

/// `--seed`, or one that nobody chose; says which.
pub fn seed(args: &mut Args) -> Result<u64, Failure> {
    let seed = match args.optional("seed")? {
        Some(seed) => seed,
        None => u64::from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.subsec_nanos()),
    };
    eprintln!("--seed {seed}");
    Ok(seed)
}

/// Three members.
pub struct Cluster {
    members: Vec<Member>,
    directory: PathBuf,
}

struct Member {
    /// The process, while it is to run.
    child: Option<Child>,
    /// The process that was killed, until somebody has the time to wait for it.
    killed: Option<Child>,
    endpoint: String,
    program: PathBuf,
    directory: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            for child in [&mut member.child, &mut member.killed].into_iter().flatten() {
                // It may be gone already.
                let _killed = child.kill();
                let _reaped = child.wait();
            }
        }
        let _removed = std::fs::remove_dir_all(&self.directory);
    }
}

impl Cluster {
    /// Starts three members of `program` below `parent` with `flags` besides their
    /// addresses, and waits until they are [`settled`](Self::settled).
    pub async fn start(program: &Path, parent: &Path, flags: &[&str]) -> Result<Cluster, Failure> {
        Cluster::start_in(&[], program, parent, flags).await
    }

    /// The same, with variables of the environment that are set besides those of this process.
    pub async fn start_in(
        environment: &[(&'static str, String)],
        program: &Path,
        parent: &Path,
        flags: &[&str],
    ) -> Result<Cluster, Failure> {
        let ports: [u16; 2 * MEMBERS] = free_ports()?;
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let (clients, peers) = ports.split_at(MEMBERS);
        let all: Vec<String> = peers
            .iter()
            .enumerate()
            .map(|(index, port)| format!("member-{index}={}", url(*port)))
            .collect();
        let directory = parent.join(format!("cluster-{}", clients[0]));
        let mut cluster = Cluster { members: Vec::new(), directory };
        for (index, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let name = format!("member-{index}");
            let directory = cluster.directory.join(&name);
            std::fs::create_dir_all(&directory)?;
            let data = directory.join("data").display().to_string();
            let (client_url, peer_url) = (url(*client), url(*peer));
            let initial = all.join(",");
            let own = [
                ["--name", &name],
                ["--data-dir", &data],
                ["--listen-client-urls", &client_url],
                ["--advertise-client-urls", &client_url],
                ["--listen-peer-urls", &peer_url],
                ["--initial-advertise-peer-urls", &peer_url],
                ["--initial-cluster", &initial],
                ["--log-level", "error"],
            ];
            cluster.members.push(Member {
                child: None,
                killed: None,
                endpoint: format!("127.0.0.1:{client}"),
                program: program.to_owned(),
                directory,
                arguments: own.concat().iter().chain(flags).map(ToString::to_string).collect(),
                environment: environment.to_vec(),
            });
        }
        for index in 0..MEMBERS {
            cluster.restart(index)?;
        }
        cluster.settled().await?;
        Ok(cluster)
    }

    /// `host:port` of every member.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.endpoint.clone()).collect()
    }

    /// Where member `index` keeps its data.
    pub fn data(&self, index: usize) -> PathBuf {
        self.members[index].directory.join("data")
    }

    /// The processes that run.
    pub fn pids(&self) -> Vec<u32> {
        (0..MEMBERS).filter_map(|index| self.pid(index)).collect()
    }

    /// The process of member `index`, if it runs.
    pub fn pid(&self, index: usize) -> Option<u32> {
        self.members[index].child.as_ref().map(Child::id)
    }

    /// Kills member `index` as a power cut would, and does not wait for it.
    pub fn kill(&mut self, index: usize) -> Result<(), Failure> {
        let member = &mut self.members[index];
        let mut child = member.child.take().ok_or("the member does not run")?;
        let result = child.kill();
        member.killed = Some(child);
        Ok(result?)
    }

    /// Asks member `index` to end and waits until it has.
    pub async fn stop(&mut self, index: usize) -> Result<(), Failure> {
        let member = &mut self.members[index];
        let child = member.child.as_mut().ok_or("the member does not run")?;
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let begun = Instant::now();
        while child.try_wait()?.is_none() {
            if begun.elapsed() > STOP_PATIENCE {
                return Err(format!("member {index} ignores SIGTERM").into());
            }
            tokio::time::sleep(POLL).await;
        }
        member.child = None;
        Ok(())
    }

    /// Starts member `index`, which was never started, or killed, or stopped.
    pub fn restart(&mut self, index: usize) -> Result<(), Failure> {
        let member = &mut self.members[index];
        if let Some(mut child) = member.killed.take() {
            child.wait()?;
        }
        let log = File::options().create(true).append(true).open(member.directory.join("log"))?;
        let child = Command::new(&member.program)
            .args(&member.arguments)
            .envs(member.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", member.program.display()))?;
        member.child = Some(child);
        Ok(())
    }

    /// Waits until every member that runs serves: all know the same leader, complain of
    /// nothing, and answer a linearizable read. The leader's number.
    pub async fn settled(&mut self) -> Result<usize, Failure> {
        self.wait("all members serve", async |cluster| {
            let leader = cluster.leader().await?;
            for member in cluster.members.iter().filter(|member| member.child.is_some()) {
                let get = RangeRequest { key: Bytes::from_static(b"any"), ..Default::default() };
                let method = "etcdserverpb.KV/Range";
                let _: RangeResponse =
                    call(&member.endpoint, method, &get, ANSWER_PATIENCE).await?;
            }
            Ok(leader)
        })
        .await
    }

    /// The number of the member that all members that run call leader.
    pub async fn leader(&self) -> Result<usize, Failure> {
        let mut found = None;
        for (index, member) in self.members.iter().enumerate() {
            if member.child.is_none() {
                continue;
            }
            let status = self.status(index).await?;
            if let Some(complaint) = status.errors.first() {
                return Err(format!("member {index} says {complaint:?}").into());
            }
            let id = status.header.map_or(0, |header| header.member_id);
            let view = (status.leader, status.raft_term);
            let (agreed, leader) = found.get_or_insert((view, None));
            if *agreed != view {
                return Err(format!(
                    "members disagree on the leader and the term: {agreed:?}, {view:?}"
                )
                .into());
            }
            if id == status.leader && id != 0 {
                *leader = Some(index);
            }
        }
        found.and_then(|(_, leader)| leader).ok_or_else(|| "no leader runs".into())
    }

    /// How member `index` says it is.
    pub async fn status(&self, index: usize) -> Result<StatusResponse, Failure> {
        call(&self.members[index].endpoint, STATUS, &StatusRequest {}, ANSWER_PATIENCE).await
    }

    /// The hash of what member `index` holds as of `revision`.
    pub async fn hash(&self, index: usize, revision: i64) -> Result<HashKvResponse, Failure> {
        let method = "etcdserverpb.Maintenance/HashKV";
        let request = HashKvRequest { revision };
        call(&self.members[index].endpoint, method, &request, WORK_PATIENCE).await
    }

    /// Asks `condition` again and again until it has an answer. Gives up when a member
    /// ends by itself, or after [`PATIENCE`], with what the condition said last.
    pub async fn wait<T>(
        &mut self,
        what: &str,
        mut condition: impl AsyncFnMut(&Cluster) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        loop {
            let error = match condition(self).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            for (index, member) in self.members.iter_mut().enumerate() {
                if let Some(child) = &mut member.child
                    && let Some(status) = child.try_wait()?
                {
                    let log = member.log();
                    return Err(format!("member {index} ended with {status}:\n{log}").into());
                }
            }
            if begun.elapsed() > PATIENCE {
                let logs: Vec<String> = self.members.iter().map(Member::log).collect();
                let (patience, logs) = (PATIENCE.as_secs(), logs.join("\n"));
                return Err(format!("not within {patience} s: {what}: {error}\n{logs}").into());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Member {
    /// The end of what it logged.
    fn log(&self) -> String {
        let log = std::fs::read(self.directory.join("log")).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(LOG_TAIL_BYTES)..];
        String::from_utf8_lossy(tail).into_owned()
    }
}

/// Forgets history older than what is `behind` revisions back on the member at `endpoint`.
pub async fn compact(endpoint: &str, behind: i64) -> Result<(), Failure> {
    let status: StatusResponse = call(endpoint, STATUS, &StatusRequest {}, ANSWER_PATIENCE).await?;
    let revision = status.header.ok_or("a status without a header")?.revision - behind;
    if revision > 0 {
        let compact = CompactionRequest { revision, physical: true };
        let method = "etcdserverpb.KV/Compact";
        let _: CompactionResponse = call(endpoint, method, &compact, WORK_PATIENCE).await?;
    }
    Ok(())
}

/// One call on a connection of its own.
pub async fn call<T: Message + Default>(
    endpoint: &str,
    method: &str,
    request: &impl Message,
    patience: Duration,
) -> Result<T, Failure> {
    let answer = tokio::time::timeout(patience, async {
        let mut connection = Connection::open(endpoint).await?;
        let path = connection.path(method)?;
        connection.unary(&path, frame(request)).await
    });
    let answer =
        answer.await.map_err(|_| format!("{method} of {endpoint}: no answer in {patience:?}"))?;
    Ok(T::decode(answer.map_err(|error| format!("{method} of {endpoint}: {error}"))?)?)
}

/// Ports nobody listens on.
pub fn free_ports<const N: usize>() -> Result<[u16; N], Failure> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let mut random = u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 32;
    // All are held until there are enough, so that none comes twice.
    let mut held = Vec::new();
    for _ in PORTS {
        if held.len() == N {
            break;
        }
        let offset = workload::next(&mut random) % PORTS.len() as u64;
        held.extend(TcpListener::bind(("127.0.0.1", PORTS.start + offset as u16)));
    }
    let ports: Vec<u16> = held
        .iter()
        .map(|listener| listener.local_addr().map(|address| address.port()))
        .collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| "too few ports are free".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_different_and_not_the_kernels_to_give() {
        let ports: [u16; 6] = free_ports().expect("ports");
        for (index, port) in ports.iter().enumerate() {
            assert!(PORTS.contains(port));
            assert!(!ports[..index].contains(port));
        }
    }
}
