//! From the rows of etcd's buckets to what a member holds.
//!
//! ```text
//! bolt::read ─ rows ─▶ [`read`] ─┬─ records of keys, one by one, in revision order ─▶ the caller
//!                                └─ all the rest, gathered ─────────────────────────▶ [`Contents`]
//! ```
//!
//! One call reads a whole file, and is its check as well: of the pages (`bolt::read`), and of
//! each row. What passes can be a checkpoint: the store takes the records as they are. So a file
//! is read twice to be restored: once to refuse it, once to carry it over.
//!
//! | etcd's                      | here                                                    |
//! |-----------------------------|---------------------------------------------------------|
//! | the newest row of `key`     | the revision, unless a compaction was of a later one    |
//! | the later of the two marks  | the compact revision: etcd, too, carries out at its start what was begun |
//! | `auth`, `authUsers`, `authRoles` | rows that are carried as they are                  |
//! | buckets that etcd has not   | are checked, and left behind                            |

use bytes::Bytes;
use prost::Message as _;
use serde_json::Value;

use super::{Bucket, REMOVED, auth, meta};
use crate::bolt::read::{Database, ReadError, Row};
use crate::mvcc::{RestoreError, Revision, check_record};
use crate::pb::etcdserverpb::AlarmMember;
use crate::pb::kvorumpb::MemberRecord;
use crate::pb::leasepb::Lease;
use crate::state::rolling::RollingHash;
use crate::state::{AuthRow, AuthTable};

/// What stands between the two numbers of a revision.
const SEPARATOR: u8 = b'_';
/// What the key of a deletion ends with.
const TOMBSTONE: u8 = b't';
/// The longest name of a user or role, in bytes: what a checkpoint's key can be.
const NAME_BYTES_MAX: usize = 4096;
/// So much of a row's key is shown in an error, in bytes.
const SHOWN_BYTES_MAX: usize = 32;

/// What is in a file, besides the keys.
#[derive(Debug, Default)]
pub struct Contents {
    /// The revision of the newest row of a key; 0 when there is none.
    pub last: Revision,
    /// The newest compaction, begun or carried out; -1 when there was none.
    pub compact_revision: i64,
    /// How many rows of keys there are.
    pub records: u64,
    /// All of them.
    pub leases: Vec<Lease>,
    /// All of them.
    pub alarms: Vec<AlarmMember>,
    /// All rows about authentication, in order.
    pub auth: Vec<AuthRow>,
    /// Whether authentication is on.
    pub auth_enabled: bool,
    /// Who belonged to the cluster.
    pub members: Vec<MemberRecord>,
    /// The ids of those that left it.
    pub removed_members: Vec<u64>,
    /// What an etcd has to be to read it, `X.Y.Z`; none before etcd 3.6.
    pub storage_version: Option<String>,
    /// The newest applied index; 0 when that is not said.
    pub consistent_index: u64,
    /// Its term; 0 when that is not said.
    pub term: u64,
    /// The records, summed up as applying them does.
    pub rolling: RollingHash,
}

impl Contents {
    /// The store's revision.
    pub fn revision(&self) -> i64 {
        self.last.main.max(self.compact_revision).max(1)
    }
}

