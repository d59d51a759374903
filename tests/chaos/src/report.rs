//! What a campaign did and found, printed and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::Serialize;

use crate::check::{Checks, Guarantee};
use crate::history::{Content, History, Outcome};

/// Outcomes of one kind of operation.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Outcomes {
    /// Done.
    pub done: u64,
    /// Refused.
    pub refused: u64,
    /// Nobody knows.
    pub unknown: u64,
}

/// A violation.
#[derive(Debug, Serialize)]
pub struct Violation {
    /// What was promised.
    pub guarantee: Guarantee,
    /// What was found.
    pub found: String,
}

/// What a campaign did and found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The seed, which says it all again.
    pub seed: u64,
    /// How many members.
    pub members: usize,
    /// How long there were faults.
    pub seconds: f64,
    /// Operations by kind.
    pub operations: BTreeMap<String, Outcomes>,
    /// Watches, and the events and progress they were told.
    pub watches: u64,
    /// Events.
    pub events: u64,
    /// Progress.
    pub progress: u64,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// The newest revision.
    pub revision: i64,
    /// The longest time in which no write was answered, in milliseconds.
    pub longest_gap_ms: u64,
    /// What was checked how often.
    pub checks: BTreeMap<Guarantee, u64>,
    /// What was broken how often.
    pub broken: BTreeMap<Guarantee, u64>,
    /// Examples of that.
    pub violations: Vec<Violation>,
    /// What could not be decided.
    pub undecided: Vec<String>,
}

impl Report {
    /// Counts what is in a history and its checks.
    pub fn new(history: &History, checks: Checks) -> Report {
        let mut operations: BTreeMap<String, Outcomes> = BTreeMap::new();
        for operation in &history.operations {
            let outcomes = operations.entry(operation.kind.clone()).or_default();
            match operation.outcome {
                Outcome::Done { .. } => outcomes.done += 1,
                Outcome::Refused(_) => outcomes.refused += 1,
                Outcome::Unknown(_) => outcomes.unknown += 1,
            }
        }
        let (mut events, mut progress) = (0, 0);
        for message in history.watches.iter().flat_map(|watch| &watch.messages) {
            match &message.content {
                Content::Events(of_message) => events += of_message.len() as u64,
                Content::Progress => progress += 1,
                _ => {}
            }
        }
        let revisions = history.operations.iter().filter_map(|operation| operation.revision());
        let violations = checks.examples.into_iter();
        Report {
            seed: 0,
            members: 0,
            seconds: 0.0,
            operations,
            watches: history.watches.len() as u64,
            events,
            progress,
            faults: BTreeMap::new(),
            revision: revisions.max().unwrap_or(1),
            longest_gap_ms: longest_gap_us(history) / 1_000,
            checks: checks.counts,
            broken: checks.broken,
            violations: violations
                .map(|(guarantee, found)| Violation { guarantee, found })
                .collect(),
            undecided: checks.undecided,
        }
    }

    /// Whether nothing is broken.
    pub fn passed(&self) -> bool {
        self.broken.is_empty()
    }
}

/// The longest time between two writes that were answered.
fn longest_gap_us(history: &History) -> u64 {
    let wrote = history.operations.iter().filter(|operation| operation.says_it_wrote());
    let mut returns: Vec<u64> = wrote.map(|operation| operation.return_us).collect();
    returns.sort_unstable();
    returns.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { seed, members, seconds, .. } = self;
        writeln!(f, "seed {seed}, {members} members, {seconds:.0} s, revision {}", self.revision)?;
        writeln!(f, "\n{:<20} {:>8} {:>8} {:>8}", "operation", "done", "refused", "unknown")?;
        for (kind, Outcomes { done, refused, unknown }) in &self.operations {
            writeln!(f, "{kind:<20} {done:>8} {refused:>8} {unknown:>8}")?;
        }
        let (watches, events, progress) = (self.watches, self.events, self.progress);
        writeln!(f, "\n{watches} watches, told {events} events and {progress} times of progress")?;
        writeln!(f, "longest time without an answered write: {} ms", self.longest_gap_ms)?;
        writeln!(f, "\n{:<20} {:>8}", "fault", "times")?;
        for (fault, times) in &self.faults {
            writeln!(f, "{fault:<20} {times:>8}")?;
        }
        writeln!(f, "\n{:<24} {:>10} {:>8}", "guarantee", "checks", "broken")?;
        for (guarantee, count) in &self.checks {
            let broken = self.broken.get(guarantee).copied().unwrap_or(0);
            let name = serde_json::to_string(guarantee).unwrap_or_default();
            writeln!(f, "{:<24} {count:>10} {broken:>8}", name.trim_matches('"'))?;
        }
        for what in &self.undecided {
            writeln!(f, "\nundecided: {what}")?;
        }
        for Violation { guarantee, found } in &self.violations {
            writeln!(f, "\nVIOLATION of {guarantee:?}: {found}")?;
        }
        writeln!(f, "\n{}", if self.passed() { "no violation" } else { "VIOLATIONS" })
    }
}
