//! One request and its response.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body as AxumBody;
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, Request, Response, header};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, Exchange};
use super::path;

/// A body that a handler did not read is read and discarded before the response if it is no larger, and
/// arrives within [`SKIP_TIMEOUT`]: the connection can then be used again.
const SKIP_BYTES: u64 = 64 << 10;
const SKIP_TIMEOUT: Duration = Duration::from_millis(50);

/// What the requests of one server share.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) shutdown: CancellationToken,
    /// Notified of each request.
    pub(super) request: Arc<Notify>,
}

/// Has the router respond. The response announces the end of the connection if the server drains, or if
/// the client still sends a body that nobody reads.
pub(super) async fn respond(
    connection: Arc<Connection>,
    peer: SocketAddr,
    router: TowerToHyperService<Router>,
    door: Door,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let exchange = connection.begin_exchange();
    door.request.notify_one();
    let unread = Unread::default();
    let expects_continue = request.headers().contains_key(header::EXPECT);
    let mut request =
        request.map(|body| RequestBody { incoming: Some(body), unread: unread.clone() });
    request.extensions_mut().insert(ConnectInfo(peer));
    if let Some(uri) = path::normalized(request.uri()) {
        *request.uri_mut() = uri;
    }
    let mut response = router.call(request).await?;
    let is_body_left = match unread.take() {
        Some(body) => expects_continue || !skip(body).await,
        None => false,
    };
    if is_body_left || door.shutdown.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response.map(|body| ResponseBody { body, _exchange: exchange }))
}

/// Reads and discards a small body. Whether it has come to its end.
async fn skip(mut body: Incoming) -> bool {
    if body.size_hint().upper().is_none_or(|upper| upper > SKIP_BYTES) {
        return false;
    }
    let to_the_end = async {
        while !body.is_end_stream() {
            match std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return false,
                None => return true,
            }
        }
        true
    };
    timeout(SKIP_TIMEOUT, to_the_end).await.unwrap_or(false)
}

/// Where a handler leaves what it did not read of a body.
#[derive(Clone, Default)]
struct Unread(Arc<Mutex<Option<Incoming>>>);

impl Unread {
    fn put(&self, body: Incoming) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(body);
    }

    fn take(&self) -> Option<Incoming> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A request's body, which goes to [`Unread`] if it is dropped before its end.
struct RequestBody {
    /// `None` once it has ended.
    incoming: Option<Incoming>,
    unread: Unread,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(context));
        if frame.is_none() {
            self.incoming = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Incoming::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(body) = self.incoming.take().filter(|body| !body.is_end_stream()) {
            self.unread.put(body);
        }
    }
}

/// A response's body. hyper drops it once it has taken the last of it, and the exchange ends.
pub(super) struct ResponseBody {
    body: AxumBody,
    _exchange: Exchange,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
