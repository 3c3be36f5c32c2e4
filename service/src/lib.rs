//! The runtime that every Lastseen service shares: settings, telemetry, life cycle, health, traces
//! and the HTTP server. It depends on neither the broker nor the database.
//!
//! A service is a library with `run(config, health, shutdown)`; its `main.rs` only passes that
//! function to [`main`]. A service that has subcommands uses [`main_with_commands`].

mod admin;
mod descriptors;
mod env_file;
mod health;
mod health_routes;
mod healthcheck;
pub mod http;
mod lifecycle;
mod log_output;
pub mod problem;
mod process_metrics;
mod recorder;
mod reload;
mod reloadable;
mod repeat_filter;
mod secrets;
pub mod settings;
mod signals;
mod sources;
mod telemetry;
pub mod terminal;
mod time_zone;
pub mod traces;

pub use health::{DependencyStatus, Health};
pub use health_routes::health_routes;
pub use lifecycle::{
    Description, Invocation, Misconfigured, Unavailable, main, main_with_commands,
};
pub use recorder::{metric_total, render_metrics};
pub use reloadable::{ReloadHandle, Reloadable};
pub use tokio_util::sync::CancellationToken;
