//! The part of the log that raft may still ask for, in memory.
//!
//! Raft reads its log through a trait and never writes it. [`LogCache`] answers from
//! memory, so those reads cost no disk access and cannot fail.
//!
//! It holds what is not applied yet, which the engine's admission bounds, and of what is
//! applied the last entries for a member that is a little behind: at most
//! `--snapshot-catchup-entries` of them, or as many as follow a snapshot that a member is
//! being sent, has just got, or may be sent the rest of, and [`APPLIED_BYTES_MAX`]. A member that is further
//! behind gets a snapshot, although the log on disk may reach further back: that is read
//! when the member starts, and not beside it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use raft::eraftpb::{self, ConfState, EntryType, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError, util};

use super::Configuration;
use crate::log::{Entry, HardState, Mark};

/// Applied entries are kept up to this many bytes in a cluster.
const APPLIED_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Nobody catches up with a lone member: as many bytes may help one that is about to join.
const APPLIED_BYTES_MAX_ALONE: usize = 4 * 1024 * 1024;

/// Entries `start.index + 1 ..= last_index()`, and the newest hard state.
pub struct LogCache {
    start: Mark,
    /// What all entries held take.
    bytes: usize,
    entries: VecDeque<eraftpb::Entry>,
    hard_state: HardState,
    configuration: ConfState,
    /// Snapshots that can be sent, by member.
    offers: BTreeMap<u64, (Mark, ConfState)>,
    /// Members that raft would send a snapshot if there were one. Raft asks through a shared
    /// reference.
    wanted: RefCell<BTreeSet<u64>>,
}

impl LogCache {
    pub(super) fn new(
        start: Mark,
        entries: Vec<Entry>,
        hard_state: HardState,
        configuration: &Configuration,
    ) -> LogCache {
        let entries: VecDeque<_> = entries.iter().map(to_raft).collect();
        let bytes = entries.iter().map(size).sum();
        let configuration = conf_state(configuration);
        LogCache {
            start,
            bytes,
            entries,
            hard_state,
            configuration,
            offers: BTreeMap::new(),
            wanted: RefCell::default(),
        }
    }

    /// A snapshot takes the place of everything.
    pub(super) fn reset(&mut self, start: Mark, configuration: ConfState) {
        self.start = start;
        self.bytes = 0;
        self.entries.clear();
        self.configuration = configuration;
        self.offers.clear();
    }

    pub(super) fn offer_snapshot(&mut self, to: u64, mark: Mark, configuration: &Configuration) {
        self.offers.insert(to, (mark, conf_state(configuration)));
    }

    /// The image that was offered for a member was sent: for another attempt there has to be
    /// another offer.
    pub(super) fn withdraw_offer(&mut self, to: u64) {
        self.offers.remove(&to);
    }

    /// Members that raft wanted to send a snapshot, and had none to send.
    pub(super) fn take_wanted(&mut self) -> Vec<u64> {
        std::mem::take(self.wanted.get_mut()).into_iter().collect()
    }

    pub(super) fn last_index(&self) -> u64 {
        self.entries.back().map_or(self.start.index, |entry| entry.index)
    }

    /// Appends entries; where they overlap what is there, they replace it and all
    /// that follows.
    pub(super) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let kept = first.index.saturating_sub(self.start.index + 1);
        let kept = usize::try_from(kept).unwrap_or(usize::MAX).min(self.entries.len());
        self.bytes -= self.entries.drain(kept..).map(|entry| size(&entry)).sum::<usize>();
        for entry in entries.iter().map(to_raft) {
            self.bytes += size(&entry);
            self.entries.push_back(entry);
        }
    }

    pub(super) fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    pub(super) fn hard_state(&self) -> HardState {
        self.hard_state
    }

    pub(super) fn set_configuration(&mut self, configuration: ConfState) {
        self.configuration = configuration;
    }

    /// Behind which index the log held here begins.
    pub(super) fn start_index(&self) -> u64 {
        self.start.index
    }

    /// Entries up to `applied` are applied: forgets those up to `forget`, and those that are
    /// too many bytes.
    pub(super) fn forget_applied(&mut self, applied: u64, forget: u64) {
        let alone = self.configuration.voters.len() + self.configuration.learners.len() <= 1;
        let bytes_max = if alone { APPLIED_BYTES_MAX_ALONE } else { APPLIED_BYTES_MAX };
        while let Some(first) = self.entries.front()
            && first.index < applied
            && (first.index <= forget || self.bytes > bytes_max)
        {
            self.start = Mark { index: first.index, term: first.term };
            self.bytes -= size(first);
            self.entries.pop_front();
        }
    }

    fn position(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.start.index + 1)?).ok()
    }
}

impl Storage for LogCache {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let hard_state = eraftpb::HardState {
            term: self.hard_state.term,
            vote: self.hard_state.vote,
            commit: self.hard_state.commit,
            ..Default::default()
        };
        Ok(RaftState { hard_state, conf_state: self.configuration.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<eraftpb::Entry>> {
        let compacted = || raft::Error::Store(StorageError::Compacted);
        let from = self.position(low).ok_or_else(compacted)?;
        let to = self.position(high).ok_or_else(compacted)?;
        if to > self.entries.len() {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let mut entries: Vec<_> = self.entries.range(from..to).cloned().collect();
        util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.start.index {
            return Ok(self.start.term);
        }
        let position = self.position(index).ok_or(raft::Error::Store(StorageError::Compacted))?;
        match self.entries.get(position) {
            Some(entry) => Ok(entry.term),
            None => Err(raft::Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.start.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(LogCache::last_index(self))
    }

    /// What is sent is only which snapshot; the image goes another way. It has to reach as
    /// far as the log held here begins, or nothing could follow it.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let reaches = self.start.index.max(request_index);
        match self.offers.get(&to) {
            Some((mark, configuration)) if mark.index >= reaches => {
                let mut snapshot = Snapshot::default();
                let metadata = snapshot.mut_metadata();
                metadata.index = mark.index;
                metadata.term = mark.term;
                metadata.set_conf_state(configuration.clone());
                Ok(snapshot)
            }
            _ => {
                self.wanted.borrow_mut().insert(to);
                Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}

fn conf_state(configuration: &Configuration) -> ConfState {
    ConfState::from((configuration.voters.clone(), configuration.learners.clone()))
}

fn size(entry: &eraftpb::Entry) -> usize {
    size_of::<eraftpb::Entry>() + entry.data.len() + entry.context.len()
}

fn to_raft(entry: &Entry) -> eraftpb::Entry {
    eraftpb::Entry {
        entry_type: entry_type(entry.kind),
        term: entry.term,
        index: entry.index,
        data: entry.data.clone(),
        context: entry.context.clone(),
        ..Default::default()
    }
}

pub(super) fn from_raft(entry: eraftpb::Entry) -> Entry {
    Entry {
        index: entry.index,
        term: entry.term,
        kind: entry.entry_type as u8,
        data: entry.data,
        context: entry.context,
    }
}

/// Only this module writes kinds, so an unknown one cannot come from the log.
fn entry_type(kind: u8) -> EntryType {
    if kind == EntryType::EntryConfChangeV2 as u8 {
        EntryType::EntryConfChangeV2
    } else {
        EntryType::EntryNormal
    }
}
