//! Faults of the database.

use std::time::{Duration, Instant};

use sqlx::{PgConnection, PgPool};
use testkit::{Partner, wait_until};
use tokio::task::JoinHandle;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::rows;
use crate::setup::{DatabaseSetup, Setup};
use crate::world::World;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("database_killed", killed).fault("database killed -9 under load, away for 5 s").in_make_test(),
        Case::new("database_stopped", stopped).fault("database stopped by `-m immediate`, three times"),
        Case::new("database_silent", silent).fault("database silent for 12 s (black hole)"),
        Case::new("database_read_only", read_only).fault("database read-only for 8 s"),
        Case::new("database_disk_full", disk_full).fault("database's disk full for 8 s"),
        Case::new("database_failover", failover).fault("standby promoted while the old primary lives on read-only, new connections led to it"),
        Case::new("database_promotion", promotion).fault("database made read-only while alive, its synchronous standby promoted; the services know both"),
        Case::new("database_row_locked", row_locked).fault("a row that is to be written locked for 6 s, then for 13 s, longer than a statement may take"),
        Case::new("database_row_held", row_held).fault("one of 50 rows seen every second locked for 2 min, with a TTL of 5 s"),
        Case::new("database_deadlock", deadlock).fault("batches deadlocked with another session, three times"),
        Case::new("database_backend_terminated", backend_terminated).fault("all our backends terminated, every 200 ms for 6 s"),
        Case::new("database_empty", empty).fault("database killed -9, and back without anything in it").in_make_test(),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.database.kill().await;
    world.run_for(Duration::from_secs(5)).await;
    world.database.boot().await;
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn stopped() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..3 {
        world.database.stop_immediately().await;
        world.run_for(Duration::from_secs(1)).await;
        world.database.boot().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::NOTHING).await
}

