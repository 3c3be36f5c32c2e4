//! The tester as its users meet it: over HTTP, through the library and as a process.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "clippy.toml allows both in tests, but does not see that the helpers here are tests too"
)]

mod api;
mod load;
mod partner;
mod process;
mod support;
