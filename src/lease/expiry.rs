//! The leader's half: deadlines.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Lease;

/// How long after a lease was reported due it is reported again, in case its
/// revocation was lost on the way.
pub const REVOKE_RETRY: Duration = Duration::from_secs(3);

/// What became of a keepalive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// The lease lasts its whole TTL, in seconds, from now on.
    Renewed {
        /// The TTL granted, in seconds.
        ttl_secs: i64,
    },
    /// Commit a remainder of 0 for this lease, then call [`Expiry::renewal_committed`]
    /// and renew again. Nothing was changed.
    ///
    /// The log holds, or is about to hold, a remainder that a later leader would go
    /// by. It must be taken back before the client hears that it has the whole TTL.
    CommitFirst {
        /// Names the remainder to be taken back.
        token: u64,
    },
    /// The deadline has passed and the revocation is under way. Answer when it is
    /// committed: then, and only then, is the lease known to be gone.
    Expired,
    /// There is no such lease.
    NotFound,
    /// This member does not lead, or has not begun to.
    NotPrimary,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    ttl_secs: i64,
    deadline: Duration,
    /// When to report the lease as due: the deadline, and later the next retry.
    report_at: Duration,
    /// When to commit what is left, if ever.
    checkpoint_at: Option<Duration>,
    /// The token of the last remainder that was committed, or handed out to be; 0
    /// for none.
    remainder: u64,
    /// The token of the last remainder known to be taken back. The log is free of
    /// remainders when this is the same as the above.
    taken_back: u64,
}

/// Deadlines of all leases while this member leads; empty otherwise.
///
/// Each operation costs O(log n); [`Expiry::expired`] and
/// [`Expiry::due_checkpoints`] that much for each lease they return or skip, at most
/// `max` of them.
///
/// Unlike etcd's, deadlines that fall together after an election are not spread out.
/// They are reported oldest first and `max` at a time, and many leases are revoked by
/// one log entry, so a pile of them is worked off in pieces all the same.
#[derive(Debug)]
pub struct Expiry {
    primary: bool,
    checkpoint_interval: Duration,
    /// The last token given out. It outlives [`Expiry::demote`], so that a token of an
    /// earlier leadership means nothing in a later one.
    token: u64,
    entries: BTreeMap<i64, Entry>,
    by_report: BTreeSet<(Duration, i64)>,
    by_checkpoint: BTreeSet<(Duration, i64)>,
}

impl Expiry {
    /// Not leading. Leases that have more than `checkpoint_interval` left have their
    /// remainder reported by [`Expiry::due_checkpoints`] that often; zero means never.
    pub fn new(checkpoint_interval: Duration) -> Expiry {
        Expiry {
            primary: false,
            checkpoint_interval,
            token: 0,
            entries: BTreeMap::new(),
            by_report: BTreeSet::new(),
            by_checkpoint: BTreeSet::new(),
        }
    }

    /// This member begins to lead. Deadlines of an earlier time are forgotten; the
    /// caller goes on with [`Expiry::schedule`] for every lease there is, with the
    /// election timeout as `extend`, in as many steps as it likes. A lease that has
    /// no deadline yet cannot be renewed and does not expire.
    pub fn promote(&mut self) {
        self.demote();
        self.primary = true;
    }

    /// This member leads no more: no lease expires here, none can be renewed.
    pub fn demote(&mut self) {
        self.primary = false;
        self.entries.clear();
        self.by_report.clear();
        self.by_checkpoint.clear();
    }

    /// Starts a lease's time: what is left of it as committed, or all of it, and
    /// `extend` on top. For a lease just granted, with `extend` zero, and on taking
    /// over. Does nothing unless this member leads, nor for a lease that already has a
    /// deadline.
    pub fn schedule(&mut self, lease: &Lease, now: Duration, extend: Duration) {
        if !self.primary || self.entries.contains_key(&lease.id()) {
            return;
        }
        let remaining = lease.remaining_ttl_secs();
        let left = if remaining > 0 { secs(remaining) } else { secs(lease.ttl_secs()) };
        let deadline = now.saturating_add(left).saturating_add(extend);
        let remainder = if remaining > 0 { self.next_token() } else { 0 };
        let entry = Entry {
            ttl_secs: lease.ttl_secs(),
            deadline,
            report_at: deadline,
            checkpoint_at: self.next_checkpoint(now, deadline),
            remainder,
            taken_back: 0,
        };
        self.insert(lease.id(), entry);
    }

