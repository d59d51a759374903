//! etcd's own client against kvorum and against etcd: the same commands, the same
//! output, error text and exit code.
//!
//! Two ages of etcdctl drive the same table of [`STEPS`]: the judge's (3.7) and, if the
//! machine has it, the 3.4 that distributions package. Steps are carried out in order,
//! each on both servers, and compared after what is a server's own (ids, addresses,
//! sizes, times) is masked.
//!
//! `KVORUM_SLOW_TESTS=1` adds `check perf`, which takes a minute per server.

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use common::accepted::{self, Accepted};
use common::mask::Identity;
use common::server::{self, TestServer};
use common::{http, judge};

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A command line and what is to be seen of it.
struct Step {
    /// Arguments, separated by spaces (two make an empty one). `{lease}` is the lease last granted.
    line: &'static str,
    /// What is written to it, and how many lines it has printed by then in all
    /// before more is written; after the last it is stopped. Empty: it runs to its
    /// end without input.
    talk: &'static [(&'static str, usize)],
    /// Whether only etcdctl 3.6 and later knows it.
    new: bool,
    /// How much is compared.
    compared: Compared,
    /// Why it is left out.
    except: Option<&'static Accepted>,
}

#[derive(Clone, Copy, PartialEq)]
enum Compared {
    /// Everything, masked.
    All,
    /// That it succeeds or fails, and in how many fields: for lists of sizes.
    Fields,
}

const fn run(line: &'static str) -> Step {
    Step { line, talk: &[], new: false, compared: Compared::All, except: None }
}

const fn new(line: &'static str) -> Step {
    Step { line, talk: &[], new: true, compared: Compared::All, except: None }
}

const fn fields(line: &'static str) -> Step {
    Step { line, talk: &[], new: false, compared: Compared::Fields, except: None }
}

