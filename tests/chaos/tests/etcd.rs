//! etcd itself, broken for some seconds: what it promises is kept, [`NOT_KEPT`] apart, so what
//! the harness finds wrong with it is wrong with the harness. Then its history is spoiled in one
//! place after another, and each must be found.
//!
//! The program is that of `KVORUM_CHAOS_SERVER`, which has to keep all of it, else the etcd that
//! kvorum is compared with (`tests/judge/build.sh`); without it the test says so and passes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use kvorum_chaos::check::{Guarantee, check};
use kvorum_chaos::history::{Answer, Content, History, Outcome, Request};

/// How long things are broken.
const SECONDS: &str = "20";
/// What etcd 3.7 does not keep: a leader that was stopped or cut off renews leases as long as it
/// believes that it leads, since one whose clock ticks does not ask the others any more
/// (etcd-io/etcd#18428). The next leader, which counts from its election, ends them early.
const NOT_KEPT: Guarantee = Guarantee::LeaseNeverEarly;
/// The exit code that says that a promise was broken.
const BROKEN: i32 = 1;

/// The program, and whether it is forgiven what etcd does not keep.
fn server() -> Option<(PathBuf, bool)> {
    if let Some(server) = env::var_os("KVORUM_CHAOS_SERVER") {
        return Some((server.into(), false));
    }
    let etcd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/judge/etcd");
    etcd.is_file().then_some((etcd, true))
}

#[test]
fn etcd_keeps_its_promises() {
    let Some((server, is_forgiven)) = server() else {
        eprintln!("skipped: there is no etcd in target/judge");
        return;
    };
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("etcd-{}", std::process::id()));
    let mut campaign = Command::new(env!("CARGO_BIN_EXE_kvorum-chaos"));
    campaign.arg("--server").arg(server).arg("--dir").arg(&dir);
    campaign.args(["--keep", "--duration", SECONDS, "--without", "snapshot,replace"]);
    let output = campaign.output().unwrap();
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let (stdout, stderr) = (String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr));
    let failed = || format!("{campaign:?}: {}\n{stdout}\n{stderr}", output.status);
    assert!(output.status.success() || output.status.code() == Some(BROKEN), "{}", failed());
    let report = fs::read(dir.join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let history = History::read(&dir.join("history.jsonl")).unwrap();
    let broken = check(&history).broken;
    let is_all_forgiven = broken.keys().all(|name| is_forgiven && *name == NOT_KEPT);
    assert!(is_all_forgiven, "{broken:?}: {}", failed());
    assert_eq!(output.status.success(), broken.is_empty(), "{}", failed());
    let told = serde_json::to_value(&broken).unwrap();
    assert_eq!(report["broken"], told, "also when read from its file: {}", failed());
    if !broken.is_empty() {
        eprintln!("forgiven: {told}");
    }

    // That nothing was found means something only if something was done.
    assert!(report["revision"].as_i64() > Some(100), "{stdout}");
    assert!(report["events"].as_u64() > Some(300), "{stdout}");
    assert!(!report["faults"].as_object().unwrap().is_empty(), "{stdout}");
    for guarantee in ["real-time", "answer-fits", "watch-reliable", "members-equal", "general"] {
        assert!(report["checks"][guarantee].as_u64() > Some(0), "{guarantee}: {stdout}");
    }
    for (name, guarantees, plant) in PLANTS {
        let mut spoiled = history.clone();
        assert!(plant(&mut spoiled), "{name}: there is nothing to spoil");
        let found = check(&spoiled).broken;
        let is_found = |guarantee| found.get(guarantee) > broken.get(guarantee);
        assert!(guarantees.iter().any(is_found), "{name}: not found, but {found:?}");
    }
    fs::remove_dir_all(&dir).unwrap();
}

/// Spoils a history; says whether it could.
type Plant = fn(&mut History) -> bool;

