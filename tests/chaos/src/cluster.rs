//! Members as processes: started with etcd's flags, killed, stopped, and replaced.
//!
//! ```text
//!   <dir>/m1.log, m2.log …   what members say
//!   <dir>/m1/data …          what they keep; <dir>/m1 is a disk of its own if there is root
//! ```

use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as Listener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

use crate::disk::Disk;
use crate::proxy::Links;
use crate::rng::Rng;

/// Ports are taken from here: below those that the kernel gives to outgoing connections,
/// so that none takes a member's place while it is down.
const PORTS: std::ops::Range<i64> = 11_000..32_000;
/// How long a member has to end after a signal that asks it to.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// What all members are started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program.
    pub server: PathBuf,
    /// How many members.
    pub members: usize,
    /// Where everything is kept.
    pub dir: PathBuf,
    /// Milliseconds between heartbeats, and without a leader until an election.
    pub timing_ms: (u64, u64),
    /// Entries between snapshots.
    pub snapshot_count: u64,
    /// Whether each member gets a disk of its own.
    pub has_disks: bool,
    /// Flags besides.
    pub flags: Vec<String>,
}

/// One member.
pub struct Member {
    /// Its name.
    pub name: String,
    client: SocketAddr,
    /// Where it listens, and where others are told to find it.
    peer: SocketAddr,
    proxy: SocketAddr,
    /// Its disk, if it has one of its own.
    pub disk: Option<Disk>,
    child: Option<Child>,
    /// How often it was started.
    lives: Arc<AtomicU64>,
    is_joining: bool,
}

/// All members and the network between them.
pub struct Cluster {
    /// What they were started with.
    pub settings: Settings,
    /// The members.
    pub members: Vec<Member>,
    /// The network.
    pub links: Links,
}

