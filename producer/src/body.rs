//! Reads the whole body of a request, within limits of size, time and memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use http_body_util::BodyExt as _;
use memmap2::MmapMut;
use runtime::problem::Problem;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::config::Callbacks;
use crate::deadline::Deadline;

/// A body up to this size needs no permits. A callback with 200 ids has at most 4 KiB, so ordinary
/// callbacks never wait for large ones.
const SMALL_BYTES: usize = 8 << 10;
/// The memory for all large bodies together. Without this bound, clients that withhold the end of a
/// large body could occupy `MAX_BODY_BYTES` of memory for each connection.
const LARGE_BYTES_TOTAL: usize = 16 << 20;
/// The most bytes that one read from a connection returns.
const READ_BYTES: usize = 16 << 10;
/// A body must arrive at least at this average rate, not counting the first [`GRACE`].
const BYTES_PER_SECOND_MIN: u32 = 16 << 10;
/// Long enough for a packet that is lost and sent again several times.
const GRACE: Duration = Duration::from_secs(2);

pub(crate) struct BodyReader {
    max_bytes: usize,
    timeout: Duration,
    grace: Duration,
    /// One permit for each byte of memory for large bodies.
    memory: Arc<Semaphore>,
}

/// The body of a request. It holds its memory permits until it is dropped.
#[derive(Default)]
pub(crate) struct BufferedBody {
    small: Vec<u8>,
    large: Option<LargeBody>,
    /// One permit for each byte of a large body, and of its next read.
    permits: Option<OwnedSemaphorePermit>,
}

/// A body of more than [`SMALL_BYTES`]. It has its own pages, which are returned to the system on
/// drop; the allocator would keep most of the memory of a thousand large bodies.
struct LargeBody {
    /// Mapped for the largest allowed body. A page takes memory once it is written to.
    pages: MmapMut,
    length: usize,
}

impl BodyReader {
    pub(crate) fn new(config: &Callbacks) -> Self {
        Self::with_memory(config.max_body_bytes, config.body_timeout, LARGE_BYTES_TOTAL)
    }

    fn with_memory(max_bytes: usize, timeout: Duration, total: usize) -> Self {
        let total = total.max(max_bytes).min(Semaphore::MAX_PERMITS);
        Self { max_bytes, timeout, grace: GRACE, memory: Arc::new(Semaphore::new(total)) }
    }

    /// Reads the body to its end.
    ///
    /// # Errors
    /// A 408, 413 or 415, a 400 for a body that breaks off or is malformed, or a 503 if there is no
    /// memory for it by the deadline.
    pub(crate) async fn read(
        &self,
        headers: &HeaderMap,
        mut body: Body,
        deadline: Deadline,
    ) -> Result<BufferedBody, Problem> {
        reject_by_headers(headers)?;
        // A body that is announced as too large is not read at all.
        if body.size_hint().lower() > self.max_bytes as u64 {
            return Err(self.too_large());
        }
        let started = Instant::now();
        let mut buffered = BufferedBody::default();
        loop {
            // Reserve memory before reading the next part. Otherwise a thousand bodies that wait
            // for memory would hold one part each.
            let expected = buffered.bytes().len() + next_read(&body, &buffered);
            self.reserve(&mut buffered, expected, deadline).await?;
            let allowed = self.time_allowed(buffered.bytes().len());
            let frame = match timeout_at(started + allowed, body.frame()).await {
                Ok(None) => return Ok(buffered),
                Ok(Some(frame)) => frame,
                Err(_) => return Err(too_slow(buffered.bytes().len(), allowed)),
            };
            let frame = frame.map_err(|error| {
                let detail = format!("the body could not be read: {error}");
                Problem::new(StatusCode::BAD_REQUEST, detail)
            })?;
            // A frame without data is a trailer, which is ignored.
            let Ok(data) = frame.into_data() else { continue };
            let length = buffered.bytes().len() + data.len();
            if length > self.max_bytes {
                return Err(self.too_large());
            }
            self.reserve(&mut buffered, length, deadline).await?;
            buffered.append(&data, self.max_bytes).map_err(|_| no_memory())?;
        }
    }

    /// How long after the start of a body its next part must arrive, if `received` bytes have
    /// arrived.
    fn time_allowed(&self, received: usize) -> Duration {
        let bytes = u32::try_from(received).unwrap_or(u32::MAX);
        let at_minimum_rate = Duration::from_secs(bytes.into()) / BYTES_PER_SECOND_MIN;
        self.timeout.min(self.grace.saturating_add(at_minimum_rate))
    }

