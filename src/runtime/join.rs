//! Which member of a running cluster this one is.
//!
//! `member add` has told the cluster the peer URLs of a member that is yet to start; with
//! that the member got its id. When it starts, with `--initial-cluster-state=existing`, it
//! asks a peer for the members and finds itself among them by those URLs.
//!
//! As in etcd, `--initial-cluster` must name the same members as the cluster knows, all of
//! them. URLs are the same when their text is, but for the spelling of IP addresses, or
//! when their host names have the same address.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};

use crate::pb::kvorumpb::{MemberRecord, MembersResponse};

/// Finds the address of `host:port`.
pub type Resolve<'a> = &'a dyn Fn(&str) -> io::Result<SocketAddr>;

/// Why the flags do not fit the cluster. Each text is etcd's, and says what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The cluster has more members than `--initial-cluster`, or fewer.
    #[error(
        "error validating peerURLs {cluster}: member count is unequal: --initial-cluster names \
         {named}; name exactly the cluster's members in it, this one included, as \
         `etcdctl member add` has printed them"
    )]
    Count {
        /// The cluster as it is.
        cluster: String,
        /// How many members the flag has.
        named: usize,
    },
    /// A member of the cluster is not in `--initial-cluster`.
    #[error(
        "error validating peerURLs {cluster}: PeerURLs: no match found for existing member \
         ({id:x}, {urls:?}), last resolver error ({last}): correct its URLs in \
         --initial-cluster, or, if it is to be this member, add this member to the cluster \
         first (`etcdctl member add`)"
    )]
    NoMatch {
        /// The cluster as it is.
        cluster: String,
        /// The member.
        id: u64,
        /// Its URLs.
        urls: Vec<String>,
        /// Why the last member of the flag was not it.
        last: String,
    },
    /// `--name` is not in `--initial-cluster`, or not one of the cluster's members.
    #[error(
        "couldn't find local name {0:?} in the initial cluster configuration: write --name as \
         it stands in --initial-cluster, or add {0}=<peer url> to it"
    )]
    NotNamed(String),
    /// There are more learners than are allowed.
    #[error(
        "too many learner members in cluster: it has {learners}, and --max-learners is {max}; \
         promote or remove one, or set --max-learners to what the other members have"
    )]
    TooManyLearners {
        /// How many there are.
        learners: usize,
        /// `--max-learners`.
        max: u64,
    },
}

/// The member of `cluster` that `name` is in `named`, the members of `--initial-cluster`.
///
/// # Errors
/// The flag and the cluster do not name the same members.
pub fn find<'a>(
    cluster: &'a MembersResponse,
    named: &[(String, Vec<String>)],
    name: &str,
    max_learners: u64,
    resolve: Resolve<'_>,
) -> Result<&'a MemberRecord, JoinError> {
    if named.len() != cluster.members.len() {
        return Err(JoinError::Count { cluster: text(cluster), named: named.len() });
    }
    let mut this = None;
    for member in &cluster.members {
        let mut last = String::new();
        let found = named.iter().find(|(_, urls)| {
            same_urls(&member.peer_urls, urls, resolve).map_err(|error| last = error).is_ok()
        });
        match found {
            Some((found, _)) if found == name => this = Some(member),
            Some(_) => {}
            None => {
                return Err(JoinError::NoMatch {
                    cluster: text(cluster),
                    id: member.id,
                    urls: member.peer_urls.clone(),
                    last,
                });
            }
        }
    }
    let learners = cluster.members.iter().filter(|member| member.is_learner).count();
    if learners as u64 > max_learners {
        return Err(JoinError::TooManyLearners { learners, max: max_learners });
    }
    this.ok_or_else(|| JoinError::NotNamed(name.to_owned()))
}

/// The first address that the system knows for `host:port`, of IPv4 if there is one.
///
/// # Errors
/// It knows none.
pub fn resolve(host_and_port: &str) -> io::Result<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = host_and_port.to_socket_addrs()?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.into_iter().next().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

