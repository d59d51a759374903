//! The kvorum binary: flags → [`Config`] → [`Server`] → a signal → shutdown. Commands that are
//! no server (`kvorum snapshot …`) are in `cli`.
//!
//! Exit codes: 0 after SIGTERM or SIGINT, and when the member was removed from its cluster;
//! 1 when the configuration cannot be used or the server failed; 2 when the command line
//! cannot be read. A second signal during the shutdown ends the process at once.

mod cli;
mod logging;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
mod systemd;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::process::ExitCode;

use kvorum::config::{Config, Outcome};
use kvorum::{Fatal, Server, StartError, config};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

/// What etcd has no flag for: how fast a snapshot is sent to a member that fell behind.
const SNAPSHOT_LIMIT: &str = "KVORUM_SNAPSHOT_SEND_BYTES_PER_SEC";

fn main() -> ExitCode {
    if let Some(exit_code) = cli::run(std::env::args_os().skip(1)) {
        return exit_code;
    }
    match config::parse(std::env::args_os().skip(1), std::env::vars_os()) {
        // Standard output may be a closed pipe: nothing is lost that anybody waits for.
        Outcome::Print(text) => drop(io::stdout().write_all(text.as_bytes())),
        Outcome::Fail { message, exit_code } => return fail(&message, exit_code),
        Outcome::Run { mut config, notices } => {
            let limit = std::env::var_os(SNAPSHOT_LIMIT);
            match limit.as_deref().map_or(Ok(0), bytes_per_sec) {
                Ok(limit) => config.snapshot_send_bytes_per_sec = limit,
                Err(message) => return fail(&message, 1),
            }
            match logging::subscriber(config.log_level, config.log_format, &config.log_outputs) {
                Ok(subscriber) => drop(tracing::subscriber::set_global_default(subscriber)),
                Err(message) => return fail(&format!("{message}\n"), 1),
            }
            notices.iter().for_each(config::Notice::log);
            if let Err(error) = run(*config)
                && !is_removal(error.as_ref())
            {
                error!(%error, "stopped by an error");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn fail(message: &str, exit_code: u8) -> ExitCode {
    let _ = io::stderr().write_all(message.as_bytes());
    ExitCode::from(exit_code)
}

fn bytes_per_sec(value: &OsStr) -> Result<u64, String> {
    let number = value.to_str().and_then(|value| value.parse().ok());
    number.ok_or_else(|| {
        format!(
            "{SNAPSHOT_LIMIT}={}: give a number of bytes per second, or 0 for no limit\n",
            value.display()
        )
    })
}

fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    memory::trim_from_time_to_time()
        .unwrap_or_else(|error| warn!(%error, "freed memory will not be given back"));
    // One worker per processor, or TOKIO_WORKER_THREADS, does the clients' work; raft, log,
    // apply and checkpoint have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = tokio::select! {
        server = Server::start(config) => server?,
        name = next(&mut signals) => {
            info!(signal = name, "received signal before the server was ready");
            return Ok(());
        }
    };
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET") {
        systemd::notify(&socket, "READY=1")
            .unwrap_or_else(|error| warn!(%error, "failed to notify systemd"));
    }
    let failure = tokio::select! {
        failure = server.wait_for_failure() => Some(failure),
        name = next(&mut signals) => {
            info!(signal = name, "received signal; shutting down");
            None
        }
    };
    tokio::select! {
        stopped = server.shutdown() => stopped?,
        name = next(&mut signals) => warn!(signal = name, "received a second signal; not waiting for the shutdown"),
    }
    failure.map_or(Ok(()), |failure| Err(failure.into()))
}

/// Whether nothing failed: the member was removed from its cluster, and has said so.
fn is_removal(error: &(dyn std::error::Error + 'static)) -> bool {
    let fatal = match error.downcast_ref() {
        Some(StartError::Fatal(fatal)) => Some(fatal),
        Some(_) => None,
        None => error.downcast_ref::<Fatal>(),
    };
    fatal.is_some_and(Fatal::is_removal)
}

async fn next((terminate, interrupt): &mut (Signal, Signal)) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "terminated",
        _ = interrupt.recv() => "interrupt",
    }
}
