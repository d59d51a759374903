//! Load for an etcd server, any etcd server: it speaks nothing but etcd's gRPC.
//!
//! ```text
//! kvorum-bench put --clients 100 --conns 10 --seconds 10
//! kvorum-bench range --endpoint 127.0.0.1:2379 --serializable
//! kvorum-bench compare --etcd target/judge/etcd --kvorum target/release/kvorum --dir /var/tmp
//! kvorum-bench cluster --assert
//! ```
//!
//! Closed loop: every client sends its next request when the last is answered. So
//! latencies are of a system at its own speed, and a slower server gets less load.
//! The generator is one thread with its own HTTP/2 hot loop ([`client`]) and requests
//! encoded in advance ([`requests`]); what it costs is printed beside what the server
//! costs, and a run in which the generator was the limit says so.
//!
//! [`compare`] measures single members, [`throughput`] clusters of three, and
//! [`failover`], [`rolling`] and [`catchup`] what happens to clusters whose members
//! are killed, restarted, or left behind. [`window`] and [`defragment`] are about the disk,
//! [`snapshot`] is about backups.

mod args;
mod catchup;
mod client;
mod cluster;
mod compare;
mod defragment;
mod failover;
mod histogram;
mod process;
mod report;
mod requests;
mod rolling;
mod server;
mod snapshot;
mod throughput;
mod window;
mod workload;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use args::Args;
use tokio::signal::unix::{SignalKind, signal};
use workload::{Kind, Load};

const USAGE: &str = "\
kvorum-bench <workload> [flags]    load one server and print what it did
kvorum-bench compare [flags]       run etcd and kvorum in turns and print a table
kvorum-bench cluster [flags]       the same with three members each
kvorum-bench failover [flags]      kill leaders; how long is nothing written?
kvorum-bench rolling [flags]       restart members in turns; which requests of etcd's Go client fail?
kvorum-bench snapshot-catchup [flags]
                                   start a member that was left behind; what does that cost the leader?
kvorum-bench sliding-window [flags]
                                   keys come and go; what does that take on the disk and in memory?
kvorum-bench defragment [flags]    defragment under load: time, memory, and what puts notice
kvorum-bench snapshot [flags]      save and restore in turns: time and memory

workloads
  put          put random keys of the key space
  range        get random keys of the key space
  list         get pages of 500 keys, beginning anywhere
  list-all     get all keys in one answer
  txn-update   compare the mod revision and put, each client its own keys
  watch        put, and wait until every watcher has the event
  keepalive    keep leases alive
  kubernetes   updates, gets, pages, creates and deletes as an API server mixes them
  load         put every key of the key space once

flags
  --endpoint HOST:PORT      the server (127.0.0.1:2379)
  --clients N               requests in flight (100)
  --conns N                 connections they share (a tenth of the clients)
  --seconds S               how long (10)
  --total N                 stop after so many operations instead
  --keys N                  key space (10000; list and list-all 100000)
  --key-size B              bytes of a key (32)
  --val-size B              bytes of a value (256)
  --limit N                 keys of a page (500)
  --serializable            reads need not be linearizable
  --watchers N              watchers (1000), ten to a stream
  --preload                 put every key first (for range, list, txn-update, kubernetes)
  --pid PID                 the server's process (found by its port if it is local)

flags of compare
  --etcd PATH --kvorum PATH the two programs
  --dir DIR                 where their data goes: one disk for both
  --rounds N                how often each measurement is repeated (3)
  --seconds S               how long each takes (5)
  --only TEXT               only groups whose name contains it: put, small, large

