//! Faults of the routine, and of the database's clock that it uses.

use std::time::Duration;

use testbed::{DatabaseClock, eventually};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::rows;
use crate::world::{PATIENCE, Setup, World};

const HOUR: Duration = Duration::from_hours(1);
/// `OBJECT_TTL` in cases in which rows become stale.
const TTL: Duration = Duration::from_secs(4);
/// How long a row may be stale: `ROUTINE_INTERVAL`, which is 500 ms here, and time for a busy
/// machine.
const MARGIN: Duration = Duration::from_secs(3);

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("routine_killed", "one of two routines killed -9 under load", one_of_two_killed),
        Case::new(
            "routine_without_database",
            "database unreachable for 8 s while rows become stale",
            without_database,
        ),
        Case::new("clock_ahead", "database's clock an hour ahead for 6 s", clock_ahead)
            .in_make_test(),
        Case::new(
            "clock_at_start",
            "routine started right after the database's clock was set an hour ahead",
            clock_set_before_start,
        ),
        Case::new("clock_back", "database's clock an hour back for 6 s", clock_back),
    ]
}

async fn one_of_two_killed() -> Verdict {
    let mut world = World::start(short_ttl()).await;
    rows::record_deletions(world.database.pool()).await;
    let other = world.spawn_routine();
    other.ready().await;
    world.start_load().await;
    let first = world.routine.replace(other).expect("there should be a routine");
    wait_until_deleted(&world, 500).await;
    first.kill();
    first.wait().await;
    world.wait_for_recovery().await;
    world.run_for(TTL + MARGIN).await;
    let oldest = rows::oldest(world.database.pool()).await;
    let ages = rows::ages_when_deleted(world.database.pool()).await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    let (youngest, oldest_deleted) = ages.expect("rows should have been deleted");
    verdict.breaches.extend(
        early_deletion_breach(youngest).into_iter().chain(late_deletion_breach(oldest_deleted)),
    );
    verdict.breaches.extend(late_deletion_breach(oldest));
    verdict
}

async fn without_database() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..short_ttl() }).await;
    rows::record_deletions(world.database.pool()).await;
    world.start_load().await;
    wait_until_deleted(&world, 500).await;
    world.to_database.cut();
    wait_until_not_ready(&world).await;
    let before = rows::deleted(world.database.pool()).await;
    world.run_for(Duration::from_secs(8)).await;
    assert_eq!(
        rows::deleted(world.database.pool()).await,
        before,
        "no routine should reach the database"
    );
    world.to_database.restore();
    world.wait_for_recovery().await;
    // Sightings from the outage are written late and soon stale. All of these rows must be deleted.
    world.run_for(TTL + MARGIN).await;
    let oldest = rows::oldest(world.database.pool()).await;
    let ages = rows::ages_when_deleted(world.database.pool()).await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    let (youngest, _) = ages.expect("rows should have been deleted");
    verdict
        .breaches
        .extend(early_deletion_breach(youngest).into_iter().chain(late_deletion_breach(oldest)));
    verdict
}

/// The audit expects each row that was written, and counts a deleted one as lost.
async fn clock_ahead() -> Verdict {
    let (mut world, clock) = start_with_clock().await;
    clock.set_ahead(HOUR).await;
    let routine = world.routine.as_ref().expect("there should be a routine");
    routine.wait_for_log("stepped ahead").await;
    world.run_for(Duration::from_secs(6)).await;
    clock.reset().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

/// Field case 3.11. The new routine has no earlier reading of the clock, and pauses for longer than
/// the case takes.
async fn clock_set_before_start() -> Verdict {
    let (mut world, clock) = start_with_clock().await;
    let routine = world.routine.take().expect("there should be a routine");
    routine.kill();
    routine.wait().await;
    clock.set_ahead(HOUR).await;
    let routine = world.spawn_routine();
    routine.wait_for_log("most rows look stale").await;
    world.routine = Some(routine);
    world.run_for(Duration::from_secs(4)).await;
    clock.reset().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

/// Rows written while the clock is behind look an hour old when the clock is correct again.
async fn clock_back() -> Verdict {
    let (mut world, clock) = start_with_clock().await;
    clock.set_behind(HOUR).await;
    world.run_for(Duration::from_secs(6)).await;
    clock.reset().await;
    let routine = world.routine.as_ref().expect("there should be a routine");
    routine.wait_for_log("stepped ahead").await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

/// A world under load, in which no row becomes stale while the database's clock is correct.
async fn start_with_clock() -> (World, DatabaseClock) {
    let routine = vec![("OBJECT_TTL", "30m")];
    let mut world = World::start_servers(Setup { routine, ..Setup::default() }).await;
    let clock = DatabaseClock::install(world.database.pool()).await;
    world.start_services();
    world.wait_until_ready().await;
    world.start_load().await;
    (world, clock)
}

/// A setup in which rows soon become stale.
fn short_ttl() -> Setup {
    Setup { routine: vec![("OBJECT_TTL", "4s")], ..Setup::default() }
}

async fn wait_until_deleted(world: &World, count: i64) {
    eventually("rows are deleted", PATIENCE, async || {
        (rows::deleted(world.database.pool()).await >= count).then_some(())
    })
    .await;
}

/// Waits until the routine reports that the database is away.
async fn wait_until_not_ready(world: &World) {
    let routine = world.routine.as_ref().expect("there should be a routine");
    eventually("the routine reports the missing database", PATIENCE, async || {
        let (status, body) = routine.get("/readyz").await;
        (status == 503 && body.contains("database")).then_some(())
    })
    .await;
}

fn early_deletion_breach(youngest: Duration) -> Option<String> {
    (youngest < TTL).then(|| format!("a row was deleted {youngest:.1?} after it was seen"))
}

fn late_deletion_breach(oldest: Duration) -> Option<String> {
    (oldest > TTL + MARGIN).then(|| format!("a row was still there {oldest:.1?} after it was seen"))
}
