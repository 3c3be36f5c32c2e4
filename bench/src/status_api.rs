//! A status API that costs next to nothing, so that what is measured is who asks it.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

const BACKLOG: u32 = 16_384;

/// A server for `GET /objects/{id}` with a thread of its own. Every object is online, so that each
/// lookup leads to a write.
pub(crate) struct StatusApi {
    address: SocketAddr,
    answered: Arc<AtomicU64>,
}

impl StatusApi {
    /// Starts it. An answer takes a time out of `latency`, each as likely as any other.
    ///
    /// # Errors
    /// When no runtime or socket can be had.
    pub(crate) fn start(latency: Range<Duration>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = socket.local_addr()?;
        let answered = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&answered);
        std::thread::spawn(move || {
            runtime.block_on(async move {
                let listener = socket.listen(BACKLOG).expect("a bound socket can listen");
                loop {
                    let (stream, _) =
                        listener.accept().await.expect("there should be files enough");
                    tokio::spawn(answer(stream, latency.clone(), Arc::clone(&counter)));
                }
            });
        });
        Ok(Self { address, answered })
    }

    /// What to set `TESTER_ENDPOINT` to.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many lookups it has answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

/// Answers one request after the other until the client has gone.
async fn answer(
    mut stream: TcpStream,
    latency: Range<Duration>,
    answered: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (mut request, mut response) = (Vec::with_capacity(1_024), Vec::with_capacity(256));
    loop {
        request.clear();
        while !request.ends_with(b"\r\n\r\n") {
            anyhow::ensure!(stream.read_buf(&mut request).await? > 0, "the client has gone");
        }
        let line = std::str::from_utf8(&request)?;
        let path = line.strip_prefix("GET /objects/").context("not a lookup")?;
        let id = path.split(' ').next().unwrap_or_default();
        if !latency.is_empty() {
            tokio::time::sleep(rand::random_range(latency.clone())).await;
        }
        let body = format!(r#"{{"id":{id},"online":true}}"#);
        response.clear();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        response.extend(head.as_bytes());
        response.extend(body.as_bytes());
        // Counted first: who has the answer finds it counted.
        answered.fetch_add(1, Ordering::Relaxed);
        stream.write_all(&response).await?;
    }
}
