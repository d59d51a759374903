//! Where kvorum answers differently from etcd on purpose, and the tests look
//! away. `docs/compatibility.md` lists the same; a test compares the two lists.

/// A difference that is known and meant.
pub(crate) struct Accepted {
    /// Its name in `docs/compatibility.md`.
    pub(crate) name: &'static str,
    /// What differs, and why that is right.
    pub(crate) reason: &'static str,
}

impl Accepted {
    /// Whether this is what a test looks away from: `when` says.
    pub(crate) fn applies(&self, when: bool) -> bool {
        when
    }
}

/// etcd looks the previous value up when it sends an event.
pub(crate) const PREV_KV_COMPACTED: Accepted = Accepted {
    name: "prev_kv-at-compaction",
    reason: "A watcher that starts at the compacted revision gets `prev_kv` with the events of that \
             revision; etcd has lost the value by then and leaves it out.",
};

/// Since 3.7 etcd answers from its index, which has no leases.
pub(crate) const KEYS_ONLY_LEASE: Accepted = Accepted {
    name: "keys_only-lease",
    reason: "A range with `keys_only` returns the lease of a key, as etcd did before 3.7 and does \
             when it sorts by value; that 3.7 leaves it out otherwise is etcd issue 22209.",
};

/// Both keep the hashes of compactions for corruption checks.
pub(crate) const HASH_KV_AFTER_RESTART: Accepted = Accepted {
    name: "hashkv-after-restart",
    reason: "`HashKV` at the revision of one of the last ten compactions returns the hash from the \
             time of that compaction; after a restart kvorum has forgotten all of them, etcd those \
             that it need not apply again.",
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

/// What a decoder of protocol buffers takes.
pub(crate) const TXN_DEPTH: Accepted = Accepted {
    name: "txn-depth",
    reason: "Transactions nest up to 40 deep; deeper ones get `too many operations in txn request`, \
             or, from 50 on, an error of the protobuf library. etcd takes as many as `--max-txn-ops`.",
};

/// Comes later.
pub(crate) const NO_AUTHENTICATION: Accepted = Accepted {
    name: "authentication",
    reason: "There are no users and roles yet: the `Auth` calls other than `AuthStatus` and \
             `Authenticate` answer `Unimplemented`.",
};

/// All of them.
pub(crate) const ACCEPTED: &[&Accepted] = &[
    &PREV_KV_COMPACTED,
    &KEYS_ONLY_LEASE,
    &HASH_KV_AFTER_RESTART,
    &DECODE_ERROR_TEXT,
    &JSON_ERROR_TEXT,
    &TXN_DEPTH,
    &NO_AUTHENTICATION,
];
