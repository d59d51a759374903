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
use crate::runtime::watch_hub;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::status::status;
use crate::engine::Engine;
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
        Ok(Response::new(Responses::new(request.into_inner(), stream.requests, stream.responses)))
    }
}

/// One client's watch stream, the sending half.
pub(super) struct Responses {
    responses: watch_hub::Responses,
    /// Kept so that the engine does not take a half-close for the end.
    _requests: watch_hub::Requests,
    /// Why reading requests failed; `None` once reading has ended well.
    failure: Option<oneshot::Receiver<Status>>,
    pump: JoinHandle<()>,
}

impl Responses {
    fn new<S>(
        inbound: S,
        requests: watch_hub::Requests,
        responses: watch_hub::Responses,
    ) -> Responses
    where
        S: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
    {
        let (failed, failure) = oneshot::channel();
        let pump = tokio::spawn(pump(inbound, requests.clone(), failed));
        Responses { responses, _requests: requests, failure: Some(failure), pump }
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
        self.responses.poll_recv(cx).map(|response| Some(response.ok_or(status(Error::Stopped))))
    }
}

/// Hands a client's requests on until it has no more.
async fn pump<S>(
    mut inbound: S,
    requests: watch_hub::Requests,
    failed: oneshot::Sender<Status>,
) where
    S: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    use tokio_stream::StreamExt as _;
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
    use tokio_stream::StreamExt as _;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::pb::etcdserverpb::WatchProgressRequest;
    use crate::pb::etcdserverpb::watch_request::RequestUnion;

    struct Rig {
        client: Option<mpsc::Sender<Result<WatchRequest, Status>>>,
        hub_requests: mpsc::Receiver<WatchRequest>,
        hub_responses: Option<mpsc::Sender<WatchResponse>>,
        stream: Responses,
    }

    fn rig() -> Rig {
        let (client, inbound) = mpsc::channel(4);
        let (requests, hub_requests) = mpsc::channel(4);
        let (hub_responses, responses) = mpsc::channel(4);
        let stream = Responses::new(ReceiverStream::new(inbound), requests, responses);
        Rig { client: Some(client), hub_requests, hub_responses: Some(hub_responses), stream }
    }

    fn progress() -> WatchRequest {
        let union = RequestUnion::ProgressRequest(WatchProgressRequest {});
        WatchRequest { request_union: Some(union) }
    }

    #[tokio::test]
    async fn half_close_keeps_the_watches_and_dropping_the_stream_ends_them() {
        let mut rig = rig();
        rig.client.as_ref().unwrap().send(Ok(progress())).await.unwrap();
        assert_eq!(rig.hub_requests.recv().await, Some(progress()));
        rig.client = None;
        while !rig.stream.pump.is_finished() {
            tokio::task::yield_now().await;
        }

        let answer = WatchResponse { watch_id: 7, ..WatchResponse::default() };
        rig.hub_responses.as_ref().unwrap().send(answer.clone()).await.unwrap();
        assert_eq!(rig.stream.next().await.unwrap().unwrap(), answer);
        assert!(rig.hub_requests.try_recv().is_err_and(|e| e == mpsc::error::TryRecvError::Empty));

        drop(rig.stream);
        rig.hub_responses.as_ref().unwrap().closed().await;
        assert_eq!(rig.hub_requests.recv().await, None);
    }

    #[tokio::test]
    async fn unknown_requests_are_ignored() {
        let mut rig = rig();
        let client = rig.client.as_ref().unwrap();
        client.send(Ok(WatchRequest { request_union: None })).await.unwrap();
        client.send(Ok(progress())).await.unwrap();
        assert_eq!(rig.hub_requests.recv().await, Some(progress()));
    }

    #[tokio::test]
    async fn an_unreadable_request_ends_the_stream_with_the_reason() {
        let mut rig = rig();
        let reason = Status::resource_exhausted("too large");
        rig.client.as_ref().unwrap().send(Err(reason)).await.unwrap();
        let end = rig.stream.next().await.unwrap().unwrap_err();
        assert_eq!((end.code(), end.message()), (tonic::Code::ResourceExhausted, "too large"));
    }

    #[tokio::test]
    async fn a_stopping_engine_makes_the_client_resume_elsewhere() {
        let mut rig = rig();
        rig.hub_responses = None;
        let end = rig.stream.next().await.unwrap().unwrap_err();
        assert_eq!(end.code(), tonic::Code::Unavailable);
        assert_eq!(end.message(), "etcdserver: server stopped");
    }
}
