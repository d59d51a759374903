//! Who is wrong, by what members hold of the same thing.
//!
//! Members that differ are judged by a majority of *all* members, as the cluster decides
//! everything else: one that did not answer is not taken for one that agrees.

use std::collections::BTreeMap;

use crate::state::reconfig::quorum;

/// What the members' hashes say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Vote {
    /// All that answered have the same.
    Equal,
    /// These have another one than a majority.
    Named(Vec<u64>),
    /// They differ, and no majority has the same.
    Nobody,
}

/// Counts the hashes of members, of which there are `members` in all.
pub(super) fn vote<H: Ord + Copy>(members: usize, hashes: &[(u64, H)]) -> Vote {
    let mut groups: BTreeMap<H, Vec<u64>> = BTreeMap::new();
    for (id, hash) in hashes {
        groups.entry(*hash).or_default().push(*id);
    }
    if groups.len() <= 1 {
        return Vote::Equal;
    }
    let decide = quorum(members);
    if !groups.values().any(|group| group.len() >= decide) {
        return Vote::Nobody;
    }
    Vote::Named(groups.into_values().filter(|group| group.len() < decide).flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compactions_are_judged_by_a_majority_of_all_members() {
        assert_eq!(vote(3, &[(1, 7), (2, 7)]), Vote::Equal);
        assert_eq!(vote(3, &[(1, 7), (2, 7), (3, 8)]), Vote::Named(vec![3]));
        assert_eq!(vote(3, &[(1, 8), (2, 7), (3, 7)]), Vote::Named(vec![1]));
        assert_eq!(vote(3, &[(1, 7), (3, 8)]), Vote::Nobody);
        assert_eq!(vote(2, &[(1, 7), (2, 8)]), Vote::Nobody);
        assert_eq!(vote(4, &[(1, 7), (2, 7), (3, 8), (4, 8)]), Vote::Nobody);
    }
}
