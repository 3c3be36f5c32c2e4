//! A status API with little overhead, so that the consumer determines the measurement.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const BACKLOG: u32 = 16_384;

/// A server for `GET /objects/{id}` on its own thread. Every object is online, so that each lookup
/// leads to a write.
pub(crate) struct StatusApi {
    address: SocketAddr,
    records: Arc<Records>,
}

#[derive(Default)]
struct Records {
    answered: AtomicU64,
    in_flight: AtomicU32,
}

/// The latency of answers.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// The range of the uniformly distributed latency.
    pub(crate) latency: Range<Duration>,
    /// With more lookups in flight, the latency grows with the square of their number.
    pub(crate) knee: Option<u32>,
}

impl Pace {
    pub(crate) const INSTANT: Self = Self { latency: Duration::ZERO..Duration::ZERO, knee: None };

    /// The latency of a lookup that begins with `in_flight` lookups; `None` for no delay.
    fn delay(&self, in_flight: u32) -> Option<Duration> {
        if self.latency.is_empty() {
            return None;
        }
        let load = self.knee.map_or(1.0, |knee| f64::from(in_flight) / f64::from(knee));
        Some(rand::random_range(self.latency.clone()).mul_f64(load.max(1.0).powi(2)))
    }
}

impl StatusApi {
    /// Starts it.
    ///
    /// # Errors
    /// When a runtime or a socket cannot be created.
    pub(crate) fn start(pace: Pace) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = socket.local_addr()?;
        let records = Arc::new(Records::default());
        let server_records = Arc::clone(&records);
        std::thread::spawn(move || {
            runtime.block_on(async move {
                let listener = socket.listen(BACKLOG).expect("a bound socket can listen");
                loop {
                    let (stream, _) =
                        listener.accept().await.expect("there should be enough file descriptors");
                    tokio::spawn(answer(stream, pace.clone(), Arc::clone(&server_records)));
                }
            });
        });
        Ok(Self { address, records })
    }

    /// The value for `TESTER_ENDPOINT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The number of answered lookups.
    pub(crate) fn answered(&self) -> u64 {
        self.records.answered.load(Ordering::Relaxed)
    }
}

/// Answers one request after the other until the client disconnects.
async fn answer(mut stream: TcpStream, pace: Pace, records: Arc<Records>) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (mut request, mut response) = (Vec::with_capacity(1_024), Vec::with_capacity(256));
    loop {
        request.clear();
        while !request.ends_with(b"\r\n\r\n") {
            anyhow::ensure!(
                stream.read_buf(&mut request).await? > 0,
                "the client has disconnected"
            );
        }
        let line = std::str::from_utf8(&request)?;
        let path = line.strip_prefix("GET /objects/").context("not a lookup")?;
        let id = path.split(' ').next().unwrap_or_default();
        let in_flight = records.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(latency) = pace.delay(in_flight) {
            // It continues if the client disconnects, like most servers.
            tokio::time::sleep(latency).await;
        }
        records.in_flight.fetch_sub(1, Ordering::Relaxed);
        let body = format!(r#"{{"id":{id},"online":true}}"#);
        response.clear();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        response.extend(head.as_bytes());
        response.extend(body.as_bytes());
        // Counted first, so that a client that has the answer finds it counted.
        records.answered.fetch_add(1, Ordering::Relaxed);
        stream.write_all(&response).await?;
    }
}
