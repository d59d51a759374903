//! Watches that write down what they are told: one of all keys on every member, which
//! begins again whenever it ends, and random ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{Error, EventType, WatchFilterType, WatchOptions, WatchResponse};
use tokio::sync::watch as signal;

use crate::client::{Session, TIMEOUT, kv_of};
use crate::history::{Content, Event, Message, Watch};
use crate::rng::Rng;

/// Between two attempts of a watch to begin.
const RETRY: Duration = Duration::from_millis(100);
/// Between two questions how far a watch has come.
const PROGRESS: Duration = Duration::from_millis(300);
/// How much older and newer than now random watches begin.
const START_OFFSET: i64 = 100;

/// Turns true when watches are to end.
pub type Stop = signal::Receiver<bool>;

/// Waits until all is to end, or whoever says so is gone.
pub async fn stopped(stop: &mut Stop) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Watches all keys of one member from the first revision on, again and again. `reached` is
/// how far it has come.
pub async fn everything(mut session: Session, reached: Arc<AtomicI64>, mut stop: Stop) {
    let Some((member, _)) = session.member else { return };
    let mut next = 2;
    while !*stop.borrow() {
        let (key, end) = ("\0".to_owned(), Some("\0".to_owned()));
        let mut watch = Watch {
            member,
            call_us: session.recorder.now_us(),
            key,
            end,
            start: next,
            prev_kv: true,
            no_put: false,
            no_delete: false,
            messages: Vec::new(),
        };
        let recorder = session.recorder.clone();
        let note = |message: &Message| {
            if let Content::Events(events) = &message.content {
                for event in events {
                    recorder.cover(event.kv.mod_revision);
                    reached.fetch_max(event.kv.mod_revision, Ordering::SeqCst);
                }
            }
        };
        // Why it ended is of no interest: it begins again.
        let _ = follow(&mut session, &mut watch, &mut stop, None, note).await;
        for message in &watch.messages {
            match &message.content {
                Content::Events(events) => {
                    let last = events.last().map_or(0, |event| event.kv.mod_revision);
                    next = next.max(last + 1);
                }
                Content::Canceled { compact_revision, .. } => next = next.max(*compact_revision),
                _ => {}
            }
        }
        session.recorder.push_watch(watch);
        if !*stop.borrow() {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Watches one after another, of what `prefixes` begin, each for a few seconds.
pub async fn random(mut session: Session, prefixes: Vec<String>, mut rng: Rng, mut stop: Stop) {
    const LIFE_MS: (i64, i64) = (200, 6_000);
    let Some((member, _)) = session.member else { return };
    while !*stop.borrow() {
        let prefix = prefixes[rng.below(prefixes.len())].clone();
        let newest = session.recorder.newest();
        let start = match rng.chance(30) {
            true => 0,
            false => (newest + rng.between(-START_OFFSET, START_OFFSET)).max(1),
        };
        let filter = rng.below(4);
        let mut watch = Watch {
            member,
            call_us: session.recorder.now_us(),
            end: Some(crate::history::prefix_end(&prefix)),
            key: prefix,
            start,
            prev_kv: rng.chance(50),
            no_put: filter == 1,
            no_delete: filter == 2,
            messages: Vec::new(),
        };
        let life = Duration::from_millis(rng.between(LIFE_MS.0, LIFE_MS.1) as u64);
        let _ = follow(&mut session, &mut watch, &mut stop, Some(life), |_| {}).await;
        session.recorder.push_watch(watch);
        tokio::time::sleep(RETRY).await;
    }
}

/// Watches until the stream ends, `life` is over, or `stop` says so.
async fn follow(
    session: &mut Session,
    watch: &mut Watch,
    stop: &mut Stop,
    life: Option<Duration>,
    note: impl Fn(&Message),
) -> Result<(), Error> {
    let mut options = WatchOptions::new().with_start_revision(watch.start).with_progress_notify();
    if let Some(end) = &watch.end {
        options = options.with_range(end.clone());
    }
    if watch.prev_kv {
        options = options.with_prev_key();
    }
    if watch.no_put {
        options = options.with_filters([WatchFilterType::NoPut]);
    } else if watch.no_delete {
        options = options.with_filters([WatchFilterType::NoDelete]);
    }
    let opened =
        tokio::time::timeout(TIMEOUT, session.client.watch(watch.key.clone(), Some(options)));
    let Ok(opened) = opened.await else { return Ok(()) };
    // When the request side is dropped the stream ends.
    let (mut requests, mut responses) = opened?.split();
    let is_over = async {
        match life {
            Some(life) => tokio::time::sleep(life).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(is_over);
    let mut progress = tokio::time::interval(PROGRESS);
    progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let response = tokio::select! {
            response = responses.message() => response?,
            () = &mut is_over => return Ok(()),
            () = stopped(stop) => return Ok(()),
            // Its queue has room: the answers to those before are read here.
            _ = progress.tick() => {
                requests.request_progress().await?;
                continue;
            }
        };
        let Some(response) = response else { return Ok(()) };
        let message = message_of(&response, session.recorder.now_us());
        note(&message);
        let is_end = matches!(message.content, Content::Canceled { .. });
        watch.messages.push(message);
        if is_end {
            return Ok(());
        }
    }
}

fn message_of(response: &WatchResponse, at_us: u64) -> Message {
    let content = if response.canceled() {
        let (compact_revision, reason) = (response.compact_revision(), response.cancel_reason());
        Content::Canceled { compact_revision, reason: reason.to_owned() }
    } else if response.created() {
        Content::Created
    } else if response.events().is_empty() {
        Content::Progress
    } else {
        Content::Events(response.events().iter().filter_map(event_of).collect())
    };
    Message { at_us, revision: response.header().map_or(0, |header| header.revision()), content }
}

fn event_of(event: &etcd_client::Event) -> Option<Event> {
    let is_delete = event.event_type() == EventType::Delete;
    Some(Event { is_delete, kv: kv_of(event.kv()?), prev: event.prev_kv().map(kv_of) })
}
