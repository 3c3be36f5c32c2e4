//! An HTTP/1.1 server with the limits that `axum::serve` lacks.
//!
//! Decision: docs/decisions/0010-what-limits-does-the-http-server-add-to-hyper.md

mod accept;
mod connection;
mod exchange;
mod idle;
mod linger;
mod listen;
mod path;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::descriptors;

use accept::Acceptor;
use connection::{Connection, Wire};
use exchange::Door;
use idle::Waiting;

pub use listen::{listen, reachable};

/// The most that a connection buffers, either way; a head that is larger is answered 431. It is
/// ample for ours, and with hyper's own 400 KiB, 10,000 connections could take 4 GB.
const MAX_BUFFER_BYTES: usize = 16 << 10;
/// How long a balancer keeps an idle connection: nginx and AWS's close it after 60 s. A server that
/// closes its side earlier may close it just as the next callback is sent, which is then lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// What one server lets its clients take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open connections. When all are taken, a new connection replaces the one that has waited
    /// longest for a request; if none waits, the new one is answered 503.
    pub max_connections: usize,
    /// Time from the first byte of a request's head to its last. It is also how far a client may fall
    /// behind the slowest allowed rate in reading responses.
    pub header_timeout: Duration,
    /// How long a connection may wait for its first request, or its next one. `None` for one request
    /// per connection, whose head must then arrive within `header_timeout`.
    pub idle_timeout: Option<Duration>,
    // Decision: docs/decisions/0009-how-does-a-server-stop-without-losing-requests.md
    /// After the shutdown, an open connection may bring one more request. Connections that have brought
    /// none are closed once no request has arrived for this long: closed at once, one could be closed in
    /// the middle of its next request.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            header_timeout: Duration::from_secs(20),
            idle_timeout: Some(IDLE_TIMEOUT),
            farewell: Duration::ZERO,
        }
    }
}

/// Serves `router` on `listener` until `shutdown`, then serves the connections in the kernel's backlog,
/// stops accepting, and returns when each connection has had its last response; see [`Limits::farewell`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let max_connections = descriptors::affordable(limits.max_connections);
    let slots = Arc::new(Semaphore::new(max_connections));
    let waiting = Arc::new(Waiting::default());
    let door = Door { shutdown: shutdown.clone(), request: Arc::new(Notify::new()) };
    let router = TowerToHyperService::new(router);
    let mut server = hyper::server::conn::http1::Builder::new();
    // The time limits are those of `Connection`, which knows more than hyper.
    server.header_read_timeout(None).max_buf_size(MAX_BUFFER_BYTES);
    // A client may close its sending side after the request, and still read the response.
    server.half_close(true).keep_alive(limits.idle_timeout.is_some());
    let connections = GracefulShutdown::new();
    let mut acceptor = Acceptor::new(listener, Arc::clone(&slots), Arc::clone(&waiting));
    loop {
        let accepted = tokio::select! {
            // In this order: a client in the kernel's backlog at the shutdown has connected, and would
            // be reset with the listener.
            biased;
            accepted = acceptor.next() => accepted,
            () = shutdown.cancelled() => break,
        };
        let Some((socket, peer, slot)) = accepted else { continue };
        let connection = Connection::new(socket, limits, Arc::clone(&waiting));
        let service = {
            let (connection, router, door) =
                (Arc::clone(&connection), router.clone(), door.clone());
            service_fn(move |request| {
                let (connection, router, door) =
                    (Arc::clone(&connection), router.clone(), door.clone());
                async move { exchange::respond(connection, peer, router, door, request).await }
            })
        };
        let stream = TokioIo::new(Wire::new(Arc::clone(&connection)));
        let serving = connections.watch(server.serve_connection(stream, service));
        tokio::spawn(async move {
            connection::drive(&connection, serving).await;
            drop(slot);
        });
    }
    drop(acceptor);
    let all = u32::try_from(max_connections).unwrap_or(u32::MAX);
    tokio::select! {
        _ = slots.acquire_many(all) => {}
        () = async { while timeout(limits.farewell, door.request.notified()).await.is_ok() {} } => {}
    }
    connections.shutdown().await;
    // Those that linger.
    let _ = slots.acquire_many(all).await;
}
