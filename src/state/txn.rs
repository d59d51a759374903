//! Carrying out ranges, puts, deletes and transactions, as etcd does.
//!
//! ```text
//! Txn ──▶ compares, nested ones included, against the state before ──▶ the path taken
//!     ──▶ its operations checked against the state before ──▶ an error: nothing happens
//!     ──▶ its operations carried out in order, each seeing the ones before it
//! ```
//!
//! After the check nothing can fail, so a transaction has all of its effects or none.
//! A request that did not pass [`super::check`] does no harm here either.
//!
//! Inner headers are as etcd's: range, put and delete responses carry the revision
//! alone, a nested transaction's header is there and empty. The caller fills the
//! outermost.
//!
//! A range over many keys holds up whoever waits for the store. [`RangeScan`] is a
//! range in steps: between two of them the store may move on, because all of them
//! read the same revision. The caller keeps that revision from being compacted away.
//! [`TxnScan`] is the same for a transaction that only reads.

use bytes::Bytes;
use prost::Message;

use super::check::{has_default_order, has_revision_filters};
use crate::error::Error;
use crate::lease::Lessor;
use crate::mvcc::{Change, KeyRange, RangeEnd, Store, Version, WriteTxn};
use crate::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::response_op::Response;
use crate::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};
use crate::pb::mvccpb::KeyValue;

/// How many changes since an older revision the store may go through to correct its
/// count of keys, before the keys are walked instead.
const COUNT_BUDGET: usize = 10_000;
/// How many keys a compare over a range looks at before it checks whether it failed.
const COMPARE_STEP_KEYS: usize = 256;
/// Rows held beyond a limit before a sorted range drops the ones that cannot win.
const SORT_SLACK_ROWS: usize = 1024;

/// Reading a store: as it is, or in the middle of a write.
///
/// `at` lies between [`Reads::compact_revision`] and [`Reads::revision`].
pub trait Reads {
    /// The newest revision there is to read, own changes included.
    fn revision(&self) -> i64;
    /// The oldest revision that is sure to be readable.
    fn compact_revision(&self) -> i64;
    /// The version of `key` at the newest revision.
    fn get(&self, key: &[u8]) -> Option<&Version>;
    /// Up to `max` live versions in the order of their keys, and the key to go on
    /// from when there may be more. Looks at `looked_max` keys at most, dead ones and
    /// ones of another time included.
    fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        looked_max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes>;
    /// How many keys are live as of `at`; `None` when that is too far back to tell
    /// without a walk.
    fn count(&self, range: &KeyRange, at: i64, budget: usize) -> Option<u64>;
}

/// Writing to a store. Reads see the writes.
pub trait Writes: Reads {
    /// Puts a key and returns the version before.
    fn put(&mut self, key: Bytes, value: Bytes, lease: i64) -> Option<Bytes>;
    /// Deletes keys and returns what they were, in the order of the keys.
    fn delete_range(&mut self, range: &KeyRange) -> Vec<Bytes>;
}

impl Reads for Store {
    fn revision(&self) -> i64 {
        self.revision()
    }

    fn compact_revision(&self) -> i64 {
        self.compact_revision()
    }

    fn get(&self, key: &[u8]) -> Option<&Version> {
        self.get(key, self.revision())
    }

    fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        looked_max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        self.scan_step(range, at, max, looked_max, visit)
    }

    fn count(&self, range: &KeyRange, at: i64, budget: usize) -> Option<u64> {
        self.count(range, at, budget)
    }
}

impl Reads for WriteTxn<'_> {
    fn revision(&self) -> i64 {
        self.read_revision()
    }

    fn compact_revision(&self) -> i64 {
        self.compact_revision()
    }

    fn get(&self, key: &[u8]) -> Option<&Version> {
        self.get(key)
    }

    /// Ranges of a write are not done in steps: `looked_max` does not matter.
    fn scan(
        &self,
        range: &KeyRange,
        at: i64,
        max: usize,
        _looked_max: usize,
        visit: &mut dyn FnMut(&[u8], &Version),
    ) -> Option<Bytes> {
        self.scan(range, at, max, visit)
    }

    fn count(&self, range: &KeyRange, at: i64, budget: usize) -> Option<u64> {
        self.count(range, at, budget)
    }
}

impl Writes for WriteTxn<'_> {
    fn put(&mut self, key: Bytes, value: Bytes, lease: i64) -> Option<Bytes> {
        self.put(key, value, lease)
    }

    fn delete_range(&mut self, range: &KeyRange) -> Vec<Bytes> {
        self.delete_range(range)
    }
}

