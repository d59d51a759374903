//! Calls that take long: others have their turn meanwhile, nobody waits longer or shorter
//! than with etcd, and who gives up leaves nothing behind.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::{CompactionRequest, RangeRequest, TxnRequest};
use kvorum::{Config, Engine, Error};

use crate::rig::*;

/// More than a read looks at in two steps.
const MANY: usize = 10_000;

async fn start_for_many() -> Rig {
    start_with(Config { max_txn_ops: MANY as u64, ..Config::in_memory() }).await
}

/// Puts keys that begin with `prefix`, all in one revision.
async fn put_many(rig: &Rig, prefix: &str, count: usize) {
    let success = (0..count).map(|number| put_op(&format!("{prefix}{number:06}"), "v")).collect();
    let request = TxnRequest { success, ..TxnRequest::default() };
    rig.server.engine().txn(request).await.unwrap();
}

/// How far a call gets without waiting for anybody.
async fn polled_once<F: Future>(mut call: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await
}

/// How many reads are under way.
fn readers(engine: &Engine) -> i64 {
    engine.refresh_metrics();
    engine.metrics().mvcc_db_open_read_transactions.get()
}

/// Begins a physical compaction that cannot end, because of a stream that nobody reads.
/// Returns once the cluster has answered it.
async fn stuck_compaction(
    rig: &Rig,
) -> (impl Sized + use<>, tokio::task::JoinHandle<Result<(), Error>>) {
    let engine = rig.server.engine().clone();
    put_many(rig, "k", 1000).await;
    let stream = engine.range_stream(list_request("k")).await.unwrap();
    rig.put("k000000", "w").await;
    let revision = rig.put("k000000", "x").await;
    let compaction = tokio::spawn({
        let engine = engine.clone();
        let request = CompactionRequest { revision, physical: true };
        async move { engine.compact(request).await.map(drop) }
    });
    let old = RangeRequest { revision: 2, ..get_request("k000000") };
    until("the compaction to be in force", async || {
        (engine.range(old.clone()).await == Err(Error::Compacted)).then_some(())
    })
    .await;
    until("the cluster's answer", async || {
        (engine.metrics().server_proposals_pending.get() == 0).then_some(())
    })
    .await;
    assert!(!compaction.is_finished(), "a reader needs what is to be removed");
    (stream, compaction)
}

#[tokio::test]
async fn a_physical_compaction_waits_for_readers_and_not_as_a_proposal() {
    let rig = start_for_many().await;
    let (stream, compaction) = stuck_compaction(&rig).await;
    drop(stream);
    assert_eq!(soon("the compaction", compaction).await.unwrap(), Ok(()));
    assert_eq!(rig.server.engine().metrics().server_proposals_failed_total.get(), 0);
}

#[tokio::test]
async fn a_physical_compaction_ends_with_the_server() {
    let rig = start_for_many().await;
    let (_stream, compaction) = stuck_compaction(&rig).await;
    soon("the server to stop", rig.server.shutdown()).await.unwrap();
    assert_eq!(soon("the compaction", compaction).await.unwrap(), Err(Error::Stopped));
}

#[test]
fn a_hash_is_of_the_moment_it_is_asked_for() {
    // The one thread that hashes is busy when the hash is asked for.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let rig = start().await;
        let engine = rig.server.engine();
        rig.put("k", "v").await;
        rig.grant(60).await;
        let before = engine.hash().await.unwrap().hash;
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || gate.recv());
        let mut hash = pin!(engine.hash());
        assert!(polled_once(hash.as_mut()).await.is_pending());
        assert_eq!(readers(engine), 1);
        rig.put("k", "w").await;
        let changed = rig.put("l", "v").await;
        rig.grant(60).await;
        rig.compact(changed).await.unwrap();
        go.send(()).unwrap();
        busy.await.unwrap().unwrap();
        assert_eq!(soon("the hash", hash).await.unwrap().hash, before);
        assert_ne!(engine.hash().await.unwrap().hash, before);
        assert_eq!(readers(engine), 0);
    });
}

#[tokio::test]
async fn a_streamed_range_that_finds_nothing_lets_others_go_on_and_ends_with_its_client() {
    let rig = start_for_many().await;
    let engine = rig.server.engine();
    let revision = rig.put("a", "v").await;
    put_many(&rig, "k", MANY).await;
    // None of them existed then.
    let request = RangeRequest { revision, ..list_request("k") };
    let stream = engine.range_stream(request.clone()).await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(readers(engine), 1, "under way");
    drop(stream);
    // Far fewer turns than it takes to the end.
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }
    assert_eq!(readers(engine), 0, "nobody receives");

    let mut stream = engine.range_stream(request).await.unwrap();
    let last = soon("the answer", stream.recv()).await.unwrap().unwrap().range_response.unwrap();
    assert_eq!((last.count, last.more), (0, false));
}

#[tokio::test]
async fn a_transaction_that_reads_much_lets_others_write_and_does_not_see_it() {
    let rig = start_for_many().await;
    let engine = rig.server.engine();
    put_many(&rig, "k", MANY).await;
    let before = rig.put("l", "1").await;
    let success =
        ["k", "l"].map(|prefix| RangeRequest { serializable: true, ..list_request(prefix) });
    let success = success.into_iter().map(|range| op(Op::RequestRange(range)));
    let request = TxnRequest { success: success.collect(), ..TxnRequest::default() };
    let mut txn = pin!(engine.txn(request));
    assert!(polled_once(txn.as_mut()).await.is_pending(), "others have their turn");
    rig.put("k000000", "2").await;
    let last = rig.put("l", "2").await;
    rig.compact(last).await.unwrap();
    let response = soon("the transaction", txn).await.unwrap();
    assert_eq!(response.header.as_ref().unwrap().revision, before);
    for (index, count) in [MANY, 1].into_iter().enumerate() {
        let range = range_of(&response, index);
        assert_eq!(range.header.as_ref().unwrap().revision, before);
        assert_eq!((range.count, range.kvs.len(), range.more), (count as i64, count, false));
        assert!(kvs(range).iter().all(|kv| kv.mod_revision <= before));
    }
    assert_eq!(readers(engine), 0);
}
