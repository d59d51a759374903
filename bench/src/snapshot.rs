//! Saving and restoring a snapshot, beside etcd.
//!
//! ```text
//! start etcd and kvorum ─▶ load --size-mib into each ─▶ for --rounds times, by each in turn:
//!     etcdctl snapshot save ─▶ etcdutl, kvorum snapshot restore ─▶ start there, first read
//! ```
//!
//! The same `etcdctl` saves from both servers, and both restore the same file: the one that
//! was saved from etcd, or from kvorum with `--only kvorum`. Who is first changes with each round,
//! and before each command what was written earlier goes to the disk, so that nobody waits for
//! the other's bytes. Files are read from the kernel's cache, as they were just written.
//!
//! Memory is what the kernel counts as resident. With etcd and etcdutl that includes pages of
//! the database, which they map.

use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;

use crate::args::Args;
use crate::cluster::Options;
use crate::process;
use crate::report::{self, median, number};
use crate::server::{Place, Server};
use crate::workload::{self, Load};

/// Bytes of a key and of its value: 1 KiB.
const KEY_BYTES: usize = 32;
const VALUE_BYTES: usize = 992;
/// Clients that load the state, over a tenth as many connections.
const CLIENTS: usize = 200;
/// How long the state may take to load, and a command to end.
const PATIENCE: Duration = Duration::from_secs(1_800);
/// How long servers are left alone after the state was loaded: checkpoints, and rewrites.
const SETTLING: Duration = Duration::from_secs(15);
/// How often it is looked whether a command has ended, and at its memory.
const SAMPLE: Duration = Duration::from_millis(5);
/// How much more memory kvorum may hold while it is saved.
const PROMISED_MIB: f64 = 64.0;
const MIB: f64 = (1 << 20) as f64;

/// A server, and what was measured of it in each round.
struct Side {
    program: PathBuf,
    server: Server,
    measured: Measured,
}

#[derive(Default)]
struct Measured {
    save_seconds: Vec<f64>,
    /// What the server held before a save, and how much more meanwhile.
    server_mib: Vec<f64>,
    server_extra_mib: Vec<f64>,
    /// What etcdctl held.
    save_mib: Vec<f64>,
    file_mib: Vec<f64>,
    restore_seconds: Vec<f64>,
    restore_mib: Vec<f64>,
    /// From the begin of a restore until the first read of what was restored was answered.
    served_seconds: Vec<f64>,
}

/// What a command took.
struct Ran {
    seconds: f64,
    most_mib: f64,
}

/// `kvorum-bench snapshot`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let size_mib = args.number("size-mib", 1_024)?.max(1);
    let rounds = args.number("rounds", 3)?.max(1);
    let only = args.text("only", "");
    args.finish()?;
    let mut sides = Vec::new();
    for (name, program) in options.sides(&only) {
        let side = Side::start(program, &options.directory, size_mib << 20).await;
        sides.push((name, side.map_err(|error| format!("{}: {error}", program.display()))?));
    }
    tokio::time::sleep(SETTLING).await;
    let tool = |name| options.programs[0].with_file_name(name);
    let (etcdctl, etcdutl) = (tool("etcdctl"), tool("etcdutl"));
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for (_, side) in &mut sides {
            side.save(&etcdctl).await?;
        }
        let file = sides.iter().find(|(name, _)| *name == "etcd").or(sides.first());
        let (_, saved) = file.ok_or("there is no such side: --only etcd, or kvorum")?;
        let file = saved.saved();
        for (name, side) in &mut sides {
            let restorer = if *name == "etcd" { etcdutl.clone() } else { side.program.clone() };
            side.restore(&restorer, &file, &options.directory).await?;
        }
        for (_, side) in &sides {
            std::fs::remove_file(side.saved())?;
        }
        sides.reverse();
    }
    sides.sort_by_key(|(name, _)| *name);
    let sides: Vec<_> = sides.into_iter().map(|(name, side)| (name, side.measured)).collect();
    println!(
        "Snapshots of {size_mib} MiB of keys with values, {} bytes each: {}. Medians of {rounds} \
         rounds; in parentheses the lowest and the highest.\n",
        KEY_BYTES + VALUE_BYTES,
        report::contestants(&options.programs)
    );
    let table = report::Columns::head(&sides);
    table.row("etcdctl snapshot save, s", |side| seconds(&side.save_seconds));
    table.row("the file, MiB", |side| number(median(&side.file_mib)));
    table.row("memory of the server before, MiB", |side| number(median(&side.server_mib)));
    table.row("at most more meanwhile, MiB", |side| number(most(&side.server_extra_mib)));
    table.row("memory of etcdctl at most, MiB", |side| number(most(&side.save_mib)));
    table.row("etcdutl, kvorum snapshot restore, s", |side| seconds(&side.restore_seconds));
    table.row("memory of restore at most, MiB", |side| number(most(&side.restore_mib)));
    table.row("restore, start and first read, s", |side| seconds(&side.served_seconds));
    let kvorum = table.side("kvorum");
    let broken = kvorum.map_or(Vec::new(), |kvorum| broken(table.side("etcd"), kvorum));
    report::verdict(options.assert, &broken)
}

/// The median, with the lowest and the highest.
fn seconds(rounds: &[f64]) -> String {
    let low = rounds.iter().copied().fold(f64::NAN, f64::min);
    format!("{:.2} ({low:.2}–{:.2})", median(rounds), most(rounds))
}

fn most(rounds: &[f64]) -> f64 {
    rounds.iter().copied().fold(f64::NAN, f64::max)
}

