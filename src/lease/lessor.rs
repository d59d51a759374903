//! The replicated half: which leases exist and which keys hang on them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::MAX_TTL_SECS;
use crate::error::Error;
use crate::pb::leasepb;

/// A lease as all members know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    id: i64,
    ttl_secs: i64,
    remaining_ttl_secs: i64,
    keys: BTreeSet<Bytes>,
}

impl Lease {
    /// Its id, never 0.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// The TTL granted, in seconds.
    pub fn ttl_secs(&self) -> i64 {
        self.ttl_secs
    }

    /// What was left of the TTL when this was last committed, in seconds; 0 when it
    /// never was, or a renewal has been committed since.
    pub fn remaining_ttl_secs(&self) -> i64 {
        self.remaining_ttl_secs
    }

    /// The keys that will be deleted with the lease, ascending.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &Bytes> {
        self.keys.iter()
    }

    /// The lease as it is stored. Its keys are not part of that: each key's own
    /// record names its lease.
    pub fn to_record(&self) -> leasepb::Lease {
        leasepb::Lease { id: self.id, ttl: self.ttl_secs, remaining_ttl: self.remaining_ttl_secs }
    }
}

/// All leases, by id, and the lease of every leased key.
///
/// Invariant: `owner[key] == id` exactly when `leases[id].keys` contains `key`. A key
/// has one lease at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lessor {
    leases: BTreeMap<i64, Lease>,
    owner: BTreeMap<Bytes, i64>,
}

impl Lessor {
    /// No leases.
    pub fn new() -> Lessor {
        Lessor::default()
    }

    /// Leases read back from storage. Their keys follow through [`Lessor::attach`].
    pub fn restore(records: impl IntoIterator<Item = leasepb::Lease>) -> Lessor {
        let leases = records.into_iter().map(|record| {
            let lease = Lease {
                id: record.id,
                ttl_secs: record.ttl,
                remaining_ttl_secs: record.remaining_ttl,
                keys: BTreeSet::new(),
            };
            (record.id, lease)
        });
        Lessor { leases: leases.collect(), owner: BTreeMap::new() }
    }

    /// Creates a lease of `ttl_secs`, which the proposer has raised to the minimum
    /// already. Id 0 means "no lease" everywhere and is refused as not found, as
    /// etcd does.
    pub fn grant(&mut self, id: i64, ttl_secs: i64) -> Result<(), Error> {
        if id == 0 {
            return Err(Error::LeaseNotFound);
        }
        if ttl_secs > MAX_TTL_SECS {
            return Err(Error::LeaseTtlTooLarge);
        }
        if self.leases.contains_key(&id) {
            return Err(Error::LeaseExists);
        }
        let lease = Lease { id, ttl_secs, remaining_ttl_secs: 0, keys: BTreeSet::new() };
        self.leases.insert(id, lease);
        Ok(())
    }

    /// Ends a lease and returns the keys that hung on it, ascending, for the caller to
    /// delete in one revision.
    pub fn revoke(&mut self, id: i64) -> Result<Vec<Bytes>, Error> {
        let lease = self.leases.remove(&id).ok_or(Error::LeaseNotFound)?;
        for key in &lease.keys {
            self.owner.remove(key);
        }
        Ok(lease.keys.into_iter().collect())
    }

    /// Hangs a key on a lease and takes it off the one it hung on. Lease 0 just takes
    /// it off. When there is no such lease nothing is changed.
    pub fn attach(&mut self, key: &Bytes, id: i64) -> Result<(), Error> {
        if id == 0 {
            self.detach(key);
            return Ok(());
        }
        if !self.leases.contains_key(&id) {
            return Err(Error::LeaseNotFound);
        }
        if self.lease_of(key) == id {
            return Ok(());
        }
        self.detach(key);
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.insert(key.clone());
            self.owner.insert(key.clone(), id);
        }
        Ok(())
    }

    /// Takes a key off its lease, if it has one.
    pub fn detach(&mut self, key: &[u8]) {
        if let Some(id) = self.owner.remove(key)
            && let Some(lease) = self.leases.get_mut(&id)
        {
            lease.keys.remove(key);
        }
    }

    /// The lease a key hangs on, 0 for none.
    pub fn lease_of(&self, key: &[u8]) -> i64 {
        self.owner.get(key).copied().unwrap_or(0)
    }

    /// Whether there is such a lease.
    pub fn exists(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// A lease by its id.
    pub fn get(&self, id: i64) -> Option<&Lease> {
        self.leases.get(&id)
    }

    /// Notes what is left of a lease's TTL, in seconds; 0 means all of it, as after a
    /// renewal. Returns the lease, or `None` when it is gone meanwhile, which is no
    /// error.
    pub fn set_remaining(&mut self, id: i64, remaining_secs: i64) -> Option<&Lease> {
        let lease = self.leases.get_mut(&id)?;
        lease.remaining_ttl_secs = remaining_secs.max(0);
        Some(lease)
    }

    /// All leases in the order of their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.leases.values()
    }

    /// The leases with ids above `after`, ascending: to go through all in steps,
    /// starting with `i64::MIN`. (Id `i64::MIN` itself comes with [`Lessor::iter`].)
    pub fn iter_after(&self, after: i64) -> impl Iterator<Item = &Lease> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.leases.range((Excluded(after), Unbounded)).map(|(_, lease)| lease)
    }

    /// How many leases there are.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}
