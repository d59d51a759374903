use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::Code;
use url::Url;

use super::super::connector::connector;
use super::super::listener::{self, Listener, ServeOptions, SocketOptions};
use super::super::tls::client::{ClientTls, ClientTlsSettings};
use super::super::tls::tests::TestCa;
use super::super::tls::{AutoTls, Side, Tls, TlsSettings};
use super::*;
use crate::net::identity::Identity;
use crate::net::{BULK_QUEUE_BYTES, Connector, Lane, PeerAddress, PeerEvent, Peers};
use crate::pb::kvorumpb::peer_client::PeerClient;
use crate::pb::kvorumpb::refusal::Reason;
use crate::pb::kvorumpb::{MemberRecord, RollingHash, SnapshotProgress, snapshot_chunk};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const CLUSTER: u64 = 0xc1;
/// The member that listens, and the one that sends.
const A: u64 = 0xa;
const B: u64 = 0xb;

/// A member that notes what it is told.
struct Fake {
    removed: Mutex<BTreeSet<u64>>,
    received: mpsc::UnboundedSender<(u64, Bytes)>,
    answer: Mutex<Option<Error>>,
}

#[tonic::async_trait]
impl Receiver for Fake {
    fn identity(&self) -> Identity {
        Identity { cluster_id: CLUSTER, member_id: A }
    }

    fn is_removed(&self, member: u64) -> bool {
        self.removed.lock().contains(&member)
    }

    fn messages(&self, from: u64, messages: Vec<Bytes>) {
        for message in messages {
            let _ = self.received.send((from, message));
        }
    }

    fn snapshot(&self, _from: u64, chunks: Streaming<SnapshotChunk>) -> SnapshotReplies {
        use tokio_stream::StreamExt as _;
        let length = |chunk: SnapshotChunk| match chunk.part {
            Some(snapshot_chunk::Part::Data(data)) => data.len() as u64,
            _ => 0,
        };
        Box::pin(chunks.map(move |chunk| {
            chunk.map(|chunk| SnapshotProgress { received: length(chunk), done: false })
        }))
    }

    async fn pull_image(&self, _from: u64, at_least: u64) -> Result<ImageChunks, Status> {
        let chunk = SnapshotChunk { part: Some(snapshot_chunk::Part::End(at_least)) };
        Ok(Box::pin(tokio_stream::once(Ok(chunk))))
    }

    /// Refuses commands without content, after a while.
    fn propose(&self, proposals: Vec<Proposal>, refusals: &Refusals) {
        let (refused, taken): (Vec<Proposal>, Vec<Proposal>) =
            proposals.into_iter().partition(|proposal| proposal.command.is_empty());
        for Proposal { sequence, term, command } in taken {
            assert_eq!(term, 7);
            let _ = self.received.send((sequence, command));
        }
        let refusals = refusals.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            for Proposal { sequence, .. } in refused {
                let _ = refusals.send(Refusal { sequence, reason: Reason::Busy.into() });
            }
        });
    }

    async fn lease_keep_alive(
        &self,
        request: LeaseKeepAliveRequest,
    ) -> Result<LeaseKeepAliveResponse, Error> {
        match self.answer.lock().clone() {
            Some(error) => Err(error),
            None => Ok(LeaseKeepAliveResponse { id: request.id, ..Default::default() }),
        }
    }

    async fn lease_time_to_live(
        &self,
        _request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        Err(Error::LeaseNotFound)
    }

    async fn member_promote(
        &self,
        _request: MemberPromoteRequest,
    ) -> Result<MemberPromoteResponse, Error> {
        Err(Error::MemberNotLearner)
    }

    async fn hash_kv(&self, request: HashKvRequest) -> Result<HashKvResponse, Error> {
        Ok(HashKvResponse { hash_revision: request.revision, ..Default::default() })
    }

    fn rolling_hashes(&self, request: RollingHashesRequest) -> RollingHashesResponse {
        let hash = |index| RollingHash { index, hash: index };
        RollingHashesResponse { hashes: request.indexes.into_iter().map(hash).collect() }
    }

    async fn members(&self, _linearizable: bool) -> Result<MembersResponse, Error> {
        let urls = |urls: &[&str]| urls.iter().map(|url| (*url).to_owned()).collect();
        let one = MemberRecord {
            id: A,
            name: "a".to_owned(),
            peer_urls: urls(&["http://10.0.0.1:2380"]),
            client_urls: urls(&["http://10.0.0.1:2379"]),
            is_learner: false,
        };
        let other = MemberRecord {
            id: 2,
            peer_urls: urls(&["http://10.0.0.2:2380"]),
            is_learner: true,
            ..MemberRecord::default()
        };
        Ok(MembersResponse { cluster_id: CLUSTER, members: vec![one, other] })
    }
}

