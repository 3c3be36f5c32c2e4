//! An HTTP/1.1 server with the limits that `axum::serve` lacks.

mod write_deadline;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use write_deadline::WriteDeadline;

/// How long to wait after a failed `accept`, which is most often "too many open files": trying
/// again at once would spin without giving a connection the time to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The most that a connection buffers, either way; a head that is larger is answered 431. It is
/// ample for ours, and with hyper's own 400 KiB, 10,000 connections could take 4 GB.
const MAX_BUFFER_BYTES: usize = 16 << 10;

/// What one server lets its clients take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open connections; at the cap, new ones wait in the kernel's backlog until one ends.
    pub max_connections: usize,
    /// Time to send a request's head. It also ends a connection that idles for so long, or whose
    /// client takes nothing of its answers for so long.
    pub header_timeout: Duration,
    /// After the shutdown each open connection may bring one more request. Those that have brought none
    /// are closed when nobody has brought any for so long: closed at once, one could be closed in the
    /// middle of its next request.
    pub farewell: Duration,
}

/// Serves `router` on `listener` until `shutdown`, then takes who has already connected, stops
/// accepting, and returns when each connection has had its last answer; see [`Limits::farewell`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.max_connections));
    let door = Door { shutdown: shutdown.clone(), request: Arc::default() };
    let router = router.layer(middleware::from_fn_with_state(door.clone(), last_if_draining));
    let service = TowerToHyperService::new(router);
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    server.max_buf_size(MAX_BUFFER_BYTES);
    let connections = GracefulShutdown::new();
    loop {
        let accepted = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            // In this order: who is in the kernel's backlog at the shutdown has connected, and would
            // be reset with the listener.
            biased;
            accepted = accepted => accepted,
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Without it, small answers wait for the client's delayed ack.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let stream = TokioIo::new(WriteDeadline::new(stream, limits.header_timeout));
        let connection = server.serve_connection(stream, service.clone());
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended early");
            }
            drop(slot);
        });
    }
    drop(listener);
    let all = u32::try_from(limits.max_connections).unwrap_or(u32::MAX);
    tokio::select! {
        _ = slots.acquire_many(all) => {}
        () = async { while timeout(limits.farewell, door.request.notified()).await.is_ok() {} } => {}
    }
    connections.shutdown().await;
}

#[derive(Clone)]
struct Door {
    shutdown: CancellationToken,
    /// Notified of each request.
    request: Arc<Notify>,
}

/// Tells the client with the answer that its connection ends.
async fn last_if_draining(State(door): State<Door>, request: Request, next: Next) -> Response {
    door.request.notify_one();
    let mut response = next.run(request).await;
    if door.shutdown.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
