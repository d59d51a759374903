//! The Cluster service of a server with one member.
//!
//! `MemberList` is complete. The calls that change members check their arguments
//! as etcd does, in etcd's words, and then say that this version cannot do it.

use tonic::{Request, Response, Status};

use super::status::status;
use crate::engine::Engine;
use crate::error::Error;
use crate::pb::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse, cluster_server,
};

pub(super) struct Cluster {
    engine: Engine,
}

impl Cluster {
    pub(super) fn new(engine: Engine) -> Cluster {
        Cluster { engine }
    }

    async fn members(&self) -> Result<Vec<Member>, Error> {
        let local = MemberListRequest { linearizable: false };
        Ok(self.engine.member_list(local).await?.members)
    }

    async fn add(&self, request: MemberAddRequest) -> Result<MemberAddResponse, Error> {
        check_urls(&request.peer_ur_ls)?;
        check_unused(&self.members().await?, None, &request.peer_ur_ls)?;
        Err(ONE_MEMBER)
    }

    async fn remove(&self, request: MemberRemoveRequest) -> Result<MemberRemoveResponse, Error> {
        check_known(&self.members().await?, request.id)?;
        Err(ONE_MEMBER)
    }

    async fn update(&self, request: MemberUpdateRequest) -> Result<MemberUpdateResponse, Error> {
        let members = self.members().await?;
        check_known(&members, request.id)?;
        check_unused(&members, Some(request.id), &request.peer_ur_ls)?;
        Err(ONE_MEMBER)
    }

    async fn promote(&self, request: MemberPromoteRequest) -> Result<MemberPromoteResponse, Error> {
        let members = self.members().await?;
        if check_known(&members, request.id)?.is_learner {
            return Err(ONE_MEMBER);
        }
        Err(Error::MemberNotLearner)
    }
}

const ONE_MEMBER: Error = Error::Unimplemented(
    "kvorum: this version serves one member and cannot add, remove, update or promote members",
);

fn check_known(members: &[Member], id: u64) -> Result<&Member, Error> {
    members.iter().find(|member| member.id == id).ok_or(Error::MemberNotFound)
}

/// No member but `except` may have one of the URLs already.
fn check_unused(members: &[Member], except: Option<u64>, urls: &[String]) -> Result<(), Error> {
    let used = members
        .iter()
        .filter(|member| Some(member.id) != except)
        .any(|member| member.peer_ur_ls.iter().any(|used| urls.contains(used)));
    if used { Err(Error::PeerUrlExists) } else { Ok(()) }
}

/// At least one URL, each `http(s)://host:port` without a path, or `unix(s)://…`.
fn check_urls(urls: &[String]) -> Result<(), Error> {
    if !urls.is_empty() && urls.iter().all(|url| is_peer_url(url.trim())) {
        Ok(())
    } else {
        Err(Error::MemberBadUrls)
    }
}

fn is_peer_url(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else { return false };
    match scheme {
        "unix" | "unixs" => true,
        "http" | "https" => {
            // The port must be written out, which the url crate would not tell: it
            // drops a port that is the scheme's own, and adds the path "/".
            let authority = rest.split(['?', '#']).next().unwrap_or_default();
            let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let port = host_port.rsplit_once(':').map(|(_, port)| port);
            !authority.contains('/')
                && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
                && url::Url::parse(url).is_ok()
        }
        _ => false,
    }
}

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        self.engine.member_list(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        self.add(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        self.remove(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        self.update(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        self.promote(request.into_inner()).await.map(Response::new).map_err(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_urls_are_checked_as_etcd_does() {
        let good = [
            "http://127.0.0.1:2380",
            "https://example.com:443",
            "http://example.com:80",
            " http://[::1]:2380 ",
            "unix://run/etcd.sock",
            "unixs:///run/etcd.sock",
        ];
        for url in good {
            assert_eq!(check_urls(&[url.to_owned()]), Ok(()), "{url}");
        }
        let bad = [
            "",
            "127.0.0.1:2380",
            "http://127.0.0.1",
            "http://[::1]",
            "http://127.0.0.1:2380/",
            "http://127.0.0.1:2380/path",
            "http://127.0.0.1:port",
            "ftp://127.0.0.1:2380",
            "http://",
        ];
        for url in bad {
            let urls = ["http://127.0.0.1:2380".to_owned(), url.to_owned()];
            assert_eq!(check_urls(&urls), Err(Error::MemberBadUrls), "{url}");
        }
        assert_eq!(check_urls(&[]), Err(Error::MemberBadUrls));
    }

    #[test]
    fn urls_and_ids_are_compared_with_the_members() {
        let url = "http://127.0.0.1:2380".to_owned();
        let members = [Member { id: 7, peer_ur_ls: vec![url.clone()], ..Member::default() }];
        assert_eq!(
            check_unused(&members, None, std::slice::from_ref(&url)),
            Err(Error::PeerUrlExists)
        );
        assert_eq!(check_unused(&members, Some(7), &[url]), Ok(()));
        assert_eq!(check_unused(&members, None, &["http://127.0.0.1:1".to_owned()]), Ok(()));
        assert_eq!(check_known(&members, 8), Err(Error::MemberNotFound));
        assert!(check_known(&members, 7).is_ok());
    }
}
