//! Who belongs to the cluster, and how members and the cluster get their ids.
//!
//! The ids are etcd's: a member's id is derived from its peer URLs and the cluster
//! token, the cluster's from its first members' ids, so that every member computes
//! the same ones from the same flags (etcd server/etcdserver/api/membership).

use std::collections::BTreeMap;

use sha1::{Digest as _, Sha1};

use crate::pb::etcdserverpb::Member;
use crate::pb::kvorumpb::MemberRecord;

/// The members of one cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Members {
    cluster_id: u64,
    members: BTreeMap<u64, MemberRecord>,
}

/// The id of a member of a new cluster.
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

impl Members {
    /// The members of a new cluster: (name, peer URLs) of each.
    pub fn bootstrap(initial: &[(String, Vec<String>)], cluster_token: &str) -> Members {
        let records = initial.iter().map(|(name, peer_urls)| MemberRecord {
            id: member_id(peer_urls, cluster_token),
            name: name.clone(),
            peer_urls: peer_urls.clone(),
            client_urls: Vec::new(),
            is_learner: false,
        });
        let members: BTreeMap<u64, MemberRecord> =
            records.map(|record| (record.id, record)).collect();
        let ids: Vec<u64> = members.keys().copied().collect();
        Members { cluster_id: cluster_id(&ids), members }
    }

    /// The members as a checkpoint holds them.
    pub fn restore(cluster_id: u64, records: Vec<MemberRecord>) -> Members {
        let members = records.into_iter().map(|record| (record.id, record)).collect();
        Members { cluster_id, members }
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    /// One member.
    pub fn get(&self, id: u64) -> Option<&MemberRecord> {
        self.members.get(&id)
    }

    /// A started member says who it is. An unknown member is ignored: it was
    /// removed meanwhile.
    pub fn publish(&mut self, id: u64, name: String, client_urls: Vec<String>) {
        if let Some(member) = self.members.get_mut(&id) {
            member.name = name;
            member.client_urls = client_urls;
        }
    }

    /// The ids of those who vote, and of those who only listen.
    pub fn voters_and_learners(&self) -> (Vec<u64>, Vec<u64>) {
        let (learners, voters): (Vec<_>, Vec<_>) =
            self.members.values().partition(|member| member.is_learner);
        let ids = |members: Vec<&MemberRecord>| members.iter().map(|member| member.id).collect();
        (ids(voters), ids(learners))
    }

    /// All members by id, as they are stored.
    pub fn records(&self) -> Vec<MemberRecord> {
        self.members.values().cloned().collect()
    }

    /// All members by id, as clients see them.
    pub fn list(&self) -> Vec<Member> {
        self.members
            .values()
            .map(|member| Member {
                id: member.id,
                name: member.name.clone(),
                peer_ur_ls: member.peer_urls.clone(),
                client_ur_ls: member.client_urls.clone(),
                is_learner: member.is_learner,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(urls: &[&str]) -> Vec<u64> {
        urls.iter().map(|url| member_id(&[(*url).to_owned()], "etcd-cluster")).collect()
    }

    /// Ids that real etcd gives.
    #[test]
    fn ids_are_those_of_etcd() {
        let alone = ids(&["http://localhost:2380"]);
        assert_eq!(alone, [0x8e9e05c52164694d]);
        assert_eq!(cluster_id(&alone), 0xcdf818194e3a8c32);

        let three =
            ids(&["http://127.0.0.1:2380", "http://127.0.0.1:22380", "http://127.0.0.1:32380"]);
        assert_eq!(three, [0xb71f75320dc06a6c, 0x9e737febb6b99eee, 0x0628170c800dbcee]);
        assert_eq!(cluster_id(&three), 0x066d3a070bf89b39);
    }

    #[test]
    fn a_member_is_reached_where_it_said() {
        let url = vec!["http://localhost:2380".to_owned()];
        let mut members = Members::bootstrap(&[("default".to_owned(), url)], "etcd-cluster");
        let id = members.list()[0].id;
        members.publish(id, "other".to_owned(), vec!["http://localhost:2379".to_owned()]);
        members.publish(1, "nobody".to_owned(), vec![]);
        let list = members.list();
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].name, "other");
        assert_eq!(list[0].client_ur_ls, ["http://localhost:2379"]);
    }
}
