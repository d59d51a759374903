//! What clients were told, what a watcher saw, and whether a server agrees with both.
//!
//! The judge is the watcher. From revision 2 on it must see *every* revision once, over
//! all the server's lives: a missing number is a gap, a repeated one a duplicate. From
//! its events the whole store is built anew ([`Model`]), and with it are compared
//!
//! - every acknowledged write: it must be what happened at the revision it was told;
//! - every event's `prev_kv`, `create_revision` and `version`;
//! - the server's keys, now and at past revisions, leases and hashes included.
//!
//! A write that failed may have happened or not. If it did, its event carries a value
//! that some client tried to write.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kvorum::pb::etcdserverpb::kv_client::KvClient;
use kvorum::pb::etcdserverpb::lease_client::LeaseClient;
use kvorum::pb::etcdserverpb::maintenance_client::MaintenanceClient;
use kvorum::pb::etcdserverpb::{
    HashKvRequest, HashKvResponse, LeaseLeasesRequest, LeaseTimeToLiveRequest, RangeRequest,
};
use kvorum::pb::mvccpb::{Event, KeyValue, event::EventType};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::common::rng::Rng;

/// Every key the clients use begins with this, and no other key is there.
pub(crate) const PREFIX: &str = "k";

/// What an acknowledged request changed: the new value of each key, or that it is gone.
pub(crate) type Changes = BTreeMap<Bytes, Option<Bytes>>;

/// Shared by the clients, the watcher and the judge.
pub(crate) struct History {
    inner: Mutex<Inner>,
    /// The revision the watcher has seen everything up to.
    seen: watch::Sender<i64>,
}

#[derive(Default)]
struct Inner {
    /// By revision.
    acknowledged: BTreeMap<i64, Changes>,
    attempted: BTreeSet<Bytes>,
    /// The highest revision any header told.
    told: i64,
    compacted: i64,
    /// The highest compaction that was asked for; it may have happened.
    compaction_asked: i64,
    granted: BTreeSet<i64>,
    revoke_asked: BTreeSet<i64>,
    revoked: BTreeSet<i64>,
    hashes: Vec<HashKvResponse>,
    model: Model,
}

impl History {
    /// Of an empty store.
    pub(crate) fn new() -> History {
        History { inner: Mutex::default(), seen: watch::Sender::new(1) }
    }

    /// What a client is about to write. To be called before it does.
    pub(crate) fn attempt(&self, value: &Bytes) {
        self.inner.lock().attempted.insert(value.clone());
    }

    /// The highest revision that anybody was told of: what is acknowledged from now on
    /// lies above.
    pub(crate) fn told(&self) -> i64 {
        self.inner.lock().told
    }

    /// A header told this revision.
    pub(crate) fn tell(&self, revision: i64) {
        let mut inner = self.inner.lock();
        inner.told = inner.told.max(revision);
    }

    /// A request was acknowledged. `floor` is what [`History::told`] was when it was sent.
    pub(crate) fn acknowledge(&self, revision: i64, floor: i64, changes: Changes) {
        assert!(revision >= floor, "acknowledged at {revision} after {floor} was told");
        self.tell(revision);
        if changes.is_empty() {
            return;
        }
        assert!(revision > floor, "a change at {revision}, which was told before it was asked for");
        let before = self.inner.lock().acknowledged.insert(revision, changes);
        assert_eq!(before, None, "two requests were acknowledged at {revision}");
    }

    /// How many changes were acknowledged.
    pub(crate) fn acknowledged(&self) -> usize {
        self.inner.lock().acknowledged.len()
    }

    pub(crate) fn ask_compaction(&self, revision: i64) {
        let mut inner = self.inner.lock();
        inner.compaction_asked = inner.compaction_asked.max(revision);
    }

    pub(crate) fn compacted(&self, revision: i64) {
        let mut inner = self.inner.lock();
        inner.compacted = inner.compacted.max(revision);
    }

    pub(crate) fn granted(&self, lease: i64) {
        self.inner.lock().granted.insert(lease);
    }

    pub(crate) fn ask_revoke(&self, lease: i64) {
        self.inner.lock().revoke_asked.insert(lease);
    }

    pub(crate) fn revoked(&self, lease: i64) {
        self.inner.lock().revoked.insert(lease);
    }

    /// A lease that is there for certain, if there is one.
    pub(crate) fn a_lease(&self, rng: &mut Rng) -> Option<i64> {
        let inner = self.inner.lock();
        let there: Vec<i64> = inner.granted.difference(&inner.revoke_asked).copied().collect();
        (!there.is_empty()).then(|| rng.pick(&there))
    }

