//! Whether all members came to the same state: asked every second while entries are applied.
//!
//! ```text
//! own      …1000 ✓  2048 ✓  3310 ✓          own hashes at the last rounds, and milestones
//! peer 7   …1000 ✓  2048 ✓  3310 ✓
//! peer 9   …1000 ✓  2048 ✗   –               behind, and different: 9 is named, not for being behind
//! ```
//!
//! Each member asks the others for their rolling hashes ([`crate::state::rolling`]) at indexes
//! that it has applied, and compares. Where hashes differ, a majority says who is wrong, as in
//! etcd's check of compaction hashes: the CORRUPT alarm is raised for the others, and a member that
//! finds itself among them stops, before it serves or leads any longer. When no majority can be
//! found, because there are two members or the rest are away for [`UNDECIDED_ROUNDS`], nobody
//! knows who is wrong: the alarm is raised for member 0, which means the cluster, and nobody stops.
//!
//! A member that has a CORRUPT alarm of its own stops whoever raised it, also in the checks of
//! [`super::corrupt`].
//!
//! While any CORRUPT alarm is active all members refuse writes. Operators replace the member that
//! was named and disarm the alarm; when it was disarmed too early it is raised again.
//!
//! An index at which a member agreed is not asked for again: the hash is a chain.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Engine;
use super::vote::{Vote, vote};
use crate::pb::etcdserverpb::{AlarmMember, AlarmRequest, AlarmType, alarm_request::AlarmAction};
use crate::pb::kvorumpb::RollingHashesRequest;
use crate::runtime::rolling_hashes::At;

/// Time between two rounds. In one in which nothing is new nobody is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// Rounds of which the newest index is asked for: for members that are behind.
const SAMPLES_MAX: usize = 32;
/// Milestones that are asked for: for those that are further behind.
const MILESTONES_MAX: usize = 32;
/// Time for a member to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Rounds in which hashes differ and there is no majority, before no more members are waited for.
const UNDECIDED_ROUNDS: u32 = 10;
/// A member that is wrong waits no longer for its alarm before it stops.
const ALARM_TIMEOUT: Duration = Duration::from_secs(2);

/// What a round has shown.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nobody differs from anybody.
    Agreed,
    /// These have another hash at the index than a majority.
    Diverged { index: u64, members: Vec<u64> },
    /// There are several hashes at the index, and none of a majority. Whether all members have
    /// said theirs.
    Undecided { index: u64, all: bool },
}

/// Hashes that a member answered, by index.
type Answer = BTreeMap<u64, u64>;

/// How far each other member is known to agree.
type AgreedUpTo = BTreeMap<u64, u64>;

/// Judges from what `this` member has at some indexes, newest first, and what the others answered.
fn judge(
    this: u64,
    own: &[At],
    others: &[u64],
    agreed: &AgreedUpTo,
    answers: &BTreeMap<u64, Answer>,
) -> Verdict {
    let members = others.len().saturating_add(1);
    let mut verdict = Verdict::Agreed;
    for At { index, hash } in own {
        let mut hashes = vec![(this, *hash)];
        for other in others {
            let answered = answers.get(other).and_then(|answer| answer.get(index)).copied();
            let before = agreed.get(other).filter(|upto| *upto >= index).map(|_| *hash);
            if let Some(theirs) = answered.or(before) {
                hashes.push((*other, theirs));
            }
        }
        let all = hashes.len() == members;
        match vote(members, &hashes) {
            Vote::Equal => {}
            Vote::Named(members) => return Verdict::Diverged { index: *index, members },
            Vote::Nobody if all || verdict == Verdict::Agreed => {
                verdict = Verdict::Undecided { index: *index, all };
            }
            Vote::Nobody => {}
        }
    }
    verdict
}

/// Notes how far each has been found to agree.
fn note_agreed(agreed: &mut AgreedUpTo, own: &[At], answers: &BTreeMap<u64, Answer>) {
    for (other, answer) in answers {
        let equal = own.iter().filter(|at| answer.get(&at.index) == Some(&at.hash));
        if let Some(newest) = equal.map(|at| at.index).max() {
            let upto = agreed.entry(*other).or_default();
            *upto = newest.max(*upto);
        }
    }
}

/// What is remembered from round to round.
#[derive(Default)]
struct Rounds {
    /// Which state, counted: it may be replaced by another member's.
    replaced: u64,
    /// The newest index of each of the last rounds.
    samples: VecDeque<At>,
    agreed: AgreedUpTo,
    /// Rounds in a row that were undecided.
    undecided: u32,
    /// Who was already spoken of in the log.
    told: BTreeSet<u64>,
}

impl Engine {
    /// Compares this member with the others until the future is dropped, or it has to stop.
    pub(crate) async fn compare_states(self) {
        let mut rounds = Rounds::default();
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.parts.fault.get().is_none() {
            ticks.tick().await;
            self.compare(&mut rounds).await;
            self.stop_if_corrupt();
        }
    }

