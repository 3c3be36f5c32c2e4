//! Connecting to the broker, with a deadline on every step.

use std::io;
use std::ops::Deref;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::AmqpUri;
use super::topology::TopologyError;

const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Opening a channel, declaring a queue, closing: answered at once or not at all.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no usable connection, named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("cannot reach {address}: {source}")]
    Reach { address: String, source: io::Error },
    #[error("{address} accepts connections but does not speak AMQP")]
    Silent { address: String },
    #[error("cannot log in at {address}: {source}")]
    LogIn { address: String, source: lapin::Error },
    #[error("cannot prepare the queues: {0}")]
    Topology(#[from] TopologyError),
    #[error("cannot open the channel: {0}")]
    OpenChannel(#[source] lapin::Error),
    #[error("cannot consume: {0}")]
    Consume(#[source] lapin::Error),
    #[error("no answer within {RPC_TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// An open connection. With its end the broker takes back all that came by it and is not acked.
///
/// lapin by itself keeps a connection for as long as it has a consumer that was asked for and that
/// nobody waits for any more, so that messages would pile up there. So its end is asked for here.
pub(super) struct Link(Connection);

impl Deref for Link {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let goodbye = pin!(self.0.close(200, "done".into()));
        // It is sent by the first poll, and nobody has to wait for the answer. An error means that the
        // connection is closed.
        let _ = goodbye.poll(&mut Context::from_waker(Waker::noop()));
    }
}

/// Opens a connection that the management page shows as `name`.
///
/// lapin's own recovery stays off: once its tries are spent it hangs for good.
pub(super) async fn connect(uri: &AmqpUri, name: &str) -> Result<Link, LinkError> {
    let uri = &uri.0;
    let address = format!("{}:{}", uri.authority.host, uri.authority.port);
    if uri.scheme == AMQPScheme::AMQP {
        probe(uri, &address).await?;
    }
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    match timeout(CONNECT_TIMEOUT, Connection::connect_uri(uri.clone(), properties)).await {
        Ok(Ok(connection)) => Ok(Link(connection)),
        Ok(Err(source)) => Err(LinkError::LogIn { address, source }),
        Err(_) => Err(LinkError::Silent { address }),
    }
}

/// Sees that a broker speaks at the other end before lapin is let near it: its connect never
/// returns from a silent peer and leaves a thread behind each time.
async fn probe(uri: &AMQPUri, address: &str) -> Result<(), LinkError> {
    let reach = |source| LinkError::Reach { address: address.to_owned(), source };
    let greeting = async {
        let host = (uri.authority.host.as_str(), uri.authority.port);
        let mut stream = TcpStream::connect(host).await?;
        stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        stream.read_u8().await
    };
    match timeout(PROBE_TIMEOUT, greeting).await {
        // 1 is a method frame: the broker's connection.start.
        Ok(Ok(1)) => Ok(()),
        Ok(Ok(_)) | Err(_) => Err(LinkError::Silent { address: address.to_owned() }),
        Ok(Err(source)) => Err(reach(source)),
    }
}

/// Says once that the link is down and once that it is up again, however often it is tried between.
#[derive(Default)]
pub(super) struct OutageLog {
    down: bool,
}

impl OutageLog {
    pub(super) fn up(&mut self, name: &str) {
        self.down = false;
        tracing::info!(connection = name, "connected to the broker");
    }

    pub(super) fn down(&mut self, name: &str, reason: &str) {
        if std::mem::replace(&mut self.down, true) {
            tracing::debug!(connection = name, reason, "still no broker");
        } else {
            tracing::warn!(connection = name, reason, "no broker; trying again until it is back");
        }
    }
}

/// Says goodbye, so that the broker logs no abrupt end.
pub(super) async fn close(link: &Link) {
    if timeout(RPC_TIMEOUT, link.0.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not answer the close");
    }
}
