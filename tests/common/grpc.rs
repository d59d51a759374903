//! gRPC with encoded messages.
//!
//! A call takes and returns bytes; [`Wire`] turns bytes into JSON with the
//! descriptors of `proto/`. So one function compares the answers of every
//! method, sees fields the generated types would skip, and can send what no
//! generated type can express.

use bytes::{Buf as _, BufMut as _, Bytes};
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, SerializeOptions};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Passes messages on as they are.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = RawCodec;
    type Decoder = RawCodec;

    fn encoder(&mut self) -> RawCodec {
        RawCodec
    }

    fn decoder(&mut self) -> RawCodec {
        RawCodec
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = source.remaining();
        Ok(Some(source.copy_to_bytes(length)))
    }
}

/// Messages that wait in a stream's queues.
const STREAM_QUEUE_MESSAGES: usize = 64;

/// A stream in both directions. Dropping it ends it.
pub(crate) struct RawStream {
    /// To the server; dropped, it half-closes the stream.
    pub(crate) requests: mpsc::Sender<Bytes>,
    /// From the server; an error is the last.
    pub(crate) responses: mpsc::Receiver<Result<Bytes, Status>>,
}

/// A client of every method.
#[derive(Clone)]
pub(crate) struct RawClient {
    grpc: tonic::client::Grpc<Channel>,
}

impl RawClient {
    /// A client over `channel`.
    pub(crate) fn new(channel: Channel) -> RawClient {
        let grpc = tonic::client::Grpc::new(channel)
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        RawClient { grpc }
    }

    /// Calls `method` (`etcdserverpb.KV/Range`) with one message for one message.
    pub(crate) async fn unary(&mut self, method: &str, message: Bytes) -> Result<Bytes, Status> {
        self.ready().await?;
        let answer = self.grpc.unary(Request::new(message), path(method), RawCodec).await?;
        Ok(answer.into_inner())
    }

    /// Calls `method` with one message and collects the stream it answers with:
    /// the messages before the error, if it ends with one.
    pub(crate) async fn collect(
        &mut self,
        method: &str,
        message: Bytes,
    ) -> (Vec<Bytes>, Result<(), Status>) {
        let mut messages = Vec::new();
        let stream = match self.ready().await {
            Ok(()) => {
                self.grpc.server_streaming(Request::new(message), path(method), RawCodec).await
            }
            Err(status) => Err(status),
        };
        let mut stream = match stream {
            Ok(stream) => stream.into_inner(),
            Err(status) => return (messages, Err(status)),
        };
        loop {
            match stream.message().await {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return (messages, Ok(())),
                Err(status) => return (messages, Err(status)),
            }
        }
    }

    /// Opens a stream in both directions. It is opened in the background, since
    /// a server need not answer anything, not even headers, before it is asked.
    pub(crate) fn open(&self, method: &'static str) -> RawStream {
        let (requests, receiver) = mpsc::channel(STREAM_QUEUE_MESSAGES);
        let (sender, responses) = mpsc::channel(STREAM_QUEUE_MESSAGES);
        let mut client = self.clone();
        tokio::spawn(async move {
            let requests = Request::new(ReceiverStream::new(receiver));
            let stream = match client.ready().await {
                Ok(()) => client.grpc.streaming(requests, path(method), RawCodec).await,
                Err(status) => Err(status),
            };
            let mut stream: Streaming<Bytes> = match stream {
                Ok(stream) => stream.into_inner(),
                // Nobody to tell it to is fine: the test has moved on.
                Err(status) => return drop(sender.send(Err(status)).await),
            };
            loop {
                let answer = match stream.message().await {
                    Ok(Some(message)) => Ok(message),
                    Ok(None) => return,
                    Err(status) => Err(status),
                };
                let last = answer.is_err();
                if sender.send(answer).await.is_err() || last {
                    return;
                }
            }
        });
        RawStream { requests, responses }
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))
    }
}

fn path(method: &str) -> http::uri::PathAndQuery {
    format!("/{method}").parse().expect("a method name is a path")
}

/// The messages of `proto/`, by name.
pub(crate) struct Wire {
    pool: DescriptorPool,
}

impl Wire {
    /// Reads the descriptors.
    pub(crate) fn new() -> Wire {
        let pool = DescriptorPool::decode(kvorum::pb::DESCRIPTORS);
        Wire { pool: pool.expect("the descriptors are well formed") }
    }

    /// `method` (`etcdserverpb.KV/Range`), if it exists.
    pub(crate) fn method(&self, method: &str) -> Option<MethodDescriptor> {
        let (service, name) = method.split_once('/')?;
        let service = self.pool.get_service_by_name(service)?;
        service.methods().find(|method| method.name() == name)
    }

    /// What is sent to `method` as JSON, or as hex if it is not a message.
    pub(crate) fn request(&self, method: &str, message: &[u8]) -> Value {
        match self.method(method) {
            Some(method) => json(method.input(), message),
            None => hex(message),
        }
    }

    /// What `method` answered as JSON; fields at their default value are left
    /// out, as on the wire.
    pub(crate) fn response(&self, method: &str, message: &[u8]) -> Value {
        match self.method(method) {
            Some(method) => json(method.output(), message),
            None => hex(message),
        }
    }
}

fn json(descriptor: prost_reflect::MessageDescriptor, message: &[u8]) -> Value {
    let Ok(decoded) = DynamicMessage::decode(descriptor, message) else {
        return hex(message);
    };
    let unknown: Vec<u32> = decoded.unknown_fields().map(|field| field.number()).collect();
    let options = SerializeOptions::new().use_proto_field_name(true);
    let value = decoded.serialize_with_options(serde_json::value::Serializer, &options);
    let mut value = value.expect("a message is representable as JSON");
    if let (false, Value::Object(fields)) = (unknown.is_empty(), &mut value) {
        fields.insert("<unknown fields>".to_owned(), unknown.into());
    }
    value
}

fn hex(message: &[u8]) -> Value {
    let digits: String = message.iter().map(|byte| format!("{byte:02x}")).collect();
    Value::String(format!("not a message: {digits}"))
}
