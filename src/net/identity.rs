//! Who calls whom: the metadata of every call between members.
//!
//! Ids and addresses go wrong where clusters are made by scripts: a data directory is copied,
//! a member of an old cluster still runs at an address that was given to a new one. A
//! member that took messages that are not for it could vote twice or take another's entries.

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::service::Interceptor;
use tonic::{Request, Status};

const CLUSTER: &str = "kvorum-cluster";
const FROM: &str = "kvorum-from";
const TO: &str = "kvorum-to";

/// Who this member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: u64,
    /// The member.
    pub member_id: u64,
}

/// Whom the metadata of a call names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// The cluster of the caller.
    pub cluster_id: u64,
    /// The member that calls.
    pub from: u64,
    /// The member that is meant.
    pub to: u64,
}

impl Named {
    /// What the metadata says; `None` when it names not all three.
    pub fn read(metadata: &MetadataMap) -> Option<Named> {
        let number = |key| metadata.get(key)?.to_str().ok()?.parse().ok();
        Some(Named { cluster_id: number(CLUSTER)?, from: number(FROM)?, to: number(TO)? })
    }
}

/// Puts the metadata of one caller and one receiver on every call.
#[derive(Debug, Clone)]
pub struct Caller {
    cluster: AsciiMetadataValue,
    from: AsciiMetadataValue,
    to: AsciiMetadataValue,
}

impl Caller {
    /// For calls of `identity` to the member `to`.
    pub fn new(identity: Identity, to: u64) -> Caller {
        Caller {
            cluster: identity.cluster_id.into(),
            from: identity.member_id.into(),
            to: to.into(),
        }
    }
}

impl Interceptor for Caller {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert(CLUSTER, self.cluster.clone());
        metadata.insert(FROM, self.from.clone());
        metadata.insert(TO, self.to.clone());
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let identity = Identity { cluster_id: u64::MAX, member_id: 7 };
        let request = Caller::new(identity, 8).call(Request::new(())).unwrap();
        let named = Named { cluster_id: u64::MAX, from: 7, to: 8 };
        assert_eq!(Named::read(request.metadata()), Some(named));
    }

    #[test]
    fn metadata_that_names_not_all_three_names_nobody() {
        let mut request = Request::new(());
        assert_eq!(Named::read(request.metadata()), None);
        for (key, value) in [(CLUSTER, "1"), (FROM, "2"), (TO, "three")] {
            request.metadata_mut().insert(key, value.parse().unwrap());
        }
        assert_eq!(Named::read(request.metadata()), None);
    }
}
