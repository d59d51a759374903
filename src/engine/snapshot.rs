//! A snapshot while it is being saved.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::Error;
use crate::pb::etcdserverpb::SnapshotResponse;
use crate::runtime::save::{Blob, Blobs, SaveError};

/// A snapshot file in pieces: see [`Engine::snapshot`](super::Engine::snapshot).
#[derive(Debug)]
pub struct Snapshot {
    revision: i64,
    version: &'static str,
    blobs: Blobs,
    stopping: Stopping,
    progress: Progress,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Database,
    /// What the file ends with is next.
    Trailer,
    /// It was complete, or there was an error.
    Over,
}

/// Becomes ready when the server begins to stop.
struct Stopping(Pin<Box<dyn Future<Output = ()> + Send>>);

impl std::fmt::Debug for Stopping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stopping")
    }
}

impl Snapshot {
    pub(super) fn new(
        revision: i64,
        version: &'static str,
        blobs: Blobs,
        mut stopping: watch::Receiver<bool>,
    ) -> Snapshot {
        let stopping = Stopping(Box::pin(async move {
            // Without its sender the server is gone.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        }));
        Snapshot { revision, version, blobs, stopping, progress: Progress::Database }
    }

    /// The revision that it holds.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The next bytes of the file; `None` when it is complete. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`Error::SnapshotGivenUp`], [`Error::Stopped`]: what was received is no file.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let response = std::future::poll_fn(|cx| self.poll_response(cx)).await;
        Ok(response.transpose()?.map(|response| response.blob))
    }

    /// The next message of etcd's stream.
    pub(crate) fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<SnapshotResponse, Error>>> {
        if self.progress == Progress::Over {
            return Poll::Ready(None);
        }
        let received = if self.stopping.0.as_mut().poll(cx).is_ready() {
            Err(Error::Stopped)
        } else {
            match std::task::ready!(self.blobs.poll_recv(cx)) {
                Some(received) => received.map_err(Error::from),
                // Clients would take what they have for the file.
                None => Err(Error::from(SaveError::Stalled)),
            }
        };
        self.progress = match &received {
            Ok(Blob { remaining_bytes: 0, .. }) if self.progress == Progress::Database => {
                Progress::Trailer
            }
            Ok(_) if self.progress == Progress::Database => Progress::Database,
            Ok(_) | Err(_) => Progress::Over,
        };
        if self.progress == Progress::Over {
            // The save ends, if it has not.
            self.blobs.close();
        }
        Poll::Ready(Some(received.map(|Blob { bytes, remaining_bytes }| SnapshotResponse {
            header: None,
            remaining_bytes,
            blob: bytes,
            version: self.version.to_owned(),
        })))
    }
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Error {
        Error::SnapshotGivenUp(error.to_string())
    }
}
