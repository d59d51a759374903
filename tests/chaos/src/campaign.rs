//! A campaign: start members, send traffic, break things one after another, put everything
//! right, wait until all is quiet, check.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch as signal;
use tokio::task::JoinSet;

use crate::check::{Guarantee, check};
use crate::client::{Recorder, Session, TIMEOUT, kv_of};
use crate::cluster::{Cluster, Settings};
use crate::faults::{Breaker, Fault, connect};
use crate::history::{Action, Final, History, Outcome, Request};
use crate::observe;
use crate::report::Report;
use crate::rng::Rng;
use crate::traffic::{self, LEASED, Profile};

/// How long a cluster has to work again once nothing is broken.
const RECOVERY: Duration = Duration::from_secs(60);
/// Between two looks at whether it does.
const POLL: Duration = Duration::from_millis(100);
/// Clients of each member alone, and of all members.
const CLIENTS_OF_MEMBER: usize = 2;
const CLIENTS_OF_ALL: usize = 2;
/// Patient clients of each member.
const PATIENT_CLIENTS: usize = 4;
/// Random watches at a time on each member.
const RANDOM_WATCHES: usize = 2;

/// What a campaign is to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The members.
    pub settings: Settings,
    /// How long things are broken.
    pub duration: Duration,
    /// Decides what is sent and broken.
    pub seed: u64,
    /// What may be broken.
    pub faults: Vec<Fault>,
    /// What is sent.
    pub profile: Profile,
    /// How many operations a second all clients together try to send.
    pub rate: f64,
    /// Whether everything old is compacted all the time.
    pub compacts: bool,
}

/// What a campaign leaves behind.
pub struct Finding {
    /// For people.
    pub report: Report,
    /// For whoever looks into it.
    pub history: History,
}

/// Runs a campaign; fails if it cannot be run, not if it finds something.
pub async fn run(plan: &Plan) -> io::Result<Finding> {
    let rng = Rng::new(plan.seed);
    let mut cluster = Cluster::start(plan.settings.clone()).await?;
    let recorder = Recorder::new();
    let mut problems: Vec<(Guarantee, String)> = Vec::new();
    if let Err(why) = healthy(&cluster).await {
        return Err(io::Error::other(format!("the cluster does not start: {why}")));
    }

    let (stop_traffic, traffic_stops) = signal::channel(false);
    let (stop_watches, watches_stop) = signal::channel(false);
    let (mut clients, mut watchers) = (JoinSet::new(), JoinSet::new());
    let reached = watch_everything(&cluster, &recorder, &mut watchers, &watches_stop).await?;
    send_traffic(plan, &cluster, &recorder, &mut clients, &traffic_stops, &rng).await?;
    for number in 0..cluster.members.len() * RANDOM_WATCHES {
        let session = session(&cluster, &recorder, Some(number % cluster.members.len())).await?;
        let (rng, stop) = (rng.fork(2_000 + number as u64), traffic_stops.clone());
        watchers.spawn(observe::random(session, traffic::prefixes(), rng, stop));
    }

    let began = Instant::now();
    let (faults, complaints) = break_things(plan, &mut cluster, rng.fork(1), &mut problems).await?;
    problems.extend(complaints.into_iter().map(|what| (Guarantee::MembersStayUp, what)));
    let seconds = began.elapsed().as_secs_f64();

    // Everything is whole again. Traffic ends; what it left behind must come to rest.
    let _ = stop_traffic.send(true);
    while clients.join_next().await.is_some() {}
    let finals = match settle(&cluster, &recorder, &reached).await {
        Ok(finals) => finals,
        Err(why) => {
            problems.push((Guarantee::Recovers, why));
            Vec::new()
        }
    };
    let _ = stop_watches.send(true);
    while watchers.join_next().await.is_some() {}
    for member in 0..cluster.members.len() {
        if let Some(status) = cluster.exit_of(member) {
            let name = &cluster.members[member].name;
            problems.push((Guarantee::MembersStayUp, format!("{name} ended by itself: {status}")));
        }
    }

    let mut history = recorder.finish();
    history.finals = finals;
    let mut checks = check(&history);
    checks.check(Guarantee::Recovers, true, String::new);
    checks.check(Guarantee::MembersStayUp, true, String::new);
    for (guarantee, what) in problems {
        checks.check(guarantee, false, || what);
    }
    let mut report = Report::new(&history, checks);
    report.seed = plan.seed;
    report.members = cluster.members.len();
    report.seconds = seconds;
    report.faults = faults;
    for member in 0..cluster.members.len() {
        cluster.end(member, rustix::process::Signal::KILL).await?;
    }
    Ok(Finding { report, history })
}

