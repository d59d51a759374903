//! Which of a member's checkpoints counts.
//!
//! A checkpoint that is to be replaced as a whole (to give its space back, or because
//! its disk had failed it) is not changed in place: the next one is filled beside it,
//! synced, and then named in the file `CURRENT`, which is replaced atomically.
//!
//! ```text
//! member/LOCK        held while a server has the member open
//! member/CURRENT     "ckpt-3\nformat 1\ncrc32c 5a1b…\n"
//! member/ckpt-3/     counts
//! member/ckpt-4/     being filled; a crash now leaves it behind, and it is removed
//! member/healing/    the same, to take the place of one that is damaged
//! member/damaged-ckpt-2/   one that was; nobody reads or removes it but the operator
//! ```
//!
//! `CURRENT` is where reading a data directory begins, so it carries the version of the whole:
//! which files there are and what they mean. (The checkpoint and each segment of the log have
//! versions of their own for what is in them.) Its checksum keeps a flipped bit from naming another
//! checkpoint, which would cost the right one as a leftover. Versions before 0.1.0 wrote its
//! first line alone.
//!
//! **A damaged checkpoint** is replaced by [`DiskGenerations::of_damaged`],
//! [`begin_beside`](DiskGenerations::begin_beside) and
//! [`replace_damaged`](DiskGenerations::replace_damaged). Until the last all is as it was; a crash
//! within it leaves a `CURRENT` that names a checkpoint which is not there, or that is missing as it
//! was: damage to be healed like the one before, and nothing is ever removed.
//!
//! Without `CURRENT` no checkpoint ever counted: the member is new, and what lies there
//! was begun by a start that did not get far. That this is so, and `CURRENT` not lost, is
//! for the caller to know before it calls [`DiskGenerations::begin_first`], as it is which one is
//! to be named again ([`DiskGenerations::name`]). Nothing is removed before the caller has opened the
//! checkpoint that counts and found that the log goes on from it
//! ([`DiskGenerations::remove_leftovers`]): an operator may have named the wrong one.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::{MemoryStorage, SledStorage, Storage, StorageError};
use crate::file_lock::FileLock;

/// The file that names the checkpoint that counts.
const CURRENT: &str = "CURRENT";
/// The file that is locked while a server has the member open.
const LOCK: &str = "LOCK";
/// Where the checkpoint is filled that is to replace a damaged one.
const HEALING: &str = "healing";
/// Put before the name of a checkpoint that was damaged.
const DAMAGED: &str = "damaged-";
/// Checkpoints of one name that may be set aside: each needs an operator to look at it.
const DAMAGED_MAX: u32 = 1000;
/// The version of the data directory that this code reads and writes.
const FORMAT: u32 = 1;
const FORMAT_LINE: &str = "format ";
const CHECKSUM_LINE: &str = "crc32c ";
/// More than `CURRENT` ever has, in bytes.
const CURRENT_BYTES_MAX: u64 = 4096;

/// Makes the checkpoint after the current one.
pub trait Generations: Send {
    /// An empty checkpoint, which does not count yet. One that was begun and not made
    /// to count is gone.
    ///
    /// # Errors
    /// Like opening a storage.
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError>;

    /// The checkpoint that counts, opened anew after it was dropped. Was it dropped because
    /// it had failed, it is in the state after a crash: all that was synced and perhaps more.
    ///
    /// # Errors
    /// Like opening a storage; also when it cannot be opened twice by one process.
    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError>;

    /// Removes all checkpoints but the one that counts: one that was begun and failed, or
    /// the one before the last switch. They must have been dropped.
    fn discard(&mut self);

    /// The checkpoint begun last counts from now on, durably; it must be synced.
    ///
    /// # Errors
    /// After [`StorageError::is_full`] the one before still counts; otherwise only a new
    /// start can tell.
    fn switch(&mut self) -> Result<(), StorageError>;
}

/// Checkpoints below a member's directory.
#[derive(Debug)]
pub struct DiskGenerations {
    member_dir: PathBuf,
    number: u64,
    /// Without it, a second server would take what the first is filling for a leftover.
    /// The kernel gives it up with the descriptor.
    _lock: FileLock,
}

impl DiskGenerations {
    /// Whether no checkpoint counts yet. Changes nothing.
    ///
    /// # Errors
    /// What the disk says.
    pub fn is_new(member_dir: &Path) -> Result<bool, StorageError> {
        member_dir.join(CURRENT).try_exists().map(|exists| !exists).map_err(|source| {
            StorageError::Io { dir: member_dir.to_owned(), action: "look for CURRENT", source }
        })
    }

