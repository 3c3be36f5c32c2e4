//! Why the database did not do what it was asked.

use std::error::Error;
use std::time::Duration;

use embedded::OpenError;

/// What the database said: each kind has its own words for it, which are for people only.
pub(crate) type Cause = Box<dyn Error + Send + Sync>;

/// Why the database did not do what it was asked, named after the operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file was not opened; trying again leads nowhere.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] Cause),
    /// The schema could not be brought up to date.
    #[error("cannot migrate: {0}")]
    Migrate(#[source] Cause),
    /// The session cannot have the settings that each statement needs, such as the time zone of `TZ`.
    #[error("cannot set up the session: {0}")]
    Session(#[source] Cause),
    /// The table `object` is not one that can be used, for these reasons.
    #[error("the table `object` cannot be used: {0}")]
    UnusableTable(String),
    /// The batch of sightings was not written, none of it.
    #[error("cannot record what was seen: {0}")]
    RecordSeen(#[source] Cause),
    /// The batch of sightings was not written, none of it, because the database will never take one of
    /// its rows, as by a constraint or a trigger. Trying it again leads nowhere.
    #[error("the database refuses it: {0}")]
    Refused(#[source] Cause),
    /// The database did not say what time it is.
    #[error("cannot read the clock: {0}")]
    Clock(#[source] Cause),
    /// The batch of stale rows was not deleted, none of it.
    #[error("cannot delete what is stale: {0}")]
    DeleteStale(#[source] Cause),
    /// The rows that are dated in the future were not corrected.
    #[error("cannot correct rows that are dated in the future: {0}")]
    CorrectFuture(#[source] Cause),
    /// The objects were not listed.
    #[error("cannot list the objects: {0}")]
    List(#[source] Cause),
    /// The objects were not counted.
    #[error("cannot count the objects: {0}")]
    Count(#[source] Cause),
    /// The database did not answer a ping.
    #[error("no answer: {0}")]
    Ping(#[source] Cause),
    /// No outcome in time. What was asked may have been done all the same.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}
