//! The producer's settings.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgAction;
use runtime::authenticity::Authenticity;
use runtime::settings::{self, Checked};

/// After this timeout, the spool may need another half second, and the client waits for one second.
const PUBLISH_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_millis(400);
/// The range of each timeout that limits what a client may take.
const CLIENT_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_mins(10);

/// The producer's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    #[command(flatten)]
    pub callbacks: Callbacks,
    #[command(flatten)]
    pub authenticity: Authenticity,
    #[command(flatten)]
    pub broker: Checked<messaging::queue::Config>,
}

/// The address that accepts callbacks, and the limits of each callback.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Callbacks")]
#[group(skip)]
pub struct Callbacks {
    /// Address that accepts callbacks; with port 0, any free port, which is logged
    #[arg(long, value_parser = settings::listen_address, default_value = ":9090")]
    pub producer_addr: SocketAddr,
    /// Largest accepted body, in bytes; a larger one is answered 413
    #[arg(long, value_parser = settings::number(64..=64_usize << 20), default_value = "1048576")]
    pub max_body_bytes: usize,
    /// Maximum number of ids in one callback; more are answered 422
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "10000")]
    pub max_ids_per_callback: usize,
    /// Time that the broker has to confirm a callback before it goes to the spool; the client gives
    /// up after 1s
    #[arg(long, value_parser = settings::duration(PUBLISH_TIMEOUT), default_value = "300ms")]
    pub publish_timeout: Duration,
    /// Directory of the spool, where callbacks wait while the broker accepts none [default:
    /// ./spool; of lastseen: spool in `LASTSEEN_DIR`]
    #[arg(long)]
    pub spool_dir: Option<PathBuf>,
    /// Maximum size of the spool, in bytes
    #[arg(long, value_parser = settings::number(1_048_576..=1_u64 << 40), default_value = "1073741824")]
    pub spool_max_bytes: u64,
    /// Whether a producer that stops first waits, for up to `DRAIN_TIMEOUT`, until its spool is
    /// empty; for a producer that may never start again
    #[arg(long, action = ArgAction::Set, value_parser = settings::switch, default_value = "off")]
    pub drain_spool: bool,
    /// Time that a client has to send a request's head, from its first byte; also the time by which
    /// a client that reads responses may lag behind 1 KiB/s
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "20s")]
    pub header_timeout: Duration,
    /// Time that a connection may wait for its next request; must be longer than the idle timeout
    /// of a load balancer (often 60s), which has to close connections first
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "75s")]
    pub idle_timeout: Duration,
    /// Time that a client has to send a request's body
    #[arg(long, value_parser = settings::duration(CLIENT_TIMEOUT), default_value = "5s")]
    pub body_timeout: Duration,
    /// Maximum number of open connections; another one replaces the connection that has waited
    /// longest for a request, or is answered 503
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "10000")]
    pub max_connections: usize,
}
