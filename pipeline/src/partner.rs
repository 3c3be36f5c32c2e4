//! A partner as strict as a real one: it gives up after a second and never retries.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::Client;
use tokio::task::JoinHandle;

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
#[derive(Debug)]
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
    #[must_use]
    pub fn with_timeout(timeout: Duration) -> Self {
        // It fails only if another test of this process has installed the provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .timeout(timeout)
            .no_proxy()
            .build()
            .expect("a plain client should build");
        Self { client, ledger: Arc::default() }
    }

    /// The responses so far.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Posts one callback and returns whether it was accepted.
    pub async fn post(&self, endpoint: &str, ids: &[i64]) -> bool {
        post(&self.client, &self.ledger, endpoint, ids).await
    }

    /// Posts each of `ids` once, with `per_callback` ids in a callback and one callback every
    /// `interval`. It does not wait for responses in between.
    #[must_use]
    pub fn post_all(
        &self,
        endpoint: String,
        ids: Range<i64>,
        per_callback: usize,
        interval: Duration,
    ) -> JoinHandle<()> {
        let (client, ledger) = (self.client.clone(), Arc::clone(&self.ledger));
        tokio::spawn(async move {
            let ids: Vec<i64> = ids.collect();
            let mut ticks = tokio::time::interval(interval);
            let mut posts = tokio::task::JoinSet::new();
            for callback in ids.chunks(per_callback) {
                ticks.tick().await;
                let (client, ledger) = (client.clone(), Arc::clone(&ledger));
                let (endpoint, callback) = (endpoint.clone(), callback.to_vec());
                posts.spawn(async move { post(&client, &ledger, &endpoint, &callback).await });
            }
            while let Some(posted) = posts.join_next().await {
                posted.expect("a post should not panic");
            }
        })
    }
}

async fn post(client: &Client, ledger: &Mutex<Ledger>, endpoint: &str, ids: &[i64]) -> bool {
    let body = serde_json::json!({ "object_ids": ids }).to_string();
    let response = client.post(endpoint).body(body).send().await;
    let lock = || ledger.lock().unwrap_or_else(PoisonError::into_inner);
    match response {
        Ok(response) if response.status().is_success() => {
            lock().accepted.extend_from_slice(ids);
            true
        }
        Ok(response) => {
            let status = response.status();
            let body = response.text().await.unwrap_or_default();
            lock().refused.push(format!("{status}: {body}"));
            false
        }
        Err(_) => {
            lock().unanswered += 1;
            false
        }
    }
}
