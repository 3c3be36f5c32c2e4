//! Real servers and processes for tests; only tests and the benchmark depend on this crate. A
//! function that cannot do what its comment says, or not within a minute or so, panics with a
//! reason, because a test cannot handle errors.
//!
//! - [`Queue`] and [`Database`] have unique names on the shared servers and are removed on drop.
//! - [`RabbitNode`], [`PostgresCluster`] and [`Prometheus`] belong to one test. The test can kill
//!   and boot the first two, and can start them with TLS by an [`Authority`].
//! - [`StatusApi`], [`PlainStatusApi`], [`Http2Api`], [`Proxy`], [`TlsProxy`], [`HaProxy`] and
//!   [`Collector`] are peers of services.
//! - [`Process`] is a service as a process, and [`InProcess`] a service in the test's own process.
//!   A [`System`] names the servers that several services share.
//! - [`Partner`] posts callbacks and keeps a ledger of the responses.
//! - [`LogCapture`] keeps what the test's own thread logs.
//!
//! The program `testkit-servers` starts the shared servers, for `scripts/with-servers`.
//!
//! Everything that a test starts ends with the test, even when it panics. Processes also end when
//! the test process is killed.

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "only tests use this crate, and a test fails by a panic with a reason"
)]
#![expect(
    clippy::must_use_candidate,
    clippy::return_self_not_must_use,
    reason = "a test that ignores a result asserts nothing, which a reader sees"
)]

mod amqp;
mod async_drop;
mod authority;
mod children;
mod collector;
mod database;
mod database_clock;
mod disks;
mod eventually;
mod haproxy;
mod http2_api;
mod in_process;
mod log_capture;
mod partner;
mod pg_bouncer;
mod plain_status_api;
mod ports;
mod postgres_cluster;
mod process;
mod process_group;
mod process_log;
mod programs;
mod prometheus;
mod proxy;
mod queue;
mod rabbit_node;
mod scratch;
mod status_api;
mod system;
mod tls_proxy;
mod wire;

pub use amqp::{amqp_uri, connect};
pub use authority::Authority;
pub use collector::Collector;
pub use database::{Database, GO_TABLE, database_url, postgres_environment};
pub use database_clock::DatabaseClock;
pub use disks::{WITH_READ_ONLY_ROOT, WITH_SMALL_DISK, fill_disk};
pub use eventually::{PATIENCE, eventually, wait_for, wait_until};
pub use haproxy::HaProxy;
pub use http2_api::{Http2Api, Http2Lookup};
pub use in_process::{InProcess, parse};
pub use log_capture::LogCapture;
pub use partner::{Ledger, Partner, http_client, install_tls};
pub use pg_bouncer::PgBouncer;
pub use plain_status_api::{Connections, PlainStatusApi};
pub use ports::free_port;
pub use postgres_cluster::PostgresCluster;
pub use process::Process;
pub use programs::server_versions;
pub use prometheus::Prometheus;
pub use proxy::Proxy;
pub use queue::{Queue, RETRY_LEVELS};
pub use rabbit_node::RabbitNode;
pub use scratch::Scratch;
pub use status_api::{Answer, Decisions, StatusApi};
pub use system::{System, all_ready, callback_endpoint, producer_address, viewer_address};
pub use tls_proxy::TlsProxy;
pub use wire::{Reply, Wire, http_get};
