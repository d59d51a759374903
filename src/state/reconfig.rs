//! Whether a change of the members is safe now: what etcd asks before it proposes one.
//!
//! A change that is committed cannot be taken back by a cluster that has lost its quorum over
//! it, so with `--strict-reconfig-check` the member that is asked looks first at who is
//! *started* (has told the cluster its name) and who is *connected*, long enough for it to
//! last. Both are what this one member sees at this moment, so they decide what is proposed,
//! and never what is applied: that is [`Members::check`].
//!
//! | change        | refused when                                                        |
//! |---------------|---------------------------------------------------------------------|
//! | add a voter   | the voters that are started would be no quorum with one more        |
//! | add anybody   | this member is not connected to a quorum as large as with one more  |
//! | remove        | the voters that are started would be no quorum without this one     |
//! |               | … or, when it is connected, those connected would be none           |
//! | promote       | the voters that are started, and it, would be no quorum with it     |
//!
//! These are etcd's rules with their exceptions: the only member may always add another, and
//! a learner may always be removed.

use std::time::Duration;

use super::members::Members;
use crate::error::Error;
use crate::pb::kvorumpb::MemberRecord;

/// A peer counts as connected when it has been for longer than this; etcd's value.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// Share of the leader's log, in percent, that a learner must have to be promoted; etcd's.
const IN_SYNC_PERCENT: u128 = 90;

/// The cluster as one member sees it.
pub struct View<'a> {
    /// Who belongs to it.
    pub members: &'a Members,
    /// Who looks.
    pub this: u64,
    /// For how long that one has been connected to another; `None` when it is not.
    pub connected: &'a dyn Fn(u64) -> Option<Duration>,
}

impl View<'_> {
    /// Whether a member may be added.
    ///
    /// # Errors
    /// [`Error::NotEnoughStartedMembers`], [`Error::UnhealthyCluster`].
    pub fn may_add(&self, is_learner: bool) -> Result<(), Error> {
        let (voters, started) = (self.members.voters().count(), self.started_voters(None));
        // One that is alone grows by one that cannot be started before it was added.
        let grows_from_one = voters == 1 && started == 1;
        if !is_learner && !grows_from_one && started < quorum(voters + 1) {
            return Err(Error::NotEnoughStartedMembers);
        }
        if voters != 1 && self.connected_voters() < quorum(voters + 1) {
            return Err(Error::UnhealthyCluster);
        }
        Ok(())
    }

    /// Whether a member may be removed. One that is unknown may: applying tells.
    ///
    /// # Errors
    /// [`Error::NotEnoughStartedMembers`], [`Error::UnhealthyCluster`].
    pub fn may_remove(&self, id: u64) -> Result<(), Error> {
        if self.members.get(id).is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        let left = self.members.voters().filter(|member| member.id != id).count();
        if self.started_voters(Some(id)) < quorum(left) {
            return Err(Error::NotEnoughStartedMembers);
        }
        // One that is down takes nobody along.
        if id != self.this && (self.connected)(id).is_none() {
            return Ok(());
        }
        let others = self.members.voters().count().saturating_sub(1);
        if self.connected_voters() < 1 + quorum(others) {
            return Err(Error::UnhealthyCluster);
        }
        Ok(())
    }

    /// Whether a learner may become a voter, as far as the others are concerned.
    ///
    /// # Errors
    /// [`Error::NotEnoughStartedMembers`].
    pub fn may_promote(&self) -> Result<(), Error> {
        // The learner is taken for a started one.
        let (voters, started) = (self.members.voters().count() + 1, self.started_voters(None) + 1);
        if started < quorum(voters) { Err(Error::NotEnoughStartedMembers) } else { Ok(()) }
    }

    fn started_voters(&self, without: Option<u64>) -> usize {
        let counts = |member: &&MemberRecord| !member.name.is_empty() && Some(member.id) != without;
        self.members.voters().filter(counts).count()
    }

    fn connected_voters(&self) -> usize {
        let is_connected = |id| (self.connected)(id).is_some_and(|since| since > HEALTHY_AFTER);
        let counts = |member: &&MemberRecord| member.id == self.this || is_connected(member.id);
        self.members.voters().filter(counts).count()
    }
}

/// How many of this many voters decide.
pub fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

/// Whether there is room for another learner.
///
/// # Errors
/// [`Error::TooManyLearners`].
pub fn check_learner_limit(members: &Members, max_learners: u64) -> Result<(), Error> {
    let learners = members.learners().count() as u64;
    if learners >= max_learners { Err(Error::TooManyLearners) } else { Ok(()) }
}

/// How far a member has followed its leader: indexes of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The newest entry that the member is known to have.
    pub matched: u64,
    /// The newest entry that the leader has.
    pub leader_matched: u64,
}

impl Progress {
    /// Whether a learner that is so far may vote.
    pub fn is_in_sync(self) -> bool {
        u128::from(self.matched) * 100 >= u128::from(self.leader_matched) * IN_SYNC_PERCENT
    }
}

/// Peer URLs without space around them. At least one, each `http(s)://host:port` without a path,
/// or `unix(s)://…`.
///
/// # Errors
/// [`Error::MemberBadUrls`].
pub fn peer_urls(given: &[String]) -> Result<Vec<String>, Error> {
    let urls: Vec<String> = given.iter().map(|url| url.trim().to_owned()).collect();
    let are_good = !urls.is_empty() && urls.iter().all(|url| is_peer_url(url));
    if are_good { Ok(urls) } else { Err(Error::MemberBadUrls) }
}

fn is_peer_url(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else { return false };
    match scheme {
        "unix" | "unixs" => true,
        "http" | "https" => {
            // The port must be written out, which the url crate would not tell: it
            // drops a port that is the scheme's own, and adds the path "/".
            let authority = rest.split(['?', '#']).next().unwrap_or_default();
            let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let port = host_port.rsplit_once(':').map(|(_, port)| port);
            !authority.contains('/')
                && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
                && url::Url::parse(url).is_ok()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
