//! How long nothing can be written when the leader is killed.
//!
//! ```text
//! write … write … kill -9 leader ······ gap ······ write … start it again … all serve
//!                 |<------------- looked at until all serve ---------------------->|
//! ```
//!
//! The gap is the longest time without an acknowledged write, from the kill until all
//! three members serve again: so what the return of the killed member disturbs counts
//! too. Writers are what a careful client is: [`WRITERS`] of them, spread over the members,
//! each with one request at a time, a short timeout (`--timeout-ms`), and another member
//! after every failure. Timings are the programs' defaults; a third cluster, kvorum with
//! `--election-timeout 500`, shows what a shorter one brings. The three clusters are killed
//! in turns, each at a random time under load that only it has; the other two idle.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::args::Args;
use crate::client::{CallError, Connection, Path};
use crate::cluster::{self, Cluster, Options};
use crate::report::{self, median, number, percentile};
use crate::requests::Template;
use crate::workload;

/// Clients that write.
const WRITERS: usize = 8;
/// Writes that are acknowledged before a leader is killed: the load is there.
const WARM_WRITES: u64 = 100;
/// The kill comes at a random time of this length after that, ten heartbeats.
const PHASE_MS: u64 = 1_000;
/// A member that is down refuses at once: writers do not spin.
const RETRY: Duration = Duration::from_millis(5);
/// Keys written to; bytes of a key and of a value.
const KEYS: u64 = 1_000;
const KEY_BYTES: usize = 32;
const VALUE_BYTES: usize = 64;
/// How much longer than etcd's kvorum's gaps may be.
const TOLERANCE: f64 = 1.10;

/// The clusters: a name, which of the programs, its flags.
const CLUSTERS: [(&str, usize, &[&str]); 3] = [
    ("etcd", 0, &[]),
    ("kvorum", 1, &[]),
    ("kvorum, `--election-timeout 500`", 1, &["--election-timeout", "500"]),
];

/// `kvorum-bench failover`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let kills = args.number("kills", 50)?.max(1);
    let timeout = Duration::from_millis(args.number("timeout-ms", 200)? as u64);
    let mut random = cluster::seed(&mut args)?;
    args.finish()?;
    let mut clusters = Vec::new();
    for (_, program, flags) in CLUSTERS {
        let program = &options.programs[program];
        clusters.push(Cluster::start(program, &options.directory, flags).await?);
    }
    let mut gaps = [const { Vec::new() }; CLUSTERS.len()];
    for kill in 0..kills {
        for turn in 0..CLUSTERS.len() {
            let index = (kill + turn) % CLUSTERS.len();
            let name = CLUSTERS[index].0;
            let phase = Duration::from_millis(workload::next(&mut random) % PHASE_MS);
            let gap = kill_leader(&mut clusters[index], phase, timeout).await;
            let gap = gap.map_err(|error| format!("{name}: {error}"))?;
            eprintln!("kill {} of {kills}, {name}: {} ms", kill + 1, gap.as_millis());
            gaps[index].push(gap.as_secs_f64() * 1e3);
        }
    }
    println!(
        "Longest time without an acknowledged write after the leader of three is killed, in ms: \
         {}; {kills} kills each, {WRITERS} writers with a timeout of {} ms and another member after \
         every failure.\n",
        report::contestants(&options.programs),
        timeout.as_millis()
    );
    println!("| | median | p90 | max |\n|---|---|---|---|");
    for ((name, ..), gaps) in CLUSTERS.iter().zip(&gaps) {
        let [p90, max] = [90.0, 100.0].map(|percent| number(percentile(gaps, percent)));
        println!("| {name} | {} | {p90} | {max} |", number(median(gaps)));
    }
    report::verdict(options.assert, &broken(&gaps))
}

/// What kvorum promised and did not keep.
fn broken([etcd, kvorum, quick]: &[Vec<f64>; CLUSTERS.len()]) -> Vec<String> {
    let p90 = |gaps: &[f64]| percentile(gaps, 90.0);
    let mut broken = Vec::new();
    for (what, etcd, kvorum) in
        [("median", median(etcd), median(kvorum)), ("p90", p90(etcd), p90(kvorum))]
    {
        // Written so that what is not a number is a broken promise too.
        let as_short = kvorum <= TOLERANCE * etcd;
        if !as_short {
            let ratio = kvorum / etcd;
            broken.push(format!("{what}: {ratio:.2} of etcd's, not {TOLERANCE:.2} or less"));
        }
    }
    let shorter = median(quick) < median(kvorum);
    if !shorter {
        broken.push("half the election timeout does not make the median shorter".to_owned());
    }
    broken
}

