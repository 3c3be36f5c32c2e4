//! A SQLite file that one process owns. One thread writes the file, and commits the requests of all
//! waiting callers as a group. `messaging` keeps a queue in such a file, and `store` keeps the
//! table in one.
//!
//! When [`File::transact`] returns, its effect survives a crash of the process or the machine,
//! because the write-ahead log is on disk (`synchronous=FULL`).

mod ballast;
mod location;
mod open;
mod open_files;
mod salvage;
mod writer;

pub use location::Location;
pub use open::{Format, OpenError, Table, attach};
pub use writer::{File, WriteError};
