//! Reads the history in Postgres.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::PgConnection;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Change, READERS, Until};
use crate::deadline::QUERY_TIMEOUT;
use crate::postgres::sql::{Settings, micros};
use crate::postgres::{LOCK_TIMEOUT, STATEMENT_TIMEOUT, Servers, run_within};
use crate::{Failure, Moment, StoreError, TimeZone};

/// A connection that was idle for this long is closed, because its server may have changed its role.
const IDLE_MAX: Duration = Duration::from_secs(10);

const NEXT_XID: &str = "pg_snapshot_xmin(now)::text::bigint
    + age((pg_snapshot_xmin(now)::text::bigint % 4294967296)::text::xid)";

pub(super) struct Reader {
    servers: Servers,
    settings: Settings,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<(Instant, PgConnection)>>,
    horizon: Mutex<Horizon>,
}

/// Up to which position all changes are committed or rolled back.
///
/// A transaction gets its number (xid) when it changes the row of an object, and the positions of
/// its changes after that. So once a change is visible, each transaction that may still commit an
/// earlier position has a number below the next unassigned one. When all these have ended, no earlier
/// change can appear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Horizon {
    settled: Mark,
    /// The next one, which is settled when all transactions below its number have ended.
    next: Option<Mark>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    position: i64,
    /// A server shows all changes up to `position` if it knows that all transactions with lower
    /// numbers have ended. A standby may know that later.
    xid: i64,
}

impl Horizon {
    /// Records a reading: the highest visible position, the next unassigned number after that, and
    /// the number below which all transactions have ended.
    fn advance(&mut self, visible: i64, next_xid: i64, oldest_running: i64) {
        let mark = Mark { position: visible, xid: next_xid };
        let next = *self.next.get_or_insert(mark);
        if oldest_running >= next.xid {
            self.settled = next;
            self.next = None;
        }
        if oldest_running >= mark.xid {
            self.settled = mark;
        } else if self.next.is_none() {
            self.next = Some(mark);
        }
    }
}

impl Reader {
    pub(super) fn new(servers: Servers, zone: &TimeZone) -> Self {
        Self {
            servers: servers.named("history"),
            settings: Settings::new(STATEMENT_TIMEOUT, LOCK_TIMEOUT, zone),
            permits: Arc::new(Semaphore::new(READERS)),
            idle: Mutex::default(),
            horizon: Mutex::default(),
        }
    }

    pub(super) async fn changes_after(
        self: &Arc<Self>,
        position: i64,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        // Usually, the changes to read are settled, unless they are the newest ones.
        let known = self.horizon.lock().settled;
        let changes = self.settled_changes(position, known, limit).await?;
        if changes.len() == limit as usize {
            return Ok(changes);
        }
        let settled = self.read_horizon().await?;
        if settled == known {
            return Ok(changes);
        }
        self.settled_changes(position, settled, limit).await
    }

    pub(super) async fn settled(self: &Arc<Self>) -> Result<i64, StoreError> {
        self.read_horizon().await.map(|settled| settled.position)
    }

    async fn settled_changes(
        self: &Arc<Self>,
        position: i64,
        Mark { position: last, xid }: Mark,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        if last <= position {
            return Ok(Vec::new());
        }
        self.changes(&format!(
            "WHERE position > {position} AND position <= {last}
               AND pg_snapshot_xmin(pg_current_snapshot())::text::bigint >= {xid}
             ORDER BY position LIMIT {limit}"
        ))
        .await
    }

    async fn read_horizon(self: &Arc<Self>) -> Result<Mark, StoreError> {
        // Two statements, because the number must be read after the position. Each row has a value
        // of one of them.
        let rows: Vec<(Option<i64>, Option<i64>, Option<i64>)> = self
            .fetch_all(&format!(
                "SELECT max(position), NULL::bigint, NULL::bigint FROM presence_change;
                 SELECT NULL::bigint, {NEXT_XID}, pg_snapshot_xmin(now)::text::bigint
                 FROM pg_current_snapshot() AS now"
            ))
            .await?;
        let mut horizon = self.horizon.lock();
        if let [(Some(visible), ..), (_, Some(next_xid), Some(oldest_running))] = rows.as_slice() {
            horizon.advance(*visible, *next_xid, *oldest_running);
        }
        Ok(horizon.settled)
    }

