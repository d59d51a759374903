//! What a request must look like before it is proposed: etcd's validation.
//!
//! Everything here looks at the request alone. Whether a lease exists, or a revision
//! is still readable, depends on the state and is decided in [`super::txn`] when the
//! request is carried out.
//!
//! The interesting check is the one for duplicate keys. A transaction changes a key
//! at most once, so within one branch two puts must differ, and no put may fall into
//! a range that the branch deletes. Nested transactions belong to the branch they
//! stand in, but their own two branches exclude each other:
//!
//! ```text
//! success: put a, txn { success: put b   failure: put b }    fine: only one of the two runs
//! success: put a, txn { success: put a   failure:       }    duplicate key
//! success: delete [a, c), put b                              duplicate key
//! success: delete [a, c), delete b                           fine: the second finds nothing
//! ```
//!
//! Two gaps of etcd's check are kept, because clients can see them: a delete whose
//! `range_end` is `"\0"` (all keys from `key` on) collides with nothing, and a nested
//! transaction may delete what an *earlier* nested transaction of the same branch
//! has put. [`super::txn`] carries out both without harm.
//!
//! Cost: the smaller set of keys or intervals is always probed against, or poured
//! into, the larger one, so a request of `n` operations takes O(n log² n) however it
//! is nested.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Included, Unbounded};

use bytes::Bytes;

use crate::error::Error;
use crate::pb::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::pb::etcdserverpb::request_op::Request;
use crate::pb::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};

/// How deep transactions may nest. A decoder of protocol buffers goes 100 messages deep, two
/// for each transaction; in the log there is one more around them, so a transaction that
/// could just be read from the wire could not be read from the log.
pub const TXN_DEPTH_MAX: usize = 40;
/// What a stored key costs beyond its key and value, in bytes, in the eyes of the quota.
const KEY_OVERHEAD_BYTES: u64 = 256;
/// What a lease costs, in bytes, in the eyes of the quota.
pub const LEASE_COST_BYTES: u64 = 64;

/// Checks a range: a key, and sort options that exist.
pub fn check_range(request: &RangeRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err()
        || SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(Error::InvalidSortOption);
    }
    Ok(())
}

/// Checks a range that is to be streamed: ascending by key and without revision filters.
pub fn check_range_stream(request: &RangeRequest) -> Result<(), Error> {
    check_range(request)?;
    if !has_default_order(request) {
        return Err(Error::StreamSortUnsupported);
    }
    if has_revision_filters(request) {
        return Err(Error::StreamFilterUnsupported);
    }
    Ok(())
}

/// Checks a put: a key, and nothing given that is to be ignored.
pub fn check_put(request: &PutRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Error::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Error::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete: a key.
pub fn check_delete_range(request: &DeleteRangeRequest) -> Result<(), Error> {
    if request.key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

/// Checks a transaction with everything in it.
///
/// `max_ops` bounds the compares and the operations of each branch. A nested
/// transaction has what the one around it left over. [`TXN_DEPTH_MAX`] bounds how deep
/// they nest.
pub fn check_txn(request: &TxnRequest, max_ops: usize) -> Result<(), Error> {
    check_txn_ops(request, max_ops, TXN_DEPTH_MAX)?;
    branch_changes(&request.success)?;
    branch_changes(&request.failure)?;
    Ok(())
}

/// Whether a transaction can be answered without going through the log: every
/// operation of both branches is a range. A nested transaction never qualifies.
pub fn is_txn_read_only(request: &TxnRequest) -> bool {
    both_branches(request).all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

/// Whether a read-only transaction may be answered from this member's state as it
/// is: every range asks for that. One without any operation counts too, as in etcd,
/// although its compares then see the same possibly old state.
pub fn is_txn_serializable(request: &TxnRequest) -> bool {
    both_branches(request)
        .all(|op| matches!(&op.request, Some(Request::RequestRange(range)) if range.serializable))
}

/// Whether a transaction may need space: some branch, at any depth, contains a put.
/// Those are refused while the NOSPACE alarm is on.
pub fn txn_has_put(request: &TxnRequest) -> bool {
    txn_write_cost(request) > 0
}

/// What a put costs in the eyes of the quota, in bytes.
pub fn put_cost(request: &PutRequest) -> u64 {
    KEY_OVERHEAD_BYTES
        .saturating_add(request.key.len() as u64)
        .saturating_add(request.value.len() as u64)
}

/// What a transaction costs in the eyes of the quota, in bytes: its dearer branch.
pub fn txn_write_cost(request: &TxnRequest) -> u64 {
    let branch = |ops: &[RequestOp]| {
        ops.iter()
            .map(|op| match &op.request {
                Some(Request::RequestPut(put)) => put_cost(put),
                Some(Request::RequestTxn(txn)) => txn_write_cost(txn),
                Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => 0,
            })
            .fold(0, u64::saturating_add)
    };
    branch(&request.success).max(branch(&request.failure))
}

/// Whether the store's own order, ascending by key, may be cut off at `limit`. With
/// `NONE` that is so whatever the target: etcd sorts what the cut has left.
pub(crate) fn has_default_order(request: &RangeRequest) -> bool {
    request.sort_order == SortOrder::None as i32
        || (request.sort_order == SortOrder::Ascend as i32
            && request.sort_target == SortTarget::Key as i32)
}

/// Whether a range asks to leave out keys by their revisions.
pub(crate) fn has_revision_filters(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn both_branches(request: &TxnRequest) -> impl Iterator<Item = &RequestOp> {
    request.success.iter().chain(&request.failure)
}

/// Everything about a transaction but its duplicate keys. Recursion ends because
/// every level that contains another uses up at least one of `max_ops`.
fn check_txn_ops(request: &TxnRequest, max_ops: usize, depth_left: usize) -> Result<(), Error> {
    let widest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(budget) = max_ops.checked_sub(widest) else {
        return Err(Error::TooManyOps);
    };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Error::EmptyKey);
    }
    both_branches(request).try_for_each(|op| match &op.request {
        Some(Request::RequestRange(range)) => check_range(range),
        Some(Request::RequestPut(put)) => check_put(put),
        Some(Request::RequestDeleteRange(delete)) => check_delete_range(delete),
        Some(Request::RequestTxn(txn)) => {
            check_txn_ops(txn, budget, depth_left.checked_sub(1).ok_or(Error::TooManyOps)?)
        }
        None => Err(Error::KeyNotFound),
    })
}

/// What the operations of one branch, at any depth, may change.
#[derive(Default)]
struct Changes<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Intervals,
}

/// Collects what a branch changes, or finds that it changes a key twice.
fn branch_changes(ops: &[RequestOp]) -> Result<Changes<'_>, Error> {
    let mut all = Changes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            all.deletes.insert_wire(&delete.key, &delete.range_end);
        }
    }
    for op in ops {
        let Some(Request::RequestTxn(txn)) = &op.request else { continue };
        // Only one of the two will run, so they are compared with everything
        // before them but not with each other.
        let success = branch_changes(&txn.success)?;
        let failure = branch_changes(&txn.failure)?;
        for nested in [&success, &failure] {
            if !disjoint(&all.puts, &nested.puts) || all.deletes.intersects(&nested.puts) {
                return Err(Error::DuplicateKey);
            }
        }
        for nested in [success, failure] {
            absorb(&mut all.puts, nested.puts);
            all.deletes.absorb(nested.deletes);
        }
    }
    for op in ops {
        let Some(Request::RequestPut(put)) = &op.request else { continue };
        if all.deletes.contains(&put.key) || !all.puts.insert(&put.key) {
            return Err(Error::DuplicateKey);
        }
    }
    Ok(all)
}

