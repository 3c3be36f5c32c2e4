//! The table in Postgres.

mod connections;
mod migrations;
mod monitor;
mod servers;
pub(crate) mod sql;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use runtime::{CriticalTask, Status, Supervisor};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection as _, Either, FromRow, PgConnection};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::deadline::{CONNECT_TIMEOUT, PING_TIMEOUT, QUERY_TIMEOUT, within};
use crate::error::Cause;
use crate::rows::{LockWait, RecordHistory};
use crate::{Cutoff, Moment, Object, Recorded, Row, Sighting, StoreError, TimeZone};

pub use servers::{ServerState, SessionAttrs};
pub(crate) use servers::{ServerWarnings, Servers};

use connections::Connections;
use sql::Settings;

/// The server ends a statement after this time. It is shorter than the caller's deadline,
/// [`QUERY_TIMEOUT`], so no statement outlives that deadline.
pub(crate) const STATEMENT_TIMEOUT: &str = "10s";
/// How long a statement waits for one lock. Batches of other replicas hold their locks for
/// milliseconds. When a session holds the lock of one row for longer, the other rows of the batch
/// must not wait for it.
pub(crate) const LOCK_TIMEOUT: &str = "1s";
/// The two limits during the search for the row that holds up a batch. The search needs up to about
/// twenty statements, so each must be short.
const BRIEF_STATEMENT_TIMEOUT: &str = "1s";
const BRIEF_LOCK_TIMEOUT: &str = "200ms";

/// The table. The server may be away at any time, also at the start.
pub(crate) struct Table {
    connections: Arc<Connections>,
    settings: Settings,
    brief_settings: Settings,
    status: watch::Receiver<Status>,
    rejected: watch::Receiver<Option<String>>,
    history: watch::Receiver<Status>,
    _monitor: CriticalTask,
}

