//! A client that writes down what it does: someone else's crate underneath, operations of
//! [`crate::history`] on top.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, CompactionOptions, CompareOp, ConnectOptions, DeleteOptions, Error, GetOptions,
    KeyValue, LeaseGrantOptions, PutOptions, TxnOp, TxnOpResponse,
};

use crate::history::{
    Action, Answer, Compare, History, Kv, Operation, Outcome, Request, Target, Watch,
};

/// How long an operation may take until nobody knows what became of it.
pub const TIMEOUT: Duration = Duration::from_secs(1);
/// The same for a patient client, who outlasts a fault.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// How far the history is known without a hole.
#[derive(Debug, Default)]
struct Coverage {
    until: i64,
    ahead: std::collections::BTreeSet<i64>,
}

/// Where everything is written down.
pub struct Recorder {
    began: Instant,
    history: Mutex<History>,
    coverage: Mutex<Coverage>,
    /// The newest revision that anybody has seen.
    newest: AtomicI64,
    /// Names clients, leases and values.
    next: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// An empty history that begins now.
    pub fn new() -> Arc<Recorder> {
        let coverage = Mutex::new(Coverage { until: 1, ..Coverage::default() });
        let (history, newest, next) = (Mutex::default(), AtomicI64::new(1), AtomicU64::new(1));
        Arc::new(Recorder { began: Instant::now(), history, coverage, newest, next })
    }

    /// Microseconds since the history began.
    pub fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// A number that nobody else gets.
    pub fn unique(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Keeps a watch that has ended.
    pub fn push_watch(&self, watch: Watch) {
        lock(&self.history).watches.push(watch);
    }

    /// Notes that all changes of a revision are in a watch that will be kept.
    pub fn cover(&self, revision: i64) {
        let mut coverage = lock(&self.coverage);
        coverage.ahead.insert(revision);
        while let Some(first) = coverage.ahead.first().copied().filter(|r| *r <= coverage.until + 1)
        {
            coverage.until = coverage.until.max(first);
            coverage.ahead.remove(&first);
        }
    }

    /// The revision up to which every change is in some watch that will be kept.
    pub fn covered(&self) -> i64 {
        lock(&self.coverage).until
    }

    /// The newest revision that anybody has seen.
    pub fn newest(&self) -> i64 {
        self.newest.load(Ordering::Relaxed)
    }

    /// When the last write was answered, and how many operations there were.
    pub fn operations(&self) -> usize {
        lock(&self.history).operations.len()
    }

    /// Takes everything out.
    pub fn finish(&self) -> History {
        std::mem::take(&mut lock(&self.history))
    }

    fn push(&self, operation: Operation) {
        if let Some(revision) = operation.revision() {
            self.newest.fetch_max(revision, Ordering::Relaxed);
        }
        lock(&self.history).operations.push(operation);
    }
}

/// A client of one member or of all of them.
#[derive(Clone)]
pub struct Session {
    /// Where operations are written down.
    pub recorder: Arc<Recorder>,
    /// The crate's client.
    pub client: Client,
    id: u64,
    /// The only member it talks to, with the count of that member's starts.
    pub member: Option<(usize, Arc<AtomicU64>)>,
    timeout: Duration,
}

impl Session {
    /// Connects, which succeeds whether or not anybody is there.
    pub async fn new(
        recorder: Arc<Recorder>,
        endpoints: &[String],
        member: Option<(usize, Arc<AtomicU64>)>,
    ) -> Result<Session, Error> {
        let options = ConnectOptions::new().with_connect_timeout(TIMEOUT);
        let client = Client::connect(endpoints, Some(options)).await?;
        let id = recorder.unique();
        Ok(Session { recorder, client, id, member, timeout: TIMEOUT })
    }

    /// The same client as somebody else, who waits longer.
    pub fn patient(&self) -> Session {
        Session { id: self.recorder.unique(), timeout: PATIENCE, ..self.clone() }
    }

    fn life(&self) -> u64 {
        self.member.as_ref().map_or(0, |(_, lives)| lives.load(Ordering::SeqCst))
    }

