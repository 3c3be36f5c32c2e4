//! One request and its response.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body as AxumBody;
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, Request, Response, header};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, Exchange};
use super::path;

/// Maximum size of an unread body that the server reads and discards before it responds, if the
/// body arrives within [`DISCARD_TIMEOUT`]. The connection can then be reused.
const DISCARD_BYTES_MAX: u64 = 64 << 10;
const DISCARD_TIMEOUT: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub(super) struct ServerSignals {
    pub(super) shutdown: CancellationToken,
    /// Notified of each request.
    pub(super) request_arrived: Arc<Notify>,
}

/// Passes the request to the router. The response contains `Connection: close` if the server is
/// draining, if the client is still sending a body that the handler has not read, or if the request
/// is chunked: if it also had a `Content-Length`, a proxy may disagree about where the request ends.
/// The bytes after it may then belong to its body, and must not be read as a request (RFC 9112,
/// 6.1).
pub(super) async fn respond(
    connection: Arc<Connection>,
    peer: SocketAddr,
    router: TowerToHyperService<Router>,
    signals: ServerSignals,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let exchange = connection.begin_exchange();
    signals.request_arrived.notify_one();
    let unread = UnreadBody::default();
    let expects_continue = request.headers().contains_key(header::EXPECT);
    let is_chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
    let mut request =
        request.map(|body| RequestBody { incoming: Some(body), unread: Arc::clone(&unread) });
    request.extensions_mut().insert(ConnectInfo(peer));
    if let Some(uri) = path::normalized(request.uri()) {
        *request.uri_mut() = uri;
    }
    let mut response = router.call(request).await?;
    let unread = unread.lock().take();
    let is_body_pending = match unread {
        Some(body) => expects_continue || !discard(body).await,
        None => false,
    };
    if is_body_pending || is_chunked || signals.shutdown.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response.map(|body| ResponseBody { body, _exchange: exchange }))
}

/// Reads and discards a small body. Returns whether its end was reached.
async fn discard(mut body: Incoming) -> bool {
    if body.size_hint().upper().is_none_or(|upper| upper > DISCARD_BYTES_MAX) {
        return false;
    }
    let read_all = async {
        while !body.is_end_stream() {
            match std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return false,
                None => return true,
            }
        }
        true
    };
    timeout(DISCARD_TIMEOUT, read_all).await.unwrap_or(false)
}

/// Receives the rest of a body that the handler dropped before its end.
type UnreadBody = Arc<Mutex<Option<Incoming>>>;

/// The body of a request. If the handler drops the body before its end, the rest is moved to
/// [`UnreadBody`].
struct RequestBody {
    /// `None` once the body has ended.
    incoming: Option<Incoming>,
    unread: UnreadBody,
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
            *self.unread.lock() = Some(body);
        }
    }
}

/// The body of a response. hyper drops it after its last byte, which ends the exchange.
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
