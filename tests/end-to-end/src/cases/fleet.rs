//! Faults of a fleet: several producers and consumers, a broker cluster and shards.

use std::time::{Duration, SystemTime};

use messaging::queue::Inspector;
use testkit::{RabbitNode, wait_until};

use crate::audit::broker_config;
use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::load::Rate;
use crate::setup::{Brokers, Setup};
use crate::world::{QUEUE, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("fleet_loses_one_of_each", one_of_each_lost).fault("two producers behind an HAProxy, four consumers, four shards on three broker nodes, 300 callbacks/s; the node that leads a shard killed -9 and never back, then the busiest consumer killed -9, then a producer restarted"),
        Case::new("fleet_changes_its_shards", shards_changed).fault("two producers behind an HAProxy and two consumers, restarted one after the other with 4 shards instead of 1, and then with 1 again"),
        Case::new("fleet_moves_to_another_broker", moved_to_another_broker).fault("a consumer added at a new broker, then two producers restarted with the address of the new broker; the old consumers stopped when the old broker has no messages, and that broker killed -9"),
    ]
}

/// The default of `DRAIN_DELAY`, which tests set to zero. `HAProxy` notices the drain meanwhile.
const DRAIN_DELAY: (&str, &str) = ("DRAIN_DELAY", "8s");
const FOUR_SHARDS: (&str, &str) = ("SHARDS", "4");
/// 300 callbacks/s, or a fifth of that in a debug build. `HAProxy` opens a connection for each.
const RATE: Rate = Rate { callbacks: Rate::USUAL.callbacks * 3 / 5, ids: 5 };
/// Time for the other consumers to take over the shards of a killed one.
const TAKEOVER: Duration = Duration::from_secs(2);

async fn one_of_each_lost() -> Verdict {
    let setup = Setup {
        rate: RATE,
        brokers: Brokers::Cluster,
        more_producers: 1,
        more_consumers: 3,
        producer: vec![FOUR_SHARDS, DRAIN_DELAY],
        consumer: vec![FOUR_SHARDS],
        ..Setup::default()
    };
    let mut world = World::under_load(setup).await;
    kill_leader_of(&mut world, "objects.0").await;
    let killed_at = SystemTime::now();
    world.wait_for_probe_recovery().await;
    let without_leader = slowest_lookup_after(&mut world, killed_at).await;

    kill_busiest_consumer(&mut world).await;
    let killed_at = SystemTime::now();
    world.wait_for_recovery().await;
    let takeover = slowest_lookup_after(&mut world, killed_at).await;

    world.update_producer(0).await;
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    // A probe shows that one shard works again. These show that all do.
    let breach = format!("lookups took {without_leader:.1?} after the leader's node was killed");
    verdict.require(without_leader <= Allowed::NOTHING.recovery, breach);
    let breach = format!("the shards of the killed consumer were taken over after {takeover:.1?}");
    verdict.require(takeover <= TAKEOVER, breach);
    verdict
}

/// No lookup is repeated: consumers drain, and every consumer reads the shards before a producer
/// publishes to them.
async fn shards_changed() -> Verdict {
    let mut world = World::under_load(two_of_each()).await;
    world.setup.consumer = vec![FOUR_SHARDS];
    update_consumers(&mut world).await;
    world.setup.producer = vec![FOUR_SHARDS, DRAIN_DELAY];
    update_producers(&mut world).await;
    world.wait_for_recovery().await;
    wait_until_all_shards_used(&world).await;

    world.setup.producer = vec![DRAIN_DELAY];
    update_producers(&mut world).await;
    world.setup.consumer = Vec::new();
    update_consumers(&mut world).await;
    world.recover_and_finish(Allowed::NOTHING).await
}

/// Two producers and two consumers, without shards.
fn two_of_each() -> Setup {
    Setup {
        rate: RATE,
        more_producers: 1,
        more_consumers: 1,
        producer: vec![DRAIN_DELAY],
        ..Setup::default()
    }
}

/// How to upgrade RabbitMQ where it cannot upgrade itself.
async fn moved_to_another_broker() -> Verdict {
    let mut world = World::under_load(two_of_each()).await;
    let new = RabbitNode::start().await;
    let new_uri: &'static str = new.amqp_uri().leak();
    let at_new = ("AMQP_URI", new_uri);
    world.setup.consumer = vec![at_new];
    let consumer = world.spawn_consumer();
    consumer.ready().await;
    let old_consumers = std::mem::replace(&mut world.consumers, vec![consumer]);
    world.setup.producer = vec![DRAIN_DELAY, at_new];
    update_producers(&mut world).await;

    let mut old = Inspector::open(&broker_config(&world.broker.amqp_uri())).await.expect("it runs");
    wait_until("the old broker has no messages", async || {
        let depths = old.depths().await.expect("it runs");
        let mut unsettled = 0.0;
        for consumer in &old_consumers {
            unsettled += consumer.metric("lastseen_unsettled_messages").await;
        }
        (depths.ready, depths.delayed) == (0, 0) && unsettled == 0.0
    })
    .await;
    for consumer in old_consumers {
        consumer.stop().await;
    }
    std::mem::replace(&mut world.broker, new).kill().await;
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn update_producers(world: &mut World) {
    for index in 0..world.producers.len() {
        world.update_producer(index).await;
    }
}

async fn update_consumers(world: &mut World) {
    for index in 0..world.consumers.len() {
        world.update_consumer(index).await;
    }
}

/// Waits until messages have passed all four shards: the log of a quorum queue has an entry for each
/// message, but only a few entries for its consumers.
async fn wait_until_all_shards_used(world: &World) {
    const ENTRIES: u64 = 100;
    let entries_of = format!(
        "Entries = fun(Shard) -> \
             Name = <<\"{QUEUE}.\", (integer_to_binary(Shard))/binary>>, \
             {{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, Name)), \
             {{ok, {{{{Applied, _}}, _}}, _}} = ra:local_query(amqqueue:get_pid(Q), fun(_) -> ok end), \
             Applied \
         end, \
         lists:min([Entries(Shard) || Shard <- [0, 1, 2, 3]])."
    );
    wait_until("messages have passed all shards", async || {
        let entries = world.broker.rabbitmqctl(&["eval", &entries_of]).await;
        entries.trim().parse::<u64>().expect("the number of entries") > ENTRIES
    })
    .await;
}

async fn kill_leader_of(world: &mut World, queue: &str) {
    for node in world.nodes_mut() {
        if node.leads(queue).await {
            return node.kill().await;
        }
    }
    panic!("no node leads {queue}");
}

/// Kills the consumer with the most deliveries. On RabbitMQ 3.10, it has all shards.
async fn kill_busiest_consumer(world: &mut World) {
    let mut busiest = (0.0, 0);
    for (index, consumer) in world.consumers.iter().enumerate() {
        let deliveries = consumer.metric("lastseen_deliveries_total").await;
        if deliveries > busiest.0 {
            busiest = (deliveries, index);
        }
    }
    world.consumers.remove(busiest.1).kill();
}

/// The longest time that an id of a callback that was due in the seconds after `start` took until
/// it was looked up.
async fn slowest_lookup_after(world: &mut World, start: SystemTime) -> Duration {
    world.run_for(Duration::from_secs(3)).await;
    // Callbacks in flight are not in the ledger yet.
    let end = SystemTime::now() - Duration::from_secs(1);
    world.slowest_lookup(start..end).await
}
