//! A server under test as a process.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::http;
use super::ports::free_port;

/// How long a server may take to start or to stop before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a condition outside this process is looked at.
const POLL: Duration = Duration::from_millis(5);
/// How much of a failing server's log is printed, in bytes.
const LOG_SHOWN_BYTES: u64 = 4 * 1024;

/// A single-node server on ports of its own, with a data directory that goes
/// away with it. Dropping it kills it; if the test is failing, its log is
/// printed first.
pub(crate) struct TestServer {
    program: PathBuf,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

/// The server under test: `$KVORUM_TEST_BINARY` if set (another build, or an
/// etcd to try a test out on), else the `kvorum` that cargo built.
pub(crate) fn kvorum() -> PathBuf {
    std::env::var_os("KVORUM_TEST_BINARY")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_kvorum")), PathBuf::from)
}

impl TestServer {
    /// Starts `program` with etcd's flags for a single node, plus `arguments`,
    /// and waits until it is healthy.
    ///
    /// # Panics
    ///
    /// If it does not become healthy in time.
    pub(crate) fn start(program: &Path, arguments: &[&str]) -> TestServer {
        TestServer::start_prepared(program, arguments, |_| {})
    }

    /// As [`start`](Self::start), after `prepare`, which may make the data directory.
    pub(crate) fn start_prepared(
        program: &Path,
        arguments: &[&str],
        prepare: impl FnOnce(&TestServer),
    ) -> TestServer {
        let directory = tempfile::Builder::new().prefix("kvorum-test-").tempdir();
        let mut server = TestServer {
            program: program.to_owned(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            directory: directory.expect("a temporary directory"),
            client_port: free_port(),
            peer_port: free_port(),
            child: None,
        };
        prepare(&server);
        server.spawn();
        server.wait_until_healthy();
        server
    }

    /// Starts the process on the ports and directory it had, and returns at once.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "the server is running already");
        let log = OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = log.expect("the log file opens");
        let client_url = self.client_url();
        let peer_url = self.peer_url();
        let child = Command::new(&self.program)
            .args(["--name", "default", "--data-dir"])
            .arg(self.data_dir())
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("default={peer_url}")])
            .args(&self.arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file is shared"))
            .stderr(log)
            .spawn();
        match child {
            Ok(child) => self.child = Some(child),
            Err(error) => panic!("{} does not start: {error}", self.program.display()),
        }
    }

    /// Waits for `GET /health` to answer 200, alarms aside, also that of a number without a
    /// name that the differential test raises.
    ///
    /// # Panics
    ///
    /// If the process ends first, or does not become healthy in time.
    pub(crate) fn wait_until_healthy(&mut self) {
        let address = self.client_address();
        let started = Instant::now();
        let path = "/health?exclude=NOSPACE&exclude=CORRUPT&exclude=9";
        while !http::get(&address, path).is_ok_and(|answer| answer.status == 200) {
            if let Some(status) = self.exit_status() {
                panic!("{} ended with {status} before it was healthy", self.program.display());
            }
            assert!(
                started.elapsed() < PATIENCE,
                "{} was not healthy after {PATIENCE:?}",
                self.program.display()
            );
            std::thread::sleep(POLL);
        }
    }

    /// Ends the process as a power cut would end it: SIGKILL.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        child.kill().expect("the process can be killed");
        child.wait().expect("the process can be waited for");
    }

    /// Asks the process to stop with SIGTERM and returns how it ended.
    ///
    /// # Panics
    ///
    /// If it does not stop in time.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        let child = self.child.as_ref().expect("the server is running");
        let id = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("SIGTERM is sent");
        let started = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                self.child = None;
                return status;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "{} runs {PATIENCE:?} after SIGTERM",
                self.program.display()
            );
            std::thread::sleep(POLL);
        }
    }

    /// Starts it again after [`kill`](Self::kill) or [`terminate`](Self::terminate)
    /// and waits until it is healthy.
    pub(crate) fn restart(&mut self) {
        self.spawn();
        self.wait_until_healthy();
    }

    /// How the process ended, or `None` while it runs.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("the process can be waited for")
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server is running").id()
    }

    /// `host:port` for clients.
    pub(crate) fn client_address(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// The URL for clients.
    pub(crate) fn client_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// The URL for peers.
    pub(crate) fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// Where the server keeps its data.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Everything the server wrote to standard output and standard error.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// A connection to the server.
    pub(crate) fn channel(&self) -> tonic::transport::Channel {
        tonic::transport::Endpoint::from_shared(self.client_url())
            .expect("the URL is well formed")
            .tcp_nodelay(true)
            .connect_lazy()
    }

    /// If the process has ended by itself: how, and its last words.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        let status = self.exit_status()?;
        Some(format!("ended with {status}; the end of its log:\n{}", self.log_tail().ok()?))
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    fn log_tail(&self) -> std::io::Result<String> {
        let mut file = File::open(self.log_path())?;
        let start = file.metadata()?.len().saturating_sub(LOG_SHOWN_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut tail = Vec::new();
        file.read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).into_owned())
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(tail) = self.log_tail()
        {
            eprintln!("--- the end of {}'s log ---\n{tail}---", self.program.display());
        }
        self.kill();
    }
}
