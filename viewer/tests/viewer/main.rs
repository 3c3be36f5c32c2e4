//! Tests of the viewer with a real broker and a real database. They are one binary, because each
//! binary takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic, as tests may"
)]

mod api;
mod fixture;
mod process;
mod stream;
mod subscriber;
mod table_sync;

use std::time::Duration;

/// Deadline of each wait. It is long, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_secs(40);
const HOUR: Duration = Duration::from_hours(1);