    pub(crate) fn hashed(&self, hash: HashKvResponse) {
        self.inner.lock().hashes.push(hash);
    }

    /// Everything up to here was seen by the watcher.
    pub(crate) fn seen(&self) -> i64 {
        *self.seen.borrow()
    }

    /// Waits until the watcher has seen everything up to `revision`.
    pub(crate) async fn wait_until_seen(&self, revision: i64) {
        let mut seen = self.seen.subscribe();
        let reached = seen.wait_for(|seen| *seen >= revision);
        let waited = tokio::time::timeout(crate::node::PATIENCE, reached).await;
        assert!(waited.is_ok(), "the watcher is at {}, not at {revision}", self.seen());
    }

    /// Events of a watch response, whole revisions in order.
    pub(crate) fn observe(&self, events: &[Bytes]) {
        let mut inner = self.inner.lock();
        for event in events {
            let event = Event::decode(event.clone()).expect("an event decodes");
            inner.model.observe(&event);
            let kv = event.kv.expect("an event has a key");
            if event.r#type == EventType::Put as i32 {
                assert!(inner.attempted.contains(&kv.value), "nobody wrote the value of {kv:?}");
            }
        }
        let revision = inner.model.revision;
        drop(inner);
        self.seen.send_replace(revision);
    }

    /// Compares a server that nobody writes to with everything that is known.
    pub(crate) async fn verify(&self, channel: Channel, rng: &mut Rng) {
        let mut kv = KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
        // What a client was waiting for when it was stopped may happen yet.
        let (now, revision) = loop {
            let now = kv.range(all_keys(0)).await.expect("a range").into_inner();
            let revision = now.header.as_ref().expect("a header").revision;
            self.wait_until_seen(revision).await;
            if self.seen() <= revision {
                break (now, revision);
            }
        };
        {
            let mut inner = self.inner.lock();
            assert!(revision >= inner.told, "at {revision}, but {} was told", inner.told);
            inner.told = revision;
            inner.check_acknowledged();
            inner.model.assert_holds(&now.kvs, revision);
        }

        let mut maintenance = MaintenanceClient::new(channel.clone());
        let hash = maintenance.hash_kv(HashKvRequest { revision: 0 }).await;
        let hash = hash.expect("a hash").into_inner();
        let compacted = {
            let inner = self.inner.lock();
            // -1 and 0 both say never.
            assert!(
                hash.compact_revision.max(0) >= inner.compacted,
                "compacted at {}, but {} was acknowledged",
                hash.compact_revision,
                inner.compacted
            );
            assert!(hash.compact_revision <= inner.compaction_asked);
            hash.compact_revision.max(1)
        };
        for _ in 0..3 {
            let at = rng.between(compacted, revision);
            let past = kv.range(all_keys(at)).await.expect("a range in the past").into_inner();
            self.inner.lock().model.assert_holds(&past.kvs, at);
        }
        self.verify_hashes(&mut maintenance, hash).await;
        self.verify_leases(LeaseClient::new(channel)).await;
    }

    async fn verify_hashes(
        &self,
        maintenance: &mut MaintenanceClient<Channel>,
        now: HashKvResponse,
    ) {
        let hashes = std::mem::take(&mut self.inner.lock().hashes);
        let comparable = hashes
            .into_iter()
            .rev()
            .filter(|before| before.compact_revision == now.compact_revision)
            .take(5);
        for before in comparable {
            let request = HashKvRequest { revision: before.hash_revision };
            let after = maintenance.hash_kv(request).await.expect("a hash").into_inner();
            if after.compact_revision != before.compact_revision {
                // A compaction to this very revision was hashed, and that hash is kept until
                // the server stops: it starts at the compaction before.
                assert_eq!(before.hash_revision, now.compact_revision);
                continue;
            }
            assert_eq!(after.hash, before.hash, "at {}", before.hash_revision);
        }
        // For the next life.
        self.inner.lock().hashes.push(now);
    }

    async fn verify_leases(&self, mut leases: LeaseClient<Channel>) {
        let there = leases.lease_leases(LeaseLeasesRequest {}).await.expect("leases").into_inner();
        let there: BTreeSet<i64> = there.leases.iter().map(|lease| lease.id).collect();
        let (some, attached) = {
            let inner = self.inner.lock();
            for lease in inner.granted.difference(&inner.revoke_asked) {
                assert!(there.contains(lease), "lease {lease} is lost");
            }
            for lease in &inner.revoked {
                assert!(!there.contains(lease), "lease {lease} is back");
            }
            let some: Vec<i64> = there.iter().copied().take(5).collect();
            (some, inner.model.keys_by_lease())
        };
        for lease in some {
            let request = LeaseTimeToLiveRequest { id: lease, keys: true };
            let lived = leases.lease_time_to_live(request).await.expect("a lease").into_inner();
            assert!(lived.ttl > 0, "lease {lease} has {} seconds left", lived.ttl);
            let keys: BTreeSet<Bytes> = lived.keys.into_iter().collect();
            assert_eq!(keys, attached.get(&lease).cloned().unwrap_or_default(), "lease {lease}");
        }
    }
}

