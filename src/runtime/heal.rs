//! A member whose checkpoint is damaged, and how it gets another without losing what it promised.
//!
//! ```text
//! 1  the log is read: whose it is, where it begins, what it holds   nothing is changed
//! 2  a peer's image is fetched, at an index not before that begin   member/snap
//! 3  a checkpoint is filled with it, read back, synced              member/healing
//! 4  the damaged one is renamed                                     member/damaged-ckpt-3
//! 5  the new one is renamed, and CURRENT names it                   member/ckpt-4
//! 6  the member is opened as after an installed snapshot            (`recover`)
//! ```
//!
//! (What sled changes in a damaged file while it tries to open it is changed, too, in what is kept.)
//!
//! Up to 4 a crash, or giving up, leaves all as it was. Between 4 and 5 `CURRENT` names what is not
//! there, or is not there itself, as before, but for `member/healing`: which is damage, too, and the
//! next start begins at 1 again. Nothing is deleted.
//!
//! # Why this is safe
//!
//! A raft member promises two things, and both are in the log, which stays: *whom it voted for in
//! which term* (the hard state), and *which entries it has* (its acknowledgements, of which
//! majorities are made). The checkpoint promises nothing: it is the state machine as of some
//! committed entry, a function of the log's prefix (raft, §7), and any member's state as of a committed
//! entry is the same function of the same prefix (State Machine Safety, §5.4.3). So it may come from
//! anybody, leader or not, of this cluster. Call the image's last entry *(i, t)*. It is committed,
//! because the peer has applied it. Then, with this member's log holding *start + 1 … last*:
//!
//! | the log                    | what becomes of it | why nothing promised is lost               |
//! |----------------------------|--------------------|--------------------------------------------|
//! | *i < start*                | the image is refused | entries between would be missing         |
//! | has *(i, t)*, or starts there | kept as it is   | by Log Matching what precedes *i* is equal; what follows is all still there |
//! | has another term at *i*    | begins anew at *i* | the committed entry at *i* is another: what this log has from there on was never committed and, since no leader without *(i, t)* can be elected any more, never will be |
//! | *last < i*                 | begins anew at *i* | an entry up to *last* is part of the committed prefix, and thus of the image, or is not and never will be, as above |
//!
//! The last two are the rule of InstallSnapshot (§7, steps 6 and 7), which `recover` follows for every
//! checkpoint marked as installed. In all cases the member then has every committed entry it had
//! acknowledged, in the log or in the image, and its last entry is *(i, t)* or what it was: it
//! votes for nobody whose log is behind that (§5.4.1), as before. Term and vote stay; where *t* is a
//! later term than the member has seen, it cannot have voted in that one, and moves there without a vote.
//! It may know less to be *committed* than before it was damaged, as after every restart, and apply
//! entries again: clients see a state that was true, and linearizable reads ask the leader anyway.
//!
//! What would break this is a log that has silently lost its end. Of a torn last write the checkpoint
//! could tell whether it had been acknowledged. If enough of it can be read it still does;
//! otherwise a log with anything torn at its end is refused ([`REACHES_UNKNOWN`]). Where `CURRENT` names
//! none, a log must reach as far as any checkpoint of its member that is there. A damaged log is never
//! healed: a member that does not know what it voted must not come back under its name.
//!
//! An image of another history is refused: of another cluster, one whose members this member does
//! not belong to, or one that contradicts an entry which this member knows to be committed.
//!
//! # A member without peers
//!
//! Its log alone rebuilds the state if it reaches back to the cluster's beginning: before the first
//! truncation. Afterwards only a snapshot that somebody saved can help, and the error says so; unless
//! the checkpoint is intact, and only the file is not that names it ([`super::current`]).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::image::{self, FillError};
use super::records::{self, Legible};
use super::recover::{Bootstrap, OnDisk, OpenError, Place, first_state, identity};
use super::space;
use crate::log::{BOOTSTRAP, Identity, Log, LogError, Mark, REACHES_UNKNOWN, Recovered};
use crate::net::pull::Pulled;
use crate::net::snapshot::HasRoom;
use crate::pb::kvorumpb::CheckpointHead;
use crate::state::StateMachine;
use crate::storage::DiskGenerations;
use crate::storage::spool::Spools;

/// A member whose checkpoint is damaged, and whose log is intact. Holds the lock of its directory.
#[derive(Debug)]
pub struct Damage {
    what: String,
    data_dir: PathBuf,
    member_dir: PathBuf,
    identity: Identity,
    log: Recovered,
    peer_urls: Vec<String>,
    generations: DiskGenerations,
    /// Why a member is not opened whose checkpoints may be intact: what is said of it when
    /// its log is not enough either.
    unnamed: Option<OpenError>,
}

