//! What the operating system says about this process: `process_*` and `os_fd_*`.
//!
//! Read from `/proc` at each scrape. A number that cannot be read, or a system without
//! `/proc`, leaves its metric out: a missing series is the truth, a zero would not be.

use std::fmt::Write as _;
use std::fs;

use rustix::process::{Resource, getrlimit};

/// Ticks per second of the times in `/proc/*/stat`: 100 on every Linux that Rust
/// supports, whatever the kernel's own tick is.
const TICKS_PER_SECOND: f64 = 100.0;

/// Appends the process' metrics to `text`.
pub(super) fn write(text: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").ok();
    // The second field is the command in parentheses, which may itself hold spaces.
    let fields: Vec<&str> = stat
        .as_deref()
        .and_then(|stat| stat.rsplit_once(')'))
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    // Numbered as in proc(5), where the field after the command is number 3.
    let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<f64>().ok());
    let (user, system) = (field(14), field(15));
    let cpu = user.zip(system).map(|(user, system)| (user + system) / TICKS_PER_SECOND);
    let boot = keyed("/proc/stat", "btime");
    let start = boot.zip(field(22)).map(|(boot, ticks)| boot + ticks / TICKS_PER_SECOND);
    let status_kib = |key: &str| keyed("/proc/self/status", key).map(|kib| kib * 1024.0);
    let open = fs::read_dir("/proc/self/fd").ok().map(|entries| {
        // The directory being read is one of them.
        entries.count().saturating_sub(1) as f64
    });
    let limit = |resource| getrlimit(resource).current.map(|limit| limit as f64);
    let max = limit(Resource::Nofile);
    let network = network();

    let rows = [
        ("process_cpu_seconds_total", "counter", "CPU time used, user and system.", cpu),
        ("process_open_fds", "gauge", "Open file descriptors.", open),
        ("process_max_fds", "gauge", "Limit of open file descriptors.", max),
        ("process_resident_memory_bytes", "gauge", "Resident memory.", status_kib("VmRSS:")),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", status_kib("VmSize:")),
        (
            "process_virtual_memory_max_bytes",
            "gauge",
            "Limit of virtual memory; -1 when there is none.",
            Some(limit(Resource::As).unwrap_or(-1.0)),
        ),
        ("process_start_time_seconds", "gauge", "Start, in Unix time.", start),
        (
            "process_network_receive_bytes_total",
            "counter",
            "Bytes received in the network namespace.",
            network.map(|(received, _)| received),
        ),
        (
            "process_network_transmit_bytes_total",
            "counter",
            "Bytes sent in the network namespace.",
            network.map(|(_, sent)| sent),
        ),
        ("os_fd_used", "gauge", "Open file descriptors.", open),
        ("os_fd_limit", "gauge", "Limit of open file descriptors.", max),
    ];
    for (name, kind, help, value) in rows {
        let Some(value) = value else { continue };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
}

/// The first number after `key` in a file of `key value` lines.
fn keyed(path: &str, key: &str) -> Option<f64> {
    let file = fs::read_to_string(path).ok()?;
    let line = file.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes received and sent according to the kernel's IP counters.
fn network() -> Option<(f64, f64)> {
    let file = fs::read_to_string("/proc/self/net/netstat").ok()?;
    // A line of names is followed by a line of numbers under the same heading.
    let mut lines = file.lines().filter_map(|line| line.strip_prefix("IpExt: "));
    let (names, numbers) = (lines.next()?, lines.next()?);
    let value = |wanted: &str| {
        let position = names.split_whitespace().position(|name| name == wanted)?;
        numbers.split_whitespace().nth(position)?.parse().ok()
    };
    Some((value("InOctets")?, value("OutOctets")?))
}
