//! The status line at the bottom of the terminal.

use std::time::{Duration, Instant};

use messaging::queue::{Depths, Inspector};
use runtime::{CancellationToken, metric_total};
use store::Objects;

const INTERVAL: Duration = Duration::from_secs(1);
/// After a count, the status line pauses for this multiple of the time that the count took, so that
/// counting a long queue does not slow the pipeline down.
const PAUSE_PER_COUNT: u32 = 20;

/// Draws the line until `shutdown`, if standard error is a terminal.
pub(crate) async fn draw(
    broker: messaging::queue::Config,
    store: store::Config,
    shutdown: CancellationToken,
) {
    if !runtime::is_terminal() {
        return shutdown.cancelled().await;
    }
    let mut counts = Counts { broker, store, inspector: None };
    let mut wait = INTERVAL;
    let mut lookups_before = 0.0;
    let mut drawn_at = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => break,
        }
        let started_at = Instant::now();
        // Cancellable, so that an unresponsive broker or database does not delay the shutdown.
        let counting = shutdown.run_until_cancelled(Box::pin(counts.count()));
        let Some((depths, online)) = counting.await else { break };
        wait = INTERVAL.max(started_at.elapsed() * PAUSE_PER_COUNT);
        let lookups = metric_total("lastseen_lookups_total");
        let per_second = (lookups - lookups_before) / drawn_at.elapsed().as_secs_f64();
        (lookups_before, drawn_at) = (lookups, Instant::now());
        let callbacks = metric_total("lastseen_callbacks_total");
        runtime::show_status(&line(callbacks, depths, per_second, online));
    }
    runtime::show_status("");
}

fn line(callbacks: f64, depths: Option<Depths>, per_second: f64, online: Option<u64>) -> String {
    let count = |count: Option<u64>| count.map_or("?".to_owned(), |count| count.to_string());
    let queued = count(depths.map(|depths| depths.ready + depths.delayed));
    let online = count(online);
    let dead = match depths.map_or(0, |depths| depths.dead) {
        0 => String::new(),
        dead => format!(" · {dead} dead letters"),
    };
    format!(
        "{callbacks} callbacks · {queued} queued · {per_second:.1} lookups/s · \
         {online} online now{dead}"
    )
}

/// Counts in the broker and the database. After a failure of the broker, it reconnects with the
/// next count.
struct Counts {
    broker: messaging::queue::Config,
    store: store::Config,
    inspector: Option<Inspector>,
}

impl Counts {
    async fn count(&mut self) -> (Option<Depths>, Option<u64>) {
        (self.depths().await, self.online().await)
    }

    async fn depths(&mut self) -> Option<Depths> {
        let mut inspector = match self.inspector.take() {
            Some(inspector) => inspector,
            None => Inspector::open(&self.broker).await.ok()?,
        };
        let depths = inspector.depths().await.ok()?;
        self.inspector = Some(inspector);
        Some(depths)
    }

    /// Opens a new connection, because after a failover an old one could still lead to the former
    /// primary.
    async fn online(&self) -> Option<u64> {
        let mut objects = Objects::open(&self.store).await.ok()?;
        objects.count().await.ok()
    }
}
