//! A member that was left behind by a whole state catches up.
//!
//! ```text
//! stop one ─▶ load --size MiB ─▶ start it ─▶ kill it at a quarter ─▶ start it
//!          ─▶ kill it at a half ─▶ start it ─▶ it has caught up
//! ```
//!
//! The log keeps so little (`--snapshot-count`, `--snapshot-catchup-entries`) that only a
//! snapshot helps. Meanwhile there are writes to the leader, `--write-rate` per second, and
//! a compaction every second. With `--send-bytes-per-sec` kvorum's leader sends no faster than
//! that; etcd's cannot be told to. What is measured is the time from the last start until the
//! member is as far as the leader, and how much more memory the leader held at any
//! time since the first start than it did under the same load before. At the end the
//! member must have the leader's hash.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::error::Error;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior};

use crate::args::Args;
use crate::client::{CallError, Connection};
use crate::cluster::{self, Cluster, MEMBERS, Options};
use crate::process;
use crate::report::{self, number};
use crate::requests::Template;
use crate::workload::{self, Load};

/// Entries of the log between checkpoints, and kept behind them.
const LOG_ENTRIES: &str = "1000";
/// Bytes of a key, and of a value that is written meanwhile.
const KEY_BYTES: usize = 32;
const VALUE_BYTES: usize = 64;
/// The keys that are written meanwhile: how many, and the first, which is not of the state.
const CHANGING_KEYS: u64 = 100;
const FIRST_CHANGING_KEY: u64 = 1_000_000_000;
/// Fewer values than this would all be in the log still.
const MIN_VALUES: usize = 10_000;
/// The largest value, in bytes.
const MAX_VALUE_BYTES: usize = 16 << 10;
/// How long the state may take to load.
const LOAD_PATIENCE: Duration = Duration::from_secs(1_800);
/// Parts of the state that the member has received when it is killed.
const KILLS: [f64; 2] = [0.25, 0.5];
/// Compactions after loading, and then those during which the leader's memory is what it
/// usually is: with the default rate of writes, there are checkpoints among them.
const SETTLING: u64 = 5;
const USUAL: u64 = 10;
/// Time between two compactions, and revisions they keep.
const COMPACTION: Duration = Duration::from_secs(1);
const KEPT_REVISIONS: i64 = 1_000;
/// What kvorum is told how fast it may send; etcd does not know it.
const SEND_LIMIT: &str = "KVORUM_SNAPSHOT_SEND_BYTES_PER_SEC";
/// How often the leader's memory is looked at.
const SAMPLE: Duration = Duration::from_millis(20);
/// How long to wait for a member's answer before its files are looked at again: a member
/// that receives may listen and not answer.
const GLANCE: Duration = Duration::from_millis(50);
/// Entries that a member that has caught up may be behind: they come all the time.
const LAG_ENTRIES: u64 = 100;
/// How much more memory kvorum's leader may hold.
const PROMISED_MIB: f64 = 64.0;
const MIB: usize = 1 << 20;

/// What was measured of one cluster.
struct Measured {
    seconds: f64,
    kills: usize,
    usual_mib: f64,
    extra_mib: f64,
    writes: u64,
    compactions: u64,
}

/// `kvorum-bench snapshot-catchup`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let size_mib = args.number("size", 1_024)?.max(1);
    let rate = args.number("write-rate", 200)?.max(1);
    let limit = args.optional("send-bytes-per-sec")?;
    args.finish()?;
    let environment: Vec<_> =
        limit.map(|bytes| (SEND_LIMIT, bytes.to_string())).into_iter().collect();
    let mut sides = Vec::new();
    for program in &options.programs {
        let measured =
            measure(program, &environment, &options.directory, size_mib * MIB, rate).await;
        sides.push(measured.map_err(|error| format!("{}: {error}", program.display()))?);
    }
    let [etcd, kvorum] = &sides[..] else { return Err("nothing was measured".into()) };
    println!(
        "A member that is {size_mib} MiB behind catches up: {}; {rate} writes per second meanwhile{}.\n",
        report::contestants(&options.programs),
        limit
            .map(|bytes| format!("; kvorum sends at most {bytes} bytes per second"))
            .unwrap_or_default(),
    );
    println!("| | etcd | kvorum |\n|---|---|---|");
    let row = |name: &str, value: fn(&Measured) -> String| {
        println!("| {name} | {} | {} |", value(etcd), value(kvorum));
    };
    row("killed while receiving, times", |side| side.kills.to_string());
    row("caught up after the last start, s", |side| number(side.seconds));
    row("writes meanwhile", |side| side.writes.to_string());
    row("compactions meanwhile", |side| side.compactions.to_string());
    row("memory of the leader before, MiB", |side| number(side.usual_mib));
    row("at most more since, MiB", |side| number(side.extra_mib));
    report::verdict(options.assert, &broken(kvorum))
}

