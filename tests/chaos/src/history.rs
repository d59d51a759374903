//! What clients saw: every operation with the times of its call and its return, and every
//! message of every watch.
//!
//! A put, a get and a delete are transactions without compares and with one action, so
//! that a checker knows one kind of operation. Times are microseconds of the harness's own
//! monotonic clock. Values that are written are unique, which tells who wrote what.
//!
//! A history is written as lines of JSON: it is what is left to look at when a check fails,
//! and can be read back and checked again.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

/// A key with its value, as a range or an event has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kv {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Revision of its creation.
    pub create_revision: i64,
    /// Revision of its last change.
    pub mod_revision: i64,
    /// Changes since its creation, that one included.
    pub version: i64,
    /// The lease it hangs on, or 0.
    pub lease: i64,
}

/// What a compare looks at, with what it is compared to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// The version; 0 of a key that is not there.
    Version(i64),
    /// The revision of the last change; 0 of a key that is not there.
    ModRevision(i64),
    /// The value; never equal for a key that is not there.
    Value(String),
}

/// A condition of a transaction: that the target is equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// What must be equal.
    pub target: Target,
}

/// One step of a transaction. `end` is as in etcd: none for one key, else the first key
/// that is no longer meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Reads keys.
    Range {
        /// The first key.
        key: String,
        /// The end of the range.
        end: Option<String>,
        /// The revision to read at, or 0 for now.
        revision: i64,
        /// At most so many keys; 0 for all.
        limit: i64,
    },
    /// Writes a key.
    Put {
        /// The key.
        key: String,
        /// Its value, which nobody else writes.
        value: String,
        /// The lease to hang it on, or 0.
        lease: i64,
        /// Whether the answer has what was there.
        prev: bool,
    },
    /// Deletes keys.
    Delete {
        /// The first key.
        key: String,
        /// The end of the range.
        end: Option<String>,
        /// Whether the answer has what was there.
        prev: bool,
    },
}

/// What an action came back with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Of a range.
    Range {
        /// The keys.
        kvs: Vec<Kv>,
        /// How many there are without the limit.
        count: i64,
    },
    /// Of a put.
    Put {
        /// What was there before, if it was asked for.
        prev: Option<Kv>,
    },
    /// Of a delete.
    Delete {
        /// How many keys are gone.
        deleted: i64,
        /// What was there before, if it was asked for.
        prev: Vec<Kv>,
    },
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Reads and writes.
    Txn {
        /// All must hold for `then` to be done.
        compares: Vec<Compare>,
        /// What is done if they hold.
        then: Vec<Action>,
        /// What is done if they do not.
        otherwise: Vec<Action>,
        /// A read that any member may answer from what it has.
        serializable: bool,
    },
    /// Forgets what was before a revision.
    Compact {
        /// That revision.
        revision: i64,
    },
    /// Makes a lease.
    Grant {
        /// Its id.
        id: i64,
        /// How long it lives.
        ttl_secs: i64,
    },
    /// Keeps a lease alive.
    KeepAlive {
        /// Its id.
        id: i64,
    },
    /// Ends a lease.
    Revoke {
        /// Its id.
        id: i64,
    },
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was done.
    Done {
        /// The header's revision.
        revision: i64,
        /// Whether the compares held.
        succeeded: bool,
        /// What the actions of that branch came back with.
        answers: Vec<Answer>,
        /// The time to live that a lease was granted or renewed with.
        ttl_secs: i64,
    },
    /// It was not done and never will be.
    Refused(String),
    /// Nobody knows.
    Unknown(String),
}

/// An operation of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Its kind, for the report.
    pub kind: String,
    /// Who asked; a client has one operation at a time.
    pub client: u64,
    /// The only member that the client talks to, if there is only one.
    pub member: Option<usize>,
    /// How often that member had been started when the operation began; 0 if it was started
    /// again before the operation ended.
    pub life: u64,
    /// When it began.
    pub call_us: u64,
    /// When it ended.
    pub return_us: u64,
    /// What was asked.
    pub request: Request,
    /// What came back.
    pub outcome: Outcome,
}

/// A change that a watch told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Whether the key was deleted; then `kv` has the key and the revision alone.
    pub is_delete: bool,
    /// The key as it is now.
    pub kv: Kv,
    /// The key as it was, if that was asked for.
    pub prev: Option<Kv>,
}

/// What a message of a watch says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// The watch stands.
    Created,
    /// Something changed.
    Events(Vec<Event>),
    /// Everything up to the header's revision was told.
    Progress,
    /// The server ended the watch.
    Canceled {
        /// Not 0 if what was to be told has been compacted.
        compact_revision: i64,
        /// Why, in the server's words.
        reason: String,
    },
}

/// A message of a watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// When it came.
    pub at_us: u64,
    /// The header's revision.
    pub revision: i64,
    /// What it says.
    pub content: Content,
}

/// A watch, from its creation until its stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The member that was asked.
    pub member: usize,
    /// When it was asked for.
    pub call_us: u64,
    /// The first key.
    pub key: String,
    /// The end of the range, as in [`Action`].
    pub end: Option<String>,
    /// The first revision to tell of; 0 for the next.
    pub start: i64,
    /// Whether events have what was there before.
    pub prev_kv: bool,
    /// Whether puts are left out.
    pub no_put: bool,
    /// Whether deletes are left out.
    pub no_delete: bool,
    /// What came.
    pub messages: Vec<Message>,
}

/// What every member had at the end, when nothing was going on any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Final {
    /// The member.
    pub member: usize,
    /// Its revision.
    pub revision: i64,
    /// Its `HashKV` at that revision, and the compacted revision that it was made at.
    pub hash: (u32, i64),
    /// All keys.
    pub kvs: Vec<Kv>,
}

/// One line of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Line {
    Operation(Operation),
    Watch(Watch),
    Final(Final),
}

/// Everything that was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Operations, in no order.
    pub operations: Vec<Operation>,
    /// Watches, in no order.
    pub watches: Vec<Watch>,
    /// The end.
    pub finals: Vec<Final>,
}

impl History {
    /// Writes all of it, a line each.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(fs::File::create(path)?);
        let operations = self.operations.iter().cloned().map(Line::Operation);
        let watches = self.watches.iter().cloned().map(Line::Watch);
        for line in operations.chain(watches).chain(self.finals.iter().cloned().map(Line::Final)) {
            serde_json::to_writer(&mut file, &line)?;
            file.write_all(b"\n")?;
        }
        file.flush()
    }

    /// Reads what [`History::write`] wrote.
    pub fn read(path: &Path) -> io::Result<History> {
        let mut history = History::default();
        for line in BufReader::new(fs::File::open(path)?).lines() {
            match serde_json::from_str(&line?)? {
                Line::Operation(operation) => history.operations.push(operation),
                Line::Watch(watch) => history.watches.push(watch),
                Line::Final(last) => history.finals.push(last),
            }
        }
        Ok(history)
    }
}

/// Whether `key` is in the range that begins at `first`.
pub fn contains(first: &str, end: Option<&str>, key: &str) -> bool {
    match end {
        None => key == first,
        Some("\0") => key >= first,
        Some(end) => key >= first && key < end,
    }
}

/// The end of the range of all keys with a prefix, which is not empty and ends in ASCII.
pub fn prefix_end(prefix: &str) -> String {
    let mut bytes = prefix.as_bytes().to_vec();
    if let Some(last) = bytes.last_mut() {
        *last += 1;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