    /// The file that says which checkpoint counts.
    pub fn current(member_dir: &Path) -> PathBuf {
        member_dir.join(CURRENT)
    }

    /// A checkpoint, whether it counts or not, or what was to replace a damaged one, if there is
    /// one. Changes nothing.
    ///
    /// # Errors
    /// What the disk says.
    pub fn any(member_dir: &Path) -> Result<Option<PathBuf>, StorageError> {
        let found = checkpoints(member_dir).map_err(|source| StorageError::Io {
            dir: member_dir.to_owned(),
            action: "look for a checkpoint",
            source,
        })?;
        let healing = Some(member_dir.join(HEALING)).filter(|path| path.exists());
        Ok(found.into_iter().next().or(healing))
    }

    /// Begins the first checkpoint of a new member, which counts once
    /// [`Generations::switch`] was called. What an earlier attempt left is removed.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn begin_first(member_dir: &Path) -> Result<(DiskGenerations, SledStorage), StorageError> {
        let generations = DiskGenerations::locked(member_dir)?;
        generations.remove_leftovers()?;
        let storage = SledStorage::open(&generations.dir(1))?;
        Ok((generations, storage))
    }

    fn locked(member_dir: &Path) -> Result<DiskGenerations, StorageError> {
        Ok(DiskGenerations {
            member_dir: member_dir.to_owned(),
            number: 0,
            _lock: lock(member_dir)?,
        })
    }

    /// Opens the checkpoint that counts. Removes nothing.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn open(member_dir: &Path) -> Result<(DiskGenerations, SledStorage), StorageError> {
        let mut generations = DiskGenerations::locked(member_dir)?;
        let current = member_dir.join(CURRENT);
        let mut text = Vec::new();
        File::open(&current)
            .and_then(|file| file.take(CURRENT_BYTES_MAX).read_to_end(&mut text))
            .map_err(|error| generations.io("read CURRENT", error))?;
        generations.number = read_current(&text).map_err(|bad| match bad {
            BadCurrent::Damaged => StorageError::CurrentDamaged { dir: member_dir.to_owned() },
            BadCurrent::Newer(found) => {
                StorageError::NewerFormat { dir: current.clone(), found, known: FORMAT }
            }
        })?;
        let dir = generations.dir(generations.number);
        if !dir.is_dir() {
            let detail = format!("{CURRENT} names it, and it is missing");
            return Err(StorageError::Damaged { dir, detail });
        }
        let storage = SledStorage::open(&dir)?;
        Ok((generations, storage))
    }

    /// Removes all checkpoints but the one that counts, which must be known to be the right one.
    ///
    /// # Errors
    /// What the disk says.
    pub fn remove_leftovers(&self) -> Result<(), StorageError> {
        self.remove_others().map_err(|error| self.io("remove a leftover", error))
    }

    /// A member whose checkpoint cannot be used, locked. Changes nothing.
    ///
    /// # Errors
    /// What the disk says.
    pub fn of_damaged(member_dir: &Path) -> Result<DiskGenerations, StorageError> {
        let mut generations = DiskGenerations::locked(member_dir)?;
        let found =
            checkpoints(member_dir).map_err(|e| generations.io("look for checkpoints", e))?;
        generations.number = found.iter().filter_map(|path| number_of(path)).max().unwrap_or(0);
        Ok(generations)
    }

    /// The checkpoint that `CURRENT` names, if it names one that is there.
    pub fn counting(&self) -> Option<PathBuf> {
        let text = fs::read(self.member_dir.join(CURRENT)).ok()?;
        Some(self.dir(read_current(&text).ok()?)).filter(|dir| dir.is_dir())
    }

    /// All that `CURRENT` may have named, with their numbers, in order.
    ///
    /// # Errors
    /// What the disk says.
    pub fn all(&self) -> Result<Vec<(u64, PathBuf)>, StorageError> {
        let found = checkpoints(&self.member_dir);
        let found = found.map_err(|error| self.io("look for checkpoints", error))?;
        let dirs = found.into_iter().filter(|path| path.is_dir());
        let mut all: Vec<_> = dirs.filter_map(|dir| Some((number_of(&dir)?, dir))).collect();
        all.sort();
        Ok(all)
    }

    /// The checkpoint of this number counts from now on, durably, after it could not be told which
    /// one does.
    ///
    /// # Errors
    /// What the disk says.
    pub fn name(&mut self, number: u64) -> Result<(), StorageError> {
        self.switch_to(number)
    }

    /// An empty checkpoint that is to take the place of the damaged one. What an earlier
    /// attempt left is removed.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn begin_beside(&self) -> Result<SledStorage, StorageError> {
        let healing = self.member_dir.join(HEALING);
        self.remove_healing().map_err(|error| self.io("remove a leftover", error))?;
        SledStorage::open(&healing)
    }

    /// What was begun beside, filled, synced and dropped counts from now on, durably. Returns
    /// where the damaged checkpoints are now.
    ///
    /// # Errors
    /// Only a new start can tell which one counts: see the module's documentation.
    pub fn replace_damaged(&mut self) -> Result<Vec<PathBuf>, StorageError> {
        let aside = self.set_aside().map_err(|error| self.io("set it aside", error))?;
        let next = self.dir(self.number + 1);
        fs::rename(self.member_dir.join(HEALING), &next)
            .and_then(|()| File::open(&self.member_dir)?.sync_all())
            .map_err(|error| self.io("replace it", error))?;
        self.switch()?;
        Ok(aside)
    }

    fn set_aside(&self) -> io::Result<Vec<PathBuf>> {
        let mut aside = Vec::new();
        for path in checkpoints(&self.member_dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mut names = (1..DAMAGED_MAX).map(|time| match time {
                1 => self.member_dir.join(format!("{DAMAGED}{name}")),
                _ => self.member_dir.join(format!("{DAMAGED}{name}-{time}")),
            });
            let free = names.find(|path| !path.exists());
            let to = free.ok_or_else(|| {
                io::Error::other(format!("there are {DAMAGED_MAX} of them: remove some"))
            })?;
            fs::rename(&path, &to)?;
            aside.push(to);
        }
        Ok(aside)
    }

    fn remove_healing(&self) -> io::Result<()> {
        let healing = self.member_dir.join(HEALING);
        SledStorage::give_back_space(&healing);
        match fs::remove_dir_all(&healing) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn dir(&self, number: u64) -> PathBuf {
        self.member_dir.join(format!("ckpt-{number}"))
    }

    fn remove_others(&self) -> io::Result<()> {
        let keep = self.dir(self.number);
        for path in checkpoints(&self.member_dir)?.into_iter().filter(|path| *path != keep) {
            SledStorage::give_back_space(&path);
            fs::remove_dir_all(&path)?;
        }
        self.remove_healing()
    }

    /// What does not count and cannot be removed now is in nobody's way: the next start
    /// tries again.
    fn remove_others_if_possible(&self) {
        if let Err(error) = self.remove_others() {
            let dir = self.member_dir.display();
            tracing::warn!(%error, %dir, "cannot remove a checkpoint that does not count");
        }
    }

    fn io(&self, action: &'static str, source: io::Error) -> StorageError {
        StorageError::Io { dir: self.member_dir.clone(), action, source }
    }

    fn switch_to(&mut self, number: u64) -> Result<(), StorageError> {
        let temporary = self.member_dir.join(format!("{CURRENT}.tmp"));
        let written = self.write_temporary(&temporary, number);
        written.map_err(|error| self.io("write CURRENT", error))?;
        let current = self.member_dir.join(CURRENT);
        fs::rename(&temporary, current).map_err(|error| self.io("replace CURRENT", error))?;
        // From here on only a new start can tell which one counts.
        self.number = number;
        let synced = File::open(&self.member_dir).and_then(|dir| dir.sync_all());
        // That there is no space would be a reason to go on as before, which is not so.
        synced.map_err(|error| self.io("sync CURRENT", io::Error::other(error)))
    }

    fn write_temporary(&self, path: &Path, number: u64) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(current_text(number).as_bytes())?;
        file.sync_all()
    }
}