/// `BTreeSet::is_disjoint` walks both sets; this walks the smaller one only.
fn disjoint(left: &BTreeSet<&[u8]>, right: &BTreeSet<&[u8]>) -> bool {
    let (small, large) = if left.len() < right.len() { (left, right) } else { (right, left) };
    !small.iter().any(|key| large.contains(key))
}

/// `into` becomes the union of both, for the price of the smaller one.
fn absorb<'a>(into: &mut BTreeSet<&'a [u8]>, mut other: BTreeSet<&'a [u8]>) {
    if into.len() < other.len() {
        std::mem::swap(into, &mut other);
    }
    into.extend(other);
}

/// A set of keys given as intervals, start (included) to end (excluded). What is
/// held neither overlaps nor touches, so one look to the left finds the interval
/// that could contain a key.
#[derive(Default)]
struct Intervals(BTreeMap<Bytes, Bytes>);

impl Intervals {
    /// Adds the keys that a delete names. An empty `range_end` means just `key`. The
    /// `range_end` `"\0"` is taken to the letter, as in etcd, and holds no key.
    fn insert_wire(&mut self, key: &Bytes, range_end: &Bytes) {
        if range_end.is_empty() {
            let mut next = Vec::with_capacity(key.len() + 1);
            next.extend_from_slice(key);
            next.push(0);
            self.insert(key.clone(), next.into());
        } else if key < range_end {
            self.insert(key.clone(), range_end.clone());
        }
    }

    fn insert(&mut self, mut start: Bytes, mut end: Bytes) {
        // Every interval taken out here was put in once: amortized O(log n).
        while let Some((at, until)) = self.0.range::<Bytes, _>(..=&end).next_back() {
            if *until < start {
                break;
            }
            if *until > end {
                end = until.clone();
            }
            let at = at.clone();
            self.0.remove(&at);
            if at < start {
                start = at;
            }
        }
        self.0.insert(start, end);
    }

    fn contains(&self, key: &[u8]) -> bool {
        self.0
            .range::<[u8], _>((Unbounded, Included(key)))
            .next_back()
            .is_some_and(|(_, end)| key < &end[..])
    }

    fn intersects(&self, keys: &BTreeSet<&[u8]>) -> bool {
        if keys.len() <= self.0.len() {
            return keys.iter().any(|key| self.contains(key));
        }
        self.0.iter().any(|(start, end)| {
            keys.range::<[u8], _>((Included(&start[..]), Excluded(&end[..]))).next().is_some()
        })
    }

    fn absorb(&mut self, mut other: Intervals) {
        if self.0.len() < other.0.len() {
            std::mem::swap(self, &mut other);
        }
        for (start, end) in other.0 {
            self.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests;
