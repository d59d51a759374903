//! etcd and kvorum in turns.
//!
//! Measurements come in groups; each group starts a server with an empty
//! directory, measures, and stops it. Within a round every group runs on one server
//! and at once on the other, and who goes first changes with the round, so what slows
//! the machine for a while slows both. The table has medians over the rounds.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use crate::args::Args;
use crate::process;
use crate::report::{self, Summary, median, number};
use crate::server::Server;
use crate::workload::{self, Kind, Load, Outcome};

/// How long a server is left alone before its idle memory is looked at.
const IDLE: Duration = Duration::from_secs(1);
/// Keys of the large group, and bytes of their values.
const LARGE_KEYS: usize = 100_000;
const LARGE_VALUE_BYTES: usize = 1_024;

/// A measurement: its row in a table, and one value per round.
struct Row {
    name: String,
    sides: [Vec<Sample>; 2],
}

/// What one round measured.
#[derive(Clone)]
enum Sample {
    Run(Box<Outcome>),
    Startup(Duration),
    Memory(u64),
}

struct Plan {
    programs: [PathBuf; 2],
    directory: PathBuf,
    rounds: usize,
    seconds: f64,
    only: String,
}

/// `kvorum-bench compare`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let plan = Plan {
        programs: [
            args.text("etcd", "target/judge/etcd").into(),
            args.text("kvorum", "target/release/kvorum").into(),
        ],
        directory: args.text("dir", "target/bench").into(),
        rounds: args.number("rounds", 3)?.max(1),
        seconds: args.real("seconds", 5.0)?,
        only: args.text("only", ""),
    };
    args.finish()?;
    std::fs::create_dir_all(&plan.directory)?;
    let mut table: BTreeMap<usize, Row> = BTreeMap::new();
    for round in 0..plan.rounds {
        for group in [Group::Put, Group::Small, Group::Large] {
            if !group.name().contains(&plan.only) {
                continue;
            }
            let order = if round.is_multiple_of(2) { [0, 1] } else { [1, 0] };
            for side in order {
                let name = if side == 0 { "etcd" } else { "kvorum" };
                eprintln!("round {} of {}, {}, {name}", round + 1, plan.rounds, group.name());
                let rows = group.measure(&plan, side).await.map_err(|error| {
                    format!("{} on {}: {error}", group.name(), plan.programs[side].display())
                })?;
                for (index, (name, sample)) in rows.into_iter().enumerate() {
                    let row = table
                        .entry(group as usize * 100 + index)
                        .or_insert_with(|| Row { name, sides: [Vec::new(), Vec::new()] });
                    row.sides[side].push(sample);
                }
            }
        }
    }
    let rounds = (plan.rounds, plan.seconds);
    println!("{}", report::header(&plan.programs, rounds));
    println!("{}", rendered(table.values()));
    Ok(())
}

/// Measurements that share a server.
#[derive(Clone, Copy)]
enum Group {
    Put,
    Small,
    Large,
}