const fn talk(line: &'static str, talk: &'static [(&'static str, usize)]) -> Step {
    Step { line, talk, new: false, compared: Compared::All, except: None }
}

const fn except(line: &'static str, why: &'static Accepted) -> Step {
    Step { except: Some(why), ..run(line) }
}

const STEPS: &[Step] = &[
    // Put and get, in every format.
    run("get nothing"),
    run("put a 1"),
    run("put a 2 --prev-kv"),
    run("put a 3 --prev-kv -w json"),
    run("put a 4 --prev-kv -w fields"),
    run("put b value with spaces"),
    talk("put b", &[("from standard input", 0)]),
    run("put dir/1 x"),
    run("put dir/2 y"),
    run("put dir/3 y"),
    run("put a --ignore-value"),
    run("put a 5 --ignore-value"),
    run("put missing --ignore-value"),
    run("put missing 1 --ignore-lease"),
    run("put a 1 --lease=4d2"),
    run("put a 1 --lease=nothex"),
    run("get a"),
    run("get a -w json"),
    run("get a -w fields"),
    run("get a --hex"),
    run("get a --print-value-only"),
    run("get a --keys-only"),
    run("get a --rev=3"),
    run("get a --rev=999"),
    run("get a --rev=-1"),
    run("get a c"),
    run("get c a"),
    run("get a --from-key"),
    run("get a --from-key --limit=2 -w json"),
    run("get  --prefix"),
    run("get  --prefix -w json"),
    run("get dir/ --prefix --count-only"),
    run("get dir/ --prefix --count-only -w fields"),
    run("get dir/ --prefix --count-only -w json"),
    run("get dir/ --prefix --keys-only"),
    run("get dir/ --prefix --limit=1"),
    run("get dir/ --prefix --order=DESCEND"),
    run("get dir/ --prefix --order=ASCEND --sort-by=VALUE"),
    run("get dir/ --prefix --order=DESCEND --sort-by=MODIFY"),
    run("get dir/ --prefix --sort-by=CREATE --limit=2"),
    run("get dir/ --prefix --sort-by=VERSION --order=DESCEND -w json"),
    run("get dir/ --prefix --sort-by=NOPE"),
    run("get a --consistency=s"),
    run("get a --consistency=x"),
    new("get  --prefix --min-mod-rev=5 --max-mod-rev=8"),
    new("get  --prefix --min-create-rev=5 -w json"),
    new("get  --prefix --stream"),
    new("get  --prefix --stream -w json --limit=2"),
    // Delete.
    run("del nothing"),
    run("del a --prev-kv"),
    run("del a -w json"),
    run("put a 6"),
    run("del a -w fields --prev-kv"),
    run("del dir/1 dir/3"),
    run("del dir/ --prefix --prev-kv -w json"),
    run("put a 7"),
    run("put aa 8"),
    run("del aa --from-key"),
    run("put empty "),
    // Transactions.
    talk("txn", &[("value(\"a\") = \"7\"\n\nput b 1\nget a\n\nget b\n\n", 0)]),
    talk("txn -w json", &[("value(\"a\") = \"x\"\n\nput b 1\n\nget b\nget nothing\n\n", 0)]),
    talk(
        "txn",
        &[("mod(\"a\") > \"0\"\nver(\"a\") < \"9\"\ncreate(\"zz\") = \"0\"\n\ndel b\n\n\n", 0)],
    ),
    // Not a lease in a comparison: etcdctl crashes on it.
    talk("txn -w fields", &[("ver(\"a\") = \"1\"\n\nput c 1\ndel --prefix dir\n\n\n", 0)]),
    talk("txn", &[("\nput a 1\nput a 2\n\n\n", 0)]),
    talk("txn", &[("nonsense\n\n\n\n", 0)]),
    talk("txn", &[("\nget a --rev=999\n\n\n", 0)]),
    // The hash, before lease ids that the server picks are part of it.
    run("endpoint hashkv"),
    run("endpoint hashkv -w json"),
    run("endpoint hashkv --rev=15 -w json"),
    run("endpoint hashkv --rev=999"),
    // Leases.
    run("lease list"),
    run("lease grant 1000"),
    run("lease timetolive {lease}"),
    run("put leased 1 --lease={lease}"),
    run("put leased/2 1 --lease={lease}"),
    run("put leased/2 2 --ignore-lease"),
    run("get leased -w json"),
    run("lease timetolive {lease} --keys"),
    run("lease timetolive {lease} --keys -w json"),
    run("lease timetolive {lease} -w fields"),
    run("lease list"),
    run("lease list -w json"),
    run("lease keep-alive {lease} --once"),
    run("lease keep-alive {lease} --once -w json"),
    talk("lease keep-alive {lease}", &[("", 1)]),
    run("lease revoke {lease}"),
    run("lease revoke {lease}"),
    run("lease timetolive {lease}"),
    run("lease timetolive {lease} -w json"),
    run("lease keep-alive {lease} --once"),
    run("get leased --prefix"),
    run("lease grant 99999999999"),
    run("lease grant -1"),
    run("lease grant nonsense"),
    run("lease grant 1000 -w json"),
    // Watches.
    talk("watch a --rev=1", &[("", 12)]),
    talk("watch a --rev=1 --prev-kv -w json", &[("", 1)]),
    talk("watch --prefix dir/ --rev=2", &[("", 15)]),
    talk("watch a b --rev=1 -w fields", &[("", 10)]),
    run("put only 1"),
    talk("watch -i", &[("watch only --rev=1\n", 3), ("progress\n", 4)]),
    talk("watch -i", &[("watch dir/ --prefix --rev=1\n", 15), ("watch a --rev=2\n", 18)]),
    run("watch"),
    // Locks and elections.
    run("lock mutex -- echo inside"),
    run("lock mutex --ttl=30 -- sh -c \"exit_3\""),
    talk("lock mutex", &[("", 1)]),
    talk("elect election candidate", &[("", 2)]),
    // Compaction.
    run("compaction 10"),
    run("compact 10"),
    run("compaction 12 --physical"),
    run("compaction 999"),
    run("compaction nonsense"),
    run("get a --rev=5"),
    run("watch a --rev=5"),
    // The cluster.
    run("member list"),
    run("member list -w json"),
    run("member list -w table"),
    run("member list -w fields"),
    run("member list --hex -w json"),
    run("member remove 4d2"),
    run("member remove nothex"),
    run("member update 4d2 --peer-urls=http://127.0.0.1:1"),
    run("member promote 4d2"),
    run("member add x --peer-urls=nonsense"),
    run("move-leader 4d2"),
    run("move-leader nothex"),
    run("endpoint health"),
    run("endpoint health -w json"),
    run("endpoint health --cluster"),
    fields("endpoint status"),
    run("endpoint status -w json"),
    new("endpoint status --cluster -w json"),
    fields("endpoint status --cluster"),
    run("endpoint health --cluster -w json"),
    fields("endpoint hashkv --cluster"),
    run("alarm list"),
    run("alarm disarm"),
    run("alarm list -w json"),
    run("defrag"),
    run("defrag --cluster"),
    new("auth status"),
    new("auth status -w json"),
    except("role list", &accepted::NO_AUTHENTICATION),
    except("user list", &accepted::NO_AUTHENTICATION),
];

/// A command's traces.
#[derive(Debug, PartialEq)]
struct Output {
    code: Option<i32>,
    lines: Vec<String>,
    errors: Vec<String>,
}

/// A server and what is its own.
struct Side {
    server: TestServer,
    identity: Identity,
    /// Texts and the names they get, longest first.
    own: Vec<(String, &'static str)>,
    lease: String,
}

impl Side {
    fn start(program: &Path) -> Side {
        let server =
            TestServer::start(program, &["--heartbeat-interval=10", "--election-timeout=100"]);
        let status = http::request(
            &server.client_address(),
            "POST",
            "/v3/maintenance/status",
            &[("content-type", "application/json")],
            b"{}",
        );
        let status: Value = serde_json::from_slice(&status.expect("the gateway answers").body)
            .expect("the gateway answers in JSON");
        let mut own = vec![
            (server.client_url(), "<client url>"),
            (server.peer_url(), "<peer url>"),
            (server.client_address(), "<address>"),
        ];
        let mut identity = Identity::new(&status, &server.client_url(), &server.peer_url());
        identity.name(server.client_address(), "<address>");
        for (field, name) in [("cluster_id", "<cluster>"), ("member_id", "<member>")] {
            let id = status.pointer(&format!("/header/{field}")).and_then(Value::as_str);
            let id: u64 = id.and_then(|id| id.parse().ok()).expect("the header has its ids");
            own.push((id.to_string(), name));
            own.push((format!("{id:x}"), name));
            // As a signed number, which is how JSON with --hex and old clients show it.
            own.push(((id as i64).to_string(), name));
        }
        own.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Side { server, identity, own, lease: "0".to_owned() }
    }

    /// Carries out `step` with `etcdctl`.
    fn execute(&mut self, etcdctl: &Path, step: &Step) -> Output {
        let line = step.line.replace("{lease}", &self.lease);
        let mut child = Command::new(etcdctl)
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.server.client_address()))
            .args(line.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcdctl starts");
        let mut input = child.stdin.take();
        let output = child.stdout.take().expect("standard output is piped");
        let mut errors = child.stderr.take().expect("standard error is piped");
        let (sender, printed) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let line = String::from_utf8_lossy(&line.unwrap_or_default()).into_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What was read before it failed is still worth comparing.
            let _read = errors.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let deadline = Instant::now() + PATIENCE;
        let mut lines = Vec::new();
        let mut collect = |enough: usize| {
            while lines.len() < enough {
                let left = deadline.saturating_duration_since(Instant::now());
                match printed.recv_timeout(left) {
                    Ok(line) => lines.push(line),
                    Err(_) => return false,
                }
            }
            true
        };
        let mut stop = false;
        for (text, enough) in step.talk {
            if let Some(input) = &mut input {
                // It may have ended already, with an error that is compared.
                let _written = input.write_all(text.as_bytes()).and_then(|()| input.flush());
            }
            stop = *enough > 0;
            collect(*enough);
        }
        if stop {
            // It would run on: what it has printed is what is compared.
            child.kill().expect("etcdctl can be stopped");
        } else {
            drop(input.take());
            collect(usize::MAX);
            if Instant::now() >= deadline {
                child.kill().expect("etcdctl can be stopped");
            }
        }
        let status = child.wait().expect("etcdctl can be waited for");
        if let Some(granted) = lines.first().and_then(|line| line.strip_prefix("lease "))
            && let Some(id) = granted.strip_suffix(" granted with TTL(1000s)")
        {
            self.lease = id.to_owned();
        }
        if let Some((_, enough)) = step.talk.last()
            && stop
        {
            lines.truncate(*enough);
        }
        let errors = errors.join().expect("standard error was read");
        Output {
            code: if stop { None } else { status.code() },
            lines: lines.iter().filter_map(|line| self.mask(line)).collect(),
            errors: errors
                .lines()
                // The client's own log.
                .filter(|line| !line.starts_with('{'))
                .filter_map(|line| self.mask(line))
                .collect(),
        }
    }

    /// `line` without what is the server's own; `None` for the borders of tables.
    fn mask(&self, line: &str) -> Option<String> {
        if let Ok(mut value) = serde_json::from_str::<Value>(line)
            && (value.is_object() || value.is_array())
        {
            mask_json(&mut value);
            self.identity.mask(&mut value);
            return Some(mask_ids(&value.to_string()));
        }
        let border = |symbol: char| symbol == '+' || symbol == '-' || ('─'..='╿').contains(&symbol);
        if !line.is_empty() && line.chars().all(border) {
            return None;
        }
        let mut line = line.to_owned();
        for (text, name) in &self.own {
            line = line.replace(text, name);
        }
        if let Some((before, _)) = line.split_once("took") {
            line = format!("{before}took <time>");
        }
        if let Some((before, after)) = line.split_once("remaining(")
            && let Some((_, after)) = after.split_once(')')
        {
            line = format!("{before}remaining(<time>){after}");
        }
        if let Some((before, keys)) = line.split_once("attached keys([") {
            let mut keys: Vec<&str> = keys.trim_end_matches("])").split(' ').collect();
            keys.sort_unstable();
            line = format!("{before}attached keys({keys:?})");
        }
        // `-w fields` shows a field per line.
        if let Some((name, value)) = line.split_once(" : ")
            && ["\"RaftTerm\"", "\"TTL\""].contains(&name)
            && value != "0"
            && value != "-1"
        {
            line = format!("{name} : <not zero>");
        }
        // Cells of tables are as wide as what is in them.
        let cells: Vec<&str> = line.split(['|', '│']).map(str::trim).collect();
        let line = if cells.len() > 2 { cells.join("|") } else { line };
        Some(mask_ids(&line))
    }
}

fn mask_json(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("storageVersion");
            for (name, field) in fields.iter_mut() {
                if name == "took" {
                    *field = "<time>".into();
                } else if name == "ttl" && field != -1 {
                    *field = "<remaining>".into();
                } else if name == "keys"
                    && let Value::Array(keys) = field
                {
                    // A lease's keys have no order.
                    keys.sort_by_key(Value::to_string);
                } else {
                    mask_json(field);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(mask_json),
        _ => {}
    }
}

/// `line` with numbers as long as an id (of a lease, mostly) replaced.
fn mask_ids(line: &str) -> String {
    const HEX_DIGITS: usize = 13;
    let mut masked = String::new();
    let mut word = String::new();
    for symbol in line.chars().chain([' ']) {
        if symbol.is_ascii_alphanumeric() {
            word.push(symbol);
            continue;
        }
        let id = word.len() >= HEX_DIGITS && word.chars().all(|digit| digit.is_ascii_hexdigit());
        masked.push_str(if id { "<id>" } else { &word });
        word.clear();
        masked.push(symbol);
    }
    masked.pop();
    masked
}

fn compare(etcdctl: &Path, etcd: &Path, old: bool, steps: &[Step]) {
    let mut sides = [Side::start(etcd), Side::start(&server::kvorum())];
    let mut differences = 0;
    for step in steps {
        if (old && step.new) || step.except.is_some() {
            continue;
        }
        let [left, right] = sides.each_mut().map(|side| side.execute(etcdctl, step));
        let equal = match step.compared {
            Compared::All => left == right,
            Compared::Fields => {
                let shape = |output: &Output| -> Vec<usize> {
                    output.lines.iter().map(|line| line.split(',').count()).collect()
                };
                left.code == right.code && shape(&left) == shape(&right)
            }
        };
        if std::env::var_os("KVORUM_DIFF_SHOW").is_some() {
            eprintln!("etcdctl {}\n  {left:?}", step.line);
        }
        if !equal {
            differences += 1;
            eprintln!("etcdctl {}\n  etcd:   {left:?}\n  kvorum: {right:?}", step.line);
        }
    }
    assert_eq!(differences, 0, "of {} commands", steps.len());
}

#[test]
fn etcdctl_sees_no_difference() {
    let Some(judges) = judge::find("etcdctl") else { return };
    compare(&judges.etcdctl, &judges.etcd, false, STEPS);
}

#[test]
fn old_etcdctl_sees_no_difference() {
    let Some(judges) = judge::find("etcdctl 3.4") else { return };
    let Some(etcdctl) = judge::old_etcdctl() else {
        eprintln!("skipped etcdctl 3.4: this machine has none in /usr/bin");
        return;
    };
    compare(&etcdctl, &judges.etcd, true, STEPS);
}

#[test]
fn etcdctl_check_perf_passes() {
    if std::env::var_os("KVORUM_SLOW_TESTS").is_none() {
        eprintln!("skipped etcdctl check perf: it takes a minute; set KVORUM_SLOW_TESTS=1");
        return;
    }
    let Some(judges) = judge::find("etcdctl check perf") else { return };
    let server = TestServer::start(&server::kvorum(), &[]);
    let output = Command::new(&judges.etcdctl)
        .args(["check", "perf", "--load=s", "--endpoints", &server.client_address()])
        .output()
        .expect("etcdctl starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("FAIL"), "check perf: {text}");
}
