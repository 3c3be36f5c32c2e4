//! Errors of the database, and what a caller can do about them.

use std::error::Error;
use std::time::Duration;

use sqlite_file::OpenError;

use crate::ServerState;

/// The error of the database driver, as text for people.
pub(crate) type Cause = Box<dyn Error + Send + Sync>;

/// An error of a database operation. Each variant is named after the operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file was not opened; retrying does not help.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No connection could be opened.
    #[error("cannot connect: {0}")]
    Connect(#[source] Cause),
    /// No connection became free, and no new one opened, within this time. No statement was sent.
    #[error("no connection within {0:?}")]
    NoConnection(Duration),
    /// The schema was not migrated.
    #[error("cannot migrate: {0}")]
    Migrate(#[source] Cause),
    /// The session rejected a setting that each statement needs, such as the time zone of `TZ`.
    #[error("cannot set up the session: {0}")]
    Session(#[source] Cause),
    /// The definition of the table `object` cannot be used, for these reasons.
    #[error("the table `object` cannot be used: {0}")]
    UnusableTable(String),
    /// No sighting of the batch was written.
    #[error("cannot record sightings: {0}")]
    RecordSeen(#[source] Cause),
    /// The search for locked rows failed.
    #[error("cannot look for locked rows: {0}")]
    Locked(#[source] Cause),
    /// The database's clock was not read.
    #[error("cannot read the clock: {0}")]
    Clock(#[source] Cause),
    /// No stale row of the batch was deleted.
    #[error("cannot delete stale rows: {0}")]
    DeleteStale(#[source] Cause),
    /// No row that is dated in the future was corrected.
    #[error("cannot correct rows that are dated in the future: {0}")]
    CorrectFuture(#[source] Cause),
    /// The objects were not listed.
    #[error("cannot list the objects: {0}")]
    List(#[source] Cause),
    /// The objects were not counted.
    #[error("cannot count the objects: {0}")]
    Count(#[source] Cause),
    /// The history was not read, or its partitions were not maintained.
    #[error("cannot access the history: {0}")]
    History(#[source] Cause),
    /// The database did not answer a ping.
    #[error("no answer: {0}")]
    Ping(#[source] Cause),
    /// The server accepts no writes or, for a reader, lacks the wanted `target_session_attrs`.
    #[error("the database is {0}")]
    Unsuitable(ServerState),
    /// The statement was given up, because its server has become read-only or the monitor has left
    /// that server for another one. The statement may have been executed nevertheless.
    #[error("given up: the server became read-only, or the store uses another one now")]
    Abandoned,
    /// No outcome arrived in time. The statement may have been executed nevertheless.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

// Decision: docs/decisions/0036-how-are-database-errors-classified.md
/// What a caller can do about a failed statement; see [`StoreError::failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The database will never accept one of the rows, because of its value, a constraint or a
    /// trigger. Find that row and give it up; the others can be written.
    RefusedRow,
    /// Another session or a slow trigger holds up one of the rows. Find that row and retry it
    /// later; the others can be written now.
    BusyRow,
    /// The connection was lost, or led to a server that accepts no writes. The store has closed it.
    /// Retry the same statement on another connection.
    Connection,
    /// The database cannot execute the statement now, for example because of a full disk, or of a
    /// missing table or privilege. Retry. If the failure persists, it may concern only some of the
    /// rows: try fewer rows at a time.
    Database,
}

impl Failure {
    /// Whether the connection may be the cause of the failure, so that a retry needs another
    /// connection.
    pub(crate) fn taints_connection(self) -> bool {
        matches!(self, Self::Connection | Self::Database)
    }
}

impl StoreError {
    /// What the caller can do about this error.
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            Self::Connect(_)
            | Self::NoConnection(_)
            | Self::Unsuitable(_)
            | Self::Abandoned
            | Self::Timeout(_) => Failure::Connection,
            _ => self.sql().map_or(Failure::Database, failure_of),
        }
    }

    // Decision: docs/decisions/0039-how-is-a-lost-outcome-announced.md
    /// Whether the statement may have been committed although its outcome was lost, because the
    /// connection ended, the deadline passed, or the store left the server after it was sent. Then
    /// no caller knows its changes.
    #[must_use]
    pub fn may_be_committed(&self) -> bool {
        let Some(error) = self.sql() else {
            return matches!(self, Self::Timeout(_) | Self::Abandoned);
        };
        match error {
            sqlx::Error::Database(error) => {
                // 57P: the server ended the session, perhaps between the commit and its response.
                // 40003: the server does not know whether it committed.
                error.code().is_some_and(|code| code.starts_with("57P") || code == "40003")
            }
            _ => true,
        }
    }

    /// The error of a statement that was sent to Postgres. All variants are listed, so that the
    /// compiler demands a decision about each new variant.
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
            | Self::History(cause)
            | Self::Ping(cause) => cause.downcast_ref(),
            Self::Open(_)
            | Self::Connect(_)
            | Self::NoConnection(_)
            | Self::UnusableTable(_)
            | Self::Unsuitable(_)
            | Self::Abandoned
            | Self::Timeout(_) => None,
        }
    }
}

/// Classifies an error of Postgres by its SQLSTATE.
pub(crate) fn failure_of(error: &sqlx::Error) -> Failure {
    let sqlx::Error::Database(error) = error else {
        // All other errors of sqlx during a statement concern the connection: I/O, TLS, the
        // protocol, or a value whose type differs from the expected one.
        return Failure::Connection;
    };
    failure_of_state(error.code().as_deref().unwrap_or_default())
}

fn failure_of_state(state: &str) -> Failure {
    // The first entry whose code is a prefix of the SQLSTATE applies.
    const TABLE: &[(&str, Failure)] = &[
        // A value out of range, a violated constraint, a view's check, or an exception of a
        // trigger.
        ("22", Failure::RefusedRow),
        ("23", Failure::RefusedRow),
        ("44", Failure::RefusedRow),
        ("P0", Failure::RefusedRow),
        // A lock (of a row, of a foreign key, an advisory lock) was not free within `lock_timeout`.
        ("55P03", Failure::BusyRow),
        // Deadlocks and serialization failures, which are conflicts with another transaction.
        ("40", Failure::BusyRow),
        // Either `statement_timeout` has passed, for which one slow row is enough, or a person has
        // cancelled the statement.
        ("57014", Failure::BusyRow),
        // The server is shutting down or starting, has dropped the database, or has ended the
        // session.
        ("57P", Failure::Connection),
        ("08", Failure::Connection),
        // The server is read-only: it is a standby, or a primary that was demoted. Another
        // connection may lead to another server.
        ("25", Failure::Connection),
        // The login failed, or there are too many connections.
        ("28", Failure::Connection),
        ("3D", Failure::Connection),
        ("53300", Failure::Connection),
    ];
    let found = TABLE.iter().find(|(code, _)| state.starts_with(code));
    // All other codes, such as those for a missing table or privilege, a full disk, too little
    // memory, a lost prepared statement or an internal error.
    found.map_or(Failure::Database, |(_, failure)| *failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sqlstate_has_one_failure_class() {
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
    fn error_before_the_statement_was_sent_is_not_ambiguous() {
        let error = |error: sqlx::Error| StoreError::RecordSeen(error.into());
        let reset = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        let before =
            [StoreError::Connect(reset().into()), StoreError::NoConnection(Duration::from_secs(2))];
        for error in before {
            assert!(!error.may_be_committed());
            assert_eq!(error.failure(), Failure::Connection);
        }
        assert!(error(reset()).may_be_committed());
        for after in [StoreError::Timeout(Duration::from_secs(12)), StoreError::Abandoned] {
            assert!(after.may_be_committed());
            assert_eq!(after.failure(), Failure::Connection);
        }
    }
}
