//! Signed callbacks, by Standard Webhooks 1.0. The sender signs the callback's id, the time and the body with its [`Keys`]. The
//! receiver, who has the same keys, reads the headers as a [`Claim`] and verifies it once the body has arrived.

mod claim;
mod keys;

use http::HeaderName;

pub use claim::{Claim, Fingerprint, Refusal};
pub use keys::{KeyProblem, Keys, KeysError, Signed};

/// Names the callback; a repeat of the callback has the same.
pub const ID: HeaderName = HeaderName::from_static(STANDARD.id);
/// When it was sent, in whole seconds since 1970.
pub const TIMESTAMP: HeaderName = HeaderName::from_static(STANDARD.timestamp);
/// Its signatures, one by each key of the sender, separated by spaces.
pub const SIGNATURE: HeaderName = HeaderName::from_static(STANDARD.signature);

/// The names of the headers of one callback. All three come from the same set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    pub(crate) id: &'static str,
    pub(crate) timestamp: &'static str,
    pub(crate) signature: &'static str,
}

/// Those of Standard Webhooks.
const STANDARD: Names =
    Names { id: "webhook-id", timestamp: "webhook-timestamp", signature: "webhook-signature" };
/// Those that senders behind Svix use for the same values.
const SVIX: Names =
    Names { id: "svix-id", timestamp: "svix-timestamp", signature: "svix-signature" };

/// The version of signatures by HMAC-SHA256.
const VERSION: &str = "v1";

/// The setting of both sides: off if there is no secret.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Authenticity")]
#[group(skip)]
pub struct Authenticity {
    /// Keys that callbacks are signed with (Standard Webhooks): `whsec_`, then 24 to 64 bytes as base64; several, separated by spaces or commas, while one replaces the other, the first being the one to sign with; if not set, callbacks are not signed
    #[arg(long, global = true)]
    pub callback_secret: Option<Keys>,
}
