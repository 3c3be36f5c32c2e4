//! The connections that statements run on.
//!
//! sqlx has a pool of its own. When a connection comes back to it, it waits for the server's answer to a ping, and
//! has no deadline for that: a database that becomes silent at that moment would take the place for good.
//!
//! Decision: docs/decisions/0044-why-does-the-store-manage-its-own-connections.md

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use crate::StoreError;

/// How long a statement waits for a connection. It is short, because the caller tries again, and finds a database
/// that has come back then.
const WAIT: Duration = Duration::from_secs(2);
/// An idle connection of this age is replaced, because a firewall may have dropped it from its table.
const IDLE_TIME: Duration = Duration::from_mins(5);
/// A connection of this age is replaced, so that the server can free the memory of its session.
const LIFETIME: Duration = Duration::from_mins(30);

/// Up to a certain number of connections, each of which is opened when it is needed.
pub(super) struct Connections {
    options: PgConnectOptions,
    places: Semaphore,
    /// The one that was used last is at the end.
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    session: PgConnection,
    opened_at: Instant,
    since: Instant,
}

/// A connection that is in use. If it is dropped, it is closed; see [`Connections::keep`].
pub(super) struct Connection<'a> {
    pub(super) session: PgConnection,
    opened_at: Instant,
    _place: SemaphorePermit<'a>,
}

impl Connections {
    pub(super) fn new(options: PgConnectOptions, limit: u32) -> Self {
        Self { options, places: Semaphore::new(limit as usize), idle: Mutex::default() }
    }

    /// The idle connection that was used last. If there is none, a new one.
    ///
    /// # Errors
    /// [`StoreError::Connect`]; [`StoreError::NoConnection`] if it takes longer than two seconds.
    pub(super) async fn take(&self) -> Result<Connection<'_>, StoreError> {
        let taken = timeout(WAIT, async {
            let place =
                self.places.acquire().await.map_err(|error| StoreError::Connect(error.into()))?;
            if let Some(Idle { session, opened_at, .. }) = self.take_idle() {
                return Ok(Connection { session, opened_at, _place: place });
            }
            let opened = self.options.connect().await;
            let session = opened.map_err(|error| StoreError::Connect(error.into()))?;
            Ok(Connection { session, opened_at: Instant::now(), _place: place })
        });
        taken.await.unwrap_or(Err(StoreError::NoConnection(WAIT)))
    }

    fn take_idle(&self) -> Option<Idle> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // All before one that was not used for too long were not used for even longer.
        let last = idle.pop().filter(|last| last.since.elapsed() < IDLE_TIME);
        if last.is_none() {
            idle.clear();
        }
        last
    }

    /// Keeps a connection that works for the next statement.
    pub(super) fn keep(&self, connection: Connection<'_>) {
        let Connection { session, opened_at, _place: place } = connection;
        if opened_at.elapsed() < LIFETIME {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.push(Idle { session, opened_at, since: Instant::now() });
        }
        // Now that it can be found.
        drop(place);
    }
}
