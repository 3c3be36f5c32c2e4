//! Faults of the database.

use std::time::{Duration, Instant};

use pipeline::Partner;
use sqlx::{PgConnection, PgPool};
use testbed::eventually;
use tokio::task::JoinHandle;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::rows;
use crate::world::{PATIENCE, Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("database_killed", "database killed -9 under load, away for 5 s", killed)
            .in_make_test(),
        Case::new("database_stopped", "database stopped by `-m immediate`, three times", stopped),
        Case::new("database_silent", "database silent for 12 s (black hole)", silent),
        Case::new("database_read_only", "database read-only for 8 s", read_only),
        Case::new("database_disk_full", "database's disk full for 8 s", disk_full),
        Case::new(
            "database_failover",
            "standby promoted while the old primary lives on read-only, new connections led to it",
            failover,
        ),
        Case::new(
            "database_row_locked",
            "a row that is to be written locked for 6 s, then for 13 s, longer than a statement may take",
            row_locked,
        ),
        Case::new(
            "database_row_held",
            "one of 50 rows seen every second locked for 2 min, with a TTL of 5 s",
            row_held,
        ),
        Case::new(
            "database_deadlock",
            "batches deadlocked with another session, three times",
            deadlock,
        ),
        Case::new(
            "database_backend_terminated",
            "all our backends terminated, every 200 ms for 6 s",
            backend_terminated,
        ),
        Case::new("database_empty", "database killed -9, and back without anything in it", empty)
            .in_make_test(),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.database.kill().await;
    world.run_for(Duration::from_secs(5)).await;
    world.database.boot().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn stopped() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for _ in 0..3 {
        world.database.stop_immediately().await;
        world.run_for(Duration::from_secs(1)).await;
        world.database.boot().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::NOTHING).await
}

async fn silent() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    world.start_load().await;
    world.to_database.silence();
    world.run_for(Duration::from_secs(12)).await;
    world.to_database.restore();
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn read_only() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    execute(world.database.pool(), "ALTER SYSTEM SET default_transaction_read_only = on").await;
    execute(world.database.pool(), "SELECT pg_reload_conf()").await;
    terminate_backends(world.database.pool()).await;
    eventually("the consumer reports the read-only database", PATIENCE, async || {
        let (status, body) = world.consumers[0].get("/readyz").await;
        (status == 503 && body.contains("read-only")).then_some(())
    })
    .await;
    world.run_for(Duration::from_secs(8)).await;
    execute(world.database.pool(), "ALTER SYSTEM RESET default_transaction_read_only").await;
    execute(world.database.pool(), "SELECT pg_reload_conf()").await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

async fn failover() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    let standby = world.database.start_standby().await;
    world.start_load().await;
    world.database.demote().await;
    for process in world.consumers.iter().chain(&world.routine) {
        eventually("the service reports the read-only database", PATIENCE, async || {
            let (status, body) = process.get("/readyz").await;
            (status == 503 && body.contains("read-only")).then_some(())
        })
        .await;
    }
    world.run_for(Duration::from_secs(3)).await;
    standby.promote().await;
    world.to_database.switch_to(format!("127.0.0.1:{}", standby.port()));
    // The former primary keeps running and serves the connections that are still open.
    let _former = std::mem::replace(&mut world.database, standby);
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    world.finish(Allowed::NOTHING).await
}

async fn disk_full() -> Verdict {
    let mut world = World::start(Setup { small_database_disk: true, ..Setup::default() }).await;
    world.start_load().await;
    world.database.fill_small_disk().await;
    world.consumers[0].wait_for_log("No space left on device").await;
    world.run_for(Duration::from_secs(8)).await;
    world.database.clear_small_disk().await;
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

async fn row_locked() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    for hold in [Duration::from_secs(6), Duration::from_secs(13)] {
        let id = insert_rows_ahead_of_load(&mut world).await;
        let mut other =
            world.database.pool().begin().await.expect("the database should be reachable");
        lock(&mut other, id).await.expect("no other session should lock it yet");
        consumer_waits_for_a_lock(&world).await;
        world.run_for(hold).await;
        other.rollback().await.expect("the database should be reachable");
        world.wait_for_recovery().await;
        wait_until_row_is_written(&world, id).await;
    }
    world.consumers[0].wait_for_log("canceling statement due to lock timeout").await;
    world.finish(Allowed::NOTHING).await
}