/// Carries out a put. `lease_exists` says whether there is a lease of some id.
///
/// # Errors
/// `LeaseNotFound`, or `KeyNotFound` when the value or lease of a missing key is to be
/// kept. Nothing is changed then.
pub fn apply_put(
    store: &mut impl Writes,
    request: &PutRequest,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<PutResponse, Error> {
    check_put(store, request, lease_exists)?;
    Ok(put(store, request))
}

/// Carries out a delete. Nothing to delete is no error, and no new revision.
pub fn apply_delete_range(
    store: &mut impl Writes,
    request: &DeleteRangeRequest,
) -> DeleteRangeResponse {
    let range = KeyRange::from_wire(request.key.clone(), request.range_end.clone());
    let previous = store.delete_range(&range);
    DeleteRangeResponse {
        header: Some(revision_header(store.revision())),
        deleted: i64::try_from(previous.len()).unwrap_or(i64::MAX),
        prev_kvs: if request.prev_kv { previous } else { Vec::new() },
    }
}

/// Carries out a transaction.
///
/// # Errors
/// What an operation on the path taken finds wrong: a revision that is compacted or
/// in the future, a missing lease, a missing key whose value or lease is to be kept.
/// Nothing is changed then.
pub fn apply_txn(
    store: &mut impl Writes,
    request: &TxnRequest,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<TxnResponse, Error> {
    let path = choose(store, request);
    check_path(store, request, &path, lease_exists)?;
    let mut response = execute(store, request, &path);
    response.header = Some(revision_header(store.revision()));
    Ok(response)
}

/// Answers a range in one go.
///
/// # Errors
/// `Compacted` or `FutureRevision`.
pub fn range(store: &impl Reads, request: &RangeRequest) -> Result<RangeResponse, Error> {
    let scan = RangeScan::new(request.clone(), store.revision(), store.compact_revision())?;
    Ok(run(store, scan))
}

/// Brings the leases of keys up to date with what a write has changed.
pub fn attach_leases(lessor: &mut Lessor, changes: &[Change]) {
    for change in changes {
        if change.deleted {
            lessor.detach(&change.key);
        } else {
            attach_lease(lessor, &change.key, &change.kv);
        }
    }
}

/// Brings the lease of `key` up to date with its newest version `kv`.
pub fn attach_lease(lessor: &mut Lessor, key: &Bytes, kv: &Bytes) {
    // A put names a lease that exists, or it was refused. A record that names one
    // that does not is taken as having none.
    if lessor.attach(key, decode(kv).lease).is_err() {
        lessor.detach(key);
    }
}

/// What a [`RangeScan`] has to say after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take another step.
    More,
    /// Nothing is left to read: finish.
    Done,
}

/// A range in steps, all as of one revision.
///
/// Without a sort order of its own it stops when the limit is reached, provided that
/// the store knows the count; otherwise it goes through the whole range.
#[derive(Debug)]
pub struct RangeScan {
    /// What is left of the range.
    rest: KeyRange,
    at: i64,
    header_revision: i64,
    started: bool,
    done: bool,
    count: Count,
    rows: Rows,
}

/// How many keys the range has, whatever the limit and the filters.
#[derive(Debug)]
enum Count {
    Known(u64),
    /// Counted while going through the whole range.
    Walked(u64),
}

impl RangeScan {
    /// Begins a range on a store whose newest revision is `current_revision`: that is
    /// the revision of the header, and the one read unless the request names another.
    ///
    /// # Errors
    /// `Compacted` or `FutureRevision`.
    pub fn new(
        request: RangeRequest,
        current_revision: i64,
        compact_revision: i64,
    ) -> Result<RangeScan, Error> {
        if request.revision > current_revision {
            return Err(Error::FutureRevision);
        }
        let at = if request.revision <= 0 { current_revision } else { request.revision };
        if at < compact_revision {
            return Err(Error::Compacted);
        }
        Ok(RangeScan {
            rest: KeyRange::from_wire(request.key.clone(), request.range_end.clone()),
            at,
            header_revision: current_revision,
            started: false,
            done: false,
            count: Count::Walked(0),
            rows: Rows::new(request),
        })
    }

    /// The revision that is read. It must not be compacted away before the last step.
    pub fn at(&self) -> i64 {
        self.at
    }

    /// Goes on for at most `max_keys` keys (at least one), live or dead: that bounds
    /// the time it takes. The first step also counts, which may take a look at each of
    /// the last 10,000 changes.
    pub fn step(&mut self, store: &impl Reads, max_keys: usize) -> Step {
        if self.done {
            return Step::Done;
        }
        if !self.started {
            self.started = true;
            if (self.rows.request.count_only || self.rows.limit < usize::MAX)
                && let Some(count) = store.count(&self.rest, self.at, COUNT_BUDGET)
            {
                self.count = Count::Known(count);
            }
        }
        let known = matches!(self.count, Count::Known(_));
        let max = if known { self.rows.wanted() } else { usize::MAX };
        if max == 0 {
            self.done = true;
            return Step::Done;
        }
        let mut seen = 0_u64;
        let rows = &mut self.rows;
        let resume = store.scan(&self.rest, self.at, max, max_keys.max(1), &mut |_, version| {
            seen = seen.saturating_add(1);
            rows.offer(version);
        });
        if let Count::Walked(count) = &mut self.count {
            *count = count.saturating_add(seen);
        }
        match resume {
            Some(key) if !known || self.rows.wanted() > 0 => {
                self.rest.start = key;
                Step::More
            }
            _ => {
                self.done = true;
                Step::Done
            }
        }
    }

    /// Takes the rows found so far, to be sent ahead of the rest. Only for a range
    /// that passed [`super::check::check_range_stream`]; any other gives nothing until
    /// it is finished.
    pub fn take_kvs(&mut self) -> Vec<Bytes> {
        self.rows.take_kvs()
    }

    /// The response, after the last step.
    pub fn finish(self) -> RangeResponse {
        let count = match self.count {
            Count::Known(count) | Count::Walked(count) => count,
        };
        let (kvs, more) = self.rows.finish();
        RangeResponse {
            header: Some(revision_header(self.header_revision)),
            kvs,
            more,
            count: i64::try_from(count).unwrap_or(i64::MAX),
        }
    }
}

/// A transaction that [`super::check::is_txn_read_only`] lets by the log, in steps: all its
/// compares and ranges see the store as it is when the transaction begins.
#[derive(Debug)]
pub struct TxnScan {
    header_revision: i64,
    succeeded: bool,
    /// The ranges of the path taken.
    scans: Vec<RangeScan>,
}

impl TxnScan {
    /// Carries out the compares, in one go, and begins the ranges.
    ///
    /// # Errors
    /// A range of the path taken at a revision that is compacted or in the future.
    pub fn new(store: &impl Reads, request: &TxnRequest) -> Result<TxnScan, Error> {
        let path = choose(store, request);
        check_path(store, request, &path, &|_| true)?;
        let ranges = path.operations(request).iter().filter_map(|op| match &op.request {
            Some(Request::RequestRange(range)) => Some(begin_checked(store, range)),
            _ => None,
        });
        Ok(TxnScan {
            header_revision: store.revision(),
            succeeded: path.succeeded,
            scans: ranges.collect::<Result<_, _>>()?,
        })
    }

    /// The oldest revision that is read. It must not be compacted away before the last step.
    pub fn at(&self) -> i64 {
        self.scans.iter().map(RangeScan::at).min().unwrap_or(self.header_revision)
    }

    /// Goes on for about `max_keys` keys, of which every range that is not done gets an
    /// equal share; see [`RangeScan::step`].
    pub fn step(&mut self, store: &impl Reads, max_keys: usize) -> Step {
        let under_way = self.scans.iter().filter(|scan| !scan.done).count();
        let share = max_keys / under_way.max(1);
        let mut step = Step::Done;
        for scan in &mut self.scans {
            if scan.step(store, share) == Step::More {
                step = Step::More;
            }
        }
        step
    }

    /// The response, after the last step.
    pub fn finish(self) -> TxnResponse {
        let responses = self
            .scans
            .into_iter()
            .map(|scan| ResponseOp { response: Some(Response::ResponseRange(scan.finish())) });
        TxnResponse {
            header: Some(revision_header(self.header_revision)),
            succeeded: self.succeeded,
            responses: responses.collect(),
        }
    }
}

/// The rows of a range that may end up in the response.
#[derive(Debug)]
struct Rows {
    request: RangeRequest,
    /// The most rows to respond with; `usize::MAX` for no limit.
    limit: usize,
    order: Order,
    filtered: bool,
    /// Rows taken, including those that [`Rows::take_kvs`] has handed on.
    taken: usize,
    /// Without sorting: what to respond with, never more than `limit`.
    kvs: Vec<Bytes>,
    /// With sorting: what may still be among the first `limit` once all are known.
    ranked: Vec<Ranked>,
    more: bool,
}

/// How the rows of a response are ordered and cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As they come, by key. Everything beyond the limit can be left out at once.
    AsStored,
    /// `NONE` with a target: etcd takes one row more than the limit in the order of
    /// the keys, and sorts those.
    CutThenSort(SortTarget),
    /// Sorted, then cut.
    SortThenCut { target: SortTarget, descending: bool },
}

