//! What a process costs, from `/proc`.

use std::cell::Cell;
use std::fs;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::JoinSet;

/// The kernel reports processor time in hundredths of a second to every program.
const TICKS_PER_SECOND: u64 = 100;
/// How often the memory of a process that is [watched](Watch) is looked at.
const SAMPLE: Duration = Duration::from_millis(20);

/// Processor time a process has used, all threads, user and system.
pub fn cpu(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 1_000 / TICKS_PER_SECOND))
}

/// Memory a process holds, in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    status_bytes(pid, "VmRSS:")
}

/// The most memory a process has ever held, in bytes.
pub fn peak_resident_bytes(pid: u32) -> Option<u64> {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1_024)
}

/// The most memory that a process holds from here on, until this goes out of scope.
pub struct Watch {
    most: Rc<Cell<u64>>,
    _task: JoinSet<()>,
}

impl Watch {
    /// Looks at the memory of `pid`, again and again.
    pub fn start(pid: u32) -> Watch {
        let most = Rc::new(Cell::new(resident_bytes(pid).unwrap_or(0)));
        let mut task = JoinSet::new();
        task.spawn_local({
            let most = Rc::clone(&most);
            async move {
                loop {
                    tokio::time::sleep(SAMPLE).await;
                    most.set(resident_bytes(pid).unwrap_or(0).max(most.get()));
                }
            }
        });
        Watch { most, _task: task }
    }

    /// The most until now, in bytes.
    pub fn most_bytes(&self) -> u64 {
        self.most.get()
    }
}

/// Processor time of all of `pids`; `None` if there are none or one is gone.
pub fn cpu_of_all(pids: &[u32]) -> Option<Duration> {
    (!pids.is_empty()).then(|| pids.iter().map(|pid| cpu(*pid)).sum()).flatten()
}

/// Memory that all of `pids` hold, in bytes; `None` if there are none or one is gone.
pub fn resident_bytes_of_all(pids: &[u32]) -> Option<u64> {
    (!pids.is_empty()).then(|| pids.iter().map(|pid| resident_bytes(*pid)).sum()).flatten()
}

/// The process of this machine that listens on `endpoint`'s port.
pub fn listening_on(endpoint: &str) -> Option<u32> {
    let (host, port) = endpoint.rsplit_once(':')?;
    if !["127.0.0.1", "localhost", "[::1]"].contains(&host) {
        return None;
    }
    let port: u16 = port.parse().ok()?;
    let sockets: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| {
            let listening = table.lines().filter_map(|line| listener(line, port));
            listening.collect::<Vec<_>>()
        })
        .collect();
    let processes = fs::read_dir("/proc").ok()?;
    let mut pids =
        processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().any(|file| {
            fs::read_link(file.path())
                .is_ok_and(|target| sockets.iter().any(|socket| target.as_os_str() == &**socket))
        })
    })
}

/// The socket of a line of `/proc/net/tcp` that listens on `port`.
fn listener(line: &str, port: u16) -> Option<String> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let local = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
    (local == port && *fields.get(3)? == LISTEN)
        .then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))?
}