/// The member `A`, listening.
struct Server {
    url: Url,
    fake: Arc<Fake>,
    received: mpsc::UnboundedReceiver<(u64, Bytes)>,
    metrics: Arc<Metrics>,
    stopping: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Server {
    fn start() -> Server {
        Server::at("http://127.0.0.1:0", None)
    }

    fn at(url: &str, tls: Option<Tls>) -> Server {
        let url = Url::parse(url).unwrap();
        let listener = Listener::bind(&url, tls, &SocketOptions::default()).unwrap();
        let (sender, received) = mpsc::unbounded_channel();
        let fake = Fake { removed: Mutex::default(), received: sender, answer: Mutex::default() };
        let fake = Arc::new(fake);
        let metrics = Metrics::new().unwrap();
        let (stopping, stopped) = watch::channel(false);
        let versions = || Versions { server: "3.7.0".to_owned(), cluster: None, storage: None };
        let receiver: Arc<dyn Receiver> = Arc::<Fake>::clone(&fake);
        let (own, stop) = (Arc::clone(&metrics), stopped.clone());
        let router = peer_router(receiver, own, versions, 8 << 20, stop);
        let url = listener.local_url().clone();
        let task = listener::serve(listener, router, ServeOptions::default(), raised(stopped));
        Server { url, fake, received, metrics, stopping, task }
    }

    async fn next(&mut self) -> (u64, Bytes) {
        timeout(PATIENCE, self.received.recv()).await.expect("a message in time").unwrap()
    }

    async fn stop(self) -> Url {
        self.stopping.send(true).unwrap();
        timeout(PATIENCE, self.task).await.expect("streams end when the server stops").unwrap();
        self.url
    }
}

async fn raised(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// The member `B`, which sends.
struct Sender {
    peers: Peers,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    metrics: Arc<Metrics>,
}

impl Sender {
    fn to(url: &Url) -> Sender {
        Sender::with(CLUSTER, connector(None), &[url.as_str()])
    }

    fn with(cluster_id: u64, connector: Connector, urls: &[&str]) -> Sender {
        let (sender, events) = mpsc::unbounded_channel();
        let metrics = Metrics::new().unwrap();
        let peers = Peers::new(
            cluster_id,
            B,
            connector,
            Arc::new(move |event| {
                let _ = sender.send(event);
            }),
            Arc::clone(&metrics),
        );
        peers.update(&[address(B, &["http://127.0.0.1:1"]), address(A, urls)]);
        Sender { peers, events, metrics }
    }

    fn send(&self, text: &str) -> bool {
        self.peers.send(A, Bytes::copy_from_slice(text.as_bytes()), Lane::Bulk)
    }

    async fn event(&mut self) -> PeerEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").unwrap()
    }

    /// Sends until something arrives: what was sent to a broken connection is lost.
    async fn get_through(&self, server: &mut Server) -> Bytes {
        let sending = async {
            loop {
                self.send("hello");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = sending => unreachable!(),
            (from, message) = server.next() => {
                assert_eq!(from, B);
                message
            }
        }
    }

    async fn active(&self, active: bool) {
        let reached = async {
            while self.peers.active_since(A).is_some() != active {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the peer's state in time");
    }
}

fn address(id: u64, urls: &[&str]) -> PeerAddress {
    PeerAddress { id, urls: urls.iter().map(|url| (*url).to_owned()).collect() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_whole_and_in_order() {
    const MESSAGES: usize = 20_000;
    let mut server = Server::start();
    let sender = Sender::to(&server.url);
    assert!(!sender.peers.send(B, Bytes::new(), Lane::Bulk), "this member is no peer");
    assert!(!sender.peers.send(0xd, Bytes::new(), Lane::Bulk), "an unknown one neither");
    let peers = sender.peers.clone();
    // Like the raft thread, outside of the runtime.
    let thread = std::thread::spawn(move || {
        for at in 0..MESSAGES {
            let message = Bytes::from(format!("{at} {}", "x".repeat(at % 700)));
            while !peers.send(A, message.clone(), Lane::Bulk) {
                std::thread::yield_now();
            }
        }
    });
    let mut bytes = 0;
    for at in 0..MESSAGES {
        let (from, message) = server.next().await;
        bytes += message.len() as u64;
        assert_eq!(from, B);
        assert_eq!(message, format!("{at} {}", "x".repeat(at % 700)));
    }
    thread.join().unwrap();
    assert_eq!(sender.metrics.peer(B, A).sent_bytes.get(), bytes);
    assert_eq!(server.metrics.peer(A, B).received_bytes.get(), bytes);
}

/// More than one reply holds, each told once.
#[tokio::test]
async fn commands_arrive_and_refusals_come_back() {
    let refused = REFUSALS_MAX as u64 + 1;
    let mut server = Server::start();
    let mut sender = Sender::to(&server.url);
    let proposal =
        |sequence, text: &'static str| Proposal { command: text.into(), sequence, term: 7 };
    assert!(!sender.peers.propose(0xd, proposal(1, "")), "an unknown member");
    for sequence in 0..refused {
        assert!(sender.peers.propose(A, proposal(sequence, "")));
    }
    assert!(sender.peers.propose(A, proposal(refused, "command")));
    assert_eq!(server.next().await, (refused, "command".into()));
    let mut told = BTreeSet::new();
    for _ in 0..refused {
        let PeerEvent::Refused { sequence, reason: Reason::Busy } = sender.event().await else {
            panic!("it is refused");
        };
        told.insert(sequence);
    }
    assert!(told.into_iter().eq(0..refused));
    assert_eq!(sender.metrics.peer(B, A).sent_bytes.get(), 7);
    assert_eq!(server.metrics.peer(A, B).received_bytes.get(), 7);
    // Nor are those lost that are decided when the sender has ended.
    assert!(sender.peers.propose(A, proposal(refused, "")));
    sender.peers.close();
    assert_eq!(
        sender.event().await,
        PeerEvent::Refused { sequence: refused, reason: Reason::Busy }
    );
}

/// When a connection cannot be made, and when a member is given up that nobody could reach.
#[tokio::test]
async fn commands_that_never_left_are_told() {
    for urls in [&["http://127.0.0.1:1"][..], &[]] {
        let mut sender = Sender::with(CLUSTER, connector(None), urls);
        let proposal = Proposal { command: "one".into(), sequence: 3, term: 7 };
        assert!(sender.peers.propose(A, proposal));
        if urls.is_empty() {
            sender.peers.close();
        }
        let refused = PeerEvent::Refused { sequence: 3, reason: Reason::NotLeader };
        while sender.event().await != refused {}
    }
}

#[tokio::test]
async fn a_large_message_arrives() {
    let mut server = Server::start();
    let sender = Sender::to(&server.url);
    let large = Bytes::from(vec![7; 6 << 20]);
    assert!(sender.peers.send(A, large.clone(), Lane::Bulk));
    assert_eq!(server.next().await.1, large);
}

#[tokio::test]
async fn the_round_trip_is_measured() {
    let server = Server::start();
    let sender = Sender::to(&server.url);
    let metrics = sender.metrics.peer(B, A);
    let measured = async {
        while metrics.round_trip_time_seconds.get_sample_count() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, measured).await.expect("the first probe is sent at once");
    assert_eq!((metrics.active.get(), metrics.known.get()), (1, 1));
    sender.peers.close();
    assert_eq!((metrics.active.get(), metrics.known.get()), (0, 0));
}

#[tokio::test]
async fn a_peer_that_comes_back_is_reached_again() {
    let mut server = Server::start();
    let mut sender = Sender::to(&server.url);
    sender.get_through(&mut server).await;
    sender.active(true).await;
    let url = server.stop().await;
    assert_eq!(sender.event().await, PeerEvent::Broken(A));
    sender.active(false).await;
    let failures = sender.metrics.peer(B, A).sent_failures.get();
    sender.send("lost");
    assert_eq!(sender.event().await, PeerEvent::Unreachable(A), "an attempt failed");

    let mut server = Server::at(url.as_str(), None);
    assert_eq!(sender.get_through(&mut server).await, "hello", "what was queued is dropped");
    sender.active(true).await;
    assert!(sender.metrics.peer(B, A).sent_failures.get() > failures);
    assert_eq!(sender.metrics.peer(B, A).disconnected.get(), 1);
}

#[tokio::test]
async fn all_urls_are_tried_and_calls_follow() {
    // Bound and closed again: nobody listens there.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut server = Server::start();
    let url = server.url.to_string();
    let urls = ["no url", &format!("http://{nobody}"), &url];
    let sender = Sender::with(CLUSTER, connector(None), &urls);
    sender.get_through(&mut server).await;
    sender.active(true).await;
    let request = LeaseKeepAliveRequest { id: 5 };
    let answer = sender.peers.client(A).unwrap().lease_keep_alive(request).await.unwrap();
    assert_eq!(answer.into_inner().id, 5);

    // To a place where nobody is, and back.
    sender.peers.update(&[address(A, &[&format!("http://{nobody}")])]);
    sender.active(false).await;
    sender.peers.update(&[address(A, &urls)]);
    sender.get_through(&mut server).await;
    sender.peers.update(&[]);
    assert!(sender.peers.client(A).is_none());
    assert!(!sender.send("unknown"));
}

#[tokio::test]
async fn what_is_queued_is_delivered_before_a_peer_is_given_up() {
    let mut server = Server::start();
    let sender = Sender::to(&server.url);
    sender.active(true).await;
    for at in 0..100 {
        assert!(sender.send(&at.to_string()));
    }
    sender.peers.update(&[]);
    for at in 0..100 {
        assert_eq!(server.next().await.1, at.to_string());
    }
}

#[tokio::test]
async fn a_unix_socket_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("unix://{}", dir.path().join("peer.sock").display());
    let mut server = Server::at(&url, None);
    let sender = Sender::with(CLUSTER, connector(None), &[&url]);
    sender.get_through(&mut server).await;
}

// Those that do not read.

/// Sends until the queue is full: how many bytes were taken.
fn fill(sender: &Sender) -> usize {
    let large = Bytes::from(vec![7; 1 << 20]);
    let mut taken = 0;
    while sender.peers.send(A, large.clone(), Lane::Bulk) {
        taken += large.len();
        assert!(taken <= 2 * BULK_QUEUE_BYTES, "the queue has no bound");
    }
    taken
}

#[tokio::test]
async fn a_peer_that_accepts_and_is_silent_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let mut sender = Sender::to(&url);
    fill(&sender);
    assert_eq!(sender.event().await, PeerEvent::Unreachable(A));
    assert!(sender.peers.active_since(A).is_none());
    assert!(sender.send("there is room again"));
}

#[tokio::test]
async fn a_peer_that_does_not_read_fills_the_queue_and_no_more() {
    // It takes the stream, and never a message of it.
    let router = Router::new().fallback(|request: HttpRequest| async move {
        let (sender, never) = mpsc::channel::<Result<http_body::Frame<Bytes>, Error>>(1);
        tokio::spawn(async move {
            let _held = (request, sender);
            std::future::pending::<()>().await;
        });
        let never = tokio_stream::wrappers::ReceiverStream::new(never);
        let body = axum::body::Body::new(http_body_util::StreamBody::new(never));
        ([(CONTENT_TYPE, "application/grpc")], body)
    });
    let url = Url::parse("http://127.0.0.1:0").unwrap();
    let listener = Listener::bind(&url, None, &SocketOptions::default()).unwrap();
    let url = listener.local_url().clone();
    listener::serve(listener, router, ServeOptions::default(), std::future::pending());

    let sender = Sender::to(&url);
    sender.active(true).await;
    let mut taken = 0;
    // Until nothing leaves the queue any more.
    loop {
        let more = fill(&sender);
        taken += more;
        if more == 0 {
            break;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }
    assert!(taken >= BULK_QUEUE_BYTES, "{taken}");
    assert!(taken <= BULK_QUEUE_BYTES + (8 << 20), "{taken}: the rest is in buffers");
    assert!(sender.peers.send(A, "heartbeat".into(), Lane::Urgent), "its lane is not full");
    assert!(sender.metrics.peer(B, A).sent_failures.get() > 0);
}

/// Passes connections on to a server until it is frozen: then they stay up and nothing gets
/// through, as in a partition.
struct Proxy {
    url: Url,
    frozen: watch::Sender<bool>,
}

impl Proxy {
    async fn to(server: &Url) -> Proxy {
        let target = server.socket_addrs(|| None).unwrap()[0];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let (frozen, is_frozen) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let is_frozen = is_frozen.clone();
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        () = raised(is_frozen) => std::future::pending().await,
                    }
                });
            }
        });
        Proxy { url, frozen }
    }
}

