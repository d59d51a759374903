//! kvorum and etcd, asked the same in lockstep, answer the same.
//!
//! A seed is a sequence of random operations over few keys: every kind of range,
//! put, delete and nested transaction, leases, watchers, compactions, alarms and
//! nonsense. Both servers start empty, every answer and every error is compared
//! field by field, and at the end both are killed, restarted and compared as a
//! whole. What may differ is masked in `common/mask.rs` and `lockstep.rs`, or
//! listed with its reason in `common/accepted.rs`.
//!
//! ```text
//! cargo test --test differential                                    20 seeds
//! KVORUM_DIFF_SEEDS=0..200 KVORUM_DIFF_OPS=500 cargo test --test differential random
//! KVORUM_TEST_BINARY=/usr/bin/etcd cargo test --test differential   something else than kvorum
//! ```

#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "this is test code")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is test code")]

#[path = "../common/mod.rs"]
mod common;

mod gateway;
mod generate;
mod hashes;
mod large;
mod lockstep;
mod watches;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::Path;

use common::rng::Rng;
use common::{accepted, judge, server};
use generate::Op;
use lockstep::{Mismatch, Pair, describe};
use serde_json::Value;

/// Seeds of an ordinary run, and operations of each.
const SEEDS: Range<u64> = 0..20;
const OPS: usize = 300;
/// Operations shown that led to a mismatch.
const OPS_SHOWN: usize = 12;
/// Mismatches shown; beyond, they are counted.
const MISMATCHES_SHOWN: usize = 10;

/// `KVORUM_DIFF_SEEDS=start..end`.
fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("KVORUM_DIFF_SEEDS") else { return SEEDS };
    let range = text
        .split_once("..")
        .and_then(|(start, end)| Some(start.trim().parse().ok()?..end.trim().parse().ok()?));
    range.unwrap_or_else(|| panic!("KVORUM_DIFF_SEEDS is {text:?}, not like 0..200"))
}

/// `KVORUM_DIFF_OPS`.
fn ops() -> usize {
    let Ok(text) = std::env::var("KVORUM_DIFF_OPS") else { return OPS };
    text.parse().unwrap_or_else(|_| panic!("KVORUM_DIFF_OPS is {text:?}, not a number"))
}

/// Where two answers part.
fn first_difference(left: &Value, right: &Value, path: &str) -> String {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
            let differs = names.into_iter().find(|name| left.get(*name) != right.get(*name));
            differs.map_or_else(String::new, |name| {
                let [left, right] =
                    [left, right].map(|side| side.get(name).unwrap_or(&Value::Null));
                first_difference(left, right, &format!("{path}/{name}"))
            })
        }
        (Value::Array(left), Value::Array(right)) => {
            let index = left.iter().zip(right).take_while(|(left, right)| left == right).count();
            let [left, right] = [left, right].map(|side| side.get(index).unwrap_or(&Value::Null));
            first_difference(left, right, &format!("{path}/{index}"))
        }
        _ => format!("{path}: {left} against {right}"),
    }
}

/// Runs one seed; an error is the report of the first mismatch.
async fn run(
    seed: u64,
    ops: usize,
    left: (&Path, &[&str]),
    right: (&Path, &[&str]),
) -> Result<(), String> {
    let mut recent = VecDeque::new();
    let report = |index: usize, recent: &VecDeque<String>, mismatch: Mismatch| {
        let before: Vec<String> = recent.iter().map(|op| format!("    {op}\n")).collect();
        format!(
            "seed {seed}, operation {index}: {}\n  first difference: {}\n  left:  {}\n  right: {}\n  before:\n{}  again:  \
             KVORUM_DIFF_SEEDS={seed}..{} KVORUM_DIFF_OPS={ops} cargo test --test differential random",
            mismatch.operation,
            first_difference(&mismatch.left, &mismatch.right, ""),
            lockstep::readable(mismatch.left),
            lockstep::readable(mismatch.right),
            before.concat(),
            seed + 1
        )
    };
    let mut rng = Rng::new(seed);
    let pair = Pair::start(left, right).await;
    let mut pair = pair.map_err(|mismatch| report(0, &recent, mismatch))?;
    for index in 0..ops {
        let op = generate::operation(&mut rng, &mut pair.known, index);
        if let Err(mismatch) = pair.execute(&op).await {
            let report = report(index, &recent, mismatch);
            let words = [&mut pair.left, &mut pair.right].map(|side| side.server.last_words());
            return Err([Some(report)]
                .into_iter()
                .chain(words)
                .flatten()
                .collect::<Vec<_>>()
                .join("\n"));
        }
        if recent.len() == OPS_SHOWN {
            recent.pop_front();
        }
        recent.push_back(match &op {
            Op::Unary { method, request } => describe(&pair.wire, method, request),
            Op::RangeStream { request } => {
                describe(&pair.wire, "etcdserverpb.KV/RangeStream", request)
            }
            op => format!("{op:?}"),
        });
    }
    pair.compare_after_crash().await.map_err(|mismatch| report(ops, &recent, mismatch))
}

/// Runs seeds one after the other and returns the reports of those that failed.
async fn run_all(
    seeds: Range<u64>,
    ops: usize,
    left: (&Path, &[&str]),
    right: (&Path, &[&str]),
) -> Vec<String> {
    let mut reports = Vec::new();
    for seed in seeds {
        if let Err(report) = run(seed, ops, left, right).await {
            if reports.len() < MISMATCHES_SHOWN {
                eprintln!("{report}\n");
            }
            reports.push(report);
        }
    }
    reports
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_are_answered_as_etcd_answers_them() {
    let Some(judges) = judge::find("the random differential") else { return };
    let kvorum = server::kvorum();
    let (seeds, ops) = (seeds(), ops());
    let reports = run_all(seeds.clone(), ops, (&judges.etcd, &[]), (&kvorum, &[])).await;
    assert!(reports.is_empty(), "{} of the seeds {seeds:?} differ", reports.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_agrees_with_itself() {
    let Some(judges) = judge::find("the differential of etcd with itself") else { return };
    let etcd = judges.etcd.as_path();
    let reports = run_all(1_000..1_003, 200, (etcd, &[]), (etcd, &[])).await;
    assert!(reports.is_empty(), "the comparison takes etcd for different from itself");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_comparison_sees_a_difference() {
    let Some(judges) = judge::find("the differential of unequal servers") else { return };
    let etcd = judges.etcd.as_path();
    // The later of a flag given twice holds.
    let smaller = format!("--max-txn-ops={}", generate::MAX_TXN_OPS - 1);
    let reports = run_all(0..3, 300, (etcd, &[]), (etcd, &[&smaller])).await;
    assert!(!reports.is_empty(), "a server with another limit is not told apart");
    if let Some(old) = judge::old_etcd() {
        let reports = run_all(0..3, 300, (etcd, &[]), (&old, &[])).await;
        assert_eq!(reports.len(), 3, "etcd 3.4 is not told apart");
    }
}

#[test]
fn accepted_differences_are_those_the_documentation_lists() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/compatibility.md");
    let text = std::fs::read_to_string(&path).expect("docs/compatibility.md is readable");
    let table = text.split("<!-- accepted differences -->").nth(1);
    let table = table.expect("docs/compatibility.md marks the table of accepted differences");
    let documented: BTreeMap<&str, &str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |")?.split_once("` | "))
        .collect();
    let accepted: BTreeMap<&str, &str> =
        accepted::ACCEPTED.iter().map(|difference| (difference.name, difference.reason)).collect();
    assert_eq!(documented, accepted, "left: docs/compatibility.md, right: common/accepted.rs");
}
