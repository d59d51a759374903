//! TLS for listeners, with etcd's flags and habits.
//!
//! ```text
//! TlsSettings (flags) ── Tls::load ──▶ Tls ── server_config() per handshake ──▶ rustls
//!                          │                     ▲
//!                     files wrong:               └ files changed on disk: read again,
//!                     refuse to start              broken: keep the old ones and warn
//! ```
//!
//! - A trusted CA means that every client must show a certificate signed by it, with or
//!   without `--client-cert-auth`, as in etcd.
//! - ALPN offers `h2` and then `http/1.1`: gRPC clients refuse a server that does not
//!   name `h2`, health probes speak HTTP/1.1 on the same port.
//! - Certificate, key and CA are looked at again when a handshake comes
//!   [`RELOAD_CHECK_INTERVAL`] after the last look. Connections that are up keep what
//!   they were made with.
//! - A certificate that is signed and not on the list of those allowed is refused after the
//!   handshake, which the client takes for a connection that broke.
//! - Nothing is process-global: the crypto provider is passed by hand.
//!
//! What it does not do: system root certificates (a CA file has to be named),
//! revocation lists, and the CBC and RSA key exchange suites that Go marks insecure.

mod allowed;
pub mod client;
mod reload;
mod subject;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{
    self, CipherSuite, RootCertStore, ServerConfig, SupportedProtocolVersion,
};

use self::allowed::Allowed;
use self::reload::Reloading;

pub use reload::RELOAD_CHECK_INTERVAL;
pub(crate) use subject::common_name;

/// Days in a year of a self-signed certificate's validity, as etcd counts them.
const DAYS_PER_YEAR: u32 = 365;

/// The protocols offered, the preferred one first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl TlsVersion {
    /// The version that `--tls-min-version` or `--tls-max-version` names.
    ///
    /// # Errors
    ///
    /// [`TlsError::UnknownVersion`] for anything but `TLS1.2` and `TLS1.3`.
    pub fn parse(name: &str) -> Result<TlsVersion, TlsError> {
        match name {
            "TLS1.2" => Ok(TlsVersion::Tls12),
            "TLS1.3" => Ok(TlsVersion::Tls13),
            _ => Err(TlsError::UnknownVersion { name: name.to_owned() }),
        }
    }
}

/// Whom a listener serves; decides which flags an error names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// Clients: `--cert-file` and so on.
    #[default]
    Client,
    /// Other members: `--peer-cert-file` and so on.
    Peer,
    /// Nobody: a command that is a client, `--cert` and so on.
    Command,
}

impl Side {
    fn flag(self, name: &str) -> String {
        match self {
            Side::Client => format!("--{name}"),
            Side::Peer => format!("--peer-{name}"),
            Side::Command => match name {
                "cert-file" => "--cert".to_owned(),
                "key-file" => "--key".to_owned(),
                "trusted-ca-file" => "--cacert".to_owned(),
                other => format!("--{other}"),
            },
        }
    }
}

/// What the TLS flags of one side say.
#[derive(Debug, Clone, Default)]
pub struct TlsSettings {
    /// Whose flags these are.
    pub side: Side,
    /// `--cert-file`: PEM, the server's certificate first, then its chain.
    pub cert_file: Option<PathBuf>,
    /// `--key-file`: PEM, the key of the first certificate.
    pub key_file: Option<PathBuf>,
    /// `--trusted-ca-file`: PEM, the CAs that sign client certificates. Naming it makes a
    /// client certificate mandatory.
    pub trusted_ca_file: Option<PathBuf>,
    /// `--client-cert-auth`: demand a client certificate. Needs `trusted_ca_file`.
    pub client_cert_auth: bool,
    /// `--tls-min-version`; `None` means TLS 1.2.
    pub min_version: Option<TlsVersion>,
    /// `--tls-max-version`; `None` means the newest.
    pub max_version: Option<TlsVersion>,
    /// `--cipher-suites`, by Go's names; empty means all. Binds TLS 1.2 only, as in Go.
    pub cipher_suites: Vec<String>,
    /// `--peer-cert-allowed-cn`: common names of which a client's certificate must have one;
    /// empty means any.
    pub allowed_common_names: Vec<String>,
    /// `--peer-cert-allowed-hostname`: host names of which it must be for one.
    pub allowed_hostnames: Vec<String>,
    /// `--auto-tls`: make a certificate when `cert_file` and `key_file` are not given.
    pub auto: Option<AutoTls>,
}

