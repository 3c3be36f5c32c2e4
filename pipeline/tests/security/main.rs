//! Database roles, TLS and secrets of the services as separate processes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod roles;
mod secrets;
mod tls;

use std::time::Duration;

const PATIENCE: Duration = Duration::from_mins(1);
