//! Three members of etcd and three of kvorum in turns.
//!
//! As [`compare`](crate::compare) does with single members: every round starts a
//! cluster of each with empty directories and default flags, who goes first changes
//! with the round, and the table has medians. Connections go to all members in turns,
//! as those of etcd's own benchmark tool do when it is given all endpoints, the leader's
//! coming last: so a single client writes through a follower. Processor time and memory
//! are sums over the three members.
//!
//! A run during which leadership moved is measured again: it would tell about an
//! election. What is promised ([`broken`]) is throughput of writes and processor time.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use crate::args::Args;
use crate::cluster::{Cluster, Options, PATIENCE};
use crate::process;
use crate::report::{self, Summary, median, number};
use crate::workload::{self, Kind, Load, Outcome};

/// How often a run is repeated because leadership moved, before that is an error.
const ATTEMPTS: usize = 3;
/// How long a cluster is left alone before its idle memory is looked at.
const IDLE: Duration = Duration::from_secs(1);

/// Who is connected to.
#[derive(Clone, Copy, PartialEq)]
enum To {
    All,
    Leader,
}

const RUNS: [(&str, Kind, usize, To); 8] = [
    ("put, 1 client, of a follower", Kind::Put, 1, To::All),
    ("put, 10 clients", Kind::Put, 10, To::All),
    ("put, 100 clients", Kind::Put, 100, To::All),
    ("put, 1,000 clients", Kind::Put, 1_000, To::All),
    ("put, 1 client, of the leader", Kind::Put, 1, To::Leader),
    ("put, 100 clients, of the leader", Kind::Put, 100, To::Leader),
    ("put, 1,000 clients, of the leader", Kind::Put, 1_000, To::Leader),
    ("get, linearizable, 100 clients", Kind::Range, 100, To::All),
];
const MEMORY: [&str; 2] = ["memory of three, idle", "memory of three, after all that"];

/// What a round measured of one cluster.
struct Round {
    outcomes: Vec<Outcome>,
    memory: [u64; MEMORY.len()],
}

/// `kvorum-bench cluster`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let rounds = args.number("rounds", 3)?.max(1);
    let seconds = args.real("seconds", 5.0)?;
    args.finish()?;
    let mut sides = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let order = if round.is_multiple_of(2) { [0, 1] } else { [1, 0] };
        for side in order {
            let program = &options.programs[side];
            eprintln!("round {} of {rounds}, {}", round + 1, ["etcd", "kvorum"][side]);
            let measured = measure(program, &options.directory, seconds).await;
            sides[side].push(measured.map_err(|error| format!("{}: {error}", program.display()))?);
        }
    }
    println!("Clusters of three: {}", report::header(&options.programs, (rounds, seconds)));
    let mut broken_promises = Vec::new();
    print!("{}", report::THROUGHPUT_HEADER);
    for (index, (name, kind, ..)) in RUNS.iter().enumerate() {
        let [etcd, kvorum] = sides
            .each_ref()
            .map(|rounds| Summary::of(rounds.iter().filter_map(|round| round.outcomes.get(index))));
        print!("{}", report::throughput_row(name, &etcd, &kvorum));
        broken_promises.extend(broken(name, *kind, &etcd, &kvorum));
    }
    println!("\n| | etcd MiB | kvorum MiB | ratio |\n|---|---|---|---|");
    for (index, name) in MEMORY.iter().enumerate() {
        let [etcd, kvorum] = sides.each_ref().map(|rounds| {
            let all = rounds.iter().map(|round| round.memory[index] as f64 / f64::from(1 << 20));
            median(&all.collect::<Vec<_>>())
        });
        println!("| {name} | {} | {} | {:.2} |", number(etcd), number(kvorum), kvorum / etcd);
    }
    report::verdict(options.assert, &broken_promises)
}

/// What kvorum promised and did not keep.
fn broken(name: &str, kind: Kind, etcd: &Summary, kvorum: &Summary) -> Vec<String> {
    let mut broken = Vec::new();
    // Written so that a rate that is not a number is a broken promise too.
    let as_fast = kvorum.rate >= etcd.rate;
    if kind == Kind::Put && !as_fast {
        let ratio = kvorum.rate / etcd.rate;
        broken.push(format!("{name}: {ratio:.2} of etcd's throughput, not 1.00 or more"));
    }
    let as_cheap = kvorum.cpu_us <= etcd.cpu_us;
    if !as_cheap {
        let costs = [kvorum, etcd].map(|summary| number(summary.cpu_us));
        broken
            .push(format!("{name}: {} us of processor per operation, etcd {}", costs[0], costs[1]));
    }
    broken
}

