//! Who may post callbacks: anybody, or, with `CALLBACK_SECRET`, whoever signs them.
//!
//! Decision: docs/decisions/0011-how-are-signatures-verified.md

use std::time::SystemTime;

use authenticity::{Claim, Fingerprint, Keys, Refusal};
use axum::http::{HeaderMap, StatusCode};
use service::problem::Problem;
use tokio::time::timeout_at;

use crate::deadline::Deadline;
use crate::duplicate_filter::{Repeats, Turn};

/// Checks signatures, if callbacks must be signed.
pub(crate) struct Signatures {
    keys: Option<Keys>,
    repeats: Repeats,
}

/// A callback whose body is still to be verified.
pub(crate) struct Unverified<'a>(Option<(&'a Keys, Claim<'a>)>);

impl Signatures {
    pub(crate) fn new(keys: Option<Keys>) -> Self {
        Self { keys, repeats: Repeats::default() }
    }

    /// Looks at the headers. A client that does not sign ends here, before its body is read.
    ///
    /// # Errors
    /// A 401 that says what is missing or wrong.
    pub(crate) fn claimed<'a>(&'a self, headers: &'a HeaderMap) -> Result<Unverified<'a>, Problem> {
        let Some(keys) = &self.keys else { return Ok(Unverified(None)) };
        let claim = Claim::read(headers, SystemTime::now()).map_err(unauthorized)?;
        Ok(Unverified(Some((keys, claim))))
    }

    /// Finds out whether the callback is still to be published, and waits while another request publishes
    /// the same callback. It leaves time to publish it if the other request fails.
    ///
    /// # Errors
    /// A 503 when the other takes too long.
    pub(crate) async fn turn(
        &self,
        fingerprint: Fingerprint,
        deadline: Deadline,
    ) -> Result<Turn<'_>, Problem> {
        let turn = timeout_at(deadline.halfway(), self.repeats.turn(fingerprint)).await;
        let turn = turn.map_err(|_| Problem {
            status: StatusCode::SERVICE_UNAVAILABLE,
            detail: "the same callback came before and is not durable yet: send it again"
                .to_owned(),
            retry_after_seconds: Some(1),
        })?;
        if let Turn::Published = turn {
            metrics::counter!("lastseen_callback_repeats_total").increment(1);
        }
        Ok(turn)
    }
}

impl Unverified<'_> {
    /// That the body is the one that was signed; tells the callback from others then, if it is signed.
    ///
    /// # Errors
    /// A 401.
    pub(crate) fn verify(&self, body: &[u8]) -> Result<Option<Fingerprint>, Problem> {
        let verified = self.0.as_ref().map(|(keys, claim)| claim.verify(keys, body));
        verified.transpose().map_err(unauthorized)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "map_err passes it so")]
fn unauthorized(refusal: Refusal) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, refusal.to_string())
}
