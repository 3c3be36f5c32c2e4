//! Plain lookups.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::servers::per_second;

/// Looks up one object after the other for `duration`, with `concurrency` lookups in flight.
/// Returns the number of answers per second. The client is reqwest with only a timeout.
pub(crate) async fn fetch(
    endpoint: &str,
    concurrency: usize,
    duration: Duration,
) -> anyhow::Result<f64> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(5))
        .pool_max_idle_per_host(concurrency)
        .build()?;
    let (next, answered) = (Arc::new(AtomicI64::new(1)), Arc::new(AtomicU64::new(0)));
    let started = Instant::now();
    let mut loops = JoinSet::new();
    for _ in 0..concurrency {
        let (client, endpoint) = (client.clone(), endpoint.to_owned());
        let (next, answered) = (Arc::clone(&next), Arc::clone(&answered));
        loops.spawn(async move {
            while started.elapsed() < duration {
                let id = next.fetch_add(1, Ordering::Relaxed);
                let answer = client.get(format!("{endpoint}/objects/{id}")).send().await?;
                answer.error_for_status()?.bytes().await?;
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, reqwest::Error>(())
        });
    }
    while let Some(ended) = loops.join_next().await {
        ended??;
    }
    Ok(per_second(answered.load(Ordering::Relaxed), started.elapsed()))
}