/// What `--auto-tls` needs to make a certificate that signs itself.
#[derive(Debug, Clone)]
pub struct AutoTls {
    /// Where `cert.pem` and `key.pem` are kept and found again:
    /// `<data-dir>/fixtures/client` or `<data-dir>/fixtures/peer`.
    pub dir: PathBuf,
    /// Addresses and names the certificate is for: the hosts of the listen URLs.
    pub hosts: Vec<String>,
    /// `--self-signed-cert-validity`, in years.
    pub validity_years: u32,
}

impl TlsSettings {
    /// Whether the flags ask for TLS at all: etcd then warns when a URL says `http`.
    pub fn is_empty(&self) -> bool {
        self.cert_file.is_none() && self.key_file.is_none() && self.auto.is_none()
    }
}

/// Why TLS cannot be set up. Each says which flag or file to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// One of certificate and key is not given.
    #[error("TLS needs a certificate and its key: set {missing}, or both to neither")]
    Incomplete {
        /// The flag that is not set.
        missing: String,
    },
    /// A file cannot be read.
    #[error("cannot read {flag} {path}: {source}", path = path.display())]
    Read {
        /// The flag that names the file.
        flag: String,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not what the flag asks for.
    #[error("{flag} {path} is not usable: {reason}", path = path.display())]
    Content {
        /// The flag that names the file.
        flag: String,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what the file has to hold.
        reason: String,
    },
    /// Client certificates are demanded, but no CA to check them against.
    #[error("{auth} needs the CA that signs client certificates: set {ca}")]
    NoTrustedCa {
        /// The flag that demands certificates.
        auth: String,
        /// The flag to set.
        ca: String,
    },
    /// A version that does not exist.
    #[error("unexpected TLS version {name:?} (must be one of: TLS1.2, TLS1.3)")]
    UnknownVersion {
        /// What the flag says.
        name: String,
    },
    /// No version lies between the two.
    #[error(
        "--tls-min-version TLS1.3 is above --tls-max-version TLS1.2: lower the one or raise the other"
    )]
    NoVersion,
    /// A suite that does not exist.
    #[error("unexpected TLS cipher suite {name:?}: --cipher-suites takes Go's names, such as {example}", example = SUITES[0].0)]
    UnknownSuite {
        /// What the flag says.
        name: String,
    },
    /// No suite is left for the versions allowed.
    #[error(
        "--cipher-suites leaves no suite for TLS 1.2: add one of {}, or set --tls-min-version=TLS1.3",
        suite_names()
    )]
    NoSuite,
    /// A certificate could not be made or stored.
    #[error("cannot make a certificate for {flag} in {dir}: {reason}", dir = dir.display())]
    Generate {
        /// The flag that asks for it.
        flag: String,
        /// Where it was to be stored.
        dir: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// Suites by Go's name. The short names of the ChaCha suites are older and still taken.
const SUITES: [(&str, CipherSuite); 11] = [
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    ("TLS_AES_128_GCM_SHA256", CipherSuite::TLS13_AES_128_GCM_SHA256),
    ("TLS_AES_256_GCM_SHA384", CipherSuite::TLS13_AES_256_GCM_SHA384),
    ("TLS_CHACHA20_POLY1305_SHA256", CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
];

/// Suites that etcd takes and that are not implemented here: Go itself calls most of
/// them insecure. They are passed over with a warning.
const UNSUPPORTED_SUITES: [&str; 15] = [
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
];

fn suite_names() -> String {
    let names: Vec<&str> = SUITES.iter().take(6).map(|(name, _)| *name).collect();
    names.join(", ")
}

/// TLS as one listener, or several, use it. Clones share the files and what was read.
#[derive(Debug, Clone)]
pub struct Tls {
    server: Arc<Reloading<ServerConfig>>,
    allowed: Arc<Allowed>,
}

/// The files, with the flags that name them.
#[derive(Debug)]
struct Files {
    side: Side,
    cert: PathBuf,
    key: PathBuf,
    ca: Option<PathBuf>,
}

impl Tls {
    /// Reads the files and checks that they fit together; makes the certificate first
    /// when `auto` asks for one and there is none. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// See [`TlsError`]. Files that break later never fail: the old ones stay in use.
    pub fn load(settings: TlsSettings) -> Result<Tls, TlsError> {
        let side = settings.side;
        let missing = |name| TlsError::Incomplete { missing: side.flag(name) };
        let (cert, key) = match (settings.cert_file, settings.key_file, &settings.auto) {
            (Some(cert), Some(key), _) => (cert, key),
            (Some(_), None, _) => return Err(missing("key-file")),
            (None, Some(_), _) => return Err(missing("cert-file")),
            (None, None, Some(auto)) => self_signed(side, auto)?,
            (None, None, None) => return Err(missing("cert-file")),
        };
        if settings.client_cert_auth && settings.trusted_ca_file.is_none() {
            return Err(TlsError::NoTrustedCa {
                auth: side.flag("client-cert-auth"),
                ca: side.flag("trusted-ca-file"),
            });
        }
        let versions = versions(settings.min_version, settings.max_version)?;
        let provider = Arc::new(provider(&settings.cipher_suites, &versions)?);
        let allowed = Allowed::new(settings.allowed_common_names, settings.allowed_hostnames);
        let files = Files { side, cert, key, ca: settings.trusted_ca_file };
        let paths = [Some(&files.cert), Some(&files.key), files.ca.as_ref()];
        let paths = paths.into_iter().flatten().cloned().collect();
        let read = Box::new(move || files.read(&provider, &versions));
        let server = Arc::new(Reloading::load(paths, read)?);
        Ok(Tls { server, allowed: Arc::new(allowed) })
    }

    /// What the next handshake is made with, after a look at the files when one is due.
    pub(super) async fn server_config(&self) -> Arc<ServerConfig> {
        self.server.current().await
    }

    /// Whether a client with these certificates, which have been verified, is let in.
    pub(super) fn admits(&self, certificates: Option<&[CertificateDer<'_>]>) -> bool {
        self.allowed.admits(certificates)
    }
}

impl Files {
    fn read(
        &self,
        provider: &Arc<CryptoProvider>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Result<ServerConfig, TlsError> {
        let (cert_flag, key_flag) = (self.side.flag("cert-file"), self.side.flag("key-file"));
        let chain = certificates(&cert_flag, &self.cert)?;
        let key = private_key(&key_flag, &self.key)?;

        // The versions were checked against the suites when the provider was made, so
        // what can fail here is said by the files.
        let fail = |error: rustls::Error| content(&cert_flag, &self.cert, error.to_string());
        let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(versions)
            .map_err(fail)?;
        let builder = match &self.ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let flag = self.side.flag("trusted-ca-file");
                let roots = roots(&flag, ca)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(
                    Arc::new(roots),
                    Arc::clone(provider),
                )
                .build()
                .map_err(|error| content(&flag, ca, error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let misfit = |error| misfit(self.side, &self.cert, &self.key, error);
        let mut config = builder.with_single_cert(chain, key).map_err(misfit)?;
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        Ok(config)
    }
}

/// Why a certificate and a key are not used together.
fn misfit(side: Side, cert: &Path, key: &Path, error: rustls::Error) -> TlsError {
    let (cert_flag, key_flag) = (side.flag("cert-file"), side.flag("key-file"));
    match error {
        rustls::Error::InconsistentKeys(_) => {
            content(&key_flag, key, format!("it is not the key of {cert_flag} {}", cert.display()))
        }
        rustls::Error::General(reason) => content(&key_flag, key, reason),
        error => content(&cert_flag, cert, error.to_string()),
    }
}

fn content(flag: &str, path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError::Content { flag: flag.to_owned(), path: path.to_owned(), reason: reason.into() }
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        flag: flag.to_owned(),
        path: path.to_owned(),
        source,
    })
}

fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(flag, path)?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(flag, path, format!("{error}; it has to hold PEM")))?;
    if certificates.is_empty() {
        return Err(content(flag, path, "it holds no certificate in PEM"));
    }
    Ok(certificates)
}

fn roots(flag: &str, path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(flag, path)? {
        roots.add(certificate).map_err(|error| content(flag, path, error.to_string()))?;
    }
    Ok(roots)
}

fn private_key(flag: &str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(flag, path)?).map_err(|error| {
        let reason = match error {
            pem::Error::NoItemsFound => "it holds no private key in PEM".to_owned(),
            error => format!("{error}; it has to hold a private key in PEM"),
        };
        content(flag, path, reason)
    })
}

/// The versions from `min` to `max`, the newest first.
fn versions(
    min: Option<TlsVersion>,
    max: Option<TlsVersion>,
) -> Result<Vec<&'static SupportedProtocolVersion>, TlsError> {
    let allowed = min.unwrap_or(TlsVersion::Tls12)..=max.unwrap_or(TlsVersion::Tls13);
    let all = [
        (TlsVersion::Tls13, &rustls::version::TLS13),
        (TlsVersion::Tls12, &rustls::version::TLS12),
    ];
    let versions: Vec<_> = all
        .into_iter()
        .filter(|(version, _)| allowed.contains(version))
        .map(|(_, version)| version)
        .collect();
    if versions.is_empty() { Err(TlsError::NoVersion) } else { Ok(versions) }
}