/// A free port.
fn free_address(rng: &mut Rng) -> io::Result<SocketAddr> {
    const ATTEMPTS: usize = 1_000;
    for _ in 0..ATTEMPTS {
        let port = rng.between(PORTS.start, PORTS.end - 1) as u16;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if Listener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(io::Error::other("there is no free port"))
}

impl Cluster {
    /// Makes addresses, disks and proxies, and starts all members. Must be called in a
    /// runtime that outlives the cluster.
    pub async fn start(settings: Settings) -> io::Result<Cluster> {
        // Not of the seed: two campaigns of one seed may run side by side.
        let mut rng = Rng::new(u64::from(std::process::id()));
        let links = Links::new(settings.members);
        let mut members = Vec::new();
        for index in 0..settings.members {
            let name = format!("m{}", index + 1);
            let (client, peer) = (free_address(&mut rng)?, free_address(&mut rng)?);
            let proxy = free_address(&mut rng)?;
            let listener = TcpListener::bind(proxy).await?;
            tokio::spawn(links.clone().serve(listener, index, peer));
            let dir = settings.dir.join(&name);
            fs::create_dir_all(&dir)?;
            let image = settings.dir.join(format!("{name}.img"));
            let disk = settings.has_disks.then(|| Disk::new(&image, &dir)).transpose()?;
            let lives = Arc::new(AtomicU64::new(0));
            let (child, is_joining) = (None, false);
            members.push(Member { name, client, peer, proxy, disk, child, lives, is_joining });
        }
        let mut cluster = Cluster { settings, members, links };
        for member in 0..cluster.members.len() {
            cluster.spawn(member)?;
        }
        Ok(cluster)
    }

    /// Where clients find a member.
    pub fn endpoint(&self, member: usize) -> String {
        format!("http://{}", self.members[member].client)
    }

    /// Where members find a member.
    pub fn peer_url(&self, member: usize) -> String {
        format!("http://{}", self.members[member].proxy)
    }

    /// How often a member was started, as it changes.
    pub fn lives(&self, member: usize) -> Arc<AtomicU64> {
        self.members[member].lives.clone()
    }

    /// Where a member keeps its data.
    fn data_dir(&self, member: usize) -> PathBuf {
        self.settings.dir.join(&self.members[member].name).join("data")
    }

    /// Starts a member that does not run.
    pub fn spawn(&mut self, index: usize) -> io::Result<()> {
        let member = &self.members[index];
        let initial: Vec<String> = (0..self.members.len())
            .map(|other| format!("{}={}", self.members[other].name, self.peer_url(other)))
            .collect();
        let log = self.settings.dir.join(format!("{}.log", member.name));
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        let (heartbeat_ms, election_ms) = self.settings.timing_ms;
        let flags = [
            ("name", member.name.clone()),
            ("data-dir", self.data_dir(index).display().to_string()),
            ("listen-client-urls", self.endpoint(index)),
            ("advertise-client-urls", self.endpoint(index)),
            ("listen-peer-urls", format!("http://{}", member.peer)),
            ("initial-advertise-peer-urls", self.peer_url(index)),
            ("initial-cluster", initial.join(",")),
            (
                "initial-cluster-state",
                if member.is_joining { "existing" } else { "new" }.to_owned(),
            ),
            ("initial-cluster-token", "chaos".to_owned()),
            ("heartbeat-interval", heartbeat_ms.to_string()),
            ("election-timeout", election_ms.to_string()),
            ("snapshot-count", self.settings.snapshot_count.to_string()),
            ("snapshot-catchup-entries", (self.settings.snapshot_count / 2).to_string()),
        ];
        let mut command = guarded(&self.settings.server);
        command.args(flags.iter().map(|(flag, value)| format!("--{flag}={value}")));
        command.args(&self.settings.flags).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        let child = command.spawn()?;
        let member = &mut self.members[index];
        member.lives.fetch_add(1, Ordering::SeqCst);
        self.links.set_pid(index, child.id().unwrap_or(0));
        member.child = Some(child);
        Ok(())
    }

    /// Sends a signal to a member that runs.
    pub fn signal(&self, member: usize, signal: Signal) {
        let id = self.members[member].child.as_ref().and_then(Child::id);
        if let Some(pid) = id.and_then(|id| Pid::from_raw(id as i32)) {
            // It may have ended by itself just now, which is found out elsewhere.
            let _ = kill_process(pid, signal);
        }
    }

    /// Ends a member by a signal, and waits for that.
    pub async fn end(&mut self, member: usize, signal: Signal) -> io::Result<()> {
        self.signal(member, signal);
        self.links.set_pid(member, 0);
        let Some(mut child) = self.members[member].child.take() else { return Ok(()) };
        if tokio::time::timeout(STOP_TIMEOUT, child.wait()).await.is_err() {
            child.kill().await?;
            let name = &self.members[member].name;
            return Err(io::Error::other(format!("{name} did not end in {STOP_TIMEOUT:?}")));
        }
        Ok(())
    }

    /// Whether a member runs; if it has ended by itself, how.
    pub fn exit_of(&mut self, member: usize) -> Option<String> {
        let child = self.members[member].child.as_mut()?;
        let status = child.try_wait().ok()??;
        self.members[member].child = None;
        self.links.set_pid(member, 0);
        Some(status.to_string())
    }

    /// Whether nobody ended the member.
    pub fn runs(&self, member: usize) -> bool {
        self.members[member].child.is_some()
    }

    /// Takes a member's data away, so that it joins anew when it is started.
    pub fn wipe(&mut self, member: usize) -> io::Result<()> {
        fs::remove_dir_all(self.data_dir(member))?;
        self.members[member].is_joining = true;
        Ok(())
    }
}

/// A command whose process does not outlive this one, however this one ends: where there is
/// `setpriv`, the kernel sees to it.
fn guarded(program: &Path) -> Command {
    const SETPRIV: &str = "/usr/bin/setpriv";
    if !Path::new(SETPRIV).exists() {
        return Command::new(program);
    }
    let mut command = Command::new(SETPRIV);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