    /// A remainder of 0 was committed for this lease, after [`Renewal::CommitFirst`]
    /// gave out `token`. A remainder handed out since still counts.
    pub fn renewal_committed(&mut self, id: i64, token: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.taken_back = entry.taken_back.max(token);
        }
    }

    /// The lease was revoked.
    pub fn forget(&mut self, id: i64) {
        self.remove(id);
    }

    /// A keepalive: moves the deadline to a whole TTL from now, or leaves it where it is
    /// when that is later, as it is for a while after taking over: the `extend` of
    /// [`Expiry::schedule`] is for those to whom the leader before promised as much.
    pub fn renew(&mut self, id: i64, now: Duration) -> Renewal {
        if !self.primary {
            return Renewal::NotPrimary;
        }
        let Some(entry) = self.entries.get(&id) else { return Renewal::NotFound };
        if entry.deadline <= now {
            return Renewal::Expired;
        }
        if entry.remainder > entry.taken_back {
            return Renewal::CommitFirst { token: entry.remainder };
        }
        let ttl_secs = entry.ttl_secs;
        if let Some(mut entry) = self.remove(id) {
            entry.deadline = entry.deadline.max(now.saturating_add(secs(ttl_secs)));
            entry.report_at = entry.deadline;
            if entry.checkpoint_at.is_none() {
                entry.checkpoint_at = self.next_checkpoint(now, entry.deadline);
            }
            self.insert(id, entry);
        }
        Renewal::Renewed { ttl_secs }
    }

    /// What is left of a lease; zero once it is due. `None` when there is no such
    /// lease or this member does not lead.
    pub fn remaining(&self, id: i64, now: Duration) -> Option<Duration> {
        self.entries.get(&id).map(|entry| entry.deadline.saturating_sub(now))
    }

    /// Up to `max` leases whose time is up, longest overdue first. Each is reported
    /// again after [`REVOKE_RETRY`] unless it was forgotten meanwhile.
    pub fn expired(&mut self, now: Duration, max: usize) -> Vec<i64> {
        let due: Vec<i64> =
            self.by_report.range(..=(now, i64::MAX)).take(max).map(|(_, id)| *id).collect();
        for id in &due {
            if let Some(mut entry) = self.remove(*id) {
                entry.report_at = now.saturating_add(REVOKE_RETRY);
                self.insert(*id, entry);
            }
        }
        due
    }

    /// Up to `max` leases whose remainder should be committed, with that remainder in
    /// seconds, rounded up. From now on a keepalive of theirs wants
    /// [`Renewal::CommitFirst`]. Propose both in the order they are asked for: the
    /// log decides by its order which of them holds.
    pub fn due_checkpoints(&mut self, now: Duration, max: usize) -> Vec<(i64, i64)> {
        let due: Vec<i64> =
            self.by_checkpoint.range(..=(now, i64::MAX)).take(max).map(|(_, id)| *id).collect();
        let mut remainders = Vec::with_capacity(due.len());
        for id in due {
            let Some(mut entry) = self.remove(id) else { continue };
            entry.checkpoint_at = self.next_checkpoint(now, entry.deadline);
            let left = entry.deadline.saturating_sub(now);
            let remaining_secs = secs_rounded_up(left);
            // A remainder of the whole TTL or more says nothing a new leader would
            // not assume anyway.
            if remaining_secs > 0 && remaining_secs < entry.ttl_secs {
                entry.remainder = self.next_token();
                remainders.push((id, remaining_secs));
            }
            self.insert(id, entry);
        }
        remainders
    }

    /// How many leases have a deadline.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none has.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn next_token(&mut self) -> u64 {
        self.token = self.token.saturating_add(1);
        self.token
    }

    fn next_checkpoint(&self, now: Duration, deadline: Duration) -> Option<Duration> {
        let interval = self.checkpoint_interval;
        (!interval.is_zero() && deadline.saturating_sub(now) > interval)
            .then(|| now.saturating_add(interval))
    }

    fn insert(&mut self, id: i64, entry: Entry) {
        self.by_report.insert((entry.report_at, id));
        if let Some(at) = entry.checkpoint_at {
            self.by_checkpoint.insert((at, id));
        }
        self.entries.insert(id, entry);
    }

    fn remove(&mut self, id: i64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.by_report.remove(&(entry.report_at, id));
        if let Some(at) = entry.checkpoint_at {
            self.by_checkpoint.remove(&(at, id));
        }
        Some(entry)
    }
}

/// Negative counts as zero.
fn secs(secs: i64) -> Duration {
    Duration::from_secs(u64::try_from(secs).unwrap_or(0))
}

fn secs_rounded_up(duration: Duration) -> i64 {
    let whole = duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0));
    i64::try_from(whole).unwrap_or(i64::MAX)
}
