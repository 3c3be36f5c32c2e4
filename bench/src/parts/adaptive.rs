//! The adaptive limit with a status API that slows down beyond a knee.

use std::time::{Duration, Instant};

use testbed::eventually;
use tokio::time::sleep;

use crate::limits;
use crate::servers::{Servers, per_second};
use crate::status_api::{Pace, StatusApi};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const PATIENCE: Duration = Duration::from_mins(1);
const KNEE: u32 = 200;
/// Up to the knee it gives 870 answers per second.
const PACE: Pace =
    Pace { latency: Duration::from_millis(30)..Duration::from_millis(430), knee: Some(KNEE) };
/// Fixed limits for comparison: one at the knee, which is the best, and one above it.
const FIXED: [u16; 2] = [200, 400];
/// A limit that an operator might set without knowing the API.
const MAX: u16 = 2_000;

/// Compares the lookups per second of the adaptive limit with the best of the fixed limits.
pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for limit in FIXED {
        let what = format!("for comparison: MAX_CONSUMERS={limit}");
        rows.push(measured(servers, what, limit, "fixed", Duration::from_secs(2)).await?);
    }
    let best = rows.iter().map(|row| row.ours).fold(0.0, f64::max);
    let what = format!("CONCURRENCY=adaptive, MAX_CONSUMERS={MAX}, from 20 s on");
    let mut adaptive = measured(servers, what, MAX, "adaptive", Duration::from_secs(20)).await?;
    adaptive.goals = vec![Goal::RatioAtLeast(0.9)];
    rows.push(adaptive);
    for row in &mut rows {
        row.limit = Some(best);
    }
    Ok(rows)
}

async fn measured(
    servers: &Servers,
    what: String,
    max_consumers: u16,
    concurrency: &str,
    ramp: Duration,
) -> anyhow::Result<Row> {
    let duration = if concurrency == "fixed" { 4 } else { 8 };
    let status_api = StatusApi::start(PACE)?;
    let deployment = servers.deployment(status_api.endpoint()).await;
    deployment.prepare().await;
    // More than the API can answer in that time.
    let messages = 1_000 * (i64::try_from(ramp.as_secs())? + duration + 5);
    limits::publish(servers.amqp_uri(), &deployment.queue.name, 1..=messages).await?;
    let max_consumers = max_consumers.to_string();
    let variables = [("MAX_CONSUMERS", max_consumers.as_str()), ("CONCURRENCY", concurrency)];
    let consumer = deployment.system.spawn("consumer", &variables);
    eventually("the first lookup is answered", PATIENCE, async || {
        (status_api.answered() > 0).then_some(())
    })
    .await;
    sleep(ramp).await;
    let meter = Meter::start(&consumer);
    let (started, before) = (Instant::now(), status_api.answered());
    sleep(Duration::from_secs(duration.unsigned_abs())).await;
    let answered = status_api.answered() - before;
    let mut row = Row::new(what, "lookups/s", per_second(answered, started.elapsed()));
    row.cost = Some(meter.cost_of(per_second(answered, Duration::from_secs(1))));
    Ok(row)
}
