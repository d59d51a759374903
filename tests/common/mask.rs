//! Takes out of an answer what two correct servers cannot agree on.
//!
//! As little as possible: a server's own ids and addresses become names (so that
//! a wrong id is still seen), and of numbers that depend on time, disk or raft
//! only the fact that they are not zero remains.

use serde_json::Value;

/// What a server calls itself, in decimal as JSON shows it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Identity {
    names: Vec<(String, &'static str)>,
}

/// Fields whose value depends on how a server stores and counts. Zero or absent
/// must still be zero or absent on both.
const NOT_ZERO: &[&str] = &[
    "raft_term",
    "raftTerm",
    "raftIndex",
    "raftAppliedIndex",
    "dbSize",
    "dbSizeInUse",
    "token",
    "remaining_bytes",
];

impl Identity {
    /// Learns the ids of the server from any of its answers as JSON (its
    /// header), and its addresses.
    pub(crate) fn new(answer: &Value, client_url: &str, peer_url: &str) -> Identity {
        let mut names =
            vec![(client_url.to_owned(), "<client url>"), (peer_url.to_owned(), "<peer url>")];
        for (field, name) in [("cluster_id", "<cluster>"), ("member_id", "<member>")] {
            if let Some(id) = answer.pointer(&format!("/header/{field}")).and_then(text) {
                names.push((id, name));
            }
        }
        Identity { names }
    }

    /// Gives `value` the name `name` wherever it is the whole of a string or
    /// number.
    pub(crate) fn name(&mut self, value: String, name: &'static str) {
        self.names.push((value, name));
    }

    /// Masks `answer`.
    pub(crate) fn mask(&self, answer: &mut Value) {
        match answer {
            Value::Object(fields) => {
                for (name, value) in fields.iter_mut() {
                    if NOT_ZERO.contains(&name.as_str()) {
                        if !matches!(text(value).as_deref(), None | Some("0")) {
                            *value = Value::String("<not zero>".to_owned());
                        }
                    } else {
                        self.mask(value);
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.mask(value)),
            Value::String(_) | Value::Number(_) => {
                let current = text(answer);
                let known = self.names.iter().find(|(known, _)| Some(known) == current.as_ref());
                if let Some((_, name)) = known {
                    *answer = Value::String((*name).to_owned());
                }
            }
            Value::Null | Value::Bool(_) => {}
        }
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Sorts the array at `pointer`, if there is one: for lists that etcd returns in
/// no particular order.
pub(crate) fn sort(answer: &mut Value, pointer: &str) {
    if let Some(Value::Array(values)) = answer.pointer_mut(pointer) {
        values.sort_by_key(Value::to_string);
    }
}
