//! Connects to the broker, with a deadline for each step.
//!
//! Decision: docs/decisions/0018-how-is-a-rabbitmq-connection-opened-and-closed.md

use std::io;
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use ::runtime::{Success, first_success};
use futures_util::FutureExt as _;
use lapin::tcp::AsyncTcpStream;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{ConnectionProperties, ErrorKind};
use parking_lot::Mutex;
use rand::seq::SliceRandom as _;
use tokio::net::{TcpStream, lookup_host};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::transport;
use super::uri::{Access, Node};

const REACH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one address of a name may stay silent before the next one is tried too.
const ADDRESS_PATIENCE: Duration = Duration::from_millis(250);
/// How long one node may take to accept a connection before the next one is tried too.
const NODE_PATIENCE: Duration = Duration::from_secs(1);
const LOG_IN_TIMEOUT: Duration = Duration::from_secs(5);
/// Deadline of one request to the broker, such as opening a channel or declaring a queue. A healthy
/// broker answers at once.
pub(crate) const RPC_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// None of several nodes is usable.
    #[error("no node is usable: {}", join(.0))]
    AllNodes(
        /// One error for each node.
        Vec<Self>,
    ),
}

fn join(errors: &[ConnectError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A second handle on a connection's socket. Dropping it shuts the socket down.
///
/// lapin's I/O thread ends only when the peer answers or the socket is shut down. A peer that hangs
/// would otherwise leak the thread and the socket.
struct Socket(std::net::TcpStream);

impl Socket {
    fn clone_of(stream: &TcpStream) -> io::Result<Self> {
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
pub struct Connection {
    inner: Arc<lapin::Connection>,
    socket: Option<Socket>,
    /// The position of its node in [`AmqpUri`](super::uri::AmqpUri).
    node: usize,
}

impl Connection {
    /// Identifies its node for [`connect_avoiding`].
    pub(crate) fn node(&self) -> usize {
        self.node
    }
}

impl Deref for Connection {
    type Target = lapin::Connection;

    fn deref(&self) -> &lapin::Connection {
        &self.inner
    }
}

impl Drop for Connection {
    /// Closes the connection. lapin alone would keep the connection open as long as it has a
    /// consumer, even if that consumer is no longer polled, and its deliveries would pile up.
    fn drop(&mut self) {
        let (connection, socket) = (Arc::clone(&self.inner), self.socket.take());
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

// Decision: docs/decisions/0076-how-is-one-of-several-servers-chosen.md
/// Opens a connection, which RabbitMQ's management page shows as `name`. It tries the nodes in
/// random order, so that the connections of many processes spread over a cluster.
///
/// lapin's own recovery stays off: it hangs permanently once it exhausts its retries.
///
/// # Errors
/// [`ConnectError`], within 9 s for one node and 1 s more for each further node.
pub async fn connect(access: &Access, name: &str) -> Result<Connection, ConnectError> {
    connect_avoiding(access, name, None).await
}

/// Like [`connect`], but tries the node `avoided` last. A node that is cut off from its cluster
/// accepts connections although they are useless.
pub(crate) async fn connect_avoiding(
    access: &Access,
    name: &str,
    avoided: Option<usize>,
) -> Result<Connection, ConnectError> {
    let mut nodes: Vec<_> = access.uri.0.iter().enumerate().collect();
    nodes.shuffle(&mut rand::rng());
    nodes.sort_by_key(|(node, _)| avoided == Some(*node));
    let authorities = access.authorities.as_deref();
    let attempts: Vec<_> = nodes
        .iter()
        .map(|(node, Node { uri, .. })| connect_to(*node, uri, authorities, name).boxed())
        .collect();
    match first_success(attempts, NODE_PATIENCE).await {
        Ok(Success { value, unusable }) => {
            for (position, reason) in unusable {
                nodes[position].1.warn_unusable(&reason);
            }
            Ok(value)
        }
        Err(errors) => {
            let errors: Vec<_> = errors.into_iter().map(|(_, error)| error).collect();
            match <[ConnectError; 1]>::try_from(errors) {
                Ok([error]) => Err(error),
                Err(errors) => Err(ConnectError::AllNodes(errors)),
            }
        }
    }
}

/// Connects to the node at the position `node`.
async fn connect_to(
    node: usize,
    uri: &AMQPUri,
    authorities: Option<&str>,
    name: &str,
) -> Result<Connection, ConnectError> {
    // The resolver and TLS expect an IPv6 address without the brackets that a URI needs.
    let host = uri.authority.host.trim_start_matches('[').trim_end_matches(']');
    let address = || format!("{}:{}", uri.authority.host, uri.authority.port);
    let reach = |source| ConnectError::Reach { address: address(), source };
    let reaching = async {
        let addresses = lookup_host((host, uri.authority.port)).await?;
        let attempts: Vec<_> =
            addresses.map(|address| TcpStream::connect(address).boxed()).collect();
        match first_success(attempts, ADDRESS_PATIENCE).await {
            Ok(Success { value, .. }) => Ok(value),
            Err(errors) => Err(errors
                .into_iter()
                .next()
                .map_or_else(|| io::Error::other("the name has no address"), |(_, error)| error)),
        }
    };
    let stream = match timeout(REACH_TIMEOUT, reaching).await {
        Ok(reached) => reached.map_err(reach)?,
        Err(_) => return Err(reach(io::ErrorKind::TimedOut.into())),
    };
    // Otherwise the kernel would hold back a small frame until the previous one is acknowledged.
    stream.set_nodelay(true).map_err(reach)?;
    let socket = Socket::clone_of(&stream).map_err(reach)?;
    let silent = || ConnectError::Silent { address: address() };
    let stream = match uri.scheme {
        AMQPScheme::AMQP => transport::plain(stream),
        AMQPScheme::AMQPS => {
            let handshake = Box::pin(transport::encrypted(stream, host, authorities));
            let encrypted = timeout(REACH_TIMEOUT, handshake).await;
            encrypted.map_err(|_| silent())?.map_err(reach)?
        }
    };
    // lapin requests the stream only once, because its recovery is off.
    let stream = Mutex::new(Some(stream));
    let connect_once = async move |_: AMQPUri, _| {
        let stream = stream.lock().take();
        let stream = stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
        Ok(AsyncTcpStream::Plain(stream))
    };
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let runtime = transport::lapin_runtime();
    let logging_in = lapin::Connection::connector(uri.clone(), runtime, connect_once, properties);
    match timeout(LOG_IN_TIMEOUT, Box::pin(logging_in)).await {
        Ok(Ok(connection)) => {
            Ok(Connection { inner: Arc::new(connection), socket: Some(socket), node })
        }
        Ok(Err(source)) => Err(match source.kind() {
            ErrorKind::IOError(error) => reach(io::Error::new(error.kind(), error.to_string())),
            ErrorKind::ParsingError(_) => silent(),
            _ => ConnectError::LogIn { address: address(), source },
        }),
        Err(_) => Err(silent()),
    }
}

/// Closes the connection with a handshake, so that the broker logs no abrupt end.
pub(crate) async fn close(connection: &Connection) {
    if timeout(RPC_TIMEOUT, connection.inner.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not confirm the close in time");
    }
}

/// Awaits the response to a request, up to [`RPC_TIMEOUT`]. An error is the reason, worded for an
/// operator.
pub(crate) async fn within_deadline<T, E: ToString>(
    request: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(response) => response.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no response from the broker within {RPC_TIMEOUT:?}")),
    }
}