/// Why an image did not take the place of a damaged checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// It cannot: another may.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// It ends before the log begins, or elsewhere than the peer said.
    #[error(
        "its state goes up to index {}, term {}, where it announced {} and {}, and this member's \
         log goes on behind {least}", .found.index, .found.term, .announced.index, .announced.term
    )]
    OtherIndex {
        /// Where it ends.
        found: Mark,
        /// Where it should have.
        announced: Mark,
        /// Where the log begins.
        least: u64,
    },
    /// This member has never been in it, or has left.
    #[error(
        "this member, {0:x}, is not a member in its state: it was removed, or is yet to be added"
    )]
    NotAMember(u64),
    /// It contradicts what is known to be committed.
    #[error(
        "its entry {} is of term {}, and this member knows another to be committed there: one of \
         the two was restored from a snapshot without the other", .0.index, .0.term
    )]
    OtherHistory(Mark),
    /// The disk failed while the checkpoint was being replaced.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Damage {
    /// Looks at a member that could not be opened because of `error`. Changes nothing. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// `error` itself if it is not of a damaged checkpoint, or the log is of no use either.
    pub fn examine(
        place: &Place,
        bootstrap: &Bootstrap,
        error: OpenError,
    ) -> Result<Damage, OpenError> {
        let Place::Disk { data_dir, wal_dir, fsync } = place else { return Err(error) };
        // One that is to go on alone has nobody to ask, and the order is not for a healthy member.
        if !error.is_damaged_checkpoint() || bootstrap.force_new_cluster {
            return Err(error);
        }
        let disk = OnDisk::of(data_dir, wal_dir.as_deref(), *fsync);
        let what = error.to_string();
        let generations = DiskGenerations::of_damaged(&disk.member_dir)?;
        let counting = generations.counting();
        // Where none is named, each that is there knows something: of the log, and of the others.
        let known_of: Vec<Legible> = match &counting {
            Some(dir) => vec![records::legible(dir)],
            None => generations.all()?.iter().rev().map(|(_, dir)| records::legible(dir)).collect(),
        };
        let named = counting.and_then(|_| known_of.first()?.head.as_ref());
        let both = |log, member| OpenError::BothDamaged { damage: what.clone(), log, member };
        let known = named.map_or(Identity::default(), records::identity);
        let is_unnamed = matches!(
            error,
            OpenError::SeveralCheckpoints { .. } | OpenError::CurrentMissing { .. }
        );
        if !Log::exists(&disk.log_dir)? {
            if is_unnamed {
                return Err(error);
            }
            let missing = LogError::Missing { dir: disk.log_dir.clone(), sequence: 1 };
            return Err(both(missing, known.member_id));
        }
        let reaches = match named {
            // An old one knows nothing of the log's end. What was installed was never in this log.
            _ if matches!(error, OpenError::CheckpointTooOld { .. }) => REACHES_UNKNOWN,
            Some(head) if head.installed => 0,
            Some(head) => head.applied_index,
            None => REACHES_UNKNOWN,
        };
        let open_log = |identity: Identity, reaches| {
            let opened = Log::open(disk.log_options(identity, reaches));
            opened.map(|(_, log)| log).map_err(|error| match error {
                LogError::Damaged { .. } | LogError::Missing { .. } => {
                    both(error, identity.member_id)
                }
                other => OpenError::Log(other),
            })
        };
        let mut log = open_log(known, reaches)?;
        if named.is_some() && log.identity != known {
            return Err(OpenError::OtherMember {
                log: disk.log_dir.clone(),
                of_log: log.identity,
                data: data_dir.clone(),
                of_checkpoint: known,
            });
        }
        let is_own = |head: &CheckpointHead| records::identity(head) == log.identity;
        let own = known_of.iter().filter(|legible| legible.head.as_ref().is_none_or(is_own));
        let own: Vec<&Legible> = own.collect();
        if named.is_none() {
            let heads = own.iter().filter_map(|legible| legible.head.as_ref());
            let written = heads.filter(|head| !head.installed);
            let reaches = written.map(|head| head.applied_index).max().unwrap_or(0);
            if log.last_index() < reaches {
                log = open_log(log.identity, reaches)?;
            }
        }
        // Perhaps of members that have gone since, but better than nothing.
        let mut members = own.iter().map(|legible| legible.members.as_slice());
        let members = members.find(|members| !members.is_empty()).unwrap_or_default();
        let others = members.iter().filter(|member| member.id != log.identity.member_id);
        let mut peer_urls: Vec<String> = others.flat_map(|other| other.peer_urls.clone()).collect();
        if members.is_empty() {
            peer_urls = bootstrap.other_peer_urls();
        }
        peer_urls.sort_unstable();
        peer_urls.dedup();
        Ok(Damage {
            what,
            data_dir: data_dir.clone(),
            member_dir: disk.member_dir,
            identity: log.identity,
            log,
            peer_urls,
            generations,
            unnamed: is_unnamed.then_some(error),
        })
    }

    /// What is damaged, and how.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Whose member this is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// An image has to go up to this entry at least.
    pub fn at_least(&self) -> u64 {
        self.log.start.index
    }

    /// Where the other members were last known to be reached; empty for a single member.
    pub fn peer_urls(&self) -> &[String] {
        &self.peer_urls
    }

    /// Where images arrive.
    ///
    /// # Errors
    /// What the disk says.
    pub fn spools(&self) -> io::Result<Spools> {
        Spools::open(Some(&self.member_dir.join("snap")))
    }

    /// Whether there is room for an image, and the checkpoint that it becomes.
    pub fn has_room(&self) -> HasRoom {
        let at = self.member_dir.clone();
        Arc::new(move |bytes| space::has_room_for_image(&at, bytes))
    }

    /// Puts an image in the place of the damaged checkpoint. Blocks on the disk, for as long as
    /// the image is large.
    ///
    /// # Errors
    /// [`ReplaceError`]: unless it is `Open`, all is as it was.
    pub fn replace(&mut self, pulled: Pulled) -> Result<(), ReplaceError> {
        let Pulled { mut spool, index, term } = pulled;
        let announced = Mark { index, term };
        let Identity { cluster_id, member_id } = self.identity;
        let mut storage = self.generations.begin_beside().map_err(FillError::from)?;
        let restored = image::fill(&mut spool, &mut storage, cluster_id, member_id, &|| false)?;
        drop((storage, spool));
        let state = StateMachine::restore(restored);
        let (found, least) = (state.applied(), self.at_least());
        if found != announced || found.index < least {
            return Err(ReplaceError::OtherIndex { found, announced, least });
        }
        if !state.members().records().iter().any(|member| member.id == member_id) {
            return Err(ReplaceError::NotAMember(member_id));
        }
        if found.index <= self.log.hard_state.commit && self.term_at(found.index) != Some(term) {
            return Err(ReplaceError::OtherHistory(found));
        }
        Ok(self.put_in_place()?)
    }

    /// Builds the state of a member without peers from its log alone.
    ///
    /// # Errors
    /// [`OpenError::Unrecoverable`] if the log does not reach back to the cluster's beginning, or
    /// what the disk says.
    pub fn rebuild(&mut self, bootstrap: &Bootstrap) -> Result<(), OpenError> {
        let first = first_state(bootstrap, &self.data_dir);
        let first = first.ok().filter(|state| {
            self.log.start == BOOTSTRAP
                && state.applied() == BOOTSTRAP
                && identity(state) == self.identity
        });
        let Some(mut state) = first else {
            if let Some(unnamed) = self.unnamed.take() {
                return Err(unnamed);
            }
            let start = self.log.start.index;
            return Err(OpenError::Unrecoverable {
                damage: self.what.clone(),
                first: start + 1,
                last: self.log.last_index(),
                data: self.data_dir.clone(),
            });
        };
        let mut storage = self.generations.begin_beside()?;
        records::fill(&mut storage, &state.cut())?;
        drop(storage);
        self.put_in_place()
    }

    fn put_in_place(&mut self) -> Result<(), OpenError> {
        let aside = self.generations.replace_damaged()?;
        if aside.is_empty() {
            tracing::warn!("nothing was left of the damaged checkpoint to be kept");
        }
        for path in aside {
            tracing::warn!(
                path = %path.display(),
                "the damaged checkpoint was moved aside; nothing reads it any more, and it may be \
                 removed. Check the disk"
            );
        }
        Ok(())
    }

    /// The term of an entry of the log.
    fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.log.start.index {
            return Some(self.log.start.term);
        }
        let entry = self.log.entries.iter().find(|entry| entry.index == index);
        entry.map(|entry| entry.term)
    }
}

#[cfg(test)]
mod tests;
