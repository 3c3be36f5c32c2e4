//! Reads and verifies the headers of a signed callback.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

use super::keys::{Keys, unix_seconds};
use super::{HeaderNames, STANDARD, SVIX, VERSION};

/// The allowed difference, in either direction, between the clocks of sender and receiver. An
/// attacker can replay a recorded callback for this time.
const TOLERANCE: Duration = Duration::from_mins(5);

/// Identifies a callback by its id and its body.
///
/// The fingerprint covers the body, so that a sender that uses one id for two callbacks loses
/// neither. It consists of 128 bits of a cryptographic hash, so two callbacks never have the same
/// fingerprint by chance.
pub type Fingerprint = [u8; 16];

/// Seconds since 1970 stay below this until the year 5138, and milliseconds have been above it
/// since 1973.
const MILLISECONDS_FROM: u64 = 100_000_000_000;

/// The reason why a callback's signature is not accepted, worded for the sender.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A header is missing.
    #[error("the header {0} is missing: callbacks must be signed here, by Standard Webhooks")]
    Missing(&'static str),
    /// A header is repeated, so it is not clear which value was signed.
    #[error("the header {0} must not be repeated")]
    Repeated(&'static str),
    /// A header breaks the specification.
    #[error("the header {0} must be {1}")]
    Malformed(&'static str, &'static str),
    /// The timestamp is in milliseconds, or an even smaller unit.
    #[error("the header {0} must be in seconds since 1970; its value looks like milliseconds")]
    Milliseconds(&'static str),
    /// The callback was sent too long ago, or a clock is wrong.
    #[error("the header {0} is {1} s before this server's clock; at most 300 s are allowed")]
    TooOld(&'static str, u64),
    /// The timestamp is in the future: a clock is wrong.
    #[error("the header {0} is {1} s ahead of this server's clock; at most 300 s are allowed")]
    TooNew(&'static str, u64),
    /// The callback was signed with other keys, or changed on the way.
    #[error(
        "no v1 signature in the header {0} was made with a key of this server for this id, timestamp and body"
    )]
    NoMatch(&'static str),
}

/// The values of the headers, not verified yet.
#[derive(Debug)]
pub struct Claim<'a> {
    names: HeaderNames,
    id: &'a str,
    timestamp: &'a str,
    signatures: Vec<[u8; 32]>,
}

impl<'a> Claim<'a> {
    /// Reads the headers, for which the body is not needed, so the server can reject an unsigned
    /// callback before it reads the body.
    ///
    /// # Errors
    /// [`Refusal`] for any fault that the headers alone show.
    pub fn read(headers: &'a HeaderMap, now: SystemTime) -> Result<Self, Refusal> {
        let names = header_names(headers);
        let id = single(headers, names.id)?;
        // Full stops separate the signed parts, so a full stop in the id would make their
        // boundaries ambiguous.
        if id.is_empty() || id.contains('.') {
            return Err(Refusal::Malformed(names.id, "a text without full stops"));
        }
        let timestamp = single(headers, names.timestamp)?;
        let is_digits = timestamp.bytes().all(|letter| letter.is_ascii_digit());
        let sent_at = timestamp.parse::<u64>().ok().filter(|_| is_digits);
        let sent_at = sent_at
            .ok_or(Refusal::Malformed(names.timestamp, "whole seconds since 1970, in digits"))?;
        if sent_at >= MILLISECONDS_FROM {
            return Err(Refusal::Milliseconds(names.timestamp));
        }
        let now = unix_seconds(now);
        if now.saturating_sub(sent_at) > TOLERANCE.as_secs() {
            return Err(Refusal::TooOld(names.timestamp, now - sent_at));
        }
        if sent_at.saturating_sub(now) > TOLERANCE.as_secs() {
            return Err(Refusal::TooNew(names.timestamp, sent_at - now));
        }
        let signatures =
            single(headers, names.signature)?.split(' ').filter_map(signature).collect();
        Ok(Self { names, id, timestamp, signatures })
    }

    /// Verifies that the sender has one of the `keys` and signed this body.
    ///
    /// # Errors
    /// [`Refusal::NoMatch`] if no signature matches.
    pub fn verify(&self, keys: &Keys, body: &[u8]) -> Result<Fingerprint, Refusal> {
        // Without a signature to compare, hashing the body would be wasted work.
        if self.signatures.is_empty()
            || !keys.verifies_any(&self.signatures, self.id, self.timestamp, body)
        {
            return Err(Refusal::NoMatch(self.names.signature));
        }
        let mut hash = Sha256::new();
        hash.update(self.id);
        // No id contains a full stop, so this full stop marks the end of the id.
        hash.update(".");
        hash.update(body);
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(&hash.finalize()[..16]);
        Ok(fingerprint)
    }
}

/// The set of headers that the callback uses. The two sets are never mixed: a callback with any
/// header of Standard Webhooks must have all of them.
fn header_names(headers: &HeaderMap) -> HeaderNames {
    let has_any = |names: HeaderNames| {
        [names.id, names.timestamp, names.signature].iter().any(|&name| headers.contains_key(name))
    };
    if !has_any(STANDARD) && has_any(SVIX) { SVIX } else { STANDARD }
}

/// The text of a header that must occur exactly once.
fn single<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or(Refusal::Missing(name))?;
    if values.next().is_some() {
        return Err(Refusal::Repeated(name));
    }
    value.to_str().map_err(|_| Refusal::Malformed(name, "printable ASCII"))
}

/// Decodes one item of the list, if it is a well-formed signature of version [`VERSION`].
fn signature(text: &str) -> Option<[u8; 32]> {
    let (version, encoded) = text.split_once(',')?;
    let bytes = (version == VERSION).then(|| BASE64_STANDARD.decode(encoded).ok())??;
    bytes.try_into().ok()
}
