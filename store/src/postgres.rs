//! The table in a Postgres.

mod monitor;
mod timestamp;

use std::sync::LazyLock;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{ConnectOptions as _, FromRow, PgConnection, PgPool, Postgres};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::deadline::{CONNECT_TIMEOUT, QUERY_TIMEOUT, within};
use crate::{Moment, Object, Recorded, Row, Sighting, StoreError, StoreStatus};

use timestamp::Timestamp;

static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("../migrations");
    // A later version of ours may have migrated further while this process was running.
    migrations.set_ignore_missing(true);
    migrations
});

/// The server itself ends a statement after this time, so that it does not outlive its caller's
/// patience, which is [`QUERY_TIMEOUT`].
const STATEMENT_TIMEOUT: &str = "10s";

/// The table. It may be away at any time, also at the start.
pub(crate) struct Table {
    pool: PgPool,
    status: watch::Receiver<StoreStatus>,
    _monitor: AbortOnDropHandle<()>,
}

impl Table {
    pub(crate) fn start(options: PgConnectOptions, name: &str, connections: u32) -> Self {
        let options = named(options, name);
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            // Short, because its caller tries again and a connection that comes back is found then.
            .acquire_timeout(Duration::from_secs(2))
            // It would cost each batch a round trip more. A connection that is gone fails the statement, and
            // every caller tries again.
            .test_before_acquire(false)
            .connect_lazy_with(options.clone());
        let (sender, status) = watch::channel(Err(monitor::NOT_YET.to_owned()));
        Self::watched(pool, status, monitor::watch(options, sender))
    }

    fn watched(
        pool: PgPool,
        status: watch::Receiver<StoreStatus>,
        monitor: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Self { pool, status, _monitor: AbortOnDropHandle::new(tokio::spawn(monitor)) }
    }

    pub(crate) fn status(&self) -> watch::Receiver<StoreStatus> {
        self.status.clone()
    }

    /// Returns only if the monitor has died, and the status with it.
    pub(crate) async fn died(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }

    pub(crate) async fn record_seen(&self, sightings: &[Sighting]) -> Result<Recorded, StoreError> {
        let asked_at = Instant::now();
        let connection =
            self.pool.acquire().await.map_err(|error| StoreError::RecordSeen(error.into()))?;
        // The ages have grown while a connection was waited for.
        let waited = asked_at.elapsed();
        let ids: Vec<i64> = sightings.iter().map(|seen| seen.id).collect();
        let ages: Vec<f64> =
            sightings.iter().map(|seen| seen.age.saturating_add(waited).as_secs_f64()).collect();
        let query = sqlx::query(
            "INSERT INTO object AS seen (id, last_seen)
             SELECT id, to_timestamp(greatest(date_part('epoch', now()) - age, 0))
             FROM unnest($1::bigint[], $2::float8[]) WITH ORDINALITY AS new (id, age, place)
             ORDER BY place
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
             WHERE seen.last_seen < excluded.last_seen OR seen.last_seen IS NULL
             -- An update has locked the row that was there, of which the new one keeps the trace.
             RETURNING id, last_seen, xmax = 0",
        )
        .bind(ids)
        .bind(ages);
        let rows: Vec<(i64, Timestamp, bool)> =
            fetch_all(connection, query, recording_failed).await?;
        let mut recorded = Recorded::default();
        for (id, last_seen, is_new) in rows {
            let list = if is_new { &mut recorded.inserted } else { &mut recorded.updated };
            list.push(Row { id, last_seen: last_seen.into() });
        }
        Ok(recorded)
    }

    pub(crate) async fn now(&self) -> Result<Moment, StoreError> {
        let mut connection =
            self.pool.acquire().await.map_err(|error| StoreError::Clock(error.into()))?;
        let read = sqlx::query_scalar("SELECT extract(epoch FROM now())::float8");
        let Ok(read) = timeout(QUERY_TIMEOUT, read.fetch_one(&mut *connection)).await else {
            drop(connection.detach());
            return Err(StoreError::Timeout(QUERY_TIMEOUT));
        };
        let seconds: f64 = read.map_err(|error| StoreError::Clock(error.into()))?;
        let since_1970 = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Ok(Moment { since_1970 })
    }

