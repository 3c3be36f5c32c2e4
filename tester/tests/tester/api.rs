//! Tests of the simulated status API.

use std::time::{Duration, Instant};

use reqwest::Response;
use runtime::CancellationToken;
use serde_json::{Value, json};
use tester::api::Api;

use crate::support::{client, settings, soon};

struct Running {
    url: String,
    client: reqwest::Client,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Starts a status API that responds at once unless `flags` set another latency.
    fn start(flags: &[&str]) -> Self {
        let defaults = ["--tester-addr=127.0.0.1:0", "--latency-min=0s", "--latency-max=0s"];
        let mut all = Vec::from(defaults);
        all.extend(flags);
        let api = Api::bind(settings(&all).api.into_inner()).unwrap();
        let url = format!("http://{}", api.address().unwrap());
        let stop = CancellationToken::new();
        let served = tokio::spawn(api.serve(stop.clone()));
        Self { url, client: client(), stop, served }
    }

    async fn get(&self, path: &str) -> Response {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    async fn status_of(&self, id: i64) -> Value {
        let response = self.get(&format!("/objects/{id}")).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json");
        serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
    }
}

async fn problem(response: Response) -> (u16, Value) {
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let status = response.status().as_u16();
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    assert_eq!(body["status"], status);
    (status, body)
}

#[tokio::test]
async fn even_ids_are_online_and_odd_ids_are_not() {
    let api = Running::start(&[]);
    for (id, online) in [(0, true), (42, true), (7, false), (-3, false), (i64::MAX, false)] {
        assert_eq!(api.status_of(id).await, json!({ "id": id, "online": online }));
    }
}

#[tokio::test]
async fn online_share_replaces_even_and_odd() {
    let api = Running::start(&["--online-share=1"]);
    assert_eq!(api.status_of(7).await, json!({ "id": 7, "online": true }));
    let api = Running::start(&["--online-share=0"]);
    assert_eq!(api.status_of(8).await, json!({ "id": 8, "online": false }));
}

#[tokio::test]
async fn non_integer_id_is_answered_400_and_another_path_404() {
    let api = Running::start(&[]);
    for id in ["abc", "1.5", "9223372036854775808", "%FF"] {
        let (status, body) = problem(api.get(&format!("/objects/{id}")).await).await;
        assert_eq!((status, &body["title"]), (400, &json!("Bad Request")), "for {id}");
    }
    for path in ["/", "/objects", "/objects/1/2"] {
        assert_eq!(problem(api.get(path).await).await.0, 404, "for {path}");
    }
    let post = api.client.post(format!("{}/objects/1", api.url)).send().await.unwrap();
    assert_eq!(problem(post).await.0, 405);
}

#[tokio::test]
async fn response_time_is_within_the_latency_bounds() {
    let api = Running::start(&["--latency-min=100ms", "--latency-max=200ms"]);
    let mut times = Vec::new();
    for id in 0..8 {
        let sent_at = Instant::now();
        api.status_of(id).await;
        times.push(sent_at.elapsed());
    }
    // Only the lower bound holds for each response: a busy machine may respond too late, but not
    // all eight times.
    assert!(times.iter().all(|time| *time >= Duration::from_millis(100)), "{times:?}");
    assert!(times.iter().any(|time| *time <= Duration::from_millis(220)), "{times:?}");
    let (shortest, longest) = (times.iter().min().unwrap(), times.iter().max().unwrap());
    assert!(*longest > *shortest + Duration::from_millis(5), "not spread: {times:?}");
}

#[tokio::test]
async fn injected_500_is_a_problem() {
    let api = Running::start(&["--fail-500-share=1"]);
    assert_eq!(problem(api.get("/objects/2").await).await.0, 500);
}

#[tokio::test]
async fn injected_429_has_retry_after() {
    let api = Running::start(&["--fail-429-share=1"]);
    let response = api.get("/objects/2").await;
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(problem(response).await.0, 429);
}

#[tokio::test]
async fn injected_garbage_is_a_200_that_is_not_json() {
    let api = Running::start(&["--fail-garbage-share=1"]);
    let response = api.get("/objects/2").await;
    assert_eq!(response.status(), 200);
    assert!(serde_json::from_slice::<Value>(&response.bytes().await.unwrap()).is_err());
}

#[tokio::test]
async fn injected_wrong_id_is_a_valid_response_about_another_id() {
    let api = Running::start(&["--fail-wrong-id-share=1"]);
    assert_eq!(api.status_of(2).await, json!({ "id": 3, "online": false }));
    assert_eq!(api.status_of(i64::MAX).await["id"], i64::MIN);
}

#[tokio::test]
async fn injected_hang_lasts_until_the_drain_and_does_not_delay_it() {
    let api = Running::start(&["--fail-hang-share=1"]);
    let url = format!("{}/objects/2", api.url);
    let client_timeout = Duration::from_millis(300);
    let error = api.client.get(&url).timeout(client_timeout).send().await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");

    let mut hanging = tokio::spawn(api.client.get(&url).send());
    // The lookup hangs: another one would have been answered within this time.
    assert!(tokio::time::timeout(client_timeout, &mut hanging).await.is_err());
    api.stop.cancel();
    soon(api.served).await.unwrap();
    assert_eq!(problem(soon(hanging).await.unwrap().unwrap()).await.0, 503);
}

#[tokio::test]
async fn drain_finishes_a_slow_lookup() {
    let api = Running::start(&["--latency-min=700ms", "--latency-max=700ms"]);
    let mut lookup = tokio::spawn(api.client.get(format!("{}/objects/2", api.url)).send());
    let in_flight = Duration::from_millis(300);
    assert!(tokio::time::timeout(in_flight, &mut lookup).await.is_err());
    api.stop.cancel();
    let response = soon(lookup).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.bytes().await.unwrap(), r#"{"id":2,"online":true}"#);
    soon(api.served).await.unwrap();
}
