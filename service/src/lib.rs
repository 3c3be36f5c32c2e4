//! Process plumbing that every Lastseen service shares: settings, telemetry, life cycle, health and
//! the HTTP server. It knows neither the broker nor the database.
//!
//! A service is a library with `run(config, health, shutdown)`; its `main.rs` hands that function to
//! [`main`] and does nothing else.

mod admin;
mod health;
pub mod http;
mod lifecycle;
pub mod problem;
pub mod settings;
mod telemetry;

pub use health::{Health, PeerStatus};
pub use lifecycle::{Description, main};
pub use tokio_util::sync::CancellationToken;
