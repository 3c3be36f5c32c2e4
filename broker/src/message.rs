//! What is published: one object id.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde::de::Error as _;
use uuid::Uuid;

/// A body that holds no object id. The message goes to the dead letters as it is.
#[derive(Debug, thiserror::Error)]
#[error("the body is not {{\"id\":<64-bit integer>}}: {0}")]
pub struct DecodeError(#[from] serde_json::Error);

/// The body as the Go services write it (`ID`) and as we do (`id`); other fields are not ours.
#[derive(Deserialize)]
struct Body {
    #[serde(alias = "ID", alias = "Id", alias = "iD")]
    id: i64,
}

/// The body of a message: JSON with the id under `id`, which Go's decoder takes in any case.
pub(crate) fn encode(id: i64) -> Vec<u8> {
    format!("{{\"id\":{id}}}").into_bytes()
}

/// The object id in a body.
///
/// # Errors
/// [`DecodeError`] when the body is no JSON object, has no id, two, or one beyond 64 bits.
pub(crate) fn decode(body: &[u8]) -> Result<i64, DecodeError> {
    // Without this, serde would take the bare list `[42]` for the object's fields in order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(serde_json::Error::custom("it is no JSON object").into());
    }
    Ok(serde_json::from_slice::<Body>(body)?.id)
}

/// When the callback came in, to the millisecond, if its id tells: those of our producer do (UUID v7).
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
    fn what_is_encoded_is_decoded() {
        for id in [0, 42, -1, i64::MAX, i64::MIN] {
            assert_eq!(decode(&encode(id)).unwrap(), id);
        }
        assert_eq!(encode(42), br#"{"id":42}"#);
    }

    #[test]
    fn a_message_of_the_go_producer_is_read() {
        assert_eq!(decode(br#"{"ID":42}"#).unwrap(), 42);
        assert_eq!(decode(br#"{"Id":42,"Seen":"never"}"#).unwrap(), 42);
    }

    #[test]
    fn the_id_of_a_callback_tells_to_the_millisecond_when_it_came_in() {
        let before = SystemTime::now() - Duration::from_millis(1);
        let told = accepted_at(&Uuid::now_v7().to_string()).unwrap();
        assert!(before <= told && told <= SystemTime::now());
        let of_a_partner = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        for id in ["", "callback-1", of_a_partner] {
            assert_eq!(accepted_at(id), None, "{id:?}");
        }
    }

    #[test]
    fn what_names_no_single_64_bit_id_is_refused() {
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
