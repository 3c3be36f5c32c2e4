//! The keys that sender and receiver share, and signing with them.

use std::fmt::{self, Debug, Formatter};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::VERSION;

const PREFIX: &str = "whsec_";
/// The length of a key that the specification requires. A shorter key could be guessed.
const KEY_BYTES: RangeInclusive<usize> = 24..=64;
/// Accepts keys with and without padding.
const KEY_ENCODING: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// One or more keys. `Debug` prints only their number, so that no log contains a key.
#[derive(Clone)]
pub struct Keys {
    /// The key that signs; it also verifies.
    first: Hmac<Sha256>,
    /// The other keys that verify.
    others: Vec<Hmac<Sha256>>,
}

/// The reason why a text is not a list of keys. The error never quotes a key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// The text contains only separators.
    #[error("there is no key: expected whsec_ and 24 to 64 bytes as base64")]
    Empty,
    /// One of the keys breaks a rule.
    #[error("key {position} of {total} {problem}")]
    Key {
        /// The position of the key, from 1.
        position: usize,
        /// The number of keys.
        total: usize,
        /// The rule that the key breaks.
        problem: KeyProblem,
    },
}

/// The rule that a key breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyProblem {
    /// The key was copied together with the version of signatures: `v1,whsec_…`.
    #[error("is the version of a signature: remove \"v1,\" or \"v1a,\" before whsec_")]
    Version,
    /// The key was copied from a file together with its quotation marks.
    #[error("contains a quotation mark: write the key without quotes")]
    Quoted,
    /// The key does not begin with `whsec_`.
    #[error("does not begin with whsec_")]
    NoPrefix,
    /// The key is hexadecimal. It would also decode as base64, but to other bytes.
    #[error("is hexadecimal: write its bytes as base64 after whsec_")]
    Hexadecimal,
    /// The key is not base64 in the standard alphabet.
    #[error("is not base64 after whsec_: letters, digits, + and / are allowed, and = at the end")]
    NotBase64,
    /// The key is too short or too long.
    #[error("has {0} bytes after whsec_: 24 to 64 are allowed")]
    Length(usize),
}

/// The values of the headers that sign a callback.
#[derive(Clone, Debug)]
pub struct SignatureHeaders {
    /// The value of [`super::TIMESTAMP`].
    pub timestamp: String,
    /// The value of [`super::SIGNATURE`].
    pub signature: String,
}

impl Keys {
    /// Signs a callback with the first key. `now` is the time of sending.
    #[must_use]
    pub fn sign(&self, id: &str, now: SystemTime, body: &[u8]) -> SignatureHeaders {
        let timestamp = unix_seconds(now).to_string();
        let tag = mac(&self.first, id, &timestamp, body).finalize().into_bytes();
        let signature = format!("{VERSION},{}", BASE64_STANDARD.encode(tag));
        SignatureHeaders { timestamp, signature }
    }

    /// Whether one of the keys made one of the `signatures`. The comparison takes constant time, so
    /// that an attacker cannot guess a signature byte by byte.
    pub(crate) fn verifies_any(
        &self,
        signatures: &[[u8; 32]],
        id: &str,
        timestamp: &str,
        body: &[u8],
    ) -> bool {
        std::iter::once(&self.first).chain(&self.others).any(|key| {
            let mac = mac(key, id, timestamp, body);
            signatures.iter().any(|signature| mac.clone().verify_slice(signature).is_ok())
        })
    }
}

impl FromStr for Keys {
    type Err = KeysError;

    fn from_str(text: &str) -> Result<Self, KeysError> {
        let separators = |letter: char| letter.is_ascii_whitespace() || letter == ',';
        let texts: Vec<&str> = text.split(separators).filter(|key| !key.is_empty()).collect();
        let total = texts.len();
        let at = |position| move |problem| KeysError::Key { position, total, problem };
        let keys = texts.into_iter().zip(1..).map(|(text, n)| parse_key(text).map_err(at(n)));
        let mut keys = keys.collect::<Result<Vec<_>, _>>()?.into_iter();
        let first = keys.next().ok_or(KeysError::Empty)?;
        Ok(Self { first, others: keys.collect() })
    }
}

impl Debug for Keys {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "Keys({})", 1 + self.others.len())
    }
}