    /// Does an operation and writes it down.
    pub async fn run(&mut self, kind: &str, request: Request) -> Outcome {
        let (life, call_us) = (self.life(), self.recorder.now_us());
        let call = tokio::time::timeout(self.timeout, send(&mut self.client, &request));
        let outcome = match call.await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => failure(&error),
            Err(_) => Outcome::Unknown("timed out here".to_owned()),
        };
        self.record(kind, request, outcome.clone(), life, call_us);
        outcome
    }

    fn record(&self, kind: &str, request: Request, outcome: Outcome, life: u64, call_us: u64) {
        let life = if self.life() == life { life } else { 0 };
        self.recorder.push(Operation {
            kind: kind.to_owned(),
            client: self.id,
            member: self.member.as_ref().map(|(member, _)| *member),
            life,
            call_us,
            return_us: self.recorder.now_us(),
            request,
            outcome,
        });
    }

    /// Renews a lease. Returns whether it is certain that it was renewed.
    pub async fn keep_alive(&mut self, id: i64) -> bool {
        // Opening the stream renews it too, but does not tell for how long.
        let opened = tokio::time::timeout(TIMEOUT, self.client.lease_keep_alive(id)).await;
        let (life, call_us) = (self.life(), self.recorder.now_us());
        let outcome = match opened {
            Ok(Ok((mut keeper, mut stream))) => {
                let call = async {
                    keeper.keep_alive().await?;
                    stream.message().await
                };
                match tokio::time::timeout(TIMEOUT, call).await {
                    Ok(Ok(Some(response))) => {
                        let revision = response.header().map_or(0, |header| header.revision());
                        let ttl_secs = response.ttl();
                        let (succeeded, answers) = (ttl_secs > 0, Vec::new());
                        Outcome::Done { revision, succeeded, answers, ttl_secs }
                    }
                    Ok(Ok(None)) => Outcome::Unknown("stream ended".to_owned()),
                    Ok(Err(error)) => failure(&error),
                    Err(_) => Outcome::Unknown("timed out here".to_owned()),
                }
            }
            Ok(Err(error)) => failure(&error),
            Err(_) => Outcome::Unknown("timed out here".to_owned()),
        };
        let is_renewed = matches!(outcome, Outcome::Done { succeeded: true, .. });
        self.record("keep-alive", Request::KeepAlive { id }, outcome, life, call_us);
        is_renewed
    }
}

/// What an error says of whether the operation was done.
fn failure(error: &Error) -> Outcome {
    // By number, as gRPC has them: InvalidArgument, NotFound, AlreadyExists, PermissionDenied,
    // ResourceExhausted, FailedPrecondition, OutOfRange, Unimplemented. All others may come
    // after the operation was committed.
    const REFUSED: &[i32] = &[3, 5, 6, 7, 8, 9, 11, 12];
    match error {
        Error::GRpcStatus(status) if REFUSED.contains(&(status.code() as i32)) => {
            Outcome::Refused(status.message().to_owned())
        }
        Error::InvalidArgs(why) => Outcome::Refused(why.clone()),
        other => Outcome::Unknown(other.to_string()),
    }
}

