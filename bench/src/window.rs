//! Keys that come and go: what a store takes on its disk when its content changes all
//! the time and hardly grows.
//!
//! ```text
//! load --keys ─▶ ( put the next key, delete the oldest ) … ─▶ settled
//!                 └─ every --compact-every writes: compact to the newest revision
//! ```
//!
//! With `--random` each write puts one of the keys there are. Compactions go on beside the
//! writes. Looked at all the time are the disk, the raft log apart, and the server's
//! memory. Nobody asks for a defragmentation. *Live* is what the clients put and did not
//! delete: keys and values, no overhead.

use std::cell::RefCell;
use std::error::Error;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::args::Args;
use crate::cluster::{self, Options};
use crate::process;
use crate::report::{self, number};
use crate::server::Server;
use crate::workload::{self, Kind, Load};

/// How often disk and memory are looked at.
const SAMPLE: Duration = Duration::from_millis(50);
/// How long a server may take for what follows its last write: a checkpoint, and one
/// rewrite.
const SETTLING: Duration = Duration::from_secs(15);
/// How long the writes between two compactions may take.
const SLICE_PATIENCE: Duration = Duration::from_secs(600);
/// Parts of the run for which memory is told.
const QUARTERS: usize = 4;
/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// How often live data kvorum may take on its disk, at any time.
const PROMISED_TIMES_LIVE: f64 = 4.0;
/// How much more memory kvorum may take in the last quarter than in the second, at most.
const PROMISED_GROWTH: f64 = 1.15;

/// What is written.
struct Window {
    keys: usize,
    val_size: usize,
    writes: u64,
    compact_every: u64,
    clients: usize,
    random: bool,
}

/// What was seen of a server at one moment.
#[derive(Clone, Copy)]
struct Sight {
    at: Instant,
    disk_bytes: u64,
    memory_bytes: u64,
}

/// What was measured of one server.
struct Measured {
    writes_per_second: f64,
    /// In multiples of the live data.
    disk_most: f64,
    disk_end: f64,
    /// The most of each quarter of the run.
    memory_mib: [f64; QUARTERS],
}

impl Window {
    fn live_bytes(&self) -> f64 {
        (self.keys * (KEY_BYTES + self.val_size)) as f64
    }

    fn load(&self, endpoint: &str, kind: Kind, total: Option<u64>, first: u64) -> Load {
        Load {
            kind,
            endpoints: vec![endpoint.to_owned()],
            clients: self.clients,
            conns: self.clients.div_ceil(10),
            duration: Duration::ZERO,
            total,
            first,
            keys: self.keys,
            key_size: KEY_BYTES,
            val_size: self.val_size,
            limit: 0,
            serializable: false,
            watchers: 0,
        }
    }
}

/// `kvorum-bench sliding-window`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let only = args.text("only", "");
    let window = Window {
        keys: args.number("keys", 100_000)?.max(1),
        val_size: args.number("val-size", 256)?,
        writes: args.optional("writes")?.unwrap_or(10_000_000),
        compact_every: args.optional("compact-every")?.unwrap_or(100_000).max(1),
        clients: args.number("clients", 100)?.max(1),
        random: args.flag("random"),
    };
    args.finish()?;
    let mut sides = Vec::new();
    for (program, name) in options.programs.iter().zip(["etcd", "kvorum"]) {
        if !name.contains(&only) {
            continue;
        }
        let measured = measure(program, &options.directory, &window).await;
        let measured = measured.map_err(|error| format!("{}: {error}", program.display()))?;
        sides.push((name, measured));
    }
    println!(
        "{} writes, {} live keys of {} and values of {} bytes, a compaction every {} writes: {}\n",
        number(window.writes as f64),
        number(window.keys as f64),
        KEY_BYTES,
        window.val_size,
        number(window.compact_every as f64),
        report::contestants(&options.programs)
    );
    let names: Vec<&str> = sides.iter().map(|(name, _)| *name).collect();
    println!("| | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()));
    let row = |name: &str, value: &dyn Fn(&Measured) -> f64| {
        let values: Vec<String> = sides.iter().map(|(_, side)| number(value(side))).collect();
        println!("| {name} | {} |", values.join(" | "));
    };
    row("writes per second", &|side| side.writes_per_second);
    row("disk without the log at most, times live data", &|side| side.disk_most);
    row("disk without the log at the end, times live data", &|side| side.disk_end);
    for quarter in 0..QUARTERS {
        let name = format!("memory in quarter {} at most, MiB", quarter + 1);
        row(&name, &|side| side.memory_mib[quarter]);
    }
    let kvorum = sides.iter().find(|(name, _)| *name == "kvorum");
    report::verdict(options.assert, &kvorum.map_or(Vec::new(), |(_, side)| broken(side)))
}

