//! The JSON gateway: gRPC for those who have only HTTP and JSON.
//!
//! ```text
//! POST /v3/kv/put {"key":"Zm9v"} ─▶ PutRequest ─▶ /etcdserverpb.KV/Put, in this process
//!      {"header":{"revision":"2"}} ◀─ PutResponse ◀─┘
//! ```
//!
//! Nothing here knows a message: a table says which path stands for which method, and
//! the descriptors of `proto/` say how its messages look in JSON. The call then takes
//! the way every gRPC call takes, through the same router, so that limits, metrics and
//! authentication are those of gRPC.
//!
//! JSON is as etcd's gateway writes it: names as in the `.proto` files, 64-bit numbers as
//! strings, bytes as base64, enums by name, fields with default values left out. Unknown
//! fields are ignored, as is what follows the first object of a body. Replies of streaming
//! calls are one object per line, `{"result":…}`, and last `{"error":…}` if the call fails.
//! A streaming call takes any number of objects one after the other, as they arrive.
//!
//! Bounds: one object of a request may have [`GatewayOptions::max_message_bytes`] twice
//! over, since JSON is longer; a stream's reply is held one message at a time.
//!
//! What it does not do: WebSockets, and the parameters of a URL.

mod stream;
#[cfg(test)]
mod tests;
mod unique;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_TYPE, TE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use http_body_util::BodyExt as _;
use prost::Message as _;
use prost_reflect::{
    DescriptorError, DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor,
    SerializeOptions,
};
use serde::de::DeserializeSeed as _;
use tonic::{Code, Status};
use tower::Service as _;

use super::listener::Connection;
use stream::{Deframer, JsonObjects, Lines, Requests};
use unique::Unique;

/// Replies above this size are turned into JSON off the threads that serve requests.
const OFFLOAD_BYTES: usize = 256 * 1024;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_TIMEOUT: &str = "grpc-timeout";
const METADATA_PREFIX: &str = "grpc-metadata-";

/// Path, service and method of each call, in the order of the `.proto` files. Lease calls
/// have an older path beside their own.
const ROUTES: [(&str, &str, &str); 51] = [
    ("/v3/kv/range", "etcdserverpb.KV", "Range"),
    ("/v3/kv/put", "etcdserverpb.KV", "Put"),
    ("/v3/kv/deleterange", "etcdserverpb.KV", "DeleteRange"),
    ("/v3/kv/txn", "etcdserverpb.KV", "Txn"),
    ("/v3/kv/compaction", "etcdserverpb.KV", "Compact"),
    ("/v3/watch", "etcdserverpb.Watch", "Watch"),
    ("/v3/lease/grant", "etcdserverpb.Lease", "LeaseGrant"),
    ("/v3/lease/revoke", "etcdserverpb.Lease", "LeaseRevoke"),
    ("/v3/kv/lease/revoke", "etcdserverpb.Lease", "LeaseRevoke"),
    ("/v3/lease/keepalive", "etcdserverpb.Lease", "LeaseKeepAlive"),
    ("/v3/lease/timetolive", "etcdserverpb.Lease", "LeaseTimeToLive"),
    ("/v3/kv/lease/timetolive", "etcdserverpb.Lease", "LeaseTimeToLive"),
    ("/v3/lease/leases", "etcdserverpb.Lease", "LeaseLeases"),
    ("/v3/kv/lease/leases", "etcdserverpb.Lease", "LeaseLeases"),
    ("/v3/cluster/member/add", "etcdserverpb.Cluster", "MemberAdd"),
    ("/v3/cluster/member/remove", "etcdserverpb.Cluster", "MemberRemove"),
    ("/v3/cluster/member/update", "etcdserverpb.Cluster", "MemberUpdate"),
    ("/v3/cluster/member/list", "etcdserverpb.Cluster", "MemberList"),
    ("/v3/cluster/member/promote", "etcdserverpb.Cluster", "MemberPromote"),
    ("/v3/maintenance/alarm", "etcdserverpb.Maintenance", "Alarm"),
    ("/v3/maintenance/status", "etcdserverpb.Maintenance", "Status"),
    ("/v3/maintenance/defragment", "etcdserverpb.Maintenance", "Defragment"),
    ("/v3/maintenance/hash", "etcdserverpb.Maintenance", "Hash"),
    ("/v3/maintenance/hashkv", "etcdserverpb.Maintenance", "HashKV"),
    ("/v3/maintenance/snapshot", "etcdserverpb.Maintenance", "Snapshot"),
    ("/v3/maintenance/transfer-leadership", "etcdserverpb.Maintenance", "MoveLeader"),
    ("/v3/maintenance/downgrade", "etcdserverpb.Maintenance", "Downgrade"),
    ("/v3/auth/enable", "etcdserverpb.Auth", "AuthEnable"),
    ("/v3/auth/disable", "etcdserverpb.Auth", "AuthDisable"),
    ("/v3/auth/status", "etcdserverpb.Auth", "AuthStatus"),
    ("/v3/auth/authenticate", "etcdserverpb.Auth", "Authenticate"),
    ("/v3/auth/user/add", "etcdserverpb.Auth", "UserAdd"),
    ("/v3/auth/user/get", "etcdserverpb.Auth", "UserGet"),
    ("/v3/auth/user/list", "etcdserverpb.Auth", "UserList"),
    ("/v3/auth/user/delete", "etcdserverpb.Auth", "UserDelete"),
    ("/v3/auth/user/changepw", "etcdserverpb.Auth", "UserChangePassword"),
    ("/v3/auth/user/grant", "etcdserverpb.Auth", "UserGrantRole"),
    ("/v3/auth/user/revoke", "etcdserverpb.Auth", "UserRevokeRole"),
    ("/v3/auth/role/add", "etcdserverpb.Auth", "RoleAdd"),
    ("/v3/auth/role/get", "etcdserverpb.Auth", "RoleGet"),
    ("/v3/auth/role/list", "etcdserverpb.Auth", "RoleList"),
    ("/v3/auth/role/delete", "etcdserverpb.Auth", "RoleDelete"),
    ("/v3/auth/role/grant", "etcdserverpb.Auth", "RoleGrantPermission"),
    ("/v3/auth/role/revoke", "etcdserverpb.Auth", "RoleRevokePermission"),
    ("/v3/election/campaign", "v3electionpb.Election", "Campaign"),
    ("/v3/election/proclaim", "v3electionpb.Election", "Proclaim"),
    ("/v3/election/leader", "v3electionpb.Election", "Leader"),
    ("/v3/election/observe", "v3electionpb.Election", "Observe"),
    ("/v3/election/resign", "v3electionpb.Election", "Resign"),
    ("/v3/lock/lock", "v3lockpb.Lock", "Lock"),
    ("/v3/lock/unlock", "v3lockpb.Lock", "Unlock"),
];

