//! Groups with a million objects: the start and the memory of the viewer, and the time from a commit
//! to the event `group` at all subscribers of the group.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use messaging::events::{Kind, Object};
use parking_lot::Mutex;
use sqlx::{Connection as _, PgConnection};
use store::{Row as Written, Sighting};
use testkit::{PATIENCE, Process, Scratch, http_get, viewer_address, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use super::callbacks::NO_STATUS_API;
use super::restart::bring_online;
use super::viewer::{ms_at, open_writer};
use crate::servers::{Deployment, Servers, per_second};
use crate::table::{Goal, Row};
use crate::usage::{Cost, Meter, megabytes};

const RUNS: usize = 3;
const OBJECTS: f64 = 1e6;
const SUBSCRIBERS: u16 = 1_000;
const CHANGES: usize = 50;
const INTERVAL: Duration = Duration::from_millis(200);
const HOUR: Duration = Duration::from_hours(1);
/// The object that goes and comes, and its group.
const OBJECT: i64 = 424_242;
const GROUP: &str = "site-42/building-42";
/// No object becomes late during the measurement.
const TTL: (&str, &str) = ("OBJECT_TTL", "4h");

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let mut table = PgConnection::connect(deployment.database.url()).await?;
    bring_online(&mut table, 0..1_000_000).await?;
    // The cleanup in `change` deletes only this object.
    let aged = "UPDATE object SET last_seen = now() - interval '2 hours' WHERE id = $1";
    sqlx::query(aged).bind(OBJECT).execute(&mut table).await?;
    sqlx::query("VACUUM ANALYZE object, presence_change").execute(&mut table).await?;

    let directory = Scratch::new("groups");
    let listed = Definition::write(directory.path(), "listed", |ids| {
        let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
        ids.join(",")
    })?;
    let ranges = Definition::write(directory.path(), "ranges", |ids| {
        format!("\"{}-{}\"", ids.start, ids.end - 1)
    })?;
    let mut rows = measure_starts(&deployment, &listed, &ranges).await?;
    rows.push(measure_events(&deployment, &listed).await?);

    sqlx::query("DELETE FROM object WHERE id = 0").execute(&mut table).await?;
    let start = Start::measure(&deployment, &listed.settings_with_cache()).await?;
    let what = "the same while one object is gone, so that the viewer reads a history of 1,000,000 \
                changes, with GROUPS_CACHE";
    rows.insert(3, start.row(what));
    Ok(rows)
}

/// 10,000 groups of 100 objects, in 100 groups.
struct Definition {
    file: String,
    cache: String,
    kilobytes: usize,
}

