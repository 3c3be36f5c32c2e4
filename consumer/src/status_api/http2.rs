//! Connections to the status API over HTTP/2, each of which carries many lookups at once.
//!
//! If all connections have as many streams as the server allows, one lookup opens a further one, and
//! the others wait until it is open. HTTP/2 leaves the stream limit to the server's settings, so how
//! many lookups a connection will carry is known only then.
//!
//! Decision: docs/decisions/0086-when-do-lookups-use-http-2.md

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use h2::client::Builder;
use h2::{Reason, RecvStream};
use http::Request;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::answer::ReceivedBody;
use super::connection::{ExchangeError, Stream};
use super::pool::{ConnectionPool, Opened};
use super::request::to_http2;
use super::response_head::{BodyLength, FIELDS_MAX, InvalidResponse, ResponseHead};

/// The name of the protocol in a TLS handshake (ALPN).
pub(super) const ALPN: &[u8] = b"h2";
/// The most streams on one connection, even if the server allows more, because all of them wait for
/// a lost packet, and end with the connection.
const STREAMS_MAX: usize = 256;
/// How much of a body the server may send before it is read.
const STREAM_WINDOW_BYTES: u32 = 16 * 1024;
/// As for HTTP/1.1. HTTP/2 counts 32 bytes more for each field.
const HEAD_BYTES_MAX: u32 = 16 * 1024;
/// How long a connection without streams is kept. Opening one takes three round trips. A lookup on
/// one that the server has just closed is sent again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends requests on an open connection. The connection closes when all clones are dropped.
pub(super) type RequestSender = h2::client::SendRequest<&'static [u8]>;

#[derive(Default)]
pub(super) struct SharedConnections {
    /// Whether the server chose HTTP/2 for the latest connection. Until the first one, assume so.
    is_chosen: AtomicBool,
    connections: Mutex<Vec<Arc<SharedConnection>>>,
    opening: tokio::sync::Mutex<()>,
}

/// An open connection. Each lookup that uses it has a reference.
pub(super) struct SharedConnection {
    requests: RequestSender,
    last_response: Mutex<Option<Instant>>,
    /// Whether a lookup timed out while no response to any lookup arrived. The server may be gone,
    /// which TCP notices much later.
    is_silent: AtomicBool,
}

/// A response whose head has been received. Dropping it resets the stream, unless it has ended.
pub(super) struct ResponseStream {
    body: RecvStream,
    _connection: Arc<SharedConnection>,
}

/// Sends the client's preface, and waits for the server's settings, which contain the stream limit.
/// Spawns a tokio task that then drives the connection. When that task ends, even by a panic, all
/// streams fail, and [`SharedConnection::is_usable`] returns false.
pub(super) async fn handshake(stream: impl Stream + 'static) -> Result<RequestSender, h2::Error> {
    let (requests, mut connection) = Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .max_header_list_size(HEAD_BYTES_MAX)
        .enable_push(false)
        // Until the server's settings replace this limit.
        .initial_max_send_streams(0)
        .handshake(stream)
        .await?;
    poll_fn(|context| match connection.poll_unpin(context) {
        Poll::Ready(ended) => Poll::Ready(ended.and(Err(Reason::CONNECT_ERROR.into()))),
        Poll::Pending if connection.max_concurrent_send_streams() > 0 => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    })
    .await?;
    tokio::spawn(async {
        if let Err(error) = connection.await.map_err(ExchangeError::from) {
            tracing::debug!(%error, "an HTTP/2 connection to the status API has ended");
        }
    });
    Ok(requests)
}

impl SharedConnections {
    /// `is_offered` states whether the client offers HTTP/2 to the server.
    pub(super) fn new(is_offered: bool) -> Self {
        Self { is_chosen: AtomicBool::new(is_offered), ..Self::default() }
    }

    /// Whether to send lookups here: the server chose HTTP/2, or has not chosen yet.
    pub(super) fn is_chosen(&self) -> bool {
        self.is_chosen.load(Ordering::Relaxed)
    }

    /// Adds an open connection.
    pub(super) fn add(&self, requests: RequestSender) -> Arc<SharedConnection> {
        let (last_response, is_silent) = (Mutex::default(), AtomicBool::default());
        let added = Arc::new(SharedConnection { requests, last_response, is_silent });
        self.connections.lock().push(Arc::clone(&added));
        self.is_chosen.store(true, Ordering::Relaxed);
        added
    }

    /// Sends a request, given in the form of HTTP/1.1, and receives the head of the response. If the
    /// server has probably not processed the request, sends it once more, on another connection.
    /// Returns `None` if the server now chooses HTTP/1.1.
    pub(super) async fn send(
        &self,
        request: &[u8],
        pool: &ConnectionPool,
    ) -> Result<Option<(ResponseStream, ResponseHead)>, ExchangeError> {
        let request = to_http2(request)?;
        let mut failed = None;
        while let Some(connection) = self.acquire(failed.as_ref(), pool).await? {
            match connection.send(request.clone()).await {
                Err(error) if failed.is_none() && connection.may_send_again(&error) => {
                    tracing::debug!(
                        reason = %error,
                        "the status API did not process a lookup; sending it again"
                    );
                    failed = Some(connection);
                }
                Err(error) => return Err(error),
                Ok((body, head)) => {
                    return Ok(Some((ResponseStream { body, _connection: connection }, head)));
                }
            }
        }
        Ok(None)
    }

