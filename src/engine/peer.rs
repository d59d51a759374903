//! What this member does for others: the calls of its peers, and its calls to the leader.

use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Response, Status, Streaming};

use super::Engine;
use crate::error::Error;
use crate::metrics::PeerMetrics;
use crate::net::identity::Identity;
use crate::net::snapshot::Incoming;
use crate::net::{Client, Receiver, SnapshotReplies, refusal};
use crate::pb::etcdserverpb::*;
use crate::pb::kvorumpb::{
    Command, MembersResponse, ProposeRequest, ProposeResponse, Refusal, RollingHash,
    RollingHashesRequest, RollingHashesResponse, SnapshotChunk, SnapshotProgress,
};
use crate::raft::Refused;
use crate::runtime::forwarder::told;
use crate::runtime::proposer::change_of;
use crate::runtime::raft_thread::{Proposal, RaftInput};

/// A call to the leader that failed is tried again after this; etcd's value.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A member as its peers see it.
pub(crate) struct PeerFace {
    engine: Engine,
    raft: Sender<RaftInput>,
    snapshots: Incoming,
}

impl PeerFace {
    pub(crate) fn new(engine: Engine, raft: Sender<RaftInput>, snapshots: Incoming) -> PeerFace {
        PeerFace { engine, raft, snapshots }
    }
}

#[tonic::async_trait]
impl Receiver for PeerFace {
    fn identity(&self) -> Identity {
        let parts = &self.engine.parts;
        Identity { cluster_id: parts.cluster_id, member_id: parts.member_id }
    }

    fn is_removed(&self, member: u64) -> bool {
        self.engine.parts.state.read().members().is_removed(member)
    }

    fn messages(&self, _from: u64, messages: Vec<Bytes>) {
        for message in messages {
            // A member that stops says so otherwise.
            let _ = self.raft.send(RaftInput::Message(message));
        }
    }

    fn snapshot(&self, from: u64, chunks: Streaming<SnapshotChunk>) -> SnapshotReplies {
        let replies = Box::pin(self.snapshots.receive(chunks));
        let metrics = self.engine.parts.peers.metrics(from);
        metrics.snapshot_receive_inflights.inc();
        Box::pin(Counted { replies, metrics, began: Instant::now(), is_done: false })
    }

    async fn propose(&self, request: ProposeRequest) -> Result<ProposeResponse, Error> {
        let mut refusals = Vec::new();
        let mut proposals = Vec::with_capacity(request.proposals.len());
        for proposal in request.proposals {
            let sequence = proposal.sequence;
            let change = if proposal.is_member_change {
                // A command that is none would stop every member that applies it.
                let command = Command::decode(proposal.command.clone()).ok();
                match command.and_then(|command| change_of(command.request.as_ref()?)) {
                    Some(change) => Some(change),
                    None => {
                        refusals.push(refused(sequence, Refused::NotLeader));
                        continue;
                    }
                }
            } else {
                None
            };
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
        let hashes = &self.engine.parts.rolling_hashes;
        let known = |index| hashes.get(index).map(|hash| RollingHash { index, hash });
        RollingHashesResponse { hashes: request.indexes.into_iter().filter_map(known).collect() }
    }

    async fn members(&self) -> Result<MembersResponse, Error> {
        let parts = &self.engine.parts;
        let members = parts.state.read().members().records();
        Ok(MembersResponse { cluster_id: parts.cluster_id, members })
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

impl Engine {
    /// Has the leader answer: this member by `here` when it leads, another one by `there`. Waits
    /// for a leader, and asks again when the one that was asked is no more, for as long as a
    /// request may take.
    pub(super) async fn at_leader<T, Here, There>(
        &self,
        here: impl Fn() -> Here,
        there: impl Fn(Client) -> There,
    ) -> Result<T, Error>
    where
        Here: Future<Output = Result<T, Error>>,
        There: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.request_timeout();
        let mut role = self.parts.published.role.subscribe();
        let mut stopped = self.parts.published.stopped.subscribe();
        loop {
            let leader = tokio::select! {
                role = role.wait_for(|role| role.leader != 0) => {
                    role.map_err(|_| Error::Stopped)?.leader
                }
                _ = stopped.wait_for(|stopped| *stopped) => return Err(Error::Stopped),
                () = tokio::time::sleep_until(deadline.into()) => return Err(Error::Timeout),
            };
            let asked = async {
                if leader == self.parts.member_id {
                    return here().await;
                }
                let client = self.parts.peers.client(leader).ok_or(Error::NotLeader)?;
                match there(client).await {
                    Ok(response) => Ok(response.into_inner()),
                    Err(status) => Err(refusal::error(&status).unwrap_or(Error::NotLeader)),
                }
            };
            match tokio::time::timeout_at(deadline.into(), asked).await {
                Err(_) => return Err(Error::Timeout),
                Ok(Err(Error::NotLeader | Error::NoLeader | Error::LeaderChanged)) => {
                    if Instant::now() + RETRY_PAUSE >= deadline {
                        return Err(Error::Timeout);
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                // That the leader stops is no reason to stop here.
                Ok(Err(Error::Stopped)) if leader != self.parts.member_id => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Ok(answered) => return answered,
            }
        }
    }
}
