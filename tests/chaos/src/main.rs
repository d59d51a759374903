//! The command line of a campaign.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

use kvorum_chaos::campaign::{self, Plan};
use kvorum_chaos::check::check;
use kvorum_chaos::cluster::Settings;
use kvorum_chaos::disk::Disk;
use kvorum_chaos::faults::Fault;
use kvorum_chaos::history::History;
use kvorum_chaos::report::Report;
use kvorum_chaos::rng::Rng;
use kvorum_chaos::traffic::Profile;

const USAGE: &str = "\
kvorum-chaos --server PATH [flags]   break a cluster of this server, and check it
kvorum-chaos --check FILE            check a history again that was kept

  --server PATH        etcd, kvorum, or what else takes etcd's flags
  --members N          how many: 3 or 5, or 1 without any fault that takes others (3)
  --duration S         how many seconds things are broken (60)
  --seed N             decides what is sent and broken (of the clock)
  --faults A,B|all     what is broken; `none` for nothing (all)
  --without A,B        what is not
  --profile NAME       what is sent: etcd, kubernetes or mixed (mixed)
  --rate N             operations a second (150)
  --no-compaction      do not compact every 100 ms
  --snapshot-count N   entries between snapshots (of the seed: 50, 100 or 1000)
  --dir PATH           where members keep their data (a new directory below the system's)
  --report FILE        write the report as JSON, too
  --keep               keep the directory even if nothing was found
  -- FLAG…             given to every member

Exit code 1 says that a promise was broken; then the directory is kept, with the history.";

/// Set in the process that has mounts of its own.
const INSIDE: &str = "KVORUM_CHAOS_INSIDE";

/// What the command line says.
struct Options {
    plan: Plan,
    report: Option<PathBuf>,
    keep: bool,
}

fn main() -> ExitCode {
    match start() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("kvorum-chaos: {error}");
            ExitCode::from(2)
        }
    }
}

fn start() -> io::Result<bool> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.is_empty() || arguments.iter().any(|argument| argument == "--help") {
        println!("{USAGE}");
        return Ok(true);
    }
    if let [flag, file] = &arguments[..]
        && flag == "--check"
    {
        let history = History::read(file.as_ref())?;
        let report = Report::new(&history, check(&history));
        println!("{report}");
        return Ok(report.passed());
    }
    let mut options = parse(arguments).map_err(io::Error::other)?;
    if options.plan.faults.iter().any(|fault| fault.needs_disk()) {
        if env::var_os(INSIDE).is_none() && can_mount() {
            return Err(again_with_own_mounts());
        }
        let dir = &options.plan.settings.dir;
        match env::var_os(INSIDE).map(|_| probe_disk(dir)) {
            Some(Ok(())) => options.plan.settings.has_disks = true,
            missing => {
                let why = match missing {
                    Some(Err(error)) => error.to_string(),
                    _ => "mounting takes root".to_owned(),
                };
                println!("no slow-disk, no full-disk: {why}");
                options.plan.faults.retain(|fault| !fault.needs_disk());
            }
        }
    }
    run(&options)
}

/// Whether this process may have mounts of its own.
fn can_mount() -> bool {
    let mut probe = Command::new("unshare");
    probe.args(["--mount", "--propagation", "private", "true"]);
    probe.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Makes a disk and takes it away.
fn probe_disk(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let (image, mount) = (dir.join("probe.img"), dir.join("probe"));
    let probed = Disk::new(&image, &mount).map(drop);
    fs::remove_file(image)?;
    if probed.is_ok() {
        fs::remove_dir(mount)?;
    }
    probed
}

/// Becomes the same program in a mount namespace of its own, so that whatever is mounted is
/// gone when it ends, however it ends. Returns only if that fails.
fn again_with_own_mounts() -> io::Error {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let program = match env::current_exe() {
        Ok(program) => program,
        Err(error) => return error,
    };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).arg(program).args(arguments);
    command.env(INSIDE, "1").exec()
}

