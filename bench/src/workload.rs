//! What the clients do.
//!
//! Everything runs on one thread: clients are local tasks that share their counts
//! without locks. Every client does its operation once before the clock starts, so
//! connections, keys and caches are there.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, PutRequest, TxnResponse,
    WatchCreateRequest, WatchRequest, response_op::Response, watch_request::RequestUnion,
};
use kvorum::pb::mvccpb::KeyValue;
use prost::Message as _;
use tokio::sync::{Barrier, Notify};

use crate::client::{CallError, Connection, Path, Stream, frame};
use crate::histogram::Histogram;
use crate::process;
use crate::requests::{self, Template, scan_watch};

/// Watchers that share a stream, as the watches of one client do.
const WATCHERS_PER_STREAM: usize = 10;
/// How long an event may take to reach a watcher before the run gives up.
const EVENT_PATIENCE: Duration = Duration::from_secs(30);
/// Longer than any run: leases are to live.
const LEASE_TTL_SECONDS: i64 = 3_600;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Put,
    Range,
    List,
    ListAll,
    TxnUpdate,
    Watch,
    KeepAlive,
    Kubernetes,
    Load,
    Window,
}

impl Kind {
    /// The workload called `name`.
    pub fn parse(name: &str) -> Option<Kind> {
        Some(match name {
            "put" => Kind::Put,
            "range" => Kind::Range,
            "list" => Kind::List,
            "list-all" => Kind::ListAll,
            "txn-update" => Kind::TxnUpdate,
            "watch" => Kind::Watch,
            "keepalive" => Kind::KeepAlive,
            "kubernetes" => Kind::Kubernetes,
            "load" => Kind::Load,
            _ => return None,
        })
    }

    /// The key space if none is given.
    pub fn usual_keys(self) -> usize {
        if matches!(self, Kind::List | Kind::ListAll | Kind::Load) { 100_000 } else { 10_000 }
    }
}

/// A run.
#[derive(Debug, Clone)]
pub struct Load {
    pub kind: Kind,
    /// `host:port` of every server; connections go to them in turns.
    pub endpoints: Vec<String>,
    /// Requests in flight.
    pub clients: usize,
    pub conns: usize,
    pub duration: Duration,
    /// Operations after which to stop, instead of by time.
    pub total: Option<u64>,
    /// The number of the first operation, which counts towards `total`.
    pub first: u64,
    /// Key space.
    pub keys: usize,
    pub key_size: usize,
    pub val_size: usize,
    /// Keys of a page.
    pub limit: usize,
    pub serializable: bool,
    pub watchers: usize,
}

/// What a run did.
#[derive(Clone)]
pub struct Outcome {
    pub latencies: Histogram,
    pub elapsed: Duration,
    pub errors: u64,
    pub first_error: Option<String>,
    /// Bytes of answers, where they are counted.
    pub bytes: u64,
    /// Events delivered to watchers.
    pub events: u64,
    /// Processor time of the servers, if it is known.
    pub server_cpu: Option<Duration>,
    /// Processor time of this generator.
    pub own_cpu: Duration,
    /// Memory of the servers at the end.
    pub server_resident_bytes: Option<u64>,
}

impl Outcome {
    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.latencies.count() as f64 / self.elapsed.as_secs_f64()
    }
}

/// What the clients share.
struct Shared {
    load: Load,
    latencies: RefCell<Histogram>,
    errors: Cell<u64>,
    first_error: RefCell<Option<String>>,
    bytes: Cell<u64>,
    events: Cell<u64>,
    /// Operations begun.
    begun: Cell<u64>,
    start: Cell<Option<Instant>>,
    ready: Barrier,
}

impl Shared {
    /// The number of the next operation, or `None` when there shall be no more.
    fn next(&self) -> Option<u64> {
        let number = self.begun.get();
        match (self.load.total, self.start.get()) {
            (Some(total), _) if number >= total => return None,
            (None, Some(start)) if start.elapsed() >= self.load.duration => return None,
            _ => {}
        }
        self.begun.set(number + 1);
        Some(number)
    }

    fn fail(&self, error: &CallError) {
        self.errors.set(self.errors.get() + 1);
        self.first_error.borrow_mut().get_or_insert_with(|| error.to_string());
    }
}