    /// A member that was named must not serve what it has. One that is alone is left to whoever
    /// raised the alarm.
    fn stop_if_corrupt(&self) {
        let this = self.parts.member_id;
        let is_named = {
            let state = self.parts.state.read();
            let mut alarms = state.alarms(AlarmType::Corrupt).into_iter();
            state.members().records().len() > 1 && alarms.any(|alarm| alarm.member_id == this)
        };
        if is_named {
            self.stop_as_corrupt("the CORRUPT alarm is raised for it");
        }
    }

    fn stop_as_corrupt(&self, why: &str) {
        let this = self.parts.member_id;
        self.parts.fault.raise(
            "self-check",
            format!(
                "what this member, {this:x}, holds must not be served: {why}; remove the member \
                 (etcdctl member remove {this:x}), remove its data directory, add it anew, and \
                 disarm the alarm (etcdctl alarm disarm)"
            ),
        );
    }

    async fn compare(&self, rounds: &mut Rounds) {
        let hashes = &self.parts.rolling_hashes;
        let replaced = hashes.replaced();
        if rounds.replaced != replaced {
            *rounds = Rounds { replaced, ..Rounds::default() };
        }
        if let Some(newest) = hashes.newest()
            && rounds.samples.back() != Some(&newest)
        {
            if rounds.samples.len() >= SAMPLES_MAX {
                rounds.samples.pop_front();
            }
            rounds.samples.push_back(newest);
        }
        let this = self.parts.member_id;
        let others = self.other_members();
        rounds.agreed.retain(|id, _| others.contains(id));
        let all_agree_upto = others
            .iter()
            .map(|id| rounds.agreed.get(id).copied().unwrap_or_default())
            .min()
            .unwrap_or(u64::MAX);
        let mut own = hashes.milestones(all_agree_upto, MILESTONES_MAX);
        own.extend(rounds.samples.iter().filter(|at| at.index > all_agree_upto));
        own.sort_unstable_by_key(|at| std::cmp::Reverse(at.index));
        own.dedup();
        if own.is_empty() {
            return;
        }
        let answers = self.ask_for_hashes(&own, &others, &rounds.agreed).await;
        if hashes.replaced() != rounds.replaced {
            return;
        }
        let verdict = judge(this, &own, &others, &rounds.agreed, &answers);
        note_agreed(&mut rounds.agreed, &own, &answers);
        self.act_on(verdict, rounds).await;
    }

    async fn ask_for_hashes(
        &self,
        own: &[At],
        others: &[u64],
        agreed: &AgreedUpTo,
    ) -> BTreeMap<u64, Answer> {
        let mut calls = JoinSet::new();
        for other in others.iter().copied() {
            let upto = agreed.get(&other).copied().unwrap_or_default();
            let indexes: Vec<u64> =
                own.iter().map(|at| at.index).filter(|index| *index > upto).collect();
            // One that is not connected would take its time, and answers a later round.
            if indexes.is_empty() || self.parts.peers.active_since(other).is_none() {
                continue;
            }
            let Some(mut client) = self.parts.peers.client(other) else { continue };
            calls.spawn(async move {
                let request = RollingHashesRequest { indexes };
                let answered = timeout(CALL_TIMEOUT, client.rolling_hashes(request)).await;
                let hashes = answered.ok()?.ok()?.into_inner().hashes;
                Some((other, hashes.into_iter().map(|at| (at.index, at.hash)).collect()))
            });
        }
        calls.join_all().await.into_iter().flatten().collect()
    }

    async fn act_on(&self, verdict: Verdict, rounds: &mut Rounds) {
        let this = self.parts.member_id;
        match verdict {
            Verdict::Agreed => {
                rounds.undecided = 0;
                rounds.told.clear();
            }
            Verdict::Diverged { index, members } => {
                rounds.undecided = 0;
                for member in &members {
                    if rounds.told.insert(*member) {
                        let member = format!("{member:x}");
                        tracing::error!(
                            member,
                            index,
                            "the state of a member differs from a majority's: remove it \
                             (etcdctl member remove), remove its data directory, add it anew, then \
                             etcdctl alarm disarm"
                        );
                    }
                }
                if members.contains(&this) {
                    // First, for as this member goes it takes what it knows along.
                    let _ = timeout(ALARM_TIMEOUT, self.raise_corrupt(this)).await;
                    let why = format!("at entry {index} it differs from what a majority holds");
                    return self.stop_as_corrupt(&why);
                }
                for member in members {
                    self.raise_corrupt(member).await;
                }
            }
            Verdict::Undecided { index, all } => {
                rounds.undecided += 1;
                if !all && rounds.undecided < UNDECIDED_ROUNDS {
                    return;
                }
                if rounds.told.insert(0) {
                    tracing::error!(
                        index,
                        "the states of members differ, and no majority agrees on one: find out which \
                         is right (etcdctl endpoint hashkv), replace the other members, then \
                         etcdctl alarm disarm"
                    );
                }
                self.raise_corrupt(0).await;
            }
        }
    }

