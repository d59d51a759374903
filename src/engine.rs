//! The handle everybody calls: clients through the API, programs that embed kvorum
//! directly.
//!
//! An [`Engine`] takes etcd's requests and gives etcd's responses, headers complete.
//! It checks a request, decides whether it may take space, has it committed, or waits
//! until it may read and reads. It is cheap to clone, and all clones are the same
//! server.
//!
//! ```no_run
//! # async fn example(engine: kvorum::Engine) -> Result<(), kvorum::Error> {
//! use kvorum::pb::etcdserverpb::{PutRequest, RangeRequest};
//!
//! engine.put(PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }).await?;
//! let found = engine.range(RangeRequest { key: "k".into(), ..Default::default() }).await?;
//! assert_eq!(found.count, 1);
//! # Ok(())
//! # }
//! ```
//!
//! **Durability.** When a call that writes returns `Ok`, the write is on the disks of
//! a majority, visible to every later read, and its event is on its way to watchers.
//!
//! **Cancellation.** Dropping a future of a call that writes gives up the answer, not
//! the write: it may still happen.

mod corrupt;
mod divergence;
mod leader;
mod members;
mod range;
mod snapshot;
mod vote;

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::{Semaphore, oneshot, watch};

use crate::error::Error;
use crate::lease::{self, Lease};
use crate::metrics::{Metrics, Op};
use crate::mvcc::Store;
use crate::net::{Client, Peers, refusal};
use crate::pb::etcdserverpb::*;
use crate::pb::kvorumpb::{MemberPublish, MemberRecord, command::Request};
use crate::runtime::checkpoint_thread::CheckpointTask;
use crate::runtime::fault::Fault;
use crate::runtime::gauges::Gauges;
use crate::runtime::hashes::{CompactionHashes, HashJob, KeyValueHash, work_out};
use crate::runtime::leases::LeaseClock;
use crate::runtime::pins::Pins;
use crate::runtime::proposer::Proposer;
use crate::runtime::published::Published;
use crate::runtime::rolling_hashes::RollingHashes;
use crate::runtime::save::Save;
use crate::runtime::space::Shortage;
use crate::runtime::watch_hub::HubHandle;
pub use crate::runtime::watch_hub::{Requests, Responses, StreamEnded, WatchStream};
use crate::state::txn::TxnScan;
use crate::state::{Response, StateMachine, check};
pub use corrupt::Inconsistent;
pub use snapshot::Snapshot;

/// Snapshots that are saved at the same time. Each holds some 25 MiB.
pub(crate) const SAVES_MAX: usize = 4;
/// A writer that is ahead of the checkpoint looks again after this.
const CHECKPOINT_PAUSE: Duration = Duration::from_millis(10);

/// What limits requests, and what is told about it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `--max-request-bytes`: an encoded request that writes.
    pub max_request_bytes: usize,
    /// `--max-txn-ops`: operations in one branch of a transaction.
    pub max_txn_ops: usize,
    /// `--quota-backend-bytes`; `None` when there is no quota.
    pub quota_bytes: Option<u64>,
    /// `--strict-reconfig-check`: whether changes of the members must be safe.
    pub strict_reconfig_check: bool,
    /// `--max-learners`.
    pub max_learners: u64,
    /// `--heartbeat-interval`.
    pub heartbeat: Duration,
    /// `--election-timeout`.
    pub election_timeout: Duration,
    /// `--warning-unary-request-duration`: a call that takes longer is logged.
    pub warning_unary_request_duration: Duration,
}

impl Limits {
    /// The election timeout in heartbeats: raft counts in these.
    pub fn election_ticks(&self) -> u32 {
        self.ticks(self.election_timeout).max(1)
    }

    /// How many whole heartbeats a time has.
    pub fn ticks(&self, time: Duration) -> u32 {
        let ticks = time.as_millis() / self.heartbeat.as_millis().max(1);
        u32::try_from(ticks).unwrap_or(u32::MAX)
    }
}

/// Which versions a server tells its clients.
#[derive(Debug, Clone)]
pub struct Versions {
    /// etcd's version whose features are served, `X.Y.Z`.
    pub server: &'static str,
    /// The storage version told, `X.Y.0`.
    pub storage: &'static str,
}

