//! The format of events on RabbitMQ, version 2, as documented in `docs/events.md`.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::events::change::Object;

/// The version that emitters write. An added field needs no new version, because readers ignore
/// unknown fields.
const VERSION: u32 = 2;
/// The oldest version that is still read. Its ids are numbers, of which many JSON parsers keep only
/// 53 bits.
const VERSION_MIN: u32 = 1;
/// A byte order mark, which RFC 8259 allows readers to ignore.
const BOM: &[u8] = "\u{feff}".as_bytes();
/// The last second of the year 9999, in seconds since 1970: the format has four digits for the
/// year.
const LAST_SECOND: u64 = 253_402_300_799;

/// One message. Its routing key is the name of the change's [`crate::events::Kind`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Identifies the emitter that published it. Each start of a process is a new source.
    pub(crate) source: Uuid,
    /// The number of the message among all messages of the source, from 1.
    pub(crate) sequence: u64,
    pub(crate) objects: Vec<Object>,
}

/// Why a message cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("cannot parse the event: {0}")]
    Shape(#[from] serde_json::Error),
    #[error("unknown event version {0}; expected {VERSION_MIN} to {VERSION}")]
    Version(u32),
    #[error("invalid last_seen: {0}")]
    Time(#[from] humantime::TimestampError),
}

#[derive(Serialize, Deserialize)]
struct Body {
    version: u32,
    source: String,
    sequence: u64,
    objects: Vec<BodyObject>,
}

#[derive(Serialize, Deserialize)]
struct BodyObject {
    #[serde(serialize_with = "as_text", deserialize_with = "text_or_number")]
    id: i64,
    last_seen: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde requires this signature")]
fn as_text<S: serde::Serializer>(id: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// Reads an id as text (version 2) or as a number (version 1).
fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Id {
        Number(i64),
        Text(String),
    }
    match Id::deserialize(deserializer)? {
        Id::Number(id) => Ok(id),
        Id::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// Formats a time as in events, such as `2026-11-21T22:00:00.123456Z`: RFC 3339 in UTC, to the
/// microsecond. A time outside the years 1970 to 9999 becomes the nearest one inside.
#[must_use]
pub fn format_time(time: SystemTime) -> String {
    let last = SystemTime::UNIX_EPOCH + Duration::from_micros(LAST_SECOND * 1_000_000 + 999_999);
    let time = time.clamp(SystemTime::UNIX_EPOCH, last);
    humantime::format_rfc3339_micros(time).to_string()
}

impl Message {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let object = |object: &Object| BodyObject {
            id: object.id,
            last_seen: format_time(object.last_seen),
        };
        serde_json::to_vec(&Body {
            version: VERSION,
            source: self.source.to_string(),
            sequence: self.sequence,
            objects: self.objects.iter().map(object).collect(),
        })
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
        // Parsed separately and first, because in another version all other fields may differ.
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(DecodeError::Version(version));
        }
        let body: Body = serde_json::from_slice(bytes)?;
        let source = body.source.parse().map_err(serde::de::Error::custom);
        let object = |object: BodyObject| {
            let last_seen = humantime::parse_rfc3339(&object.last_seen)?;
            Ok(Object { id: object.id, last_seen })
        };
        let objects: Result<_, humantime::TimestampError> =
            body.objects.into_iter().map(object).collect();
        Ok(Self {
            source: source.map_err(|error: serde_json::Error| DecodeError::Shape(error))?,
            sequence: body.sequence,
            objects: objects?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example in `docs/events.md`.
    const EXAMPLE: &str = r#"{"version":2,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":7,"objects":[{"id":"2","last_seen":"2026-11-21T22:00:00.123456Z"}]}"#;

    #[test]
    fn documented_example_is_written_and_read() {
        let message = Message::decode(EXAMPLE.as_bytes()).unwrap();
        assert_eq!((message.sequence, message.objects[0].id), (7, 2));
        assert_eq!(String::from_utf8(message.encode().unwrap()).unwrap(), EXAMPLE);
        let page = include_str!("../../../../docs/events.md");
        assert!(page.contains(EXAMPLE), "docs/events.md has another example");
    }

    #[test]
    fn unknown_fields_are_ignored_unknown_versions_refused() {
        let more = EXAMPLE.replacen('{', r#"{"trace":[1],"#, 1);
        assert!(Message::decode(more.as_bytes()).is_ok());
        for version in [0, 3] {
            let other = format!(r#"{{"version":{version},"x":1}}"#);
            let error = Message::decode(other.as_bytes()).unwrap_err();
            assert!(matches!(error, DecodeError::Version(of) if of == version), "{error}");
        }
        let bad_id = EXAMPLE.replace(r#""id":"2""#, r#""id":"two""#);
        for text in
            ["", "[]", "{}", r#"{"version":1}"#, &EXAMPLE.replace("2026-", "soon "), &bad_id]
        {
            assert!(Message::decode(text.as_bytes()).is_err(), "{text}");
        }
    }

    // Field case 7.4
    #[test]
    fn version_1_with_ids_as_numbers_is_still_read() {
        let old = r#"{"version":1,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":7,"objects":[{"id":-9007199254740993,"last_seen":"2026-11-21T22:00:00.123456Z"}]}"#;
        let message = Message::decode(old.as_bytes()).unwrap();
        assert_eq!(message.objects[0].id, -9_007_199_254_740_993);
        let new = String::from_utf8(message.encode().unwrap()).unwrap();
        assert!(new.contains(r#"{"version":2,"#) && new.contains(r#""id":"-9007199254740993""#));
    }

    // Field case 1.3
    #[test]
    fn byte_order_mark_before_an_event_is_ignored() {
        let marked = format!("\u{feff}{EXAMPLE}");
        assert_eq!(Message::decode(marked.as_bytes()).unwrap().sequence, 7);
    }

    #[test]
    fn unrepresentable_time_becomes_the_nearest_one() {
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(format_time(far), "9999-12-31T23:59:59.999999Z");
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(format_time(before), "1970-01-01T00:00:00.000000Z");
    }

    proptest! {
        #[test]
        fn encoded_message_is_decoded_unchanged(
            objects in prop::collection::vec((any::<i64>(), 0..LAST_SECOND * 1_000_000), 0..5),
            sequence: u64,
        ) {
            let object = |(id, micros)| Object {
                id,
                last_seen: SystemTime::UNIX_EPOCH + Duration::from_micros(micros),
            };
            let objects = objects.into_iter().map(object).collect();
            let message = Message { source: Uuid::now_v7(), sequence, objects };
            prop_assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
        }
    }
}
