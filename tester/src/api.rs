//! The simulated status API: responds slowly whether an object is online, and injects failures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use rand::RngExt as _;
use runtime::CancellationToken;
use runtime::http::{self, Limits};
use runtime::problem::Problem;
use tokio::net::TcpListener;

use crate::config::{self, Failures};

/// Higher limits than any test reaches: a consumer may have thousands of slow lookups in flight.
const LIMITS: Limits = Limits {
    max_connections: 20_000,
    header_timeout: Duration::from_secs(30),
    idle_timeout: Some(Duration::from_secs(75)),
    quiet_period: Duration::ZERO,
};

const LOOKUPS: &str = "lastseen_tester_lookups_total";
const IN_FLIGHT: &str = "lastseen_tester_lookups_in_flight";

/// The simulated status API.
pub struct Api {
    listener: TcpListener,
    config: config::Api,
}

impl Api {
    /// Listens on the address. Connections wait in the kernel's backlog until [`Api::serve`].
    ///
    /// # Errors
    /// When it cannot listen on the address.
    pub fn bind(config: config::Api) -> std::io::Result<Self> {
        describe_metrics();
        Ok(Self { listener: http::listen(config.tester_addr)?, config })
    }

    /// The address that it listens on, with the actual port if the setting has port 0.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves lookups until `shutdown`, then finishes those in flight. Hanging lookups end at once.
    pub async fn serve(self, shutdown: CancellationToken) {
        let state = Arc::new(Behaviour { config: self.config, shutdown: shutdown.clone() });
        let router = Router::new()
            .route("/objects/{id}", get(lookup))
            .fallback(async || {
                Problem::new(StatusCode::NOT_FOUND, "not found; use GET /objects/{id}")
            })
            .method_not_allowed_fallback(async || {
                Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed; use GET")
            })
            .with_state(state);
        http::serve(self.listener, router, LIMITS, shutdown).await;
    }
}

struct Behaviour {
    config: config::Api,
    shutdown: CancellationToken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Online,
    Offline,
    InternalError,
    TooManyRequests,
    Hang,
    Garbage,
    WrongId,
}

async fn lookup(
    State(behaviour): State<Arc<Behaviour>>,
    id: Result<Path<i64>, PathRejection>,
) -> Response {
    let _in_flight = InFlight::new();
    let Ok(Path(id)) = id else {
        metrics::counter!(LOOKUPS, "answer" => "bad_request").increment(1);
        return Problem::new(StatusCode::BAD_REQUEST, "the id must be a 64-bit integer")
            .into_response();
    };
    let config = &behaviour.config;
    // In a block, because the generator belongs to this thread and must not be held across an
    // await.
    let (answer, latency) = {
        let mut random = rand::rng();
        let failure = failure_at(random.random(), &config.failures);
        let answer = failure.unwrap_or_else(|| true_status(id, config.online_share));
        (answer, random.random_range(config.latency_min..=config.latency_max))
    };
    metrics::counter!(LOOKUPS, "answer" => label(answer)).increment(1);
    match answer {
        // The server drops this future earlier if the client disconnects.
        Answer::Hang => behaviour.shutdown.cancelled().await,
        _ => tokio::time::sleep(latency).await,
    }
    respond(answer, id, config.online_share)
}

fn label(answer: Answer) -> &'static str {
    match answer {
        Answer::Online => "online",
        Answer::Offline => "offline",
        Answer::InternalError => "500",
        Answer::TooManyRequests => "429",
        Answer::Hang => "hang",
        Answer::Garbage => "garbage",
        Answer::WrongId => "wrong_id",
    }
}

fn respond(answer: Answer, id: i64, online_share: Option<f64>) -> Response {
    match answer {
        Answer::Online => status(id, true),
        Answer::Offline => status(id, false),
        Answer::InternalError => {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "an injected failure").into_response()
        }
        Answer::TooManyRequests => Problem {
            retry_after_seconds: Some(1),
            ..Problem::new(StatusCode::TOO_MANY_REQUESTS, "an injected refusal")
        }
        .into_response(),
        // Sent only at shutdown, so that the drain does not wait for hanging lookups.
        Answer::Hang => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "draining").into_response(),
        // With the content type of JSON, so that only parsing the body reveals the fault.
        Answer::Garbage => {
            let content_type = [(header::CONTENT_TYPE, "application/json")];
            (content_type, "<html>it works!</html>").into_response()
        }
        Answer::WrongId => {
            let other = id.wrapping_add(1);
            status(other, true_status(other, online_share) == Answer::Online)
        }
    }
}