/// What is spoiled, and what that breaks.
const PLANTS: &[(&str, &[Guarantee], Plant)] = &[
    ("a lost write", &[Guarantee::WriteIsThere, Guarantee::AtMostOnce], |history| {
        let mut operations = history.operations.iter_mut().filter(|o| o.says_it_wrote());
        operations.nth(100).is_some_and(|operation| match &mut operation.outcome {
            Outcome::Done { revision, .. } => {
                *revision += 1_000_000;
                true
            }
            _ => false,
        })
    }),
    ("a stale read", &[Guarantee::RealTime], |history| {
        let is_read = |kind: &str| kind == "get";
        let mut gets = history.operations.iter_mut().filter(|operation| is_read(&operation.kind));
        let Some(old) = gets.find(|operation| operation.revision().is_some()) else { return false };
        let (request, outcome, revision) =
            (old.request.clone(), old.outcome.clone(), old.revision());
        gets.filter(|operation| operation.revision() > revision).last().is_some_and(|operation| {
            (operation.request, operation.outcome) = (request, outcome);
            true
        })
    }),
    ("a read of another value", &[Guarantee::AnswerFits], |history| {
        history.operations.iter_mut().any(|operation| {
            let Outcome::Done { answers, .. } = &mut operation.outcome else { return false };
            let is_get = operation.kind == "get";
            is_get
                && answers.iter_mut().any(|answer| match answer {
                    Answer::Range { kvs, .. } if !kvs.is_empty() => {
                        kvs[0].value.push('x');
                        true
                    }
                    _ => false,
                })
        })
    }),
    ("a write that was refused and done", &[Guarantee::AtMostOnce], |history| {
        let mut puts = history.operations.iter_mut().filter(|operation| operation.kind == "put");
        puts.find(|operation| operation.says_it_wrote()).is_some_and(|operation| {
            operation.outcome = Outcome::Refused("no".to_owned());
            true
        })
    }),
    ("a lost event", &[Guarantee::WatchReliable], |history| {
        spoil_events(history, |messages| {
            messages.remove(messages.len() / 2);
        })
    }),
    ("events in another order", &[Guarantee::WatchOrdered], |history| {
        spoil_events(history, |messages| {
            let middle = messages.len() / 2;
            messages.swap(middle, middle + 1);
        })
    }),
    ("an event twice", &[Guarantee::WatchUnique], |history| {
        spoil_events(history, |messages| {
            let middle = messages.len() / 2;
            messages.insert(middle, messages[middle].clone());
        })
    }),
    ("progress ahead of events", &[Guarantee::WatchBookmarkable], |history| {
        spoil_events(history, |messages| {
            let (middle, last) = (messages.len() / 2, messages[messages.len() - 1].revision);
            let mut progress = messages[middle].clone();
            (progress.revision, progress.content) = (last, Content::Progress);
            messages.insert(middle, progress);
        })
    }),
    ("another previous value", &[Guarantee::WatchPrevKv], |history| {
        spoil_events(history, |messages| {
            let events = messages.iter_mut().filter_map(|message| match &mut message.content {
                Content::Events(events) => events.iter_mut().find_map(|event| event.prev.as_mut()),
                _ => None,
            });
            if let Some(prev) = events.last() {
                prev.version += 1;
            }
        })
    }),
    ("a split revision", &[Guarantee::OneHistory], |history| {
        spoil_events(history, |messages| {
            let middle = messages.len() / 2;
            if let Content::Events(events) = &mut messages[middle].content {
                events[0].kv.key.push('x');
            }
        })
    }),
    ("a lease that ends early", &[Guarantee::LeaseNeverEarly], |history| {
        // As if it had been granted for a day: nobody asked for its end before that.
        let mut found = false;
        for operation in &mut history.operations {
            match (&operation.request, &mut operation.outcome) {
                (Request::Grant { .. }, Outcome::Done { ttl_secs, .. }) => {
                    *ttl_secs = 86_400;
                    found = true;
                }
                (Request::Revoke { .. }, outcome) => *outcome = Outcome::Refused(String::new()),
                _ => {}
            }
        }
        found
    }),
    ("members that differ", &[Guarantee::MembersEqual], |history| {
        history.finals.last_mut().is_some_and(|last| {
            last.hash.0 ^= 1;
            true
        })
    }),
];

/// Spoils the messages with events of a long watch of all keys.
fn spoil_events(
    history: &mut History,
    spoil: fn(&mut Vec<kvorum_chaos::history::Message>),
) -> bool {
    let is_event = |content: &Content| matches!(content, Content::Events(_));
    let count = |watch: &kvorum_chaos::history::Watch| {
        watch.messages.iter().filter(|message| is_event(&message.content)).count()
    };
    let watches = history.watches.iter_mut().filter(|w| w.key == "\0" && count(w) > 10);
    let Some(watch) = watches.max_by_key(|watch| count(watch)) else { return false };
    watch
        .messages
        .retain(|message| message.content == Content::Created || is_event(&message.content));
    spoil(&mut watch.messages);
    true
}
