//! A status API over HTTP/2.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Bytes;
use axum::http::{Request, Response};
use h2::RecvStream;
use h2::server::{Builder, SendResponse};
use runtime::CancellationToken;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use crate::{Authority, PATIENCE};

/// A server whose test answers each lookup itself. TLS chooses HTTP/2.
#[derive(Debug)]
pub struct Http2Api {
    address: SocketAddr,
    lookups: UnboundedReceiver<Http2Lookup>,
    open: Arc<AtomicUsize>,
    _accepting: AbortOnDropHandle<()>,
}

/// A lookup that has arrived.
#[derive(Debug)]
pub struct Http2Lookup {
    /// The number of connections that were accepted before its own.
    pub connection: usize,
    /// The request, whose body is empty.
    pub request: Request<RecvStream>,
    /// Sends the response.
    pub respond: SendResponse<Bytes>,
    /// Closes the connection when it is cancelled, without a GOAWAY.
    pub disconnect: CancellationToken,
}

impl Http2Api {
    /// Starts on a free port of 127.0.0.1, with the certificate of `authority`, and announces
    /// `stream_limit`, if given.
    pub async fn start(authority: &Authority, stream_limit: Option<u32>) -> Self {
        let acceptor = authority.acceptor(&[b"h2", b"http/1.1"]);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port should be free");
        let address = listener.local_addr().expect("a listener has an address");
        let (sender, lookups) = mpsc::unbounded_channel();
        let open = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&open);
        let accepting = tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.expect("there should be descriptors");
                let (acceptor, sender, open) = (acceptor.clone(), sender.clone(), counter.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::Relaxed);
                    // An error means that the client has ended the connection.
                    _ = serve(acceptor, stream, stream_limit, number, sender).await;
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Self { address, lookups, open, _accepting: AbortOnDropHandle::new(accepting) }
    }

    /// The address of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The number of open connections.
    pub fn open_connections(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Waits for the next lookup.
    pub async fn next(&mut self) -> Http2Lookup {
        let next = timeout(PATIENCE, self.lookups.recv()).await;
        next.expect("a lookup should arrive").expect("the server runs")
    }

    /// Whether a lookup has arrived that [`next`](Self::next) has not returned.
    pub fn has_next(&self) -> bool {
        !self.lookups.is_empty()
    }
}

impl Http2Lookup {
    /// Answers that the object is online.
    pub fn answer(mut self) {
        let id = self.request.uri().path().rsplit('/').next().unwrap_or_default();
        let body = format!(r#"{{"id":{id},"online":true}}"#);
        // The client may have given up.
        if let Ok(mut stream) = self.respond.send_response(Response::default(), false) {
            _ = stream.send_data(body.into(), true);
        }
    }
}

async fn serve(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    stream_limit: Option<u32>,
    connection: usize,
    lookups: UnboundedSender<Http2Lookup>,
) -> anyhow::Result<()> {
    let stream = acceptor.accept(stream).await?;
    let mut builder = Builder::new();
    if let Some(limit) = stream_limit {
        builder.max_concurrent_streams(limit);
    }
    let mut streams = builder.handshake(stream).await?;
    let disconnect = CancellationToken::new();
    while let Some(Some(accepted)) = disconnect.run_until_cancelled(streams.accept()).await {
        let (request, respond) = accepted?;
        let disconnect = disconnect.clone();
        lookups.send(Http2Lookup { connection, request, respond, disconnect })?;
    }
    Ok(())
}