fn status(id: i64, online: bool) -> Response {
    Json(serde_json::json!({ "id": id, "online": online })).into_response()
}

/// Online if `id` is even or, with `online_share`, if `id` is in this share of the ids.
///
/// A hash decides whether an id is in the share, so that the status of an id never changes.
fn true_status(id: i64, online_share: Option<f64>) -> Answer {
    let online = match online_share {
        None => id % 2 == 0,
        Some(share) => hash_point(id) < share,
    };
    if online { Answer::Online } else { Answer::Offline }
}

/// Maps an id to a number in the interval [0, 1). The numbers of all ids are evenly distributed.
fn hash_point(id: i64) -> f64 {
    // The output function of SplitMix64, which gives neighbouring ids unrelated numbers.
    let mut hash = id.cast_unsigned().wrapping_add(0x9E37_79B9_7F4A_7C15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    f64::from((hash >> 32) as u32) / 2_f64.powi(32)
}

/// The failure to inject for a random `point` in the interval [0, 1). The failures divide the
/// interval from 0 on, and the part of each is as wide as its share.
fn failure_at(point: f64, failures: &Failures) -> Option<Answer> {
    let mut end = 0.0;
    [
        (failures.fail_500_share, Answer::InternalError),
        (failures.fail_429_share, Answer::TooManyRequests),
        (failures.fail_hang_share, Answer::Hang),
        (failures.fail_garbage_share, Answer::Garbage),
        (failures.fail_wrong_id_share, Answer::WrongId),
    ]
    .into_iter()
    .find(|(share, _)| {
        end += share;
        point < end
    })
    .map(|(_, failure)| failure)
}

/// Counts a lookup as in flight until this guard is dropped, also if the client disconnects.
struct InFlight;

impl InFlight {
    fn new() -> Self {
        metrics::gauge!(IN_FLIGHT).increment(1);
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        metrics::gauge!(IN_FLIGHT).decrement(1);
    }
}

fn describe_metrics() {
    metrics::describe_counter!(LOOKUPS, "Lookups received, by the response chosen for them.");
    metrics::describe_gauge!(IN_FLIGHT, "Lookups received and not answered yet.");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_share_the_even_ids_are_online() {
        let online: Vec<i64> =
            (-3..=4).filter(|id| true_status(*id, None) == Answer::Online).collect();
        assert_eq!(online, [-2, 0, 2, 4]);
    }

    #[test]
    fn online_share_is_met_and_the_same_ids_stay_online() {
        let online = |share| -> Vec<i64> {
            (0..10_000).filter(|id| true_status(*id, Some(share)) == Answer::Online).collect()
        };
        assert_eq!(online(0.0).len(), 0);
        assert_eq!(online(1.0).len(), 10_000);
        let quarter = online(0.25);
        assert!((2_300..=2_700).contains(&quarter.len()), "{} of 10000", quarter.len());
        assert_eq!(quarter, online(0.25));
        let half = online(0.5);
        assert!(quarter.iter().all(|id| half.contains(id)), "a larger share turns ids offline");
    }

    #[test]
    fn each_failure_occupies_its_share_of_the_interval() {
        let failures = Failures {
            fail_500_share: 0.1,
            fail_429_share: 0.0,
            fail_hang_share: 0.2,
            fail_garbage_share: 0.3,
            fail_wrong_id_share: 0.1,
        };
        for (point, expected) in [
            (0.0, Some(Answer::InternalError)),
            (0.09, Some(Answer::InternalError)),
            (0.11, Some(Answer::Hang)),
            (0.29, Some(Answer::Hang)),
            (0.31, Some(Answer::Garbage)),
            (0.59, Some(Answer::Garbage)),
            (0.61, Some(Answer::WrongId)),
            (0.71, None),
            (0.99, None),
        ] {
            assert_eq!(failure_at(point, &failures), expected, "at {point}");
        }
    }
}
