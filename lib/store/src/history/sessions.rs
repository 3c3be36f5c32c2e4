//! The times between which an object was online, from its changes.

use std::time::Duration;

use super::{Change, History, Presence, Until};
use crate::{Moment, StoreError};

/// Maximum number of changes that one statement reads.
const CHANGES_MAX: u32 = 1_000;

/// A time during which an object was online: in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// When it came online; `None` if that is not in the history.
    pub online_at: Option<Moment>,
    /// When it was deleted; `None` if it is still online. If that is not in the history, the time
    /// when it came online again.
    pub gone_at: Option<Moment>,
    /// When it was last seen; `None` if that is not known, because it is still online.
    pub last_seen: Option<Moment>,
}

/// Which sessions to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionQuery {
    /// Only sessions that ended after this time, or have not ended.
    pub since: Option<Moment>,
    /// Only sessions that began before this time.
    pub until: Option<Moment>,
    /// Only sessions before this one, from [`SessionPage::next`].
    pub after: Option<i64>,
}

/// Some of the sessions of an object, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionPage {
    /// The sessions.
    pub sessions: Vec<Session>,
    /// For the next page: the position at which the last session began. `None` at the end.
    pub next: Option<i64>,
}

/// How long an object was online within a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Availability {
    /// The beginning of the time.
    pub since: Moment,
    /// The end of the time.
    pub until: Moment,
    /// How long the object was online.
    pub online: Duration,
    /// The number of its sessions, whole or in part.
    pub sessions: u64,
}

impl Availability {
    /// The share of the time, from 0 to 1; 0 if there was no time.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        let all = self.until.ahead_of(self.since);
        if all.is_zero() { 0.0 } else { (self.online.as_secs_f64() / all.as_secs_f64()).min(1.0) }
    }

    pub(super) fn add(&mut self, session: &Session) {
        let from = session.online_at.map_or(self.since, |online_at| online_at.max(self.since));
        let to = session.gone_at.map_or(self.until, |gone_at| gone_at.min(self.until));
        self.online += to.ahead_of(from);
        self.sessions += 1;
    }
}

/// Reads the sessions of the object `id`.
pub(super) async fn read(
    history: &History,
    id: i64,
    query: SessionQuery,
    limit: usize,
) -> Result<SessionPage, StoreError> {
    let mut page = SessionPage::default();
    let mut reader = SessionReader::default();
    let mut until = match (query.after, query.until) {
        (Some(position), _) => {
            // The session that began here is already known; only its beginning matters.
            reader.is_after_page = true;
            Until::Position(position)
        }
        (None, Some(time)) => Until::Time(time),
        (None, None) => Until::Now,
    };
    // A session has two changes, and the one after it shows where it ends.
    let sessions = u32::try_from(limit).unwrap_or(u32::MAX);
    let changes_max = sessions.saturating_mul(2).saturating_add(3).min(CHANGES_MAX);
    loop {
        let changes = history.changes_of(id, until, changes_max).await?;
        // Each statement but the first begins with the last change of the one before.
        let skipped = usize::from(reader.last.is_some());
        let is_end = changes.len() < changes_max as usize;
        for change in changes.iter().skip(skipped) {
            let Some(session) = reader.next(*change) else { continue };
            if page.add(session, query, limit) == Next::Stop {
                return Ok(page);
            }
            page.next = Some(change.position);
        }
        let Some(last) = reader.last.filter(|_| !is_end) else { break };
        until = Until::Position(last.position);
    }
    if let Some(session) = reader.unfinished()
        && page.add(session, query, limit) == Next::Stop
    {
        return Ok(page);
    }
    page.next = None;
    Ok(page)
}

#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    Stop,
}

impl SessionPage {
    /// Adds the session if the query asks for it. `next` stays at the session before if no more
    /// fits.
    fn add(&mut self, session: Session, query: SessionQuery, limit: usize) -> Next {
        let ended_before = |since| session.gone_at.is_some_and(|gone_at| gone_at <= since);
        if query.since.is_some_and(ended_before) {
            self.next = None;
            return Next::Stop;
        }
        let began_after = |until| session.online_at.is_some_and(|online_at| online_at >= until);
        if query.until.is_some_and(began_after) {
            return Next::Continue;
        }
        if self.sessions.len() == limit {
            return Next::Stop;
        }
        self.sessions.push(session);
        Next::Continue
    }
}

/// Turns changes, newest first, into sessions.
///
/// Another program that writes the table records no changes, so any change may be missing.
#[derive(Default)]
struct SessionReader {
    /// The latest change that was passed.
    last: Option<Change>,
    /// The next change is the beginning of the last session of the page before.
    is_after_page: bool,
}

impl SessionReader {
    /// The session that began with `change` or, if it is `Gone`, the one after it whose beginning
    /// is missing.
    fn next(&mut self, change: Change) -> Option<Session> {
        let later = self.last.replace(change);
        if std::mem::take(&mut self.is_after_page) {
            return None;
        }
        match change.presence {
            Presence::Online => Some(Session {
                online_at: Some(change.at),
                gone_at: later.map(|later| later.at),
                last_seen: later.map(|later| match later.presence {
                    Presence::Gone => later.last_seen,
                    Presence::Online => change.last_seen,
                }),
            }),
            Presence::Gone => later.and_then(without_beginning),
        }
    }

    /// The session whose beginning is older than the history.
    fn unfinished(&self) -> Option<Session> {
        self.last.and_then(without_beginning)
    }
}

fn without_beginning(change: Change) -> Option<Session> {
    (change.presence == Presence::Gone).then_some(Session {
        online_at: None,
        gone_at: Some(change.at),
        last_seen: Some(change.last_seen),
    })
}
