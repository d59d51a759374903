//! Results for people.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
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

/// What every table begins with: the programs, the machine, how it was measured.
pub fn header(programs: &[PathBuf; 2], (rounds, seconds): (usize, f64)) -> String {
    format!(
        "{}; the generator shares the machine. Medians of {rounds} rounds of {seconds} s; in \
         parentheses the lowest and the highest.\n",
        contestants(programs)
    )
}

/// The programs and the machine.
pub fn contestants(programs: &[PathBuf; 2]) -> String {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processor.lines().find_map(|line| line.strip_prefix("model name"));
    let model =
        model.map_or("unknown processor", |model| model.trim_start_matches([' ', '\t', ':']));
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let [etcd, kvorum] = programs.each_ref().map(|program| version(program));
    format!("{kvorum} against {etcd} on {processors} x {model}")
}

fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("{name} ({})", text.lines().next().unwrap_or("unknown version"))
}

/// The rounds of one measurement on one side.
pub struct Summary {
    pub rate: f64,
    /// The rate with the lowest and the highest, marked if the generator was the limit.
    pub rates: String,
    pub latencies: String,
    /// Processor time per operation, in microseconds.
    pub cpu_us: f64,
}

impl Summary {
    /// Medians of `runs`.
    pub fn of<'a>(runs: impl Iterator<Item = &'a Outcome>) -> Summary {
        let runs: Vec<&Outcome> = runs.collect();
        let rates: Vec<f64> = runs.iter().map(|run| run.rate()).collect();
        let rate = median(&rates);
        let [low, high] =
            [f64::min, f64::max].map(|choose| rates.iter().copied().reduce(choose).unwrap_or(0.0));
        let mark = if runs.iter().any(|run| saturated(run)) { " *" } else { "" };
        let [p50, p99] = [50.0, 99.0].map(|percent| {
            let all: Vec<f64> =
                runs.iter().map(|run| run.latencies.percentile(percent).as_secs_f64()).collect();
            milliseconds(Duration::from_secs_f64(median(&all)))
        });
        let cpu: Vec<f64> = runs
            .iter()
            .filter_map(|run| Some(micros(run.server_cpu?, run.latencies.count())))
            .collect();
        Summary {
            rate,
            rates: format!("{} ({}–{}){mark}", number(rate), number(low), number(high)),
            latencies: format!("{p50}, {p99}"),
            cpu_us: median(&cpu),
        }
    }
}

/// The head of a table of [`throughput_row`]s.
pub const THROUGHPUT_HEADER: &str = "\
| | etcd /s | kvorum /s | ratio | etcd p50, p99 ms | kvorum p50, p99 ms | etcd CPU µs | kvorum CPU µs |
|---|---|---|---|---|---|---|---|
";

/// One measurement on both sides.
pub fn throughput_row(name: &str, etcd: &Summary, kvorum: &Summary) -> String {
    format!(
        "| {name} | {} | {} | {:.2} | {} | {} | {} | {} |\n",
        etcd.rates,
        kvorum.rates,
        kvorum.rate / etcd.rate,
        etcd.latencies,
        kvorum.latencies,
        number(etcd.cpu_us),
        number(kvorum.cpu_us)
    )
}

/// A table, as it is printed, with a column for each side that was measured.
pub struct Columns<'a, T>(&'a [(&'static str, T)]);

impl<'a, T> Columns<'a, T> {
    /// Prints its head.
    pub fn head(sides: &'a [(&'static str, T)]) -> Columns<'a, T> {
        let names: Vec<&str> = sides.iter().map(|(name, _)| *name).collect();
        println!("| | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()));
        Columns(sides)
    }

    /// Prints a row.
    pub fn row(&self, name: &str, value: impl Fn(&T) -> String) {
        let values: Vec<String> = self.0.iter().map(|(_, side)| value(side)).collect();
        println!("| {name} | {} |", values.join(" | "));
    }

    /// What was measured of a side, if it was.
    pub fn side(&self, name: &str) -> Option<&'a T> {
        self.0.iter().find(|(side, _)| *side == name).map(|(_, side)| side)
    }
}

/// Says which promises were not kept, and with `assert` ends with an error if one was not.
pub fn verdict(assert: bool, broken: &[String]) -> Result<(), Box<dyn Error>> {
    for promise in broken {
        println!("not kept: {promise}");
    }
    if assert && !broken.is_empty() {
        return Err(format!("{} of the promises were not kept", broken.len()).into());
    }
    Ok(())
}

/// The middle of `values`, NaN if there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length.is_multiple_of(2) => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}

/// The smallest of `values` that `percent` of them do not exceed, NaN if there are none.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// With thousands separated, and a digit after the point when there is room.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "?".to_owned();
    }
    if value.abs() < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(number(1_234_567.4), "1,234,567");
        assert_eq!(number(123.4), "123");
        assert_eq!(number(9.96), "10.0");
        assert_eq!(number(f64::NAN), "?");
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=50).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 90.0), 45.0);
        assert_eq!(percentile(&values, 100.0), 50.0);
        assert_eq!(percentile(&values, 0.0), 1.0);
        assert_eq!(percentile(&[7.0], 90.0), 7.0);
        assert!(percentile(&[], 90.0).is_nan());
    }

    #[test]
    fn a_broken_promise_is_an_error_only_if_asked_for() {
        let broken = ["slower".to_owned()];
        assert!(verdict(true, &broken).is_err());
        assert!(verdict(false, &broken).is_ok());
        assert!(verdict(true, &[]).is_ok());
    }
}
