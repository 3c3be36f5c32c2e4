//! Opens connections to the status API, and keeps idle ones for later lookups. Over TLS, the server
//! chooses between HTTP/1.1, which this module handles, and HTTP/2 (`http2.rs`).
//!
//! An HTTP server may close an idle connection at any moment, even while a request is on its way.
//! The request then fails although neither the API nor the object is at fault. The pool keeps idle
//! connections for less time than servers usually do. If a server closes one even earlier, the
//! lookup is sent once more, on a new connection.
//!
//! Decision: docs/decisions/0030-when-is-a-lookup-sent-again-at-once.md

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::Either;
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls_platform_verifier::ConfigVerifierExt as _;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use super::addresses::Addresses;
use super::answer::ReceivedBody;
use super::connection::{Connection, ExchangeError};
use super::http2::{self, RequestSender, ResponseStream, SharedConnections};
use super::response_head::{BodyLength, ResponseHead};

/// How long an idle connection is kept: less than the shortest common limit of servers, 1 s.
const IDLE_TIMEOUT: Duration = Duration::from_millis(500);
/// How TCP detects a server that is gone. This matters only if `STATUS_TIMEOUT` is minutes.
const PROBE_INTERVAL: Duration = Duration::from_secs(15);
const PROBES: u32 = 3;
/// How long a request may stay unacknowledged by the server's kernel. TCP sends no probes meanwhile.
#[cfg(target_os = "linux")]
const UNACKED_TIMEOUT: Duration = Duration::from_secs(30);

/// There is no limit on idle connections, because a connection is opened only for a lookup that
/// finds none idle. So there are never more connections than there were lookups in flight within
/// the last two [`IDLE_TIMEOUT`]s.
pub(super) struct ConnectionPool {
    addresses: Addresses,
    /// For an `https` URL.
    tls: Option<Tls>,
    idle: Arc<IdleConnections>,
    http2: Arc<SharedConnections>,
    _closing: AbortOnDropHandle<()>,
}

/// A response whose head has been received.
pub(super) enum Exchange {
    Http1(Connection),
    Http2(ResponseStream),
}

/// A new connection, in the protocol that the server chose.
pub(super) enum Opened {
    Http1(Connection),
    Http2(RequestSender),
}

struct Tls {
    connector: TlsConnector,
    server_name: ServerName<'static>,
    offers_http2: bool,
}

/// In the order in which they became idle. The latest one is reused first, so that those that are
/// not needed time out.
struct IdleConnections {
    timeout: Duration,
    connections: Mutex<Vec<(Instant, Connection)>>,
}

impl ConnectionPool {
    /// Starts a tokio task that closes connections that have been idle for too long.
    ///
    /// # Errors
    /// When the URL is `https` and the system has no certificate authorities.
    pub(super) fn new(url: &Url, addresses: Addresses, http2: bool) -> anyhow::Result<Self> {
        let host = url.host_str().unwrap_or_default();
        let tls = if url.scheme() == "https" { Some(Tls::new(host, http2)?) } else { None };
        Ok(Self::start(addresses, tls, IDLE_TIMEOUT))
    }

    fn start(addresses: Addresses, tls: Option<Tls>, idle_timeout: Duration) -> Self {
        let idle =
            Arc::new(IdleConnections { timeout: idle_timeout, connections: Mutex::default() });
        let offers_http2 = tls.as_ref().is_some_and(|tls| tls.offers_http2);
        let http2 = Arc::new(SharedConnections::new(offers_http2));
        let closing = tokio::spawn(close_expired(Arc::clone(&idle), Arc::clone(&http2)));
        Self { addresses, tls, idle, http2, _closing: AbortOnDropHandle::new(closing) }
    }

