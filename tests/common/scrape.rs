//! Prometheus' text format, read.

use std::collections::{BTreeMap, BTreeSet};

use super::http;

/// A scrape, read.
#[derive(Debug)]
pub(crate) struct Scrape {
    /// Metric → its type.
    pub(crate) types: BTreeMap<String, String>,
    /// Metric → the names of its labels, without `le` and `quantile`.
    pub(crate) labels: BTreeMap<String, BTreeSet<String>>,
    /// Series, with its labels sorted → its value.
    pub(crate) series: BTreeMap<String, f64>,
}

impl Scrape {
    /// Scrapes `address` (`host:port`).
    pub(crate) fn of(address: &str) -> Scrape {
        let answer = http::get(address, "/metrics").expect("a scrape");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
        Scrape::read(&answer.text())
    }

    fn read(text: &str) -> Scrape {
        let mut scrape =
            Scrape { types: BTreeMap::new(), labels: BTreeMap::new(), series: BTreeMap::new() };
        for line in text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                let before = scrape.types.insert(name.to_owned(), kind.to_owned());
                assert_eq!(before, None, "{name} is there twice");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                let (name, labels) = match series.split_once('{') {
                    Some((name, labels)) => (name, labels.trim_end_matches('}')),
                    None => (series, ""),
                };
                let mut labels: Vec<&str> = labels
                    .split("\",")
                    .map(|label| label.trim_end_matches('"'))
                    .filter(|label| !label.is_empty())
                    .collect();
                labels.sort_unstable();
                let names = labels.iter().filter_map(|label| Some(label.split_once('=')?.0));
                let names = names.filter(|name| !["le", "quantile"].contains(name));
                let metric = scrape.metric_of(name).to_owned();
                scrape.labels.entry(metric).or_default().extend(names.map(str::to_owned));
                let series = if labels.is_empty() {
                    name.to_owned()
                } else {
                    format!("{name}{{{}\"}}", labels.join("\","))
                };
                scrape.series.insert(series, value.parse().expect("a number"));
            }
        }
        scrape
    }

    /// The metric a series belongs to: a histogram has three kinds of them.
    fn metric_of<'a>(&self, series: &'a str) -> &'a str {
        let parts = ["_bucket", "_sum", "_count"].iter();
        parts
            .filter_map(|part| series.strip_suffix(part))
            .find(|name| self.types.get(*name).is_some_and(|kind| kind != "counter"))
            .unwrap_or(series)
    }

    /// The value of a series, its labels sorted.
    #[track_caller]
    pub(crate) fn value(&self, series: &str) -> f64 {
        match self.series.get(series) {
            Some(value) => *value,
            None => panic!("{series} is missing"),
        }
    }

    /// The sum of all series of this name.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        let of_name = |series: &str| series.split('{').next() == Some(name);
        self.series.iter().filter(|(series, _)| of_name(series)).map(|(_, value)| value).sum()
    }
}
