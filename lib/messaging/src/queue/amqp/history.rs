//! Headers of a message: the span that published it, and the history of its failed attempts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::queue::dead_letter::DeadLetter;
use crate::queue::message::{self, decode};

/// Prefix of all headers that Lastseen sets, except for [`TRACEPARENT`].
const OWN_PREFIX: &str = "lastseen-";
/// Prefix of the broker's headers, such as its record of dead-lettering. A message that leaves a
/// delay queue gets this record too.
const BROKER_PREFIX: &str = "x-";
/// The span that published the message. All copies keep this header, including redriven ones.
const TRACEPARENT: &str = "traceparent";
const ATTEMPTS: &str = "lastseen-attempts";
const REASON: &str = "lastseen-reason";
/// When the first and the last attempt failed, in RFC 3339, for the person who reads the dead
/// letters.
const FIRST_FAILED_AT: &str = "lastseen-first-failed-at";
const LAST_FAILED_AT: &str = "lastseen-last-failed-at";

/// The headers of a message that is published in this span.
pub(super) fn with_traceparent(traceparent: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert(TRACEPARENT.into(), AMQPValue::LongString(traceparent.into()));
    headers
}

/// The id of the callback that the message comes from; empty for a message of the Go producer.
pub(super) fn callback_id(properties: &BasicProperties) -> String {
    properties.correlation_id().as_ref().map_or_else(String::new, ToString::to_string)
}

pub(super) fn traceparent(properties: &BasicProperties) -> Option<&str> {
    match header(properties, TRACEPARENT)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

pub(super) fn failed_attempts(properties: &BasicProperties) -> u32 {
    // Lastseen writes 64 bits, but another tool may have converted the number to another size.
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

/// When the callback arrived: to the millisecond if its id contains the time, otherwise to the
/// second.
pub(super) fn accepted_at(properties: &BasicProperties) -> Option<SystemTime> {
    message::accepted_at(&callback_id(properties)).or_else(|| published_at(properties))
}

/// The properties of the copy that is published after a failed attempt.
pub(super) fn after_failure(properties: &BasicProperties, reason: &str) -> BasicProperties {
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let text = |value: &str| AMQPValue::LongString(value.into());
    let attempts = i64::from(failed_attempts(properties)) + 1;
    let first = header(properties, FIRST_FAILED_AT).cloned().unwrap_or_else(|| text(&now));
    let mut headers = headers_without(properties, &[BROKER_PREFIX]);
    headers.insert(ATTEMPTS.into(), AMQPValue::LongLongInt(attempts));
    headers.insert(REASON.into(), text(reason));
    headers.insert(FIRST_FAILED_AT.into(), first);
    headers.insert(LAST_FAILED_AT.into(), text(&now));
    copied(properties, headers)
}

/// The properties of the copy that goes to the end of the queue.
pub(super) fn requeued(properties: &BasicProperties) -> BasicProperties {
    copied(properties, headers_without(properties, &[BROKER_PREFIX]))
}

/// The properties of a redriven dead letter: without the history of its failures.
pub(super) fn redriven(properties: &BasicProperties) -> BasicProperties {
    copied(properties, headers_without(properties, &[BROKER_PREFIX, OWN_PREFIX]))
}

/// Decodes a dead letter for an operator.
pub(super) fn dead_letter(body: Vec<u8>, properties: &BasicProperties) -> DeadLetter {
    let time = |name| humantime::parse_rfc3339(&text(header(properties, name)?)?).ok();
    DeadLetter {
        id: decode(&body).ok(),
        body,
        callback_id: callback_id(properties),
        reason: reason(properties),
        attempts: failed_attempts(properties),
        published_at: published_at(properties),
        first_failed_at: time(FIRST_FAILED_AT),
        last_failed_at: time(LAST_FAILED_AT),
    }
}

/// Why the message was given up, by Lastseen or by RabbitMQ. If RabbitMQ gave it up, for example at
/// the delivery limit, the reason that Lastseen recorded belongs to an earlier attempt.
fn reason(properties: &BasicProperties) -> String {
    let own = header(properties, REASON).and_then(text);
    let broker = match newest_death(properties) {
        Some(death) => death.inner().get("reason"),
        None => header(properties, "x-first-death-reason"),
    };
    match (broker.and_then(text), own) {
        (Some(broker), Some(own)) => format!("{broker} (by RabbitMQ), after: {own}"),
        (Some(broker), None) => format!("{broker} (by RabbitMQ)"),
        (None, Some(own)) => own,
        (None, None) => "unknown".to_owned(),
    }
}

/// The queue in which the message expired, if the broker dead-lettered it for that reason.
pub(super) fn expired_in(properties: &BasicProperties) -> Option<String> {
    let death = newest_death(properties)?.inner();
    (death.get("reason").and_then(text)? == "expired").then(|| death.get("queue").and_then(text))?
}

/// The broker's newest record of dead-lettering the message. Copies that Lastseen publishes have no
/// such record.
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

fn copied(properties: &BasicProperties, headers: FieldTable) -> BasicProperties {
    // Leave out the expiration, which is meant for one delay queue only. Otherwise every later copy
    // would inherit it.
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
