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
use connection::{Connection, TrackedStream};
use exchange::ServerSignals;
use idle::IdleConnections;

pub use listen::{listen, reachable_ip};

/// The size of a connection's buffer in each direction. A larger request head is answered 431. With
/// hyper's default of 400 KiB, 10,000 connections could take 4 GB.
const MAX_BUFFER_BYTES: usize = 16 << 10;
/// Longer than load balancers keep an idle connection (nginx and AWS close it after 60 s). If the
/// server closed the connection first, it could do so just as the balancer sends the next callback,
/// and that callback would be lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// The limits that one server imposes on its clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of open connections. When it is reached, a new connection replaces the
    /// connection that has waited longest for a request. If no connection waits for a request, the
    /// new connection is answered 503.
    pub max_connections: usize,
    /// Maximum time between the first and the last byte of a request's head. Also the maximum time
    /// by which a client may lag behind the slowest allowed rate of reading a response.
    pub header_timeout: Duration,
    /// How long a connection may wait for its first or next request. `None` allows one request per
    /// connection, whose head must then arrive within `header_timeout`.
    pub idle_timeout: Option<Duration>,
    // Decision: docs/decisions/0009-how-does-a-server-stop-without-losing-requests.md
    /// After the shutdown signal, the server closes idle connections only when no request has
    /// arrived for this time. Until then, it accepts one more request on each open connection. If
    /// it closed an idle connection immediately, it could do so just as the client sends its next
    /// request.
    pub quiet_period: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            header_timeout: Duration::from_secs(20),
            idle_timeout: Some(IDLE_TIMEOUT),
            quiet_period: Duration::ZERO,
        }
    }
}

/// Serves `router` on `listener` until `shutdown`. Then serves the connections in the kernel's
/// backlog, stops accepting, and returns when each connection has received its last response; see
/// [`Limits::quiet_period`].
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let max_connections = descriptors::max_connections(limits.max_connections);
    let slots = Arc::new(Semaphore::new(max_connections));
    let idle = Arc::new(IdleConnections::default());
    let signals =
        ServerSignals { shutdown: shutdown.clone(), request_arrived: Arc::new(Notify::new()) };
    let router = TowerToHyperService::new(router);
    let mut server = hyper::server::conn::http1::Builder::new();
    // `Connection` enforces the time limits, because hyper limits only the time for the head.
    server.header_read_timeout(None).max_buf_size(MAX_BUFFER_BYTES);
    // A client may close its sending side after the request and still read the response.
    server.half_close(true).keep_alive(limits.idle_timeout.is_some());
    let connections = GracefulShutdown::new();
    let mut acceptor = Acceptor::new(listener, Arc::clone(&slots), Arc::clone(&idle));
    loop {
        let accepted = tokio::select! {
            // Accept first: clients in the kernel's backlog at the shutdown have connected, and
            // closing the listener would reset their connections.
            biased;
            accepted = acceptor.next() => accepted,
            () = shutdown.cancelled() => break,
        };
        let Some((socket, peer, slot)) = accepted else { continue };
        let connection = Connection::new(socket, limits, Arc::clone(&idle));
        let service = {
            let (connection, router, signals) =
                (Arc::clone(&connection), router.clone(), signals.clone());
            service_fn(move |request| {
                let (connection, router) = (Arc::clone(&connection), router.clone());
                exchange::respond(connection, peer, router, signals.clone(), request)
            })
        };
        let stream = TokioIo::new(TrackedStream(Arc::clone(&connection)));
        let serving = connections.watch(server.serve_connection(stream, service));
        tokio::spawn(async move {
            connection::drive(&connection, serving).await;
            drop(slot);
        });
    }
    drop(acceptor);
    let all_slots = u32::try_from(max_connections).unwrap_or(u32::MAX);
    let quiet = async {
        while timeout(limits.quiet_period, signals.request_arrived.notified()).await.is_ok() {}
    };
    tokio::select! {
        _ = slots.acquire_many(all_slots) => {}
        () = quiet => {}
    }
    connections.shutdown().await;
    // Waits for connections in `linger`, which still hold a slot.
    let _ = slots.acquire_many(all_slots).await;
}
