//! Closes a connection without losing the response.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a client may pause before the connection is closed.
const QUIET_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a client may continue to send.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How many bytes a client may still send.
const BYTES_MAX: usize = 64 << 20;
const CHUNK_BYTES: usize = 16 << 10;

/// Closes the sending side of the connection. Then reads and discards what the client still sends,
/// within limits of time and size, until the client closes its side. Closing a socket with unread
/// bytes would reset the connection, and a client that reads only after sending its whole body
/// would lose the response.
pub(super) async fn linger(socket: &TcpStream) {
    if SockRef::from(socket).shutdown(Shutdown::Write).is_err() {
        return;
    }
    let discard_all = async {
        let mut bytes_left = BYTES_MAX;
        while let Ok(Ok(())) = timeout(QUIET_TIMEOUT, socket.readable()).await {
            match discard(socket) {
                Ok(0) => return,
                Ok(count) if count <= bytes_left => bytes_left -= count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => return,
            }
        }
    };
    let _ = timeout(TOTAL_TIMEOUT, discard_all).await;
}

/// A separate function, so that its buffer does not become part of each connection's future.
fn discard(socket: &TcpStream) -> io::Result<usize> {
    socket.try_read(&mut [0; CHUNK_BYTES])
}
