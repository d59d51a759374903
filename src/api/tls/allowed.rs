//! Whose certificates are accepted among those that the CA has signed.
//!
//! One CA often signs for more than one cluster, or for clients and members alike.
//! `--peer-cert-allowed-cn` and `--peer-cert-allowed-hostname` then say which of them are
//! members. As in etcd, both ends of a connection look at the other's certificate.

use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::server::ParsedCertificate;

use super::common_name;

/// What a certificate must say; nothing, when both lists are empty.
#[derive(Debug, Clone, Default)]
pub(super) struct Allowed {
    common_names: Vec<String>,
    hostnames: Vec<String>,
}

impl Allowed {
    pub(super) fn new(common_names: Vec<String>, hostnames: Vec<String>) -> Allowed {
        Allowed { common_names, hostnames }
    }

    /// `certificates` have been verified; the first is the one in question. None at all are
    /// admitted when nothing is demanded of them.
    pub(super) fn admits(&self, certificates: Option<&[CertificateDer<'_>]>) -> bool {
        if self.common_names.is_empty() && self.hostnames.is_empty() {
            return true;
        }
        let Some(certificate) = certificates.and_then(<[_]>::first) else { return false };
        let name = common_name(certificate);
        name.is_some_and(|name| self.common_names.contains(&name))
            || self.hostnames.iter().any(|hostname| is_for(certificate, hostname))
    }
}

fn is_for(certificate: &CertificateDer<'_>, hostname: &str) -> bool {
    let Ok(certificate) = ParsedCertificate::try_from(certificate) else { return false };
    let Ok(name) = ServerName::try_from(hostname) else { return false };
    verify_server_name(&certificate, &name).is_ok()
}
