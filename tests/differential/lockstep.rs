//! Two servers that are asked the same and must answer the same.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use kvorum::pb::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest,
    RangeRequest,
};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::common::accepted::{DECODE_ERROR_TEXT, HASH_KV_AFTER_RESTART, KEYS_ONLY_LEASE};
use crate::common::grpc::{RawClient, RawStream, Wire};
use crate::common::mask::{self, Identity};
use crate::common::server::TestServer;
use crate::generate::{Known, MAX_TXN_OPS, Op};
use crate::watches::Watches;

/// How long one answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What both servers are started with: an election takes 100 ms instead of a
/// second, and the disk is not waited for.
pub(crate) fn arguments(program: &Path, more: &[&str]) -> Vec<String> {
    let max_txn_ops = format!("--max-txn-ops={MAX_TXN_OPS}");
    let mut arguments =
        vec!["--heartbeat-interval=10", "--election-timeout=100", max_txn_ops.as_str()];
    if Some(program) != crate::common::judge::old_etcd().as_deref() {
        arguments.push("--unsafe-no-fsync");
    }
    arguments.extend(more);
    arguments.into_iter().map(str::to_owned).collect()
}

/// Why a run stopped: the two servers disagree.
#[derive(Debug)]
pub(crate) struct Mismatch {
    /// What was asked.
    pub(crate) operation: String,
    /// What the judge answered.
    pub(crate) left: Value,
    /// What the server under test answered.
    pub(crate) right: Value,
}

/// One of the two.
pub(crate) struct Side {
    pub(crate) server: TestServer,
    pub(crate) client: RawClient,
    pub(crate) identity: Identity,
    keep_alive: Option<RawStream>,
}

impl Side {
    /// Starts `program` and learns who it is.
    pub(crate) async fn start(wire: &Wire, program: &Path, more: &[&str]) -> Side {
        let arguments = arguments(program, more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let server = TestServer::start(program, &arguments);
        let mut side = Side {
            client: RawClient::new(server.channel()),
            identity: Identity::default(),
            keep_alive: None,
            server,
        };
        let method = "etcdserverpb.Maintenance/Status";
        let status = side.client.unary(method, Bytes::new()).await;
        let status = wire.response(method, &status.expect("a healthy server answers Status"));
        side.identity = Identity::new(&status, &side.server.client_url(), &side.server.peer_url());
        side
    }

    async fn keep_alive(&mut self, id: i64) -> Result<Bytes, Status> {
        let request = Bytes::from(LeaseKeepAliveRequest { id }.encode_to_vec());
        let client = &self.client;
        let stream =
            self.keep_alive.get_or_insert_with(|| client.open("etcdserverpb.Lease/LeaseKeepAlive"));
        // If the stream has ended, why is in what comes from it.
        let _ended = stream.requests.send(request).await.is_err();
        match stream.responses.recv().await {
            Some(Ok(answer)) => Ok(answer),
            ended => {
                self.keep_alive = None;
                Err(ended.map_or_else(|| Status::unknown("the stream ended"), Result::unwrap_err))
            }
        }
    }

    async fn restart(&mut self) {
        self.keep_alive = None;
        self.server.kill();
        self.server.restart();
        self.client = RawClient::new(self.server.channel());
    }
}

/// The judge on the left, the server under test on the right.
pub(crate) struct Pair {
    pub(crate) wire: Wire,
    pub(crate) left: Side,
    pub(crate) right: Side,
    pub(crate) known: Known,
    watches: Watches,
}

impl Pair {
    /// Starts both.
    pub(crate) async fn start(
        left: (&Path, &[&str]),
        right: (&Path, &[&str]),
    ) -> Result<Pair, Mismatch> {
        let wire = Wire::new();
        let left = Side::start(&wire, left.0, left.1).await;
        let right = Side::start(&wire, right.0, right.1).await;
        let watches = Watches::open(&wire, &left, &right, Vec::new()).await?;
        Ok(Pair { wire, left, right, known: Known::new(), watches })
    }

