//! Looking after the database: is it there, and has it our schema?

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::sync::watch;

use super::MIGRATIONS;
use crate::deadline::{CONNECT_TIMEOUT, within};
use crate::{StoreError, StoreStatus};

/// The status before the first attempt to connect.
pub(super) const NOT_YET: &str = "not connected yet";
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Migrations may have to wait for another process that is at it.
const MIGRATE_TIMEOUT: Duration = Duration::from_mins(1);
const INTERVAL: Duration = Duration::from_secs(1);

/// Keeps `status` true, and the schema up to date whenever the database comes (back): it may have
/// been set up anew meanwhile. Ends only with the task.
///
/// It has a connection of its own: a pool keeps trying by itself and then only says that it timed
/// out, not why.
pub(super) async fn watch(options: PgConnectOptions, status: watch::Sender<StoreStatus>) {
    let backoff = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times();
    let mut waits = backoff.build();
    loop {
        let reason = match open(&options).await {
            Ok(mut connection) => {
                tracing::info!("connected to the database");
                _ = status.send_replace(Ok(()));
                waits = backoff.build();
                loop {
                    tokio::time::sleep(INTERVAL).await;
                    if let Err(error) = ping(&mut connection).await {
                        break error.to_string();
                    }
                }
            }
            Err(error) => error.to_string(),
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

async fn open(options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
    let mut connection = within(CONNECT_TIMEOUT, StoreError::Connect, options.connect()).await?;
    if may_migrate(&mut connection).await? {
        migrate(&mut connection).await?;
    }
    // Ready only with the table in place.
    ping(&mut connection).await?;
    Ok(connection)
}

async fn migrate(connection: &mut PgConnection) -> Result<(), StoreError> {
    // A table that went away by itself has left sqlx's record of the migrations behind, by which it
    // would not come back. They are all made anew, then.
    let forget = sqlx::query(
        "DO $$ BEGIN
             IF to_regclass('object') IS NULL THEN DROP TABLE IF EXISTS _sqlx_migrations; END IF;
         END $$",
    );
    within(MIGRATE_TIMEOUT, StoreError::Migrate, forget.execute(&mut *connection)).await?;
    // Safe when several processes do it at once: sqlx takes an advisory lock. This is `run` without
    // its generic `Acquire`, which the compiler cannot prove to be `Send` for a borrowed connection.
    let migration = MIGRATIONS.run_direct(None, connection, false);
    within(MIGRATE_TIMEOUT, StoreError::Migrate, migration).await
}

/// Whether our role may make tables. One that may not leaves it to a process whose role may, and has
/// its own work as soon as the table is there. Without any schema all are let through: that fails,
/// and the reason is told.
async fn may_migrate(connection: &mut PgConnection) -> Result<bool, StoreError> {
    let sql = "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), true)";
    let may = sqlx::query_scalar(sql).fetch_one(connection);
    within(PING_TIMEOUT, StoreError::Migrate, may).await
}

async fn ping(connection: &mut PgConnection) -> Result<(), StoreError> {
    // It names the table, so that a database which was set up anew under us is noticed.
    let query = sqlx::query("SELECT 1 FROM object LIMIT 1");
    within(PING_TIMEOUT, StoreError::Ping, query.execute(connection)).await?;
    Ok(())
}
