//! Callbacks that show whether the system works again, from the callback to the commit.

use std::ops::RangeFrom;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgPool;
use testkit::Partner;

const INTERVAL: Duration = Duration::from_millis(100);
/// Time limit of a query, after which the table counts as away.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Far from the ids of the load.
const FIRST_ID: i64 = 1_000_000_000_000;

/// Posts callbacks of one id each, and checks whether the ids appear in the table.
pub(crate) struct Prober {
    partner: Partner,
    ids: RangeFrom<i64>,
    accepted: Vec<(i64, SystemTime)>,
}

impl Default for Prober {
    fn default() -> Self {
        Self { partner: Partner::default(), ids: FIRST_ID.., accepted: Vec::new() }
    }
}

impl Prober {
    /// All accepted ids, with the time of the response.
    pub(crate) fn accepted(&self) -> &[(i64, SystemTime)] {
        &self.accepted
    }

    /// Posts probes until one has been accepted and the object of one is in the table. With
    /// `committed_after`, any object that was last seen after that time also counts, because a
    /// probe waits behind the backlog.
    pub(crate) async fn probe_until_committed(
        &mut self,
        endpoint: &str,
        table: &PgPool,
        committed_after: Option<SystemTime>,
    ) {
        let mut pending = Vec::new();
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            ticks.tick().await;
            if let Some(id) = self.ids.by_ref().find(|id| id % 2 == 0)
                && self.partner.post(endpoint, &[id]).await
            {
                self.accepted.push((id, SystemTime::now()));
                pending.push(id);
            }
            if !pending.is_empty() && is_any_committed(table, &pending, committed_after).await {
                return;
            }
        }
    }
}

async fn is_any_committed(
    table: &PgPool,
    ids: &[i64],
    committed_after: Option<SystemTime>,
) -> bool {
    const ANY: &str =
        "SELECT EXISTS (SELECT FROM object WHERE id = ANY($1) OR last_seen > to_timestamp($2))";
    let since_1970 = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let after = committed_after.map(|time| since_1970(time).as_secs_f64());
    let query = sqlx::query_scalar(ANY).bind(ids).bind(after).fetch_one(table);
    matches!(tokio::time::timeout(QUERY_TIMEOUT, query).await, Ok(Ok(true)))
}
