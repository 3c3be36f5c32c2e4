//! The whole system as separate processes: normal operation and failures, database roles, TLS and
//! secrets, metrics, alerts, dashboard and settings, traces, and the manifests for Kubernetes. One
//! binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests may panic, too")]

mod compose;
mod dashboard;
mod kubernetes;
mod metrics;
mod pipeline;
mod promtool;
mod roles;
mod rules;
mod secrets;
mod settings;
mod spans;
mod tls;
mod traces;
