//! A partner that costs next to nothing: callbacks over plain sockets, each connection with one at a
//! time.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::world::per_second;

/// What to post.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) producer: SocketAddr,
    pub(crate) connections: u16,
    /// In each callback; each id is in one callback only.
    pub(crate) ids: u16,
    /// Not measured.
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
}

/// What was answered.
pub(crate) struct Answers {
    pub(crate) accepted_per_second: f64,
    /// In microseconds.
    pub(crate) latencies: Histogram<u64>,
}

impl Answers {
    pub(crate) fn latency_ms(&self, quantile: f64) -> f64 {
        Duration::from_micros(self.latencies.value_at_quantile(quantile)).as_secs_f64() * 1e3
    }
}

impl Load {
    /// Posts as fast as is answered.
    ///
    /// # Errors
    /// When a connection breaks, or an answer is not 200.
    pub(crate) async fn run(self) -> anyhow::Result<Answers> {
        // In a thread of its own, so that nothing else here waits for the same core.
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(self.post())
        })
        .await?
    }

    async fn post(self) -> anyhow::Result<Answers> {
        let begins = Instant::now() + self.warm_up;
        let mut connections = JoinSet::new();
        for number in 0..self.connections {
            connections.spawn(self.post_on_one(number, begins));
        }
        let (mut accepted, mut latencies) = (0, Histogram::new(3)?);
        while let Some(ended) = connections.join_next().await {
            let of_one = ended??;
            accepted += of_one.len();
            latencies.add(&of_one)?;
        }
        let accepted_per_second = per_second(accepted, self.duration);
        Ok(Answers { accepted_per_second, latencies })
    }

    async fn post_on_one(self, number: u16, begins: Instant) -> anyhow::Result<Histogram<u64>> {
        let mut stream = TcpStream::connect(self.producer).await?;
        stream.set_nodelay(true)?;
        let mut latencies = Histogram::new(3)?;
        let (mut request, mut answer) = (Vec::new(), Vec::with_capacity(1_024));
        // Ids far apart for each connection, so that all are distinct.
        let mut next = i64::from(number) << 40;
        loop {
            let sent = Instant::now();
            if sent >= begins + self.duration {
                return Ok(latencies);
            }
            encode(&mut request, next, self.ids)?;
            next += i64::from(self.ids);
            stream.write_all(&request).await?;
            let status = read_answer(&mut stream, &mut answer).await?;
            ensure!(status == 200, "answered {status}");
            let now = Instant::now();
            if now >= begins && now < begins + self.duration {
                latencies.record(u64::try_from((now - sent).as_micros())?)?;
            }
        }
    }
}

fn encode(request: &mut Vec<u8>, first: i64, ids: u16) -> anyhow::Result<()> {
    let mut body = br#"{"object_ids":["#.to_vec();
    for id in first..first + i64::from(ids) {
        write!(body, "{id},")?;
    }
    body.pop();
    body.extend(b"]}");
    request.clear();
    write!(
        request,
        "POST /callback HTTP/1.1\r\nhost: producer\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )?;
    request.extend(body);
    Ok(())
}

/// Reads one whole answer and gives its status.
async fn read_answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> anyhow::Result<u16> {
    buffer.clear();
    loop {
        ensure!(stream.read_buf(buffer).await? > 0, "the producer has closed the connection");
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(buffer)? else { continue };
        let length = response
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("content-length"));
        let length = std::str::from_utf8(length.context("an answer without a length")?.value)?;
        if buffer.len() == head + length.parse::<usize>()? {
            return response.code.context("an answer without a status");
        }
    }
}
