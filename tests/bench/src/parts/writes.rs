//! The consumer's batch writer alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use consumer::{WriteOutcome, Writer};
use messaging::events::{Emitter, Exchange};
use runtime::traces::Span;
use runtime::{CancellationToken, Supervisor};
use store::Store;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::callbacks::NO_STATUS_API;
use crate::limits;
use crate::servers::{Servers, per_second};
use crate::table::{Goal, Row};

const DURATION: Duration = Duration::from_secs(4);
const ROWS_PER_UPSERT: u32 = 1_000;
/// The number of objects.
const POPULATION: u32 = 100_000;
/// The number of results that wait for their commit, as in a consumer with many lookups: one batch
/// that is being written, and the next one.
const WAITING: i64 = 2_000;

pub(crate) async fn measure(servers: &Servers) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.prepared(NO_STATUS_API.to_owned()).await;
    let url = deployment.database.url();
    // Insert all rows first, so that both measurements only update.
    limits::upsert(url, ROWS_PER_UPSERT, POPULATION, sleep(DURATION / 2)).await?;
    let limit = limits::upsert(url, ROWS_PER_UPSERT, POPULATION, sleep(DURATION)).await?;

    // The writer needs only a part of the settings of a consumer.
    let settings: consumer::Config = testkit::parse(["--database-url", url]);
    let store = Arc::new(Store::start(settings.store.open(&Supervisor::default())?, "bench", 2));
    store.status().wait_for(Result::is_ok).await?;
    let events = Emitter::start(&Exchange::disabled(), "bench: events", &Supervisor::default());
    let (supervisor, shutdown) = (Supervisor::default(), CancellationToken::new());
    let writer = Writer::start(store, events, &settings.lookups, &supervisor, shutdown);
    let (started, mut waiting) = (Instant::now(), JoinSet::new());
    for first in 0..WAITING {
        let writer = writer.clone();
        waiting.spawn(async move {
            let (mut written, mut id) = (0_u64, first);
            while started.elapsed() < DURATION {
                let write = writer.record(id * 2, Instant::now(), Span::default()).await?;
                let outcome = write.outcome().await?;
                anyhow::ensure!(outcome == WriteOutcome::Committed, "{outcome:?}");
                written += 1;
                id = (id + WAITING) % i64::from(POPULATION);
            }
            Ok(written)
        });
    }
    let mut written = 0;
    while let Some(count) = waiting.join_next().await {
        written += count??;
    }
    let ours = per_second(written, started.elapsed());
    let mut row = Row::new("the batch writer, 2,000 results at once", "rows/s", ours);
    row.limit = Some(limit);
    row.goals = vec![Goal::RatioAtLeast(0.8)];
    Ok(vec![row])
}