async fn measure(program: &Path, parent: &Path, seconds: f64) -> Result<Round, Box<dyn Error>> {
    let mut cluster = Cluster::start(program, parent, &[]).await?;
    let pids = cluster.pids();
    let memory =
        || process::resident_bytes_of_all(&pids).ok_or("the processes of the members have gone");
    tokio::time::sleep(IDLE).await;
    let idle = memory()?;
    let mut outcomes = Vec::new();
    let preload = Load { kind: Kind::Load, ..load(&cluster, Kind::Put, 100, To::All, 0, seconds) };
    workload::run_within(PATIENCE, &preload, &[]).await?;
    for (name, kind, clients, to) in RUNS {
        let outcome = settled_run(&mut cluster, kind, clients, to, seconds).await;
        outcomes.push(outcome.map_err(|error| format!("{name}: {error}"))?);
    }
    Ok(Round { outcomes, memory: [idle, memory()?] })
}

/// A run with the same leader from beginning to end.
async fn settled_run(
    cluster: &mut Cluster,
    kind: Kind,
    clients: usize,
    to: To,
    seconds: f64,
) -> Result<Outcome, Box<dyn Error>> {
    let pids = cluster.pids();
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        let leader = cluster.settled().await?;
        let term = cluster.status(leader).await?.raft_term;
        let load = load(cluster, kind, clients, to, leader, seconds);
        let outcome = workload::run_within(PATIENCE + load.duration, &load, &pids).await?;
        let after = cluster.settled().await?;
        let term_after = cluster.status(after).await?.raft_term;
        if (leader, term) == (after, term_after) {
            return match outcome.errors {
                0 => Ok(outcome),
                errors => {
                    let first = outcome.first_error.unwrap_or_default();
                    Err(format!("{errors} errors, the first: {first}").into())
                }
            };
        }
        why = format!(
            "leadership moved from member {leader} in term {term} to {after} in {term_after}; {} errors",
            outcome.errors
        );
        eprintln!("{why}; once more");
    }
    Err(format!("{ATTEMPTS} times {why}").into())
}

fn load(
    cluster: &Cluster,
    kind: Kind,
    clients: usize,
    to: To,
    leader: usize,
    seconds: f64,
) -> Load {
    let endpoints = endpoints(cluster.endpoints(), to, leader);
    Load {
        kind,
        clients,
        conns: clients.div_ceil(10).max(endpoints.len()).min(clients),
        endpoints,
        duration: Duration::from_secs_f64(seconds),
        total: None,
        first: 0,
        keys: 10_000,
        key_size: 32,
        val_size: 256,
        limit: 500,
        serializable: false,
        watchers: 0,
    }
}

/// The members to connect to, the leader last.
fn endpoints(mut all: Vec<String>, to: To, leader: usize) -> Vec<String> {
    let of_leader = all.remove(leader);
    if to == To::Leader {
        all.clear();
    }
    all.push(of_leader);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(rate: f64, cpu_us: f64) -> Summary {
        Summary { rate, rates: String::new(), latencies: String::new(), cpu_us }
    }

    #[test]
    fn the_leader_comes_last() {
        let all = || ["a", "b", "c"].map(str::to_owned).to_vec();
        assert_eq!(endpoints(all(), To::All, 0), ["b", "c", "a"]);
        assert_eq!(endpoints(all(), To::Leader, 1), ["b"]);
    }

    #[test]
    fn slower_or_dearer_is_a_broken_promise() {
        let etcd = summary(100.0, 10.0);
        let count = |kind, rate, cpu_us| broken("x", kind, &etcd, &summary(rate, cpu_us)).len();
        assert_eq!(count(Kind::Put, 100.0, 10.0), 0);
        assert_eq!(count(Kind::Put, 99.0, 11.0), 2);
        assert_eq!(count(Kind::Put, f64::NAN, f64::NAN), 2);
        assert_eq!(count(Kind::Range, 99.0, 10.0), 0);
        assert_eq!(count(Kind::Range, 99.0, 10.1), 1);
    }
}
