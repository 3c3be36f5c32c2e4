//! Connecting to the broker, with a deadline on every step.
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
/// Opening a channel, declaring a queue, closing: answered at once or not at all.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no usable connection, named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody is there, it hangs up, or it is not to be trusted.
    #[error("cannot reach {address}: {source}")]
    Reach {
        /// Host and port.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// It says nothing, or not what a broker says.
    #[error("{address} accepts connections but does not speak AMQP")]
    Silent {
        /// Host and port.
        address: String,
    },
    /// The broker does not let us in.
    #[error("cannot log in at {address}: {source}")]
    LogIn {
        /// Host and port.
        address: String,
        /// Why not.
        source: lapin::Error,
    },
}

/// A second handle on the socket of a connection, which is shut down when this is dropped.
///
/// lapin reads and writes on a thread of its own, which ends when the peer answers or the socket does.
/// A peer that hangs would keep both for good.
struct Socket(TcpStream);

impl Socket {
    fn of(stream: &impl AsFd) -> io::Result<Self> {
        Ok(Self(stream.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // An error means that it is closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// An open connection. When it ends, the broker takes back all deliveries that are not acked.
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
    /// Closes the connection. lapin itself keeps one for as long as it has a consumer that nobody polls any
    /// more, so that messages would pile up there.
    fn drop(&mut self) {
        let (connection, socket) = (Arc::clone(&self.connection), self.socket.take());
        let mut close: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(async move { connection.close(200, "done".into()).await });
        // The first poll sends the request. An error means that the connection is closed.
        let is_pending = close.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        if is_pending && let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let _ = timeout(RPC_TIMEOUT, close).await;
                drop(socket);
            });
        }
    }
}

/// Opens a connection that the management page shows as `name`.
///
/// lapin's own recovery stays off: it hangs permanently once it exhausts its retries.
///
/// # Errors
/// [`ConnectError`], after 9 s at the latest.
pub async fn connect(access: &Access, name: &str) -> Result<Link, ConnectError> {
    let uri = &access.uri.0;
    let address = || format!("{}:{}", uri.authority.host, uri.authority.port);
    let reach = |source| ConnectError::Reach { address: address(), source };
    let runtime = runtime::default_runtime().map_err(|error| reach(io::Error::other(error)))?;
    let endpoint = (uri.authority.host.clone(), uri.authority.port);
    let reached = AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(endpoint));
    let stream = match timeout(REACH_TIMEOUT, reached).await {
        Ok(reached) => reached.map_err(reach)?,
        Err(_) => return Err(reach(io::ErrorKind::TimedOut.into())),
    };
    let socket = match &stream {
        AsyncTcpStream::Plain(stream) => Socket::of(stream.get_ref()).map_err(reach)?,
        _ => return Err(reach(io::ErrorKind::Unsupported.into())),
    };
    let silent = || ConnectError::Silent { address: address() };
    let tls = OwnedTLSConfig { identity: None, cert_chain: access.authorities.clone() };
    let stream = match uri.scheme {
        AMQPScheme::AMQP => stream,
        AMQPScheme::AMQPS => {
            // The system's own authorities are trusted besides ours. On the heap: it has a state of 20 KiB.
            let handshake = Box::pin(stream.into_tls(&uri.authority.host, tls.as_ref()));
            let encrypted = timeout(REACH_TIMEOUT, handshake).await;
            encrypted.map_err(|_| silent())?.map_err(reach)?
        }
    };
    // lapin asks for the stream once, since its recovery is off.
    let stream = Mutex::new(Some(stream));
    let take = async move |_: AMQPUri, _| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected).into())
    };
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let logged_in = Connection::connector(uri.clone(), runtime, take, properties);
    match timeout(LOG_IN_TIMEOUT, Box::pin(logged_in)).await {
        Ok(Ok(connection)) => Ok(Link { connection: Arc::new(connection), socket: Some(socket) }),
        Ok(Err(source)) => Err(match source.kind() {
            ErrorKind::IOError(error) => reach(io::Error::new(error.kind(), error.to_string())),
            ErrorKind::ParsingError(_) => silent(),
            _ => ConnectError::LogIn { address: address(), source },
        }),
        Err(_) => Err(silent()),
    }
}

/// Logs once that a connection is lost and once that it is back, however many attempts are in between.
#[derive(Default)]
pub struct OutageLog {
    down: bool,
}

impl OutageLog {
    /// The connection `name` is open.
    pub fn up(&mut self, name: &str) {
        self.down = false;
        tracing::info!(connection = name, "connected to the broker");
    }

    /// There is no connection `name`, or none any more.
    pub fn down(&mut self, name: &str, reason: &str) {
        if std::mem::replace(&mut self.down, true) {
            tracing::debug!(connection = name, reason, "still no broker");
        } else {
            tracing::warn!(connection = name, reason, "no broker; trying again until it is back");
        }
    }
}

/// Closes the connection in good order, so that the broker logs no abrupt end.
pub async fn close(link: &Link) {
    if timeout(RPC_TIMEOUT, link.connection.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not answer the close");
    }
}
