//! The log on disk, open for writing.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::dir::{self, Directory, Step};
use super::format::{
    Batch, Place, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, continuation,
};
use super::guard;
use super::recover::{self, FoundSegment};
use super::replay::Bounds;
use super::spares::Spares;
use super::{
    AppendReceipt, Entry, HardState, Identity, LogError, LogStore, Mark, Options, Recovered,
    SyncStats,
};

/// A segment that the writer has to make itself, because no spare is ready, has this many
/// bytes of zeros: about a millisecond's worth. Above all this is the first of a new log.
const INLINE_SEGMENT_BYTES: u64 = 1 << 20;
/// The least [`Options::segment_bytes`] in effect: a header and some records.
const SEGMENT_BYTES_MIN: u64 = 2 * SEGMENT_HEADER_BYTES;
/// The most: beyond any file system's largest file.
const SEGMENT_BYTES_MAX: u64 = 1 << 50;

/// The raft log in a directory of its own. One thread uses it; dropping it writes nothing.
#[derive(Debug)]
pub struct Log {
    identity: Identity,
    segment_bytes: u64,
    /// With the records that wait in `batch`.
    pub(super) appended: Bounds,
    /// Without them: what the header of a segment begun now would say.
    written: Bounds,
    batch: Batch,
    /// Highest index in `batch`.
    batch_last_index: u64,
    pub(super) current: Segment,
    /// Older segments, oldest first: those not to be written any more.
    sealed: VecDeque<Sealed>,
    poison: Option<LogError>,
    // Dropped in this order: the thread must be gone before the lock is.
    pub(super) spares: Spares,
    pub(super) dir: Arc<Directory>,
}

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) sequence: u64,
    salt: u64,
    /// Where the next record goes.
    pub(super) end: u64,
    /// Size of the file. Writing beyond makes it grow, at a price.
    pub(super) capacity: u64,
    /// Everything before is on the disk for certain.
    synced: u64,
    /// Highest index of an entry in it.
    last_index: u64,
    /// The spare to follow it was asked for; once, lest a full disk is tried all the time.
    spare_wanted: bool,
}

#[derive(Debug)]
struct Sealed {
    path: PathBuf,
    last_index: u64,
}

impl Log {
    /// Opens the log in `options.dir`, or begins one there.
    ///
    /// What is returned is on the disk. A torn last write is cut, which a warning tells, and
    /// [`Recovered::repaired`]: whoever opens it next finds nothing of it. Anything else that is wrong
    /// is an error, and changes nothing.
    pub fn open(options: Options) -> Result<(Log, Recovered), LogError> {
        let Options { dir, segment_bytes, fsync, identity, reaches } = options;
        let segment_bytes = segment_bytes
            .clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
            .next_multiple_of(SEGMENT_HEADER_BYTES);
        let dir = Arc::new(Directory::open(&dir, fsync)?);
        let mut listing = dir.list()?;
        let run = listing.segments.split_off(run_start(&listing.segments));
        let mut retired: Vec<PathBuf> = listing.segments.into_iter().map(|s| s.2).collect();

        let found = recover::read(&dir, run, reaches)?;
        for path in &listing.temporaries {
            fs::remove_file(path).map_err(|e| LogError::io("remove", path, e))?;
        }
        guard::put(dir.path());
        dir.sync()?;
        let (bounds, entries, mut segments, repaired) = match found {
            Some(found) => {
                if let Some(repaired) = &found.repaired {
                    tracing::warn!("repaired the raft log: {repaired}");
                }
                (found.bounds, found.entries, found.segments, found.repaired)
            }
            None => {
                let header = SegmentHeader {
                    identity,
                    sequence: 1,
                    salt: new_salt(dir.path())?,
                    previous_end: 0,
                    next_index: Bounds::EMPTY.next_index,
                    hard_state: Bounds::EMPTY.hard_state,
                    start: Bounds::EMPTY.start,
                    file_bytes: 0,
                };
                let first = begin_segment(&dir, header, None, segment_bytes)?;
                (Bounds::EMPTY, Vec::new(), vec![first], None)
            }
        };
        let Some(last) = segments.pop() else {
            return Err(LogError::Missing { dir: dir.path().to_owned(), sequence: 1 });
        };
        let identity = last.header.identity;
        let current = Segment::new(last, fsync);
        let mut sealed: VecDeque<Sealed> = segments
            .into_iter()
            .map(|s| Sealed { path: s.path, last_index: s.last_index })
            .collect();
        retired.extend(drain_below(&mut sealed, bounds.start.index));
        let spares = Spares::start(dir.clone(), segment_bytes, listing.spares, retired)?;
        let log = Log {
            identity,
            segment_bytes,
            appended: bounds,
            written: bounds,
            batch: Batch::default(),
            batch_last_index: 0,
            current,
            sealed,
            poison: None,
            spares,
            dir,
        };
        let Bounds { hard_state, start, .. } = bounds;
        Ok((log, Recovered { identity, hard_state, start, entries, repaired }))
    }

