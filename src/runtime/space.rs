//! Watches the disks' free space.
//!
//! A log that cannot be written stops the member, so writes are refused before that:
//! when less is free than [`RESERVE_BYTES`] and what the checkpoint is about to take, puts
//! are answered as if the quota were used up, until a quarter more is free. Deletes, compaction
//! and reads go on, and once there is space again so do writes; nobody has to restart or disarm
//! anything.
//!
//! The same holds while the checkpoint waits for space ([`super::checkpoint_thread`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Less free space than this, beside what the checkpoint is about to take, is kept for
/// the log's next segment and for what is under way.
pub const RESERVE_BYTES: u64 = 96 * 1024 * 1024;
/// What a byte of records takes on the disk, once in the store, at most: a third more than
/// itself, if the keys and values are tiny. (In sled, where checkpoints of format 1 have them, it
/// is up to three bytes; such a checkpoint is written anew soon, and one that meets the end of the
/// disk is opened anew.)
pub const STORE_BYTES_PER_BYTE: u64 = 2;
/// A checkpoint is written anew when it would take more than this much of what its records do, in
/// percent. What compaction gave up does not count among them, so that it is due right after a
/// compaction, if at all. A checkpoint takes at most this much of what the last compaction left,
/// what was written since, and, while it is written anew, what is left then. All of it must stay
/// below four times what is live.
pub const REWRITE_PERCENT: u64 = 140;
/// A checkpoint of less than this, in bytes, is not worth it: sled begins with some.
pub const REWRITE_FLOOR_BYTES: u64 = 32 << 20;
/// Writers wait when more than this is applied and not yet in the checkpoint. It bounds the
/// memory that holds it, and what the log has to keep and a restart to replay.
pub const UNWRITTEN_BYTES_MAX: usize = 256 * 1024 * 1024;
/// How often the disks are asked.
const INTERVAL: Duration = Duration::from_millis(100);

/// Why writes that take space are refused now, if they are.
#[derive(Debug, Default)]
pub struct Shortage {
    disk_is_low: AtomicBool,
    checkpoint_waits: AtomicBool,
    dirty_bytes: AtomicUsize,
    cut_bytes: AtomicUsize,
}

impl Shortage {
    /// Whether to refuse what takes space.
    pub fn is_present(&self) -> bool {
        self.disk_is_low.load(Ordering::Acquire) || self.checkpoint_waits.load(Ordering::Acquire)
    }

