//! All SQL of Lastseen: record sightings, delete stale rows, list objects.
//!
//! The table is `object(id, last_seen)`, in a Postgres database or in a SQLite file, as
//! [`DatabaseUrl`] says. All times are by the database's clock: callers pass ages or readings of
//! that clock, never readings of their own.

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

/// `Ok` if the database answers and accepts writes, otherwise the reason, as text for an operator.
pub type StoreStatus = Result<(), String>;
