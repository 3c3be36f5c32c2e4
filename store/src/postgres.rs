//! The table in a Postgres.

mod connections;
mod migrations;
mod monitor;
mod sql;

use std::collections::HashMap;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Either, FromRow, PgConnection};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::deadline::{CONNECT_TIMEOUT, PING_TIMEOUT, QUERY_TIMEOUT, within};
use crate::error::Cause;
use crate::store::Waits;
use crate::{Moment, Object, Recorded, Row, Sighting, StoreError, StoreStatus, TimeZone};

use connections::Connections;
use sql::Settings;

/// The server itself ends a statement after this time, so that it does not outlive its caller's
/// patience, which is [`QUERY_TIMEOUT`].
const STATEMENT_TIMEOUT: &str = "10s";
/// How long a statement waits for one lock. Another replica's batch holds its locks for milliseconds;
/// a session that holds one for longer must not hold up the other rows.
const LOCK_TIMEOUT: &str = "1s";
/// The same while a batch is searched for the row that holds it up: that takes up to some twenty
/// statements, so each must be short.
const BRIEF_STATEMENT_TIMEOUT: &str = "1s";
const BRIEF_LOCK_TIMEOUT: &str = "200ms";

/// The table. It may be away at any time, also at the start.
pub(crate) struct Table {
    connections: Connections,
    settings: Settings,
    brief_settings: Settings,
    status: watch::Receiver<StoreStatus>,
    rejected: watch::Receiver<Option<String>>,
    _monitor: AbortOnDropHandle<()>,
}