/// A row, with what it is sorted by.
#[derive(Debug)]
struct Ranked {
    number: i64,
    value: Bytes,
    kv: Bytes,
}

impl Rows {
    fn new(request: RangeRequest) -> Rows {
        let limit = match usize::try_from(request.limit) {
            Ok(limit) if limit > 0 => limit,
            _ => usize::MAX,
        };
        let filtered = has_revision_filters(&request);
        let target = SortTarget::try_from(request.sort_target).unwrap_or(SortTarget::Key);
        let descending = request.sort_order == SortOrder::Descend as i32;
        let order = if has_default_order(&request) {
            match target {
                SortTarget::Key => Order::AsStored,
                _ if filtered => Order::SortThenCut { target, descending: false },
                _ => Order::CutThenSort(target),
            }
        } else {
            Order::SortThenCut { target, descending }
        };
        Rows {
            request,
            limit,
            order,
            filtered,
            taken: 0,
            kvs: Vec::new(),
            ranked: Vec::new(),
            more: false,
        }
    }

    /// How many more keys it takes at most until the response is known but for its
    /// count; `usize::MAX` when that cannot be told.
    fn wanted(&self) -> usize {
        if self.request.count_only || self.more {
            return 0;
        }
        match self.order {
            Order::SortThenCut { .. } => usize::MAX,
            Order::AsStored | Order::CutThenSort(_) if self.limit == usize::MAX => usize::MAX,
            Order::AsStored if self.filtered => usize::MAX,
            // One beyond the limit tells that there is more.
            Order::AsStored | Order::CutThenSort(_) => {
                self.limit.saturating_add(1).saturating_sub(self.taken)
            }
        }
    }

