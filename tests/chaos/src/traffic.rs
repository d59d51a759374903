//! What clients do: as etcd's own robustness tests do it, as Kubernetes does it, leases, and
//! a compaction every tenth of a second.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::client::Session;
use crate::history::{Action, Answer, Compare, Kv, Outcome, Request, Target, prefix_end};
use crate::observe::{Stop, stopped};
use crate::rng::Rng;

/// Keys of the etcd profile; few, so that clients meet.
const KEYS: usize = 10;
/// Objects of the Kubernetes profile.
const OBJECTS: usize = 30;
/// How many times to live a lease may be kept alive for.
const RENEWALS_MAX: i64 = 6;
/// How many revisions before the newest are spared by compaction, at most.
const SPARED_MAX: i64 = 200;
/// How often a compaction is asked for.
const COMPACTION: Duration = Duration::from_millis(100);

/// Where keys of leases are.
pub const LEASED: &str = "lease/";
const PLAIN: &str = "key/";
const RANGED: &str = "range/";
const PODS: &str = "/registry/pods/";

/// What clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Everything the KV service has, on few keys.
    Etcd,
    /// Lists, and creates, updates and deletes guarded by revisions.
    Kubernetes,
    /// Half of the clients each.
    Mixed,
}

impl Profile {
    /// By its name.
    pub fn parse(name: &str) -> Option<Profile> {
        match name {
            "etcd" => Some(Profile::Etcd),
            "kubernetes" => Some(Profile::Kubernetes),
            "mixed" => Some(Profile::Mixed),
            _ => None,
        }
    }

    /// What the client with this number does.
    fn is_kubernetes(self, client: usize) -> bool {
        match self {
            Profile::Etcd => false,
            Profile::Kubernetes => true,
            Profile::Mixed => client % 2 == 1,
        }
    }
}

/// The prefixes that are worth watching.
pub fn prefixes() -> Vec<String> {
    [PLAIN, RANGED, LEASED, PODS, "key/1", "l", "\u{1}"].map(str::to_owned).to_vec()
}

fn txn(compares: Vec<Compare>, then: Vec<Action>, otherwise: Vec<Action>) -> Request {
    Request::Txn { compares, then, otherwise, serializable: false }
}

fn one(action: Action) -> Request {
    txn(Vec::new(), vec![action], Vec::new())
}

fn get(key: String) -> Action {
    Action::Range { key, end: None, revision: 0, limit: 0 }
}

fn list(prefix: &str, revision: i64, limit: i64) -> Action {
    Action::Range { key: prefix.to_owned(), end: Some(prefix_end(prefix)), revision, limit }
}

/// A value that nobody else writes.
fn value(session: &Session) -> String {
    format!("v{}", session.recorder.unique())
}

fn put(session: &Session, key: String, lease: i64, prev: bool) -> Action {
    Action::Put { key, value: value(session), lease, prev }
}

/// Sends operations, so many a second, until it is told to stop.
pub async fn client(
    mut session: Session,
    number: usize,
    profile: Profile,
    per_second: f64,
    mut rng: Rng,
    mut stop: Stop,
) {
    let mut pods = Pods::default();
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !*stop.borrow() {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopped(&mut stop) => return,
        }
        if profile.is_kubernetes(number) {
            pods.step(&mut session, &mut rng).await;
        } else {
            plain(&mut session, &mut rng).await;
        }
    }
}

