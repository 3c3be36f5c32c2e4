//! The time zone in which a column of type `timestamp` (without time zone) is read and written.

use std::fmt;
use std::str::FromStr;

/// The name of a time zone, such as `Europe/Berlin`, for the database session.
///
/// The Go services' table contains local times in the time zone of `TZ`. The database knows each
/// time zone with its daylight saving changes, and rejects an unknown name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeZone(String);

impl TimeZone {
    /// Maximum length, which is longer than any real name. The limit exists because each statement
    /// contains the name.
    const LENGTH_MAX: usize = 64;

    /// The machine's time zone; UTC if it has none, as in most containers.
    #[must_use]
    pub fn of_the_machine() -> Self {
        let name = iana_time_zone::get_timezone().ok();
        name.and_then(|name| name.parse().ok()).unwrap_or_else(|| Self("UTC".to_owned()))
    }
}

impl FromStr for TimeZone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // POSIX writes a colon before a name of the time zone database.
        let name = text.strip_prefix(':').unwrap_or(text);
        if name == "/etc/localtime" {
            return Ok(Self::of_the_machine());
        }
        let name = name.strip_prefix("/usr/share/zoneinfo/").unwrap_or(name);
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_+-/,.:<>".contains(c);
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '<');
        if !is_name || name.len() > Self::LENGTH_MAX || !name.chars().all(is_allowed) {
            return Err("expected the name of a time zone, such as Europe/Berlin or UTC".to_owned());
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for TimeZone {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_zone_names_are_accepted() {
        for name in ["UTC", "Europe/Berlin", "America/Port-au-Prince", "Etc/GMT+5", "<+03>-3"] {
            assert_eq!(name.parse::<TimeZone>().unwrap().to_string(), name);
        }
        for name in [":Europe/Berlin", "/usr/share/zoneinfo/Europe/Berlin"] {
            assert_eq!(name.parse::<TimeZone>().unwrap().to_string(), "Europe/Berlin");
        }
    }

    #[test]
    fn text_that_could_end_the_sql_literal_is_rejected() {
        for text in ["", ":", "UTC'; DROP TABLE object; --", "UTC\\", "/etc/passwd", "a b"] {
            assert!(text.parse::<TimeZone>().is_err(), "{text}");
        }
    }
}