    /// Whether `dir` holds a log. A directory that is not there does not.
    pub fn exists(dir: &Path) -> Result<bool, LogError> {
        dir::holds_a_log(dir)
    }

    /// Whether everything in the directory `dir` is of a log.
    ///
    /// # Errors
    /// [`LogError::Io`]: the directory is not there, or cannot be read.
    pub fn is_all_of(dir: &Path) -> Result<bool, LogError> {
        dir::holds_a_log_only(dir)
    }

    /// Keeps an etcd away that is started on the directory `dir` by mistake, as it is kept away from
    /// a log: for where it would look for its own, when kvorum's is elsewhere. Does what it can.
    pub fn guard(dir: &Path) {
        guard::put(dir);
    }

    /// Whether an etcd is kept away from the directory `dir`.
    pub fn is_guarded(dir: &Path) -> bool {
        guard::is_in(dir)
    }

    fn check(&self) -> Result<(), LogError> {
        self.poison.clone().map_or(Ok(()), Err)
    }

    /// Adds a record to those that wait.
    fn push(
        &mut self,
        hard_state: Option<HardState>,
        start: Option<Mark>,
        resets: bool,
        entries: &[Entry],
    ) -> Result<(), LogError> {
        self.batch.push(hard_state, start, resets, entries)?;
        self.appended.advance(hard_state, start, resets, entries);
        if let Some(last) = entries.last() {
            self.batch_last_index = self.batch_last_index.max(last.index);
        }
        Ok(())
    }

    /// Writes what waits, and `syncs` it; the log is of no use after an error.
    fn write(&mut self, syncs: bool) -> Result<SyncStats, LogError> {
        self.check()?;
        self.write_batch(syncs).inspect_err(|error| self.poison = Some(error.clone()))
    }

    fn write_batch(&mut self, syncs: bool) -> Result<SyncStats, LogError> {
        if self.batch.is_empty() {
            return Ok(SyncStats::default());
        }
        let began = Instant::now();
        let bytes = self.batch.len() as u64;
        // An empty segment that is too small grows; another would be too small as well.
        if self.current.end + bytes > self.current.capacity
            && self.current.end > SEGMENT_HEADER_BYTES
        {
            self.roll()?;
        }
        let Segment { sequence, salt, end: offset, capacity, synced, .. } = self.current;
        let end = offset + bytes;
        // Zeros behind the last record say that it is the last, whatever an earlier life
        // of the file has left there.
        let zeros = capacity.saturating_sub(end).min(RECORD_HEADER_BYTES) as usize;
        let batch = self.batch.seal(Place { salt, sequence, offset }, synced, zeros);
        self.current
            .file
            .write_all_at(batch, offset)
            .map_err(|e| LogError::io("write", &self.current.path, e))?;
        self.dir.step(Step::BatchWritten);
        let write_duration = began.elapsed();
        let began = Instant::now();
        if syncs {
            self.dir.sync_file(&self.current.file, &self.current.path)?;
            self.dir.step(Step::BatchSynced);
        }
        let fsync_duration = began.elapsed();

        if end > capacity / 2 && !self.current.spare_wanted {
            self.current.spare_wanted = true;
            self.spares.want();
        }
        self.current.end = end;
        self.current.capacity = capacity.max(end);
        if syncs && self.dir.fsync() {
            self.current.synced = end;
        }
        self.current.last_index = self.current.last_index.max(self.batch_last_index);
        self.written = self.appended;
        self.batch.clear();
        self.batch_last_index = 0;
        Ok(SyncStats { bytes, write_duration, fsync_duration })
    }

    /// Goes on in a new segment. All that the current one holds is synced.
    fn roll(&mut self) -> Result<(), LogError> {
        let header = SegmentHeader {
            identity: self.identity,
            sequence: self.current.sequence + 1,
            salt: new_salt(self.dir.path())?,
            previous_end: self.current.end,
            next_index: self.written.next_index,
            hard_state: self.written.hard_state,
            start: self.written.start,
            file_bytes: 0,
        };
        let spare = self.spares.take();
        if spare.is_none() {
            self.spares.want();
        }
        let next = begin_segment(&self.dir, header, spare, self.segment_bytes)?;
        let next = Segment::new(next, self.dir.fsync());
        let before = std::mem::replace(&mut self.current, next);
        let Segment { path, file, sequence, salt, end: offset, last_index, .. } = before;
        // From now on the log is not whole without the next segment.
        file.write_all_at(&continuation(Place { salt, sequence, offset }), offset)
            .map_err(|e| LogError::io("write", &path, e))?;
        self.dir.sync_file(&file, &path)?;
        self.sealed.push_back(Sealed { path, last_index });
        Ok(())
    }
}

