//! The checksum of each compaction.
//!
//! When history is compacted to a revision, etcd hashes the keys as of that revision,
//! with the compaction before as the lower end, and keeps the last ten: these are what
//! members compare with each other, because all of them have them. `HashKV` of such a
//! revision answers what was kept, also when that revision has been compacted since.
//!
//! The hash is worked out beside everything else, in steps; physical compaction waits
//! for it, because it reads what compaction is about to remove.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};

use super::pins::{Pin, Pins};
use crate::mvcc::HashKv;
use crate::state::StateMachine;

/// How many hashes are kept; etcd's value.
const HASHES_MAX: usize = 10;
/// Compactions that wait to be hashed. Beyond that they go without.
const QUEUE_MAX: usize = 4;
/// Keys visited in one hold of the state's lock.
const KEYS_PER_STEP: usize = 2048;

/// A hash as `HashKV` answers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyValueHash {
    /// The checksum.
    pub hash: u32,
    /// The compaction it starts at.
    pub compact_revision: i64,
    /// The revision it goes to.
    pub revision: i64,
}

/// A hash that is to be worked out; that of a compaction was begun before it took effect.
pub struct HashJob {
    hash: HashKv,
    /// Keeps what the hash reads.
    pin: Pin,
}

impl HashJob {
    /// To be called in the hold of the state's lock in which the hash was begun.
    pub fn new(hash: HashKv, pins: &Arc<Pins>) -> HashJob {
        let pin = pins.pin(hash.floor());
        HashJob { hash, pin }
    }
}

/// The last hashes.
#[derive(Debug, Default)]
pub struct CompactionHashes {
    kept: watch::Sender<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    done: BTreeMap<i64, KeyValueHash>,
    /// Compactions that wait to be hashed or are being hashed.
    under_way: BTreeSet<i64>,
}

impl CompactionHashes {
    /// The hash of the compaction to `revision`, if it is one of the last; waits while
    /// it is being worked out.
    pub async fn get(&self, revision: i64) -> Option<KeyValueHash> {
        let mut kept = self.kept.subscribe();
        let settled = kept.wait_for(|kept| !kept.under_way.contains(&revision)).await.ok()?;
        settled.done.get(&revision).copied()
    }

    /// All that are kept, the newest first.
    pub fn newest_first(&self) -> Vec<KeyValueHash> {
        self.kept.borrow().done.values().rev().copied().collect()
    }

    fn keep(&self, hash: KeyValueHash) {
        self.kept.send_modify(|kept| {
            kept.done.insert(hash.revision, hash);
            while kept.done.len() > HASHES_MAX {
                kept.done.pop_first();
            }
        });
    }
}

/// Says that a compaction is being hashed, until dropped: done, or given up because there
/// are too many, the work failed, or the server stops.
struct UnderWay {
    hashes: Arc<CompactionHashes>,
    revision: i64,
}

impl UnderWay {
    fn begin(hashes: &Arc<CompactionHashes>, revision: i64) -> UnderWay {
        hashes.kept.send_modify(|kept| {
            kept.under_way.insert(revision);
        });
        UnderWay { hashes: Arc::clone(hashes), revision }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.hashes.kept.send_modify(|kept| {
            kept.under_way.remove(&self.revision);
        });
    }
}

/// The apply thread's side.
pub struct HashQueue {
    jobs: mpsc::Sender<(HashJob, UnderWay)>,
    hashes: Arc<CompactionHashes>,
}

impl HashQueue {
    /// A compaction took effect. Never blocks; with too many under way this one goes
    /// without a hash, and is removed the sooner.
    pub fn push(&self, job: HashJob) {
        let under_way = UnderWay::begin(&self.hashes, job.hash.revision());
        // Dropped with its pin when there is no room.
        let _ = self.jobs.try_send((job, under_way));
    }
}

/// A queue, and the task that works it off until the queue is dropped.
pub fn hasher(
    state: Arc<RwLock<StateMachine>>,
    hashes: Arc<CompactionHashes>,
) -> (HashQueue, impl Future<Output = ()> + Send) {
    let (sender, mut jobs) = mpsc::channel(QUEUE_MAX);
    let queue = HashQueue { jobs: sender, hashes: Arc::clone(&hashes) };
    let work = async move {
        while let Some((job, under_way)) = jobs.recv().await {
            let state = Arc::clone(&state);
            let hashes = Arc::clone(&hashes);
            // Sorting and hashing takes long; it must not hold up those who serve.
            let worked = tokio::task::spawn_blocking(move || {
                if let Some(hash) = work_out(&state, job) {
                    hashes.keep(hash);
                }
                drop(under_way);
            });
            if let Err(error) = worked.await {
                tracing::warn!(%error, "a compaction could not be hashed");
            }
        }
    };
    (queue, work)
}

/// Works a hash out, in steps between which writes go on. Blocks. `None` when the state was
/// replaced meanwhile by one that is compacted further.
///
/// It does not look at how old its pin is: it sees each key once, and asking again would take
/// as long.
pub fn work_out(state: &RwLock<StateMachine>, job: HashJob) -> Option<KeyValueHash> {
    let HashJob { mut hash, pin } = job;
    loop {
        let state = state.read();
        if pin.is_lost() {
            return None;
        }
        if hash.step(state.store(), KEYS_PER_STEP) {
            break;
        }
    }
    drop(pin);
    let (revision, compact_revision) = (hash.revision(), hash.compact_revision());
    Some(KeyValueHash { hash: hash.finish(), compact_revision, revision })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mvcc::Store;

    fn hash(revision: i64) -> KeyValueHash {
        KeyValueHash { hash: 1, compact_revision: -1, revision }
    }

    #[tokio::test]
    async fn who_asks_waits_for_that_hash_alone() {
        let hashes = Arc::new(CompactionHashes::default());
        let under_way = UnderWay::begin(&hashes, 7);
        assert_eq!(hashes.get(0).await, None);
        assert_eq!(hashes.get(5).await, None);
        let waiting = tokio::spawn({
            let hashes = Arc::clone(&hashes);
            async move { hashes.get(7).await }
        });
        tokio::task::yield_now().await;
        hashes.keep(hash(7));
        drop(under_way);
        assert_eq!(waiting.await.expect("an answer"), Some(hash(7)));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_hash_that_was_given_up() {
        let hashes = Arc::new(CompactionHashes::default());
        let (jobs, receiver) = mpsc::channel(1);
        let queue = HashQueue { jobs, hashes: Arc::clone(&hashes) };
        let pins = Arc::new(Pins::default());
        for revision in [1, 2] {
            let hash = Store::new().compaction_hash_begin(revision);
            queue.push(HashJob::new(hash, &pins));
        }
        assert_eq!(hashes.get(2).await, None, "the queue was full");
        assert_eq!(pins.readers(), 1);
        // The task is aborted when the server stops.
        drop(receiver);
        assert_eq!(hashes.get(1).await, None);
        assert_eq!(pins.readers(), 0);
    }

    #[tokio::test]
    async fn the_last_hashes_are_kept() {
        let hashes = CompactionHashes::default();
        for revision in 1..=20 {
            hashes.keep(hash(revision));
        }
        assert_eq!(hashes.get(10).await, None);
        assert_eq!(hashes.get(11).await, Some(hash(11)));
        let kept: Vec<i64> = hashes.newest_first().iter().map(|kept| kept.revision).collect();
        assert_eq!(kept, [20, 19, 18, 17, 16, 15, 14, 13, 12, 11]);
    }
}
