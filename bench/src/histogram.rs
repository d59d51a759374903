//! Latencies, counted in buckets that are about one percent wide.
//!
//! A value below 256 has a bucket of its own; above, the seven bits after the
//! leading one choose among 128 buckets of every power of two.

use std::time::Duration;

const SUB_BITS: u32 = 7;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB_BUCKETS;

/// Counts of latencies, in nanoseconds.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram::new()
    }
}

impl Histogram {
    /// No latencies.
    pub fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], count: 0, max: 0 }
    }

    /// Counts one.
    pub fn record(&mut self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.max = self.max.max(nanoseconds);
    }

    /// The latency that `percent` of all did not exceed, to a percent.
    pub fn percentile(&self, percent: f64) -> Duration {
        let rank =
            ((percent / 100.0 * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(highest(index).min(self.max));
            }
        }
        Duration::ZERO
    }

    /// The longest, exactly.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.count
    }
}

fn bucket(value: u64) -> usize {
    let shift = (63 - (value | (SUB_BUCKETS as u64)).leading_zeros()).saturating_sub(SUB_BITS);
    shift as usize * SUB_BUCKETS + (value >> shift) as usize
}

/// The highest value of a bucket.
fn highest(index: usize) -> u64 {
    let shift = (index / SUB_BUCKETS).saturating_sub(1);
    let top = (index - shift * SUB_BUCKETS) as u64;
    ((top + 1) << shift).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_value_and_is_a_percent_wide() {
        let mut value: u64 = 1;
        while value < u64::MAX / 3 {
            for value in [value - 1, value, value + 1] {
                let high = highest(bucket(value));
                assert!(high >= value, "{value} is above its bucket's {high}");
                assert!((high - value) as f64 <= value as f64 / 127.0, "{value}'s is wide: {high}");
            }
            value = value * 3 / 2 + 1;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn percentiles_are_of_what_was_recorded() {
        let mut histogram = Histogram::new();
        for microseconds in 1..=1_000 {
            histogram.record(Duration::from_micros(microseconds));
        }
        for percent in [1.0, 50.0, 90.0, 99.0, 99.9, 100.0] {
            let want = percent * 10.0;
            let got = histogram.percentile(percent).as_nanos() as f64 / 1_000.0;
            assert!((got - want).abs() <= want / 100.0 + 0.01, "p{percent} is {got}, not {want}");
        }
        assert_eq!(histogram.max(), Duration::from_millis(1));
        assert_eq!(histogram.count(), 1_000);
    }
}
