//! etcd's three comparisons of the members' data (server/etcdserver/corrupt.go).
//!
//! | when                                         | what is compared               | a difference     |
//! |----------------------------------------------|--------------------------------|------------------|
//! | before serving, `InitialCorruptCheck`        | all data, at this revision     | refuse to start  |
//! | every `--corrupt-check-time`, the leader     | all data, at this revision     | CORRUPT, by vote |
//! | every `--compact-hash-check-time`, the leader| the last compactions' hashes   | CORRUPT, by vote |
//!
//! They read all data, so they find what changed in memory or in the checkpoint as well, and
//! cost as much. What tells members apart that *applied* differently is in [`super::divergence`],
//! costs nothing and is always on.
//!
//! Where etcd's leader takes itself for right, a majority decides here; [`super::divergence`] has
//! what follows for the member that is named.
//!
//! Hashes compare only between equal compact revisions. A member that does not answer is not
//! taken for one that agrees: it is left out, and the log says so.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Engine;
use super::vote::{Vote, vote};
use crate::error::Error;
use crate::net::refusal;
use crate::pb::etcdserverpb::{HashKvRequest, HashKvResponse};
use crate::runtime::hashes::KeyValueHash;

/// Why a member does not start.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Inconsistent {
    /// It has other data than its peers.
    #[error(
        "{0:x} found data inconsistency with peers: remove the member that is wrong (etcdctl \
         endpoint hashkv tells them apart), remove its data directory, and add it anew"
    )]
    Peers(u64),
    /// It cannot work out its own hash.
    #[error("{0:x} failed to fetch hash ({1})")]
    Own(u64, Error),
}

/// What a peer answered, or why it did not; `None`: nothing that is known here.
struct PeerHash {
    id: u64,
    answer: Result<HashKvResponse, Option<Error>>,
}

/// What the leader finds wrong with a follower, if anything, besides its hash; `after` is its own
/// hash, worked out after the answer.
fn wrong_with(after: &HashKvResponse, follower: &HashKvResponse) -> Option<&'static str> {
    let revision = |hash: &HashKvResponse| hash.header.as_ref().map_or(0, |header| header.revision);
    if revision(follower) > revision(after) {
        Some("revision from follower must be less than or equal to leader's")
    } else if follower.compact_revision > after.compact_revision {
        Some("compact revision from follower must be less than or equal to leader's")
    } else {
        None
    }
}

impl Engine {
    /// Compares this member's data with that of all peers that answer, before it serves.
    ///
    /// # Errors
    /// [`Inconsistent`].
    pub(crate) async fn check_initially(&self) -> Result<(), Inconsistent> {
        let this = self.parts.member_id;
        let member = format!("{this:x}");
        tracing::info!(member, timeout = ?self.request_timeout(), "starting initial corruption check");
        let own = self.hash_kv(HashKvRequest { revision: 0 }).await;
        let own = own.map_err(|error| Inconsistent::Own(this, error))?;
        let mut is_different = false;
        for PeerHash { id, answer } in self.hashes_of_peers(own.hash_revision).await {
            let peer = format!("{id:x}");
            match answer {
                Ok(theirs) if theirs.hash == own.hash => {}
                Ok(theirs) if theirs.compact_revision == own.compact_revision => {
                    is_different = true;
                    tracing::warn!(
                        peer,
                        revision = own.hash_revision,
                        compact_revision = own.compact_revision,
                        hash = own.hash,
                        peer_hash = theirs.hash,
                        "found different hash values from remote peer"
                    );
                }
                Ok(theirs) => tracing::warn!(
                    peer,
                    compact_revision = own.compact_revision,
                    peer_compact_revision = theirs.compact_revision,
                    "found different compact revision values from remote peer"
                ),
                Err(Some(Error::FutureRevision)) => {
                    tracing::warn!(peer, "cannot fetch hash from slow remote peer");
                }
                Err(Some(Error::Compacted)) => tracing::warn!(
                    peer,
                    "cannot fetch hash from remote peer; local member is behind"
                ),
                Err(_) => tracing::warn!(peer, "cannot fetch hash from remote peer"),
            }
        }
        if is_different {
            return Err(Inconsistent::Peers(this));
        }
        tracing::info!(member, "initial corruption checking passed; no corruption");
        Ok(())
    }

    /// Compares all data every `every` while this member leads, until the future is dropped.
    pub(crate) async fn check_periodically(self, every: Duration) {
        tracing::info!(interval = ?every, "enabled corruption checking");
        loop {
            sleep(every).await;
            if !self.raft_status().is_leader {
                continue;
            }
            if let Err(error) = self.check_all_data().await {
                tracing::warn!(%error, "failed to check hash KV");
            }
        }
    }

    /// Compares compactions every `every` while this member leads, until the future is dropped.
    pub(crate) async fn check_compactions(self, every: Duration) {
        let mut checked = 0;
        loop {
            sleep(every).await;
            if self.raft_status().is_leader {
                self.check_newest_compaction(&mut checked).await;
            }
        }
    }