impl Table {
    pub(crate) fn start(
        options: PgConnectOptions,
        zone: &TimeZone,
        name: &str,
        connections: u32,
    ) -> Self {
        let options = named(options, name);
        let connections = Connections::new(options.clone(), connections);
        let (sender, status) = watch::channel(Err(monitor::NOT_YET.to_owned()));
        let (rejection, rejected) = watch::channel(None);
        let monitor = monitor::watch(options, zone.clone(), sender, rejection);
        let settings = Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, zone);
        let brief_settings = Settings::new(BRIEF_STATEMENT_TIMEOUT, BRIEF_LOCK_TIMEOUT, zone);
        Self::watched(connections, (settings, brief_settings), (status, rejected), monitor)
    }

    fn watched(
        connections: Connections,
        (settings, brief_settings): (Settings, Settings),
        (status, rejected): (watch::Receiver<StoreStatus>, watch::Receiver<Option<String>>),
        monitor: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let monitor = AbortOnDropHandle::new(tokio::spawn(monitor));
        Self { connections, settings, brief_settings, status, rejected, _monitor: monitor }
    }

    pub(crate) fn status(&self) -> watch::Receiver<StoreStatus> {
        self.status.clone()
    }

    pub(crate) async fn rejected(&self) -> String {
        let mut rejected = self.rejected.clone();
        if let Ok(reason) = rejected.wait_for(Option::is_some).await
            && let Some(reason) = &*reason
        {
            return reason.clone();
        }
        // The monitor has died, which `died` reports.
        std::future::pending().await
    }

    /// Returns only if the monitor has died, and the status with it.
    pub(crate) async fn died(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }

    pub(crate) async fn record_seen(
        &self,
        sightings: &[Sighting],
        waits: Waits,
    ) -> Result<Recorded, StoreError> {
        if sightings.is_empty() {
            return Ok(Recorded::default());
        }
        // The ages grow while a connection is waited for.
        let asked_at = Instant::now();
        let mut ages = HashMap::with_capacity(sightings.len());
        let statement = || {
            let waited = asked_at.elapsed();
            let age = |seen: &Sighting| sql::age_micros(seen.age.saturating_add(waited));
            ages.extend(sightings.iter().map(|seen| (seen.id, age(seen))));
            let sightings: Vec<_> =
                sightings.iter().map(|seen| (seen.id, ages[&seen.id])).collect();
            sql::record_seen(&sightings)
        };
        let rows: Vec<(i64, bool, i64)> =
            self.fetch_all(statement, waits, StoreError::RecordSeen).await?;
        let mut recorded = Recorded::default();
        for (id, is_new, now) in rows {
            let age = ages.get(&id).copied().unwrap_or_default();
            let last_seen = Moment::from_micros(now.saturating_sub(age));
            let list = if is_new { &mut recorded.inserted } else { &mut recorded.updated };
            list.push(Row { id, last_seen });
        }
        Ok(recorded)
    }

    pub(crate) async fn locked(&self, ids: &[i64]) -> Result<Vec<i64>, StoreError> {
        let rows: Vec<(i64,)> =
            self.fetch_all(|| sql::locked(ids), Waits::Usual, StoreError::Locked).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    pub(crate) async fn count_stale(&self, oldest: Moment) -> Result<(u64, u64), StoreError> {
        let statement = || sql::count_stale(oldest);
        let rows: Vec<(i64, i64)> =
            self.fetch_all(statement, Waits::Usual, StoreError::Count).await?;
        let (stale, all) = rows.first().copied().unwrap_or_default();
        Ok((stale.unsigned_abs(), all.unsigned_abs()))
    }

    pub(crate) async fn stale(
        &self,
        oldest: Moment,
        limit: u32,
        except: &[i64],
    ) -> Result<Vec<i64>, StoreError> {
        let statement = || sql::stale(oldest, limit, except);
        let rows: Vec<(i64,)> = self.fetch_all(statement, Waits::Usual, StoreError::List).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    pub(crate) async fn delete_these(
        &self,
        oldest: Moment,
        ids: &[i64],
    ) -> Result<Vec<Row>, StoreError> {
        let statement = || sql::delete_these(oldest, ids);
        let rows: Vec<(i64, i64)> =
            self.fetch_all(statement, Waits::Brief, StoreError::DeleteStale).await?;
        let gone = |(id, last_seen)| Row { id, last_seen: Moment::from_micros(last_seen) };
        Ok(rows.into_iter().map(gone).collect())
    }

    pub(crate) async fn now(&self) -> Result<Moment, StoreError> {
        let rows: Vec<(i64,)> =
            self.fetch_all(|| sql::NOW.to_owned(), Waits::Usual, StoreError::Clock).await?;
        let (now,) = rows.into_iter().next().unwrap_or_default();
        Ok(Moment::from_micros(now))
    }

    pub(crate) async fn delete_stale(
        &self,
        oldest: Moment,
        limit: u32,
    ) -> Result<Vec<Row>, StoreError> {
        let statement = || sql::delete_stale(oldest, limit);
        let rows: Vec<(i64, i64)> =
            self.fetch_all(statement, Waits::Usual, StoreError::DeleteStale).await?;
        let gone = |(id, last_seen)| Row { id, last_seen: Moment::from_micros(last_seen) };
        Ok(rows.into_iter().map(gone).collect())
    }

    pub(crate) async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        let statement = || sql::correct_future(limit);
        let rows: Vec<(i64,)> =
            self.fetch_all(statement, Waits::Usual, StoreError::CorrectFuture).await?;
        Ok(rows.first().map_or(0, |(count,)| count.unsigned_abs()))
    }

    // Decision: docs/decisions/0038-how-does-a-service-leave-a-read-only-server.md
    /// Runs a statement with a deadline, which sqlx does not have, and returns its rows.
    ///
    /// A connection that may be the reason for a failure is closed: one that leads to a server which takes no writes
    /// any more would otherwise never be replaced.
    async fn fetch_all<R: for<'r> FromRow<'r, PgRow> + Send + Unpin>(
        &self,
        statement: impl FnOnce() -> String,
        waits: Waits,
        failed: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        let mut connection = self.connections.take().await?;
        let settings = match waits {
            Waits::Usual => &self.settings,
            Waits::Brief => &self.brief_settings,
        };
        let script = settings.and(&statement());
        let session = &mut connection.session;
        let rows = run_within(QUERY_TIMEOUT, session, script, failed).await;
        let works = match &rows {
            Ok(_) => true,
            Err(error) if error.failure().taints_connection() => false,
            // A server reports an error first, and releases the locks of the statement then. A caller that looks for
            // the row that was locked must not find these.
            Err(_) => within(PING_TIMEOUT, StoreError::Ping, session.ping()).await.is_ok(),
        };
        if works {
            self.connections.keep(connection);
        }
        rows
    }
}