/// What kvorum promised and did not keep.
fn broken(kvorum: &Measured) -> Vec<String> {
    let mut broken = Vec::new();
    // Written so that what is not a number is a broken promise too.
    let small = kvorum.disk_most < PROMISED_TIMES_LIVE;
    if !small {
        let times = number(kvorum.disk_most);
        broken
            .push(format!("{times} times live data on disk, not less than {PROMISED_TIMES_LIVE}"));
    }
    let [_, second, .., last] = kvorum.memory_mib;
    let flat = last <= second * PROMISED_GROWTH;
    if !flat {
        let [second, last] = [second, last].map(number);
        broken.push(format!("memory grew from {second} MiB to {last} MiB"));
    }
    broken
}

async fn measure(
    program: &Path,
    parent: &Path,
    window: &Window,
) -> Result<Measured, Box<dyn Error>> {
    let server = Rc::new(Server::start(program, parent, &[]).await?);
    let endpoint = server.endpoint().to_owned();
    workload::run_within(SLICE_PATIENCE, &window.load(&endpoint, Kind::Load, None, 0), &[]).await?;
    let sights = Rc::new(RefCell::new(Vec::new()));
    let mut watching = JoinSet::new();
    watching.spawn_local(watch(Rc::clone(&server), Rc::clone(&sights)));
    let mut compactions: JoinSet<Result<(), String>> = JoinSet::new();
    let begun = Instant::now();
    let mut written = 0;
    while written < window.writes {
        let slice = window.compact_every.min(window.writes - written);
        let kind = if window.random { Kind::Put } else { Kind::Window };
        let load = window.load(&endpoint, kind, Some(written + slice), written);
        let outcome = workload::run_within(SLICE_PATIENCE, &load, &[]).await?;
        if let Some(error) = outcome.first_error {
            return Err(format!("{} writes failed, the first: {error}", outcome.errors).into());
        }
        written += slice;
        let endpoint = endpoint.clone();
        compactions.spawn_local(async move {
            cluster::compact(&endpoint, 0).await.map_err(|error| error.to_string())
        });
        while let Some(done) = compactions.try_join_next() {
            done??;
        }
    }
    let ended = Instant::now();
    while let Some(done) = compactions.join_next().await {
        done??;
    }
    tokio::time::sleep(SETTLING).await;
    drop(watching);
    let disk_end = server.disk_bytes() as f64 / window.live_bytes();
    let sights = sights.borrow();
    let disk_most = sights.iter().map(|sight: &Sight| sight.disk_bytes).max().unwrap_or(0);
    let took = ended - begun;
    let memory_mib = std::array::from_fn(|quarter| {
        let end = |quarters: usize| begun + took * quarters as u32 / QUARTERS as u32;
        let (from, to) = (end(quarter), end(quarter + 1));
        let there = sights.iter().filter(|sight| from <= sight.at && sight.at < to);
        let most = there.map(|sight| sight.memory_bytes).max().unwrap_or(0);
        most as f64 / f64::from(1 << 20)
    });
    Ok(Measured {
        writes_per_second: window.writes as f64 / took.as_secs_f64(),
        disk_most: disk_most as f64 / window.live_bytes(),
        disk_end,
        memory_mib,
    })
}

async fn watch(server: Rc<Server>, sights: Rc<RefCell<Vec<Sight>>>) {
    loop {
        let disk_bytes = server.disk_bytes();
        let memory_bytes = process::resident_bytes(server.pid()).unwrap_or(0);
        sights.borrow_mut().push(Sight { at: Instant::now(), disk_bytes, memory_bytes });
        tokio::time::sleep(SAMPLE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(disk_most: f64, memory_mib: [f64; QUARTERS]) -> Measured {
        Measured { writes_per_second: 1.0, disk_most, disk_end: 1.0, memory_mib }
    }

    #[test]
    fn a_large_disk_or_growing_memory_is_a_broken_promise() {
        assert_eq!(broken(&measured(3.9, [50.0, 100.0, 100.0, 110.0])).len(), 0);
        assert_eq!(broken(&measured(4.0, [50.0, 100.0, 100.0, 130.0])).len(), 2);
        assert_eq!(broken(&measured(f64::NAN, [1.0; QUARTERS])).len(), 1);
    }
}
