//! Cipher suites by Go's names.
//!
//! Go knows a few more suites than are offered here: those without forward secrecy
//! or without an authenticated cipher. Hardening guides list some of them, so one
//! that Go knows is left out of the offer with a warning; a name nobody knows, or a
//! list of which nothing remains, prevents the start.

/// A cipher suite of TLS 1.2 that can be offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CipherSuite {
    /// The name, Go's and IANA's.
    pub name: &'static str,
    /// The number IANA gave it.
    pub id: u16,
}

/// What can be offered.
pub(super) const SUPPORTED: [CipherSuite; 6] = [
    CipherSuite { name: "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", id: 0xc02b },
    CipherSuite { name: "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", id: 0xc02c },
    CipherSuite { name: "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", id: 0xc02f },
    CipherSuite { name: "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", id: 0xc030 },
    CipherSuite { name: "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", id: 0xcca8 },
    CipherSuite { name: "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", id: 0xcca9 },
];

/// Suites of TLS 1.3: may be listed, are always offered.
const TLS13: [&str; 3] =
    ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"];

/// Suites Go knows and that are not offered here.
const GO_ONLY: [&str; 16] = [
    "TLS_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
];

/// What a name in `--cipher-suites` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// This suite.
    Suite(CipherSuite),
    /// A suite of TLS 1.3.
    Tls13,
    /// A suite that only Go has.
    GoOnly,
    /// Nothing.
    Unknown,
}

pub(super) fn named(name: &str) -> Named {
    // Two names were cut short in Go 1.13 and before, and remain in manifests.
    let full = match name {
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305" => "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305" => "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        other => other,
    };
    if let Some(suite) = SUPPORTED.iter().find(|suite| suite.name == full) {
        return Named::Suite(*suite);
    }
    if TLS13.contains(&full) {
        Named::Tls13
    } else if GO_ONLY.contains(&full) {
        Named::GoOnly
    } else {
        Named::Unknown
    }
}
