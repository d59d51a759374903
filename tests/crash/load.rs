//! Clients that write all the time and take down what they were told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvorum::pb::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::request_op::Request as Op;
use kvorum::pb::etcdserverpb::{
    CompactionRequest, Compare, DefragmentRequest, DeleteRangeRequest, HashKvRequest,
    LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader,
    TxnRequest, response_op::Response,
};
use kvorum::pb::mvccpb::KeyValue;
use prost::Message as _;
use tokio::task::{JoinError, JoinSet};
use tonic::Status;
use tonic::transport::Channel;

use crate::common::rng::Rng;
use crate::history::{Changes, History, PREFIX};
use crate::node::PATIENCE;

/// Clients that run at once.
const CLIENTS: usize = 6;
/// Keys they fight over.
const KEYS: usize = 40;
/// After an error a client goes on after this.
const RETRY: Duration = Duration::from_millis(2);
/// No lease expires during a test.
const TTL_SECS: i64 = 6000;

/// What a load consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mix {
    /// Everything, mostly small.
    Everything,
    /// Puts of this many bytes, and nothing that gives space back.
    Fill(usize),
}

/// Running clients. Dropping it stops them.
pub(crate) struct Load {
    clients: JoinSet<()>,
    finish: Arc<AtomicBool>,
}

impl Load {
    /// Starts clients whose writes follow from `rng`.
    pub(crate) fn start(
        channel: &Channel,
        history: &Arc<History>,
        mix: Mix,
        rng: &mut Rng,
    ) -> Load {
        let mut clients = JoinSet::new();
        let finish = Arc::new(AtomicBool::new(false));
        for _ in 0..CLIENTS {
            let client = Client {
                kv: KvClient::new(channel.clone()),
                leases: LeaseClient::new(channel.clone()),
                maintenance: MaintenanceClient::new(channel.clone()),
                history: Arc::clone(history),
                rng: Rng::new(rng.next()),
                mix,
            };
            clients.spawn(client.run(Arc::clone(&finish)));
        }
        Load { clients, finish }
    }

    /// Lets the clients wait for their last answers from a server that goes on. Panics
    /// like [`Load::stop`].
    pub(crate) async fn finish(mut self) {
        self.finish.store(true, Ordering::Relaxed);
        let finished = tokio::time::timeout(PATIENCE, async {
            while let Some(client) = self.clients.join_next().await {
                resume_panic(client);
            }
        });
        assert!(finished.await.is_ok(), "a request is not answered");
    }

    /// Stops the clients; what they are waiting for now is not acknowledged.
    ///
    /// # Panics
    ///
    /// If a client was told something that cannot be.
    pub(crate) async fn stop(mut self) {
        self.clients.abort_all();
        while let Some(client) = self.clients.join_next().await {
            resume_panic(client);
        }
    }
}