    pub(crate) async fn delete_stale(
        &self,
        oldest: Moment,
        limit: u32,
    ) -> Result<Vec<Row>, StoreError> {
        let query = sqlx::query(
            "DELETE FROM object WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM object
                 WHERE last_seen < to_timestamp($1)
                 LIMIT $2 FOR UPDATE SKIP LOCKED))
             RETURNING id, last_seen",
        )
        .bind(oldest.since_1970.as_secs_f64())
        .bind(i64::from(limit));
        let connection =
            self.pool.acquire().await.map_err(|error| StoreError::DeleteStale(error.into()))?;
        let rows: Vec<(i64, Timestamp)> =
            fetch_all(connection, query, |error| StoreError::DeleteStale(error.into())).await?;
        let gone = |(id, last_seen): (i64, Timestamp)| Row { id, last_seen: last_seen.into() };
        Ok(rows.into_iter().map(gone).collect())
    }
}

/// Runs a statement with a deadline, which sqlx does not have, for the rows that it returns. A connection that has missed it is
/// thrown away: back in the pool it would first have to answer a ping, without a deadline, and hold
/// its place there for as long as a silent peer leaves it open.
async fn fetch_all<R: for<'r> FromRow<'r, PgRow>>(
    mut connection: PoolConnection<Postgres>,
    query: Query<'_, Postgres, PgArguments>,
    failed: impl FnOnce(sqlx::Error) -> StoreError,
) -> Result<Vec<R>, StoreError> {
    // One by one as they come in, for sqlx's rows take several times as much memory as what is in them.
    let rows = query.fetch(&mut *connection).map(|row| R::from_row(&row?)).try_collect();
    let Ok(rows) = timeout(QUERY_TIMEOUT, rows).await else {
        drop(connection.detach());
        return Err(StoreError::Timeout(QUERY_TIMEOUT));
    };
    rows.map_err(failed)
}

/// Tells a row that the database refuses from a database that takes none.
///
/// What a SQLSTATE of these classes complains of is a value: out of range (22), against a constraint
/// (23) or a view's check (44), or a trigger's `RAISE` (P0). All others, such as a missing table or
/// privilege, a full disk or a deadlock, would hit each row alike and pass by: a row that was given up
/// for one of those would be lost for an outage.
fn recording_failed(error: sqlx::Error) -> StoreError {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    let refused = code
        .is_some_and(|code| ["22", "23", "44", "P0"].iter().any(|class| code.starts_with(class)));
    let kind = if refused { StoreError::Refused } else { StoreError::RecordSeen };
    kind(error.into())
}

/// The table, read on one connection.
pub(crate) struct Reader(PgConnection);

impl Reader {
    pub(crate) async fn open(options: PgConnectOptions) -> Result<Self, StoreError> {
        let options = named(options, "objects");
        let connect = options.connect();
        within(CONNECT_TIMEOUT, StoreError::Connect, connect).await.map(Self)
    }

    pub(crate) async fn page(&mut self, first: i64, limit: u32) -> Result<Vec<Object>, StoreError> {
        let query = sqlx::query_as(
            "SELECT id,
                    round(extract(epoch FROM last_seen) * 1000000)::bigint,
                    round(extract(epoch FROM now()) * 1000000)::bigint
             FROM object WHERE id >= $1 AND isfinite(last_seen) ORDER BY id LIMIT $2",
        );
        let page = query.bind(first).bind(i64::from(limit)).fetch_all(&mut self.0);
        let rows: Vec<(i64, i64, i64)> = within(QUERY_TIMEOUT, StoreError::List, page).await?;
        Ok(rows.into_iter().map(|(id, last_seen, now)| Object::new(id, last_seen, now)).collect())
    }

    pub(crate) async fn count(&mut self) -> Result<u64, StoreError> {
        let query = sqlx::query_scalar("SELECT count(*) FROM object WHERE isfinite(last_seen)");
        let count = query.fetch_one(&mut self.0);
        let rows: i64 = within(QUERY_TIMEOUT, StoreError::Count, count).await?;
        Ok(rows.unsigned_abs())
    }
}

/// The options to connect with as `name`, which `pg_stat_activity` shows.
fn named(options: PgConnectOptions, name: &str) -> PgConnectOptions {
    options
        .application_name(name)
        .options([("statement_timeout", STATEMENT_TIMEOUT), ("timezone", "UTC")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_monitor_that_panics_is_noticed() {
        let pool = PgPoolOptions::new().connect_lazy_with(PgConnectOptions::new());
        let (sender, status) = watch::channel(Ok(()));
        let (panic, panics) = tokio::sync::oneshot::channel::<()>();
        let table = Table::watched(pool, status, async move {
            let _status = sender;
            panics.await.expect("this one panics");
        });
        let died = table.died();
        tokio::pin!(died);
        assert!(timeout(Duration::from_millis(100), &mut died).await.is_err(), "not yet");
        drop(panic);
        assert!(timeout(Duration::from_secs(30), died).await.is_ok());
    }
}
