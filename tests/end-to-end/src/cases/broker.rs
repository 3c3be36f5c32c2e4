//! Faults of the broker.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tester::ledger::Entry;
use testkit::{Answer, Process, wait_for, wait_until};

use crate::audit::due_at;
use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::setup::Setup;
use crate::world::{QUEUE, World};

/// Outages of 2 s every 4 s, for one minute.
const FLAPS: usize = 15;
/// The number of messages that the broker has nacked.
const REFUSED: &str = r#"lastseen_published_total{outcome="refused"}"#;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("broker_stopped", stopped).fault("broker stopped in good order for a minute"),
        Case::new("broker_killed", killed)
            .fault("broker killed -9 under load, three times")
            .in_make_test(),
        Case::new("broker_outage", outage).fault("broker killed -9, away for 25 s and its boot"),
        Case::new("broker_silent", silent).fault("broker silent for 12 s (black hole)"),
        Case::new("broker_speechless", never_speaking)
            .fault("broker accepts and never speaks, 12 s"),
        Case::new("broker_flapping", flapping)
            .fault("broker gone for 2 s of every 4 s, for a minute"),
        Case::new("broker_memory_alarm", memory_alarm)
            .fault("broker's memory alarm for 8 s")
            .in_make_test(),
        Case::new("broker_disk_alarm", disk_alarm).fault("broker's disk alarm for 8 s"),
        Case::new("broker_queue_deleted", queue_deleted)
            .fault("queue deleted under load, three times")
            .in_make_test(),
        Case::new("broker_queue_full", queue_full)
            .fault("queue full, with reject-publish, and the only consumer stopped for 8 s"),
        Case::new("broker_queue_adopted", queue_adopted).fault("queue exists and is a classic one"),
        Case::new("broker_queue_refused", queue_refused)
            .fault("queue exists and drops what is beyond 1,000; deleted 10 s later"),
        Case::new("broker_connections_closed", connections_closed)
            .fault("all connections closed by an operator, three times")
            .in_make_test(),
        Case::new("broker_consumer_timeout", consumer_timeout)
            .fault("some lookups take 6 s for 10 s, the broker's consumer timeout is 3 s"),
    ]
}

async fn stopped() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.broker.stop().await;
    wait_for_spooling(&world, "cannot reach").await;
    world.run_for(Duration::from_mins(1)).await;
    world.broker.boot().await;
    // Deliveries in flight return to the queue when the connection ends.
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn killed() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..3 {
        world.broker.kill().await;
        world.broker.boot().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Longer outages differ only in the size of the spool, which reaches many thousand messages here.
async fn outage() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.broker.kill().await;
    wait_for_spooling(&world, "cannot reach").await;
    let outage_from = SystemTime::now();
    world.run_for(Duration::from_secs(25)).await;
    let outage_until = SystemTime::now();
    world.broker.boot().await;
    let relay_from = SystemTime::now();
    world.wait_for_recovery().await;
    let spooled = world.producer().metric("lastseen_spooled_total").await;
    world.wait_until_all_relayed().await;
    let relay_until = SystemTime::now();
    let spooled_entries = world.entries_due(outage_from..outage_until);
    let entries_during_relay = world.entries_due(relay_from..relay_until);
    let looked_up_at = wait_for_lookups(&world, &spooled_entries).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    verdict.breaches.extend(order_breach(&spooled_entries, &looked_up_at));
    verdict.breaches.extend(latency_breach(&entries_during_relay));
    verdict.require(spooled >= 10_000.0, format!("only {spooled} messages were spooled"));
    verdict
}

