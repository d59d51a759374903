//! Someone else's etcd client, the crate `etcd-client`, against an embedded server: over a
//! channel without sockets, and over TCP.
//!
//! The client's message types were generated from etcd's own files, so that it agrees with
//! kvorum only where both agree with etcd.

#![cfg(test)]

use std::time::Duration;

use etcd_client::{
    Channel, Client, Compare, CompareOp, DeleteOptions, Error, EventType, GetOptions, LockOptions,
    ProclaimOptions, PutOptions, ResignOptions, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse,
    WatchOptions, WatchStream,
};
use kvorum::{Config, Server};

/// How long anything may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test with a client of each kind, each on a server of its own.
async fn with_clients<F: Future<Output = Result<(), Error>>>(test: impl Fn(Client) -> F) {
    for is_in_process in [true, false] {
        let server = Server::start(Config::in_memory()).await.unwrap();
        let client = if is_in_process {
            Client::from_channel(Channel::Tonic(server.channel()), None).await
        } else {
            Client::connect([server.client_urls()[0].as_str()], None).await
        };
        let tested = tokio::time::timeout(PATIENCE, test(client.unwrap())).await;
        let result = tested.unwrap_or_else(|_| panic!("took longer than {PATIENCE:?}"));
        result.unwrap_or_else(|error| panic!("in process: {is_in_process}: {error}"));
        let stopped = tokio::time::timeout(PATIENCE, server.shutdown()).await;
        stopped.expect("the server stops").unwrap();
    }
}

