//! Faults of the routine, and of the database's clock that it uses.

use std::time::Duration;

use testkit::{DatabaseClock, wait_until};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::rows;
use crate::setup::Setup;
use crate::world::World;

const HOUR: Duration = Duration::from_hours(1);
/// `OBJECT_TTL` in cases in which rows become stale.
const TTL: Duration = Duration::from_secs(4);
/// How long a row may be stale: `ROUTINE_INTERVAL`, which is 500 ms here, and time for a busy
/// machine.
const MARGIN: Duration = Duration::from_secs(3);

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("routine_killed", one_of_two_killed)
            .fault("one of two routines killed -9 under load"),
        Case::new("routine_without_database", without_database)
            .fault("database unreachable for 8 s while rows become stale"),
        Case::new("clock_ahead", clock_ahead)
            .fault("database's clock an hour ahead for 6 s")
            .in_make_test(),
        Case::new("clock_at_start", clock_set_before_start)
            .fault("routine started right after the database's clock was set an hour ahead"),
        Case::new("clock_back", clock_back).fault("database's clock an hour back for 6 s"),
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
    world.wait_for_recovery().await;
    world.run_for(TTL + MARGIN).await;
    let oldest = rows::oldest(world.database.pool()).await;
    let ages = rows::ages_when_deleted(world.database.pool()).await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    let (youngest, oldest_deleted) = ages.expect("rows should have been deleted");
    require_timely_deletions(&mut verdict, youngest, oldest.max(oldest_deleted));
    verdict
}

async fn without_database() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..short_ttl() }).await;
    rows::record_deletions(world.database.pool()).await;
    world.start_load().await;
    wait_until_deleted(&world, 500).await;
    world.to_database.cut();
    world.routine().wait_until_unready(&["database"]).await;
    let before = rows::deleted(world.database.pool()).await;
    world.run_for(Duration::from_secs(8)).await;
    assert_eq!(
        rows::deleted(world.database.pool()).await,
        before,
        "no routine should reach the database"
    );
    world.to_database.restore();
    world.wait_for_recovery().await;
    // Sightings from the outage are written late, so that their rows are soon stale. The routine
    // must delete all of these rows.
    world.run_for(TTL + MARGIN).await;
    let oldest = rows::oldest(world.database.pool()).await;
    let ages = rows::ages_when_deleted(world.database.pool()).await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    let (youngest, _) = ages.expect("rows should have been deleted");
    require_timely_deletions(&mut verdict, youngest, oldest);
    verdict
}

/// The routine must delete nothing: the audit counts each deleted row as lost.
async fn clock_ahead() -> Verdict {
    let (world, clock) = start_with_clock().await;
    clock.set_ahead(HOUR).await;
    world.routine().wait_for_log("stepped ahead").await;
    world.run_for(Duration::from_secs(6)).await;
    clock.reset().await;
    world.recover_and_finish(Allowed::NOTHING).await
}

/// Field case 3.11. The new routine has no earlier reading of the clock, and pauses for longer than
/// the case takes.
async fn clock_set_before_start() -> Verdict {
    let (mut world, clock) = start_with_clock().await;
    world.routine().kill();
    clock.set_ahead(HOUR).await;
    let routine = world.spawn_routine();
    routine.wait_for_log("most rows look stale").await;
    world.routine = Some(routine);
    world.run_for(Duration::from_secs(4)).await;
    clock.reset().await;
    world.recover_and_finish(Allowed::NOTHING).await
}

/// Rows written while the clock is behind look an hour old when the clock is correct again.
async fn clock_back() -> Verdict {
    let (world, clock) = start_with_clock().await;
    clock.set_behind(HOUR).await;
    world.run_for(Duration::from_secs(6)).await;
    clock.reset().await;
    world.routine().wait_for_log("stepped ahead").await;
    world.recover_and_finish(Allowed::NOTHING).await
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
    wait_until("rows are deleted", async || rows::deleted(world.database.pool()).await >= count)
        .await;
}

/// Checks the ages of the youngest deleted row and of the oldest row.
fn require_timely_deletions(verdict: &mut Verdict, youngest: Duration, oldest: Duration) {
    verdict.require(youngest >= TTL, format!("a row was deleted {youngest:.1?} after it was seen"));
    let breach = format!("a row was still there {oldest:.1?} after it was seen");
    verdict.require(oldest <= TTL + MARGIN, breach);
}
