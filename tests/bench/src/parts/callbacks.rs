//! The producer, from the callback to the confirm.

use std::time::Duration;

use anyhow::ensure;
use testkit::{Process, producer_address, wait_until};

use crate::callbacks::{Load, LoadResult};
use crate::servers::{Deployment, Servers};
use crate::table::{Goal, Row};
use crate::usage::Meter;
use crate::{limits, peers};

const WARM_UP: Duration = Duration::from_secs(1);
const DURATION: Duration = Duration::from_secs(6);
/// Enough messages for a few seconds.
const MESSAGES: i64 = 200_000;
/// Enough messages for a few seconds with a small window.
const WINDOW_MESSAGES: u64 = 60_000;
/// A long timeout, so that few messages go to the spool instead of the broker.
pub(super) const LONG_TIMEOUT: [(&str, &str); 1] = [("PUBLISH_TIMEOUT", "400ms")];
/// The endpoint in measurements without lookups.
pub(super) const NO_STATUS_API: &str = "http://127.0.0.1:1";

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let uri = &servers.amqp_uri;
    let prepared = async || servers.prepared(NO_STATUS_API.to_owned()).await;
    let raw = limits::publish(uri, &prepared().await.queue.name, 1..=MESSAGES).await?;
    let (mut rows, mut windows) = (Vec::new(), Vec::new());
    for window in [64, 1_000] {
        let queue = prepared().await.queue;
        let rate = limits::publish_in_a_window(uri, &queue.name, WINDOW_MESSAGES, window).await?;
        let what = format!("for comparison: one socket, {window} messages at a time");
        rows.push(Row::new(what, "messages/s", rate));
        windows.push(rate);
    }
    let queue = prepared().await.queue;
    let rate = limits::publish_by_lapin(uri, &queue.name, MESSAGES.unsigned_abs()).await?;
    let what = "for comparison: lapin, 1,000 publishes polled together";
    rows.push(Row::new(what, "messages/s", rate));
    let mut one = callbacks(servers, 1, 64).await?;
    one.goals = vec![Goal::RatioAtLeast(0.65), Goal::P50MsAtMost(3.0), Goal::P99MsAtMost(25.0)];
    let mut connections = callbacks(servers, 1, 1_000).await?;
    connections.goals = vec![Goal::PeakMbAtMost(40.0)];
    let mut many = callbacks(servers, 200, 16).await?;
    many.goals = vec![Goal::RatioAtLeast(0.9), Goal::P99MsAtMost(200.0)];
    for row in rows.iter_mut().chain([&mut many]) {
        row.limit = Some(raw);
    }
    // Neither has more than one message in flight for each connection.
    one.limit = Some(windows[0]);
    connections.limit = Some(windows[1]);
    if let Some(peer) = peer(servers, 1, 64).await? {
        one.peer = Some(peer.ours);
        one.goals.push(Goal::PeerRatioAtLeast(2.0));
        many.peer = self::peer(servers, 200, 16).await?.map(|row| row.ours);
        rows.push(peer);
    }
    rows.extend([one, connections, many]);
    Ok(rows)
}

async fn callbacks(servers: &Servers, ids: u16, connections: u16) -> anyhow::Result<Row> {
    let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
    callbacks_at(&deployment, ids, connections, &LONG_TIMEOUT).await
}

/// Measures the same callbacks with the producer in Node, if it is installed.
async fn peer(servers: &Servers, ids: u16, connections: u16) -> anyhow::Result<Option<Row>> {
    let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
    let Some(peer) = peers::node_producer(&servers.amqp_uri, &deployment) else { return Ok(None) };
    let mut row = load_producer(&peer, ids, connections).await?;
    row.what = format!("for comparison: a producer in Node, {}", row.what);
    Ok(Some(row))
}

/// Measures callbacks that are posted as fast as they are answered.
pub(super) async fn callbacks_at(
    deployment: &Deployment,
    ids: u16,
    connections: u16,
    variables: &[(&'static str, &str)],
) -> anyhow::Result<Row> {
    let producer = deployment.system.start("producer", variables).await;
    // A producer is also ready without its broker.
    wait_until("the producer is connected", async || {
        !producer.get("/readyz").await.1.contains("without broker")
    })
    .await;
    let mut row = load_producer(&producer, ids, connections).await?;
    let mut note = waits(&producer).await;
    let spooled = producer.metric("lastseen_spooled_total").await;
    if spooled > 0.0 {
        row.ours -= spooled / (WARM_UP + DURATION).as_secs_f64();
        note = format!("{note}. {spooled} ids, not counted, went to the spool");
    }
    row.note = Some(note);
    Ok(row)
}

/// Posts callbacks to a producer as fast as it answers them.
async fn load_producer(producer: &Process, ids: u16, connections: u16) -> anyhow::Result<Row> {
    let load = Load {
        producer: producer_address(producer).await,
        connections,
        ids,
        rate: None,
        warm_up: WARM_UP,
        duration: DURATION,
    };
    let meter = Meter::start(producer);
    let result = load.run().await?;
    ensure!(result.refused_per_second == 0.0, "some callbacks were refused");
    let ids = if ids == 1 { "1 id".to_owned() } else { format!("{ids} ids") };
    let what = format!("callbacks of {ids}, {connections} connections");
    Ok(load_row(what, load, &result, &meter))
}

/// The row of a load, with the accepted ids per second as its main figure.
pub(super) fn load_row(what: String, load: Load, result: &LoadResult, meter: &Meter<'_>) -> Row {
    let ids_per_second = result.accepted_per_second * f64::from(load.ids);
    let mut row = Row::new(what, "ids/s", ids_per_second);
    row.p50_ms = Some(result.latency_ms(0.5));
    row.p99_ms = Some(result.latency_ms(0.99));
    // The warm-up costs as much per second as the measured time.
    row.cost = Some(meter.cost_of(ids_per_second * (load.warm_up + load.duration).as_secs_f64()));
    row
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
