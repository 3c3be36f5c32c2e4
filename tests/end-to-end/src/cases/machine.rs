//! Faults of the machine, and starts in any order.

use std::time::Duration;

use tokio::net::TcpStream;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::load::Rate;
use crate::setup::Setup;
use crate::world::World;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("files_exhausted", files_exhausted).fault("no service can open another file or connection for 6 s, and those to broker and database are cut meanwhile; half as many callbacks, over one connection"),
        Case::new("any_order", any_order).fault("everything down, and started in three orders, first with the services before all that they need"),
        Case::new("network_slow", network_slow).fault("10 to 30 ms of delay each way between services, broker and database for 15 s, and every hundredth packet 200 ms late (by proxies, and not by `tc netem`, which few kernels have)"),
    ]
}

/// The limit for each service. Without pauses between retries, a service would log a hundred times
/// as many lines.
const LINES_PER_SECOND: usize = 40;

async fn files_exhausted() -> Verdict {
    // The load uses one connection, which is never idle long enough to be closed, because the
    // producer can accept no other one.
    let rate = Rate { callbacks: Rate::USUAL.callbacks / 2, ..Rate::USUAL };
    let setup = Setup { has_proxies: true, connections: Some(1), rate, ..Setup::default() };
    let mut world = World::under_load(setup).await;

    let log_lines = |world: &World| -> Vec<usize> {
        world.services().map(|service| service.log().len()).collect()
    };
    let lines_before = log_lines(&world);
    let limits: Vec<u64> = world.services().map(|service| service.limit_open_files(8)).collect();
    let unaccepted = TcpStream::connect(world.callback_address()).await;
    let unaccepted = unaccepted.expect("the kernel should accept the connection");
    world.producer().wait_for_log("cannot accept a connection").await;
    // Makes the services need new connections.
    for proxy in [&world.to_broker, &world.to_database] {
        proxy.cut();
        proxy.restore();
    }
    let seconds = 6;
    world.run_for(Duration::from_secs(seconds)).await;
    let lines_after = log_lines(&world);
    for (service, limit) in world.services().zip(limits) {
        service.limit_open_files(limit);
    }
    drop(unaccepted);
    world.wait_for_recovery().await;

    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    for (before, after) in lines_before.iter().zip(lines_after) {
        let lines = after - before;
        let most = LINES_PER_SECOND * usize::try_from(seconds).unwrap_or(usize::MAX);
        verdict.require(lines <= most, format!("a service logged {lines} lines in {seconds} s"));
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
    // The killed consumers leave deliveries that are looked up again.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn stop_everything(world: &mut World) {
    if !world.producers.is_empty() {
        world.kill_producer();
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
    let world = World::under_load(Setup { has_proxies: true, ..Setup::default() }).await;
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
    // If a confirm arrives after `PUBLISH_TIMEOUT`, its message is also in the spool.
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

/// The number of batches that the producer has published, and the seconds that this took.
async fn publishing(world: &World) -> (f64, f64) {
    let count = world.producer().metric("lastseen_publish_seconds_count").await;
    (count, world.producer().metric("lastseen_publish_seconds_sum").await)
}