/// A client of one member, or of all.
async fn session(
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    member: Option<usize>,
) -> io::Result<Session> {
    let endpoints = match member {
        Some(member) => vec![cluster.endpoint(member)],
        None => (0..cluster.members.len()).map(|member| cluster.endpoint(member)).collect(),
    };
    let member = member.map(|member| (member, cluster.lives(member)));
    Session::new(recorder.clone(), &endpoints, member).await.map_err(io::Error::other)
}

/// A watch of all keys on each member; how far each has come.
async fn watch_everything(
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    tasks: &mut JoinSet<()>,
    stop: &observe::Stop,
) -> io::Result<Vec<Arc<AtomicI64>>> {
    let mut reached = Vec::new();
    for member in 0..cluster.members.len() {
        let session = session(cluster, recorder, Some(member)).await?;
        let revision = Arc::new(AtomicI64::new(1));
        tasks.spawn(observe::everything(session, revision.clone(), stop.clone()));
        reached.push(revision);
    }
    Ok(reached)
}

async fn send_traffic(
    plan: &Plan,
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    tasks: &mut JoinSet<()>,
    stop: &observe::Stop,
    rng: &Rng,
) -> io::Result<()> {
    let members = cluster.members.len();
    let of_members =
        (0..members * CLIENTS_OF_MEMBER).map(|number| Some(number / CLIENTS_OF_MEMBER));
    let targets: Vec<Option<usize>> = of_members.chain([None; CLIENTS_OF_ALL]).collect();
    let per_second = plan.rate / targets.len() as f64;
    for (number, target) in targets.into_iter().enumerate() {
        let session = session(cluster, recorder, target).await?;
        let (rng, stop) = (rng.fork(1_000 + number as u64), stop.clone());
        tasks.spawn(traffic::client(session, number, plan.profile, per_second, rng, stop));
    }
    let mut compactors = Vec::new();
    for member in 0..members {
        let session = session(cluster, recorder, Some(member)).await?;
        tasks.spawn(traffic::leases(
            session.clone(),
            rng.fork(3_000 + member as u64),
            stop.clone(),
        ));
        for number in 0..PATIENT_CLIENTS {
            let rng = rng.fork(5_000 + (member * PATIENT_CLIENTS + number) as u64);
            tasks.spawn(traffic::patient(session.patient(), rng, stop.clone()));
        }
        compactors.push(session);
    }
    if plan.compacts {
        tasks.spawn(traffic::compactor(compactors, rng.fork(4_000), stop.clone()));
    }
    Ok(())
}

/// One fault after another; each kind once before any comes again.
async fn break_things(
    plan: &Plan,
    cluster: &mut Cluster,
    rng: Rng,
    problems: &mut Vec<(Guarantee, String)>,
) -> io::Result<(BTreeMap<String, u64>, Vec<String>)> {
    const LONGEST_MS: i64 = 3_000;
    let mut counts = BTreeMap::new();
    let mut breaker = Breaker { cluster, rng, complaints: Vec::new(), longest_ms: LONGEST_MS };
    let began = Instant::now();
    let mut left: Vec<Fault> = Vec::new();
    while began.elapsed() < plan.duration {
        let pause_ms = breaker.rng.between(200, 1_500) as u64;
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        if plan.faults.is_empty() {
            continue;
        }
        if left.is_empty() {
            left.clone_from(&plan.faults);
        }
        let next = breaker.rng.below(left.len());
        let fault = left.swap_remove(next);
        println!("{:>7.1} s  {}", began.elapsed().as_secs_f64(), fault.name());
        breaker.run(fault).await?;
        *counts.entry(fault.name()).or_default() += 1;
        if let Err(why) = healthy(breaker.cluster).await {
            problems.push((Guarantee::Recovers, format!("after {}: {why}", fault.name())));
            break;
        }
    }
    let complaints = std::mem::take(&mut breaker.complaints);
    Ok((counts, complaints))
}

