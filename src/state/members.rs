//! Who belongs to the cluster, and how members and the cluster get their ids.
//!
//! The ids are etcd's: a member's id is derived from its peer URLs and the cluster
//! token, the cluster's from its first members' ids, so that every member computes
//! the same ones from the same flags (etcd server/etcdserver/api/membership). A member
//! that is added later has the time in the place of the token.
//!
//! Members change by committed entries only, one at a time, and an entry that cannot be
//! carried out is refused here by all members alike ([`Members::check`]). What more is asked
//! of a change before it is proposed, and depends on who asks, is in [`super::reconfig`].
//!
//! Always true: ids and peer URLs belong to one member each, an id that was removed never
//! comes back, and there is a voter.

use std::collections::{BTreeMap, BTreeSet};

use sha1::{Digest as _, Sha1};

use crate::error::Error;
use crate::pb::etcdserverpb::Member;
use crate::pb::kvorumpb::{MemberRecord, member_change::Change};

/// Raft's word for "no member".
const NOBODY: u64 = 0;

/// The members of one cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Members {
    cluster_id: u64,
    members: BTreeMap<u64, MemberRecord>,
    /// Ids of members that left.
    removed: BTreeSet<u64>,
}

/// The id of a member of a new cluster. One that is added later has, in etcd and so here,
/// the seconds since 1970 for a token.
pub fn member_id(peer_urls: &[String], cluster_token: &str) -> u64 {
    let mut sorted: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let mut hash = Sha1::new();
    for url in sorted {
        hash.update(url);
    }
    hash.update(cluster_token);
    first_eight_bytes(hash)
}

/// The id of a cluster that begins with these members.
pub fn cluster_id(member_ids: &[u64]) -> u64 {
    let mut sorted = member_ids.to_vec();
    sorted.sort_unstable();
    let mut hash = Sha1::new();
    for id in sorted {
        hash.update(id.to_be_bytes());
    }
    first_eight_bytes(hash)
}

fn first_eight_bytes(hash: Sha1) -> u64 {
    hash.finalize().iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte))
}

/// Whom a change is about.
pub fn changed(change: &Change) -> u64 {
    match change {
        Change::Add(member) | Change::Update(member) => member.id,
        Change::Remove(id) | Change::Promote(id) => *id,
    }
}

impl Members {
    /// The members of a new cluster: (name, peer URLs) of each.
    pub fn bootstrap(initial: &[(String, Vec<String>)], cluster_token: &str) -> Members {
        let records = initial.iter().map(|(name, peer_urls)| {
            // Each member makes this from its own flags, and all must hold the same.
            let mut peer_urls = peer_urls.clone();
            peer_urls.sort_unstable();
            MemberRecord {
                id: member_id(&peer_urls, cluster_token),
                name: name.clone(),
                peer_urls,
                client_urls: Vec::new(),
                is_learner: false,
            }
        });
        let members: BTreeMap<u64, MemberRecord> =
            records.map(|record| (record.id, record)).collect();
        let ids: Vec<u64> = members.keys().copied().collect();
        Members { cluster_id: cluster_id(&ids), members, removed: BTreeSet::new() }
    }

