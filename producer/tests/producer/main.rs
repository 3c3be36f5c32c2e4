//! Tests the producer with a real broker. All tests are in one binary, because linking each binary
//! takes seconds. The tests with hostile clients have their own binary, because those clients would
//! slow down these tests.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod accepted;
mod harness;
mod limits;
mod outage;
mod refused;
mod signed;
mod spool;

use std::time::Duration;

/// Far longer than any wait here needs, because a machine that runs many tests in parallel is slow.
const DEADLINE: Duration = Duration::from_secs(30);
