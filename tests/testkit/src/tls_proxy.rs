//! TLS in front of a server that has none.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::Authority;

/// Decrypts connections and forwards them to a server. Stops to accept connections on drop.
#[derive(Debug)]
pub struct TlsProxy {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl TlsProxy {
    /// Starts on a free port of 127.0.0.1, with the certificate of `authority`.
    pub async fn start(authority: &Authority, target: SocketAddr) -> Self {
        let acceptor = authority.acceptor(&[b"http/1.1"]);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port should be free");
        let address = listener.local_addr().expect("a listener has an address");
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Clients that do not trust the certificate end the connection.
                tokio::spawn(forward(acceptor.clone(), stream, target));
            }
        });
        Self { address, accepting }
    }

    /// The address to connect to instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TlsProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn forward(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    target: SocketAddr,
) -> std::io::Result<()> {
    let mut client = acceptor.accept(stream).await?;
    let mut server = TcpStream::connect(target).await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}
