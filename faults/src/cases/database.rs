//! What happens to the database.

use std::time::Duration;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("database_killed", "database killed -9 under load, away for 5 s", killed)
            .in_make_test(),
        Case::new("database_silent", "database silent for 12 s (black hole)", silent),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    world.database.kill().await;
    world.stays(Duration::from_secs(5)).await;
    world.database.boot().await;
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}

async fn silent() -> Verdict {
    let mut world = World::start(Setup { through_proxies: true, ..Setup::default() }).await;
    world.comes_under_load().await;
    world.to_database.silence();
    world.stays(Duration::from_secs(12)).await;
    world.to_database.restore();
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}