/// Limits of the gateway.
#[derive(Debug, Clone)]
pub struct GatewayOptions {
    /// Bytes of the largest gRPC request: `--max-request-bytes` and gRPC's overhead. An
    /// object of JSON may have twice as many.
    pub max_message_bytes: usize,
}

/// The gateway's routes, `/v3/…` and the older `/v3beta/…`, as calls to `grpc`. Merge it
/// into the router of the client port.
///
/// # Errors
///
/// When the descriptors built into this program cannot be read.
pub fn router(grpc: Router, options: GatewayOptions) -> Result<Router, DescriptorError> {
    let pool = DescriptorPool::decode(crate::pb::DESCRIPTORS)?;
    let mut routes = BTreeMap::new();
    for (path, service, method) in ROUTES {
        let service = pool.get_service_by_name(service);
        let found = service.and_then(|service| service.methods().find(|m| m.name() == method));
        let Some(method) = found else { continue };
        let call = Call {
            path: format!("/{}/{}", method.parent_service().full_name(), method.name()),
            input: method.input(),
            output: method.output(),
            client_streaming: method.is_client_streaming(),
            server_streaming: method.is_server_streaming(),
        };
        routes.insert(path, Arc::new(call));
    }
    let max_object_bytes = options.max_message_bytes.saturating_mul(2);
    let gateway = Arc::new(Gateway { grpc, routes, max_object_bytes });
    let router = Router::new()
        .route("/v3/", any(serve))
        .route("/v3/{*path}", any(serve))
        .route("/v3beta/", any(serve))
        .route("/v3beta/{*path}", any(serve));
    Ok(router.with_state(gateway))
}

struct Gateway {
    grpc: Router,
    routes: BTreeMap<&'static str, Arc<Call>>,
    max_object_bytes: usize,
}

/// One gRPC method.
#[derive(Debug)]
struct Call {
    path: String,
    input: MessageDescriptor,
    output: MessageDescriptor,
    client_streaming: bool,
    server_streaming: bool,
}

