//! Faults of the machine, and starts in any order.

use std::time::Duration;

use tokio::net::TcpStream;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::load::Rate;
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "files_exhausted",
            "no service can open another file or connection for 6 s, and those to broker and database are cut meanwhile; half as many callbacks, over one connection",
            files_exhausted,
        ),
        Case::new(
            "any_order",
            "everything down, and started in three orders, first with the services before all that they need",
            any_order,
        ),
        Case::new(
            "network_slow",
            "10 to 30 ms of delay each way between services, broker and database for 15 s, and every hundredth packet 200 ms late (by proxies, and not by `tc netem`, which few kernels have)",
            network_slow,
        ),
    ]
}

/// Limit that a service without pauses between its retries would exceed a hundred times.
const LINES_PER_SECOND: usize = 40;

async fn files_exhausted() -> Verdict {
    // One connection that is never idle long enough to be closed, because no new one can be
    // accepted.
    let rate = Rate { callbacks: Rate::USUAL.callbacks / 2, ..Rate::USUAL };
    let setup = Setup { has_proxies: true, connections: Some(1), rate, ..Setup::default() };
    let mut world = World::start(setup).await;
    world.start_load().await;

    let log_lines = |world: &World| -> Vec<usize> {
        world.services().map(|service| service.log().len()).collect()
    };
    let lines_before = log_lines(&world);
    let limits: Vec<u64> = world.services().map(|service| service.limit_open_files(8)).collect();
    let refused = TcpStream::connect(world.producer_address()).await;
    let refused = refused.expect("the kernel should accept the connection");
    world.producer().wait_for_log("cannot accept a connection").await;
    // Now the services need new connections.
    for proxy in [&world.to_broker, &world.to_database] {
        proxy.cut();
        proxy.restore();
    }
    let seconds = 6;
    world.run_for(Duration::from_secs(seconds)).await;
    let lines_after = log_lines(&world);
    for (service, limit) in world.services().zip(limits) {
        let _ = service.limit_open_files(limit);
    }
    drop(refused);
    world.wait_for_recovery().await;

    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    for (before, after) in lines_before.iter().zip(lines_after) {
        let lines = after - before;
        if lines > LINES_PER_SECOND * usize::try_from(seconds).unwrap_or(usize::MAX) {
            verdict.breaches.push(format!("a service logged {lines} lines in {seconds} s"));
        }
    }
    verdict
}

#[derive(Clone, Copy)]
enum Component {
    Broker,
    Database,
    StatusApi,
    Producer,
    Consumer,
    Routine,
}

async fn any_order() -> Verdict {
    use Component::{Broker, Consumer, Database, Producer, Routine, StatusApi};
    let orders = [
        [Producer, Consumer, Routine, StatusApi, Database, Broker],
        [Broker, Routine, Consumer, Producer, Database, StatusApi],
        [Database, Consumer, StatusApi, Broker, Routine, Producer],
    ];
    // A small load, because the time to catch up does not matter here.
    let rate = Rate { ids: 1, ..Rate::USUAL };
    // There is no queue and no table yet.
    let mut world = World::start_servers(Setup { rate, ..Setup::default() }).await;
    let mut under_load = false;
    for order in orders {
        stop_everything(&mut world).await;
        for component in order {
            start_component(&mut world, component).await;
            if matches!(component, Producer) && !under_load {
                world.start_load().await;
                under_load = true;
            }
            world.run_for(Duration::from_secs(1)).await;
        }
        world.wait_for_recovery().await;
        world.wait_until_ready().await;
    }
    // Consumers have been killed.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn stop_everything(world: &mut World) {
    if world.producer.is_some() {
        world.kill_producer().await;
    }
    for service in world.consumers.drain(..).chain(world.routine.take()) {
        service.kill();
    }
    world.broker.kill().await;
    world.database.kill().await;
    world.status_api.stop();
}

async fn start_component(world: &mut World, component: Component) {
    match component {
        Component::Broker => world.broker.boot().await,
        Component::Database => world.database.boot().await,
        Component::StatusApi => world.status_api.restart(),
        Component::Producer => world.restart_producer().await,
        Component::Consumer => {
            let consumer = world.spawn_consumer();
            world.consumers.push(consumer);
        }
        Component::Routine => world.routine = Some(world.spawn_routine()),
    }
}

async fn network_slow() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    world.start_load().await;
    for proxy in [&world.to_broker, &world.to_database] {
        let (least, most) = (Duration::from_millis(10), Duration::from_millis(30));
        // Linux retransmits a lost packet after at least 200 ms.
        proxy.slow_down(least..most, Duration::from_millis(200));
    }
    let (count, sum) = publishing(&world).await;
    world.run_for(Duration::from_secs(15)).await;
    let (later_count, later_sum) = publishing(&world).await;
    let mean = (later_sum - sum) / (later_count - count);
    assert!(mean > 0.02, "a publish took {mean} s on average, less than a round trip");
    for proxy in [&world.to_broker, &world.to_database] {
        proxy.restore();
    }
    world.wait_for_recovery().await;
    // If a confirm arrives after `PUBLISH_TIMEOUT`, its message is also in the spool.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// The number of batches that the producer has published, and the seconds that this took.
async fn publishing(world: &World) -> (f64, f64) {
    let count = world.producer().metric("lastseen_publish_seconds_count").await;
    (count, world.producer().metric("lastseen_publish_seconds_sum").await)
}
