//! The consumer, from the delivery to the committed row.

use std::time::{Duration, Instant};

use testkit::{PlainStatusApi, Process, wait_for, wait_until};
use tokio::time::sleep;

use super::callbacks::{LONG_TIMEOUT, callbacks_at};
use crate::limits;
use crate::servers::{Deployment, Servers, per_second};
use crate::status_api::Pace;
use crate::table::{Goal, Row};
use crate::usage::Meter;

const MESSAGES: i64 = 100_000;
pub(super) const IN_FLIGHT: u16 = 300;
/// The latency of the slow status API.
pub(super) const SLOW: Pace =
    Pace { latency: Duration::from_millis(300)..Duration::from_millis(4_300), knee: None };
const SLOW_MEAN_SECONDS: f64 = 2.3;
/// Time from the first lookup of a backlog to the measurement.
const SLOW_RAMP: Duration = Duration::from_secs(10);
const SLOW_DURATION: Duration = Duration::from_secs(8);

pub(crate) async fn measure_instant(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let status_api = Pace::INSTANT.start();
    let seconds = Duration::from_secs(4);
    let limit = limits::fetch(&status_api.endpoint(), IN_FLIGHT.into(), seconds).await?;
    let mut rows = Vec::new();
    // The difference between the first and the last row shows the noise of the machine.
    for has_viewer in [false, true, false] {
        let deployment = servers.prepared(status_api.endpoint()).await;
        limits::publish(&servers.amqp_uri, &deployment.queue.name, 1..=MESSAGES).await?;
        // A paused viewer, whose queue of events fills up.
        let viewer =
            if has_viewer { Some(deployment.system.start("viewer", &[]).await) } else { None };
        if let Some(viewer) = &viewer {
            viewer.pause().await;
        }
        rows.push(measure_backlog_lookup(&deployment).await?);
    }
    let (first, last) = (rows[0].ours, rows[2].ours);
    rows[0].limit = Some(limit);
    rows[0].goals = vec![Goal::RatioAtLeast(0.47)];
    rows[1].what += ", with a viewer that is stopped, beside without";
    rows[1].limit = Some(f64::midpoint(first, last));
    rows[1].goals = vec![Goal::RatioAtLeast(0.9)];
    rows[2].what = format!("for comparison: {} again, beside the first", rows[2].what);
    rows[2].limit = Some(first);
    Ok(rows)
}

/// Measures the lookup of most of [`MESSAGES`] with a status API that answers at once.
async fn measure_backlog_lookup(deployment: &Deployment) -> anyhow::Result<Row> {
    let max_consumers = IN_FLIGHT.to_string();
    let consumer =
        deployment.system.start("consumer", &[("MAX_CONSUMERS", max_consumers.as_str())]).await;
    let meter = Meter::start(&consumer);
    let before = settled(&consumer).await;
    let started = Instant::now();
    // The last tenth is not measured, because it is consumed while the queue runs dry.
    let enough = before + (MESSAGES.unsigned_abs() - before) / 10 * 9;
    let after = wait_for_settled(&consumer, enough).await;
    let rate = per_second(after - before, started.elapsed());
    let mut row = Row::new("answers at once, 300 in flight", "objects/s", rate);
    row.cost = Some(meter.cost_of(per_second(after - before, Duration::from_secs(1))));
    Ok(row)
}

/// Measures how a million waiting messages affect publishing and consuming.
pub(crate) async fn measure_backlog(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    const BACKLOG: i64 = 1_000_000;
    let status_api = Pace::INSTANT.start();
    let mut rows = Vec::new();
    for backlog in [0, BACKLOG] {
        let deployment = servers.prepared(status_api.endpoint()).await;
        let queue = &deployment.queue.name;
        if backlog > 0 {
            limits::publish(&servers.amqp_uri, queue, 1..=backlog).await?;
        }
        rows.push(callbacks_at(&deployment, 1, 64, &LONG_TIMEOUT).await?);
        // Without our code, the backlog slows down only the broker.
        let rate = limits::publish_in_a_window(&servers.amqp_uri, queue, 60_000, 64).await?;
        let what = "for comparison: one socket, 64 messages at a time";
        rows.push(Row::new(what, "messages/s", rate));
        if backlog == 0 {
            limits::publish(&servers.amqp_uri, queue, 1..=MESSAGES).await?;
        }
        rows.push(measure_backlog_lookup(&deployment).await?);
    }
    let mut rows_with_backlog = rows.split_off(3);
    for (with, without) in rows_with_backlog.iter_mut().zip(rows) {
        with.what = format!("{}, behind {BACKLOG} messages, beside without", with.what);
        with.limit = Some(without.ours);
        // The row for comparison has no cost and no goals.
        if let Some(cost) = without.cost {
            with.goals = vec![Goal::RatioAtLeast(0.9), Goal::PeakMbAtMost(cost.peak_mb * 1.1)];
        }
    }
    Ok(rows_with_backlog)
}