    /// Sends a request and receives the head of the response. Afterwards, the caller must
    /// [receive](Exchange::receive_body) the body.
    pub(super) async fn send(
        &self,
        request: &[u8],
    ) -> Result<(Exchange, ResponseHead), ExchangeError> {
        loop {
            // In a box, so that a lookup over HTTP/1.1 needs no memory for it.
            if self.http2.is_chosen()
                && let Some((stream, head)) = Box::pin(self.http2.send(request, self)).await?
            {
                return Ok((Exchange::Http2(stream), head));
            }
            if let Some(mut connection) = self.idle.take(Instant::now()) {
                match connection.send(request).await {
                    Err(error) if connection.ended_before_response(&error) => tracing::debug!(
                        reason = %error,
                        "the status API closed an idle connection; sending the lookup again"
                    ),
                    result => return result.map(|head| (Exchange::Http1(connection), head)),
                }
            }
            // In a box, because most lookups reuse a connection.
            match Box::pin(self.open()).await? {
                Opened::Http1(mut connection) => {
                    let head = connection.send(request).await?;
                    return Ok((Exchange::Http1(connection), head));
                }
                // The server has begun to offer HTTP/2.
                Opened::Http2(requests) => {
                    self.http2.add(requests);
                }
            }
        }
    }

    /// Keeps a connection that has received a complete response for another lookup.
    pub(super) fn keep(&self, connection: Connection) {
        self.idle.connections.lock().push((Instant::now(), connection));
    }

    pub(super) async fn open(&self) -> Result<Opened, ExchangeError> {
        let connecting = async {
            let stream = self.addresses.connect().await?;
            configure(&stream)?;
            let Some(Tls { connector, server_name, .. }) = &self.tls else {
                return Ok(Opened::Http1(Connection::new(stream)));
            };
            let stream = connector.connect(server_name.clone(), stream).await?;
            Ok(if stream.get_ref().1.alpn_protocol() == Some(http2::ALPN) {
                Opened::Http2(http2::handshake(stream).await?)
            } else {
                Opened::Http1(Connection::new(stream))
            })
        };
        let connected = tokio::time::timeout(super::MAX_CONNECT_TIME, connecting).await;
        connected.map_err(io::Error::from)?
    }
}

impl Exchange {
    /// Receives the body until its end, or until `body` is full.
    pub(super) fn receive_body(
        &mut self,
        length: BodyLength,
        body: &mut ReceivedBody,
    ) -> impl Future<Output = Result<(), ExchangeError>> {
        match self {
            Self::Http1(connection) => Either::Left(connection.receive_body(length, body)),
            Self::Http2(stream) => Either::Right(stream.receive_body(body)),
        }
    }
}

impl Tls {
    fn new(host: &str, offers_http2: bool) -> anyhow::Result<Self> {
        Self::with_config(host, ClientConfig::with_platform_verifier()?, offers_http2)
    }

    fn with_config(
        host: &str,
        mut config: ClientConfig,
        offers_http2: bool,
    ) -> anyhow::Result<Self> {
        let offered = offers_http2.then(|| http2::ALPN.to_vec());
        config.alpn_protocols = offered.into_iter().chain([b"http/1.1".to_vec()]).collect();
        let server_name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), server_name, offers_http2 })
    }
}

impl IdleConnections {
    /// Takes the connection that has been idle for the shortest time, unless it is unusable.
    fn take(&self, now: Instant) -> Option<Connection> {
        loop {
            let (since, mut connection) = self.connections.lock().pop()?;
            if now.duration_since(since) < self.timeout && connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    fn close_expired(&self, now: Instant) {
        let mut idle = self.connections.lock();
        let expired = idle.partition_point(|(since, _)| now.duration_since(*since) >= self.timeout);
        // Drop the connections after the guard, because closing a socket is a system call.
        let closing: Vec<_> = idle.drain(..expired).collect();
        drop(idle);
        drop(closing);
    }
}

async fn close_expired(idle: Arc<IdleConnections>, http2: Arc<SharedConnections>) {
    let mut rounds = interval(idle.timeout);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = rounds.tick().await;
        idle.close_expired(now);
        http2.drop_unused(now);
    }
}

fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(PROBE_INTERVAL).with_interval(PROBE_INTERVAL);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKED_TIMEOUT))?;
    socket.set_tcp_keepalive(&probes.with_retries(PROBES))
}

#[cfg(test)]
mod tests;