/// What kvorum promised and did not keep.
fn broken(kvorum: &Measured) -> Vec<String> {
    let mut broken = Vec::new();
    if kvorum.kills < KILLS.len() {
        broken.push("the member had caught up before it could be killed: a larger --size".into());
    }
    // Written so that what is not a number is a broken promise too.
    let bounded = kvorum.extra_mib < PROMISED_MIB;
    if !bounded {
        let extra = number(kvorum.extra_mib);
        broken.push(format!("the leader held {extra} MiB more, not less than {PROMISED_MIB}"));
    }
    broken
}

async fn measure(
    program: &Path,
    environment: &[(&'static str, String)],
    parent: &Path,
    size: usize,
    rate: usize,
) -> Result<Measured, Box<dyn Error>> {
    let flags = [
        ["--snapshot-count", LOG_ENTRIES],
        ["--snapshot-catchup-entries", LOG_ENTRIES],
        ["--quota-backend-bytes", "8589934592"],
    ];
    let mut cluster = Cluster::start_in(environment, program, parent, &flags.concat()).await?;
    let leader = cluster.leader().await?;
    let receiver = (leader + 1) % MEMBERS;
    cluster.stop(receiver).await?;
    let endpoint = cluster.endpoints()[leader].clone();
    eprintln!("{}: loading {} MiB", program.display(), size / MIB);
    workload::run_within(LOAD_PATIENCE, &state(&endpoint, size), &[]).await?;
    cluster.settled().await?;

    let pid = cluster.pid(leader).ok_or("the leader does not run")?;
    let background = Background::start(&endpoint, pid, rate);
    // What loading took goes back first.
    cluster.wait("memory is given back", async |_| background.compacted(SETTLING)).await?;
    background.most_bytes.set(0);
    let usual = SETTLING + USUAL;
    cluster.wait("writes and compactions go on", async |_| background.compacted(usual)).await?;
    let usual = background.most_bytes.get();
    let (mut kills, mut begun) = (0, Instant::now());
    let mut before = (0, 0);
    for kill in KILLS.map(Some).into_iter().chain([None]) {
        cluster.restart(receiver)?;
        (begun, before) = (Instant::now(), background.done());
        let data = cluster.data(receiver);
        let mut least = u64::MAX;
        let caught_up = cluster
            .wait("the member catches up", async |cluster| {
                // What an earlier attempt left goes away at the start.
                let bytes = bytes_below(&data);
                least = least.min(bytes);
                if kill.is_some_and(|part| (bytes - least) as f64 >= part * size as f64) {
                    return Ok(false);
                }
                let applied = async {
                    let leader = cluster.status(leader).await?.raft_applied_index;
                    let receiver = cluster.status(receiver).await?.raft_applied_index;
                    Ok::<_, CallError>((leader, receiver))
                };
                let (goal, applied) = tokio::time::timeout(GLANCE, applied)
                    .await
                    .map_err(|_| "it does not answer yet")??;
                if applied + LAG_ENTRIES < goal {
                    return Err(format!("it has applied {applied} of {goal} entries").into());
                }
                Ok(true)
            })
            .await?;
        if caught_up {
            break;
        }
        eprintln!("{}: killed while it receives", program.display());
        cluster.kill(receiver)?;
        kills += 1;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let after = background.done();
    let most = background.most_bytes.get();
    drop(background);
    if cluster.settled().await? != leader {
        return Err("leadership moved: the memory is of a follower".into());
    }
    same_hash(&cluster, leader, receiver).await?;
    Ok(Measured {
        seconds,
        kills,
        usual_mib: usual as f64 / MIB as f64,
        extra_mib: most.saturating_sub(usual) as f64 / MIB as f64,
        writes: after.0 - before.0,
        compactions: after.1 - before.1,
    })
}

/// Puts `size` bytes of values.
fn state(endpoint: &str, size: usize) -> Load {
    let val_size = (size / MIN_VALUES).clamp(1, MAX_VALUE_BYTES);
    Load::state(endpoint, size / val_size, KEY_BYTES, val_size)
}

/// Bytes of all files below `directory`; what vanishes meanwhile is not counted.
fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

async fn same_hash(cluster: &Cluster, a: usize, b: usize) -> Result<(), Box<dyn Error>> {
    let revision = cluster.status(a).await?.header.map_or(0, |header| header.revision);
    let hashes = [cluster.hash(a, revision).await?, cluster.hash(b, revision).await?];
    let [ours, theirs] = hashes.map(|hash| (hash.hash, hash.compact_revision));
    if ours != theirs {
        return Err(format!(
            "the hash at revision {revision} and the compacted revision are {ours:?} on the \
             leader and {theirs:?} on the member that caught up"
        )
        .into());
    }
    Ok(())
}

/// Writes, compactions, and looks at the leader's memory, until this goes out of scope.
struct Background {
    shared: Rc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    writes: Cell<u64>,
    compactions: Cell<u64>,
    most_bytes: Cell<u64>,
    last_error: RefCell<String>,
}

impl std::ops::Deref for Background {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Background {
    fn start(endpoint: &str, pid: u32, rate: usize) -> Background {
        let shared = Rc::new(Shared::default());
        let mut tasks = JoinSet::new();
        tasks.spawn_local(Rc::clone(&shared).write(endpoint.to_owned(), rate));
        tasks.spawn_local(Rc::clone(&shared).compact(endpoint.to_owned()));
        tasks.spawn_local(Rc::clone(&shared).sample(pid));
        Background { shared, _tasks: tasks }
    }
}

impl Shared {
    fn done(&self) -> (u64, u64) {
        (self.writes.get(), self.compactions.get())
    }

    fn compacted(&self, times: u64) -> Result<(), CallError> {
        if self.compactions.get() < times {
            return Err(format!("the last error is {:?}", self.last_error.borrow()).into());
        }
        Ok(())
    }

    async fn write(self: Rc<Self>, endpoint: String, rate: usize) {
        let mut tick = tokio::time::interval(Duration::from_secs(1) / rate as u32);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let Err(error) = self.write_while_connected(&endpoint, &mut tick).await;
            *self.last_error.borrow_mut() = error.to_string();
            tick.tick().await;
        }
    }

    async fn write_while_connected(
        &self,
        endpoint: &str,
        tick: &mut Interval,
    ) -> Result<Infallible, CallError> {
        let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
        let put = Template::put(KEY_BYTES, &value);
        let mut connection = Connection::open(endpoint).await?;
        let path = connection.path("etcdserverpb.KV/Put")?;
        loop {
            tick.tick().await;
            let key = FIRST_CHANGING_KEY + self.writes.get() % CHANGING_KEYS;
            connection.unary(&path, put.with(key)).await?;
            self.writes.set(self.writes.get() + 1);
        }
    }

    async fn compact(self: Rc<Self>, endpoint: String) {
        loop {
            tokio::time::sleep(COMPACTION).await;
            match cluster::compact(&endpoint, KEPT_REVISIONS).await {
                Ok(_) => self.compactions.set(self.compactions.get() + 1),
                Err(error) => *self.last_error.borrow_mut() = error.to_string(),
            }
        }
    }

    async fn sample(self: Rc<Self>, pid: u32) {
        loop {
            let bytes = process::resident_bytes(pid).unwrap_or(0);
            self.most_bytes.set(self.most_bytes.get().max(bytes));
            tokio::time::sleep(SAMPLE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(kills: usize, extra_mib: f64) -> Measured {
        Measured { seconds: 1.0, kills, usual_mib: 1.0, extra_mib, writes: 1, compactions: 1 }
    }

    #[test]
    fn much_memory_or_no_kill_is_a_broken_promise() {
        assert_eq!(broken(&measured(2, 63.9)).len(), 0);
        assert_eq!(broken(&measured(1, 64.0)).len(), 2);
        assert_eq!(broken(&measured(2, f64::NAN)).len(), 1);
    }

    #[test]
    fn the_state_has_its_size_and_more_values_than_the_log_keeps() {
        for size in [MIB, 100 * MIB, 1_024 * MIB] {
            let load = state("", size);
            assert!(load.keys >= MIN_VALUES && load.val_size <= MAX_VALUE_BYTES);
            assert!(load.keys * load.val_size <= size);
            assert!(load.keys * load.val_size > size - load.val_size);
        }
    }
}
