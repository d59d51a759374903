//! The peers' port: what other members call, and two pages for tools.
//!
//! ```text
//! gRPC kvorumpb.Peer ─▶ is it for us, from one of us? ─▶ net::Receiver
//! GET /version, /members
//! ```
//!
//! Everything but `Members` and the pages is refused to callers that belong to another cluster,
//! mean another member ([`crate::net::identity`]), or were removed. A refusal says what to change,
//! since it ends up in the log of a member that cannot join.
//!
//! Raft's messages, and commands for the leader, are handed to the receiver as they come, a batch
//! at a time, within the task of their connection; a member that was removed hears of it as soon
//! as it sends again.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::Router;
use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse as _, Response as HttpResponse};
use axum::routing::any;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tonic::server::NamedService as _;
use tonic::{Request, Response, Status, Streaming};

use super::http::{JSON, Versions, method_not_allowed, not_found, version_answer};
use super::status::status;
use super::until_stopped::UntilStopped;
use crate::engine::Limits;
use crate::error::Error;
use crate::metrics::{Metrics, PeerMetrics};
use crate::net::identity::Named;
use crate::net::pull::ImageChunks;
use crate::net::{Receiver, Refusals, SnapshotReplies, refusal};
use crate::pb::etcdserverpb::{
    HashKvRequest, HashKvResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, MemberPromoteRequest, MemberPromoteResponse,
};
use crate::pb::kvorumpb::peer_server::{self, PeerServer};
use crate::pb::kvorumpb::{
    MembersRequest, MembersResponse, Proposal, PullImageRequest, RaftMessages, RaftMessagesReply,
    Refusal, RollingHashesRequest, RollingHashesResponse, SnapshotChunk,
};

/// Room in a message for what raft puts around an entry, and for several small ones, in bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 4 * 1024 * 1024;

/// Refusals of commands in one reply; further ones are in the next.
const REFUSALS_MAX: usize = 1024;

/// Callers whose bytes are counted; those of further ones are not. Callers name themselves.
const MAX_COUNTED_PEERS: usize = 64;

const CLUSTER_ID: HeaderName = HeaderName::from_static("x-etcd-cluster-id");

/// The largest message a member may send, in bytes.
pub fn max_peer_message_bytes(limits: &Limits) -> usize {
    limits.max_request_bytes.saturating_add(MESSAGE_OVERHEAD_BYTES)
}

/// What the peers' port serves. Streams end when `stopping` becomes true.
pub fn peer_router(
    receiver: Arc<dyn Receiver>,
    metrics: Arc<Metrics>,
    versions: impl Fn() -> Versions + Send + Sync + 'static,
    max_message_bytes: usize,
    stopping: watch::Receiver<bool>,
) -> Router {
    let counted = Mutex::default();
    let peer = Peer { receiver: Arc::clone(&receiver), metrics, counted, stopping };
    let grpc = PeerServer::new(peer).max_decoding_message_size(max_message_bytes);
    let versions: Arc<dyn Fn() -> Versions + Send + Sync> = Arc::new(versions);
    Router::new()
        .route_service(&format!("/{}/{{method}}", PeerServer::<Peer>::NAME), grpc)
        .route("/members", any(members).with_state(receiver))
        .route("/version", any(version).with_state(versions))
        .fallback(not_found)
}

async fn version(
    State(versions): State<Arc<dyn Fn() -> Versions + Send + Sync>>,
    request: HttpRequest,
) -> HttpResponse {
    match *request.method() {
        Method::GET => version_answer(versions()),
        _ => method_not_allowed(),
    }
}

