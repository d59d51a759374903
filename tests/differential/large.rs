//! Requests and answers at the size limits, which random small ones never reach.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, WatchResponse,
    watch_request::RequestUnion,
};
use prost::Message as _;
use serde_json::{Value, json};

use crate::common::{judge, server};
use crate::lockstep::{Mismatch, PATIENCE, Pair, Side, same};

const MIB: usize = 1 << 20;
/// The largest message a client sends and a fragment of events has.
const FRAGMENT_BYTES: usize = 2 * MIB;
/// Values of which five do not fit into one fragment.
const LARGE_BYTES: usize = 450_000;
const LARGE_VALUES: u8 = 12;
/// Those, and the two puts at the limit that are let through.
const EVENTS: usize = LARGE_VALUES as usize + 2;

fn put(key: u8, bytes: usize) -> Bytes {
    let put = PutRequest {
        key: vec![b'a' + key].into(),
        value: vec![b'x'; bytes].into(),
        ..Default::default()
    };
    put.encode_to_vec().into()
}

/// What a watcher from the first revision gets: all events, in responses that the
/// server may cut as it likes, but not larger than a fragment may be if it was
/// asked for fragments (an event alone may be larger).
async fn watched(side: &Side, fragment: bool) -> Value {
    let create = WatchCreateRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        start_revision: 2,
        fragment,
        ..Default::default()
    };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    let mut stream = side.client.open("etcdserverpb.Watch/Watch");
    let sent = stream.requests.send(create.encode_to_vec().into()).await;
    sent.expect("the stream takes requests");
    let mut sizes = Vec::new();
    let mut faults = Vec::new();
    while sizes.len() < EVENTS {
        let answer = tokio::time::timeout(PATIENCE, stream.responses.recv()).await;
        let Ok(Some(Ok(answer))) = answer else {
            faults.push(format!("no more: {answer:?}"));
            break;
        };
        let bytes = answer.len();
        let answer = WatchResponse::decode(answer).expect("a WatchResponse");
        sizes.extend(answer.events.iter().map(Bytes::len));
        if fragment && answer.events.len() > 1 && bytes > FRAGMENT_BYTES {
            faults.push(format!("a fragment has {bytes} bytes"));
        }
        if answer.fragment && !fragment {
            faults.push("a fragment that was not asked for".to_owned());
        }
    }
    json!({ "sizes": sizes, "faults": faults })
}

async fn compare(left: &Path, right: &Path) -> Result<(), Mismatch> {
    let mut pair = Pair::start((left, &[]), (right, &[])).await?;
    let method = "etcdserverpb.KV/Put";
    for bytes in [MIB, MIB * 3 / 2 - 200, MIB * 3 / 2 + 1, 2 * MIB - 20, 2 * MIB + 1, 3 * MIB] {
        let request = put(100, bytes);
        pair.call(method, request.clone(), request).await?;
    }
    for key in 0..LARGE_VALUES {
        let request = put(key, LARGE_BYTES);
        pair.call(method, request.clone(), request).await?;
    }
    for fragment in [true, false] {
        let (left, right) =
            tokio::join!(watched(&pair.left, fragment), watched(&pair.right, fragment));
        same(|| format!("a watch of large values, fragment {fragment}"), left, right)?;
    }
    let everything = RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        ..Default::default()
    };
    let request = everything.encode_to_vec().into();
    pair.execute(&crate::generate::Op::RangeStream { request }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_limited_as_etcd_limits_them() {
    let Some(judges) = judge::find("the differential of large values") else { return };
    let kvorum = server::kvorum();
    let compared = compare(&judges.etcd, &kvorum);
    let compared = tokio::time::timeout(Duration::from_secs(60), compared).await;
    if let Err(mismatch) = compared.expect("both servers answer") {
        let [left, right] = [mismatch.left, mismatch.right]
            .map(|side| side.to_string().chars().take(2_000).collect::<String>());
        let operation: String = mismatch.operation.chars().take(200).collect();
        panic!("{operation}\n  left:  {left}\n  right: {right}");
    }
}
