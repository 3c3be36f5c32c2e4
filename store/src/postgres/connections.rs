//! The connection pool for statements.
//!
//! sqlx has a pool, but that pool pings a returned connection without a deadline: a database that
//! becomes silent at that moment would occupy the connection's place permanently.
//!
//! Decision: docs/decisions/0044-why-does-the-store-manage-its-own-connections.md

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use crate::StoreError;

/// How long a statement waits for a connection. It is short, because the caller retries, and then
/// uses a database that has come back.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that was idle for this long is replaced, because a firewall may have dropped it.
const IDLE_MAX: Duration = Duration::from_mins(5);
/// A connection of this age is replaced, so that the server can free the memory of its session.
const LIFETIME_MAX: Duration = Duration::from_mins(30);

/// A pool of up to a fixed number of connections, which it opens when they are needed.
pub(super) struct Connections {
    options: PgConnectOptions,
    permits: Semaphore,
    /// The most recently used connection is at the end.
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    session: PgConnection,
    opened_at: Instant,
    since: Instant,
}

/// A connection in use. Dropping it closes it; [`Connections::release`] keeps it open.
pub(super) struct Connection<'a> {
    pub(super) session: PgConnection,
    opened_at: Instant,
    _permit: SemaphorePermit<'a>,
}

impl Connections {
    pub(super) fn new(options: PgConnectOptions, limit: u32) -> Self {
        Self { options, permits: Semaphore::new(limit as usize), idle: Mutex::default() }
    }

    /// Returns the most recently used idle connection or, if there is none, a new one.
    ///
    /// # Errors
    /// [`StoreError::Connect`]; [`StoreError::NoConnection`] after [`ACQUIRE_TIMEOUT`].
    pub(super) async fn acquire(&self) -> Result<Connection<'_>, StoreError> {
        let acquired = timeout(ACQUIRE_TIMEOUT, async {
            let permit =
                self.permits.acquire().await.map_err(|error| StoreError::Connect(error.into()))?;
            if let Some(Idle { session, opened_at, .. }) = self.take_idle() {
                return Ok(Connection { session, opened_at, _permit: permit });
            }
            let opened = self.options.connect().await;
            let session = opened.map_err(|error| StoreError::Connect(error.into()))?;
            Ok(Connection { session, opened_at: Instant::now(), _permit: permit })
        });
        acquired.await.unwrap_or(Err(StoreError::NoConnection(ACQUIRE_TIMEOUT)))
    }

    fn take_idle(&self) -> Option<Idle> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // If the most recently used connection was idle for too long, so were all others.
        let last = idle.pop().filter(|last| last.since.elapsed() < IDLE_MAX);
        if last.is_none() {
            idle.clear();
        }
        last
    }

    /// Returns a working connection to the pool, for the next statement.
    pub(super) fn release(&self, connection: Connection<'_>) {
        let Connection { session, opened_at, _permit: permit } = connection;
        if opened_at.elapsed() < LIFETIME_MAX {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.push(Idle { session, opened_at, since: Instant::now() });
        }
        // Only now, so that the next statement finds the idle connection.
        drop(permit);
    }
}
