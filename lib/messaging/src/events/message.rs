//! The format of events on RabbitMQ, version 2, as documented in `docs/events.md`.

use std::time::{Duration, SystemTime};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::events::change::{GivenUp, Kind, Object};
use crate::events::group_change::GroupChange;

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

const GIVEN_UP_KEY: &str = "given_up";
const GROUP_KEY: &str = "group";

/// What an emitter publishes in one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Committed(Kind, Vec<Object>),
    GivenUp(Vec<GivenUp>),
    Groups(Vec<GroupChange>),
}

/// A message that was received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Identifies the emitter that published it. Each start of a process is a new source.
    pub(crate) source: Uuid,
    /// The number of the message among all messages of the source, from 1.
    pub(crate) sequence: u64,
    /// `None` if no subscriber needs the content: that of groups, or of a later version with
    /// another routing key. The number of such a message counts.
    pub(crate) content: Option<Content>,
}

/// Why a message cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("cannot parse the event: {0}")]
    Shape(#[from] serde_json::Error),
    #[error("unknown event version {0}; expected {VERSION_MIN} to {VERSION}")]
    Version(u32),
    #[error("invalid time: {0}")]
    Time(#[from] humantime::TimestampError),
}

#[derive(Serialize, Deserialize)]
struct Body<T> {
    version: u32,
    source: String,
    sequence: u64,
    objects: T,
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<GroupChange>>,
}

#[derive(Serialize, Deserialize)]
struct BodyObject {
    #[serde(serialize_with = "as_text", deserialize_with = "text_or_number")]
    id: i64,
    last_seen: String,
}

#[derive(Serialize, Deserialize)]
struct BodyGivenUp {
    #[serde(serialize_with = "as_text", deserialize_with = "text_or_number")]
    id: i64,
    at: String,
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

impl Content {
    pub(crate) fn routing_key(&self) -> &'static str {
        match self {
            Self::Committed(kind, _) => kind.name(),
            Self::GivenUp(_) => GIVEN_UP_KEY,
            Self::Groups(_) => GROUP_KEY,
        }
    }

    /// Encodes the message with this content.
    pub(crate) fn encode(self, source: Uuid, sequence: u64) -> Result<Vec<u8>, serde_json::Error> {
        match self {
            Self::Committed(_, objects) => {
                let object = |object: &Object| BodyObject {
                    id: object.id,
                    last_seen: format_time(object.last_seen),
                };
                let objects: Vec<_> = objects.iter().map(object).collect();
                encode(source, sequence, objects, None)
            }
            Self::GivenUp(objects) => {
                let object =
                    |object: &GivenUp| BodyGivenUp { id: object.id, at: format_time(object.at) };
                let objects: Vec<_> = objects.iter().map(object).collect();
                encode(source, sequence, objects, None)
            }
            // Subscribers of earlier versions require the field `objects`.
            Self::Groups(groups) => encode(source, sequence, [(); 0], Some(groups)),
        }
    }
}

fn encode(
    source: Uuid,
    sequence: u64,
    objects: impl Serialize,
    groups: Option<Vec<GroupChange>>,
) -> Result<Vec<u8>, serde_json::Error> {
    let source = source.to_string();
    serde_json::to_vec(&Body { version: VERSION, source, sequence, objects, groups })
}

impl Message {
    /// Decodes a message. Only the content depends on the routing key, so that the number of a
    /// message counts even if its content is unknown.
    pub(crate) fn decode(routing_key: &str, bytes: &[u8]) -> Result<Self, DecodeError> {
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
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == routing_key);
        if let Some(kind) = kind {
            let object = |object: BodyObject| {
                let last_seen = humantime::parse_rfc3339(&object.last_seen)?;
                Ok(Object { id: object.id, last_seen })
            };
            decode_objects(bytes, object, |objects| Content::Committed(kind, objects))
        } else if routing_key == GIVEN_UP_KEY {
            let object = |object: BodyGivenUp| {
                let at = humantime::parse_rfc3339(&object.at)?;
                Ok(GivenUp { id: object.id, at })
            };
            decode_objects(bytes, object, Content::GivenUp)
        } else {
            let (source, sequence, IgnoredAny) = decode_body(bytes)?;
            Ok(Self { source, sequence, content: None })
        }
    }
}