/// Why a file is no `CURRENT`.
#[derive(Debug, PartialEq, Eq)]
enum BadCurrent {
    Damaged,
    /// Of another version of the data directory.
    Newer(u32),
}

/// What `CURRENT` holds when the checkpoint of this number counts.
fn current_text(number: u64) -> String {
    let text = format!("ckpt-{number}\n{FORMAT_LINE}{FORMAT}\n");
    let checksum = crc32c::crc32c(text.as_bytes());
    format!("{text}{CHECKSUM_LINE}{checksum:08x}\n")
}

/// The number of the checkpoint that counts. A later version may write other lines, but begins with
/// these two and ends with the checksum.
fn read_current(text: &[u8]) -> Result<u64, BadCurrent> {
    let text = str::from_utf8(text).map_err(|_| BadCurrent::Damaged)?;
    let text = text.strip_suffix('\n').ok_or(BadCurrent::Damaged)?;
    let Some((body, last)) = text.rsplit_once('\n') else {
        return number_in(text).ok_or(BadCurrent::Damaged);
    };
    let checksum = last.strip_prefix(CHECKSUM_LINE).ok_or(BadCurrent::Damaged)?;
    if checksum != format!("{:08x}", crc32c::crc32c(format!("{body}\n").as_bytes())) {
        return Err(BadCurrent::Damaged);
    }
    let mut lines = body.lines();
    let (name, format) = (lines.next(), lines.next());
    let format = format.and_then(|line| line.strip_prefix(FORMAT_LINE)?.parse().ok());
    match format.ok_or(BadCurrent::Damaged)? {
        FORMAT => name.and_then(number_in).ok_or(BadCurrent::Damaged),
        newer => Err(BadCurrent::Newer(newer)),
    }
}

