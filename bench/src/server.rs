//! A single member on this machine, with a [`Place`] of its own, until it goes out of
//! scope.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::CallError;
use crate::cluster::free_ports;
use crate::workload;

/// How long a server may take to start, with whatever it has to load.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// How often a starting server is tried.
const START_POLL: Duration = Duration::from_millis(2);
/// Where etcd and kvorum keep their raft log, in `member`.
const LOG: &str = "wal";
/// What the kernel counts the blocks of a file in.
const BLOCK_BYTES: u64 = 512;

/// A directory and ports for a server. The directory goes when this does.
pub struct Place {
    directory: PathBuf,
    client: u16,
    peer: u16,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _removed = std::fs::remove_dir_all(&self.directory);
    }
}

impl Place {
    /// One below `parent`.
    pub fn below(parent: &Path) -> Result<Place, Box<dyn Error>> {
        let [client, peer] = free_ports()?;
        let directory = parent.join(format!("server-{client}"));
        std::fs::create_dir_all(&directory)?;
        Ok(Place { directory, client, peer })
    }

    /// A file or directory in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The data directory, which nobody has made.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// The flags that tell a server, or a restore, whose data that is.
    pub fn member(&self) -> [String; 6] {
        let peer_url = self.peer_url();
        let cluster = format!("bench={peer_url}");
        [
            "--name",
            "bench",
            "--initial-advertise-peer-urls",
            &peer_url,
            "--initial-cluster",
            &cluster,
        ]
        .map(str::to_owned)
    }

    fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer)
    }

    /// Starts `program` here, and waits until `first` succeeds with its endpoint.
    pub async fn start(
        self,
        program: &Path,
        flags: &[&str],
        first: impl AsyncFn(&str) -> Result<(), CallError>,
    ) -> Result<Server, Box<dyn Error>> {
        let log = File::create(self.path("log"))?;
        let (peer_url, endpoint) = (self.peer_url(), format!("127.0.0.1:{}", self.client));
        let client_url = format!("http://{endpoint}");
        let begun = Instant::now();
        let child = Command::new(program)
            .args(self.member())
            .arg("--data-dir")
            .arg(self.data())
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url])
            .args(["--quota-backend-bytes", "8589934592", "--log-level", "error"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", program.display()))?;
        let mut server = Server { child, place: self, endpoint, startup: Duration::ZERO };
        while let Err(error) = first(&server.endpoint).await {
            if let Some(status) = server.child.try_wait()? {
                let log = std::fs::read_to_string(server.place.path("log"))?;
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
}

/// A server that is killed when it goes out of scope.
pub struct Server {
    child: Child,
    place: Place,
    endpoint: String,
    startup: Duration,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _killed = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Server {
    /// Starts `program` in a place of its own below `parent`, and puts its first key.
    pub async fn start(
        program: &Path,
        parent: &Path,
        flags: &[&str],
    ) -> Result<Server, Box<dyn Error>> {
        Place::below(parent)?.start(program, flags, workload::first_put).await
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// `host:port` for clients.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// From its start to the answer to its first request.
    pub fn startup(&self) -> Duration {
        self.startup
    }

    /// Bytes that everything but the raft log takes on the disk.
    pub fn disk_bytes(&self) -> u64 {
        taken_below(&self.place.data())
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
