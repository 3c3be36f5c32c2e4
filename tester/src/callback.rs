//! Sends one callback once, and reports its outcome.

use std::time::{Duration, SystemTime};

use reqwest::{Client, StatusCode, header, redirect, retry};
use runtime::authenticity::Keys;
use url::Url;
use uuid::Uuid;

use crate::config::Callbacks;

/// How long an idle connection is kept for the next callback. If this were longer than the server's
/// idle timeout, a callback could be sent on a connection that the server is closing, and be lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

const CALLBACKS: &str = "lastseen_tester_callbacks_total";

/// The outcome of a callback.
#[derive(Debug)]
pub enum Outcome {
    /// Answered 2xx.
    Accepted(StatusCode),
    /// Answered with another status.
    Refused(StatusCode),
    /// Not answered within `CALLBACK_TIMEOUT`.
    Unanswered,
    /// The connection could not be made, or ended before the response.
    Failed(reqwest::Error),
}

impl Outcome {
    fn label(&self) -> &'static str {
        match self {
            Self::Accepted(_) => "accepted",
            Self::Refused(_) => "refused",
            // In both cases no response arrived.
            Self::Unanswered | Self::Failed(_) => "unanswered",
        }
    }
}

/// Posts callbacks, each one once, signed if there are keys.
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    client: Client,
    endpoint: Url,
    keys: Option<Keys>,
}

impl Sender {
    /// # Errors
    /// When the client cannot be built, most likely because no TLS provider is installed.
    pub(crate) fn new(callbacks: &Callbacks, keys: Option<Keys>) -> Result<Self, reqwest::Error> {
        metrics::describe_counter!(CALLBACKS, "Callbacks sent, by outcome.");
        let client = Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .connect_timeout(callbacks.callback_timeout)
            .timeout(callbacks.callback_timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build()?;
        Ok(Self { client, endpoint: callbacks.callback_endpoint.clone(), keys })
    }

    /// Sends one callback with this body, and waits for the response up to the timeout.
    pub(crate) async fn send(&self, body: String) -> Outcome {
        let mut request = self
            .client
            .post(self.endpoint.clone())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(keys) = &self.keys {
            let id = format!("msg_{}", Uuid::now_v7().simple());
            let signed = keys.sign(&id, SystemTime::now(), body.as_bytes());
            request = request
                .header(runtime::authenticity::ID, id)
                .header(runtime::authenticity::TIMESTAMP, signed.timestamp)
                .header(runtime::authenticity::SIGNATURE, signed.signature);
        }
        let request = request.body(body);
        let response = async {
            let mut response = request.send().await?;
            // The body is read to its end, so that the connection can be reused.
            while response.chunk().await?.is_some() {}
            Ok::<_, reqwest::Error>(response.status())
        };
        let outcome = match response.await {
            Ok(status) if status.is_success() => Outcome::Accepted(status),
            Ok(status) => Outcome::Refused(status),
            Err(error) if error.is_timeout() => Outcome::Unanswered,
            Err(error) => Outcome::Failed(error),
        };
        metrics::counter!(CALLBACKS, "outcome" => outcome.label()).increment(1);
        outcome
    }
}

/// The body of a callback with these ids. Built without serde, because under load this runs tens of
/// thousands of times a second.
pub(crate) fn body(ids: impl ExactSizeIterator<Item = i64>) -> String {
    const ID_BYTES: usize = 8;
    let mut body = String::with_capacity(20 + ids.len() * ID_BYTES);
    let mut digits = itoa::Buffer::new();
    body.push_str("{\"object_ids\":[");
    for (index, id) in ids.enumerate() {
        if index > 0 {
            body.push(',');
        }
        body.push_str(digits.format(id));
    }
    body.push_str("]}");
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_is_json_with_the_ids_in_order() {
        assert_eq!(body([].into_iter()), r#"{"object_ids":[]}"#);
        assert_eq!(body([7].into_iter()), r#"{"object_ids":[7]}"#);
        let ids = [i64::MIN, -1, 0, 5, 5, i64::MAX];
        let parsed: serde_json::Value = serde_json::from_str(&body(ids.into_iter())).unwrap();
        assert_eq!(parsed, serde_json::json!({ "object_ids": ids }));
    }
}
