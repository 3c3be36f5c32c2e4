//! Signed callbacks, as in Standard Webhooks 1.0. The sender signs the callback's id, the time and
//! the body with its [`Keys`]. The receiver has the same keys. It reads the headers as a [`Claim`],
//! and verifies the claim once the body has arrived.

mod claim;
mod keys;

use axum::http::HeaderName;

pub use claim::{Claim, Fingerprint, Refusal};
pub use keys::{KeyProblem, Keys, KeysError, SignatureHeaders};

/// The id of the callback; a repeat has the same id.
pub const ID: HeaderName = HeaderName::from_static(STANDARD.id);
/// The time of sending, in whole seconds since 1970.
pub const TIMESTAMP: HeaderName = HeaderName::from_static(STANDARD.timestamp);
/// The signatures, one by each key of the sender, separated by spaces.
pub const SIGNATURE: HeaderName = HeaderName::from_static(STANDARD.signature);

/// The names of the headers of one callback: [`STANDARD`] or [`SVIX`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeaderNames {
    pub(crate) id: &'static str,
    pub(crate) timestamp: &'static str,
    pub(crate) signature: &'static str,
}

/// The headers of Standard Webhooks.
const STANDARD: HeaderNames = HeaderNames {
    id: "webhook-id",
    timestamp: "webhook-timestamp",
    signature: "webhook-signature",
};
/// The headers that Svix uses for the same values.
const SVIX: HeaderNames =
    HeaderNames { id: "svix-id", timestamp: "svix-timestamp", signature: "svix-signature" };

/// The version of signatures with HMAC-SHA256.
const VERSION: &str = "v1";

/// The setting that sender and receiver share. Without a secret, callbacks are not signed.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Authenticity")]
#[group(skip)]
pub struct Authenticity {
    /// Keys that sign callbacks (Standard Webhooks): `whsec_`, then 24 to 64 bytes as base64. To
    /// replace a key, set several keys, separated by spaces or commas: the first key signs, all
    /// keys verify. If not set, callbacks are not signed
    #[arg(long, global = true)]
    pub callback_secret: Option<Keys>,
}