/// A panic of a client is the test's.
fn resume_panic(client: Result<(), JoinError>) {
    if let Err(error) = client
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

struct Client {
    kv: KvClient<Channel>,
    leases: LeaseClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
    history: Arc<History>,
    rng: Rng,
    mix: Mix,
}

impl Client {
    async fn run(mut self, finish: Arc<AtomicBool>) {
        while !finish.load(Ordering::Relaxed) {
            if self.step().await.is_err() {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn step(&mut self) -> Result<(), Status> {
        if let Mix::Fill(bytes) = self.mix {
            return self.put(bytes, false).await;
        }
        match self.rng.weighted(&[50, 12, 20, 10, 5, 5, 2, 2, 4, 1]) {
            0 => {
                let bytes = self.value_bytes();
                self.put(bytes, false).await
            }
            1 => {
                let bytes = self.value_bytes();
                self.put(bytes, true).await
            }
            2 => self.txn().await,
            3 => self.delete(false).await,
            4 => self.delete(true).await,
            5 => self.grant().await,
            6 => self.revoke().await,
            7 => self.compact().await,
            8 => self.read().await,
            _ => self.maintain().await,
        }
    }

    fn key(&mut self) -> Bytes {
        key(self.rng.below(KEYS))
    }

    /// Mostly little; sometimes more than the checkpoint keeps in one piece.
    fn value_bytes(&mut self) -> usize {
        let most = self.rng.pick(&[16, 16, 64, 64, 64, 512, 512, 4 << 10, 4 << 10, 100 << 10]);
        16 + self.rng.below(most)
    }

    /// A value nobody wrote before.
    fn value(&mut self, bytes: usize) -> Bytes {
        let mut value = format!("{:016x}", self.rng.next()).into_bytes();
        let filler = self.rng.next().to_le_bytes();
        while value.len() < bytes {
            value.extend_from_slice(&filler);
        }
        let value = Bytes::from(value);
        self.history.attempt(&value);
        value
    }

    fn put_request(&mut self, bytes: usize) -> PutRequest {
        PutRequest { key: self.key(), value: self.value(bytes), ..Default::default() }
    }

    async fn put(&mut self, bytes: usize, with_lease: bool) -> Result<(), Status> {
        let mut put = self.put_request(bytes);
        if with_lease {
            put.lease = self.history.a_lease(&mut self.rng).unwrap_or(0);
        }
        let changes = Changes::from([(put.key.clone(), Some(put.value.clone()))]);
        let floor = self.history.told();
        let told = self.kv.put(put).await?.into_inner();
        self.history.acknowledge(revision(&told.header), floor, changes);
        Ok(())
    }

    /// Writes two keys and deletes a third if a fourth exists, else writes one.
    async fn txn(&mut self) -> Result<(), Status> {
        let first = self.rng.below(KEYS);
        let [a, b, gone, compared] = [0, 1, 2, 3].map(|n| key((first + n * 7) % KEYS));
        let [new_a, new_b, other] = [0; 3].map(|_| {
            let bytes = self.value_bytes();
            self.value(bytes)
        });
        let put = |key: &Bytes, value: &Bytes| {
            let put = PutRequest { key: key.clone(), value: value.clone(), ..Default::default() };
            RequestOp { request: Some(Op::RequestPut(put)) }
        };
        let delete = DeleteRangeRequest { key: gone.clone(), ..Default::default() };
        let request = TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Greater as i32,
                target: CompareTarget::Mod as i32,
                key: compared,
                range_end: Bytes::new(),
                target_union: Some(TargetUnion::ModRevision(0)),
            }],
            success: vec![
                put(&a, &new_a),
                RequestOp { request: Some(Op::RequestDeleteRange(delete)) },
                put(&b, &new_b),
            ],
            failure: vec![put(&a, &other)],
        };
        let floor = self.history.told();
        let told = self.kv.txn(request).await?.into_inner();
        let mut changes = Changes::new();
        if told.succeeded {
            changes.insert(a, Some(new_a));
            changes.insert(b, Some(new_b));
            if let Some(Response::ResponseDeleteRange(deleted)) = &told.responses[1].response
                && deleted.deleted == 1
            {
                changes.insert(gone, None);
            }
        } else {
            changes.insert(a, Some(other));
        }
        self.history.acknowledge(revision(&told.header), floor, changes);
        Ok(())
    }

    async fn delete(&mut self, several: bool) -> Result<(), Status> {
        let first = self.rng.below(KEYS);
        let range_end = if several { key(first + 3) } else { Bytes::new() };
        let request = DeleteRangeRequest { key: key(first), range_end, prev_kv: true };
        let floor = self.history.told();
        let told = self.kv.delete_range(request).await?.into_inner();
        let changes = told.prev_kvs.into_iter().map(|kv| {
            let kv = KeyValue::decode(kv).expect("a key decodes");
            (kv.key, None)
        });
        self.history.acknowledge(revision(&told.header), floor, changes.collect());
        Ok(())
    }

    async fn grant(&mut self) -> Result<(), Status> {
        let id = self.rng.between(1, i64::MAX - 1);
        let told = self.leases.lease_grant(LeaseGrantRequest { ttl: TTL_SECS, id }).await?;
        self.history.tell(revision(&told.into_inner().header));
        self.history.granted(id);
        Ok(())
    }

    async fn revoke(&mut self) -> Result<(), Status> {
        let Some(id) = self.history.a_lease(&mut self.rng) else { return Ok(()) };
        self.history.ask_revoke(id);
        let told = self.leases.lease_revoke(LeaseRevokeRequest { id }).await?;
        self.history.tell(revision(&told.into_inner().header));
        self.history.revoked(id);
        Ok(())
    }

    /// Never beyond what the watcher has seen: it must be able to go on.
    async fn compact(&mut self) -> Result<(), Status> {
        let revision = self.history.seen() - self.rng.between(0, 40);
        if revision < 1 {
            return Ok(());
        }
        self.history.ask_compaction(revision);
        let physical = self.rng.chance(30);
        self.kv.compact(CompactionRequest { revision, physical }).await?;
        self.history.compacted(revision);
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Status> {
        let floor = self.history.told();
        let request = RangeRequest { key: self.key(), ..Default::default() };
        let told = self.kv.range(request).await?.into_inner();
        self.history.acknowledge(revision(&told.header), floor, Changes::new());
        let hash = self.maintenance.hash_kv(HashKvRequest { revision: 0 }).await?;
        self.history.hashed(hash.into_inner());
        Ok(())
    }

    async fn maintain(&mut self) -> Result<(), Status> {
        if self.rng.chance(20) {
            self.maintenance.defragment(DefragmentRequest {}).await?;
        }
        Ok(())
    }
}

fn key(number: usize) -> Bytes {
    Bytes::from(format!("{PREFIX}{number:04}"))
}

fn revision(header: &Option<ResponseHeader>) -> i64 {
    header.as_ref().expect("a header").revision
}
