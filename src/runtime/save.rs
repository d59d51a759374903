//! Saving: the state as a snapshot file that etcd reads, made bit by bit while it is sent.
//!
//! ```text
//!            ╭─ first pass: how large, where is the root ─╮
//! state ── steps at one pinned revision ── rows ── bolt ──┤
//!            ╰─ second pass: the file, and its SHA-256 ───┴─▶ blobs ─▶ client
//! ```
//!
//! In one hold of the state's lock everything small is copied, leases included, as for an
//! [image](super::image). Then a thread of its own goes through the keys, in revision order, in
//! steps between which writes and compactions go on. It holds one window of records, as handles
//! (`mvcc`'s `by_revision`), some pages, and `BLOBS_WAITING` blobs, whatever the size of the state.
//!
//! **How long.** A client may be slow, and a file large: a save takes as long as the client goes
//! on reading. Meanwhile its pin keeps in memory what compaction would have freed. So it is given
//! up, with an error that says why, when the client takes nothing for [`SAVE_STALL_MAX`], or when what
//! is kept is [too much](super::held). When the client goes, so does the pin.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::RwLock;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::held::{HELD_BYTES_MAX, Held};
use super::pins::{Pin, Pins};
use crate::backup::encode::{self, Rest};
use crate::backup::{Bucket, Digest};
use crate::bolt::write::{Plan, WriteError, Writer};
use crate::metrics::Metrics;
use crate::mvcc::RevisionWalk;
use crate::state::{AuthRow, AuthTable, StateMachine};

/// The length of a blob; etcd's value.
pub const BLOB_BYTES: usize = 32 * 1024;
/// Blobs that wait for the client. Beyond that the save waits.
const BLOBS_WAITING: usize = 8;
/// Keys or changes looked at in one hold of the state's lock: well under a millisecond.
const KEYS_PER_STEP: usize = 4096;
/// Bytes of records that a step ends after.
const STEP_BYTES: usize = 1 << 20;
/// How long a client may take nothing.
pub const SAVE_STALL_MAX: Duration = Duration::from_secs(60);

/// Why there is no whole file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// Nobody receives any more.
    #[error("the client is gone")]
    Gone,
    /// The client takes nothing.
    #[error(
        "kvorum: the snapshot was given up, because nothing of it was taken for {} s",
        SAVE_STALL_MAX.as_secs()
    )]
    Stalled,
    /// Too much is kept for it.
    #[error(
        "kvorum: the snapshot was given up, because more than {} MiB that were compacted since \
         it began waited for it; take it faster, or compact less often meanwhile",
        HELD_BYTES_MAX >> 20
    )]
    TooMuchHeld,
    /// The state was replaced by one that does not have the revision any more.
    #[error(
        "kvorum: the snapshot was given up, because this member was sent a state that is \
         compacted further; begin again"
    )]
    Replaced,
    /// The state holds what the format has no place for.
    #[error("kvorum: the state does not fit into a snapshot file: {0}")]
    Write(#[from] WriteError),
}

fn auth_row(row: &AuthRow) -> (Bucket, Bytes, Bytes) {
    let bucket = match row.table {
        AuthTable::Auth => Bucket::Auth,
        AuthTable::User => Bucket::AuthUsers,
        AuthTable::Role => Bucket::AuthRoles,
    };
    (bucket, row.key.clone(), row.value.clone())
}

/// A piece of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// The bytes: [`BLOB_BYTES`] of the database, or what is left of it; the last blob is the
    /// SHA-256 of all others.
    pub bytes: Bytes,
    /// How many bytes of the database are still to come.
    pub remaining_bytes: u64,
}

/// What comes out of a save; after an error nothing more does.
pub type Blobs = mpsc::Receiver<Result<Blob, SaveError>>;

/// A save that was begun: a state as of one moment, and the means to read it.
pub struct Save {
    rest: Rest,
    start: RevisionWalk,
    state: Arc<RwLock<StateMachine>>,
    pin: Pin,
    /// What the pin keeps.
    held: Held,
}

impl Save {
    /// Of the present state. Holds its lock for as long as copying the leases takes.
    pub fn new(state: &Arc<RwLock<StateMachine>>, pins: &Arc<Pins>) -> Save {
        let now = state.read();
        let start = now.store().walk_as_etcd();
        let rest = Rest {
            head: now.head(),
            members: now.members().records(),
            leases: now.lessor().iter().map(|lease| lease.to_record()).collect(),
            auth: now.auth_rows().iter().map(auth_row).collect(),
        };
        let pin = pins.pin(start.floor());
        let held = Held::from(start.floor());
        Save { rest, start, state: Arc::clone(state), pin, held }
    }

    /// The revision that is saved.
    pub fn revision(&self) -> i64 {
        self.start.revision()
    }

