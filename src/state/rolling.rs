//! One number for how the state came to be: equal on members that applied the same entries
//! with the same effect, and different for ever after the first one that had another.
//!
//! Each entry is folded into the number together with what it changed: the stored bytes of new
//! records with their revisions, leases, members, alarms, compactions. It is a chain, so two
//! members that agree at an index agreed at all indexes before. What frees memory at a pace of
//! its own, physical compaction, is left out, and so is what only this member knows.
//!
//! It finds members that *applied* differently: another version, a bug, a log or a checkpoint
//! that is not what was written. A byte that changes in memory afterwards is none of its
//! business until something is built on it: for that there is HashKV, which reads everything.
//! It guards against accidents, not against somebody who wants two states to look alike.
//!
//! Bytes are summed with CRC-32C, in hardware; 64 bits are carried from one to the next.

use prost::Message as _;

use crate::log::Mark;
use crate::mvcc::Revision;
use crate::pb::kvorumpb::MemberRecord;
use crate::pb::leasepb;

/// Odd, without a pattern: the golden ratio's digits.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

// What is folded in, so that a lease is not taken for a member.
const ENTRY: u64 = 1;
const RECORD: u64 = 2;
const LEASE: u64 = 3;
const LEASE_ENDED: u64 = 4;
const MEMBER: u64 = 5;
const MEMBER_REMOVED: u64 = 6;
const ALARM: u64 = 7;
const ALARM_DISARMED: u64 = 8;
const COMPACTION: u64 = 9;
const AUTH_ROW: u64 = 10;

/// See the module documentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RollingHash(u64);

impl RollingHash {
    /// As it was stored.
    pub fn restore(value: u64) -> RollingHash {
        RollingHash(value)
    }

    /// To be stored, and to be compared with other members'.
    pub fn value(self) -> u64 {
        self.0
    }

    /// An entry begins, whatever it does.
    pub fn entry(&mut self, entry: Mark) {
        self.fold([ENTRY, entry.index, entry.term]);
    }

    /// A version of a key was written, or its tombstone.
    pub fn record(&mut self, revision: Revision, tombstone: bool, kv: &[u8]) {
        let kind = RECORD | u64::from(tombstone) << 32;
        let Revision { main, sub } = revision;
        self.fold([kind, main.cast_unsigned(), sub.cast_unsigned(), checksum(kv)]);
    }

    /// A row of authentication is carried, from a file that was restored.
    pub fn auth_row(&mut self, table: u64, key: &[u8], value: &[u8]) {
        self.fold([AUTH_ROW | table << 32, checksum(key), checksum(value)]);
    }

    /// A lease is as in the record now; `None`: it has ended.
    pub fn lease(&mut self, id: i64, lease: Option<&leasepb::Lease>) {
        match lease {
            Some(lease) => self.fold([
                LEASE,
                id.cast_unsigned(),
                lease.ttl.cast_unsigned(),
                lease.remaining_ttl.cast_unsigned(),
            ]),
            None => self.fold([LEASE_ENDED, id.cast_unsigned()]),
        }
    }

    /// A member is as in the record now; `None`: there is none of this id.
    pub fn member(&mut self, id: u64, member: Option<&MemberRecord>) {
        match member {
            Some(member) => self.fold([MEMBER, id, checksum(&member.encode_to_vec())]),
            None => self.fold([MEMBER_REMOVED, id]),
        }
    }

    /// An alarm is active now, or no longer.
    pub fn alarm(&mut self, member: u64, alarm: i32, active: bool) {
        let what = if active { ALARM } else { ALARM_DISARMED };
        self.fold([what, member, u64::from(alarm.cast_unsigned())]);
    }

    /// History before a revision was given up.
    pub fn compaction(&mut self, revision: i64) {
        self.fold([COMPACTION, revision.cast_unsigned()]);
    }

    fn fold<const N: usize>(&mut self, words: [u64; N]) {
        for word in words {
            // Added, because nothing could be told from nothing multiplied.
            let mixed = (self.0.wrapping_add(MULTIPLIER) ^ word).wrapping_mul(MULTIPLIER);
            // Multiplication moves differences up only; this brings them down again.
            self.0 = mixed ^ mixed >> 29;
        }
    }
}

/// A checksum of some bytes, and how many they are.
fn checksum(bytes: &[u8]) -> u64 {
    (bytes.len() as u64) << 32 | u64::from(crc32c::crc32c(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn everything_that_is_folded_in_makes_a_difference() {
        let lease = leasepb::Lease { id: 1, ttl: 2, remaining_ttl: 3 };
        let member = MemberRecord { id: 1, ..MemberRecord::default() };
        let at = |main, sub| Revision { main, sub };
        let folds: &[&dyn Fn(&mut RollingHash)] = &[
            &|_| {},
            &|hash| hash.entry(Mark { index: 1, term: 1 }),
            &|hash| hash.entry(Mark { index: 1, term: 2 }),
            &|hash| hash.entry(Mark { index: 2, term: 1 }),
            &|hash| hash.record(at(1, 0), false, b"kv"),
            &|hash| hash.record(at(1, 0), true, b"kv"),
            &|hash| hash.record(at(1, 1), false, b"kv"),
            &|hash| hash.record(at(2, 0), false, b"kv"),
            &|hash| hash.record(at(1, 0), false, b"kw"),
            &|hash| hash.record(at(1, 0), false, b"kv\0"),
            &|hash| hash.lease(1, Some(&lease)),
            &|hash| hash.lease(1, Some(&leasepb::Lease { remaining_ttl: 2, ..lease })),
            &|hash| hash.lease(1, Some(&leasepb::Lease { ttl: 3, ..lease })),
            &|hash| hash.lease(1, None),
            &|hash| hash.member(1, Some(&member)),
            &|hash| hash.member(1, Some(&MemberRecord { is_learner: true, ..member.clone() })),
            &|hash| hash.member(1, None),
            &|hash| hash.alarm(1, 1, true),
            &|hash| hash.alarm(1, 1, false),
            &|hash| hash.alarm(1, 2, true),
            &|hash| hash.compaction(1),
            &|hash| hash.compaction(2),
            &|hash| hash.auth_row(1, b"a", b"b"),
            &|hash| hash.auth_row(2, b"a", b"b"),
            &|hash| hash.auth_row(1, b"b", b"b"),
            &|hash| hash.auth_row(1, b"a", b""),
        ];
        let mut values = BTreeSet::new();
        for (at, fold) in folds.iter().enumerate() {
            let mut hash = RollingHash::restore(7);
            fold(&mut hash);
            assert!(values.insert(hash.value()), "the fold {at} is like an earlier one");
        }
    }

    #[test]
    fn a_difference_never_goes_away() {
        let (mut one, mut other) = (RollingHash::restore(1), RollingHash::restore(1 << 63));
        for index in 1..=100_000 {
            let entry = Mark { index, term: 1 };
            one.entry(entry);
            other.entry(entry);
            assert_ne!(one, other, "after entry {index}");
        }
    }
}