    /// Waits for the permits that a body needs to grow to `length` bytes; a small body needs none.
    /// Meanwhile nothing is read from the client.
    async fn reserve(
        &self,
        body: &mut BufferedBody,
        length: usize,
        deadline: Deadline,
    ) -> Result<(), Problem> {
        let length = length.min(self.max_bytes);
        let held = body.permits.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if length <= SMALL_BYTES || length <= held {
            return Ok(());
        }
        let wanted = u32::try_from(length - held).unwrap_or(u32::MAX);
        let acquired = Arc::clone(&self.memory).acquire_many_owned(wanted);
        // The semaphore is never closed, so the only error is a timeout.
        let Ok(Ok(permits)) = timeout_at(deadline.at(), acquired).await else {
            return Err(no_memory());
        };
        match &mut body.permits {
            Some(held) => held.merge(permits),
            none => *none = Some(permits),
        }
        Ok(())
    }

    fn too_large(&self) -> Problem {
        let detail = format!("the body is over {} bytes: send several callbacks", self.max_bytes);
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    }
}

impl BufferedBody {
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.large {
            Some(LargeBody { pages, length, .. }) => &pages[..*length],
            None => &self.small,
        }
    }

    /// Appends to a body that never exceeds `max_bytes`.
    fn append(&mut self, data: &[u8], max_bytes: usize) -> std::io::Result<()> {
        let length = self.bytes().len();
        if length + data.len() <= SMALL_BYTES {
            self.small.extend_from_slice(data);
            return Ok(());
        }
        let large = if let Some(large) = self.large.take() {
            large
        } else {
            let mut pages = MmapMut::map_anon(max_bytes)?;
            // Without this advice, the kernel may back neighbouring bodies with pages of 2 MiB. The
            // call fails only on kernels without such pages.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::NoHugePage);
            pages[..length].copy_from_slice(&self.small);
            self.small = Vec::new();
            LargeBody { pages, length }
        };
        let LargeBody { pages, length } = self.large.insert(large);
        pages[*length..][..data.len()].copy_from_slice(data);
        *length += data.len();
        Ok(())
    }
}

/// The number of bytes that the next read may add to a body. The first read counts as none, so that
/// a client that sends only the head of a request holds no permits.
fn next_read(body: &Body, buffered: &BufferedBody) -> usize {
    if buffered.bytes().is_empty() {
        return 0;
    }
    let remaining = body.size_hint().upper().and_then(|bytes| usize::try_from(bytes).ok());
    remaining.map_or(READ_BYTES, |remaining| remaining.min(READ_BYTES))
}

fn no_memory() -> Problem {
    Problem {
        status: StatusCode::SERVICE_UNAVAILABLE,
        detail: "no memory for another large body now: send the callback again".to_owned(),
        retry_after_seconds: Some(1),
    }
}

fn too_slow(received: usize, allowed: Duration) -> Problem {
    let detail =
        format!("the body did not arrive within {allowed:?}: {received} bytes were received");
    Problem::new(StatusCode::REQUEST_TIMEOUT, detail)
}

/// Rejects an encoded or multipart body. Any other media type and charset is accepted, because many
/// clients send a wrong one or none with JSON in UTF-8.
fn reject_by_headers(headers: &HeaderMap) -> Result<(), Problem> {
    if texts(headers, header::CONTENT_ENCODING).any(|encoding| !is_identity(encoding)) {
        return Err(unsupported("the content-encoding must be identity: send the JSON as it is"));
    }
    if texts(headers, header::CONTENT_TYPE).any(is_multipart) {
        return Err(unsupported("multipart bodies are not supported: send the JSON alone"));
    }
    Ok(())
}

fn is_identity(encoding: &str) -> bool {
    let encoding = encoding.trim();
    encoding.is_empty() || encoding.eq_ignore_ascii_case("identity")
}

fn is_multipart(content_type: &str) -> bool {
    let kind = content_type.trim_start().split('/').next().unwrap_or_default();
    kind.eq_ignore_ascii_case("multipart")
}

/// The values of a header. A value that is not text becomes `?`, which matches nothing.
fn texts(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("?"))
}

