//! What a watch promises: order, completeness, prompt and honest progress.

use std::time::{Duration, Instant};

use kvorum::Config;
use kvorum::pb::etcdserverpb::WatchCreateRequest;
use kvorum::pb::etcdserverpb::watch_create_request::FilterType;
use kvorum::pb::mvccpb::event::EventType;

use crate::rig::{
    Watches, delete_op, mod_revision_is, put_op, seen, soon, start, start_with, watch_prefix,
};

#[tokio::test]
async fn creates_are_answered_in_order_with_ids_of_their_own() {
    let rig = start().await;
    let mut watches = rig.watches();
    for id in 0..3 {
        let created = watches.create(watch_prefix("a/", 0)).await;
        assert_eq!((created.watch_id, created.canceled), (id, false));
        assert_eq!(created.header.unwrap().revision, 1);
    }
    // Chosen ids are taken, skipped by the server, and refused when in use.
    let chosen = |watch_id| WatchCreateRequest { watch_id, ..watch_prefix("a/", 0) };
    assert_eq!(watches.create(chosen(3)).await.watch_id, 3);
    assert_eq!(watches.create(chosen(0)).await.watch_id, 4);
    let refused = watches.create(chosen(3)).await;
    assert!(refused.canceled);
    assert_eq!(refused.watch_id, -1);
    assert_eq!(refused.cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
}

#[tokio::test]
async fn ranges_without_keys_and_negative_revisions_are_refused_on_the_stream() {
    let rig = start().await;
    let mut watches = rig.watches();
    let empty = WatchCreateRequest {
        key: "b".into(),
        range_end: "a".into(),
        ..WatchCreateRequest::default()
    };
    let refused = watches.create(empty).await;
    assert_eq!((refused.watch_id, refused.canceled), (-1, true));
    assert_eq!(refused.cancel_reason, "mvcc: watcher range is empty");

    let refused = watches.create(watch_prefix("a/", -1)).await;
    assert_eq!((refused.watch_id, refused.canceled, refused.compact_revision), (-1, true, 0));
    assert_eq!(refused.cancel_reason, "etcdserver: mvcc: required revision has been compacted");
    // The stream goes on.
    assert_eq!(watches.create(watch_prefix("a/", 0)).await.watch_id, 0);
}

#[tokio::test]
async fn events_of_one_revision_come_in_one_response() {
    let rig = start().await;
    rig.put("a/3", "old").await;
    let mut watches = rig.watches();
    watches.create(watch_prefix("a/", 0)).await;
    let ops = vec![put_op("a/2", "x"), put_op("a/1", "y"), delete_op("a/3"), put_op("b", "z")];
    let txn = rig.txn(mod_revision_is("none", 0), ops, Vec::new()).await;
    let revision = txn.header.unwrap().revision;
    let response = watches.next().await;
    assert_eq!(response.header.as_ref().unwrap().revision, revision);
    let told: Vec<_> = seen(&response).into_iter().map(|e| (e.kind, e.key, e.revision)).collect();
    assert_eq!(
        told,
        [
            (EventType::Put, "a/2".to_owned(), revision),
            (EventType::Put, "a/1".to_owned(), revision),
            (EventType::Delete, "a/3".to_owned(), revision),
        ],
        "in the order they were carried out"
    );
}

#[tokio::test]
async fn a_watch_from_the_past_gets_everything_once_and_in_order() {
    let rig = start().await;
    let mut expected = Vec::new();
    for number in 0..300 {
        expected.push(rig.put(&format!("a/{}", number % 7), "v").await);
    }
    let mut watches = rig.watches();
    watches.create(watch_prefix("a/", expected[50])).await;
    for number in 0..100 {
        expected.push(rig.put(&format!("a/{}", number % 7), "v").await);
    }
    let told: Vec<_> = watches.events(350).await.iter().map(|event| event.revision).collect();
    assert_eq!(told, expected[50..]);
}

#[tokio::test]
async fn a_watch_from_the_future_waits_for_it() {
    let rig = start().await;
    let now = rig.revision().await;
    let mut watches = rig.watches();
    let created = watches.create(watch_prefix("a/", now + 3)).await;
    assert!(!created.canceled);
    // No watcher on the stream is there yet: no progress to tell.
    watches.request_progress().await;
    for value in ["1", "2", "3", "4"] {
        rig.put("a/k", value).await;
    }
    let values: Vec<_> = watches.events(2).await.into_iter().map(|event| event.value).collect();
    assert_eq!(values, ["3", "4"]);
}

#[tokio::test]
async fn a_start_before_the_compaction_is_cancelled_after_it_was_created() {
    let rig = start().await;
    for _ in 0..5 {
        rig.put("a/k", "v").await;
    }
    let compacted = rig.revision().await - 1;
    rig.compact(compacted).await.unwrap();
    let mut watches = rig.watches();
    let created = watches.create(watch_prefix("a/", compacted - 1)).await;
    assert!(!created.canceled);
    let cancelled = watches.next().await;
    assert!(cancelled.canceled && cancelled.events.is_empty());
    assert_eq!((cancelled.watch_id, cancelled.compact_revision), (0, compacted));
    assert_eq!((cancelled.header.unwrap().revision, cancelled.cancel_reason.as_str()), (0, ""));

    // The compacted revision itself is still there.
    watches.create(watch_prefix("a/", compacted)).await;
    let told: Vec<_> = watches.events(2).await.iter().map(|event| event.revision).collect();
    assert_eq!(told, [compacted, compacted + 1]);
}

#[tokio::test]
async fn a_cancelled_watch_is_silent_and_an_unknown_id_is_ignored() {
    let rig = start().await;
    let mut watches = rig.watches();
    watches.create(watch_prefix("a/", 0)).await;
    watches.create(watch_prefix("b/", 0)).await;
    watches.cancel(17).await;
    watches.cancel(0).await;
    let cancelled = watches.next().await;
    assert_eq!((cancelled.watch_id, cancelled.canceled), (0, true));
    assert_eq!((cancelled.compact_revision, cancelled.cancel_reason.as_str()), (0, ""));
    assert_eq!(cancelled.header.unwrap().revision, rig.revision().await);
    rig.put("a/k", "v").await;
    rig.put("b/k", "v").await;
    assert_eq!(watches.next().await.watch_id, 1);
}

#[tokio::test]
async fn filters_leave_out_what_is_not_wanted() {
    let rig = start().await;
    let mut watches = rig.watches();
    for filter in [FilterType::Noput, FilterType::Nodelete] {
        let filters = vec![filter.into()];
        watches.create(WatchCreateRequest { filters, ..watch_prefix("a/", 0) }).await;
    }
    rig.put("a/k", "1").await;
    rig.delete("a/k", "").await;
    rig.put("a/k", "2").await;
    rig.delete("a/k", "").await;
    let mut told = [Vec::new(), Vec::new()];
    while told.iter().any(|events| events.len() < 2) {
        let response = watches.next().await;
        let kinds = seen(&response).into_iter().map(|event| event.kind);
        told[usize::try_from(response.watch_id).unwrap()].extend(kinds);
    }
    assert_eq!(told, [vec![EventType::Delete; 2], vec![EventType::Put; 2]]);
}

#[tokio::test]
async fn previous_values_come_only_when_asked_for() {
    let rig = start().await;
    rig.put("a/k", "1").await;
    let mut watches = rig.watches();
    for prev_kv in [false, true] {
        watches.create(WatchCreateRequest { prev_kv, ..watch_prefix("a/", 0) }).await;
    }
    rig.put("a/k", "2").await;
    let mut told = [None, None];
    for _ in 0..2 {
        let response = watches.next().await;
        let [event] = <[_; 1]>::try_from(seen(&response)).unwrap();
        told[usize::try_from(response.watch_id).unwrap()] = event.previous;
    }
    assert_eq!(told, [None, Some("1".to_owned())]);
}

#[tokio::test]
async fn only_a_client_that_can_join_fragments_gets_them() {
    let rig = start().await;
    let value = "v".repeat(1 << 20);
    for key in ["a/1", "a/2", "a/3"] {
        rig.put(key, &value).await;
    }
    for fragment in [false, true] {
        let mut watches = rig.watches();
        let create = WatchCreateRequest { fragment, prev_kv: true, ..watch_prefix("a/", 0) };
        watches.create(create).await;
        let revision = rig.delete("a/", "a0").await;
        let mut parts = Vec::new();
        loop {
            let response = watches.next().await;
            assert_eq!(response.header.as_ref().unwrap().revision, revision);
            let more = response.fragment;
            parts.push(response.events.len());
            if !more {
                break;
            }
        }
        assert_eq!(parts.iter().sum::<usize>(), 3);
        assert_eq!(parts.len() > 1, fragment, "{parts:?}");
        for key in ["a/1", "a/2", "a/3"] {
            rig.put(key, &value).await;
        }
    }
}

#[tokio::test]
async fn progress_is_told_at_once() {
    let rig = start().await;
    let mut watches = rig.watches();
    // Without a watcher there is nothing to tell.
    watches.request_progress().await;
    watches.create(watch_prefix("a/", 0)).await;
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let revision = rig.put("b", "v").await;
        let asked = Instant::now();
        watches.request_progress().await;
        // The hub may hear of the request before it hears of the put.
        let progress = watches.next().await;
        fastest = fastest.min(asked.elapsed());
        assert_eq!((progress.watch_id, progress.events.len()), (-1, 0));
        assert!(progress.header.unwrap().revision <= revision);
    }
    // One that is not slowed down by other work on this machine is fast.
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

#[tokio::test]
async fn progress_comes_to_tell_every_revision() {
    let rig = start().await;
    let mut watches = rig.watches();
    watches.create(watch_prefix("a/", 0)).await;
    let revision = rig.put("b", "v").await;
    soon("progress to reach the last write", async {
        loop {
            watches.request_progress().await;
            if watches.next().await.header.unwrap().revision == revision {
                break;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_never_ahead_of_the_events() {
    const WRITES: usize = 400;
    let rig = start().await;
    let mut watches = rig.watches();
    // Two watchers: progress counts for the stream, so for both.
    watches.create(watch_prefix("a/", 0)).await;
    watches.create(watch_prefix("a/", 1)).await;
    let first = rig.revision().await;
    let writer = {
        let mut kv = rig.kv();
        tokio::spawn(async move {
            for number in 0..WRITES {
                let key = format!("a/{}", number % 5);
                kv.put(crate::rig::put_request(&key, "v", 0)).await.unwrap();
            }
        })
    };
    let last = first + WRITES as i64;
    let mut reached = [first; 2];
    let mut progressed = 0;
    watches.request_progress().await;
    while reached != [last; 2] {
        let response = watches.next().await;
        if response.events.is_empty() {
            // Every revision after the first changed a watched key.
            let told = response.header.unwrap().revision;
            assert!(told <= reached[0] && told <= reached[1], "{told} ahead of {reached:?}");
            progressed += 1;
            watches.request_progress().await;
        } else {
            let watcher = usize::try_from(response.watch_id).unwrap();
            for event in seen(&response) {
                assert_eq!(event.revision, reached[watcher] + 1, "no gap, nothing twice");
                reached[watcher] = event.revision;
            }
            // A request that found a watcher behind gets no answer: ask again.
            if progressed == 0 {
                watches.request_progress().await;
            }
        }
    }
    writer.await.unwrap();
}

#[tokio::test]
async fn quiet_watches_that_want_it_are_told_how_far_they_are() {
    let config = Config {
        watch_progress_notify_interval: Duration::from_millis(100),
        ..Config::in_memory()
    };
    let rig = start_with(config).await;
    let mut watches = rig.watches();
    watches.create(watch_prefix("a/", 0)).await;
    let create = WatchCreateRequest { progress_notify: true, ..watch_prefix("a/", 0) };
    watches.create(create).await;
    let revision = rig.put("b", "v").await;
    soon("a notification of the last revision", async {
        loop {
            let progress = watches.next().await;
            assert_eq!((progress.watch_id, progress.events.len()), (1, 0));
            if progress.header.unwrap().revision == revision {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_done_asking_keeps_its_watches() {
    let rig = start().await;
    let url = rig.server.client_urls()[0].to_string();
    let channel = tonic::transport::Endpoint::from_shared(url).unwrap().connect().await.unwrap();
    let mut watches = Watches::open(channel);
    watches.create(watch_prefix("a/", 0)).await;
    watches.half_close();
    for value in ["1", "2", "3"] {
        rig.put("a/k", value).await;
        assert_eq!(watches.events(1).await[0].value, value);
    }
}

#[tokio::test]
async fn a_slow_client_misses_nothing_and_holds_nobody_up() {
    let rig = start().await;
    let mut slow = rig.watches();
    slow.create(watch_prefix("a/", 0)).await;
    let mut quick = rig.watches();
    quick.create(watch_prefix("a/", 0)).await;
    // More than any queue between server and client holds.
    let value = "v".repeat(64 << 10);
    let mut revisions = Vec::new();
    for _ in 0..200 {
        revisions.push(rig.put("a/k", &value).await);
        assert_eq!(quick.events(1).await[0].revision, revisions[revisions.len() - 1]);
    }
    let told: Vec<_> = slow.events(200).await.iter().map(|event| event.revision).collect();
    assert_eq!(told, revisions);
}

#[tokio::test]
async fn streams_end_with_the_server_in_a_way_that_makes_clients_resume() {
    let rig = start().await;
    let url = rig.server.client_urls()[0].to_string();
    let channel = tonic::transport::Endpoint::from_shared(url).unwrap().connect().await.unwrap();
    let (_requests, stream) = tokio::sync::mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut client = kvorum::pb::etcdserverpb::watch_client::WatchClient::new(channel);
    let mut responses = client.watch(stream).await.unwrap().into_inner();
    let stopping = tokio::spawn(rig.server.shutdown());
    let end = soon("the stream to end", responses.message()).await.unwrap_err();
    assert_eq!(end.code(), tonic::Code::Unavailable, "{end:?}");
    soon("the server to stop", stopping).await.unwrap().unwrap();
}
