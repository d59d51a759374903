//! etcd's data, as etcd keeps it: the buckets of a snapshot file, and what is in them.
//!
//! | bucket            | key                                       | value                        |
//! |-------------------|-------------------------------------------|------------------------------|
//! | `key`             | revision: main, `_`, sub, and `t` if deleted | `mvccpb.KeyValue`         |
//! | `lease`           | id, 8 bytes, big-endian                   | `leasepb.Lease`              |
//! | `alarm`           | `etcdserverpb.AlarmMember`                | nothing                      |
//! | `members`         | id, hexadecimal                           | the member as JSON           |
//! | `members_removed` | id, hexadecimal                           | `removed`                    |
//! | `cluster`         | `clusterVersion`, `downgrade`             | text, JSON                   |
//! | `meta`            | see [`meta`]                              | numbers, revisions, text, JSON |
//! | `auth`            | `authEnabled`, `authRevision`             | 1 byte; 8 bytes, big-endian  |
//! | `authUsers`       | name                                      | `authpb.User`                |
//! | `authRoles`       | name                                      | `authpb.Role`                |
//!
//! All of them are there, empty or not. A snapshot file is such a database (`bolt`), and behind
//! it its SHA-256.
//!
//! * [`encode`]: from records to rows.
//! * [`decode`]: from rows to records.
//! * [`file`]: a snapshot file, and whether its hash is right.
//! * [`status`]: what `snapshot status` says of a file.
//! * [`wal`]: etcd's log, as far as it says whether a database is complete.

pub mod decode;
pub mod encode;
pub mod file;
pub mod status;
pub mod wal;

/// The name of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bucket {
    /// Active alarms.
    Alarm,
    /// Whether authentication is on, and its revision.
    Auth,
    /// Roles by name.
    AuthRoles,
    /// Users by name.
    AuthUsers,
    /// The cluster's version, and whether it is being downgraded.
    Cluster,
    /// All versions of all keys, by revision.
    Key,
    /// Leases by id.
    Lease,
    /// Members by id.
    Members,
    /// The ids of those that left.
    MembersRemoved,
    /// How far the member had come.
    Meta,
}

impl Bucket {
    /// All of them, in the order of their names, which is that of the file.
    pub const ALL: [Bucket; 10] = [
        Bucket::Alarm,
        Bucket::Auth,
        Bucket::AuthRoles,
        Bucket::AuthUsers,
        Bucket::Cluster,
        Bucket::Key,
        Bucket::Lease,
        Bucket::Members,
        Bucket::MembersRemoved,
        Bucket::Meta,
    ];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Bucket::Alarm => "alarm",
            Bucket::Auth => "auth",
            Bucket::AuthRoles => "authRoles",
            Bucket::AuthUsers => "authUsers",
            Bucket::Cluster => "cluster",
            Bucket::Key => "key",
            Bucket::Lease => "lease",
            Bucket::Members => "members",
            Bucket::MembersRemoved => "members_removed",
            Bucket::Meta => "meta",
        }
    }

    /// The bucket of this name, if it is one of etcd's.
    pub fn named(name: &[u8]) -> Option<Bucket> {
        Bucket::ALL.into_iter().find(|bucket| bucket.name().as_bytes() == name)
    }
}

/// Keys of the bucket `meta`.
pub mod meta {
    /// The newest applied index, 8 bytes, big-endian.
    pub const CONSISTENT_INDEX: &str = "consistent_index";
    /// Its term, 8 bytes, big-endian.
    pub const TERM: &str = "term";
    /// raft's configuration, JSON.
    pub const CONF_STATE: &str = "confState";
    /// A compaction that was begun: a revision as in the bucket `key`.
    pub const SCHEDULED_COMPACT_REVISION: &str = "scheduledCompactRev";
    /// A compaction that was carried out, likewise.
    pub const FINISHED_COMPACT_REVISION: &str = "finishedCompactRev";
    /// The lowest etcd that can read all that is in the file, `3.X.0`.
    pub const STORAGE_VERSION: &str = "storageVersion";
}

/// Keys of the bucket `cluster`.
pub mod cluster {
    /// The version that all members have, `3.X.0`.
    pub const VERSION: &str = "clusterVersion";
    /// A downgrade under way, JSON.
    pub const DOWNGRADE: &str = "downgrade";
}

/// Keys of the bucket `auth`.
pub mod auth {
    /// Whether authentication is on: one byte, 0 or 1.
    pub const ENABLED: &str = "authEnabled";
    /// Counts its changes: 8 bytes, big-endian.
    pub const REVISION: &str = "authRevision";
}

/// What stands in the bucket `members_removed` for each id.
pub const REMOVED: &str = "removed";
/// The length of the SHA-256 behind the database, in bytes.
pub const TRAILER_BYTES: usize = 32;

/// The SHA-256 of a database that comes in pieces.
pub struct Digest(ring::digest::Context);

impl Default for Digest {
    fn default() -> Digest {
        Digest::new()
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Digest")
    }
}

impl Digest {
    /// Of nothing.
    pub fn new() -> Digest {
        Digest(ring::digest::Context::new(&ring::digest::SHA256))
    }

    /// The database goes on with these bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// What a snapshot file has behind the database.
    pub fn finish(self) -> [u8; TRAILER_BYTES] {
        let digest = self.0.finish();
        let mut trailer = [0; TRAILER_BYTES];
        trailer.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
        trailer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_the_order_of_their_names() {
        assert!(Bucket::ALL.is_sorted_by_key(|bucket| bucket.name()));
        assert!(
            Bucket::ALL
                .iter()
                .all(|bucket| Bucket::named(bucket.name().as_bytes()) == Some(*bucket))
        );
        assert_eq!(Bucket::named(b"keys"), None);
    }
}
