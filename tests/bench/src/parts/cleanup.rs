//! The routine deletes a million of two million rows while the others are updated.

use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};
use testkit::wait_for;
use tokio::time::sleep;

use super::callbacks::NO_STATUS_API;
use crate::limits;
use crate::servers::{Servers, per_second};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const STALE: u64 = 1_000_000;
/// The rows that are updated.
const FRESH: u32 = 1_000_000;
const ROWS_PER_UPSERT: u32 = 1_000;
const WITHOUT_ROUTINE: Duration = Duration::from_secs(5);

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let url = deployment.database.url();
    let mut table = PgConnection::connect(url).await?;
    // Stale and fresh rows alternate, so that both are on each page.
    sqlx::query(
        "INSERT INTO object SELECT id, CASE WHEN id % 2 = 0 THEN now() ELSE now() - interval '2 h' END
         FROM generate_series(0, 1999999) AS id",
    )
    .execute(&mut table)
    .await?;
    sqlx::query("VACUUM ANALYZE object").execute(&mut table).await?;
    let without = limits::upsert(url, ROWS_PER_UPSERT, FRESH, sleep(WITHOUT_ROUTINE)).await?;

    let variables = [("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "500ms")];
    let started = Instant::now();
    let routine = deployment.system.start("routine", &variables).await;
    let meter = Meter::start(&routine);
    let mut took = Duration::ZERO;
    let all_deleted = async {
        // Polls the metric, because scans of the table would slow the routine and the upserts.
        routine.wait_for_metric("lastseen_deleted_rows_total", 1e6).await;
        took = started.elapsed();
    };
    let with = limits::upsert(url, ROWS_PER_UPSERT, FRESH, all_deleted).await?;

    let mut deleted =
        Row::new("1,000,000 stale of 2,000,000 rows", "rows/s", per_second(STALE, took));
    deleted.goals = vec![Goal::OursAtLeast(200_000.0), Goal::PeakMbAtMost(12.0)];
    deleted.cost = Some(meter.cost_of(1e6));
    let mut upserts = Row::new("upserts meanwhile, beside those without it", "rows/s", with);
    upserts.limit = Some(without);
    upserts.goals = vec![Goal::RatioAtLeast(0.7)];
    Ok(vec![deleted, upserts, rounds(servers).await?])
}

/// Measures the size of the table after many rounds of inserts and deletes.
async fn rounds(servers: &Servers) -> anyhow::Result<Row> {
    const ROUNDS: u32 = 20;
    /// The round after which the table should not grow any more.
    const BASELINE_ROUND: u32 = 5;
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let mut table = PgConnection::connect(deployment.database.url()).await?;
    let variables = [("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "100ms")];
    let _routine = deployment.system.start("routine", &variables).await;
    let (mut baseline_bytes, mut bytes) = (0, 0);
    for round in 1..=ROUNDS {
        // In each round, every other row is updated, and the others are stale and deleted.
        sqlx::query(
            "INSERT INTO object AS seen
             SELECT id, CASE WHEN id % 2 = 0 THEN now() ELSE now() - interval '2 h' END
             FROM generate_series(0, 99999) AS id
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen",
        )
        .execute(&mut table)
        .await?;
        wait_for("all stale rows are deleted", async || {
            let stale = "SELECT count(*) FROM object WHERE id % 2 = 1";
            let left: i64 = sqlx::query_scalar(stale).fetch_one(&mut table).await.ok()?;
            (left == 0).then_some(())
        })
        .await;
        // Autovacuum runs only once a minute by default, so the rounds would take half an hour.
        sqlx::query("VACUUM object").execute(&mut table).await?;
        let size = "SELECT pg_total_relation_size('object')";
        bytes = sqlx::query_scalar::<_, i64>(size).fetch_one(&mut table).await?;
        if round == BASELINE_ROUND {
            baseline_bytes = bytes;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "it is a few megabytes")]
    let megabytes = |bytes: i64| bytes as f64 / 1e6;
    let what = format!("size of the table after {ROUNDS} rounds, 50,000 rows come and go in each");
    let mut row = Row::new(what, "MB", megabytes(bytes));
    row.goals = vec![Goal::OursAtMost(megabytes(baseline_bytes) * 1.1)];
    row.note = Some(format!("{:.1} MB after {BASELINE_ROUND}", megabytes(baseline_bytes)));
    Ok(row)
}
