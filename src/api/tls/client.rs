//! TLS of connections to other members: the client's half.
//!
//! ```text
//! ClientTlsSettings (flags) ── ClientTls::load ──▶ ClientTls ── connect() per connection
//! ```
//!
//! - The peer's certificate must be signed by `--peer-trusted-ca-file` and be for the host in
//!   the peer URL. With `--peer-auto-tls` each member's certificate is signed by itself, so
//!   that nothing can be verified, and, as in etcd, nothing is: that mode is against listeners
//!   and not against impostors.
//! - The certificate shown is `--peer-client-cert-file` or, without it, `--peer-cert-file`.
//! - Files that change are read again, as those of listeners are.
//!
//! The system's root certificates are not used: a CA file has to be named.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
};

use super::allowed::Allowed;
use super::reload::Reloading;
use super::{
    ALPN, AutoTls, Side, TlsError, TlsVersion, certificates, misfit, private_key, provider, roots,
    self_signed, versions,
};

/// What the TLS flags say about connections to peers.
#[derive(Debug, Clone, Default)]
pub struct ClientTlsSettings {
    /// The certificate to show, and its chain: `--peer-client-cert-file`, or else
    /// `--peer-cert-file`. Without one, and without `auto`, none is shown.
    pub cert_file: Option<PathBuf>,
    /// The key of that certificate.
    pub key_file: Option<PathBuf>,
    /// `--peer-trusted-ca-file`: the CAs that sign peers' certificates.
    pub trusted_ca_file: Option<PathBuf>,
    /// `--tls-min-version`; `None` means TLS 1.2.
    pub min_version: Option<TlsVersion>,
    /// `--tls-max-version`; `None` means the newest.
    pub max_version: Option<TlsVersion>,
    /// `--cipher-suites`, by Go's names; empty means all.
    pub cipher_suites: Vec<String>,
    /// `--peer-cert-allowed-cn`.
    pub allowed_common_names: Vec<String>,
    /// `--peer-cert-allowed-hostname`.
    pub allowed_hostnames: Vec<String>,
    /// `--peer-auto-tls`: peers are not verified, unless a certificate is given.
    pub auto: Option<AutoTls>,
    /// The flags are those of a command, as etcdctl's: `--cacert`, `--cert`, `--key`.
    pub is_command: bool,
    /// `--insecure-skip-tls-verify` of a command: whoever answers is believed.
    pub skip_verify: bool,
}

/// TLS as connections to peers use it. Clones share the files and what was read.
#[derive(Debug, Clone)]
pub struct ClientTls {
    client: Arc<Reloading<ClientConfig>>,
    allowed: Arc<Allowed>,
}

impl ClientTls {
    /// Reads the files and checks that they fit together. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// See [`TlsError`]. Files that break later never fail: the old ones stay in use.
    pub fn load(settings: ClientTlsSettings) -> Result<ClientTls, TlsError> {
        let side = if settings.is_command { Side::Command } else { Side::Peer };
        let missing = |name| TlsError::Incomplete { missing: side.flag(name) };
        let (pair, verify) = match (settings.cert_file, settings.key_file, &settings.auto) {
            (Some(cert), Some(key), _) => (Some((cert, key)), true),
            (Some(_), None, _) => return Err(missing("key-file")),
            (None, Some(_), _) => return Err(missing("cert-file")),
            (None, None, Some(auto)) => (Some(self_signed(Side::Peer, auto)?), false),
            (None, None, None) => (None, true),
        };
        let verify = verify && !settings.skip_verify;
        if verify && settings.trusted_ca_file.is_none() {
            tracing::warn!(
                "no --peer-trusted-ca-file: peers at https URLs cannot be verified, and not \
                 reached"
            );
        }
        let versions = versions(settings.min_version, settings.max_version)?;
        let provider = Arc::new(provider(&settings.cipher_suites, &versions)?);
        let files = Files { side, pair, ca: settings.trusted_ca_file, verify };
        let pair = files.pair.iter().flat_map(|(cert, key)| [cert, key]);
        let paths = pair.chain(&files.ca).cloned().collect();
        let read = Box::new(move || files.read(&provider, &versions));
        let client = Arc::new(Reloading::load(paths, read)?);
        let allowed = Allowed::new(settings.allowed_common_names, settings.allowed_hostnames);
        Ok(ClientTls { client, allowed: Arc::new(allowed) })
    }

    /// The handshake with the peer at `host`, for which its certificate must be.
    ///
    /// # Errors
    ///
    /// What the handshake fails with, or that the certificate is not among those allowed.
    pub(in crate::api) async fn connect<S>(&self, host: &str, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let config = self.client.current().await;
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        if !self.allowed.admits(stream.get_ref().1.peer_certificates()) {
            let text = "the peer's certificate is not among those of --peer-cert-allowed-cn and \
                        --peer-cert-allowed-hostname";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(stream)
    }
}

struct Files {
    side: Side,
    /// Certificate and key.
    pair: Option<(PathBuf, PathBuf)>,
    ca: Option<PathBuf>,
    verify: bool,
}

impl Files {
    fn read(
        &self,
        provider: &Arc<CryptoProvider>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Result<ClientConfig, TlsError> {
        // Cannot fail: the versions were checked against the suites before.
        let builder = ClientConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(versions)
            .map_err(|_| TlsError::NoSuite)?;
        let builder = if self.verify {
            let roots = match &self.ca {
                Some(ca) => roots(&self.side.flag("trusted-ca-file"), ca)?,
                None => RootCertStore::empty(),
            };
            builder.with_root_certificates(roots)
        } else {
            let anyone = Arc::new(Anyone { provider: Arc::clone(provider) });
            builder.dangerous().with_custom_certificate_verifier(anyone)
        };
        let mut config = match &self.pair {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates(&self.side.flag("cert-file"), cert)?;
                let secret = private_key(&self.side.flag("key-file"), key)?;
                builder
                    .with_client_auth_cert(chain, secret)
                    .map_err(|error| misfit(self.side, cert, key, error))?
            }
        };
        // A peer speaks HTTP/2 and nothing else.
        config.alpn_protocols = ALPN.iter().take(1).map(|name| name.to_vec()).collect();
        Ok(config)
    }
}

/// Takes any certificate, as long as the peer has its key.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
