//! Looking after the database: is it there, and has it our schema?

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions as _, FromRow, PgConnection};
use tokio::sync::watch;

use super::sql::{self, Settings};
use super::{check_table, migrations, run_within};
use crate::deadline::{CONNECT_TIMEOUT, PING_TIMEOUT, within};
use crate::error::Cause;
use crate::{StoreError, StoreStatus, TimeZone};

/// The status before the first attempt to connect.
pub(super) const NOT_YET: &str = "not connected yet";
/// Migrations may have to wait for another process that is at it.
const MIGRATE_TIMEOUT: Duration = Duration::from_mins(1);
const INTERVAL: Duration = Duration::from_secs(1);

/// A connection of the monitor's own, and what its statements need.
struct Session {
    connection: PgConnection,
    zone: TimeZone,
}

/// Keeps `status` true, and the schema up to date whenever the database comes (back): it may have
/// been set up anew meanwhile. Ends only with the task. If the first database that it sees has a table that
/// cannot be used, `rejection` gets the reason.
///
/// It has a connection of its own: a pool keeps trying by itself and then only says that it timed
/// out, not why.
pub(super) async fn watch(
    options: PgConnectOptions,
    zone: TimeZone,
    status: watch::Sender<StoreStatus>,
    rejection: watch::Sender<Option<String>>,
) {
    // Whether the database has answered before: then the table was fine, or we were told to go on.
    let mut is_first = true;
    let backoff = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times();
    let mut waits = backoff.build();
    loop {
        let reason = match Session::open(&options, zone.clone()).await {
            Ok(mut session) => {
                tracing::info!("connected to the database");
                is_first = false;
                _ = status.send_replace(Ok(()));
                waits = backoff.build();
                loop {
                    tokio::time::sleep(INTERVAL).await;
                    if let Err(error) = session.check().await {
                        break error.to_string();
                    }
                }
            }
            Err(error) => {
                if matches!(error, StoreError::UnusableTable(_)) && std::mem::take(&mut is_first) {
                    rejection.send_replace(Some(error.to_string()));
                }
                error.to_string()
            }
        };
        let before = status.send_replace(Err(reason.clone()));
        // Once for each outage; the first attempt of all counts as one.
        if before.is_ok() || before == Err(NOT_YET.to_owned()) {
            tracing::warn!(reason, "no database; trying again until it is back");
        } else {
            tracing::debug!(reason, "still no database");
        }
        tokio::time::sleep(waits.next().unwrap_or(INTERVAL)).await;
    }
}

impl Session {
    /// Connects, and brings the schema up to date. The table is in place then.
    async fn open(options: &PgConnectOptions, zone: TimeZone) -> Result<Self, StoreError> {
        let connection = within(CONNECT_TIMEOUT, StoreError::Connect, options.connect()).await?;
        let mut session = Self { connection, zone };
        if session.may_migrate().await? {
            session.migrate().await?;
        }
        session.check().await?;
        Ok(session)
    }

    /// Whether our role may make tables. One that may not leaves it to a process whose role may, and has
    /// its own work as soon as the table is there.
    async fn may_migrate(&mut self) -> Result<bool, StoreError> {
        let rows: Vec<(bool,)> =
            self.run(PING_TIMEOUT, sql::MAY_MIGRATE, StoreError::Migrate).await?;
        Ok(rows.first().is_none_or(|(may,)| *may))
    }

    async fn migrate(&mut self) -> Result<(), StoreError> {
        // Safe when several processes do it at once, for it takes a lock.
        let _: Vec<()> =
            self.run(MIGRATE_TIMEOUT, &migrations::script(), StoreError::Migrate).await?;
        Ok(())
    }

    /// Asks for the table, so that a database which was set up anew under us is noticed, and whether it
    /// can be used.
    ///
    /// A server that takes no writes ends the connection: after a failover, the next one may lead to
    /// the new primary.
    async fn check(&mut self) -> Result<(), StoreError> {
        let settings = self.settings(PING_TIMEOUT);
        check_table(PING_TIMEOUT, &mut self.connection, &settings).await?;
        let rows: Vec<(bool,)> =
            self.run(PING_TIMEOUT, sql::IS_READ_ONLY, StoreError::Ping).await?;
        if rows.first().is_some_and(|(is_read_only,)| *is_read_only) {
            return Err(StoreError::ReadOnly);
        }
        Ok(())
    }

    fn settings(&self, limit: Duration) -> Settings {
        let timeout = format!("{}s", limit.as_secs());
        Settings::new(&timeout, &timeout, &self.zone)
    }

    async fn run<R: for<'r> FromRow<'r, PgRow>>(
        &mut self,
        limit: Duration,
        statement: &str,
        failed: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        let settings = self.settings(limit);
        run_within(limit, &mut self.connection, settings.and(statement), failed).await
    }
}
