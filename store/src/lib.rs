//! SQL and nothing else: record what was seen, delete what is stale, list what is there.
//!
//! The table is `object(id, last_seen)`, in a Postgres or in a SQLite file: [`DatabaseUrl`] says
//! which. All times are the database's: callers pass ages, or what its clock has said, and never
//! readings of their own clocks.

mod config;
mod deadline;
mod error;
mod moment;
mod objects;
mod postgres;
mod sqlite;
mod store;
mod time_zone;

pub use config::{Claim, Config, DatabaseUrl};
pub use embedded::OpenError;
pub use error::{Failure, StoreError};
pub use moment::Moment;
pub use objects::{Object, Objects};
pub use store::{Recorded, Row, Sighting, Store};
pub use time_zone::TimeZone;

/// Whether the database answers and takes writes: `Ok`, or why not, in words for an operator.
pub type StoreStatus = Result<(), String>;