/// One operation of the etcd profile.
async fn plain(session: &mut Session, rng: &mut Rng) {
    let key = format!("{PLAIN}{}", rng.below(KEYS));
    let other = format!("{PLAIN}{}", rng.below(KEYS));
    let newest = session.recorder.newest();
    match rng.weighted(&[20, 8, 6, 6, 3, 25, 6, 6, 6, 5, 4, 3]) {
        0 => drop(session.run("get", one(get(key))).await),
        1 => {
            let (compares, otherwise) = (Vec::new(), Vec::new());
            let then = vec![if rng.chance(50) { get(key) } else { list(PLAIN, 0, 0) }];
            let request = Request::Txn { compares, then, otherwise, serializable: true };
            session.run("get-serializable", request).await;
        }
        2 => drop(session.run("list", one(list(PLAIN, 0, 0))).await),
        3 => {
            let revision = (newest - rng.between(0, 50)).max(1);
            session.run("list-at-revision", one(list(PLAIN, revision, rng.between(0, 5)))).await;
        }
        4 => {
            let then = vec![get(key), list(RANGED, 0, 3), get(other)];
            session.run("txn-read", txn(Vec::new(), then, Vec::new())).await;
        }
        5 => {
            let action = put(session, key, 0, rng.chance(50));
            session.run("put", one(action)).await;
        }
        6 => {
            let prev = rng.chance(50);
            session.run("delete", one(Action::Delete { key, end: None, prev })).await;
        }
        7 if key != other => {
            let fourth = format!("{RANGED}{}", rng.below(KEYS));
            let first = put(session, key.clone(), 0, true);
            let second = put(session, fourth, 0, false);
            let delete = Action::Delete { key: other, end: None, prev: true };
            let then = vec![first, get(key), second, delete, list(PLAIN, 0, 0)];
            session.run("txn-write", txn(Vec::new(), then, Vec::new())).await;
        }
        8 => {
            // What is known of the key may be old by now: then the compare fails.
            let Outcome::Done { answers, .. } = session.run("get", one(get(key.clone()))).await
            else {
                return;
            };
            let current = first_kv(&answers);
            let target = match &current {
                Some(kv) if rng.chance(50) => Target::Value(kv.value.clone()),
                Some(kv) if rng.chance(50) => Target::Version(kv.version),
                kv => Target::ModRevision(kv.as_ref().map_or(0, |kv| kv.mod_revision)),
            };
            let compares = vec![Compare { key: key.clone(), target }];
            let then = vec![put(session, key.clone(), 0, true)];
            session.run("compare-and-swap", txn(compares, then, vec![get(key)])).await;
        }
        9 => {
            let action = put(session, format!("{RANGED}{}", rng.below(KEYS)), 0, false);
            session.run("put", one(action)).await;
        }
        10 => {
            // A write that changes nothing is no revision.
            let key = "absent".to_owned();
            session.run("delete-absent", one(Action::Delete { key, end: None, prev: false })).await;
        }
        _ => {
            let (key, end) = (RANGED.to_owned(), Some(prefix_end(RANGED)));
            session.run("delete-range", one(Action::Delete { key, end, prev: true })).await;
        }
    }
}

fn first_kv(answers: &[Answer]) -> Option<Kv> {
    match answers.first()? {
        Answer::Range { kvs, .. } => kvs.first().cloned(),
        _ => None,
    }
}

/// What a Kubernetes-like client believes to be there.
#[derive(Default)]
struct Pods {
    known: BTreeMap<String, i64>,
}

impl Pods {
    async fn step(&mut self, session: &mut Session, rng: &mut Rng) {
        let key = format!("{PODS}ns{}/pod-{}", rng.below(3), rng.below(OBJECTS));
        let known = self.known.get(&key).copied().unwrap_or(0);
        let guard = Compare { key: key.clone(), target: Target::ModRevision(known) };
        let (kind, then) = match (known, rng.weighted(&[10, 60, 20, 10])) {
            (_, 0) => return self.list(session).await,
            (_, 3) => {
                session.run("get", one(get(key))).await;
                return;
            }
            (0, _) => ("create", put(session, key.clone(), 0, false)),
            (_, 1) => ("update", put(session, key.clone(), 0, false)),
            _ => ("delete-guarded", Action::Delete { key: key.clone(), end: None, prev: true }),
        };
        let request = txn(vec![guard], vec![then], vec![get(key.clone())]);
        let Outcome::Done { revision, succeeded, answers, .. } = session.run(kind, request).await
        else {
            return;
        };
        let now = match (succeeded, kind) {
            (true, "delete-guarded") => None,
            (true, _) => Some(revision),
            (false, _) => first_kv(&answers).map(|kv| kv.mod_revision),
        };
        match now {
            Some(revision) => self.known.insert(key, revision),
            None => self.known.remove(&key),
        };
    }

