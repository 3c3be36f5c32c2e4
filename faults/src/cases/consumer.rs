//! Faults of the consumers.

use std::time::Duration;

use testbed::{Answer, eventually};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{QUEUE, Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("consumer_killed", "the only consumer killed -9 under load, five times", killed)
            .in_make_test(),
        Case::new(
            "consumer_crash_loop",
            "the only consumer killed -9 25 times, each time amid the same lookups",
            crash_loop,
        ),
        Case::new(
            "consumer_delivery_limit",
            "likewise, under a policy of `delivery-limit` 20; what the broker gives up by that is redriven",
            delivery_limit,
        ),
        Case::new(
            "consumer_stopped",
            "the only consumer stopped (SIGSTOP) for a minute, so that the broker gives it up",
            stopped,
        ),
        Case::new("one_of_two_consumers_killed", "one of two consumers killed -9", one_of_two)
            .in_make_test(),
    ]
}

/// More often than RabbitMQ 4 delivers a message by default.
const KILLS: u32 = 25;
const DELIVERY_LIMIT: u32 = 20;
/// The number of lookups in flight at which the consumer is killed.
const IN_FLIGHT: usize = 200;
const PATIENCE: Duration = Duration::from_secs(30);

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for _ in 0..5 {
        kill_consumer(&mut world).await;
        world.consumers.push(world.spawn_consumer());
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn crash_loop() -> Verdict {
    // With coalescing it would prefetch thousands of messages, and start with other ones each time.
    let setup = Setup { consumer: vec![("COALESCE", "off")], ..Setup::default() };
    let mut world = World::start(setup).await;
    world.start_load().await;
    crash_repeatedly(&mut world).await;
    let often_delivered = world.status_api.ids_looked_up_more_than(DELIVERY_LIMIT);
    world.wait_for_recovery().await;
    // None becomes a dead letter, because our queue allows 100 deliveries of a message.
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if often_delivered < IN_FLIGHT {
        verdict.breaches.push(format!("only {often_delivered} messages were delivered that often"));
    }
    verdict
}

async fn delivery_limit() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    let limit = format!(r#"{{"delivery-limit":{DELIVERY_LIMIT}}}"#);
    let policy = ["set_policy", "limit", &format!("^{QUEUE}$"), &limit, "--apply-to", "queues"];
    world.broker.rabbitmqctl(&policy).await;
    world.start_load().await;
    crash_repeatedly(&mut world).await;
    world.wait_for_recovery().await;
    let mut letters = world.redrive_dead_letters().await;
    // The broker may move messages to the dead letters with some delay.
    loop {
        world.run_for(Duration::from_secs(1)).await;
        let more = world.redrive_dead_letters().await;
        if more.is_empty() {
            break;
        }
        letters.extend(more);
    }
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if letters.len() < IN_FLIGHT {
        verdict.breaches.push(format!("the broker dead-lettered only {} messages", letters.len()));
    }
    if let Some(letter) = letters.iter().find(|letter| !letter.reason.contains("delivery_limit")) {
        verdict.breaches.push(format!("a dead letter because of {:?}", letter.reason));
    }
    verdict
}

async fn stopped() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.consumers[0].pause().await;
    // Longer than the broker waits for a heartbeat, which is at most three times 5 s.
    world.run_for(Duration::from_mins(1)).await;
    let consumers = world.broker.rabbitmqctl(&["list_consumers", "queue_name"]).await;
    world.consumers[0].resume();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if consumers.contains(QUEUE) {
        verdict.breaches.push("the broker still listed the stopped consumer".to_owned());
    }
    verdict
}

async fn one_of_two() -> Verdict {
    let mut world = World::start(Setup { consumers: 2, ..Setup::default() }).await;
    world.start_load().await;
    kill_consumer(&mut world).await;
    world.wait_for_recovery().await;
    let redeliveries = r#"lastseen_deliveries_total{redelivered="true"}"#;
    let redeliveries = world.consumers[0].metric(redeliveries).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if redeliveries < 1.0 {
        verdict.breaches.push("the killed consumer had no delivery for the other one".to_owned());
    }
    verdict
}

/// Kills the consumer and starts another one, [`KILLS`] times. The status API answers no lookup
/// meanwhile, so that each consumer gets the same messages.
async fn crash_repeatedly(world: &mut World) {
    world.status_api.set_behaviour(|_| Answer::Hang);
    for _ in 0..KILLS {
        wait_for_in_flight(world, "lookups are in flight", |count| count >= IN_FLIGHT).await;
        kill_consumer(world).await;
        wait_for_in_flight(world, "no lookup is in flight", |count| count == 0).await;
        world.consumers.push(world.spawn_consumer());
    }
    world.status_api.reset_behaviour();
}

async fn wait_for_in_flight(world: &World, what: &str, is_expected: impl Fn(usize) -> bool) {
    eventually(what, PATIENCE, async || is_expected(world.status_api.in_flight()).then_some(()))
        .await;
}

async fn kill_consumer(world: &mut World) {
    let killed = world.consumers.remove(0);
    killed.kill();
    killed.wait().await;
}
