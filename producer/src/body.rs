//! From a request to the whole of its body, within limits of size, time and memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use http_body_util::BodyExt as _;
use service::problem::Problem;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::Callbacks;

/// What a body may take without asking for room. A callback of 200 ids has 4 KiB at most, so the
/// callbacks of every day never wait for the large ones.
const SMALL_BYTES: usize = 16 << 10;
/// What the large bodies may take together. Without this bound, clients who send all of a large body
/// but its end could have `MAX_BODY_BYTES` of memory for each connection.
const LARGE_BYTES_TOTAL: usize = 64 << 20;

/// Reads bodies.
pub(crate) struct Bodies {
    max_bytes: usize,
    within: Duration,
    /// One permit for each large body that may be held.
    room: Arc<Semaphore>,
}

/// A body, with the room that it takes up until it is dropped.
#[derive(Default)]
pub(crate) struct Whole {
    pub(crate) bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl Bodies {
    pub(crate) fn new(config: &Callbacks) -> Self {
        let max_bytes = config.max_body_bytes;
        let room = Arc::new(Semaphore::new((LARGE_BYTES_TOTAL / max_bytes).max(1)));
        Self { max_bytes, within: config.body_timeout, room }
    }

    /// Reads the body to its end.
    ///
    /// # Errors
    /// A 408, 413 or 415, or a 400 for a body that breaks off or is in no right form.
    pub(crate) async fn read(&self, headers: &HeaderMap, body: Body) -> Result<Whole, Problem> {
        may_be_json(headers)?;
        // What says itself that it is too large is not read at all.
        if body.size_hint().lower() > self.max_bytes as u64 {
            return Err(self.too_large());
        }
        timeout(self.within, self.collect(body)).await.unwrap_or_else(|_| {
            let detail = format!("the body did not arrive within {:?}", self.within);
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, detail))
        })
    }

    async fn collect(&self, mut body: Body) -> Result<Whole, Problem> {
        let mut whole = Whole::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                let detail = format!("the body could not be read: {error}");
                Problem::new(StatusCode::BAD_REQUEST, detail)
            })?;
            // What is no data is a trailer, which says nothing to us.
            let Ok(data) = frame.into_data() else { continue };
            let bytes = whole.bytes.len() + data.len();
            if bytes > self.max_bytes {
                return Err(self.too_large());
            }
            if bytes > SMALL_BYTES && whole.room.is_none() {
                // Nothing closes the semaphore. While this waits, the client has to wait as well.
                whole.room = Arc::clone(&self.room).acquire_owned().await.ok();
            }
            whole.bytes.extend_from_slice(&data);
        }
        Ok(whole)
    }

    fn too_large(&self) -> Problem {
        let detail = format!("the body is over {} bytes: send several callbacks", self.max_bytes);
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    }
}

/// Refuses what says itself that it is not JSON in UTF-8: it may still look like it.
fn may_be_json(headers: &HeaderMap) -> Result<(), Problem> {
    for encoding in texts(headers, header::CONTENT_ENCODING) {
        if !encoding.trim().eq_ignore_ascii_case("identity") {
            return Err(unsupported(
                "the content-encoding must be identity: send the JSON as it is",
            ));
        }
    }
    for content_type in texts(headers, header::CONTENT_TYPE) {
        let mut parts = content_type.split(';').map(|part| part.trim().to_ascii_lowercase());
        let kind = parts.next().unwrap_or_default();
        // The last two are what clients say of a text of which they were told nothing.
        let json =
            ["application/json", "text/json", "text/plain", "application/x-www-form-urlencoded"];
        if !json.contains(&kind.as_str()) && !kind.ends_with("+json") {
            return Err(unsupported("the content-type must be application/json"));
        }
        let charset = parts.find_map(|part| Some(part.strip_prefix("charset=")?.to_owned()));
        if charset
            .is_some_and(|charset| !["utf-8", "us-ascii"].contains(&charset.trim_matches('"')))
        {
            return Err(unsupported("the charset must be utf-8"));
        }
    }
    Ok(())
}

/// The values of a header; one that is no text counts as something that nobody knows.
fn texts(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("?"))
}

fn unsupported(detail: &str) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
}
