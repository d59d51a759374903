//! A state is sent to another member while writes and compactions go on, is interrupted twice,
//! and arrives as it was when it was begun. `KVORUM_SNAPSHOT_MIB` says how large it is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use kvorum::log::Mark;
use kvorum::net::snapshot::{Arrived, Image, ImageLost, Incoming, SendError, send};
use kvorum::pb::etcdserverpb::{CompactionRequest, PutRequest};
use kvorum::pb::kvorumpb::peer_client::PeerClient;
use kvorum::pb::kvorumpb::{Command, SnapshotChunk, SnapshotProgress, command::Request};
use kvorum::runtime::image::{Source, fill};
use kvorum::runtime::pins::Pins;
use kvorum::state::members::Members;
use kvorum::state::{Effects, StateMachine};
use kvorum::storage::SledStorage;
use parking_lot::RwLock;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

const VALUE_BYTES: u64 = 1024;
const BYTES_PER_SEC: u64 = 256 << 20;

fn apply(state: &RwLock<StateMachine>, request: Request) {
    let mut state = state.write();
    let entry = Mark { index: state.applied().index + 1, term: 1 };
    let command = Command { header: None, request: Some(request) };
    state.apply(entry, command, &mut Effects::default()).unwrap();
    // As the checkpoint does, now and then.
    if entry.index.is_multiple_of(1000) {
        state.cut();
    }
}

fn put(key: u64, fill: u8) -> Request {
    let value = Bytes::from(vec![fill; VALUE_BYTES as usize]);
    Request::Put(PutRequest { key: format!("key {key}").into(), value, ..PutRequest::default() })
}

/// A source that says that it is lost when it comes to an offset.
struct Lossy {
    source: Source,
    at: u64,
}

impl Image for Lossy {
    fn id(&self) -> u64 {
        self.source.id()
    }
    fn index(&self) -> u64 {
        self.source.index()
    }
    fn term(&self) -> u64 {
        self.source.term()
    }
    fn offset(&self) -> u64 {
        self.source.offset()
    }
    fn restart(&mut self) {
        self.source.restart();
    }
    fn next_chunk(&mut self) -> Result<Option<Bytes>, ImageLost> {
        if self.source.offset() >= self.at {
            Err(ImageLost::Replaced)
        } else {
            self.source.next_chunk()
        }
    }
}

/// The receiver's service, called without a socket.
struct Direct(Incoming);

impl tonic::server::StreamingService<SnapshotChunk> for Direct {
    type Response = SnapshotProgress;
    type ResponseStream = ReceiverStream<Result<SnapshotProgress, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<SnapshotChunk>>) -> Self::Future {
        ready(Ok(Response::new(self.0.receive(request.into_inner()))))
    }
}

async fn send_to(incoming: &Incoming, image: &mut Lossy) -> Result<(), SendError> {
    let incoming = incoming.clone();
    let service = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let direct = Direct(incoming.clone());
        async move {
            let codec = tonic_prost::ProstCodec::default();
            Ok::<_, Infallible>(tonic::server::Grpc::new(codec).streaming(direct, request).await)
        }
    });
    send(PeerClient::new(service), image, Bytes::new(), BYTES_PER_SEC).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_arrives_as_it_was_though_interrupted_twice() {
    let mib = std::env::var("KVORUM_SNAPSHOT_MIB").map_or(16, |mib| mib.parse().unwrap());
    let keys = (mib << 20) / VALUE_BYTES;
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    let cluster_id = members.cluster_id();
    let state = StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned());
    let state = Arc::new(RwLock::new(state));
    for key in 0..keys {
        apply(&state, put(key, 1));
    }
    let pins: Arc<Pins> = Arc::default();
    let (hash, revision) = (state.read().hash(), state.read().store().revision());
    let source = Source::new(1, &state, &pins);

    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (state, pins, stop) = (Arc::clone(&state), Arc::clone(&pins), Arc::clone(&stop));
        move || {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) && written < keys {
                apply(&state, put(written * 7 % keys, 2));
                written += 1;
                if written.is_multiple_of(100) {
                    let revision = state.read().store().revision();
                    let request = CompactionRequest { revision, physical: false };
                    apply(&state, Request::Compaction(request));
                }
                state.write().compact_step(pins.lowest().unwrap_or(i64::MAX), 100);
            }
            written
        }
    });

    let dir = tempfile::tempdir().unwrap();
    let (sender, mut arrived) = mpsc::unbounded_channel();
    let deliver = move |image| drop(sender.send(image));
    let incoming =
        Incoming::open(Some(&dir.path().join("snap")), Arc::new(|_| true), Arc::new(deliver))
            .unwrap();
    let whole = mib << 20;
    let mut image = Lossy { source, at: whole / 3 };
    for next in [whole / 3 * 2, u64::MAX] {
        let lost = send_to(&incoming, &mut image).await;
        assert!(matches!(lost, Err(SendError::Lost(_))), "{lost:?}");
        image.at = next;
    }
    let sending = tokio::spawn(async move { send_to(&incoming, &mut image).await });
    let Arrived { mut spool, done, .. } = arrived.recv().await.unwrap();
    let filled = tokio::task::spawn_blocking(move || {
        let mut storage = SledStorage::open(&dir.path().join("ckpt-1")).unwrap();
        let restored = fill(&mut spool, &mut storage, cluster_id, 7, &|| false).unwrap();
        StateMachine::restore(restored)
    });
    let filled = filled.await.unwrap();
    done.send(()).unwrap();
    sending.await.unwrap().unwrap();
    stop.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() > 0, "writes went on");

    assert_eq!((filled.hash(), filled.store().revision()), (hash, revision));
    assert_eq!(filled.member_id(), 7);
    assert_eq!(pins.readers(), 0);
}