    pub(super) async fn extent(self: &Arc<Self>) -> Result<Vec<Change>, StoreError> {
        self.changes(
            "WHERE position IN ((SELECT min(position) FROM presence_change),
                                (SELECT max(position) FROM presence_change))
             ORDER BY position",
        )
        .await
    }

    pub(super) async fn changes_of(
        self: &Arc<Self>,
        id: i64,
        until: Until,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        let object = format!("object_id = '{id}'::bigint");
        let (last, time) = match until {
            Until::Now => (i64::MAX.to_string(), "now()".to_owned()),
            Until::Position(position) => (
                position.to_string(),
                format!("(SELECT at FROM presence_change WHERE position = {position})"),
            ),
            Until::Time(time) => {
                let time = literal(time);
                let first = format!(
                    "coalesce((SELECT min(position) FROM presence_change
                               WHERE {object} AND at >= {time}), {})",
                    i64::MAX
                );
                (first, time)
            }
        };
        // An object may have changed thousands of times a day, and the index has no order. Its
        // latest changes are usually enough.
        let newest = format!("ORDER BY position DESC LIMIT {limit}");
        for days in [1, 8] {
            let latest = format!("AND at >= {time} - interval '{days} d'");
            let latest = format!("WHERE {object} AND position <= {last} {latest} {newest}");
            let changes = self.changes(&latest).await?;
            if changes.len() == limit as usize {
                return Ok(changes);
            }
        }
        self.changes(&format!("WHERE {object} AND position <= {last} {newest}")).await
    }

    pub(super) async fn gone_since(
        self: &Arc<Self>,
        since: Moment,
        first_id: i64,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        let since = literal(since);
        self.changes(&format!(
            "JOIN (SELECT DISTINCT ON (object_id) object_id AS id, position AS last
                   FROM presence_change
                   WHERE at >= {since} AND object_id >= '{first_id}'::bigint
                   ORDER BY object_id, position DESC) AS latest ON last = position
             WHERE NOT is_online AND at >= {since}
               AND NOT EXISTS (SELECT FROM object WHERE object.id = latest.id)
             ORDER BY latest.id LIMIT {limit}"
        ))
        .await
    }

    pub(super) async fn now(self: &Arc<Self>) -> Result<Moment, StoreError> {
        let rows: Vec<(i64,)> = self.fetch_all(&crate::postgres::sql::now()).await?;
        Ok(Moment::from_micros(rows.first().map_or(0, |(now,)| *now)))
    }

    /// The changes that `rest`, the rest of a statement, selects.
    async fn changes(self: &Arc<Self>, rest: &str) -> Result<Vec<Change>, StoreError> {
        let (at, last_seen) = (micros("at"), micros("last_seen"));
        self.fetch_all(&format!(
            "SELECT position, object_id, is_online, {at}, {last_seen}
             FROM presence_change {rest}"
        ))
        .await
    }

    /// Runs a statement on an idle or a new connection. An idle one may be broken, so the statement
    /// is then tried on a new one.
    ///
    /// It runs in its own task, because the server continues a statement that nobody waits for any
    /// more, which must count as one of the [`READERS`].
    async fn fetch_all<R>(self: &Arc<Self>, statement: &str) -> Result<Vec<R>, StoreError>
    where
        R: for<'r> FromRow<'r, PgRow> + Send + Unpin + 'static,
    {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let (this, script) = (Arc::clone(self), self.settings.and(statement));
        let run = tokio::spawn(async move {
            let _permit = permit;
            if let Some(connection) = this.take_idle() {
                match this.run(connection, script.clone()).await {
                    Err(error) if error.failure() == Failure::Connection => {}
                    result => return result,
                }
            }
            let (_, connection) = this.servers.connect(0).await?;
            this.run(connection, script).await
        });
        run.await.map_err(|panicked| StoreError::History(panicked.into()))?
    }

    fn take_idle(&self) -> Option<PgConnection> {
        let mut idle = self.idle.lock();
        idle.retain(|(since, _)| since.elapsed() < IDLE_MAX);
        idle.pop().map(|(_, connection)| connection)
    }

    async fn run<R>(
        &self,
        mut connection: PgConnection,
        script: String,
    ) -> Result<Vec<R>, StoreError>
    where
        R: for<'r> FromRow<'r, PgRow>,
    {
        let rows = run_within(QUERY_TIMEOUT, &mut connection, script, StoreError::History).await?;
        self.idle.lock().push((Instant::now(), connection));
        Ok(rows)
    }

    /// Whether the server is a standby, which may not have the latest changes yet.
    pub(super) async fn is_standby(self: &Arc<Self>) -> Result<bool, StoreError> {
        let rows: Vec<(bool,)> = self.fetch_all("SELECT pg_is_in_recovery()").await?;
        Ok(rows.first().is_some_and(|(is_standby,)| *is_standby))
    }
}

impl<'r> FromRow<'r, PgRow> for Change {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        let moment = |index| row.try_get(index).map(Moment::from_micros);
        Ok(Self::new(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, moment(3)?, moment(4)?))
    }
}

/// An SQL expression for the time.
fn literal(time: Moment) -> String {
    format!("(timestamptz 'epoch' + {} * interval '1 us')", time.micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_is_settled_when_all_earlier_transactions_have_ended() {
        let mut horizon = Horizon::default();
        let settled = |horizon: &Horizon| horizon.settled.position;
        // Transaction 8, which is running, may commit a position below 100.
        horizon.advance(100, 10, 8);
        assert_eq!(settled(&horizon), 0);
        // Transaction 11 is running: it began after 100 was visible.
        horizon.advance(105, 12, 9);
        assert_eq!(settled(&horizon), 0);
        horizon.advance(110, 13, 11);
        assert_eq!(settled(&horizon), 100);
        horizon.advance(120, 14, 13);
        assert_eq!(settled(&horizon), 110);
        horizon.advance(130, 15, 15);
        assert_eq!(settled(&horizon), 130);
        horizon.advance(130, 16, 15);
        assert_eq!(settled(&horizon), 130);
    }
}
