//! Real servers and processes for tests. It is a dev-dependency only, and every failure is a panic
//! with a reason, because a test cannot handle errors.
//!
//! - [`Queue`] and [`Database`] have unique names on the shared servers and are removed on drop.
//! - [`RabbitNode`] and [`PostgresCluster`] belong to one test, which can kill and boot them, with
//!   TLS by an [`Authority`]. So does [`Prometheus`].
//! - [`StatusApi`], [`Proxy`], [`Balancer`], [`HaProxy`] and [`Collector`] are peers of services.
//! - [`Process`] is a service.
//!
//! Everything that a test starts ends with the test, even when it panics. Processes also end when
//! the test process is killed.

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "it serves tests only, where a panic with a reason is how to fail"
)]

mod amqp;
mod async_drop;
mod authority;
mod balancer;
mod children;
mod collector;
mod database;
mod database_clock;
mod eventually;
mod haproxy;
mod http_get;
mod pg_bouncer;
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
mod read_only_root;
mod scratch;
mod small_disk;
mod status_api;

pub use amqp::{amqp_uri, connect};
pub use authority::Authority;
pub use balancer::Balancer;
pub use collector::Collector;
pub use database::{Database, database_url, postgres_environment};
pub use database_clock::DatabaseClock;
pub use eventually::eventually;
pub use haproxy::HaProxy;
pub use http_get::{Reply, http_get};
pub use pg_bouncer::PgBouncer;
pub use ports::free_port;
pub use postgres_cluster::PostgresCluster;
pub use process::Process;
pub use programs::server_versions;
pub use prometheus::Prometheus;
pub use proxy::Proxy;
pub use queue::{Queue, RETRY_LEVELS};
pub use rabbit_node::RabbitNode;
pub use read_only_root::WITH_READ_ONLY_ROOT;
pub use scratch::Scratch;
pub use small_disk::{WITH_SMALL_DISK, fill_disk};
pub use status_api::{Answer, SentHook, StatusApi};
