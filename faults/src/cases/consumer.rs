//! What happens to the consumers.

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

/// More often than RabbitMQ 4 by default delivers a message.
const KILLS: u32 = 25;
const DELIVERY_LIMIT: u32 = 20;
/// Enough lookups to be amid them.
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
    // Or it would take thousands ahead, and begin with others each time.
    let setup = Setup { consumer: vec![("COALESCE", "off")], ..Setup::default() };
    let mut world = World::start(setup).await;
    world.start_load().await;
    crash_repeatedly(&mut world).await;
    let unlucky = world.status_api.ids_looked_up_more_than(DELIVERY_LIMIT);
    world.wait_for_recovery().await;
    // None is a dead letter: our queue says how often a message may come back, which is 100 times.
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if unlucky < IN_FLIGHT {
        verdict.breaches.push(format!("only {unlucky} messages were delivered so often"));
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
    // A broker may move messages to the dead letters for some time after it gave them up.
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
        verdict.breaches.push(format!("the broker has given up only {}", letters.len()));
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
    // Longer than the broker waits for a heartbeat, which is three times 5 s at most.
    world.run_for(Duration::from_mins(1)).await;
    let consumers = world.broker.rabbitmqctl(&["list_consumers", "queue_name"]).await;
    world.consumers[0].resume();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if consumers.contains(QUEUE) {
        verdict.breaches.push("the broker had not given it up".to_owned());
    }
    verdict
}

async fn one_of_two() -> Verdict {
    let mut world = World::start(Setup { consumers: 2, ..Setup::default() }).await;
    world.start_load().await;
    kill_consumer(&mut world).await;
    world.wait_for_recovery().await;
    let taken_over = r#"lastseen_deliveries_total{redelivered="true"}"#;
    let taken_over = world.consumers[0].metric(taken_over).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if taken_over < 1.0 {
        verdict.breaches.push("it held nothing that the other could take over".to_owned());
    }
    verdict
}

/// Kills the consumer and starts another one, [`KILLS`] times. The status API answers no lookup
/// meanwhile, so that each consumer gets the same messages.
async fn crash_repeatedly(world: &mut World) {
    world.status_api.set_behaviour(|_| Answer::Hang);
    for _ in 0..KILLS {
        in_flight(world, "the consumer is amid its lookups", |count| count >= IN_FLIGHT).await;
        kill_consumer(world).await;
        in_flight(world, "its lookups are broken off", |count| count == 0).await;
        world.consumers.push(world.spawn_consumer());
    }
    world.status_api.reset_behaviour();
}

async fn in_flight(world: &World, what: &str, is_so: impl Fn(usize) -> bool) {
    eventually(what, PATIENCE, async || is_so(world.status_api.in_flight()).then_some(())).await;
}

async fn kill_consumer(world: &mut World) {
    let killed = world.consumers.remove(0);
    killed.kill();
    killed.wait().await;
}
