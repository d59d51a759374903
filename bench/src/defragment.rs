//! Defragmentation beside etcd's, and what clients notice of it.
//!
//! ```text
//! load --size-mib ─▶ put every second key again ─▶ compact ─▶ put for a while: the normal p99
//!                 ─▶ Defragment, while puts go on ─▶ p99 meanwhile, time, most memory
//! ```
//!
//! Half of what is on the disk is then not needed. kvorum gives that back by itself, and
//! may have done so before it is asked to. Puts come at a steady rate, `--rate` a second, so
//! that both servers have the same to do, and count from when they were due: what waits for
//! a server that stops is what its clients would wait for. Those that fail count as well, as
//! a slow disk makes etcd's: they are "timed out" after 7 s of standing still.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{DefragmentRequest, DefragmentResponse};
use tokio::task::JoinSet;

use crate::args::Args;
use crate::client::{CallError, Connection};
use crate::cluster::{self, Options};
use crate::histogram::Histogram;
use crate::process;
use crate::report::{self, milliseconds, number};
use crate::requests::Template;
use crate::server::Server;
use crate::workload::{self, Load};

const KEY_BYTES: usize = 32;
/// Bytes of a value of the state, and of one that is put meanwhile.
const STATE_VALUE_BYTES: usize = 4 << 10;
const VALUE_BYTES: usize = 256;
/// Where keys begin that are put meanwhile, and how many there are.
const FIRST_KEY: u64 = 1_000_000_000;
const CHANGING_KEYS: u64 = 1_000;
/// Connections that share the puts.
const CONNECTIONS: usize = 4;
/// How long the state may take to load, and a defragmentation.
const PATIENCE: Duration = Duration::from_secs(1_800);
/// How long a server is left alone after the state was loaded: checkpoints, and rewrites.
const SETTLING: Duration = Duration::from_secs(15);
/// How long puts are measured before.
const USUAL: Duration = Duration::from_secs(15);
/// How many times its normal value kvorum's p99 may be meanwhile.
const PROMISED_TIMES: f64 = 2.0;
const MIB: f64 = (1 << 20) as f64;

/// What was measured of one server.
struct Measured {
    seconds: f64,
    disk_before_mib: f64,
    disk_after_mib: f64,
    memory_before_mib: f64,
    memory_most_mib: f64,
    usual: Latencies,
    meanwhile: Latencies,
}

/// How long puts took, and how many of them failed.
#[derive(Clone, Default)]
struct Latencies {
    all: Histogram,
    failed: u64,
    first_error: Option<String>,
}

/// `kvorum-bench defragment`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let size_mib = args.number("size-mib", 1_024)?.max(1);
    let rate = args.number("rate", 500)?.max(1);
    let only = args.text("only", "");
    args.finish()?;
    let mut sides = Vec::new();
    for (name, program) in options.sides(&only) {
        let measured = measure(program, &options.directory, size_mib << 20, rate).await;
        let measured = measured.map_err(|error| format!("{}: {error}", program.display()))?;
        sides.push((name, measured));
    }
    println!(
        "Defragment with {size_mib} MiB of data and half as much garbage, {rate} puts per second \
         meanwhile: {}\n",
        report::contestants(&options.programs)
    );
    let table = report::Columns::head(&sides);
    table.row("Defragment, s", |side| number(side.seconds));
    table.row("disk without the log before, MiB", |side| number(side.disk_before_mib));
    table.row("disk without the log after, MiB", |side| number(side.disk_after_mib));
    table.row("memory before, MiB", |side| number(side.memory_before_mib));
    table.row("memory at most meanwhile, MiB", |side| number(side.memory_most_mib));
    table.row("puts normally: p50, p99, max, ms", |side| side.usual.told());
    table.row("puts meanwhile: p50, p99, max, ms", |side| side.meanwhile.told());
    table.row("of them failed", |side| (side.usual.failed + side.meanwhile.failed).to_string());
    let kept = table.side("kvorum").map_or(Vec::new(), |kvorum| broken(table.side("etcd"), kvorum));
    report::verdict(options.assert, &kept)
}

impl Latencies {
    fn told(&self) -> String {
        let [p50, p99] = [50.0, 99.0].map(|percent| milliseconds(self.all.percentile(percent)));
        format!("{p50}, {p99}, {}", milliseconds(self.all.max()))
    }

    fn p99(&self) -> Duration {
        self.all.percentile(99.0)
    }
}

/// What kvorum promised and did not keep.
fn broken(etcd: Option<&Measured>, kvorum: &Measured) -> Vec<String> {
    let mut broken = Vec::new();
    if let Some(etcd) = etcd {
        if kvorum.seconds > etcd.seconds {
            let [ours, theirs] = [kvorum.seconds, etcd.seconds].map(number);
            broken.push(format!("Defragment took {ours} s, etcd's {theirs} s"));
        }
        if kvorum.memory_most_mib > etcd.memory_most_mib {
            let [ours, theirs] = [kvorum.memory_most_mib, etcd.memory_most_mib].map(number);
            broken.push(format!("{ours} MiB of memory, etcd {theirs} MiB"));
        }
    }
    for latencies in [&kvorum.usual, &kvorum.meanwhile] {
        if let Some(error) = &latencies.first_error {
            broken.push(format!("{} puts failed, the first: {error}", latencies.failed));
        }
    }
    let (usual, meanwhile) = (kvorum.usual.p99(), kvorum.meanwhile.p99());
    if meanwhile.as_secs_f64() >= PROMISED_TIMES * usual.as_secs_f64() {
        let [meanwhile, usual] = [meanwhile, usual].map(milliseconds);
        broken.push(format!("the p99 of puts was {meanwhile} ms meanwhile, {usual} ms before"));
    }
    broken
}

