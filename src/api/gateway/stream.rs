//! Bodies in motion: JSON objects out of a request, gRPC frames out of a reply.
//!
//! ```text
//! request: {"a":1}{"a" :2}… ─ JsonObjects ─▶ objects ─ Requests ─▶ frames ─▶ call
//! reply:   frames ─ Deframer ─▶ messages ─ Lines ─▶ {"result":…}\n…
//! ```
//!
//! Both directions hold one message at a time and take the next when they are asked for
//! it, so a slow side slows the other down.

use super::*;
use http_body::Frame;

/// A gRPC frame: one byte for compression, four for the length.
const PREFIX_BYTES: usize = 5;

/// Cuts a body into the JSON objects it holds, whatever pieces it comes in.
pub(super) struct JsonObjects {
    body: Body,
    buffer: BytesMut,
    scan: Scan,
    max_object_bytes: usize,
    ended: bool,
}

/// How far the buffer has been looked at. Every byte is looked at once, so that a body
/// that trickles in costs no more than one that comes at once.
#[derive(Default)]
struct Scan {
    position: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// The length of the object at the start of `buffer`, if it is whole. The buffer must
    /// start with a brace.
    fn end_of_object(&mut self, buffer: &[u8]) -> Option<usize> {
        for &byte in buffer.get(self.position..)? {
            self.position += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(std::mem::take(self).position);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

impl JsonObjects {
    pub(super) fn new(body: Body, max_object_bytes: usize) -> JsonObjects {
        let (buffer, scan) = (BytesMut::new(), Scan::default());
        JsonObjects { body, buffer, scan, max_object_bytes, ended: false }
    }

    /// The next object; `None` at the end. After an error there is nothing more to come.
    pub(super) fn poll_object(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Status>>> {
        loop {
            match self.buffered() {
                Ok(Some(object)) => return Poll::Ready(Some(Ok(object))),
                Ok(None) if self.ended && self.buffer.is_empty() => return Poll::Ready(None),
                Ok(None) if self.ended => {
                    self.buffer.clear();
                    return Poll::Ready(Some(Err(Status::invalid_argument("unexpected EOF"))));
                }
                Ok(None) => {}
                Err(status) => {
                    self.ended = true;
                    self.buffer.clear();
                    return Poll::Ready(Some(Err(status)));
                }
            }
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    self.ended = true;
                    self.buffer.clear();
                    return Poll::Ready(Some(Err(Status::cancelled(error.to_string()))));
                }
                None => self.ended = true,
            }
        }
    }

    /// The next object as far as it has arrived.
    fn buffered(&mut self) -> Result<Option<Bytes>, Status> {
        if self.scan.position == 0 {
            let blank = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let _ = self.buffer.split_to(blank);
            match self.buffer.first() {
                None => return Ok(None),
                Some(b'{') => {}
                Some(&byte) => return Err(unexpected(byte)),
            }
        }
        let end = self.scan.end_of_object(&self.buffer);
        let length = end.unwrap_or(self.buffer.len());
        if length > self.max_object_bytes {
            return Err(Status::resource_exhausted(format!(
                "grpc: received message larger than max ({length} vs. {})",
                self.max_object_bytes
            )));
        }
        Ok(end.map(|end| self.buffer.split_to(end).freeze()))
    }

    /// Reads the rest of the body without keeping it, as far as an object may be long.
    pub(super) async fn discard(mut self) {
        let mut left = self.max_object_bytes;
        while let Some(Ok(frame)) = self.body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            left = left.saturating_sub(length);
            if left == 0 {
                break;
            }
        }
    }
}

/// In the words of etcd's gateway, which depend on whether it can be JSON at all.
fn unexpected(byte: u8) -> Status {
    let character = char::from(byte);
    Status::invalid_argument(match byte {
        b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
            format!("proto: syntax error (line 1:1): unexpected token {character}")
        }
        _ => format!("invalid character {character:?} looking for beginning of value"),
    })
}

