//! The producer, from the callback to the confirm.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pipeline::callback_endpoint;
use testbed::{Process, eventually};

use crate::callbacks::Load;
use crate::limits;
use crate::servers::{Deployment, Servers};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const PATIENCE: Duration = Duration::from_mins(1);
/// Enough messages for a few seconds.
const MESSAGES: i64 = 200_000;
/// Enough messages for a few seconds with a small window.
const IN_A_WINDOW: u64 = 60_000;
/// A long timeout, so that few messages go to the spool instead of the broker.
pub(super) const LONG_TIMEOUT: [(&str, &str); 1] = [("PUBLISH_TIMEOUT", "400ms")];
/// The endpoint in measurements without lookups.
pub(super) const NO_STATUS_API: &str = "http://127.0.0.1:1";

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let raw = {
        let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
        deployment.prepare().await;
        limits::publish(servers.amqp_uri(), &deployment.queue.name, 1..=MESSAGES).await?
    };
    let mut windows = Vec::new();
    for window in [64, 1_000] {
        let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
        deployment.prepare().await;
        let queue = &deployment.queue.name;
        let rate =
            limits::publish_in_a_window(servers.amqp_uri(), queue, IN_A_WINDOW, window).await?;
        let what = format!("for comparison: one socket, {window} messages at a time");
        let mut row = Row::new(what, "messages/s", rate);
        row.limit = Some(raw);
        windows.push(row);
    }
    let by_lapin = {
        let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
        deployment.prepare().await;
        limits::publish_by_lapin(
            servers.amqp_uri(),
            &deployment.queue.name,
            MESSAGES.unsigned_abs(),
        )
        .await?
    };
    let mut lapin =
        Row::new("for comparison: lapin, 1,000 publishes polled together", "messages/s", by_lapin);
    lapin.limit = Some(raw);
    let mut one = callbacks(servers, 1, 64).await?;
    one.limit = Some(raw);
    one.goals =
        vec![Goal::RatioAtLeast(0.55), Goal::OursAtLeast(16_700.0), Goal::P99MsAtMost(25.0)];
    let mut connections = callbacks(servers, 1, 1_000).await?;
    connections.limit = Some(raw);
    connections.goals = vec![Goal::PeakMbAtMost(40.0)];
    let mut many = callbacks(servers, 200, 16).await?;
    many.limit = Some(raw);
    many.goals = vec![Goal::RatioAtLeast(0.85), Goal::P99MsAtMost(200.0)];
    windows.extend([lapin, one, connections, many]);
    Ok(windows)
}

async fn callbacks(servers: &Servers, ids: u16, connections: u16) -> anyhow::Result<Row> {
    let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
    callbacks_at(&deployment, ids, connections, &LONG_TIMEOUT).await
}

/// Measures callbacks that are posted as fast as they are answered.
pub(super) async fn callbacks_at(
    deployment: &Deployment,
    ids: u16,
    connections: u16,
    variables: &[(&'static str, &str)],
) -> anyhow::Result<Row> {
    let producer = deployment.spawn("producer", variables).await;
    // It is also ready without its broker.
    eventually("the producer is connected", PATIENCE, async || {
        (!producer.get("/readyz").await.1.contains("without broker")).then_some(())
    })
    .await;
    let load = Load {
        producer: address(&producer).await?,
        connections,
        ids,
        rate: None,
        warm_up: Duration::from_secs(1),
        duration: Duration::from_secs(6),
    };
    let meter = Meter::start(&producer);
    let result = load.run().await?;
    ensure!(result.refused_per_second == 0.0, "some callbacks were refused");
    let ids_per_second = result.accepted_per_second * f64::from(ids);
    let what = format!(
        "callbacks of {ids} id{}, {connections} connections",
        if ids == 1 { "" } else { "s" }
    );
    let mut row = Row::new(what, "ids/s", ids_per_second);
    row.p50_ms = Some(result.latency_ms(0.5));
    row.p99_ms = Some(result.latency_ms(0.99));
    // The warm-up costs as much per second as the measured time.
    row.cost = Some(meter.cost_of(ids_per_second * (load.warm_up + load.duration).as_secs_f64()));
    row.note = Some(waits(&producer).await);
    ensure!(producer.metric("lastseen_spooled_total").await == 0.0, "some went to the spool");
    Ok(row)
}

/// Describes the mean waits of a publishing round for its frames and for its confirms.
async fn waits(producer: &Process) -> String {
    let mean_ms = async |name: &str| {
        let sum = producer.metric(&format!("{name}_sum")).await;
        1e3 * sum / producer.metric(&format!("{name}_count")).await
    };
    let frames = mean_ms("lastseen_publish_write_seconds").await;
    let confirms = mean_ms("lastseen_publish_confirm_seconds").await;
    format!("a round waits {frames:.1} ms for its frames and {confirms:.1} for its confirms")
}

pub(super) async fn address(producer: &Process) -> anyhow::Result<SocketAddr> {
    let endpoint = callback_endpoint(producer).await;
    let address = endpoint.trim_start_matches("http://").trim_end_matches("/callback");
    address.parse().context("invalid address of the producer")
}
