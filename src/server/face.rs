//! A member as its peers see it: what their calls come to.

use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use crate::engine::Engine;
use crate::error::Error;
use crate::metrics::PeerMetrics;
use crate::net::identity::Identity;
use crate::net::snapshot::Incoming;
use crate::net::{Receiver, SnapshotReplies};
use crate::pb::etcdserverpb::*;
use crate::pb::kvorumpb::{
    Command, MembersResponse, ProposeRequest, ProposeResponse, Refusal, RollingHash,
    RollingHashesRequest, RollingHashesResponse, SnapshotChunk, SnapshotProgress,
};
use crate::raft::Refused;
use crate::runtime::forwarder::told;
use crate::runtime::proposer::change_of;
use crate::runtime::raft_thread::{Proposal, RaftInput};

/// How long one that joins waits for a majority to confirm who the members are.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(1);

/// See the module documentation.
pub(super) struct PeerFace {
    engine: Engine,
    raft: Sender<RaftInput>,
    snapshots: Incoming,
}

impl PeerFace {
    pub(super) fn new(engine: Engine, raft: Sender<RaftInput>, snapshots: Incoming) -> PeerFace {
        PeerFace { engine, raft, snapshots }
    }
}

#[tonic::async_trait]
impl Receiver for PeerFace {
    fn identity(&self) -> Identity {
        let header = self.engine.header();
        Identity { cluster_id: header.cluster_id, member_id: header.member_id }
    }

    fn is_removed(&self, member: u64) -> bool {
        self.engine.is_removed(member)
    }

    fn messages(&self, _from: u64, messages: Vec<Bytes>) {
        for message in messages {
            // A member that stops says so otherwise.
            let _ = self.raft.send(RaftInput::Message(message));
        }
    }

    fn snapshot(&self, from: u64, chunks: Streaming<SnapshotChunk>) -> SnapshotReplies {
        let replies = Box::pin(self.snapshots.receive(chunks));
        let metrics = self.engine.metrics().peer(self.engine.member_id(), from);
        metrics.snapshot_receive_inflights.inc();
        Box::pin(Counted { replies, metrics, began: Instant::now(), is_done: false })
    }

    async fn propose(&self, request: ProposeRequest) -> Result<ProposeResponse, Error> {
        let mut refusals = Vec::new();
        let mut proposals = Vec::with_capacity(request.proposals.len());
        for proposal in request.proposals {
            let sequence = proposal.sequence;
            // One that is no command would stop every member that applies it; and what it
            // changes is what it says, not what is said of it.
            let Ok(command) = Command::decode(proposal.command.clone()) else {
                refusals.push(refused(sequence, Refused::NotLeader));
                continue;
            };
            let change = command.request.as_ref().and_then(change_of);
            proposals.push(Proposal { command: proposal.command, change, sequence });
        }
        let (sender, answer) = oneshot::channel();
        let input = RaftInput::Forwarded { proposals, term: request.term, refusals: sender };
        self.raft.send(input).map_err(|_| Error::Stopped)?;
        let not_taken = answer.await.map_err(|_| Error::Stopped)?;
        refusals.extend(not_taken.into_iter().map(|(sequence, why)| refused(sequence, why)));
        Ok(ProposeResponse { refusals })
    }

    async fn lease_keep_alive(
        &self,
        request: LeaseKeepAliveRequest,
    ) -> Result<LeaseKeepAliveResponse, Error> {
        self.engine.keep_alive_here(request.id).await
    }

    async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        self.engine.time_to_live_here(request).await
    }

    async fn member_promote(
        &self,
        request: MemberPromoteRequest,
    ) -> Result<MemberPromoteResponse, Error> {
        self.engine.promote_here(request.id).await
    }

    async fn hash_kv(&self, request: HashKvRequest) -> Result<HashKvResponse, Error> {
        self.engine.hash_kv(request).await
    }

    fn rolling_hashes(&self, request: RollingHashesRequest) -> RollingHashesResponse {
        let known = |index| {
            let hash = self.engine.rolling_hash(index)?;
            Some(RollingHash { index, hash })
        };
        RollingHashesResponse { hashes: request.indexes.into_iter().filter_map(known).collect() }
    }

    async fn members(&self, linearizable: bool) -> Result<MembersResponse, Error> {
        if linearizable {
            // A cluster of one that has added a voter has no majority until that one joins: what
            // is remembered has to do then.
            let _ = tokio::time::timeout(BARRIER_TIMEOUT, self.engine.linearizable_barrier()).await;
        }
        let cluster_id = self.identity().cluster_id;
        Ok(MembersResponse { cluster_id, members: self.engine.member_records() })
    }
}

/// What the sender of a snapshot is told; counts how it ends.
struct Counted {
    replies: SnapshotReplies,
    metrics: PeerMetrics,
    began: Instant,
    is_done: bool,
}

impl Stream for Counted {
    type Item = Result<SnapshotProgress, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = ready!(self.replies.as_mut().poll_next(context));
        self.is_done |= matches!(&next, Some(Ok(progress)) if progress.done);
        Poll::Ready(next)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.snapshot_receive_inflights.dec();
        if self.is_done {
            self.metrics.snapshot_receive_success.inc();
            self.metrics.snapshot_receive_seconds.observe(self.began.elapsed().as_secs_f64());
        } else {
            self.metrics.snapshot_receive_failures.inc();
        }
    }
}

fn refused(sequence: u64, why: Refused) -> Refusal {
    Refusal { sequence, reason: told(why).into() }
}
