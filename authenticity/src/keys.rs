//! The keys that the two sides share, and signing.

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

use crate::VERSION;

const PREFIX: &str = "whsec_";
/// As the specification has it: a shorter one could be guessed.
const KEY_BYTES: RangeInclusive<usize> = 24..=64;
/// Keys are written with their padding or without.
const KEY_ENCODING: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// One key or several. They are in no log: their `Debug` tells how many they are.
#[derive(Clone)]
pub struct Keys {
    /// To sign with.
    first: Hmac<Sha256>,
    /// To verify with as well.
    others: Vec<Hmac<Sha256>>,
}

/// Why a text holds no keys. It does not quote the text.
#[derive(Debug, thiserror::Error)]
#[error("expected whsec_ and 24 to 64 bytes as base64, or several of these separated by spaces")]
pub struct KeysError;

/// What makes a callback a signed one: the values of its headers.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The value of [`crate::TIMESTAMP`].
    pub timestamp: String,
    /// The value of [`crate::SIGNATURE`].
    pub signature: String,
}

impl Keys {
    /// Signs a callback of this id and body, sent now, with the first key.
    #[must_use]
    pub fn sign(&self, id: &str, now: SystemTime, body: &[u8]) -> Signed {
        let timestamp = unix_seconds(now).to_string();
        let tag = signing(&self.first, id, &timestamp, body).finalize().into_bytes();
        let signature = format!("{VERSION},{}", BASE64_STANDARD.encode(tag));
        Signed { timestamp, signature }
    }

    /// Whether one of the `signatures` is by one of the keys. It takes as long for a signature that
    /// is nearly right as for one that is not at all.
    pub(crate) fn any_made(
        &self,
        signatures: &[[u8; 32]],
        id: &str,
        timestamp: &str,
        body: &[u8],
    ) -> bool {
        std::iter::once(&self.first).chain(&self.others).any(|key| {
            let signing = signing(key, id, timestamp, body);
            signatures.iter().any(|signature| signing.clone().verify_slice(signature).is_ok())
        })
    }
}

impl FromStr for Keys {
    type Err = KeysError;

    fn from_str(text: &str) -> Result<Self, KeysError> {
        let separators = |letter: char| letter.is_ascii_whitespace() || letter == ',';
        let mut keys = text.split(separators).filter(|key| !key.is_empty()).map(key);
        let first = keys.next().ok_or(KeysError)??;
        Ok(Self { first, others: keys.collect::<Result<_, _>>()? })
    }
}

impl Debug for Keys {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "Keys({})", 1 + self.others.len())
    }
}

fn key(text: &str) -> Result<Hmac<Sha256>, KeysError> {
    let encoded = text.strip_prefix(PREFIX).ok_or(KeysError)?;
    let bytes = KEY_ENCODING.decode(encoded).map_err(|_| KeysError)?;
    if !KEY_BYTES.contains(&bytes.len()) {
        return Err(KeysError);
    }
    Hmac::new_from_slice(&bytes).map_err(|_| KeysError)
}

/// The signature of this content, all but finished.
fn signing(key: &Hmac<Sha256>, id: &str, timestamp: &str, body: &[u8]) -> Hmac<Sha256> {
    let mut signing = key.clone();
    for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
        signing.update(part);
    }
    signing
}

/// A clock that is set before 1970 counts as at 1970.
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
    fn the_published_vectors_are_signed_as_published() {
        let body = r#"{"test": 2432232314}"#;
        let signed = signature(KEY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");

        let key = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
        let body = r#"{"email":"test@example.com","username":"test_user"}"#;
        let signed = signature(key, "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1_649_367_553, body);
        assert_eq!(signed, "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=");
    }

    #[test]
    fn several_keys_are_separated_by_spaces_or_commas_and_the_first_signs() {
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

    #[test]
    fn what_is_no_key_is_refused_without_being_quoted() {
        let too_short = format!("whsec_{}", BASE64_STANDARD.encode([7; 23]));
        let too_long = format!("whsec_{}", BASE64_STANDARD.encode([7; 65]));
        let one_bad = format!("{KEY} nonsense");
        for text in ["", " , ", "whsec_", "whsec_????", &KEY[6..], &too_short, &too_long, &one_bad]
        {
            let error = text.parse::<Keys>().unwrap_err().to_string();
            assert!(error.starts_with("expected whsec_ and 24 to 64 bytes"), "{error}");
        }
    }
}
