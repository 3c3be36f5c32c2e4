//! With `CALLBACK_SECRET`, accepts only signed callbacks.
//!
//! Decision: docs/decisions/0011-how-are-signatures-verified.md

use std::time::SystemTime;

use axum::http::{HeaderMap, StatusCode};
use runtime::authenticity::{Claim, Fingerprint, Keys, Refusal};
use runtime::problem::Problem;
use tokio::time::timeout_at;

use crate::deadline::Deadline;
use crate::duplicate_filter::{Admission, DuplicateFilter};

pub(crate) struct Signatures {
    keys: Option<Keys>,
    duplicates: DuplicateFilter,
}

/// The signature of a callback whose body is not verified yet. Empty if callbacks need no
/// signature.
pub(crate) struct UnverifiedSignature<'a>(Option<(&'a Keys, Claim<'a>)>);

impl Signatures {
    pub(crate) fn new(keys: Option<Keys>) -> Self {
        Self { keys, duplicates: DuplicateFilter::default() }
    }

    /// Reads the headers, so that a client that does not sign is rejected before its body is read.
    ///
    /// # Errors
    /// A 401 that names the header and what is wrong with it.
    pub(crate) fn read_headers<'a>(
        &'a self,
        headers: &'a HeaderMap,
    ) -> Result<UnverifiedSignature<'a>, Problem> {
        let Some(keys) = &self.keys else { return Ok(UnverifiedSignature(None)) };
        let claim = Claim::read(headers, SystemTime::now()).map_err(unauthorized)?;
        Ok(UnverifiedSignature(Some((keys, claim))))
    }

    /// Admits a callback that is not published yet. Waits while another request publishes the same
    /// callback, and leaves time to publish it if the other request fails.
    ///
    /// # Errors
    /// A 503 when the other request takes too long.
    pub(crate) async fn admit(
        &self,
        fingerprint: Fingerprint,
        deadline: Deadline,
    ) -> Result<Admission<'_>, Problem> {
        let admission = timeout_at(deadline.halfway(), self.duplicates.admit(fingerprint)).await;
        let admission = admission.map_err(|_| Problem {
            status: StatusCode::SERVICE_UNAVAILABLE,
            detail: "another request with the same callback is not finished: send this one again"
                .to_owned(),
            retry_after_seconds: Some(1),
        })?;
        if let Admission::AlreadyPublished = admission {
            metrics::counter!("lastseen_callback_repeats_total").increment(1);
        }
        Ok(admission)
    }
}

impl UnverifiedSignature<'_> {
    /// Verifies that this body was signed. Returns the callback's fingerprint, or `None` if
    /// callbacks need no signature.
    ///
    /// # Errors
    /// A 401 when no signature matches.
    pub(crate) fn verify(&self, body: &[u8]) -> Result<Option<Fingerprint>, Problem> {
        let verified = self.0.as_ref().map(|(keys, claim)| claim.verify(keys, body));
        verified.transpose().map_err(unauthorized)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "map_err passes it by value")]
fn unauthorized(refusal: Refusal) -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, refusal.to_string())
}
