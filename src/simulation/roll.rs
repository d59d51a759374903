//! Who belongs to the simulated cluster, as of every committed entry.
//!
//! ```text
//!   index     2 … 30      31 … 77        78 …
//!   voters    a b c       a b c d        b c d       one more or one less at a time
//!   removed                              a           for ever
//! ```
//!
//! **What decides.** A leader counts by the configuration that it has applied. Another change
//! is proposed only when the last one is applied, so it is behind the log by one change at
//! most. So an entry is committed when it is on the disks of a majority of the voters as of
//! the entry before it, or of those from before the last change: [`Roll::decide`]. Who only
//! listens, or was removed, is none of them, whatever it acknowledges.
//!
//! **What is promised of a member that was removed** is in `judge.rs`.

use std::collections::BTreeSet;

use crate::pb::etcdserverpb::Member;
use crate::pb::kvorumpb::{MemberRecord, member_change::Change};
use crate::raft::Configuration;
use crate::state::members::{Members, changed};
use crate::state::reconfig::quorum;

/// The members from an entry on.
struct Since {
    index: u64,
    members: Members,
}

/// How often what has changed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) added: u64,
    pub(super) promoted: u64,
    pub(super) removed: u64,
}

/// See the module documentation.
pub(super) struct Roll {
    history: Vec<Since>,
    /// Those who vote now, and those who did before the last change of raft's configuration.
    voters: [BTreeSet<u64>; 2],
    removed: BTreeSet<u64>,
    pub(super) changes: Changes,
}

fn ids<'a>(members: impl Iterator<Item = &'a MemberRecord>) -> BTreeSet<u64> {
    members.map(|member| member.id).collect()
}

impl Roll {
    pub(super) fn new(index: u64, members: &Members) -> Roll {
        let history = vec![Since { index, members: members.clone() }];
        let voters = ids(members.voters());
        let voters = [voters.clone(), voters];
        Roll { history, voters, removed: BTreeSet::new(), changes: Changes::default() }
    }

    /// The entry at `index` is applied, and these are the members then. `is_change`: it
    /// changes raft's configuration.
    pub(super) fn applied(
        &mut self,
        index: u64,
        is_change: bool,
        members: &Members,
    ) -> Result<(), String> {
        let before = self.last();
        if before == members {
            return Ok(());
        }
        let (old, new) = (ids(before.voters()), ids(members.voters()));
        let (old_learners, new_learners) = (ids(before.learners()), ids(members.learners()));
        let differ = old.symmetric_difference(&new).count();
        if differ > 1 || new.is_empty() {
            return Err(format!("entry {index} makes voters of {old:x?} these: {new:x?}"));
        }
        let is_other = (&old, &old_learners) != (&new, &new_learners);
        if is_other && !is_change {
            return Err(format!("entry {index} changes who belongs, and raft does not know it"));
        }
        let all = &old | &old_learners;
        let left = &new | &new_learners;
        if let Some(id) = left.intersection(&self.removed).next() {
            return Err(format!("entry {index} brings {id:x} back, which was removed"));
        }
        self.changes.added += left.difference(&all).count() as u64;
        self.changes.promoted += new.intersection(&old_learners).count() as u64;
        self.changes.removed += all.difference(&left).count() as u64;
        self.removed.extend(all.difference(&left));
        if members.removed().into_iter().collect::<BTreeSet<u64>>() != self.removed {
            return Err(format!("entry {index} forgets who was removed: {:x?}", self.removed));
        }
        self.history.push(Since { index, members: members.clone() });
        if is_other {
            self.voters = [new, old];
        }
        Ok(())
    }

    /// The members now.
    pub(super) fn last(&self) -> &Members {
        &self.history[self.history.len() - 1].members
    }

    /// The members as of an entry.
    fn at(&self, index: u64) -> Option<&Members> {
        let end = self.history.partition_point(|since| since.index <= index);
        self.history.get(end.checked_sub(1)?).map(|since| &since.members)
    }

    /// Whether those who hold the entry that comes next have committed it with that.
    pub(super) fn decide(&self, holders: &[u64]) -> bool {
        self.voters.iter().any(|voters| {
            let holding = holders.iter().filter(|id| voters.contains(id)).count();
            holding >= quorum(voters.len())
        })
    }

    /// Whether one that was removed may have to help another to learn that it is alone. raft
    /// makes changes when they are applied, so that the second of two knows that it needs
    /// nobody only when it hears that this is committed, from the first.
    pub(super) fn is_needed(&self, id: u64) -> bool {
        let [now, before] = &self.voters;
        now.len() == 1 && before.contains(&id)
    }

    /// Whether this is raft's configuration as of an entry.
    pub(super) fn is_configuration(&self, index: u64, found: &Configuration) -> bool {
        self.at(index).is_some_and(|members| {
            let (voters, learners) = members.voters_and_learners();
            *found == Configuration { voters, learners }
        })
    }

    /// Where a change was made that began after `after`, and was answered with these members.
    pub(super) fn made_at(&self, after: u64, change: &Change, answer: &[Member]) -> Option<u64> {
        let id = changed(change);
        let is_made = |members: &Members| match change {
            Change::Add(added) => {
                members.get(id).is_some_and(|found| found.is_learner == added.is_learner)
            }
            Change::Promote(_) => members.get(id).is_some_and(|found| !found.is_learner),
            Change::Update(update) => {
                members.get(id).is_some_and(|found| found.peer_urls == update.peer_urls)
            }
            Change::Remove(_) => members.is_removed(id),
        };
        let found = self
            .history
            .iter()
            .find(|since| is_made(&since.members) && since.members.list() == answer)?;
        // One that changes nothing, such as the same URLs, leaves the members as they were.
        (found.index > after || matches!(change, Change::Update(_))).then_some(found.index)
    }
}