// Field case 4.2
async fn row_held() -> Verdict {
    let held = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 120 });
    let routine = vec![("OBJECT_TTL", "5s")];
    let mut world = World::start(Setup { routine, ..Setup::default() }).await;
    rows::record_deletions(world.database.pool()).await;
    let repeated = RepeatedCallbacks::start(world.endpoint());
    repeated.wait_until_stored(world.database.pool()).await;
    let mut other = world.database.pool().begin().await.expect("the database should be reachable");
    lock(&mut other, RepeatedCallbacks::FIRST_ID)
        .await
        .expect("the row should be free for a moment");
    let mut fewest = usize::MAX;
    let until = Instant::now() + held;
    while Instant::now() < until {
        world.run_for(Duration::from_millis(500)).await;
        fewest = fewest.min(repeated.count_stored(world.database.pool()).await);
    }
    other.rollback().await.expect("the database should be reachable");
    world.start_load().await;
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if fewest < RepeatedCallbacks::COUNT {
        verdict
            .breaches
            .push(format!("of {} rows, only {fewest} stayed", RepeatedCallbacks::COUNT));
    }
    verdict
}

/// Posts callbacks about the same objects every second until it is dropped. The audit ignores them.
struct RepeatedCallbacks(JoinHandle<()>);

impl Drop for RepeatedCallbacks {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl RepeatedCallbacks {
    /// Even, so that they are online, and far from the others.
    const FIRST_ID: i64 = 2_000_000_000_000;
    const COUNT: usize = 50;

    fn ids() -> Vec<i64> {
        (Self::FIRST_ID..).step_by(2).take(Self::COUNT).collect()
    }

    fn start(endpoint: String) -> Self {
        let post = async move {
            let (partner, ids) = (Partner::default(), Self::ids());
            let mut ticks = tokio::time::interval(Duration::from_secs(1));
            loop {
                ticks.tick().await;
                partner.post(&endpoint, &ids).await;
            }
        };
        Self(tokio::spawn(post))
    }

    async fn wait_until_stored(&self, pool: &PgPool) {
        eventually("the repeated objects are in the table", PATIENCE, async || {
            (self.count_stored(pool).await == Self::COUNT).then_some(())
        })
        .await;
    }

    async fn count_stored(&self, pool: &PgPool) -> usize {
        assert!(!self.0.is_finished(), "the callbacks should continue");
        let count = "SELECT count(*) FROM object WHERE id = ANY($1)";
        let count = sqlx::query_scalar(count).bind(Self::ids()).fetch_one(pool);
        let count: i64 = count.await.expect("the database should be reachable");
        usize::try_from(count).unwrap_or_default()
    }
}

async fn deadlock() -> Verdict {
    // Puts two ids of the same callback into one batch.
    let consumer = vec![("WRITE_BATCH_LINGER", "500ms")];
    let mut world = World::start(Setup { consumer, ..Setup::default() }).await;
    world.start_load().await;
    // Shorter than the lock timeout of the consumer.
    execute(world.database.pool(), "ALTER SYSTEM SET deadlock_timeout = '100ms'").await;
    execute(world.database.pool(), "SELECT pg_reload_conf()").await;
    while deadlocks(world.database.pool()).await < 3 {
        let id = insert_rows_ahead_of_load(&mut world).await;
        let mut other =
            world.database.pool().begin().await.expect("the database should be reachable");
        // Makes the consumer detect the deadlock, so that it is the victim.
        execute(&mut *other, "SET LOCAL deadlock_timeout = '1min'").await;
        lock(&mut other, id + 2).await.expect("no other session should lock it yet");
        consumer_waits_for_a_lock(&world).await;
        // A batch with both rows has locked the lower one by now, and waits for the higher one. If
        // the rows are in different batches, there is no deadlock this time.
        lock(&mut other, id).await.expect("the consumer should have been the victim");
        other.rollback().await.expect("the database should be reachable");
        wait_until_row_is_written(&world, id).await;
        wait_until_row_is_written(&world, id + 2).await;
    }
    world.wait_for_recovery().await;
    world.finish(Allowed::NOTHING).await
}

async fn backend_terminated() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    let mut terminated = 0;
    for _ in 0..30 {
        terminated += terminate_backends(world.database.pool()).await;
        world.run_for(Duration::from_millis(200)).await;
    }
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    // Both services reconnect each time, but not always within 200 ms.
    if terminated < 20 {
        verdict.breaches.push(format!("only {terminated} backends were terminated"));
    }
    verdict
}