fn run(options: &Options) -> io::Result<bool> {
    let Plan { seed, settings, faults, .. } = &options.plan;
    let names: Vec<String> = faults.iter().map(|fault| fault.name()).collect();
    let (dir, timing_ms) = (settings.dir.display(), settings.timing_ms);
    println!("seed {seed}, {} members in {dir}", settings.members);
    println!("snapshots every {}, timing {timing_ms:?} ms", settings.snapshot_count);
    println!("faults: {}", names.join(", "));
    fs::create_dir_all(&settings.dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let finding = runtime.block_on(async {
        tokio::select! {
            finding = campaign::run(&options.plan) => finding,
            _ = tokio::signal::ctrl_c() => Err(io::Error::other("interrupted")),
        }
    })?;
    drop(runtime);
    let report = &finding.report;
    println!("\n{report}");
    if let Some(path) = &options.report {
        fs::write(path, serde_json::to_vec_pretty(report)?)?;
    }
    if report.passed() && !options.keep {
        fs::remove_dir_all(&settings.dir)?;
    } else {
        let path = settings.dir.join("history.jsonl");
        finding.history.write(&path)?;
        fs::write(settings.dir.join("report.json"), serde_json::to_vec_pretty(report)?)?;
        println!("kept: {}; see it again with --check {}", settings.dir.display(), path.display());
    }
    Ok(report.passed())
}

fn faults(names: &str) -> Result<Vec<Fault>, String> {
    match names {
        "all" => Ok(Fault::ALL.to_vec()),
        "none" => Ok(Vec::new()),
        names => {
            let find = |name: &str| {
                let found = Fault::ALL.into_iter().find(|fault| fault.name() == name);
                let all = || Fault::ALL.map(Fault::name).join(", ");
                found.ok_or_else(|| format!("there is no fault {name:?}; there are {}", all()))
            };
            names.split(',').map(find).collect()
        }
    }
}

fn parse(arguments: Vec<String>) -> Result<Options, String> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let (mut seed, mut chosen, mut without) = (clock as u32 as u64, Fault::ALL.to_vec(), vec![]);
    let (mut server, mut members, mut seconds) = (None, 3, 60.0);
    let (mut profile, mut rate, mut compacts) = (Profile::Mixed, 150.0, true);
    let (mut snapshot_count, mut dir, mut report, mut keep) = (None, None, None, false);
    let mut flags = Vec::new();
    let mut words = arguments.into_iter();
    while let Some(word) = words.next() {
        let (flag, mut given) = match word.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
            None => (word, None),
        };
        let mut value =
            || given.take().or_else(|| words.next()).ok_or(format!("{flag} needs a value"));
        fn number<T: std::str::FromStr>(flag: &str, text: String) -> Result<T, String> {
            text.parse().map_err(|_| format!("{flag} is {text:?}, not a number"))
        }
        match flag.as_str() {
            "--server" => server = Some(PathBuf::from(value()?)),
            "--members" => members = number(&flag, value()?)?,
            "--duration" => seconds = number(&flag, value()?)?,
            "--seed" => seed = number(&flag, value()?)?,
            "--faults" => chosen = faults(&value()?)?,
            "--without" => without = faults(&value()?)?,
            "--profile" => {
                let name = value()?;
                profile = Profile::parse(&name).ok_or(format!("there is no profile {name:?}"))?;
            }
            "--rate" => rate = number(&flag, value()?)?,
            "--no-compaction" => compacts = false,
            "--snapshot-count" => snapshot_count = Some(number(&flag, value()?)?),
            "--dir" => dir = Some(PathBuf::from(value()?)),
            "--report" => report = Some(PathBuf::from(value()?)),
            "--keep" => keep = true,
            "--" => flags = words.by_ref().collect(),
            other => return Err(format!("there is no flag {other}\n\n{USAGE}")),
        }
    }
    let is_possible = (1..=9).contains(&members) && seconds > 0.0 && rate > 0.0;
    if !is_possible {
        return Err("--members is 1 to 9, --duration and --rate are more than 0".to_owned());
    }
    chosen.retain(|fault| !without.contains(fault));
    // Drawn always, so that a flag changes nothing else.
    let mut rng = Rng::new(seed).fork(0);
    let timing_ms = rng.pick(&[(100, 1_000), (50, 500), (30, 300)]);
    let drawn = rng.pick(&[50, 100, 1_000]);
    let pid = std::process::id();
    let dir = dir.unwrap_or_else(|| env::temp_dir().join(format!("kvorum-chaos-{seed}-{pid}")));
    let settings = Settings {
        server: server.ok_or("--server is needed: the program to break")?,
        members,
        dir,
        timing_ms,
        snapshot_count: snapshot_count.unwrap_or(drawn),
        has_disks: false,
        flags,
    };
    let duration = Duration::from_secs_f64(seconds);
    let faults = chosen;
    let plan = Plan { settings, duration, seed, faults, profile, rate, compacts };
    Ok(Options { plan, report, keep })
}
