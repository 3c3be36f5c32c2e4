//! The connection pool for statements.
//!
//! The pool of sqlx pings each returned connection without a deadline. If the database became
//! silent at that moment, the connection would occupy a slot of the pool permanently.
//!
//! Decision: docs/decisions/0044-why-does-the-store-manage-its-own-connections.md

use std::time::Duration;

use parking_lot::Mutex;
use sqlx::{ConnectOptions as _, PgConnection};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, timeout};

use super::servers::Servers;
use crate::StoreError;

/// How long a statement waits for a connection. The time is short, because the caller retries, and
/// a retry can use a database that has come back.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that was idle for this long is replaced, because a firewall may have dropped it.
const IDLE_MAX: Duration = Duration::from_mins(5);
/// A connection of this age is replaced, so that the server can free the memory of its session.
const LIFETIME_MAX: Duration = Duration::from_mins(30);

/// A pool of up to a fixed number of connections, which it opens when they are needed.
///
/// The monitor chooses their server and says when they must end: one that it has left may still
/// answer, and would accept no writes, or writes that are lost.
pub(super) struct Connections {
    servers: Servers,
    permits: Semaphore,
    pool: Mutex<Pool>,
    /// Statements on connections of earlier generations are given up.
    abandoned: watch::Sender<u64>,
}

#[derive(Default)]
struct Pool {
    /// The index of the server to which new connections lead.
    server: usize,
    /// The generation of new connections. Those of earlier generations do not come back.
    generation: u64,
    /// The most recently used connection is at the end. All are of this generation.
    idle: Vec<Idle>,
}

struct Idle {
    session: PgConnection,
    opened_at: Instant,
    since: Instant,
}

/// A connection in use. Dropping it closes it; [`Connections::release`] keeps it open.
pub(super) struct Connection<'a> {
    pub(super) session: PgConnection,
    pub(super) generation: u64,
    opened_at: Instant,
    _permit: SemaphorePermit<'a>,
}

impl Connections {
    /// A pool of connections to the first of the servers.
    pub(super) fn new(servers: Servers, limit: u32) -> Self {
        let permits = Semaphore::new(limit as usize);
        Self { servers, permits, pool: Mutex::default(), abandoned: watch::Sender::default() }
    }

    /// The index of the server to which new connections lead.
    pub(super) fn server(&self) -> usize {
        self.pool.lock().server
    }

    /// Lets new connections lead to this server. If that is another one than before, all former
    /// connections end, as in [`Connections::abandon`].
    pub(super) fn use_server(&self, server: usize) {
        let mut pool = self.pool.lock();
        if pool.server != server {
            pool.server = server;
            self.abandoned.send_replace(pool.retire());
        }
    }

    /// Closes all idle connections now, and those in use after their statement.
    pub(super) fn retire(&self) {
        self.pool.lock().retire();
    }

    /// Closes all connections now, and gives up the statements on those in use. A commit could wait
    /// forever for a standby that has been promoted.
    pub(super) fn abandon(&self) {
        self.abandoned.send_replace(self.pool.lock().retire());
    }

    /// Waits until statements on connections of this generation must be given up.
    pub(super) async fn abandoned(&self, generation: u64) {
        let mut abandoned = self.abandoned.subscribe();
        // It fails only without a sender, but `self` is one.
        _ = abandoned.wait_for(|first_kept| generation < *first_kept).await;
    }

    /// Returns the most recently used idle connection or, if there is none, a new one.
    ///
    /// # Errors
    /// [`StoreError::Connect`]; [`StoreError::NoConnection`] after [`ACQUIRE_TIMEOUT`].
    pub(super) async fn acquire(&self) -> Result<Connection<'_>, StoreError> {
        let acquired = timeout(ACQUIRE_TIMEOUT, async {
            let permit =
                self.permits.acquire().await.map_err(|error| StoreError::Connect(error.into()))?;
            let (server, generation, idle) = {
                let mut pool = self.pool.lock();
                (pool.server, pool.generation, pool.take_idle())
            };
            if let Some(Idle { session, opened_at, .. }) = idle {
                return Ok(Connection { session, generation, opened_at, _permit: permit });
            }
            let opened = self.servers.options(server).connect().await;
            let session = opened.map_err(|error| StoreError::Connect(error.into()))?;
            Ok(Connection { session, generation, opened_at: Instant::now(), _permit: permit })
        });
        acquired.await.unwrap_or(Err(StoreError::NoConnection(ACQUIRE_TIMEOUT)))
    }

    /// Returns a working connection to the pool, for the next statement.
    pub(super) fn release(&self, connection: Connection<'_>) {
        let Connection { session, generation, opened_at, _permit: permit } = connection;
        let mut pool = self.pool.lock();
        if generation == pool.generation && opened_at.elapsed() < LIFETIME_MAX {
            pool.idle.push(Idle { session, opened_at, since: Instant::now() });
        }
        drop(pool);
        // Only now, so that the next statement finds the idle connection.
        drop(permit);
    }
}

impl Pool {
    fn take_idle(&mut self) -> Option<Idle> {
        // If the most recently used connection was idle for too long, so were all others.
        let last = self.idle.pop().filter(|last| last.since.elapsed() < IDLE_MAX);
        if last.is_none() {
            self.idle.clear();
        }
        last
    }

    /// Starts a new generation, and returns it.
    fn retire(&mut self) -> u64 {
        self.idle.clear();
        self.generation += 1;
        self.generation
    }
}
