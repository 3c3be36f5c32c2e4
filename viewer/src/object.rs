//! An object of the view, and how events and responses show it.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

/// Microseconds since 1970.
pub(crate) type Micros = i64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) id: i64,
    pub(crate) last_seen: Micros,
}

/// Encodes a server-sent event. Only some events have the field `remaining`.
pub(crate) fn encode(
    event: &str,
    event_id: &str,
    objects: &[Object],
    remaining: Option<&'static str>,
) -> Bytes {
    let mut text = String::with_capacity(128 + 64 * objects.len());
    // Writing to a string cannot fail.
    let _ = write!(text, "event: {event}\nid: {event_id}\ndata: {{\"objects\":[");
    for (index, object) in objects.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let (id, last_seen) = (object.id, format_time(object.last_seen));
        let _ = write!(text, "{comma}{{\"id\":\"{id}\",\"last_seen\":\"{last_seen}\"}}");
    }
    text.push(']');
    if let Some(remaining) = remaining {
        let _ = write!(text, ",\"remaining\":\"{remaining}\"");
    }
    text.push_str("}\n\n");
    // A slow subscriber may hold the text for a long time.
    text.shrink_to_fit();
    Bytes::from(text)
}

pub(crate) fn format_time(time: Micros) -> String {
    let since_1970 = Duration::from_micros(time.unsigned_abs());
    let time = if time < 0 { None } else { SystemTime::UNIX_EPOCH.checked_add(since_1970) };
    messaging::events::format_time(time.unwrap_or(SystemTime::UNIX_EPOCH))
}

pub(crate) fn to_micros(time: SystemTime) -> Micros {
    let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "counts here stay below 2^53")]
pub(crate) fn as_f64(count: usize) -> f64 {
    count as f64
}