    fn offer(&mut self, version: &Version) {
        if self.request.count_only || self.more || self.is_filtered_out(version) {
            return;
        }
        match self.order {
            Order::AsStored => {
                if self.taken == self.limit {
                    self.more = true;
                    return;
                }
                self.taken += 1;
                self.kvs.push(version.kv.clone());
            }
            Order::CutThenSort(target) => {
                self.taken += 1;
                self.ranked.push(Ranked::new(target, self.taken, version));
                self.more = self.taken > self.limit;
            }
            Order::SortThenCut { target, .. } => {
                self.taken = self.taken.saturating_add(1);
                self.ranked.push(Ranked::new(target, self.taken, version));
                let keep = self.limit.saturating_add(1);
                if self.ranked.len() >= keep.saturating_mul(2).saturating_add(SORT_SLACK_ROWS) {
                    self.sort();
                    self.ranked.truncate(keep);
                }
            }
        }
    }

    fn is_filtered_out(&self, version: &Version) -> bool {
        let request = &self.request;
        let outside = |revision: i64, min: i64, max: i64| {
            (min != 0 && revision < min) || (max != 0 && revision > max)
        };
        self.filtered
            && (outside(version.revision.main, request.min_mod_revision, request.max_mod_revision)
                || outside(
                    version.create_revision,
                    request.min_create_revision,
                    request.max_create_revision,
                ))
    }

    /// Equal rows stay in the order of their keys. (etcd leaves them in any order.)
    fn sort(&mut self) {
        let descending = matches!(self.order, Order::SortThenCut { descending: true, .. });
        self.ranked.sort_by(|left, right| {
            let ascending =
                left.number.cmp(&right.number).then_with(|| left.value.cmp(&right.value));
            if descending { ascending.reverse() } else { ascending }
        });
    }

    fn take_kvs(&mut self) -> Vec<Bytes> {
        let kvs = std::mem::take(&mut self.kvs);
        if self.request.keys_only { kvs.iter().map(without_value).collect() } else { kvs }
    }

    fn finish(mut self) -> (Vec<Bytes>, bool) {
        if self.order != Order::AsStored {
            self.sort();
            self.more = self.ranked.len() > self.limit;
            self.ranked.truncate(self.limit);
            self.kvs = std::mem::take(&mut self.ranked).into_iter().map(|row| row.kv).collect();
        }
        let kvs = self.take_kvs();
        (kvs, self.more)
    }
}