/// Carries out `load`; `pids` are the servers that are here.
pub async fn run(load: &Load, pids: &[u32]) -> Result<Outcome, CallError> {
    let mut load = load.clone();
    if load.kind == Kind::Load {
        load.total = Some(load.keys as u64);
    }
    if load.kind == Kind::Watch {
        load.clients = 1;
    }
    let mut connections = Vec::new();
    for endpoint in load.endpoints.iter().cycle().take(load.conns) {
        connections.push(Connection::open(endpoint).await?);
    }
    let (clients, first) = (load.clients, load.first);
    let shared = Rc::new(Shared {
        load,
        latencies: RefCell::new(Histogram::new()),
        errors: Cell::new(0),
        first_error: RefCell::new(None),
        bytes: Cell::new(0),
        events: Cell::new(0),
        begun: Cell::new(first),
        start: Cell::new(None),
        ready: Barrier::new(clients + 1),
    });
    let watchers = if shared.load.kind == Kind::Watch {
        Some(Watchers::start(&connections, &shared).await?)
    } else {
        None
    };
    let mut tasks = Vec::new();
    for index in 0..clients {
        let connection = connections[index % connections.len()].clone();
        let mut client = Client::new(index, connection, &shared)?;
        client.watchers = watchers.clone();
        tasks.push(tokio::task::spawn_local(client.run()));
    }
    // Everyone has done it once; now it counts.
    shared.ready.wait().await;
    let cpu = process::cpu_of_all(pids);
    let own_cpu = process::cpu(std::process::id()).unwrap_or_default();
    let start = Instant::now();
    shared.start.set(Some(start));
    shared.ready.wait().await;
    for task in tasks {
        task.await?;
    }
    let elapsed = start.elapsed();
    let server_cpu = cpu.zip(process::cpu_of_all(pids)).map(|(before, after)| after - before);
    let own_cpu = process::cpu(std::process::id()).unwrap_or_default() - own_cpu;
    let latencies = shared.latencies.borrow().clone();
    let first_error = shared.first_error.borrow().clone();
    if latencies.count() == 0 {
        return Err(first_error.unwrap_or_else(|| "nothing was done".to_owned()).into());
    }
    Ok(Outcome {
        latencies,
        elapsed,
        errors: shared.errors.get(),
        first_error,
        bytes: shared.bytes.get(),
        events: shared.events.get(),
        server_cpu,
        own_cpu,
        server_resident_bytes: process::resident_bytes_of_all(pids),
    })
}

/// As [`run`], for servers that might not answer any more.
pub async fn run_within(
    patience: Duration,
    load: &Load,
    pids: &[u32],
) -> Result<Outcome, CallError> {
    tokio::time::timeout(patience, run(load, pids))
        .await
        .map_err(|_| format!("{:?} has not ended after {patience:?}", load.kind))?
}

/// One request at a time.
struct Client {
    index: usize,
    connection: Connection,
    shared: Rc<Shared>,
    random: u64,
    value: Bytes,
    put: Template,
    get: Template,
    page: Template,
    delete: Template,
    /// Mod revisions of the keys that are this client's own; 0 if not known.
    own: Vec<i64>,
    lease: Option<(i64, Stream)>,
    watchers: Option<Rc<Watchers>>,
    paths: Paths,
}

struct Paths {
    put: Path,
    range: Path,
    delete: Path,
    txn: Path,
    grant: Path,
    keep_alive: Path,
}

impl Client {
    fn new(index: usize, connection: Connection, shared: &Rc<Shared>) -> Result<Client, CallError> {
        let load = &shared.load;
        let mut random = 0x9e37_79b9_7f4a_7c15 ^ (index as u64);
        let value: Bytes = (0..load.val_size).map(|_| next(&mut random) as u8).collect();
        // Key i belongs to client i modulo the number of clients.
        let own = (load.keys + load.clients - 1 - index.min(load.keys - 1)) / load.clients;
        Ok(Client {
            index,
            shared: Rc::clone(shared),
            random,
            put: Template::put(load.key_size, &value),
            get: Template::get(load.key_size, load.serializable),
            page: Template::page(load.key_size, load.limit, load.serializable),
            delete: Template::delete(load.key_size),
            value,
            own: vec![0; own.max(1)],
            lease: None,
            watchers: None,
            paths: Paths {
                put: connection.path("etcdserverpb.KV/Put")?,
                range: connection.path("etcdserverpb.KV/Range")?,
                delete: connection.path("etcdserverpb.KV/DeleteRange")?,
                txn: connection.path("etcdserverpb.KV/Txn")?,
                grant: connection.path("etcdserverpb.Lease/LeaseGrant")?,
                keep_alive: connection.path("etcdserverpb.Lease/LeaseKeepAlive")?,
            },
            connection,
        })
    }

