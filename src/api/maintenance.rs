//! The Maintenance service.
//!
//! Downgrading checks its arguments in etcd's words first and then says what this version
//! cannot do.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::status::status;
use crate::engine::{Engine, Snapshot};
use crate::error::Error;
use crate::pb::etcdserverpb::downgrade_request::DowngradeAction;
use crate::pb::etcdserverpb::{
    AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeRequest,
    DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest,
    MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
    maintenance_server,
};

pub(super) struct Maintenance {
    engine: Engine,
}

impl Maintenance {
    pub(super) fn new(engine: Engine) -> Maintenance {
        Maintenance { engine }
    }

    async fn change_version(&self, request: DowngradeRequest) -> Result<DowngradeResponse, Error> {
        let status = self.engine.status().await?;
        let cluster = Minor::parse(&status.version).ok_or(Error::WrongDowngradeVersionFormat)?;
        let response = DowngradeResponse { header: status.header, version: cluster.to_string() };
        let Ok(action) = DowngradeAction::try_from(request.action) else {
            return Err(Error::UnknownMethod);
        };
        // etcd answers a cancel like this also when there is nothing to cancel.
        if action == DowngradeAction::Cancel {
            return Ok(response);
        }
        let target = Minor::parse(&request.version).ok_or(Error::WrongDowngradeVersionFormat)?;
        if Some(target) != cluster.previous() {
            return Err(Error::InvalidDowngradeTargetVersion);
        }
        Err(Error::Unimplemented("kvorum: this version cannot downgrade its data"))
    }
}

/// A snapshot as it is made: a client that is slow makes it wait, one that goes away ends it.
pub(super) struct Blobs(Snapshot);

impl Stream for Blobs {
    type Item = Result<SnapshotResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_response(cx).map(|response| response.map(|response| response.map_err(status)))
    }
}

/// A version without its patch level: what a cluster's version is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Minor {
    major: u64,
    minor: u64,
}

impl Minor {
    /// Reads `major.minor` or a semantic version.
    fn parse(text: &str) -> Option<Minor> {
        let core = text.split(['-', '+']).next().unwrap_or_default();
        let is_core = core.len() == text.len();
        let numbers: Vec<u64> = core.split('.').map(number).collect::<Option<_>>()?;
        match *numbers.as_slice() {
            [major, minor, _patch] => Some(Minor { major, minor }),
            [major, minor] if is_core => Some(Minor { major, minor }),
            _ => None,
        }
    }

    /// The only version etcd downgrades to.
    fn previous(self) -> Option<Minor> {
        Some(Minor { minor: self.minor.checked_sub(1)?, ..self })
    }
}

/// A number as semantic versions write it: digits without leading zero.
fn number(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    (plain && (digits.len() == 1 || !digits.starts_with('0'))).then(|| digits.parse().ok())?
}

impl std::fmt::Display for Minor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[tonic::async_trait]
impl maintenance_server::Maintenance for Maintenance {
    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        self.engine.alarm(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.engine.status().await.map(Response::new).map_err(status)
    }

    async fn defragment(
        &self,
        _: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        self.engine.defragment().await.map(Response::new).map_err(status)
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        self.engine.hash().await.map(Response::new).map_err(status)
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        self.engine.hash_kv(request.into_inner()).await.map(Response::new).map_err(status)
    }

    type SnapshotStream = Blobs;

    async fn snapshot(
        &self,
        _: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let snapshot = self.engine.snapshot().map_err(status)?;
        Ok(Response::new(Blobs(snapshot)))
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        self.engine.move_leader(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        self.change_version(request.into_inner()).await.map(Response::new).map_err(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_etcd_reads_them() {
        let minor = |major, minor| Some(Minor { major, minor });
        for (text, version) in [
            ("3.6", minor(3, 6)),
            ("3.6.0", minor(3, 6)),
            ("3.6.14", minor(3, 6)),
            ("3.8.0-alpha.0", minor(3, 8)),
            ("3.8.0+build.5", minor(3, 8)),
            ("3.8.0-1.2.3", minor(3, 8)),
            ("3", None),
            ("", None),
            ("v3.6.0", None),
            ("3.6.0.1", None),
            ("3.06.0", None),
            ("3.x", None),
            ("3.6-alpha", None),
            ("3.+6", None),
            ("3..6", None),
        ] {
            assert_eq!(Minor::parse(text), version, "{text:?}");
        }
    }

    #[test]
    fn the_only_target_is_one_minor_below() {
        let version = Minor::parse("3.7.1").unwrap();
        assert_eq!(version.to_string(), "3.7");
        assert_eq!(version.previous(), Minor::parse("3.6"));
        assert_eq!(Minor::parse("4.0").unwrap().previous(), None);
    }
}
