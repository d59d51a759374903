//! Images on their way from one member to another, over `Peer.Snapshot`.
//!
//! ```text
//! sender                                   receiver
//! begin{id, index, term, message} ───────▶ is there something of this id?
//!           ◀───────────────────────────── received: so many bytes
//! data … data … data … end{length} ──────▶ spool, then check all of it
//!           ◀───────────────────────────── received (a sign of life, now and then)
//!           ◀───────────────────────────── done: it is in force
//! ```
//!
//! Bytes are counted and passed on, not understood: what an image is, `storage::image` knows.
//!
//! * **Interrupted**: what has arrived is kept for [`SPOOL_KEPT_MAX`], and the next attempt with
//!   the same id goes on behind it. Both ends notice within [`STALL_MAX`]. An image of which the
//!   receiver has nothing any more is not begun again: a newer one leaves it less to catch up
//!   with ([`SendError::Forgotten`]).
//! * **Repeated**: nor is one that was handed over before. One that is older than the receiver's
//!   state is handed over, and found to be of no use there; that is no error.
//! * **At the same time**: images of two senders have two ids and two spools, of which there are
//!   few ([`SPOOLS_MAX`]): the oldest that nobody is sending makes room. Of two attempts with the
//!   same id the later one goes on where the earlier, which is ended, was.
//! * **Memory**: the sender has [`CHUNKS_IN_FLIGHT`] chunks waiting at most, beside what the
//!   transport's windows let in.
//!
//! How a transfer ended is returned exactly once, by [`send`].

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Status};

use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::snapshot_chunk::Part;
use crate::pb::kvorumpb::{SnapshotBegin, SnapshotChunk, SnapshotProgress};
use crate::storage::spool::{SPOOLS_MAX, Spool, Spools};

/// Chunks, of a quarter of a mebibyte each, that wait to be sent.
pub const CHUNKS_IN_FLIGHT: usize = 8;
/// A transfer of which nothing is heard for so long has failed.
pub const STALL_MAX: Duration = Duration::from_secs(30);
/// How long what has arrived of an interrupted transfer is kept. Longer than the sender keeps
/// its side.
pub const SPOOL_KEPT_MAX: Duration = Duration::from_secs(90);
/// A throttle that was late, or had nothing to send, hurries for so long.
const OVERDUE_MAX: Duration = Duration::from_millis(100);
/// How often the receiver gives a sign of life while the sender waits for the end.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
/// Answers that wait for the transport.
const PROGRESS_MAX: usize = 4;

/// Why an image that was begun cannot be made to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImageLost {
    /// What is left of it is not there any more.
    #[error("the state was replaced while its image was being sent")]
    Replaced,
    /// It was taken so slowly that the memory it keeps is needed for others.
    #[error(
        "the image was given up, because too much that was compacted since it began waited for \
         it; take it faster, or compact less often meanwhile"
    )]
    TooMuchHeld,
}

/// An image, made while it is sent. Its bytes are always the same.
pub trait Image: Send + 'static {
    /// Which image: no other has this number.
    fn id(&self) -> u64;
    /// Up to which entry it goes.
    fn index(&self) -> u64;
    /// That entry's term.
    fn term(&self) -> u64;
    /// How many bytes were given out.
    fn offset(&self) -> u64;
    /// Begins again at offset 0.
    fn restart(&mut self);
    /// The next bytes; `None` at the end. Takes a moment, in which it may hold a lock. Where they
    /// take more than that to be found, there are none yet, and it is to be called again, after
    /// others have had their turn.
    ///
    /// # Errors
    /// [`ImageLost`]: there will be no more.
    fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost>;
}

