//! The versions of one key, oldest first, tombstones included.
//!
//! ```text
//! 2: put   4: put   6: tombstone   8: put      two generations of one key
//! ```
//!
//! Most keys have one version, so one is held in place, without an allocation of its
//! own.
//!
//! **What compaction keeps** is decided here, once, for the store, for checkpoints and
//! for hashes. Compaction to revision C keeps every version at or above C, and the one
//! before the first of these unless that is a tombstone:
//!
//! ```text
//!               C = 7                       C = 8                   C = 9
//! 4: put
//! 6: put        kept: the state at 7        kept: replaced at 8
//! 8: put        kept: above 7               kept: at 8              kept: the state at 9
//! ```
//!
//! So a reader at C, or later, finds what it looks for; a tombstone exactly at C stays,
//! as in etcd; and the version that a change exactly at C replaced stays too, so that a
//! watcher that starts at C still gets `prev_kv`. That last one no reader can see.

use std::collections::VecDeque;

use bytes::Bytes;

use super::tree::Counted;
use super::{Revision, Version};

/// The versions of one key. Empty only in between, while its owner drops it.
pub(super) enum Chain {
    One(Version),
    /// A queue, as compaction takes versions off its front one by one.
    Many(VecDeque<Version>),
}

impl Version {
    /// The version that says "deleted". It holds no bytes: they follow from the key.
    pub(super) fn tombstone(revision: Revision) -> Version {
        Version { revision, create_revision: 0, version: 0, kv: Bytes::new() }
    }

    pub(super) fn is_tombstone(&self) -> bool {
        self.version == 0
    }
}

impl Counted for Chain {
    fn is_live(&self) -> bool {
        self.live().is_some()
    }
}

impl Chain {
    /// All versions, tombstones included, oldest first.
    pub(super) fn versions(&self) -> impl Iterator<Item = &Version> {
        let (front, back) = match self {
            Chain::One(version) => (std::slice::from_ref(version), [].as_slice()),
            Chain::Many(versions) => versions.as_slices(),
        };
        front.iter().chain(back)
    }

    /// The present version, unless the key is deleted.
    pub(super) fn live(&self) -> Option<&Version> {
        self.newest().filter(|version| !version.is_tombstone())
    }

    /// The version as of revision `at`, unless the key did not exist then.
    pub(super) fn at(&self, at: i64) -> Option<&Version> {
        let newest = self.newest()?;
        let version = if newest.revision.main <= at {
            newest
        } else {
            self.get(self.count_below(at + 1).checked_sub(1)?)?
        };
        Some(version).filter(|version| !version.is_tombstone())
    }

    /// Appends `version`, which must be newer than all others.
    pub(super) fn push(&mut self, version: Version) {
        *self = match std::mem::replace(self, Chain::Many(VecDeque::new())) {
            Chain::One(only) => Chain::Many(VecDeque::from([only, version])),
            Chain::Many(mut versions) => {
                versions.push_back(version);
                Chain::Many(versions)
            }
        };
    }

    /// The versions that compaction to `compact_revision` keeps.
    pub(super) fn kept_by(&self, compact_revision: i64) -> impl Iterator<Item = &Version> {
        self.versions().skip(self.dropped_by(compact_revision))
    }

    /// Drops what compaction to `compact_revision` drops, showing each to `dropped`.
    /// Returns whether anything is left.
    pub(super) fn compact(
        &mut self,
        compact_revision: i64,
        mut dropped: impl FnMut(&Version),
    ) -> bool {
        let count = self.dropped_by(compact_revision);
        if count == 0 {
            return true;
        }
        self.versions().take(count).for_each(&mut dropped);
        let Chain::Many(versions) = self else { return false };
        versions.drain(..count);
        if versions.len() > 1 {
            if versions.len() * 4 < versions.capacity() {
                versions.shrink_to(versions.len() * 2);
            }
            return true;
        }
        let Some(only) = versions.pop_front() else { return false };
        *self = Chain::One(only);
        true
    }

    /// How many of the oldest versions compaction to `compact_revision` drops.
    fn dropped_by(&self, compact_revision: i64) -> usize {
        let below = self.count_below(compact_revision);
        match below.checked_sub(1).and_then(|before| self.get(before)) {
            Some(before) if !before.is_tombstone() => below - 1,
            _ => below,
        }
    }

    /// How many versions are below main revision `bound`.
    fn count_below(&self, bound: i64) -> usize {
        match self {
            Chain::One(version) => usize::from(version.revision.main < bound),
            Chain::Many(versions) => {
                versions.partition_point(|version| version.revision.main < bound)
            }
        }
    }

    fn newest(&self) -> Option<&Version> {
        match self {
            Chain::One(version) => Some(version),
            Chain::Many(versions) => versions.back(),
        }
    }

