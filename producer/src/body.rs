//! Reads the whole body of a request, within limits of size, time and memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use http_body_util::BodyExt as _;
use memmap2::MmapMut;
use service::problem::Problem;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::config::Callbacks;
use crate::deadline::Deadline;

/// What a body may take without asking for room. A callback of 200 ids has 4 KiB at most, so the
/// callbacks of every day never wait for the large ones.
const SMALL_BYTES: usize = 8 << 10;
/// What the large bodies may take together. Without this bound, clients who send all of a large body
/// but its end could have `MAX_BODY_BYTES` of memory for each connection.
const LARGE_BYTES_TOTAL: usize = 16 << 20;
/// What one read from a connection brings at most.
const READ_BYTES: usize = 16 << 10;
/// After [`GRACE`], a body must have arrived at this rate on average.
const BYTES_PER_SECOND_MIN: u32 = 16 << 10;
/// Ample for a packet that is lost several times.
const GRACE: Duration = Duration::from_secs(2);

/// Reads bodies.
pub(crate) struct Bodies {
    max_bytes: usize,
    within: Duration,
    grace: Duration,
    /// One permit for each byte that large bodies may hold.
    room: Arc<Semaphore>,
}

/// A body, with the room that it takes up until it is dropped.
#[derive(Default)]
pub(crate) struct BufferedBody {
    small: Vec<u8>,
    large: Option<LargeBody>,
    /// A permit for each byte of a body that is not small, and for the next read of it.
    room: Option<OwnedSemaphorePermit>,
}

/// A body of more than [`SMALL_BYTES`], in pages of its own: the system has them back when it is dropped. The allocator
/// would keep most of the memory of a thousand large bodies for itself.
struct LargeBody {
    /// For the largest body that is allowed. A page takes memory once it is written to.
    pages: MmapMut,
    length: usize,
}

impl Bodies {
    pub(crate) fn new(config: &Callbacks) -> Self {
        Self::with_room(config.max_body_bytes, config.body_timeout, LARGE_BYTES_TOTAL)
    }

    fn with_room(max_bytes: usize, within: Duration, total: usize) -> Self {
        let total = total.max(max_bytes).min(Semaphore::MAX_PERMITS);
        Self { max_bytes, within, grace: GRACE, room: Arc::new(Semaphore::new(total)) }
    }

    /// Reads the body to its end.
    ///
    /// # Errors
    /// A 408, 413 or 415, a 400 for a body that breaks off or is in no right form, or a 503 if there is no
    /// memory for it by the deadline.
    pub(crate) async fn read(
        &self,
        headers: &HeaderMap,
        mut body: Body,
        deadline: Deadline,
    ) -> Result<BufferedBody, Problem> {
        reject_by_headers(headers)?;
        // What says itself that it is too large is not read at all.
        if body.size_hint().lower() > self.max_bytes as u64 {
            return Err(self.too_large());
        }
        let started = Instant::now();
        let mut buffered = BufferedBody::default();
        loop {
            // Before the next part is read: a thousand bodies that wait must not hold one each.
            let expected = buffered.bytes().len() + next_read(&body, &buffered);
            self.make_room(&mut buffered, expected, deadline).await?;
            let allowed = self.allowed_for(buffered.bytes().len());
            let frame = match timeout_at(started + allowed, body.frame()).await {
                Ok(None) => return Ok(buffered),
                Ok(Some(frame)) => frame,
                Err(_) => return Err(too_slow(buffered.bytes().len(), allowed)),
            };
            let frame = frame.map_err(|error| {
                let detail = format!("the body could not be read: {error}");
                Problem::new(StatusCode::BAD_REQUEST, detail)
            })?;
            // What is no data is a trailer, which says nothing to us.
            let Ok(data) = frame.into_data() else { continue };
            let length = buffered.bytes().len() + data.len();
            if length > self.max_bytes {
                return Err(self.too_large());
            }
            self.make_room(&mut buffered, length, deadline).await?;
            buffered.append(&data, self.max_bytes).map_err(|_| no_memory())?;
        }
    }

    /// How long after its beginning a body of which so much has arrived must go on.
    fn allowed_for(&self, received: usize) -> Duration {
        let seconds = u32::try_from(received).unwrap_or(u32::MAX);
        let at_least = Duration::from_secs(seconds.into()) / BYTES_PER_SECOND_MIN;
        self.within.min(self.grace.saturating_add(at_least))
    }