/// Kills the leader `phase` after the load is there, and starts it again.
async fn kill_leader(
    cluster: &mut Cluster,
    phase: Duration,
    timeout: Duration,
) -> Result<Duration, Box<dyn Error>> {
    let leader = cluster.settled().await?;
    // What earlier writes left would only make the members larger.
    cluster::compact(&cluster.endpoints()[leader], 0).await?;
    let writers = Writers::start(cluster.endpoints(), timeout);
    writers.acknowledge_more(cluster, WARM_WRITES).await?;
    tokio::time::sleep(phase).await;
    let leader = cluster.wait("there is a leader", Cluster::leader).await?;
    writers.gap.set(Some(Gap::since(Instant::now())));
    cluster.kill(leader)?;
    cluster.wait("the others have a leader", Cluster::leader).await?;
    // From here on: the writes before may have been the old leader's.
    writers.acknowledge_more(cluster, 1).await?;
    cluster.restart(leader)?;
    cluster.settled().await?;
    let gap = writers.gap.get().ok_or("nobody looked for the gap")?;
    Ok(gap.until(Instant::now()))
}

/// The longest time without an acknowledged write.
#[derive(Debug, Clone, Copy)]
struct Gap {
    last: Instant,
    longest: Duration,
}

impl Gap {
    fn since(begin: Instant) -> Gap {
        Gap { last: begin, longest: Duration::ZERO }
    }

    fn acknowledged(self, at: Instant) -> Gap {
        Gap { last: at, longest: self.until(at) }
    }

    fn until(self, end: Instant) -> Duration {
        self.longest.max(end.saturating_duration_since(self.last))
    }
}

/// Clients that write until this goes out of scope.
struct Writers {
    shared: Rc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    endpoints: Vec<String>,
    timeout: Duration,
    put: Template,
    acknowledged: Cell<u64>,
    last_error: RefCell<String>,
    gap: Cell<Option<Gap>>,
}

impl std::ops::Deref for Writers {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Writers {
    fn start(endpoints: Vec<String>, timeout: Duration) -> Writers {
        let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
        let shared = Rc::new(Shared {
            endpoints,
            timeout,
            put: Template::put(KEY_BYTES, &value),
            acknowledged: Cell::new(0),
            last_error: RefCell::default(),
            gap: Cell::new(None),
        });
        let mut tasks = JoinSet::new();
        for index in 0..WRITERS {
            tasks.spawn_local(Rc::clone(&shared).write(index));
        }
        Writers { shared, _tasks: tasks }
    }

    /// Waits until so many more writes are acknowledged.
    async fn acknowledge_more(&self, cluster: &mut Cluster, more: u64) -> Result<(), CallError> {
        let goal = self.acknowledged.get() + more;
        cluster
            .wait("writes are acknowledged", async |_| {
                if self.acknowledged.get() >= goal {
                    Ok(())
                } else {
                    Err(format!("the last error is {:?}", self.last_error.borrow()).into())
                }
            })
            .await
    }
}

impl Shared {
    async fn write(self: Rc<Self>, index: usize) {
        let mut random = index as u64;
        let mut at = index;
        let mut connection = None;
        loop {
            let endpoint = &self.endpoints[at % self.endpoints.len()];
            let put = self.put.with(workload::next(&mut random) % KEYS);
            let attempt = attempt(&mut connection, endpoint, put);
            let error = match tokio::time::timeout(self.timeout, attempt).await {
                Ok(Ok(())) => {
                    self.acknowledged.set(self.acknowledged.get() + 1);
                    self.gap.set(self.gap.get().map(|gap| gap.acknowledged(Instant::now())));
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer in time".to_owned(),
            };
            *self.last_error.borrow_mut() = error;
            connection = None;
            at += 1;
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn attempt(
    connection: &mut Option<(Connection, Path)>,
    endpoint: &str,
    put: Bytes,
) -> Result<(), CallError> {
    let (connection, path) = match connection {
        Some(open) => open,
        None => {
            let open = Connection::open(endpoint).await?;
            let path = open.path("etcdserverpb.KV/Put")?;
            connection.insert((open, path))
        }
    };
    connection.unary(path, put).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_silence_between_kill_and_end() {
        let at = |ms| Duration::from_millis(ms);
        let kill = Instant::now();
        let gap = Gap::since(kill);
        assert_eq!(gap.until(kill + at(70)), at(70), "no write at all");
        let gap = gap.acknowledged(kill + at(2));
        assert_eq!(gap.until(kill + at(40)), at(38), "what was in flight ends no gap");
        let gap = gap.acknowledged(kill + at(30)).acknowledged(kill + at(31));
        assert_eq!(gap.until(kill + at(40)), at(28), "between two writes");
        assert_eq!(gap.until(kill + at(80)), at(49), "a later one that is longer counts");
    }

    #[test]
    fn longer_gaps_than_etcds_are_broken_promises() {
        let etcd = vec![1_000.0; 10];
        let count = |kvorum: f64, quick: f64| {
            broken(&[etcd.clone(), vec![kvorum; 10], vec![quick; 10]]).len()
        };
        assert_eq!(count(1_099.0, 600.0), 0);
        assert_eq!(count(1_101.0, 600.0), 2);
        assert_eq!(count(1_000.0, 1_000.0), 1);
        assert_eq!(broken(&[Vec::new(), Vec::new(), Vec::new()]).len(), 3);
    }
}