    /// Makes the file on a thread of its own, and hands it out as it is taken. To be called
    /// within the runtime. Dropping the receiver ends the save.
    /// `slot` is given back at the end.
    pub fn begin(mut self, metrics: Arc<Metrics>, slot: OwnedSemaphorePermit) -> Blobs {
        let (blobs, receiver) = mpsc::channel(BLOBS_WAITING);
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            let _slot = slot;
            let began = Instant::now();
            let mut out = Out { blobs, runtime, digest: Digest::new(), left: 0 };
            let made = self.make(&mut out);
            let (revision, took) = (self.revision(), began.elapsed());
            drop(self);
            metrics.disk_backend_snapshot_duration_seconds.observe(took.as_secs_f64());
            match made {
                Ok(bytes) => tracing::info!(revision, bytes, ?took, "sent a snapshot"),
                Err(error) => {
                    tracing::warn!(revision, %error, ?took, "a snapshot ended early");
                    // A client that takes nothing learns when it does that there is no more.
                    if error != SaveError::Stalled {
                        let _ = out.send(Err(error));
                    }
                }
            }
        });
        receiver
    }

    /// Both passes. The size of the database.
    fn make(&mut self, out: &mut Out) -> Result<u64, SaveError> {
        let plan = self.pass(Writer::planning(), out)?;
        out.left = plan.file_bytes();
        self.pass(Writer::writing(plan), out)?;
        out.end()?;
        Ok(plan.file_bytes())
    }

    fn pass(&mut self, mut writer: Writer, out: &mut Out) -> Result<Plan, SaveError> {
        for bucket in Bucket::ALL {
            for (key, value) in self.rest.rows(bucket) {
                writer.row(key, value)?;
                out.take(&mut writer)?;
            }
            if bucket == Bucket::Key {
                self.keys(&mut writer, out)?;
            }
            writer.end_bucket(bucket.name())?;
        }
        let plan = writer.end()?;
        out.take(&mut writer)?;
        out.take_rest(&mut writer)?;
        Ok(plan)
    }

    fn keys(&mut self, writer: &mut Writer, out: &mut Out) -> Result<(), SaveError> {
        let mut walk = self.start.clone();
        while !walk.is_done() {
            {
                let state = self.state.read();
                if self.pin.is_lost() {
                    return Err(SaveError::Replaced);
                }
                walk.step(state.store(), KEYS_PER_STEP, STEP_BYTES);
            }
            if self.held.is_too_much(&self.state) {
                return Err(SaveError::TooMuchHeld);
            }
            while let Some(record) = walk.take() {
                let (key, value) = encode::key_row(record);
                writer.row(key, value)?;
                out.take(writer)?;
            }
            // While nothing is sent, nothing else would tell.
            if out.blobs.is_closed() {
                return Err(SaveError::Gone);
            }
        }
        Ok(())
    }
}

/// The way to the client.
struct Out {
    blobs: mpsc::Sender<Result<Blob, SaveError>>,
    runtime: tokio::runtime::Handle,
    digest: Digest,
    /// Bytes of the database that were not sent yet.
    left: u64,
}

impl Out {
    /// Sends what the writer has, in whole blobs.
    fn take(&mut self, writer: &mut Writer) -> Result<(), SaveError> {
        while let Some(bytes) = writer.take(BLOB_BYTES) {
            self.database(bytes)?;
        }
        Ok(())
    }

    /// Sends the last bytes, which are no whole blob.
    fn take_rest(&mut self, writer: &mut Writer) -> Result<(), SaveError> {
        match writer.take(writer.ready_bytes()).filter(|bytes| !bytes.is_empty()) {
            Some(bytes) => self.database(bytes),
            None => Ok(()),
        }
    }

    fn database(&mut self, bytes: Bytes) -> Result<(), SaveError> {
        self.digest.add(&bytes);
        self.left = self.left.saturating_sub(bytes.len() as u64);
        self.send(Ok(Blob { bytes, remaining_bytes: self.left }))
    }

    /// Sends what a file ends with.
    fn end(&mut self) -> Result<(), SaveError> {
        let bytes = std::mem::take(&mut self.digest).finish();
        self.send(Ok(Blob { bytes: Bytes::copy_from_slice(&bytes), remaining_bytes: 0 }))
    }

    /// Waits for the client, if it is behind.
    fn send(&self, blob: Result<Blob, SaveError>) -> Result<(), SaveError> {
        let blob = match self.blobs.try_send(blob) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(SaveError::Gone),
            Err(TrySendError::Full(blob)) => blob,
        };
        let sent = async { tokio::time::timeout(SAVE_STALL_MAX, self.blobs.send(blob)).await };
        match self.runtime.block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SaveError::Gone),
            Err(_) => Err(SaveError::Stalled),
        }
    }
}

#[cfg(test)]
mod tests;