#[tokio::test]
async fn a_connection_does_not_outlive_a_partition() {
    let mut server = Server::start();
    let proxy = Proxy::to(&server.url).await;
    let mut sender = Sender::to(&proxy.url);
    sender.get_through(&mut server).await;
    sender.active(true).await;
    proxy.frozen.send(true).unwrap();
    assert_eq!(sender.event().await, PeerEvent::Broken(A), "pings go unanswered");
    assert!(sender.peers.active_since(A).is_none());
    while server.received.try_recv().is_ok() {}
    proxy.frozen.send(false).unwrap();
    sender.get_through(&mut server).await;
}

// Who talks to whom.

async fn refusal_of(status: Result<Response<LeaseKeepAliveResponse>, Status>) -> Status {
    let status = status.expect_err("refused");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    status
}

#[tokio::test]
async fn members_of_other_clusters_are_refused() {
    let mut server = Server::start();
    let mut sender = Sender::with(0xc2, connector(None), &[server.url.as_str()]);
    sender.send("a vote");
    assert_eq!(sender.event().await, PeerEvent::Unreachable(A));
    assert!(sender.peers.active_since(A).is_none());
    let mut client = sender.peers.client(A).unwrap();
    let status = refusal_of(client.lease_keep_alive(LeaseKeepAliveRequest { id: 1 }).await).await;
    for part in ["c1", "c2", "--initial-cluster-token", "--data-dir"] {
        assert!(status.message().contains(part), "{part}: {status}");
    }
    assert_eq!(refusal::error(&status), None);
    server.received.try_recv().expect_err("nothing got through");
}

