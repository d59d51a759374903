use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::bolt::write::tests::read;
use crate::log::Mark;
use crate::mvcc::{Record, Revision, Store};
use crate::pb::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, PutRequest,
};
use crate::pb::kvorumpb::{Command, command::Request};
use crate::state::Effects;
use crate::state::members::Members;

fn new_state() -> Arc<RwLock<StateMachine>> {
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    let state = StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned());
    Arc::new(RwLock::new(state))
}

fn apply(state: &RwLock<StateMachine>, request: Request) {
    let mut state = state.write();
    let entry = Mark { index: state.applied().index + 1, term: 1 };
    let command = Command { header: None, request: Some(request) };
    state.apply(entry, command, &mut Effects::default()).expect("applied");
}

/// The nth write of a history that has everything in it.
fn write(state: &RwLock<StateMachine>, number: u64) {
    let key = Bytes::from(format!("key {}", number * 7 % 300));
    if number % 9 == 4 {
        return apply(
            state,
            Request::DeleteRange(DeleteRangeRequest { key, ..Default::default() }),
        );
    }
    let value = Bytes::from(vec![number as u8; number as usize * 31 % 6000]);
    apply(state, Request::Put(PutRequest { key, value, ..Default::default() }));
}

fn compact(state: &RwLock<StateMachine>, pins: &Pins, behind: i64) {
    let revision = state.read().store().revision() - behind;
    apply(state, Request::Compaction(CompactionRequest { revision, physical: false }));
    let floor = pins.lowest().unwrap_or(i64::MAX);
    state.write().compact_step(floor, usize::MAX);
}

fn begin(state: &Arc<RwLock<StateMachine>>, pins: &Arc<Pins>) -> Blobs {
    let slot = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
    Save::new(state, pins).begin(Metrics::new().unwrap(), slot)
}

/// The records that a file holds.
fn records(rows: Vec<(Bytes, Bytes)>) -> Vec<Record> {
    let number = |bytes: &[u8]| i64::from_be_bytes(bytes.try_into().unwrap());
    let record = |(key, kv): (Bytes, Bytes)| {
        let revision = Revision::new(number(&key[..8]), number(&key[9..17]));
        (revision, key.len() == 18, kv)
    };
    rows.into_iter().map(record).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_of_one_revision_while_writes_and_compactions_go_on() {
    let (state, pins) = (new_state(), Arc::new(Pins::default()));
    apply(&state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 7 }));
    (0..4000).for_each(|number| write(&state, number));
    compact(&state, &pins, 1500);
    let stop = Arc::new(AtomicBool::new(false));
    // Who holds it keeps the writer from writing.
    let turn = Arc::new(parking_lot::Mutex::new(()));
    let writer = std::thread::spawn({
        let (state, pins) = (Arc::clone(&state), Arc::clone(&pins));
        let (stop, turn) = (Arc::clone(&stop), Arc::clone(&turn));
        move || {
            for number in 4000.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let _turn = turn.lock();
                write(&state, number);
                if number % 50 == 0 {
                    compact(&state, &pins, 10);
                }
            }
        }
    });
    for _ in 0..5 {
        let (save, expected) = {
            // What is expected is as of the revision that is saved.
            let _turn = turn.lock();
            let (revision, compacted, records) = {
                let state = state.read();
                let store = state.store();
                let records: Vec<Record> = store.records().collect();
                (store.revision(), store.compact_revision(), records)
            };
            let slot = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
            let save = Save::new(&state, &pins);
            assert_eq!(save.revision(), revision);
            let expected = Store::restore(records, revision, compacted).unwrap();
            (save.begin(Metrics::new().unwrap(), slot), expected)
        };
        let (mut blobs, mut file) = (save, Vec::new());
        while let Some(blob) = blobs.recv().await {
            file.push(blob.unwrap());
        }
        let trailer = file.pop().unwrap();
        let file: Vec<u8> = file.iter().flat_map(|blob| blob.bytes.to_vec()).collect();
        let mut digest = Digest::new();
        digest.add(&file);
        assert_eq!(trailer.bytes, digest.finish().as_slice());
        let mut buckets = read(&file);
        let names: Vec<&str> = buckets.keys().map(String::as_str).collect();
        assert_eq!(names, Bucket::ALL.map(Bucket::name));
        assert_eq!((buckets["lease"].0.len(), buckets["members"].0.len()), (1, 1));
        let (revision, compacted) = (expected.revision(), expected.compact_revision());
        let rows = buckets.remove("key").unwrap().0;
        let found = Store::restore(records(rows), revision, compacted).unwrap();
        let some = (compacted..=revision).step_by(97);
        for at in some.chain([revision]) {
            assert_eq!(found.hash_kv(at), expected.hash_kv(at), "at {at} of {revision}");
        }
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert_eq!(pins.readers(), 0);
}

#[tokio::test]
async fn a_client_that_goes_releases_its_pin() {
    let (state, pins) = (new_state(), Arc::new(Pins::default()));
    (0..3000).for_each(|number| write(&state, number));
    let mut blobs = begin(&state, &pins);
    assert!(blobs.recv().await.unwrap().is_ok());
    assert_eq!(pins.readers(), 1);
    drop(blobs);
    // The runtime waits for the thread.
    tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        while pins.readers() > 0 {
            assert!(began.elapsed() < Duration::from_secs(20), "the pin stays");
            std::thread::yield_now();
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_save_that_keeps_too_much_or_whose_state_is_replaced_is_given_up() {
    let (state, pins) = (new_state(), Arc::new(Pins::default()));
    (0..100).for_each(|number| write(&state, number));
    let mut save = Save::new(&state, &pins);
    save.held.assume(HELD_BYTES_MAX + 1);
    let slot = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
    let mut blobs = save.begin(Metrics::new().unwrap(), slot);
    assert_eq!(blobs.recv().await, Some(Err(SaveError::TooMuchHeld)));
    assert_eq!(blobs.recv().await, None);

    let save = Save::new(&state, &pins);
    pins.lose_below(50);
    let slot = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
    let mut blobs = save.begin(Metrics::new().unwrap(), slot);
    assert_eq!(blobs.recv().await, Some(Err(SaveError::Replaced)));
}
