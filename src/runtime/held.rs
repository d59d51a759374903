//! What a slow reader keeps in memory, and how much of that is too much.
//!
//! A [pin](super::pins) spares what its reader has yet to see: the versions that were replaced
//! since, and that compaction would have freed. Whoever sends what it reads to somebody outside
//! (a snapshot file to a client, an image to another member) has no say in how long that takes, and
//! so looks here after each step. It gives up when it keeps more than [`HELD_BYTES_MAX`]: memory
//! that is needed to serve is not for somebody who takes what he asked for slowly, or stops and
//! resumes for ever.
//!
//! Several readers may keep the same versions. Each is counted by itself: there are few.

use parking_lot::RwLock;

use crate::mvcc::Revision;
use crate::state::StateMachine;

/// What a reader may keep from being freed by compactions that come after it has begun.
pub const HELD_BYTES_MAX: u64 = 512 << 20;
/// Changes looked at in one hold of the state's lock: well under a millisecond.
const CHANGES_PER_STEP: usize = 4096;
/// Such steps at a time: readers that are tasks of the runtime look as well. A reader that has to
/// count more does so the next time, and it steps often enough for that.
const STEPS_AT_ONCE: usize = 4;

/// How much a reader keeps.
#[derive(Debug)]
pub(super) struct Held {
    bytes: u64,
    /// Up to where that was counted.
    counted_to: Revision,
}

impl Held {
    /// Of a reader that has pinned this revision.
    pub(super) fn from(pinned: i64) -> Held {
        Held { bytes: 0, counted_to: Revision::new(pinned, 0) }
    }

    /// Counts what was compacted since the last time, and says whether all of it is more than
    /// [`HELD_BYTES_MAX`]. To be called after each step of the reader.
    pub(super) fn is_too_much(&mut self, state: &RwLock<StateMachine>) -> bool {
        for _ in 0..STEPS_AT_ONCE {
            let from = self.counted_to;
            let (bytes, next) = state.read().store().replaced_bytes(from, CHANGES_PER_STEP);
            (self.bytes, self.counted_to) = (self.bytes + bytes, next);
            if next == from {
                break;
            }
        }
        self.bytes > HELD_BYTES_MAX
    }

    /// As if this had been counted.
    #[cfg(test)]
    pub(super) fn assume(&mut self, bytes: u64) {
        self.bytes = bytes;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::log::Mark;
    use crate::pb::etcdserverpb::{CompactionRequest, PutRequest};
    use crate::pb::kvorumpb::{Command, command::Request};
    use crate::state::Effects;
    use crate::state::members::Members;

    fn apply(state: &RwLock<StateMachine>, request: Request) {
        let mut state = state.write();
        let entry = Mark { index: state.applied().index + 1, term: 1 };
        let command = Command { header: None, request: Some(request) };
        state.apply(entry, command, &mut Effects::default()).expect("applied");
    }

    #[test]
    fn what_is_compacted_after_the_pin_is_counted_once_until_it_is_too_much() {
        const VALUE_BYTES: u64 = 1 << 20;
        let urls = vec!["http://localhost:2380".to_owned()];
        let members = Members::bootstrap(&[("default".to_owned(), urls)], "etcd-cluster");
        let state = StateMachine::bootstrap(members.list()[0].id, members, "3.7.0".to_owned());
        let state = RwLock::new(state);
        // All versions share one buffer: what is counted is what clients gave.
        let value = Bytes::from(vec![7; VALUE_BYTES as usize]);
        let put = || {
            let put = PutRequest { key: "k".into(), value: value.clone(), ..Default::default() };
            apply(&state, Request::Put(put));
        };
        let revision = || state.read().store().revision();
        put();
        let mut held = Held::from(revision());
        put();
        assert!(!held.is_too_much(&state) && held.bytes == 0, "nothing was compacted");
        let compact = || {
            let compaction = CompactionRequest { revision: revision(), physical: false };
            apply(&state, Request::Compaction(compaction));
        };
        put();
        compact();
        assert!(!held.is_too_much(&state));
        let once = held.bytes;
        assert!((VALUE_BYTES..2 * VALUE_BYTES).contains(&once), "{once}");
        assert!(!held.is_too_much(&state) && held.bytes == once, "not twice");
        held.assume(HELD_BYTES_MAX);
        put();
        compact();
        assert!(held.is_too_much(&state));
        assert!(held.is_too_much(&state), "and stays so");
    }
}
