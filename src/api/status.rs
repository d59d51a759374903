//! The one table from [`Error`] to what the wire carries.
//!
//! An answer that is an error is a code and a text. etcd's clients look the text
//! up, to the letter, and retry by the code, so both are part of the protocol:
//!
//! ```text
//! Error::Compacted  ->  11 OutOfRange  "etcdserver: mvcc: required revision has been compacted"
//! ```
//!
//! The text is the error's `Display`; the code is decided here and nowhere else.
//! Two rows look wrong and are not: etcd answers "too many requests" and "not
//! enough started members" with `Unknown`, and so does kvorum, because clients
//! that retry by code would otherwise treat the two servers differently.
//!
//! The Lock and Election services answer every error with `Unknown`, whatever
//! the table says: see `unknown` below.

use tonic::{Code, Status};

use crate::error::Error;

/// The gRPC code that goes with `error`.
pub fn code(error: &Error) -> Code {
    match error {
        Error::EmptyKey
        | Error::KeyNotFound
        | Error::ValueProvided
        | Error::LeaseProvided
        | Error::TooManyOps
        | Error::DuplicateKey
        | Error::InvalidSortOption
        | Error::InvalidClientApiVersion
        | Error::RequestTooLarge
        | Error::MemberBadUrls
        | Error::WrongDowngradeVersionFormat
        | Error::InvalidDowngradeTargetVersion => Code::InvalidArgument,

        Error::Compacted | Error::FutureRevision | Error::LeaseTtlTooLarge => Code::OutOfRange,

        Error::LeaseNotFound | Error::MemberNotFound => Code::NotFound,

        Error::LeaseExists
        | Error::MemberExists
        | Error::PeerUrlExists
        | Error::MemberNotLearner
        | Error::LearnerNotReady
        | Error::TooManyLearners
        | Error::LearnerUnsupported
        | Error::BadLeaderTransferee
        | Error::NotLeader
        | Error::AuthNotEnabled => Code::FailedPrecondition,

        Error::DeadlineExceeded => Code::DeadlineExceeded,
        // etcd never gives one up.
        Error::SnapshotGivenUp(_) => Code::Aborted,
        Error::NoSpace => Code::ResourceExhausted,
        Error::Corrupt => Code::DataLoss,

        Error::NoLeader
        | Error::LeaderChanged
        | Error::Timeout
        | Error::TimeoutLeaderFail
        | Error::TimeoutConnectionLost
        | Error::TimeoutWaitAppliedIndex
        | Error::UnhealthyCluster
        | Error::Stopped => Code::Unavailable,

        // etcd's own table would say ResourceExhausted and FailedPrecondition,
        // but its conversion loses them on the way out; see the module's essay.
        Error::TooManyRequests | Error::NotEnoughStartedMembers => Code::Unknown,
        // etcd has no code for these either.
        Error::UnknownMethod | Error::LeaderTransferTimeout | Error::MemberRemoved => Code::Unknown,

        Error::StreamSortUnsupported | Error::StreamFilterUnsupported | Error::Unimplemented(_) => {
            Code::Unimplemented
        }
    }
}

/// `error` as a call's status: its code and its exact text.
pub fn status(error: Error) -> Status {
    Status::new(code(&error), error.to_string())
}

