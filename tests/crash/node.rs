//! The server as a process that can be stopped in every way there is.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::common::ports::free_port;
use crate::common::{http, server};

/// How long a server may take to start or to stop before the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How often a condition outside this process is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(2);

/// A server on a data directory that outlives it. Dropping it kills it.
pub(crate) struct Node {
    data_dir: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    port: u16,
    child: Option<Child>,
}

impl Node {
    /// A server that is not started yet: data in `data_dir`, what it says in `log`.
    pub(crate) fn new(data_dir: &Path, log: &Path, arguments: &[&str]) -> Node {
        Node {
            data_dir: data_dir.to_owned(),
            log: log.to_owned(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            port: free_port(),
            child: None,
        }
    }

    /// The same server, told to look for its data elsewhere from its next start on.
    pub(crate) fn move_to(&mut self, data_dir: &Path) {
        assert!(self.child.is_none(), "the server is running");
        self.data_dir = data_dir.to_owned();
    }

    /// Other flags from its next start on.
    pub(crate) fn set_arguments(&mut self, arguments: Vec<String>) {
        self.arguments = arguments;
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A connection that is made when it is needed, and again when it is lost.
    pub(crate) fn channel(&self) -> tonic::transport::Channel {
        tonic::transport::Endpoint::from_shared(self.url())
            .expect("the URL is well formed")
            .tcp_nodelay(true)
            .connect_lazy()
    }

    /// Starts the process and returns at once.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "the server is running already");
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.expect("the log file opens");
        let child = Command::new(server::kvorum())
            .arg("--data-dir")
            .arg(&self.data_dir)
            .args(["--listen-client-urls", &self.url(), "--advertise-client-urls", &self.url()])
            .arg("--listen-peer-urls=http://127.0.0.1:0")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file is shared"))
            .stderr(log)
            .spawn();
        self.child = Some(child.expect("the server starts"));
    }

    /// Starts the process and waits until it serves.
    pub(crate) fn start(&mut self) {
        self.spawn();
        self.wait_until_serving();
    }

    /// Waits until it serves.
    ///
    /// # Panics
    ///
    /// If it ends instead, or takes too long.
    pub(crate) fn wait_until_serving(&mut self) {
        if let Err(status) = self.serves() {
            panic!("the server ended with {status} before it served:\n{}", self.log_tail());
        }
    }

    /// Waits for an answer of any kind to `GET /health`: it is given once the member
    /// has a leader and its sockets accept. If the server ends instead: how.
    pub(crate) fn serves(&mut self) -> Result<(), ExitStatus> {
        let address = format!("127.0.0.1:{}", self.port);
        let began = Instant::now();
        while http::get(&address, "/health").is_err() {
            if let Some(status) = self.exit_status() {
                self.child = None;
                return Err(status);
            }
            assert!(began.elapsed() < PATIENCE, "not serving:\n{}", self.log_tail());
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// `GET /health`.
    pub(crate) fn is_healthy(&self) -> bool {
        let address = format!("127.0.0.1:{}", self.port);
        http::get(&address, "/health").is_ok_and(|answer| answer.status == 200)
    }

    /// SIGKILL, and waits for the end. Nothing happens if it has ended.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        child.kill().expect("the process can be killed");
        child.wait().expect("the process can be waited for");
    }

    /// SIGTERM; how it ended, and how long that took.
    pub(crate) fn terminate(&mut self) -> (ExitStatus, Duration) {
        self.signal(Signal::TERM);
        let began = Instant::now();
        let status = self.wait_for_exit();
        (status, began.elapsed())
    }

    /// Waits for it to end by itself.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                self.child = None;
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "still runs:\n{}", self.log_tail());
            std::thread::sleep(POLL);
        }
    }

    /// SIGSTOP, and waits until all its threads stand still.
    pub(crate) fn freeze(&mut self) {
        self.signal(Signal::STOP);
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let began = Instant::now();
        while !all_stopped(&tasks) {
            assert!(began.elapsed() < PATIENCE, "a thread does not stop");
            std::thread::sleep(POLL);
        }
    }

    /// How the process ended, or `None` while it runs.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("the process can be waited for")
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exit_status().is_none()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server is running").id()
    }

    /// Everything the server has said since it was first started.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The end of that.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// What it says from now on goes to an empty file.
    pub(crate) fn forget_log(&self) {
        let _ = std::fs::remove_file(&self.log);
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the server is running");
        rustix::process::kill_process(Pid::from_child(child), signal).expect("a signal is sent");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of the server's log ---\n{}\n---", self.log_tail());
        }
        self.kill();
    }
}

fn all_stopped(tasks: &Path) -> bool {
    let Ok(tasks) = std::fs::read_dir(tasks) else { return true };
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // pid (name) state …; the name may hold anything.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
    })
}