    /// Carries out `op` on both and compares.
    pub(crate) async fn execute(&mut self, op: &Op) -> Result<(), Mismatch> {
        match op {
            Op::Unary { method, request } => {
                // A watcher that has not caught up is refused or not, as the
                // compaction comes before or after.
                if *method == "etcdserverpb.KV/Compact" && !self.settle().await? {
                    return Ok(());
                }
                let answer = self.call(method, request.clone(), request.clone()).await?;
                self.learn(method, request, &answer);
                Ok(())
            }
            Op::RangeStream { request } => self.range_stream(request).await,
            Op::KeepAlive { id } => {
                let method = "etcdserverpb.Lease/LeaseKeepAlive";
                let (left, right) = tokio::join!(
                    patient(self.left.keep_alive(*id)),
                    patient(self.right.keep_alive(*id))
                );
                let request = Bytes::from(LeaseKeepAliveRequest { id: *id }.encode_to_vec());
                self.compare(method, &request, left, right).map(drop)
            }
            Op::BriefLease { id, ttl } => self.brief_lease(*id, *ttl).await,
            Op::Watch { request } => {
                self.watches.create(&self.wire, &self.left, &self.right, &self.known, request).await
            }
            Op::CancelWatch { choice } => {
                self.settle().await?;
                self.watches.cancel(&self.wire, &self.left, &self.right, *choice).await
            }
            Op::Progress => {
                self.settle().await?;
                self.watches.progress_ahead(&self.known).await
            }
            Op::Settle => self.settle().await.map(drop),
        }
    }

    /// Waits until every watcher has everything, and compares what it has.
    /// False when an alarm was in the way of making sure.
    pub(crate) async fn settle(&mut self) -> Result<bool, Mismatch> {
        if self.watches.may_lag(self.known.revision) {
            let put = kvorum::pb::etcdserverpb::PutRequest {
                key: Bytes::from_static(b"settle"),
                ..Default::default()
            };
            let (method, put) = ("etcdserverpb.KV/Put", Bytes::from(put.encode_to_vec()));
            let answer = self.call(method, put.clone(), put.clone()).await?;
            self.learn(method, &put, &answer);
        }
        self.watches.settle(&self.known).await?;
        Ok(self.watches.settled())
    }

    /// Kills both, starts them again and compares everything that can be read.
    pub(crate) async fn compare_after_crash(&mut self) -> Result<(), Mismatch> {
        self.settle().await?;
        self.watches.finish()?;
        self.left.restart().await;
        self.right.restart().await;
        self.compare_everything().await?;
        let log = self.watches.take_log();
        self.watches = Watches::open(&self.wire, &self.left, &self.right, log).await?;
        let everything = kvorum::pb::etcdserverpb::WatchCreateRequest {
            key: Bytes::from_static(b"\0"),
            range_end: Bytes::from_static(b"\0"),
            start_revision: self.known.compacted.max(1),
            ..Default::default()
        };
        self.watches.create(&self.wire, &self.left, &self.right, &self.known, &everything).await
    }

    async fn compare_everything(&mut self) -> Result<(), Mismatch> {
        let Known { compacted, revision, .. } = self.known;
        let some = (compacted + 1..revision).step_by(17);
        for revision in [compacted - 1, compacted, revision, revision + 1].into_iter().chain(some) {
            let range = RangeRequest {
                key: Bytes::from_static(b"\0"),
                range_end: Bytes::from_static(b"\0"),
                revision: revision.max(1),
                ..Default::default()
            };
            let range = Bytes::from(range.encode_to_vec());
            self.call("etcdserverpb.KV/Range", range.clone(), range).await?;
            if HASH_KV_AFTER_RESTART.applies(revision == compacted) {
                continue;
            }
            let hash = kvorum::pb::etcdserverpb::HashKvRequest { revision: revision.max(0) };
            let hash = Bytes::from(hash.encode_to_vec());
            self.call("etcdserverpb.Maintenance/HashKV", hash.clone(), hash).await?;
        }
        for method in ["etcdserverpb.Lease/LeaseLeases", "etcdserverpb.Maintenance/Alarm"] {
            self.call(method, Bytes::new(), Bytes::new()).await?;
        }
        for id in (-10..10).filter(|id| *id != 0) {
            let request = LeaseTimeToLiveRequest { id, keys: true }.encode_to_vec();
            let request = Bytes::from(request);
            self.call("etcdserverpb.Lease/LeaseTimeToLive", request.clone(), request).await?;
        }
        Ok(())
    }