    async fn check_all_data(&self) -> Result<(), Error> {
        let before = self.hash_kv(HashKvRequest { revision: 0 }).await?;
        let peers = self.hashes_of_peers(before.hash_revision).await;
        self.linearizable_barrier().await?;
        let after = self.hash_kv(HashKvRequest { revision: 0 }).await?;
        let is_same_moment = after.hash_revision == before.hash_revision
            && after.compact_revision == before.compact_revision;
        let this = self.parts.member_id;
        let members = peers.len() + 1;
        let mut wrong = BTreeSet::new();
        if is_same_moment && after.hash != before.hash {
            tracing::warn!(revision = before.hash_revision, "found hash mismatch");
            wrong.insert(this);
        }
        let mut hashes = vec![(this, before.hash)];
        let mut checked = 0;
        for PeerHash { id, answer } in peers {
            let peer = format!("{id:x}");
            let Ok(answer) = answer else {
                tracing::warn!(peer, "a peer was not checked: it did not answer");
                continue;
            };
            checked += 1;
            if let Some(reason) = wrong_with(&after, &answer) {
                tracing::error!(peer, "{reason}");
                wrong.insert(id);
            }
            if answer.compact_revision == before.compact_revision {
                hashes.push((id, answer.hash));
            }
        }
        match vote(members, &hashes) {
            Vote::Equal => {}
            Vote::Named(members) => wrong.extend(members),
            Vote::Nobody => {
                wrong.insert(0);
            }
        }
        if !wrong.is_empty() {
            let (revision, compact_revision) = (before.hash_revision, before.compact_revision);
            let hashes: Vec<String> =
                hashes.iter().map(|(id, hash)| format!("{id:x}: {hash}")).collect();
            tracing::error!(
                revision,
                compact_revision,
                ?hashes,
                "same compact revision then hashes must match"
            );
        }
        for member in wrong {
            self.raise_corrupt(member).await;
        }
        tracing::info!(number_of_peers_checked = checked, "finished peer corruption check");
        Ok(())
    }

    /// Compares the newest compaction that all members have hashed, if it is beyond `checked`.
    async fn check_newest_compaction(&self, checked: &mut i64) {
        let unchecked = self.parts.hashes.newest_first();
        for own in unchecked.into_iter().take_while(|hash| hash.revision > *checked) {
            let KeyValueHash { hash, compact_revision, revision } = own;
            let peers = self.hashes_of_peers(revision).await;
            let members = peers.len() + 1;
            if members == 1 {
                return;
            }
            let mut hashes = vec![(self.parts.member_id, hash)];
            for PeerHash { id, answer } in peers {
                match answer {
                    Ok(theirs) if theirs.compact_revision == compact_revision => {
                        hashes.push((id, theirs.hash));
                    }
                    answer => {
                        let reason = match answer {
                            Ok(_) => "another compact revision",
                            Err(_) => "no response",
                        };
                        tracing::warn!(peer = format!("{id:x}"), reason, "Skipped peer's hash");
                    }
                }
            }
            match vote(members, &hashes) {
                Vote::Equal if hashes.len() == members => {
                    *checked = revision;
                    tracing::info!(revision, "successfully checked hash on whole cluster");
                    return;
                }
                // An earlier one may be hashed everywhere.
                Vote::Equal => {}
                Vote::Named(wrong) => {
                    for member in wrong {
                        let member_id = format!("{member:x}");
                        tracing::error!(member_id, revision, "Detected compaction hash mismatch");
                        self.raise_corrupt(member).await;
                    }
                    return;
                }
                Vote::Nobody => {
                    tracing::error!(
                        revision,
                        "Detected compaction hash mismatch but cannot identify the corrupted \
                         members, so intentionally set the memberID as 0"
                    );
                    self.raise_corrupt(0).await;
                    return;
                }
            }
        }
    }

    /// What all other members say of a revision.
    async fn hashes_of_peers(&self, revision: i64) -> Vec<PeerHash> {
        let mut calls = JoinSet::new();
        for id in self.other_members() {
            let client = self.parts.peers.client(id);
            let patience = self.request_timeout();
            calls.spawn(async move {
                let Some(mut client) = client else { return PeerHash { id, answer: Err(None) } };
                let call = client.hash_kv(HashKvRequest { revision });
                let answer = timeout(patience, call).await;
                let answer = answer.map_or(Err(Some(Error::Timeout)), refusal::answered);
                PeerHash { id, answer }
            });
        }
        calls.join_all().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcdserverpb::ResponseHeader;

    fn hash(newest: i64, compact_revision: i64, hash: u32) -> HashKvResponse {
        let header = Some(ResponseHeader { revision: newest, ..ResponseHeader::default() });
        HashKvResponse { header, hash, compact_revision, hash_revision: 10 }
    }

    #[test]
    fn a_follower_is_wrong_that_is_ahead_of_its_leader() {
        let after = hash(12, 6, 8);
        let reason = |follower| wrong_with(&after, &follower).unwrap_or_default();
        assert_eq!(reason(hash(10, 4, 7)), "");
        assert_eq!(reason(hash(12, 6, 9)), "");
        assert!(reason(hash(13, 4, 7)).starts_with("revision from follower"));
        assert!(reason(hash(12, 7, 7)).starts_with("compact revision from follower"));
    }
}
