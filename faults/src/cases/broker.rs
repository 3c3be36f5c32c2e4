//! Faults of the broker.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use testbed::{Answer, Process, eventually};
use tester::ledger::Entry;

use crate::audit::due_at;
use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::status_api::correct_answer;
use crate::world::{QUEUE, Setup, World};

/// How long a case waits for the effect of an action.
const PATIENCE: Duration = Duration::from_mins(1);

/// Outages of 2 s every 4 s, for one minute.
const FLAPS: usize = 15;
/// The number of messages that the broker has nacked.
const REFUSED: &str = r#"lastseen_published_total{outcome="refused"}"#;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("broker_stopped", "broker stopped in good order for a minute", stopped),
        Case::new("broker_killed", "broker killed -9 under load, three times", killed)
            .in_make_test(),
        Case::new("broker_outage", "broker killed -9, away for 25 s and its boot", outage),
        Case::new("broker_silent", "broker silent for 12 s (black hole)", silent),
        Case::new("broker_speechless", "broker accepts and never speaks, 12 s", never_speaking),
        Case::new("broker_flapping", "broker gone for 2 s of every 4 s, for a minute", flapping),
        Case::new("broker_memory_alarm", "broker's memory alarm for 8 s", memory_alarm)
            .in_make_test(),
        Case::new("broker_disk_alarm", "broker's disk alarm for 8 s", disk_alarm),
        Case::new("broker_queue_deleted", "queue deleted under load, three times", queue_deleted)
            .in_make_test(),
        Case::new(
            "broker_queue_full",
            "queue full, with reject-publish, and the only consumer stopped for 8 s",
            queue_full,
        ),
        Case::new("broker_queue_adopted", "queue exists and is a classic one", queue_adopted),
        Case::new(
            "broker_queue_refused",
            "queue exists and drops what is beyond 1,000; deleted 10 s later",
            queue_refused,
        ),
        Case::new(
            "broker_connections_closed",
            "all connections closed by an operator, three times",
            connections_closed,
        )
        .in_make_test(),
        Case::new(
            "broker_consumer_timeout",
            "some lookups take 6 s for 10 s, the broker's consumer timeout is 3 s",
            consumer_timeout,
        ),
    ]
}

async fn stopped() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.broker.stop().await;
    wait_for_spooling(&world, "cannot reach").await;
    world.run_for(Duration::from_mins(1)).await;
    world.broker.boot().await;
    world.wait_for_recovery().await;
    // Deliveries in flight return to the queue when the connection ends.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for _ in 0..3 {
        world.broker.kill().await;
        world.broker.boot().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Longer outages differ only in the size of the spool, which reaches many thousand messages here.
async fn outage() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.broker.kill().await;
    wait_for_spooling(&world, "cannot reach").await;
    let away_from = SystemTime::now();
    world.run_for(Duration::from_secs(25)).await;
    let away_until = SystemTime::now();
    world.broker.boot().await;
    let back_from = SystemTime::now();
    world.wait_for_recovery().await;
    let spooled = producer(&world).metric("lastseen_spooled_total").await;
    world.wait_until_all_relayed().await;
    let back_until = SystemTime::now();
    let spooled_entries = world.entries_due(away_from..away_until);
    let entries_during_relay = world.entries_due(back_from..back_until);
    let looked_up_at = wait_for_lookups(&world, &spooled_entries).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    verdict.breaches.extend(order_breach(&spooled_entries, &looked_up_at));
    verdict.breaches.extend(latency_breach(&entries_during_relay));
    if spooled < 10_000.0 {
        verdict.breaches.push(format!("only {spooled} messages were spooled"));
    }
    verdict
}

