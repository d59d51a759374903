//! Large files on a disk that the raft log has to sync meanwhile.
//!
//! A file system writes its journal for all files at once. So the log's sync, and with it every
//! client that writes, waits for what other files have under way: for 8 MiB that are synced at
//! once 20 ms, on a disk on which the log alone takes 0.2; for 1 GiB that is given back at once
//! 130 ms, where the disk is told of blocks that are free (`discard`). In small steps, each
//! synced before the next, neither shows, and writing takes half as long, too.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::thread::Builder;

/// Bytes to write before a sync.
pub(crate) const SYNC_EVERY_BYTES: u64 = 512 << 10;
/// Bytes to give back before a sync.
const SHRINK_STEP_BYTES: u64 = 4 << 20;

/// Removes a file; what is returned gives back its space.
///
/// # Errors
/// What the file system says.
pub(crate) fn unlink(path: &Path) -> io::Result<Unlinked> {
    // Only to hold on to it: one that cannot be opened is removed all the same.
    let file = OpenOptions::new().write(true).open(path).ok();
    fs::remove_file(path)?;
    Ok(Unlinked(file))
}

/// A file without a name, whose space goes with it: all at once when this is dropped, or when the
/// process ends.
#[must_use = "dropping it gives back all its space at once"]
pub(crate) struct Unlinked(Option<File>);

impl Unlinked {
    /// Gives back the space in steps. Blocks on the disk.
    pub(crate) fn give_back(self) {
        // What fails on the way is given back when the file is closed.
        let _ = self.0.as_ref().map_or(Ok(()), empty);
    }

    /// The same in the background, for those that must not block.
    pub(crate) fn give_back_later(self) {
        let len =
            self.0.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |data| data.len());
        if len <= SHRINK_STEP_BYTES {
            return;
        }
        // Without a thread it is given back here.
        let _ = Builder::new().name("give-back".to_owned()).spawn(move || self.give_back());
    }
}

/// Gives back the space of a file, whoever has it open. Blocks on the disk.
///
/// # Errors
/// What the file system says; the file is shorter then.
pub(crate) fn empty(file: &File) -> io::Result<()> {
    let mut len = file.metadata()?.len();
    while len > 0 {
        len = len.saturating_sub(SHRINK_STEP_BYTES);
        file.set_len(len)?;
        // Its length is what there is to sync.
        file.sync_data()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_emptied_or_unlinked_takes_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large");
        for len in [0, 1, SHRINK_STEP_BYTES, 2 * SHRINK_STEP_BYTES + 1] {
            let file = File::create(&path).unwrap();
            file.set_len(len).unwrap();
            empty(&file).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 0);
            file.set_len(len).unwrap();
            let unlinked = unlink(&path).unwrap();
            assert!(!path.exists());
            assert_eq!(file.metadata().unwrap().len(), len);
            unlinked.give_back();
            assert_eq!(file.metadata().unwrap().len(), 0);
            assert_eq!(unlink(&path).map(drop).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
