//! The body of a message: one object id.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde::de::Error as _;
use uuid::Uuid;

/// The body contains no object id. The message becomes a dead letter unchanged.
#[derive(Debug, thiserror::Error)]
#[error("the body is not {{\"id\":<64-bit integer>}}: {0}")]
pub struct DecodeError(#[from] serde_json::Error);

/// The body as the Go services (`ID`) and Lastseen (`id`) write it. Other fields are ignored.
#[derive(Deserialize)]
struct Body {
    #[serde(alias = "ID", alias = "Id", alias = "iD")]
    id: i64,
}

/// Encodes the body: JSON with the id under `id`. Go's decoder ignores the case of the name.
pub(crate) fn encode(id: i64) -> Vec<u8> {
    format!("{{\"id\":{id}}}").into_bytes()
}

/// Decodes the object id in a body.
///
/// # Errors
/// [`DecodeError`] if the body is not a JSON object, or has no id, two ids, or an id beyond 64
/// bits.
pub(crate) fn decode(body: &[u8]) -> Result<i64, DecodeError> {
    // Without this check, serde would accept the list `[42]` as the fields in order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(serde_json::Error::custom("not a JSON object").into());
    }
    Ok(serde_json::from_slice::<Body>(body)?.id)
}

/// When the callback arrived, to the millisecond; `None` unless its id is a UUID v7, such as the
/// producer generates.
pub(crate) fn accepted_at(callback_id: &str) -> Option<SystemTime> {
    let id = Uuid::try_parse(callback_id).ok().filter(|id| id.get_version_num() == 7)?;
    let (seconds, nanoseconds) = id.get_timestamp()?.to_unix();
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_id_is_decoded() {
        for id in [0, 42, -1, i64::MAX, i64::MIN] {
            assert_eq!(decode(&encode(id)).unwrap(), id);
        }
        assert_eq!(encode(42), br#"{"id":42}"#);
    }

    #[test]
    fn message_of_the_go_producer_is_decoded() {
        assert_eq!(decode(br#"{"ID":42}"#).unwrap(), 42);
        assert_eq!(decode(br#"{"Id":42,"Seen":"never"}"#).unwrap(), 42);
    }

    #[test]
    fn callback_id_contains_the_time_of_arrival() {
        let before = SystemTime::now() - Duration::from_millis(1);
        let accepted_at_from_id = accepted_at(&Uuid::now_v7().to_string()).unwrap();
        assert!(before <= accepted_at_from_id && accepted_at_from_id <= SystemTime::now());
        let uuid_v4 = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        for id in ["", "callback-1", uuid_v4] {
            assert_eq!(accepted_at(id), None, "{id:?}");
        }
    }

    #[test]
    fn body_without_a_single_64_bit_id_is_refused() {
        let bodies: [&[u8]; 8] = [
            b"",
            b"42",
            b"{}",
            br#"{"id":"42"}"#,
            br#"{"id":4.2}"#,
            br#"{"id":9223372036854775808}"#,
            br#"{"id":1,"ID":2}"#,
            b"\xff\xfe",
        ];
        for body in bodies {
            assert!(decode(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
    }
}
