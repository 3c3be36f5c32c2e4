//! A partner as strict as a real one: it gives up after a second and never retries.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Client;
use tokio::task::JoinHandle;

use crate::wait_until;

/// The responses to the callbacks.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// The ids of all callbacks that were answered 2xx. They must not be lost.
    pub accepted: Vec<i64>,
    /// Status and body of the other responses.
    pub refused: Vec<String>,
    /// The number of callbacks without a response: connection refused or broken, or a timeout.
    pub unanswered: usize,
}

/// Posts callbacks in the background.
#[derive(Clone, Debug)]
pub struct Partner {
    client: Client,
    ledger: Arc<Mutex<Ledger>>,
}

impl Default for Partner {
    fn default() -> Self {
        Self::with_timeout(Duration::from_secs(1))
    }
}

impl Partner {
    /// A partner with a longer timeout than a real one, for tests that are not about time.
    pub fn with_timeout(timeout: Duration) -> Self {
        Self { client: http_client(timeout), ledger: Arc::default() }
    }

    /// The responses so far.
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().clone()
    }

    /// Waits until at least `count` ids have been accepted.
    pub async fn wait_for_accepted(&self, count: usize) {
        let what = format!("{count} ids are accepted");
        wait_until(&what, async || self.ledger.lock().accepted.len() >= count).await;
    }

    /// Posts one callback and returns whether it was accepted.
    pub async fn post(&self, endpoint: &str, ids: &[i64]) -> bool {
        let body = serde_json::json!({ "object_ids": ids }).to_string();
        match self.client.post(endpoint).body(body).send().await {
            Ok(response) if response.status().is_success() => {
                self.ledger.lock().accepted.extend_from_slice(ids);
                true
            }
            Ok(response) => {
                let status = response.status();
                let body = response.text().await.unwrap_or_default();
                self.ledger.lock().refused.push(format!("{status}: {body}"));
                false
            }
            Err(_) => {
                self.ledger.lock().unanswered += 1;
                false
            }
        }
    }

    /// Posts each of `ids` once, with `per_callback` ids in a callback and one callback every
    /// `interval`, without waiting for the responses to earlier callbacks.
    pub fn post_all(
        &self,
        endpoint: String,
        ids: Range<i64>,
        per_callback: usize,
        interval: Duration,
    ) -> JoinHandle<()> {
        let partner = self.clone();
        tokio::spawn(async move {
            let ids: Vec<i64> = ids.collect();
            let mut ticks = tokio::time::interval(interval);
            let mut posts = tokio::task::JoinSet::new();
            for callback in ids.chunks(per_callback) {
                ticks.tick().await;
                let (partner, endpoint) = (partner.clone(), endpoint.clone());
                let callback = callback.to_vec();
                posts.spawn(async move { partner.post(&endpoint, &callback).await });
            }
            while let Some(posted) = posts.join_next().await {
                posted.expect("a post should not panic");
            }
        })
    }
}

/// Installs the TLS provider of this process, without which no HTTP client can be built.
pub fn install_tls() {
    // This fails only if another test of this process has installed the provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// An HTTP client that gives up after `timeout`.
pub fn http_client(timeout: Duration) -> Client {
    install_tls();
    let client = Client::builder().timeout(timeout).no_proxy().build();
    client.expect("a plain client should build")
}
