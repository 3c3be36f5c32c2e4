//! From a commit to all who subscribe.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amqp::Access;
use anyhow::{Context as _, ensure};
use events::{Emitter, Exchange, Kind, Object};
use hdrhistogram::Histogram;
use pipeline::viewer_url;
use store::{Config, Recorded, Row as Written, Sighting, Store};
use testbed::eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::servers::{Place, World, per_second};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const PATIENCE: Duration = Duration::from_mins(1);
/// Each of some objects, the first of which has a number that they divide.
const COMMITS: i64 = 100;
const OBJECTS: i64 = 10;
const INTERVAL: Duration = Duration::from_millis(100);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Vec<Row>> {
    let mut thousand = subscribers(world, 1_000).await?;
    thousand.goals = vec![Goal::P99MsAtMost(200.0)];
    Ok(vec![thousand, subscribers(world, 10_000).await?])
}

/// Commits as a consumer does, and measures until each subscriber has heard of it.
async fn subscribers(world: &World, count: u16) -> anyhow::Result<Row> {
    let place = world.place("http://127.0.0.1:1".to_owned()).await;
    place.prepare().await;
    let viewer = place.spawn("viewer", &[]).await;
    let address = viewer_url(&viewer).await.trim_start_matches("http://").parse()?;
    let commits = Arc::new(Mutex::new(Vec::new()));
    let mut listening = JoinSet::new();
    for _ in 0..count {
        listening.spawn(listen(address, Arc::clone(&commits)));
    }
    let meter = Meter::start(&viewer);
    eventually("all have subscribed", PATIENCE, async || {
        let there = viewer.metric("lastseen_viewer_subscribers").await;
        (there >= f64::from(count)).then_some(())
    })
    .await;
    // The snapshots are on their way to the last of them.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let started = Instant::now();
    commit(&place, &commits).await?;
    let mut latencies = Histogram::<u64>::new(3)?;
    while let Some(heard) = timeout(PATIENCE, listening.join_next()).await? {
        latencies.add(heard??)?;
    }
    let told = latencies.len();
    ensure!(told == u64::from(count) * COMMITS.unsigned_abs(), "{told} were heard of");
    let what = format!("{count} subscribers, 10 commits of {OBJECTS} objects per second");
    let mut row = Row::new(what, "events/s", per_second(told, started.elapsed()));
    let ms =
        |quantile| Duration::from_micros(latencies.value_at_quantile(quantile)).as_secs_f64() * 1e3;
    (row.p50_ms, row.p99_ms) = (Some(ms(0.5)), Some(ms(0.99)));
    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
    let told = told as f64;
    row.cost = Some(meter.cost_of(told));
    Ok(row)
}

async fn commit(place: &Place, commits: &Mutex<Vec<Instant>>) -> anyhow::Result<()> {
    let store = Store::start(
        &Config::at(place.database.url().parse().map_err(anyhow::Error::msg)?),
        "bench",
        1,
    )?;
    let uri = place.system.amqp_uri.parse().map_err(|()| anyhow::anyhow!("no AMQP URI"))?;
    let exchange = Exchange::on_rabbitmq(Access { uri, authorities: None }, &place.queue.name);
    let emitter = Emitter::start(&exchange, "bench");
    timeout(PATIENCE, store.status().wait_for(Result::is_ok)).await??;
    let mut status = emitter.status().context("there is a broker")?;
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await??;
    let mut interval = interval(INTERVAL);
    for commit in 0..COMMITS {
        interval.tick().await;
        let ids = commit * OBJECTS..(commit + 1) * OBJECTS;
        let sightings: Vec<Sighting> = ids.map(|id| Sighting { id, age: Duration::ZERO }).collect();
        // As a consumer does, it tries again: behind other parts the server may be busy for seconds.
        let recorded =
            eventually("the commit", PATIENCE, async || store.record_seen(&sightings).await.ok());
        let Recorded { inserted, updated } = recorded.await;
        commits.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        let object = |row: &Written| Object { id: row.id, last_seen: row.last_seen.time() };
        emitter.publish(Kind::Online, inserted.iter().map(object));
        emitter.publish(Kind::Seen, updated.iter().map(object));
    }
    Ok(())
}

/// Subscribes, and hears of each commit, in microseconds after it.
async fn listen(
    viewer: SocketAddr,
    commits: Arc<Mutex<Vec<Instant>>>,
) -> anyhow::Result<Histogram<u64>> {
    let mut stream = TcpStream::connect(viewer).await?;
    stream.write_all(b"GET /events HTTP/1.1\r\nhost: bench\r\n\r\n").await?;
    let mut heard = Histogram::new(3)?;
    let mut text = Vec::new();
    while heard.len() < COMMITS.unsigned_abs() {
        ensure!(stream.read_buf(&mut text).await? > 0, "the stream has ended");
        let now = Instant::now();
        // What comes behind the last line may be cut off in the middle of a number.
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { continue };
        let lines: Vec<u8> = text.drain(..=end).collect();
        for commit in
            String::from_utf8_lossy(&lines).split("\"id\":\"").skip(1).filter_map(first_of)
        {
            let commits = commits.lock().unwrap_or_else(PoisonError::into_inner);
            let committed = commits.get(commit).context("heard of before it was committed")?;
            heard.record(u64::try_from(now.duration_since(*committed).as_micros())?)?;
        }
    }
    Ok(heard)
}

/// The number of the commit, if the text begins with its first object.
fn first_of(text: &str) -> Option<usize> {
    let digits = text.split('"').next()?;
    let id: i64 = digits.parse().ok().filter(|id| id % OBJECTS == 0)?;
    usize::try_from(id / OBJECTS).ok()
}
