//! The partner, as strict as a real one: it gives up after a second and never sends anything twice.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::Client;
use tokio::task::JoinHandle;

/// What became of the callbacks.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// The ids of all callbacks that were answered 2xx: these must not be lost.
    pub accepted: Vec<i64>,
    /// The answers that were not 2xx, whole.
    pub refused: Vec<String>,
    /// How many got no answer: connection refused or broken, or no answer within a second.
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
    /// One that gives up later than a real one does, for tests that are not about time.
    #[must_use]
    pub fn with_timeout(patience: Duration) -> Self {
        // It fails only when another test of this process has installed it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .timeout(patience)
            .no_proxy()
            .build()
            .expect("a plain client should build");
        Self { client, ledger: Arc::default() }
    }

    /// What has been answered so far.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Posts one callback and says whether it was accepted.
    pub async fn post(&self, endpoint: &str, ids: &[i64]) -> bool {
        post(&self.client, &self.ledger, endpoint, ids).await
    }

    /// Posts the `ids` once each, `per_callback` at a time, one callback every `interval`, whatever
    /// becomes of the ones before.
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
    let answer = client.post(endpoint).body(body).send().await;
    let lock = || ledger.lock().unwrap_or_else(PoisonError::into_inner);
    match answer {
        Ok(answer) if answer.status().is_success() => {
            lock().accepted.extend_from_slice(ids);
            true
        }
        Ok(answer) => {
            let status = answer.status();
            let body = answer.text().await.unwrap_or_default();
            lock().refused.push(format!("{status}: {body}"));
            false
        }
        Err(_) => {
            lock().unanswered += 1;
            false
        }
    }
}