impl Inner {
    fn check_acknowledged(&mut self) {
        for (revision, changes) in &self.acknowledged {
            let happened = self.model.changes_at(*revision);
            assert_eq!(
                happened.as_ref(),
                Some(changes),
                "what was acknowledged at {revision} is not what happened"
            );
        }
        assert!(self.compacted <= self.compaction_asked);
    }
}

fn all_keys(revision: i64) -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, ..Default::default() }
}

/// The store, made of events.
struct Model {
    events: Vec<Event>,
    live: BTreeMap<Bytes, KeyValue>,
    revision: i64,
}

impl Default for Model {
    fn default() -> Model {
        Model { events: Vec::new(), live: BTreeMap::new(), revision: 1 }
    }
}

impl Model {
    /// Checks that the event can follow those before. Nothing it replaces can have been
    /// compacted: clients compact no further than the watcher has seen.
    fn observe(&mut self, event: &Event) {
        let kv = event.kv.clone().expect("an event has a key");
        let last = self.events.last().map_or(1, mod_revision);
        assert!(
            kv.mod_revision == last + 1 || (kv.mod_revision == last && !self.events.is_empty()),
            "an event of revision {} follows one of {last}",
            kv.mod_revision
        );
        let before = self.live.get(&kv.key);
        assert_eq!(event.prev_kv.as_ref(), before, "before {kv:?}");
        if event.r#type == EventType::Put as i32 {
            let (created, version) =
                before.map_or((kv.mod_revision, 1), |old| (old.create_revision, old.version + 1));
            assert_eq!((kv.create_revision, kv.version), (created, version), "{kv:?}");
            self.live.insert(kv.key.clone(), kv.clone());
        } else {
            assert!(before.is_some(), "{kv:?} was deleted and was not there");
            self.live.remove(&kv.key);
        }
        self.revision = kv.mod_revision;
        self.events.push(event.clone());
    }

    fn changes_at(&self, revision: i64) -> Option<Changes> {
        let start = self.events.partition_point(|event| mod_revision(event) < revision);
        let mut changes = Changes::new();
        for event in &self.events[start..] {
            if mod_revision(event) != revision {
                break;
            }
            let kv = event.kv.as_ref()?;
            let put = event.r#type == EventType::Put as i32;
            let before = changes.insert(kv.key.clone(), put.then(|| kv.value.clone()));
            assert_eq!(before, None, "{:?} changes twice at {revision}", kv.key);
        }
        (!changes.is_empty()).then_some(changes)
    }

    /// The keys as of a revision.
    fn at(&self, revision: i64) -> BTreeMap<Bytes, KeyValue> {
        if revision == self.revision {
            return self.live.clone();
        }
        let mut live = BTreeMap::new();
        for event in self.events.iter().take_while(|event| mod_revision(event) <= revision) {
            let Some(kv) = &event.kv else { continue };
            if event.r#type == EventType::Put as i32 {
                live.insert(kv.key.clone(), kv.clone());
            } else {
                live.remove(&kv.key);
            }
        }
        live
    }

    fn assert_holds(&self, kvs: &[Bytes], revision: i64) {
        let found: Vec<KeyValue> =
            kvs.iter().map(|kv| KeyValue::decode(kv.clone()).expect("a key decodes")).collect();
        let expected: Vec<KeyValue> = self.at(revision).into_values().collect();
        let first = found.iter().zip(&expected).position(|(found, expected)| found != expected);
        assert_eq!(first.map(|at| (&found[at], &expected[at])), None, "at {revision}");
        assert_eq!(found.len(), expected.len(), "keys at {revision}");
    }

    fn keys_by_lease(&self) -> BTreeMap<i64, BTreeSet<Bytes>> {
        let mut keys = BTreeMap::<i64, BTreeSet<Bytes>>::new();
        for kv in self.live.values().filter(|kv| kv.lease != 0) {
            keys.entry(kv.lease).or_default().insert(kv.key.clone());
        }
        keys
    }
}

fn mod_revision(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}