impl Ranked {
    /// `place` is the row's place in the order of the keys.
    fn new(target: SortTarget, place: usize, version: &Version) -> Ranked {
        let mut value = Bytes::new();
        let number = match target {
            SortTarget::Key => i64::try_from(place).unwrap_or(i64::MAX),
            SortTarget::Version => version.version,
            SortTarget::Create => version.create_revision,
            SortTarget::Mod => version.revision.main,
            SortTarget::Value => {
                value = decode(&version.kv).value;
                0
            }
        };
        Ranked { number, value, kv: version.kv.clone() }
    }
}

/// Which branches of a transaction run.
struct Path {
    succeeded: bool,
    /// Of the nested transactions in the branch taken, in their order.
    nested: Vec<Path>,
}

impl Path {
    fn operations<'a>(&self, request: &'a TxnRequest) -> &'a [RequestOp] {
        if self.succeeded { &request.success } else { &request.failure }
    }
}

fn choose(store: &impl Reads, request: &TxnRequest) -> Path {
    let succeeded = request.compare.iter().all(|compare| holds(store, compare));
    let mut path = Path { succeeded, nested: Vec::new() };
    path.nested = path
        .operations(request)
        .iter()
        .filter_map(|op| match &op.request {
            Some(Request::RequestTxn(txn)) => Some(choose(store, txn)),
            _ => None,
        })
        .collect();
    path
}

fn check_path(
    store: &impl Reads,
    request: &TxnRequest,
    path: &Path,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<(), Error> {
    let mut nested = path.nested.iter();
    for op in path.operations(request) {
        match &op.request {
            Some(Request::RequestRange(range)) => check_revision(store, range.revision)?,
            Some(Request::RequestPut(put)) => check_put(store, put, lease_exists)?,
            Some(Request::RequestTxn(txn)) => {
                if let Some(path) = nested.next() {
                    check_path(store, txn, path, lease_exists)?;
                }
            }
            Some(Request::RequestDeleteRange(_)) | None => {}
        }
    }
    Ok(())
}

/// Inside a transaction a negative revision is not "the newest": it has been
/// compacted, once anything has.
fn check_revision(store: &impl Reads, revision: i64) -> Result<(), Error> {
    if revision == 0 {
        Ok(())
    } else if revision > store.revision() {
        Err(Error::FutureRevision)
    } else if revision < store.compact_revision() {
        Err(Error::Compacted)
    } else {
        Ok(())
    }
}

fn check_put(
    store: &impl Reads,
    request: &PutRequest,
    lease_exists: &dyn Fn(i64) -> bool,
) -> Result<(), Error> {
    if request.lease != 0 && !lease_exists(request.lease) {
        return Err(Error::LeaseNotFound);
    }
    if (request.ignore_value || request.ignore_lease) && store.get(&request.key).is_none() {
        return Err(Error::KeyNotFound);
    }
    Ok(())
}

fn execute(store: &mut impl Writes, request: &TxnRequest, path: &Path) -> TxnResponse {
    let mut nested = path.nested.iter();
    let mut responses = Vec::with_capacity(path.operations(request).len());
    for op in path.operations(request) {
        let response = match &op.request {
            Some(Request::RequestRange(range)) => {
                Some(Response::ResponseRange(range_checked(store, range)))
            }
            Some(Request::RequestPut(request)) => Some(Response::ResponsePut(put(store, request))),
            Some(Request::RequestDeleteRange(delete)) => {
                Some(Response::ResponseDeleteRange(apply_delete_range(store, delete)))
            }
            Some(Request::RequestTxn(txn)) => {
                nested.next().map(|path| Response::ResponseTxn(execute(store, txn, path)))
            }
            None => None,
        };
        responses.push(ResponseOp { response });
    }
    TxnResponse { header: Some(ResponseHeader::default()), succeeded: path.succeeded, responses }
}

/// A put that has passed [`check_put`]. If the key it refers to was deleted since,
/// by the same transaction, there is no value and no lease left to be kept. (Only the
/// gaps of the duplicate check let that through; etcd crashes there.)
fn put(store: &mut impl Writes, request: &PutRequest) -> PutResponse {
    let mut value = request.value.clone();
    let mut lease = request.lease;
    if request.ignore_value || request.ignore_lease {
        let previous = store.get(&request.key);
        let previous = previous.map(|version| decode(&version.kv)).unwrap_or_default();
        if request.ignore_value {
            value = previous.value;
        }
        if request.ignore_lease {
            lease = previous.lease;
        }
    }
    let previous = store.put(request.key.clone(), value, lease);
    PutResponse {
        header: Some(revision_header(store.revision())),
        prev_kv: if request.prev_kv { previous.unwrap_or_default() } else { Bytes::new() },
    }
}

/// A range whose revision has passed [`check_revision`].
fn range_checked(store: &impl Reads, request: &RangeRequest) -> RangeResponse {
    begin_checked(store, request).map_or_else(|_| RangeResponse::default(), |scan| run(store, scan))
}

/// Begins a range whose revision has passed [`check_revision`]: that is no error.
fn begin_checked(store: &impl Reads, request: &RangeRequest) -> Result<RangeScan, Error> {
    // Without a compact revision nothing is refused, and a revision between -1 and
    // the newest was found readable.
    RangeScan::new(request.clone(), store.revision(), i64::MIN)
}

fn run(store: &impl Reads, mut scan: RangeScan) -> RangeResponse {
    while scan.step(store, usize::MAX) == Step::More {}
    scan.finish()
}

/// Whether a compare holds: for every key of its range, or for the one missing key
/// when there is none.
fn holds(store: &impl Reads, compare: &Compare) -> bool {
    let at = store.revision();
    let mut range = KeyRange::from_wire(compare.key.clone(), compare.range_end.clone());
    if range.end == RangeEnd::Single {
        return match store.get(&compare.key) {
            Some(version) => holds_for(compare, version),
            None => holds_for_missing(compare),
        };
    }
    let mut found = false;
    loop {
        let mut all = true;
        let resume = store.scan(&range, at, COMPARE_STEP_KEYS, usize::MAX, &mut |_, version| {
            found = true;
            all = all && holds_for(compare, version);
        });
        match resume {
            _ if !all => return false,
            Some(key) => range.start = key,
            None => return found || holds_for_missing(compare),
        }
    }
}

fn holds_for(compare: &Compare, version: &Version) -> bool {
    let ordering = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Value) => {
            let given = match &compare.target_union {
                Some(TargetUnion::Value(value)) => &value[..],
                _ => &[],
            };
            decode(&version.kv).value[..].cmp(given)
        }
        Ok(CompareTarget::Lease) => decode(&version.kv).lease.cmp(&given_number(compare)),
        Ok(CompareTarget::Create) => version.create_revision.cmp(&given_number(compare)),
        Ok(CompareTarget::Mod) => version.revision.main.cmp(&given_number(compare)),
        Ok(CompareTarget::Version) => version.version.cmp(&given_number(compare)),
        Err(_) => std::cmp::Ordering::Equal,
    };
    has_result(compare, ordering)
}

