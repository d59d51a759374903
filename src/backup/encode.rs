//! Our records as rows of etcd's buckets, all but the keys.
//!
//! What is left out is as important as what is there, for three versions of etcd are to serve
//! the file:
//!
//! - `storageVersion`: etcd does not start on a file whose version is above its own. One that has
//!   a term and no version is taken for etcd 3.5's, which every later one brings up to date when
//!   it starts.
//! - `clusterVersion` and `downgrade`, likewise: a member does not start in a cluster of a later
//!   version. A cluster that has none finds out which version all its members have, as each new
//!   one does.
//!
//! Members, index, term and configuration are those of the member that saved. Restoring replaces
//! them; they are there for whoever looks at the file.

use bytes::Bytes;
use prost::Message as _;

use super::{Bucket, REMOVED, meta};
use crate::mvcc::{Record, Revision};
use crate::pb::kvorumpb::{CheckpointHead, MemberRecord};
use crate::pb::leasepb::Lease;

/// A row: its key and its value.
pub type Row = (Bytes, Bytes);

/// Everything but the keys, as of one moment.
#[derive(Debug, Clone, Default)]
pub struct Rest {
    /// How far the state is, and the small things in it.
    pub head: CheckpointHead,
    /// All members.
    pub members: Vec<MemberRecord>,
    /// All leases.
    pub leases: Vec<Lease>,
    /// Rows of the buckets `auth`, `authUsers` and `authRoles`, as they came.
    pub auth: Vec<(Bucket, Bytes, Bytes)>,
}

impl Rest {
    /// The rows of a bucket, in the order of their keys; none for [`Bucket::Key`], whose rows
    /// are made by [`key_row`].
    pub fn rows(&self, bucket: Bucket) -> Box<dyn Iterator<Item = Row> + '_> {
        match bucket {
            // One by one: there may be millions.
            Bucket::Lease => Box::new(self.leases().map(lease_row)),
            Bucket::Key | Bucket::Cluster => Box::new(std::iter::empty()),
            Bucket::Alarm => {
                sorted(self.head.alarms.iter().map(|alarm| (alarm.encode_to_vec(), Vec::new())))
            }
            Bucket::Members => {
                sorted(self.members.iter().map(|member| (hex(member.id), json(member))))
            }
            Bucket::MembersRemoved => {
                let removed = self.head.removed_members.iter();
                sorted(removed.map(|id| (hex(*id), REMOVED)))
            }
            Bucket::Meta => sorted(self.meta().into_iter()),
            Bucket::Auth | Bucket::AuthUsers | Bucket::AuthRoles => {
                let rows = self.auth.iter().filter(move |(of, ..)| *of == bucket);
                sorted(rows.map(|(_, key, value)| (key.clone(), value.clone())))
            }
        }
    }

    /// All leases in the order of their keys. These are without a sign: negative ids come last.
    fn leases(&self) -> impl Iterator<Item = &Lease> {
        let positive = self.leases.iter().filter(|lease| lease.id >= 0);
        positive.chain(self.leases.iter().filter(|lease| lease.id < 0))
    }

    fn meta(&self) -> Vec<(&'static str, Vec<u8>)> {
        let head = &self.head;
        let mut rows = vec![
            (meta::CONSISTENT_INDEX, head.applied_index.to_be_bytes().to_vec()),
            (meta::TERM, head.applied_term.to_be_bytes().to_vec()),
            (meta::CONF_STATE, configuration(&self.members)),
        ];
        // All that was given up is left out of the file: that compaction is finished.
        if head.compact_revision > 0 {
            let compacted = Revision::new(head.compact_revision, 0).record_key(false);
            rows.push((meta::FINISHED_COMPACT_REVISION, compacted.clone()));
            rows.push((meta::SCHEDULED_COMPACT_REVISION, compacted));
        }
        rows
    }
}

/// The row of a version or tombstone of a key.
pub fn key_row((revision, tombstone, kv): Record) -> Row {
    (Bytes::from(revision.record_key(tombstone)), kv)
}

fn lease_row(lease: &Lease) -> Row {
    (Bytes::copy_from_slice(&lease.id.to_be_bytes()), Bytes::from(lease.encode_to_vec()))
}

fn sorted<K: Into<Bytes>, V: Into<Bytes>>(
    rows: impl Iterator<Item = (K, V)>,
) -> Box<dyn Iterator<Item = Row>> {
    let mut rows: Vec<Row> = rows.map(|(key, value)| (key.into(), value.into())).collect();
    rows.sort_unstable();
    Box::new(rows.into_iter())
}

