//! What happens to the broker.

use std::time::Duration;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("broker_killed", "broker killed -9 under load, three times", killed)
            .in_make_test(),
        Case::new("broker_silent", "broker silent for 12 s (black hole)", silent),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    for _ in 0..3 {
        world.broker.kill().await;
        world.broker.boot().await;
        world.recovers().await;
    }
    world.settles(Allowed::REPEATS).await
}

async fn silent() -> Verdict {
    let mut world = World::start(Setup { through_proxies: true, ..Setup::default() }).await;
    world.comes_under_load().await;
    world.to_broker.silence();
    // Longer than two heartbeats, so that both sides give the connections up.
    world.stays(Duration::from_secs(12)).await;
    world.to_broker.restore();
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}