/// Any error as the Lock and Election services answer it: `Unknown` with the
/// text. etcd runs those two on top of its own client, whose errors carry no
/// code any more.
pub(super) fn unknown(error: impl std::fmt::Display) -> Status {
    Status::unknown(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What etcd's clients compare with, written out by hand from etcd's
    /// error table: number of the variant, the error, its code, its text.
    fn table() -> Vec<(Error, Code, &'static str)> {
        use Code::*;
        vec![
            (Error::EmptyKey, InvalidArgument, "etcdserver: key is not provided"),
            (Error::KeyNotFound, InvalidArgument, "etcdserver: key not found"),
            (Error::ValueProvided, InvalidArgument, "etcdserver: value is provided"),
            (Error::LeaseProvided, InvalidArgument, "etcdserver: lease is provided"),
            (Error::TooManyOps, InvalidArgument, "etcdserver: too many operations in txn request"),
            (
                Error::DuplicateKey,
                InvalidArgument,
                "etcdserver: duplicate key given in txn request",
            ),
            (Error::InvalidSortOption, InvalidArgument, "etcdserver: invalid sort option"),
            (
                Error::InvalidClientApiVersion,
                InvalidArgument,
                "etcdserver: invalid client api version",
            ),
            (Error::RequestTooLarge, InvalidArgument, "etcdserver: request is too large"),
            (
                Error::Compacted,
                OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
            ),
            (
                Error::FutureRevision,
                OutOfRange,
                "etcdserver: mvcc: required revision is a future revision",
            ),
            (
                Error::StreamSortUnsupported,
                Unimplemented,
                "RangeStream does not support custom sort orders",
            ),
            (
                Error::StreamFilterUnsupported,
                Unimplemented,
                "RangeStream does not support revision filters",
            ),
            (Error::LeaseNotFound, NotFound, "etcdserver: requested lease not found"),
            (Error::LeaseExists, FailedPrecondition, "etcdserver: lease already exists"),
            (Error::LeaseTtlTooLarge, OutOfRange, "etcdserver: too large lease TTL"),
            (Error::NoSpace, ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
            (Error::Corrupt, DataLoss, "etcdserver: corrupt cluster"),
            (Error::TooManyRequests, Unknown, "etcdserver: too many requests"),
            (Error::MemberNotFound, NotFound, "etcdserver: member not found"),
            (Error::MemberExists, FailedPrecondition, "etcdserver: member ID already exist"),
            (Error::MemberBadUrls, InvalidArgument, "etcdserver: given member URLs are invalid"),
            (Error::PeerUrlExists, FailedPrecondition, "etcdserver: Peer URLs already exists"),
            (
                Error::MemberNotLearner,
                FailedPrecondition,
                "etcdserver: can only promote a learner member",
            ),
            (
                Error::LearnerNotReady,
                FailedPrecondition,
                "etcdserver: can only promote a learner member which is in sync with leader",
            ),
            (
                Error::TooManyLearners,
                FailedPrecondition,
                "etcdserver: too many learner members in cluster",
            ),
            (
                Error::LearnerUnsupported,
                FailedPrecondition,
                "etcdserver: rpc not supported for learner",
            ),
            (Error::UnhealthyCluster, Unavailable, "etcdserver: unhealthy cluster"),
            (
                Error::MemberRemoved,
                Unknown,
                "the member has been permanently removed from the cluster",
            ),
            (
                Error::NotEnoughStartedMembers,
                Unknown,
                "etcdserver: re-configuration failed due to not enough started members",
            ),
            (Error::BadLeaderTransferee, FailedPrecondition, "etcdserver: bad leader transferee"),
            (Error::NotLeader, FailedPrecondition, "etcdserver: not leader"),
            (
                Error::WrongDowngradeVersionFormat,
                InvalidArgument,
                "etcdserver: wrong downgrade target version format",
            ),
            (
                Error::InvalidDowngradeTargetVersion,
                InvalidArgument,
                "etcdserver: invalid downgrade target version",
            ),
            (Error::UnknownMethod, Unknown, "etcdserver: unknown method"),
            (
                Error::AuthNotEnabled,
                FailedPrecondition,
                "etcdserver: authentication is not enabled",
            ),
            (Error::NoLeader, Unavailable, "etcdserver: no leader"),
            (Error::LeaderChanged, Unavailable, "etcdserver: leader changed"),
            (Error::DeadlineExceeded, DeadlineExceeded, "context deadline exceeded"),
            (Error::Timeout, Unavailable, "etcdserver: request timed out"),
            (
                Error::TimeoutLeaderFail,
                Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
            ),
            (
                Error::TimeoutConnectionLost,
                Unavailable,
                "etcdserver: request timed out, possibly due to connection lost",
            ),
            (
                Error::LeaderTransferTimeout,
                Unknown,
                "etcdserver: request timed out, leader transfer took too long",
            ),
            (
                Error::TimeoutWaitAppliedIndex,
                Unavailable,
                "etcdserver: request timed out, waiting for the applied index took too long",
            ),
            (Error::Stopped, Unavailable, "etcdserver: server stopped"),
            (Error::SnapshotGivenUp("slow".to_owned()), Aborted, "slow"),
            (Error::Unimplemented("not here"), Unimplemented, "not here"),
        ]
    }

    /// Stops compiling when a variant is added, as a reminder to give it a row
    /// in `table` and to raise `VARIANTS`.
    fn known(error: &Error) {
        match error {
            Error::EmptyKey
            | Error::KeyNotFound
            | Error::ValueProvided
            | Error::LeaseProvided
            | Error::TooManyOps
            | Error::DuplicateKey
            | Error::InvalidSortOption
            | Error::InvalidClientApiVersion
            | Error::RequestTooLarge
            | Error::Compacted
            | Error::FutureRevision
            | Error::StreamSortUnsupported
            | Error::StreamFilterUnsupported
            | Error::LeaseNotFound
            | Error::LeaseExists
            | Error::LeaseTtlTooLarge
            | Error::NoSpace
            | Error::Corrupt
            | Error::TooManyRequests
            | Error::MemberNotFound
            | Error::MemberExists
            | Error::MemberBadUrls
            | Error::PeerUrlExists
            | Error::MemberNotLearner
            | Error::LearnerNotReady
            | Error::TooManyLearners
            | Error::LearnerUnsupported
            | Error::NotEnoughStartedMembers
            | Error::UnhealthyCluster
            | Error::MemberRemoved
            | Error::BadLeaderTransferee
            | Error::NotLeader
            | Error::WrongDowngradeVersionFormat
            | Error::InvalidDowngradeTargetVersion
            | Error::UnknownMethod
            | Error::AuthNotEnabled
            | Error::NoLeader
            | Error::LeaderChanged
            | Error::DeadlineExceeded
            | Error::Timeout
            | Error::TimeoutLeaderFail
            | Error::TimeoutConnectionLost
            | Error::LeaderTransferTimeout
            | Error::TimeoutWaitAppliedIndex
            | Error::Stopped
            | Error::SnapshotGivenUp(_)
            | Error::Unimplemented(_) => (),
        }
    }
    const VARIANTS: usize = 47;

    #[test]
    fn every_error_has_etcds_code_and_text() {
        let table = table();
        for (error, code, text) in &table {
            known(error);
            let status = status(error.clone());
            assert_eq!((status.code(), status.message()), (*code, *text), "{error:?}");
        }
        let variants: std::collections::HashSet<_> =
            table.iter().map(|(error, ..)| std::mem::discriminant(error)).collect();
        assert_eq!(variants.len(), VARIANTS, "every variant has exactly one row");
        assert_eq!(table.len(), VARIANTS);
    }

    #[test]
    fn lock_and_election_lose_the_code_and_keep_the_text() {
        let status = unknown(Error::LeaseNotFound);
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(status.message(), "etcdserver: requested lease not found");
    }
}
