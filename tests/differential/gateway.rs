//! The JSON gateway and the plain HTTP endpoints: the same requests to both
//! servers, in order, and the same status, content type and body.
//!
//! Bodies are compared as JSON, since etcd varies its spaces on purpose. A body
//! of several lines is a stream: every line is compared.

use serde_json::{Value, json};

use crate::common::accepted::{self, Accepted};
use crate::common::grpc::Wire;
use crate::common::http::{self, Answer};
use crate::common::{judge, mask, server};
use crate::lockstep::{Side, same};

/// A request.
struct Case {
    method: &'static str,
    path: &'static str,
    body: &'static str,
    /// Lines after which the client goes away; 0 reads to the end.
    lines: usize,
    /// What is not compared.
    except: Option<&'static Accepted>,
}

const fn post(path: &'static str, body: &'static str) -> Case {
    Case { method: "POST", path, body, lines: 0, except: None }
}

const fn get(path: &'static str) -> Case {
    Case { method: "GET", path, body: "", lines: 0, except: None }
}

const fn stream(path: &'static str, body: &'static str, lines: usize) -> Case {
    Case { method: "POST", path, body, lines, except: None }
}

const fn with_method(method: &'static str, path: &'static str) -> Case {
    Case { method, path, body: "{}", lines: 0, except: None }
}

const fn bad_json(path: &'static str, body: &'static str) -> Case {
    let except = Some(&accepted::JSON_ERROR_TEXT);
    Case { method: "POST", path, body, lines: 0, except }
}

