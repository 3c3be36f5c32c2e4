//! Parses the query parameters of requests for the history.

use std::time::Duration;

use axum::http::HeaderValue;
use chrono::DateTime;
use serde::Deserialize;
use store::{Moment, SessionQuery};
use utoipa::IntoParams;

use crate::api::{parse_duration, parse_page_limit};

/// The default of `window`.
const WINDOW: Duration = Duration::from_hours(24);
/// Maximum number of digits of a cursor, so that each one is a 64-bit integer.
const CURSOR_DIGITS_MAX: usize = 18;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct SessionsQuery {
    /// Only sessions that ended after this time, or have not ended
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<String>,
    /// Only sessions that began before this time
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<String>,
    /// Maximum number of sessions
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// The field `next` of the previous page
    #[param(pattern = "^(0|[1-9][0-9]{0,17})$")]
    after: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AvailabilityQuery {
    /// How far back to look, such as `24h`, which is the default
    #[param(pattern = "^[1-9][0-9]{0,6}(ms|s|m|h|d)$")]
    window: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ChangesQuery {
    /// The field `next` of the previous page, or `latest`
    #[param(pattern = "^(latest|0|[1-9][0-9]{0,17})$")]
    after: Option<String>,
    /// Maximum number of changes in a page; ignored for a stream
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// Same as the header `Last-Event-ID`, for clients that cannot send the header
    #[serde(rename = "lastEventId")]
    #[param(pattern = "^(0|[1-9][0-9]{0,17})$")]
    last_event_id: Option<String>,
    /// Ignored: some clients add it to bypass caches
    #[serde(rename = "_")]
    #[expect(dead_code, reason = "declared so that it is not rejected as unknown")]
    cache_buster: Option<String>,
}

/// Describes the header.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
pub(crate) struct LastEventId {
    /// The cursor of the last change that the client received; precedes the parameters
    #[param(rename = "Last-Event-ID", required = false, pattern = "^(0|[1-9][0-9]{0,17})$")]
    #[expect(dead_code, reason = "the request's headers are read instead")]
    last_event_id: String,
}

pub(super) struct ChangesRequest {
    pub(super) start: Start,
    pub(super) limit: usize,
}

/// Where the feed begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    After(i64),
    Latest,
}

impl ChangesQuery {
    pub(super) fn parse(
        &self,
        last_event_id: Option<&HeaderValue>,
    ) -> Result<ChangesRequest, String> {
        let limit = parse_page_limit(self.limit.as_deref())?;
        let header = last_event_id.map(|id| id.to_str().unwrap_or_default());
        let header = header.map(|id| parse_cursor("Last-Event-ID", id)).transpose()?;
        let parameter = self.last_event_id.as_deref();
        let parameter = parameter.map(|id| parse_cursor("lastEventId", id)).transpose()?;
        let start = match self.after.as_deref() {
            None => Start::After(0),
            Some("latest") => Start::Latest,
            Some(cursor) => Start::After(parse_cursor("after", cursor)?),
        };
        // A browser that reconnects sends the same parameters, so the header is newer.
        let start = header.or(parameter).map_or(start, Start::After);
        Ok(ChangesRequest { start, limit })
    }
}

impl SessionsQuery {
    /// The sessions to read, and their maximum number.
    pub(super) fn parse(&self) -> Result<(SessionQuery, usize), String> {
        let query = SessionQuery {
            since: self.since.as_deref().map(|text| parse_time("since", text)).transpose()?,
            until: self.until.as_deref().map(|text| parse_time("until", text)).transpose()?,
            after: self.after.as_deref().map(|text| parse_cursor("after", text)).transpose()?,
        };
        Ok((query, parse_page_limit(self.limit.as_deref())?))
    }
}

impl AvailabilityQuery {
    pub(super) fn parse(&self) -> Result<Duration, String> {
        self.window.as_deref().map_or(Ok(WINDOW), |text| parse_duration("window", text))
    }
}

fn parse_cursor(name: &str, text: &str) -> Result<i64, String> {
    let is_cursor = text.len() <= CURSOR_DIGITS_MAX
        && text.bytes().all(|byte| byte.is_ascii_digit())
        && (text == "0" || !text.starts_with('0'));
    let position = text.parse().ok().filter(|_| is_cursor);
    position.ok_or_else(|| format!("{name}: expected a value from an earlier response"))
}

fn parse_time(name: &str, text: &str) -> Result<Moment, String> {
    let time = DateTime::parse_from_rfc3339(text).map_err(|_| {
        format!("{name}: expected a time as in RFC 3339, such as 2026-11-21T22:00:00Z")
    })?;
    Ok(Moment::from_micros(time.timestamp_micros()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_cursors_are_accepted() {
        for text in ["0", "7", "1764356400000000", "999999999999999999"] {
            assert_eq!(parse_cursor("after", text), Ok(text.parse().unwrap()));
        }
        for text in ["", "+1", "-1", "01", "00", "1.0", " 1", "1000000000000000000", "latest"] {
            assert!(parse_cursor("after", text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_with_any_offset_are_accepted() {
        let noon = parse_time("since", "2026-11-21T12:00:00Z").unwrap();
        for text in ["2026-11-21T14:00:00+02:00", "2026-11-21t12:00:00.000000z"] {
            assert_eq!(parse_time("since", text), Ok(noon), "{text}");
        }
        assert_eq!(parse_time("since", "1000-01-01T00:00:00Z"), Ok(Moment::from_micros(0)));
        for text in ["", "now", "2026-11-21", "2026-11-21T12:00:00", "2026-13-21T12:00:00Z"] {
            assert!(parse_time("since", text).is_err(), "{text}");
        }
    }
}
