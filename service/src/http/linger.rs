//! The end of a connection.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a client may send nothing before the connection is closed.
const QUIET: Duration = Duration::from_secs(2);
/// How long a client may go on sending.
const TOTAL: Duration = Duration::from_secs(10);
/// How much it may send.
const BYTES: usize = 64 << 20;
/// How much is read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// Says that no more will be sent, and reads and discards what the client still sends until it closes its
/// side, for a bounded time and size. A close with unread bytes resets the connection, and the reset can
/// make the client lose a response that it has not read yet: many clients read only once they have
/// sent their whole body.
pub(super) async fn linger(socket: &TcpStream) {
    if SockRef::from(socket).shutdown(Shutdown::Write).is_err() {
        return;
    }
    let discard_all = async {
        let mut left = BYTES;
        while let Ok(Ok(())) = timeout(QUIET, socket.readable()).await {
            match discard(socket) {
                Ok(0) => return,
                Ok(count) if count <= left => left -= count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => return,
            }
        }
    };
    let _ = timeout(TOTAL, discard_all).await;
}

/// The buffer is here, and not in the future above, so that it takes memory only while it is used.
fn discard(socket: &TcpStream) -> io::Result<usize> {
    socket.try_read(&mut [0; CHUNK_BYTES])
}
