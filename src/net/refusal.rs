//! What another member answered when it is no success.
//!
//! A member answers a call of another as it would a client: by the status that `api/status.rs`
//! makes of an [`Error`]. The caller wants the error back, to answer its own client with it or
//! to act on it, and above all wants to tell an answer from silence: when the connection broke,
//! nobody knows what the other member did.

use tonic::metadata::MetadataMap;
use tonic::{Code, Response, Status};

use crate::error::Error;

/// The metadata of a refusal that says: the caller was removed from the cluster.
const REMOVED: &str = "kvorum-removed";

/// The text of that refusal: etcd's.
const REMOVED_TEXT: &str = "the member has been permanently removed from the cluster";

/// The errors that members tell each other.
const TOLD: [Error; 25] = [
    Error::KeyNotFound,
    Error::RequestTooLarge,
    Error::Compacted,
    Error::FutureRevision,
    Error::LeaseNotFound,
    Error::LeaseExists,
    Error::LeaseTtlTooLarge,
    Error::NoSpace,
    Error::Corrupt,
    Error::TooManyRequests,
    Error::MemberNotFound,
    Error::MemberBadUrls,
    Error::PeerUrlExists,
    Error::MemberNotLearner,
    Error::LearnerNotReady,
    Error::NotEnoughStartedMembers,
    Error::BadLeaderTransferee,
    Error::NotLeader,
    Error::AuthNotEnabled,
    Error::NoLeader,
    Error::LeaderChanged,
    Error::Timeout,
    Error::TimeoutLeaderFail,
    Error::TimeoutWaitAppliedIndex,
    Error::Stopped,
];

/// The error with which a member answered. `None` when it did not answer, or not with one
/// that is known here: whether it did what it was asked is then open.
pub fn error(status: &Status) -> Option<Error> {
    // The text tells them apart; several have the same code.
    TOLD.iter().find(|error| error.to_string() == status.message()).cloned()
}

/// What a call came to: the answer, the error that was answered, or `None` when there was no
/// answer.
///
/// # Errors
/// See there.
pub fn answered<T>(answer: Result<Response<T>, Status>) -> Result<T, Option<Error>> {
    answer.map(Response::into_inner).map_err(|status| error(&status))
}

/// The refusal of a member that was removed.
pub fn removed() -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert(REMOVED, 1_u64.into());
    Status::with_metadata(Code::FailedPrecondition, REMOVED_TEXT, metadata)
}

/// Whether a call was refused because this member was removed from the cluster.
pub fn is_removed(status: &Status) -> bool {
    status.metadata().contains_key(REMOVED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_from_silence() {
        for told in TOLD {
            let status = Status::unavailable(told.to_string());
            assert_eq!(error(&status), Some(told));
        }
        assert_eq!(error(&Status::unavailable("connection reset")), None);
    }

    #[test]
    fn a_removed_member_is_known_by_more_than_the_text() {
        assert!(is_removed(&removed()));
        assert!(!is_removed(&Status::failed_precondition(REMOVED_TEXT)));
    }
}
