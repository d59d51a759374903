//! Whether elections suit the disk.
//!
//! A follower acknowledges what it has synced. A leader that hears nothing from a majority
//! for an election timeout steps down, and a follower that hears nothing from its leader
//! stands for election itself. So the time that one sync takes belongs to every round trip
//! between members, and etcd's rule for those holds: the heartbeat interval is about one,
//! the election timeout at least ten.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Round trips that an election timeout has to last for; etcd's advice.
const ROUND_TRIPS: u32 = 10;
/// What is suggested is a multiple of this.
const SUGGESTED_STEP_MS: u128 = 50;
/// `--election-timeout` can be no longer.
const ELECTION_TIMEOUT_MAX_MS: u128 = 50_000;

/// What to tell the operator when one sync of the log took `fsync`; `None` when that suits
/// the two intervals.
pub fn advice(fsync: Duration, heartbeat: Duration, election_timeout: Duration) -> Option<String> {
    if fsync <= heartbeat && fsync.saturating_mul(ROUND_TRIPS) <= election_timeout {
        return None;
    }
    let steps = fsync.as_millis().div_ceil(SUGGESTED_STEP_MS).max(1);
    let heartbeat_ms = steps * SUGGESTED_STEP_MS;
    let election_ms = heartbeat_ms * u128::from(ROUND_TRIPS);
    let slow = format!(
        "the raft log's disk took {fsync:?} to sync, which is too long for \
         --heartbeat-interval={} and --election-timeout={}: leaders may be lost for no other \
         reason",
        heartbeat.as_millis(),
        election_timeout.as_millis(),
    );
    Some(if election_ms <= ELECTION_TIMEOUT_MAX_MS {
        format!(
            "{slow}. Set --heartbeat-interval={heartbeat_ms} and \
             --election-timeout={election_ms} on all members, or give the log a faster disk \
             (--wal-dir)"
        )
    } else {
        format!("{slow}. Give the log a faster disk (--wal-dir)")
    })
}

/// Syncs that are looked back at.
const WINDOW_SYNCS: usize = 64;
/// So many of them must be too slow: one alone may be the disk's housekeeping.
const SLOW_SYNCS: usize = 3;
/// The operator is not told more often.
const TELL_EVERY: Duration = Duration::from_secs(600);

/// The last syncs of the log, and whether the operator should know about them.
#[derive(Debug)]
pub struct SyncTimes {
    heartbeat: Duration,
    election_timeout: Duration,
    last: VecDeque<Duration>,
    told_at: Option<Instant>,
}

impl SyncTimes {
    /// Judged by `--heartbeat-interval` and `--election-timeout`.
    pub fn new(heartbeat: Duration, election_timeout: Duration) -> SyncTimes {
        SyncTimes { heartbeat, election_timeout, last: VecDeque::new(), told_at: None }
    }

    /// A sync took `fsync`, and it is `now`. What to tell, if it is time to.
    pub fn note(&mut self, fsync: Duration, now: Instant) -> Option<String> {
        if self.last.len() >= WINDOW_SYNCS {
            self.last.pop_front();
        }
        self.last.push_back(fsync);
        let was_told = self.told_at.is_some_and(|at| now.duration_since(at) < TELL_EVERY);
        // Most syncs are fast, and need no more than this.
        if was_told || advice(fsync, self.heartbeat, self.election_timeout).is_none() {
            return None;
        }
        let mut slowest: Vec<Duration> = self.last.iter().copied().collect();
        slowest.sort_unstable_by(|one, other| other.cmp(one));
        let usual_slow = *slowest.get(SLOW_SYNCS - 1)?;
        let text = advice(usual_slow, self.heartbeat, self.election_timeout)?;
        self.told_at = Some(now);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice_of(fsync_ms: u64, heartbeat_ms: u64, election_ms: u64) -> Option<String> {
        let ms = Duration::from_millis;
        advice(ms(fsync_ms), ms(heartbeat_ms), ms(election_ms))
    }

    #[test]
    fn a_disk_that_keeps_up_is_not_mentioned() {
        assert_eq!(advice_of(0, 100, 1000), None);
        assert_eq!(advice_of(100, 100, 1000), None);
        assert_eq!(advice_of(100, 500, 5000), None);
    }

    #[test]
    fn the_operator_is_told_of_slow_syncs_now_and_then() {
        let ms = Duration::from_millis;
        let mut times = SyncTimes::new(ms(100), ms(1000));
        let mut now = Instant::now();
        let mut note = |fsync, passed: Duration| {
            now += passed;
            times.note(fsync, now)
        };
        assert_eq!(note(ms(300), ms(1)), None, "once may happen");
        assert_eq!(note(ms(5), ms(1)), None);
        assert_eq!(note(ms(400), ms(1)), None);
        let text = note(ms(200), ms(1)).expect("the third one");
        assert!(text.contains("took 200ms"), "{text}");
        assert_eq!(note(ms(500), ms(1)), None, "it was told");
        assert_eq!(note(ms(5), TELL_EVERY), None, "it is fast now");
        let text = note(ms(350), ms(1)).expect("slow again");
        assert!(text.contains("took 350ms"), "{text}");
        for _ in 0..WINDOW_SYNCS {
            assert_eq!(note(ms(5), ms(1)), None);
        }
        assert_eq!(note(ms(300), TELL_EVERY), None, "what was slow is long ago");
    }

    #[test]
    fn a_disk_that_is_too_slow_comes_with_what_to_set() {
        for (fsync, heartbeat, election) in [(101, 100, 1000), (101, 200, 1000), (60, 50, 1000)] {
            let text = advice_of(fsync, heartbeat, election).expect("it is too slow");
            assert!(text.contains(&format!("took {fsync}ms")), "{text}");
        }
        let text = advice_of(120, 100, 1000).expect("it is too slow");
        assert!(
            text.contains("--heartbeat-interval=150 and --election-timeout=1500 on all members"),
            "{text}"
        );
        // What is suggested suits, and is taken.
        assert_eq!(advice_of(120, 150, 1500), None);
        assert_eq!(advice_of(5000, 5000, 50_000), None);
        let text = advice_of(5001, 100, 1000).expect("it is too slow");
        assert!(text.ends_with("Give the log a faster disk (--wal-dir)"), "{text}");
    }
}
