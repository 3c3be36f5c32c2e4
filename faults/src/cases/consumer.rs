//! What happens to the consumers.

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("consumer_killed", "the only consumer killed -9 under load, five times", killed)
            .in_make_test(),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    for _ in 0..5 {
        let killed = world.consumers.remove(0);
        killed.kill();
        killed.wait().await;
        world.consumers.push(world.spawn_consumer());
        world.recovers().await;
    }
    world.settles(Allowed::REPEATS).await
}
