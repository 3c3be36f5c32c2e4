//! What happens to the status API.

use std::time::Duration;

use testbed::Answer;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("status_api_down", "status API down for 20 s", down).in_make_test(),
        Case::new("status_api_500", "status API answers all with 500 for 10 s", answering_500),
    ]
}

async fn down() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    world.status_api.goes_down();
    world.stays(Duration::from_secs(20)).await;
    world.status_api.comes_back();
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}

async fn answering_500() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    world.status_api.misbehaves(|_| Answer::Status(500));
    world.stays(Duration::from_secs(10)).await;
    world.status_api.behaves();
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}
