//! Process plumbing that every Lastseen service shares: settings, telemetry, life cycle, health,
//! traces and the HTTP server. It knows neither the broker nor the database.
//!
//! A service is a library with `run(config, health, shutdown)`; its `main.rs` hands that function to
//! [`main`] and does nothing else. One that has subcommands uses [`main_with_commands`].

mod admin;
mod descriptors;
mod env_file;
mod health;
mod healthcheck;
pub mod http;
mod lifecycle;
mod log_output;
mod probes;
pub mod problem;
mod process_metrics;
mod recorder;
mod reload;
mod reloadable;
mod repeat_filter;
mod secrets;
pub mod settings;
mod sources;
mod telemetry;
pub mod terminal;
mod time_zone;
pub mod traces;

pub use health::{Health, PeerStatus};
pub use lifecycle::{
    Description, Invocation, Misconfigured, Unavailable, main, main_with_commands,
};
pub use probes::probes;
pub use recorder::{metric_total, rendered_metrics};
pub use reloadable::{Changer, Live};
pub use tokio_util::sync::CancellationToken;