/// # Errors
/// [`StoreError::UnusableTable`]; or `Ping`, such as without a table.
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

/// Like [`run`], with a deadline. The connection is of no use after it.
async fn run_within<R: for<'r> FromRow<'r, PgRow>>(
    limit: Duration,
    connection: &mut PgConnection,
    script: String,
    failed: fn(Cause) -> StoreError,
) -> Result<Vec<R>, StoreError> {
    let rows = timeout(limit, run(connection, script, failed)).await;
    rows.unwrap_or(Err(StoreError::Timeout(limit)))
}

/// Runs what [`Settings::and`] makes of a statement, and returns its rows.
async fn run<R: for<'r> FromRow<'r, PgRow>>(
    connection: &mut PgConnection,
    script: String,
    failed: fn(Cause) -> StoreError,
) -> Result<Vec<R>, StoreError> {
    let mut outcomes = sqlx::raw_sql(AssertSqlSafe(script)).fetch_many(connection);
    let (mut completed, mut rows) = (0, Vec::new());
    loop {
        match outcomes.try_next().await {
            Ok(Some(Either::Left(_))) => completed += 1,
            // One by one as they come in, for sqlx's rows take several times as much memory as what is in them.
            Ok(Some(Either::Right(row))) => {
                rows.push(R::from_row(&row).map_err(|error| failed(error.into()))?);
            }
            Ok(None) => return Ok(rows),
            // Nothing that concerns a row can be wrong with these.
            Err(error @ sqlx::Error::Database(_)) if completed < sql::SETTINGS => {
                return Err(StoreError::Session(error.into()));
            }
            Err(error) => return Err(failed(error.into())),
        }
    }
}

/// The table, read on one connection.
pub(crate) struct Reader {
    connection: PgConnection,
    settings: Settings,
}

impl Reader {
    pub(crate) async fn open(
        options: PgConnectOptions,
        zone: &TimeZone,
    ) -> Result<Self, StoreError> {
        let options = named(options, "objects");
        let mut connection =
            within(CONNECT_TIMEOUT, StoreError::Connect, options.connect()).await?;
        let settings = Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, zone);
        // Whatever else it finds, such as no table, is an error of what is read.
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
        failed: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        run_within(QUERY_TIMEOUT, &mut self.connection, self.settings.and(statement), failed).await
    }
}

/// The options to connect with as `name`, which `pg_stat_activity` shows.
///
/// They are those that every pooler knows, too: all others are set with each statement.
fn named(options: PgConnectOptions, name: &str) -> PgConnectOptions {
    options.application_name(name).extra_float_digits(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_monitor_that_panics_is_noticed() {
        let connections = Connections::new(PgConnectOptions::new(), 1);
        let (sender, status) = watch::channel(Ok(()));
        let (panic, panics) = tokio::sync::oneshot::channel::<()>();
        let settings = Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, &TimeZone::of_the_machine());
        let (_rejection, rejected) = watch::channel(None);
        let table = Table::watched(
            connections,
            (settings.clone(), settings),
            (status, rejected),
            async move {
                let _status = sender;
                panics.await.expect("this one panics");
            },
        );
        let died = table.died();
        tokio::pin!(died);
        assert!(timeout(Duration::from_millis(100), &mut died).await.is_err(), "not yet");
        drop(panic);
        assert!(timeout(Duration::from_secs(30), died).await.is_ok());
    }
}
