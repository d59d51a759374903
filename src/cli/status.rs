//! `kvorum snapshot status`: what `etcdutl snapshot status` prints.

use std::path::Path;

use kvorum::backup::file::SnapshotFile;
use kvorum::backup::status::{Status, status};

use super::{Arguments, EXIT_BAD_FEATURE, Failure};

/// Carries the command out.
pub(super) fn run(arguments: &Arguments) -> Result<String, Failure> {
    let path = arguments.only("snapshot status requires exactly one argument")?;
    let show = match arguments.get("write-out") {
        "simple" => simple,
        "json" => json,
        "fields" => fields,
        "table" => table,
        _ => {
            let message = "unsupported output format: set -w to fields, json, simple or table";
            return Err(Failure { message: message.to_owned(), exit_code: EXIT_BAD_FEATURE });
        }
    };
    let file = SnapshotFile::open(Path::new(path)).map_err(Failure::new)?;
    let database = file.database().map_err(Failure::new)?;
    let status = status(&database).map_err(|error| {
        let error = file.content_error(error);
        Failure::new(format!("snapshot file integrity check failed. 1 errors found.\n{error}"))
    })?;
    Ok(show(&status))
}

fn simple(status: &Status) -> String {
    let Status { hash, revision, total_key, total_size, version } = status;
    let size = human_bytes(*total_size);
    format!("{hash:x}, {revision}, {total_key}, {size}, {version}\n")
}

fn json(status: &Status) -> String {
    let Status { hash, revision, total_key, total_size, version } = status;
    let version = serde_json::Value::from(version.as_str());
    format!(
        "{{\"hash\":{hash},\"revision\":{revision},\"totalKey\":{total_key},\
         \"totalSize\":{total_size},\"version\":{version}}}\n"
    )
}

fn fields(status: &Status) -> String {
    let Status { hash, revision, total_key, total_size, version } = status;
    format!(
        "\"Hash\" : {hash}\n\"Revision\" : {revision}\n\"Keys\" : {total_key}\n\
         \"Size\" : {total_size}\n\"Version\" : {version}\n"
    )
}

fn table(status: &Status) -> String {
    let cells = [
        ("HASH", format!("{:x}", status.hash)),
        ("REVISION", status.revision.to_string()),
        ("TOTAL KEYS", status.total_key.to_string()),
        ("TOTAL SIZE", human_bytes(status.total_size)),
        ("VERSION", status.version.clone()),
    ];
    let widths = cells.each_ref().map(|(title, value)| title.len().max(value.len()));
    let rule = |left: &str, between: &str, right: &str| {
        let lines = widths.map(|width| "─".repeat(width + 2));
        format!("{left}{}{right}\n", lines.join(between))
    };
    let row = |cells: Vec<String>| format!("│ {} │\n", cells.join(" │ "));
    let titles = cells.iter().zip(widths).map(|((title, _), width)| format!("{title:^width$}"));
    let values = cells.iter().zip(widths).map(|((_, value), width)| format!("{value:>width$}"));
    [
        rule("┌", "┬", "┐"),
        row(titles.collect()),
        rule("├", "┼", "┤"),
        row(values.collect()),
        rule("└", "┴", "┘"),
    ]
    .concat()
}

/// Bytes in powers of 1000, with one decimal below 10, as etcd shows them.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    let value = (value * 10.0 + 0.5).floor() / 10.0;
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Status {
        Status {
            hash: 0xdc24_fa39,
            revision: 54,
            total_key: 51,
            total_size: 135_168,
            version: "3.7.0".to_owned(),
        }
    }

    /// As etcdutl 3.7.1 printed them.
    #[test]
    fn each_format_is_that_of_etcdutl() {
        let status = example();
        assert_eq!(simple(&status), "dc24fa39, 54, 51, 135 kB, 3.7.0\n");
        assert_eq!(
            json(&status),
            "{\"hash\":3693410873,\"revision\":54,\"totalKey\":51,\"totalSize\":135168,\"version\":\"3.7.0\"}\n"
        );
        assert_eq!(
            fields(&status),
            "\"Hash\" : 3693410873\n\"Revision\" : 54\n\"Keys\" : 51\n\"Size\" : 135168\n\"Version\" : 3.7.0\n"
        );
        assert_eq!(
            table(&status),
            "\
┌──────────┬──────────┬────────────┬────────────┬─────────┐
│   HASH   │ REVISION │ TOTAL KEYS │ TOTAL SIZE │ VERSION │
├──────────┼──────────┼────────────┼────────────┼─────────┤
│ dc24fa39 │       54 │         51 │     135 kB │   3.7.0 │
└──────────┴──────────┴────────────┴────────────┴─────────┘
"
        );
    }

    #[test]
    fn sizes_are_rounded_as_etcd_rounds_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (20_480, "20 kB"),
            (9_950, "10 kB"),
            (1_071_104, "1.1 MB"),
            (1_135_353_856, "1.1 GB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
