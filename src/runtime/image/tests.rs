use super::*;
use crate::log::Mark;
use crate::pb::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest,
};
use crate::pb::kvorumpb::{Command, command::Request};
use crate::runtime::held::HELD_BYTES_MAX;
use crate::state::Effects;
use crate::state::members::Members;
use crate::storage::MemoryStorage;
use crate::storage::spool::Spools;

fn new_state() -> StateMachine {
    let urls = vec!["http://localhost:2380".to_owned()];
    let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
    StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned())
}

fn apply(state: &RwLock<StateMachine>, request: Request) {
    let mut state = state.write();
    let entry = Mark { index: state.applied().index + 1, term: 1 };
    let command = Command { header: None, request: Some(request) };
    state.apply(entry, command, &mut Effects::default()).expect("applied");
}

fn put(key: &str, value: &str, lease: i64) -> Request {
    let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
    Request::Put(PutRequest { key, value, lease, ..PutRequest::default() })
}

fn delete(key: &str) -> Request {
    let key = Bytes::from(key.to_owned());
    Request::DeleteRange(DeleteRangeRequest { key, ..DeleteRangeRequest::default() })
}

fn compact(revision: i64) -> Request {
    Request::Compaction(CompactionRequest { revision, physical: false })
}

/// A state with something of everything, with a compaction that is only begun.
fn state_with_everything() -> Arc<RwLock<StateMachine>> {
    let state = RwLock::new(new_state());
    apply(&state, Request::LeaseGrant(LeaseGrantRequest { ttl: 60, id: 7 }));
    apply(&state, Request::LeaseGrant(LeaseGrantRequest { ttl: 90, id: 8 }));
    for round in 0..5 {
        for key in 0..20 {
            apply(&state, put(&format!("key {key}"), &format!("value {round}"), 7 + key % 3 % 2));
        }
        apply(&state, delete("key 3"));
    }
    apply(&state, Request::LeaseRevoke(LeaseRevokeRequest { id: 8 }));
    apply(&state, put("after", "x", 7));
    apply(&state, compact(60));
    Arc::new(state)
}

fn all(source: &mut Source) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(chunk) = source.next_chunk().expect("it is not lost") {
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(source.offset(), bytes.len() as u64);
    bytes
}

fn spool_of(bytes: &[u8]) -> Spool {
    let spools = Spools::open(None).expect("in memory");
    let mut spool = spools.begin().expect("in memory").expect("there is room");
    spool.append(Bytes::copy_from_slice(bytes)).expect("in memory");
    spool
}

fn filled(bytes: &[u8], member_id: u64) -> Result<StateMachine, FillError> {
    let cluster_id = new_state().members().cluster_id();
    let mut storage = MemoryStorage::new();
    let restored = fill(&mut spool_of(bytes), &mut storage, cluster_id, member_id, &|| false)?;
    assert!(restored.head.installed, "until the next checkpoint");
    Ok(StateMachine::restore(restored))
}

fn assert_equal(left: &StateMachine, right: &StateMachine) {
    assert_eq!(left.applied(), right.applied());
    assert_eq!(left.store().revision(), right.store().revision());
    assert_eq!(left.store().compact_revision(), right.store().compact_revision());
    assert_eq!(left.store().keys_total(), right.store().keys_total());
    assert_eq!(left.members(), right.members());
    let leases = |state: &StateMachine| {
        let leases = state.lessor().iter();
        let leases = leases.map(|lease| (lease.to_record(), lease.keys().cloned().collect()));
        leases.collect::<Vec<(Lease, Vec<Bytes>)>>()
    };
    assert_eq!(leases(left), leases(right), "with the keys that hang on them");
    assert_eq!(left.hash(), right.hash());
    let at = left.store().revision();
    assert_eq!(left.store().hash_kv(at), right.store().hash_kv(at));
    let records = |state: &StateMachine| state.store().records().collect::<Vec<_>>();
    assert_eq!(records(left), records(right));
}

