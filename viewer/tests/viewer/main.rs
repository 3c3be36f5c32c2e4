//! Tests of the viewer with a real broker and a real database. All tests are in one binary, because
//! each binary takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test helpers may panic, too"
)]

mod api;
mod fixture;
mod groups;
mod history;
mod process;
mod snapshot;
mod stream;
mod subscriber;
mod table_sync;

use std::time::Duration;

use testkit::PATIENCE;

const HOUR: Duration = Duration::from_hours(1);