impl LogStore for Log {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<HardState>,
    ) -> Result<AppendReceipt, LogError> {
        self.check()?;
        self.appended.check_append(entries)?;
        if !entries.is_empty() || hard_state.is_some() {
            self.push(hard_state, None, false, entries)?;
        }
        Ok(AppendReceipt {
            last_index: self.appended.last_index(),
            waiting_bytes: self.batch.len() as u64,
        })
    }

    fn sync(&mut self) -> Result<SyncStats, LogError> {
        self.write(true)
    }

    fn truncate_prefix(&mut self, to: Mark) -> Result<(), LogError> {
        self.check()?;
        if self.appended.check_truncate(to)? {
            self.push(None, Some(to), false, &[])?;
            self.write(true)?;
            self.spares.retire(drain_below(&mut self.sealed, to.index));
        }
        Ok(())
    }

    fn install(&mut self, start: Mark, hard_state: HardState) -> Result<(), LogError> {
        self.check()?;
        self.appended.check_install(start)?;
        self.push(Some(hard_state), Some(start), true, &[])?;
        self.write(true)?;
        self.current.last_index = 0;
        self.spares.retire(self.sealed.drain(..).map(|segment| segment.path));
        Ok(())
    }

    fn attest(&mut self) -> Result<(), LogError> {
        self.check()?;
        let Segment { end, capacity, synced, .. } = self.current;
        // Where it does not fit, a segment follows, whose header says the same.
        if synced < end || end + RECORD_HEADER_BYTES > capacity || !self.batch.is_empty() {
            return Ok(());
        }
        self.push(None, None, false, &[])?;
        self.write(false).map(drop)
    }

    fn close(&mut self) -> Result<(), LogError> {
        self.check()?;
        self.write(true)?;
        // It need not be synced itself, but it costs nothing to wait once at the end.
        self.push(None, None, false, &[])?;
        self.write(true)?;
        Ok(())
    }
}

impl Segment {
    fn new(found: FoundSegment, fsync: bool) -> Segment {
        Segment {
            path: found.path,
            file: found.file,
            sequence: found.header.sequence,
            salt: found.header.salt,
            end: found.end,
            capacity: found.file_bytes,
            // Nothing is claimed that was not waited for.
            synced: if fsync { found.end } else { SEGMENT_HEADER_BYTES },
            last_index: found.last_index,
            spare_wanted: false,
        }
    }
}

/// Where the unbroken run of sequence numbers begins that goes up to the last.
fn run_start(segments: &[(u64, u64, PathBuf)]) -> usize {
    let gap = segments
        .iter()
        .zip(segments.iter().skip(1))
        .rposition(|(a, b)| a.0.checked_add(1) != Some(b.0));
    gap.map_or(0, |gap| gap + 1)
}

/// Takes off the oldest segments that hold no entry after `index`.
fn drain_below(sealed: &mut VecDeque<Sealed>, index: u64) -> Vec<PathBuf> {
    let count = sealed.iter().take_while(|segment| segment.last_index <= index).count();
    sealed.drain(..count).map(|segment| segment.path).collect()
}

/// A salt that no segment had before.
fn new_salt(dir: &Path) -> Result<u64, LogError> {
    getrandom::u64().map_err(|e| {
        LogError::io("draw a random number for", dir, std::io::Error::other(e.to_string()))
    })
}

/// Makes the segment that `header` begins, over `spare` if there is one. When this
/// returns, header, zeros and name are on the disk; before that, no segment by that name
/// exists, so that a segment without a good header never comes from a crash.
fn begin_segment(
    dir: &Directory,
    header: SegmentHeader,
    spare: Option<PathBuf>,
    segment_bytes: u64,
) -> Result<FoundSegment, LogError> {
    let (unnamed, file, file_bytes, written_bytes) = match spare {
        Some(path) => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|e| LogError::io("open", &path, e))?;
            let metadata = file.metadata().map_err(|e| LogError::io("look at", &path, e))?;
            // With the end of a log without records.
            (path, file, metadata.len(), SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES)
        }
        None => {
            let path = dir.temporary(&format!("segment-{:016x}", header.sequence));
            let file = dir.create(&path)?;
            let file_bytes = segment_bytes.min(INLINE_SEGMENT_BYTES);
            (path, file, file_bytes, file_bytes)
        }
    };
    let header = SegmentHeader { file_bytes, ..header };
    let mut page = header.encode();
    page.resize(written_bytes as usize, 0);
    file.write_all_at(&page, 0).map_err(|e| LogError::io("write", &unnamed, e))?;
    dir.step(Step::HeaderWritten);
    dir.sync_file(&file, &unnamed)?;
    dir.step(Step::HeaderSynced);
    let path = dir.segment(header.sequence, header.next_index);
    fs::rename(&unnamed, &path).map_err(|e| LogError::io("rename", &unnamed, e))?;
    dir.step(Step::SegmentNamed);
    dir.sync()?;
    dir.step(Step::SegmentSynced);
    Ok(FoundSegment { path, header, file, file_bytes, end: SEGMENT_HEADER_BYTES, last_index: 0 })
}
