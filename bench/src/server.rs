//! A single member on this machine, with a directory of its own, until it goes out of
//! scope.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::free_ports;
use crate::workload;

/// How long a server may take to start.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How often a starting server is tried.
const START_POLL: Duration = Duration::from_millis(2);
/// Where etcd and kvorum keep their raft log, in `member`.
const LOG: &str = "wal";
/// What the kernel counts the blocks of a file in.
const BLOCK_BYTES: u64 = 512;

/// A server that is killed when it goes out of scope.
pub struct Server {
    child: Child,
    endpoint: String,
    directory: PathBuf,
    startup: Duration,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already, and its directory with it.
        let _killed = self.child.kill();
        let _reaped = self.child.wait();
        let _removed = std::fs::remove_dir_all(&self.directory);
    }
}

impl Server {
    /// Starts `program` with a directory of its own below `parent`, and puts its first key.
    pub async fn start(
        program: &Path,
        parent: &Path,
        flags: &[&str],
    ) -> Result<Server, Box<dyn Error>> {
        let [client, peer] = free_ports()?;
        let directory = parent.join(format!("server-{client}"));
        std::fs::create_dir_all(&directory)?;
        let log = File::create(directory.join("log"))?;
        let [client_url, peer_url] = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
        let begun = Instant::now();
        let child = Command::new(program)
            .args(["--name", "bench", "--data-dir"])
            .arg(directory.join("data"))
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("bench={peer_url}")])
            .args(["--quota-backend-bytes", "8589934592", "--log-level", "error"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", program.display()))?;
        let endpoint = format!("127.0.0.1:{client}");
        let mut server = Server { child, endpoint, directory, startup: Duration::ZERO };
        while let Err(error) = workload::first_put(&server.endpoint).await {
            if let Some(status) = server.child.try_wait()? {
                let log = std::fs::read_to_string(server.directory.join("log"))?;
                return Err(format!("{} ended with {status}:\n{log}", program.display()).into());
            }
            if begun.elapsed() > START_PATIENCE {
                return Err(format!("{} does not answer: {error}", program.display()).into());
            }
            tokio::time::sleep(START_POLL).await;
        }
        server.startup = begun.elapsed();
        Ok(server)
    }

    /// `host:port` for clients.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// From its start to the answer to its first put.
    pub fn startup(&self) -> Duration {
        self.startup
    }

    /// Bytes that everything but the raft log takes on the disk.
    pub fn disk_bytes(&self) -> u64 {
        taken_below(&self.directory.join("data"))
    }
}

/// Bytes that the files below `directory` take, raft logs apart; what vanishes meanwhile
/// is not counted.
fn taken_below(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .filter(|entry| entry.file_name() != LOG)
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => taken_below(&entry.path()),
            Ok(metadata) => metadata.blocks() * BLOCK_BYTES,
            Err(_) => 0,
        })
        .sum()
}
