//! What the calls of other members arrive at.

use std::pin::Pin;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::identity::Identity;
use super::pull::ImageChunks;
use crate::error::Error;
use crate::pb::etcdserverpb::{
    HashKvRequest, HashKvResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, MemberPromoteRequest, MemberPromoteResponse,
};
use crate::pb::kvorumpb::{
    MembersResponse, Proposal, Refusal, RollingHashesRequest, RollingHashesResponse, SnapshotChunk,
    SnapshotProgress,
};

/// How a snapshot is coming along, told while it arrives.
pub type SnapshotReplies = Pin<Box<dyn Stream<Item = Result<SnapshotProgress, Status>> + Send>>;

/// Where refusals of commands go. As many as the caller has commands under way, which it bounds.
pub type Refusals = mpsc::UnboundedSender<Refusal>;

/// A member, as others see it. When a method is called, the caller has been found to
/// belong to this cluster, not to have been removed, and to mean this member;
/// [`Receiver::members`] alone is called for anybody.
#[tonic::async_trait]
pub trait Receiver: Send + Sync + 'static {
    /// Who this is.
    fn identity(&self) -> Identity;
    /// Whether the member was removed from the cluster, for ever. Asked for each batch of
    /// messages.
    fn is_removed(&self, member: u64) -> bool;
    /// Takes raft messages of the member `from`, in the order in which they were sent. Never
    /// waits.
    fn messages(&self, from: u64, messages: Vec<Bytes>);
    /// Has commands appended to the log, each if this member leads in the term that it is for.
    /// Never waits; `refusals` is told which are not, then or later.
    fn propose(&self, proposals: Vec<Proposal>, refusals: &Refusals);
    /// Takes a snapshot of the member `from`. Dropping what is returned means that the
    /// caller has gone away.
    fn snapshot(&self, from: u64, chunks: Streaming<SnapshotChunk>) -> SnapshotReplies;
    /// This member's state as an image, for the member `from`, if it goes at least up to an entry.
    async fn pull_image(&self, from: u64, at_least: u64) -> Result<ImageChunks, Status>;
    /// Keeps a lease alive, if this member leads.
    async fn lease_keep_alive(
        &self,
        request: LeaseKeepAliveRequest,
    ) -> Result<LeaseKeepAliveResponse, Error>;
    /// How long a lease lives, if this member leads.
    async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Error>;
    /// Makes a learner a voter, if this member leads.
    async fn member_promote(
        &self,
        request: MemberPromoteRequest,
    ) -> Result<MemberPromoteResponse, Error>;
    /// This member's hash of the keys.
    async fn hash_kv(&self, request: HashKvRequest) -> Result<HashKvResponse, Error>;
    /// How this member's state came to be, up to those of these indexes that it remembers.
    fn rolling_hashes(&self, request: RollingHashesRequest) -> RollingHashesResponse;
    /// The cluster and its members, as this member knows them; `linearizable`: as they are,
    /// if a majority can be asked.
    async fn members(&self, linearizable: bool) -> Result<MembersResponse, Error>;
}