async fn silent() -> Verdict {
    let world = World::under_load(Setup { has_proxies: true, ..Setup::default() }).await;
    world.to_database.silence();
    world.run_for(Duration::from_secs(12)).await;
    world.to_database.restore();
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn read_only() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    world.database.configure("ALTER SYSTEM SET default_transaction_read_only = on").await;
    terminate_backends(world.database.pool()).await;
    world.consumers[0].wait_until_unready(&["read-only"]).await;
    world.run_for(Duration::from_secs(8)).await;
    world.database.configure("ALTER SYSTEM RESET default_transaction_read_only").await;
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn failover() -> Verdict {
    let mut world = World::start(Setup { has_proxies: true, ..Setup::default() }).await;
    let standby = world.database.start_standby().await;
    world.start_load().await;
    world.database.demote().await;
    for process in world.consumers.iter().chain(&world.routine) {
        process.wait_until_unready(&["read-only"]).await;
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

async fn promotion() -> Verdict {
    let setup = Setup { database: DatabaseSetup::WithStandby, ..Setup::default() };
    let mut world = World::under_load(setup).await;
    let standby = world.standby.take().expect("the setup has a standby");
    world.database.demote().await;
    standby.promote().await;
    // The former primary keeps running, and does not accept writes.
    let former = std::mem::replace(&mut world.database, standby);
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    let connected = connections_of_services(former.pool()).await;
    let allowed = Allowed { recovery: Duration::from_secs(5), ..Allowed::NOTHING };
    let mut verdict = world.finish(allowed).await;
    verdict.require(connected == 0, format!("{connected} connections led to the old primary"));
    verdict
}

async fn disk_full() -> Verdict {
    let world =
        World::under_load(Setup { database: DatabaseSetup::OnSmallDisk, ..Setup::default() }).await;
    world.database.fill_small_disk().await;
    world.consumers[0].wait_for_log("No space left on device").await;
    world.run_for(Duration::from_secs(8)).await;
    world.database.clear_small_disk().await;
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn row_locked() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for hold in [Duration::from_secs(6), Duration::from_secs(13)] {
        let id = insert_rows_ahead_of_load(&mut world).await;
        let mut other_session =
            world.database.pool().begin().await.expect("the database should be reachable");
        lock(&mut other_session, id).await.expect("no other session should lock it yet");
        wait_until_consumer_is_blocked(&world).await;
        world.run_for(hold).await;
        other_session.rollback().await.expect("the database should be reachable");
        world.wait_for_recovery().await;
        wait_until_row_is_written(&world, id).await;
    }
    world.consumers[0].wait_for_log("canceling statement due to lock timeout").await;
    world.finish(Allowed::NOTHING).await
}

// Field case 4.2
async fn row_held() -> Verdict {
    let hold_duration = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 120 });
    let routine = vec![("OBJECT_TTL", "5s")];
    let mut world = World::start(Setup { routine, ..Setup::default() }).await;
    rows::record_deletions(world.database.pool()).await;
    let repeated = RepeatedCallbacks::start(world.endpoint());
    repeated.wait_until_stored(world.database.pool()).await;
    let mut other_session =
        world.database.pool().begin().await.expect("the database should be reachable");
    lock(&mut other_session, RepeatedCallbacks::FIRST_ID)
        .await
        .expect("the row should be free for a moment");
    let mut fewest = usize::MAX;
    let until = Instant::now() + hold_duration;
    while Instant::now() < until {
        world.run_for(Duration::from_millis(500)).await;
        fewest = fewest.min(repeated.count_stored(world.database.pool()).await);
    }
    other_session.rollback().await.expect("the database should be reachable");
    world.start_load().await;
    let mut verdict = world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await;
    let count = RepeatedCallbacks::COUNT;
    verdict.require(fewest >= count, format!("of {count} rows, only {fewest} stayed"));
    verdict
}

/// Posts a callback about the same objects every second until this value is dropped. The audit
/// ignores these callbacks.
struct RepeatedCallbacks(JoinHandle<()>);

impl Drop for RepeatedCallbacks {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl RepeatedCallbacks {
    /// Even, so that the objects are online, and far from the ids of the load and the probes.
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
        wait_until("the repeated objects are in the table", async || {
            self.count_stored(pool).await == Self::COUNT
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
    let mut world = World::under_load(Setup { consumer, ..Setup::default() }).await;
    // This must be shorter than the lock timeout of the consumer.
    world.database.configure("ALTER SYSTEM SET deadlock_timeout = '100ms'").await;
    while deadlocks(world.database.pool()).await < 3 {
        let id = insert_rows_ahead_of_load(&mut world).await;
        let mut other_session =
            world.database.pool().begin().await.expect("the database should be reachable");
        // Postgres aborts the transaction of the session that detects the deadlock first. This
        // makes the consumer's session detect it.
        let set =
            sqlx::query("SET LOCAL deadlock_timeout = '1min'").execute(&mut *other_session).await;
        set.expect("a superuser may change this setting");
        lock(&mut other_session, id + 2).await.expect("no other session should lock it yet");
        wait_until_consumer_is_blocked(&world).await;
        // A batch with both rows has locked the lower one by now, and waits for the higher one. If
        // the rows are in different batches, there is no deadlock this time.
        lock(&mut other_session, id).await.expect("the consumer should have been the victim");
        other_session.rollback().await.expect("the database should be reachable");
        wait_until_row_is_written(&world, id).await;
        wait_until_row_is_written(&world, id + 2).await;
    }
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn backend_terminated() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    let mut terminated = 0;
    for _ in 0..30 {
        terminated += terminate_backends(world.database.pool()).await;
        world.run_for(Duration::from_millis(200)).await;
    }
    let mut verdict = world.recover_and_finish(Allowed::NOTHING).await;
    // Both services reconnect each time, but not always within 200 ms.
    verdict.require(terminated >= 20, format!("only {terminated} backends were terminated"));
    verdict
}

async fn empty() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.replace_database().await;
    world.wait_for_recovery().await;
    world.wait_until_ready().await;
    world.finish(Allowed::NOTHING).await
}

/// Inserts two rows, last seen a while ago, whose ids the load will post in one callback in about a
/// second. Returns the first id; the other one is two higher.
async fn insert_rows_ahead_of_load(world: &mut World) -> i64 {
    let ahead = i64::from(world.setup.rate.callbacks * world.setup.rate.ids) * 3 / 2;
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

async fn wait_until_consumer_is_blocked(world: &World) {
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE application_name = 'consumer' AND wait_event_type = 'Lock'";
    wait_until("the consumer waits for a lock", async || {
        let waiting = sqlx::query_scalar(waiting).fetch_one(world.database.pool());
        let waiting: i64 = waiting.await.expect("the database should be reachable");
        waiting > 0
    })
    .await;
}

/// Waits until the consumer has written a row of [`insert_rows_ahead_of_load`]. The audit does not
/// check this, because it cannot distinguish the consumer's row from the inserted one.
async fn wait_until_row_is_written(world: &World, id: i64) {
    let seen = "SELECT last_seen > now() - interval '5 min' FROM object WHERE id = $1";
    wait_until("the formerly locked row is written", async || {
        let seen = sqlx::query_scalar(seen).bind(id).fetch_one(world.database.pool());
        let seen: bool = seen.await.expect("the row should exist");
        seen
    })
    .await;
}

/// The number of deadlocks that the server has detected in this database.
async fn deadlocks(pool: &PgPool) -> i64 {
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    sqlx::query_scalar(deadlocks).fetch_one(pool).await.expect("the database should be reachable")
}

/// The number of backends of our services.
async fn connections_of_services(pool: &PgPool) -> i64 {
    let count = "SELECT count(*) FROM pg_stat_activity
                 WHERE application_name IN ('consumer', 'routine')";
    sqlx::query_scalar(count).fetch_one(pool).await.expect("the database should be reachable")
}

/// Terminates all backends of our services, and returns their number.
async fn terminate_backends(pool: &PgPool) -> i64 {
    let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                     WHERE application_name IN ('consumer', 'routine')";
    sqlx::query_scalar(terminate).fetch_one(pool).await.expect("the database should be reachable")
}
