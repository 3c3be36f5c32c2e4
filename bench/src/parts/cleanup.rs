//! A million stale rows among two million, while the others are written.

use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};
use testbed::eventually;
use tokio::time::sleep;

use crate::limits;
use crate::table::{Goal, Row};
use crate::usage::Meter;
use crate::world::{World, per_second};

const PATIENCE: Duration = Duration::from_mins(2);
const STALE: u64 = 1_000_000;
/// Those that are written.
const FRESH: u32 = 1_000_000;
const ROWS_PER_UPSERT: u32 = 1_000;
const WITHOUT_IT: Duration = Duration::from_secs(5);

pub(crate) async fn measure(world: &World) -> anyhow::Result<Vec<Row>> {
    let place = world.place("http://127.0.0.1:1".to_owned()).await;
    place.prepare().await;
    let url = place.database.url();
    let mut table = PgConnection::connect(url).await?;
    // Stale and fresh by turns, so that both are on each page.
    sqlx::query(
        "INSERT INTO object SELECT id, CASE WHEN id % 2 = 0 THEN now() ELSE now() - interval '2 h' END
         FROM generate_series(0, 1999999) AS id",
    )
    .execute(&mut table)
    .await?;
    sqlx::query("VACUUM ANALYZE object").execute(&mut table).await?;
    let without = limits::upsert(url, ROWS_PER_UPSERT, FRESH, sleep(WITHOUT_IT)).await?;

    let variables = [("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "500ms")];
    let started = Instant::now();
    let routine = place.spawn("routine", &variables).await;
    let meter = Meter::start(&routine);
    let mut took = Duration::ZERO;
    let gone = async {
        eventually("all that is stale is gone", PATIENCE, async || {
            // A table scan for each look would slow both down.
            (routine.metric("lastseen_deleted_rows_total").await >= 1e6).then_some(())
        })
        .await;
        took = started.elapsed();
    };
    let with = limits::upsert(url, ROWS_PER_UPSERT, FRESH, gone).await?;

    let mut deleted =
        Row::new("1,000,000 stale of 2,000,000 rows", "rows/s", per_second(STALE, took));
    deleted.goals = vec![Goal::OursAtLeast(200_000.0), Goal::PeakMbAtMost(12.0)];
    deleted.cost = Some(meter.cost_of(1e6));
    let mut upserts = Row::new("upserts meanwhile, beside those without it", "rows/s", with);
    upserts.limit = Some(without);
    upserts.goals = vec![Goal::RatioAtLeast(0.7)];
    Ok(vec![deleted, upserts])
}
