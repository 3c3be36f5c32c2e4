//! Metrics, alerts, dashboard and settings of the services.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests may panic, too")]

mod dashboard;
mod metrics;
mod promtool;
mod rules;
mod settings;

use std::time::Duration;

use testbed::Process;

const PATIENCE: Duration = Duration::from_mins(1);

/// The text of `/metrics` of a service.
async fn scrape(service: &Process) -> String {
    let (status, text) = service.get("/metrics").await;
    assert_eq!(status, 200, "{text}");
    text
}