/// Whether two lists hold the same URLs; says why not.
fn same_urls(a: &[String], b: &[String], resolve: Resolve<'_>) -> Result<(), String> {
    if a.len() != b.len() {
        return Err(format!("len({a:?}) != len({b:?})"));
    }
    let sorted = |urls: &[String], each: &dyn Fn(&str) -> Result<String, String>| {
        let mut urls = urls.iter().map(|url| each(url)).collect::<Result<Vec<_>, _>>()?;
        urls.sort_unstable();
        Ok::<_, String>(urls)
    };
    let spelled = |url: &str| Ok(normalized(url));
    if sorted(a, &spelled)? == sorted(b, &spelled)? {
        return Ok(());
    }
    let resolved = |url: &str| resolved(url, resolve);
    let (a, b) = (sorted(a, &resolved)?, sorted(b, &resolved)?);
    match a.iter().zip(&b).find(|(a, b)| a != b) {
        Some((a, b)) => Err(format!("resolved urls: {a:?} != {b:?}")),
        None => Ok(()),
    }
}

/// `http://host:80` as its scheme, host and port; `None` for a socket file.
fn parts(url: &str) -> Option<(&str, &str, &str)> {
    let (scheme, authority) = url.split_once("://")?;
    let (host, port) = authority.rsplit_once(':')?;
    ["http", "https"].contains(&scheme).then_some((scheme, host, port))
}

fn address(host: &str) -> Option<IpAddr> {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.parse().ok().map(|address: IpAddr| address.to_canonical())
}

/// The URL with its IP address, if it has one, in the usual spelling.
fn normalized(url: &str) -> String {
    let Some((scheme, host, port)) = parts(url) else { return url.to_owned() };
    match (address(host), port.parse()) {
        (Some(ip), Ok(port)) => format!("{scheme}://{}", SocketAddr::new(ip, port)),
        _ => url.to_owned(),
    }
}

/// The URL with its host's address instead of its name. `localhost` stays as it is.
fn resolved(url: &str, resolve: Resolve<'_>) -> Result<String, String> {
    match parts(url) {
        Some((scheme, host, port)) if host != "localhost" && address(host).is_none() => {
            let found = resolve(&format!("{host}:{port}"));
            let found = found.map_err(|error| format!("failed to resolve {url:?} ({error})"))?;
            Ok(format!("{scheme}://{found}"))
        }
        _ => Ok(normalized(url)),
    }
}

