//! A server in the same process, as Rust methods: etcd's calls with their answers decoded.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use kvorum::client::{Compare, Event};
//! use kvorum::{Config, Server};
//!
//! let server = Server::start(Config::in_memory()).await?;
//! let client = server.client();
//!
//! // Reads and writes.
//! client.put("fruit/apple", "red").await?;
//! client.put("fruit/lemon", "yellow").await?;
//! let apple = client.get("fruit/apple").await?.expect("it was put");
//! assert_eq!((&apple.value[..], apple.version), (&b"red"[..], 1));
//!
//! // A list, and everything that changes after it: nothing between is missed.
//! let list = client.get_prefix("fruit/").await?;
//! assert_eq!(list.kvs.len(), 2);
//! let mut watcher = client.watch_prefix("fruit/").start_revision(list.revision + 1).await?;
//!
//! // A transaction: the lock is taken only by whoever finds it free.
//! let lease = client.lease_grant(10).await?;
//! let taken = client
//!     .txn()
//!     .when(Compare::create_revision("fruit/lock").equal(0))
//!     .then(client.put("fruit/lock", "mine").lease(lease.id()))
//!     .otherwise(client.get("fruit/lock"))
//!     .await?;
//! assert!(taken.succeeded);
//!
//! // With its lease the lock goes, too; the watcher sees both.
//! lease.revoke().await?;
//! let put = watcher.recv().await?;
//! assert!(matches!(&put.events[..], [Event::Put { kv, .. }] if kv.value == "mine"));
//! let delete = watcher.recv().await?;
//! assert!(matches!(&delete.events[..], [Event::Delete { key, .. }] if key == "fruit/lock"));
//! assert_eq!(delete.revision, taken.revision + 1);
//!
//! server.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! A call is a value: [`Client::put`] and the like return a request, its methods are its
//! options, and `.await` carries it out. A request that is not awaited does nothing, and
//! can be handed to a [`Txn`] instead. Keys and values are whatever becomes [`Bytes`]:
//! `"literals"`, `String`, `Vec<u8>`, `Bytes` itself.
//!
//! **Durability.** When a call that writes has returned `Ok`, the write is on disk (on a
//! majority of them, in a cluster), every later read sees it, and watchers are about to.
//! `--unsafe-no-fsync` and servers in memory promise only the latter two.
//!
//! **Consistency.** Reads are linearizable: they see everything acknowledged before they
//! began. `serializable()` reads what this member has, without asking the others.
//!
//! **Cancellation.** A future may be dropped at any time. That gives up the answer and not
//! the write, which may have happened or still happen.
//!
//! **Errors.** An [`Error`] other than those of which [`Error::is_ambiguous`] speaks means
//! that nothing was changed. After the server has stopped every call fails with
//! [`Error::Stopped`].
//!
//! What has no method here can be asked of [`Client::engine`] in etcd's own messages.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::future::{Future, IntoFuture, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use prost::Message as _;
use tokio_stream::Stream;

