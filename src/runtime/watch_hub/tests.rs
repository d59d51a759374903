//! The hub against a fake history, on one thread and without waiting for time: the
//! clock is paused and moves only when everyone is idle.

use std::future::poll_fn;

use parking_lot::Mutex;
use prost::Message;

use super::*;
use crate::mvcc::watch::tests::{Client, Past, Random, Seen, create_at_random};
use crate::pb::etcdserverpb::{WatchCancelRequest, WatchCreateRequest, WatchProgressRequest};
use crate::pb::mvccpb::Event;

/// A member without anything but its watches.
struct Member {
    past: Arc<Mutex<Past>>,
    hub: HubHandle,
    feed: Feed,
}

impl History for Mutex<Past> {
    fn revision(&self) -> i64 {
        self.lock().revision()
    }

    fn changes(&self, from: i64, changes: usize, bytes: usize) -> Result<Page, Compacted> {
        self.lock().changes(from, changes, bytes)
    }
}

const PROGRESS_INTERVAL: Duration = Duration::from_secs(600);

impl Member {
    fn start(seed: u64) -> Member {
        Member::with_limits(seed, Limits::default())
    }

    fn with_limits(seed: u64, limits: Limits) -> Member {
        let past = Arc::new(Mutex::new(Past::new()));
        let header: HeaderSource = Arc::new(|revision| ResponseHeader {
            cluster_id: 7,
            member_id: 8,
            revision,
            raft_term: 9,
        });
        let config =
            WatchConfig { progress_interval: PROGRESS_INTERVAL, max_request_bytes: 3 << 19, seed };
        let (hub, handle, feed) = WatchHub::with_limits(Arc::clone(&past), header, config, limits);
        tokio::spawn(hub.run());
        Member { past, hub: handle, feed }
    }

    fn put(&self, key: &str, value: &[u8]) {
        let mut past = self.past.lock();
        let previous = past.revision;
        let changes = past.write(&[(key, Some(value))]);
        self.feed.publish(previous, past.revision, changes.into());
    }

    fn revision(&self) -> i64 {
        self.past.lock().revision
    }

    /// A stream with one watch, which has been created.
    async fn watch(&self, request: WatchCreateRequest) -> WatchStream {
        let mut stream = self.hub.open_stream();
        stream.requests.send(create(request)).await.unwrap();
        let created = stream.responses.recv().await.unwrap();
        assert!(created.created && !created.canceled);
        stream
    }
}

fn create(request: WatchCreateRequest) -> WatchRequest {
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) }
}

fn cancel(watch_id: i64) -> WatchRequest {
    let cancel = WatchCancelRequest { watch_id };
    WatchRequest { request_union: Some(RequestUnion::CancelRequest(cancel)) }
}

fn progress() -> WatchRequest {
    WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) }
}

fn watch(key: &'static str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { key: key.into(), start_revision, ..WatchCreateRequest::default() }
}

fn revisions(response: &WatchResponse) -> Vec<i64> {
    let events = response.events.iter().map(|event| Event::decode(event.clone()).unwrap());
    events.map(|event| event.kv.unwrap().mod_revision).collect()
}

/// Reads events until that of revision `last`.
async fn read_through(stream: &mut WatchStream, last: i64) -> Vec<i64> {
    let mut got = Vec::new();
    while got.last() != Some(&last) {
        got.extend(revisions(&stream.responses.recv().await.unwrap()));
    }
    got
}

/// Lets everyone else run until nobody has anything to do.
async fn idle() {
    tokio::time::sleep(Duration::from_nanos(1)).await;
}

