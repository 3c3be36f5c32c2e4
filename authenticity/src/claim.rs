//! The headers of a signed callback, and their verification.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderMap;
use sha2::{Digest as _, Sha256};

use crate::keys::{Keys, unix_seconds};
use crate::{Names, STANDARD, SVIX, VERSION};

/// How far the sender's clock may be from ours, either way. A callback that was recorded by somebody
/// else can be sent again for as long.
const TOLERANCE: Duration = Duration::from_mins(5);

/// What tells one callback from all others: made of its id and its body.
///
/// The body is in it so that a sender that uses an id twice loses nothing. Its 128 bits are of a
/// cryptographic hash, so that two callbacks never share one by chance.
pub type Fingerprint = [u8; 16];

/// Seconds since 1970 stay below this until the year 5138, and milliseconds have been above it since 1973.
const MILLISECONDS_FROM: u64 = 100_000_000_000;

/// Why a callback's signature is not accepted, in words for the sender.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not signed at all, or not in full.
    #[error("the header {0} is missing: callbacks must be signed here, by Standard Webhooks")]
    Missing(&'static str),
    /// It would not be clear which one was signed.
    #[error("the header {0} is there more than once")]
    Repeated(&'static str),
    /// Not as the specification has it.
    #[error("the header {0} must be {1}")]
    Malformed(&'static str, &'static str),
    /// In milliseconds, or an even smaller unit.
    #[error("the header {0} must be in seconds since 1970; its value looks like milliseconds")]
    Milliseconds(&'static str),
    /// Sent too long ago, or a clock is wrong.
    #[error("the header {0} is {1} s before this server's clock; at most 300 s are allowed")]
    TooOld(&'static str, u64),
    /// A clock is wrong.
    #[error("the header {0} is {1} s ahead of this server's clock; at most 300 s are allowed")]
    TooNew(&'static str, u64),
    /// Signed with other keys, or changed on the way.
    #[error(
        "no v1 signature in the header {0} was made with a key of this server for this id, timestamp and body"
    )]
    NotOurs(&'static str),
}

/// The values of the headers, which are not verified yet.
#[derive(Debug)]
pub struct Claim<'a> {
    names: Names,
    id: &'a str,
    timestamp: &'a str,
    signatures: Vec<[u8; 32]>,
}

impl<'a> Claim<'a> {
    /// Reads the headers. It costs next to nothing, so that a client which does not sign need not
    /// even be listened to further.
    ///
    /// # Errors
    /// [`Refusal`] for whatever can be seen without the body.
    pub fn read(headers: &'a HeaderMap, now: SystemTime) -> Result<Self, Refusal> {
        let names = names(headers);
        let id = only(headers, names.id)?;
        // With a full stop in it, one signature would stand for several splits of the signed text.
        if id.is_empty() || id.contains('.') {
            return Err(Refusal::Malformed(names.id, "a text without full stops"));
        }
        let timestamp = only(headers, names.timestamp)?;
        let digits = timestamp.bytes().all(|letter| letter.is_ascii_digit());
        let sent_at = timestamp.parse::<u64>().ok().filter(|_| digits);
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
        let signatures = only(headers, names.signature)?.split(' ').filter_map(signature).collect();
        Ok(Self { names, id, timestamp, signatures })
    }

    /// That the sender has one of the `keys`, and signed this very body.
    ///
    /// # Errors
    /// [`Refusal::NotOurs`].
    pub fn verify(&self, keys: &Keys, body: &[u8]) -> Result<Fingerprint, Refusal> {
        // Without a signature to compare with, the body need not be hashed.
        if self.signatures.is_empty()
            || !keys.any_made(&self.signatures, self.id, self.timestamp, body)
        {
            return Err(Refusal::NotOurs(self.names.signature));
        }
        let mut hash = Sha256::new();
        hash.update(self.id);
        // No id has one, so this ends it.
        hash.update(".");
        hash.update(body);
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(&hash.finalize()[..16]);
        Ok(fingerprint)
    }
}

/// The set of headers that the callback uses. The two sets are never mixed: a callback with any header of Standard Webhooks must have all of
/// them.
fn names(headers: &HeaderMap) -> Names {
    let has_any = |names: Names| {
        [names.id, names.timestamp, names.signature].iter().any(|&name| headers.contains_key(name))
    };
    if !has_any(STANDARD) && has_any(SVIX) { SVIX } else { STANDARD }
}

/// The text of a header that must be there once.
fn only<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or(Refusal::Missing(name))?;
    if values.next().is_some() {
        return Err(Refusal::Repeated(name));
    }
    value.to_str().map_err(|_| Refusal::Malformed(name, "printable ASCII"))
}

/// One of the list's signatures, if it is of our version and right in form.
fn signature(text: &str) -> Option<[u8; 32]> {
    let (version, encoded) = text.split_once(',')?;
    let bytes = (version == VERSION).then(|| BASE64_STANDARD.decode(encoded).ok())??;
    bytes.try_into().ok()
}
