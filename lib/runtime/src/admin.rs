//! The admin address: `/livez`, `/readyz` and `/metrics`.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::problem::Problem;
use crate::{Health, recorder};

#[derive(Clone)]
struct Admin {
    service: &'static str,
    health: Health,
}

pub(crate) fn router(service: &'static str, health: Health) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render_metrics))
        .fallback(async || {
            Problem::new(StatusCode::NOT_FOUND, "not found; use /livez, /readyz or /metrics")
        })
        .with_state(Admin { service, health })
}

async fn readyz(State(admin): State<Admin>) -> Response {
    if admin.health.is_draining() {
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "draining").into_response();
    }
    let missing = admin.health.missing();
    if missing.is_empty() {
        let mut lines = vec!["ready\n".to_owned()];
        let optional = admin.health.missing_optional().into_iter();
        lines.extend(optional.map(|(name, reason)| format!("without {name}: {reason}\n")));
        return lines.concat().into_response();
    }
    let reasons: Vec<String> =
        missing.into_iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, reasons.join("; ")).into_response()
}

async fn render_metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    let mut roles = admin.health.roles(admin.service);
    for (_, is_ready) in &mut roles {
        *is_ready &= !admin.health.is_draining();
    }
    ([(header::CONTENT_TYPE, content_type)], recorder::render(&roles))
}
