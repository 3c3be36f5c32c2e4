//! The viewer, from a commit to the events at all subscribers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use messaging::amqp::Access;
use messaging::events::{Emitter, Exchange, Kind, Object};
use parking_lot::Mutex;
use runtime::Supervisor;
use store::{Config, Recorded, Row as Written, Sighting, Store};
use testkit::{PATIENCE, viewer_address, wait_for};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use super::callbacks::NO_STATUS_API;
use crate::servers::{Deployment, Servers, per_second};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const COMMITS: i64 = 100;
/// Objects of each commit. The first id of a commit is a multiple of this number.
const OBJECTS: i64 = 10;
const INTERVAL: Duration = Duration::from_millis(100);

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let mut thousand = measure_subscribers(servers, 1_000).await?;
    thousand.goals = vec![Goal::P99MsAtMost(200.0)];
    Ok(vec![thousand, measure_subscribers(servers, 10_000).await?])
}

/// Commits as a consumer does, and measures the time until each subscriber has received the event.
async fn measure_subscribers(servers: &Servers, count: u16) -> anyhow::Result<Row> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let viewer = deployment.system.start("viewer", &[]).await;
    let address = viewer_address(&viewer).await;
    let commits = Arc::new(Mutex::new(Vec::new()));
    let mut listening = JoinSet::new();
    for _ in 0..count {
        listening.spawn(listen(address, Arc::clone(&commits)));
    }
    let meter = Meter::start(&viewer);
    viewer.wait_for_metric("lastseen_viewer_subscribers", f64::from(count)).await;
    // The last subscribers may still be receiving their snapshots.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let started = Instant::now();
    commit(&deployment, &commits).await?;
    let mut latencies = Histogram::<u64>::new(3)?;
    while let Some(received) = timeout(PATIENCE, listening.join_next()).await? {
        latencies.add(received??)?;
    }
    let received = latencies.len();
    ensure!(received == u64::from(count) * COMMITS.unsigned_abs(), "{received} events arrived");
    let what = format!("{count} subscribers, 10 commits of {OBJECTS} objects per second");
    let mut row = Row::new(what, "events/s", per_second(received, started.elapsed()));
    (row.p50_ms, row.p99_ms) = (Some(ms_at(&latencies, 0.5)), Some(ms_at(&latencies, 0.99)));
    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
    let received = received as f64;
    row.cost = Some(meter.cost_of(received));
    Ok(row)
}

/// The quantile of times in microseconds, in milliseconds.
pub(super) fn ms_at(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    Duration::from_micros(latencies.value_at_quantile(quantile)).as_secs_f64() * 1e3
}

async fn commit(deployment: &Deployment, commits: &Mutex<Vec<Instant>>) -> anyhow::Result<()> {
    let (store, emitter) = open_writer(deployment).await?;
    let mut interval = interval(INTERVAL);
    for commit in 0..COMMITS {
        interval.tick().await;
        let ids = commit * OBJECTS..(commit + 1) * OBJECTS;
        let sightings: Vec<Sighting> = ids.map(|id| Sighting { id, age: Duration::ZERO }).collect();
        // Tries again, like a consumer: the server may be busy for seconds after other parts.
        let recorded = wait_for("the commit", async || store.record_seen(&sightings).await.ok());
        let Recorded { inserted, updated } = recorded.await;
        commits.lock().push(Instant::now());
        let object = |row: &Written| Object { id: row.id, last_seen: row.last_seen.time() };
        emitter.publish(Kind::Online, inserted.iter().map(object));
        emitter.publish(Kind::Seen, updated.iter().map(object));
    }
    Ok(())
}

/// What a consumer writes to.
pub(super) async fn open_writer(deployment: &Deployment) -> anyhow::Result<(Store, Emitter)> {
    let store = Store::start(
        Config::at(deployment.database.url().parse().map_err(anyhow::Error::msg)?)
            .open(&Supervisor::default())?,
        "bench",
        1,
    );
    let uri = deployment.system.amqp_uri.parse().map_err(anyhow::Error::msg)?;
    let exchange = Exchange::on_rabbitmq(Access { uri, authorities: None }, &deployment.queue.name);
    let emitter = Emitter::start(&exchange, "bench", &Supervisor::default());
    timeout(PATIENCE, store.status().wait_for(Result::is_ok)).await??;
    let mut status = emitter.status().context("there is a broker")?;
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await??;
    Ok((store, emitter))
}

/// Subscribes, and returns the time from each commit to its event in microseconds.
async fn listen(
    viewer: SocketAddr,
    commits: Arc<Mutex<Vec<Instant>>>,
) -> anyhow::Result<Histogram<u64>> {
    let mut stream = TcpStream::connect(viewer).await?;
    stream.write_all(b"GET /events HTTP/1.1\r\nhost: bench\r\n\r\n").await?;
    let mut latencies = Histogram::new(3)?;
    let mut text = Vec::new();
    while latencies.len() < COMMITS.unsigned_abs() {
        ensure!(stream.read_buf(&mut text).await? > 0, "the stream has ended");
        let now = Instant::now();
        // The text after the last line feed may end in the middle of a number.
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { continue };
        let lines: Vec<u8> = text.drain(..=end).collect();
        for commit in
            String::from_utf8_lossy(&lines).split("\"id\":\"").skip(1).filter_map(commit_number)
        {
            let commits = commits.lock();
            let committed = commits.get(commit).context("an event arrived before its commit")?;
            latencies.record(u64::try_from(now.duration_since(*committed).as_micros())?)?;
        }
    }
    Ok(latencies)
}

/// The number of the commit, if the text begins with the first object of a commit.
fn commit_number(text: &str) -> Option<usize> {
    let digits = text.split('"').next()?;
    let id: i64 = digits.parse().ok().filter(|id| id % OBJECTS == 0)?;
    usize::try_from(id / OBJECTS).ok()
}
