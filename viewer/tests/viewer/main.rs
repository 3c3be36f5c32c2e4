//! The viewer beside a real broker and a real database. One binary, because each takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the helpers of tests are tests as well"
)]

mod api;
mod fixture;
mod process;
mod stream;
mod subscriber;
mod table_sync;

use std::time::Duration;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_secs(40);
const HOUR: Duration = Duration::from_hours(1);
