//! Faults of the consumers.

use std::time::Duration;

use testkit::{Answer, wait_until};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::setup::Setup;
use crate::world::{QUEUE, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("consumer_killed", killed).fault("the only consumer killed -9 under load, five times").in_make_test(),
        Case::new("consumer_crash_loop", crash_loop).fault("the only consumer killed -9 25 times, each time amid the same lookups"),
        Case::new("consumer_delivery_limit", delivery_limit).fault("likewise, under a policy of `delivery-limit` 20; what the broker gives up by that is redriven"),
        Case::new("consumer_stopped", stopped).fault("the only consumer stopped (SIGSTOP) for a minute, so that the broker gives it up"),
        Case::new("one_of_two_consumers_killed", one_of_two).fault("one of two consumers killed -9").in_make_test(),
    ]
}

/// More often than RabbitMQ 4 delivers a message by default.
const KILLS: u32 = 25;
const DELIVERY_LIMIT: u32 = 20;
/// The number of lookups in flight at which the consumer is killed.
const IN_FLIGHT: usize = 200;

async fn killed() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..5 {
        kill_consumer(&mut world);
        world.consumers.push(world.spawn_consumer());
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn crash_loop() -> Verdict {
    // With coalescing, a consumer would prefetch thousands of messages, and each would start with
    // other ones.
    let setup = Setup { consumer: vec![("COALESCE", "off")], ..Setup::default() };
    let mut world = World::under_load(setup).await;
    crash_repeatedly(&mut world).await;
    let often_delivered = world.status_api.looked_up_more_than(DELIVERY_LIMIT).len();
    // No message becomes a dead letter, because our queue allows 100 deliveries of a message.
    let mut verdict = world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await;
    let breach =
        format!("only {often_delivered} messages were delivered more than {DELIVERY_LIMIT} times");
    verdict.require(often_delivered >= IN_FLIGHT, breach);
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
    let breach = format!("the broker dead-lettered only {} messages", letters.len());
    verdict.require(letters.len() >= IN_FLIGHT, breach);
    if let Some(letter) = letters.iter().find(|letter| !letter.reason.contains("delivery_limit")) {
        verdict.breaches.push(format!("a dead letter because of {:?}", letter.reason));
    }
    verdict
}

async fn stopped() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    world.consumers[0].pause().await;
    // Longer than the broker waits for a heartbeat, which is at most three times 5 s.
    world.run_for(Duration::from_mins(1)).await;
    let consumers = world.broker.rabbitmqctl(&["list_consumers", "queue_name"]).await;
    world.consumers[0].resume();
    let mut verdict = world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await;
    verdict.require(!consumers.contains(QUEUE), "the broker still listed the stopped consumer");
    verdict
}

async fn one_of_two() -> Verdict {
    let mut world = World::under_load(Setup { more_consumers: 1, ..Setup::default() }).await;
    kill_consumer(&mut world);
    world.wait_for_recovery().await;
    let redeliveries = r#"lastseen_deliveries_total{redelivered="true"}"#;
    let redeliveries = world.consumers[0].metric(redeliveries).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    verdict.require(redeliveries > 0.0, "the killed consumer had no delivery for the other one");
    verdict
}

/// Kills the consumer and starts another one, [`KILLS`] times. The status API answers no lookup
/// meanwhile, so that each consumer gets the same messages.
async fn crash_repeatedly(world: &mut World) {
    world.set_answers(|_| Answer::Hang);
    for _ in 0..KILLS {
        wait_until("lookups are in flight", async || world.status_api.in_flight() >= IN_FLIGHT)
            .await;
        kill_consumer(world);
        wait_until("no lookup is in flight", async || world.status_api.in_flight() == 0).await;
        world.consumers.push(world.spawn_consumer());
    }
    world.reset_answers();
}

fn kill_consumer(world: &mut World) {
    world.consumers.remove(0).kill();
}
