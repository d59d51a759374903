//! The KV service: requests go to the [`Engine`] as they came, answers go out
//! as they are. Checks, order and headers are the engine's.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::status::status;
use crate::engine::Engine;
use crate::error::Error;
use crate::pb::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
    kv_server,
};

pub(super) struct Kv {
    engine: Engine,
}

impl Kv {
    pub(super) fn new(engine: Engine) -> Kv {
        Kv { engine }
    }
}

#[tonic::async_trait]
impl kv_server::Kv for Kv {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let request = request.into_inner();
        // The rest of what learners refuse is refused before it comes here.
        if self.engine.is_learner() && !request.serializable {
            return Err(status(Error::LearnerUnsupported));
        }
        self.engine.range(request).await.map(Response::new).map_err(status)
    }

    type RangeStreamStream = Chunks;

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Chunks>, Status> {
        let chunks = self.engine.range_stream(request.into_inner()).await.map_err(status)?;
        Ok(Response::new(Chunks(chunks)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.engine.put(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        self.engine.delete_range(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        self.engine.txn(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        self.engine.compact(request.into_inner()).await.map(Response::new).map_err(status)
    }
}

/// The chunks of a `RangeStream` as the engine makes them. The engine's queue
/// is bounded, so a slow reader slows the reading; a reader that goes away ends it.
pub(super) struct Chunks(mpsc::Receiver<Result<RangeStreamResponse, Error>>);

impl Stream for Chunks {
    type Item = Result<RangeStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|chunk| chunk.map_err(status)))
    }
}