fn hex(id: u64) -> String {
    format!("{id:x}")
}

/// A member as Go writes it: fields that are empty are left out.
fn json(member: &MemberRecord) -> String {
    let text = |value: &str| serde_json::Value::from(value).to_string();
    let list = |urls: &[String]| serde_json::Value::from(urls).to_string();
    let mut json = format!("{{\"id\":{},\"peerURLs\":{}", member.id, list(&member.peer_urls));
    if member.is_learner {
        json.push_str(",\"isLearner\":true");
    }
    if !member.name.is_empty() {
        json.push_str(&format!(",\"name\":{}", text(&member.name)));
    }
    if !member.client_urls.is_empty() {
        json.push_str(&format!(",\"clientURLs\":{}", list(&member.client_urls)));
    }
    json.push('}');
    json
}

/// raft's configuration, as Go writes it.
fn configuration(members: &[MemberRecord]) -> Vec<u8> {
    let ids = |is_learner: bool| {
        let of = members.iter().filter(|member| member.is_learner == is_learner);
        of.map(|member| member.id.to_string()).collect::<Vec<_>>().join(",")
    };
    let mut json = String::from("{");
    for (name, ids) in [("voters", ids(false)), ("learners", ids(true))] {
        if !ids.is_empty() {
            json.push_str(&format!("\"{name}\":[{ids}],"));
        }
    }
    json.push_str("\"auto_leave\":false}");
    json.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcdserverpb::AlarmMember;

    fn text(rest: &Rest, bucket: Bucket) -> Vec<(String, String)> {
        let show = |bytes: Bytes| bytes.escape_ascii().to_string();
        rest.rows(bucket).map(|(key, value)| (show(key), show(value))).collect()
    }

    fn row(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn rows_are_as_etcd_writes_them() {
        let member = |id, name: &str, is_learner| MemberRecord {
            id,
            name: name.to_owned(),
            peer_urls: vec!["http://a:2380".to_owned()],
            client_urls: name.chars().map(|_| "http://a\"".to_owned()).collect(),
            is_learner,
        };
        let rest = Rest {
            head: CheckpointHead {
                applied_index: 258,
                applied_term: 3,
                compact_revision: 7,
                alarms: vec![AlarmMember { member_id: 9, alarm: 1 }],
                removed_members: vec![255, 16],
                ..CheckpointHead::default()
            },
            members: vec![member(10, "n", false), member(160, "", true)],
            leases: [-2, 0, 5].map(|id| Lease { id, ttl: 60, remaining_ttl: 0 }).to_vec(),
            auth: vec![(Bucket::AuthUsers, Bytes::from_static(b"root"), Bytes::new())],
        };
        assert_eq!(text(&rest, Bucket::Alarm), [row("\\x08\\t\\x10\\x01", "")]);
        assert_eq!(
            text(&rest, Bucket::MembersRemoved),
            [row("10", "removed"), row("ff", "removed")]
        );
        assert_eq!(
            text(&rest, Bucket::Members),
            [
                row(
                    "a",
                    r#"{\"id\":10,\"peerURLs\":[\"http://a:2380\"],\"name\":\"n\",\"clientURLs\":[\"http://a\\\"\"]}"#
                ),
                row("a0", r#"{\"id\":160,\"peerURLs\":[\"http://a:2380\"],\"isLearner\":true}"#),
            ]
        );
        let compacted = r"\x00\x00\x00\x00\x00\x00\x00\x07_\x00\x00\x00\x00\x00\x00\x00\x00";
        assert_eq!(
            text(&rest, Bucket::Meta),
            [
                row("confState", r#"{\"voters\":[10],\"learners\":[160],\"auto_leave\":false}"#),
                row("consistent_index", r"\x00\x00\x00\x00\x00\x00\x01\x02"),
                row("finishedCompactRev", compacted),
                row("scheduledCompactRev", compacted),
                row("term", r"\x00\x00\x00\x00\x00\x00\x00\x03"),
            ]
        );
        let leases: Vec<Bytes> = rest.rows(Bucket::Lease).map(|(key, _)| key).collect();
        assert!(leases.is_sorted() && leases.len() == 3);
        assert_eq!(text(&rest, Bucket::AuthUsers), [row("root", "")]);
        assert!(text(&rest, Bucket::AuthRoles).is_empty());
    }

    #[test]
    fn a_store_that_was_never_compacted_does_not_say_so() {
        let head = CheckpointHead { compact_revision: -1, ..CheckpointHead::default() };
        let rest = Rest { head, ..Rest::default() };
        assert_eq!(text(&rest, Bucket::Meta).len(), 3);
    }
}
