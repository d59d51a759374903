//! gRPC's health checking protocol, as etcd offers it.
//!
//! One service is known, the empty name that means the whole server, and it is
//! serving as long as it answers at all: whether the member can serve reads and
//! writes is what `/readyz` and `/livez` say.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::until_stopped::UntilStopped;

use crate::pb::health::health_check_response::ServingStatus;
use crate::pb::health::{HealthCheckRequest, HealthCheckResponse, health_server};

pub(super) struct Health {
    stopping: watch::Receiver<bool>,
}

impl Health {
    /// `stopping` becomes true when the server begins to stop.
    pub(super) fn new(stopping: watch::Receiver<bool>) -> Health {
        Health { stopping }
    }
}

/// The status of `service`, if it is known.
fn serving(service: &str) -> Option<ServingStatus> {
    service.is_empty().then_some(ServingStatus::Serving)
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match serving(&request.into_inner().service) {
            Some(status) => Ok(Response::new(HealthCheckResponse { status: status.into() })),
            None => Err(Status::not_found("unknown service")),
        }
    }

    type WatchStream = UntilStopped<Statuses>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<UntilStopped<Statuses>>, Status> {
        let status =
            serving(&request.into_inner().service).unwrap_or(ServingStatus::ServiceUnknown);
        let statuses = Statuses(Some(status));
        Ok(Response::new(UntilStopped::new(statuses, self.stopping.clone())))
    }
}

/// The present status, and then nothing: it does not change while the server serves.
/// The stream stays open, because a client takes its end for a failure.
pub(super) struct Statuses(Option<ServingStatus>);

impl Stream for Statuses {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(status) => Poll::Ready(Some(Ok(HealthCheckResponse { status: status.into() }))),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::health_server::Health as _;
    use super::*;

    fn request(service: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: service.to_owned() })
    }

    #[tokio::test]
    async fn only_the_whole_server_is_known() {
        let (_stop, stopping) = watch::channel(false);
        let health = Health::new(stopping);
        let answer = health.check(request("")).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
        let refusal = health.check(request("etcdserverpb.KV")).await.unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::NotFound);
        assert_eq!(refusal.message(), "unknown service");
    }

    #[tokio::test]
    async fn watching_sends_the_status_once_and_stays_open() {
        let (_stop, stopping) = watch::channel(false);
        let health = Health::new(stopping);
        for (service, expected) in
            [("", ServingStatus::Serving), ("other", ServingStatus::ServiceUnknown)]
        {
            let mut stream = health.watch(request(service)).await.unwrap().into_inner();
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut stream).poll_next(&mut cx) {
                Poll::Ready(Some(Ok(answer))) => assert_eq!(answer.status(), expected),
                other => panic!("{other:?}"),
            }
            assert!(Pin::new(&mut stream).poll_next(&mut cx).is_pending());
        }
    }
}
