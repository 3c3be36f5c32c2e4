//! Connects to the broker, with a deadline for each step.
//!
//! Decision: docs/decisions/0018-how-is-a-rabbitmq-connection-opened-and-closed.md

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use lapin::tcp::{AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind, runtime};
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::Access;

const REACH_TIMEOUT: Duration = Duration::from_secs(2);
const LOG_IN_TIMEOUT: Duration = Duration::from_secs(5);
/// Deadline of one request to the broker, such as opening a channel or declaring a queue. A healthy
/// broker answers at once.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no usable connection. Each variant is named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The peer is unreachable, closes the connection, or has an untrusted certificate.
    #[error("cannot reach {address}: {source}")]
    Reach {
        /// Host and port.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// The peer sends nothing, or something other than AMQP.
    #[error("{address} accepts connections but does not speak AMQP")]
    Silent {
        /// Host and port.
        address: String,
    },
    /// The broker rejects the login.
    #[error("cannot log in at {address}: {source}")]
    LogIn {
        /// Host and port.
        address: String,
        /// The cause.
        source: lapin::Error,
    },
}

/// A second handle on a connection's socket. Dropping it shuts the socket down.
///
/// lapin's I/O thread ends only when the peer answers or the socket is shut down. A peer that hangs
/// would otherwise leak the thread and the socket.
struct Socket(TcpStream);

impl Socket {
    fn clone_of(stream: &impl AsFd) -> io::Result<Self> {
        Ok(Self(stream.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // An error means that the socket is already closed.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// An open connection. When it ends, the broker requeues all deliveries that are not acked.
pub struct Link {
    connection: Arc<Connection>,
    socket: Option<Socket>,
}

impl Deref for Link {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Link {
    /// Closes the connection. lapin alone would keep it open as long as it has a consumer, even one
    /// that is no longer polled, and messages would pile up there.
    fn drop(&mut self) {
        let (connection, socket) = (Arc::clone(&self.connection), self.socket.take());
        let mut close: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(async move { connection.close(200, "done".into()).await });
        // The first poll sends the request. An error means that the connection is already closed.
        let is_pending = close.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        if is_pending && let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let _ = timeout(RPC_TIMEOUT, close).await;
                drop(socket);
            });
        }
    }
}

/// Opens a connection, which RabbitMQ's management page shows as `name`.
///
/// lapin's own recovery stays off: it hangs permanently once it exhausts its retries.
///
/// # Errors
/// [`ConnectError`], within 9 s.
pub async fn connect(access: &Access, name: &str) -> Result<Link, ConnectError> {
    let uri = &access.uri.0;
    let address = || format!("{}:{}", uri.authority.host, uri.authority.port);
    let reach = |source| ConnectError::Reach { address: address(), source };
    let runtime = runtime::default_runtime().map_err(|error| reach(io::Error::other(error)))?;
    let endpoint = (uri.authority.host.clone(), uri.authority.port);
    let reaching = AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(endpoint));
    let stream = match timeout(REACH_TIMEOUT, reaching).await {
        Ok(reached) => reached.map_err(reach)?,
        Err(_) => return Err(reach(io::ErrorKind::TimedOut.into())),
    };
    let socket = match &stream {
        AsyncTcpStream::Plain(stream) => Socket::clone_of(stream.get_ref()).map_err(reach)?,
        _ => return Err(reach(io::ErrorKind::Unsupported.into())),
    };
    let silent = || ConnectError::Silent { address: address() };
    let tls = OwnedTLSConfig { identity: None, cert_chain: access.authorities.clone() };
    let stream = match uri.scheme {
        AMQPScheme::AMQP => stream,
        AMQPScheme::AMQPS => {
            // `into_tls` also trusts the system's authorities. Boxed, because the future takes 20
            // KiB.
            let handshake = Box::pin(stream.into_tls(&uri.authority.host, tls.as_ref()));
            let encrypted = timeout(REACH_TIMEOUT, handshake).await;
            encrypted.map_err(|_| silent())?.map_err(reach)?
        }
    };
    // lapin requests the stream only once, because its recovery is off.
    let stream = Mutex::new(Some(stream));
    let connect_once = async move |_: AMQPUri, _| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected).into())
    };
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let logging_in = Connection::connector(uri.clone(), runtime, connect_once, properties);
    match timeout(LOG_IN_TIMEOUT, Box::pin(logging_in)).await {
        Ok(Ok(connection)) => Ok(Link { connection: Arc::new(connection), socket: Some(socket) }),
        Ok(Err(source)) => Err(match source.kind() {
            ErrorKind::IOError(error) => reach(io::Error::new(error.kind(), error.to_string())),
            ErrorKind::ParsingError(_) => silent(),
            _ => ConnectError::LogIn { address: address(), source },
        }),
        Err(_) => Err(silent()),
    }
}

/// Logs one warning when a connection is lost and one line when it is back; attempts in between are
/// DEBUG.
#[derive(Default)]
pub struct OutageLog {
    is_down: bool,
}

impl OutageLog {
    /// Logs that the connection `name` is open.
    pub fn up(&mut self, name: &str) {
        self.is_down = false;
        tracing::info!(connection = name, "connected to the broker");
    }

    /// Logs that the connection `name` could not be opened, or was lost.
    pub fn down(&mut self, name: &str, reason: &str) {
        if std::mem::replace(&mut self.is_down, true) {
            tracing::debug!(connection = name, reason, "the broker is still away");
        } else {
            tracing::warn!(connection = name, reason, "no broker; trying again until it is back");
        }
    }
}

/// Closes the connection with a handshake, so that the broker logs no abrupt end.
pub async fn close(link: &Link) {
    if timeout(RPC_TIMEOUT, link.connection.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not confirm the close in time");
    }
}
