//! Tests the tester over HTTP, through its library and as a process.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "clippy.toml allows both in tests, but not in their helpers"
)]

mod api;
mod load;
mod partner;
mod process;
mod support;