#[tokio::test]
async fn calls_for_another_member_are_refused() {
    let server = Server::start();
    let sender = Sender::to(&server.url);
    sender.peers.update(&[address(0xd, &[server.url.as_str()])]);
    let mut client = sender.peers.client(0xd).unwrap();
    let status = refusal_of(client.lease_keep_alive(LeaseKeepAliveRequest { id: 1 }).await).await;
    assert!(status.message().contains("this is member a, the caller b means d"), "{status}");
}

#[tokio::test]
async fn a_removed_member_hears_of_it() {
    let mut server = Server::start();
    let mut sender = Sender::to(&server.url);
    sender.get_through(&mut server).await;
    server.fake.removed.lock().insert(B);
    sender.send("an appeal");
    let mut events = Vec::new();
    while !events.contains(&PeerEvent::Removed) {
        events.push(sender.event().await);
    }
    let mut client = sender.peers.client(A).unwrap();
    let status = refusal_of(client.lease_keep_alive(LeaseKeepAliveRequest { id: 1 }).await).await;
    assert!(refusal::is_removed(&status));
    assert_eq!(status.message(), "the member has been permanently removed from the cluster");
    // And when it starts anew, by the first connection.
    let mut sender = Sender::to(&server.url);
    while sender.event().await != PeerEvent::Removed {}
}

