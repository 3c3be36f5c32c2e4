//! All SQL of Lastseen: record sightings, delete stale rows, list objects.
//!
//! The table is `object(id, last_seen)`, in the Postgres database or the SQLite file that
//! [`DatabaseUrl`] names. All times are by the database's clock: callers pass ages or readings of
//! that clock, never readings of their own clocks.

mod config;
mod database;
mod deadline;
mod error;
mod history;
mod moment;
mod objects;
mod postgres;
mod rows;
mod sqlite;
mod store;
mod time_zone;

pub use config::{Addresses, Config, DatabaseUrl};
pub use database::Database;
pub use error::{Failure, StoreError};
pub use history::{
    Availability, Change, ChangePage, Extent, History, Presence, Retention, Session, SessionPage,
    SessionQuery,
};
pub use moment::{Cutoff, Moment};
pub use objects::{Object, Objects};
pub use postgres::{ServerState, SessionAttrs};
pub use rows::{Recorded, Row, Sighting};
pub use sqlite_file::OpenError;
pub use store::Store;
pub use time_zone::TimeZone;
