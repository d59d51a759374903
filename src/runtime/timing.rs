//! Whether elections suit the disk.
//!
//! A follower acknowledges what it has synced. A leader that hears nothing from a majority
//! for an election timeout steps down, and a follower that hears nothing from its leader
//! stands for election itself. So the time that one sync takes belongs to every round trip
//! between members, and etcd's rule for those holds: the heartbeat interval is about one,
//! the election timeout at least ten.

use std::time::Duration;

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
