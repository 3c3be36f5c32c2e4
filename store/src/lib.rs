//! SQL and nothing else: connect, migrate, record what was seen, delete what is stale.
//!
//! The table is `object(id bigint primary key, last_seen timestamptz)`. All times are the
//! database's: callers pass ages, never clock readings.

mod config;
mod monitor;
mod postgres;

pub use config::Config;
pub use postgres::{Sighting, Store, StoreError};

/// Whether the database answers: `Ok`, or why not, in words for an operator.
pub type StoreStatus = Result<(), String>;

/// The status before the first attempt to connect.
const NOT_YET: &str = "not connected yet";