    /// Returns a connection, other than `except`, that has room for a stream.
    async fn acquire(
        &self,
        except: Option<&Arc<SharedConnection>>,
        pool: &ConnectionPool,
    ) -> Result<Option<Arc<SharedConnection>>, ExchangeError> {
        if let Some(connection) = self.with_room(except) {
            return Ok(Some(connection));
        }
        let _opening = self.opening.lock().await;
        // Another lookup may have opened a connection meanwhile.
        let with_room = self.with_room(except);
        if with_room.is_some() || !self.is_chosen() {
            return Ok(with_room);
        }
        match pool.open().await? {
            Opened::Http2(requests) => Ok(Some(self.add(requests))),
            Opened::Http1(connection) => {
                pool.keep(connection);
                self.is_chosen.store(false, Ordering::Relaxed);
                Ok(None)
            }
        }
    }

    fn with_room(&self, except: Option<&Arc<SharedConnection>>) -> Option<Arc<SharedConnection>> {
        let connections = self.connections.lock();
        let mut allowed = connections
            .iter()
            .filter(|connection| except.is_none_or(|except| !Arc::ptr_eq(except, connection)));
        allowed.find(|connection| connection.has_room() && connection.is_usable()).cloned()
    }

    /// Drops connections that cannot be used any more or have been idle for too long. Those that
    /// have no streams close then.
    pub(super) fn drop_unused(&self, now: Instant) {
        let is_recent = |at| now.duration_since(at) < IDLE_TIMEOUT;
        self.connections.lock().retain(|connection| {
            connection.is_usable()
                && (connection.streams() > 0
                    || connection.last_response.lock().is_some_and(is_recent))
        });
    }
}

impl SharedConnection {
    /// The number of references, without that of [`SharedConnections`].
    fn streams(self: &Arc<Self>) -> usize {
        Arc::strong_count(self) - 1
    }

    fn has_room(self: &Arc<Self>) -> bool {
        self.streams() < self.requests.current_max_send_streams().min(STREAMS_MAX)
    }

    /// Whether new lookups may use the connection: not after a GOAWAY, and not when the task that
    /// drives the connection has ended.
    fn is_usable(&self) -> bool {
        let is_ready = matches!(self.requests.clone().ready().now_or_never(), Some(Ok(_)));
        is_ready && !self.is_silent.load(Ordering::Relaxed)
    }

    async fn send(
        &self,
        request: Request<()>,
    ) -> Result<(RecvStream, ResponseHead), ExchangeError> {
        let _check = SilenceCheck { connection: self, sent: Instant::now() };
        let (response, _) = self.requests.clone().send_request(request, true)?;
        let response = response.await;
        if !response.as_ref().is_err_and(h2::Error::is_io) {
            *self.last_response.lock() = Some(Instant::now());
        }
        let (mut head, body) = response?.into_parts();
        if head.headers.len() > FIELDS_MAX {
            return Err(InvalidResponse::from(httparse::Error::TooManyHeaders).into());
        }
        let head = ResponseHead {
            status: head.status,
            content_type: head.headers.remove(CONTENT_TYPE),
            retry_after: head.headers.remove(RETRY_AFTER),
            body_length: BodyLength::UntilClose,
            keeps_alive: false,
        };
        Ok((body, head))
    }

    /// Whether the server has probably not processed a request that failed with this error: it
    /// refused the stream, announced the end of the connection before that, or closed a connection
    /// that it had answered on.
    fn may_send_again(&self, error: &ExchangeError) -> bool {
        let ExchangeError::Http2(error) = error else { return false };
        if error.is_io() {
            return self.last_response.lock().is_some();
        }
        error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM))
    }
}

/// Marks the connection as silent if a lookup is dropped, at its deadline, and no response to any
/// lookup has arrived since it was `sent`.
struct SilenceCheck<'a> {
    connection: &'a SharedConnection,
    sent: Instant,
}

impl Drop for SilenceCheck<'_> {
    fn drop(&mut self) {
        if self.connection.last_response.lock().is_none_or(|last| last < self.sent) {
            self.connection.is_silent.store(true, Ordering::Relaxed);
        }
    }
}

impl ResponseStream {
    /// Receives the body until its end, or until `body` is full.
    pub(super) async fn receive_body(
        &mut self,
        body: &mut ReceivedBody,
    ) -> Result<(), ExchangeError> {
        while !body.is_truncated
            && let Some(part) = self.body.data().await
        {
            let part = part?;
            body.push(&part);
            // Lets the server send as much again.
            self.body.flow_control().release_capacity(part.len())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