/// The members as etcd's peers list them.
async fn members(State(receiver): State<Arc<dyn Receiver>>, request: HttpRequest) -> HttpResponse {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let MembersResponse { cluster_id, mut members } = match receiver.members(false).await {
        Ok(members) => members,
        Err(error) => return (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    };
    members.sort_by_key(|member| member.id);
    let list: serde_json::Value = members
        .into_iter()
        .map(|member| {
            let mut fields = serde_json::Map::new();
            fields.insert("id".to_owned(), member.id.into());
            fields.insert("peerURLs".to_owned(), member.peer_urls.into());
            // What is empty is left out, as etcd does.
            if member.is_learner {
                fields.insert("isLearner".to_owned(), true.into());
            }
            if !member.name.is_empty() {
                fields.insert("name".to_owned(), member.name.into());
            }
            if !member.client_urls.is_empty() {
                fields.insert("clientURLs".to_owned(), member.client_urls.into());
            }
            serde_json::Value::from(fields)
        })
        .collect();
    let cluster_id = [(CLUSTER_ID, format!("{cluster_id:x}"))];
    (cluster_id, [(CONTENT_TYPE, JSON)], format!("{list}\n")).into_response()
}

struct Peer {
    receiver: Arc<dyn Receiver>,
    metrics: Arc<Metrics>,
    /// The callers whose bytes are counted.
    counted: Mutex<BTreeSet<u64>>,
    stopping: watch::Receiver<bool>,
}

impl Peer {
    /// The caller, if this member talks to it.
    fn caller<T>(&self, request: &Request<T>) -> Result<u64, Status> {
        let Some(named) = Named::read(request.metadata()) else {
            return Err(Status::invalid_argument(
                "kvorum: the call does not say who calls whom: this port is for the members of \
                 the cluster, clients use --listen-client-urls",
            ));
        };
        let own = self.receiver.identity();
        if named.cluster_id != own.cluster_id {
            return Err(Status::failed_precondition(format!(
                "kvorum: cluster ID mismatch: member {:x} belongs to cluster {:x}, the caller \
                 {:x} to {:x}: check that --initial-cluster-token and --initial-cluster are the \
                 same on all members, and that --data-dir is not of another cluster",
                own.member_id, own.cluster_id, named.from, named.cluster_id
            )));
        }
        if self.receiver.is_removed(named.from) {
            return Err(refusal::removed());
        }
        if named.to != own.member_id {
            return Err(Status::failed_precondition(format!(
                "kvorum: member ID mismatch: this is member {:x}, the caller {:x} means {:x}: \
                 check the peer URLs of the members (etcdctl member list) and, if the data of a \
                 member is lost, remove it and add it anew",
                own.member_id, named.from, named.to
            )));
        }
        Ok(named.from)
    }

    fn counters(&self, from: u64) -> Option<PeerMetrics> {
        let mut counted = self.counted.lock();
        if !counted.contains(&from) && counted.len() >= MAX_COUNTED_PEERS {
            return None;
        }
        counted.insert(from);
        Some(self.metrics.peer(self.receiver.identity().member_id, from))
    }
}

/// Raft's messages of one connection. As a stream, it is the refusals of commands and the answers
/// to probes: asking it for one takes all messages that come before.
struct Messages {
    incoming: Streaming<RaftMessages>,
    from: u64,
    receiver: Arc<dyn Receiver>,
    counters: Option<PeerMetrics>,
    /// Until the last message has come.
    refusals: Option<Refusals>,
    refused: mpsc::UnboundedReceiver<Refusal>,
}

impl Messages {
    fn take(&self, messages: Vec<Bytes>, proposals: Vec<Proposal>) {
        if let Some(counters) = &self.counters {
            let commands = proposals.iter().map(|proposal| proposal.command.len());
            let bytes: usize = messages.iter().map(Bytes::len).chain(commands).sum();
            counters.received_bytes.inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
        if !messages.is_empty() {
            self.receiver.messages(self.from, messages);
        }
        if let Some(refusals) = &self.refusals
            && !proposals.is_empty()
        {
            self.receiver.propose(proposals, refusals);
        }
    }
}

impl Stream for Messages {
    type Item = Result<RaftMessagesReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let mut refusals = Vec::new();
            match self.refused.poll_recv_many(context, &mut refusals, REFUSALS_MAX) {
                // Nothing comes any more, and all is decided that came.
                Poll::Ready(0) => return Poll::Ready(None),
                Poll::Ready(_) => {
                    return Poll::Ready(Some(Ok(RaftMessagesReply { probe: 0, refusals })));
                }
                Poll::Pending if self.refusals.is_none() => return Poll::Pending,
                Poll::Pending => {}
            }
            let RaftMessages { messages, probe, proposals } =
                match ready!(Pin::new(&mut self.incoming).poll_next(context)) {
                    None => {
                        self.refusals = None;
                        continue;
                    }
                    Some(Ok(batch)) => batch,
                    Some(Err(status)) => {
                        if let Some(counters) = &self.counters {
                            counters.received_failures.inc();
                        }
                        return Poll::Ready(Some(Err(status)));
                    }
                };
            if self.receiver.is_removed(self.from) {
                return Poll::Ready(Some(Err(refusal::removed())));
            }
            self.take(messages, proposals);
            if probe != 0 {
                let refusals = Vec::new();
                return Poll::Ready(Some(Ok(RaftMessagesReply { probe, refusals })));
            }
        }
    }
}

fn answer<T>(result: Result<T, Error>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(status)
}

#[tonic::async_trait]
impl peer_server::Peer for Peer {
    type MessagesStream = UntilStopped<Messages>;
    type SnapshotStream = SnapshotReplies;
    type PullImageStream = UntilStopped<ImageChunks>;

    async fn messages(
        &self,
        request: Request<Streaming<RaftMessages>>,
    ) -> Result<Response<Self::MessagesStream>, Status> {
        let from = self.caller(&request)?;
        let (refusals, refused) = mpsc::unbounded_channel();
        let messages = Messages {
            refusals: Some(refusals),
            refused,
            incoming: request.into_inner(),
            from,
            receiver: Arc::clone(&self.receiver),
            counters: self.counters(from),
        };
        Ok(Response::new(UntilStopped::new(messages, self.stopping.clone())))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let from = self.caller(&request)?;
        let replies = self.receiver.snapshot(from, request.into_inner());
        let replies = UntilStopped::new(replies, self.stopping.clone());
        Ok(Response::new(Box::pin(replies)))
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        let from = self.caller(&request)?;
        let chunks = self.receiver.pull_image(from, request.into_inner().at_least).await?;
        Ok(Response::new(UntilStopped::new(chunks, self.stopping.clone())))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<LeaseKeepAliveRequest>,
    ) -> Result<Response<LeaseKeepAliveResponse>, Status> {
        self.caller(&request)?;
        answer(self.receiver.lease_keep_alive(request.into_inner()).await)
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        self.caller(&request)?;
        answer(self.receiver.lease_time_to_live(request.into_inner()).await)
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        self.caller(&request)?;
        answer(self.receiver.member_promote(request.into_inner()).await)
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        self.caller(&request)?;
        answer(self.receiver.hash_kv(request.into_inner()).await)
    }

    async fn rolling_hashes(
        &self,
        request: Request<RollingHashesRequest>,
    ) -> Result<Response<RollingHashesResponse>, Status> {
        self.caller(&request)?;
        Ok(Response::new(self.receiver.rolling_hashes(request.into_inner())))
    }

    async fn members(
        &self,
        request: Request<MembersRequest>,
    ) -> Result<Response<MembersResponse>, Status> {
        answer(self.receiver.members(request.into_inner().linearizable).await)
    }
}
