//! Faults of a broker cluster of three nodes.

use std::time::Duration;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::setup::{Brokers, Setup};
use crate::world::{QUEUE, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("cluster_leader_killed", leader_killed).fault("three broker nodes; the leader's killed -9 and never back, services connected to another"),
        Case::new("cluster_own_node_killed", own_node_killed).fault("three broker nodes, all in `AMQP_URI`; the one that leads and has the services killed -9 and never back"),
        Case::new("cluster_minority", minority).fault("three broker nodes, all in `AMQP_URI`; two killed -9, away for 10 s and their boot"),
        Case::new("cluster_rolling_restart", rolling_restart).fault("three broker nodes, all in `AMQP_URI`, restarted one after the other"),
        Case::new("cluster_node_cut_off", node_cut_off).fault("three broker nodes, all in `AMQP_URI`; the one that leads and has the services cut off from the others for 20 s, its port open"),
        Case::new("cluster_node_replaced", node_replaced).fault("three broker nodes, all in `AMQP_URI`; a fourth added, the one that leads and has the services removed, then another one killed -9"),
    ]
}

/// Field case 3.1: RabbitMQ nacks all messages on channels that have published to the dead leader.
async fn leader_killed() -> Verdict {
    let setup = Setup { brokers: Brokers::ClusterNode(1), ..Setup::default() };
    let mut world = World::start(setup).await;
    assert!(world.broker.leads(QUEUE).await, "the queue's leader is on another node");
    world.start_load().await;
    world.broker.kill().await;
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn own_node_killed() -> Verdict {
    let mut world = under_load_at_the_leader().await;
    world.broker.kill().await;
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn minority() -> Verdict {
    let mut world = World::under_load(cluster()).await;
    world.broker.kill().await;
    world.other_nodes[1].kill().await;
    world.run_for(Duration::from_secs(10)).await;
    tokio::join!(world.broker.boot(), world.other_nodes[1].boot());
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn rolling_restart() -> Verdict {
    let mut world = World::under_load(cluster()).await;
    for index in 0..3 {
        let node = world.nodes_mut().nth(index).expect("there should be three nodes");
        node.restart().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// The node that is cut off still accepts connections, but can confirm and deliver nothing. The
/// first recovery takes place while it is cut off.
async fn node_cut_off() -> Verdict {
    let mut world = under_load_at_the_leader().await;
    world.broker.disconnect_from(&world.other_nodes).await;
    world.wait_for_probe_recovery().await;
    world.run_for(Duration::from_secs(20)).await;
    world.broker.reconnect_to(&world.other_nodes).await;
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// The last kill shows that the queues use the added node: without it, they would have no majority.
async fn node_replaced() -> Verdict {
    let mut world = under_load_at_the_leader().await;
    let added = world.broker.start_joined().await;
    world.broker.grow_queues_to(&added).await;
    let mut removed = std::mem::replace(&mut world.broker, added);
    world.broker.remove_from_cluster(&mut removed).await;
    world.wait_for_probe_recovery().await;
    world.other_nodes[0].kill().await;
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

fn cluster() -> Setup {
    Setup { brokers: Brokers::Cluster, ..Setup::default() }
}

/// Starts a world under load. The services know all nodes of the cluster, but are connected to the
/// one that leads all queues.
async fn under_load_at_the_leader() -> World {
    let mut world = World::start_servers(cluster()).await;
    for node in &world.other_nodes {
        node.set_accepting(false).await;
    }
    world.start_services();
    world.wait_until_ready().await;
    for node in &world.other_nodes {
        node.set_accepting(true).await;
    }
    assert!(world.broker.leads(QUEUE).await, "the queue's leader is on another node");
    world.start_load().await;
    world
}
