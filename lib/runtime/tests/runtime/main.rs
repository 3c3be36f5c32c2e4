//! Tests of the public parts of the runtime. All tests are in one binary, because each binary takes
//! seconds to link.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod http;
mod lifecycle;
mod signature;

use std::time::Duration;

/// Far longer than any step takes, because a machine that runs many tests in parallel is slow.
const DEADLINE: Duration = Duration::from_secs(30);
