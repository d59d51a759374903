use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::codegen::Service;

use super::*;
use crate::storage::Table;
use crate::storage::image::ImageWriter;

/// An image of `len` records, in chunks of some bytes, that can be lost on the way.
#[derive(Debug, Clone)]
struct Made {
    id: u64,
    bytes: Bytes,
    offset: usize,
    chunk_bytes: usize,
    lost_at: usize,
    restarts: usize,
}

impl Made {
    fn new(id: u64, records: usize) -> Made {
        let mut writer = ImageWriter::new();
        for record in 0..records {
            writer.put(Table::Mvcc, &record.to_be_bytes(), [b"0", &[7; 90]]);
        }
        writer.end(b"head", b"the head");
        let mut bytes = Vec::new();
        while let Some(chunk) = writer.take() {
            bytes.extend_from_slice(&chunk);
        }
        let bytes = Bytes::from(bytes);
        Made { id, bytes, offset: 0, chunk_bytes: 100, lost_at: usize::MAX, restarts: 0 }
    }
}

impl Image for Made {
    fn id(&self) -> u64 {
        self.id
    }

    fn index(&self) -> u64 {
        10
    }

    fn term(&self) -> u64 {
        2
    }

    fn offset(&self) -> u64 {
        self.offset as u64
    }

    fn restart(&mut self) {
        self.offset = 0;
        self.restarts += 1;
    }

    fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost> {
        if self.offset >= self.lost_at {
            return Err(ImageLost::Replaced);
        }
        let to = self.bytes.len().min(self.offset + self.chunk_bytes);
        let chunk = self.bytes.slice(self.offset..to);
        self.offset = to;
        Ok((!chunk.is_empty()).then_some(chunk))
    }
}

/// The receiver's service, called without a socket.
#[derive(Clone)]
struct Direct(Incoming);

impl tonic::server::StreamingService<SnapshotChunk> for Direct {
    type Response = SnapshotProgress;
    type ResponseStream = ReceiverStream<Result<SnapshotProgress, Status>>;
    type Future = Ready<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<tonic::Streaming<SnapshotChunk>>) -> Self::Future {
        ready(Ok(tonic::Response::new(self.0.receive(request.into_inner()))))
    }
}

impl Service<http::Request<tonic::body::Body>> for Direct {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::default();
            Ok(tonic::server::Grpc::new(codec).streaming(service, request).await)
        })
    }
}

/// A receiver, and what arrives there.
fn receiver(dir: Option<&Path>) -> (Incoming, mpsc::UnboundedReceiver<Arrived>) {
    let (sender, arrived) = mpsc::unbounded_channel();
    let deliver = move |image| drop(sender.send(image));
    (Incoming::open(dir, Arc::new(|_| true), Arc::new(deliver)).expect("opened"), arrived)
}

async fn send_to(incoming: &Incoming, image: &mut Made) -> Result<(), SendError> {
    send(PeerClient::new(Direct(incoming.clone())), image, Bytes::from_static(b"message"), 0).await
}

/// An attempt whose chunks a test hands over one by one.
struct ByHand {
    chunks: Option<mpsc::UnboundedSender<Result<SnapshotChunk, Status>>>,
    progress: ReceiverStream<Result<SnapshotProgress, Status>>,
}

impl ByHand {
    fn begin(incoming: &Incoming, id: u64) -> ByHand {
        let (chunks, queue) = mpsc::unbounded_channel();
        let progress = incoming.receive(UnboundedReceiverStream::new(queue));
        let by_hand = ByHand { chunks: Some(chunks), progress };
        by_hand.push(Part::Begin(SnapshotBegin { id, ..SnapshotBegin::default() }));
        by_hand
    }

    fn push(&self, part: Part) {
        let chunks = self.chunks.as_ref().expect("it has not ended");
        chunks.send(Ok(SnapshotChunk { part: Some(part) })).expect("it is received");
    }

    async fn received(&mut self) -> Result<u64, Code> {
        let progress = self.progress.next().await.expect("an answer");
        progress.map(|progress| progress.received).map_err(|status| status.code())
    }

    /// Hands over bytes, ends the call, and waits until the receiver has seen that.
    async fn interrupted_after(mut self, data: Bytes) {
        self.received().await.expect("it is taken");
        self.push(Part::Data(data));
        self.chunks = None;
        assert_eq!(self.received().await, Err(Code::Aborted));
    }
}

#[tokio::test]
async fn an_image_arrives_and_is_done_when_it_is_in_force() {
    let dir = tempfile::tempdir().expect("a directory");
    for dir in [None, Some(dir.path())] {
        let (incoming, mut arrived) = receiver(dir);
        let mut image = Made::new(1, 100);
        let sending = tokio::spawn({
            let incoming = incoming.clone();
            async move { send_to(&incoming, &mut image).await }
        });
        let Arrived { mut spool, begin, done } = arrived.recv().await.expect("it arrives");
        spool.verify().expect("intact");
        assert_eq!((begin.id, begin.index, begin.term), (1, 10, 2));
        assert_eq!(begin.message, "message");
        assert!(!sending.is_finished());
        done.send(()).expect("somebody waits");
        sending.await.expect("no panic").expect("it is in force");
    }
}