    /// Records that are applied and not yet in a cut, in bytes.
    pub(super) fn set_dirty_bytes(&self, bytes: usize) {
        self.dirty_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Records of the cut that is being written, in bytes.
    pub(super) fn set_cut_bytes(&self, bytes: usize) {
        self.cut_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Space that the checkpoint is about to take for what is acknowledged already.
    fn owed_bytes(&self) -> u64 {
        (self.unwritten_bytes() as u64).saturating_mul(STORE_BYTES_PER_BYTE)
    }

    /// Records that are applied and not yet in a durable checkpoint, in bytes.
    fn unwritten_bytes(&self) -> usize {
        let dirty = self.dirty_bytes.load(Ordering::Relaxed);
        dirty.saturating_add(self.cut_bytes.load(Ordering::Relaxed))
    }

    /// Whether writers are so far ahead of the checkpoint that they have to wait:
    /// [`UNWRITTEN_BYTES_MAX`].
    pub fn is_behind(&self) -> bool {
        self.unwritten_bytes() > UNWRITTEN_BYTES_MAX
    }

    /// The checkpoint has to wait for space, or need not any more. Returns what was so.
    pub(super) fn set_checkpoint_waits(&self, waits: bool) -> bool {
        self.checkpoint_waits.swap(waits, Ordering::AcqRel)
    }
}

/// Free bytes on a directory's disk. `None` when the disk does not answer, which the log
/// will notice soon enough.
pub fn free_bytes(directory: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether a directory's disk has room for the checkpoint that an image of so many bytes
/// becomes, which is there as well, and the log can go on. A disk that does not answer has.
pub fn has_room_for_image(directory: &Path, image_bytes: u64) -> bool {
    let needed = image_bytes.saturating_mul(STORE_BYTES_PER_BYTE).saturating_add(RESERVE_BYTES);
    free_bytes(directory).is_none_or(|free| free >= needed)
}

/// Whether a checkpoint that takes `on_disk_bytes` is to be written anew, now that the records
/// that are kept are so many bytes. `overhead_bytes` is what it took beside its records right after
/// it was written anew last, and would take again.
pub fn is_rewrite_due(on_disk_bytes: u64, kept_bytes: u64, overhead_bytes: u64) -> bool {
    let least_bytes = kept_bytes.saturating_add(overhead_bytes);
    on_disk_bytes > rewrite_floor_bytes().max((least_bytes / 100).saturating_mul(REWRITE_PERCENT))
}

#[cfg(not(test))]
fn rewrite_floor_bytes() -> u64 {
    REWRITE_FLOOR_BYTES
}

#[cfg(test)]
thread_local! {
    /// Less than [`REWRITE_FLOOR_BYTES`], for small checkpoints that are written anew.
    pub(crate) static FLOOR_BYTES: std::cell::Cell<u64> =
        const { std::cell::Cell::new(REWRITE_FLOOR_BYTES) };
}

#[cfg(test)]
fn rewrite_floor_bytes() -> u64 {
    FLOOR_BYTES.get()
}

/// What a checkpoint takes that is written as a whole, in bytes, of records of so many.
pub fn rewritten_bytes(records_bytes: u64) -> u64 {
    records_bytes.saturating_add(records_bytes / 8)
}

/// What [`Space::watch`] looks at.
pub struct Space {
    /// Directories; each may be on a disk of its own.
    pub directories: Vec<PathBuf>,
    /// Told while one of the disks is short of space.
    pub shortage: Arc<Shortage>,
}

impl Space {
    /// Runs until the future is dropped.
    pub async fn watch(self) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look();
        }
    }

    fn look(&self) {
        let directories = self.directories.iter();
        let shortest = directories.filter_map(|dir| Some((free_bytes(dir)?, dir)));
        let Some((free_bytes, directory)) = shortest.min() else { return };
        let reserve_bytes = RESERVE_BYTES.saturating_add(self.shortage.owed_bytes());
        let was_low = self.shortage.disk_is_low.load(Ordering::Acquire);
        // Some more than it took to run short, or it would come and go with every write.
        let wanted_bytes = if was_low { reserve_bytes + reserve_bytes / 4 } else { reserve_bytes };
        let low = free_bytes < wanted_bytes;
        if low == was_low {
            return;
        }
        self.shortage.disk_is_low.store(low, Ordering::Release);
        if low {
            tracing::error!(
                directory = %directory.display(),
                free_bytes,
                reserve_bytes,
                "the disk is almost full: writes that take space are refused until it has space again"
            );
        } else {
            tracing::info!(directory = %directory.display(), free_bytes, "the disk has space again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_checkpoint_is_written_anew_when_much_of_it_is_not_needed() {
        let due =
            |on_disk_mib, records_mib| is_rewrite_due(on_disk_mib * MIB, records_mib * MIB, 0);
        assert!(!due(32, 0), "a small one is left alone");
        assert!(due(33, 0) && due(65, 46));
        assert!(!due(65, 47));
        assert!(!due(1433, 1024));
        assert!(due(1434, 1024));
        assert!(!is_rewrite_due(u64::MAX / 2, u64::MAX / 2, u64::MAX));
    }

    #[test]
    fn a_checkpoint_written_anew_is_not_due_again() {
        for records_mib in [0, 1, 33, 1024, 1 << 20] {
            assert!(!is_rewrite_due(rewritten_bytes(records_mib * MIB), records_mib * MIB, 0));
        }
    }
}