#[tokio::test]
async fn kv() {
    with_clients(|mut client| async move {
        client.put("a/1", "one", None).await?;
        let prev = PutOptions::new().with_prev_key();
        let put = client.put("a/1", "uno", Some(prev)).await?;
        assert_eq!(put.prev_key().unwrap().value(), b"one");
        for (key, value) in [("a/2", "due"), ("a/3", "tre"), ("b", "other")] {
            client.put(key, value, None).await?;
        }

        let newest = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(2);
        let got = client.get("a/", Some(newest)).await?;
        assert_eq!((got.count(), got.more()), (3, true));
        let keys: Vec<_> = got.kvs().iter().map(|kv| kv.key_str().unwrap()).collect();
        assert_eq!(keys, ["a/3", "a/2"]);
        assert_eq!(got.header().unwrap().revision(), 6);

        let past = client.get("a/1", Some(GetOptions::new().with_revision(2))).await?;
        assert_eq!(past.kvs()[0].value(), b"one");

        let mut kv = client.kv_client();
        let mut pieces = kv.get_stream("a/", Some(GetOptions::new().with_prefix())).await?;
        let mut streamed = 0;
        while let Some(piece) = pieces.message().await? {
            streamed += piece.kvs().len();
        }
        assert_eq!(streamed, 3);

        let prefix = DeleteOptions::new().with_prefix().with_prev_key();
        let deleted = client.delete("a/", Some(prefix)).await?;
        assert_eq!((deleted.deleted(), deleted.prev_kvs().len()), (3, 3));

        client.compact(6, None).await?;
        let compacted = client.get("a/1", Some(GetOptions::new().with_revision(2))).await;
        let Err(Error::GRpcStatus(status)) = compacted else { panic!("{compacted:?}") };
        assert_eq!(status.message(), "etcdserver: mvcc: required revision has been compacted");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn txn() {
    with_clients(|mut client| async move {
        let create = || {
            Txn::new()
                .when([Compare::create_revision("k", CompareOp::Equal, 0)])
                .and_then([TxnOp::put("k", "v", None), TxnOp::get("k", None)])
                .or_else([TxnOp::delete("k", None), TxnOp::txn(Txn::new().and_then([]))])
        };
        let first = client.txn(create()).await?;
        assert!(first.succeeded());
        let responses = first.op_responses();
        let [TxnOpResponse::Put(_), TxnOpResponse::Get(get)] = &responses[..] else {
            panic!("{responses:?}")
        };
        assert_eq!(get.kvs()[0].value(), b"v");

        let second = client.txn(create()).await?;
        assert!(!second.succeeded());
        let responses = second.op_responses();
        let [TxnOpResponse::Delete(delete), TxnOpResponse::Txn(inner)] = &responses[..] else {
            panic!("{responses:?}")
        };
        assert_eq!((delete.deleted(), inner.succeeded()), (1, true));
        Ok(())
    })
    .await;
}

/// The next events of a stream, as text.
async fn events(stream: &mut WatchStream) -> Result<Vec<String>, Error> {
    loop {
        let response = stream.message().await?.expect("the stream goes on");
        if response.events().is_empty() {
            continue;
        }
        let show = |event: &etcd_client::Event| {
            let kv = event.kv().unwrap();
            let prev = event.prev_kv().map_or("none", |prev| prev.value_str().unwrap());
            let kind = if event.event_type() == EventType::Put { "put" } else { "delete" };
            format!("{kind} {}={} was {prev}", kv.key_str().unwrap(), kv.value_str().unwrap())
        };
        return Ok(response.events().iter().map(show).collect());
    }
}

#[tokio::test]
async fn watch() {
    with_clients(|mut client| async move {
        let options = WatchOptions::new().with_prefix().with_prev_key();
        let mut stream = client.watch("w/", Some(options)).await?;
        client.put("w/1", "a", None).await?;
        assert_eq!(events(&mut stream).await?, ["put w/1=a was none"]);
        let both = [TxnOp::put("w/1", "b", None), TxnOp::put("w/2", "c", None)];
        client.txn(Txn::new().and_then(both)).await?;
        assert_eq!(events(&mut stream).await?, ["put w/1=b was a", "put w/2=c was none"]);
        client.delete("w/1", None).await?;
        assert_eq!(events(&mut stream).await?, ["delete w/1= was b"]);

        let past = WatchOptions::new().with_start_revision(2).with_watch_id(7);
        stream.watch("w/2", Some(past)).await?;
        assert_eq!(events(&mut stream).await?, ["put w/2=c was none"]);
        stream.cancel(7).await?;
        loop {
            let response = stream.message().await?.expect("the stream goes on");
            if response.canceled() {
                assert_eq!(response.watch_id(), 7);
                break;
            }
        }
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn lease() {
    with_clients(|mut client| async move {
        let id = client.lease_grant(60, None).await?.id();
        client.put("l", "v", Some(PutOptions::new().with_lease(id))).await?;
        let (mut keeper, mut stream) = client.lease_keep_alive(id).await?;
        keeper.keep_alive().await?;
        assert_eq!(stream.message().await?.unwrap().ttl(), 60);
        let left = client.lease_time_to_live(id, None).await?;
        assert_eq!(left.granted_ttl(), 60);
        assert_eq!(client.leases().await?.leases().len(), 1);
        client.lease_revoke(id).await?;
        assert_eq!(client.get("l", None).await?.count(), 0);
        assert!(client.lease_keep_alive(id).await.is_err(), "it has ended");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn lock() {
    with_clients(|mut client| async move {
        let first = client.lock("work", None).await?;
        let lease = client.lease_grant(60, None).await?.id();
        let waiting = {
            let mut client = client.clone();
            tokio::spawn(async move {
                client.lock("work", Some(LockOptions::new().with_lease(lease))).await
            })
        };
        // Until the second waits in line.
        while client.get("work/", Some(GetOptions::new().with_prefix())).await?.count() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(!waiting.is_finished(), "one holds it at a time");
        client.unlock(first.key()).await?;
        let second = waiting.await.unwrap()?;
        assert!(second.key().starts_with(b"work/"));
        client.lease_revoke(lease).await?;
        assert_eq!(client.get(second.key(), None).await?.count(), 0, "gone with its lease");
        client.lock("work", None).await?;
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn election() {
    with_clients(|mut client| async move {
        let lease = client.lease_grant(60, None).await?.id();
        let won = client.campaign("boss", "ann", lease).await?;
        let leader = won.leader().unwrap().clone();
        assert_eq!((leader.name(), leader.lease()), (&b"boss"[..], lease));
        let mut observed = client.observe("boss").await?;
        assert_eq!(observed.message().await?.unwrap().kv().unwrap().value(), b"ann");
        let options = ProclaimOptions::new().with_leader(leader.clone());
        client.proclaim("ann the great", Some(options)).await?;
        assert_eq!(observed.message().await?.unwrap().kv().unwrap().value(), b"ann the great");
        assert_eq!(client.leader("boss").await?.kv().unwrap().value(), b"ann the great");
        client.resign(Some(ResignOptions::new().with_leader(leader))).await?;
        assert!(client.leader("boss").await.is_err(), "there is none");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn maintenance_and_cluster() {
    with_clients(|mut client| async move {
        client.put("k", "v", None).await?;
        let status = client.status().await?;
        assert!(status.version().starts_with("3."), "{}", status.version());
        assert!(status.db_size() > 0 && status.raft_index() >= status.raft_applied_index());
        let members = client.member_list().await?;
        assert_eq!(members.members().len(), 1);
        assert_eq!(members.members()[0].id(), status.leader());
        let hash = client.hash_kv(0).await?;
        assert_eq!(hash.header().unwrap().revision(), 2);
        assert_eq!(client.hash_kv(2).await?.hash(), hash.hash());
        client.defragment().await?;
        assert_eq!(client.get("k", None).await?.kvs()[0].value(), b"v");
        Ok(())
    })
    .await;
}
