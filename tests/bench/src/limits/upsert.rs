//! Plain upserts.

use std::pin::pin;
use std::time::Instant;

use futures_util::FutureExt as _;
use sqlx::{Connection as _, PgConnection};

use crate::servers::per_second;

/// Upserts batches of `rows` rows, one after the other on one connection, until `until` completes.
/// It cycles through `population` even ids. Returns the number of committed rows per second.
pub(crate) async fn upsert(
    url: &str,
    rows: u32,
    population: u32,
    until: impl Future<Output = ()>,
) -> anyhow::Result<f64> {
    let mut connection = PgConnection::connect(url).await?;
    let mut until = pin!(until.fuse());
    let (started, mut written) = (Instant::now(), 0_u64);
    loop {
        let first = i64::try_from(written % u64::from(population))?;
        let ids: Vec<i64> = (first..first + i64::from(rows)).map(|number| number * 2).collect();
        let upsert = sqlx::query(
            "INSERT INTO object AS seen (id, last_seen) SELECT id, now() FROM unnest($1::bigint[]) AS id
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
             WHERE seen.last_seen < excluded.last_seen",
        )
        .bind(ids)
        .execute(&mut connection);
        let mut upsert = pin!(upsert);
        tokio::select! {
            () = &mut until => return Ok(per_second(written, started.elapsed())),
            done = &mut upsert => { done?; }
        }
        written += u64::from(rows);
    }
}
