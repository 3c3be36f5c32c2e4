//! The statements.

use std::sync::LazyLock;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::pool::PoolConnection;
use sqlx::postgres::types::PgInterval;
use sqlx::postgres::{PgArguments, PgPoolOptions, PgQueryResult};
use sqlx::query::Query;
use sqlx::{PgPool, Postgres};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::{Config, StoreStatus, monitor};

pub(crate) static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("../migrations");
    // A later version of ours may have migrated further while this process was running.
    migrations.set_ignore_missing(true);
    migrations
});

/// The server ends a statement after this time.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// And we give up on it shortly after, for a server that no longer answers at all.
const QUERY_TIMEOUT: Duration = Duration::from_secs(12);

/// Why the database did not do what it was asked, named after the operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("cannot migrate: {0}")]
    Migrate(#[source] MigrateError),
    /// The batch of sightings was not written, none of it.
    #[error("cannot record what was seen: {0}")]
    RecordSeen(#[source] sqlx::Error),
    /// The batch of stale rows was not deleted, none of it.
    #[error("cannot delete what is stale: {0}")]
    DeleteStale(#[source] sqlx::Error),
    /// The database did not answer a ping.
    #[error("no answer: {0}")]
    Ping(#[source] sqlx::Error),
    /// No outcome in time. What was asked may have been done all the same.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// An object that was online.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The object.
    pub id: i64,
    /// How long ago the status API said so.
    pub age: Duration,
}

/// The table `object` in Postgres. It may be away at any time, also at the start.
pub struct Store {
    pool: PgPool,
    status: watch::Receiver<StoreStatus>,
    _monitor: AbortOnDropHandle<()>,
}

impl Store {
    /// Starts to look after the database in the background: connects when it can be reached, brings
    /// the schema up to date, and does so again whenever it has been away. `name` is what
    /// `pg_stat_activity` shows.
    #[must_use]
    pub fn start(config: &Config, name: &str, connections: u32) -> Self {
        let options = config.options(name, STATEMENT_TIMEOUT);
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            // Short, because its caller tries again and a connection that comes back is found then.
            .acquire_timeout(Duration::from_secs(2))
            .connect_lazy_with(options.clone());
        let (sender, status) = watch::channel(Err(crate::NOT_YET.to_owned()));
        let monitor = AbortOnDropHandle::new(tokio::spawn(monitor::watch(options, sender)));
        Self { pool, status, _monitor: monitor }
    }

    /// Whether the database answers and has our schema.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<StoreStatus> {
        self.status.clone()
    }

    /// Notes that each object was online `age` ago by the database's clock, and never moves a row
    /// back. The ids must be distinct and in ascending order: batches that overlap in different
    /// orders would deadlock. All are committed on return.
    ///
    /// # Errors
    /// [`StoreError`]; then none is written, or, after a timeout, perhaps all.
    pub async fn record_seen(&self, sightings: &[Sighting]) -> Result<(), StoreError> {
        let asked_at = Instant::now();
        let connection = self.pool.acquire().await.map_err(StoreError::RecordSeen)?;
        // The ages have grown while a connection was waited for.
        let waited = asked_at.elapsed();
        let ids: Vec<i64> = sightings.iter().map(|seen| seen.id).collect();
        let ages: Vec<f64> =
            sightings.iter().map(|seen| (seen.age + waited).as_secs_f64()).collect();
        let query = sqlx::query(
            "INSERT INTO object AS seen (id, last_seen)
             SELECT id, now() - make_interval(secs => age)
             FROM unnest($1::bigint[], $2::float8[]) WITH ORDINALITY AS new (id, age, place)
             ORDER BY place
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
             WHERE seen.last_seen < excluded.last_seen OR seen.last_seen IS NULL",
        )
        .bind(ids)
        .bind(ages);
        execute(connection, query, StoreError::RecordSeen).await?;
        Ok(())
    }

    /// Deletes up to `limit` rows that are older than `ttl` by the database's clock, and says how
    /// many; fewer than `limit` means that no more are left that nobody else is busy with.
    ///
    /// A row that is being written at this moment is left out: it is not stale any more, or another
    /// replica deletes it. So this never waits for an upsert, and an upsert waits at most for the
    /// end of one such batch.
    ///
    /// # Errors
    /// [`StoreError`]; then none is deleted, or, after a timeout, perhaps all.
    pub async fn delete_stale(&self, ttl: Duration, limit: u32) -> Result<u64, StoreError> {
        let query = sqlx::query(
            "DELETE FROM object WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM object WHERE last_seen < now() - $1
                 LIMIT $2 FOR UPDATE SKIP LOCKED))",
        )
        .bind(interval(ttl))
        .bind(i64::from(limit));
        let connection = self.pool.acquire().await.map_err(StoreError::DeleteStale)?;
        let done = execute(connection, query, StoreError::DeleteStale).await?;
        Ok(done.rows_affected())
    }
}

/// Runs a statement with a deadline, which sqlx does not have. A connection that has missed it is
/// thrown away: back in the pool it would first have to answer a ping, without a deadline, and hold
/// its place there for as long as a silent peer leaves it open.
async fn execute(
    mut connection: PoolConnection<Postgres>,
    query: Query<'_, Postgres, PgArguments>,
    failed: fn(sqlx::Error) -> StoreError,
) -> Result<PgQueryResult, StoreError> {
    let Ok(done) = timeout(QUERY_TIMEOUT, query.execute(&mut *connection)).await else {
        drop(connection.detach());
        return Err(StoreError::Timeout(QUERY_TIMEOUT));
    };
    done.map_err(failed)
}

fn interval(duration: Duration) -> PgInterval {
    let microseconds = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    PgInterval { months: 0, days: 0, microseconds }
}
