//! Segments to come: one ready file ahead of the writer, made off its path.
//!
//! Overwriting blocks that were written before costs half of what growing a file does,
//! since the file system has nothing to record but the data. So a segment's file is
//! either one that an earlier segment has left, or one filled with zeros in advance, by
//! the thread here: filling 64 MiB takes tens to hundreds of milliseconds nobody should wait for.
//!
//! What a spare holds does not matter to correctness; segments are salted. Its *name*
//! does: a retired segment is renamed, and the renaming is on the disk, before its bytes
//! may be overwritten, else after a power cut an old segment's name would stand over a
//! new one's bytes. Whatever fails here is logged and tried again when the next spare is
//! wanted; it never reaches the writer, who makes a small segment itself if it must.
//!
//! Bounds: [`SPARES_MAX`] ready files, one thread, one buffer of [`FILL_CHUNK_BYTES`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::LogError;
use super::dir::{Directory, Step};
use crate::large_file::{self, SYNC_EVERY_BYTES, Unlinked};

/// Ready files kept at most. One is made; a second is only ever a recycled one.
pub(super) const SPARES_MAX: usize = 2;
/// Zeros are written in pieces of this size, each synced, so that stopping waits for one at most, or
/// for a segment whose space is given back.
const FILL_CHUNK_BYTES: u64 = SYNC_EVERY_BYTES;

/// The ready files and the thread that provides them. Dropping it stops the thread.
#[derive(Debug)]
pub(super) struct Spares {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    dir: Arc<Directory>,
    segment_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: Vec<PathBuf>,
    retired: Vec<PathBuf>,
    /// A spare is wanted if none is ready.
    wanted: bool,
    busy: bool,
    stop: bool,
    /// Names the next spare.
    next_number: u64,
}

impl Spares {
    /// Starts the thread. `found` are the spares of an earlier run, `retired` segments it
    /// did not get to recycle.
    pub(super) fn start(
        dir: Arc<Directory>,
        segment_bytes: u64,
        found: Vec<(u64, PathBuf)>,
        retired: Vec<PathBuf>,
    ) -> Result<Spares, LogError> {
        let next_number = found.iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        let mut ready = Vec::new();
        for (_, path) in found {
            let right_size = fs::metadata(&path).is_ok_and(|m| m.len() == segment_bytes);
            if right_size && ready.len() < SPARES_MAX {
                ready.push(path);
            } else {
                fs::remove_file(&path).map_err(|e| LogError::io("remove", &path, e))?;
            }
        }
        let state = State { ready, retired, next_number, ..State::default() };
        let shared = Arc::new(Shared {
            dir,
            segment_bytes,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name("log-spares".to_owned())
            .spawn(move || worker.run())
            .map_err(|e| LogError::io("start a thread for", shared.dir.path(), e))?;
        Ok(Spares { shared, thread: Some(thread) })
    }

    /// A file to write the next segment over, if one is ready. No segment's name stands
    /// for it any more, not even after a power cut.
    pub(super) fn take(&self) -> Option<PathBuf> {
        self.shared.state.lock().ready.pop()
    }

    /// Says that a spare will be needed before long.
    pub(super) fn want(&self) {
        self.shared.state.lock().wanted = true;
        self.shared.changed.notify_all();
    }

    /// Gives back segments whose entries are all cut.
    pub(super) fn retire(&self, segments: impl IntoIterator<Item = PathBuf>) {
        self.shared.state.lock().retired.extend(segments);
        self.shared.changed.notify_all();
    }

    /// Waits until the thread has nothing to do; says how many spares are ready then.
    #[cfg(test)]
    pub(super) fn settle(&self) -> usize {
        let mut state = self.shared.state.lock();
        while state.busy || state.wanted || !state.retired.is_empty() {
            self.shared.changed.wait(&mut state);
        }
        state.ready.len()
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has nothing to tell: it holds no state but files.
            let _ = thread.join();
        }
    }
}

enum Job {
    Recycle(Vec<PathBuf>),
    Fill { number: u64 },
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next_job() {
            match job {
                Job::Recycle(segments) => {
                    if let Err(error) = self.recycle(segments) {
                        tracing::warn!(%error, "raft log: old segments stay until the next start");
                    }
                }
                Job::Fill { number } => {
                    if let Err(error) = self.fill(number) {
                        tracing::warn!(
                            %error,
                            "raft log: no segment prepared ahead; writes go on, more slowly"
                        );
                    }
                }
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if !state.retired.is_empty() {
                state.busy = true;
                return Some(Job::Recycle(std::mem::take(&mut state.retired)));
            }
            if std::mem::take(&mut state.wanted) && state.ready.is_empty() {
                state.busy = true;
                state.next_number += 1;
                return Some(Job::Fill { number: state.next_number - 1 });
            }
            state.busy = false;
            self.changed.notify_all();
            self.changed.wait(&mut state);
        }
    }

