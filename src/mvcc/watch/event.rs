//! Events as they go over the wire.
//!
//! `mvccpb.Event` is three fields, two of which are records that the store holds in
//! encoded form already. So an event is put together, not encoded:
//!
//! ```text
//! 08 01                 type = DELETE; a PUT is 0 and has no byte
//! 12 <len> <KeyValue>   kv
//! 1a <len> <KeyValue>   prev_kv, if asked for and there was one
//! ```

use bytes::{BufMut, Bytes};
use prost::encoding::{encode_varint, encoded_len_varint};

use super::super::Change;

const TYPE_DELETE: [u8; 2] = [0x08, 0x01];
const KV_TAG: u8 = 0x12;
const PREV_KV_TAG: u8 = 0x1a;

/// The event of one change, made when first asked for, once with and once without the
/// previous record, and shared by all watchers that get it.
pub(super) struct SharedEvent<'a> {
    change: &'a Change,
    plain: Option<Bytes>,
    with_prev: Option<Bytes>,
}

impl<'a> SharedEvent<'a> {
    pub(super) fn new(change: &'a Change) -> Self {
        SharedEvent { change, plain: None, with_prev: None }
    }

    /// The encoded `mvccpb.Event`; with the record replaced, if there was one, when
    /// `prev_kv` is set.
    pub(super) fn encoded(&mut self, prev_kv: bool) -> Bytes {
        let change = self.change;
        match &change.prev {
            Some(prev) if prev_kv => {
                self.with_prev.get_or_insert_with(|| encode(change, Some(prev))).clone()
            }
            _ => self.plain.get_or_insert_with(|| encode(change, None)).clone(),
        }
    }
}

fn encode(change: &Change, prev: Option<&Bytes>) -> Bytes {
    let type_len = if change.deleted { TYPE_DELETE.len() } else { 0 };
    let size = type_len + field_len(&change.kv) + prev.map_or(0, field_len);
    let mut event = Vec::with_capacity(size);
    if change.deleted {
        event.put_slice(&TYPE_DELETE);
    }
    put_field(&mut event, KV_TAG, &change.kv);
    if let Some(prev) = prev {
        put_field(&mut event, PREV_KV_TAG, prev);
    }
    debug_assert_eq!(event.len(), size, "allocated exactly");
    Bytes::from(event)
}

/// What a length-delimited field with a one-byte tag takes, in bytes.
pub(super) fn field_len(record: &Bytes) -> usize {
    1 + encoded_len_varint(record.len() as u64) + record.len()
}

fn put_field(event: &mut Vec<u8>, tag: u8, record: &Bytes) {
    event.put_u8(tag);
    encode_varint(record.len() as u64, event);
    event.put_slice(record);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::super::Revision;
    use super::*;
    use crate::pb::mvccpb::event::EventType;
    use crate::pb::mvccpb::{Event, KeyValue};

    fn record(value_len: usize, mod_revision: i64) -> KeyValue {
        let (key, value) = (Bytes::from_static(b"key"), Bytes::from(vec![7; value_len]));
        KeyValue { key, create_revision: 2, mod_revision, version: 1, value, lease: 0 }
    }

    #[test]
    fn events_are_what_the_generated_encoder_makes_of_them() {
        let tombstone = KeyValue { value: Bytes::new(), mod_revision: 9, ..record(0, 9) };
        let puts = [record(0, 9), record(1, 9), record(200, 9), record(70_000, 9)];
        let cases = puts.map(|kv| (EventType::Put, kv));
        for (event_type, kv) in cases.into_iter().chain([(EventType::Delete, tombstone)]) {
            for prev in [None, Some(record(0, 8)), Some(record(300, 8))] {
                let change = Change {
                    revision: Revision::new(9, 0),
                    key: kv.key.clone(),
                    deleted: event_type == EventType::Delete,
                    kv: kv.encode_to_vec().into(),
                    created: prev.is_none(),
                    prev: prev.as_ref().map(|prev| prev.encode_to_vec().into()),
                };
                let mut shared = SharedEvent::new(&change);
                let event =
                    |prev_kv| Event { r#type: event_type.into(), kv: Some(kv.clone()), prev_kv };
                assert_eq!(shared.encoded(false), event(None).encode_to_vec());
                assert_eq!(shared.encoded(true), event(prev).encode_to_vec());
            }
        }
    }

    #[test]
    fn watchers_share_one_encoding() {
        let kv = Bytes::from(record(10, 9).encode_to_vec());
        let (revision, key) = (Revision::new(9, 0), Bytes::from_static(b"key"));
        let prev = Some(kv.clone());
        let change = Change { revision, key, deleted: false, kv, prev, created: false };
        let mut shared = SharedEvent::new(&change);
        for prev_kv in [false, true] {
            assert_eq!(shared.encoded(prev_kv).as_ptr(), shared.encoded(prev_kv).as_ptr());
        }
        assert_ne!(shared.encoded(false), shared.encoded(true));
    }
}
