//! Requests, encoded and framed before the clock runs.
//!
//! A key is `/bench/` and a number filled up with zeros to the key size, so a
//! request for another key differs in ten bytes: a [`Template`] is copied and patched.

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, compare,
    request_op::Request,
};

use crate::client::frame;

const PREFIX: &[u8] = b"/bench/";
/// The first key that does not begin with the prefix.
const PREFIX_END: &[u8] = b"/bench0";
/// Digits of a key's number.
const DIGITS: usize = 10;
/// The shortest key.
pub const MIN_KEY_BYTES: usize = PREFIX.len() + DIGITS;

/// A framed request with room for a key's number.
pub struct Template {
    frame: Vec<u8>,
    /// Where the digits are.
    at: Vec<usize>,
}

impl Template {
    fn new(message: &impl prost::Message, key_size: usize) -> Template {
        let frame = frame(message).to_vec();
        let key = key(0, key_size);
        let starts = frame.windows(key.len()).enumerate().filter(|(_, window)| *window == key);
        let at = starts.map(|(start, _)| start + key.len() - DIGITS).collect();
        Template { frame, at }
    }

    /// Puts a key.
    pub fn put(key_size: usize, value: &Bytes) -> Template {
        let put = PutRequest { key: key(0, key_size), value: value.clone(), ..Default::default() };
        Template::new(&put, key_size)
    }

    /// Gets a key.
    pub fn get(key_size: usize, serializable: bool) -> Template {
        let range = RangeRequest { key: key(0, key_size), serializable, ..Default::default() };
        Template::new(&range, key_size)
    }

    /// Gets a page of `limit` keys that begins at a key.
    pub fn page(key_size: usize, limit: usize, serializable: bool) -> Template {
        let range = RangeRequest {
            key: key(0, key_size),
            range_end: Bytes::from_static(PREFIX_END),
            limit: limit as i64,
            serializable,
            ..Default::default()
        };
        Template::new(&range, key_size)
    }

    /// Deletes a key.
    pub fn delete(key_size: usize) -> Template {
        Template::new(&DeleteRangeRequest { key: key(0, key_size), ..Default::default() }, key_size)
    }

    /// The request for key `number`.
    pub fn with(&self, number: u64) -> Bytes {
        let mut frame = self.frame.clone();
        for at in &self.at {
            write_digits(&mut frame[*at..*at + DIGITS], number);
        }
        frame.into()
    }
}

/// Key `number`.
pub fn key(number: u64, key_size: usize) -> Bytes {
    let mut key = vec![b'0'; key_size.max(MIN_KEY_BYTES)];
    key[..PREFIX.len()].copy_from_slice(PREFIX);
    let digits = key.len() - DIGITS;
    write_digits(&mut key[digits..], number);
    key.into()
}

fn write_digits(digits: &mut [u8], mut number: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Gets everything.
pub fn everything(serializable: bool) -> Bytes {
    frame(&RangeRequest {
        key: Bytes::from_static(PREFIX),
        range_end: Bytes::from_static(PREFIX_END),
        serializable,
        ..Default::default()
    })
}

/// Puts `key` if its mod revision is `mod_revision`, else gets it: how Kubernetes
/// creates (0) and updates an object.
pub fn update(key: &Bytes, value: &Bytes, mod_revision: i64) -> Bytes {
    let put = PutRequest { key: key.clone(), value: value.clone(), ..Default::default() };
    let get = RangeRequest { key: key.clone(), ..Default::default() };
    frame(&TxnRequest {
        compare: vec![Compare {
            result: compare::CompareResult::Equal as i32,
            target: compare::CompareTarget::Mod as i32,
            key: key.clone(),
            range_end: Bytes::new(),
            target_union: Some(compare::TargetUnion::ModRevision(mod_revision)),
        }],
        success: vec![RequestOp { request: Some(Request::RequestPut(put)) }],
        failure: vec![RequestOp { request: Some(Request::RequestRange(get)) }],
    })
}

/// How many events an encoded `WatchResponse` has, and whether it says that the
/// watcher was created or canceled.
pub fn scan_watch(mut message: &[u8]) -> Option<WatchScan> {
    let mut scan = WatchScan::default();
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let (field, wire_type) = (tag >> 3, tag & 7);
        match wire_type {
            0 => {
                let value = varint(&mut message)?;
                scan.created |= field == 3 && value == 1;
                scan.canceled |= field == 4 && value == 1;
            }
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
                scan.events += u64::from(field == 11);
            }
            _ => return None,
        }
    }
    Some(scan)
}

/// What [`scan_watch`] finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WatchScan {
    pub created: bool,
    pub canceled: bool,
    pub events: u64,
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use kvorum::pb::etcdserverpb::{ResponseHeader, WatchResponse};
    use prost::Message as _;

    use super::*;
    use crate::client::FRAME_HEADER_BYTES;

    #[test]
    fn a_template_is_the_request_for_its_key() {
        let value = Bytes::from_static(b"value");
        let frame = Template::put(32, &value).with(1_234_567);
        let put = PutRequest::decode(&frame[FRAME_HEADER_BYTES..]).expect("a request");
        assert_eq!(put.key, key(1_234_567, 32));
        assert_eq!(put.key.len(), 32);
        assert_eq!(put.value, value);
        assert_eq!(frame[1..5], (frame.len() as u32 - 5).to_be_bytes());
        let range = Template::page(20, 500, true).with(7);
        let range = RangeRequest::decode(&range[FRAME_HEADER_BYTES..]).expect("a request");
        assert_eq!((range.key, range.limit), (key(7, 20), 500));
        assert!(key(9_999_999_999, 17).as_ref() < PREFIX_END);
    }

    #[test]
    fn events_of_a_watch_response_are_counted() {
        let response = WatchResponse {
            header: Some(ResponseHeader { revision: 300, ..Default::default() }),
            watch_id: 3,
            events: vec![Bytes::from_static(b"x"); 3],
            ..Default::default()
        };
        let scan = scan_watch(&response.encode_to_vec());
        assert_eq!(scan, Some(WatchScan { events: 3, ..Default::default() }));
        let created = WatchResponse { created: true, ..Default::default() };
        let scan = scan_watch(&created.encode_to_vec());
        assert_eq!(scan, Some(WatchScan { created: true, ..Default::default() }));
    }
}