impl Table {
    pub(crate) fn start(
        servers: Servers,
        zone: &TimeZone,
        name: &str,
        connections: u32,
        supervisor: &Supervisor,
    ) -> Self {
        let servers = servers.for_writes().named(name);
        let connections = Arc::new(Connections::new(servers.clone(), connections));
        let (sender, status) = watch::channel(Err(monitor::NOT_CONNECTED_YET.to_owned()));
        let (rejection, rejected) = watch::channel(None);
        let (history_sender, history) = watch::channel(Err(monitor::NOT_CONNECTED_YET.to_owned()));
        let reports = monitor::Reports { status: sender, rejection, history: history_sender };
        let pool = Arc::clone(&connections);
        let monitor = monitor::run(servers, pool, zone.clone(), reports);
        let monitor = supervisor.spawn_critical(format!("database monitor ({name})"), monitor);
        let settings = Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, zone);
        let brief_settings = Settings::new(BRIEF_STATEMENT_TIMEOUT, BRIEF_LOCK_TIMEOUT, zone);
        Self { connections, settings, brief_settings, status, rejected, history, _monitor: monitor }
    }

    /// Whether the role can write the history.
    pub(crate) fn history(&self) -> watch::Receiver<Status> {
        self.history.clone()
    }

    /// Whether to record the history. It is recorded unless the monitor has found that it cannot be
    /// written, so the first statement after the start waits for the monitor.
    pub(crate) async fn records_history(&self) -> RecordHistory {
        let mut history = self.history.clone();
        let is_known = |status: &Status| *status != Err(monitor::NOT_CONNECTED_YET.to_owned());
        match timeout(CONNECT_TIMEOUT, history.wait_for(is_known)).await {
            Ok(Ok(status)) if status.is_err() => RecordHistory::No,
            _ => RecordHistory::Yes,
        }
    }

    /// Does a part of the maintenance of the history, and returns whether there may be more to do.
    pub(crate) async fn maintain_history(&self, retention: Duration) -> Result<bool, StoreError> {
        let statement = || sql::maintain_history(retention);
        let rows: Vec<(bool,)> =
            self.fetch_all(statement, LockWait::Usual, StoreError::History).await?;
        Ok(rows.first().is_some_and(|(has_more,)| *has_more))
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    pub(crate) async fn rejected(&self) -> String {
        let mut rejected = self.rejected.clone();
        if let Ok(reason) = rejected.wait_for(Option::is_some).await
            && let Some(reason) = &*reason
        {
            return reason.clone();
        }
        // The monitor has stopped; the supervisor reports that.
        std::future::pending().await
    }

    pub(crate) async fn record_seen(
        &self,
        sightings: &[Sighting],
        wait: LockWait,
        history: impl Future<Output = RecordHistory>,
    ) -> Result<Recorded, StoreError> {
        if sightings.is_empty() {
            return Ok(Recorded::default());
        }
        // The ages grow while the statement waits for the monitor or a connection.
        let started_at = Instant::now();
        let history = history.await;
        let mut ages = HashMap::with_capacity(sightings.len());
        let statement = || {
            let waited = started_at.elapsed();
            let age = |seen: &Sighting| sql::age_micros(seen.age.saturating_add(waited));
            ages.extend(sightings.iter().map(|seen| (seen.id, age(seen))));
            let sightings: Vec<_> =
                sightings.iter().map(|seen| (seen.id, ages[&seen.id])).collect();
            sql::record_seen(&sightings, history)
        };
        let rows: Vec<(i64, bool, i64)> =
            self.fetch_all(statement, wait, StoreError::RecordSeen).await?;
        let mut recorded = Recorded::default();
        for (id, is_new, now) in rows {
            let age = ages.get(&id).copied().unwrap_or_default();
            let last_seen = Moment::from_micros(now.saturating_sub(age));
            let list = if is_new { &mut recorded.inserted } else { &mut recorded.updated };
            list.push(Row { id, last_seen });
        }
        Ok(recorded)
    }

    pub(crate) async fn find_locked(&self, ids: &[i64]) -> Result<Vec<i64>, StoreError> {
        let rows: Vec<(i64,)> =
            self.fetch_all(|| sql::find_locked(ids), LockWait::Usual, StoreError::Locked).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    pub(crate) async fn count_stale(&self, cutoff: Cutoff) -> Result<(u64, u64), StoreError> {
        let statement = || sql::count_stale(cutoff);
        let rows: Vec<(i64, i64)> =
            self.fetch_all(statement, LockWait::Usual, StoreError::Count).await?;
        let (stale, all) = rows.first().copied().unwrap_or_default();
        Ok((stale.unsigned_abs(), all.unsigned_abs()))
    }

    pub(crate) async fn list_stale(
        &self,
        cutoff: Cutoff,
        limit: u32,
        except: &[i64],
    ) -> Result<Vec<i64>, StoreError> {
        let statement = || sql::list_stale(cutoff, limit, except);
        let rows: Vec<(i64,)> =
            self.fetch_all(statement, LockWait::Usual, StoreError::List).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    pub(crate) async fn delete_stale_among(
        &self,
        cutoff: Cutoff,
        ids: &[i64],
        history: RecordHistory,
    ) -> Result<Vec<Row>, StoreError> {
        self.delete(|| sql::delete_stale_among(cutoff, ids, history), LockWait::Brief).await
    }

    pub(crate) async fn now(&self) -> Result<Moment, StoreError> {
        let rows: Vec<(i64,)> =
            self.fetch_all(sql::now, LockWait::Usual, StoreError::Clock).await?;
        let (now,) = rows.into_iter().next().unwrap_or_default();
        Ok(Moment::from_micros(now))
    }

    pub(crate) async fn delete_stale(
        &self,
        cutoff: Cutoff,
        limit: u32,
        history: RecordHistory,
    ) -> Result<Vec<Row>, StoreError> {
        self.delete(|| sql::delete_stale(cutoff, limit, history), LockWait::Usual).await
    }

    async fn delete(
        &self,
        statement: impl FnOnce() -> String,
        wait: LockWait,
    ) -> Result<Vec<Row>, StoreError> {
        let rows: Vec<(i64, i64)> =
            self.fetch_all(statement, wait, StoreError::DeleteStale).await?;
        let to_row = |(id, last_seen)| Row { id, last_seen: Moment::from_micros(last_seen) };
        Ok(rows.into_iter().map(to_row).collect())
    }

    pub(crate) async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        let statement = || sql::correct_future(limit);
        let rows: Vec<(i64,)> =
            self.fetch_all(statement, LockWait::Usual, StoreError::CorrectFuture).await?;
        Ok(rows.first().map_or(0, |(count,)| count.unsigned_abs()))
    }

    // Decision: docs/decisions/0038-how-does-a-service-leave-a-read-only-server.md
    /// Runs a statement with a deadline, which sqlx does not have, and returns its rows.
    ///
    /// It closes a connection that may have caused a failure. Otherwise a connection to a server
    /// that has become read-only would never be replaced.
    async fn fetch_all<R: for<'r> FromRow<'r, PgRow> + Send + Unpin>(
        &self,
        statement: impl FnOnce() -> String,
        wait: LockWait,
        to_error: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        let mut connection = self.connections.acquire().await?;
        let settings = match wait {
            LockWait::Usual => &self.settings,
            LockWait::Brief => &self.brief_settings,
        };
        let script = settings.and(&statement());
        let session = &mut connection.session;
        let rows = tokio::select! {
            // First, so that nothing is sent to a server that the monitor has left already.
            biased;
            () = self.connections.abandoned(connection.generation) => Err(StoreError::Abandoned),
            rows = run_within(QUERY_TIMEOUT, session, script, to_error) => rows,
        };
        let is_usable = match &rows {
            Ok(_) => true,
            Err(error) if error.failure().taints_connection() => false,
            // The server reports an error before it releases the locks of the statement. The ping
            // returns after they are released, so that a caller that then searches for locked rows
            // does not find these locks.
            Err(_) => within(PING_TIMEOUT, StoreError::Ping, session.ping()).await.is_ok(),
        };
        if is_usable {
            self.connections.release(connection);
        }
        rows
    }
}

/// Checks the definition of the table.
///
/// # Errors
/// [`StoreError::UnusableTable`]; or `Ping`, for example if the table is missing.
async fn check_table(
    limit: Duration,
    connection: &mut PgConnection,
    settings: &Settings,
) -> Result<(), StoreError> {
    let check = settings.and(sql::CHECK_TABLE);
    let rows: Vec<(Option<String>,)> =
        run_within(limit, connection, check, StoreError::Ping).await?;
    match rows.into_iter().next() {
        Some((Some(problems),)) => Err(StoreError::UnusableTable(problems)),
        _ => Ok(()),
    }
}

/// Like [`run`], but with a deadline. After a timeout, the connection is unusable.
pub(crate) async fn run_within<R: for<'r> FromRow<'r, PgRow>>(
    limit: Duration,
    connection: &mut PgConnection,
    script: String,
    to_error: fn(Cause) -> StoreError,
) -> Result<Vec<R>, StoreError> {
    let rows = timeout(limit, run(connection, script, to_error)).await;
    rows.unwrap_or(Err(StoreError::Timeout(limit)))
}

/// Runs a script of [`Settings::and`], and returns the rows of its statement.
async fn run<R: for<'r> FromRow<'r, PgRow>>(
    connection: &mut PgConnection,
    script: String,
    to_error: fn(Cause) -> StoreError,
) -> Result<Vec<R>, StoreError> {
    let mut outcomes = sqlx::raw_sql(AssertSqlSafe(script)).fetch_many(connection);
    let (mut completed, mut rows) = (0, Vec::new());
    loop {
        match outcomes.try_next().await {
            Ok(Some(Either::Left(_))) => completed += 1,
            // Each row is converted as soon as it arrives, because a row of sqlx needs several
            // times the memory of its content.
            Ok(Some(Either::Right(row))) => {
                rows.push(R::from_row(&row).map_err(|error| to_error(error.into()))?);
            }
            Ok(None) => return Ok(rows),
            // The settings are executed before the statement, so no row can be the cause of this
            // error.
            Err(error @ sqlx::Error::Database(_)) if completed < sql::SETTINGS => {
                return Err(StoreError::Session(error.into()));
            }
            Err(error) => return Err(to_error(error.into())),
        }
    }
}

/// Reads the table on one connection.
pub(crate) struct Reader {
    connection: PgConnection,
    settings: Settings,
}

impl Reader {
    pub(crate) async fn open(servers: Servers, zone: &TimeZone) -> Result<Self, StoreError> {
        let (_, mut connection) = servers.named("objects").connect(0).await?;
        let settings = Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, zone);
        // Other errors, such as a missing table, are reported by the statement that reads the
        // table.
        let checked = check_table(CONNECT_TIMEOUT, &mut connection, &settings).await;
        if let Err(error @ StoreError::UnusableTable(_)) = checked {
            return Err(error);
        }
        Ok(Self { connection, settings })
    }

    pub(crate) async fn page(&mut self, first: i64, limit: u32) -> Result<Vec<Object>, StoreError> {
        let page = sql::page(first, limit);
        let rows: Vec<(i64, i64, i64)> = self.fetch_all(&page, StoreError::List).await?;
        Ok(rows.into_iter().map(|(id, last_seen, now)| Object::new(id, last_seen, now)).collect())
    }

    pub(crate) async fn count(&mut self) -> Result<u64, StoreError> {
        let rows: Vec<(i64,)> = self.fetch_all(sql::COUNT, StoreError::Count).await?;
        Ok(rows.first().map_or(0, |(count,)| count.unsigned_abs()))
    }

    async fn fetch_all<R: for<'r> FromRow<'r, PgRow>>(
        &mut self,
        statement: &str,
        to_error: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        run_within(QUERY_TIMEOUT, &mut self.connection, self.settings.and(statement), to_error)
            .await
    }
}