fn parse_key(text: &str) -> Result<Hmac<Sha256>, KeyProblem> {
    if ["v1", "v1a"].contains(&text) {
        return Err(KeyProblem::Version);
    }
    if text.contains(['"', '\'', '`']) {
        return Err(KeyProblem::Quoted);
    }
    let encoded = text.strip_prefix(PREFIX).ok_or(KeyProblem::NoPrefix)?;
    if is_hexadecimal(encoded) {
        return Err(KeyProblem::Hexadecimal);
    }
    let bytes = KEY_ENCODING.decode(encoded).map_err(|_| KeyProblem::NotBase64)?;
    if !KEY_BYTES.contains(&bytes.len()) {
        return Err(KeyProblem::Length(bytes.len()));
    }
    // This cannot fail, because HMAC accepts keys of any length.
    Hmac::new_from_slice(&bytes).map_err(|_| KeyProblem::Length(bytes.len()))
}

/// Whether the text is hexadecimal rather than base64. Of 10^15 random keys in base64, about one
/// consists only of hexadecimal digits.
fn is_hexadecimal(text: &str) -> bool {
    text.len() >= 32
        && text.bytes().all(|letter| letter.is_ascii_hexdigit())
        && text.bytes().any(|letter| letter.is_ascii_digit())
}

/// The message authentication code (MAC) of the signed content, not finalised yet.
fn mac(key: &Hmac<Sha256>, id: &str, timestamp: &str, body: &[u8]) -> Hmac<Sha256> {
    let mut mac = key.clone();
    for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
        mac.update(part);
    }
    mac
}

/// Seconds since 1970; 0 for an earlier time.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn signature(key: &str, id: &str, seconds: u64, body: &str) -> String {
        let now = UNIX_EPOCH + Duration::from_secs(seconds);
        key.parse::<Keys>().unwrap().sign(id, now, body.as_bytes()).signature
    }

    #[test]
    fn published_test_vectors_are_signed_as_published() {
        let body = r#"{"test": 2432232314}"#;
        let signed = signature(KEY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");

        let key = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let body = r#"{"email":"test@example.com","username":"test_user"}"#;
        let signed = signature(key, "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1_649_367_553, body);
        assert_eq!(signed, "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=");
    }

    #[test]
    fn first_of_several_keys_signs() {
        let second = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        for both in [format!("{KEY} {second}"), format!(" {KEY},\n{second} ,")] {
            assert_eq!(format!("{:?}", both.parse::<Keys>().unwrap()), "Keys(2)");
            assert_eq!(signature(&both, "a", 1, "b"), signature(KEY, "a", 1, "b"));
        }
    }

    #[test]
    fn padding_of_a_key_may_be_left_out() {
        let padded = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwAA==";
        let bare = padded.trim_end_matches('=');
        assert_eq!(signature(padded, "a", 1, "b"), signature(bare, "a", 1, "b"));
    }

    /// Field case 8.2.
    #[test]
    fn each_mistake_in_a_key_has_its_own_error() {
        let hexadecimal = format!("whsec_{}", "0123456789abcdef".repeat(4));
        let too_short = format!("whsec_{}", BASE64_STANDARD.encode([7; 23]));
        let too_long = format!("whsec_{}", BASE64_STANDARD.encode([7; 65]));
        let mistakes = [
            (format!("v1,{KEY}"), KeyProblem::Version),
            (format!("\"{KEY}\""), KeyProblem::Quoted),
            (format!("'{KEY}'"), KeyProblem::Quoted),
            (KEY[6..].to_owned(), KeyProblem::NoPrefix),
            (hexadecimal, KeyProblem::Hexadecimal),
            ("whsec_????".to_owned(), KeyProblem::NotBase64),
            ("whsec_".to_owned(), KeyProblem::Length(0)),
            (too_short, KeyProblem::Length(23)),
            (too_long, KeyProblem::Length(65)),
        ];
        for (text, problem) in mistakes {
            let Err(KeysError::Key { position: 1, problem: found, .. }) = text.parse::<Keys>()
            else {
                panic!("{text} should be rejected because of its first key");
            };
            assert_eq!(found, problem, "{text}");
        }
        for text in ["", " , "] {
            assert_eq!(text.parse::<Keys>().unwrap_err(), KeysError::Empty);
        }
    }

    #[test]
    fn error_has_the_position_of_the_key_and_not_the_key() {
        let error = format!("{KEY} nonsense").parse::<Keys>().unwrap_err().to_string();
        assert_eq!(error, "key 2 of 2 does not begin with whsec_");
    }
}