/// Why an image did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The receiver, or the way to it, failed.
    #[error("the snapshot was not taken: {0}")]
    Refused(#[from] Status),
    /// Nothing was heard for [`STALL_MAX`].
    #[error("the snapshot stalled for {} s", STALL_MAX.as_secs())]
    Stalled,
    /// The receiver ended the call before the end of the image.
    #[error("the snapshot's receiver ended the call")]
    Ended,
    /// The receiver has more than there is, or what it got was not as it was sent.
    #[error("what the receiver has of the snapshot is not what was sent")]
    Mismatch,
    /// The receiver has nothing of an image that was begun before, because it was killed, say, or
    /// has handed it over: a newer one is better.
    #[error("the receiver has nothing of the snapshot that was begun, and is sent a newer one")]
    Forgotten,
    /// The image cannot be made any more.
    #[error(transparent)]
    Lost(#[from] ImageLost),
}

impl SendError {
    /// Whether another attempt with the same image may succeed.
    pub fn may_be_resumed(&self) -> bool {
        match self {
            SendError::Refused(status) => status.code() != Code::DataLoss,
            SendError::Stalled | SendError::Ended => true,
            SendError::Mismatch | SendError::Forgotten | SendError::Lost(_) => false,
        }
    }
}

/// Sends an image, from where the receiver has it, and returns when it is in force there.
/// `message` is raft's message that goes with it. Not more than `bytes_per_sec` are sent; 0: as
/// fast as it goes.
///
/// Dropping the future interrupts the transfer, as an error does; the image may be sent again.
///
/// # Errors
/// [`SendError`].
pub async fn send<T, I: Image>(
    mut client: PeerClient<T>,
    image: &mut I,
    message: Bytes,
    bytes_per_sec: u64,
) -> Result<(), SendError>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: tonic::codegen::Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let (chunks, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let begin = SnapshotBegin { id: image.id(), index: image.index(), term: image.term(), message };
    let mut call = Call { chunks, progress: None };
    call.push(Part::Begin(begin)).await?;
    let answered = timeout(STALL_MAX, client.snapshot(ReceiverStream::new(queue))).await;
    let answered = answered.map_err(|_| SendError::Stalled)??;
    call.progress = Some(answered.into_inner());

    let received = heard(&mut call.progress).await?.received;
    if received == 0 && image.offset() > 0 {
        return Err(SendError::Forgotten);
    }
    let mut throttle = Throttle::new(bytes_per_sec);
    let mut chunk = seek(image, received).await?;
    while let Some(data) = chunk {
        throttle.admit(data.len()).await;
        call.push(Part::Data(data)).await?;
        chunk = next_data(image).await?;
    }
    call.push(Part::End(image.offset())).await?;
    while !heard(&mut call.progress).await?.done {}
    Ok(())
}

/// The first bytes of an image from an offset on. If the image is beyond, it is made once more.
async fn seek<I: Image>(image: &mut I, offset: u64) -> Result<Option<Bytes>, SendError> {
    if image.offset() > offset {
        image.restart();
    }
    while image.offset() < offset {
        let Some(chunk) = image.next_chunk()? else { return Err(SendError::Mismatch) };
        if let Some(beyond @ 1..) = image.offset().checked_sub(offset) {
            let beyond = usize::try_from(beyond).unwrap_or(usize::MAX);
            return Ok(Some(chunk.slice(chunk.len().saturating_sub(beyond)..)));
        }
        // Whoever waits for this thread goes first.
        yield_now().await;
    }
    Ok(next_data(image).await?)
}

/// The next bytes of an image, once there are some; `None` at its end.
pub(super) async fn next_data<I: Image>(image: &mut I) -> Result<Option<Bytes>, ImageLost> {
    loop {
        match image.next_chunk()? {
            Some(chunk) if chunk.is_empty() => yield_now().await,
            chunk => return Ok(chunk),
        }
    }
}

/// The sender's ends of the call.
struct Call {
    chunks: mpsc::Sender<SnapshotChunk>,
    progress: Option<tonic::Streaming<SnapshotProgress>>,
}

impl Call {
    /// Queues a chunk once there is room. That the receiver has ended the call is noticed
    /// here, and why.
    async fn push(&mut self, part: Part) -> Result<(), SendError> {
        let Call { chunks, progress } = self;
        let room = timeout(STALL_MAX, async {
            loop {
                tokio::select! {
                    biased;
                    room = chunks.reserve() => return Ok(room.ok()),
                    // A sign of life, or the end.
                    said = heard(progress), if progress.is_some() => said?,
                };
            }
        });
        match room.await {
            Err(_) => Err(SendError::Stalled),
            Ok(Err(error)) => Err(error),
            Ok(Ok(Some(room))) => {
                room.send(SnapshotChunk { part: Some(part) });
                Ok(())
            }
            // Nobody takes chunks any more: the receiver says why.
            Ok(Ok(None)) => loop {
                heard(progress).await?;
            },
        }
    }
}

/// The next thing the receiver says.
async fn heard(
    progress: &mut Option<tonic::Streaming<SnapshotProgress>>,
) -> Result<SnapshotProgress, SendError> {
    let Some(progress) = progress else { return Err(SendError::Ended) };
    let next = timeout(STALL_MAX, progress.message()).await;
    next.map_err(|_| SendError::Stalled)??.ok_or(SendError::Ended)
}

/// Spreads bytes over time: each chunk pays, before the next one goes, for the time it takes.
pub(super) struct Throttle {
    bytes_per_sec: u64,
    next: Instant,
}

impl Throttle {
    /// 0: as fast as it goes.
    pub(super) fn new(bytes_per_sec: u64) -> Throttle {
        Throttle { bytes_per_sec, next: Instant::now() }
    }

    /// Waits until so many bytes may go.
    pub(super) async fn admit(&mut self, bytes: usize) {
        if self.bytes_per_sec == 0 {
            return;
        }
        sleep_until(self.next).await;
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_sec as f64);
        // Sleep lasts longer than it is asked to: what is lost by that is made up for.
        self.next = self.next.max(Instant::now() - OVERDUE_MAX) + takes;
    }
}