async fn empty() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    world.replace_database().await;
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    world.finish(Allowed::NOTHING).await
}

/// Inserts two rows, last seen a while ago, whose ids the load will post in one callback in about a
/// second. Returns the first id; the other one is two higher.
async fn insert_rows_ahead_of_load(world: &mut World) -> i64 {
    let ahead = i64::from(world.rate().callbacks * world.rate().ids) * 3 / 2;
    // The first even id of a callback.
    let id = (world.next_id() + ahead) / 10 * 10 + 6;
    let rows = "INSERT INTO object SELECT id, now() - interval '10 min'
                FROM generate_series($1, $1 + 2, 2) AS id";
    let written = sqlx::query(rows).bind(id).execute(world.database.pool()).await;
    written.expect("the load should not have posted these ids yet");
    id
}

async fn lock(connection: &mut PgConnection, id: i64) -> Result<(), sqlx::Error> {
    let lock = "SELECT FROM object WHERE id = $1 FOR UPDATE";
    sqlx::query(lock).bind(id).execute(connection).await.map(drop)
}

async fn consumer_waits_for_a_lock(world: &World) {
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE application_name = 'consumer' AND wait_event_type = 'Lock'";
    eventually("the consumer waits for a lock", PATIENCE, async || {
        let waiting = sqlx::query_scalar(waiting).fetch_one(world.database.pool());
        let waiting: i64 = waiting.await.expect("the database should be reachable");
        (waiting > 0).then_some(())
    })
    .await;
}

/// Waits until the consumer has written a row of [`insert_rows_ahead_of_load`]. The audit cannot
/// check this, because it finds the inserted row.
async fn wait_until_row_is_written(world: &World, id: i64) {
    let seen = "SELECT last_seen > now() - interval '5 min' FROM object WHERE id = $1";
    eventually("the formerly locked row is written", PATIENCE, async || {
        let seen = sqlx::query_scalar(seen).bind(id).fetch_one(world.database.pool());
        let seen: bool = seen.await.expect("the row should exist");
        seen.then_some(())
    })
    .await;
}

/// The number of deadlocks that the server has detected in this database.
async fn deadlocks(pool: &PgPool) -> i64 {
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    sqlx::query_scalar(deadlocks).fetch_one(pool).await.expect("the database should be reachable")
}

/// Terminates all backends of our services, and returns their number.
async fn terminate_backends(pool: &PgPool) -> i64 {
    let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                     WHERE application_name IN ('consumer', 'routine')";
    sqlx::query_scalar(terminate).fetch_one(pool).await.expect("the database should be reachable")
}

async fn execute(connection: impl sqlx::PgExecutor<'_>, sql: &'static str) {
    let done = sqlx::query(sql).execute(connection).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error}"));
}
