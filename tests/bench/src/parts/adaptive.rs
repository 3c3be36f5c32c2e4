//! The adaptive limit with a status API that slows down beyond a knee.

use std::time::Duration;

use super::lookups::lookup_rate;
use crate::limits;
use crate::servers::Servers;
use crate::status_api::Pace;
use crate::table::{Goal, Row};

const KNEE: u32 = 200;
/// At the knee, the status API gives 870 answers per second. Above the knee, it gives fewer.
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
        rows.push(measure_limit(servers, what, limit, "fixed", Duration::from_secs(2)).await?);
    }
    let best = rows.iter().map(|row| row.ours).fold(0.0, f64::max);
    let what = format!("CONCURRENCY=adaptive, MAX_CONSUMERS={MAX}, from 20 s on");
    let ramp = Duration::from_secs(20);
    let mut adaptive = measure_limit(servers, what, MAX, "adaptive", ramp).await?;
    adaptive.goals = vec![Goal::RatioAtLeast(0.9)];
    rows.push(adaptive);
    for row in &mut rows {
        row.limit = Some(best);
    }
    Ok(rows)
}

async fn measure_limit(
    servers: &Servers,
    what: String,
    max_consumers: u16,
    concurrency: &str,
    ramp: Duration,
) -> anyhow::Result<Row> {
    let duration = if concurrency == "fixed" { 4 } else { 8 };
    let status_api = PACE.start();
    let deployment = servers.prepared(status_api.endpoint()).await;
    // More than the API can answer in that time.
    let messages = 1_000 * (i64::try_from(ramp.as_secs())? + duration + 5);
    limits::publish(&servers.amqp_uri, &deployment.queue.name, 1..=messages).await?;
    let max_consumers = max_consumers.to_string();
    let variables = [("MAX_CONSUMERS", max_consumers.as_str()), ("CONCURRENCY", concurrency)];
    let duration = Duration::from_secs(duration.unsigned_abs());
    let consumers = [deployment.system.spawn("consumer", &variables)];
    Ok(lookup_rate(what, &status_api, &consumers, ramp, duration).await)
}