/// The number of the checkpoint of this name.
fn number_in(name: &str) -> Option<u64> {
    let number = name.strip_prefix("ckpt-")?;
    // `+3` and `03` are numbers, too, and of no checkpoint.
    number.parse().ok().filter(|parsed: &u64| parsed.to_string() == number)
}

fn number_of(path: &Path) -> Option<u64> {
    number_in(path.file_name()?.to_str()?)
}

/// The checkpoints there are, whether they count or not.
fn checkpoints(member_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(member_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with("ckpt-")) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Locks a member's directory.
fn lock(member_dir: &Path) -> Result<FileLock, StorageError> {
    let dir = || member_dir.to_owned();
    FileLock::acquire(&member_dir.join(LOCK))
        .map_err(|source| StorageError::Io { dir: dir(), action: "lock LOCK", source })?
        .ok_or_else(|| StorageError::Locked { dir: dir() })
}

impl Generations for DiskGenerations {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        self.remove_leftovers()?;
        Ok(Box::new(SledStorage::open(&self.dir(self.number + 1))?))
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        self.switch_to(self.number + 1)
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        Ok(Box::new(SledStorage::open(&self.dir(self.number))?))
    }

    fn discard(&mut self) {
        self.remove_others_if_possible();
    }
}

/// Checkpoints in memory: each is as good as the last.
#[derive(Debug, Default)]
pub struct MemoryGenerations;

impl Generations for MemoryGenerations {
    fn begin(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        Ok(Box::new(MemoryStorage::new()))
    }