async fn silent() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    world.start_load().await;
    world.to_broker.silence();
    // Longer than two heartbeats, so that both sides give the connections up.
    world.run_for(Duration::from_secs(12)).await;
    world.to_broker.restore();
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn never_speaking() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    world.start_load().await;
    world.to_broker.cut();
    world.to_broker.silence();
    wait_for_spooling(&world, "does not speak AMQP").await;
    world.run_for(Duration::from_secs(12)).await;
    world.to_broker.restore();
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn flapping() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    world.start_load().await;
    for _ in 0..FLAPS {
        world.run_for(Duration::from_secs(2)).await;
        world.to_broker.cut();
        world.run_for(Duration::from_secs(2)).await;
        world.to_broker.restore();
    }
    world.wait_for_recovery().await;
    let lost = times_logged(producer(&world), "no broker; trying again");
    assert!(lost >= FLAPS, "the producer noticed {lost} ends of its connections");
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn memory_alarm() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.broker.set_memory_alarm(true).await;
    wait_for_spooling(&world, "blocked: low on memory").await;
    world.run_for(Duration::from_secs(8)).await;
    world.broker.set_memory_alarm(false).await;
    world.wait_for_recovery().await;
    // Messages in flight when the broker stopped reading are spooled, and later read by the broker.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn disk_alarm() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.broker.set_disk_alarm(true).await;
    wait_for_spooling(&world, "blocked: low on disk").await;
    world.run_for(Duration::from_secs(8)).await;
    world.broker.set_disk_alarm(false).await;
    world.wait_for_recovery().await;
    // As after the memory alarm.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn queue_deleted() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for _ in 0..3 {
        // Otherwise the relay could have messages in flight that were accepted long before.
        world.wait_until_all_relayed().await;
        world.delete_queue().await;
        // Delete the queue again only when its consumer works. On RabbitMQ 3.10, the process that
        // dead-letters for quorum queues dies if a queue is deleted while that process starts. It
        // then stays down for all queues until the node is restarted.
        world.wait_for_probe_recovery().await;
    }
    let gone = times_logged(producer(&world), "the queue is gone");
    assert!(gone > 0, "the producer has not noticed that the queue is gone");
    // Sometimes the broker's channel ends first.
    let lost = times_logged(producer(&world), "no broker; trying again");
    assert!(lost >= 3, "the producer noticed {lost} ends of its connections");
    // Deliveries in flight cannot be acked, because their connection ends with the queue.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn queue_full() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    let limit = r#"{"max-length":1000,"overflow":"reject-publish"}"#;
    let policy = ["set_policy", "full", "^objects$", limit, "--apply-to", "queues"];
    world.broker.rabbitmqctl(&policy).await;
    world.start_load().await;
    let consumer = world.consumers.remove(0);
    consumer.terminate();
    consumer.wait().await;
    wait_for_spooling(&world, "").await;
    world.run_for(Duration::from_secs(8)).await;
    let refused = producer(&world).metric(REFUSED).await;
    assert!(refused > 0.0, "the broker has not refused anything");
    world.consumers.push(world.spawn_consumer());
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

