//! The Lease service.
//!
//! One of etcd's habits lives here: a keepalive stream answers its requests one by one,
//! in order, and the first that is refused ends it. That a lease which does not exist is
//! an answer and not an error (a TTL of 0 or -1) is the engine's doing.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::status::status;
use super::until_stopped::UntilStopped;
use crate::engine::Engine;
use crate::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, lease_server,
};

pub(super) struct Lease {
    engine: Engine,
}

impl Lease {
    pub(super) fn new(engine: Engine) -> Lease {
        Lease { engine }
    }
}

#[tonic::async_trait]
impl lease_server::Lease for Lease {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        self.engine.lease_grant(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        self.engine.lease_revoke(request.into_inner()).await.map(Response::new).map_err(status)
    }

    type LeaseKeepAliveStream =
        UntilStopped<Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let engine = self.engine.clone();
        let stopping = engine.stopping();
        let answers = request.into_inner().then(move |request| {
            let engine = engine.clone();
            async move { engine.lease_keep_alive(request?.id).await.map_err(status) }
        });
        Ok(Response::new(UntilStopped::new(Box::pin(answers), stopping)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        self.engine
            .lease_time_to_live(request.into_inner())
            .await
            .map(Response::new)
            .map_err(status)
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        self.engine.lease_leases(request.into_inner()).await.map(Response::new).map_err(status)
    }
}