/// ring with the suites that `names` allow; those of TLS 1.3 always stay.
fn provider(
    names: &[String],
    versions: &[&'static SupportedProtocolVersion],
) -> Result<CryptoProvider, TlsError> {
    let mut provider = ring::default_provider();
    if names.is_empty() {
        return Ok(provider);
    }
    let mut wanted = BTreeSet::new();
    for name in names {
        if let Some((_, suite)) = SUITES.iter().find(|(known, _)| known == name) {
            wanted.insert(u16::from(*suite));
        } else if UNSUPPORTED_SUITES.contains(&name.as_str()) {
            tracing::warn!(suite = name, "TLS cipher suite is not supported and passed over");
        } else {
            return Err(TlsError::UnknownSuite { name: name.clone() });
        }
    }
    provider
        .cipher_suites
        .retain(|suite| suite.tls13().is_some() || wanted.contains(&u16::from(suite.suite())));
    let needs_12 = versions.contains(&&rustls::version::TLS12);
    if needs_12 && !provider.cipher_suites.iter().any(|suite| suite.tls13().is_none()) {
        return Err(TlsError::NoSuite);
    }
    Ok(provider)
}

/// The paths of certificate and key in `auto.dir`, made now unless both are there.
fn self_signed(side: Side, auto: &AutoTls) -> Result<(PathBuf, PathBuf), TlsError> {
    let (cert_path, key_path) = (auto.dir.join("cert.pem"), auto.dir.join("key.pem"));
    if cert_path.exists() && key_path.exists() {
        return Ok((cert_path, key_path));
    }
    let fail = |reason: String| TlsError::Generate {
        flag: side.flag("auto-tls"),
        dir: auto.dir.clone(),
        reason,
    };
    if auto.validity_years == 0 {
        return Err(fail("--self-signed-cert-validity has to be 1 year or more".to_owned()));
    }

    let hosts: Vec<String> = auto.hosts.iter().filter(|host| !host.is_empty()).cloned().collect();
    let mut params =
        rcgen::CertificateParams::new(hosts).map_err(|error| fail(error.to_string()))?;
    let mut name = rcgen::DistinguishedName::new();
    name.push(rcgen::DnType::OrganizationName, "kvorum");
    params.distinguished_name = name;
    params.key_usages =
        vec![rcgen::KeyUsagePurpose::DigitalSignature, rcgen::KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    if side == Side::Peer {
        params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    }
    let days = DAYS_PER_YEAR.saturating_mul(auto.validity_years.min(1000));
    let now = SystemTime::now();
    params.not_before = now.into();
    params.not_after = (now + Duration::from_secs(u64::from(days) * 24 * 60 * 60)).into();
    let (cert, key) = rcgen::KeyPair::generate()
        .and_then(|key| Ok((params.self_signed(&key)?, key)))
        .map_err(|error| fail(error.to_string()))?;

    let store = || -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&auto.dir)?;
        // The certificate last: both names exist only when both files are whole.
        replace(&key_path, &key.serialize_pem(), 0o600)?;
        replace(&cert_path, &cert.pem(), 0o644)
    };
    store().map_err(|error| fail(error.to_string()))?;
    tracing::warn!(
        cert_file = %cert_path.display(),
        validity_years = auto.validity_years,
        "made a certificate that signs itself"
    );
    Ok((cert_path, key_path))
}

/// Writes a file under another name and then gives it its own, so that the name never
/// stands for half a file.
fn replace(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let aside = path.with_extension("pem.new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&aside)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(&aside, path)
}
