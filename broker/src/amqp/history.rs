//! What a message carries along: the span it comes from, and the history of its failures, in headers of ours.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::inspector::DeadLetter;
use crate::message::{self, decode};

/// What the names of all of our headers begin with, and of the broker's own: its record of the
/// dead-lettering, that by our delay queues included.
const OURS: &str = "lastseen-";
const BROKERS: &str = "x-";
/// The span that it comes from. Copies keep it, redriven ones too.
const TRACEPARENT: &str = "traceparent";
/// How many attempts have failed so far.
const ATTEMPTS: &str = "lastseen-attempts";
/// Why the last of them failed.
const REASON: &str = "lastseen-reason";
/// When the first and the last failed, in RFC 3339, for the person who reads the dead letters.
const FIRST_FAILED_AT: &str = "lastseen-first-failed-at";
const LAST_FAILED_AT: &str = "lastseen-last-failed-at";

/// The headers of a message that comes from that span.
pub(super) fn begun_by(traceparent: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert(TRACEPARENT.into(), AMQPValue::LongString(traceparent.into()));
    headers
}

/// The span that the message comes from.
pub(super) fn traceparent(properties: &BasicProperties) -> Option<&str> {
    match header(properties, TRACEPARENT)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

/// How many attempts at the message have failed.
pub(super) fn failed_attempts(properties: &BasicProperties) -> u32 {
    // We write 64 bits; a broker or a tool on the way may have made it another size.
    let attempts = match header(properties, ATTEMPTS) {
        Some(AMQPValue::ShortShortInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortShortUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongLongInt(attempts)) => *attempts,
        _ => 0,
    };
    u32::try_from(attempts).unwrap_or(0)
}

/// When the callback came in: to the millisecond by its id, or else to the second.
pub(super) fn accepted_at(properties: &BasicProperties) -> Option<SystemTime> {
    let by_id =
        properties.correlation_id().as_ref().and_then(|id| message::accepted_at(id.as_str()));
    by_id.or_else(|| published_at(properties))
}

/// The properties of the copy that is made when another attempt has failed.
pub(super) fn after_failure(properties: &BasicProperties, reason: &str) -> BasicProperties {
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let text = |value: &str| AMQPValue::LongString(value.into());
    let attempts = i64::from(failed_attempts(properties)) + 1;
    let first = header(properties, FIRST_FAILED_AT).cloned().unwrap_or_else(|| text(&now));
    let mut headers = headers_without(properties, &[BROKERS]);
    headers.insert(ATTEMPTS.into(), AMQPValue::LongLongInt(attempts));
    headers.insert(REASON.into(), text(reason));
    headers.insert(FIRST_FAILED_AT.into(), first);
    headers.insert(LAST_FAILED_AT.into(), text(&now));
    copied(properties, headers)
}

/// The properties of the copy that goes to the end of the queue.
pub(super) fn kept(properties: &BasicProperties) -> BasicProperties {
    copied(properties, headers_without(properties, &[BROKERS]))
}

/// The properties of the copy by which a dead letter begins anew.
pub(super) fn forgotten(properties: &BasicProperties) -> BasicProperties {
    copied(properties, headers_without(properties, &[BROKERS, OURS]))
}

/// What a person is told of a message among the dead letters.
pub(super) fn dead_letter(body: Vec<u8>, properties: &BasicProperties) -> DeadLetter {
    let time = |name| humantime::parse_rfc3339(&text(header(properties, name)?)?).ok();
    DeadLetter {
        id: decode(&body).ok(),
        body,
        callback_id: properties
            .correlation_id()
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        reason: reason(properties),
        attempts: failed_attempts(properties),
        published_at: published_at(properties),
        first_failed_at: time(FIRST_FAILED_AT),
        last_failed_at: time(LAST_FAILED_AT),
    }
}

/// Our reason; or RabbitMQ's, if it has given up the message by itself, as it does when the delivery
/// limit is reached. Then ours is that of an earlier attempt.
fn reason(properties: &BasicProperties) -> String {
    let ours = header(properties, REASON).and_then(text);
    let brokers = match newest_death(properties) {
        Some(death) => death.inner().get("reason"),
        None => header(properties, "x-first-death-reason"),
    };
    match (brokers.and_then(text), ours) {
        (Some(brokers), Some(ours)) => format!("{brokers} (by RabbitMQ), after: {ours}"),
        (Some(brokers), None) => format!("{brokers} (by RabbitMQ)"),
        (None, Some(ours)) => ours,
        (None, None) => "unknown".to_owned(),
    }
}

/// The queue in which the message expired, if that made it a dead letter.
pub(super) fn expired_in(properties: &BasicProperties) -> Option<String> {
    let death = newest_death(properties)?.inner();
    (death.get("reason").and_then(text)? == "expired").then(|| death.get("queue").and_then(text))?
}

/// The broker's record of why it dead-lettered the message. Our own copies have none.
fn newest_death(properties: &BasicProperties) -> Option<&FieldTable> {
    // The newest entry of x-death comes first.
    let AMQPValue::FieldArray(deaths) = header(properties, "x-death")? else { return None };
    match deaths.as_slice().first() {
        Some(AMQPValue::FieldTable(death)) => Some(death),
        _ => None,
    }
}

fn published_at(properties: &BasicProperties) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs((*properties.timestamp())?))
}

fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn headers_without(properties: &BasicProperties, prefixes: &[&str]) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in properties.headers().iter().flat_map(FieldTable::inner) {
        if !prefixes.iter().any(|prefix| name.as_str().starts_with(prefix)) {
            headers.insert(name.clone(), value.clone());
        }
    }
    headers
}

/// The message's own properties with other headers.
fn copied(properties: &BasicProperties, headers: FieldTable) -> BasicProperties {
    // The broker dates the copy by its own delay queue; an expiration would follow it for ever.
    let mut copied = BasicProperties::default().with_headers(headers);
    if let Some(content_type) = properties.content_type() {
        copied = copied.with_content_type(content_type.clone());
    }
    if let Some(callback_id) = properties.correlation_id() {
        copied = copied.with_correlation_id(callback_id.clone());
    }
    if let Some(published_at) = properties.timestamp() {
        copied = copied.with_timestamp(*published_at);
    }
    copied
}
