//! etcd's write-ahead log, as far as it says whose it is, and whether a database lacks any of it.
//!
//! ```text
//! <sequence>-<index>.wal     frame: length u64, the top byte of which is 0x80 | padding, or 0
//! ┌─────┬──────┬───────┬───      record: type, crc, data (walpb.Record), and padding to 8 bytes
//! │ crc │ meta │ entry │ …     types: 1 metadata, 2 entry, 3 state, 4 crc, 5 snapshot
//! └─────┴──────┴───────┴───   zeros up to the size that was set aside
//! ```
//!
//! Checksums are CRC-32C, each going on from the one before; a file begins with a record that
//! says where the one before it ended. The files are read one after the other; of an entry there
//! remains whether it changes data ([`Wal::unapplied`]).
//!
//! The newest file may end in a record that was not written completely: etcd has told nobody of
//! it. Anywhere else that is damage.

use std::fs::{self, File};
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use prost::Message as _;

/// What a file's name ends with.
const SUFFIX: &str = ".wal";
/// What etcd sets aside for a file of its log, which then has no smaller size.
const SET_ASIDE_BYTES: u64 = 64_000_000;
/// The longest record there can be, in bytes. etcd itself writes none longer than a request.
const RECORD_BYTES_MAX: u64 = 1 << 30;
/// A disk writes so many bytes at once or not at all.
const SECTOR_BYTES: usize = 512;

const METADATA: i64 = 1;
const ENTRY: i64 = 2;
const STATE: i64 = 3;
const CRC: i64 = 4;
const SNAPSHOT: i64 = 5;

/// raft's type of an entry that changes who belongs to the cluster, in either form.
const CONF_CHANGES: [i64; 2] = [1, 2];
/// Fields of etcd's requests (`InternalRaftRequest`) that change no data: who asks, and ranges;
/// the cluster's version, and who a member says it is.
const HARMLESS_FIELDS: [u32; 6] = [1, 3, 100, 1300, 1301, 1302];

/// What etcd's log says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wal {
    /// Whose it is.
    pub member_id: u64,
    /// And of which cluster.
    pub cluster_id: u64,
    /// The newest term that the member was in.
    pub term: u64,
    /// The index up to which it reaches: of an entry or a snapshot.
    pub last_index: u64,
    /// The indexes of entries that change data and that the database has not, in order.
    pub unapplied: Vec<u64>,
}

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The operating system refused.
    #[error("cannot read {}: {error}", path.display())]
    Io {
        /// The file, or the directory.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
    /// There is none.
    #[error("etcd's write-ahead log is missing: {} has no *{SUFFIX}; correct --wal-dir", .0.display())]
    Missing(PathBuf),
    /// A file is missing between two others.
    #[error("etcd's write-ahead log is not complete: the file before {} is missing", .0.display())]
    Gap(PathBuf),
    /// A file is not what was written.
    #[error("etcd's write-ahead log {} is damaged at byte {offset}: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        problem: &'static str,
    },
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(uint32, tag = "2")]
    crc: u32,
    #[prost(bytes = "vec", optional, tag = "3")]
    data: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(uint64, tag = "1")]
    node_id: u64,
    #[prost(uint64, tag = "2")]
    cluster_id: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RaftEntry {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(uint64, tag = "2")]
    term: u64,
    #[prost(uint64, tag = "3")]
    index: u64,
    #[prost(bytes = "vec", tag = "4")]
    data: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RaftState {
    #[prost(uint64, tag = "1")]
    term: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RaftSnapshot {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(uint64, tag = "2")]
    term: u64,
}

