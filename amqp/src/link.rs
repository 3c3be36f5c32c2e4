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

use crate::Access;

const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What the broker's `connection.start`, its answer to our header, begins with.
const METHOD_FRAME: u8 = 1;
/// Opening a channel, declaring a queue, closing: answered at once or not at all.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no usable connection, named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody is there, or not whom we trust.
    #[error("cannot reach {address}: {source}")]
    Reach {
        /// Host and port.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// It has not said what a broker says first, or nothing any more.
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

/// An open connection. With its end the broker takes back all that came by it and is not acked.
///
/// lapin by itself keeps a connection for as long as it has a consumer that was asked for and that
/// nobody waits for any more, so that messages would pile up there. So its end is asked for here.
pub struct Link(Connection);

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
///
/// # Errors
/// [`ConnectError`], after 7 s at the latest.
pub async fn connect(access: &Access, name: &str) -> Result<Link, ConnectError> {
    let uri = &access.uri.0;
    let address = format!("{}:{}", uri.authority.host, uri.authority.port);
    // Of no use to amqp://. Of amqps://, the system's own authorities are trusted besides.
    let tls = OwnedTLSConfig { identity: None, cert_chain: access.authorities.clone() };
    // On the heap, both: a TLS handshake has a state of 20 KiB.
    match timeout(PROBE_TIMEOUT, Box::pin(greeting(uri, &tls))).await {
        Ok(Ok(METHOD_FRAME)) => {}
        Ok(Ok(_)) | Err(_) => return Err(ConnectError::Silent { address }),
        Ok(Err(source)) => return Err(ConnectError::Reach { address, source }),
    }
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = async {
        let runtime = runtime::default_runtime()?;
        Connection::connect_uri_with_config(uri.clone(), properties, tls, runtime).await
    };
    match timeout(CONNECT_TIMEOUT, Box::pin(connecting)).await {
        Ok(Ok(connection)) => Ok(Link(connection)),
        Ok(Err(source)) => Err(ConnectError::LogIn { address, source }),
        Err(_) => Err(ConnectError::Silent { address }),
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

/// Says goodbye, so that the broker logs no abrupt end.
pub async fn close(link: &Link) {
    if timeout(RPC_TIMEOUT, link.0.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not answer the close");
    }
}
