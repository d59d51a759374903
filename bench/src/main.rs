//! Load for an etcd server, any etcd server: it speaks nothing but etcd's gRPC.
//!
//! ```text
//! kvorum-bench put --clients 100 --conns 10 --seconds 10
//! kvorum-bench range --endpoint 127.0.0.1:2379 --serializable
//! kvorum-bench compare --etcd target/judge/etcd --kvorum target/release/kvorum --dir /var/tmp
//! ```
//!
//! Closed loop: every client sends its next request when the last is answered. So
//! latencies are of a system at its own speed, and a slower server gets less load.
//! The generator is one thread with its own HTTP/2 hot loop ([`client`]) and requests
//! encoded in advance ([`requests`]); what it costs is printed beside what the server
//! costs, and a run in which the generator was the limit says so.

mod args;
mod client;
mod compare;
mod histogram;
mod process;
mod report;
mod requests;
mod workload;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use args::Args;
use workload::{Kind, Load};

const USAGE: &str = "\
kvorum-bench <workload> [flags]    load one server and print what it did
kvorum-bench compare [flags]       run etcd and kvorum in turns and print a table

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
  --only TEXT               only groups whose name contains it: put, small, large";

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(Into::into).and_then(|runtime| {
        let tasks = tokio::task::LocalSet::new();
        tasks.block_on(&runtime, run())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvorum-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse(std::env::args().skip(1), &["serializable", "preload", "help"])?;
    let Some(command) = args.command() else {
        println!("{USAGE}");
        return Ok(());
    };
    if args.flag("help") || command == "help" {
        println!("{USAGE}");
        return Ok(());
    }
    if command == "compare" {
        return compare::run(args).await;
    }
    let kind =
        Kind::parse(&command).ok_or_else(|| format!("no workload {command:?}\n\n{USAGE}"))?;
    let clients = args.number("clients", 100)?.max(1);
    let load = Load {
        kind,
        endpoint: args.text("endpoint", "127.0.0.1:2379"),
        clients,
        conns: args.number("conns", clients.div_ceil(10))?.max(1),
        duration: Duration::from_secs_f64(args.real("seconds", 10.0)?),
        total: args.optional("total")?,
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
        None => process::listening_on(&load.endpoint),
    };
    args.finish()?;
    if preload {
        workload::run(&Load { kind: Kind::Load, total: None, ..load.clone() }, pid).await?;
    }
    let outcome = workload::run(&load, pid).await?;
    println!("{}", report::one(&load, &outcome));
    Ok(())
}
