//! Tests the tester over HTTP, through its library and as a process.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "test helpers may panic, too")]

mod api;
mod load;
mod partner;
mod process;
mod support;
