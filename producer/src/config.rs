//! The producer's settings.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use authenticity::Authenticity;
use service::settings;

/// The client gives up after a second, and the spool may take half of it once the broker has had its time.
const PUBLISH_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_millis(400);
/// How long a client may take.
const CLIENT_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_mins(10);

/// The producer's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub callbacks: Callbacks,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub authenticity: Authenticity,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub broker: broker::Config,
}

/// Where callbacks are taken, and what each may hold and take.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Callbacks")]
#[group(skip)]
pub struct Callbacks {
    /// Where callbacks are taken; port 0 takes any free one and logs it
    #[arg(long, value_parser = settings::listen_address, default_value = ":9090")]
    pub producer_addr: SocketAddr,
    /// The largest body taken, in bytes; a larger one is answered 413
    #[arg(long, value_parser = settings::number(64..=64_usize << 20), default_value = "1048576")]
    pub max_body_bytes: usize,
    /// The most ids taken in one callback; more are answered 422
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "10000")]
    pub max_ids_per_callback: usize,
    /// How long the broker may take to confirm a callback before it goes to the spool; the client gives up after 1s
    #[arg(long, value_parser = settings::duration(PUBLISH_TIMEOUT), default_value = "300ms")]
    pub publish_timeout: Duration,
    /// The directory of the spool, where callbacks wait while the broker takes none [default: ./spool; of lastseen: spool in `LASTSEEN_DIR`]
    #[arg(long)]
    pub spool_dir: Option<PathBuf>,
    /// How large the spool may grow, in bytes
    #[arg(long, value_parser = settings::number(1_048_576..=1_u64 << 40), default_value = "1073741824")]
    pub spool_max_bytes: u64,
    /// How long a client may take to send a request's head, from its first byte; also how far it may fall behind 1 KiB/s in reading responses
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "20s")]
    pub header_timeout: Duration,
    /// How long a connection may wait for its next request; balancers close theirs after 60s, and must do so first
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "75s")]
    pub idle_timeout: Duration,
    /// How long a client may take to send a request's body
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "5s")]
    pub body_timeout: Duration,
    /// The most connections open at once; a further one replaces the one that has waited longest for a request, or is answered 503
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "10000")]
    pub max_connections: usize,
}
