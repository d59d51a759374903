//! What `snapshot status` says of a file: what `etcdutl snapshot status` does, to the letter.

use std::collections::HashSet;

use super::decode::{DecodeError, bad_row, record_key};
use super::{Bucket, meta};
use crate::bolt::read::Database;
use crate::mvcc::check_record;

/// A file in a few numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// CRC-32C of all rows of all buckets, with the buckets' names.
    pub hash: u32,
    /// The main revision of the newest row of a key; 0 when there is none.
    pub revision: i64,
    /// How many keys there are at that revision.
    pub total_key: u64,
    /// The length of the database, in bytes.
    pub total_size: u64,
    /// What an etcd has to be to read it; empty before etcd 3.6.
    pub version: String,
}

/// Reads all of a file. The names of all keys that there are at its end are in memory.
///
/// # Errors
/// The file is damaged, or not etcd's.
pub fn status(database: &Database) -> Result<Status, DecodeError> {
    let mut status = Status {
        hash: 0,
        revision: 0,
        total_key: 0,
        total_size: database.size_bytes(),
        version: String::new(),
    };
    let mut keys: HashSet<Box<[u8]>> = HashSet::new();
    let mut scan = database.scan()?;
    let buckets = scan.buckets()?;
    if !buckets.iter().any(|bucket| bucket.name == Bucket::Meta.name()) {
        return Err(DecodeError::NoBucket(Bucket::Meta.name()));
    }
    for bucket in &buckets {
        status.hash = crc32c::crc32c_append(status.hash, &bucket.name);
        let named = Bucket::named(&bucket.name);
        let mut rows = scan.rows(bucket)?;
        while let Some(row) = rows.next()? {
            status.hash = crc32c::crc32c_append(status.hash, &row.key);
            status.hash = crc32c::crc32c_append(status.hash, &row.value);
            match named {
                Some(Bucket::Key) => {
                    let (revision, tombstone) = record_key(&row.key)
                        .ok_or_else(|| bad_row(Bucket::Key, &row.key, "its key is no revision"))?;
                    status.revision = revision.main;
                    let key = check_record(revision, tombstone, &row.value)?;
                    if tombstone {
                        keys.remove(&key);
                    } else {
                        keys.insert(key);
                    }
                }
                Some(Bucket::Meta) if row.key == meta::STORAGE_VERSION => {
                    status.version = String::from_utf8_lossy(&row.value).into_owned();
                }
                _ => {}
            }
        }
    }
    scan.end()?;
    status.total_key = keys.len() as u64;
    Ok(status)
}