/// A key of the crate's as one of ours.
pub fn kv_of(kv: &KeyValue) -> Kv {
    Kv {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: String::from_utf8_lossy(kv.value()).into_owned(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        version: kv.version(),
        lease: kv.lease(),
    }
}

fn kvs_of(kvs: &[KeyValue]) -> Vec<Kv> {
    kvs.iter().map(kv_of).collect()
}

fn range_options(end: Option<&String>, revision: i64, limit: i64) -> GetOptions {
    let options = GetOptions::new().with_revision(revision).with_limit(limit);
    match end {
        Some(end) => options.with_range(end.clone()),
        None => options,
    }
}

fn put_options(lease: i64, prev: bool) -> PutOptions {
    let options = PutOptions::new().with_lease(lease);
    if prev { options.with_prev_key() } else { options }
}

fn delete_options(end: Option<&String>, prev: bool) -> DeleteOptions {
    let options = DeleteOptions::new();
    let options = match end {
        Some(end) => options.with_range(end.clone()),
        None => options,
    };
    if prev { options.with_prev_key() } else { options }
}

fn op_of(action: &Action) -> TxnOp {
    match action.clone() {
        Action::Range { key, end, revision, limit } => {
            TxnOp::get(key, Some(range_options(end.as_ref(), revision, limit)))
        }
        Action::Put { key, value, lease, prev } => {
            TxnOp::put(key, value, Some(put_options(lease, prev)))
        }
        Action::Delete { key, end, prev } => {
            TxnOp::delete(key, Some(delete_options(end.as_ref(), prev)))
        }
    }
}

fn compare_of(compare: &Compare) -> etcd_client::Compare {
    let key = compare.key.clone();
    match &compare.target {
        Target::Version(version) => etcd_client::Compare::version(key, CompareOp::Equal, *version),
        Target::ModRevision(revision) => {
            etcd_client::Compare::mod_revision(key, CompareOp::Equal, *revision)
        }
        Target::Value(value) => etcd_client::Compare::value(key, CompareOp::Equal, value.clone()),
    }
}

/// Sends a request by the call that is made for it.
async fn send(client: &mut Client, request: &Request) -> Result<Outcome, Error> {
    let (header, succeeded, answers, ttl_secs) = match request {
        Request::Txn { compares, then, otherwise, serializable } => {
            if let ([], [action], []) = (&compares[..], &then[..], &otherwise[..]) {
                let (header, answer) = send_one(client, action, *serializable).await?;
                (header, true, vec![answer], 0)
            } else {
                let txn = etcd_client::Txn::new()
                    .when(compares.iter().map(compare_of).collect::<Vec<_>>())
                    .and_then(then.iter().map(op_of).collect::<Vec<_>>())
                    .or_else(otherwise.iter().map(op_of).collect::<Vec<_>>());
                let response = client.txn(txn).await?;
                let answers = response.op_responses().iter().map(answer_of).collect();
                (response.header().cloned(), response.succeeded(), answers, 0)
            }
        }
        Request::Compact { revision } => {
            let options = (revision % 4 == 0).then(|| CompactionOptions::new().with_physical());
            (client.compact(*revision, options).await?.take_header(), true, Vec::new(), 0)
        }
        Request::Grant { id, ttl_secs } => {
            let options = LeaseGrantOptions::new().with_id(*id);
            let mut response = client.lease_grant(*ttl_secs, Some(options)).await?;
            (response.take_header(), true, Vec::new(), response.ttl())
        }
        Request::Revoke { id } => {
            (client.lease_revoke(*id).await?.take_header(), true, Vec::new(), 0)
        }
        // A stream, which Session::keep_alive handles.
        Request::KeepAlive { .. } => return Err(Error::InvalidArgs("keep-alive".to_owned())),
    };
    let revision = header.map_or(0, |header| header.revision());
    Ok(Outcome::Done { revision, succeeded, answers, ttl_secs })
}

async fn send_one(
    client: &mut Client,
    action: &Action,
    is_serializable: bool,
) -> Result<(Option<etcd_client::ResponseHeader>, Answer), Error> {
    match action.clone() {
        Action::Range { key, end, revision, limit } => {
            let options = range_options(end.as_ref(), revision, limit);
            let options = if is_serializable { options.with_serializable() } else { options };
            let mut response = client.get(key, Some(options)).await?;
            let (kvs, count) = (kvs_of(response.kvs()), response.count());
            Ok((response.take_header(), Answer::Range { kvs, count }))
        }
        Action::Put { key, value, lease, prev } => {
            let mut response = client.put(key, value, Some(put_options(lease, prev))).await?;
            let prev = response.prev_key().map(kv_of);
            Ok((response.take_header(), Answer::Put { prev }))
        }
        Action::Delete { key, end, prev } => {
            let options = delete_options(end.as_ref(), prev);
            let mut response = client.delete(key, Some(options)).await?;
            let (deleted, prev) = (response.deleted(), kvs_of(response.prev_kvs()));
            Ok((response.take_header(), Answer::Delete { deleted, prev }))
        }
    }
}

fn answer_of(response: &TxnOpResponse) -> Answer {
    match response {
        TxnOpResponse::Get(range) => {
            Answer::Range { kvs: kvs_of(range.kvs()), count: range.count() }
        }
        TxnOpResponse::Put(put) => Answer::Put { prev: put.prev_key().map(kv_of) },
        TxnOpResponse::Delete(delete) => {
            Answer::Delete { deleted: delete.deleted(), prev: kvs_of(delete.prev_kvs()) }
        }
        // Nobody here nests transactions: this fits no answer that is expected.
        TxnOpResponse::Txn(_) => Answer::Put { prev: None },
    }
}