    /// Calls `method` on both, compares the answers and returns the judge's.
    pub(crate) async fn call(
        &mut self,
        method: &str,
        left: Bytes,
        right: Bytes,
    ) -> Result<Value, Mismatch> {
        let request = left.clone();
        let (left, right) = tokio::join!(
            patient(self.left.client.unary(method, left)),
            patient(self.right.client.unary(method, right))
        );
        self.compare(method, &request, left, right)
    }

    fn compare(
        &self,
        method: &str,
        request: &[u8],
        left: Result<Bytes, Status>,
        right: Result<Bytes, Status>,
    ) -> Result<Value, Mismatch> {
        let mut left = normal(&self.wire, &self.left.identity, method, left);
        let mut right = normal(&self.wire, &self.right.identity, method, right);
        accept_keys_only(&self.wire.request(method, request), &mut left, &mut right);
        let operation = || describe(&self.wire, method, request);
        same(operation, left, right)
    }

    async fn range_stream(&mut self, request: &Bytes) -> Result<(), Mismatch> {
        let method = "etcdserverpb.KV/RangeStream";
        let (left, right) = tokio::join!(
            self.left.client.collect(method, request.clone()),
            self.right.client.collect(method, request.clone())
        );
        let [mut left, mut right] = [(left, &self.left), (right, &self.right)]
            .map(|((parts, end), side)| merged(&self.wire, &side.identity, method, &parts, end));
        accept_keys_only(&self.wire.request(method, request), &mut left, &mut right);
        same(|| describe(&self.wire, method, request), left, right).map(drop)
    }

    async fn brief_lease(&mut self, id: i64, ttl: i64) -> Result<(), Mismatch> {
        let grant = "etcdserverpb.Lease/LeaseGrant";
        let request = Bytes::from(LeaseGrantRequest { id, ttl }.encode_to_vec());
        let (left, right) = tokio::join!(
            patient(self.left.client.unary(grant, request.clone())),
            patient(self.right.client.unary(grant, request.clone()))
        );
        let chosen = [&left, &right].map(|answer| {
            let answer = answer.as_ref().ok()?;
            let granted =
                kvorum::pb::etcdserverpb::LeaseGrantResponse::decode(answer.clone()).ok()?;
            Some(granted.id)
        });
        let [left, right] =
            [(left, &mut self.left, chosen[0]), (right, &mut self.right, chosen[1])].map(
                |(answer, side, chosen)| {
                    let mut identity = side.identity.clone();
                    if let (0, Some(chosen)) = (id, chosen) {
                        let name = if chosen > 0 { "<lease>" } else { "<not a positive lease>" };
                        identity.name(chosen.to_string(), name);
                    }
                    normal(&self.wire, &identity, grant, answer)
                },
            );
        same(|| describe(&self.wire, grant, &request), left, right)?;
        if let [Some(left), Some(right)] = chosen {
            let revoke = |id| Bytes::from(LeaseRevokeRequest { id }.encode_to_vec());
            self.call("etcdserverpb.Lease/LeaseRevoke", revoke(left), revoke(right)).await?;
        }
        Ok(())
    }

    fn learn(&mut self, method: &str, request: &[u8], answer: &Value) {
        let Some(answer) = answer.get("ok") else { return };
        if method == "etcdserverpb.KV/Compact" {
            let request = kvorum::pb::etcdserverpb::CompactionRequest::decode(request);
            self.known.compacted = request.expect("it was encoded here").revision;
        }
        if let Some(Value::String(revision)) = answer.pointer("/header/revision") {
            let revision = revision.parse().expect("a revision is a number");
            self.known.revision = self.known.revision.max(revision);
        }
    }
}

async fn patient<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::unknown(format!("no answer within {PATIENCE:?}"))),
    }
}

/// `left` if both are equal.
pub(crate) fn same(
    operation: impl FnOnce() -> String,
    left: Value,
    right: Value,
) -> Result<Value, Mismatch> {
    if left == right { Ok(left) } else { Err(Mismatch { operation: operation(), left, right }) }
}

/// `method` and what it was asked, for people.
pub(crate) fn describe(wire: &Wire, method: &str, request: &[u8]) -> String {
    format!("{method} {}", readable(wire.request(method, request)))
}

