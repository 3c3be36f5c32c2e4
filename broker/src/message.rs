//! What is published: one object id.

use serde::Deserialize;
use serde::de::Error as _;

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