/// An image that arrived, whole and intact.
#[derive(Debug)]
pub struct Arrived {
    /// The image.
    pub spool: Spool,
    /// Whose it is, up to which entry, and raft's message that goes with it.
    pub begin: SnapshotBegin,
    /// To be told once the image is in force, or found to be of no use because this member is
    /// ahead of it. Dropped: it will not be in force, and the sender is told to try again.
    pub done: oneshot::Sender<()>,
}

/// Takes an image that arrived. Must not block.
pub type Deliver = Arc<dyn Fn(Arrived) + Send + Sync>;

/// Whether there is room for an image of which so many bytes have arrived, and for what is made
/// of it. Asked for every chunk.
pub type HasRoom = Arc<dyn Fn(u64) -> bool + Send + Sync>;

/// The receiving side. Clones are the same.
#[derive(Clone)]
pub struct Incoming {
    inner: Arc<Inner>,
}

struct Inner {
    spools: Spools,
    has_room: HasRoom,
    deliver: Deliver,
    /// The images that are arriving, or of which a part is kept; the oldest first.
    slots: Mutex<Vec<Arc<Slot>>>,
}

/// What there is of one image.
struct Slot {
    id: u64,
    /// Counts the attempts. When it changes, the attempt before ends.
    attempt: watch::Sender<u64>,
    /// Held by the attempt that is under way.
    spool: Arc<AsyncMutex<Option<Spool>>>,
    /// When something was last done about it.
    touched: Mutex<Instant>,
}