#[tokio::test]
async fn an_image_is_refused_and_given_up_when_the_disk_has_no_room_for_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let has_room = |bytes| bytes <= 1000;
    let deliver = |_| panic!("it is not whole");
    let incoming = Incoming::open(Some(dir.path()), Arc::new(has_room), Arc::new(deliver));
    let mut sender = ByHand::begin(&incoming.expect("opened"), 1);
    assert_eq!(sender.received().await, Ok(0));
    sender.push(Part::Data(vec![0; 1000].into()));
    sender.push(Part::Data(vec![0; 1].into()));
    assert_eq!(sender.received().await, Err(Code::ResourceExhausted));
    assert_eq!(std::fs::read_dir(dir.path()).expect("the directory").count(), 0);
}

/// What was written since the image was made would be more for it to catch up with than a new
/// image leaves.
#[tokio::test]
async fn an_image_is_not_sent_again_from_its_beginning_to_who_has_nothing_of_it() {
    let (incoming, mut arrived) = receiver(None);
    let mut image = Made::new(7, 20);
    image.offset = 1;
    let error = send_to(&incoming, &mut image).await.expect_err("it has lost what it had");
    assert!(matches!(error, SendError::Forgotten), "{error}");
    assert!(!error.may_be_resumed());
    assert!(arrived.try_recv().is_err());
}

/// Wherever it was interrupted, and wherever the sender then is, what has arrived is not sent
/// again.
#[tokio::test]
async fn an_interrupted_image_goes_on_where_it_was() {
    let whole = Made::new(7, 20);
    for offset in (1..whole.bytes.len()).step_by(37) {
        for ahead in [0, offset, whole.bytes.len()] {
            let (incoming, mut arrived) = receiver(None);
            let first = ByHand::begin(&incoming, 7);
            first.interrupted_after(whole.bytes.slice(..offset)).await;

            let mut image = Made { offset: ahead, ..whole.clone() };
            let sending =
                tokio::spawn(async move { (send_to(&incoming, &mut image).await, image) });
            let Arrived { mut spool, done, .. } = arrived.recv().await.expect("it arrives");
            assert_eq!(spool.len(), whole.bytes.len() as u64);
            spool.verify().expect("intact");
            done.send(()).expect("somebody waits");
            let (sent, image) = sending.await.expect("no panic");
            sent.expect("it is in force");
            assert_eq!(image.restarts, usize::from(ahead > offset));
        }
    }
}

#[tokio::test]
async fn what_is_not_as_it_was_made_is_not_delivered_and_not_kept() {
    let (incoming, mut arrived) = receiver(None);
    let intact = Made::new(1, 100);
    let mut damaged = intact.bytes.to_vec();
    damaged[500] ^= 1;
    let mut image = Made { bytes: Bytes::from(damaged), ..intact.clone() };
    let error = send_to(&incoming, &mut image).await.expect_err("refused");
    assert!(!error.may_be_resumed(), "{error}");

    // The receiver has more than there is.
    ByHand::begin(&incoming, 2).interrupted_after(Bytes::from(vec![0; 100_000])).await;
    let mut image = Made { id: 2, ..intact };
    let error = send_to(&incoming, &mut image).await.expect_err("refused");
    assert!(matches!(error, SendError::Mismatch), "{error}");
    assert!(arrived.try_recv().is_err());
}

#[tokio::test]
async fn an_image_that_is_lost_or_not_installed_is_an_error() {
    let (incoming, mut arrived) = receiver(None);
    let mut image = Made { lost_at: 500, ..Made::new(1, 100) };
    let error = send_to(&incoming, &mut image).await.expect_err("lost");
    assert!(matches!(error, SendError::Lost(ImageLost::Replaced)), "{error}");

    let mut image = Made::new(2, 100);
    let sending = tokio::spawn(async move { send_to(&incoming, &mut image).await });
    drop(arrived.recv().await.expect("it arrives"));
    let error = sending.await.expect("no panic").expect_err("not in force");
    assert!(error.may_be_resumed(), "{error}");
}