    /// Lists everything by pages of one revision.
    async fn list(&mut self, session: &mut Session) {
        const PAGE: i64 = 20;
        let (mut from, mut at) = (PODS.to_owned(), 0);
        let mut found = BTreeMap::new();
        loop {
            let end = Some(prefix_end(PODS));
            let page = Action::Range { key: from, end, revision: at, limit: PAGE };
            let Outcome::Done { revision, answers, .. } = session.run("list-page", one(page)).await
            else {
                return;
            };
            at = if at == 0 { revision } else { at };
            let Some(Answer::Range { kvs, count }) = answers.first() else { return };
            found.extend(kvs.iter().map(|kv| (kv.key.clone(), kv.mod_revision)));
            match kvs.last() {
                Some(last) if *count > kvs.len() as i64 => from = format!("{}\0", last.key),
                _ => break,
            }
        }
        self.known = found;
    }
}

/// Reads, and now and then writes, and waits for the answer however long a fault lasts: what
/// a member had been asked before it was stopped, it answers when it goes on.
pub async fn patient(mut session: Session, mut rng: Rng, mut stop: Stop) {
    while !*stop.borrow() {
        let key = format!("{PLAIN}{}", rng.below(KEYS));
        let (kind, action) = match rng.chance(20) {
            true => ("put-patient", put(&session, key, 0, false)),
            false => ("get-patient", get(key)),
        };
        session.run(kind, one(action)).await;
        let pause = Duration::from_millis(rng.between(50, 350) as u64);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopped(&mut stop) => return,
        }
    }
}

/// Makes leases, hangs keys on them, keeps them alive for a while, and ends them or lets
/// them end.
pub async fn leases(mut session: Session, mut rng: Rng, stop: Stop) {
    const PAUSE: Duration = Duration::from_millis(300);
    while !*stop.borrow() {
        tokio::time::sleep(PAUSE).await;
        let id = session.recorder.unique() as i64;
        let request = Request::Grant { id, ttl_secs: rng.between(1, 4) };
        let Outcome::Done { ttl_secs, .. } = session.run("lease-grant", request).await else {
            continue;
        };
        for nth in 0..rng.between(1, 3) {
            let action = put(&session, format!("{LEASED}{id}/{nth}"), id, false);
            session.run("put-leased", one(action)).await;
        }
        let rest = Duration::from_secs(ttl_secs.unsigned_abs()) / 3;
        for _ in 0..rng.between(0, RENEWALS_MAX) {
            if *stop.borrow() {
                return;
            }
            tokio::time::sleep(rest).await;
            session.keep_alive(id).await;
        }
        if rng.chance(40) {
            session.run("lease-revoke", Request::Revoke { id }).await;
        }
    }
}

/// Compacts again and again, close to the newest revision, but never what no watch has
/// written down: else there would be nothing to check against.
pub async fn compactor(mut sessions: Vec<Session>, mut rng: Rng, stop: Stop) {
    let mut done = 0;
    while !*stop.borrow() {
        tokio::time::sleep(COMPACTION).await;
        let session = rng.below(sessions.len());
        let Some(session) = sessions.get_mut(session) else { return };
        let spared = if rng.chance(20) { 0 } else { rng.between(0, SPARED_MAX) };
        let revision = session.recorder.covered() - spared;
        if revision > done {
            let outcome = session.run("compact", Request::Compact { revision }).await;
            if !matches!(outcome, Outcome::Refused(_)) {
                done = revision;
            }
        }
    }
}
