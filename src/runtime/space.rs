//! Watches the disks' free space.
//!
//! A log that cannot be written stops the member, so writes are refused before that:
//! when less than [`RESERVE_BYTES`] are free, puts are answered as if the quota were
//! used up. Deletes, compaction and reads go on, and once there is space again so do
//! writes; nobody has to restart or disarm anything.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Less free space than this is kept for what has been acknowledged already: the
/// log's next segment, and the changes that the next checkpoint writes.
pub const RESERVE_BYTES: u64 = 96 * 1024 * 1024;
/// How often the disks are asked.
const INTERVAL: Duration = Duration::from_millis(500);

/// What [`Space::watch`] looks at.
pub struct Space {
    /// Directories; each may be on a disk of its own.
    pub directories: Vec<PathBuf>,
    /// Set while one of the disks is short of space.
    pub low: Arc<AtomicBool>,
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
        let shortest = self.directories.iter().filter_map(|directory| {
            // A disk that does not answer fails the log soon enough.
            let stat = rustix::fs::statvfs(directory).ok()?;
            Some((stat.f_bavail.saturating_mul(stat.f_frsize), directory))
        });
        let Some((free_bytes, directory)) = shortest.min() else { return };
        let low = free_bytes < RESERVE_BYTES;
        if low == self.low.swap(low, Ordering::AcqRel) {
            return;
        }
        if low {
            tracing::error!(
                directory = %directory.display(),
                free_bytes,
                reserve_bytes = RESERVE_BYTES,
                "the disk is almost full: writes that take space are refused until it has space again"
            );
        } else {
            tracing::info!(directory = %directory.display(), free_bytes, "the disk has space again");
        }
    }
}
