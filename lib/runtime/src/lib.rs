//! The runtime that every Lastseen service shares: settings, telemetry, life cycle, health, traces
//! and the HTTP server. It depends on neither the broker nor the database.
//!
//! A service is a library with `run(config, context)` and a `main` that passes it to [`main`]. A
//! service that has subcommands uses [`main_with_commands`].

mod admin;
pub mod authenticity;
mod context;
mod descriptors;
mod env_file;
mod fallback;
mod health;
mod health_routes;
mod healthcheck;
pub mod http;
mod lifecycle;
mod log_limiter;
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
mod supervisor;
mod telemetry;
mod time_zone;
pub mod traces;

pub use context::Context;
pub use fallback::{Success, Unusable, first_success};
pub use health::{Health, Status};
pub use health_routes::health_routes;
pub use lifecycle::{
    Description, Invocation, Misconfigured, Unavailable, main, main_with_commands,
};
pub use log_limiter::LogLimiter;
pub use log_output::{is_terminal, show_status};
pub use recorder::{metric_total, metric_values};
pub use reloadable::{ReloadHandle, Reloadable};
pub use supervisor::{CriticalTask, Needed, Running, Supervisor};
pub use tokio_util::sync::CancellationToken;
