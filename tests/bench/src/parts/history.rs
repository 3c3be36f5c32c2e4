//! What the history costs: upserts and deletions with and without it, its size, and the time to read
//! the sessions of one object.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use runtime::{Reloadable, Supervisor};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use store::{Config, History, Retention, SessionQuery, Sighting, Store};

use super::callbacks::NO_STATUS_API;
use crate::servers::{Servers, per_second};
use crate::table::{Goal, Row};

/// Rows of one upsert, and ids that exist from the start.
const BATCH: i64 = 1_000;
const POPULATION: i64 = 100_000;
/// Batches in one measurement. With and without the history alternate, because the machine is not
/// always equally fast.
const BATCHES: i64 = 100;
const ROUNDS: i64 = 6;
const STALE: i64 = 200_000;
/// The history whose sessions are read.
const DAYS: i64 = 30;
const CHANGES_PER_DAY: i64 = 100_000;
const OBJECTS: i64 = 10_000;
const READS: i64 = 2_000;
const HOUR: Duration = Duration::from_hours(1);

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let url = deployment.database.url();
    let config = config(url)?;
    let off = Retention { history_retention: Duration::ZERO };
    let with = store(&config, Retention::default()).await?;
    let without = store(&config, off).await?;
    let mut rows = Vec::new();
    for (share, least) in [(100, 0.7), (1, 0.9)] {
        let what = format!("upserts, {share}% of the rows are new");
        rows.push(
            compare(&what, least, &with, &without, async |store, round| {
                upsert(url, store, round, share).await
            })
            .await?,
        );
    }
    let what = "deletions of stale rows";
    rows.push(
        compare(what, 0.6, &with, &without, async |store, _| delete(url, store).await).await?,
    );
    rows.extend(read(servers).await?);
    Ok(rows)
}

fn config(url: &str) -> anyhow::Result<Config> {
    Ok(Config::at(url.parse().map_err(anyhow::Error::msg)?))
}

async fn store(config: &Config, retention: Retention) -> anyhow::Result<Store> {
    let database = config.open(&Supervisor::default())?;
    let database = database.with_retention(Reloadable::fixed(retention));
    let store = Store::start(database, "bench", 1);
    store.status().wait_for(Result::is_ok).await?;
    Ok(store)
}

/// Compares the rows per second of `work` with and without the history.
async fn compare(
    what: &str,
    least: f64,
    with: &Store,
    without: &Store,
    work: impl AsyncFn(&Store, i64) -> anyhow::Result<(i64, Duration)>,
) -> anyhow::Result<Row> {
    // The first round creates the files of the tables and their indexes.
    let (mut limit, mut ours) = ((0, Duration::ZERO), (0, Duration::ZERO));
    for round in 0..=ROUNDS {
        for (store, sum) in [(without, &mut limit), (with, &mut ours)] {
            let (rows, took) = work(store, round).await?;
            if round > 0 {
                *sum = (sum.0 + rows, sum.1 + took);
            }
        }
    }
    let rate = |(rows, took): (i64, Duration)| per_second(rows.unsigned_abs(), took);
    let mut row = Row::new(format!("{what}, beside those without history"), "rows/s", rate(ours));
    row.limit = Some(rate(limit));
    row.goals = vec![Goal::RatioAtLeast(least)];
    Ok(row)
}

/// Upserts batches in which `share` percent of the ids are new.
async fn upsert(
    url: &str,
    store: &Store,
    round: i64,
    share: i64,
) -> anyhow::Result<(i64, Duration)> {
    clear(url).await?;
    for first in (0..POPULATION).step_by(10_000) {
        store.record_seen(&sightings(first..first + 10_000, HOUR)).await?;
    }
    let new = BATCH * share / 100;
    let mut took = Duration::ZERO;
    for batch in 0..BATCHES {
        let known = (batch * BATCH) % POPULATION;
        let first_new = POPULATION + (round * BATCHES + batch) * new;
        let mut batch = sightings(known..known + BATCH - new, Duration::ZERO);
        batch.extend(sightings(first_new..first_new + new, Duration::ZERO));
        let started = Instant::now();
        store.record_seen(&batch).await?;
        took += started.elapsed();
    }
    Ok((BATCHES * BATCH, took))
}

