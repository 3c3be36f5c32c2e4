//! Value parsers of settings. Their errors name the allowed values.

mod checked;
mod server_list;

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

pub use checked::{Check, Checked};
pub use server_list::ServerList;

/// A value parser for durations such as `500ms`, `3s` or `1m 30s` within `allowed`.
///
/// Months and years are rejected: their lengths vary, and `M` is easily confused with `m`.
pub fn duration(
    allowed: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let expected = || {
            let (min, max) = (display(*allowed.start()), display(*allowed.end()));
            format!("expected a duration from {min} to {max}, written like 500ms, 3s, 2m, 1h or 1d")
        };
        let text = text.trim();
        let mut units = text.split(|letter: char| !letter.is_alphabetic());
        if let Some(unit) = units.find(|unit| is_month_or_year(unit)) {
            let instead = match unit.to_ascii_lowercase().as_str() {
                "m" => "M would be months; write m for minutes, or d for days",
                _ => "months and years have no fixed length; write d for days",
            };
            return Err(format!("{}; {instead}", expected()));
        }
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && !is_zero(text) {
            return Err(format!("{}; add the unit, as in {text}s", expected()));
        }
        let parsed = humantime::parse_duration(text).ok();
        parsed.filter(|duration| allowed.contains(duration)).ok_or_else(expected)
    }
}

fn is_month_or_year(unit: &str) -> bool {
    // Only a capital M means months.
    unit == "M"
        || ["month", "months", "mo", "y", "yr", "yrs", "year", "years"]
            .contains(&unit.to_ascii_lowercase().as_str())
}

fn is_zero(text: &str) -> bool {
    text.bytes().all(|byte| byte == b'0')
}

/// Formats the duration as settings write it: in the largest unit that divides it.
#[must_use]
pub fn display(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let units = [
        ("d", 86_400_000_000_000),
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
    ];
    let largest = units.into_iter().find(|(_, unit)| nanos.is_multiple_of(*unit));
    match largest {
        _ if nanos == 0 => "0s".to_owned(),
        Some((name, unit)) => format!("{}{name}", nanos / unit),
        None => format!("{nanos}ns"),
    }
}

/// A value parser for `on` and `off`.
///
/// # Errors
/// The allowed values, in words.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

/// A value parser for listening addresses: `127.0.0.1:9090`, `[::1]:9090`, or `:9090` for all
/// interfaces, which is `[::]:9090` and includes IPv4 ([`crate::http::listen`]). Port 0 takes any
/// free port.
///
/// # Errors
/// The allowed values, in words.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map_err(|_| {
        "expected IP:PORT such as 127.0.0.1:9090, or :9090 for all interfaces; port 0 takes any \
        free one"
            .to_owned()
    })
}

/// A value parser for numbers within `allowed`.
pub fn number<T>(
    allowed: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: std::str::FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        text.parse().ok().filter(|number| allowed.contains(number)).ok_or_else(|| {
            let kind = if "0.5".parse::<T>().is_ok() { "number" } else { "whole number" };
            format!("expected a {kind} from {} to {}", allowed.start(), allowed.end())
        })
    }
}

/// Splits a list of URLs at the commas that precede a scheme, and trims each URL. All other commas
/// are part of a URL, for example those between several hosts.
pub fn split_urls(list: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(list);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        let mut commas = text.match_indices(',').map(|(at, _)| at);
        let Some(end) = commas.find(|comma| starts_with_scheme(&text[comma + 1..])) else {
            return Some(text.trim());
        };
        rest = Some(&text[end + 1..]);
        Some(text[..end].trim())
    })
}

fn starts_with_scheme(text: &str) -> bool {
    let scheme = text.trim_start().split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| {
        !scheme.is_empty() && scheme.chars().all(|letter| letter.is_ascii_alphanumeric())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_hours(24);

    /// Field case 2.8.
    #[test]
    fn a_duration_outside_its_range_is_rejected() {
        let parse = duration(RANGE);
        for (text, millis) in [
            ("10ms", 10),
            ("1.5s", 1_500),
            (" 3s ", 3_000),
            ("1m 30s", 90_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "0s", "0", "1ns", "9ms", "25h", "-3s", "soon", "99999999999999999999h"] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with("expected a duration from 10ms to 1d, written"), "{error}");
        }
        assert_eq!(duration(Duration::ZERO..=Duration::MAX)("0s"), Ok(Duration::ZERO));
    }

    /// Field case 2.8.
    #[test]
    fn months_and_years_are_rejected_with_the_unit_to_write() {
        let parse = duration(RANGE);
        for (text, hint) in [
            ("5M", "write m for minutes"),
            ("1h 5M", "write m for minutes"),
            ("1month", "write d for days"),
            ("2 Years", "write d for days"),
            ("1y", "write d for days"),
            ("30", "as in 30s"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn text_that_is_no_number_is_rejected_with_the_range() {
        let expected = Err("expected a whole number from 1 to 32".to_owned());
        for text in ["", "0", "33", "-1", "abc", "1.5", "4x", "99999999999999999999"] {
            assert_eq!(number(1..=32_u16)(text), expected, "{text}");
        }
        assert_eq!(number(1..=32_u16)("32"), Ok(32));
        let expected = Err("expected a number from 0 to 1".to_owned());
        for text in ["", "1.1", "NaN", "half"] {
            assert_eq!(number(0.0..=1.0_f64)(text), expected, "{text}");
        }
    }

    #[test]
    fn a_listening_address_may_leave_out_the_host() {
        assert_eq!(listen_address(":9090").unwrap().to_string(), "[::]:9090");
        assert_eq!(listen_address("0.0.0.0:9090").unwrap().to_string(), "0.0.0.0:9090");
        assert!(listen_address("9090").is_err());
    }
}
