//! Reading ranges: in one answer, as a stream of pieces, and for transactions that only
//! read.
//!
//! A long read goes on in steps. Each holds the state's lock for some thousand keys, and
//! between two of them others have their turn. All steps read the revision that the first
//! picked, which is pinned until the last, or until it has been for too long.

use std::time::Instant;

use tokio::sync::mpsc;

use super::Engine;
use crate::error::Error;
use crate::metrics::Op;
use crate::mvcc::Store;
use crate::pb::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse};
use crate::runtime::pins::Pin;
use crate::state::check;
use crate::state::txn::{RangeScan, Step};

/// Keys visited in one hold of the state's lock: well under a millisecond.
const KEYS_PER_STEP: usize = 4096;
/// Keys in the first message of a streamed range; etcd's value.
const STREAM_FIRST_KEYS: usize = 10;
/// Messages of a streamed range that wait for a slow client.
const STREAM_MESSAGES_MAX: usize = 4;

impl Engine {
    /// Reads a range as of one revision. Linearizable unless `serializable`.
    ///
    /// A long range is read in steps, between which writes go on.
    ///
    /// # Errors
    /// [`Error::Compacted`], [`Error::FutureRevision`], or a request etcd refuses.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        check::check_range(&request)?;
        let began = Instant::now();
        let answered = self.range_unchecked(request).await;
        let durations = &self.parts.metrics.server_request_duration_seconds;
        durations.observe(Op::Range, answered.is_ok(), began.elapsed());
        answered
    }

    async fn range_unchecked(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        self.before_read(request.serializable).await?;
        let began = Instant::now();
        let read = self.read_range(request).await;
        self.parts.metrics.server_range_duration_seconds.observe(read.is_ok(), began.elapsed());
        self.parts.metrics.mvcc_range_total.inc();
        let mut response = read?;
        self.complete(&mut response.header);
        Ok(response)
    }

    async fn read_range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        let begin =
            |store: &Store| RangeScan::new(request, store.revision(), store.compact_revision());
        let scan = self.scanned(begin, RangeScan::at, RangeScan::step).await?;
        Ok(scan.finish())
    }

    /// What `begin` gives for the present state, after all its steps. Between these writes
    /// go on; the revision that it reads `at` is pinned.
    pub(super) async fn scanned<S>(
        &self,
        begin: impl FnOnce(&Store) -> Result<S, Error>,
        at: fn(&S) -> i64,
        step: fn(&mut S, &Store, usize) -> Step,
    ) -> Result<S, Error> {
        let (mut scan, pin) = {
            let state = self.parts.state.read();
            let store = state.store();
            let mut scan = begin(store)?;
            if step(&mut scan, store, KEYS_PER_STEP) == Step::Done {
                return Ok(scan);
            }
            let pin = self.parts.pins.pin(at(&scan));
            (scan, pin)
        };
        loop {
            // Whoever waits for this thread goes first.
            tokio::task::yield_now().await;
            let state = self.parts.state.read();
            if pin.is_overdue() || pin.is_lost() {
                return Err(Error::Compacted);
            }
            if step(&mut scan, state.store(), KEYS_PER_STEP) == Step::Done {
                return Ok(scan);
            }
        }
    }

    /// Reads a range as of one revision, piece by piece. The last piece alone has the
    /// header, `more` and `count`; all of them merged are what [`Engine::range`] gives.
    ///
    /// Dropping the receiver ends the read.
    ///
    /// # Errors
    /// Like [`Engine::range`]; also for a sort order or filter, which a stream cannot
    /// have.
    pub async fn range_stream(
        &self,
        request: RangeRequest,
    ) -> Result<mpsc::Receiver<Result<RangeStreamResponse, Error>>, Error> {
        check::check_range_stream(&request)?;
        self.before_read(request.serializable).await?;
        let (pieces, receiver) = mpsc::channel(STREAM_MESSAGES_MAX);
        let (scan, pin) = {
            let state = self.parts.state.read();
            let store = state.store();
            let scan = RangeScan::new(request, store.revision(), store.compact_revision())?;
            let pin = self.parts.pins.pin(scan.at());
            (scan, pin)
        };
        tokio::spawn(self.clone().stream(scan, pin, pieces));
        Ok(receiver)
    }

    async fn stream(
        self,
        mut scan: RangeScan,
        pin: Pin,
        pieces: mpsc::Sender<Result<RangeStreamResponse, Error>>,
    ) {
        let piece = |response| RangeStreamResponse { range_response: Some(response) };
        let mut keys = STREAM_FIRST_KEYS;
        loop {
            let stepped = {
                let state = self.parts.state.read();
                (!pin.is_lost()).then(|| scan.step(state.store(), keys))
            };
            match stepped {
                Some(Step::Done) => break,
                Some(Step::More) => {}
                None => {
                    drop(pin);
                    let _ = pieces.send(Err(Error::Compacted)).await;
                    return;
                }
            }
            let kvs = scan.take_kvs();
            let bytes: usize = kvs.iter().map(bytes::Bytes::len).sum();
            if bytes < self.parts.limits.max_request_bytes / 2 {
                keys = (keys * 2).min(KEYS_PER_STEP);
            } else if bytes > self.parts.limits.max_request_bytes * 2 {
                keys = (keys / 2).max(1);
            }
            let is_sent = if kvs.is_empty() {
                // Whoever waits for this thread goes first.
                tokio::task::yield_now().await;
                true
            } else {
                let response = RangeResponse { kvs, ..RangeResponse::default() };
                let sent = pieces.send(Ok(piece(response)));
                // A client that does not read must not hold the pin.
                tokio::time::timeout_at(pin.deadline().into(), sent).await.is_ok()
            };
            // Nobody receives.
            if pieces.is_closed() {
                return;
            }
            if !is_sent || pin.is_overdue() {
                drop(pin);
                let _ = pieces.send(Err(Error::Compacted)).await;
                return;
            }
        }
        drop(pin);
        let mut last = scan.finish();
        self.complete(&mut last.header);
        let _ = pieces.send(Ok(piece(last))).await;
    }
}
