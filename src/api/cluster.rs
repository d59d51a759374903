//! The Cluster service: who belongs to the cluster. Checks, their order and headers are the
//! [`Engine`]'s.

use tonic::{Request, Response, Status};

use super::status::status;
use crate::engine::Engine;
use crate::pb::etcdserverpb::{
    MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse, cluster_server,
};

pub(super) struct Cluster {
    engine: Engine,
}

impl Cluster {
    pub(super) fn new(engine: Engine) -> Cluster {
        Cluster { engine }
    }
}

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        self.engine.member_list(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        self.engine.member_add(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        self.engine.member_remove(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        self.engine.member_update(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        self.engine.member_promote(request.into_inner()).await.map(Response::new).map_err(status)
    }
}
