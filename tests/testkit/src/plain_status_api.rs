//! A status API on plain sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use runtime::CancellationToken;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const BACKLOG: u32 = 16_384;

/// What the server does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// Keeps it open.
    StayOpen,
    /// Closes it when the second request has arrived, without a response.
    CloseAtSecondRequest,
    /// Closes it after the first response, although the response does not announce this.
    CloseAfterResponse,
    /// Closes it when the first request has arrived, without a response.
    CloseAtFirstRequest,
}

/// Returns the latency of an answer for a number of lookups in flight; `None` for no delay.
type Latency = dyn Fn(u32) -> Option<Duration> + Send + Sync;

/// A server for `GET /objects/{id}` on its own thread, which reports every object as online. Its
/// overhead is so small that a measurement with it shows the speed of the consumer. It can also
/// close connections at any time.
#[derive(Debug)]
pub struct PlainStatusApi {
    address: SocketAddr,
    counts: Arc<Counts>,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    requests: AtomicU64,
    answered: AtomicU64,
    in_flight: AtomicU32,
}

impl PlainStatusApi {
    /// Starts the server on a free port.
    pub fn start(
        connections: Connections,
        latency: impl Fn(u32) -> Option<Duration> + Send + Sync + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime should start");
        let socket = TcpSocket::new_v4().expect("a socket should open");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port should be free");
        let address = socket.local_addr().expect("a bound socket has an address");
        let listener = {
            let _runtime = runtime.enter();
            socket.listen(BACKLOG).expect("a bound socket can listen")
        };
        let (counts, stop) = (Arc::new(Counts::default()), CancellationToken::new());
        let (counted, stopped) = (Arc::clone(&counts), stop.clone());
        let latency: Arc<Latency> = Arc::new(latency);
        std::thread::spawn(move || {
            runtime.block_on(stopped.run_until_cancelled(async move {
                loop {
                    let (stream, _) =
                        listener.accept().await.expect("there should be enough file descriptors");
                    let (latency, counts) = (Arc::clone(&latency), Arc::clone(&counted));
                    tokio::spawn(
                        async move { serve(stream, connections, &*latency, &counts).await },
                    );
                }
            }));
        });
        Self { address, counts, stop }
    }

    /// The address of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The value for `TESTER_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The number of connections with at least one request.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// The number of requests.
    pub fn requests(&self) -> u64 {
        self.counts.requests.load(Ordering::Relaxed)
    }

    /// The number of answered lookups.
    pub fn answered(&self) -> u64 {
        self.counts.answered.load(Ordering::Relaxed)
    }
}

impl Drop for PlainStatusApi {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Answers one request after the other, until one side closes the connection.
async fn serve(
    mut stream: TcpStream,
    connections: Connections,
    latency: &Latency,
    counts: &Counts,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut request, mut number) = (Vec::with_capacity(1_024), 0);
    loop {
        request.clear();
        while !request.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
        }
        number += 1;
        counts.connections.fetch_add(u64::from(number == 1), Ordering::Relaxed);
        counts.requests.fetch_add(1, Ordering::Relaxed);
        if connections == Connections::CloseAtFirstRequest
            || connections == Connections::CloseAtSecondRequest && number == 2
        {
            return Ok(());
        }
        let head = std::str::from_utf8(&request).unwrap_or_default();
        let id = head.strip_prefix("GET /objects/").and_then(|path| path.split_once(' '));
        // Field case 5.7.
        let (id, _) = id.filter(|(_, rest)| rest.starts_with("HTTP/1.1\r\n")).expect("a lookup");
        let in_flight = counts.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(latency) = latency(in_flight) {
            // Like most servers, this one continues if the client disconnects.
            tokio::time::sleep(latency).await;
        }
        counts.in_flight.fetch_sub(1, Ordering::Relaxed);
        let body = format!(r#"{{"id":{id},"online":true}}"#);
        let response = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        // Counted before it is sent, so that a client that has the answer finds it in the count.
        counts.answered.fetch_add(1, Ordering::Relaxed);
        stream.write_all(response.as_bytes()).await?;
        if connections == Connections::CloseAfterResponse {
            return Ok(());
        }
    }
}
