//! Faults of a broker cluster of three nodes.

use std::time::Duration;

use testbed::RabbitNode;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{QUEUE, Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "cluster_leader_killed",
            "three broker nodes; the leader's killed -9 and never back, services connected to another",
            leader_killed,
        ),
        Case::new(
            "cluster_own_node_killed",
            "three broker nodes; the one that leads and has the services killed -9 and never back, a \
             balancer has another",
            own_node_killed,
        ),
        Case::new(
            "cluster_minority",
            "three broker nodes; two killed -9, away for 10 s and their boot",
            minority,
        ),
        Case::new(
            "cluster_rolling_restart",
            "three broker nodes restarted one after the other, behind a balancer",
            rolling_restart,
        ),
    ]
}

/// Field case 3.1: RabbitMQ nacks all messages on channels that have published to the dead leader.
async fn leader_killed() -> Verdict {
    let mut world = World::start(Setup { cluster: Some(1), ..Setup::default() }).await;
    assert!(world.broker.leads(QUEUE).await, "the queue's leader is on another node");
    world.start_load().await;
    world.broker.kill().await;
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn own_node_killed() -> Verdict {
    let setup = Setup { cluster: Some(0), has_proxies: true, ..Setup::default() };
    let mut world = World::start(setup).await;
    assert!(world.broker.leads(QUEUE).await, "the queue's leader is on another node");
    world.start_load().await;
    world.broker.kill().await;
    world.to_broker.switch_to(address(&world.other_nodes[0]));
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn minority() -> Verdict {
    let mut world = World::start(Setup { cluster: Some(1), ..Setup::default() }).await;
    world.start_load().await;
    world.broker.kill().await;
    world.other_nodes[1].kill().await;
    world.run_for(Duration::from_secs(10)).await;
    tokio::join!(world.broker.boot(), world.other_nodes[1].boot());
    world.wait_for_probe_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.1
async fn rolling_restart() -> Verdict {
    let setup = Setup { cluster: Some(0), has_proxies: true, ..Setup::default() };
    let mut world = World::start(setup).await;
    world.start_load().await;
    let second = address(&world.other_nodes[0]);
    world.to_broker.switch_to(second);
    world.broker.restart().await;
    world.wait_for_recovery().await;
    let third = address(&world.other_nodes[1]);
    world.to_broker.switch_to(third);
    world.other_nodes[0].restart().await;
    world.wait_for_recovery().await;
    let first = address(&world.broker);
    world.to_broker.switch_to(first);
    world.other_nodes[1].restart().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// The address of the node for a proxy.
fn address(node: &RabbitNode) -> String {
    format!("127.0.0.1:{}", node.amqp_port())
}
