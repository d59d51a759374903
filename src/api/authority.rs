//! Clients of etcd 3.4 that call a URL an authority.
//!
//! When they ask one endpoint (`etcdctl endpoint status --cluster`, `defrag`), their HTTP/2
//! requests say `:authority: http://127.0.0.1:2379`, and over a unix socket they name its
//! path. That is no authority: etcd does not look at it, but the HTTP/2 library here refuses
//! the request. So the first request's block of headers is looked at before the library gets
//! it, and what it says made an authority. Later requests refer to it by its index in the table that
//! both ends keep (HPACK, RFC 7541): the entry is shorter here, so it stays here at least
//! as long as with the client, and all indexes mean the same.
//!
//! Only the first block is looked at, and only one that is in a single frame without
//! padding, as gRPC's are; anything else passes as it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

use super::listener::HTTP2_PREFACE;
use super::writes_pass::writes_pass;

/// The largest block looked at, in bytes: the largest frame before a server asks for more.
const BLOCK_BYTES_MAX: usize = 16 << 10;
/// Read at a time, in bytes.
const READ_BYTES: usize = 4 << 10;
/// Length, type, flags, stream.
const FRAME_HEADER_BYTES: usize = 9;
const TYPE_HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table.
const AUTHORITY_INDEX: usize = 1;
/// What stands for the path of a socket.
const LOCAL: &[u8] = b"localhost";

/// A connection of HTTP/2, with the first request's authority made one.
pub(super) struct PlainAuthority<S> {
    stream: S,
    /// Read and not looked at yet.
    unseen: BytesMut,
    /// To be read by the HTTP/2 library.
    seen: BytesMut,
    /// Bytes of the preface, and then of a frame, that are yet to pass as they are.
    passing: usize,
    /// The first block has passed, or there will not be one to look at.
    done: bool,
}

impl<S> PlainAuthority<S> {
    pub(super) fn new(stream: S) -> PlainAuthority<S> {
        PlainAuthority {
            stream,
            unseen: BytesMut::new(),
            seen: BytesMut::new(),
            passing: HTTP2_PREFACE.len(),
            done: false,
        }
    }

    /// Looks at what was read, as far as it is there.
    fn look(&mut self) {
        while !self.done {
            let pass = self.passing.min(self.unseen.len());
            self.seen.extend_from_slice(&self.unseen.split_to(pass));
            self.passing -= pass;
            let Some((&[high, middle, low, kind, flags], _)) = self.unseen.split_first_chunk()
            else {
                return;
            };
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            let whole = FRAME_HEADER_BYTES.saturating_add(length);
            if kind != TYPE_HEADERS {
                self.passing = whole;
            } else if length <= BLOCK_BYTES_MAX && self.unseen.len() < whole {
                return;
            } else {
                self.done = true;
                if length <= BLOCK_BYTES_MAX && flags & FLAG_PADDED == 0 {
                    let frame = self.unseen.split_to(whole);
                    self.seen.extend_from_slice(&with_authority(&frame, flags).unwrap_or(frame));
                }
            }
        }
        self.seen.unsplit(self.unseen.split());
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PlainAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.seen.is_empty() {
            if this.done {
                return Pin::new(&mut this.stream).poll_read(cx, buf);
            }
            let mut chunk = [0; READ_BYTES];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut chunk))?;
            this.unseen.extend_from_slice(chunk.filled());
            this.done |= chunk.filled().is_empty();
            this.look();
        }
        let length = this.seen.len().min(buf.remaining());
        buf.put_slice(&this.seen.split_to(length));
        Poll::Ready(Ok(()))
    }
}

writes_pass!(PlainAuthority);