impl Definition {
    /// `objects` writes the elements of a group's `objects`.
    fn write(
        directory: &Path,
        name: &str,
        objects: impl Fn(Range<u32>) -> String,
    ) -> anyhow::Result<Self> {
        let building = |site: u32, building: u32| {
            let first = (site * 100 + building) * 100;
            let objects = objects(first..first + 100);
            format!(r#"{{"name":"building-{building}","objects":[{objects}]}}"#)
        };
        let sites = (0..100).map(|site| {
            let buildings: Vec<String> = (0..100).map(|number| building(site, number)).collect();
            let buildings = buildings.join(",");
            // A building that is degraded does not change its site.
            format!(r#"{{"name":"site-{site}","up":"50%","children":[{buildings}]}}"#)
        });
        let text = format!("[{}]", sites.collect::<Vec<_>>().join(",\n"));
        let file = directory.join(name).with_extension("json");
        std::fs::write(&file, &text)?;
        let cache = file.with_extension("cache");
        let path = |path: &Path| path.to_str().map(str::to_owned).context("the path is not UTF-8");
        let kilobytes = text.len() / 1_000;
        Ok(Self { file: path(&file)?, cache: path(&cache)?, kilobytes })
    }

    fn settings(&self) -> [(&'static str, &str); 1] {
        [("GROUPS_FILE", &self.file)]
    }

    fn settings_with_cache(&self) -> [(&'static str, &str); 2] {
        [("GROUPS_FILE", &self.file), ("GROUPS_CACHE", &self.cache)]
    }
}

async fn measure_starts(
    deployment: &Deployment,
    listed: &Definition,
    ranges: &Definition,
) -> anyhow::Result<Vec<Row>> {
    // These starts write the caches.
    for definition in [listed, ranges] {
        Start::measure(deployment, &definition.settings_with_cache()).await?;
    }
    let [mut without, mut parsed, mut cached, mut parsed_ranges, mut cached_ranges] =
        [const { Vec::new() }; 5];
    // Alternating, because the speed of a machine varies from minute to minute.
    for _ in 0..RUNS {
        without.push(Start::measure(deployment, &[]).await?);
        parsed.push(Start::measure(deployment, &listed.settings()).await?);
        cached.push(Start::measure(deployment, &listed.settings_with_cache()).await?);
        parsed_ranges.push(Start::measure(deployment, &ranges.settings()).await?);
        cached_ranges.push(Start::measure(deployment, &ranges.settings_with_cache()).await?);
    }
    let seconds = |start: &Start| start.seconds;
    let reading = |starts: &[Start]| median(starts, |start| start.reading_ms.unwrap_or(f64::NAN));
    let what = |definition: &Definition, how| {
        let kilobytes = definition.kilobytes;
        format!("of it, reading and building the groups {how}, from a file of {kilobytes} kB")
    };
    let mut rows = vec![
        by(&without, seconds).row(
            "for comparison: a viewer with 1,000,000 objects and no groups, from its start until \
             it is ready",
        ),
        by(&parsed, seconds)
            .row("the same with 10,100 groups that list these objects, until they are in effect"),
        by(&cached, seconds).row("the same with GROUPS_CACHE"),
        Row::new(what(listed, "without GROUPS_CACHE"), "ms", reading(&parsed)),
        Row::new(what(listed, "with GROUPS_CACHE"), "ms", reading(&cached)),
        Row::new(what(ranges, "without GROUPS_CACHE"), "ms", reading(&parsed_ranges)),
        Row::new(what(ranges, "with GROUPS_CACHE"), "ms", reading(&cached_ranges)),
    ];
    for row in rows.iter_mut().filter(|row| row.what.contains("building the groups with ")) {
        row.goals = vec![Goal::OursAtMost(300.0)];
    }
    let rss = |starts: &[Start]| median(starts, |start| start.rss_mb);
    let (before, after) = (rss(&without), rss(&cached));
    let mut memory = Row::new("resident memory that these groups add", "MB", after - before);
    memory.note = Some(format!("{before:.0} MB without groups, {after:.0} MB with them"));
    rows.push(memory);
    Ok(rows)
}

/// A measured start of a viewer.
struct Start {
    seconds: f64,
    /// The time to read the files and to have the tree.
    reading_ms: Option<f64>,
    rss_mb: f64,
    cost: Cost,
}

impl Start {
    /// Starts a viewer, and kills it when it is ready and its groups are in effect.
    async fn measure(
        deployment: &Deployment,
        groups: &[(&'static str, &str)],
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let viewer = deployment.system.spawn("viewer", &[&[TTL], groups].concat());
        let meter = Meter::start(&viewer);
        viewer.ready().await;
        if !groups.is_empty() {
            wait_for_groups(&viewer).await;
        }
        let seconds = started.elapsed().as_secs_f64();
        let cost = meter.cost_of(OBJECTS);
        let rss_mb = megabytes(viewer.rss_kib());
        let mut reading_ms = None;
        if !groups.is_empty() {
            let line = viewer.wait_for_log("read the groups").await;
            let from_cache = line.contains("from_cache=true");
            let cache = groups.iter().find(|(name, _)| *name == "GROUPS_CACHE");
            ensure!(!from_cache || cache.is_some(), "{line}");
            let seconds = line.split_once("seconds=").context("the line has the time")?.1;
            let seconds = seconds.split_whitespace().next().unwrap_or_default();
            reading_ms = Some(seconds.parse::<f64>()? * 1e3);
        }
        Ok(Self { seconds, reading_ms, rss_mb, cost })
    }

    fn row(&self, what: &str) -> Row {
        let mut row = Row::new(what, "s", self.seconds);
        row.cost = Some(self.cost);
        row
    }
}

async fn wait_for_groups(viewer: &Process) {
    let address = viewer_address(viewer).await;
    let are_in_effect = async || {
        let answer = http_get(address, "/groups?depth=1").await;
        answer.is_ok_and(|answer| answer.status == 200 && answer.body.contains("\"status\":\"up\""))
    };
    wait_until("the groups are in effect", are_in_effect).await;
}

/// The start with the median of this figure.
fn by(starts: &[Start], figure: impl Fn(&Start) -> f64) -> &Start {
    let mut sorted: Vec<&Start> = starts.iter().collect();
    sorted.sort_by(|one, other| figure(one).total_cmp(&figure(other)));
    sorted[sorted.len() / 2]
}

fn median(starts: &[Start], figure: impl Fn(&Start) -> f64) -> f64 {
    figure(by(starts, &figure))
}

/// Lets an object of one group go and come, and measures the time until each subscriber of the group
/// has received the group's new status.
async fn measure_events(deployment: &Deployment, definition: &Definition) -> anyhow::Result<Row> {
    let settings = [&[TTL], &definition.settings_with_cache()[..]].concat();
    let viewer = deployment.system.start("viewer", &settings).await;
    wait_for_groups(&viewer).await;
    let address = viewer_address(&viewer).await;
    let commits = Arc::new(Mutex::new(Vec::new()));
    let mut listening = JoinSet::new();
    for _ in 0..SUBSCRIBERS {
        listening.spawn(listen(address, Arc::clone(&commits)));
    }
    let meter = Meter::start(&viewer);
    viewer.wait_for_metric("lastseen_viewer_subscribers", f64::from(SUBSCRIBERS)).await;
    // The last subscribers may still be receiving their snapshots.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let started = Instant::now();
    change(deployment, &commits).await?;
    let mut latencies = Histogram::<u64>::new(3)?;
    while let Some(received) = timeout(PATIENCE, listening.join_next()).await? {
        latencies.add(received??)?;
    }
    let received = latencies.len();
    ensure!(received == u64::from(SUBSCRIBERS) * CHANGES as u64, "{received} events arrived");
    let what = format!(
        "{SUBSCRIBERS} subscribers of one of 10,100 groups with 1,000,000 objects, 5 changes of \
         its status per second"
    );
    let mut row = Row::new(what, "events/s", per_second(received, started.elapsed()));
    (row.p50_ms, row.p99_ms) = (Some(ms_at(&latencies, 0.5)), Some(ms_at(&latencies, 0.99)));
    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
    let received = received as f64;
    row.cost = Some(meter.cost_of(received));
    row.goals = vec![Goal::P99MsAtMost(60.0)];
    Ok(row)
}

/// Deletes the object as a routine does, and inserts it as a consumer does, in turns.
async fn change(deployment: &Deployment, commits: &Mutex<Vec<Instant>>) -> anyhow::Result<()> {
    let (store, emitter) = open_writer(deployment).await?;
    let object = |row: &Written| Object { id: row.id, last_seen: row.last_seen.time() };
    let mut interval = interval(INTERVAL);
    for number in 0..CHANGES {
        interval.tick().await;
        let (kind, rows) = if is_degraded_after(number) {
            let before = store.now().await?.before(HOUR);
            (Kind::Gone, store.delete_stale(before, 10).await?)
        } else {
            let sighting = Sighting { id: OBJECT, age: 2 * HOUR };
            (Kind::Online, store.record_seen(&[sighting]).await?.inserted)
        };
        commits.lock().push(Instant::now());
        ensure!(rows.len() == 1, "{} objects have changed", rows.len());
        emitter.publish(kind, rows.iter().map(object));
    }
    Ok(())
}

fn is_degraded_after(number: usize) -> bool {
    number.is_multiple_of(2)
}

/// Subscribes, and returns the time from each commit to its event `group` in microseconds.
async fn listen(
    viewer: SocketAddr,
    commits: Arc<Mutex<Vec<Instant>>>,
) -> anyhow::Result<Histogram<u64>> {
    let mut stream = TcpStream::connect(viewer).await?;
    let request = format!("GET /events?group={GROUP} HTTP/1.1\r\nhost: bench\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut latencies = Histogram::new(3)?;
    let (mut text, mut number) = (Vec::new(), 0);
    while number < CHANGES {
        ensure!(stream.read_buf(&mut text).await? > 0, "the stream has ended");
        let now = Instant::now();
        // The text after the last line feed may end in the middle of an event.
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else { continue };
        let lines: Vec<u8> = text.drain(..=end).collect();
        let lines = String::from_utf8_lossy(&lines);
        for line in lines.lines().filter(|line| line.starts_with("data: {\"groups\"")) {
            let status = if is_degraded_after(number) { "degraded" } else { "up" };
            ensure!(line.contains(&format!("\"is\":\"{status}\"")), "{line}");
            let committed = *commits.lock().get(number).context("an event before its commit")?;
            latencies.record(u64::try_from(now.duration_since(committed).as_micros())?)?;
            number += 1;
        }
    }
    Ok(latencies)
}