/// The request of a streaming call, made of a body's objects as they arrive.
///
/// A bad object ends the request, as it does in etcd: what was sent before it counts.
pub(super) struct Requests {
    objects: JsonObjects,
    input: MessageDescriptor,
    ended: bool,
}

impl Requests {
    pub(super) fn new(objects: JsonObjects, input: MessageDescriptor) -> Requests {
        Requests { objects, input, ended: false }
    }
}

impl http_body::Body for Requests {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let object = std::task::ready!(self.objects.poll_object(cx));
        let message = object.map(|object| to_proto(&self.input, &object?));
        match message {
            Some(Ok(message)) => Poll::Ready(Some(Ok(Frame::data(frame(&message))))),
            Some(Err(status)) if status.code() == Code::Cancelled => {
                self.ended = true;
                Poll::Ready(Some(Err(status)))
            }
            Some(Err(status)) => {
                tracing::debug!(reason = status.message(), "bad JSON ends a streaming request");
                self.ended = true;
                Poll::Ready(None)
            }
            None => {
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

/// Cuts gRPC's frames out of the pieces a reply comes in.
#[derive(Default)]
pub(super) struct Deframer(BytesMut);

impl Deframer {
    /// The message of a reply that has exactly one.
    pub(super) fn only(reply: Bytes) -> Result<Bytes, Status> {
        let mut deframer = Deframer(reply.into());
        let message = deframer.next()?;
        message
            .filter(|_| deframer.0.is_empty())
            .ok_or_else(|| Status::internal("the reply is not one gRPC message"))
    }

    fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let Some((&[compressed, a, b, c, d], _)) = self.0.split_first_chunk::<PREFIX_BYTES>()
        else {
            return Ok(None);
        };
        if compressed != 0 {
            return Err(Status::internal("the reply is compressed, which was not asked for"));
        }
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).map_err(broken)?;
        if self.0.len() - PREFIX_BYTES < length {
            self.0.reserve(PREFIX_BYTES + length - self.0.len());
            return Ok(None);
        }
        let _ = self.0.split_to(PREFIX_BYTES);
        Ok(Some(self.0.split_to(length).freeze()))
    }
}

/// The reply of a streaming call, one line of JSON per message.
pub(super) struct Lines {
    reply: Body,
    deframer: Deframer,
    output: MessageDescriptor,
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    first: Option<Bytes>,
    ended: bool,
}

impl Lines {
    pub(super) fn new(
        reply: Body,
        output: MessageDescriptor,
        deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    ) -> Lines {
        let deframer = Deframer::default();
        Lines { reply, deframer, output, deadline, first: None, ended: false }
    }

    /// Gives the line back that was asked for ahead of time.
    pub(super) fn put_back(&mut self, line: Bytes) {
        self.first = Some(line);
    }

    /// The next line, or the error that ends the reply; `None` at a good end.
    pub(super) fn poll_line(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Status>>> {
        if let Some(line) = self.first.take() {
            return Poll::Ready(Some(Ok(line)));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let result = std::task::ready!(self.poll_message(cx));
        let line = result.and_then(|message| message.map(|message| self.line(message)).transpose());
        self.ended = !matches!(line, Ok(Some(_)));
        Poll::Ready(line.transpose())
    }

    fn line(&self, message: Bytes) -> Result<Bytes, Status> {
        let mut line = b"{\"result\":".to_vec();
        write_json(&self.output, message, &mut line)?;
        line.extend_from_slice(b"}\n");
        Ok(line.into())
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(deadline_exceeded()));
        }
        loop {
            if let Some(message) = self.deframer.next()? {
                return Poll::Ready(Ok(Some(message)));
            }
            match std::task::ready!(Pin::new(&mut self.reply).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.deframer.push(&data),
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            return Poll::Ready(ended(&trailers).map(|()| None));
                        }
                    }
                },
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(None)),
            }
        }
    }
}

impl http_body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let line = std::task::ready!(self.poll_line(cx));
        Poll::Ready(line.map(|line| {
            let line = line.unwrap_or_else(|status| error_line(&status).into());
            Ok(Frame::data(line))
        }))
    }
}
