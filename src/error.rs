//! Errors, named by what went wrong in etcd's words.
//!
//! The text of each is the text etcd's clients match on, to the letter. The gRPC
//! code that goes with it is decided in one place, `api/status.rs`.

/// Why a request was not carried out.
///
/// Unless the variant says otherwise nothing was changed. A [`Error::is_ambiguous`]
/// error leaves open whether a write has happened or still will.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // The request itself: change it before sending it again.
    /// A key is empty.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// `ignore_value` or `ignore_lease` on a key that does not exist, or a
    /// transaction's operation without content.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    /// `ignore_value` together with a value.
    #[error("etcdserver: value is provided")]
    ValueProvided,
    /// `ignore_lease` together with a lease.
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    /// More compares or operations than `--max-txn-ops`.
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    /// A transaction changes one key twice.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// A sort order or target that does not exist.
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    /// The `client-api-version` metadata is not UTF-8.
    #[error("etcdserver: invalid client api version")]
    InvalidClientApiVersion,
    /// The request is larger than `--max-request-bytes`.
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    /// The revision has been compacted: read a newer one.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The revision does not exist yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    /// `RangeStream` with a sort order other than by key, ascending.
    #[error("RangeStream does not support custom sort orders")]
    StreamSortUnsupported,
    /// `RangeStream` with a revision filter.
    #[error("RangeStream does not support revision filters")]
    StreamFilterUnsupported,

    // Leases.
    /// No such lease, or it has expired.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    /// A lease of this id exists.
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    /// The TTL exceeds 9,000,000,000 seconds.
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,

    // Space, corruption and load.
    /// The quota is used up: compact, then `etcdctl alarm disarm`.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// The CORRUPT alarm is raised.
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    /// Too much is under way: send it again later.
    #[error("etcdserver: too many requests")]
    TooManyRequests,

    // Membership.
    /// No such member, or it was removed.
    #[error("etcdserver: member not found")]
    MemberNotFound,
    /// A member of this id exists, or existed.
    #[error("etcdserver: member ID already exist")]
    MemberExists,
    /// A member's peer URLs are missing or malformed.
    #[error("etcdserver: given member URLs are invalid")]
    MemberBadUrls,
    /// Another member has one of these peer URLs.
    #[error("etcdserver: Peer URLs already exists")]
    PeerUrlExists,
    /// The member to promote votes already.
    #[error("etcdserver: can only promote a learner member")]
    MemberNotLearner,
    /// The learner to promote has too little of the log yet: try again later.
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    /// There are `--max-learners` learners.
    #[error("etcdserver: too many learner members in cluster")]
    TooManyLearners,
    /// A member that only listens does not answer this: ask another.
    #[error("etcdserver: rpc not supported for learner")]
    LearnerUnsupported,
    /// The change would leave too few started members for a quorum.
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    NotEnoughStartedMembers,
    /// Too few members have been connected for long enough: the change might end the
    /// quorum.
    #[error("etcdserver: unhealthy cluster")]
    UnhealthyCluster,
    /// This member was removed from the cluster. A write may have happened.
    #[error("the member has been permanently removed from the cluster")]
    MemberRemoved,
    /// The target of a leader transfer is unknown or a learner.
    #[error("etcdserver: bad leader transferee")]
    BadLeaderTransferee,
    /// The request must go to the leader.
    #[error("etcdserver: not leader")]
    NotLeader,

    // Downgrade.
    /// The target is neither `major.minor` nor a semantic version.
    #[error("etcdserver: wrong downgrade target version format")]
    WrongDowngradeVersionFormat,
    /// The target is not one minor version below the cluster's.
    #[error("etcdserver: invalid downgrade target version")]
    InvalidDowngradeTargetVersion,
    /// A downgrade action that does not exist.
    #[error("etcdserver: unknown method")]
    UnknownMethod,

    // Authentication.
    /// `Authenticate` while auth is off.
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,

    // Availability: the same request may succeed later, or elsewhere.
    /// There is no leader.
    #[error("etcdserver: no leader")]
    NoLeader,
    /// The leader changed while a read waited.
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    /// There was no leader whom a write could have been given to, for as long as a request may
    /// take. It has not happened, and will not.
    #[error("context deadline exceeded")]
    DeadlineExceeded,
    /// No answer from the cluster in time. A write may have happened.
    #[error("etcdserver: request timed out")]
    Timeout,
    /// Like [`Error::Timeout`], and a leader was lost meanwhile.
    #[error("etcdserver: request timed out, possibly due to previous leader failure")]
    TimeoutLeaderFail,
    /// Like [`Error::Timeout`], and this member was cut off from others meanwhile.
    #[error("etcdserver: request timed out, possibly due to connection lost")]
    TimeoutConnectionLost,
    /// The leader did not hand over in time. It may still.
    #[error("etcdserver: request timed out, leader transfer took too long")]
    LeaderTransferTimeout,
    /// This member did not catch up in time to answer.
    #[error("etcdserver: request timed out, waiting for the applied index took too long")]
    TimeoutWaitAppliedIndex,
    /// The server is stopping. A write may have happened.
    #[error("etcdserver: server stopped")]
    Stopped,
    /// A snapshot that was being saved was given up; the text says why.
    #[error("{0}")]
    SnapshotGivenUp(String),
    /// This version does not have the feature.
    #[error("{0}")]
    Unimplemented(&'static str),
}

impl Error {
    /// Whether a write that got this answer may have happened, or still may.
    pub fn is_ambiguous(&self) -> bool {
        matches!(
            self,
            Error::Timeout
                | Error::TimeoutLeaderFail
                | Error::TimeoutConnectionLost
                | Error::MemberRemoved
                | Error::Stopped
        )
    }
}
