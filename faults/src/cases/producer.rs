//! What happens to the producer.

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("producer_killed", "the only producer killed -9 under load, five times", killed)
            .in_make_test(),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    for _ in 0..5 {
        world.producer_is_killed().await;
        world.producer_is_back().await;
        world.recovers().await;
    }
    world.settles(Allowed::REPEATS).await
}