#[tokio::test(start_paused = true)]
async fn events_come_at_once_with_complete_headers() {
    let member = Member::start(1);
    let began = Instant::now();
    let mut stream = member.watch(watch("a", 0)).await;
    member.put("b", b"");
    member.put("a", b"");
    let response = stream.responses.recv().await.unwrap();
    assert_eq!(revisions(&response), [3]);
    let header = ResponseHeader { cluster_id: 7, member_id: 8, revision: 3, raft_term: 9 };
    assert_eq!(response.header, Some(header));

    // From history, too: nothing waits for a timer.
    let mut late = member.watch(watch("a", 1)).await;
    assert_eq!(revisions(&late.responses.recv().await.unwrap()), [3]);
    late.requests.send(progress()).await.unwrap();
    let response = late.responses.recv().await.unwrap();
    assert_eq!((response.watch_id, response.header.unwrap().revision), (-1, 3));
    late.requests.send(cancel(0)).await.unwrap();
    assert!(late.responses.recv().await.unwrap().canceled);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_the_feed_drops_is_read_from_history() {
    let member = Member::start(2);
    let mut stream = member.watch(watch("a", 0)).await;
    // The hub does not run before the next await.
    let last = 3 * FEED_MESSAGES as i64;
    while member.revision() < last {
        member.put("a", b"");
    }
    let dropped = member.hub.stats().feed_dropped_total.load(Ordering::Relaxed);
    assert_eq!(dropped, last as u64 - 1 - FEED_MESSAGES as u64);
    assert_eq!(read_through(&mut stream, last).await, Vec::from_iter(2..=last));
    // And after that, the feed is good again.
    member.put("a", b"");
    assert_eq!(revisions(&stream.responses.recv().await.unwrap()), [last + 1]);
}

#[tokio::test(start_paused = true)]
async fn a_store_replaced_as_a_whole_is_read_from_history() {
    let member = Member::start(3);
    let mut stream = member.watch(watch("a", 0)).await;
    {
        let mut past = member.past.lock();
        for _ in 0..10 {
            past.write(&[("a", Some(b""))]);
        }
        member.feed.publish(past.revision, past.revision, Arc::new([]));
    }
    assert_eq!(read_through(&mut stream, 11).await, Vec::from_iter(2..=11));
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_costs_a_queue_and_loses_nothing() {
    let member = Member::start(4);
    let mut slow = member.watch(watch("a", 0)).await;
    let mut quick = member.watch(watch("a", 0)).await;
    let last = 1 + 2 * STREAM_RESPONSES as i64;
    for revision in 2..=last {
        member.put("a", b"");
        assert_eq!(revisions(&quick.responses.recv().await.unwrap()), [revision]);
    }
    let stats = member.hub.stats();
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    idle().await;
    assert_eq!(count(&stats.pending_events), STREAM_RESPONSES);
    assert_eq!((count(&stats.watchers), count(&stats.slow_watchers)), (2, 1));
    assert_eq!(read_through(&mut slow, last).await, Vec::from_iter(2..=last));
    idle().await;
    assert_eq!((count(&stats.pending_events), count(&stats.slow_watchers)), (0, 0));
    assert_eq!(stats.events_total.load(Ordering::Relaxed), 2 * (last as u64 - 1));
}

#[tokio::test(start_paused = true)]
async fn a_queue_is_bounded_by_bytes_too() {
    let member = Member::start(5);
    let mut slow = member.watch(watch("a", 0)).await;
    let value = vec![0; STREAM_BYTES / 8];
    for _ in 0..100 {
        member.put("a", &value);
        idle().await;
    }
    assert_eq!(member.hub.stats().pending_events.load(Ordering::Relaxed), 8);
    assert_eq!(read_through(&mut slow, 101).await, Vec::from_iter(2..=101));
}

#[test]
fn a_full_queue_calls_the_hub_once_when_half_of_it_is_read() {
    let (control_sender, mut control) = mpsc::unbounded_channel();
    let handle = HubHandle { control: control_sender, shared: Arc::default() };
    let (WatchStream { requests: _requests, mut responses }, hub_end) = handle.new_stream();
    let header: HeaderSource = Arc::new(|_| ResponseHeader::default());
    let lane = Lane { queue: hub_end.responses, gate: hub_end.gate, header };
    for _ in 0..3 {
        while lane.has_room() {
            lane.push(WatchResponse::default());
        }
        for left in (0..STREAM_RESPONSES).rev() {
            assert!(control.try_recv().is_err(), "{left} are enough to read");
            responses.try_recv().unwrap();
            if left < STREAM_RESPONSES / 2 {
                break;
            }
        }
        assert!(matches!(control.try_recv(), Ok(Control::Attend(_))));
        while responses.try_recv().is_some() {}
        assert!(control.try_recv().is_err(), "once is enough");
        lane.gate.attention.store(false, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn requests_wait_while_answers_are_not_read() {
    let member = Member::start(6);
    let mut stream = member.hub.open_stream();
    let requests = stream.requests.clone();
    let total = 2 * STREAM_RESPONSES as i64;
    let sender = tokio::spawn(async move {
        for _ in 0..total {
            requests.send(create(watch("a", 0))).await.unwrap();
        }
    });
    idle().await;
    assert!(!sender.is_finished());
    assert_eq!(member.hub.stats().watchers.load(Ordering::Relaxed), STREAM_RESPONSES);
    for id in 0..total {
        let response = stream.responses.recv().await.unwrap();
        assert_eq!((response.created, response.watch_id), (true, id), "in request order");
    }
    sender.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn progress_notifications_come_in_the_interval_and_to_the_quiet_only() {
    let member = Member::start(7);
    let began = Instant::now();
    let request = WatchCreateRequest { progress_notify: true, ..watch("a", 0) };
    let mut stream = member.watch(request).await;
    let mut silent = member.watch(watch("a", 0)).await;
    member.put("b", b"");
    let response = stream.responses.recv().await.unwrap();
    let first = began.elapsed();
    assert_eq!((response.watch_id, response.header.unwrap().revision), (0, 2));
    assert!(response.events.is_empty());
    let around = |elapsed: Duration, intervals: u32| {
        let off = elapsed.abs_diff(PROGRESS_INTERVAL * intervals);
        assert!(
            off <= PROGRESS_INTERVAL * intervals / 10 + Duration::from_millis(1),
            "{elapsed:?}"
        );
    };
    around(first, 1);
    member.put("a", b"");
    assert_eq!(revisions(&stream.responses.recv().await.unwrap()), [3]);
    assert_eq!(stream.responses.recv().await.unwrap().header.unwrap().revision, 3);
    around(began.elapsed() - first, 2);
    assert_eq!(revisions(&silent.responses.recv().await.unwrap()), [3]);
    assert_eq!(silent.responses.try_recv(), None);
}

#[tokio::test(start_paused = true)]
async fn intervals_are_spread_by_the_seed() {
    let config =
        |seed| WatchConfig { progress_interval: PROGRESS_INTERVAL, max_request_bytes: 1, seed };
    let mut random = 42;
    let spread: BTreeSet<_> = (0..1000).map(|_| interval(&config(42), &mut random)).collect();
    assert!(*spread.first().unwrap() >= PROGRESS_INTERVAL * 9 / 10);
    assert!(*spread.last().unwrap() <= PROGRESS_INTERVAL * 11 / 10);
    assert!(spread.len() > 100);
    let mut again = 42;
    assert!(spread.contains(&interval(&config(42), &mut again)));
    let tiny = WatchConfig { progress_interval: Duration::ZERO, ..config(1) };
    assert!(interval(&tiny, &mut again) >= MIN_PROGRESS_INTERVAL * 9 / 10);
}

#[tokio::test(start_paused = true)]
async fn closing_the_hub_ends_all_streams() {
    let member = Member::start(8);
    let mut stream = member.watch(watch("a", 0)).await;
    member.put("a", b"");
    idle().await;
    member.hub.close();
    assert_eq!(revisions(&stream.responses.recv().await.unwrap()), [2], "what was queued");
    assert_eq!(stream.responses.recv().await, None);
    assert_eq!(stream.requests.send(progress()).await, Err(StreamEnded));
    let mut late = member.hub.open_stream();
    assert_eq!(late.responses.recv().await, None);
    assert_eq!(late.requests.send(progress()).await, Err(StreamEnded));
    member.put("a", b"");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_feed_ends_all_streams() {
    let member = Member::start(9);
    let mut stream = member.watch(watch("a", 0)).await;
    drop(member.feed);
    assert_eq!(stream.responses.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_responses_ends_the_stream_and_dropping_the_requests_does_not() {
    let member = Member::start(10);
    let WatchStream { requests, mut responses } = member.watch(watch("a", 0)).await;
    drop(requests);
    member.put("a", b"");
    assert_eq!(revisions(&responses.recv().await.unwrap()), [2]);
    let stats = member.hub.stats();
    let open = || (stats.streams.load(Ordering::Relaxed), stats.watchers.load(Ordering::Relaxed));
    idle().await;
    assert_eq!(open(), (1, 1));
    member.put("a", b"");
    idle().await;
    drop(responses);
    member.put("a", b"");
    idle().await;
    assert_eq!(open(), (0, 0));
    assert_eq!(stats.pending_events.load(Ordering::Relaxed), 0);
}

/// Everything at once: writers, dropped messages, compactions, and clients that read at
/// their own pace, each checked against the model.
#[tokio::test(start_paused = true)]
async fn watches_are_what_they_promise_with_everyone_at_work() {
    let mut seen = Seen::default();
    let mut dropped = 0;
    for seed in 0..30 {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let limits = match random.below(3) {
            0 => Limits::default(),
            _ => Limits { responses: 1 + random.below(20), bytes: 300 + random.below(10_000) },
        };
        let member = Member::with_limits(seed, limits);
        let mut clients: Vec<(WatchStream, Client)> = Vec::new();
        for _ in 0..400 {
            match random.below(12) {
                0 if clients.len() < 5 => {
                    clients.push((member.hub.open_stream(), Client::default()))
                }
                0..=3 => {
                    // Some bursts are larger than the feed.
                    let burst =
                        if random.one_in(40) { FEED_MESSAGES + 10 } else { random.below(4) };
                    for _ in 0..burst {
                        let mut past = member.past.lock();
                        let previous = past.revision;
                        let changes = past.write_at_random(&mut random);
                        if past.revision > previous {
                            member.feed.publish(previous, past.revision, changes.into());
                        }
                    }
                }
                4 if random.one_in(3) => {
                    let mut past = member.past.lock();
                    let span = past.revision - past.compact_revision.max(0);
                    if span > 0 {
                        past.compact_revision = past.revision - random.below(span as usize) as i64;
                    }
                }
                5..=7 if !clients.is_empty() => {
                    let nth = random.below(clients.len());
                    let (stream, client) = &mut clients[nth];
                    let request = match random.below(6) {
                        0 => cancel(random.below(6) as i64),
                        1 | 2 => progress(),
                        _ => create(create_at_random(&mut random, member.revision())),
                    };
                    // Only what goes through at once: nobody reads meanwhile.
                    let created = match &request.request_union {
                        Some(RequestUnion::CreateRequest(create)) => Some(create.clone()),
                        _ => None,
                    };
                    let mut send = std::pin::pin!(stream.requests.send(request));
                    let sent = poll_fn(|context| Poll::Ready(send.as_mut().poll(context))).await;
                    if let (Poll::Ready(Ok(())), Some(create)) = (sent, created) {
                        client.creates(&create);
                    }
                }
                8 if !clients.is_empty() && random.one_in(10) => {
                    let nth = random.below(clients.len());
                    seen.add(clients.swap_remove(nth).1.seen);
                }
                9 if random.one_in(4) => tokio::time::advance(PROGRESS_INTERVAL).await,
                10 => tokio::task::yield_now().await,
                _ if !clients.is_empty() => {
                    let nth = random.below(clients.len());
                    let (stream, client) = &mut clients[nth];
                    for _ in 0..random.below(20) {
                        let Some(response) = stream.responses.try_recv() else { break };
                        client.got(response, &member.past.lock());
                    }
                }
                _ => {}
            }
        }
        loop {
            idle().await;
            let mut read = false;
            for (stream, client) in &mut clients {
                while let Some(response) = stream.responses.try_recv() {
                    client.got(response, &member.past.lock());
                    read = true;
                }
            }
            if !read {
                break;
            }
        }
        let past = member.past.lock();
        for (_, client) in &clients {
            client.finished(&past, past.revision);
            seen.add(client.seen);
        }
        let stats = member.hub.stats();
        assert_eq!(stats.slow_watchers.load(Ordering::Relaxed), 0);
        assert_eq!(stats.pending_events.load(Ordering::Relaxed), 0);
        dropped += stats.feed_dropped_total.load(Ordering::Relaxed);
    }
    println!("{seen:?}, {dropped} dropped");
    let Seen { events, progress, periodic, compacted, refused, canceled, .. } = seen;
    for count in [progress, periodic, compacted, refused, canceled] {
        assert!(count > 10, "all of it happened");
    }
    assert!(events > 10_000 && dropped > 0);
}

/// The hub, the apply thread and the readers on threads of their own: no wake-up is lost
/// between them. A lost one would leave this test waiting for ever. The queues are so
/// small that they are full, empty, or about to be, all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nobody_sleeps_through_a_wake_up() {
    let member = Member::with_limits(11, Limits { responses: 2, bytes: 1 << 20 });
    let mut readers = Vec::new();
    let last = 20_000;
    for _ in 0..4 {
        let mut stream = member.watch(watch("a", 1)).await;
        readers.push(tokio::spawn(async move {
            let mut next = 2;
            while next <= last {
                for revision in revisions(&stream.responses.recv().await.unwrap()) {
                    assert_eq!(revision, next);
                    next += 1;
                }
            }
        }));
    }
    let apply = std::thread::spawn(move || {
        while member.revision() < last {
            member.put("a", b"");
            // Let the hub come so far that there is something to lose.
            if member.revision() % 3 == 0 {
                std::thread::yield_now();
            }
        }
        member
    });
    for reader in readers {
        reader.await.unwrap();
    }
    apply.join().unwrap();
}