#[tokio::test]
async fn anybody_is_told_the_members_and_nothing_else() {
    let server = Server::start();
    let channel = connector(None)(server.url.as_str()).unwrap();
    let mut client = PeerClient::new(channel);
    let members = client.members(MembersRequest::default()).await.unwrap().into_inner();
    assert_eq!((members.cluster_id, members.members.len()), (CLUSTER, 2));
    let status = client.hash_kv(HashKvRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("--listen-client-urls"));
}

#[tokio::test]
async fn errors_come_back_as_what_they_were() {
    let server = Server::start();
    let sender = Sender::to(&server.url);
    let mut client = sender.peers.client(A).unwrap();
    let request = || LeaseKeepAliveRequest { id: 7 };
    client.lease_keep_alive(request()).await.unwrap();
    for error in [Error::NotLeader, Error::TooManyRequests, Error::Timeout, Error::Stopped] {
        *server.fake.answer.lock() = Some(error.clone());
        let status = client.lease_keep_alive(request()).await.unwrap_err();
        assert_eq!(refusal::error(&status), Some(error));
    }
    let status = client.lease_time_to_live(LeaseTimeToLiveRequest::default()).await.unwrap_err();
    assert_eq!(refusal::error(&status), Some(Error::LeaseNotFound));
    let status = client.member_promote(MemberPromoteRequest::default()).await.unwrap_err();
    assert_eq!(refusal::error(&status), Some(Error::MemberNotLearner));
    let hash = client.hash_kv(HashKvRequest { revision: 3 }).await.unwrap().into_inner();
    assert_eq!(hash.hash_revision, 3);
    // Nobody there: that is no answer.
    server.stop().await;
    let status = client.lease_keep_alive(request()).await.unwrap_err();
    assert_eq!(refusal::error(&status), None, "{status}");
}