/// The image is of the moment it was begun in, whatever happens while it is made, and makes the
/// receiver's state equal to the sender's at that moment, but for who it is of.
#[test]
fn an_image_is_read_back_as_the_state_it_was_begun_with() {
    let state = state_with_everything();
    let pins = Arc::default();
    let undisturbed = all(&mut Source::new(1, &state, &pins));
    let expected = filled(&undisturbed, 5).expect("a state");
    assert_eq!(expected.member_id(), 5);
    assert_equal(&expected, &state.read());

    let mut source = Source::new(2, &state, &pins);
    let revision = state.read().store().revision();
    let mut disturbed = Vec::new();
    let mut turn = 0;
    // Chunks are large and the state is small: the steps are disturbed one by one.
    while !source.progress.ended {
        source.step().expect("it is not lost");
        turn += 1;
        apply(&state, put("key 5", "newer", 0));
        apply(&state, put(&format!("new {turn}"), "x", 0));
        apply(&state, delete("key 7"));
        apply(&state, compact(revision + turn));
        let floor = pins.lowest().expect("the source pins");
        while !state.write().compact_step(floor, 10) {
            if state.read().store().is_compaction_pinned(floor) {
                break;
            }
        }
    }
    disturbed.extend(all(&mut source));
    assert!(turn > 3 && disturbed == undisturbed);
    drop(source);
    assert_eq!(pins.readers(), 0);
}

/// As in a checkpoint that was written here, so that they take no more space and memory.
#[test]
fn versions_that_were_sent_are_frozen() {
    let state = state_with_everything();
    let bytes = all(&mut Source::new(1, &state, &Arc::default()));
    let mut storage = MemoryStorage::new();
    let cluster_id = new_state().members().cluster_id();
    fill(&mut spool_of(&bytes), &mut storage, cluster_id, 5, &|| false).expect("a state");
    let last = state.read().store().records().last().expect("there are some").0;
    assert_eq!(storage.frozen_to(), Some(records::key(last)));
}

#[test]
fn versions_out_of_order_are_refused_and_a_stop_is_heeded() {
    let mut writer = ImageWriter::new();
    let kv = b"\x0a\x01k".as_slice();
    for main in [3, 2] {
        let key = records::key(crate::mvcc::Revision::new(main, 0));
        writer.put(Table::Mvcc, &key, [&[1], kv]);
    }
    writer.end(records::HEAD, b"");
    let image: Vec<u8> = std::iter::from_fn(|| writer.take()).flatten().collect();
    let fill = |stops: bool| {
        fill(&mut spool_of(&image), &mut MemoryStorage::new(), 1, 1, &|| stops)
            .err()
            .expect("refused")
    };
    let refused = fill(false).to_string();
    assert!(refused.contains("Mvcc") && refused.contains("after the one before"), "{refused}");
    assert!(matches!(fill(true), FillError::Stopped));
}

/// Records, versions of one key, and keys that come and go between steps: however the walk is
/// cut into steps, the bytes are the same.
#[test]
fn an_image_that_is_begun_again_is_the_same_bytes() {
    let state = Arc::new(RwLock::new(new_state()));
    let value = "v".repeat(10_000);
    for index in 0..30 {
        apply(&state, put(&format!("key {}", index % 7), &value, 0));
        apply(&state, put("one key", &value, 0));
    }
    let pins = Arc::default();
    let mut source = Source::new(1, &state, &pins);
    let first = all(&mut source);
    assert!(first.len() > 2 * FRAME_BYTES, "several chunks");
    for round in 0..20 {
        apply(&state, put(&format!("between {round}"), &value, 0));
        apply(&state, delete(&format!("key {}", round % 7)));
        let revision = state.read().store().revision();
        apply(&state, compact(revision));
        state.write().compact_step(pins.lowest().expect("pinned"), 1000);
        source.restart();
        assert!(all(&mut source) == first, "round {round}");
    }
    let spooled = filled(&first, 1).expect("a state");
    assert_eq!(spooled.store().keys_total(), 8);
}

