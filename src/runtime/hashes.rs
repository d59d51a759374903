//! The checksum of each compaction.
//!
//! When history is compacted to a revision, etcd hashes the keys as of that revision,
//! with the compaction before as the lower end, and keeps the last ten: these are what
//! members compare with each other, because all of them have them. `HashKV` of such a
//! revision answers what was kept, also when that revision has been compacted since.
//!
//! The hash is worked out beside everything else, in steps; physical compaction waits
//! for it, because it reads what compaction is about to remove.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};

use super::pins::Pin;
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

/// A compaction that is to be hashed: begun before it took effect.
pub struct HashJob {
    /// What to do.
    pub hash: HashKv,
    /// Keeps what the hash reads.
    pub pin: Pin,
}

/// The last hashes.
#[derive(Debug)]
pub struct CompactionHashes {
    done: Mutex<BTreeMap<i64, KeyValueHash>>,
    /// The newest compaction that is being hashed or was; to wait for it.
    finished: watch::Sender<i64>,
    begun: Mutex<i64>,
}

impl Default for CompactionHashes {
    fn default() -> CompactionHashes {
        CompactionHashes {
            done: Mutex::default(),
            finished: watch::Sender::new(i64::MIN),
            begun: Mutex::new(i64::MIN),
        }
    }
}

impl CompactionHashes {
    /// The hash of the compaction to `revision`, if it is one of the last; waits while
    /// it is being worked out.
    pub async fn get(&self, revision: i64) -> Option<KeyValueHash> {
        if revision <= *self.begun.lock() {
            let mut finished = self.finished.subscribe();
            // The hasher is gone when the server stops; then there is none.
            finished.wait_for(|finished| revision <= *finished).await.ok()?;
        }
        self.done.lock().get(&revision).copied()
    }

    fn keep(&self, hash: KeyValueHash) {
        let mut done = self.done.lock();
        done.insert(hash.revision, hash);
        while done.len() > HASHES_MAX {
            done.pop_first();
        }
        drop(done);
        self.finished.send_replace(hash.revision);
    }
}

/// The apply thread's side.
pub struct HashQueue {
    jobs: mpsc::Sender<HashJob>,
    hashes: Arc<CompactionHashes>,
}

impl HashQueue {
    /// A compaction took effect. Never blocks; with too many under way this one goes
    /// without a hash, and is removed the sooner.
    pub fn push(&self, job: HashJob) {
        let revision = job.hash.revision();
        if self.jobs.try_send(job).is_ok() {
            *self.hashes.begun.lock() = revision;
        }
    }
}

/// A queue, and the task that works it off until the queue is dropped.
pub fn hasher(
    state: Arc<RwLock<StateMachine>>,
    hashes: Arc<CompactionHashes>,
) -> (HashQueue, impl Future<Output = ()> + Send) {
    let (sender, mut jobs) = mpsc::channel::<HashJob>(QUEUE_MAX);
    let queue = HashQueue { jobs: sender, hashes: Arc::clone(&hashes) };
    let work = async move {
        while let Some(job) = jobs.recv().await {
            let state = Arc::clone(&state);
            let hashes = Arc::clone(&hashes);
            // Sorting and hashing takes long; it must not hold up those who serve.
            let worked = tokio::task::spawn_blocking(move || hashes.keep(work_out(&state, job)));
            if let Err(error) = worked.await {
                tracing::warn!(%error, "a compaction could not be hashed");
            }
        }
    };
    (queue, work)
}

fn work_out(state: &RwLock<StateMachine>, job: HashJob) -> KeyValueHash {
    let HashJob { mut hash, pin } = job;
    while !hash.step(state.read().store(), KEYS_PER_STEP) {}
    drop(pin);
    let (revision, compact_revision) = (hash.revision(), hash.compact_revision());
    KeyValueHash { hash: hash.finish(), compact_revision, revision }
}
