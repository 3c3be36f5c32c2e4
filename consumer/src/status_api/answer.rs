//! Interprets a response of the status API.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::LookupError;
use crate::config::Status404;

/// The client reads at most this much of a body. A valid answer has about 30 bytes.
pub(super) const MAX_BODY_BYTES: usize = 16 * 1024;
/// How much of a body an error quotes.
pub(super) const QUOTED_BYTES: usize = 100;
const QUOTED_CONTENT_TYPE_BYTES: usize = 60;
/// The client caps `Retry-After` at this: the breaker's longest pause, and the longest delay of a
/// delay queue.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);
const UTF8_BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A response whose body has been read.
#[derive(Debug)]
pub(super) struct ReceivedResponse {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) retry_after: Option<HeaderValue>,
    pub(super) body: ReceivedBody,
}

/// The first [`MAX_BODY_BYTES`] of a body.
#[derive(Debug, Default)]
pub(super) struct ReceivedBody {
    pub(super) bytes: Vec<u8>,
    /// Whether the body is longer than that.
    pub(super) is_truncated: bool,
}

impl ReceivedBody {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let space = MAX_BODY_BYTES.saturating_sub(self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(space)]);
        self.is_truncated |= bytes.len() > space;
    }
}

#[derive(Deserialize)]
struct Body {
    id: i64,
    online: bool,
}

/// What an error quotes of a response: the content type and the first bytes, escaped.
#[derive(Debug)]
pub(crate) struct Excerpt {
    content_type: Option<String>,
    first_bytes: String,
}

impl ReceivedResponse {
    /// Whether object `id` is online.
    pub(super) fn is_online(&self, id: i64, status_404: Status404) -> Result<bool, LookupError> {
        match self.status {
            StatusCode::OK if self.body.is_truncated => Err(LookupError::TooLarge(self.excerpt())),
            StatusCode::OK => self.parse(id),
            StatusCode::NOT_FOUND => match self.foreign_404(status_404) {
                None => Ok(false),
                Some(reason) => Err(LookupError::NotFound { reason, response: self.excerpt() }),
            },
            status => Err(LookupError::Status {
                status,
                retry_after: self.retry_after.as_ref().and_then(retry_after),
                response: self.excerpt(),
            }),
        }
    }

    fn parse(&self, id: i64) -> Result<bool, LookupError> {
        let garbage = |reason: &str| LookupError::Garbage {
            reason: escape(reason.as_bytes(), QUOTED_BYTES),
            response: self.excerpt(),
        };
        let json = json(&self.body.bytes);
        // Without this check, serde would accept the list `[42,true]` as the fields in order.
        if json.first() != Some(&b'{') {
            return Err(garbage(match json {
                [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "the body is UTF-16, not UTF-8",
                _ => "the body is not a JSON object",
            }));
        }
        // `garbage` truncates the error, because it may quote a value of any length.
        let body: Body =
            serde_json::from_slice(json).map_err(|error| garbage(&error.to_string()))?;
        if body.id != id {
            return Err(LookupError::WrongId { id: body.id, response: self.excerpt() });
        }
        Ok(body.online)
    }

    // Decision: docs/decisions/0028-when-does-a-404-mean-offline.md
    /// Returns the reason why this 404 does not mean that the object is offline, or `None` if it
    /// does.
    ///
    /// For an unknown object, the API sends an empty body or a JSON object. For an unknown route, a
    /// gateway or default backend in front of the API mostly sends HTML or plain text. If an
    /// unknown route meant "offline", every object would seem offline, and its messages would be
    /// acked. A doubtful 404 is therefore a failed lookup.
    fn foreign_404(&self, status_404: Status404) -> Option<&'static str> {
        if status_404 == Status404::Failed {
            return Some("STATUS_404=failed");
        }
        let json = json(&self.body.bytes);
        if json.is_empty() {
            return None;
        }
        if self.body.is_truncated {
            return Some("the body is too large");
        }
        let Ok(fields) = serde_json::from_slice::<Map<String, Value>>(json) else {
            return Some("the body is not a JSON object");
        };
        if fields.get("online").is_some_and(|online| *online != Value::Bool(false)) {
            return Some("the body says online");
        }
        let mentions_a_route = |value: &Value| {
            let text = value.as_str().unwrap_or_default().to_ascii_lowercase();
            // Kong, APISIX and Laravel send the first text, Express and Nest the second one.
            text.contains("route") || text.starts_with("cannot get")
        };
        fields.values().any(mentions_a_route).then_some("the body is about a route, not an object")
    }

    fn excerpt(&self) -> Excerpt {
        let content_type = self.content_type.as_ref().map(HeaderValue::as_bytes);
        Excerpt {
            content_type: content_type.map(|text| escape(text, QUOTED_CONTENT_TYPE_BYTES)),
            first_bytes: escape(&self.body.bytes, QUOTED_BYTES),
        }
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content_type {
            Some(content_type) => write!(out, "{content_type}, ")?,
            None => out.write_str("no content type, ")?,
        }
        match self.first_bytes.as_str() {
            "" => out.write_str("no body"),
            text => write!(out, "body begins \"{text}\""),
        }
    }
}

/// The body without a byte order mark and outer white space, which RFC 8259 lets a parser ignore.
fn json(body: &[u8]) -> &[u8] {
    body.strip_prefix(UTF8_BYTE_ORDER_MARK).unwrap_or(body).trim_ascii()
}

/// The first `max` bytes on one line, without control characters.
pub(super) fn escape(bytes: &[u8], max: usize) -> String {
    let cut = &bytes[..bytes.len().min(max)];
    String::from_utf8_lossy(cut).escape_debug().to_string()
}

/// Parses `Retry-After`, a number of seconds or a date; a past date means no wait. The API chooses
/// the value, so it is capped here, before any arithmetic.
pub(super) fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let value = value.to_str().ok()?.trim();
    let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    let wait = if is_number {
        // A number above u64::MAX is a long wait, too.
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        let until = httpdate::parse_http_date(value).ok()?;
        until.duration_since(SystemTime::now()).unwrap_or_default()
    };
    Some(wait.min(RETRY_AFTER_MAX))
}
