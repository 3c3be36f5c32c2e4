//! The simulated partner posts callbacks with random ids at an interval, each callback once.

use rand::RngExt as _;
use runtime::CancellationToken;
use runtime::authenticity::Authenticity;
use tokio::time::{Instant, MissedTickBehavior};

use crate::callback::{self, Outcome, Sender};
use crate::config::{self, Callbacks};

/// A client of the callback endpoint that behaves like the partners.
pub struct Partner {
    sender: Sender,
    callbacks: Callbacks,
    config: config::Partner,
}

impl Partner {
    /// Creates the partner without posting yet.
    ///
    /// # Errors
    /// When its HTTP client cannot be built, most likely because no TLS provider is installed.
    pub fn new(
        callbacks: Callbacks,
        authenticity: Authenticity,
        config: config::Partner,
    ) -> Result<Self, reqwest::Error> {
        let sender = Sender::new(&callbacks, authenticity.callback_secret)?;
        Ok(Self { sender, callbacks, config })
    }

    /// Posts the first callback now and then one per interval until `shutdown`. A callback in
    /// flight still waits for its response.
    pub async fn post_until(self, shutdown: CancellationToken) {
        let mut interval = tokio::time::interval(self.config.callback_interval);
        // After a slow response, the partner resumes its interval and does not catch up.
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = interval.tick() => self.post().await,
            }
        }
    }

    async fn post(&self) {
        let drawn = self.draw_ids();
        let ids = drawn.len();
        let sent_at = Instant::now();
        let outcome = self.sender.send(callback::body(drawn.into_iter())).await;
        let elapsed_ms = sent_at.elapsed().as_millis();
        match outcome {
            Outcome::Accepted(status) => {
                tracing::info!(ids, status = status.as_u16(), elapsed_ms, "callback accepted");
            }
            Outcome::Refused(status) => {
                tracing::warn!(ids, status = status.as_u16(), elapsed_ms, "callback refused");
            }
            Outcome::Unanswered => {
                tracing::warn!(ids, elapsed_ms, "callback not answered in time");
            }
            Outcome::Failed(error) => {
                // The text of reqwest's error is only "error sending request"; `{:#}` prints the
                // causes.
                let error = anyhow::Error::new(error.without_url());
                tracing::warn!(ids, elapsed_ms, "callback not answered: {error:#}");
            }
        }
    }

    /// Random ids, each drawn independently, so that some repeat.
    fn draw_ids(&self) -> Vec<i64> {
        let mut random = rand::rng();
        let count =
            random.random_range(self.config.callback_ids_min..=self.config.callback_ids_max);
        let range = self.callbacks.object_id_min..=self.callbacks.object_id_max;
        (0..count).map(|_| random.random_range(range.clone())).collect()
    }
}