async fn queue_adopted() -> Verdict {
    let mut world = World::start_servers(Setup::default()).await;
    world.broker.declare_queue(QUEUE, &[]).await;
    world.start_services();
    world.wait_until_ready().await;
    for service in [producer(&world), &world.consumers[0]] {
        service.wait_for_log("the queue has another type; using it as it is").await;
    }
    world.start_load().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

async fn queue_refused() -> Verdict {
    let mut world = World::start_servers(Setup { has_proxies: true, ..Setup::default() }).await;
    world.broker.declare_queue(QUEUE, &[("x-max-length", 1_000)]).await;
    world.start_services();
    producer(&world).ready().await;
    world.start_load().await;
    let reason = "queue objects exists with other arguments";
    wait_for_spooling(&world, reason).await;
    let consumer = &world.consumers[0];
    eventually("the consumer reports why it is not ready", PATIENCE, async || {
        let (status, page) = consumer.get("/readyz").await;
        (status == 503 && page.contains(reason)).then_some(())
    })
    .await;
    let attempts_and_lines = |world: &World| {
        let lines = producer(world).log().len() + world.consumers[0].log().len();
        (world.to_broker.accepted(), lines)
    };
    let before = attempts_and_lines(&world);
    world.run_for(Duration::from_secs(10)).await;
    let after = attempts_and_lines(&world);
    let (attempts, lines) = (after.0 - before.0, after.1 - before.1);
    // Two services with two publishers or consumers each, which connect about once a second.
    assert!(attempts <= 80, "{attempts} connections within 10 s");
    assert!(lines <= 10, "{lines} lines logged within 10 s");
    world.broker.delete_queue(QUEUE).await;
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    world.finish(Allowed::NOTHING).await
}

async fn connections_closed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for _ in 0..3 {
        world.broker.rabbitmqctl(&["close_all_connections", "--global", "maintenance"]).await;
        world.wait_for_probe_recovery().await;
    }
    for service in [producer(&world), &world.consumers[0]] {
        let lost = times_logged(service, "no broker; trying again");
        assert!(lost >= 3, "a service noticed {lost} ends of its connections");
    }
    // Deliveries in flight return to the queue when the connection ends.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn consumer_timeout() -> Verdict {
    let setup = Setup { consumer: vec![("STATUS_TIMEOUT", "20s")], ..Setup::default() };
    let mut world = World::start_servers(setup).await;
    // A channel reads the timeout when it is opened, and by default checks it every minute.
    let settings = "application:set_env(rabbit, consumer_timeout, 3000), \
                    application:set_env(rabbit, channel_tick_interval, 1000).";
    world.broker.rabbitmqctl(&["eval", settings]).await;
    world.start_services();
    world.wait_until_ready().await;
    world.start_load().await;
    world.status_api.set_behaviour(|id| match id % 250 {
        0 => Answer::After(Duration::from_secs(6), Box::new(correct_answer(id))),
        _ => correct_answer(id),
    });
    // Field case 9.1: RabbitMQ 3.10 closes the channel, and 4.3 cancels the consumer. The reason is
    // not always in the log: deliveries of the lost channel may be noticed first.
    world.consumers[0].wait_for_log("no broker; trying again").await;
    world.run_for(Duration::from_secs(10)).await;
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    // All deliveries of the consumer return to the queue with its channel, and are looked up again.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

fn producer(world: &World) -> &Process {
    world.producer.as_ref().expect("no case in this file ends the producer")
}

/// Waits until the producer reports `reason` for the missing broker, is ready and has spooled.
async fn wait_for_spooling(world: &World, reason: &str) {
    let what = format!("the producer spools, without broker: {reason}");
    eventually(&what, PATIENCE, async || {
        let (status, page) = producer(world).get("/readyz").await;
        assert_eq!(status, 200, "{page}");
        let spooled = producer(world).metric("lastseen_spooled_total").await;
        (page.contains(reason) && spooled > 0.0).then_some(())
    })
    .await;
}

fn times_logged(service: &Process, text: &str) -> usize {
    service.log().iter().filter(|line| line.contains(text)).count()
}

/// Waits until all ids in `entries` have been looked up, and returns the times of their lookups.
async fn wait_for_lookups(world: &World, entries: &[Entry]) -> HashMap<i64, SystemTime> {
    eventually("all spooled ids are looked up", PATIENCE, async || {
        let lookups = world.status_api.lookups();
        let ids = entries.iter().flat_map(|entry| &entry.ids);
        ids.map(|id| Some((*id, lookups.get(id)?.answered_at?))).collect()
    })
    .await
}

/// A breach if ids were looked up long before older ones. The order is only approximate, because
/// many messages are relayed and looked up at once.
fn order_breach(entries: &[Entry], looked_up_at: &HashMap<i64, SystemTime>) -> Option<String> {
    const TOLERANCE: Duration = Duration::from_secs(3);
    let in_order = |entry: &Entry| entry.ids.iter().map(|id| looked_up_at[id]).min();
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by_key(|entry| in_order(entry));
    let mut newest = SystemTime::UNIX_EPOCH;
    let ahead = entries.into_iter().map(|entry| {
        newest = newest.max(due_at(entry));
        newest.duration_since(due_at(entry)).unwrap_or_default()
    });
    let most = ahead.max().unwrap_or_default();
    (most > TOLERANCE).then(|| format!("a callback was relayed before one {most:.1?} older"))
}

/// A breach if more than one in a hundred of these callbacks waited for the whole
/// `PUBLISH_TIMEOUT`.
fn latency_breach(entries: &[Entry]) -> Option<String> {
    const PUBLISH_TIMEOUT_US: u64 = 300_000;
    let waited = |entry: &&Entry| entry.latency_us > entry.late_us + PUBLISH_TIMEOUT_US;
    let slow = entries.iter().filter(waited).count();
    (slow * 100 > entries.len())
        .then(|| format!("the relay slowed {slow} of {} callbacks", entries.len()))
}