    /// Renames what can be used again, removes the rest.
    fn recycle(&self, segments: Vec<PathBuf>) -> Result<(), LogError> {
        let (mut renamed, mut useless) = (Vec::new(), Vec::new());
        for segment in segments {
            let size = fs::metadata(&segment).map_err(|e| LogError::io("look at", &segment, e))?;
            let number = {
                let mut state = self.state.lock();
                let room = state.ready.len() + renamed.len() < SPARES_MAX;
                (room && size.len() == self.segment_bytes).then(|| {
                    state.next_number += 1;
                    state.next_number - 1
                })
            };
            if let Some(number) = number {
                let spare = self.dir.spare(number);
                fs::rename(&segment, &spare).map_err(|e| LogError::io("rename", &segment, e))?;
                renamed.push(spare);
            } else {
                let unlinked = large_file::unlink(&segment);
                useless.push(unlinked.map_err(|e| LogError::io("remove", &segment, e))?);
            }
            self.dir.step(Step::SegmentGone);
        }
        self.dir.sync()?;
        self.dir.step(Step::RecyclingSynced);
        self.state.lock().ready.append(&mut renamed);
        // Not before: a segment must not be shorter than it was while a power cut may bring back its
        // name. What was never to be synced is not now.
        if self.dir.fsync() {
            useless.into_iter().for_each(Unlinked::give_back);
        }
        Ok(())
    }

    /// Makes a spare of zeros.
    fn fill(&self, number: u64) -> Result<(), LogError> {
        let temporary = self.dir.temporary(&format!("spare-{number:016x}"));
        let made = self.write_zeros(&temporary).and_then(|whole| {
            if !whole {
                return Ok(None);
            }
            let spare = self.dir.spare(number);
            fs::rename(&temporary, &spare).map_err(|e| LogError::io("rename", &temporary, e))?;
            Ok(Some(spare))
        });
        match made {
            Ok(Some(spare)) => {
                self.state.lock().ready.push(spare);
                Ok(())
            }
            Ok(None) => remove_if_there(&temporary),
            Err(error) => {
                // The space is worth more than the error of removing what is not there.
                let _ = remove_if_there(&temporary);
                Err(error)
            }
        }
    }

    /// `false` if stopped on the way.
    fn write_zeros(&self, path: &Path) -> Result<bool, LogError> {
        let failed = |e| LogError::io("write", path, e);
        // The writer needs what is left more than it needs a spare.
        let space = rustix::fs::statvfs(self.dir.path()).map_err(|e| failed(e.into()))?;
        if space.f_bavail.saturating_mul(space.f_frsize) < self.segment_bytes.saturating_mul(2) {
            return Err(failed(io::ErrorKind::StorageFull.into()));
        }
        let mut file: File = self.dir.create(path)?;
        let zeros = vec![0; usize::try_from(FILL_CHUNK_BYTES.min(self.segment_bytes)).unwrap_or(0)];
        let mut left = self.segment_bytes;
        while left > 0 {
            if self.state.lock().stop {
                return Ok(false);
            }
            let piece = left.min(zeros.len() as u64);
            file.write_all(zeros.get(..piece as usize).unwrap_or(&zeros)).map_err(failed)?;
            left -= piece;
            self.dir.sync_file(&file, path)?;
        }
        Ok(true)
    }
}

fn remove_if_there(path: &Path) -> Result<(), LogError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(LogError::io("remove", path, e)),
        _ => Ok(()),
    }
}
