//! One watcher over all the server's lives: after each, it goes on where it stopped.

use std::sync::Arc;
use std::time::Duration;

use kvorum::pb::etcdserverpb::watch_client::WatchClient;
use kvorum::pb::etcdserverpb::{WatchCreateRequest, WatchRequest, watch_request::RequestUnion};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::history::History;

/// How soon a lost stream is opened again.
const RETRY: Duration = Duration::from_millis(5);

/// Watches everything from the revision after the last one seen, for ever: to be
/// spawned, and aborted at the end. Only a mistake of the server ends it, by a panic.
pub(crate) async fn follow(channel: Channel, history: Arc<History>) {
    loop {
        let _lost = follow_once(channel.clone(), &history).await;
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow_once(channel: Channel, history: &History) -> Result<(), tonic::Status> {
    let (requests, receiver) = mpsc::channel(1);
    let start_revision = history.seen() + 1;
    let create = WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision,
        prev_kv: true,
        ..Default::default()
    };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    requests.try_send(create).expect("the queue has room");
    let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
    let mut responses = client.watch(ReceiverStream::new(receiver)).await?.into_inner();
    while let Some(response) = responses.message().await? {
        assert!(
            response.compact_revision == 0,
            "cannot go on from {start_revision}: compacted at {}",
            response.compact_revision
        );
        if response.canceled {
            break;
        }
        history.observe(&response.events);
    }
    Ok(())
}
