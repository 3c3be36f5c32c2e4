//! What happens to the producer.

use std::fs;
use std::time::Duration;

use testbed::{eventually, fill_disk};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::world::{PATIENCE, Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("producer_killed", "the only producer killed -9 under load, five times", killed)
            .in_make_test(),
        Case::new(
            "producer_lost_with_broker",
            "broker down, and the only producer killed -9 under load three times; once more while it relays what it spooled",
            killed_without_broker,
        )
        .in_make_test(),
        Case::new("spool_full", "the spool's disk full for 10 s, broker up", disk_full),
        Case::new(
            "spool_and_broker_full",
            "the spool's disk full while the broker is down, and still full when that is back",
            disk_full_without_broker,
        )
        .in_make_test(),
        Case::new(
            "spool_unwritable",
            "the spool's directory cannot be written at the producer's start, and can be 8 s later",
            unwritable,
        ),
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

/// The spool must have all that it had before the kill, each time. The last kill is meant for the relay:
/// what it has under way to the broker then must still be in the spool.
async fn killed_without_broker() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.comes_under_load().await;
    world.broker.kill().await;
    let mut least = 1.0;
    for _ in 0..3 {
        world.spools(least).await;
        world.stays(Duration::from_secs(2)).await;
        let spooled = world.spooled().await;
        world.producer_is_killed().await;
        world.producer_is_back().await;
        // It takes callbacks before it has told of its spool.
        world.spools(1.0).await;
        let found = world.spooled().await;
        assert!(found >= spooled, "of {spooled} messages in the spool, {found} survived the kill");
        least = found + 1.0;
    }
    world.broker.boot().await;
    world.relays_some().await;
    world.producer_is_killed().await;
    world.producer_is_back().await;
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}

async fn disk_full() -> Verdict {
    let mut world = World::start(on_a_small_disk()).await;
    world.comes_under_load().await;
    let filling = fill_disk(world.producer(), &world.spool());
    world.stays(Duration::from_secs(10)).await;
    fs::remove_file(filling).expect("the filling should be there");
    world.recovers().await;
    world.settles(Allowed::NOTHING).await
}

async fn disk_full_without_broker() -> Verdict {
    let mut world = World::start(on_a_small_disk()).await;
    world.comes_under_load().await;
    world.broker.kill().await;
    world.spools(1_000.0).await;
    let filling = fill_disk(world.producer(), &world.spool());
    eventually("the producer says that its disk is full", PATIENCE, async || {
        let (status, reason) = world.producer().get("/readyz").await;
        (status == 503 && reason.contains("disk is full")).then_some(())
    })
    .await;
    world.stays(Duration::from_secs(5)).await;
    world.broker.boot().await;
    world.recovers().await;
    world.relays_all().await;
    fs::remove_file(filling).expect("the filling should be there");
    // While the broker is away and the disk is full, no durable place is left.
    world.settles(Allowed { not_2xx: true, ..Allowed::REPEATS }).await
}

/// Where the spool's directory should be there is a file: root may write into every directory.
async fn unwritable() -> Verdict {
    let mut world = World::servers(Setup::default()).await;
    fs::write(world.spool(), "in the way").expect("a scratch directory should be writable");
    world.start_services();
    world.is_ready().await;
    world.comes_under_load().await;
    let (_, ready) = world.producer().get("/readyz").await;
    assert!(ready.contains("without spool: "), "{ready}");
    world.stays(Duration::from_secs(4)).await;
    fs::remove_file(world.spool()).expect("the file should still be in the way");
    eventually("the producer has its spool", PATIENCE, async || {
        let (_, ready) = world.producer().get("/readyz").await;
        (!ready.contains("without spool: ")).then_some(())
    })
    .await;
    // It serves from now on.
    world.broker.kill().await;
    world.spools(100.0).await;
    world.broker.boot().await;
    world.recovers().await;
    world.settles(Allowed::REPEATS).await
}

fn on_a_small_disk() -> Setup {
    Setup { small_spool_disk: true, ..Setup::default() }
}
