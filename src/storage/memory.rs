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
}

impl Storage for MemoryStorage {
    fn write(&mut self, batch: Batch) -> Result<(), StorageError> {
        if let Some((table, len)) = batch.oversized_key() {
            return Err(StorageError::KeyTooLong { table, len });
        }
        self.apply(batch);
        Ok(())
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
