//! Why the database did not do what it was asked, and what a caller can do about it.

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
    /// All connections were in use, or a new one was not open, for that time. The database was asked for nothing.
    #[error("no connection within {0:?}")]
    NoConnection(Duration),
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
    /// The database did not say which rows are locked.
    #[error("cannot look for locked rows: {0}")]
    Locked(#[source] Cause),
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
    /// The server takes no writes: a standby, or one that was made read-only.
    #[error("the database is read-only")]
    ReadOnly,
    /// No outcome in time. What was asked may have been done all the same.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

// Decision: docs/decisions/0036-how-are-database-errors-classified.md
/// What a caller can do about a failed statement. The table behind it is [`StoreError::failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The database will never accept one of the rows: a value, a constraint or a trigger is against
    /// it. Find that row and give it up; the others can be written.
    RefusedRow,
    /// Another session, or a slow trigger, is in the way of one of the rows. Find that row and try it
    /// again later; the others can be written now.
    BusyRow,
    /// The connection is lost or leads to a server that takes no writes. It has been closed: try again
    /// on another one, unchanged.
    Connection,
    /// The database cannot do it now, as with a full disk or a missing table or privilege. Try again.
    /// If it goes on, it may concern only some rows: try fewer at a time.
    Database,
}

impl Failure {
    /// Whether the connection may be the reason, so that the next attempt needs another one.
    pub(crate) fn taints_connection(self) -> bool {
        matches!(self, Self::Connection | Self::Database)
    }
}

impl StoreError {
    /// What the caller can do about it.
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            Self::Connect(_) | Self::NoConnection(_) | Self::ReadOnly | Self::Timeout(_) => {
                Failure::Connection
            }
            _ => self.sql().map_or(Failure::Database, failure_of),
        }
    }

    // Decision: docs/decisions/0039-how-is-a-lost-outcome-announced.md
    /// Whether the statement may have been committed although its outcome was lost: the connection
    /// ended, or no answer came, after the statement may have been sent. Its changes were reported to
    /// nobody, then.
    #[must_use]
    pub fn may_be_committed(&self) -> bool {
        let Some(error) = self.sql() else { return matches!(self, Self::Timeout(_)) };
        match error {
            sqlx::Error::Database(error) => {
                // The server ended the session, perhaps between the commit and its answer.
                // 40003 says so itself.
                error.code().is_some_and(|code| code.starts_with("57P") || code == "40003")
            }
            _ => true,
        }
    }

    fn sql(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Migrate(cause)
            | Self::RecordSeen(cause)
            | Self::Locked(cause)
            | Self::Session(cause)
            | Self::CorrectFuture(cause)
            | Self::Clock(cause)
            | Self::DeleteStale(cause)
            | Self::List(cause)
            | Self::Count(cause)
            | Self::Ping(cause) => cause.downcast_ref(),
            Self::Open(_)
            | Self::Connect(_)
            | Self::NoConnection(_)
            | Self::UnusableTable(_)
            | Self::ReadOnly
            | Self::Timeout(_) => None,
        }
    }
}

/// The one place that decides what an error of Postgres means, by its SQLSTATE.
pub(crate) fn failure_of(error: &sqlx::Error) -> Failure {
    let sqlx::Error::Database(error) = error else {
        // Everything else that sqlx reports while a statement runs is about the connection: I/O, TLS,
        // the protocol, a value that does not have the type it was prepared with.
        return Failure::Connection;
    };
    failure_of_state(error.code().as_deref().unwrap_or_default())
}

fn failure_of_state(state: &str) -> Failure {
    // The first entry whose code begins the SQLSTATE.
    const TABLE: &[(&str, Failure)] = &[
        // A value is out of range, against a constraint, against a view's check, or a trigger raised.
        ("22", Failure::RefusedRow),
        ("23", Failure::RefusedRow),
        ("44", Failure::RefusedRow),
        ("P0", Failure::RefusedRow),
        // Waited for a lock (of a row, a foreign key, an advisory lock) for `lock_timeout`.
        ("55P03", Failure::BusyRow),
        // Deadlocks and serialization failures: in conflict with another transaction.
        ("40", Failure::BusyRow),
        // `statement_timeout`, or somebody cancelled it: one slow row is enough.
        ("57014", Failure::BusyRow),
        // Class 57P: the server shuts down, starts, dropped the database or ended the session.
        ("57P", Failure::Connection),
        ("08", Failure::Connection),
        // Read-only: a standby, or a primary that was demoted. Another connection may lead elsewhere.
        ("25", Failure::Connection),
        // Cannot log in, or too many connections.
        ("28", Failure::Connection),
        ("3D", Failure::Connection),
        ("53300", Failure::Connection),
    ];
    let found = TABLE.iter().find(|(code, _)| state.starts_with(code));
    // All others: a missing table or privilege, a full disk, no memory, a prepared statement that the
    // connection no longer has, an internal error.
    found.map_or(Failure::Database, |(_, failure)| *failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sqlstate_has_one_class() {
        for (state, failure) in [
            ("22003", Failure::RefusedRow),
            ("23505", Failure::RefusedRow),
            ("23514", Failure::RefusedRow),
            ("44000", Failure::RefusedRow),
            ("P0001", Failure::RefusedRow),
            ("55P03", Failure::BusyRow),
            ("40001", Failure::BusyRow),
            ("40P01", Failure::BusyRow),
            ("57014", Failure::BusyRow),
            ("25006", Failure::Connection),
            ("25P03", Failure::Connection),
            ("57P01", Failure::Connection),
            ("57P03", Failure::Connection),
            ("08006", Failure::Connection),
            ("53300", Failure::Connection),
            ("26000", Failure::Database),
            ("0A000", Failure::Database),
            ("53100", Failure::Database),
            ("54001", Failure::Database),
            ("42P01", Failure::Database),
            ("42501", Failure::Database),
            ("55006", Failure::Database),
            ("58030", Failure::Database),
            ("XX000", Failure::Database),
            ("", Failure::Database),
        ] {
            assert_eq!(failure_of_state(state), failure, "{state}");
        }
    }

    #[test]
    fn an_error_before_the_statement_was_sent_is_not_ambiguous() {
        let error = |error: sqlx::Error| StoreError::RecordSeen(error.into());
        let reset = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        let before =
            [StoreError::Connect(reset().into()), StoreError::NoConnection(Duration::from_secs(2))];
        for error in before {
            assert!(!error.may_be_committed());
            assert_eq!(error.failure(), Failure::Connection);
        }
        assert!(error(reset()).may_be_committed());
        assert!(StoreError::Timeout(Duration::from_secs(12)).may_be_committed());
    }
}
