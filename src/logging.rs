//! The program's log: one line per event, shaped like etcd's so that whatever reads
//! etcd's log reads this one.
//!
//! ```text
//! json     {"level":"info","ts":"2026-01-02T15:04:05.123456Z","caller":"src/main.rs:7","msg":"…","name":"n1"}
//! console  2026-01-02T15:04:05.123456Z  info  src/main.rs:7  …  {"name":"n1"}        (tabs between)
//! ```
//!
//! Only the program installs a log; a library user brings a `tracing` subscriber of
//! their own or none. A target that cannot be written (a closed pipe, a full disk)
//! loses lines and stops nothing. Libraries below are heard from `warn` upwards only.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvorum::config::{LogFormat, LogLevel, LogOutput};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{FilterFn, LevelFilter};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

/// Makes the subscriber for these settings. Fails when a log file cannot be opened; the
/// error names it.
pub(crate) fn subscriber(
    level: LogLevel,
    format: LogFormat,
    outputs: &[LogOutput],
) -> Result<impl Subscriber + Send + Sync + use<>, String> {
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Lines { format })
        .with_writer(Targets::open(outputs)?)
        .with_filter(filter(level));
    Ok(tracing_subscriber::registry().with(lines))
}

fn filter(level: LogLevel) -> FilterFn<impl Fn(&tracing::Metadata<'_>) -> bool> {
    let level = match level {
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Info => Level::INFO,
        LogLevel::Warn => Level::WARN,
        LogLevel::Error | LogLevel::DPanic | LogLevel::Panic | LogLevel::Fatal => Level::ERROR,
    };
    let keep = move |metadata: &tracing::Metadata<'_>| {
        let ours = metadata.target() == "kvorum" || metadata.target().starts_with("kvorum::");
        *metadata.level() <= if ours { level } else { level.min(Level::WARN) }
    };
    FilterFn::new(keep).with_max_level_hint(LevelFilter::from_level(level))
}

/// Where lines go: to each of them.
#[derive(Clone)]
struct Targets(Arc<Vec<Target>>);

enum Target {
    Stderr,
    Stdout,
    File(File),
}

impl Targets {
    fn open(outputs: &[LogOutput]) -> Result<Targets, String> {
        let open = |output: &LogOutput| match output {
            LogOutput::Default | LogOutput::Stderr | LogOutput::Journal => Ok(Target::Stderr),
            LogOutput::Stdout => Ok(Target::Stdout),
            LogOutput::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                file.map(Target::File).map_err(|error| {
                    format!("cannot open the log file {} of --log-outputs: {error}", path.display())
                })
            }
        };
        Ok(Targets(Arc::new(outputs.iter().map(open).collect::<Result<_, _>>()?)))
    }
}

impl Write for Targets {
    /// Gets a whole line at a time, so that lines of several threads do not mix.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        for target in self.0.iter() {
            // There is nowhere to report a log that cannot be written.
            let _ = match target {
                Target::Stderr => io::stderr().write_all(line),
                Target::Stdout => io::stdout().write_all(line),
                Target::File(file) => (&*file).write_all(line),
            };
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Targets {
    type Writer = Targets;

    fn make_writer(&'a self) -> Targets {
        self.clone()
    }
}

struct Lines {
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            _ => "debug",
        };
        let time = timestamp(SystemTime::now());
        let caller =
            caller(metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default());
        match self.format {
            LogFormat::Json => {
                let message = Value::String(fields.message);
                write!(
                    out,
                    "{{\"level\":\"{level}\",\"ts\":\"{time}\",\"caller\":{},\"msg\":{message}",
                    Value::String(caller)
                )?;
                for (name, value) in &fields.others {
                    write!(out, ",{}:{value}", Value::String(name.clone()))?;
                }
                writeln!(out, "}}")
            }
            LogFormat::Console => {
                write!(out, "{time}\t{level}\t{caller}\t{}", fields.message)?;
                if !fields.others.is_empty() {
                    write!(out, "\t{}", Value::Object(fields.others))?;
                }
                writeln!(out)
            }
        }
    }
}

/// The fields of an event, by name.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("message", value) => self.message = value.to_string(),
            // A line has each name once; these four are taken.
            (name @ ("level" | "ts" | "caller" | "msg"), value) => {
                self.others.insert(format!("{name}_"), value);
            }
            (name, value) => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::String(value.to_owned()));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::Bool(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

/// The last two parts of a source file's path, and the line.
fn caller(file: &str, line: u32) -> String {
    let start = file.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    format!("{}:{line}", file.get(start..).unwrap_or(file))
}

/// RFC 3339 in UTC with microseconds, as etcd writes it.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut text = String::with_capacity(27);
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_micros()
    );
    text
}

/// Days since 1970 as year, month and day. Counts from March, so that the day a leap
/// year adds is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn logged(level: LogLevel, format: LogFormat, log: impl FnOnce()) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let subscriber = subscriber(level, format, &[LogOutput::File(path.clone())]).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_is_an_object_of_zaps_shape() {
        let lines = logged(LogLevel::Info, LogFormat::Json, || {
            let text = "two\n\"lines\"";
            tracing::warn!(
                count = 3_u64,
                "a-name" = text,
                on = true,
                level = "taken",
                "said {text}"
            );
        });
        assert_eq!(lines.len(), 1);
        let line: Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(line["level"], "warn");
        assert_eq!(line["msg"], "said two\n\"lines\"");
        assert_eq!(
            (&line["count"], &line["on"], &line["level_"]),
            (&3.into(), &true.into(), &"taken".into())
        );
        assert_eq!(line["a-name"], "two\n\"lines\"");
        assert!(line["caller"].as_str().unwrap().starts_with("src/logging.rs:"), "{line}");
        assert!(lines[0].starts_with("{\"level\":\"warn\",\"ts\":\"20"), "{}", lines[0]);
    }

    #[test]
    fn console_lines_have_tabs() {
        let lines =
            logged(LogLevel::Info, LogFormat::Console, || tracing::info!(name = "n1", "ready"));
        let parts: Vec<&str> = lines[0].split('\t').collect();
        assert_eq!((parts[1], &parts[3..]), ("info", &["ready", "{\"name\":\"n1\"}"][..]));
    }

    #[test]
    fn the_level_decides_and_libraries_are_quieter() {
        let log = || {
            tracing::debug!("d");
            tracing::info!("i");
            tracing::error!("e");
            tracing::info!(target: "h2::proto", "library i");
            tracing::warn!(target: "h2::proto", "library w");
        };
        for (level, count) in
            [(LogLevel::Debug, 4), (LogLevel::Info, 3), (LogLevel::Warn, 2), (LogLevel::Fatal, 1)]
        {
            assert_eq!(logged(level, LogFormat::Json, log).len(), count, "{level}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named() {
        let outputs = [LogOutput::File("/no/such/directory/log".into())];
        let error = subscriber(LogLevel::Info, LogFormat::Json, &outputs).map(drop).unwrap_err();
        assert!(error.contains("/no/such/directory/log of --log-outputs"), "{error}");
    }

    #[test]
    fn times_are_rfc_3339() {
        // From `date -u -d @…`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000007Z"),
            (951_782_399, "2000-02-28T23:59:59.000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000007Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000007Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::new(seconds, 7_000)), expected);
        }
    }

    #[test]
    fn callers_are_short() {
        assert_eq!(caller("/home/x/src/config/parse.rs", 7), "config/parse.rs:7");
        assert_eq!(caller("main.rs", 1), "main.rs:1");
    }
}