/// What kvorum promised and did not keep. Written so that what is not a number is a broken
/// promise too.
fn broken(etcd: Option<&Measured>, kvorum: &Measured) -> Vec<String> {
    let mut broken = Vec::new();
    if let Some(etcd) = etcd {
        for (what, ours, theirs) in [
            ("save", &kvorum.save_seconds, &etcd.save_seconds),
            ("restore", &kvorum.restore_seconds, &etcd.restore_seconds),
        ] {
            let (ours, theirs) = (median(ours), median(theirs));
            let no_slower = ours <= theirs;
            if !no_slower {
                broken.push(format!("snapshot {what} took {ours:.2} s, etcd's {theirs:.2} s"));
            }
        }
    }
    let extra = most(&kvorum.server_extra_mib);
    let bounded = extra < PROMISED_MIB;
    if !bounded {
        let extra = number(extra);
        broken.push(format!("saving took {extra} MiB, not less than {PROMISED_MIB}"));
    }
    broken
}

impl Side {
    /// A server with its state.
    async fn start(program: &Path, parent: &Path, size: usize) -> Result<Side, Box<dyn Error>> {
        let server = Server::start(program, parent, &[]).await?;
        let keys = (size / (KEY_BYTES + VALUE_BYTES)).max(1);
        eprintln!("{}: loading {keys} values of {VALUE_BYTES} bytes", program.display());
        let state = Load {
            clients: CLIENTS,
            conns: CLIENTS.div_ceil(10),
            ..Load::state(server.endpoint(), keys, KEY_BYTES, VALUE_BYTES)
        };
        let outcome = workload::run_within(PATIENCE, &state, &[]).await?;
        if let Some(error) = outcome.first_error {
            return Err(format!("{} puts failed, the first: {error}", outcome.errors).into());
        }
        Ok(Side { program: program.to_owned(), server, measured: Measured::default() })
    }

    /// Where it is saved to.
    fn saved(&self) -> PathBuf {
        self.server.place().path("saved")
    }

    async fn save(&mut self, etcdctl: &Path) -> Result<(), Box<dyn Error>> {
        let file = self.saved();
        let arguments = ["snapshot", "save", "--endpoints", self.server.endpoint()];
        let arguments = arguments.map(OsStr::new).into_iter().chain([file.as_os_str()]);
        rustix::fs::sync();
        let pid = self.server.pid();
        let before = process::resident_bytes(pid).ok_or("the server is gone")? as f64 / MIB;
        let memory = process::Watch::start(pid);
        let ran = command(etcdctl, arguments).await?;
        let most = memory.most_bytes() as f64 / MIB;
        let measured = &mut self.measured;
        measured.save_seconds.push(ran.seconds);
        measured.save_mib.push(ran.most_mib);
        measured.server_mib.push(before);
        measured.server_extra_mib.push(most - before);
        measured.file_mib.push(file.metadata()?.len() as f64 / MIB);
        Ok(())
    }

    async fn restore(
        &mut self,
        restorer: &Path,
        file: &Path,
        parent: &Path,
    ) -> Result<(), Box<dyn Error>> {
        let place = Place::below(parent)?;
        let (data, member) = (place.data(), place.member());
        let arguments = ["snapshot", "restore", "--data-dir"].map(OsStr::new).into_iter();
        let arguments = arguments.chain([data.as_os_str(), file.as_os_str()]);
        let arguments = arguments.chain(member.iter().map(OsStr::new));
        rustix::fs::sync();
        let ran = command(restorer, arguments).await?;
        let server = place.start(&self.program, &[], workload::first_get).await?;
        self.measured.restore_seconds.push(ran.seconds);
        self.measured.restore_mib.push(ran.most_mib);
        self.measured.served_seconds.push(ran.seconds + server.startup().as_secs_f64());
        Ok(())
    }
}

/// Runs a command to its end, which must be a good one.
async fn command<'a>(
    program: &Path,
    arguments: impl Iterator<Item = &'a OsStr>,
) -> Result<Ran, Box<dyn Error>> {
    let begun = Instant::now();
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{} does not start: {error}", program.display()))?;
    let pid = child.id().ok_or("a command that has ended before it began")?;
    let mut most = 0;
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output());
    tokio::pin!(ended);
    let output = loop {
        tokio::select! {
            output = &mut ended => break output,
            () = tokio::time::sleep(SAMPLE) => {
                most = process::peak_resident_bytes(pid).unwrap_or(0).max(most);
            }
        }
    };
    let seconds = begun.elapsed().as_secs_f64();
    let program = program.display();
    let output = output.map_err(|_| format!("{program} has not ended after {PATIENCE:?}"))??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} ended with {}:\n{said}", output.status).into());
    }
    Ok(Ran { seconds, most_mib: most as f64 / MIB })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(save: f64, restore: f64, extra_mib: [f64; 2]) -> Measured {
        Measured {
            save_seconds: vec![9.0, save, 0.1],
            restore_seconds: vec![9.0, restore, 0.1],
            server_extra_mib: extra_mib.to_vec(),
            ..Measured::default()
        }
    }

    #[test]
    fn what_is_slower_or_takes_memory_is_a_broken_promise() {
        let etcd = measured(2.0, 3.0, [500.0, 500.0]);
        assert_eq!(broken(Some(&etcd), &measured(2.0, 3.0, [63.9, 1.0])).len(), 0);
        assert_eq!(broken(Some(&etcd), &measured(2.1, 3.1, [1.0, 64.0])).len(), 3);
        assert_eq!(broken(None, &measured(2.1, 3.1, [1.0, 63.9])).len(), 0);
        assert_eq!(broken(Some(&etcd), &Measured::default()).len(), 3);
    }
}
