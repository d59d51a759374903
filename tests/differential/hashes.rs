//! `HashKV` is etcd's for the same operations: at every revision, after compactions at all kinds of
//! places (at a tombstone, behind it, at a version that was replaced), and after restarts.
//! `Hash` is of all that is stored, in etcd of its file, so it cannot be equal; it is answered.

use kvorum::pb::etcdserverpb as pb;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;

use crate::common::server::TestServer;
use crate::common::{judge, server};

/// What is done to both, one after the other.
#[derive(Debug, Clone, Copy)]
enum Step {
    Put(&'static str, &'static str),
    Leased(&'static str),
    Delete(&'static str),
    /// Everything from this key on.
    DeleteFrom(&'static str),
    /// A transaction that puts a key, deletes another, and puts a third.
    Txn,
    /// As of so many revisions ago.
    Compact(i64),
    Restart,
}

use Step::{Compact, Delete, DeleteFrom, Leased, Put, Restart, Txn};

const STEPS: &[Step] = &[
    Put("a", "1"),
    Put("a", "2"),
    Put("b", "1"),
    Delete("a"),
    // At the tombstone, which is kept, since it is what the key is as of that revision.
    Compact(0),
    Put("c", "1"),
    // Behind it.
    Compact(0),
    Put("a", "again"),
    Put("a", "and again"),
    Delete("b"),
    Leased("d"),
    Txn,
    // At a version that a later one has replaced, and before a tombstone.
    Compact(4),
    Restart,
    Put("a", "after the restart"),
    Compact(1),
    DeleteFrom("a"),
    // At a revision with several tombstones, and nothing else is left.
    Compact(0),
    Put("e", "1"),
    Compact(0),
    Restart,
    Delete("e"),
    Compact(0),
    Put("e", "2"),
];

impl Step {
    /// Returns the revision after it.
    async fn carry_out(self, server: &mut TestServer, newest: i64) -> i64 {
        let mut kv = KvClient::new(server.channel());
        let put = |key: &str, value: &str, lease| pb::PutRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            lease,
            ..pb::PutRequest::default()
        };
        let delete = |key: &str| pb::DeleteRangeRequest {
            key: key.to_owned().into(),
            ..pb::DeleteRangeRequest::default()
        };
        let header = match self {
            Put(key, value) => kv.put(put(key, value, 0)).await.unwrap().into_inner().header,
            Leased(key) => {
                let grant = pb::LeaseGrantRequest { ttl: 100_000, id: 42 };
                LeaseClient::new(server.channel()).lease_grant(grant).await.unwrap();
                kv.put(put(key, "leased", 42)).await.unwrap().into_inner().header
            }
            Delete(key) => kv.delete_range(delete(key)).await.unwrap().into_inner().header,
            DeleteFrom(key) => {
                let all = pb::DeleteRangeRequest { range_end: vec![0].into(), ..delete(key) };
                kv.delete_range(all).await.unwrap().into_inner().header
            }
            Txn => {
                use pb::request_op::Request::{RequestDeleteRange, RequestPut};
                let requests = [
                    RequestPut(put("x", "1", 0)),
                    RequestDeleteRange(delete("a")),
                    RequestPut(put("y", "1", 0)),
                ];
                let success = requests.map(|request| pb::RequestOp { request: Some(request) });
                let txn = pb::TxnRequest { success: success.into(), ..Default::default() };
                kv.txn(txn).await.unwrap().into_inner().header
            }
            Compact(ago) => {
                let request = pb::CompactionRequest { revision: newest - ago, physical: true };
                kv.compact(request).await.unwrap().into_inner().header
            }
            Restart => {
                server.kill();
                server.restart();
                return newest;
            }
        };
        header.unwrap().revision
    }
}

/// The answer at a revision, or the error.
async fn hash_at(server: &TestServer, revision: i64) -> Result<(u32, i64, i64), String> {
    let mut maintenance = MaintenanceClient::new(server.channel());
    let answer = maintenance.hash_kv(pb::HashKvRequest { revision }).await;
    let answer = answer.map_err(|status| format!("{:?} {}", status.code(), status.message()))?;
    let answer = answer.into_inner();
    Ok((answer.hash, answer.compact_revision, answer.hash_revision))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hash_kv_is_etcds_at_every_revision_after_compactions_and_restarts() {
    let Some(judges) = judge::find("the comparison of hashes") else { return };
    let mut etcd = TestServer::start(&judges.etcd, &[]);
    let mut kvorum = TestServer::start(&server::kvorum(), &[]);
    let (mut newest, mut compared) = (1, 0);
    // Their revisions, and whether the servers were restarted since.
    let mut compactions = Vec::new();
    for (number, step) in STEPS.iter().enumerate() {
        let revisions =
            (step.carry_out(&mut etcd, newest).await, step.carry_out(&mut kvorum, newest).await);
        assert_eq!(revisions.0, revisions.1, "step {number}, {step:?}");
        // At the revisions of compactions etcd remembers, across a restart, the hashes that were
        // made while it compacted (`hashkv-after-restart` in docs/compatibility.md).
        match step {
            Compact(ago) => compactions.push((newest - ago, false)),
            Restart => compactions.iter_mut().for_each(|(_, restarted)| *restarted = true),
            _ => {}
        }
        newest = revisions.0;
        for revision in 0..=newest + 1 {
            if compactions.contains(&(revision, true)) {
                continue;
            }
            let hashes = (hash_at(&etcd, revision).await, hash_at(&kvorum, revision).await);
            assert_eq!(hashes.0, hashes.1, "step {number}, {step:?}, revision {revision}");
            compared += usize::from(hashes.0.is_ok());
        }
    }
    assert!(compared > 80, "{compared} hashes were compared");
    for server in [&etcd, &kvorum] {
        let mut maintenance = MaintenanceClient::new(server.channel());
        let first = maintenance.hash(pb::HashRequest {}).await.unwrap().into_inner();
        assert_ne!(first.hash, 0);
        let second = maintenance.hash(pb::HashRequest {}).await.unwrap().into_inner();
        assert_eq!(first.hash, second.hash, "nothing has changed");
    }
}