fn unsupported(detail: &str) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(300);
    const MIB: usize = 1 << 20;

    /// A body that stalls after its first bytes.
    fn stalled(bytes: usize) -> Body {
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>(vec![b' '; bytes])]);
        Body::from_stream(futures_util::StreamExt::chain(first, futures_util::stream::pending()))
    }

    async fn read(bodies: &BodyReader, body: Body) -> Result<usize, Problem> {
        let deadline = Deadline::new(Instant::now(), BUDGET);
        let read = bodies.read(&HeaderMap::new(), body, deadline).await;
        read.map(|body| body.bytes().len())
    }

    #[tokio::test]
    async fn body_is_complete_for_any_sizes_of_its_parts() {
        let bodies = BodyReader::with_memory(MIB, BUDGET * 30, MIB);
        for sizes in [vec![], vec![SMALL_BYTES], vec![SMALL_BYTES - 1, 1, 1, 300_000], vec![MIB]] {
            let parts = sizes.iter().zip(1..).map(|(size, value)| vec![value; *size]);
            let parts: Vec<Vec<u8>> = parts.collect();
            let stream =
                futures_util::stream::iter(parts.clone().into_iter().map(Ok::<_, std::io::Error>));
            let deadline = Deadline::new(Instant::now(), BUDGET * 30);
            let body = bodies.read(&HeaderMap::new(), Body::from_stream(stream), deadline).await;
            assert!(body.unwrap().bytes() == parts.concat(), "{sizes:?}");
        }
        assert_eq!(bodies.memory.available_permits(), MIB, "all permits are returned");
    }

    /// Field case 1.12.
    #[tokio::test]
    async fn stalled_bodies_hold_only_what_has_arrived() {
        let bodies = BodyReader::with_memory(MIB, BUDGET * 3, 64 * MIB);
        // If each held MAX_BODY_BYTES, only 64 would have memory, and the others would get a 503.
        let stalled = (0..160).map(|_| read(&bodies, stalled(17 << 10)));
        let stalled = futures_util::future::join_all(stalled);
        let other = read(&bodies, Body::from(vec![b' '; 24 << 10]));
        let (stalled, other) = tokio::join!(stalled, other);
        assert_eq!(other.unwrap(), 24 << 10);
        for problem in stalled {
            assert_eq!(problem.unwrap_err().status, StatusCode::REQUEST_TIMEOUT);
        }
        assert_eq!(bodies.memory.available_permits(), 64 * MIB, "all permits are returned");
    }

    #[tokio::test]
    async fn bodies_without_a_first_byte_hold_no_permits() {
        let bodies = BodyReader::with_memory(MIB, BUDGET * 3, MIB);
        let silent =
            || Body::from_stream(futures_util::stream::pending::<std::io::Result<Vec<u8>>>());
        let silent = futures_util::future::join_all((0..64).map(|_| read(&bodies, silent())));
        let (silent, other) = tokio::join!(silent, read(&bodies, Body::from(vec![b' '; MIB])));
        assert_eq!(other.unwrap(), MIB);
        for problem in silent {
            assert_eq!(problem.unwrap_err().status, StatusCode::REQUEST_TIMEOUT);
        }
    }

    #[tokio::test]
    async fn body_without_memory_is_answered_503_at_its_deadline() {
        let bodies = BodyReader::with_memory(MIB, BUDGET * 3, MIB);
        // The stalled body takes all memory, and has not timed out at the other one's deadline.
        let (stalled, other) = tokio::join!(
            read(&bodies, stalled(MIB)),
            read(&bodies, Body::from(vec![b' '; MIB / 2])),
        );
        assert_eq!(stalled.unwrap_err().status, StatusCode::REQUEST_TIMEOUT);
        let problem = other.unwrap_err();
        assert_eq!(problem.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(problem.retry_after_seconds, Some(1));
    }

    #[tokio::test]
    async fn body_below_the_minimum_rate_is_answered_408() {
        let bodies = BodyReader::with_memory(MIB, Duration::from_mins(1), 64 * MIB);
        let bodies = BodyReader { grace: BUDGET, ..bodies };
        let trickle = futures_util::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(vec![b' '; 100]), ()))
        });
        let problem = read(&bodies, Body::from_stream(trickle)).await.unwrap_err();
        assert_eq!(problem.status, StatusCode::REQUEST_TIMEOUT);
    }
}
