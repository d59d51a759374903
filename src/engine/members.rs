//! Changes of the members, with what etcd asks of them before and its order of asking.
//!
//! A change is a command like any other: the state machine has the last word on it, on all
//! members alike. What is asked here besides is whether it is safe now
//! ([`crate::state::reconfig`]), and how many learners there may be.
//!
//! A learner is promoted by the leader alone, who knows how far it has come; any other member
//! passes the request on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Engine, unexpected};
use crate::error::Error;
use crate::net::{Client, refusal};
use crate::pb::etcdserverpb::*;
use crate::pb::kvorumpb::{MemberChange, MemberRecord, command::Request, member_change::Change};
use crate::state::Response;
use crate::state::members::member_id;
use crate::state::reconfig::{self, Progress, View};

/// How long a promotion waits for what is committed to be applied; etcd's value.
const APPLY_TIMEOUT: Duration = Duration::from_secs(1);

impl Engine {
    /// Adds a member, which may then be started.
    ///
    /// # Errors
    /// [`Error::MemberBadUrls`], [`Error::PeerUrlExists`], [`Error::MemberExists`],
    /// [`Error::TooManyLearners`]; with `--strict-reconfig-check`
    /// [`Error::NotEnoughStartedMembers`] and [`Error::UnhealthyCluster`]; no answer from the
    /// cluster.
    pub async fn member_add(&self, request: MemberAddRequest) -> Result<MemberAddResponse, Error> {
        let mut peer_urls = reconfig::peer_urls(&request.peer_ur_ls)?;
        peer_urls.sort_unstable();
        let is_learner = request.is_learner;
        self.strictly(|view| view.may_add(is_learner))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = member_id(&peer_urls, &now.as_secs().to_string());
        let record = MemberRecord { id, peer_urls, is_learner, ..MemberRecord::default() };
        let member = Some(Member::from(&record));
        let change = Change::Add(record);
        if is_learner {
            // The limit is this member's own, so that it cannot be judged by all. What they
            // judge comes first, as in etcd, and on what was acknowledged to anybody.
            self.parts.proposer.read_barrier().await?;
            let state = self.parts.state.read();
            state.members().check(&change)?;
            reconfig::check_learner_limit(state.members(), self.parts.limits.max_learners)?;
        }
        let members = self.change_members(change).await?;
        Ok(MemberAddResponse { header: self.cluster_header(), member, members })
    }

    /// Removes a member for ever: its id is never used again.
    ///
    /// # Errors
    /// [`Error::MemberNotFound`]; with `--strict-reconfig-check`
    /// [`Error::NotEnoughStartedMembers`], which also the last voter gets without it, and
    /// [`Error::UnhealthyCluster`]; no answer from the cluster.
    pub async fn member_remove(
        &self,
        request: MemberRemoveRequest,
    ) -> Result<MemberRemoveResponse, Error> {
        self.strictly(|view| view.may_remove(request.id))?;
        let members = self.change_members(Change::Remove(request.id)).await?;
        Ok(MemberRemoveResponse { header: self.cluster_header(), members })
    }

    /// Gives a member other peer URLs.
    ///
    /// # Errors
    /// [`Error::MemberNotFound`], [`Error::PeerUrlExists`], [`Error::MemberBadUrls`]; no answer
    /// from the cluster.
    pub async fn member_update(
        &self,
        request: MemberUpdateRequest,
    ) -> Result<MemberUpdateResponse, Error> {
        let MemberUpdateRequest { id, peer_ur_ls } = request;
        let change =
            |peer_urls| Change::Update(MemberRecord { id, peer_urls, ..MemberRecord::default() });
        let peer_urls = reconfig::peer_urls(&peer_ur_ls).map_err(|bad| {
            // etcd does not look at the URLs themselves before all its members fail over them.
            self.parts.state.read().members().check(&change(peer_ur_ls)).err().unwrap_or(bad)
        })?;
        let members = self.change_members(change(peer_urls)).await?;
        Ok(MemberUpdateResponse { header: self.cluster_header(), members })
    }

    /// Makes a voter of a learner that has caught up.
    ///
    /// # Errors
    /// [`Error::MemberNotFound`], [`Error::MemberNotLearner`], [`Error::LearnerNotReady`];
    /// with `--strict-reconfig-check` [`Error::NotEnoughStartedMembers`]; no answer from the
    /// leader or the cluster.
    pub async fn member_promote(
        &self,
        request: MemberPromoteRequest,
    ) -> Result<MemberPromoteResponse, Error> {
        let there = |mut client: Client| async move {
            refusal::answered(client.member_promote(request).await)
        };
        let response = self.at_leader(|| self.promote_here(request.id), there).await?;
        Ok(MemberPromoteResponse { header: self.cluster_header(), ..response })
    }

