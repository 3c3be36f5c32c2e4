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
use tokio::time::sleep_until;

use crate::servers::per_second;

/// For how long after its end a load at a rate waits for what is late.
const LATE: Duration = Duration::from_secs(2);

/// What to post.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) producer: SocketAddr,
    pub(crate) connections: u16,
    /// In each callback; each id is in one callback only.
    pub(crate) ids: u16,
    /// Callbacks per second, whether they are answered or not; as fast as is answered if it is not said.
    pub(crate) rate: Option<f64>,
    /// Not measured.
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
}

/// What was answered.
pub(crate) struct Answers {
    pub(crate) accepted_per_second: f64,
    /// Answers other than 200, and none at all within a second or so.
    pub(crate) refused_per_second: f64,
    /// Of what was accepted, in microseconds from when it was sent; at a rate, from when it was due.
    latencies: Histogram<u64>,
}

impl Answers {
    pub(crate) fn latency_ms(&self, quantile: f64) -> f64 {
        Duration::from_micros(self.latencies.value_at_quantile(quantile)).as_secs_f64() * 1e3
    }
}

/// What came of the callbacks of one connection.
struct Tally {
    latencies: Histogram<u64>,
    refused: u64,
}

impl Load {
    /// Posts callbacks.
    ///
    /// # Errors
    /// When a connection breaks.
    pub(crate) async fn run(self) -> anyhow::Result<Answers> {
        // In a thread of its own, so that nothing else here waits for the same core.
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(self.post())
        })
        .await?
    }

    async fn post(self) -> anyhow::Result<Answers> {
        let starts = Instant::now();
        let mut connections = JoinSet::new();
        for number in 0..self.connections {
            connections.spawn(self.post_on_one(number, starts));
        }
        let (mut latencies, mut refused) = (Histogram::new(3)?, 0);
        while let Some(ended) = connections.join_next().await {
            let of_one = ended??;
            latencies.add(&of_one.latencies)?;
            refused += of_one.refused;
        }
        Ok(Answers {
            accepted_per_second: per_second(latencies.len(), self.duration),
            refused_per_second: per_second(refused, self.duration),
            latencies,
        })
    }

    async fn post_on_one(self, number: u16, starts: Instant) -> anyhow::Result<Tally> {
        let mut stream = TcpStream::connect(self.producer).await?;
        stream.set_nodelay(true)?;
        let (begins, ends) = (starts + self.warm_up, starts + self.warm_up + self.duration);
        let mut tally = Tally { latencies: Histogram::new(3)?, refused: 0 };
        let (mut request, mut answer) = (Vec::new(), Vec::with_capacity(1_024));
        // Ids far apart for each connection, so that all are distinct.
        let mut next = i64::from(number) << 40;
        // The connections take turns.
        let turns =
            self.rate.map(|rate| Duration::from_secs_f64(f64::from(self.connections) / rate));
        let mut due = starts
            + turns.unwrap_or_default().mul_f64(f64::from(number) / f64::from(self.connections));
        loop {
            match turns {
                Some(_) => sleep_until(due.into()).await,
                None => due = Instant::now(),
            }
            if due >= ends {
                return Ok(tally);
            }
            let is_measured = due >= begins;
            if Instant::now() > ends + LATE {
                tally.refused += u64::from(is_measured);
                due += turns.unwrap_or_default();
                continue;
            }
            encode(&mut request, next, self.ids)?;
            next += i64::from(self.ids);
            stream.write_all(&request).await?;
            let status = read_answer(&mut stream, &mut answer).await?;
            let now = Instant::now();
            // As fast as is answered, what ends after the end is not of that time.
            if is_measured && (turns.is_some() || now < ends) {
                if status == 200 {
                    tally.latencies.record(u64::try_from((now - due).as_micros())?)?;
                } else {
                    tally.refused += 1;
                }
            }
            due += turns.unwrap_or_default();
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