async fn delete(url: &str, store: &Store) -> anyhow::Result<(i64, Duration)> {
    clear(url).await?;
    for first in (0..STALE).step_by(10_000) {
        store.record_seen(&sightings(first..first + 10_000, 2 * HOUR)).await?;
    }
    let cutoff = store.now().await?.before(HOUR);
    let started = Instant::now();
    while !store.delete_stale(cutoff, 10_000).await?.is_empty() {}
    Ok((STALE, started.elapsed()))
}

/// Empties both tables.
async fn clear(url: &str) -> anyhow::Result<()> {
    let mut database = PgConnection::connect(url).await?;
    sqlx::raw_sql("TRUNCATE object, presence_change").execute(&mut database).await?;
    Ok(())
}

fn sightings(ids: std::ops::Range<i64>, age: Duration) -> Vec<Sighting> {
    ids.map(|id| Sighting { id, age }).collect()
}

/// Fills the history of 30 days, and reads the sessions of single objects.
async fn read(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let config = config(deployment.database.url())?;
    store(&config, Retention::default()).await?;
    let mut database = PgConnection::connect(deployment.database.url()).await?;
    sqlx::raw_sql(AssertSqlSafe(format!(
        "DO $$ BEGIN FOR ago IN 1..{DAYS} LOOP
             EXECUTE format(
                 'CREATE TABLE presence_change_%s PARTITION OF presence_change FOR VALUES FROM (%L) TO (%L)',
                 to_char(current_date - ago, 'YYYYMMDD'),
                 (current_date - ago)::timestamp AT TIME ZONE 'UTC',
                 (current_date - ago + 1)::timestamp AT TIME ZONE 'UTC');
         END LOOP; END $$;
         INSERT INTO presence_change (object_id, at, last_seen, is_online)
         SELECT change / 2 * 7919 % {OBJECTS}, at, at, change % 2 = 0
         FROM generate_series(0::bigint, {DAYS} * {CHANGES_PER_DAY} - 1) AS change,
              LATERAL (SELECT (current_date - {DAYS})::timestamp AT TIME ZONE 'UTC'
                              + change * interval '{DAYS} d' / ({DAYS} * {CHANGES_PER_DAY})) AS time (at);
         ANALYZE presence_change"
    )))
    .execute(&mut database)
    .await?;
    let size = "SELECT sum(pg_total_relation_size(relid))::float8 FROM pg_partition_tree('presence_change')";
    let bytes: f64 = sqlx::query_scalar(size).fetch_one(&mut database).await?;
    #[expect(clippy::cast_precision_loss, reason = "it is a few millions")]
    let changes = (DAYS * CHANGES_PER_DAY) as f64;

    let history = History::new(&config);
    let mut latencies = Histogram::<u64>::new(3)?;
    let started = Instant::now();
    for read in 0..READS {
        let id = (read * 7_919) % OBJECTS;
        let read_at = Instant::now();
        let page = history.sessions(id, SessionQuery::default(), 100).await?;
        latencies.record(u64::try_from(read_at.elapsed().as_micros())?)?;
        anyhow::ensure!(
            page.sessions.len() == 100,
            "object {id}: {} sessions",
            page.sessions.len()
        );
    }
    let rate = per_second(READS.unsigned_abs(), started.elapsed());
    let mut reads =
        Row::new("100 sessions of one object, 3,000,000 changes in 30 days", "reads/s", rate);
    #[expect(clippy::cast_precision_loss, reason = "it is less than a minute")]
    let ms = |quantile| Some(latencies.value_at_quantile(quantile) as f64 / 1e3);
    (reads.p50_ms, reads.p99_ms) = (ms(0.5), ms(0.99));
    reads.goals = vec![Goal::P99MsAtMost(20.0)];
    let size = Row::new("disk use of one change, with its indexes", "bytes", bytes / changes);
    Ok(vec![reads, size])
}
