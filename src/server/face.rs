//! A member as its peers see it: what their calls come to.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use crate::engine::Engine;
use crate::error::Error;
use crate::metrics::PeerMetrics;
use crate::net::identity::Identity;
use crate::net::pull::{self, ImageChunks};
use crate::net::snapshot::{Image as _, Incoming};
use crate::net::{Receiver, Refusals, SnapshotReplies};
use crate::pb::etcdserverpb::*;
use crate::pb::kvorumpb::{
    self, Command, MembersResponse, RollingHash, RollingHashesRequest, RollingHashesResponse,
    SnapshotChunk, SnapshotProgress,
};
use crate::raft::Refused;
use crate::runtime::forwarder::refusal;
use crate::runtime::image::Images;
use crate::runtime::proposer::change_of;
use crate::runtime::raft_thread::{Proposal, RaftInput};

/// How long one that joins waits for a majority to confirm who the members are.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(1);

/// Members with a damaged state that this one helps at a time.
const PULLS_MAX: usize = 2;

/// See the module documentation.
pub(super) struct PeerFace {
    engine: Engine,
    raft: Sender<RaftInput>,
    snapshots: Incoming,
    /// Images of the state for members that ask for one.
    images: Arc<Images>,
    /// Bytes of an image sent per second to one member; 0: as fast as it goes.
    bytes_per_sec: u64,
    pulls: Arc<Semaphore>,
}

impl PeerFace {
    pub(super) fn new(
        engine: Engine,
        raft: Sender<RaftInput>,
        snapshots: Incoming,
        images: Arc<Images>,
        bytes_per_sec: u64,
    ) -> PeerFace {
        let pulls = Arc::new(Semaphore::new(PULLS_MAX));
        PeerFace { engine, raft, snapshots, images, bytes_per_sec, pulls }
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

    fn propose(&self, proposals: Vec<kvorumpb::Proposal>, refusals: &Refusals) {
        for proposal in proposals {
            let kvorumpb::Proposal { command, sequence, term } = proposal;
            // One that is no command would stop every member that applies it; and what it
            // changes is what it says, not what is said of it. A member that stops takes none.
            let input = Command::decode(command.clone()).ok().map(|decoded| {
                let change = decoded.request.as_ref().and_then(change_of);
                let proposal = Proposal { command, change, sequence };
                RaftInput::Forwarded { proposal, term, refusals: refusals.clone() }
            });
            let is_taken = input.is_some_and(|input| self.raft.send(input).is_ok());
            if !is_taken {
                // Who asked may have gone.
                let _ = refusals.send(refusal(sequence, Refused::NotLeader));
            }
        }
    }

    fn snapshot(&self, from: u64, chunks: Streaming<SnapshotChunk>) -> SnapshotReplies {
        let replies = Box::pin(self.snapshots.receive(chunks));
        let metrics = self.engine.metrics().peer(self.engine.member_id(), from);
        metrics.snapshot_receive_inflights.inc();
        Box::pin(Counted { replies, metrics, began: Instant::now(), is_done: false })
    }

    async fn pull_image(&self, from: u64, at_least: u64) -> Result<ImageChunks, Status> {
        self.engine.serializable_check().map_err(|error| Status::unavailable(error.to_string()))?;
        if !self.engine.member_records().iter().any(|member| member.id == from) {
            return Err(Status::failed_precondition(format!(
                "it knows no member {from:x}: it was removed, or this one has yet to hear of it"
            )));
        }
        let own = self.engine.member_id();
        // The cluster's, where no majority could tell which member it is, has number 0.
        let is_in_doubt = |alarm: &AlarmMember| {
            alarm.alarm == AlarmType::Corrupt as i32 && [0, own].contains(&alarm.member_id)
        };
        if self.engine.alarms().iter().any(is_in_doubt) {
            return Err(Status::failed_precondition(
                "its own state is in doubt: the CORRUPT alarm is active (etcdctl alarm list)",
            ));
        }
        let Ok(permit) = Arc::clone(&self.pulls).try_acquire_owned() else {
            return Err(Status::resource_exhausted(format!(
                "it sends its state to {PULLS_MAX} members already: wait until one has it"
            )));
        };
        let images = Arc::clone(&self.images);
        // Copying the leases may take a while.
        let made = tokio::task::spawn_blocking(move || images.source(from, at_least)).await;
        let source = made.map_err(|error| Status::internal(error.to_string()))?;
        let source = source.map_err(|error| Status::unavailable(error.to_string()))?;
        let index = source.index();
        if index < at_least || index == 0 {
            return Err(Status::failed_precondition(format!(
                "it has applied entries up to {index}, and the caller's log goes on behind {at_least}"
            )));
        }
        tracing::info!(
            member = format!("{from:x}"),
            index,
            "sending a snapshot that was asked for"
        );
        Ok(pull::offer(source, self.bytes_per_sec, permit))
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