use crate::engine::{Engine, Snapshot, WatchStream};
use crate::error::Error;
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::response_op::Response;
use crate::pb::etcdserverpb::watch_request::RequestUnion;
use crate::pb::etcdserverpb::{
    self as pb, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader, TxnRequest,
    WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::pb::mvccpb::event::EventType;
use crate::pb::mvccpb::{self, KeyValue};

/// A handle to a server in this process. See the [module](self). Clones are the same
/// server; they outlive it, and get [`Error::Stopped`] then.
#[derive(Debug, Clone)]
pub struct Client {
    engine: Engine,
}

impl Client {
    /// A client of the server behind `engine`.
    pub fn new(engine: Engine) -> Client {
        Client { engine }
    }

    /// The handle that speaks etcd's messages.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Reads a key; `None` when there is no such key.
    pub fn get(&self, key: impl Into<Bytes>) -> Get {
        let request = RangeRequest { key: key.into(), ..RangeRequest::default() };
        Get { engine: self.engine.clone(), request }
    }

    /// Reads all keys that begin with `prefix`, in order and as of one revision; with an
    /// empty prefix, all there are.
    pub fn get_prefix(&self, prefix: impl Into<Bytes>) -> GetPrefix {
        let (key, range_end) = prefix_range(prefix.into());
        let request = RangeRequest { key, range_end, ..RangeRequest::default() };
        GetPrefix { engine: self.engine.clone(), request }
    }

    /// Writes a key.
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Put {
        let request = PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() };
        Put { engine: self.engine.clone(), request }
    }

    /// Deletes a key, if there is one.
    pub fn delete(&self, key: impl Into<Bytes>) -> Delete {
        let request = DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() };
        Delete { engine: self.engine.clone(), request }
    }

    /// Deletes all keys that begin with `prefix`, in one revision; with an empty prefix, all
    /// there are.
    pub fn delete_prefix(&self, prefix: impl Into<Bytes>) -> Delete {
        let (key, range_end) = prefix_range(prefix.into());
        let request = DeleteRangeRequest { key, range_end, prev_kv: false };
        Delete { engine: self.engine.clone(), request }
    }

    /// Compares and carries out one of two lists of requests, all in one revision.
    pub fn txn(&self) -> Txn {
        Txn { engine: self.engine.clone(), request: TxnRequest::default() }
    }

    /// Watches a key.
    pub fn watch(&self, key: impl Into<Bytes>) -> Watch {
        let request = WatchCreateRequest { key: key.into(), ..WatchCreateRequest::default() };
        Watch { engine: self.engine.clone(), request }
    }

    /// Watches all keys that begin with `prefix`; with an empty prefix, all there are.
    pub fn watch_prefix(&self, prefix: impl Into<Bytes>) -> Watch {
        let (key, range_end) = prefix_range(prefix.into());
        let request = WatchCreateRequest { key, range_end, ..WatchCreateRequest::default() };
        Watch { engine: self.engine.clone(), request }
    }

    /// Gives up the history before `revision`: it can be neither read nor watched any more.
    /// Keys keep their newest values.
    ///
    /// # Errors
    /// [`Error::Compacted`] when that has happened before, [`Error::FutureRevision`].
    pub async fn compact(&self, revision: i64) -> Result<(), Error> {
        let request = CompactionRequest { revision, physical: false };
        self.engine.compact(request).await.map(drop)
    }

    /// Grants a lease of `ttl_secs` seconds. The server raises a time shorter than one and a
    /// half election timeouts: see [`Lease::ttl_secs`].
    ///
    /// # Errors
    /// [`Error::LeaseTtlTooLarge`], [`Error::NoSpace`].
    pub async fn lease_grant(&self, ttl_secs: i64) -> Result<Lease, Error> {
        let request = LeaseGrantRequest { ttl: ttl_secs, id: 0 };
        let granted = self.engine.lease_grant(request).await?;
        Ok(Lease { engine: self.engine.clone(), id: granted.id, ttl_secs: granted.ttl })
    }

    /// Everything that the server holds, as a file from which etcd, and kvorum, can be restored:
    /// a consistent view of the present moment, to be written piece by piece. Dropping what is
    /// returned ends it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = kvorum::Server::start(kvorum::Config::in_memory()).await?;
    /// # let client = server.client();
    /// # let mut file = Vec::new();
    /// use std::io::Write as _;
    ///
    /// let mut snapshot = client.snapshot()?;
    /// while let Some(bytes) = snapshot.next().await? {
    ///     file.write_all(&bytes)?;
    /// }
    /// # assert_eq!(file.len() % 4096, 32);
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::TooManyRequests`] while several others are under way.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        self.engine.snapshot()
    }

    /// A lease that was granted before. Nobody is asked whether it still exists.
    pub fn lease(&self, id: i64) -> Lease {
        Lease { engine: self.engine.clone(), id, ttl_secs: 0 }
    }
}

/// The range of all keys that begin with `prefix`, in etcd's terms.
fn prefix_range(prefix: Bytes) -> (Bytes, Bytes) {
    // To the wire, an empty key is none, and the end "\0" is behind all keys.
    const ZERO: Bytes = Bytes::from_static(b"\0");
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return (prefix, end.into());
        }
    }
    (if prefix.is_empty() { ZERO } else { prefix }, ZERO)
}

/// What a request's `.await` makes.
type Answer<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// Lets requests be awaited.
macro_rules! awaitable {
    ($($request:ident => $response:ty;)+) => {$(
        impl IntoFuture for $request {
            type Output = Result<$response, Error>;
            type IntoFuture = Answer<$response>;

            fn into_future(self) -> Answer<$response> {
                Box::pin(self.run())
            }
        }
    )+};
}

awaitable! {
    Get => Option<KeyValue>;
    GetPrefix => GetResponse;
    Put => PutResponse;
    Delete => DeleteResponse;
    Txn => TxnResponse;
    Watch => Watcher;
}

/// [`Client::get`].
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Get {
    engine: Engine,
    request: RangeRequest,
}

impl Get {
    /// Reads the key as it was at this revision; 0 is the newest.
    ///
    /// The call fails with [`Error::Compacted`] or [`Error::FutureRevision`] when it is not
    /// one of the history's.
    pub fn revision(mut self, revision: i64) -> Get {
        self.request.revision = revision;
        self
    }

    /// Reads what this member has. It never waits, and may be behind.
    pub fn serializable(mut self) -> Get {
        self.request.serializable = true;
        self
    }

    async fn run(self) -> Result<Option<KeyValue>, Error> {
        Ok(GetResponse::decode(self.engine.range(self.request).await?)?.kvs.pop())
    }
}

/// [`Client::get_prefix`].
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct GetPrefix {
    engine: Engine,
    request: RangeRequest,
}

impl GetPrefix {
    /// Reads the keys as they were at this revision; 0 is the newest.
    ///
    /// The call fails with [`Error::Compacted`] or [`Error::FutureRevision`] when it is not
    /// one of the history's.
    pub fn revision(mut self, revision: i64) -> GetPrefix {
        self.request.revision = revision;
        self
    }

    /// Reads what this member has. It never waits, and may be behind.
    pub fn serializable(mut self) -> GetPrefix {
        self.request.serializable = true;
        self
    }

    /// Gives at most this many keys; 0 is no limit. [`GetResponse::more`] says whether there
    /// are more, [`GetPrefix::after`] goes on.
    pub fn limit(mut self, keys: u32) -> GetPrefix {
        self.request.limit = keys.into();
        self
    }

    /// Gives the keys behind this one only, as the next page of a list: together with the
    /// first page's [`revision`](GetPrefix::revision), all pages are of one moment.
    pub fn after(mut self, key: &[u8]) -> GetPrefix {
        self.request.key = self.request.key.max([key, b"\0"].concat().into());
        self
    }

    /// Leaves the values out.
    pub fn keys_only(mut self) -> GetPrefix {
        self.request.keys_only = true;
        self
    }

    async fn run(self) -> Result<GetResponse, Error> {
        GetResponse::decode(self.engine.range(self.request).await?)
    }
}

/// What a read found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GetResponse {
    /// The newest revision when it was read. A watch that is to see what happens after
    /// starts at the next one.
    pub revision: i64,
    /// The keys, in order.
    pub kvs: Vec<KeyValue>,
    /// How many keys there are, whatever the limit.
    pub count: i64,
    /// Whether the limit left some out.
    pub more: bool,
}

impl GetResponse {
    fn decode(response: pb::RangeResponse) -> Result<GetResponse, Error> {
        Ok(GetResponse {
            revision: revision(response.header),
            kvs: key_values(response.kvs)?,
            count: response.count,
            more: response.more,
        })
    }
}

/// [`Client::put`].
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Put {
    engine: Engine,
    request: PutRequest,
}

impl Put {
    /// Attaches the key to a lease: when that ends, the key is deleted. Without it, the key
    /// is detached from the lease it had. 0 is no lease.
    ///
    /// The call fails with [`Error::LeaseNotFound`] when there is no such lease.
    pub fn lease(mut self, id: i64) -> Put {
        self.request.lease = id;
        self
    }

    /// Gives back what the key was before.
    pub fn prev_kv(mut self) -> Put {
        self.request.prev_kv = true;
        self
    }

    async fn run(self) -> Result<PutResponse, Error> {
        PutResponse::decode(self.engine.put(self.request).await?)
    }
}

/// What a put did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PutResponse {
    /// The revision it made.
    pub revision: i64,
    /// What the key was before, if that was asked for and there was one.
    pub prev_kv: Option<KeyValue>,
}

impl PutResponse {
    fn decode(response: pb::PutResponse) -> Result<PutResponse, Error> {
        let prev_kv = Some(response.prev_kv).filter(|kv| !kv.is_empty());
        Ok(PutResponse {
            revision: revision(response.header),
            prev_kv: prev_kv.map(key_value).transpose()?,
        })
    }
}

/// [`Client::delete`] and [`Client::delete_prefix`].
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Delete {
    engine: Engine,
    request: DeleteRangeRequest,
}

impl Delete {
    /// Gives back what the keys were.
    pub fn prev_kv(mut self) -> Delete {
        self.request.prev_kv = true;
        self
    }

    async fn run(self) -> Result<DeleteResponse, Error> {
        DeleteResponse::decode(self.engine.delete_range(self.request).await?)
    }
}

/// What a delete did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeleteResponse {
    /// The revision it made, or the newest when there was nothing to delete.
    pub revision: i64,
    /// How many keys were deleted.
    pub deleted: i64,
    /// What they were, in order, if that was asked for.
    pub prev_kvs: Vec<KeyValue>,
}

impl DeleteResponse {
    fn decode(response: pb::DeleteRangeResponse) -> Result<DeleteResponse, Error> {
        Ok(DeleteResponse {
            revision: revision(response.header),
            deleted: response.deleted,
            prev_kvs: key_values(response.prev_kvs)?,
        })
    }
}

/// [`Client::txn`]: `when` all compares hold `then` …, `otherwise` …
///
/// Every call of a method adds one compare or request. Requests are carried out in order,
/// and reads among them see the writes before them. No key may be written twice.
///
/// The call fails, and changes nothing, with [`Error::DuplicateKey`],
/// [`Error::TooManyOps`], or the error of one of its requests.
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Txn {
    engine: Engine,
    request: TxnRequest,
}

impl Txn {
    /// Adds a condition. Without any, the transaction succeeds.
    pub fn when(mut self, compare: Compare) -> Txn {
        self.request.compare.push(compare.0);
        self
    }

    /// Adds what is done when all conditions hold.
    pub fn then(mut self, request: impl Into<Op>) -> Txn {
        self.request.success.push(request.into().0);
        self
    }

    /// Adds what is done when one does not.
    pub fn otherwise(mut self, request: impl Into<Op>) -> Txn {
        self.request.failure.push(request.into().0);
        self
    }

    async fn run(self) -> Result<TxnResponse, Error> {
        TxnResponse::decode(self.engine.txn(self.request).await?)
    }
}

/// A request as a part of a transaction: made of a [`Get`], [`GetPrefix`], [`Put`],
/// [`Delete`] or [`Txn`].
#[derive(Debug, Clone)]
pub struct Op(RequestOp);

/// Lets requests be parts of a transaction.
macro_rules! operations {
    ($($request:ident => $variant:ident;)+) => {$(
        impl From<$request> for Op {
            fn from(request: $request) -> Op {
                Op(RequestOp { request: Some(Request::$variant(request.request)) })
            }
        }
    )+};
}

operations! {
    Get => RequestRange;
    GetPrefix => RequestRange;
    Put => RequestPut;
    Delete => RequestDeleteRange;
    Txn => RequestTxn;
}

/// What a transaction did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TxnResponse {
    /// The revision it made, or the newest when it wrote nothing.
    pub revision: i64,
    /// Whether all compares held.
    pub succeeded: bool,
    /// The answers to the requests that were carried out, in their order.
    pub responses: Vec<OpResponse>,
}

/// The answer to one request of a transaction.
#[derive(Debug, Clone, PartialEq)]
pub enum OpResponse {
    /// Of a [`Get`] or [`GetPrefix`].
    Get(GetResponse),
    /// Of a [`Put`].
    Put(PutResponse),
    /// Of a [`Delete`].
    Delete(DeleteResponse),
    /// Of a [`Txn`].
    Txn(TxnResponse),
}

impl TxnResponse {
    fn decode(response: pb::TxnResponse) -> Result<TxnResponse, Error> {
        let part = |op: pb::ResponseOp| {
            Ok(match op.response.ok_or(Error::Corrupt)? {
                Response::ResponseRange(response) => {
                    OpResponse::Get(GetResponse::decode(response)?)
                }
                Response::ResponsePut(response) => OpResponse::Put(PutResponse::decode(response)?),
                Response::ResponseDeleteRange(response) => {
                    OpResponse::Delete(DeleteResponse::decode(response)?)
                }
                Response::ResponseTxn(response) => OpResponse::Txn(TxnResponse::decode(response)?),
            })
        };
        Ok(TxnResponse {
            revision: revision(response.header),
            succeeded: response.succeeded,
            responses: response.responses.into_iter().map(part).collect::<Result<_, Error>>()?,
        })
    }
}

/// A condition of a transaction: `Compare::version("key").equal(1)`.
///
/// All numbers of a key that does not exist are 0. Its value is none: no comparison of
/// that holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Compare(pb::Compare);

/// What of a key is compared; its methods say how, and with what.
#[derive(Debug, Clone)]
#[must_use = "a comparison needs something to compare with"]
pub struct Comparison<T> {
    key: Bytes,
    target: CompareTarget,
    union: fn(T) -> TargetUnion,
}

impl Compare {
    /// The key's value.
    pub fn value(key: impl Into<Bytes>) -> Comparison<Bytes> {
        Comparison { key: key.into(), target: CompareTarget::Value, union: TargetUnion::Value }
    }

    /// How often the key was put since it was created.
    pub fn version(key: impl Into<Bytes>) -> Comparison<i64> {
        Comparison { key: key.into(), target: CompareTarget::Version, union: TargetUnion::Version }
    }

    /// The revision that created the key: 0 when there is none.
    pub fn create_revision(key: impl Into<Bytes>) -> Comparison<i64> {
        let union = TargetUnion::CreateRevision;
        Comparison { key: key.into(), target: CompareTarget::Create, union }
    }

    /// The revision that last put the key.
    pub fn mod_revision(key: impl Into<Bytes>) -> Comparison<i64> {
        let union = TargetUnion::ModRevision;
        Comparison { key: key.into(), target: CompareTarget::Mod, union }
    }

    /// The lease the key is attached to.
    pub fn lease(key: impl Into<Bytes>) -> Comparison<i64> {
        Comparison { key: key.into(), target: CompareTarget::Lease, union: TargetUnion::Lease }
    }
}

impl<T> Comparison<T> {
    /// It is this.
    pub fn equal(self, to: impl Into<T>) -> Compare {
        self.compare(CompareResult::Equal, to)
    }

    /// It is not this.
    pub fn not_equal(self, to: impl Into<T>) -> Compare {
        self.compare(CompareResult::NotEqual, to)
    }

    /// It is greater than this.
    pub fn greater(self, than: impl Into<T>) -> Compare {
        self.compare(CompareResult::Greater, than)
    }

    /// It is less than this.
    pub fn less(self, than: impl Into<T>) -> Compare {
        self.compare(CompareResult::Less, than)
    }

    fn compare(self, result: CompareResult, with: impl Into<T>) -> Compare {
        Compare(pb::Compare {
            result: result.into(),
            target: self.target.into(),
            key: self.key,
            target_union: Some((self.union)(with.into())),
            ..pb::Compare::default()
        })
    }
}

/// [`Client::watch`] and [`Client::watch_prefix`].
#[derive(Debug, Clone)]
#[must_use = "a request does nothing until it is awaited"]
pub struct Watch {
    engine: Engine,
    request: WatchCreateRequest,
}

impl Watch {
    /// Begins with the changes of this revision, in the past or in the future. 0, as without
    /// it, is the next one.
    pub fn start_revision(mut self, revision: i64) -> Watch {
        self.request.start_revision = revision;
        self
    }

    /// Gives with every event what the key was before.
    pub fn prev_kv(mut self) -> Watch {
        self.request.prev_kv = true;
        self
    }

    /// While nothing happens, tells every now and then (`--watch-progress-notify-interval`)
    /// how far the watch has come: as [`Changes`] without events.
    pub fn progress_notify(mut self) -> Watch {
        self.request.progress_notify = true;
        self
    }

    async fn run(self) -> Result<Watcher, Error> {
        let mut stream = self.engine.watch()?;
        let create =
            WatchRequest { request_union: Some(RequestUnion::CreateRequest(self.request)) };
        stream.requests.send(create).await.map_err(|_| Error::Stopped)?;
        let created = stream.responses.recv().await.ok_or(Error::Stopped)?;
        let revision = revision(created.header);
        Ok(Watcher { stream, revision, ready: VecDeque::new(), end: None, is_told: false })
    }
}

/// A watch that is under way: a [`Stream`], or [`Watcher::recv`]. Dropping it ends it.
///
/// It gets every change of its keys, in order and each once. One that is slow costs the
/// server a bounded queue; what does not fit is read from history later.
#[derive(Debug)]
pub struct Watcher {
    stream: WatchStream,
    revision: i64,
    ready: VecDeque<Changes>,
    end: Option<Error>,
    is_told: bool,
}

/// What one revision changed of the keys that are watched.
#[derive(Debug, Clone, PartialEq)]
pub struct Changes {
    /// The revision. All events up to it have been given, with these.
    pub revision: i64,
    /// The events; none in an answer to [`Watch::progress_notify`].
    pub events: Vec<Event>,
}

/// What happened to a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It was put.
    Put {
        /// What it is now.
        kv: KeyValue,
        /// What it was, if that was asked for and there was one.
        prev_kv: Option<KeyValue>,
    },
    /// It was deleted, by a request or by its lease.
    Delete {
        /// The key.
        key: Bytes,
        /// What it was, if that was asked for and is not compacted.
        prev_kv: Option<KeyValue>,
    },
}

impl Event {
    /// The key it happened to.
    pub fn key(&self) -> &Bytes {
        match self {
            Event::Put { kv, .. } => &kv.key,
            Event::Delete { key, .. } => key,
        }
    }

    /// The event, and its revision.
    fn decode(encoded: Bytes) -> Result<(i64, Event), Error> {
        let mvccpb::Event { r#type, kv, prev_kv } =
            mvccpb::Event::decode(encoded).map_err(|_| Error::Corrupt)?;
        let kv = kv.ok_or(Error::Corrupt)?;
        let revision = kv.mod_revision;
        let is_delete = r#type == i32::from(EventType::Delete);
        let event = if is_delete {
            Event::Delete { key: kv.key, prev_kv }
        } else {
            Event::Put { kv, prev_kv }
        };
        Ok((revision, event))
    }
}

impl Watcher {
    /// The newest revision when the watch began.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The next changes. Cancel-safe: a future that is dropped has taken nothing.
    ///
    /// # Errors
    /// The watch has ended, and says so every time: [`Error::Compacted`] when it was to begin
    /// in a past that is gone (read the keys again, and watch from the revision after);
    /// [`Error::Stopped`] with the server.
    pub async fn recv(&mut self) -> Result<Changes, Error> {
        poll_fn(|context| self.poll_recv(context)).await
    }

    fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Result<Changes, Error>> {
        loop {
            if let Some(changes) = self.ready.pop_front() {
                return Poll::Ready(Ok(changes));
            }
            if let Some(end) = &self.end {
                return Poll::Ready(Err(end.clone()));
            }
            let response = ready!(self.stream.responses.poll_recv(context));
            if let Err(end) = self.take(response) {
                self.end = Some(end);
            }
        }
    }

    /// Takes a response apart, which may have the events of several revisions.
    fn take(&mut self, response: Option<WatchResponse>) -> Result<(), Error> {
        let response = response.ok_or(Error::Stopped)?;
        if response.canceled {
            let is_compacted = response.compact_revision > 0;
            return Err(if is_compacted { Error::Compacted } else { Error::Stopped });
        }
        if response.events.is_empty() {
            let revision = revision(response.header);
            self.ready.push_back(Changes { revision, events: Vec::new() });
        }
        for encoded in response.events {
            let (revision, event) = Event::decode(encoded)?;
            match self.ready.back_mut().filter(|changes| changes.revision == revision) {
                Some(changes) => changes.events.push(event),
                None => self.ready.push_back(Changes { revision, events: vec![event] }),
            }
        }
        Ok(())
    }
}

/// Ends after the error that [`Watcher::recv`] would go on telling.
impl Stream for Watcher {
    type Item = Result<Changes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_told {
            return Poll::Ready(None);
        }
        let changes = ready!(self.poll_recv(context));
        self.is_told = changes.is_err();
        Poll::Ready(Some(changes))
    }
}

/// A lease: keys that are attached to it ([`Put::lease`]) are deleted when it ends.
///
/// It ends on the server, by time or by [`Lease::revoke`], and not because this is dropped.
#[derive(Debug, Clone)]
pub struct Lease {
    engine: Engine,
    id: i64,
    ttl_secs: i64,
}

/// What is left of a lease.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LeaseTimeToLive {
    /// Until it ends, in seconds, if nobody keeps it alive.
    pub ttl_secs: i64,
    /// What it was granted for, in seconds.
    pub granted_ttl_secs: i64,
    /// The keys that are attached to it, in order.
    pub keys: Vec<Bytes>,
}

impl Lease {
    /// The lease's id.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// What it was granted for, in seconds; 0 if it came from [`Client::lease`].
    pub fn ttl_secs(&self) -> i64 {
        self.ttl_secs
    }

    /// Begins its time anew, and says how many seconds that is. Every third of the time is
    /// often enough.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`] when it has ended, [`Error::NoLeader`].
    pub async fn keep_alive(&self) -> Result<i64, Error> {
        match self.engine.lease_keep_alive(self.id).await?.ttl {
            0 => Err(Error::LeaseNotFound),
            ttl => Ok(ttl),
        }
    }

    /// What is left of it.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`] when it has ended, [`Error::LeaderChanged`].
    pub async fn time_to_live(&self) -> Result<LeaseTimeToLive, Error> {
        let request = LeaseTimeToLiveRequest { id: self.id, keys: true };
        let response = self.engine.lease_time_to_live(request).await?;
        if response.ttl < 0 {
            return Err(Error::LeaseNotFound);
        }
        Ok(LeaseTimeToLive {
            ttl_secs: response.ttl,
            granted_ttl_secs: response.granted_ttl,
            keys: response.keys,
        })
    }

    /// Ends it, and deletes its keys in one revision, which it returns; with no keys, the
    /// newest.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`] when it has ended.
    pub async fn revoke(&self) -> Result<i64, Error> {
        let request = LeaseRevokeRequest { id: self.id };
        Ok(revision(self.engine.lease_revoke(request).await?.header))
    }
}

fn revision(header: Option<ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

/// What is stored was encoded by the server itself, so that it can be decoded.
fn key_value(encoded: Bytes) -> Result<KeyValue, Error> {
    KeyValue::decode(encoded).map_err(|_| Error::Corrupt)
}

fn key_values(encoded: Vec<Bytes>) -> Result<Vec<KeyValue>, Error> {
    encoded.into_iter().map(key_value).collect()
}