/// A cluster as etcd prints it.
fn text(cluster: &MembersResponse) -> String {
    struct Text<'a>(&'a MembersResponse);
    impl fmt::Display for Text<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{{ClusterID:{:x} Members:[", self.0.cluster_id)?;
            for (i, member) in self.0.members.iter().enumerate() {
                let space = if i == 0 { "" } else { " " };
                let MemberRecord { id, name, peer_urls, .. } = member;
                write!(f, "{space}{{ID:{id:x} Name:{name} PeerURLs:[{}]}}", peer_urls.join(" "))?;
            }
            f.write_str("]}")
        }
    }
    Text(cluster).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(members: &[(u64, &[&str])]) -> MembersResponse {
        let record = |(id, urls): &(u64, &[&str])| MemberRecord {
            id: *id,
            peer_urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            ..MemberRecord::default()
        };
        MembersResponse { cluster_id: 7, members: members.iter().map(record).collect() }
    }

    fn named(members: &[(&str, &[&str])]) -> Vec<(String, Vec<String>)> {
        let urls = |urls: &[&str]| urls.iter().map(|url| (*url).to_owned()).collect();
        members.iter().map(|(name, list)| ((*name).to_owned(), urls(list))).collect()
    }

    /// `*.test` is 10.0.0.9, and nothing else is known.
    fn dns(host_and_port: &str) -> io::Result<SocketAddr> {
        match host_and_port.split_once(".test:") {
            Some((_, port)) => {
                let port = port.parse().map_err(io::Error::other)?;
                Ok(SocketAddr::new([10, 0, 0, 9].into(), port))
            }
            None => Err(io::Error::other("no such host")),
        }
    }

    fn id(
        existing: &[(u64, &[&str])],
        flags: &[(&str, &[&str])],
        name: &str,
    ) -> Result<u64, String> {
        let cluster = cluster(existing);
        let found = find(&cluster, &named(flags), name, 1, &dns);
        found.map(|member| member.id).map_err(|error| error.to_string())
    }

    #[test]
    fn a_member_is_found_by_its_urls() {
        let existing: &[(u64, &[&str])] =
            &[(1, &["http://10.0.0.1:2380"]), (2, &["http://10.0.0.2:1", "http://10.0.0.2:2"])];
        let flags: &[(&str, &[&str])] =
            &[("b", &["http://10.0.0.2:2", "http://10.0.0.2:1"]), ("a", &["http://10.0.0.1:2380"])];
        assert_eq!(id(existing, flags, "a"), Ok(1));
        assert_eq!(id(existing, flags, "b"), Ok(2));
        let error = id(existing, flags, "c").expect_err("no such name");
        assert!(error.starts_with("couldn't find local name \"c\" in the initial cluster"));
    }

    #[test]
    fn an_address_is_the_same_however_it_is_written() {
        for (one, other) in [
            ("http://[::1]:2380", "http://[0:0:0:0:0:0:0:1]:2380"),
            ("http://[::ffff:10.0.0.1]:2380", "http://10.0.0.1:2380"),
            ("http://node.test:2380", "http://10.0.0.9:2380"),
            ("http://node.test:2380", "http://other.test:2380"),
            ("http://unknown:2380", "http://unknown:2380"),
            ("unix://localhost:m1", "unix://localhost:m1"),
        ] {
            assert_eq!(id(&[(1, &[one])], &[("a", &[other])], "a"), Ok(1), "{one} {other}");
        }
        for (one, other) in [
            ("http://10.0.0.1:2380", "https://10.0.0.1:2380"),
            ("http://10.0.0.1:2380", "http://10.0.0.1:2381"),
            ("http://localhost:2380", "http://127.0.0.1:2380"),
            ("unix://localhost:m1", "unix://localhost:m2"),
        ] {
            let error = id(&[(1, &[one])], &[("a", &[other])], "a").expect_err("are not the same");
            assert!(error.contains("resolved urls: "), "{error}");
        }
    }

    #[test]
    fn flags_that_do_not_fit_the_cluster_are_refused_in_etcds_words() {
        let existing: &[(u64, &[&str])] = &[(1, &["http://a:1"]), (0x2a, &["http://b:1"])];
        let error = id(existing, &[("a", &["http://a:1"])], "a").expect_err("one is missing");
        assert!(error.starts_with(
            "error validating peerURLs {ClusterID:7 Members:[{ID:1 Name: PeerURLs:[http://a:1]} \
             {ID:2a Name: PeerURLs:[http://b:1]}]}: member count is unequal"
        ));
        let error = id(existing, &[("a", &["http://a:1"]), ("b", &["http://c:1"])], "a")
            .expect_err("one is another");
        assert!(error.contains(
            "PeerURLs: no match found for existing member (2a, [\"http://b:1\"]), last resolver \
             error (failed to resolve \"http://b:1\" (no such host))"
        ));
    }

    #[test]
    fn a_learner_too_many_is_refused() {
        let mut cluster = cluster(&[(1, &["http://a:1"]), (2, &["http://b:1"])]);
        let flags = named(&[("a", &["http://a:1"]), ("b", &["http://b:1"])]);
        cluster.members.iter_mut().for_each(|member| member.is_learner = true);
        let found = find(&cluster, &flags, "a", 2, &dns).map(|member| member.id);
        assert_eq!(found, Ok(1));
        let error = find(&cluster, &flags, "a", 1, &dns).expect_err("one too many");
        assert_eq!(error, JoinError::TooManyLearners { learners: 2, max: 1 });
    }
}