    /// Waits for the room that a body needs to grow to `length` bytes; a small body needs none. While this waits, the
    /// client has to wait as well.
    async fn make_room(
        &self,
        body: &mut BufferedBody,
        length: usize,
        deadline: Deadline,
    ) -> Result<(), Problem> {
        let length = length.min(self.max_bytes);
        let held = body.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if length <= SMALL_BYTES || length <= held {
            return Ok(());
        }
        let wanted = u32::try_from(length - held).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(wanted);
        // Nothing closes the semaphore.
        let Ok(Ok(room)) = timeout_at(deadline.at(), room).await else { return Err(no_memory()) };
        match &mut body.room {
            Some(held) => held.merge(room),
            none => *none = Some(room),
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

    /// Appends to a body that is never longer than `max_bytes`.
    ///
    /// # Errors
    /// When the system has no memory.
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
            // Without this, the kernel may back neighbouring bodies with pages of 2 MiB. The call fails only on kernels
            // that have no such pages.
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

/// How much the next read may add to a body. The first read counts as nothing, so that a client that sends only the head of a
/// request holds no room.
fn next_read(body: &Body, buffered: &BufferedBody) -> usize {
    if buffered.bytes().is_empty() {
        return 0;
    }
    let left = body.size_hint().upper().and_then(|left| usize::try_from(left).ok());
    left.map_or(READ_BYTES, |left| left.min(READ_BYTES))
}

fn no_memory() -> Problem {
    Problem {
        status: StatusCode::SERVICE_UNAVAILABLE,
        detail: "there are too many large bodies at once: send it again".to_owned(),
        retry_after_seconds: Some(1),
    }
}

fn too_slow(received: usize, allowed: Duration) -> Problem {
    let detail = format!("the body did not arrive within {allowed:?}: {received} bytes have come");
    Problem::new(StatusCode::REQUEST_TIMEOUT, detail)
}

/// Rejects what cannot be a callback, whatever its bytes say. The type and the charset are not looked at: many clients send a wrong one, or
/// none, with JSON in UTF-8.
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

/// The values of a header; one that is no text counts as something that nobody knows.
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

    /// A body that does not go on after its first bytes.
    fn stalled(bytes: usize) -> Body {
        let first = futures_util::stream::iter([Ok::<_, std::io::Error>(vec![b' '; bytes])]);
        Body::from_stream(futures_util::StreamExt::chain(first, futures_util::stream::pending()))
    }

    async fn read(bodies: &Bodies, body: Body) -> Result<usize, Problem> {
        let deadline = Deadline::new(Instant::now(), BUDGET);
        let read = bodies.read(&HeaderMap::new(), body, deadline).await;
        read.map(|body| body.bytes().len())
    }

    #[tokio::test]
    async fn body_is_what_arrived_whatever_the_sizes_of_its_parts() {
        let bodies = Bodies::with_room(MIB, BUDGET * 30, MIB);
        for sizes in [vec![], vec![SMALL_BYTES], vec![SMALL_BYTES - 1, 1, 1, 300_000], vec![MIB]] {
            let parts = sizes.iter().zip(1..).map(|(size, value)| vec![value; *size]);
            let parts: Vec<Vec<u8>> = parts.collect();
            let stream =
                futures_util::stream::iter(parts.clone().into_iter().map(Ok::<_, std::io::Error>));
            let deadline = Deadline::new(Instant::now(), BUDGET * 30);
            let body = bodies.read(&HeaderMap::new(), Body::from_stream(stream), deadline).await;
            assert!(body.unwrap().bytes() == parts.concat(), "{sizes:?}");
        }
        assert_eq!(bodies.room.available_permits(), MIB, "all of the room is free again");
    }

    /// Field case 1.12.
    #[tokio::test]
    async fn stalled_bodies_hold_only_what_has_arrived() {
        let bodies = Bodies::with_room(MIB, BUDGET * 3, 64 * MIB);
        let stalled = (0..160).map(|_| read(&bodies, stalled(17 << 10)));
        let stalled = futures_util::future::join_all(stalled);
        let other = read(&bodies, Body::from(vec![b' '; 24 << 10]));
        let (stalled, other) = tokio::join!(stalled, other);
        assert_eq!(other.unwrap(), 24 << 10);
        for problem in stalled {
            assert_eq!(problem.unwrap_err().status, StatusCode::REQUEST_TIMEOUT);
        }
        assert_eq!(bodies.room.available_permits(), 64 * MIB, "all of the room is free again");
    }

    #[tokio::test]
    async fn bodies_without_a_first_byte_hold_no_room() {
        let bodies = Bodies::with_room(MIB, BUDGET * 3, MIB);
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
    async fn body_without_room_is_answered_503_at_its_deadline() {
        let bodies = Bodies::with_room(MIB, BUDGET * 3, MIB);
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
        let bodies = Bodies::with_room(MIB, Duration::from_mins(1), 64 * MIB);
        let bodies = Bodies { grace: BUDGET, ..bodies };
        let trickle = futures_util::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(vec![b' '; 100]), ()))
        });
        let problem = read(&bodies, Body::from_stream(trickle)).await.unwrap_err();
        assert_eq!(problem.status, StatusCode::REQUEST_TIMEOUT);
    }
}
