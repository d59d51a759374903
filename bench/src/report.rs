//! Results for people.

use std::fmt::Write as _;
use std::time::Duration;

use crate::workload::{Load, Outcome};

/// The share of one processor at which the generator is the limit.
const SATURATED: f64 = 0.9;

/// One run.
pub fn one(load: &Load, outcome: &Outcome) -> String {
    let mut text = String::new();
    let count = outcome.latencies.count();
    let elapsed = outcome.elapsed.as_secs_f64();
    let _ = writeln!(
        text,
        "{:?}: {count} operations in {elapsed:.2} s by {} clients over {} connections: {:.0} per second",
        load.kind,
        load.clients,
        load.conns,
        outcome.rate()
    );
    let [p50, p90, p99, p999] =
        [50.0, 90.0, 99.0, 99.9].map(|percent| milliseconds(outcome.latencies.percentile(percent)));
    let max = milliseconds(outcome.latencies.max());
    let _ =
        writeln!(text, "latency  p50 {p50}  p90 {p90}  p99 {p99}  p99.9 {p999}  max {max}  (ms)");
    if outcome.bytes > 0 {
        let mebibytes = outcome.bytes as f64 / f64::from(1 << 20);
        let _ = writeln!(text, "answers  {mebibytes:.0} MiB, {:.0} MiB/s", mebibytes / elapsed);
    }
    if outcome.events > 0 {
        let rate = outcome.events as f64 / elapsed;
        let _ = writeln!(text, "events   {}, {rate:.0} per second", outcome.events);
    }
    if let Some(cpu) = outcome.server_cpu {
        let _ = write!(text, "server   {:.1} us of processor per operation", micros(cpu, count));
        if let Some(bytes) = outcome.server_resident_bytes {
            let _ = write!(text, ", {} MiB resident", bytes >> 20);
        }
        let _ = writeln!(text);
    }
    let _ = write!(
        text,
        "client   {:.1} us of processor per operation{}",
        micros(outcome.own_cpu, count),
        if saturated(outcome) { ": the generator was the limit" } else { "" }
    );
    if outcome.errors > 0 {
        let first = outcome.first_error.as_deref().unwrap_or_default();
        let _ = write!(text, "\nerrors   {}, the first: {first}", outcome.errors);
    }
    text
}

/// Whether the generator had no time left.
pub fn saturated(outcome: &Outcome) -> bool {
    outcome.own_cpu.as_secs_f64() > SATURATED * outcome.elapsed.as_secs_f64()
}

/// Processor time per operation, in microseconds.
pub fn micros(cpu: Duration, count: u64) -> f64 {
    cpu.as_secs_f64() * 1e6 / count.max(1) as f64
}

/// In milliseconds, with three significant digits or so.
pub fn milliseconds(latency: Duration) -> String {
    let milliseconds = latency.as_secs_f64() * 1e3;
    match milliseconds {
        ..10.0 => format!("{milliseconds:.2}"),
        ..100.0 => format!("{milliseconds:.1}"),
        _ => format!("{milliseconds:.0}"),
    }
}
