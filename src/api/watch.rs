//! The Watch service: a pump between a gRPC stream and the engine's.
//!
//! ```text
//! client ── requests ──> pump task ──> engine's watch stream (bounded queue)
//! client <─ responses ── Responses <── engine's watch stream (bounded queue)
//! ```
//!
//! What a watch means is the engine's business. Here only the stream's life is
//! decided, as etcd does it: a client that is done asking (half-close) keeps its
//! watches; a client that stops reading (the response stream is dropped) loses
//! them; a request that cannot be read ends the stream with the reason. A client
//! that reads slowly fills the engine's queue, which is the engine's to handle.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::status::status;
use crate::engine::{self, Engine, WatchStream};
use crate::error::Error;
use crate::pb::etcdserverpb::{WatchRequest, WatchResponse, watch_server};

pub(super) struct Watch {
    engine: Engine,
}

impl Watch {
    pub(super) fn new(engine: Engine) -> Watch {
        Watch { engine }
    }
}

#[tonic::async_trait]
impl watch_server::Watch for Watch {
    type WatchStream = Responses;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let stream = self.engine.watch().map_err(status)?;
        Ok(Response::new(Responses::new(request.into_inner(), stream)))
    }
}

/// One client's watch stream, the sending half.
pub(super) struct Responses {
    responses: engine::Responses,
    /// Why reading requests failed; `None` once reading has ended well.
    failure: Option<oneshot::Receiver<Status>>,
    pump: JoinHandle<()>,
}

impl Responses {
    fn new<S>(inbound: S, stream: WatchStream) -> Responses
    where
        S: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
    {
        let WatchStream { requests, responses } = stream;
        let (failed, failure) = oneshot::channel();
        let pump = tokio::spawn(pump(inbound, requests, failed));
        Responses { responses, failure: Some(failure), pump }
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Stream for Responses {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(failure) = &mut self.failure
            && let Poll::Ready(outcome) = Pin::new(failure).poll(cx)
        {
            self.failure = None;
            if let Ok(status) = outcome {
                return Poll::Ready(Some(Err(status)));
            }
        }
        // The engine ends a stream only when it stops. Unavailable makes etcd's
        // clients resume elsewhere; any other code would halt the watch.
        self.responses
            .poll_recv(cx)
            .map(|response| Some(response.ok_or_else(|| status(Error::Stopped))))
    }
}

/// Hands a client's requests on until it has no more.
async fn pump<S>(mut inbound: S, requests: engine::Requests, failed: oneshot::Sender<Status>)
where
    S: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    while let Some(request) = inbound.next().await {
        match request {
            // A request of a kind this version does not know: etcd ignores it too.
            Ok(WatchRequest { request_union: None }) => {}
            Ok(request) => {
                if requests.send(request).await.is_err() {
                    return;
                }
            }
            Err(status) => {
                // Nobody listens any more: then nobody misses it.
                let _ = failed.send(status);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::pb::etcdserverpb::watch_request::RequestUnion;
    use crate::pb::etcdserverpb::{ResponseHeader, WatchCancelRequest, WatchCreateRequest};
    use crate::runtime::watch_hub::{
        Compacted, Feed, History, HubHandle, Page, WatchConfig, WatchHub,
    };

    /// A store in which nothing ever happened.
    struct Empty;

    impl History for Empty {
        fn revision(&self) -> i64 {
            1
        }
        fn changes(&self, _: i64, _: usize, _: usize) -> Result<Page, Compacted> {
            Ok(Page { changes: Vec::new(), through: 1 })
        }
    }

    struct Rig {
        client: Option<mpsc::Sender<Result<WatchRequest, Status>>>,
        hub: HubHandle,
        stream: Responses,
        _feed: Feed,
    }

    fn rig() -> Rig {
        let header = |revision| ResponseHeader { revision, ..ResponseHeader::default() };
        let config = WatchConfig {
            progress_interval: Duration::from_secs(3600),
            max_request_bytes: 1 << 20,
            seed: 1,
        };
        let (task, hub, feed) = WatchHub::new(Empty, Arc::new(header), config);
        tokio::spawn(task.run());
        let (client, inbound) = mpsc::channel(4);
        let stream = Responses::new(ReceiverStream::new(inbound), hub.open_stream());
        Rig { client: Some(client), hub, stream, _feed: feed }
    }

    fn request(union: RequestUnion) -> WatchRequest {
        WatchRequest { request_union: Some(union) }
    }

    fn create() -> WatchRequest {
        let create = WatchCreateRequest { key: "k".into(), ..WatchCreateRequest::default() };
        request(RequestUnion::CreateRequest(create))
    }

    impl Rig {
        async fn send(&self, request: Result<WatchRequest, Status>) {
            self.client.as_ref().unwrap().send(request).await.unwrap();
        }

        /// Waits until the hub's streams are as many as given.
        async fn streams(&self, streams: usize) {
            while self.hub.stats().streams.load(std::sync::atomic::Ordering::Relaxed) != streams {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn half_close_keeps_the_watches_and_dropping_the_stream_ends_them() {
        let mut rig = rig();
        rig.send(Ok(create())).await;
        rig.client = None;
        while !rig.stream.pump.is_finished() {
            tokio::task::yield_now().await;
        }
        assert!(rig.stream.next().await.unwrap().unwrap().created);
        rig.streams(1).await;

        let Rig { stream, hub, client, _feed } = rig;
        drop(stream);
        let (_, inbound) = mpsc::channel(1);
        let other = Responses::new(ReceiverStream::new(inbound), hub.open_stream());
        Rig { client, hub, stream: other, _feed }.streams(1).await;
    }

    #[tokio::test]
    async fn unknown_requests_are_ignored() {
        let mut rig = rig();
        rig.send(Ok(WatchRequest { request_union: None })).await;
        rig.send(Ok(create())).await;
        let cancel = WatchCancelRequest { watch_id: 0 };
        rig.send(Ok(request(RequestUnion::CancelRequest(cancel)))).await;
        assert!(rig.stream.next().await.unwrap().unwrap().created);
        assert!(rig.stream.next().await.unwrap().unwrap().canceled);
    }

    #[tokio::test]
    async fn an_unreadable_request_ends_the_stream_with_the_reason() {
        let mut rig = rig();
        rig.send(Err(Status::resource_exhausted("too large"))).await;
        let end = rig.stream.next().await.unwrap().unwrap_err();
        assert_eq!((end.code(), end.message()), (tonic::Code::ResourceExhausted, "too large"));
    }

    #[tokio::test]
    async fn a_stopping_engine_makes_the_client_resume_elsewhere() {
        let mut rig = rig();
        rig.hub.close();
        let end = rig.stream.next().await.unwrap().unwrap_err();
        assert_eq!(end.code(), tonic::Code::Unavailable);
        assert_eq!(end.message(), "etcdserver: server stopped");
    }
}