    /// Raises the CORRUPT alarm for a member, unless it is active; 0: for the cluster.
    pub(super) async fn raise_corrupt(&self, member_id: u64) {
        let alarm = AlarmType::Corrupt as i32;
        let active = self.parts.state.read().alarms(AlarmType::Corrupt);
        if active.contains(&AlarmMember { member_id, alarm }) {
            return;
        }
        let request = AlarmRequest { action: AlarmAction::Activate as i32, member_id, alarm };
        if let Err(error) = self.alarm(request).await {
            let member = format!("{member_id:x}");
            tracing::warn!(member, %error, "cannot raise the CORRUPT alarm yet");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [At; 3] =
        [At { index: 30, hash: 3 }, At { index: 20, hash: 2 }, At { index: 10, hash: 1 }];

    /// Judged by member 1, with these answers of others.
    fn judged(others: &[u64], answers: &[(u64, &[(u64, u64)])]) -> Verdict {
        judged_after(&[], others, answers)
    }

    fn judged_after(
        agreed: &[(u64, u64)],
        others: &[u64],
        answers: &[(u64, &[(u64, u64)])],
    ) -> Verdict {
        let answers = answers.iter().map(|(id, pairs)| (*id, pairs.iter().copied().collect()));
        judge(1, &OWN, others, &agreed.iter().copied().collect(), &answers.collect())
    }

    fn diverged(index: u64, members: &[u64]) -> Verdict {
        Verdict::Diverged { index, members: members.to_vec() }
    }

    #[test]
    fn members_that_are_behind_or_away_are_not_accused() {
        assert_eq!(judged(&[], &[]), Verdict::Agreed);
        assert_eq!(judged(&[2, 3], &[]), Verdict::Agreed);
        assert_eq!(judged(&[2, 3], &[(2, &[(10, 1)]), (3, &[])]), Verdict::Agreed);
        assert_eq!(judged(&[2, 3], &[(2, &[(10, 1), (20, 2)]), (3, &[(30, 3)])]), Verdict::Agreed);
        // An index that was not asked for says nothing.
        assert_eq!(judged(&[2, 3], &[(2, &[(15, 9)]), (3, &[(15, 8)])]), Verdict::Agreed);
    }

    #[test]
    fn a_majority_names_the_others() {
        let right: &[(u64, u64)] = &[(10, 1), (20, 2), (30, 3)];
        let wrong: &[(u64, u64)] = &[(10, 1), (20, 7), (30, 8)];
        assert_eq!(judged(&[2, 3], &[(2, right), (3, wrong)]), diverged(30, &[3]));
        // It is this one.
        assert_eq!(judged(&[2, 3], &[(2, wrong), (3, wrong)]), diverged(30, &[1]));
        // The one that is wrong is also behind, or the one that is right.
        assert_eq!(judged(&[2, 3], &[(2, right), (3, &[(20, 7)])]), diverged(20, &[3]));
        assert_eq!(judged(&[2, 3], &[(2, &[(20, 2)]), (3, wrong)]), diverged(20, &[3]));
        // Two are wrong, each in its way.
        let other: &[(u64, u64)] = &[(30, 9)];
        let five = [(2, right), (3, right), (4, wrong), (5, other)];
        assert_eq!(judged(&[2, 3, 4, 5], &five), diverged(30, &[4, 5]));
        // A majority is one of all members, not of those who answered.
        let some = [(2, right), (4, wrong)];
        let undecided = Verdict::Undecided { index: 30, all: false };
        assert_eq!(judged(&[2, 3, 4, 5], &some), undecided);
    }

    #[test]
    fn who_agreed_later_agreed_before() {
        let wrong: &[(u64, u64)] = &[(20, 7)];
        let undecided = Verdict::Undecided { index: 20, all: false };
        assert_eq!(judged(&[2, 3], &[(3, wrong)]), undecided);
        assert_eq!(judged_after(&[(2, 25)], &[2, 3], &[(3, wrong)]), diverged(20, &[3]));
        assert_eq!(judged_after(&[(2, 15)], &[2, 3], &[(3, wrong)]), undecided);

        let mut agreed = AgreedUpTo::from([(2, 20)]);
        let answer = |pairs: &[(u64, u64)]| pairs.iter().copied().collect::<Answer>();
        let answers = [(2, answer(&[(10, 1)])), (3, answer(&[(10, 1), (30, 7)])), (4, answer(&[]))];
        note_agreed(&mut agreed, &OWN, &answers.into_iter().collect());
        assert_eq!(agreed, AgreedUpTo::from([(2, 20), (3, 10)]));
    }

    #[test]
    fn without_a_majority_nobody_is_named() {
        let wrong: &[(u64, u64)] = &[(10, 1), (20, 7)];
        let all = Verdict::Undecided { index: 20, all: true };
        assert_eq!(judged(&[2], &[(2, wrong)]), all);
        assert_eq!(judged(&[2, 3], &[(2, wrong), (3, &[(20, 8)])]), all);
    }
}