/// An answer without what may differ.
fn normal(wire: &Wire, identity: &Identity, method: &str, answer: Result<Bytes, Status>) -> Value {
    let answer = match answer {
        Ok(answer) => answer,
        Err(status) => return error(&status),
    };
    let mut answer = wire.response(method, &answer);
    match method {
        "etcdserverpb.Lease/LeaseLeases" => mask::sort(&mut answer, "/leases"),
        "etcdserverpb.Lease/LeaseTimeToLive" => {
            mask::sort(&mut answer, "/keys");
            let remaining = answer.get_mut("TTL");
            if let Some(remaining) = remaining
                && remaining != "-1"
            {
                *remaining = "<remaining>".into();
            }
        }
        "etcdserverpb.Maintenance/Status" => {
            // etcd finds it out some seconds after its start.
            if let Some(fields) = answer.as_object_mut() {
                fields.remove("storageVersion");
            }
            // Go's protobuf varies the spaces in a message's text from build to build.
            let errors = answer.get_mut("errors").and_then(Value::as_array_mut);
            for error in errors.into_iter().flatten() {
                let words: Vec<&str> =
                    error.as_str().unwrap_or_default().split_whitespace().collect();
                *error = words.join(" ").into();
            }
        }
        "etcdserverpb.Maintenance/Hash" => {
            // A hash of the whole file, which is every server's own.
            if let Some(hash) = answer.get_mut("hash") {
                *hash = "<hash>".into();
            }
        }
        _ => {}
    }
    identity.mask(&mut answer);
    json!({ "ok": answer })
}

fn error(status: &Status) -> Value {
    let mut message = status.message().to_owned();
    if status.code() == Code::Internal
        && (message.contains("unmarshal") || message.contains("decode"))
    {
        message = DECODE_ERROR_TEXT.name.to_owned();
    }
    let mut error = json!({ "code": format!("{:?}", status.code()), "message": message });
    if !status.details().is_empty() {
        error["details"] = format!("{:?}", status.details()).into();
    }
    json!({ "error": error })
}

/// The parts of a range stream as the one range they are, and what was wrong
/// with how it was split.
fn merged(
    wire: &Wire,
    identity: &Identity,
    method: &str,
    parts: &[Bytes],
    end: Result<(), Status>,
) -> Value {
    let mut records = Vec::new();
    let mut last = Value::Null;
    let mut faults = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let mut part = wire.response(method, part);
        identity.mask(&mut part);
        let mut range = part.get_mut("range_response").map(Value::take).unwrap_or_default();
        let kvs = range.as_object_mut().and_then(|fields| fields.remove("kvs"));
        if let Some(Value::Array(kvs)) = kvs {
            records.extend(kvs);
        }
        if index + 1 < parts.len() && range != json!({}) {
            faults.push(format!("part {index} of {} has {range}", parts.len()));
        }
        last = range;
    }
    match end {
        Ok(()) => json!({ "kvs": records, "last": last, "faults": faults }),
        // How much came before an error is a matter of time.
        Err(status) => error(&status),
    }
}

/// Forgets the leases of records without a value, if `request` asks for such.
fn accept_keys_only(request: &Value, left: &mut Value, right: &mut Value) {
    if request.to_string().contains("\"keys_only\":true") {
        forget_leases(left);
        forget_leases(right);
    }
}

fn forget_leases(answer: &mut Value) {
    match answer {
        Value::Object(fields) => {
            if fields.contains_key("mod_revision") && !fields.contains_key("value") {
                fields.insert("lease".to_owned(), KEYS_ONLY_LEASE.name.into());
            }
            fields.values_mut().for_each(forget_leases);
        }
        Value::Array(values) => values.iter_mut().for_each(forget_leases),
        _ => {}
    }
}

/// `value` with keys and values as text instead of base64.
pub(crate) fn readable(mut value: Value) -> Value {
    make_readable(&mut value);
    value
}

fn make_readable(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(text)
                        if ["key", "value", "range_end"].contains(&name.as_str()) =>
                    {
                        if let Some(bytes) = from_base64(text) {
                            *text = bytes.escape_ascii().to_string();
                        }
                    }
                    field => make_readable(field),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(make_readable),
        _ => {}
    }
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let digit = alphabet.iter().position(|known| *known == digit)?;
        bits = (bits << 6) | digit as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}