async fn measure(
    program: &Path,
    parent: &Path,
    size: usize,
    rate: usize,
) -> Result<Measured, Box<dyn Error>> {
    let server = Server::start(program, parent, &[]).await?;
    let endpoint = server.endpoint().to_owned();
    let keys = (size / STATE_VALUE_BYTES).max(2);
    eprintln!("{}: loading {keys} values of {STATE_VALUE_BYTES} bytes", program.display());
    for keys in [keys, keys / 2] {
        let state = Load::state(&endpoint, keys, KEY_BYTES, STATE_VALUE_BYTES);
        workload::run_within(PATIENCE, &state, &[]).await?;
    }
    cluster::compact(&endpoint, 0).await?;
    tokio::time::sleep(SETTLING).await;
    let usual = {
        let puts = Puts::start(&endpoint, rate).await?;
        tokio::time::sleep(USUAL).await;
        puts.done().await
    };
    let disk_before = server.disk_bytes();
    let memory_before = process::resident_bytes(server.pid()).unwrap_or(0);
    let memory = process::Watch::start(server.pid());
    let puts = Puts::start(&endpoint, rate).await?;
    let begun = Instant::now();
    let method = "etcdserverpb.Maintenance/Defragment";
    let _: DefragmentResponse =
        cluster::call(&endpoint, method, &DefragmentRequest {}, PATIENCE).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let meanwhile = puts.done().await;
    Ok(Measured {
        seconds,
        disk_before_mib: disk_before as f64 / MIB,
        disk_after_mib: server.disk_bytes() as f64 / MIB,
        memory_before_mib: memory_before as f64 / MIB,
        memory_most_mib: memory.most_bytes() as f64 / MIB,
        usual,
        meanwhile,
    })
}

/// Puts at a steady rate, until this goes out of scope.
struct Puts {
    shared: Rc<Told>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Told {
    stop: Cell<bool>,
    latencies: RefCell<Latencies>,
}

impl Puts {
    async fn start(endpoint: &str, rate: usize) -> Result<Puts, CallError> {
        let shared = Rc::new(Told::default());
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            connections.push(Connection::open(endpoint).await?);
        }
        let mut tasks = JoinSet::new();
        let told = Rc::clone(&shared);
        tasks.spawn_local(async move {
            if let Err(error) = told.put_all(&connections, rate).await {
                told.fail(&error);
            }
        });
        Ok(Puts { shared, tasks })
    }

    /// What there is to tell, of puts under way too.
    async fn done(mut self) -> Latencies {
        self.shared.stop.set(true);
        while self.tasks.join_next().await.is_some() {}
        self.shared.latencies.borrow().clone()
    }
}

impl Told {
    fn fail(&self, error: &CallError) {
        let latencies = &mut *self.latencies.borrow_mut();
        latencies.failed += 1;
        latencies.first_error.get_or_insert_with(|| error.to_string());
    }

    async fn put_all(
        self: &Rc<Self>,
        connections: &[Connection],
        rate: usize,
    ) -> Result<(), CallError> {
        let put = Template::put(KEY_BYTES, &Bytes::from(vec![b'v'; VALUE_BYTES]));
        let every = Duration::from_secs(1) / rate as u32;
        let mut due = Instant::now();
        let mut under_way = JoinSet::new();
        for (number, connection) in (0..).zip(connections.iter().cycle()) {
            tokio::time::sleep_until(due.into()).await;
            if self.stop.get() {
                break;
            }
            let (told, mut connection) = (Rc::clone(self), connection.clone());
            let path = connection.path("etcdserverpb.KV/Put")?;
            let request = put.with(FIRST_KEY + number % CHANGING_KEYS);
            under_way.spawn_local(async move {
                if let Err(error) = connection.unary(&path, request).await {
                    told.fail(&error);
                }
                told.latencies.borrow_mut().all.record(due.elapsed());
            });
            while under_way.try_join_next().is_some() {}
            due += every;
        }
        while under_way.join_next().await.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(seconds: f64, memory_most_mib: f64, p99_ms: u64) -> Measured {
        let of = |milliseconds| {
            let mut latencies = Latencies::default();
            latencies.all.record(Duration::from_millis(milliseconds));
            latencies
        };
        Measured {
            seconds,
            disk_before_mib: 1.0,
            disk_after_mib: 1.0,
            memory_before_mib: 1.0,
            memory_most_mib,
            usual: of(10),
            meanwhile: of(p99_ms),
        }
    }

    #[test]
    fn what_is_slower_or_larger_is_a_broken_promise() {
        let etcd = measured(5.0, 100.0, 5_000);
        assert_eq!(broken(Some(&etcd), &measured(5.0, 100.0, 19)).len(), 0);
        assert_eq!(broken(Some(&etcd), &measured(5.1, 101.0, 21)).len(), 3);
        assert_eq!(broken(None, &measured(5.1, 101.0, 21)).len(), 1);
        let [calm, mut failing] = [19, 19].map(|p99_ms| measured(5.0, 100.0, p99_ms));
        failing.meanwhile.failed = 1;
        failing.meanwhile.first_error = Some("timed out".to_owned());
        assert_eq!(broken(Some(&failing), &calm).len(), 0, "etcd's may fail");
        assert_eq!(broken(Some(&calm), &failing).len(), 1);
    }
}
