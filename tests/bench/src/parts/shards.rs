//! Messages distributed over shards: publishing, consuming, and the lookups of several consumers.

use std::time::{Duration, Instant};

use messaging::queue::{Config, Publisher, QueueConfig, QueueType};
use runtime::Supervisor;
use testkit::{Process, RabbitNode, wait_until};

use super::callbacks::{LONG_TIMEOUT, NO_STATUS_API, callbacks_at};
use super::lookups::{IN_FLIGHT, SLOW, settled};
use crate::limits;
use crate::servers::{Deployment, Servers, per_second};
use crate::status_api::Pace;
use crate::table::{Goal, Row};

/// Messages of one measurement without coalescing.
const MESSAGES: i64 = 100_000;
/// Messages and objects of one measurement with coalescing.
const REPEATED_MESSAGES: i64 = 20_000;
const OBJECTS: i64 = 100;
/// More shards than consumers, so that each consumer is likely to get some.
const SHARDS_PER_CONSUMER: u16 = 4;
/// Few, because three nodes on one machine take long to confirm, and what is not confirmed in time
/// goes to the spool.
const CONNECTIONS: u16 = 4;
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) async fn measure_throughputs(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let mut rows = measure_throughput(servers, "one node").await?;
    let [first, _second, _third] = RabbitNode::start_cluster().await;
    rows.extend(measure_throughput(&servers.with_broker(first.amqp_uri()), "three nodes").await?);
    Ok(rows)
}

async fn measure_throughput(servers: &Servers, nodes: &str) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let raw = limits::publish(&servers.amqp_uri, &deployment.queue.name, 1..=MESSAGES).await?;
    let mut rows = Vec::new();
    for shards in [1, 2, 4, 8] {
        let text = shards.to_string();
        let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
        let variables = [LONG_TIMEOUT[0], ("SHARDS", text.as_str())];
        let mut published = callbacks_at(&deployment, 200, CONNECTIONS, &variables).await?;
        published.what = format!("{}, {shards} shards, {nodes}", published.what);
        published.limit = Some(raw);
        let consumed = measure_lookups(servers, shards).await?;
        rows.extend([
            published,
            Row::new(format!("lookups, {shards} shards, {nodes}"), "objects/s", consumed),
        ]);
    }
    Ok(rows)
}

/// The rate at which one consumer looks up most of [`MESSAGES`].
async fn measure_lookups(servers: &Servers, shards: u16) -> anyhow::Result<f64> {
    let status_api = Pace::INSTANT.start();
    let deployment = servers.prepared(status_api.endpoint()).await;
    publish(servers, &deployment, shards, 1..=MESSAGES).await?;
    let in_flight = IN_FLIGHT.to_string();
    let consumers =
        start_consumers(&deployment, 1, shards, &[("MAX_CONSUMERS", in_flight.as_str())]).await;
    let (started, before) = (Instant::now(), settled_by(&consumers).await);
    let enough = before + (MESSAGES.unsigned_abs() - before) / 10 * 9;
    wait_until("most of the backlog is looked up", async || settled_by(&consumers).await >= enough)
        .await;
    Ok(per_second(settled_by(&consumers).await - before, started.elapsed()))
}

/// The lookups of 2, 4 and 8 consumers for many messages about few objects. The limit is the number
/// of lookups of one consumer.
pub(crate) async fn measure_fleets(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let one = count_lookups(servers, 1, 1).await?;
    let mut rows =
        vec![Row::new("20,000 messages about 100 objects, one consumer", "lookups", one)];
    for consumers in [2, 4, 8] {
        for shards in [1, consumers * SHARDS_PER_CONSUMER] {
            let lookups = count_lookups(servers, consumers, shards).await?;
            let what = format!("the same, {consumers} consumers, {shards} shards, beside one");
            let mut row = Row::new(what, "lookups", lookups);
            row.limit = Some(one);
            if shards > 1 {
                row.goals.push(Goal::OursAtMost(one * 1.1));
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

#[expect(clippy::cast_precision_loss, reason = "it is below 20,000")]
async fn count_lookups(servers: &Servers, consumers: u16, shards: u16) -> anyhow::Result<f64> {
    let status_api = SLOW.start();
    let deployment = servers.prepared(status_api.endpoint()).await;
    // The consumers come first, as in operation. Otherwise the first one would hold most of the
    // messages before the others are connected.
    let fleet = start_consumers(&deployment, consumers, shards, &[]).await;
    let ids = (0..REPEATED_MESSAGES).map(|number| number % OBJECTS);
    publish(servers, &deployment, shards, ids).await?;
    wait_until("all messages are settled", async || {
        settled_by(&fleet).await >= REPEATED_MESSAGES.unsigned_abs()
    })
    .await;
    Ok(status_api.answered() as f64)
}

async fn start_consumers(
    deployment: &Deployment,
    count: u16,
    shards: u16,
    variables: &[(&'static str, &str)],
) -> Vec<Process> {
    let shards = shards.to_string();
    let variables = [variables, &[("SHARDS", shards.as_str())]].concat();
    let mut consumers = Vec::new();
    for _ in 0..count {
        consumers.push(deployment.system.start("consumer", &variables).await);
    }
    consumers
}

async fn settled_by(consumers: &[Process]) -> u64 {
    let mut sum = 0;
    for consumer in consumers {
        sum += settled(consumer).await;
    }
    sum
}

/// Publishes one message for each of `ids`.
async fn publish(
    servers: &Servers,
    deployment: &Deployment,
    shards: u16,
    ids: impl IntoIterator<Item = i64>,
) -> anyhow::Result<()> {
    let queue = QueueConfig {
        queue_name: deployment.queue.name.clone(),
        queue_type: QueueType::Quorum,
        shards,
        amqp_ca: None,
    };
    let amqp_uri = servers.amqp_uri.parse().map_err(anyhow::Error::msg)?;
    let broker = Config { amqp_uri, queue }.open(&Supervisor::default())?;
    let publisher = Publisher::start(broker, "bench");
    publisher.wait_until_open().await;
    let ids: Vec<i64> = ids.into_iter().collect();
    for batch in ids.chunks(1_000) {
        publisher.publish_ids("bench", batch, CONFIRM_TIMEOUT).await?;
    }
    publisher.close().await;
    Ok(())
}
