//! Reads the history in Postgres.

use std::fmt::Write as _;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::PgConnection;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Change, READERS, Until, sessions};
use crate::deadline::QUERY_TIMEOUT;
use crate::postgres::sql::{Settings, micros};
use crate::postgres::{LOCK_TIMEOUT, STATEMENT_TIMEOUT, Servers, run_within};
use crate::{Moment, StoreError, TimeZone};

/// A connection that was idle for this long is closed, because its server may have changed its role.
const IDLE_MAX: Duration = Duration::from_secs(10);

const NEXT_XID: &str = "pg_snapshot_xmin(now)::text::bigint
    + age((pg_snapshot_xmin(now)::text::bigint % 4294967296)::text::xid)";

pub(super) struct Reader {
    servers: Servers,
    settings: Settings,
    permits: Semaphore,
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
            permits: Semaphore::new(READERS),
            idle: Mutex::default(),
            horizon: Mutex::default(),
        }
    }

    pub(super) async fn changes_after(
        &self,
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

    async fn settled_changes(
        &self,
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

    async fn read_horizon(&self) -> Result<Mark, StoreError> {
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

    pub(super) async fn settled_position(&self) -> Result<i64, StoreError> {
        Ok(self.read_horizon().await?.position)
    }

    pub(super) async fn extent(&self) -> Result<Vec<Change>, StoreError> {
        self.changes(
            "WHERE position IN ((SELECT min(position) FROM presence_change),
                                (SELECT max(position) FROM presence_change))
             ORDER BY position",
        )
        .await
    }

    pub(super) async fn changes_of(
        &self,
        id: i64,
        until: Until,
    ) -> Result<Vec<Change>, StoreError> {
        let mut condition = format!("WHERE object_id = '{id}'::bigint");
        // Writing to a string cannot fail.
        _ = match until {
            Until::Now => Ok(()),
            Until::Position(position) => write!(condition, " AND position <= {position}"),
            Until::Time(time) => write!(
                condition,
                " AND position <= coalesce(
                      (SELECT min(position) FROM presence_change
                       WHERE object_id = '{id}'::bigint AND at >= {}), {})",
                literal(time),
                i64::MAX
            ),
        };
        let limit = sessions::CHANGES;
        self.changes(&format!("{condition} ORDER BY position DESC LIMIT {limit}")).await
    }

    pub(super) async fn gone_since(
        &self,
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
             WHERE kind = 'gone' AND at >= {since}
               AND NOT EXISTS (SELECT FROM object WHERE object.id = object_id)
             ORDER BY object_id LIMIT {limit}"
        ))
        .await
    }

    pub(super) async fn now(&self) -> Result<Moment, StoreError> {
        let rows: Vec<(i64,)> = self.fetch_all(&crate::postgres::sql::now()).await?;
        Ok(Moment::from_micros(rows.first().map_or(0, |(now,)| *now)))
    }

    /// The changes that `rest`, the rest of a statement, selects.
    async fn changes(&self, rest: &str) -> Result<Vec<Change>, StoreError> {
        let (at, last_seen) = (micros("at"), micros("last_seen"));
        self.fetch_all(&format!(
            "SELECT position, object_id, kind = 'online', {at}, {last_seen}
             FROM presence_change {rest}"
        ))
        .await
    }

    /// Runs a statement on an idle or a new connection. An idle one may be broken, so the statement
    /// is then tried on a new one.
    async fn fetch_all<R>(&self, statement: &str) -> Result<Vec<R>, StoreError>
    where
        R: for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        if let Some(connection) = self.take_idle()
            && let Ok(rows) = self.run(connection, statement).await
        {
            return Ok(rows);
        }
        let (_, connection) = self.servers.connect(0).await?;
        self.run(connection, statement).await
    }

    fn take_idle(&self) -> Option<PgConnection> {
        let mut idle = self.idle.lock();
        idle.retain(|(since, _)| since.elapsed() < IDLE_MAX);
        idle.pop().map(|(_, connection)| connection)
    }

    async fn run<R>(
        &self,
        mut connection: PgConnection,
        statement: &str,
    ) -> Result<Vec<R>, StoreError>
    where
        R: for<'r> FromRow<'r, PgRow>,
    {
        let script = self.settings.and(statement);
        let rows = run_within(QUERY_TIMEOUT, &mut connection, script, StoreError::History).await?;
        self.idle.lock().push((Instant::now(), connection));
        Ok(rows)
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
