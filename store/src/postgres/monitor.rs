//! Monitors the database: whether it answers and has the schema.

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
pub(super) const NOT_CONNECTED_YET: &str = "not connected yet";
/// Migrations may have to wait for another process that migrates.
const MIGRATE_TIMEOUT: Duration = Duration::from_mins(1);
const INTERVAL: Duration = Duration::from_secs(1);

/// The monitor's connection, and the time zone for its statements.
struct Session {
    connection: PgConnection,
    zone: TimeZone,
}

/// Updates `status`, and migrates the schema whenever the database comes (back), because it may
/// have been created anew. Runs until its task is aborted. If the first database that it finds has
/// an unusable table, `rejection` gets the reason.
///
/// It has its own connection, because a pool would only report a timeout, not the cause.
pub(super) async fn run(
    options: PgConnectOptions,
    zone: TimeZone,
    status: watch::Sender<StoreStatus>,
    rejection: watch::Sender<Option<String>>,
) {
    // Only the first table may be rejected; after that, the service keeps running.
    let mut is_first = true;
    let backoff = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times();
    let mut delays = backoff.build();
    loop {
        let reason = match Session::open(&options, zone.clone()).await {
            Ok(mut session) => {
                tracing::info!("connected to the database");
                is_first = false;
                _ = status.send_replace(Ok(()));
                delays = backoff.build();
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
        let previous = status.send_replace(Err(reason.clone()));
        // Warn once for each outage, and if the first attempt fails.
        if previous.is_ok() || previous == Err(NOT_CONNECTED_YET.to_owned()) {
            tracing::warn!(reason, "no database; trying again until it is back");
        } else {
            tracing::debug!(reason, "still no database");
        }
        tokio::time::sleep(delays.next().unwrap_or(INTERVAL)).await;
    }
}

impl Session {
    /// Connects, migrates the schema if the role may, and checks the table.
    async fn open(options: &PgConnectOptions, zone: TimeZone) -> Result<Self, StoreError> {
        let connection = within(CONNECT_TIMEOUT, StoreError::Connect, options.connect()).await?;
        let mut session = Self { connection, zone };
        if session.may_migrate().await? {
            session.migrate().await?;
        }
        session.check().await?;
        Ok(session)
    }

    /// Whether the role may create tables. A role that may not leaves that to another process, and
    /// works as soon as the table exists.
    async fn may_migrate(&mut self) -> Result<bool, StoreError> {
        let rows: Vec<(bool,)> =
            self.run(PING_TIMEOUT, sql::MAY_MIGRATE, StoreError::Migrate).await?;
        Ok(rows.first().is_none_or(|(may_create,)| *may_create))
    }

    async fn migrate(&mut self) -> Result<(), StoreError> {
        // Several processes may migrate at once, because the script takes a lock.
        let _: Vec<()> =
            self.run(MIGRATE_TIMEOUT, &migrations::script(), StoreError::Migrate).await?;
        Ok(())
    }

    /// Checks that the table exists and is usable, and so notices a database that was created anew.
    ///
    /// A read-only server is an error, which ends the connection: after a failover, the next
    /// connection may lead to the new primary.
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
