//! Where kvorum answers differently from etcd on purpose, and the tests look
//! away. `docs/compatibility.md` lists the same; a test compares the two lists.

/// A difference that is known and meant.
pub(crate) struct Accepted {
    /// Its name in `docs/compatibility.md`.
    pub(crate) name: &'static str,
    /// What differs, and why that is right.
    pub(crate) reason: &'static str,
}

/// etcd looks the previous value up when it sends an event.
pub(crate) const PREV_KV_COMPACTED: Accepted = Accepted {
    name: "prev_kv-at-compaction",
    reason: "A watcher that starts at the compacted revision gets `prev_kv` with the events of that \
             revision; etcd has lost the value by then and leaves it out.",
};

/// Words of a protobuf library.
pub(crate) const DECODE_ERROR_TEXT: Accepted = Accepted {
    name: "decode-error-text",
    reason: "A request that is not a protobuf message gets etcd's code with another text: it comes \
             from the protobuf library.",
};

/// Words of a JSON library.
pub(crate) const JSON_ERROR_TEXT: Accepted = Accepted {
    name: "json-error-text",
    reason: "The gateway answers a body that is not the request in JSON with etcd's status and code, \
             and another text: it comes from the JSON library.",
};

/// All of them.
pub(crate) const ACCEPTED: &[&Accepted] =
    &[&PREV_KV_COMPACTED, &DECODE_ERROR_TEXT, &JSON_ERROR_TEXT];
