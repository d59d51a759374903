//! Whole numbers as Go's flags take them: decimal, or `0x`, `0o`, `0b` and a
//! leading `0` for other bases, with `_` between digits where a base is named.

/// Why a text is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberError {
    Syntax,
    Range,
}

impl NumberError {
    /// As the `flag` package says it.
    pub(super) fn flag_text(self) -> &'static str {
        match self {
            NumberError::Syntax => "parse error",
            NumberError::Range => "value out of range",
        }
    }

    /// As the `strconv` package says it.
    pub(super) fn strconv_text(self) -> &'static str {
        match self {
            NumberError::Syntax => "invalid syntax",
            NumberError::Range => "value out of range",
        }
    }
}

/// A number from 0 to `max`; a sign is refused.
pub(super) fn unsigned(text: &str, max: u64) -> Result<u64, NumberError> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix('0') {
        Some(rest) if !rest.is_empty() => match rest.split_at_checked(1) {
            Some(("x", digits)) => (digits, 16),
            Some(("o", digits)) => (digits, 8),
            Some(("b", digits)) => (digits, 2),
            _ => (rest, 8),
        },
        _ => (lower.as_str(), 10),
    };
    // Go allows an underscore after a prefix and between two digits only.
    let named_base = radix != 10;
    let body = if named_base { digits.strip_prefix('_').unwrap_or(digits) } else { digits };
    if body.is_empty() || body.starts_with('_') || body.ends_with('_') || body.contains("__") {
        return Err(NumberError::Syntax);
    }
    let mut number: u64 = 0;
    for c in body.chars().filter(|c| *c != '_') {
        let digit = c.to_digit(radix).ok_or(NumberError::Syntax)?;
        number = number
            .checked_mul(u64::from(radix))
            .and_then(|number| number.checked_add(u64::from(digit)))
            .filter(|number| *number <= max)
            .ok_or(NumberError::Range)?;
    }
    Ok(number)
}

/// A number that may carry a sign.
pub(super) fn signed(text: &str) -> Result<i64, NumberError> {
    match text.strip_prefix('-') {
        Some(digits) => {
            let number = unsigned(digits, i64::MIN.unsigned_abs())?;
            Ok(0_i64.wrapping_sub_unsigned(number))
        }
        None => {
            let number = unsigned(text.strip_prefix('+').unwrap_or(text), i64::MAX.unsigned_abs())?;
            i64::try_from(number).map_err(|_| NumberError::Range)
        }
    }
}
