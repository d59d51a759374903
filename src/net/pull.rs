//! Images that a member asks for, over `Peer.PullImage`: its own state is damaged, and without
//! one it cannot take part in raft, which else would see to it that it is sent an image.
//!
//! ```text
//! asks                                      is asked
//! at least up to entry 4711 ──────────────▶ does the state go so far?
//!       spool ◀── begin, data …, end ─────  the image of the present state
//! ```
//!
//! The bytes are those of [`super::snapshot`], in the other direction, and simpler: an attempt
//! that fails leaves nothing, and the next begins at the beginning, at this peer or another.
//! Both ends notice within [`STALL_MAX`] that the other is gone; the one that is asked has
//! [`CHUNKS_IN_FLIGHT`] chunks waiting at most.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::snapshot::{CHUNKS_IN_FLIGHT, HasRoom, Image, STALL_MAX, Throttle, next_data};
use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::snapshot_chunk::Part;
use crate::pb::kvorumpb::{PullImageRequest, SnapshotBegin, SnapshotChunk};
use crate::storage::spool::{Spool, Spools};

/// An image on its way to whoever asked for it.
pub type ImageChunks = Pin<Box<dyn Stream<Item = Result<SnapshotChunk, Status>> + Send>>;

/// An image that was asked for, whole and intact.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub spool: Spool,
    /// Up to which entry.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
}

