//! Where a server listens: from flags to bound sockets, and to the URLs it tells others.

use std::time::Duration;

use super::StartError;
use crate::api::connector::connector;
use crate::api::listener::{Listener, ServeOptions, SocketOptions};
use crate::api::tls::client::{ClientTls, ClientTlsSettings};
use crate::api::tls::{AutoTls, Side, Tls, TlsSettings, TlsVersion};
use crate::config::Config;
use crate::net::Connector;

/// Time between pings on a connection that a peer made, and how long one may go unanswered: a
/// peer that vanished makes another connection when it is back, and must not find its old
/// ones piled up.
const PEER_KEEPALIVE: Duration = Duration::from_secs(5);

/// Sockets, bound before anything is written: an address in use is the most likely
/// mistake.
pub(super) struct Bound {
    /// `--listen-client-urls`.
    pub(super) clients: Vec<Listener>,
    /// `--listen-client-http-urls`.
    pub(super) http_only: Vec<Listener>,
    /// `--listen-metrics-urls`.
    pub(super) metrics: Vec<Listener>,
}

impl Bound {
    pub(super) fn bind(config: &Config) -> Result<Bound, StartError> {
        let settings = tls_settings(config);
        let tls = if settings.is_empty() { None } else { Some(Tls::load(settings)?) };
        let bind = |urls| bind(config, urls, tls.as_ref());
        Ok(Bound {
            clients: bind(&config.listen_client_urls)?,
            http_only: bind(&config.listen_client_http_urls)?,
            metrics: bind(&config.listen_metrics_urls)?,
        })
    }
}

/// `--listen-peer-urls`. Bound later than the others: a member that accepts connections and
/// does not answer keeps those waiting that ask it who is in the cluster.
pub(super) fn bind_peers(config: &Config) -> Result<Vec<Listener>, StartError> {
    let settings = peer_tls_settings(config);
    let tls = if settings.is_empty() { None } else { Some(Tls::load(settings)?) };
    bind(config, &config.listen_peer_urls, tls.as_ref())
}

fn bind(
    config: &Config,
    urls: &[crate::config::Url],
    tls: Option<&Tls>,
) -> Result<Vec<Listener>, StartError> {
    let options = SocketOptions {
        reuse_port: config.socket_reuse_port,
        reuse_address: config.socket_reuse_address,
    };
    let bind = |url| {
        let url = listen_url(url)?;
        Listener::bind(&url, tls.cloned(), &options).map_err(StartError::Listen)
    };
    urls.iter().map(bind).collect()
}

fn listen_url(url: &crate::config::Url) -> Result<url::Url, StartError> {
    url::Url::parse(url.as_str()).map_err(|error| {
        let text = format!("cannot listen on {url}: {error}");
        StartError::Listen(std::io::Error::new(std::io::ErrorKind::InvalidInput, text))
    })
}

fn tls_settings(config: &Config) -> TlsSettings {
    TlsSettings {
        side: Side::Client,
        cert_file: config.cert_file.clone(),
        key_file: config.key_file.clone(),
        trusted_ca_file: config.trusted_ca_file.clone(),
        client_cert_auth: config.client_cert_auth,
        min_version: Some(tls_version(config.tls_min_version)),
        max_version: config.tls_max_version.map(tls_version),
        cipher_suites: config.cipher_suites.clone(),
        allowed_common_names: Vec::new(),
        allowed_hostnames: Vec::new(),
        auto: config.auto_tls.then(|| auto_tls(config, "client", &config.listen_client_urls)),
    }
}

fn peer_tls_settings(config: &Config) -> TlsSettings {
    TlsSettings {
        side: Side::Peer,
        cert_file: config.peer_cert_file.clone(),
        key_file: config.peer_key_file.clone(),
        trusted_ca_file: config.peer_trusted_ca_file.clone(),
        client_cert_auth: config.peer_client_cert_auth,
        min_version: Some(tls_version(config.tls_min_version)),
        max_version: config.tls_max_version.map(tls_version),
        cipher_suites: config.cipher_suites.clone(),
        allowed_common_names: config.peer_cert_allowed_cn.clone(),
        allowed_hostnames: config.peer_cert_allowed_hostname.clone(),
        auto: peer_auto_tls(config),
    }
}

fn peer_auto_tls(config: &Config) -> Option<AutoTls> {
    config.peer_auto_tls.then(|| auto_tls(config, "peer", &config.listen_peer_urls))
}

fn auto_tls(config: &Config, side: &str, urls: &[crate::config::Url]) -> AutoTls {
    AutoTls {
        dir: config.data_dir.join("fixtures").join(side),
        hosts: urls.iter().filter_map(|url| url.host().map(str::to_owned)).collect(),
        validity_years: u32::try_from(config.self_signed_cert_validity).unwrap_or(u32::MAX),
    }
}

/// How this member connects to others.
pub(super) fn peer_connector(config: &Config) -> Result<Connector, StartError> {
    if peer_tls_settings(config).is_empty() && config.peer_trusted_ca_file.is_none() {
        return Ok(connector(None));
    }
    let (cert_file, key_file) = match &config.peer_client_cert_file {
        Some(cert_file) => (Some(cert_file.clone()), config.peer_client_key_file.clone()),
        None => (config.peer_cert_file.clone(), config.peer_key_file.clone()),
    };
    let settings = ClientTlsSettings {
        cert_file,
        key_file,
        trusted_ca_file: config.peer_trusted_ca_file.clone(),
        min_version: Some(tls_version(config.tls_min_version)),
        max_version: config.tls_max_version.map(tls_version),
        cipher_suites: config.cipher_suites.clone(),
        allowed_common_names: config.peer_cert_allowed_cn.clone(),
        allowed_hostnames: config.peer_cert_allowed_hostname.clone(),
        auto: peer_auto_tls(config),
        is_command: false,
        skip_verify: false,
    };
    Ok(connector(Some(ClientTls::load(settings)?)))
}

fn tls_version(version: crate::config::TlsVersion) -> TlsVersion {
    match version {
        crate::config::TlsVersion::Tls12 => TlsVersion::Tls12,
        crate::config::TlsVersion::Tls13 => TlsVersion::Tls13,
    }
}

/// How connections are served.
pub(super) fn serve_options(config: &Config) -> ServeOptions {
    ServeOptions {
        max_concurrent_streams: config.max_concurrent_streams,
        keepalive_interval: config.grpc_keepalive_interval,
        keepalive_timeout: config.grpc_keepalive_timeout,
        ..ServeOptions::default()
    }
}

/// How connections of peers are served: those of members that are gone end soon.
pub(super) fn peer_serve_options() -> ServeOptions {
    ServeOptions {
        keepalive_interval: PEER_KEEPALIVE,
        keepalive_timeout: PEER_KEEPALIVE,
        ..ServeOptions::default()
    }
}

/// `--advertise-client-urls`. Nobody can connect to a port 0: instead, the port is told
/// that the listener of the same place in `--listen-client-urls` was given.
pub(super) fn advertised(config: &Config, bound: &Bound) -> Vec<String> {
    let ports = bound.clients.iter().map(|listener| listener.local_url().port_or_known_default());
    let mut ports = ports.chain(std::iter::repeat(None));
    let urls = config.advertise_client_urls.iter().map(|url| {
        let port = ports.next().flatten().filter(|_| url.port() == Some(0));
        port.map_or_else(|| url.clone(), |port| url.with_port(port)).as_str().to_owned()
    });
    urls.collect()
}