#[test]
fn what_is_not_an_image_of_this_cluster_is_refused() {
    let state = state_with_everything();
    let intact = all(&mut Source::new(1, &state, &Arc::default()));
    for at in (0..intact.len()).step_by(97) {
        let mut flipped = intact.clone();
        flipped[at] ^= 4;
        assert!(filled(&flipped, 1).is_err(), "byte {at}");
        assert!(filled(&intact[..at], 1).is_err(), "cut at {at}");
    }
    let mut storage = MemoryStorage::new();
    let error = fill(&mut spool_of(&intact), &mut storage, 99, 1, &|| false);
    assert!(matches!(error, Err(FillError::OtherCluster { own: 99, .. })));
}

/// Revisions that the new state has compacted cannot be read any more; the others can.
#[test]
fn a_source_ends_when_its_state_is_replaced_by_one_without_its_revision() {
    let state = state_with_everything();
    let pins: Arc<Pins> = Arc::default();
    let mut source = Source::new(1, &state, &pins);
    let bytes = all(&mut source);
    *state.write() = filled(&bytes, 1).expect("a state");
    pins.lose_below(60);
    source.restart();
    assert!(all(&mut source) == bytes, "the new state has it all");
    pins.lose_below(61);
    source.restart();
    assert_eq!(source.next_chunk().map(|chunk| chunk.map(|chunk| chunk.len())), Ok(Some(12)));
    assert_eq!(source.next_chunk(), Err(ImageLost::Replaced));
}

/// However often its transfer is interrupted and goes on.
#[test]
fn a_source_that_keeps_too_much_is_given_up() {
    let state = state_with_everything();
    let mut source = Source::new(1, &state, &Arc::default());
    let bytes = all(&mut source);
    source.restart();
    assert!(all(&mut source) == bytes, "nothing is compacted meanwhile");
    source.held.assume(HELD_BYTES_MAX + 1);
    source.restart();
    source.next_chunk().expect("what an image begins with");
    assert_eq!(source.next_chunk(), Err(ImageLost::TooMuchHeld));
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_source_is_kept_for_a_while() {
    let state = state_with_everything();
    let pins: Arc<Pins> = Arc::default();
    let outgoing = Arc::new(Images::new(Arc::clone(&state), Arc::clone(&pins)));
    let index = state.read().applied().index;
    let source = outgoing.source(3, 0).expect("random numbers");
    let id = source.id();
    outgoing.ended(3, source, &Err(SendError::Stalled));
    assert_ne!(outgoing.source(4, 0).expect("random numbers").id(), id, "another member");
    let source = outgoing.source(3, index).expect("random numbers");
    assert_eq!(source.id(), id);
    outgoing.ended(3, source, &Err(SendError::Stalled));
    assert_ne!(outgoing.source(3, index + 1).expect("random numbers").id(), id, "too old");
    let source = outgoing.source(3, 0).expect("random numbers");
    outgoing.ended(3, source, &Ok(()));
    assert_eq!(pins.readers(), 0, "what arrived is not kept");
    let source = outgoing.source(3, 0).expect("random numbers");
    outgoing.ended(3, source, &Err(SendError::Mismatch));
    assert_eq!(pins.readers(), 0, "what cannot go on is not kept");
}

/// Tens of thousands of keys: the source holds handles of one step, and one frame.
#[test]
fn a_source_holds_little_whatever_the_state_holds() {
    let state = Arc::new(RwLock::new(new_state()));
    for index in 0..50_000 {
        apply(&state, put(&format!("key {index}"), &"v".repeat(100), 0));
    }
    let mut source = Source::new(1, &state, &Arc::default());
    let mut most = 0;
    while let Some(chunk) = source.next_chunk().expect("it is not lost") {
        most = most.max(source.progress.writer.ready_bytes() + chunk.len());
    }
    assert!(source.offset() > 10 * FRAME_BYTES as u64, "a state of many chunks");
    // A step's records, and what is left of the frame before.
    assert!(most <= 3 * FRAME_BYTES, "{most} bytes");
}