fn decode_objects<B: DeserializeOwned, O>(
    bytes: &[u8],
    object: impl Fn(B) -> Result<O, humantime::TimestampError>,
    content: impl FnOnce(Vec<O>) -> Content,
) -> Result<Message, DecodeError> {
    let (source, sequence, objects): (_, _, Vec<B>) = decode_body(bytes)?;
    let objects: Result<_, _> = objects.into_iter().map(object).collect();
    Ok(Message { source, sequence, content: Some(content(objects?)) })
}

/// Returns the source, the number and the objects.
fn decode_body<T: DeserializeOwned>(bytes: &[u8]) -> Result<(Uuid, u64, T), DecodeError> {
    let Body { source, sequence, objects, .. } = serde_json::from_slice(bytes)?;
    let source = source.parse().map_err(serde::de::Error::custom);
    let source = source.map_err(|error: serde_json::Error| DecodeError::Shape(error))?;
    Ok((source, sequence, objects))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::events::group_change::GroupCause;

    /// The examples in `docs/events.md`.
    const EXAMPLE: &str = r#"{"version":2,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":7,"objects":[{"id":"2","last_seen":"2026-11-21T22:00:00.123456Z"}]}"#;
    const GIVEN_UP: &str = r#"{"version":2,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":8,"objects":[{"id":"2","at":"2026-11-21T22:00:00.123456Z"}]}"#;
    const GROUPS: &str = r#"{"version":2,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":9,"objects":[],"groups":[{"path":"shop","was":"up","is":"degraded","online":79,"total":100,"because":{"path":"shop/berlin","object":"142","kind":"gone"}}]}"#;

    fn decode(text: &str) -> Result<Message, DecodeError> {
        Message::decode("online", text.as_bytes())
    }

    /// The only object of the message.
    fn object(message: &Message) -> Object {
        let Some(Content::Committed(Kind::Online, objects)) = &message.content else {
            panic!("{message:?}")
        };
        objects[0]
    }

    fn encoded(content: &Content, message: &Message) -> String {
        let bytes = content.clone().encode(message.source, message.sequence).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn documented_examples_are_written_and_read() {
        let page = include_str!("../../../../docs/events.md");
        for (key, example) in [("online", EXAMPLE), ("given_up", GIVEN_UP)] {
            let message = Message::decode(key, example.as_bytes()).unwrap();
            let content = message.content.as_ref().unwrap();
            assert_eq!(content.routing_key(), key);
            assert_eq!(encoded(content, &message), example);
            assert!(page.contains(example), "docs/events.md has another example");
        }
        assert_eq!(object(&decode(EXAMPLE).unwrap()).id, 2);

        let message = Message::decode("group", GROUPS.as_bytes()).unwrap();
        assert_eq!((message.sequence, &message.content), (9, &None));
        let mut body: serde_json::Value = serde_json::from_str(GROUPS).unwrap();
        let groups = Content::Groups(serde_json::from_value(body["groups"].take()).unwrap());
        assert_eq!(
            (groups.routing_key(), encoded(&groups, &message)),
            ("group", GROUPS.to_owned())
        );
        assert!(page.contains(GROUPS), "docs/events.md has another example");
    }

    #[test]
    fn group_that_is_up_has_no_cause_and_a_whole_group_no_object() {
        let because = GroupCause { path: "shop/berlin".to_owned(), object: None, kind: None };
        let change = |because| GroupChange {
            path: "shop".to_owned(),
            was: "degraded".to_owned(),
            is: "up".to_owned(),
            online: 1,
            total: 2,
            because,
        };
        let content = Content::Groups(vec![change(None), change(Some(because))]);
        let bytes = content.encode(Uuid::now_v7(), 1).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(body["groups"][0]["because"], serde_json::Value::Null);
        let whole = serde_json::json!({"path": "shop/berlin", "object": null, "kind": null});
        assert_eq!(body["groups"][1]["because"], whole);
    }

    #[test]
    fn unknown_fields_are_ignored_unknown_versions_refused() {
        let more = EXAMPLE.replacen('{', r#"{"trace":[1],"groups":1,"#, 1);
        assert!(decode(&more).is_ok());
        for version in [0, 3] {
            let other = format!(r#"{{"version":{version},"x":1}}"#);
            let error = decode(&other).unwrap_err();
            assert!(matches!(error, DecodeError::Version(of) if of == version), "{error}");
        }
        let bad_id = EXAMPLE.replace(r#""id":"2""#, r#""id":"two""#);
        for text in
            ["", "[]", "{}", r#"{"version":1}"#, &EXAMPLE.replace("2026-", "soon "), &bad_id]
        {
            assert!(decode(text).is_err(), "{text}");
        }
        assert!(Message::decode("given_up", EXAMPLE.as_bytes()).is_err());
    }

    #[test]
    fn number_of_a_message_with_unknown_content_is_read() {
        for text in [EXAMPLE, GIVEN_UP, &EXAMPLE.replace("last_seen", "renamed")] {
            let message = Message::decode("renamed", text.as_bytes()).unwrap();
            assert!(message.sequence >= 7 && message.content.is_none(), "{message:?}");
        }
    }

    // Field case 7.4
    #[test]
    fn version_1_with_ids_as_numbers_is_still_read() {
        let old = r#"{"version":1,"source":"019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11","sequence":7,"objects":[{"id":-9007199254740993,"last_seen":"2026-11-21T22:00:00.123456Z"}]}"#;
        let message = decode(old).unwrap();
        assert_eq!(object(&message).id, -9_007_199_254_740_993);
        let new = encoded(message.content.as_ref().unwrap(), &message);
        assert!(new.contains(r#"{"version":2,"#) && new.contains(r#""id":"-9007199254740993""#));
    }

    // Field case 1.3
    #[test]
    fn byte_order_mark_before_an_event_is_ignored() {
        let marked = format!("\u{feff}{EXAMPLE}");
        assert_eq!(decode(&marked).unwrap().sequence, 7);
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
            kind in prop::sample::select(&Kind::ALL[..]),
            given_up: bool,
            sequence: u64,
        ) {
            let time = |micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
            let objects = objects.into_iter();
            let content = if given_up {
                Content::GivenUp(objects.map(|(id, at)| GivenUp { id, at: time(at) }).collect())
            } else {
                let object = |(id, last_seen)| Object { id, last_seen: time(last_seen) };
                Content::Committed(kind, objects.map(object).collect())
            };
            let source = Uuid::now_v7();
            let bytes = content.clone().encode(source, sequence).unwrap();
            let message = Message::decode(content.routing_key(), &bytes).unwrap();
            prop_assert_eq!(message, Message { source, sequence, content: Some(content) });
        }

        #[test]
        fn group_changes_are_read_as_written(
            names in prop::collection::vec(any::<String>(), 0..5),
            object: Option<i64>,
            online: u32,
            total: u32,
            sequence: u64,
        ) {
            let change = |name: String| GroupChange {
                path: name.clone(),
                was: name.clone(),
                is: "down".to_owned(),
                online,
                total,
                because: object.map(|id| GroupCause {
                    path: name.clone(),
                    object: Some(id.to_string()),
                    kind: (id > 0).then_some(name),
                }),
            };
            let changes: Vec<_> = names.into_iter().map(change).collect();
            let source = Uuid::now_v7();
            let bytes = Content::Groups(changes.clone()).encode(source, sequence).unwrap();
            let message = Message::decode("group", &bytes).unwrap();
            prop_assert_eq!(message, Message { source, sequence, content: None });
            let mut body: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            let read: Vec<GroupChange> = serde_json::from_value(body["groups"].take()).unwrap();
            prop_assert_eq!(read, changes);
        }
    }
}
