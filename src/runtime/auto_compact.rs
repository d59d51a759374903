//! Compaction by the clock: `--auto-compaction-mode` and `--auto-compaction-retention`.
//!
//! [`Schedule`] decides, as a pure stepper: it is told the time and the newest
//! revision, and says now and then which revision to compact to. The rules are etcd's
//! (server/etcdserver/api/v3compactor):
//!
//! * *periodic*: the revision is sampled ten times an interval; the interval is the
//!   retention, at most an hour. After one whole retention the first compaction goes
//!   to the sample taken one retention ago, then there is one each interval.
//! * *revision*: every five minutes, to the newest revision less the retention.
//!
//! Only the leader compacts. A member that does not lead goes on sampling, so that it
//! can take over where the leader was. [`AutoCompactor`] is the shell around this.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::proposer::Proposer;
use super::published::Published;
use crate::error::Error;
use crate::pb::kvorumpb::{AutoCompact, command::Request};
use crate::state::StateMachine;

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// The history of this much time.
    Period(Duration),
    /// This many revisions.
    Revisions(i64),
}

const REVISION_INTERVAL: Duration = Duration::from_secs(300);
const PERIODIC_INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// The revision is sampled this often in an interval.
const SAMPLES_PER_INTERVAL: u32 = 10;

/// Decides when to compact to what.
#[derive(Debug)]
pub struct Schedule {
    retention: Retention,
    /// Periodic mode: revisions sampled, oldest first.
    samples: VecDeque<i64>,
    /// When the last compaction succeeded or, before the first, when it all began.
    last: Duration,
    compacted: i64,
}

impl Schedule {
    /// Begins at `now`.
    pub fn new(retention: Retention, now: Duration) -> Schedule {
        Schedule { retention, samples: VecDeque::new(), last: now, compacted: 0 }
    }

    /// How often [`Schedule::step`] is to be called.
    pub fn interval(&self) -> Duration {
        match self.retention {
            Retention::Period(period) => period.min(PERIODIC_INTERVAL_MAX) / SAMPLES_PER_INTERVAL,
            Retention::Revisions(_) => REVISION_INTERVAL,
        }
    }

    /// The time is `now`, the newest revision `revision`. Which revision to compact to,
    /// if this is the time for it. [`Schedule::compacted`] says that it went well;
    /// otherwise the next step asks again.
    pub fn step(&mut self, now: Duration, revision: i64) -> Option<i64> {
        let target = match self.retention {
            Retention::Revisions(kept) => revision.saturating_sub(kept),
            Retention::Period(period) => {
                let interval = self.interval();
                let kept = (period.as_nanos() / interval.as_nanos().max(1)).max(1);
                let kept = usize::try_from(kept).unwrap_or(usize::MAX);
                self.samples.push_back(revision);
                while self.samples.len() > kept.saturating_add(1) {
                    self.samples.pop_front();
                }
                let pause =
                    if self.compacted == 0 { period } else { period.min(PERIODIC_INTERVAL_MAX) };
                if now.saturating_sub(self.last) < pause || self.samples.len() <= kept {
                    return None;
                }
                *self.samples.front()?
            }
        };
        (target > 0 && target > self.compacted).then_some(target)
    }

    /// History is compacted to `revision`, at `now`.
    pub fn compacted(&mut self, now: Duration, revision: i64) {
        self.last = now;
        self.compacted = revision;
    }
}

/// What compaction by the clock works with.
pub struct AutoCompactor {
    /// The newest revision.
    pub state: Arc<RwLock<StateMachine>>,
    /// How history is compacted.
    pub proposer: Arc<Proposer>,
    /// Whether this member leads.
    pub published: Arc<Published>,
}

impl AutoCompactor {
    /// Compacts while this member leads, until the future is dropped.
    pub async fn run(self, retention: Retention) {
        let began = Instant::now();
        let mut schedule = Schedule::new(retention, Duration::ZERO);
        let mut ticks = tokio::time::interval(schedule.interval().max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let newest = self.state.read().store().revision();
            let Some(revision) = schedule.step(began.elapsed(), newest) else { continue };
            let role = *self.published.role.borrow();
            if !role.is_leader {
                continue;
            }
            let request = Request::AutoCompact(AutoCompact { term: role.term, revision });
            match self.proposer.propose(request).await {
                Ok(_) | Err(Error::Compacted) => {
                    tracing::info!(revision, "completed auto compaction");
                    schedule.compacted(began.elapsed(), revision);
                }
                Err(error) => tracing::warn!(revision, %error, "failed auto compaction"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// Steps through `minutes`, one revision a minute from 1; what it compacts to, and when.
    fn run(retention: Retention, minutes: u32) -> Vec<(u32, i64)> {
        let mut schedule = Schedule::new(retention, Duration::ZERO);
        let mut compactions = Vec::new();
        let mut now = Duration::ZERO;
        while now < minutes * MINUTE {
            now += schedule.interval();
            let minute = (now.as_secs() / 60) as u32;
            if let Some(target) = schedule.step(now, 1 + i64::from(minute)) {
                schedule.compacted(now, target);
                compactions.push((minute, target));
            }
        }
        compactions
    }

    #[test]
    fn periodic_keeps_the_history_of_its_period() {
        let compactions = run(Retention::Period(10 * MINUTE), 60);
        let first = *compactions.first().expect("it compacts");
        assert!((10..=11).contains(&first.0), "not before one whole period: {compactions:?}");
        for pair in compactions.windows(2) {
            assert!(pair[1].0 - pair[0].0 >= 10, "once an interval: {compactions:?}");
        }
        for (minute, target) in compactions {
            let kept = 1 + i64::from(minute) - target;
            assert!((10..=11).contains(&kept), "at {minute} min it kept {kept} min");
        }
    }

    #[test]
    fn a_long_period_compacts_every_hour() {
        let compactions = run(Retention::Period(180 * MINUTE), 600);
        assert!(compactions[0].0 >= 180);
        assert!(compactions.windows(2).all(|pair| (60..=66).contains(&(pair[1].0 - pair[0].0))));
    }

    #[test]
    fn revision_keeps_as_many_as_it_says() {
        let compactions = run(Retention::Revisions(20), 60);
        assert!(!compactions.is_empty());
        for (minute, target) in compactions {
            assert_eq!(1 + i64::from(minute) - target, 20);
            assert_eq!(minute % 5, 0);
        }
    }

    #[test]
    fn a_failed_compaction_is_asked_for_again() {
        let mut schedule = Schedule::new(Retention::Revisions(1), Duration::ZERO);
        assert_eq!(schedule.step(5 * MINUTE, 10), Some(9));
        assert_eq!(schedule.step(10 * MINUTE, 12), Some(11));
        schedule.compacted(10 * MINUTE, 11);
        assert_eq!(schedule.step(15 * MINUTE, 12), None, "nothing new to give up");
    }
}
