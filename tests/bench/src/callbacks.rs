//! A partner with little overhead, which posts callbacks over plain sockets. Each connection has
//! one callback in flight.

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

/// How long a load with a rate continues after its `duration` to post callbacks that are late.
const LATE_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) producer: SocketAddr,
    pub(crate) connections: u16,
    /// The number of ids in each callback. Each id is in one callback only.
    pub(crate) ids: u16,
    /// Callbacks per second, regardless of responses. With `None`, each connection posts its next
    /// callback after a response.
    pub(crate) rate: Option<f64>,
    /// Time before the measurement.
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
}

pub(crate) struct LoadResult {
    pub(crate) accepted_per_second: f64,
    /// Responses other than 200, and callbacks that were not sent in time.
    pub(crate) refused_per_second: f64,
    /// Latencies of accepted callbacks in microseconds. They count from when a callback was sent
    /// or, with a rate, from when it was due.
    latencies: Histogram<u64>,
}

impl LoadResult {
    pub(crate) fn latency_ms(&self, quantile: f64) -> f64 {
        Duration::from_micros(self.latencies.value_at_quantile(quantile)).as_secs_f64() * 1e3
    }
}

struct ConnectionResult {
    latencies: Histogram<u64>,
    refused: u64,
}

impl Load {
    pub(crate) async fn run(self) -> anyhow::Result<LoadResult> {
        // On its own thread, so that it does not share a core with other work of this program.
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(self.post())
        })
        .await?
    }

    async fn post(self) -> anyhow::Result<LoadResult> {
        let started_at = Instant::now();
        let mut connections = JoinSet::new();
        for number in 0..self.connections {
            connections.spawn(self.post_on_one(number, started_at));
        }
        let (mut latencies, mut refused) = (Histogram::new(3)?, 0);
        while let Some(ended) = connections.join_next().await {
            let result = ended??;
            latencies.add(&result.latencies)?;
            refused += result.refused;
        }
        Ok(LoadResult {
            accepted_per_second: per_second(latencies.len(), self.duration),
            refused_per_second: per_second(refused, self.duration),
            latencies,
        })
    }

    async fn post_on_one(
        self,
        number: u16,
        started_at: Instant,
    ) -> anyhow::Result<ConnectionResult> {
        let mut stream = TcpStream::connect(self.producer).await?;
        stream.set_nodelay(true)?;
        let measured_from = started_at + self.warm_up;
        let measured_until = measured_from + self.duration;
        let mut tally = ConnectionResult { latencies: Histogram::new(3)?, refused: 0 };
        let (mut request, mut response) = (Vec::new(), Vec::with_capacity(1_024));
        // Each connection has its own range of ids, so that all ids are distinct.
        let mut next = i64::from(number) << 40;
        // The connections post in turn.
        let period =
            self.rate.map(|rate| Duration::from_secs_f64(f64::from(self.connections) / rate));
        let mut due = started_at
            + period.unwrap_or_default().mul_f64(f64::from(number) / f64::from(self.connections));
        loop {
            match period {
                Some(_) => sleep_until(due.into()).await,
                None => due = Instant::now(),
            }
            if due >= measured_until {
                return Ok(tally);
            }
            let is_measured = due >= measured_from;
            if Instant::now() > measured_until + LATE_MAX {
                tally.refused += u64::from(is_measured);
                due += period.unwrap_or_default();
                continue;
            }
            encode(&mut request, next, self.ids)?;
            next += i64::from(self.ids);
            stream.write_all(&request).await?;
            let status = read_response(&mut stream, &mut response).await?;
            let now = Instant::now();
            // Without a rate, a response after the end does not belong to the measured time.
            if is_measured && (period.is_some() || now < measured_until) {
                if status == 200 {
                    tally.latencies.record(u64::try_from((now - due).as_micros())?)?;
                } else {
                    tally.refused += 1;
                }
            }
            due += period.unwrap_or_default();
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

/// Reads one complete response and returns its status.
async fn read_response(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> anyhow::Result<u16> {
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
        let length = std::str::from_utf8(length.context("a response without a length")?.value)?;
        if buffer.len() == head + length.parse::<usize>()? {
            return response.code.context("a response without a status");
        }
    }
}