/// "YQ==" is a, "Yg==" is b, "Yw==" is c, "AA==" is "\0".
const CASES: &[Case] = &[
    // KV.
    post("/v3/kv/range", r#"{"key":"YQ=="}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","value":"MQ=="}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","value":"Mg==","prev_kv":true}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","value":"Mw==","prevKv":true}"#),
    post("/v3/kv/put", r#"{"key":"Yg==","value":"eA=="}"#),
    post("/v3/kv/put", r#"{"key":"Yw","value":"_-4"}"#),
    post("/v3/kv/put", r#"{"key":"Yw==","value":"\/+4="}"#),
    post("/v3/kv/put", r#"{"key":"Yw==","value":null,"lease":"0"}"#),
    post("/v3/kv/put", r#"{"value":"eA=="}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","lease":"77"}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","value":"eA==","ignore_value":true}"#),
    post("/v3/kv/put", ""),
    post("/v3/kv/range", r#"{"key":"YQ=="}"#),
    post("/v3/kv/range", r#"{"key":"AA==","range_end":"AA=="}"#),
    post("/v3/kv/range", r#"{"key":"AA==","rangeEnd":"AA==","limit":"1"}"#),
    post("/v3/kv/range", r#"{"key":"AA==","range_end":"AA==","limit":2,"keys_only":true}"#),
    post("/v3/kv/range", r#"{"key":"AA==","range_end":"AA==","count_only":true}"#),
    post(
        "/v3/kv/range",
        r#"{"key":"AA==","range_end":"AA==","sort_order":"DESCEND","sort_target":"VALUE"}"#,
    ),
    post("/v3/kv/range", r#"{"key":"AA==","range_end":"AA==","sort_order":2,"sort_target":3}"#),
    post("/v3/kv/range", r#"{"key":"AA==","range_end":"AA==","sort_order":9}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","revision":"2","serializable":true}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","revision":"999"}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","revision":2e0}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","unknown_field":{"x":[1]}}"#),
    post("/v3/kv/range", r#" {"key":"YQ=="} "#),
    bad_json("/v3/kv/range", r#"{"key":"YQ==""#),
    bad_json("/v3/kv/range", r#"{bad"#),
    bad_json("/v3/kv/range", r#"[]"#),
    bad_json("/v3/kv/range", r#"7"#),
    bad_json("/v3/kv/range", r#"{"key":7}"#),
    bad_json("/v3/kv/range", r#"{"key":"!!"}"#),
    bad_json("/v3/kv/range", r#"{"key":"YQ==","limit":"many"}"#),
    bad_json("/v3/kv/range", r#"{"key":"YQ==","limit":1.5}"#),
    // A name that is no enum's is skipped like an unknown field.
    post("/v3/kv/range", r#"{"key":"YQ==","sort_order":"SIDEWAYS"}"#),
    bad_json("/v3/kv/range", r#"{"key":"YQ==","key":"Yg=="}"#),
    bad_json("/v3/kv/range", r#"{"key":"YQ==","range_end":"Yg==","rangeEnd":"Yg=="}"#),
    bad_json("/v3/kv/txn", r#"{"success":[{"request_range":{"key":"YQ==","key":"Yg=="}}]}"#),
    bad_json("/v3/kv/txn", r#"{"success":[{"request_range":{},"request_put":{}}]}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","x":1,"x":{"key":1,"key":2}}"#),
    post(
        "/v3/kv/txn",
        r#"{"compare":[{"key":"YQ==","target":"VERSION","version":"3","result":"EQUAL"}],
            "success":[{"request_put":{"key":"YQ==","value":"NA==","prev_kv":true}},
                       {"request_range":{"key":"YQ=="}},
                       {"request_txn":{"success":[{"request_range":{"key":"Yg=="}}]}}],
            "failure":[{"requestRange":{"key":"Yw=="}}]}"#,
    ),
    post(
        "/v3/kv/txn",
        r#"{"compare":[{"key":"YQ==","target":"VALUE","value":"eA==","result":"NOT_EQUAL"},
                       {"key":"YQ==","target":"MOD","mod_revision":"1","result":"LESS"}],
            "success":[{"request_put":{"key":"YQ==","value":"NQ=="}}],
            "failure":[{"request_delete_range":{"key":"Yw==","prev_kv":true}}]}"#,
    ),
    post("/v3/kv/txn", "{}"),
    post("/v3/kv/txn", r#"{"success":[{}]}"#),
    post(
        "/v3/kv/txn",
        r#"{"success":[{"request_put":{"key":"YQ=="}},{"request_put":{"key":"YQ=="}}]}"#,
    ),
    post("/v3/kv/deleterange", r#"{"key":"Yg==","prev_kv":true}"#),
    post("/v3/kv/deleterange", r#"{"key":"Yg=="}"#),
    post("/v3/kv/deleterange", r#"{}"#),
    post("/v3/kv/compaction", r#"{"revision":"3","physical":true}"#),
    post("/v3/kv/compaction", r#"{"revision":"3"}"#),
    post("/v3/kv/compaction", r#"{"revision":"999"}"#),
    post("/v3/kv/range", r#"{"key":"YQ==","revision":"1"}"#),
    // The old prefix.
    post("/v3beta/kv/range", r#"{"key":"YQ=="}"#),
    post("/v3alpha/kv/range", r#"{"key":"YQ=="}"#),
    // Leases.
    post("/v3/lease/grant", r#"{"TTL":"1000","ID":"5"}"#),
    post("/v3/lease/grant", r#"{"TTL":1000,"ID":5}"#),
    post("/v3/lease/grant", r#"{"TTL":"99999999999","ID":"6"}"#),
    post("/v3/kv/put", r#"{"key":"Yg==","value":"eA==","lease":"5"}"#),
    post("/v3/lease/timetolive", r#"{"ID":"5","keys":true}"#),
    post("/v3/kv/lease/timetolive", r#"{"ID":"5"}"#),
    post("/v3/lease/timetolive", r#"{"ID":"6"}"#),
    post("/v3/lease/leases", "{}"),
    post("/v3/kv/lease/leases", "{}"),
    post("/v3/lease/leases", ""),
    stream("/v3/lease/keepalive", r#"{"ID":"5"}"#, 1),
    stream("/v3/lease/keepalive", r#"{"ID":"6"}"#, 1),
    stream("/v3/lease/keepalive", "{\"ID\":\"5\"}\n{\"ID\":\"6\"}", 2),
    post("/v3/lease/revoke", r#"{"ID":"6"}"#),
    post("/v3/lease/revoke", r#"{"ID":"5"}"#),
    post("/v3/kv/lease/revoke", r#"{"ID":"5"}"#),
    // Watches.
    stream(
        "/v3/watch",
        r#"{"create_request":{"key":"YQ==","start_revision":"5","prev_kv":true}}"#,
        2,
    ),
    stream(
        "/v3/watch",
        r#"{"create_request":{"key":"YQ==","range_end":"Yg==","filters":["NOPUT"]}}"#,
        1,
    ),
    stream("/v3/watch", r#"{"create_request":{"key":"YQ==","start_revision":"1"}}"#, 2),
    stream("/v3/watch", r#"{"create_request":{"key":"Yg==","range_end":"YQ=="}}"#, 1),
    stream(
        "/v3/watch",
        "{\"create_request\":{\"key\":\"YQ==\"}}\n{\"cancel_request\":{\"watch_id\":\"0\"}}",
        2,
    ),
    // Cluster.
    post("/v3/cluster/member/list", "{}"),
    post("/v3/cluster/member/list", r#"{"linearizable":true}"#),
    post("/v3/cluster/member/remove", r#"{"ID":"4711"}"#),
    post("/v3/cluster/member/update", r#"{"ID":"4711","peerURLs":["http://127.0.0.1:1"]}"#),
    post("/v3/cluster/member/promote", r#"{"ID":"4711"}"#),
    post("/v3/cluster/member/add", r#"{"peerURLs":["not a url"]}"#),
    // Maintenance.
    post("/v3/maintenance/status", "{}"),
    post("/v3/maintenance/alarm", "{}"),
    post("/v3/maintenance/alarm", r#"{"action":"ACTIVATE","memberID":"7","alarm":"NOSPACE"}"#),
    post("/v3/maintenance/alarm", r#"{"action":"GET"}"#),
    post("/v3/kv/put", r#"{"key":"YQ==","value":"MQ=="}"#),
    get("/health"),
    get("/health?exclude=NOSPACE"),
    get("/readyz"),
    post("/v3/maintenance/alarm", r#"{"action":"DEACTIVATE","memberID":"7","alarm":"NOSPACE"}"#),
    post("/v3/maintenance/defragment", "{}"),
    post("/v3/maintenance/hash", "{}"),
    post("/v3/maintenance/hashkv", "{}"),
    post("/v3/maintenance/hashkv", r#"{"revision":"4"}"#),
    post("/v3/maintenance/hashkv", r#"{"revision":"999"}"#),
    post("/v3/maintenance/transfer-leadership", r#"{"targetID":"4711"}"#),
    // Auth that is off.
    post("/v3/auth/status", "{}"),
    post("/v3/auth/authenticate", r#"{"name":"root","password":"x"}"#),
    // What is not there.
    post("/v3/kv/nope", "{}"),
    post("/v3/kv/range/", r#"{"key":"YQ=="}"#),
    post("/v2/keys", "{}"),
    post("/", "{}"),
    get("/"),
    get("/nope"),
    get("/v3/kv/range"),
    with_method("PUT", "/v3/kv/range"),
    with_method("DELETE", "/v3/kv/put"),
    // Plain HTTP.
    get("/health"),
    get("/health?serializable=true"),
    get("/livez"),
    get("/livez?verbose"),
    get("/livez/serializable_read"),
    get("/livez/nope"),
    get("/readyz"),
    get("/readyz/data_corruption"),
    get("/readyz/linearizable_read?verbose"),
    get("/readyz?exclude=linearizable_read"),
    get("/readyz?exclude=nope"),
    with_method("POST", "/health"),
    with_method("POST", "/version"),
];

/// What is compared of an answer.
fn normal(side: &Side, case: &Case, answer: std::io::Result<Answer>) -> Value {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return json!({ "no answer": error.to_string() }),
    };
    let text = answer.text();
    let lines = text.lines().filter(|line| !line.is_empty());
    let mut body: Vec<Value> = if answer.header("content-type").contains("json") {
        lines
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|_| format!("not JSON: {line}").into())
            })
            .collect()
    } else if case.path.contains("verbose") {
        // etcd lists the checks in no order.
        let mut lines: Vec<Value> = lines.map(Value::from).collect();
        lines.sort_by_key(Value::to_string);
        lines
    } else {
        vec![text.clone().into()]
    };
    if case.lines > 0 {
        body.truncate(case.lines);
    }
    for line in &mut body {
        if case.except.is_some_and(|except| except.name == accepted::JSON_ERROR_TEXT.name)
            && let Some(message) = line.get_mut("message")
        {
            *message = accepted::JSON_ERROR_TEXT.name.into();
        }
        if case.path.ends_with("timetolive")
            && let Some(remaining) = line.get_mut("TTL")
            && remaining != "-1"
        {
            *remaining = "<remaining>".into();
        }
        if case.path.ends_with("/hash")
            && let Some(hash) = line.get_mut("hash")
        {
            *hash = "<hash>".into();
        }
        if case.path.ends_with("status")
            && let Some(fields) = line.as_object_mut()
        {
            fields.remove("storageVersion");
        }
        mask::sort(line, "/leases");
        side.identity.mask(line);
    }
    json!({
        "status": answer.status,
        "content-type": answer.header("content-type"),
        "body": body,
    })
}

fn ask(side: &Side, case: &Case) -> std::io::Result<Answer> {
    let enough = |body: &[u8]| {
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        case.lines > 0 && lines >= case.lines && body.ends_with(b"\n")
    };
    let headers = [("content-type", "application/json")];
    let address = side.server.client_address();
    http::request_until(&address, case.method, case.path, &headers, case.body.as_bytes(), enough)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_answers_as_etcd_answers() {
    let Some(judges) = judge::find("the gateway differential") else { return };
    let wire = Wire::new();
    let left = Side::start(&wire, &judges.etcd, &[]).await;
    let right = Side::start(&wire, &server::kvorum(), &[]).await;
    let mut differences = 0;
    for (index, case) in CASES.iter().enumerate() {
        let answers = [&left, &right].map(|side| normal(side, case, ask(side, case)));
        let [left, right] = answers;
        assert!(left.get("no answer").is_none(), "etcd does not answer {}: {left}", case.path);
        if std::env::var_os("KVORUM_DIFF_SHOW").is_some() {
            eprintln!("{} {} {}: {left}", case.method, case.path, case.body);
        }
        let operation = || format!("{} {} {}", case.method, case.path, case.body);
        if let Err(mismatch) = same(operation, left, right) {
            differences += 1;
            eprintln!(
                "gateway case {index}: {}\n  etcd:   {}\n  kvorum: {}",
                mismatch.operation, mismatch.left, mismatch.right
            );
        }
    }
    assert_eq!(differences, 0, "of {} gateway requests", CASES.len());
}