    fn get(&self, position: usize) -> Option<&Version> {
        match self {
            Chain::One(version) => (position == 0).then_some(version),
            Chain::Many(versions) => versions.get(position),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(main: i64, sub: i64, create_revision: i64, version: i64) -> Version {
        let revision = Revision::new(main, sub);
        Version { revision, create_revision, version, kv: Bytes::from_static(b"kv") }
    }

    /// Three generations: 2, 4, deleted at 6; 8, 10, deleted at 12; 14, 15.1, deleted at 16.
    fn three_generations() -> Chain {
        let mut chain = Chain::One(put(2, 0, 2, 1));
        chain.push(put(4, 0, 2, 2));
        chain.push(Version::tombstone(Revision::new(6, 0)));
        chain.push(put(8, 0, 8, 1));
        chain.push(put(10, 0, 8, 2));
        chain.push(Version::tombstone(Revision::new(12, 0)));
        chain.push(put(14, 0, 14, 1));
        chain.push(put(15, 1, 14, 2));
        chain.push(Version::tombstone(Revision::new(16, 0)));
        chain
    }

    fn mains<'a>(versions: impl Iterator<Item = &'a Version>) -> Vec<i64> {
        versions.map(|version| version.revision.main).collect()
    }

    #[test]
    fn one_version_costs_no_more_than_itself() {
        assert_eq!(size_of::<Chain>(), size_of::<Version>());
    }

    #[test]
    fn reads_find_the_generation() {
        // Revision, and the version seen there: (mod, create, version).
        let seen = [
            (1, None),
            (2, Some((2, 2, 1))),
            (3, Some((2, 2, 1))),
            (4, Some((4, 2, 2))),
            (5, Some((4, 2, 2))),
            (6, None),
            (7, None),
            (8, Some((8, 8, 1))),
            (9, Some((8, 8, 1))),
            (10, Some((10, 8, 2))),
            (11, Some((10, 8, 2))),
            (12, None),
            (13, None),
            (14, Some((14, 14, 1))),
            (15, Some((15, 14, 2))),
            (16, None),
            (17, None),
        ];
        let chain = three_generations();
        for (at, expected) in seen {
            let version = chain.at(at).map(|v| (v.revision.main, v.create_revision, v.version));
            assert_eq!(version, expected, "at {at}");
        }
        assert!(chain.live().is_none());
    }

    /// etcd's own cases for this chain (`TestKeyIndexCompactAndKeep`), with, in addition,
    /// the version that a change exactly at the compact revision replaced.
    #[test]
    fn compaction_keeps_what_etcd_keeps_and_what_was_replaced_there() {
        let kept: [(i64, &[i64], Option<i64>); 17] = [
            (1, &[2, 4, 6, 8, 10, 12, 14, 15, 16], None),
            (2, &[2, 4, 6, 8, 10, 12, 14, 15, 16], None),
            (3, &[2, 4, 6, 8, 10, 12, 14, 15, 16], None),
            (4, &[4, 6, 8, 10, 12, 14, 15, 16], Some(2)),
            (5, &[4, 6, 8, 10, 12, 14, 15, 16], None),
            (6, &[6, 8, 10, 12, 14, 15, 16], Some(4)),
            (7, &[8, 10, 12, 14, 15, 16], None),
            (8, &[8, 10, 12, 14, 15, 16], None),
            (9, &[8, 10, 12, 14, 15, 16], None),
            (10, &[10, 12, 14, 15, 16], Some(8)),
            (11, &[10, 12, 14, 15, 16], None),
            (12, &[12, 14, 15, 16], Some(10)),
            (13, &[14, 15, 16], None),
            (14, &[14, 15, 16], None),
            (15, &[15, 16], Some(14)),
            (16, &[16], Some(15)),
            (17, &[], None),
        ];
        let mut continuous = three_generations();
        for (compact_revision, etcd, replaced) in kept {
            let expected: Vec<i64> = replaced.into_iter().chain(etcd.iter().copied()).collect();

            let mut once = three_generations();
            assert_eq!(mains(once.kept_by(compact_revision)), expected, "{compact_revision}");
            let mut dropped = Vec::new();
            let left =
                once.compact(compact_revision, |version| dropped.push(version.revision.main));
            assert_eq!(left, !expected.is_empty());
            assert_eq!(mains(once.versions()), expected, "once, to {compact_revision}");
            dropped.extend(&expected);
            assert_eq!(dropped, mains(three_generations().versions()));

            continuous.compact(compact_revision, |_| {});
            assert_eq!(mains(continuous.versions()), expected, "step by step");
        }
    }

    #[test]
    fn compaction_leaves_an_only_version_in_place() {
        let mut chain = Chain::One(put(2, 0, 2, 1));
        chain.push(put(3, 0, 2, 2));
        assert!(chain.compact(9, |_| {}));
        assert!(matches!(chain, Chain::One(_)));
    }
}