/// The files of a log, in order, with their sequence.
///
/// # Errors
/// [`WalError::Io`].
pub fn files(dir: &Path) -> Result<Vec<(u64, PathBuf)>, WalError> {
    let failed = |error| WalError::Io { path: dir.to_owned(), error };
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let sequence = name.strip_suffix(SUFFIX).and_then(|name| name.split_once('-'));
        let number = sequence.and_then(|(number, _)| u64::from_str_radix(number, 16).ok());
        if let Some(number) = number {
            found.push((number, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Reads a log. Entries up to `applied` are in the database.
///
/// # Errors
/// [`WalError`].
pub fn read(dir: &Path, applied: u64) -> Result<Wal, WalError> {
    let files = files(dir)?;
    let mut reading = Reading { applied, wal: Wal::default(), crc: 0, has_metadata: false };
    let mut before: Option<u64> = None;
    let newest = files.last().map(|(sequence, _)| *sequence);
    for (sequence, path) in files {
        if before.is_some_and(|before| before + 1 != sequence) {
            return Err(WalError::Gap(path));
        }
        before = Some(sequence);
        reading.file(&path, newest == Some(sequence))?;
    }
    if !reading.has_metadata {
        return Err(WalError::Missing(dir.to_owned()));
    }
    Ok(reading.wal)
}

struct Reading {
    applied: u64,
    wal: Wal,
    crc: u32,
    has_metadata: bool,
}

impl Reading {
    fn file(&mut self, path: &Path, is_newest: bool) -> Result<(), WalError> {
        let failed = |error| WalError::Io { path: path.to_owned(), error };
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut offset = 0;
        while len - offset >= 8 {
            let damaged = |problem| WalError::Damaged { path: path.to_owned(), offset, problem };
            let mut field = [0; 8];
            file.read_exact(&mut field).map_err(failed)?;
            let field = i64::from_le_bytes(field);
            if field == 0 {
                // Set aside, and not written yet.
                return Ok(());
            }
            // The length is the lower 56 bits; of the top byte, the lower three are the padding.
            let record_bytes = field.cast_unsigned() & ((1 << 56) - 1);
            let padding_bytes = if field < 0 { field.cast_unsigned() >> 56 & 7 } else { 0 };
            let frame_bytes = record_bytes + padding_bytes;
            if record_bytes > RECORD_BYTES_MAX || frame_bytes > len - offset - 8 {
                // The end of a file that was cut off. In one that etcd has set aside as a whole
                // not even a write that was cut short looks like this.
                if is_newest && len < SET_ASIDE_BYTES {
                    return Ok(());
                }
                return Err(damaged("a record is longer than the file"));
            }
            // No more than the file has.
            let mut frame = vec![0; usize::try_from(frame_bytes).unwrap_or_default()];
            file.read_exact(&mut frame).map_err(failed)?;
            let record = frame.get(..usize::try_from(record_bytes).unwrap_or_default());
            let record = Record::decode(record.unwrap_or_default()).ok();
            if let Err(problem) = record.ok_or("a record is none").and_then(|it| self.record(&it)) {
                if is_newest && is_torn(offset + 8, &frame) {
                    return Ok(());
                }
                return Err(damaged(problem));
            }
            offset += 8 + frame_bytes;
        }
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), &'static str> {
        let data = record.data.as_deref().unwrap_or_default();
        if record.kind == CRC {
            if self.crc != 0 && self.crc != record.crc {
                return Err("it does not go on from the file before");
            }
            self.crc = record.crc;
            return Ok(());
        }
        let crc = crc32c::crc32c_append(self.crc, data);
        if crc != record.crc {
            return Err("its checksum is wrong");
        }
        self.crc = crc;
        match record.kind {
            METADATA => {
                let metadata = Metadata::decode(data).map_err(|_| "its metadata is none")?;
                let (member, cluster) = (metadata.node_id, metadata.cluster_id);
                if self.has_metadata
                    && (member, cluster) != (self.wal.member_id, self.wal.cluster_id)
                {
                    return Err("it is of another member than the file before");
                }
                (self.wal.member_id, self.wal.cluster_id) = (member, cluster);
                self.has_metadata = true;
            }
            ENTRY => {
                let entry = RaftEntry::decode(data).map_err(|_| "an entry is none")?;
                self.entry(&entry);
            }
            STATE => {
                let state = RaftState::decode(data).map_err(|_| "raft's state is none")?;
                self.wal.term = self.wal.term.max(state.term);
            }
            SNAPSHOT => {
                let snapshot = RaftSnapshot::decode(data).map_err(|_| "a snapshot is none")?;
                self.wal.last_index = self.wal.last_index.max(snapshot.index);
                self.wal.term = self.wal.term.max(snapshot.term);
            }
            _ => return Err("a record is of a kind that there is not"),
        }
        Ok(())
    }

    /// An entry replaces those that were at its index and later.
    fn entry(&mut self, entry: &RaftEntry) {
        let unapplied = &mut self.wal.unapplied;
        while unapplied.pop_if(|index| *index >= entry.index).is_some() {}
        self.wal.last_index = entry.index;
        self.wal.term = self.wal.term.max(entry.term);
        if entry.index > self.applied && changes_data(entry) {
            self.wal.unapplied.push(entry.index);
        }
    }
}

/// Whether a database that lacks the entry lacks anything. What is not known does.
fn changes_data(entry: &RaftEntry) -> bool {
    if CONF_CHANGES.contains(&entry.kind) {
        return true;
    }
    let mut rest = entry.data.as_slice();
    while !rest.is_empty() {
        let Ok((field, wire_type)) = prost::encoding::decode_key(&mut rest) else { return true };
        let context = prost::encoding::DecodeContext::default();
        let skipped = prost::encoding::skip_field(wire_type, field, &mut rest, context);
        if skipped.is_err() || !HARMLESS_FIELDS.contains(&field) {
            return true;
        }
    }
    false
}

/// Whether a frame, which begins at `at` in its file, was not written completely: a sector of it
/// is still all zeros.
fn is_torn(at: u64, frame: &[u8]) -> bool {
    let in_sector = usize::try_from(at % SECTOR_BYTES as u64).unwrap_or_default();
    let (first, rest) = frame.split_at(frame.len().min(SECTOR_BYTES - in_sector));
    std::iter::once(first)
        .chain(rest.chunks(SECTOR_BYTES))
        .any(|sector| sector.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log as etcd writes it.
    #[derive(Default)]
    struct Written {
        bytes: Vec<u8>,
        crc: u32,
    }

    impl Written {
        fn frame(&mut self, record: &Record) -> &mut Written {
            let record = record.encode_to_vec();
            let padding = (8 - record.len() % 8) % 8;
            let top = if padding == 0 { 0 } else { 0x80 | padding as u64 };
            self.bytes.extend((record.len() as u64 | top << 56).to_le_bytes());
            self.bytes.extend(&record);
            self.bytes.extend(vec![0; padding]);
            self
        }

        fn record(&mut self, kind: i64, message: &impl prost::Message) -> &mut Written {
            let data = message.encode_to_vec();
            self.crc = crc32c::crc32c_append(self.crc, &data);
            let crc = self.crc;
            self.frame(&Record { kind, crc, data: Some(data) })
        }

        fn crc(&mut self) -> &mut Written {
            let crc = self.crc;
            self.frame(&Record { kind: CRC, crc, data: None })
        }

        fn entry(&mut self, index: u64, data: &[u8]) -> &mut Written {
            self.record(ENTRY, &RaftEntry { kind: 0, term: 3, index, data: data.to_vec() })
        }

        fn begun() -> Written {
            let mut written = Written::default();
            written.crc().record(METADATA, &Metadata { node_id: 7, cluster_id: 9 });
            written
        }

        fn read(&self, applied: u64) -> Result<Wal, WalError> {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("0000000000000000-0000000000000000.wal"), &self.bytes)
                .unwrap();
            read(dir.path(), applied)
        }
    }

    /// A put, as the field of a request.
    const PUT: &[u8] = b"\x22\x03\x0a\x01a";

    #[test]
    fn entries_that_change_data_and_are_not_applied_are_found() {
        let mut log = Written::begun();
        log.entry(1, PUT).entry(2, b"").entry(3, PUT).entry(4, b"\x08\x01").entry(5, PUT);
        log.record(STATE, &RaftState { term: 4 });
        let wal = log.read(2).unwrap();
        assert_eq!((wal.member_id, wal.cluster_id, wal.term, wal.last_index), (7, 9, 4, 5));
        assert_eq!(wal.unapplied, [3, 5]);
        // What the next leader wrote instead.
        log.entry(4, b"");
        assert_eq!(log.read(2).unwrap().unapplied, [3]);
        assert_eq!(log.read(3).unwrap().unapplied, [0; 0]);
    }

    #[test]
    fn a_torn_end_is_no_damage_and_a_changed_byte_is() {
        let mut log = Written::begun();
        log.entry(1, PUT);
        let whole = log.bytes.len();
        log.entry(2, &[0x22; 2000]);
        let mut torn = Written { bytes: log.bytes.clone(), crc: 0 };
        torn.bytes.truncate(whole + 600);
        assert_eq!(torn.read(0).unwrap().last_index, 1);
        torn.bytes.resize(log.bytes.len(), 0);
        assert_eq!(torn.read(0).unwrap().last_index, 1);
        log.bytes[whole + 600] ^= 1;
        let error = log.read(0).unwrap_err().to_string();
        assert!(error.contains("checksum is wrong"), "{error}");
    }

    #[test]
    fn files_follow_each_other_without_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path(), 0).unwrap_err();
        assert!(matches!(error, WalError::Missing(_)), "{error}");
        let mut first = Written::begun();
        first.entry(1, PUT);
        let mut second = Written { bytes: Vec::new(), crc: first.crc };
        second.crc().record(METADATA, &Metadata { node_id: 7, cluster_id: 9 }).entry(2, PUT);
        let file = |sequence: u64| dir.path().join(format!("{sequence:016x}-{:016x}.wal", 0));
        fs::write(file(3), &first.bytes).unwrap();
        fs::write(file(4), &second.bytes).unwrap();
        assert_eq!(read(dir.path(), 0).unwrap().unapplied, [1, 2]);
        fs::rename(file(4), file(5)).unwrap();
        assert!(matches!(read(dir.path(), 0), Err(WalError::Gap(_))));
        fs::rename(file(3), file(4)).unwrap();
        fs::write(file(4), &Written::begun().bytes).unwrap();
        let error = read(dir.path(), 0).unwrap_err().to_string();
        assert!(error.contains("does not go on"), "{error}");
    }
}