/// Every number of a missing key is 0. Its value is unlike any value, even in being
/// unlike: such a compare always fails.
fn holds_for_missing(compare: &Compare) -> bool {
    match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Value) => false,
        Ok(_) => has_result(compare, 0.cmp(&given_number(compare))),
        Err(_) => has_result(compare, std::cmp::Ordering::Equal),
    }
}

/// The number to compare with; 0 when it is absent or meant for another target.
fn given_number(compare: &Compare) -> i64 {
    match (CompareTarget::try_from(compare.target), &compare.target_union) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(number)))
        | (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(number)))
        | (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(number)))
        | (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(number))) => *number,
        _ => 0,
    }
}

fn has_result(compare: &Compare, ordering: std::cmp::Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Err(_) => true,
    }
}

fn revision_header(revision: i64) -> ResponseHeader {
    ResponseHeader { revision, ..ResponseHeader::default() }
}

/// A stored record. The store encoded it, or decoded it when it was read back from
/// disk, so it is well formed. Keys and values are handles into `kv`, not copies.
fn decode(kv: &Bytes) -> KeyValue {
    let record = KeyValue::decode(kv.clone());
    debug_assert!(record.is_ok(), "a stored record does not decode");
    record.unwrap_or_default()
}

/// A stored record but for its value. (etcd 3.7 loses the lease here too; up to 3.6
/// it does not, and neither does this.)
fn without_value(kv: &Bytes) -> Bytes {
    let record = KeyValue { value: Bytes::new(), ..decode(kv) };
    record.encode_to_vec().into()
}

#[cfg(test)]
mod tests;
