//! A SQLite file that one process owns: opened or refused, and written by one thread that commits
//! for all who wait. What is in it is its user's affair: `broker` keeps a queue in one, `store` the
//! table.
//!
//! What [`File::transact`] has returned survives the end of the process at any moment, and of the
//! machine: the write-ahead log is on disk before (`synchronous=FULL`).

mod ballast;
mod location;
mod open;
mod open_files;
mod salvage;
mod writer;

pub use location::Location;
pub use open::{Format, OpenError, Table, attach};
pub use writer::{File, WriteError};

/// Whether the file can be written: `Ok`, or why not, in words for an operator.
pub type FileStatus = Result<(), String>;