async fn serve(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let path = request.uri().path();
    let call = match path.strip_prefix("/v3beta/") {
        Some(rest) => gateway.routes.get(format!("/v3/{rest}").as_str()),
        None => gateway.routes.get(path),
    };
    let Some(call) = call.cloned() else {
        return failure(&Status::not_found("Not Found"));
    };
    if request.method() != Method::POST {
        return failure(&Status::unimplemented("Method Not Allowed"));
    }
    let result = if call.server_streaming {
        gateway.stream(&call, request).await
    } else {
        gateway.unary(&call, request).await
    };
    result.unwrap_or_else(|status| failure(&status))
}

impl Gateway {
    async fn unary(&self, call: &Arc<Call>, request: Request) -> Result<Response, Status> {
        let deadline = timeout_of(request.headers())?;
        let request = self.request(call, request).await?;
        let exchange = async {
            let reply = self.call(request).await?;
            let headers = metadata(reply.headers());
            let reply = reply.into_body().collect().await.map_err(broken)?;
            if let Some(trailers) = reply.trailers() {
                ended(trailers)?;
            }
            Ok((headers, Deframer::only(reply.to_bytes())?))
        };
        let (headers, message) = within(deadline, exchange).await?;
        let json = if message.len() <= OFFLOAD_BYTES {
            to_json(&call.output, message)?
        } else {
            let call = Arc::clone(call);
            let encoding = tokio::task::spawn_blocking(move || to_json(&call.output, message));
            encoding.await.map_err(broken)??
        };
        let mut response = json_response(StatusCode::OK, json);
        response.headers_mut().extend(headers);
        Ok(response)
    }

    async fn stream(&self, call: &Arc<Call>, request: Request) -> Result<Response, Status> {
        let deadline =
            timeout_of(request.headers())?.map(|timeout| Box::pin(tokio::time::sleep(timeout)));
        let request = self.request(call, request).await?;
        let reply = match self.call(request).await {
            Ok(reply) => reply,
            Err(status) => return Ok(stream_failure(&status)),
        };
        let headers = metadata(reply.headers());
        let mut lines = Lines::new(reply.into_body(), call.output.clone(), deadline);
        // The first line decides the status: a call that fails before it is an HTTP error.
        match std::future::poll_fn(|cx| lines.poll_line(cx)).await {
            None => Ok(StatusCode::OK.into_response()),
            Some(Err(status)) => Ok(stream_failure(&status)),
            Some(Ok(line)) => {
                lines.put_back(line);
                let mut response = json_response(StatusCode::OK, Body::new(lines));
                response.headers_mut().extend(headers);
                Ok(response)
            }
        }
    }

    /// The gRPC request that an HTTP request stands for.
    async fn request(&self, call: &Call, request: Request) -> Result<Request, Status> {
        let (parts, body) = request.into_parts();
        let objects = JsonObjects::new(body, self.max_object_bytes);
        let body = if call.client_streaming {
            Body::new(Requests::new(objects, call.input.clone()))
        } else {
            Body::from(frame(&first_message(objects, &call.input).await?))
        };
        let mut request = Request::new(body);
        *request.version_mut() = Version::HTTP_2;
        *request.method_mut() = Method::POST;
        *request.uri_mut() = call.path.parse().map_err(broken)?;
        *request.headers_mut() = forwarded(&parts.headers);
        if let Some(connection) = parts.extensions.get::<Arc<Connection>>() {
            // The certificate is the HTTP client's; through here users come by token only.
            let connection = Connection { peer_common_name: None, ..Connection::clone(connection) };
            request.extensions_mut().insert(Arc::new(connection));
        }
        Ok(request)
    }

    /// Makes the call; a reply that is already known to be an error is one.
    async fn call(&self, request: Request) -> Result<Response, Status> {
        let Ok(reply) = self.grpc.clone().call(request).await;
        ended(reply.headers())?;
        if reply.status() != StatusCode::OK {
            return Err(Status::unknown(format!("unexpected HTTP status {}", reply.status())));
        }
        Ok(reply)
    }
}

/// The first object of a body; a body without any is a message without fields.
async fn first_message(
    mut objects: JsonObjects,
    input: &MessageDescriptor,
) -> Result<Bytes, Status> {
    let Some(object) = std::future::poll_fn(|cx| objects.poll_object(cx)).await else {
        return Ok(Bytes::new());
    };
    let message = to_proto(input, &object?)?;
    // What follows is read and ignored; a client may not look for an answer before all
    // has been taken.
    objects.discard().await;
    Ok(message)
}

