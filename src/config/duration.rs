//! Durations as Go writes them: `1h30m`, `1.5s`, `300ms`, `100µs`.
//!
//! Unlike Go's they are never negative: no flag has a use for that, and a
//! negative interval is better refused than understood.

use std::time::Duration;

const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000), // U+00B5, the micro sign
    ("μs", 1_000), // U+03BC, the Greek letter
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a duration; the error says what is wrong in Go's words.
pub fn parse(text: &str) -> Result<Duration, String> {
    let invalid = || format!("time: invalid duration {text:?}");
    if text.starts_with('-') && text != "-0" {
        return Err(format!("time: negative duration {text:?}"));
    }
    let mut rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total_nanos: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        if unit.is_empty() {
            return Err(format!("time: missing unit in duration {text:?}"));
        }
        let Some(&(_, nanos)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("time: unknown unit {unit:?} in duration {text:?}"));
        };
        let whole: u128 =
            if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
        // Digits below a nanosecond's share are cut, never rounded.
        let mut scale: u128 = 1;
        let mut part: u128 = 0;
        for digit in fraction.bytes().take(18) {
            part = part * 10 + u128::from(digit - b'0');
            scale *= 10;
        }
        let below_one = part * u128::from(nanos) / scale;
        total_nanos = whole
            .checked_mul(u128::from(nanos))
            .and_then(|nanos| nanos.checked_add(below_one))
            .and_then(|nanos| nanos.checked_add(total_nanos))
            .filter(|nanos| *nanos <= i64::MAX as u128)
            .ok_or_else(invalid)?;
        rest = after;
    }
    u64::try_from(total_nanos).map(Duration::from_nanos).map_err(|_| invalid())
}

fn digits(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

/// Writes a duration so that [`parse`] reads the same one: `2h`, `1m30s`, `300ms`.
pub(super) fn format(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    let mut rest = nanos;
    for (unit, size) in [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("µs", 1_000),
        ("ns", 1),
    ] {
        let count = rest / size;
        rest %= size;
        if count > 0 {
            text.push_str(&format!("{count}{unit}"));
        }
    }
    text
}
