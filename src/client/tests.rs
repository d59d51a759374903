use super::*;

fn range(prefix: &'static [u8]) -> (Bytes, Bytes) {
    prefix_range(Bytes::from_static(prefix))
}

#[test]
fn a_prefix_ends_before_the_first_key_that_does_not_begin_with_it() {
    let pair = |start: &'static [u8], end: &'static [u8]| (start.into(), end.into());
    assert_eq!(range(b"a/"), pair(b"a/", b"a0"));
    assert_eq!(range(b"a\xff"), pair(b"a\xff", b"b"));
    assert_eq!(range(b"a\x00"), pair(b"a\x00", b"a\x01"));
    assert_eq!(range(b"\xff\xff"), pair(b"\xff\xff", b"\0"), "to the end of all keys");
    assert_eq!(range(b""), pair(b"\0", b"\0"), "all keys");
}