async fn silent() -> Verdict {
    let world = World::under_load(Setup { has_proxies: true, ..Setup::default() }).await;
    world.to_broker.silence();
    // Longer than two heartbeats, so that both sides give up the connections.
    world.run_for(Duration::from_secs(12)).await;
    world.to_broker.restore();
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn never_speaking() -> Verdict {
    let world = World::under_load(Setup { has_proxies: true, ..Setup::default() }).await;
    world.to_broker.cut();
    world.to_broker.silence();
    wait_for_spooling(&world, "does not speak AMQP").await;
    world.run_for(Duration::from_secs(12)).await;
    world.to_broker.restore();
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn flapping() -> Verdict {
    let mut world = World::under_load(Setup { has_proxies: true, ..Setup::default() }).await;
    for _ in 0..FLAPS {
        world.run_for(Duration::from_secs(2)).await;
        world.to_broker.cut();
        world.run_for(Duration::from_secs(2)).await;
        world.to_broker.restore();
    }
    world.wait_for_recovery().await;
    let disconnects = times_logged(world.producer(), "no broker; trying again");
    assert!(disconnects >= FLAPS, "the producer noticed {disconnects} ends of its connections");
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn memory_alarm() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    world.broker.set_memory_alarm(true).await;
    wait_for_spooling(&world, "blocked: low on memory").await;
    world.run_for(Duration::from_secs(8)).await;
    world.broker.set_memory_alarm(false).await;
    // Messages in flight when the broker stopped reading are spooled, and later read by the broker.
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn disk_alarm() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    world.broker.set_disk_alarm(true).await;
    wait_for_spooling(&world, "blocked: low on disk").await;
    world.run_for(Duration::from_secs(8)).await;
    world.broker.set_disk_alarm(false).await;
    // As after the memory alarm, messages in flight are in the spool and in the broker.
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn queue_deleted() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..3 {
        // The deletion may lose messages in flight. For messages of the relay, the audit would not
        // excuse this, because their callbacks were answered long before.
        world.wait_until_all_relayed().await;
        world.delete_queue().await;
        // Delete the queue again only when its consumer works. On RabbitMQ 3.10, the process that
        // dead-letters for quorum queues dies if a queue is deleted while that process starts. It
        // then stays down for all queues until the node is restarted.
        world.wait_for_probe_recovery().await;
    }
    // Not after each deletion, because sometimes the channel ends first.
    let deletions = times_logged(world.producer(), "the queue is gone");
    assert!(deletions > 0, "the producer has not noticed that the queue is gone");
    let disconnects = times_logged(world.producer(), "no broker; trying again");
    assert!(disconnects >= 3, "the producer noticed {disconnects} ends of its connections");
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
    let refused = world.producer().metric(REFUSED).await;
    assert!(refused > 0.0, "the broker has not refused anything");
    world.consumers.push(world.spawn_consumer());
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn queue_adopted() -> Verdict {
    let mut world = World::start_servers(Setup::default()).await;
    world.broker.declare_queue(QUEUE, &[]).await;
    world.start_services();
    world.wait_until_ready().await;
    for service in [world.producer(), &world.consumers[0]] {
        service.wait_for_log("the queue has another type; using it as it is").await;
    }
    world.start_load().await;
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn queue_refused() -> Verdict {
    let mut world = World::start_servers(Setup { has_proxies: true, ..Setup::default() }).await;
    world.broker.declare_queue(QUEUE, &[("x-max-length", 1_000)]).await;
    world.start_services();
    world.producer().ready().await;
    world.start_load().await;
    let reason = "queue objects exists with other arguments";
    wait_for_spooling(&world, reason).await;
    world.consumers[0].wait_until_unready(&[reason]).await;
    let attempts_and_lines = |world: &World| {
        let lines = world.producer().log().len() + world.consumers[0].log().len();
        (world.to_broker.accepted(), lines)
    };
    let before = attempts_and_lines(&world);
    world.run_for(Duration::from_secs(10)).await;
    let after = attempts_and_lines(&world);
    let (attempts, lines) = (after.0 - before.0, after.1 - before.1);
    // Two services with two publishers or consumers each, which connect about once a second.
    assert!(attempts <= 80, "{attempts} connections within 10 s");
    assert!(lines <= 10, "{lines} lines logged within 10 s");
    world.broker.rabbitmqctl(&["delete_queue", QUEUE]).await;
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    world.finish(Allowed::NOTHING).await
}

async fn connections_closed() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..3 {
        world.broker.rabbitmqctl(&["close_all_connections", "--global", "maintenance"]).await;
        world.wait_for_probe_recovery().await;
    }
    for service in [world.producer(), &world.consumers[0]] {
        let disconnects = times_logged(service, "no broker; trying again");
        assert!(disconnects >= 3, "a service noticed {disconnects} ends of its connections");
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
    world.set_answers(|id| match id % 250 {
        0 => Answer::even_is_online(id).after(Duration::from_secs(6)),
        _ => Answer::even_is_online(id),
    });
    // Field case 9.1: RabbitMQ 3.10 closes the channel, and 4.3 cancels the consumer. The log does
    // not always give this reason, because the consumer may first notice that its deliveries have
    // lost their channel.
    world.consumers[0].wait_for_log("no broker; trying again").await;
    world.run_for(Duration::from_secs(10)).await;
    world.reset_answers();
    // All deliveries of the consumer return to the queue with its channel, and are looked up again.
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

/// Waits until the producer reports `reason` for the missing broker, is ready and has spooled.
async fn wait_for_spooling(world: &World, reason: &str) {
    let what = format!("the producer spools, without broker: {reason}");
    wait_until(&what, async || {
        let (status, page) = world.producer().get("/readyz").await;
        assert_eq!(status, 200, "{page}");
        let spooled = world.producer().metric("lastseen_spooled_total").await;
        page.contains(reason) && spooled > 0.0
    })
    .await;
}

fn times_logged(service: &Process, text: &str) -> usize {
    service.log().iter().filter(|line| line.contains(text)).count()
}

/// Waits until all ids in `entries` have been looked up, and returns the times of their lookups.
async fn wait_for_lookups(world: &World, entries: &[Entry]) -> HashMap<i64, SystemTime> {
    wait_for("all spooled ids are looked up", async || {
        let lookups = world.status_api.decisions();
        let ids = entries.iter().flat_map(|entry| &entry.ids);
        ids.map(|id| Some((*id, lookups.get(id)?.answered_at?))).collect()
    })
    .await
}

/// A breach if ids were looked up before much older ones. A small difference is normal, because
/// many messages are relayed and looked up at once.
fn order_breach(entries: &[Entry], looked_up_at: &HashMap<i64, SystemTime>) -> Option<String> {
    const TOLERANCE: Duration = Duration::from_secs(3);
    let first_lookup = |entry: &Entry| entry.ids.iter().map(|id| looked_up_at[id]).min();
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by_key(|entry| first_lookup(entry));
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
