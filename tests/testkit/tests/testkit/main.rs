//! Tests of the testkit against real servers. They are one binary, because each takes seconds to
//! link.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic, too")]

mod eventually;
mod infrastructure;
mod process;
mod proxy;
mod servers;
mod shared_servers;
mod status_api;
