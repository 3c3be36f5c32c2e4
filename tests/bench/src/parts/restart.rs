//! The start of the viewer with a million objects, with and without a snapshot.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use testkit::{Process, Scratch, eventually, http_get, viewer_address};

use super::callbacks::NO_STATUS_API;
use crate::servers::{Deployment, Servers};
use crate::table::{Goal, Row};
use crate::usage::{Cost, Meter};

const RUNS: usize = 3;
const OBJECTS: f64 = 1e6;
const RESTORED: &str = "restored the objects from the snapshot";
/// Number of sightings of each object. The snapshot has space for about as many.
const SIGHTINGS: usize = 8;
/// Enough for a pause between two readings, which is ten times as long as the previous reading.
const READ_WITHIN: Duration = Duration::from_mins(5);

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let mut table = PgConnection::connect(deployment.database.url()).await?;
    bring_online(&mut table, 0..1_000_000).await?;
    sqlx::query("VACUUM ANALYZE object, presence_change").execute(&mut table).await?;

    let directory = Scratch::new("snapshot");
    let path = directory.path().join("viewer.snapshot");
    let setting = path.to_str().context("the path of the snapshot is not UTF-8")?;
    let viewer = deployment.system.start("viewer", &[("VIEWER_SNAPSHOT", setting)]).await;
    for known in 1..SIGHTINGS {
        wait_for_sightings(&viewer, known).await;
        sqlx::query("UPDATE object SET last_seen = clock_timestamp()").execute(&mut table).await?;
    }
    wait_for_sightings(&viewer, SIGHTINGS).await;
    viewer.stop().await;
    // The updates have left dead rows, which would slow the readings.
    sqlx::query("VACUUM FULL object").execute(&mut table).await?;
    let megabytes = std::fs::metadata(&path)?.len() / 1_000_000;
    bring_online(&mut table, 1_000_000..1_010_000).await?;

    // Alternating, because the speed of a machine varies from minute to minute.
    let (mut reading, mut restoring) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        reading.push(Start::measure(&deployment, &[], None).await);
        let settings = [("VIEWER_SNAPSHOT", setting)];
        restoring.push(Start::measure(&deployment, &settings, Some(RESTORED)).await);
    }
    let (reading, restoring) = (Start::median(reading)?, Start::median(restoring)?);
    let what = "for comparison: a viewer with 1,010,000 objects, from its start until it is ready";
    let mut without = Row::new(what, "s", reading.seconds);
    without.cost = Some(reading.cost);
    let what = format!(
        "the same from a snapshot ({megabytes} MB) of 1,000,000 objects, with 10,000 changes since"
    );
    let mut with = Row::new(what, "s", restoring.seconds);
    with.cost = Some(restoring.cost);
    with.goals = vec![Goal::OursAtMost(2.0)];
    let times = reading.seconds / restoring.seconds;
    let mut speedup = Row::new("the first of these two times divided by the second", "", times);
    speedup.goals = vec![Goal::OursAtLeast(3.0)];
    Ok(vec![without, with, speedup])
}

/// Waits until the viewer knows this number of sightings of each object. It reads the object with
/// the highest id last.
async fn wait_for_sightings(viewer: &Process, count: usize) {
    let address = viewer_address(viewer).await;
    let is_known = async || {
        let object = http_get(address, "/objects/999999").await.ok()?.body;
        let (_, sightings) = object.split_once("sightings")?;
        (sightings.matches('Z').count() >= count).then_some(())
    };
    eventually("all objects have been read", READ_WITHIN, is_known).await;
}

/// Inserts objects as a consumer does, with their changes.
pub(super) async fn bring_online(table: &mut PgConnection, ids: Range<u32>) -> anyhow::Result<()> {
    let Range { start, end } = ids;
    sqlx::query(AssertSqlSafe(format!(
        "WITH inserted AS (
             INSERT INTO object SELECT id, now() FROM generate_series({start}, {end} - 1) AS id
             RETURNING id, last_seen)
         INSERT INTO presence_change (object_id, last_seen, is_online)
         SELECT id, last_seen, true FROM inserted"
    )))
    .execute(table)
    .await?;
    Ok(())
}

/// A measured start of a viewer.
struct Start {
    seconds: f64,
    cost: Cost,
}

impl Start {
    /// Starts a viewer, which must log `line`, and kills it when it is ready.
    async fn measure(
        deployment: &Deployment,
        settings: &[(&'static str, &str)],
        line: Option<&str>,
    ) -> Self {
        let started = Instant::now();
        let viewer = deployment.system.spawn("viewer", settings);
        let meter = Meter::start(&viewer);
        viewer.ready().await;
        let seconds = started.elapsed().as_secs_f64();
        let cost = meter.cost_of(OBJECTS);
        if let Some(line) = line {
            viewer.wait_for_log(line).await;
        }
        Self { seconds, cost }
    }

    fn median(mut starts: Vec<Self>) -> anyhow::Result<Self> {
        starts.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        starts.into_iter().nth(RUNS / 2).context("there are several starts")
    }
}
