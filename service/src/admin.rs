//! The admin address: `/livez`, `/readyz` and `/metrics`.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

use crate::Health;
use crate::problem::Problem;

/// Upper bounds of every `_seconds` histogram: from a fast commit to a status API at its slowest.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Upper bounds of every `_rows` histogram.
const ROWS: [f64; 8] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 10_000.0];

/// Installs the process's metrics recorder; the handle renders it.
///
/// # Errors
/// When a recorder is installed already.
pub(crate) fn install_metrics(service: &'static str) -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_rows".to_owned()), &ROWS)?
        .install_recorder()?;
    metrics::describe_gauge!("lastseen_build_info", "Always 1; the labels say what runs.");
    metrics::gauge!("lastseen_build_info", "service" => service, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

/// Moves recorded samples into their buckets every few seconds, so that histograms stay small when
/// nobody scrapes.
pub(crate) async fn metrics_upkeep(handle: PrometheusHandle) {
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    loop {
        interval.tick().await;
        handle.run_upkeep();
    }
}

#[derive(Clone)]
struct Admin {
    health: Health,
    metrics: PrometheusHandle,
    draining: CancellationToken,
}

pub(crate) fn router(
    health: Health,
    metrics: PrometheusHandle,
    draining: CancellationToken,
) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render_metrics))
        .fallback(async || {
            Problem::new(StatusCode::NOT_FOUND, "here are /livez, /readyz and /metrics")
        })
        .with_state(Admin { health, metrics, draining })
}

async fn readyz(State(admin): State<Admin>) -> Response {
    if admin.draining.is_cancelled() {
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "draining").into_response();
    }
    let missing = admin.health.missing();
    if missing.is_empty() {
        return "ready\n".into_response();
    }
    let reasons: Vec<String> =
        missing.into_iter().map(|(peer, reason)| format!("{peer}: {reason}")).collect();
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, reasons.join("; ")).into_response()
}

async fn render_metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], admin.metrics.render())
}
