//! gRPC over HTTP/2, no more than load needs: requests come encoded and framed,
//! answers are handed out as they are.

use std::error::Error;
use std::future::poll_fn;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Uri, Version};

/// What the server may send before it must wait: more than the largest answer
/// of a run, so that its speed is measured and not the window.
const WINDOW_BYTES: u32 = 256 << 20;
/// The header gRPC puts before a message: not compressed, and its length.
pub const FRAME_HEADER_BYTES: usize = 5;

/// What can go wrong with a call.
pub type CallError = Box<dyn Error>;

/// A connection. Clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
    authority: String,
}

/// Where a method is.
#[derive(Clone)]
pub struct Path(Uri);

/// Puts gRPC's header before `message`.
pub fn frame(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(FRAME_HEADER_BYTES + length);
    frame.put_u8(0);
    frame.put_u32(length as u32);
    // A BytesMut grows as it must.
    let _never_full = message.encode(&mut frame);
    frame.freeze()
}

impl Connection {
    /// Connects to `endpoint` (`host:port`).
    pub async fn open(endpoint: &str) -> Result<Connection, CallError> {
        let stream = tokio::net::TcpStream::connect(endpoint).await?;
        stream.set_nodelay(true)?;
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await?;
        tokio::task::spawn_local(async move {
            // The calls in flight learn of it, each for itself.
            let _closed = connection.await;
        });
        Ok(Connection { requests, authority: endpoint.to_owned() })
    }

    /// Where `method` (`etcdserverpb.KV/Put`) is on this server.
    pub fn path(&self, method: &str) -> Result<Path, CallError> {
        Ok(Path(format!("http://{}/{method}", self.authority).parse()?))
    }

    /// Calls `path` with one framed message; the answer is one message, without
    /// its frame.
    pub async fn unary(&mut self, path: &Path, message: Bytes) -> Result<Bytes, CallError> {
        let (mut stream, answer) = self.start(path).await?;
        stream.send_data(message, true)?;
        let answer = answer.await?;
        check_status(answer.headers())?;
        let mut body = answer.into_body();
        let mut data = match body.data().await {
            Some(data) => data?,
            None => Bytes::new(),
        };
        body.flow_control().release_capacity(data.len())?;
        let mut rest: Option<BytesMut> = None;
        while let Some(more) = body.data().await {
            let more = more?;
            body.flow_control().release_capacity(more.len())?;
            rest.get_or_insert_with(|| BytesMut::from(data.as_ref())).extend_from_slice(&more);
        }
        if let Some(rest) = rest {
            data = rest.freeze();
        }
        end(&mut body).await?;
        if data.len() < FRAME_HEADER_BYTES {
            return Err("an answer without a message".into());
        }
        data.advance(FRAME_HEADER_BYTES);
        Ok(data)
    }

    /// Calls `path` with one framed message and only counts the bytes that come.
    pub async fn count(&mut self, path: &Path, message: Bytes) -> Result<u64, CallError> {
        let (mut stream, answer) = self.start(path).await?;
        stream.send_data(message, true)?;
        let answer = answer.await?;
        check_status(answer.headers())?;
        let mut body = answer.into_body();
        let mut bytes = 0;
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            bytes += data.len() as u64;
        }
        end(&mut body).await?;
        Ok(bytes)
    }

    /// Opens a stream in both directions and sends its first message.
    pub async fn open_stream(&mut self, path: &Path, first: Bytes) -> Result<Stream, CallError> {
        let (mut requests, answer) = self.start(path).await?;
        requests.send_data(first, false)?;
        let answer = answer.await?;
        check_status(answer.headers())?;
        Ok(Stream { requests, responses: answer.into_body(), buffer: BytesMut::new() })
    }

    async fn start(
        &mut self,
        path: &Path,
    ) -> Result<(SendStream<Bytes>, h2::client::ResponseFuture), CallError> {
        poll_fn(|context| self.requests.poll_ready(context)).await?;
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = path.0.clone();
        *request.version_mut() = Version::HTTP_2;
        let headers = request.headers_mut();
        headers.insert(http::header::TE, http::HeaderValue::from_static("trailers"));
        let grpc = http::HeaderValue::from_static("application/grpc");
        headers.insert(http::header::CONTENT_TYPE, grpc);
        let (answer, stream) = self.requests.send_request(request, false)?;
        Ok((stream, answer))
    }
}

/// A stream in both directions.
pub struct Stream {
    requests: SendStream<Bytes>,
    responses: RecvStream,
    buffer: BytesMut,
}

impl Stream {
    /// Sends a framed message.
    pub fn send(&mut self, message: Bytes) -> Result<(), CallError> {
        Ok(self.requests.send_data(message, false)?)
    }

    /// The next message, without its frame.
    pub async fn next(&mut self) -> Result<Bytes, CallError> {
        loop {
            if let Some(header) = self.buffer.first_chunk::<FRAME_HEADER_BYTES>() {
                let [_, length @ ..] = *header;
                let length = FRAME_HEADER_BYTES + u32::from_be_bytes(length) as usize;
                if self.buffer.len() >= length {
                    let mut message = self.buffer.split_to(length).freeze();
                    message.advance(FRAME_HEADER_BYTES);
                    return Ok(message);
                }
            }
            match self.responses.data().await {
                Some(data) => {
                    let data = data?;
                    self.responses.flow_control().release_capacity(data.len())?;
                    self.buffer.extend_from_slice(&data);
                }
                None => {
                    end(&mut self.responses).await?;
                    return Err("the stream ended".into());
                }
            }
        }
    }
}

async fn end(body: &mut RecvStream) -> Result<(), CallError> {
    match body.trailers().await? {
        Some(trailers) => check_status(&trailers),
        None => Ok(()),
    }
}

fn check_status(headers: &HeaderMap) -> Result<(), CallError> {
    match headers.get("grpc-status") {
        None => Ok(()),
        Some(code) if code == "0" => Ok(()),
        Some(code) => {
            let message = headers.get("grpc-message").and_then(|text| text.to_str().ok());
            Err(format!("status {code:?}: {}", message.unwrap_or_default()).into())
        }
    }
}