/// Waits until every member answers a linearizable read, and says who does not.
async fn healthy(cluster: &Cluster) -> Result<(), String> {
    let began = Instant::now();
    for member in 0..cluster.members.len() {
        loop {
            let ask = async {
                let mut client = connect(&[cluster.endpoint(member)]).await?;
                client.get("health", None).await.ok()
            };
            if let Ok(Some(_)) = tokio::time::timeout(TIMEOUT, ask).await {
                break;
            }
            if began.elapsed() > RECOVERY {
                let name = &cluster.members[member].name;
                return Err(format!("{name} answers no linearizable read for {RECOVERY:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// Waits until all leases are over and every watch has told everything, then asks every
/// member what it has.
async fn settle(
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    reached: &[Arc<AtomicI64>],
) -> Result<Vec<Final>, String> {
    let began = Instant::now();
    let is_late = |what: &str| match began.elapsed() > RECOVERY {
        true => Err(format!("{what} {RECOVERY:?} after the last fault")),
        false => Ok(()),
    };
    healthy(cluster).await?;
    let mut all = session(cluster, recorder, None).await.map_err(|error| error.to_string())?;
    // What is found here is a part of the history.
    let leased = Action::Range {
        key: LEASED.to_owned(),
        end: Some(crate::history::prefix_end(LEASED)),
        revision: 0,
        limit: 0,
    };
    let request = Request::Txn {
        compares: Vec::new(),
        then: vec![leased],
        otherwise: Vec::new(),
        serializable: false,
    };
    let revision = loop {
        is_late("there are leases left")?;
        if let Outcome::Done { revision, answers, .. } =
            all.run("get-leased", request.clone()).await
            && answers
                .iter()
                .all(|answer| matches!(answer, crate::history::Answer::Range { count: 0, .. }))
        {
            break revision;
        }
        tokio::time::sleep(POLL).await;
    };
    for (member, reached) in reached.iter().enumerate() {
        while reached.load(Ordering::SeqCst) < revision {
            let at = reached.load(Ordering::SeqCst);
            let name = &cluster.members[member].name;
            is_late(&format!("the watch of {name} is at {at}, not at {revision},"))?;
            tokio::time::sleep(POLL).await;
        }
    }
    loop {
        let mut finals = Vec::new();
        for member in 0..cluster.members.len() {
            if let Some(last) = final_of(cluster, member, revision).await {
                finals.push(last);
            }
        }
        // A compaction may not have come to all of them yet.
        let are_equal = finals.windows(2).all(|pair| pair[0].hash.1 == pair[1].hash.1);
        if finals.len() == cluster.members.len() && (are_equal || is_late("").is_err()) {
            return Ok(finals);
        }
        is_late("members do not tell what they have")?;
        tokio::time::sleep(POLL).await;
    }
}

/// What a member has.
async fn final_of(cluster: &Cluster, member: usize, revision: i64) -> Option<Final> {
    let mut client = connect(&[cluster.endpoint(member)]).await?;
    let options = etcd_client::GetOptions::new().with_all_keys();
    let response = client.get("", Some(options)).await.ok()?;
    let hash = client.hash_kv(revision).await.ok()?;
    Some(Final {
        member,
        revision: response.header()?.revision(),
        hash: (hash.hash(), hash.compact_version()),
        kvs: response.kvs().iter().map(kv_of).collect(),
    })
}
