//! Connecting to the broker, with a deadline on every step.

use std::io;
use std::ops::Deref;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::{AsyncReadExt as _, AsyncWriteExt as _};
use lapin::tcp::{AMQPUriTcpExt as _, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, runtime};
use tokio::time::timeout;

use super::Config;
use super::topology::TopologyError;

const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What the broker's `connection.start`, its answer to our header, begins with.
const METHOD_FRAME: u8 = 1;
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
pub(super) async fn connect(config: &Config, name: &str) -> Result<Link, LinkError> {
    let uri = &config.uri.0;
    let address = format!("{}:{}", uri.authority.host, uri.authority.port);
    // Of no use to amqp://. Of amqps://, the system's own authorities are trusted besides.
    let tls = OwnedTLSConfig { identity: None, cert_chain: config.queue.amqp_ca.clone() };
    // On the heap, both: a TLS handshake has a state of 20 KiB.
    match timeout(PROBE_TIMEOUT, Box::pin(greeting(uri, &tls))).await {
        Ok(Ok(METHOD_FRAME)) => {}
        Ok(Ok(_)) | Err(_) => return Err(LinkError::Silent { address }),
        Ok(Err(source)) => return Err(LinkError::Reach { address, source }),
    }
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = async {
        let runtime = runtime::default_runtime()?;
        Connection::connect_uri_with_config(uri.clone(), properties, tls, runtime).await
    };
    match timeout(CONNECT_TIMEOUT, Box::pin(connecting)).await {
        Ok(Ok(connection)) => Ok(Link(connection)),
        Ok(Err(source)) => Err(LinkError::LogIn { address, source }),
        Err(_) => Err(LinkError::Silent { address }),
    }
}

/// The first byte that a broker says, behind TLS if the URI asks for it. It is asked for before lapin
/// is let near: lapin's connect never returns from a silent peer and leaves a thread behind each time.
async fn greeting(uri: &AMQPUri, tls: &OwnedTLSConfig) -> io::Result<u8> {
    let runtime = runtime::default_runtime().map_err(io::Error::other)?;
    let mut stream = uri.connect_with_config_async(tls.as_ref(), &runtime).await?;
    stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
    stream.flush().await?;
    let mut first = [0];
    stream.read_exact(&mut first).await?;
    Ok(first[0])
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
