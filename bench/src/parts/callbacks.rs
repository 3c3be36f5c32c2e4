//! From the callback to its confirm.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pipeline::callback_endpoint;
use testbed::{Process, eventually};

use crate::callbacks::Load;
use crate::limits;
use crate::servers::{Place, World};
use crate::table::{Goal, Row};
use crate::usage::Meter;

const PATIENCE: Duration = Duration::from_mins(1);
/// Enough for some seconds.
const MESSAGES: i64 = 200_000;
/// The same for fewer at a time.
const IN_A_WINDOW: u64 = 60_000;
/// So that the spool takes as little as possible of what is compared with what the broker confirms.
pub(super) const PATIENT: [(&str, &str); 1] = [("PUBLISH_TIMEOUT", "400ms")];
/// Nobody asks it.
pub(super) const NO_STATUS_API: &str = "http://127.0.0.1:1";

pub(crate) async fn measure(world: &World) -> anyhow::Result<Vec<Row>> {
    let raw = {
        let place = world.place(NO_STATUS_API.to_owned()).await;
        place.prepare().await;
        limits::publish(world.amqp_uri(), &place.queue.name, 1..=MESSAGES).await?
    };
    let mut windows = Vec::new();
    for window in [64, 1_000] {
        let place = world.place(NO_STATUS_API.to_owned()).await;
        place.prepare().await;
        let queue = &place.queue.name;
        let rate =
            limits::publish_in_a_window(world.amqp_uri(), queue, IN_A_WINDOW, window).await?;
        let what = format!("for comparison: one socket, {window} messages at a time");
        let mut row = Row::new(what, "messages/s", rate);
        row.limit = Some(raw);
        windows.push(row);
    }
    let by_lapin = {
        let place = world.place(NO_STATUS_API.to_owned()).await;
        place.prepare().await;
        limits::publish_by_lapin(world.amqp_uri(), &place.queue.name, MESSAGES.unsigned_abs())
            .await?
    };
    let mut lapin =
        Row::new("for comparison: lapin, 1,000 publishes polled together", "messages/s", by_lapin);
    lapin.limit = Some(raw);
    let mut one = callbacks(world, 1, 64).await?;
    one.limit = Some(raw);
    one.goals =
        vec![Goal::RatioAtLeast(0.55), Goal::OursAtLeast(16_700.0), Goal::P99MsAtMost(25.0)];
    let mut connections = callbacks(world, 1, 1_000).await?;
    connections.limit = Some(raw);
    connections.goals = vec![Goal::PeakMbAtMost(40.0)];
    let mut many = callbacks(world, 200, 16).await?;
    many.limit = Some(raw);
    many.goals = vec![Goal::RatioAtLeast(0.85), Goal::P99MsAtMost(200.0)];
    windows.extend([lapin, one, connections, many]);
    Ok(windows)
}

async fn callbacks(world: &World, ids: u16, connections: u16) -> anyhow::Result<Row> {
    let place = world.place(NO_STATUS_API.to_owned()).await;
    callbacks_at(&place, ids, connections, &PATIENT).await
}

/// Posts as fast as is answered.
pub(super) async fn callbacks_at(
    place: &Place,
    ids: u16,
    connections: u16,
    variables: &[(&'static str, &str)],
) -> anyhow::Result<Row> {
    let producer = place.spawn("producer", variables).await;
    // It is ready without its broker, too.
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
    let answers = load.run().await?;
    ensure!(answers.refused_per_second == 0.0, "some callbacks were refused");
    let ids_per_second = answers.accepted_per_second * f64::from(ids);
    let what = format!(
        "callbacks of {ids} id{}, {connections} connections",
        if ids == 1 { "" } else { "s" }
    );
    let mut row = Row::new(what, "ids/s", ids_per_second);
    row.p50_ms = Some(answers.latency_ms(0.5));
    row.p99_ms = Some(answers.latency_ms(0.99));
    // The warm-up has cost it as much as what was measured.
    row.cost = Some(meter.cost_of(ids_per_second * (load.warm_up + load.duration).as_secs_f64()));
    row.note = Some(waits(&producer).await);
    ensure!(producer.metric("lastseen_spooled_total").await == 0.0, "some went to the spool");
    Ok(row)
}

/// How long a round of publishing waits, for its frames to be written and for its confirms.
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
    address.parse().context("the producer's address is none")
}
