//! Records in a map, for tests and for members that need no disk.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Batch, Storage, StorageError, Table, Visit};

/// A [`Storage`] that forgets everything when it is dropped. A clone is a copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryStorage {
    records: BTreeMap<(Table, Bytes), Bytes>,
    frozen_to: Option<Bytes>,
}

impl MemoryStorage {
    /// No records.
    pub fn new() -> MemoryStorage {
        MemoryStorage::default()
    }

    /// Makes the changes of a batch whose keys have been looked at.
    pub(super) fn apply(&mut self, batch: Batch) {
        for (key, value) in batch.changes {
            match value {
                Some(value) => self.records.insert(key, value),
                None => self.records.remove(&key),
            };
        }
    }

    /// Whether there are records of [`Table::Mvcc`] that are not frozen.
    pub(super) fn has_versions(&self) -> bool {
        let (from, to) = ((Table::Mvcc, Bytes::new()), (Table::Lease, Bytes::new()));
        let last = self.records.range(from..to).next_back();
        last.is_some_and(|((_, key), _)| self.frozen_to.as_ref() < Some(key))
    }
}

impl Storage for MemoryStorage {
    fn write(&mut self, batch: Batch) -> Result<(), StorageError> {
        if let Some((table, len)) = batch.oversized_key() {
            return Err(StorageError::KeyTooLong { table, len });
        }
        if batch.changes_up_to(self.frozen_to.as_deref()) {
            return Err(StorageError::Frozen);
        }
        self.apply(batch);
        Ok(())
    }

    fn freeze(
        &mut self,
        records: &mut dyn Iterator<Item = (Bytes, Vec<u8>)>,
    ) -> Result<(), StorageError> {
        if self.has_versions() {
            return super::write_in_batches(self, records);
        }
        for (key, value) in records {
            if self.frozen_to.as_ref() >= Some(&key) {
                return Err(StorageError::Frozen);
            }
            self.frozen_to = Some(key.clone());
            self.records.insert((Table::Mvcc, key), value.into());
        }
        Ok(())
    }

    fn frozen_to(&self) -> Option<Bytes> {
        self.frozen_to.clone()
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        Ok(self.records.get(&(table, Bytes::copy_from_slice(key))).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError> {
        if !to.is_empty() && from >= to {
            return Ok(());
        }
        let start = (table, Bytes::copy_from_slice(from));
        let end = match to {
            b"" => Unbounded,
            _ => Excluded((table, Bytes::copy_from_slice(to))),
        };
        for ((found, key), value) in self.records.range((Included(start), end)) {
            if *found != table || visit(key, value.clone()) == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(())
    }

    fn may_be_reopened(&mut self) -> bool {
        false
    }

    fn size_on_disk(&self) -> Result<u64, StorageError> {
        Ok(self.records.iter().map(|((_, key), value)| (key.len() + value.len()) as u64).sum())
    }
}
