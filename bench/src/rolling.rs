//! Which requests fail while the members of a cluster are restarted in turns.
//!
//! The load is etcd's official Go client with its defaults and all three endpoints, and a
//! timeout of five seconds for every request (`tests/judge/client`). Every member
//! gets SIGTERM, is started again when it has ended, and the next one's turn comes when all
//! three serve and `--pause-ms` later: a gRPC client comes back to a member that was down
//! only after a second, so without the pause the member that restarts fastest would
//! leave its clients with one connection, or none. The member the round begins with changes.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::args::Args;
use crate::cluster::{Cluster, MEMBERS, Options, PATIENCE};
use crate::report::{self, number};

/// What the client's requests came to.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    requests: u64,
    /// By operation and error.
    failed: BTreeMap<String, u64>,
}

impl Tally {
    fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

/// `kvorum-bench rolling`.
pub async fn run(mut args: Args) -> Result<(), Box<dyn Error>> {
    let options = Options::from(&mut args)?;
    let rounds = args.number("rounds", 3)?.max(1);
    let clients = args.number("clients", 20)?.max(1);
    let pause = Duration::from_millis(args.number("pause-ms", 2_000)? as u64);
    let program = args.text("go-client", "target/judge/client");
    args.finish()?;
    let mut tallies = [const { None }; 2];
    for (tally, server) in tallies.iter_mut().zip(&options.programs) {
        eprintln!("{rounds} rounds of {}", server.display());
        let measured = async {
            let mut cluster = Cluster::start(server, &options.directory, &[]).await?;
            let client = Client::start(Path::new(&program), &cluster.endpoints(), clients).await?;
            for round in 0..rounds {
                for turn in 0..MEMBERS {
                    let member = (round + turn) % MEMBERS;
                    cluster.stop(member).await?;
                    cluster.restart(member)?;
                    cluster.settled().await?;
                    tokio::time::sleep(pause).await;
                }
            }
            client.finish().await
        };
        let measured: Result<Tally, Box<dyn Error>> = measured.await;
        *tally = Some(measured.map_err(|error| format!("{}: {error}", server.display()))?);
    }
    let [Some(etcd), Some(kvorum)] = tallies else { return Err("nothing was measured".into()) };
    println!(
        "Requests of etcd's Go client that failed while three members were restarted in turns, \
         {rounds} times each: {}; {clients} goroutines.\n",
        report::contestants(&options.programs)
    );
    println!("| | etcd | kvorum |\n|---|---|---|");
    println!(
        "| requests | {} | {} |",
        number(etcd.requests as f64),
        number(kvorum.requests as f64)
    );
    println!("| failed | {} | {} |", etcd.failures(), kvorum.failures());
    let mut kinds: Vec<&String> = etcd.failed.keys().chain(kvorum.failed.keys()).collect();
    kinds.sort();
    kinds.dedup();
    for kind in kinds {
        let [etcd, kvorum] =
            [&etcd, &kvorum].map(|tally| tally.failed.get(kind).copied().unwrap_or(0));
        println!("| {} | {etcd} | {kvorum} |", kind.replace('|', "\\|"));
    }
    let mut broken = Vec::new();
    if kvorum.failures() > etcd.failures() {
        broken.push(format!("{} failures, etcd {}", kvorum.failures(), etcd.failures()));
    }
    report::verdict(options.assert, &broken)
}

/// The Go program, which works until its standard input ends.
struct Client {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Client {
    /// Starts it and waits until its requests succeed.
    async fn start(
        program: &Path,
        endpoints: &[String],
        clients: usize,
    ) -> Result<Client, Box<dyn Error>> {
        let mut child = Command::new(program)
            .args(["-endpoints", &endpoints.join(","), "-goroutines", &clients.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // The Go client logs every connection that it loses.
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                format!("{} (tests/judge/build.sh builds it): {error}", program.display())
            })?;
        let output = child.stdout.take().ok_or("the client has no output")?;
        let mut client = Client { child, output: BufReader::new(output) };
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, client.output.read_line(&mut line))
            .await
            .map_err(|_| "the Go client has no success")??;
        if line != "ready\n" {
            return Err(format!("the Go client says {line:?}").into());
        }
        Ok(client)
    }

    /// Lets it end and say what it did.
    async fn finish(mut self) -> Result<Tally, Box<dyn Error>> {
        drop(self.child.stdin.take());
        let mut text = String::new();
        tokio::time::timeout(PATIENCE, self.output.read_to_string(&mut text))
            .await
            .map_err(|_| "the Go client does not end")??;
        parse(&text)
    }
}

/// What the Go client prints at its end.
fn parse(text: &str) -> Result<Tally, Box<dyn Error>> {
    let mut tally = Tally::default();
    for line in text.lines() {
        match line.splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["requests", count] => tally.requests = count.parse()?,
            ["failed", count, kind] => {
                tally.failed.insert(kind.to_owned(), count.parse()?);
            }
            _ => return Err(format!("the Go client says {line:?}").into()),
        }
    }
    if tally.requests == 0 { Err("the Go client did nothing".into()) } else { Ok(tally) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_go_clients_words_are_understood() {
        let tally = parse("requests 90\nfailed 2 put: a b\nfailed 1 get: c\n").expect("a tally");
        assert_eq!((tally.requests, tally.failures()), (90, 3));
        assert_eq!(tally.failed["put: a b"], 2);
        assert!(parse("").is_err(), "it did not live to tell");
        assert!(parse("panic: x").is_err());
    }
}