/// Why what is in a file is not etcd's data.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The file is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A bucket is missing that all of etcd's databases have.
    #[error("it is a bbolt database, and not etcd's: it has no bucket {0:?}")]
    NoBucket(&'static str),
    /// A row is not what it should be.
    #[error("its bucket {bucket:?} has a row {key} that is none: {problem}")]
    Row {
        /// Which bucket.
        bucket: &'static str,
        /// The row's key.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A record is not one of a store.
    #[error("its bucket \"key\" is damaged: {0}")]
    Record(#[from] RestoreError),
}

pub(super) fn bad_row(bucket: Bucket, key: &[u8], problem: &'static str) -> DecodeError {
    let shown = key.get(..SHOWN_BYTES_MAX).unwrap_or(key).escape_ascii();
    let more = if key.len() > SHOWN_BYTES_MAX { "…" } else { "" };
    DecodeError::Row { bucket: bucket.name(), key: format!("\"{shown}{more}\""), problem }
}

/// Reads a file, and shows `visit` each record of a key, in revision order. A record's bytes
/// are slices of what was read: copy what you keep.
///
/// # Errors
/// [`DecodeError`], and those of `visit`.
pub fn read<E: From<DecodeError>>(
    database: &Database,
    mut visit: impl FnMut(Revision, bool, &Bytes) -> Result<(), E>,
) -> Result<Contents, E> {
    let read = |error: ReadError| E::from(DecodeError::from(error));
    let mut contents = Contents { compact_revision: -1, ..Contents::default() };
    let mut scan = database.scan().map_err(read)?;
    let buckets = scan.buckets().map_err(read)?;
    for needed in [Bucket::Key, Bucket::Meta] {
        if !buckets.iter().any(|bucket| bucket.name == needed.name()) {
            return Err(DecodeError::NoBucket(needed.name()).into());
        }
    }
    for bucket in &buckets {
        let named = Bucket::named(&bucket.name);
        let mut rows = scan.rows(bucket).map_err(read)?;
        while let Some(row) = rows.next().map_err(read)? {
            match named {
                Some(Bucket::Key) => {
                    let (revision, tombstone) = contents.record(&row)?;
                    visit(revision, tombstone, &row.value)?;
                }
                Some(named) => contents.row(named, &row)?,
                None => {}
            }
        }
    }
    scan.end().map_err(read)?;
    Ok(contents)
}

impl Contents {
    /// A row of the bucket `key`.
    fn record(&mut self, row: &Row) -> Result<(Revision, bool), DecodeError> {
        let (revision, tombstone) = record_key(&row.key)
            .ok_or_else(|| bad_row(Bucket::Key, &row.key, "its key is no revision"))?;
        if revision <= self.last {
            return Err(RestoreError::OutOfOrder { found: revision, last: self.last }.into());
        }
        check_record(revision, tombstone, &row.value)?;
        self.last = revision;
        self.records += 1;
        self.rolling.record(revision, tombstone, &row.value);
        Ok((revision, tombstone))
    }

    /// A row of another bucket.
    fn row(&mut self, bucket: Bucket, Row { key, value }: &Row) -> Result<(), DecodeError> {
        let bad = |problem| bad_row(bucket, key, problem);
        match bucket {
            Bucket::Key | Bucket::Cluster => {}
            Bucket::Alarm => {
                let alarm = AlarmMember::decode(key.as_ref()).map_err(|_| bad("it is no alarm"))?;
                self.alarms.push(alarm);
            }
            Bucket::Lease => {
                let lease = Lease::decode(value.as_ref()).map_err(|_| bad("it is no lease"))?;
                if *key != lease.id.to_be_bytes()[..] || lease.id == 0 {
                    return Err(bad("it is a lease of another id"));
                }
                self.leases.push(lease);
            }
            Bucket::Members => {
                let member = member(value).ok_or_else(|| bad("it is no member"))?;
                if hex_id(key) != Some(member.id) {
                    return Err(bad("it is a member of another id"));
                }
                self.members.push(member);
            }
            Bucket::MembersRemoved => {
                let id = hex_id(key).filter(|_| value == REMOVED);
                self.removed_members.push(id.ok_or_else(|| bad("it is no removed member"))?);
            }
            Bucket::Meta => self.meta(key, value).ok_or_else(|| bad("its value cannot be"))?,
            Bucket::Auth => {
                if key == auth::ENABLED {
                    // As etcd: one byte, and that is 1.
                    self.auth_enabled = value.as_ref() == [1];
                }
                self.auth(AuthTable::Auth, key, value);
            }
            Bucket::AuthUsers | Bucket::AuthRoles if key.len() > NAME_BYTES_MAX => {
                return Err(bad("its name is longer than 4096 bytes"));
            }
            Bucket::AuthUsers => self.auth(AuthTable::User, key, value),
            Bucket::AuthRoles => self.auth(AuthTable::Role, key, value),
        }
        Ok(())
    }

    fn auth(&mut self, table: AuthTable, key: &Bytes, value: &Bytes) {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        self.auth.push(AuthRow { table, key, value });
    }

    fn meta(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let number = || value.try_into().ok().map(u64::from_be_bytes);
        let is = |name: &str| key == name.as_bytes();
        if is(meta::CONSISTENT_INDEX) {
            self.consistent_index = number()?;
        } else if is(meta::TERM) {
            self.term = number()?;
        } else if is(meta::STORAGE_VERSION) {
            let version = std::str::from_utf8(value).ok()?;
            major_minor(version)?;
            self.storage_version = Some(version.to_owned());
        } else if is(meta::SCHEDULED_COMPACT_REVISION) || is(meta::FINISHED_COMPACT_REVISION) {
            let (revision, _) = record_key(value)?;
            if revision.main > 0 {
                self.compact_revision = self.compact_revision.max(revision.main);
            }
        }
        Some(())
    }
}

/// No number of a revision is larger: what follows it has to have one, too.
const REVISION_MAX: i64 = i64::MAX / 2;

/// The revision that is a record's key, and whether it is that of a deletion.
pub fn record_key(key: &[u8]) -> Option<(Revision, bool)> {
    let (main, rest) = key.split_first_chunk::<8>()?;
    let (separator, rest) = rest.split_first()?;
    let (sub, mark) = rest.split_first_chunk::<8>()?;
    let tombstone = match mark {
        [] => false,
        [TOMBSTONE] => true,
        _ => return None,
    };
    let revision = Revision { main: i64::from_be_bytes(*main), sub: i64::from_be_bytes(*sub) };
    let numbers = 0..=REVISION_MAX;
    let is_one = *separator == SEPARATOR
        && numbers.contains(&revision.main)
        && numbers.contains(&revision.sub);
    is_one.then_some((revision, tombstone))
}

fn hex_id(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok().filter(|id| *id != 0)
}

/// The first two numbers of `X.Y.Z`.
pub fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A member as etcd writes it: JSON, with etcd's names of the fields.
fn member(json: &[u8]) -> Option<MemberRecord> {
    let json: Value = serde_json::from_slice(json).ok()?;
    let texts = |name: &str| match json.get(name) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(texts)) => {
            texts.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        }
        Some(_) => None,
    };
    Some(MemberRecord {
        id: json.get("id")?.as_u64().filter(|id| *id != 0)?,
        name: json.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        peer_urls: texts("peerURLs")?,
        client_urls: texts("clientURLs")?,
        is_learner: json.get("isLearner").and_then(Value::as_bool).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Row {
        Row {
            key: Bytes::copy_from_slice(key.as_ref()),
            value: Bytes::copy_from_slice(value.as_ref()),
        }
    }

    #[test]
    fn a_revision_is_told_from_what_is_none() {
        let at = Revision { main: 7, sub: 2 };
        assert_eq!(record_key(&at.record_key(false)), Some((at, false)));
        assert_eq!(record_key(&at.record_key(true)), Some((at, true)));
        assert_eq!(record_key(&Revision { main: -1, sub: 0 }.record_key(false)), None);
        for none in [&b""[..], b"12345678_1234567", b"12345678-12345678", b"12345678_12345678x"] {
            assert_eq!(record_key(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_member_is_read_as_etcd_writes_it() {
        let mut contents = Contents::default();
        let json = r#"{"id":10276657743932975437,"peerURLs":["http://localhost:2380"],"name":"default","clientURLs":["http://localhost:2379"]}"#;
        contents.row(Bucket::Members, &row("8e9e05c52164694d", json)).unwrap();
        assert_eq!(
            contents.members,
            [MemberRecord {
                id: 0x8e9e_05c5_2164_694d,
                name: "default".to_owned(),
                peer_urls: vec!["http://localhost:2380".to_owned()],
                client_urls: vec!["http://localhost:2379".to_owned()],
                is_learner: false,
            }]
        );
        let wrong = contents.row(Bucket::Members, &row("8e9e05c52164694e", json)).unwrap_err();
        assert!(wrong.to_string().contains("another id"), "{wrong}");
        for bad in ["", "{}", r#"{"id":-1}"#, r#"{"id":1,"peerURLs":[1]}"#] {
            assert!(contents.row(Bucket::Members, &row("1", bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_later_of_two_compactions_counts_and_can_be_ahead_of_all_keys() {
        let mut contents = Contents { compact_revision: -1, ..Contents::default() };
        let mark = |main| Revision { main, sub: 0 }.record_key(false);
        assert_eq!((contents.compact_revision, contents.revision()), (-1, 1));
        contents.row(Bucket::Meta, &row(meta::SCHEDULED_COMPACT_REVISION, mark(9))).unwrap();
        contents.row(Bucket::Meta, &row(meta::FINISHED_COMPACT_REVISION, mark(5))).unwrap();
        assert_eq!((contents.compact_revision, contents.revision()), (9, 9));
        assert!(contents.row(Bucket::Meta, &row(meta::TERM, "1")).is_err());
    }

    #[test]
    fn records_in_disorder_or_of_another_revision_are_refused() {
        let mut contents = Contents::default();
        let at = |main| Revision { main, sub: 0 };
        let kv = |main| {
            let kv = crate::pb::mvccpb::KeyValue {
                key: "a".into(),
                create_revision: main,
                mod_revision: main,
                version: 1,
                ..Default::default()
            };
            kv.encode_to_vec()
        };
        contents.record(&row(at(5).record_key(false), kv(5))).unwrap();
        contents.record(&row(at(6).record_key(true), b"\x0a\x01a")).unwrap();
        assert!(contents.record(&row(at(6).record_key(false), kv(6))).is_err());
        assert!(contents.record(&row(at(7).record_key(false), kv(6))).is_err());
        assert!(contents.record(&row(at(7).record_key(true), b"")).is_err(), "nothing deleted");
        contents.record(&row(at(7).record_key(false), b"")).unwrap();
        assert_eq!((contents.last, contents.records), (at(7), 3));
    }
}
