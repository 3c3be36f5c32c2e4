//! Monitors whether the database answers and has the schema.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use runtime::Status;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection};
use tokio::sync::watch;

use super::connections::Connections;
use super::servers::{ServerState, Servers};
use super::sql::{self, Settings};
use super::{check_table, migrations, run_within};
use crate::deadline::{PING_TIMEOUT, within};
use crate::error::Cause;
use crate::{StoreError, TimeZone};

pub(super) const NOT_CONNECTED_YET: &str = "not connected yet";
/// A migration may have to wait for another process that is migrating.
const MIGRATE_TIMEOUT: Duration = Duration::from_mins(1);
const INTERVAL: Duration = Duration::from_secs(1);

/// The monitor's connection, the address of its server, and the time zone for its statements.
struct Session {
    connection: PgConnection,
    server: String,
    zone: TimeZone,
}

/// What the monitor reports.
pub(super) struct Reports {
    /// Whether the database answers and has the schema.
    pub(super) status: watch::Sender<Status>,
    /// Why the first database that the monitor found is unusable.
    pub(super) rejection: watch::Sender<Option<String>>,
    /// Whether the role can write the history.
    pub(super) history: watch::Sender<Status>,
}

/// Finds the server that accepts writes and lets `connections` lead to it, updates `status`, and
/// migrates the schema whenever the database comes (back), because it may have been created anew.
/// Runs until its task is aborted. If the first database that it finds has an unusable table,
/// `rejection` gets the reason. Reports in `history` whether the history can be written.
///
/// It has its own connection, because a pool would only report a timeout, not the cause. When that
/// connection ends, so do all others, because their server may no longer be the primary.
pub(super) async fn run(
    servers: Servers,
    connections: Arc<Connections>,
    zone: TimeZone,
    Reports { status, rejection, history }: Reports,
) {
    // Only the first table that is found may be rejected. Later, the service keeps running.
    let mut is_first = true;
    let backoff = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times();
    let mut delays = backoff.build();
    loop {
        let reason = match Session::open(&servers, &connections, zone.clone()).await {
            Ok(mut session) => {
                tracing::info!(server = session.server, "connected to the database");
                is_first = false;
                session.check_history(&history).await;
                _ = status.send_replace(Ok(()));
                delays = backoff.build();
                let error = session.check_until_it_fails(&history).await;
                match error {
                    StoreError::Unsuitable(_) => connections.abandon(),
                    _ => connections.retire(),
                }
                error.to_string()
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
    /// Connects to the server that accepts writes, lets `connections` lead to it, migrates the
    /// schema if the role may, and checks the table.
    async fn open(
        servers: &Servers,
        connections: &Connections,
        zone: TimeZone,
    ) -> Result<Self, StoreError> {
        let (server, connection) = servers.connect(connections.server()).await?;
        // Before the checks, because statements may succeed even if these fail.
        connections.use_server(server);
        let mut session = Self { connection, server: servers.address(server), zone };
        // A role that may not create tables leaves that to another process, and works as soon as
        // the table exists.
        let rows: Vec<(bool,)> =
            session.run(PING_TIMEOUT, sql::MAY_MIGRATE, StoreError::Migrate).await?;
        if rows.first().is_none_or(|(may_create,)| *may_create) {
            // Several processes may migrate at once, because the script takes a lock.
            let script = migrations::script();
            let _: Vec<()> = session.run(MIGRATE_TIMEOUT, &script, StoreError::Migrate).await?;
        }
        session.check().await?;
        Ok(session)
    }

    /// Checks once per [`INTERVAL`], and returns the first error.
    async fn check_until_it_fails(mut self, history: &watch::Sender<Status>) -> StoreError {
        loop {
            tokio::time::sleep(INTERVAL).await;
            if let Err(error) = self.check().await {
                return error;
            }
            self.check_history(history).await;
        }
    }

    /// Checks whether the history can be written. If not, objects are recorded without it: they
    /// matter more.
    async fn check_history(&mut self, history: &watch::Sender<Status>) {
        let checked = self.run(PING_TIMEOUT, sql::CHECK_HISTORY, StoreError::Ping).await;
        let rows: Vec<(Option<String>,)> = match checked {
            Ok(rows) => rows,
            // The next check of the table finds out what is wrong with the connection.
            Err(_) => return,
        };
        let problem = rows.into_iter().next().and_then(|(problem,)| problem);
        let status = problem.map_or(Ok(()), Err);
        history.send_if_modified(|before| std::mem::replace(before, status.clone()) != status);
    }

    /// Checks that the table exists and is usable, and so notices a database that was created anew.
    ///
    /// A read-only server counts as an error, which ends the connection: after a failover, the next
    /// connection may lead to the new primary.
    async fn check(&mut self) -> Result<(), StoreError> {
        let settings = self.settings(PING_TIMEOUT);
        check_table(PING_TIMEOUT, &mut self.connection, &settings).await?;
        let state = ServerState::read(&mut self.connection);
        match within(PING_TIMEOUT, StoreError::Ping, state).await? {
            ServerState::ReadWrite => Ok(()),
            state => Err(StoreError::Unsuitable(state)),
        }
    }

    fn settings(&self, limit: Duration) -> Settings {
        let timeout = format!("{}s", limit.as_secs());
        Settings::new(&timeout, &timeout, &self.zone)
    }

    async fn run<R: for<'r> FromRow<'r, PgRow>>(
        &mut self,
        limit: Duration,
        statement: &str,
        to_error: fn(Cause) -> StoreError,
    ) -> Result<Vec<R>, StoreError> {
        let settings = self.settings(limit);
        run_within(limit, &mut self.connection, settings.and(statement), to_error).await
    }
}