    async fn run(mut self) {
        let shared = Rc::clone(&self.shared);
        if !matches!(shared.load.kind, Kind::Load | Kind::Window)
            && let Err(error) = self.operation(self.index as u64).await
        {
            shared.fail(&error);
        }
        shared.ready.wait().await;
        shared.ready.wait().await;
        while let Some(number) = shared.next() {
            let begun = Instant::now();
            match self.operation(number).await {
                Ok(()) => shared.latencies.borrow_mut().record(begun.elapsed()),
                Err(error) => {
                    shared.fail(&error);
                    // A server that is gone answers at once: do not spin.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn operation(&mut self, number: u64) -> Result<(), CallError> {
        match self.shared.load.kind {
            Kind::Put => {
                let key = self.any_key();
                self.put(key).await
            }
            Kind::Load => self.put(number).await,
            Kind::Window => {
                // Turn by turn a key comes and the oldest goes.
                let oldest = number / 2;
                if number.is_multiple_of(2) {
                    return self.put(oldest + self.shared.load.keys as u64).await;
                }
                let request = self.delete.with(oldest);
                self.connection.unary(&self.paths.delete, request).await.map(drop)
            }
            Kind::Range => self.get().await,
            Kind::List => self.list().await,
            Kind::ListAll => {
                let request = requests::everything(self.shared.load.serializable);
                self.count(request).await
            }
            Kind::TxnUpdate => self.update().await,
            Kind::KeepAlive => self.keep_alive().await,
            Kind::Watch => self.put_and_wait().await,
            Kind::Kubernetes => match next(&mut self.random) % 100 {
                // Status updates and renewals of leases are most of it.
                0..55 => self.update().await,
                55..90 => self.get().await,
                90..95 => self.list().await,
                95..98 => {
                    let key = self.any_key();
                    self.put(key).await
                }
                _ => {
                    let key = self.any_key();
                    let request = self.delete.with(key);
                    self.connection.unary(&self.paths.delete, request).await.map(drop)
                }
            },
        }
    }

    fn any_key(&mut self) -> u64 {
        next(&mut self.random) % self.shared.load.keys as u64
    }

    async fn put(&mut self, key: u64) -> Result<(), CallError> {
        let request = self.put.with(key);
        self.connection.unary(&self.paths.put, request).await.map(drop)
    }

    async fn get(&mut self) -> Result<(), CallError> {
        let key = self.any_key();
        let request = self.get.with(key);
        self.connection.unary(&self.paths.range, request).await.map(drop)
    }

    async fn list(&mut self) -> Result<(), CallError> {
        let key = self.any_key();
        let request = self.page.with(key);
        self.count(request).await
    }

    async fn count(&mut self, request: Bytes) -> Result<(), CallError> {
        let bytes = self.connection.count(&self.paths.range, request).await?;
        self.shared.bytes.set(self.shared.bytes.get() + bytes);
        Ok(())
    }

    async fn update(&mut self) -> Result<(), CallError> {
        let load = &self.shared.load;
        let slot = (next(&mut self.random) % self.own.len() as u64) as usize;
        let number = (slot * load.clients + self.index) as u64;
        let key = requests::key(number, load.key_size);
        // Not known, or changed by another workload's write: the answer tells.
        loop {
            let request = requests::update(&key, &self.value, self.own[slot]);
            let answer = self.connection.unary(&self.paths.txn, request).await?;
            let answer = TxnResponse::decode(answer)?;
            if answer.succeeded {
                let header = answer.header.ok_or("a TxnResponse without header")?;
                self.own[slot] = header.revision;
                return Ok(());
            }
            let Some(Response::ResponseRange(range)) =
                answer.responses.into_iter().next().and_then(|response| response.response)
            else {
                return Err("a TxnResponse without the range asked for".into());
            };
            self.own[slot] = match range.kvs.into_iter().next() {
                Some(kv) => KeyValue::decode(kv)?.mod_revision,
                None => 0,
            };
        }
    }

    async fn keep_alive(&mut self) -> Result<(), CallError> {
        let (id, stream) = match &mut self.lease {
            Some(lease) => lease,
            None => {
                let grant = frame(&LeaseGrantRequest { ttl: LEASE_TTL_SECONDS, id: 0 });
                let granted = self.connection.unary(&self.paths.grant, grant).await?;
                let id = LeaseGrantResponse::decode(granted)?.id;
                let first = frame(&LeaseKeepAliveRequest { id });
                let mut stream = self.connection.open_stream(&self.paths.keep_alive, first).await?;
                stream.next().await?;
                self.lease.insert((id, stream))
            }
        };
        stream.send(frame(&LeaseKeepAliveRequest { id: *id }))?;
        stream.next().await.map(drop)
    }

    async fn put_and_wait(&mut self) -> Result<(), CallError> {
        let watchers = self.watchers.clone().ok_or("no watchers were started")?;
        watchers.expect();
        self.put(0).await?;
        tokio::time::timeout(EVENT_PATIENCE, watchers.delivered())
            .await
            .map_err(|_| "an event did not reach all watchers".into())
    }
}

/// Watchers of one key.
struct Watchers {
    shared: Rc<Shared>,
    count: u64,
    /// Events still to come.
    missing: Cell<u64>,
    all: Notify,
}

impl Watchers {
    async fn start(
        connections: &[Connection],
        shared: &Rc<Shared>,
    ) -> Result<Rc<Watchers>, CallError> {
        let load = &shared.load;
        let watchers = Rc::new(Watchers {
            shared: Rc::clone(shared),
            count: load.watchers as u64,
            missing: Cell::new(0),
            all: Notify::new(),
        });
        let create =
            WatchCreateRequest { key: requests::key(0, load.key_size), ..Default::default() };
        let create = RequestUnion::CreateRequest(create);
        let create = frame(&WatchRequest { request_union: Some(create) });
        let mut left = load.watchers;
        for index in 0..load.watchers.div_ceil(WATCHERS_PER_STREAM) {
            let mut connection = connections[index % connections.len()].clone();
            let path = connection.path("etcdserverpb.Watch/Watch")?;
            let mut stream = connection.open_stream(&path, create.clone()).await?;
            let here = left.min(WATCHERS_PER_STREAM);
            left -= here;
            for _ in 1..here {
                stream.send(create.clone())?;
            }
            let mut created = 0;
            while created < here {
                let scan = scan_watch(&stream.next().await?).ok_or("not a WatchResponse")?;
                if scan.canceled {
                    return Err("the server refuses the watchers".into());
                }
                created += usize::from(scan.created);
            }
            tokio::task::spawn_local(Rc::clone(&watchers).receive(stream));
        }
        Ok(watchers)
    }

    async fn receive(self: Rc<Self>, mut stream: Stream) {
        loop {
            let scan = match stream.next().await {
                Ok(message) => scan_watch(&message).ok_or_else(|| "not a WatchResponse".into()),
                Err(error) => Err(error),
            };
            match scan {
                Ok(scan) => {
                    self.shared.events.set(self.shared.events.get() + scan.events);
                    self.missing.set(self.missing.get().saturating_sub(scan.events));
                    if self.missing.get() == 0 {
                        self.all.notify_one();
                    }
                }
                Err(error) => return self.shared.fail(&error),
            }
        }
    }

    fn expect(&self) {
        self.missing.set(self.count);
    }

    async fn delivered(&self) {
        while self.missing.get() > 0 {
            self.all.notified().await;
        }
    }
}

/// Puts the first key, as soon as the server lets it.
pub async fn first_put(endpoint: &str) -> Result<(), CallError> {
    let mut connection = Connection::open(endpoint).await?;
    let path = connection.path("etcdserverpb.KV/Put")?;
    let put = PutRequest { key: Bytes::from_static(b"first"), ..Default::default() };
    connection.unary(&path, frame(&put)).await.map(drop)
}

/// SplitMix64.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