/// Where raft is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftStatus {
    /// The leader's id; 0 when none is known.
    pub leader: u64,
    /// Whether this member is the leader.
    pub is_leader: bool,
    /// The current term.
    pub term: u64,
    /// The newest committed index.
    pub committed: u64,
    /// The newest applied index.
    pub applied: u64,
}

/// The parts an engine is made of. Put together by the server.
pub(crate) struct Parts {
    pub(crate) member_id: u64,
    pub(crate) cluster_id: u64,
    pub(crate) state: Arc<RwLock<StateMachine>>,
    pub(crate) proposer: Arc<Proposer>,
    pub(crate) published: Arc<Published>,
    pub(crate) leases: Arc<LeaseClock>,
    pub(crate) pins: Arc<Pins>,
    /// `SAVES_MAX` slots.
    pub(crate) saves: Arc<Semaphore>,
    pub(crate) peers: Peers,
    pub(crate) hub: HubHandle,
    pub(crate) hashes: Arc<CompactionHashes>,
    pub(crate) rolling_hashes: Arc<RollingHashes>,
    pub(crate) checkpoint: Sender<CheckpointTask>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gauges: Gauges,
    pub(crate) fault: Fault,
    /// Whether the server takes no new work.
    pub(crate) stopping: watch::Receiver<bool>,
    /// Whether a disk has no space left to give.
    pub(crate) shortage: Arc<Shortage>,
    pub(crate) limits: Limits,
    pub(crate) versions: Versions,
}

