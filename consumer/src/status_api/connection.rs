//! One connection to the status API: sends a request and receives the response.
//!
//! Decision: docs/decisions/0084-why-is-the-http-client-of-lookups-our-own.md

use std::future::poll_fn;
use std::io;
use std::mem::{self, MaybeUninit};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::FutureExt as _;
use httparse::{EMPTY_HEADER, Status};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::task::unconstrained;

use super::answer::{QUOTED_BYTES, ReceivedBody, escape};
use super::response_head::{BodyLength, FIELDS_MAX, InvalidResponse, ResponseHead};

/// The most bytes that a connection holds while it waits for the end of a head, with the interim
/// responses before it, or for the end of the trailers.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The most bytes of the line before a chunk. Servers send a number of a few digits.
const CHUNK_LINE_BYTES_MAX: usize = 1_024;
/// The most bytes to receive at once: more than a usual response has.
const RECEIVE_BYTES: usize = 4 * 1024;

/// A TCP stream, or a TLS stream.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(super) struct Connection {
    stream: Box<dyn Stream>,
    /// The received bytes of the current response.
    received: Vec<u8>,
    /// How many of the received bytes have been read.
    read: usize,
}

/// Why there is no complete response.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the connection was closed before the end of the response")]
    Closed,
    #[error(transparent)]
    Invalid(#[from] InvalidResponse),
    /// The text may contain bytes from the server.
    #[error("HTTP/2: {}", escape(.0.to_string().as_bytes(), QUOTED_BYTES))]
    Http2(#[from] h2::Error),
}

impl Connection {
    pub(super) fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::new(stream), received: Vec::new(), read: 0 }
    }

    /// Sends a request and receives the head of the response. Afterwards, the caller must
    /// [receive](Self::receive_body) the body.
    pub(super) async fn send(&mut self, request: &[u8]) -> Result<ResponseHead, ExchangeError> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        // How many of the unread bytes are known to contain no end of a head.
        let (mut searched, mut interim_bytes) = (0, 0);
        loop {
            self.receive().await?;
            while self.may_have_blank_line(searched)
                && let Some((head, length)) = ResponseHead::parse(self.unread())?
            {
                self.read += length;
                if !head.is_interim() {
                    return Ok(head);
                }
                (searched, interim_bytes) = (0, interim_bytes + length);
            }
            searched = self.unread().len();
            if interim_bytes + searched > HEAD_BYTES_MAX {
                return Err(InvalidResponse::TooLarge(HEAD_BYTES_MAX).into());
            }
        }
    }

    /// Receives the body until its end, or until `body` is full.
    pub(super) async fn receive_body(
        &mut self,
        length: BodyLength,
        body: &mut ReceivedBody,
    ) -> Result<(), ExchangeError> {
        match length {
            BodyLength::Bytes(length) => self.receive_bytes(length, body).await,
            BodyLength::Chunked => self.receive_chunks(body).await,
            BodyLength::UntilClose => self.receive_until_close(body).await,
        }
    }

    /// Whether the response ended where the server said, and the server has sent nothing after it.
    /// Frees the memory of the response, so that an idle connection holds none.
    pub(super) fn finish_response(&mut self) -> bool {
        let received = mem::take(&mut self.received);
        received.len() == mem::take(&mut self.read)
    }

    /// Whether the server has neither closed this idle connection nor sent anything on it.
    pub(super) fn is_quiet(&mut self) -> bool {
        // Without a budget, because tokio reports a task that has used up its budget as blocked.
        unconstrained(self.stream.read(&mut [0])).now_or_never().is_none()
    }

    /// Whether a request on this connection failed because the server closed the connection before
    /// the first byte of a response.
    pub(super) fn ended_before_response(&self, error: &ExchangeError) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let has_ended = match error {
            ExchangeError::Closed => true,
            ExchangeError::Io(error) => {
                [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof]
                    .contains(&error.kind())
            }
            ExchangeError::Invalid(_) | ExchangeError::Http2(_) => false,
        };
        has_ended && self.received.is_empty()
    }

    async fn receive_bytes(
        &mut self,
        mut length: u64,
        body: &mut ReceivedBody,
    ) -> Result<(), ExchangeError> {
        while length > 0 && !body.is_truncated {
            if self.unread().is_empty() {
                self.receive().await?;
            }
            let available = self.unread();
            let part = usize::try_from(length).unwrap_or(usize::MAX).min(available.len());
            body.push(&available[..part]);
            self.read += part;
            length -= part as u64;
        }
        Ok(())
    }

    async fn receive_chunks(&mut self, body: &mut ReceivedBody) -> Result<(), ExchangeError> {
        loop {
            let size = self.receive_chunk_size().await?;
            if size == 0 {
                return self.receive_trailers().await;
            }
            self.receive_bytes(size, body).await?;
            if body.is_truncated {
                return Ok(());
            }
            while self.unread().len() < 2 {
                self.receive().await?;
            }
            if !self.unread().starts_with(b"\r\n") {
                return Err(InvalidResponse::Chunk.into());
            }
            self.read += 2;
        }
    }

    async fn receive_chunk_size(&mut self) -> Result<u64, ExchangeError> {
        loop {
            // The parser takes a line without a size for the last chunk.
            if self.unread().first().is_some_and(|byte| !byte.is_ascii_hexdigit()) {
                return Err(InvalidResponse::Chunk.into());
            }
            let parsed = httparse::parse_chunk_size(self.unread());
            match parsed.map_err(|_| InvalidResponse::Chunk)? {
                Status::Complete((length, size)) => {
                    self.read += length;
                    return Ok(size);
                }
                Status::Partial => self.check_unread(CHUNK_LINE_BYTES_MAX)?,
            }
            self.receive().await?;
        }
    }

    /// Receives the fields after the last chunk, which a lookup does not need.
    async fn receive_trailers(&mut self) -> Result<(), ExchangeError> {
        let mut searched = 0;
        loop {
            if self.may_have_blank_line(searched)
                && let Some(length) = trailers_length(self.unread())?
            {
                self.read += length;
                return Ok(());
            }
            self.check_unread(HEAD_BYTES_MAX)?;
            searched = self.unread().len();
            self.receive().await?;
        }
    }

    /// Whether to parse the unread bytes, of which the first `searched` were parsed in vain. Without
    /// this check, a head that arrives byte by byte would be parsed again for each byte.
    fn may_have_blank_line(&self, searched: usize) -> bool {
        let added = &self.unread()[searched.saturating_sub(2)..];
        searched == 0
            || added.windows(2).any(|bytes| bytes == b"\n\n")
            || added.windows(3).any(|bytes| bytes == b"\n\r\n")
    }

    async fn receive_until_close(&mut self, body: &mut ReceivedBody) -> Result<(), ExchangeError> {
        loop {
            body.push(self.unread());
            self.read = self.received.len();
            if body.is_truncated {
                return Ok(());
            }
            match self.receive().await {
                Ok(()) => {}
                Err(ExchangeError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn unread(&self) -> &[u8] {
        &self.received[self.read..]
    }

    fn check_unread(&self, max: usize) -> Result<(), InvalidResponse> {
        if self.unread().len() > max { Err(InvalidResponse::TooLarge(max)) } else { Ok(()) }
    }

    /// Receives more bytes, and forgets those that have been read.
    ///
    /// # Errors
    /// [`ExchangeError::Closed`] if the server has closed the connection.
    async fn receive(&mut self) -> Result<(), ExchangeError> {
        self.received.drain(..mem::take(&mut self.read));
        let count = poll_fn(|context| self.poll_receive(context)).await?;
        if count == 0 { Err(ExchangeError::Closed) } else { Ok(()) }
    }

    /// The buffer is on the stack, so a connection that waits for a response has none.
    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut buffer = [MaybeUninit::uninit(); RECEIVE_BYTES];
        let mut buffer = ReadBuf::uninit(&mut buffer);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        self.received.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

/// The length of the trailers with the empty line after them, or `None` if `bytes` does not contain
/// their end. This is not a part of the async function above, whose future would contain `fields`.
fn trailers_length(bytes: &[u8]) -> Result<Option<usize>, InvalidResponse> {
    let mut fields = [EMPTY_HEADER; FIELDS_MAX];
    Ok(match httparse::parse_headers(bytes, &mut fields)? {
        Status::Complete((length, _)) => Some(length),
        Status::Partial => None,
    })
}

#[cfg(test)]
mod tests;