fn to_proto(input: &MessageDescriptor, json: &[u8]) -> Result<Bytes, Status> {
    let invalid = |error| Status::invalid_argument(format!("proto: {error}"));
    let unique = Unique { message: input.clone() };
    unique.deserialize(&mut serde_json::Deserializer::from_slice(json)).map_err(invalid)?;
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let mut json = serde_json::Deserializer::from_slice(json);
    let message = DynamicMessage::deserialize_with_options(input.clone(), &mut json, &options)
        .map_err(invalid)?;
    Ok(message.encode_to_vec().into())
}

fn to_json(output: &MessageDescriptor, message: Bytes) -> Result<Vec<u8>, Status> {
    let mut json = Vec::with_capacity(message.len());
    write_json(output, message, &mut json)?;
    Ok(json)
}

fn write_json(
    output: &MessageDescriptor,
    message: Bytes,
    json: &mut Vec<u8>,
) -> Result<(), Status> {
    let options = SerializeOptions::new().use_proto_field_name(true);
    let message = DynamicMessage::decode(output.clone(), message).map_err(broken)?;
    let mut serializer = serde_json::Serializer::new(json);
    message.serialize_with_options(&mut serializer, &options).map_err(broken)
}

/// The message with gRPC's prefix: not compressed, and its length.
fn frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    // A request is bounded far below this.
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

/// What of an HTTP request's headers the call gets to see.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    metadata.insert(CONTENT_TYPE, GRPC);
    metadata.insert(TE, HeaderValue::from_static("trailers"));
    for (name, value) in headers {
        if name == AUTHORIZATION || name.as_str() == GRPC_TIMEOUT {
            metadata.append(name, value.clone());
        } else if let Some(name) = name.as_str().strip_prefix(METADATA_PREFIX)
            && !is_reserved(name)
            && let Ok(name) = HeaderName::try_from(name)
        {
            metadata.append(name, value.clone());
        }
    }
    metadata
}

/// Names that belong to the protocol and not to its users.
fn is_reserved(name: &str) -> bool {
    matches!(name, "content-type" | "te" | "host" | "connection" | "content-length")
        || name.starts_with("grpc-")
}

/// A reply's headers under the names the HTTP client sees them by.
fn metadata(headers: &HeaderMap) -> HeaderMap {
    let named = headers.iter().filter_map(|(name, value)| {
        let name = name.as_str();
        if name.starts_with("grpc-") || name == "date" {
            return None;
        }
        let name = HeaderName::try_from(format!("{METADATA_PREFIX}{name}")).ok()?;
        Some((name, value.clone()))
    });
    named.collect()
}

/// The error that headers or trailers tell, if they tell one.
fn ended(headers: &HeaderMap) -> Result<(), Status> {
    match Status::from_header_map(headers) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(()),
    }
}

fn broken(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

/// How long `Grpc-Timeout` lets a call take, such as `300m` for milliseconds.
fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let parse = || {
        let unit = text.chars().last()?;
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(match unit {
            'H' => Duration::from_secs(number.checked_mul(60 * 60)?),
            'M' => Duration::from_secs(number.checked_mul(60)?),
            'S' => Duration::from_secs(number),
            'm' => Duration::from_millis(number),
            'u' => Duration::from_micros(number),
            'n' => Duration::from_nanos(number),
            _ => return None,
        })
    };
    let invalid = || Status::invalid_argument(format!("invalid grpc-timeout: {text}"));
    parse().map(Some).ok_or_else(invalid)
}

async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match limit {
        None => work.await,
        Some(limit) => {
            tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(deadline_exceeded()))
        }
    }
}

fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

fn json_response(status: StatusCode, body: impl Into<Body>) -> Response {
    (status, [(CONTENT_TYPE, JSON)], body.into()).into_response()
}

/// An error as the answer to a unary call, or to something that is no call at all.
fn failure(status: &Status) -> Response {
    let mut response = json_response(http_status(status.code()), error_object(status));
    if status.code() == Code::Unauthenticated
        && let Ok(message) = HeaderValue::try_from(status.message())
    {
        response.headers_mut().insert(WWW_AUTHENTICATE, message);
    }
    response
}

/// An error as the only line of a streaming call.
fn stream_failure(status: &Status) -> Response {
    json_response(http_status(status.code()), error_line(status))
}

fn error_line(status: &Status) -> String {
    format!("{{\"error\":{}}}\n", error_object(status))
}

fn error_object(status: &Status) -> String {
    let code = status.code() as i32;
    match status.message() {
        "" => format!("{{\"code\":{code}}}"),
        message => format!("{{\"code\":{code},\"message\":{}}}", serde_json::Value::from(message)),
    }
}

/// The HTTP status that stands for a gRPC code.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // Not registered anywhere; nginx uses it for a client that closed the request.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::REQUEST_TIMEOUT),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
