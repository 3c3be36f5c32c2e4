//! The history: when each object came online and was gone, and a feed of these changes.
//!
//! [`Store`](crate::Store) writes a row of the table `presence_change` in the statement that inserts
//! or deletes the row of the object. This module reads these rows.
//!
//! Decision: docs/decisions/0087-how-is-the-history-recorded.md

mod config;
mod postgres;
mod sessions;
mod sqlite;

use std::sync::Arc;
use std::time::Duration;

use crate::config::Backend;
use crate::{Config, Moment, StoreError};

pub use config::Retention;
pub use sessions::{Availability, Session, SessionPage, SessionQuery};

pub(crate) use sqlite::{SCHEMA, Writer, delete_old};

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It was inserted into the table.
    Online,
    /// It was deleted from the table.
    Gone,
}

/// A committed change of an object's presence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The position in the history, at least 1. The changes of one object are in the order of their
    /// positions. Positions that were rolled back are missing.
    pub position: i64,
    /// The object's id.
    pub id: i64,
    /// What happened.
    pub presence: Presence,
    /// When the change was written.
    pub at: Moment,
    /// The object's `last_seen` after it came online, or before it was deleted.
    pub last_seen: Moment,
}

/// Reads the history on up to four connections, which it opens when they are needed. Clones share
/// them.
#[derive(Clone)]
pub struct History(Kind);

#[derive(Clone)]
enum Kind {
    Postgres(Arc<postgres::Reader>),
    Sqlite(Arc<sqlite::Reader>),
}

/// The number of statements that run at the same time; further ones wait.
const READERS: usize = 4;

/// The number of sessions that [`History::availability`] reads at a time.
const SESSIONS: usize = 500;

/// The first and the last change that the history has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The oldest change.
    pub first: Change,
    /// The newest change.
    pub last: Change,
}

/// The changes after a position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangePage {
    /// In the order of their positions.
    pub changes: Vec<Change>,
    /// Whether more changes follow that can be read now.
    pub has_more: bool,
}

impl History {
    /// The history in the database that the settings name. Opens nothing yet.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self(match config.backend() {
            Backend::Postgres(servers) => {
                Kind::Postgres(Arc::new(postgres::Reader::new(servers, &config.time_zone())))
            }
            Backend::Sqlite(location) => {
                Kind::Sqlite(Arc::new(sqlite::Reader::new(location.path())))
            }
        })
    }

    /// The next changes after `position`, up to `limit`; from the oldest one if it is 0.
    ///
    /// It never skips a change, although transactions commit in another order than that of their
    /// positions: it returns a change only when no transaction can still commit an earlier one. In
    /// Postgres, a transaction that has written something, anywhere in the cluster, delays the
    /// changes that are committed while it is open.
    ///
    /// # Errors
    /// [`StoreError`]: `History`, `Connect`, `Unsuitable`, `Open` or `Timeout`.
    pub async fn changes_after(&self, position: i64, limit: u32) -> Result<ChangePage, StoreError> {
        let mut changes = match &self.0 {
            Kind::Postgres(reader) => reader.changes_after(position, limit.saturating_add(1)).await,
            Kind::Sqlite(reader) => reader.changes_after(position, limit.saturating_add(1)).await,
        }?;
        let has_more = changes.len() > limit as usize;
        changes.truncate(limit as usize);
        Ok(ChangePage { changes, has_more })
    }

    /// The oldest and the newest change; `None` if there is none. Changes between them may not be
    /// committed yet.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn extent(&self) -> Result<Option<Extent>, StoreError> {
        let changes = match &self.0 {
            Kind::Postgres(reader) => reader.extent().await,
            Kind::Sqlite(reader) => reader.extent().await,
        }?;
        Ok(match changes.as_slice() {
            [first, .., last] => Some(Extent { first: *first, last: *last }),
            [only] => Some(Extent { first: *only, last: *only }),
            [] => None,
        })
    }

    /// The position up to which all changes are committed or rolled back, so that a statement that
    /// begins later sees the effects of all of them; 0 if there is no change, or if it is not known
    /// yet because a transaction is open.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn settled(&self) -> Result<i64, StoreError> {
        match &self.0 {
            Kind::Postgres(reader) => reader.settled().await,
            // All visible changes are settled.
            Kind::Sqlite(_) => Ok(self.extent().await?.map_or(0, |extent| extent.last.position)),
        }
    }

    /// The sessions of one object, newest first.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn sessions(
        &self,
        id: i64,
        query: SessionQuery,
        limit: usize,
    ) -> Result<SessionPage, StoreError> {
        sessions::read(self, id, query, limit).await
    }

    /// Up to `limit` of the latest changes of an object up to and including `until`, newest first.
    async fn changes_of(
        &self,
        id: i64,
        until: Until,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        match &self.0 {
            Kind::Postgres(reader) => reader.changes_of(id, until, limit).await,
            Kind::Sqlite(reader) => reader.changes_of(id, until, limit).await,
        }
    }

    /// How long the object was online within `window` before now. Time before the beginning of the
    /// history does not count.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn availability(
        &self,
        id: i64,
        window: Duration,
    ) -> Result<Availability, StoreError> {
        let until = self.now().await?;
        let beginning = self.extent().await?.map_or(until, |extent| extent.first.at);
        let since = until.minus(window).max(beginning.min(until));
        let mut availability = Availability { since, until, online: Duration::ZERO, sessions: 0 };
        let mut query = SessionQuery { since: Some(since), ..SessionQuery::default() };
        loop {
            let page = self.sessions(id, query, SESSIONS).await?;
            page.sessions.iter().for_each(|session| availability.add(session));
            query.after = page.next;
            if page.next.is_none() {
                return Ok(availability);
            }
        }
    }

    /// Whether the history still has all changes after `position`, which is 0 or the position of a
    /// change.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn has_all_after(&self, position: i64) -> Result<bool, StoreError> {
        Ok(match self.extent().await? {
            _ if position == 0 => true,
            Some(Extent { first, .. }) if position.saturating_add(1) < first.position => false,
            Some(Extent { last, .. }) if position <= last.position => true,
            // A position that another server returned.
            _ => match &self.0 {
                Kind::Postgres(reader) => reader.is_standby().await?,
                Kind::Sqlite(_) => false,
            },
        })
    }

    /// The last change of the object; `None` without a change.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn latest(&self, id: i64) -> Result<Option<Change>, StoreError> {
        Ok(self.changes_of(id, Until::Now, 1).await?.first().copied())
    }

    /// The last changes of up to `limit` objects that are gone since `since` or later, in ascending
    /// order of the ids, from `first_id` on.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn gone_since(
        &self,
        since: Moment,
        first_id: i64,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        match &self.0 {
            Kind::Postgres(reader) => reader.gone_since(since, first_id, limit).await,
            Kind::Sqlite(reader) => reader.gone_since(since, first_id, limit).await,
        }
    }

    /// Reads the database's clock.
    ///
    /// # Errors
    /// As [`History::changes_after`].
    pub async fn now(&self) -> Result<Moment, StoreError> {
        match &self.0 {
            Kind::Postgres(reader) => reader.now().await,
            Kind::Sqlite(reader) => reader.now().await,
        }
    }
}

/// The last change of an object that a statement reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The newest one.
    Now,
    /// The first one at or after this time.
    Time(Moment),
    /// The one at this position.
    Position(i64),
}

impl Change {
    fn new(position: i64, id: i64, is_online: bool, at: Moment, last_seen: Moment) -> Self {
        let presence = if is_online { Presence::Online } else { Presence::Gone };
        Self { position, id, presence, at, last_seen }
    }
}