pub(crate) async fn measure_slow(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (processes, at_once) in [(1, 300), (1, 2_000), (2, 2_000), (1, 10_000)] {
        rows.push(slow(servers, processes, at_once).await?);
    }
    Ok(rows)
}

async fn slow(servers: &Servers, processes: u16, at_once: u16) -> anyhow::Result<Row> {
    let status_api = SLOW.start();
    let deployment = servers.prepared(status_api.endpoint()).await;
    let limit = f64::from(processes) * f64::from(at_once) / SLOW_MEAN_SECONDS;
    let seconds = (SLOW_RAMP + SLOW_DURATION).as_secs_f64() + 5.0;
    #[expect(clippy::cast_possible_truncation, reason = "it is about 100,000")]
    let messages = (limit * seconds) as i64 + 3 * i64::from(at_once) * i64::from(processes);
    limits::publish(&servers.amqp_uri, &deployment.queue.name, 1..=messages).await?;
    let max_consumers = at_once.to_string();
    let variables = [("MAX_CONSUMERS", max_consumers.as_str())];
    let spawn = |_| deployment.system.spawn("consumer", &variables);
    let consumers: Vec<Process> = (0..processes).map(spawn).collect();
    let what = format!(
        "takes 0.3 to 4.3 s, {}{at_once} in flight",
        if processes == 1 { String::new() } else { format!("{processes} processes, each ") }
    );
    let mut row = lookup_rate(what, &status_api, &consumers, SLOW_RAMP, SLOW_DURATION).await;
    row.limit = Some(limit);
    row.goals = vec![Goal::RatioAtLeast(0.98)];
    if at_once == 10_000 {
        row.goals.extend([Goal::PeakMbAtMost(110.0), Goal::CpuSecondsAtMost(8.0)]);
    }
    Ok(row)
}

/// Measures the answered lookups of `consumers` for `duration`, from `ramp` after the first one on.
/// The cost is that of the first consumer for its share of the lookups.
pub(super) async fn lookup_rate(
    what: String,
    status_api: &PlainStatusApi,
    consumers: &[Process],
    ramp: Duration,
    duration: Duration,
) -> Row {
    wait_until("the first lookup is answered", async || status_api.answered() > 0).await;
    sleep(ramp).await;
    let meter = Meter::start(&consumers[0]);
    let (started, before) = (Instant::now(), status_api.answered());
    sleep(duration).await;
    let answered = status_api.answered() - before;
    let mut row = Row::new(what, "lookups/s", per_second(answered, started.elapsed()));
    #[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
    let share = answered as f64 / consumers.len() as f64;
    row.cost = Some(meter.cost_of(share));
    row
}

/// Measures the number of lookups for many messages about few objects.
pub(crate) async fn measure_coalescing(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    const MESSAGES: u64 = 20_000;
    const OBJECTS: i64 = 100;
    let status_api = SLOW.start();
    let deployment = servers.prepared(status_api.endpoint()).await;
    let ids = (0..).map(|number| number % OBJECTS).take(usize::try_from(MESSAGES)?);
    limits::publish(&servers.amqp_uri, &deployment.queue.name, ids).await?;
    let started = Instant::now();
    let consumer = deployment.system.start("consumer", &[]).await;
    let meter = Meter::start(&consumer);
    wait_for_settled(&consumer, MESSAGES).await;
    let took = started.elapsed();
    #[expect(clippy::cast_precision_loss, reason = "it is below 20,000")]
    let lookups = status_api.answered() as f64;
    let what =
        format!("20,000 messages about 100 objects, all acked after {:.0} s", took.as_secs_f64());
    let mut row = Row::new(what, "lookups", lookups);
    row.cost = Some(meter.cost_of(per_second(MESSAGES, Duration::from_secs(1))));
    row.goals = vec![Goal::OursAtMost(1_000.0)];
    Ok(vec![row])
}

/// Waits until at least `minimum` deliveries are settled, and returns their number.
async fn wait_for_settled(consumer: &Process, minimum: u64) -> u64 {
    wait_for("the backlog is looked up", async || {
        let settled = settled(consumer).await;
        (settled >= minimum).then_some(settled)
    })
    .await
}

pub(super) async fn settled(consumer: &Process) -> u64 {
    let settled = consumer.metric("lastseen_settled_total").await;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let settled = settled as u64;
    settled
}
