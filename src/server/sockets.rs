//! Where a server listens: from flags to bound sockets, and to the URLs it tells others.

use super::StartError;
use crate::api::listener::{Listener, ServeOptions, SocketOptions};
use crate::api::tls::{AutoTls, Side, Tls, TlsSettings, TlsVersion};
use crate::config::Config;

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
        let options = SocketOptions {
            reuse_port: config.socket_reuse_port,
            reuse_address: config.socket_reuse_address,
        };
        let bind = |urls: &[crate::config::Url]| -> Result<Vec<Listener>, StartError> {
            urls.iter()
                .map(|url| {
                    let url = listen_url(url)?;
                    Listener::bind(&url, tls.clone(), &options).map_err(StartError::Listen)
                })
                .collect()
        };
        Ok(Bound {
            clients: bind(&config.listen_client_urls)?,
            http_only: bind(&config.listen_client_http_urls)?,
            metrics: bind(&config.listen_metrics_urls)?,
        })
    }
}

fn listen_url(url: &crate::config::Url) -> Result<url::Url, StartError> {
    url::Url::parse(url.as_str()).map_err(|error| {
        let text = format!("cannot listen on {url}: {error}");
        StartError::Listen(std::io::Error::new(std::io::ErrorKind::InvalidInput, text))
    })
}

fn tls_settings(config: &Config) -> TlsSettings {
    let hosts = config.listen_client_urls.iter().filter_map(|url| url.host().map(str::to_owned));
    TlsSettings {
        side: Side::Client,
        cert_file: config.cert_file.clone(),
        key_file: config.key_file.clone(),
        trusted_ca_file: config.trusted_ca_file.clone(),
        client_cert_auth: config.client_cert_auth,
        min_version: Some(tls_version(config.tls_min_version)),
        max_version: config.tls_max_version.map(tls_version),
        cipher_suites: config.cipher_suites.clone(),
        auto: config.auto_tls.then(|| AutoTls {
            dir: config.data_dir.join("fixtures").join("client"),
            hosts: hosts.collect(),
            validity_years: u32::try_from(config.self_signed_cert_validity).unwrap_or(u32::MAX),
        }),
    }
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
