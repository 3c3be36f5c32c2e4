//! Value parsers of settings: what is allowed, and what is said of what is not.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

/// A value parser for durations such as `500ms`, `3s` or `1m 30s`; zero is not allowed.
///
/// # Errors
/// What is allowed, in words.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration above zero, such as 500ms, 3s or 2m".to_owned())
}

/// A value parser for what is `on` or `off`.
///
/// # Errors
/// What is allowed, in words.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

/// A value parser for listening addresses: `127.0.0.1:9090`, `[::1]:9090`, or `:9090` for all
/// interfaces. Port 0 takes any free port.
///
/// # Errors
/// What is allowed, in words.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    full.parse().map_err(|_| {
        "expected IP:PORT such as 127.0.0.1:9090, or :9090 for all interfaces; port 0 takes any free one".to_owned()
    })
}

/// A value parser for numbers within `allowed`, both ends included.
pub fn number<T>(
    allowed: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: std::str::FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        text.parse().ok().filter(|number| allowed.contains(number)).ok_or_else(|| {
            format!("expected a number from {} to {}", allowed.start(), allowed.end())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_address_may_leave_out_the_host() {
        assert_eq!(listen_address(":9090").unwrap().to_string(), "0.0.0.0:9090");
        assert!(listen_address("9090").is_err());
    }
}
