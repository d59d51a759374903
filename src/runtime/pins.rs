//! Revisions that somebody is reading.
//!
//! A long read goes on in steps and lets go of the state in between. It pins its
//! revision, so that physical compaction spares what it has yet to read; the logical
//! compaction, which is what clients see, does not wait for anyone.
//!
//! A pin keeps superseded versions in memory, so it must end. What waits for others (a range
//! or transaction that gives way between steps, a stream that waits for its client) looks
//! at the clock, and ends after [`PIN_MAX`]. What does not (hashes, and the checkpoint's
//! rewrite) takes as long as it takes to see each key, once or some times. Saves, and images for
//! other members, are somewhere between: they end when nothing of them is taken for a while, or
//! when they [keep too much](super::held).
//!
//! **A state that is replaced**, by a snapshot from another member, holds the same at every
//! revision that both have: a read of one of these goes on in the new state as if nothing had
//! happened. What is below the new state's compact revision is not there, whatever was pinned:
//! such a pin is *lost* ([`Pin::is_lost`]), and its reader must give up. Readers look, in the
//! same hold of the state's lock, before each step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A range, stream or transaction that takes longer than this is answered as compacted,
/// rather than keep what is compacted in memory for ever.
pub const PIN_MAX: Duration = Duration::from_secs(60);

/// All pinned revisions.
#[derive(Debug)]
pub struct Pins {
    readers: Mutex<BTreeMap<i64, usize>>,
    /// The compact revision of the last state that replaced another.
    lost_below: AtomicI64,
}

impl Default for Pins {
    fn default() -> Pins {
        Pins { readers: Mutex::default(), lost_below: AtomicI64::new(i64::MIN) }
    }
}

/// One reader's hold on a revision; ends when dropped.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Pins>,
    revision: i64,
    since: Instant,
}

impl Pins {
    /// Pins `revision`. To be called under the state's read lock, where it is known
    /// that nothing of it has been removed.
    pub fn pin(self: &Arc<Pins>, revision: i64) -> Pin {
        *self.readers.lock().entry(revision).or_default() += 1;
        Pin { pins: Arc::clone(self), revision, since: Instant::now() }
    }

    /// The state was replaced by one with this compact revision: pins of earlier revisions are
    /// lost. To be called under the state's write lock.
    pub fn lose_below(&self, compact_revision: i64) {
        self.lost_below.fetch_max(compact_revision, Ordering::AcqRel);
    }

    /// How many readers hold a revision.
    pub fn readers(&self) -> usize {
        self.readers.lock().values().sum()
    }

    /// The oldest pinned revision.
    pub fn lowest(&self) -> Option<i64> {
        self.readers.lock().keys().next().copied()
    }
}

impl Pin {
    /// The pinned revision.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Whether the state was replaced by one that does not have the pinned revision. To be
    /// asked under the state's lock, in the hold that the answer is for.
    pub fn is_lost(&self) -> bool {
        self.revision < self.pins.lost_below.load(Ordering::Acquire)
    }

    /// When the read has had its time.
    pub fn deadline(&self) -> Instant {
        self.since + PIN_MAX
    }

    /// Whether the read has had its time.
    pub fn is_overdue(&self) -> bool {
        Instant::now() > self.deadline()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut readers = self.pins.readers.lock();
        if let Some(count) = readers.get_mut(&self.revision) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.revision);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_pin_counts_until_its_last_reader_is_gone() {
        let pins = Arc::new(Pins::default());
        assert_eq!(pins.lowest(), None);
        let (first, second) = (pins.pin(7), pins.pin(7));
        let later = pins.pin(9);
        drop(first);
        assert_eq!(pins.lowest(), Some(7));
        drop(second);
        assert_eq!(pins.lowest(), Some(9));
        assert_eq!((pins.lowest(), later.revision()), (Some(9), 9));
        drop(later);
        assert_eq!(pins.lowest(), None);
    }
    #[test]
    fn a_state_that_is_replaced_loses_what_it_has_compacted() {
        let pins = Arc::new(Pins::default());
        let (never_compacted, old, new) = (pins.pin(-1), pins.pin(7), pins.pin(9));
        assert!(!never_compacted.is_lost());
        pins.lose_below(9);
        pins.lose_below(8);
        assert!(never_compacted.is_lost() && old.is_lost() && !new.is_lost());
    }
}
