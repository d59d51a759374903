//! The rolling hashes of the last applied entries, to be compared with other members'.
//!
//! Members apply at their own pace, and can only be compared at the same index. So each
//! remembers every one of the last `RECENT_MAX` indexes, which lets members be compared that
//! are a moment apart, and, for those further apart, the last `MILESTONES_MAX` multiples of
//! `MILESTONE_EVERY`.

use std::collections::VecDeque;

use parking_lot::Mutex;

/// Entries of which each has its hash remembered: 64 KiB.
const RECENT_MAX: usize = 4096;
/// The hash of every entry whose index is a multiple of this is remembered for longer.
const MILESTONE_EVERY: u64 = 1024;
/// That many of them: they reach a quarter of a million entries back.
const MILESTONES_MAX: usize = 256;

/// How the state came to be, up to one index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The index.
    pub index: u64,
    /// [`crate::state::StateMachine::rolling_hash`] there.
    pub hash: u64,
}

/// What is remembered. Written by the apply thread.
#[derive(Debug)]
pub struct RollingHashes {
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    recent: VecDeque<At>,
    milestones: VecDeque<At>,
    /// Counts the states: one from another member replaces this one's.
    replaced: u64,
}

impl RollingHashes {
    /// Begins with what was recovered.
    pub fn new(recovered: At) -> RollingHashes {
        let kept = Kept { recent: [recovered].into(), milestones: VecDeque::new(), replaced: 0 };
        RollingHashes { kept: Mutex::new(kept) }
    }

    /// These were applied, in this order.
    pub fn extend(&self, applied: &[At]) {
        let mut kept = self.kept.lock();
        for at in applied {
            push(&mut kept.recent, *at, RECENT_MAX);
            if at.index.is_multiple_of(MILESTONE_EVERY) {
                push(&mut kept.milestones, *at, MILESTONES_MAX);
            }
        }
    }

    /// The state is another member's now: what led to the one before is forgotten.
    pub fn replace(&self, at: At) {
        let mut kept = self.kept.lock();
        kept.recent = [at].into();
        kept.milestones.clear();
        kept.replaced += 1;
    }

    /// How often the state was replaced.
    pub fn replaced(&self) -> u64 {
        self.kept.lock().replaced
    }

    /// The newest.
    pub fn newest(&self) -> Option<At> {
        self.kept.lock().recent.back().copied()
    }

    /// Milestones beyond an index, the newest `max` of them.
    pub fn milestones(&self, beyond: u64, max: usize) -> Vec<At> {
        let kept = self.kept.lock();
        kept.milestones.iter().rev().take_while(|at| at.index > beyond).take(max).copied().collect()
    }

    /// The hash at an index, if it is applied and still remembered.
    pub fn get(&self, index: u64) -> Option<u64> {
        let kept = self.kept.lock();
        find(&kept.recent, index).or_else(|| find(&kept.milestones, index))
    }
}

fn push(to: &mut VecDeque<At>, at: At, max: usize) {
    if to.len() >= max {
        to.pop_front();
    }
    to.push_back(at);
}

fn find(among: &VecDeque<At>, index: u64) -> Option<u64> {
    let found = among.binary_search_by_key(&index, |at| at.index).ok()?;
    among.get(found).map(|at| at.hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64) -> At {
        At { index, hash: index * 3 }
    }

    #[test]
    fn the_last_ones_are_remembered_and_milestones_for_longer() {
        let hashes = RollingHashes::new(at(5));
        assert_eq!((hashes.newest(), hashes.get(5), hashes.get(6)), (Some(at(5)), Some(15), None));
        let last = MILESTONE_EVERY * (MILESTONES_MAX as u64 + 10) + 7;
        for index in 6..=last {
            hashes.extend(&[at(index)]);
        }
        assert_eq!(hashes.newest(), Some(at(last)));
        let oldest = last + 1 - RECENT_MAX as u64;
        assert_eq!(hashes.get(oldest), Some(oldest * 3));
        assert_eq!(hashes.get(oldest - 1), None);
        assert_eq!(hashes.get(last + 1), None);
        let milestone = |number: u64| hashes.get(number * MILESTONE_EVERY);
        assert!(milestone(10).is_none() && milestone(11).is_some() && milestone(20).is_some());
        let beyond = hashes.milestones(262 * MILESTONE_EVERY, 10);
        assert_eq!(beyond, [266, 265, 264, 263].map(|number| at(number * MILESTONE_EVERY)));
        assert_eq!(hashes.milestones(0, 2).len(), 2);
    }

    #[test]
    fn a_state_of_another_member_has_its_own_past() {
        let hashes = RollingHashes::new(at(1023));
        hashes.extend(&[at(1024), at(1025)]);
        hashes.replace(at(5000));
        assert_eq!(
            (hashes.get(1024), hashes.get(1025), hashes.get(5000)),
            (None, None, Some(15000))
        );
        assert_eq!(hashes.replaced(), 1);
        assert!(hashes.milestones(0, 9).is_empty());
    }
}