/// See the module documentation.
#[derive(Clone)]
pub struct Engine {
    parts: Arc<Parts>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Engine").field("header", &self.header()).finish_non_exhaustive()
    }
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Engine {
        Engine { parts: Arc::new(parts) }
    }

    /// The state, for tests that tamper with it.
    #[cfg(test)]
    pub(crate) fn state(&self) -> &RwLock<StateMachine> {
        &self.parts.state
    }

    // ---- KV (ranges: in `range`) ----

    /// Writes a key.
    ///
    /// # Errors
    /// A request etcd refuses, [`Error::LeaseNotFound`], [`Error::NoSpace`], or no
    /// answer from the cluster.
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, Error> {
        check::check_put(&request)?;
        self.reserve(check::put_cost(&request)).await?;
        match self.commit(Request::Put(request)).await? {
            Response::Put(response) => Ok(response),
            other => Err(unexpected(&other)),
        }
    }

    /// Deletes the keys of a range, in one revision.
    ///
    /// # Errors
    /// A request etcd refuses, or no answer from the cluster.
    pub async fn delete_range(
        &self,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, Error> {
        check::check_delete_range(&request)?;
        match self.commit(Request::DeleteRange(request)).await? {
            Response::DeleteRange(response) => Ok(response),
            other => Err(unexpected(&other)),
        }
    }

    /// Compares, then carries out one of two lists of operations, all in one revision.
    ///
    /// # Errors
    /// A request etcd refuses, what an operation on the path taken finds wrong (then
    /// nothing is changed), [`Error::NoSpace`], or no answer from the cluster.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Error> {
        check::check_txn(&request, self.parts.limits.max_txn_ops)?;
        let response = if check::is_txn_read_only(&request) {
            self.before_read(check::is_txn_serializable(&request)).await?;
            let began = Instant::now();
            let begin = |store: &Store| TxnScan::new(store, &request);
            let answered = self.scanned(begin, TxnScan::at, TxnScan::step).await;
            let durations = &self.parts.metrics.server_request_duration_seconds;
            durations.observe(Op::ReadonlyTxn, answered.is_ok(), began.elapsed());
            let mut response = answered?.finish();
            self.complete(&mut response.header);
            response
        } else {
            if check::txn_has_put(&request) {
                self.reserve(check::txn_write_cost(&request)).await?;
            }
            match self.commit(Request::Txn(request)).await? {
                Response::Txn(response) => response,
                other => return Err(unexpected(&other)),
            }
        };
        self.parts.metrics.mvcc_txn_total.inc();
        Ok(response)
    }

    /// Gives up the history before a revision. With `physical` it is answered once
    /// what was given up is removed from memory, however long that takes: as in etcd, the
    /// request timeout ends when the cluster has answered.
    ///
    /// # Errors
    /// [`Error::Compacted`], [`Error::FutureRevision`]; with `physical`, [`Error::Stopped`]
    /// for a compaction that is in force.
    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse, Error> {
        match self.commit(Request::Compaction(request)).await? {
            Response::Compact(response) => {
                if request.physical {
                    self.wait_until_removed(request.revision).await?;
                }
                Ok(response)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until nothing is left of what compaction to `revision` gave up.
    async fn wait_until_removed(&self, revision: i64) -> Result<(), Error> {
        let mut removed_below = self.parts.published.removed_below.subscribe();
        let mut stopping = self.stopping();
        tokio::select! {
            removed = removed_below.wait_for(|below| *below >= revision) => {
                removed.map(drop).map_err(|_| Error::Stopped)
            }
            // A sender that is gone has stopped, too.
            _ = stopping.wait_for(|stopping| *stopping) => Err(Error::Stopped),
        }
    }

    // ---- Watch ----

    /// Opens a stream of watches. It ends when its responses are dropped, or with the
    /// server.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn watch(&self) -> Result<WatchStream, Error> {
        self.serializable_check()?;
        Ok(self.parts.hub.open_stream())
    }

    // ---- Lease ----

    /// Grants a lease. A TTL that is too short is raised; the response says to what.
    ///
    /// # Errors
    /// [`Error::LeaseExists`], [`Error::LeaseTtlTooLarge`], [`Error::NoSpace`].
    pub async fn lease_grant(
        &self,
        request: LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, Error> {
        let limits = &self.parts.limits;
        let min = lease::min_ttl_secs(limits.heartbeat, limits.election_ticks());
        // One that is too long is refused when it is applied: after an alarm, as in etcd.
        let ttl = request.ttl.max(min);
        self.reserve(check::LEASE_COST_BYTES).await?;
        let id = if request.id == 0 { random_lease_id()? } else { request.id };
        let request = LeaseGrantRequest { ttl, id };
        match self.commit(Request::LeaseGrant(request)).await? {
            Response::LeaseGrant(response) => Ok(response),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends a lease and deletes its keys, in one revision.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    pub async fn lease_revoke(
        &self,
        request: LeaseRevokeRequest,
    ) -> Result<LeaseRevokeResponse, Error> {
        match self.commit(Request::LeaseRevoke(request)).await? {
            Response::LeaseRevoke(response) => Ok(response),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins a lease's time anew, at the leader. A TTL of 0 in the response: there is no
    /// such lease.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Stopped`].
    pub async fn lease_keep_alive(&self, id: i64) -> Result<LeaseKeepAliveResponse, Error> {
        self.serializable_check()?;
        let header = Some(self.header());
        let there = |mut client: Client| async move {
            refusal::answered(client.lease_keep_alive(LeaseKeepAliveRequest { id }).await)
        };
        let response = self.at_leader(|| self.keep_alive_here(id), there).await?;
        Ok(LeaseKeepAliveResponse { header, ..response })
    }

    /// The same, if this member leads.
    pub(crate) async fn keep_alive_here(&self, id: i64) -> Result<LeaseKeepAliveResponse, Error> {
        let header = Some(self.header());
        let ttl = self.parts.leases.keep_alive(id, &self.parts.proposer).await?;
        if ttl > 0 {
            self.parts.metrics.debugging_lease_renewed_total.inc();
        }
        Ok(LeaseKeepAliveResponse { header, id, ttl })
    }

    /// What is left of a lease, in seconds, and its keys if wanted: the leader knows. A TTL
    /// of -1: there is no such lease.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Stopped`].
    pub async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        let there = |mut client: Client| async move {
            refusal::answered(client.lease_time_to_live(request).await)
        };
        let here = || self.time_to_live_here(request);
        let response = self.at_leader(here, there).await?;
        Ok(LeaseTimeToLiveResponse { header: Some(self.header()), ..response })
    }

    /// The same, if this member leads.
    pub(crate) async fn time_to_live_here(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        self.parts.proposer.read_barrier().await?;
        self.parts.leases.taken_over(&self.parts.proposer).await?;
        let id = request.id;
        let mut response = LeaseTimeToLiveResponse {
            header: Some(self.header()),
            id,
            ttl: -1,
            ..Default::default()
        };
        let state = self.parts.state.read();
        if let Some(lease) = state.lessor().get(id) {
            let left = self.parts.leases.remaining(id).ok_or(Error::LeaderChanged)?;
            response.ttl = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
            response.granted_ttl = lease.ttl_secs();
            if request.keys {
                response.keys = lease.keys().cloned().collect();
            }
        }
        Ok(response)
    }

    /// All leases, those first that end first.
    ///
    /// # Errors
    /// None at present.
    pub async fn lease_leases(
        &self,
        _request: LeaseLeasesRequest,
    ) -> Result<LeaseLeasesResponse, Error> {
        let ids: Vec<i64> = self.parts.state.read().lessor().iter().map(Lease::id).collect();
        // Each by itself, and not under the state's lock: keepalives and writes go on.
        let left = |id| (self.parts.leases.remaining(id), id);
        let mut leases: Vec<(Option<Duration>, i64)> = ids.into_iter().map(left).collect();
        leases.sort_unstable();
        let leases = leases.into_iter().map(|(_, id)| LeaseStatus { id }).collect();
        Ok(LeaseLeasesResponse { header: Some(self.header()), leases })
    }

    // ---- Cluster ----

    /// The cluster's members, by id.
    ///
    /// # Errors
    /// No answer from the cluster, when `linearizable`.
    pub async fn member_list(
        &self,
        request: MemberListRequest,
    ) -> Result<MemberListResponse, Error> {
        if request.linearizable {
            self.parts.proposer.read_barrier().await?;
        }
        let members = self.parts.state.read().members().list();
        Ok(MemberListResponse { header: self.cluster_header(), members })
    }

    /// All members, as they are recorded.
    pub(crate) fn member_records(&self) -> Vec<MemberRecord> {
        self.parts.state.read().members().records()
    }

    /// The rolling hash of everything applied up to an index, if it is remembered.
    pub(crate) fn rolling_hash(&self, index: u64) -> Option<u64> {
        self.parts.rolling_hashes.get(index)
    }

    /// The ids of all members but this one.
    fn other_members(&self) -> Vec<u64> {
        let this = self.parts.member_id;
        let members = self.member_records().into_iter().map(|member| member.id);
        members.filter(|id| *id != this).collect()
    }

    /// Whether a member of this id was removed.
    pub(crate) fn is_removed(&self, id: u64) -> bool {
        self.parts.published.is_removed(id)
    }

    /// Tells the cluster this member's name and where its clients reach it.
    pub(crate) async fn publish(
        &self,
        name: String,
        client_urls: Vec<String>,
    ) -> Result<(), Error> {
        let id = self.parts.member_id;
        let request = Request::MemberPublish(MemberPublish { id, name, client_urls });
        self.parts.proposer.propose(request).await.map(drop)
    }

    /// Hands leadership to another voter. Dropping the future does not take it back.
    ///
    /// # Errors
    /// [`Error::NotLeader`] when this member does not lead; [`Error::BadLeaderTransferee`]
    /// for a member that is unknown or only listens; [`Error::LeaderTransferTimeout`].
    pub async fn move_leader(
        &self,
        request: MoveLeaderRequest,
    ) -> Result<MoveLeaderResponse, Error> {
        let target = request.target_id;
        if !self.parts.published.role.borrow().is_leader {
            return Err(Error::NotLeader);
        }
        let is_voter = {
            let state = self.parts.state.read();
            state.members().get(target).is_some_and(|member| !member.is_learner)
        };
        if !is_voter {
            return Err(Error::BadLeaderTransferee);
        }
        if target != self.parts.member_id {
            self.parts.proposer.transfer_leader(target).await?;
        }
        // etcd leaves the header out.
        Ok(MoveLeaderResponse::default())
    }

    /// Before the server stops: hands leadership to whoever can take it, if this member leads.
    pub(crate) async fn resign(&self) {
        self.parts.proposer.resign().await;
    }

    // ---- Maintenance ----

    /// Lists, raises or disarms alarms.
    ///
    /// # Errors
    /// No answer from the cluster.
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse, Error> {
        match self.commit(Request::Alarm(request)).await? {
            Response::Alarm(response) => Ok(response),
            other => Err(unexpected(&other)),
        }
    }

    /// Active alarms, as this member knows them.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.parts.state.read().alarms(AlarmType::None)
    }

    /// How this member is. Never waits for the cluster.
    ///
    /// # Errors
    /// None at present.
    pub async fn status(&self) -> Result<StatusResponse, Error> {
        let role = *self.parts.published.role.borrow();
        let (alarms, applied, in_use) = {
            let state = self.parts.state.read();
            let in_use = state.store().size_in_use_bytes();
            (state.alarms(AlarmType::None), state.applied(), in_use)
        };
        let mut errors: Vec<String> = Vec::new();
        if role.leader == 0 {
            errors.push(Error::NoLeader.to_string());
        }
        errors.extend(alarms.iter().map(alarm_text));
        if self.parts.shortage.is_present() {
            errors.push(DISK_FULL.to_owned());
        }
        let in_use = i64::try_from(in_use).unwrap_or(i64::MAX);
        let on_disk = self.parts.published.checkpoint_bytes();
        let on_disk = i64::try_from(on_disk).unwrap_or(i64::MAX);
        let quota = self.parts.limits.quota_bytes.unwrap_or(0);
        Ok(StatusResponse {
            header: Some(self.header()),
            version: self.parts.versions.server.to_owned(),
            // etcdctl divides by it.
            db_size: on_disk.max(in_use).max(1),
            leader: role.leader,
            raft_index: self.parts.published.committed(),
            raft_term: role.term,
            raft_applied_index: applied.index,
            errors,
            db_size_in_use: in_use.max(1),
            is_learner: self.is_learner(),
            storage_version: self.parts.versions.storage.to_owned(),
            db_size_quota: i64::try_from(quota).unwrap_or(i64::MAX),
            downgrade_info: Some(DowngradeInfo::default()),
        })
    }

    /// A checksum of everything this member holds that members must agree on, all as of
    /// the same moment. The keys are gone through in steps between which writes go on.
    ///
    /// # Errors
    /// [`Error::Compacted`] when the state was replaced meanwhile, by a snapshot that is
    /// compacted further.
    pub async fn hash(&self) -> Result<HashResponse, Error> {
        let (job, rest) = {
            let state = self.parts.state.read();
            let hash = state.store().hash_kv_begin(state.store().revision());
            (HashJob::new(hash, &self.parts.pins), state.hash_of_rest())
        };
        let keys = self.work_out(job).await?;
        Ok(HashResponse { header: Some(self.header()), hash: rest.after(keys.hash) })
    }

    /// etcd's checksum of the keys as of a revision (0: the current one).
    ///
    /// # Errors
    /// [`Error::Compacted`], [`Error::FutureRevision`].
    pub async fn hash_kv(&self, request: HashKvRequest) -> Result<HashKvResponse, Error> {
        let began = Instant::now();
        let kept = self.parts.hashes.get(request.revision).await;
        let KeyValueHash { hash, compact_revision, revision } = match kept {
            Some(kept) => kept,
            None => self.hash_keys(request.revision).await?,
        };
        self.parts.metrics.mvcc_hash_rev_duration_seconds.observe(began.elapsed().as_secs_f64());
        Ok(HashKvResponse {
            header: Some(self.header()),
            hash,
            compact_revision,
            hash_revision: revision,
        })
    }

    async fn hash_keys(&self, revision: i64) -> Result<KeyValueHash, Error> {
        let job = {
            let state = self.parts.state.read();
            let store = state.store();
            let at = if revision == 0 { store.revision() } else { revision };
            // etcd takes a negative revision for one before all others: nothing is hashed.
            if at > 0 && at < store.compact_revision() {
                return Err(Error::Compacted);
            }
            if at > store.revision() {
                return Err(Error::FutureRevision);
            }
            HashJob::new(store.hash_kv_begin(at), &self.parts.pins)
        };
        self.work_out(job).await
    }

    /// Works a hash out, away from the threads that serve.
    async fn work_out(&self, job: HashJob) -> Result<KeyValueHash, Error> {
        let engine = self.clone();
        let worked = tokio::task::spawn_blocking(move || work_out(&engine.parts.state, job));
        worked.await.map_err(|_| Error::Stopped)?.ok_or(Error::Compacted)
    }

    /// Writes the checkpoint anew, so that the space of what was deleted and compacted
    /// goes back to the filesystem. Reads and writes go on meanwhile. Dropping the future
    /// gives up the answer, and the work if it has not begun. Calls that wait while the
    /// checkpoint is being written share the next one.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when the disk has no room for the new one beside the old one,
    /// which stays in use; [`Error::Stopped`].
    pub async fn defragment(&self) -> Result<DefragmentResponse, Error> {
        let (done, written) = oneshot::channel();
        let asked = self.parts.checkpoint.send(CheckpointTask::Rewrite(done));
        asked.map_err(|_| Error::Stopped)?;
        written.await.unwrap_or(Err(Error::Stopped))?;
        Ok(DefragmentResponse::default())
    }

    /// Everything this member holds, as a file that etcd can be restored from: a consistent
    /// view of the present moment, in blobs of at most 32 KiB, of which the last is the SHA-256
    /// of the others. Never waits for the cluster; writes go on meanwhile. Dropping what is
    /// returned ends it, and so does the end of the server.
    ///
    /// # Errors
    /// [`Error::TooManyRequests`] while `SAVES_MAX` others are under way; [`Error::Stopped`].
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        self.serializable_check()?;
        let slot = Arc::clone(&self.parts.saves).try_acquire_owned();
        let slot = slot.map_err(|_| Error::TooManyRequests)?;
        let save = Save::new(&self.parts.state, &self.parts.pins);
        let revision = save.revision();
        let blobs = save.begin(Arc::clone(&self.parts.metrics), slot);
        Ok(Snapshot::new(revision, self.parts.versions.storage, blobs, self.stopping()))
    }

    // ---- Auth ----

    /// Auth is off.
    pub fn auth_status(&self) -> AuthStatusResponse {
        AuthStatusResponse { header: Some(self.header()), enabled: false, auth_revision: 1 }
    }

    // ---- The server itself ----

    /// The header of a response that goes out now.
    pub fn header(&self) -> ResponseHeader {
        let revision = self.parts.state.read().store().revision();
        ResponseHeader {
            cluster_id: self.parts.cluster_id,
            member_id: self.parts.member_id,
            revision,
            raft_term: self.parts.published.applied_term(),
        }
    }

    /// Whether this member knows a leader.
    pub fn has_leader(&self) -> bool {
        self.parts.published.role.borrow().leader != 0
    }

    /// Whether this member only listens.
    pub fn is_learner(&self) -> bool {
        self.parts.published.is_learner()
    }

    /// This member's id.
    pub fn member_id(&self) -> u64 {
        self.parts.member_id
    }

    /// Where raft is, as this member knows it.
    pub fn raft_status(&self) -> RaftStatus {
        let role = *self.parts.published.role.borrow();
        RaftStatus {
            leader: role.leader,
            is_leader: role.is_leader,
            term: role.term,
            committed: self.parts.published.committed(),
            applied: *self.parts.published.applied.borrow(),
        }
    }

    /// How long a request waits for the cluster before it is answered as timed out.
    pub fn request_timeout(&self) -> Duration {
        self.parts.proposer.request_timeout()
    }

    /// The newest revision.
    pub fn revision(&self) -> i64 {
        self.parts.state.read().store().revision()
    }

    /// The version all members have, `X.Y.Z`.
    pub fn cluster_version(&self) -> String {
        self.parts.state.read().cluster_version().to_owned()
    }

    /// Which versions this server tells.
    pub fn versions(&self) -> &Versions {
        &self.parts.versions
    }

    /// What limits requests.
    pub fn limits(&self) -> &Limits {
        &self.parts.limits
    }

    /// The metrics of this server. Before they are rendered, [`Engine::refresh_metrics`].
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.parts.metrics
    }

    /// Writes to the metrics what is only known when it is asked for: sizes, revisions,
    /// watchers, alarms.
    pub fn refresh_metrics(&self) {
        self.parts.gauges.refresh();
    }

    /// Waits until everything acknowledged before is visible here.
    ///
    /// # Errors
    /// No answer from the cluster.
    pub async fn linearizable_barrier(&self) -> Result<(), Error> {
        self.parts.proposer.read_barrier().await
    }

    /// Whether this member can serve what it holds.
    ///
    /// # Errors
    /// [`Error::Stopped`] once it was shut down, or something stopped it for good.
    pub fn serializable_check(&self) -> Result<(), Error> {
        let is_over = *self.parts.published.stopped.borrow() || self.parts.fault.get().is_some();
        if is_over { Err(Error::Stopped) } else { Ok(()) }
    }

    /// Becomes true when the server begins to stop: for streams, which would keep it
    /// waiting.
    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.parts.stopping.clone()
    }

    /// What a read waits for before it reads.
    async fn before_read(&self, serializable: bool) -> Result<(), Error> {
        if serializable {
            self.serializable_check()
        } else {
            self.parts.proposer.read_barrier().await
        }
    }

    /// Judges whether a request of this cost fits into the quota. When not, raises the
    /// NOSPACE alarm, as etcd does, and refuses.
    async fn reserve(&self, cost: u64) -> Result<(), Error> {
        let patience = Instant::now() + self.request_timeout();
        while self.parts.shortage.is_behind() {
            if Instant::now() >= patience {
                return Err(Error::TooManyRequests);
            }
            tokio::time::sleep(CHECKPOINT_PAUSE).await;
        }
        if self.parts.shortage.is_present() {
            return Err(Error::NoSpace);
        }
        let Some(quota) = self.parts.limits.quota_bytes else { return Ok(()) };
        if self.parts.published.size_bytes().saturating_add(cost) <= quota {
            return Ok(());
        }
        if !self.parts.state.read().has_alarm(AlarmType::Nospace) {
            let request = AlarmRequest {
                action: alarm_request::AlarmAction::Activate as i32,
                member_id: self.parts.member_id,
                alarm: AlarmType::Nospace as i32,
            };
            tracing::warn!(quota, "database space exceeded: raising the NOSPACE alarm");
            self.alarm(request).await?;
        }
        Err(Error::NoSpace)
    }

    /// Has a command committed. The response is complete, and of the command's kind.
    async fn commit(&self, request: Request) -> Result<Response, Error> {
        let mut response = self.parts.proposer.propose(request).await?;
        if let Some(header) = response.header_mut() {
            self.complete(header);
        }
        Ok(response)
    }

    /// Fills in what the state machine does not know. The revision stays as it is.
    fn complete(&self, header: &mut Option<ResponseHeader>) {
        let header = header.get_or_insert_default();
        header.cluster_id = self.parts.cluster_id;
        header.member_id = self.parts.member_id;
        header.raft_term = self.parts.published.applied_term();
    }
}

/// A lease id as etcd picks them: random, positive, 63 bits.
fn random_lease_id() -> Result<i64, Error> {
    let random = getrandom::u64().map_err(|_| Error::Stopped)?;
    Ok(i64::try_from(random >> 1).unwrap_or(i64::MAX).max(1))
}

/// In `Status.errors` while writes are refused for want of disk space. That is no
/// alarm: it comes and goes by itself, and other members may have space.
const DISK_FULL: &str = "kvorum: the disk is almost full: writes that take space are refused";

/// As etcd prints an alarm in `Status.errors`.
fn alarm_text(alarm: &AlarmMember) -> String {
    // One that this version does not know is told by its number, as etcd does.
    let number = alarm.alarm;
    let name = AlarmType::try_from(number)
        .map_or_else(|_| number.to_string(), |alarm| alarm.as_str_name().to_owned());
    format!("memberID:{} alarm:{name} ", alarm.member_id)
}

/// A command answered with another command's response would be a mistake of this
/// program; nobody is told that their write succeeded.
fn unexpected(response: &Response) -> Error {
    tracing::error!(?response, "a command got the response of another");
    Error::Stopped
}