/// Why an image that was asked for did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The peer, or the way to it, failed; or it has none to give.
    #[error("{}", said(.0))]
    Refused(#[from] Status),
    /// Nothing was heard for [`STALL_MAX`].
    #[error("nothing came for {} s", STALL_MAX.as_secs())]
    Stalled,
    /// What came is not what a peer of this version sends.
    #[error("what came is no snapshot: {0}")]
    Malformed(String),
    /// It has to be kept somewhere.
    #[error("the disk of this member has no room for the snapshot: free some space")]
    NoRoom,
    /// The disk of this member failed.
    #[error("cannot keep the snapshot: {0}")]
    Disk(#[from] std::io::Error),
}

/// tonic says "transport error" of whatever led to it.
fn said(status: &Status) -> String {
    let cause = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    let mut cause = cause.filter(|_| text.is_empty() || text == "transport error");
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Gives out an image, in a task of its own, `bytes_per_sec` at most (0: as fast as it goes).
/// `hold` is dropped at the end, or when whoever asked is gone.
pub fn offer<I: Image>(mut image: I, bytes_per_sec: u64, hold: impl Send + 'static) -> ImageChunks {
    let (chunks, stream) = mpsc::channel(CHUNKS_IN_FLIGHT);
    tokio::spawn(async move {
        let _hold = hold;
        // One whose transfer was interrupted before may be anywhere.
        if image.offset() > 0 {
            image.restart();
        }
        let (id, index, term) = (image.id(), image.index(), image.term());
        let mut part = Part::Begin(SnapshotBegin { id, index, term, message: Default::default() });
        let mut throttle = Throttle::new(bytes_per_sec);
        loop {
            let is_end = matches!(part, Part::End(_));
            let chunk = SnapshotChunk { part: Some(part) };
            if !matches!(timeout(STALL_MAX, chunks.send(Ok(chunk))).await, Ok(Ok(()))) || is_end {
                return;
            }
            part = match next_data(&mut image).await {
                Ok(Some(data)) => {
                    throttle.admit(data.len()).await;
                    Part::Data(data)
                }
                Ok(None) => Part::End(image.offset()),
                Err(lost) => {
                    // What it keeps goes at once: nobody need take the news.
                    drop(image);
                    let lost = Err(Status::aborted(lost.to_string()));
                    let _ = timeout(STALL_MAX, chunks.send(lost)).await;
                    return;
                }
            };
        }
    });
    Box::pin(ReceiverStream::new(stream))
}

/// Asks a peer for its state, which has to go at least up to the entry `at_least`, and keeps
/// it in a spool. Dropping the future ends the call, and leaves nothing.
///
/// # Errors
/// [`PullError`]; nothing is kept then.
pub async fn pull<T>(
    mut client: PeerClient<T>,
    at_least: u64,
    spools: &Spools,
    has_room: &HasRoom,
) -> Result<Pulled, PullError>
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let malformed = |what: &str| PullError::Malformed(what.to_owned());
    let call = timeout(STALL_MAX, client.pull_image(PullImageRequest { at_least })).await;
    let mut chunks = call.map_err(|_| PullError::Stalled)??.into_inner();
    let mut begin: Option<SnapshotBegin> = None;
    let mut spool = spools.begin()?.ok_or(PullError::NoRoom)?;
    loop {
        let chunk =
            timeout(STALL_MAX, chunks.message()).await.map_err(|_| PullError::Stalled)??;
        match chunk.and_then(|chunk| chunk.part) {
            Some(Part::Begin(first)) if begin.is_none() => begin = Some(first),
            Some(Part::Data(data)) => {
                if !has_room(spool.len() + data.len() as u64) {
                    return Err(PullError::NoRoom);
                }
                spool = blocking(move || spool.append(data).map(|()| spool)).await??;
            }
            Some(Part::End(len)) => {
                let begin = begin.ok_or_else(|| malformed("it does not say where it ends"))?;
                if spool.len() != len {
                    return Err(malformed("some of it is missing"));
                }
                let checked = blocking(move || spool.verify().map(|()| spool)).await?;
                let spool = checked.map_err(|error| PullError::Malformed(error.to_string()))?;
                return Ok(Pulled { spool, index: begin.index, term: begin.term });
            }
            Some(Part::Begin(_)) => return Err(malformed("it begins twice")),
            None => return Err(malformed("it ended before its end")),
        }
    }
}

/// Does what blocks on the disk where that is allowed.
async fn blocking<R: Send + 'static>(
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, PullError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| PullError::Disk(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::{Ready, ready};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use bytes::Bytes;
    use tonic::Response;

    use super::super::snapshot::ImageLost;
    use super::*;
    use crate::storage::Table;
    use crate::storage::image::ImageWriter;

    /// An image in pieces, of which so many can be had.
    struct Pieces {
        pieces: Vec<Bytes>,
        next: usize,
        lost_at: usize,
    }

    impl Image for Pieces {
        fn id(&self) -> u64 {
            7
        }
        fn index(&self) -> u64 {
            42
        }
        fn term(&self) -> u64 {
            3
        }
        fn offset(&self) -> u64 {
            self.pieces.iter().take(self.next).map(|piece| piece.len() as u64).sum()
        }
        fn restart(&mut self) {
            self.next = 0;
        }
        fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost> {
            if self.next == self.lost_at {
                return Err(ImageLost::Replaced);
            }
            self.next += 1;
            Ok(self.pieces.get(self.next - 1).cloned())
        }
    }

    fn pieces() -> Pieces {
        let mut writer = ImageWriter::new();
        for key in 0..4_u8 {
            writer.put(Table::Mvcc, &[key], [&[], &vec![key; 200_000]]);
        }
        writer.end(b"head", b"the head");
        let pieces = std::iter::from_fn(|| writer.take()).collect();
        // As if a transfer to the same member had been interrupted.
        Pieces { pieces, next: 2, lost_at: usize::MAX }
    }

    /// A peer that answers with this, called without a socket.
    struct Answers(Option<ImageChunks>);

    impl tonic::server::ServerStreamingService<PullImageRequest> for Answers {
        type Response = SnapshotChunk;
        type ResponseStream = ImageChunks;
        type Future = Ready<Result<Response<ImageChunks>, Status>>;

        fn call(&mut self, _: tonic::Request<PullImageRequest>) -> Self::Future {
            ready(self.0.take().map(Response::new).ok_or_else(|| Status::aborted("once")))
        }
    }

    async fn pull_of(chunks: ImageChunks, room: bool) -> Result<Pulled, PullError> {
        let answers = Arc::new(parking_lot::Mutex::new(Some(chunks)));
        let service = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
            let answer = Answers(answers.lock().take());
            async move {
                let codec = tonic_prost::ProstCodec::default();
                let mut grpc = tonic::server::Grpc::new(codec);
                Ok::<_, Infallible>(grpc.server_streaming(answer, request).await)
            }
        });
        let spools = Spools::open(None).expect("in memory");
        let has_room: HasRoom = Arc::new(move |_| room);
        pull(PeerClient::new(service), 1, &spools, &has_room).await
    }

    fn answer(parts: Vec<Part>) -> ImageChunks {
        let chunks = parts.into_iter().map(|part| Ok(SnapshotChunk { part: Some(part) }));
        Box::pin(tokio_stream::iter(chunks.collect::<Vec<_>>()))
    }

    #[tokio::test]
    async fn an_image_that_is_offered_arrives_from_its_beginning() {
        let held = Arc::new(());
        let mut pulled =
            pull_of(offer(pieces(), 0, Arc::clone(&held)), true).await.expect("it arrives");
        assert_eq!((pulled.index, pulled.term), (42, 3));
        let whole: usize = pieces().pieces.iter().map(Bytes::len).sum();
        assert_eq!(pulled.spool.len(), whole as u64);
        pulled.spool.verify().expect("as it was made");
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_is_no_whole_image_is_refused() {
        let lost = Pieces { lost_at: 2, ..pieces() };
        let error = pull_of(offer(lost, 0, ()), true).await.expect_err("the rest is lost");
        assert!(error.to_string().contains("replaced while its image"), "{error}");
        let error = pull_of(offer(pieces(), 0, ()), false).await.expect_err("no room");
        assert!(matches!(error, PullError::NoRoom), "{error}");
        let begin = || Part::Begin(SnapshotBegin::default());
        for (parts, words) in [
            (vec![], "ended before its end"),
            (vec![begin(), begin()], "begins twice"),
            (vec![begin(), Part::Data("x".into())], "ended before its end"),
            (vec![begin(), Part::Data("x".into()), Part::End(2)], "some of it is missing"),
            (vec![Part::End(0)], "does not say where it ends"),
            (vec![begin(), Part::Data(vec![7; 100].into()), Part::End(100)], "no snapshot"),
        ] {
            let error = pull_of(answer(parts), true).await.expect_err(words).to_string();
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_falls_silent_is_given_up() {
        let silent = tokio_stream::pending::<Result<SnapshotChunk, Status>>();
        let error = pull_of(Box::pin(silent), true).await.expect_err("nothing comes");
        assert!(matches!(error, PullError::Stalled), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_asked_and_takes_nothing_is_given_up() {
        /// Ends never, or by being lost after so many chunks.
        struct Endless(Arc<AtomicU64>, u64);
        impl Image for Endless {
            fn id(&self) -> u64 {
                1
            }
            fn index(&self) -> u64 {
                1
            }
            fn term(&self) -> u64 {
                1
            }
            fn offset(&self) -> u64 {
                0
            }
            fn restart(&mut self) {}
            fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost> {
                match self.0.fetch_add(1, Ordering::Relaxed) < self.1 {
                    true => Ok(Some("x".into())),
                    false => Err(ImageLost::TooMuchHeld),
                }
            }
        }
        let fit = CHUNKS_IN_FLIGHT as u64 - 1;
        for (lost_after, keeps_until) in [(u64::MAX, STALL_MAX), (fit, Duration::ZERO)] {
            let (made, held) = (Arc::new(AtomicU64::new(0)), Arc::new(()));
            let chunks = offer(Endless(Arc::clone(&made), lost_after), 0, Arc::clone(&held));
            let began = tokio::time::Instant::now();
            let gone = async |what: &dyn Fn() -> bool| {
                while !what() {
                    assert!(began.elapsed() < 2 * STALL_MAX, "it is never given up");
                    tokio::time::sleep(STALL_MAX / 10).await;
                }
                began.elapsed()
            };
            // With the image goes its pin.
            let kept = gone(&|| Arc::strong_count(&made) == 1).await;
            assert!(kept >= keeps_until && kept < keeps_until + STALL_MAX / 2, "{kept:?}");
            assert!(gone(&|| Arc::strong_count(&held) == 1).await >= STALL_MAX);
            assert!(made.load(Ordering::Relaxed) <= CHUNKS_IN_FLIGHT as u64 + 1);
            drop(chunks);
        }
    }
}