    fn switch(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn reopen(&mut self) -> Result<Box<dyn Storage>, StorageError> {
        // Nothing outlives a storage in memory.
        Err(StorageError::Failed { dir: PathBuf::from("(memory)") })
    }

    fn discard(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::super::{Batch, Table};
    use super::*;

    fn put(storage: &mut dyn Storage, value: &'static str) {
        let mut batch = Batch::new();
        batch.put(Table::Head, &b"k"[..], value);
        storage.write(batch).expect("write");
        storage.sync().expect("sync");
    }

    fn value(storage: &dyn Storage) -> Vec<u8> {
        storage.get(Table::Head, b"k").expect("get").expect("a value").to_vec()
    }

    #[test]
    fn a_checkpoint_counts_from_the_switch_on() {
        let dir = tempfile::tempdir().expect("a directory");
        {
            let (_, mut storage) = DiskGenerations::begin_first(dir.path()).expect("begin");
            put(&mut storage, "never counted");
        }
        assert!(DiskGenerations::is_new(dir.path()).expect("looks"));
        {
            let (mut generations, mut storage) =
                DiskGenerations::begin_first(dir.path()).expect("begin");
            assert!(storage.get(Table::Head, b"k").expect("get").is_none());
            put(&mut storage, "first");
            generations.switch().expect("switch");
        }
        assert!(!DiskGenerations::is_new(dir.path()).expect("looks"));
        {
            let (mut generations, storage) = DiskGenerations::open(dir.path()).expect("open");
            assert_eq!(value(&storage), b"first");
            put(generations.begin().expect("begin").as_mut(), "left behind");
        }
        {
            let (mut generations, storage) = DiskGenerations::open(dir.path()).expect("open");
            assert_eq!(value(&storage), b"first");
            assert_eq!(checkpoints(dir.path()), 2, "whether it fits the log is not known yet");
            generations.remove_leftovers().expect("removed");
            assert_eq!(checkpoints(dir.path()), 1);
            let mut next = generations.begin().expect("begin");
            put(next.as_mut(), "second");
            generations.switch().expect("switch");
            drop((storage, next));
            assert_eq!(checkpoints(dir.path()), 2);
            generations.discard();
        }
        let (_, storage) = DiskGenerations::open(dir.path()).expect("open");
        assert_eq!(value(&storage), b"second");
        assert_eq!(checkpoints(dir.path()), 1);
    }

    fn checkpoints(dir: &Path) -> usize {
        let names = fs::read_dir(dir).expect("the directory").flatten();
        names.filter(|entry| entry.file_name().to_string_lossy().starts_with("ckpt-")).count()
    }

    #[test]
    fn what_one_server_fills_is_no_leftover_to_another() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut generations, storage) = DiskGenerations::begin_first(dir.path()).expect("open");
        generations.switch().expect("switch");
        let next = generations.begin().expect("begin");
        let error = DiskGenerations::open(dir.path()).expect_err("it is in use");
        assert!(matches!(error, StorageError::Locked { .. }), "{error}");
        assert!(dir.path().join("ckpt-2").is_dir(), "what is being filled is still there");
        drop((generations, storage, next));
        DiskGenerations::open(dir.path()).expect("it is free again");
    }

    #[test]
    fn current_is_read_as_written_and_nothing_else_is() {
        assert_eq!(read_current(current_text(37).as_bytes()), Ok(37));
        assert_eq!(read_current(b"ckpt-37\n"), Ok(37), "as before 0.1.0");
        let intact = current_text(37).into_bytes();
        for at in 0..intact.len() {
            for bit in 0..8 {
                let mut flipped = intact.clone();
                flipped[at] ^= 1 << bit;
                assert_eq!(read_current(&flipped), Err(BadCurrent::Damaged), "{at} {bit}");
            }
            let cut = read_current(&intact[..at]);
            assert!(cut == Err(BadCurrent::Damaged) || cut == Ok(37), "cut at {at}");
        }
        for other in ["", "\n", "ckpt-37", "ckpt-\n", "ckpt-+37\n", "ckpt-037\n", "ckpt-1/..\n"] {
            assert_eq!(read_current(other.as_bytes()), Err(BadCurrent::Damaged), "{other:?}");
        }
        let newer = "ckpt-1\nformat 2\nand more\n";
        let newer = format!("{newer}crc32c {:08x}\n", crc32c::crc32c(newer.as_bytes()));
        assert_eq!(read_current(newer.as_bytes()), Err(BadCurrent::Newer(2)));
    }

    #[test]
    fn a_damaged_checkpoint_is_set_aside_and_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        for round in 1..=3 {
            fs::create_dir_all(dir.path().join(format!("ckpt-{round}"))).expect("a directory");
            fs::write(dir.path().join(CURRENT), "what is this?").expect("written");
            // An attempt that got nowhere.
            let generations = DiskGenerations::of_damaged(dir.path()).expect("locked");
            put(&mut generations.begin_beside().expect("begun"), "given up");
            drop(generations);
            let mut generations = DiskGenerations::of_damaged(dir.path()).expect("locked");
            let mut storage = generations.begin_beside().expect("begun");
            assert!(storage.get(Table::Head, b"k").expect("get").is_none());
            put(&mut storage, "healed");
            drop(storage);
            let aside = generations.replace_damaged().expect("replaced");
            drop(generations);
            assert!(aside.iter().all(|path| path.is_dir()) && !aside.is_empty());
            let (_, storage) = DiskGenerations::open(dir.path()).expect("open");
            assert_eq!(value(&storage), b"healed");
            assert!(aside.iter().all(|path| path.is_dir()), "nobody removes them");
        }
    }

    #[test]
    fn a_missing_checkpoint_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join(CURRENT), "ckpt-7\n").expect("write");
        let error = DiskGenerations::open(dir.path()).expect_err("it is missing").to_string();
        assert!(error.contains("ckpt-7"), "{error}");
    }
}
