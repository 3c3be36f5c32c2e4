//! What the services tell of themselves: that it is well-formed, true, and all written down.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "the helpers of tests are tests as well"
)]

mod dashboard;
mod metrics;
mod promtool;
mod rules;
mod settings;

use std::time::Duration;

use testbed::Process;

const PATIENCE: Duration = Duration::from_mins(1);

/// What it says at `/metrics`.
async fn scrape(service: &Process) -> String {
    let (status, text) = service.get("/metrics").await;
    assert_eq!(status, 200, "{text}");
    text
}