impl Incoming {
    /// Receives into spools in `dir`, or in memory. What an earlier life left there is removed.
    /// Blocks on the disk.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(dir: Option<&Path>, has_room: HasRoom, deliver: Deliver) -> io::Result<Incoming> {
        let spools = Spools::open(dir)?;
        let inner = Inner { spools, has_room, deliver, slots: Mutex::default() };
        Ok(Incoming { inner: Arc::new(inner) })
    }

    /// Takes an image from `chunks`, in a task of its own; what is returned is what the sender
    /// is told. Dropping it interrupts the transfer.
    pub fn receive<S>(&self, chunks: S) -> ReceiverStream<Result<SnapshotProgress, Status>>
    where
        S: Stream<Item = Result<SnapshotChunk, Status>> + Send + Unpin + 'static,
    {
        let (progress, receiver) = mpsc::channel(PROGRESS_MAX);
        let incoming = self.clone();
        tokio::spawn(async move {
            let received = tokio::select! {
                received = incoming.take(chunks, &progress) => received,
                // The sender's end is gone. What has arrived is in its slot.
                () = progress.closed() => Err(Status::cancelled("the sender is gone")),
            };
            if let Err(status) = received {
                tracing::warn!(error = status.message(), "a snapshot did not arrive");
                let _ = progress.send(Err(status)).await;
                drop(progress);
                // What came is kept for a while.
                sleep(SPOOL_KEPT_MAX).await;
                incoming.remove_old();
            }
        });
        ReceiverStream::new(receiver)
    }

    async fn take<S>(
        &self,
        mut chunks: S,
        progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
    ) -> Result<(), Status>
    where
        S: Stream<Item = Result<SnapshotChunk, Status>> + Send + Unpin + 'static,
    {
        let Some(Part::Begin(begin)) = next_part(&mut chunks).await? else {
            return Err(Status::invalid_argument("a snapshot begins with its begin"));
        };
        let slot = self.slot(begin.id)?;
        let spool = self.take_into(&slot, &mut chunks, progress).await?;
        // From here on the same image would be another transfer, from the beginning.
        self.remove(&slot);
        let received = spool.len();
        let (done, in_force) = oneshot::channel();
        tracing::info!(bytes = received, index = begin.index, "received a snapshot");
        (self.inner.deliver)(Arrived { spool, begin, done });
        with_signs_of_life(progress, received, in_force).await?.map_err(|_| {
            Status::unavailable("the snapshot was not installed: the member stops, or failed")
        })?;
        let _ = progress.send(Ok(SnapshotProgress { received, done: true })).await;
        Ok(())
    }

    /// Takes what is missing of an image, and checks it.
    async fn take_into<S>(
        &self,
        slot: &Arc<Slot>,
        chunks: &mut S,
        progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
    ) -> Result<Spool, Status>
    where
        S: Stream<Item = Result<SnapshotChunk, Status>> + Send + Unpin + 'static,
    {
        let mut attempt = 0;
        slot.attempt.send_modify(|attempts| {
            *attempts += 1;
            attempt = *attempts;
        });
        let mut attempts = slot.attempt.subscribe();
        let overtaken = || Status::aborted("another attempt at the same snapshot took over");
        // Whoever had it ends now.
        let mut held = tokio::select! {
            held = Arc::clone(&slot.spool).lock_owned() => held,
            _ = attempts.wait_for(|attempts| *attempts != attempt) => return Err(overtaken()),
        };
        if held.is_none() {
            *held = self.inner.spools.begin().map_err(|error| disk(&error))?;
        }
        let received = held.as_ref().ok_or_else(too_many)?.len();
        tracing::info!(received, "receiving a snapshot");
        let _ = progress.send(Ok(SnapshotProgress { received, done: false })).await;
        loop {
            let part = tokio::select! {
                part = next_part(chunks) => part?,
                _ = attempts.wait_for(|attempts| *attempts != attempt) => return Err(overtaken()),
            };
            *slot.touched.lock() = Instant::now();
            match part {
                Some(Part::Data(data)) => {
                    let expected = held.as_ref().map_or(0, Spool::len) + data.len() as u64;
                    if !(self.inner.has_room)(expected) {
                        // What there is of it takes space, and would be kept for a while.
                        *held = None;
                        self.remove(slot);
                        return Err(no_room());
                    }
                    // It stays in the slot if this is given up meanwhile.
                    let appending = tokio::task::spawn_blocking(move || {
                        let appended = held.as_mut().map(|spool| spool.append(data));
                        (held, appended)
                    });
                    let (back, appended) =
                        appending.await.map_err(|error| Status::internal(error.to_string()))?;
                    held = back;
                    appended.ok_or_else(too_many)?.map_err(|error| disk(&error))?;
                }
                Some(Part::End(len)) => {
                    let spool = held.take().ok_or_else(too_many)?;
                    let received = spool.len();
                    if received != len {
                        return Err(Status::data_loss(format!(
                            "{received} bytes of a snapshot of {len} have arrived"
                        )));
                    }
                    let checked = tokio::task::spawn_blocking(move || {
                        let mut spool = spool;
                        spool.verify().map(|()| spool)
                    });
                    let checked = with_signs_of_life(progress, received, checked).await?;
                    return match checked {
                        Ok(Ok(spool)) => Ok(spool),
                        Ok(Err(error)) => Err(Status::data_loss(error.to_string())),
                        Err(error) => Err(Status::internal(error.to_string())),
                    };
                }
                Some(Part::Begin(_)) => {
                    return Err(Status::invalid_argument("a snapshot that begins twice"));
                }
                None => return Err(Status::aborted("the snapshot ended before its end")),
            }
        }
    }

    /// The slot of an image: the one that is there, or a new one.
    fn slot(&self, id: u64) -> Result<Arc<Slot>, Status> {
        let mut slots = self.inner.slots.lock();
        if let Some(slot) = slots.iter().find(|slot| slot.id == id) {
            return Ok(Arc::clone(slot));
        }
        if slots.len() >= SPOOLS_MAX {
            // One that nobody is sending. Its spool goes with it.
            let idle = slots.iter().position(|slot| slot.spool.try_lock().is_ok());
            let idle = idle.ok_or_else(too_many)?;
            slots.remove(idle);
        }
        let slot = Arc::new(Slot {
            id,
            attempt: watch::Sender::new(0),
            spool: Arc::default(),
            touched: Mutex::new(Instant::now()),
        });
        slots.push(Arc::clone(&slot));
        Ok(slot)
    }

    fn remove(&self, slot: &Arc<Slot>) {
        self.inner.slots.lock().retain(|other| !Arc::ptr_eq(other, slot));
    }

    /// Gives up what nobody has come back for.
    fn remove_old(&self) {
        self.inner.slots.lock().retain(|slot| {
            let is_busy = slot.spool.try_lock().is_err();
            is_busy || slot.touched.lock().elapsed() < SPOOL_KEPT_MAX
        });
    }
}

