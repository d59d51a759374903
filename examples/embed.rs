//! A server inside this program: no socket, no file, no other process.
//!
//! ```text
//! cargo run --example embed
//! ```
//!
//! `Config::in_memory()` forgets everything when the server stops. For data that stays, set
//! `data_dir` in a `Config`; everything else is the same.

#![allow(clippy::print_stdout, reason = "showing what happens is what this is for")]

use std::error::Error;

use kvorum::client::{Compare, Event};
use kvorum::{Config, Server};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::start(Config::in_memory()).await?;
    let client = server.client();
    for url in server.client_urls() {
        println!("etcd clients connect to {url}, and this program needs no socket");
    }

    // Put and get.
    let put = client.put("service/a", "10.0.0.1").await?;
    let found = client.get("service/a").await?.ok_or("it was put")?;
    println!("revision {}: {}", put.revision, show(&found.key, &found.value));

    // Watch what comes from here on.
    let mut watcher = client.watch_prefix("service/").start_revision(put.revision + 1).await?;

    // A transaction under a lease: register once, and only while this program lives.
    let lease = client.lease_grant(60).await?;
    let registered = client
        .txn()
        .when(Compare::create_revision("service/b").equal(0))
        .then(client.put("service/b", "10.0.0.2").lease(lease.id()))
        .otherwise(client.get("service/b"))
        .await?;
    println!("registered service/b: {}", registered.succeeded);
    println!("its lease is good for another {} s", lease.keep_alive().await?);

    // The lease ends, and its key with it.
    lease.revoke().await?;
    for _ in 0..2 {
        let changes = watcher.recv().await?;
        for event in changes.events {
            match event {
                Event::Put { kv, .. } => {
                    println!("revision {}: {}", changes.revision, show(&kv.key, &kv.value));
                }
                Event::Delete { key, .. } => {
                    println!("revision {}: {} deleted", changes.revision, key.escape_ascii());
                }
            }
        }
    }

    // Any client crate for etcd that is built on tonic can have a channel without a socket.
    let mut kv = kvorum::pb::etcdserverpb::kv_client::KvClient::new(server.channel());
    let range = kvorum::pb::etcdserverpb::RangeRequest {
        key: "service/".into(),
        range_end: "service0".into(),
        ..Default::default()
    };
    println!("{} key left", kv.range(range).await?.into_inner().count);

    server.shutdown().await?;
    Ok(())
}

fn show(key: &[u8], value: &[u8]) -> String {
    format!("{} = {}", key.escape_ascii(), value.escape_ascii())
}