/// A frame of headers, with a URL as its authority made one. `None` if there is none, or
/// the frame is not understood.
fn with_authority(frame: &[u8], flags: u8) -> Option<BytesMut> {
    let (header, block) = frame.split_at_checked(FRAME_HEADER_BYTES)?;
    let mut fields = if flags & FLAG_PRIORITY == 0 { block } else { block.get(5..)? };
    while let Some(&first) = fields.first() {
        let name_bits = match first {
            // A field of the table, or the size of the table.
            0x80.. => {
                integer(&mut fields, 7)?;
                continue;
            }
            0x20..0x40 => {
                integer(&mut fields, 5)?;
                continue;
            }
            0x40..0x80 => 6,
            0x00..0x20 => 4,
        };
        let name = integer(&mut fields, name_bits)?;
        if name == 0 {
            string(&mut fields)?;
        }
        let value_at = frame.len() - fields.len();
        let value = string(&mut fields)?;
        if name != AUTHORITY_INDEX {
            continue;
        }
        let authority = authority_of(&value?)?;
        let mut changed = BytesMut::with_capacity(frame.len());
        changed.extend_from_slice(header);
        changed.extend_from_slice(frame.get(FRAME_HEADER_BYTES..value_at)?);
        // Without Huffman's code, and in one byte.
        changed.put_u8(u8::try_from(authority.len()).ok().filter(|&length| length < 0x7f)?);
        changed.extend_from_slice(&authority);
        changed.extend_from_slice(fields);
        let length = u32::try_from(changed.len() - FRAME_HEADER_BYTES).ok()?;
        changed.get_mut(..3)?.copy_from_slice(length.to_be_bytes().get(1..)?);
        return Some(changed);
    }
    None
}

/// The authority of a URL, or what stands for that of a path; `None` of what is neither.
fn authority_of(url: &[u8]) -> Option<Vec<u8>> {
    let scheme = url.windows(3).position(|window| window == b"://");
    let authority = scheme.map_or(url, |at| url.get(at + 3..).unwrap_or_default());
    if authority.is_empty() || authority.contains(&b'/') {
        return Some(LOCAL.to_vec());
    }
    scheme.map(|_| authority.to_vec())
}