/// The next part of a snapshot; `None` when the sender has ended the call.
async fn next_part<S>(chunks: &mut S) -> Result<Option<Part>, Status>
where
    S: Stream<Item = Result<SnapshotChunk, Status>> + Unpin,
{
    match timeout(STALL_MAX, chunks.next()).await {
        Err(_) => Err(Status::deadline_exceeded("nothing of the snapshot came for too long")),
        Ok(None) => Ok(None),
        Ok(Some(Err(status))) => Err(status),
        Ok(Some(Ok(SnapshotChunk { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(SnapshotChunk { part: None }))) => {
            Err(Status::invalid_argument("a part of a snapshot that is none"))
        }
    }
}

/// Waits for `work`, and tells the sender now and then that somebody does.
async fn with_signs_of_life<W: Future>(
    progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
    received: u64,
    work: W,
) -> Result<W::Output, Status> {
    let mut work = std::pin::pin!(work);
    let mut signs = interval(SIGN_OF_LIFE);
    loop {
        tokio::select! {
            finished = &mut work => return Ok(finished),
            _ = signs.tick() => {
                let sign = SnapshotProgress { received, done: false };
                progress.send(Ok(sign)).await.map_err(|_| Status::cancelled("the sender is gone"))?;
            }
        }
    }
}

fn disk(error: &io::Error) -> Status {
    Status::unavailable(format!("cannot keep the snapshot: {error}"))
}

fn no_room() -> Status {
    Status::resource_exhausted(
        "kvorum: the disk of the member that fell behind has no room for a snapshot: give it more",
    )
}

fn too_many() -> Status {
    Status::resource_exhausted(format!("{SPOOLS_MAX} snapshots are arriving already"))
}

#[cfg(test)]
mod tests;
