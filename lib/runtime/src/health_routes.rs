//! Health routes for load balancers that check the port to which they send requests.

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::Health;

/// `/livez` and `/readyz` for a public port. They return only the status; the admin address also
/// serves the reasons.
pub fn health_routes<S: Clone + Send + Sync + 'static>(health: Health) -> Router<S> {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(async move || readyz(&health)))
}

fn readyz(health: &Health) -> Response {
    if health.is_ready() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
}