#[tokio::test]
async fn a_snapshot_is_passed_on_as_it_comes() {
    let server = Server::start();
    let sender = Sender::to(&server.url);
    let chunk = |length: usize| SnapshotChunk {
        part: Some(snapshot_chunk::Part::Data(Bytes::from(vec![0; length]))),
    };
    let chunks = tokio_stream::iter([chunk(5), chunk(1 << 20)]);
    let mut client = sender.peers.client(A).unwrap();
    let mut replies = client.snapshot(chunks).await.unwrap().into_inner();
    for received in [5, 1 << 20] {
        assert_eq!(replies.message().await.unwrap().unwrap().received, received);
    }
    assert_eq!(replies.message().await.unwrap(), None);
}

#[tokio::test]
async fn tools_see_the_members_and_the_version() {
    let server = Server::start();
    let stream = tokio::net::TcpStream::connect(server.url.socket_addrs(|| None).unwrap()[0]);
    let stream = hyper_util::rt::TokioIo::new(stream.await.unwrap());
    let (mut client, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut get = async |method: Method, path: &str| {
        let request = http::Request::builder().method(method).uri(path).header("host", "a");
        let request = request.body(http_body_util::Empty::<Bytes>::new()).unwrap();
        let (parts, body) = client.send_request(request).await.unwrap().into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (parts.status, parts.headers, String::from_utf8(bytes.to_vec()).unwrap())
    };
    let (status, headers, body) = get(Method::GET, "/members").await;
    assert_eq!((status, &headers["x-etcd-cluster-id"]), (StatusCode::OK, &"c1".parse().unwrap()));
    assert!(body.ends_with('\n'));
    let members: serde_json::Value = serde_json::from_str(&body).unwrap();
    let expected = serde_json::json!([
        {"id": 2, "peerURLs": ["http://10.0.0.2:2380"], "isLearner": true},
        {
            "id": 10, "peerURLs": ["http://10.0.0.1:2380"], "name": "a",
            "clientURLs": ["http://10.0.0.1:2379"]
        },
    ]);
    assert_eq!(members, expected);
    let (_, _, body) = get(Method::GET, "/version").await;
    let version = r#"{"etcdserver":"3.7.0","etcdcluster":"not_decided","storage":"unknown"}"#;
    assert_eq!(body, version);
    assert_eq!(get(Method::POST, "/members").await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(get(Method::GET, "/health").await.0, StatusCode::NOT_FOUND);
}

// TLS.

fn server_tls(ca: &TestCa, allowed: &[&str]) -> Option<Tls> {
    let settings = TlsSettings {
        side: Side::Peer,
        trusted_ca_file: Some(ca.path("ca.pem")),
        allowed_common_names: allowed.iter().map(|name| (*name).to_owned()).collect(),
        ..ca.settings("server")
    };
    Some(Tls::load(settings).unwrap())
}

fn client_settings(ca: &TestCa, name: &str) -> ClientTlsSettings {
    ClientTlsSettings {
        cert_file: Some(ca.path(&format!("{name}.pem"))),
        key_file: Some(ca.path(&format!("{name}.key"))),
        trusted_ca_file: Some(ca.path("ca.pem")),
        ..ClientTlsSettings::default()
    }
}

fn secure(settings: ClientTlsSettings, url: &Url) -> Sender {
    let tls = ClientTls::load(settings).unwrap();
    Sender::with(CLUSTER, connector(Some(tls)), &[url.as_str()])
}

/// That no message gets to the server.
async fn is_kept_out(mut sender: Sender, server: &mut Server) {
    for _ in 0..2 {
        sender.send("let me in");
        assert_eq!(sender.event().await, PeerEvent::Unreachable(A));
    }
    assert!(sender.peers.active_since(A).is_none());
    server.received.try_recv().expect_err("kept out");
}

#[tokio::test]
async fn members_with_certificates_of_one_ca_talk() {
    let (ca, stranger) = (TestCa::new(), TestCa::new());
    ca.issue("server", "a");
    ca.issue("client", "b");
    stranger.issue("client", "b");
    let mut server = Server::at("https://127.0.0.1:0", server_tls(&ca, &[]));
    let good = client_settings(&ca, "client");
    secure(good.clone(), &server.url).get_through(&mut server).await;
    while server.received.try_recv().is_ok() {}

    let none = ClientTlsSettings { cert_file: None, key_file: None, ..good.clone() };
    is_kept_out(secure(none, &server.url), &mut server).await;
    let trusted_ca_file = good.trusted_ca_file.clone();
    let forged = ClientTlsSettings { trusted_ca_file, ..client_settings(&stranger, "client") };
    is_kept_out(secure(forged, &server.url), &mut server).await;
    // The other way round: the client does not trust the server.
    let trusted_ca_file = Some(stranger.path("ca.pem"));
    let wary = ClientTlsSettings { trusted_ca_file, ..good.clone() };
    is_kept_out(secure(wary, &server.url), &mut server).await;
    let roots = ClientTlsSettings { trusted_ca_file: None, ..good };
    is_kept_out(secure(roots, &server.url), &mut server).await;
}

#[tokio::test]
async fn a_certificate_must_be_for_the_host() {
    let ca = TestCa::new();
    ca.issue("server", "a");
    ca.issue("client", "b");
    let mut server = Server::at("https://127.0.0.2:0", server_tls(&ca, &[]));
    is_kept_out(secure(client_settings(&ca, "client"), &server.url), &mut server).await;
}

#[tokio::test]
async fn only_allowed_names_are_let_in() {
    let ca = TestCa::new();
    ca.issue("server", "member");
    ca.issue("member", "member");
    ca.issue("client", "client");
    let mut server = Server::at("https://127.0.0.1:0", server_tls(&ca, &["other", "member"]));
    is_kept_out(secure(client_settings(&ca, "client"), &server.url), &mut server).await;
    let good = client_settings(&ca, "member");
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let picky = ClientTlsSettings { allowed_common_names: names(&["x"]), ..good.clone() };
    is_kept_out(secure(picky, &server.url), &mut server).await;
    let picky = ClientTlsSettings { allowed_hostnames: names(&["example.com"]), ..good.clone() };
    is_kept_out(secure(picky, &server.url), &mut server).await;
    let content = ClientTlsSettings { allowed_hostnames: names(&["x", "localhost"]), ..good };
    secure(content, &server.url).get_through(&mut server).await;
}

#[tokio::test]
async fn certificates_that_sign_themselves_are_taken_as_they_are() {
    let auto = |dir: &tempfile::TempDir| {
        let hosts = vec!["127.0.0.1".to_owned()];
        Some(AutoTls { dir: dir.path().join("peer"), hosts, validity_years: 1 })
    };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings = TlsSettings { side: Side::Peer, auto: auto(&a), ..TlsSettings::default() };
    let mut server = Server::at("https://127.0.0.1:0", Some(Tls::load(settings).unwrap()));
    let settings = ClientTlsSettings { auto: auto(&b), ..ClientTlsSettings::default() };
    secure(settings, &server.url).get_through(&mut server).await;
}

#[tokio::test]
async fn changed_files_are_used_for_new_connections() {
    let (ca, next) = (TestCa::new(), TestCa::new());
    ca.issue("server", "a");
    ca.issue("client", "b");
    next.issue("server", "a");
    next.issue("client", "b");
    let mut server = Server::at("https://127.0.0.1:0", server_tls(&next, &[]));
    let sender = secure(client_settings(&ca, "client"), &server.url);
    // Another CA: no connection comes about until the sender's files are those of the next.
    for name in ["ca.pem", "client.pem", "client.key"] {
        std::fs::copy(next.path(name), ca.path(name)).unwrap();
    }
    sender.get_through(&mut server).await;
}
