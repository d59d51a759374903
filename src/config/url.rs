//! The URLs of flags, kept exactly as written.
//!
//! Members publish their URLs and clients compare them as strings, so the text
//! must survive untouched. A general URL type does not do that: it drops `:80`,
//! appends `/` and lower-cases hosts. This one knows the four schemes etcd has
//! and nothing else:
//!
//! ```text
//! http://10.0.0.1:2379   https://[::1]:2379     a TCP address, port required (0 = any free one)
//! unix:///run/etcd.sock  unixs://localhost:m1   a socket file: what stands between the scheme and the end
//! ```
//!
//! It does not resolve names and opens nothing.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// How a URL is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// Plain TCP.
    Http,
    /// TLS over TCP.
    Https,
    /// A plain unix socket.
    Unix,
    /// TLS over a unix socket.
    Unixs,
}

impl Scheme {
    /// Whether connections are encrypted.
    pub fn is_tls(self) -> bool {
        matches!(self, Scheme::Https | Scheme::Unixs)
    }

    /// Whether the address is a socket file.
    pub fn is_unix(self) -> bool {
        matches!(self, Scheme::Unix | Scheme::Unixs)
    }
}

/// Where a URL points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address<'a> {
    /// An IP address or host name (IPv6 without brackets) and a port.
    Tcp {
        /// An IP address or host name; IPv6 without brackets, empty when none was written.
        host: &'a str,
        /// The port; 0 = any free one.
        port: u16,
    },
    /// The path of a socket file; relative when the URL has a host part, as etcd reads it.
    Unix(&'a Path),
}

/// A URL as flags carry it; ordered and compared by its text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Url {
    text: String,
}

/// The text of a URL in its parts. Every [`Url`] has been through here, so that
/// the accessors cannot fail.
struct Parts<'a> {
    scheme: Scheme,
    address: Address<'a>,
}

fn split(text: &str) -> Result<Parts<'_>, String> {
    let unknown = || format!("URL scheme must be http, https, unix, or unixs: {text}");
    let (scheme, rest) = text.split_once(':').ok_or_else(unknown)?;
    let scheme = match scheme {
        "http" => Scheme::Http,
        "https" => Scheme::Https,
        "unix" => Scheme::Unix,
        "unixs" => Scheme::Unixs,
        _ => return Err(unknown()),
    };
    if scheme.is_unix() {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        if path.is_empty() || path == "/" {
            return Err(format!("URL does not name a socket file: {text}"));
        }
        return Ok(Parts { scheme, address: Address::Unix(Path::new(path)) });
    }
    let not_an_address = || format!("URL address does not have the form \"host:port\": {text}");
    let authority = rest.strip_prefix("//").ok_or_else(not_an_address)?;
    if authority.contains('/') {
        return Err(format!("URL must not contain a path: {text}"));
    }
    if authority.contains(['?', '#', '@', '%']) || authority.contains(char::is_whitespace) {
        return Err(format!("URL must be a scheme, a host and a port and nothing else: {text}"));
    }
    let (host, port) = authority.rsplit_once(':').ok_or_else(not_an_address)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or_else(not_an_address)?,
        None if host.contains(':') => return Err(not_an_address()),
        None => host,
    };
    // `u16` reads "+80" too, which is no port.
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(not_an_address());
    }
    let port = port.parse().map_err(|_| format!("URL port must be at most 65535: {text}"))?;
    Ok(Parts { scheme, address: Address::Tcp { host, port } })
}

impl Url {
    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.parts().scheme
    }

    /// The address to bind or dial.
    pub fn address(&self) -> Address<'_> {
        self.parts().address
    }

    /// The host of a TCP URL (IPv6 without brackets), `None` of a socket file.
    pub fn host(&self) -> Option<&str> {
        match self.address() {
            Address::Tcp { host, .. } => Some(host),
            Address::Unix(_) => None,
        }
    }

    /// The port of a TCP URL, `None` of a socket file.
    pub fn port(&self) -> Option<u16> {
        match self.address() {
            Address::Tcp { port, .. } => Some(port),
            Address::Unix(_) => None,
        }
    }

    /// The URL exactly as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The same URL with another port, for one whose port 0 has been bound; a
    /// socket file stays as it is.
    pub fn with_port(&self, port: u16) -> Url {
        match self.text.rsplit_once(':') {
            Some((front, _)) if !self.scheme().is_unix() => Url { text: format!("{front}:{port}") },
            _ => self.clone(),
        }
    }

    fn parts(&self) -> Parts<'_> {
        #[expect(
            clippy::expect_used,
            reason = "the text was accepted by the same function when the URL was made"
        )]
        split(&self.text).expect("a Url holds a valid text")
    }
}

impl FromStr for Url {
    type Err = String;

    /// Reads one URL; the error is etcd's text where etcd has one.
    fn from_str(text: &str) -> Result<Url, String> {
        let text = text.trim();
        // As Go does: the scheme alone is case-insensitive.
        let text = match text.split_once(':') {
            Some((scheme, rest)) => format!("{}:{rest}", scheme.to_ascii_lowercase()),
            None => text.to_owned(),
        };
        split(&text)?;
        Ok(Url { text })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Reads a comma-separated list: sorted and without repetitions, as etcd keeps it.
pub(super) fn parse_list(text: &str) -> Result<Vec<Url>, String> {
    let mut urls = text.split(',').map(str::parse).collect::<Result<Vec<Url>, String>>()?;
    urls.sort();
    urls.dedup();
    Ok(urls)
}

/// The list as a flag would give it.
pub(super) fn join(urls: &[Url]) -> String {
    urls.iter().map(Url::as_str).collect::<Vec<_>>().join(",")
}