    /// The members as a checkpoint holds them, or as a cluster told one that is about to
    /// join; `removed` are the ids of those that left.
    pub fn restore(cluster_id: u64, records: Vec<MemberRecord>, removed: Vec<u64>) -> Members {
        let members = records.into_iter().map(|record| (record.id, record)).collect();
        Members { cluster_id, members, removed: removed.into_iter().collect() }
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    /// One member.
    pub fn get(&self, id: u64) -> Option<&MemberRecord> {
        self.members.get(&id)
    }

    /// Whether a member of this id was removed. It never comes back.
    pub fn is_removed(&self, id: u64) -> bool {
        self.removed.contains(&id)
    }

    /// The ids of all members that were removed.
    pub fn removed(&self) -> Vec<u64> {
        self.removed.iter().copied().collect()
    }

    /// Whether a change can be carried out.
    ///
    /// # Errors
    /// Adding: [`Error::MemberExists`] for an id that is taken or was removed,
    /// [`Error::PeerUrlExists`]. Removing: [`Error::MemberNotFound`],
    /// [`Error::NotEnoughStartedMembers`] for the last voter, whom raft cannot do without.
    /// Promoting: [`Error::MemberNotFound`], [`Error::MemberNotLearner`]. Updating:
    /// [`Error::MemberNotFound`], [`Error::PeerUrlExists`].
    pub fn check(&self, change: &Change) -> Result<(), Error> {
        let known = |id| self.get(id).ok_or(Error::MemberNotFound);
        match change {
            Change::Add(member) => {
                let id = member.id;
                if id == NOBODY || self.members.contains_key(&id) || self.is_removed(id) {
                    return Err(Error::MemberExists);
                }
                self.check_unused(&member.peer_urls, id)
            }
            Change::Remove(id) => {
                let is_voter = !known(*id)?.is_learner;
                if is_voter && self.voters().count() == 1 {
                    return Err(Error::NotEnoughStartedMembers);
                }
                Ok(())
            }
            Change::Promote(id) if known(*id)?.is_learner => Ok(()),
            Change::Promote(_) => Err(Error::MemberNotLearner),
            Change::Update(member) => {
                known(member.id)?;
                self.check_unused(&member.peer_urls, member.id)
            }
        }
    }

    /// No member but `except` may have one of the URLs already.
    fn check_unused(&self, urls: &[String], except: u64) -> Result<(), Error> {
        let mut others = self.members.values().filter(|member| member.id != except);
        let is_used = others.any(|member| member.peer_urls.iter().any(|used| urls.contains(used)));
        if is_used { Err(Error::PeerUrlExists) } else { Ok(()) }
    }

    /// Carries a change out.
    ///
    /// # Errors
    /// As [`Members::check`]; nothing was changed then.
    pub fn change(&mut self, change: Change) -> Result<(), Error> {
        self.check(&change)?;
        match change {
            Change::Add(member) => {
                self.members.insert(member.id, member);
            }
            Change::Remove(id) => {
                self.members.remove(&id);
                self.removed.insert(id);
            }
            Change::Promote(id) => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.is_learner = false;
                }
            }
            // The rest of the member is not the caller's to say (etcd #21694 promoted it).
            Change::Update(MemberRecord { id, peer_urls, .. }) => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.peer_urls = peer_urls;
                }
            }
        }
        Ok(())
    }

    /// A started member says who it is. An unknown member is ignored: it was
    /// removed meanwhile.
    pub fn publish(&mut self, id: u64, name: String, client_urls: Vec<String>) {
        if let Some(member) = self.members.get_mut(&id) {
            member.name = name;
            member.client_urls = client_urls;
        }
    }

    /// Those who vote, by id.
    pub fn voters(&self) -> impl Iterator<Item = &MemberRecord> {
        self.members.values().filter(|member| !member.is_learner)
    }

    /// Those who only listen, by id.
    pub fn learners(&self) -> impl Iterator<Item = &MemberRecord> {
        self.members.values().filter(|member| member.is_learner)
    }

    /// The ids of those who vote, and of those who only listen.
    pub fn voters_and_learners(&self) -> (Vec<u64>, Vec<u64>) {
        let voters = self.voters().map(|member| member.id).collect();
        (voters, self.learners().map(|member| member.id).collect())
    }

    /// All members by id, as they are stored.
    pub fn records(&self) -> Vec<MemberRecord> {
        self.members.values().cloned().collect()
    }

    /// All members by id, as clients see them.
    pub fn list(&self) -> Vec<Member> {
        self.members.values().map(Member::from).collect()
    }
}

impl From<&MemberRecord> for Member {
    fn from(member: &MemberRecord) -> Member {
        Member {
            id: member.id,
            name: member.name.clone(),
            peer_ur_ls: member.peer_urls.clone(),
            client_ur_ls: member.client_urls.clone(),
            is_learner: member.is_learner,
        }
    }
}

#[cfg(test)]
mod tests;
