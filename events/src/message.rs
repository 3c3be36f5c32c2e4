//! The format on a RabbitMQ, version 1; `docs/events.md` tells it to others.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Object;

/// The only one there is. A field that is added does not change it: who reads ignores those that it
/// does not know.
const VERSION: u32 = 1;
/// The last moment that has four digits for its year, in seconds since 1970.
const LAST_SECOND: u64 = 253_402_300_799;

/// One message. What has become of the objects is said by its routing key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// The process that tells it, since its start.
    pub(crate) source: Uuid,
    /// Counts the messages of the source, of all kinds, from 1 on.
    pub(crate) sequence: u64,
    pub(crate) objects: Vec<Object>,
}

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("it is not as expected: {0}")]
    Shape(#[from] serde_json::Error),
    #[error("it is of version {0}; this program knows version {VERSION}")]
    Version(u32),
    #[error("no time: {0}")]
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
    id: i64,
    last_seen: String,
}

/// A time as it is in events, such as `2026-11-21T22:00:00.123456Z`: RFC 3339 in UTC, to the
/// microsecond. What lies beyond the years 1970 to 9999 is the nearest within.
#[must_use]
pub fn text_of(time: SystemTime) -> String {
    let last = SystemTime::UNIX_EPOCH + Duration::from_micros(LAST_SECOND * 1_000_000 + 999_999);
    let time = time.clamp(SystemTime::UNIX_EPOCH, last);
    humantime::format_rfc3339_micros(time).to_string()
}

impl Message {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let object =
            |object: &Object| BodyObject { id: object.id, last_seen: text_of(object.last_seen) };
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
        // By itself and first: of another version, anything else may be different.
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != VERSION {
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

    /// As it is in `docs/events.md`.
    const EXAMPLE: &str = r#"{"version":1,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":7,"objects":[{"id":2,"last_seen":"2026-11-21T22:00:00.123456Z"}]}"#;

    #[test]
    fn the_documented_example_is_what_is_written_and_read() {
        let message = Message::decode(EXAMPLE.as_bytes()).unwrap();
        assert_eq!((message.sequence, message.objects[0].id), (7, 2));
        assert_eq!(String::from_utf8(message.encode().unwrap()).unwrap(), EXAMPLE);
        let page = include_str!("../../docs/events.md");
        assert!(page.contains(EXAMPLE), "the page has another example");
    }

    #[test]
    fn unknown_fields_are_ignored_and_an_unknown_version_is_refused() {
        let more = EXAMPLE.replacen('{', r#"{"trace":[1],"#, 1);
        assert!(Message::decode(more.as_bytes()).is_ok());
        let later = r#"{"version":2,"who":"knows"}"#;
        assert!(matches!(Message::decode(later.as_bytes()), Err(DecodeError::Version(2))));
        for text in ["", "[]", "{}", r#"{"version":1}"#, &EXAMPLE.replace("2026-", "soon ")] {
            assert!(Message::decode(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_beyond_what_can_be_written_is_the_nearest_that_can() {
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(text_of(far), "9999-12-31T23:59:59.999999Z");
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(text_of(before), "1970-01-01T00:00:00.000000Z");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_it_was(
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