    /// The same, if this member leads.
    ///
    /// # Errors
    /// As [`Engine::member_promote`]; [`Error::NotLeader`].
    pub(crate) async fn promote_here(&self, id: u64) -> Result<MemberPromoteResponse, Error> {
        let promoted = self.promote(id).await;
        let metrics = &self.parts.metrics;
        match &promoted {
            Ok(_) => metrics.server_learner_promote_successes.inc(),
            Err(Error::NotLeader) => {}
            Err(error) => {
                let reason = error.to_string();
                metrics.server_learner_promote_failures.with_label_values(&[&reason]).inc();
            }
        }
        let members = promoted?;
        Ok(MemberPromoteResponse { header: self.cluster_header(), members })
    }

    async fn promote(&self, id: u64) -> Result<Vec<Member>, Error> {
        self.wait_until_committed_is_applied().await?;
        if !self.parts.published.role.borrow().is_leader {
            return Err(Error::NotLeader);
        }
        let is_learner = {
            let state = self.parts.state.read();
            state.members().get(id).ok_or(Error::MemberNotFound)?.is_learner
        };
        // Raft hears of a learner a moment after the state.
        let progress = self.progress_of(id);
        if is_learner && !progress.is_some_and(reconfig::Progress::is_in_sync) {
            return Err(Error::LearnerNotReady);
        }
        self.strictly(|view| view.may_promote())?;
        self.change_members(Change::Promote(id)).await
    }

    /// How far a member has followed this one; `None` when raft does not know it, or when this
    /// one does not lead.
    fn progress_of(&self, id: u64) -> Option<Progress> {
        let progress = self.parts.published.progress();
        let matched = |id| Some(progress.iter().find(|member| member.id == id)?.matched);
        Some(Progress { matched: matched(id)?, leader_matched: matched(self.parts.member_id)? })
    }

    async fn wait_until_committed_is_applied(&self) -> Result<(), Error> {
        let committed = self.parts.published.committed();
        let mut applied = self.parts.published.applied.subscribe();
        let mut stopping = self.stopping();
        tokio::select! {
            reached = applied.wait_for(|applied| *applied >= committed) => {
                reached.map(drop).map_err(|_| Error::Stopped)
            }
            _ = stopping.wait_for(|stopping| *stopping) => Err(Error::Stopped),
            () = tokio::time::sleep(APPLY_TIMEOUT) => Err(Error::TimeoutWaitAppliedIndex),
        }
    }

    /// Asks whether a change is safe, if that is wanted.
    fn strictly(&self, may: impl FnOnce(&View) -> Result<(), Error>) -> Result<(), Error> {
        if !self.parts.limits.strict_reconfig_check {
            return Ok(());
        }
        let state = self.parts.state.read();
        let connected = |id| self.parts.peers.active_since(id).map(|since| since.elapsed());
        let view =
            View { members: state.members(), this: self.parts.member_id, connected: &connected };
        may(&view).inspect_err(|error| tracing::warn!(%error, "refused a change of the members"))
    }

    /// Has a change committed. Returns all members as they are then.
    async fn change_members(&self, change: Change) -> Result<Vec<Member>, Error> {
        let request = Request::MemberChange(MemberChange { change: Some(change) });
        match self.commit(request).await? {
            Response::Members(members) => Ok(members),
            other => Err(unexpected(&other)),
        }
    }

    /// The header of the cluster service's responses, in which etcd leaves the revision out.
    pub(super) fn cluster_header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { revision: 0, ..self.header() })
    }

    /// Says why there is no leader yet: which members are not reached, where etcd's log has
    /// an election each second.
    pub(crate) fn log_who_is_missing(&self) {
        let records = self.member_records();
        let is_missing = |record: &&MemberRecord| {
            record.id != self.parts.member_id && self.parts.peers.active_since(record.id).is_none()
        };
        let missing: Vec<String> = records
            .iter()
            .filter(is_missing)
            .map(|record| format!("{:x} at {}", record.id, record.peer_urls.join(",")))
            .collect();
        let quorum = reconfig::quorum(records.iter().filter(|record| !record.is_learner).count());
        tracing::warn!(
            ?missing,
            quorum,
            "there is no leader: so many voters have to run, and to reach each other at the peer \
             URLs that the cluster's list of members has for them"
        );
    }
}