/// An integer of HPACK whose first `bits` bits are in the first byte (RFC 7541, 5.1).
fn integer(fields: &mut &[u8], bits: u32) -> Option<usize> {
    let most = (1_usize << bits) - 1;
    let mut value = usize::from(*fields.first()?) & most;
    fields.advance(1);
    if value < most {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*fields.first()?);
        fields.advance(1);
        value += (byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// A string of HPACK; `Some(None)` when it is there and has other characters than a URL.
fn string(fields: &mut &[u8]) -> Option<Option<Vec<u8>>> {
    let coded = fields.first()? & 0x80 != 0;
    let length = integer(fields, 7)?;
    let (value, rest) = fields.split_at_checked(length)?;
    *fields = rest;
    Some(if coded { decoded(value) } else { Some(value.to_vec()) })
}

/// Undoes Huffman's code (RFC 7541, appendix B) for the characters of URLs: of each length
/// in bits, the first code and the characters in the order of their codes.
const CODES: [(u32, usize, &[u8]); 5] = [
    (5, 0x0, b"012aceiost"),
    (6, 0x14, b" %-./3456789=A_bdfghlmnpru"),
    (7, 0x5c, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, 0xf8, b"&*,;XZ"),
    (13, 0x1ffa, b"@[]~"),
];

fn decoded(coded: &[u8]) -> Option<Vec<u8>> {
    let (mut text, mut code, mut length) = (Vec::new(), 0_usize, 0_u32);
    for bit in coded.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)) {
        (code, length) = (code << 1 | usize::from(bit), length + 1);
        let characters = CODES.iter().find(|(bits, ..)| *bits == length);
        let character = characters.and_then(|(_, first, characters)| {
            code.checked_sub(*first).and_then(|at| characters.get(at))
        });
        if let Some(&character) = character {
            text.push(character);
            (code, length) = (0, 0);
        } else if length > 13 {
            return None;
        }
    }
    // What fills the last byte.
    (length < 8 && code == (1 << length) - 1).then_some(text)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A frame of headers as a client of gRPC sends it: two fields of the static table, a
    /// path, the authority, and one more.
    fn headers(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x86, 0x44, 0x02, b'/', b'x', 0x41];
        block.extend_from_slice(authority);
        block.extend_from_slice(&[0x40, 0x01, b'a', 0x81, 0x1f]);
        frame(TYPE_HEADERS, 0x4, &block)
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend_from_slice(&[kind, flags, 0, 0, 0, 1]);
        frame.extend_from_slice(payload);
        frame
    }

    fn plain(text: &str) -> Vec<u8> {
        [&[text.len() as u8], text.as_bytes()].concat()
    }

    fn huffman(text: &str) -> Vec<u8> {
        let mut bits = Vec::new();
        for character in text.bytes() {
            let (length, first, at) = CODES
                .iter()
                .find_map(|(length, first, characters)| {
                    let at = characters.iter().position(|&c| c == character)?;
                    Some((*length, *first, at))
                })
                .unwrap();
            bits.extend((0..length).rev().map(|bit| (first + at) >> bit & 1));
        }
        while bits.len() % 8 != 0 {
            bits.push(1);
        }
        let bytes: Vec<u8> = bits
            .chunks(8)
            .map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | *bit as u8))
            .collect();
        [&[0x80 | bytes.len() as u8], &bytes[..]].concat()
    }

    async fn passed(sent: &[u8], piece: usize) -> Vec<u8> {
        let (near, mut far) = tokio::io::duplex(64);
        let mut stream = PlainAuthority::new(near);
        let sending = async {
            for piece in sent.chunks(piece) {
                far.write_all(piece).await.unwrap();
            }
            drop(far);
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(sending, stream.read_to_end(&mut received));
        read.unwrap();
        received
    }

    fn connection(authority: &[u8]) -> Vec<u8> {
        let settings = frame(4, 0, &[0, 3, 0, 0, 0, 100]);
        let data = frame(0, 1, b"message");
        [HTTP2_PREFACE.to_vec(), settings, headers(authority), data, headers(authority)].concat()
    }

    #[test]
    fn the_code_is_the_rfcs() {
        // From RFC 7541, C.4.1.
        let coded = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decoded(&coded).unwrap(), b"www.example.com");
        assert_eq!(huffman("www.example.com")[1..], coded);
        assert_eq!(decoded(&[0xff, 0xff]), None, "too much that fills");
        assert_eq!(decoded(&[0x00]), None, "filled with the wrong thing");
    }

    #[tokio::test]
    async fn a_url_becomes_its_authority_in_the_first_block() {
        for (url, authority) in [
            ("http://127.0.0.1:2379", "127.0.0.1:2379"),
            ("https://etcd-0.example:2379", "etcd-0.example:2379"),
            ("http://[::1]:2379", "[::1]:2379"),
            ("unix:///run/etcd.sock", "localhost"),
            ("unix://", "localhost"),
            ("/run/etcd.sock", "localhost"),
        ] {
            for sent in [plain(url), huffman(url)] {
                let sent = connection(&sent);
                let second = sent.len() - headers(&plain(url)).len();
                for piece in [1, 7, 1000] {
                    let received = passed(&sent, piece).await;
                    let expected = connection(&plain(authority));
                    let first = HTTP2_PREFACE.len() + 15 + headers(&plain(authority)).len();
                    assert_eq!(received[..first], expected[..first], "{url}");
                    assert!(sent.ends_with(&received[first..]), "{url}: the rest is as it was");
                    assert!(received.len() - first > sent.len() - second);
                }
            }
        }
    }

    #[tokio::test]
    async fn everything_else_passes_as_it_is() {
        let padded = frame(TYPE_HEADERS, FLAG_PADDED | 4, &[0, 0x41, 3, b':', b'/', b'/']);
        let cases = [
            connection(&plain("127.0.0.1:2379")),
            connection(&huffman("127.0.0.1:2379")),
            [HTTP2_PREFACE.to_vec(), padded].concat(),
            [HTTP2_PREFACE.to_vec(), frame(TYPE_HEADERS, 4, &[0x41, 0x7f, 0xff, 0xff, 0xff])]
                .concat(),
            [HTTP2_PREFACE.to_vec(), frame(TYPE_HEADERS, 4, &[0x41, 0x85])].concat(),
            [HTTP2_PREFACE.to_vec(), vec![0xff; 40_000]].concat(),
            HTTP2_PREFACE[..10].to_vec(),
        ];
        for sent in cases {
            for piece in [1, 1000] {
                assert_eq!(passed(&sent, piece).await, sent);
            }
        }
    }
}