#[tokio::test]
async fn images_of_two_senders_do_not_meet_and_a_third_waits_for_room() {
    let (incoming, mut arrived) = receiver(None);
    let mut first = ByHand::begin(&incoming, 1);
    let mut second = ByHand::begin(&incoming, 2);
    assert_eq!((first.received().await, second.received().await), (Ok(0), Ok(0)));
    let mut third = ByHand::begin(&incoming, 3);
    assert_eq!(third.received().await, Err(Code::ResourceExhausted));

    for (by_hand, id) in [(&first, 1), (&second, 2)] {
        let bytes = Made::new(id, 10 + id as usize).bytes;
        let len = bytes.len() as u64;
        by_hand.push(Part::Data(bytes));
        by_hand.push(Part::End(len));
    }
    let mut ids = Vec::new();
    for _ in 0..2 {
        let Arrived { spool, begin, done } = arrived.recv().await.expect("it arrives");
        assert_eq!(spool.len(), Made::new(begin.id, 10 + begin.id as usize).bytes.len() as u64);
        ids.push(begin.id);
        drop(spool);
        done.send(()).expect("somebody waits");
    }
    ids.sort_unstable();
    assert_eq!(ids, [1, 2]);
    let mut third = ByHand::begin(&incoming, 3);
    assert_eq!(third.received().await, Ok(0));
}

/// What nobody is sending makes room for what somebody is.
#[tokio::test]
async fn interrupted_images_make_room_the_oldest_first() {
    let (incoming, _arrived) = receiver(None);
    for id in 1..=3 {
        ByHand::begin(&incoming, id).interrupted_after(Bytes::from(vec![0; 10])).await;
    }
    assert_eq!(ByHand::begin(&incoming, 3).received().await, Ok(10));
    assert_eq!(ByHand::begin(&incoming, 2).received().await, Ok(10));
    assert_eq!(ByHand::begin(&incoming, 1).received().await, Ok(0));
}

#[tokio::test]
async fn of_two_attempts_at_the_same_image_the_later_goes_on() {
    let (incoming, mut arrived) = receiver(None);
    let mut image = Made::new(1, 100);
    let mut first = ByHand::begin(&incoming, 1);
    assert_eq!(first.received().await, Ok(0));
    first.push(Part::Data(image.bytes.slice(..1000)));
    let sending = tokio::spawn(async move { send_to(&incoming, &mut image).await });
    let Arrived { mut spool, done, .. } = arrived.recv().await.expect("it arrives");
    spool.verify().expect("intact");
    done.send(()).expect("somebody waits");
    sending.await.expect("no panic").expect("it is in force");
    assert_eq!(first.received().await, Err(Code::Aborted));
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_ever_and_nothing_is_kept_for_ever() {
    let (incoming, _arrived) = receiver(None);
    let mut silent = ByHand::begin(&incoming, 1);
    assert_eq!(silent.received().await, Ok(0));
    let began = Instant::now();
    assert_eq!(silent.received().await, Err(Code::DeadlineExceeded));
    assert_eq!(began.elapsed().as_secs(), STALL_MAX.as_secs());
    assert_eq!(incoming.inner.slots.lock().len(), 1);
    sleep(SPOOL_KEPT_MAX * 2).await;
    assert_eq!(incoming.inner.slots.lock().len(), 0);

    // A receiver that takes the call and says nothing.
    let deaf = tower::service_fn(|request: http::Request<tonic::body::Body>| async move {
        let body = tonic::body::Body::new(request.into_body());
        let mut response = http::Response::new(body);
        std::future::pending::<()>().await;
        response.headers_mut().clear();
        Ok::<_, Infallible>(response)
    });
    let mut image = Made::new(2, 100);
    let error = send(PeerClient::new(deaf), &mut image, Bytes::new(), 0).await;
    assert!(matches!(error, Err(SendError::Stalled)), "{error:?}");
}

/// The clock that it sleeps by has ticks of a millisecond.
#[tokio::test(start_paused = true)]
async fn a_throttle_is_as_fast_as_it_says() {
    let mut throttle = Throttle::new(1500);
    let began = Instant::now();
    for _ in 0..1500 {
        throttle.admit(1).await;
    }
    let took = began.elapsed().as_secs_f64();
    assert!((0.9..1.01).contains(&took), "{took} s for one second's worth");

    // Of what was not used no more than `OVERDUE_MAX` is made up for.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let began = Instant::now();
    for _ in 0..1500 {
        throttle.admit(1).await;
    }
    let took = began.elapsed().as_secs_f64();
    assert!((0.85..1.01).contains(&took), "{took} s for one second's worth");
}

#[tokio::test(start_paused = true)]
async fn a_throttle_spreads_the_bytes_over_time() {
    let (incoming, mut arrived) = receiver(None);
    let mut image = Made::new(1, 1000);
    let bytes = image.bytes.len() as u64;
    let began = Instant::now();
    let client = PeerClient::new(Direct(incoming));
    let sending =
        tokio::spawn(async move { send(client, &mut image, Bytes::new(), bytes / 10).await });
    arrived.recv().await.expect("it arrives").done.send(()).expect("somebody waits");
    sending.await.expect("no panic").expect("it is in force");
    let took = began.elapsed().as_secs_f64();
    assert!((9.0..12.0).contains(&took), "{took} s for ten seconds' worth");
}