impl Group {
    fn name(self) -> &'static str {
        match self {
            Group::Put => "put",
            Group::Small => "small",
            Group::Large => "large",
        }
    }

    async fn measure(
        self,
        plan: &Plan,
        side: usize,
    ) -> Result<Vec<(String, Sample)>, Box<dyn Error>> {
        let server = Server::start(&plan.programs[side], &plan.directory, &[]).await?;
        let pid = server.pid();
        let load = |kind: Kind, clients: usize| Load {
            kind,
            endpoints: vec![server.endpoint().to_owned()],
            clients,
            conns: clients.div_ceil(10),
            duration: Duration::from_secs_f64(plan.seconds),
            total: None,
            first: 0,
            keys: 10_000,
            key_size: 32,
            val_size: 256,
            limit: 500,
            serializable: false,
            watchers: 1_000,
        };
        let mut rows = Vec::new();
        let mut runs: Vec<(&str, Load)> = Vec::new();
        match self {
            Group::Put => {
                rows.push(("start to first put".to_owned(), Sample::Startup(server.startup())));
                tokio::time::sleep(IDLE).await;
                rows.push(("memory, idle".to_owned(), Sample::memory(pid)?));
                runs.push(("put, 1 client", load(Kind::Put, 1)));
                runs.push(("put, 10 clients", load(Kind::Put, 10)));
                runs.push(("put, 100 clients", load(Kind::Put, 100)));
                runs.push(("put, 1,000 clients", load(Kind::Put, 1_000)));
            }
            Group::Small => {
                workload::run(&load(Kind::Load, 100), &[]).await?;
                runs.push(("get, linearizable, 100 clients", load(Kind::Range, 100)));
                let serializable = Load { serializable: true, ..load(Kind::Range, 100) };
                runs.push(("get, serializable, 100 clients", serializable));
                runs.push(("compare and put, 100 clients", load(Kind::TxnUpdate, 100)));
                runs.push(("as Kubernetes mixes, 100 clients", load(Kind::Kubernetes, 100)));
                runs.push(("lease keepalive, 100 clients", load(Kind::KeepAlive, 100)));
                let watch = Load { conns: 10, ..load(Kind::Watch, 1) };
                runs.push(("put to 1,000 watchers", watch));
            }
            Group::Large => {
                let large = |kind, clients| Load {
                    keys: LARGE_KEYS,
                    val_size: LARGE_VALUE_BYTES,
                    ..load(kind, clients)
                };
                workload::run(&large(Kind::Load, 100), &[]).await?;
                rows.push(("memory, 100,000 keys of 1 KiB".to_owned(), Sample::memory(pid)?));
                runs.push(("list 500 of 100,000, 10 clients", large(Kind::List, 10)));
                runs.push(("list all 100,000, 1 client", large(Kind::ListAll, 1)));
                runs.push(("get, 100,000 keys, 100 clients", large(Kind::Range, 100)));
            }
        }
        for (name, load) in runs {
            let outcome = workload::run(&load, &[pid]).await?;
            if outcome.errors > 0 {
                let first = outcome.first_error.unwrap_or_default();
                return Err(format!("{name}: {} errors, the first: {first}", outcome.errors).into());
            }
            rows.push((name.to_owned(), Sample::Run(Box::new(outcome))));
        }
        if matches!(self, Group::Large) {
            let name = "memory, after the lists".to_owned();
            rows.push((name, Sample::memory(pid)?));
        }
        Ok(rows)
    }
}

impl Sample {
    fn run(&self) -> Option<&Outcome> {
        match self {
            Sample::Run(outcome) => Some(outcome),
            _ => None,
        }
    }

    fn memory(pid: u32) -> Result<Sample, String> {
        let bytes = process::resident_bytes(pid);
        bytes.map(Sample::Memory).ok_or_else(|| format!("process {pid} has gone"))
    }
}

fn rendered<'a>(rows: impl Iterator<Item = &'a Row>) -> String {
    let mut throughput = report::THROUGHPUT_HEADER.to_owned();
    let mut amounts = String::from("| | etcd | kvorum | ratio |\n|---|---|---|---|\n");
    for row in rows {
        let [etcd, kvorum] = &row.sides;
        if matches!(etcd.first(), Some(Sample::Run(_))) {
            let [etcd, kvorum] =
                [etcd, kvorum].map(|samples| Summary::of(samples.iter().filter_map(Sample::run)));
            throughput.push_str(&report::throughput_row(&row.name, &etcd, &kvorum));
        } else {
            let [etcd, kvorum] = [etcd, kvorum].map(|samples| amount(samples));
            let ratio = kvorum.0 / etcd.0;
            amounts
                .push_str(&format!("| {} | {} | {} | {ratio:.2} |\n", row.name, etcd.1, kvorum.1));
        }
    }
    format!("{throughput}\n{amounts}")
}

fn amount(samples: &[Sample]) -> (f64, String) {
    let values: Vec<f64> = samples
        .iter()
        .map(|sample| match sample {
            Sample::Startup(time) => time.as_secs_f64() * 1e3,
            Sample::Memory(bytes) => *bytes as f64 / f64::from(1 << 20),
            Sample::Run(outcome) => outcome.rate(),
        })
        .collect();
    let unit = if matches!(samples.first(), Some(Sample::Memory(_))) { "MiB" } else { "ms" };
    let middle = median(&values);
    (middle, format!("{} {unit}", number(middle)))
}