flags of cluster, failover, rolling and snapshot-catchup
  --etcd, --kvorum, --dir   as for compare
  --assert                  end with an error if kvorum is worse than CONTRIBUTING.md promises
  --rounds N, --seconds S   as for compare (cluster); restarts of every member (3; rolling)
  --kills N                 leaders killed in every cluster (50; failover)
  --timeout-ms MS           how long a writer waits before it tries another member (200; failover)
  --seed N                  when to kill (failover)
  --clients N               goroutines that put and get (20; rolling)
  --pause-ms MS             between two members (2000; rolling)
  --go-client PATH          the program of tests/judge/client (target/judge/client; rolling)
  --size MIB                the state a member must catch up with (1024; snapshot-catchup)
  --write-rate N            writes per second meanwhile (200; snapshot-catchup)
  --send-bytes-per-sec N    how fast kvorum's leader sends it (unlimited; snapshot-catchup)

flags of sliding-window, defragment and snapshot
  --etcd, --kvorum, --dir, --assert, --only NAME (etcd or kvorum)
  --writes N                in all (10000000; sliding-window)
  --compact-every N         writes between two compactions (100000; sliding-window)
  --random                  put any of the keys, instead of a new one and delete the oldest
  --size-mib MIB            the state (1024; defragment, snapshot)
  --rate N                  puts per second meanwhile (500; defragment)
  --rounds N                how often each is saved and restored (3; snapshot)

snapshot runs etcdctl and etcdutl, which must be beside --etcd.";

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(Into::into).and_then(|runtime| {
        let tasks = tokio::task::LocalSet::new();
        tasks.block_on(&runtime, async {
            // Servers that were started are killed by their owners' drop: so `run` is dropped.
            tokio::select! {
                result = run() => result,
                signal = interrupted() => Err(signal),
            }
        })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvorum-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why to stop, when somebody asks for it.
async fn interrupted() -> Box<dyn Error> {
    let signals = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    match signals {
        [Ok(mut interrupt), Ok(mut terminate)] => {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            "interrupted".into()
        }
        [Err(error), _] | [_, Err(error)] => error.into(),
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse(
        std::env::args().skip(1),
        &["serializable", "preload", "assert", "random", "help"],
    )?;
    let Some(command) = args.command() else {
        println!("{USAGE}");
        return Ok(());
    };
    if args.flag("help") || command == "help" {
        println!("{USAGE}");
        return Ok(());
    }
    match command.as_str() {
        "compare" => return compare::run(args).await,
        "cluster" => return throughput::run(args).await,
        "failover" => return failover::run(args).await,
        "rolling" => return rolling::run(args).await,
        "snapshot-catchup" => return catchup::run(args).await,
        "defragment" => return defragment::run(args).await,
        "sliding-window" => return window::run(args).await,
        "snapshot" => return snapshot::run(args).await,
        _ => {}
    }
    let kind =
        Kind::parse(&command).ok_or_else(|| format!("no workload {command:?}\n\n{USAGE}"))?;
    let clients = args.number("clients", 100)?.max(1);
    let load = Load {
        kind,
        endpoints: vec![args.text("endpoint", "127.0.0.1:2379")],
        clients,
        conns: args.number("conns", clients.div_ceil(10))?.max(1),
        duration: Duration::from_secs_f64(args.real("seconds", 10.0)?),
        total: args.optional("total")?,
        first: 0,
        keys: args.number("keys", kind.usual_keys())?.max(1),
        key_size: args.number("key-size", 32)?,
        val_size: args.number("val-size", 256)?,
        limit: args.number("limit", 500)?,
        serializable: args.flag("serializable"),
        watchers: args.number("watchers", 1_000)?.max(1),
    };
    let preload = args.flag("preload");
    let pid = match args.optional("pid")? {
        Some(pid) => u32::try_from(pid).ok(),
        None => process::listening_on(&load.endpoints[0]),
    };
    let pids = pid.as_slice();
    args.finish()?;
    if preload {
        workload::run(&Load { kind: Kind::Load, total: None, ..load.clone() }, pids).await?;
    }
    let outcome = workload::run(&load, pids).await?;
    println!("{}", report::one(&load, &outcome));
    Ok(())
}
