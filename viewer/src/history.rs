//! The part of the API that reads the history: objects that are gone, sessions, availability, and
//! the feed of changes.

pub(crate) mod changes;
mod feed;
mod query;
mod ring;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use runtime::problem::Problem;
use runtime::{CriticalTask, Supervisor};
use serde::Serialize;
use store::{Change, History, Moment, Presence, StoreError};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use utoipa::ToSchema;

use crate::api::{ObjectId, Shared, bad_request, unavailable};
use crate::object::format_time;
use crate::openapi;
use feed::{Feed, FeedError};
use query::{AvailabilityQuery, SessionsQuery};

/// Maximum number of requests that read the history or wait for a connection to the database.
const REQUESTS_MAX: usize = 64;
/// Number of objects in one query for the objects of a group that are gone.
const GONE_PAGE: u32 = 10_000;
/// The deadline for reading what a request asks for.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn router() -> Router<Shared> {
    Router::new()
        .route("/objects/{id}/sessions", get(sessions))
        .route("/objects/{id}/availability", get(availability))
        .route("/changes", get(changes::presence_changes))
}

/// Reads the history for requests. Clones share the limit of requests.
#[derive(Clone)]
pub(crate) struct HistoryReader {
    /// `None` if `HISTORY_RETENTION` is 0.
    enabled: Option<(History, Arc<Feed>)>,
    requests: Arc<Semaphore>,
}

/// A time during which an object was online.
#[derive(Serialize, ToSchema)]
pub(crate) struct Session {
    /// When it came online; null if that is older than the history.
    #[schema(value_type = Option<String>, format = DateTime)]
    online_at: Option<String>,
    /// When it was deleted; null if it is still online.
    #[schema(value_type = Option<String>, format = DateTime)]
    gone_at: Option<String>,
    /// When it was last seen; null if it is still online.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_seen: Option<String>,
}

/// A page of the sessions of an object.
#[derive(Serialize, ToSchema)]
pub(crate) struct Sessions {
    /// The sessions, newest first.
    sessions: Vec<Session>,
    /// The value of `after` for the next page; null if this is the last one.
    next: Option<String>,
}

/// How long an object was online within a time.
#[derive(Serialize, ToSchema)]
pub(crate) struct Availability {
    id: ObjectId,
    /// The beginning of the time: that of the window, or that of the history if it is later.
    #[schema(value_type = String, format = DateTime)]
    since: String,
    /// The end of the time: now, by the database's clock.
    #[schema(value_type = String, format = DateTime)]
    until: String,
    /// How long the object was online, in seconds.
    seconds_online: f64,
    /// The share of the time, from 0 to 1.
    ratio: f64,
    /// The number of its sessions, whole or in part.
    sessions: u64,
}

/// List the sessions of an object
///
/// A session is the time from when an object came online until it was gone. In pages, newest first.
/// An object that was never online has no sessions.
#[utoipa::path(
    get, path = "/objects/{id}/sessions",
    params(("id" = ObjectId, Path, description = "The object's id"), SessionsQuery),
    responses(
        (status = 200, description = "A page of sessions", body = Sessions),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no history", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The database does not answer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn sessions(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<SessionsQuery>, QueryRejection>,
) -> Result<Json<Sessions>, Problem> {
    let id = crate::api::path_id(id)?;
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let (query, limit) = query.parse().map_err(bad_request)?;
    let read = async |history: &History| history.sessions(id, query, limit).await;
    let page = shared.history.read(read).await?;
    let sessions = page.sessions.into_iter().map(Session::from).collect();
    Ok(Json(Sessions { sessions, next: page.next.map(|next| next.to_string()) }))
}

/// Get the availability of an object
///
/// How long it was online within the latest time.
#[utoipa::path(
    get, path = "/objects/{id}/availability",
    params(("id" = ObjectId, Path, description = "The object's id"), AvailabilityQuery),
    responses(
        (status = 200, description = "The availability", body = Availability),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no history", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The database does not answer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn availability(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<AvailabilityQuery>, QueryRejection>,
) -> Result<Json<Availability>, Problem> {
    let id = crate::api::path_id(id)?;
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let window = query.parse().map_err(bad_request)?;
    let read = async |history: &History| history.availability(id, window).await;
    let found = shared.history.read(read).await?;
    Ok(Json(Availability {
        id: ObjectId(id),
        since: text(found.since),
        until: text(found.until),
        seconds_online: found.online.as_secs_f64(),
        ratio: found.ratio(),
        sessions: found.sessions,
    }))
}

impl HistoryReader {
    pub(crate) fn new(store: &store::Config) -> Self {
        let enabled = store.history.is_on().then(|| {
            let history = History::new(store);
            // The feed has its own connections, so that requests cannot hold it up.
            (history, Arc::new(Feed::new(History::new(store))))
        });
        Self { enabled, requests: Arc::new(Semaphore::new(REQUESTS_MAX)) }
    }

    /// Spawns what the feed of changes needs.
    pub(crate) fn spawn(&self, supervisor: &Supervisor) -> Option<CriticalTask> {
        let (_, feed) = self.enabled.as_ref()?;
        let feed = Arc::clone(feed);
        let run = async move { match feed.run().await {} };
        Some(supervisor.spawn_critical("feed of changes", run))
    }

    /// The latest change of an object; `None` without a change, or if there is no history.
    pub(crate) async fn latest_change(&self, id: i64) -> Result<Option<Change>, Problem> {
        if self.enabled.is_none() {
            return Ok(None);
        }
        self.read(async |history: &History| history.latest(id).await).await
    }

    /// The latest changes of up to `limit` objects with ids from `first` on that are gone since
    /// `within` before now, in ascending order of the ids; only those in `ids`, if it is given, which
    /// is in ascending order.
    pub(crate) async fn gone(
        &self,
        within: Duration,
        first: i64,
        limit: usize,
        ids: Option<&[i64]>,
    ) -> Result<Vec<Change>, Problem> {
        let read = async |history: &History| {
            let since = history.now().await?.minus(within);
            let Some(ids) = ids else {
                return history.gone_since(since, first, as_u32(limit)).await;
            };
            gone_among(history, since, first, limit, ids).await
        };
        self.read(read).await
    }

    /// Runs `read`, unless too many requests are waiting for the database.
    async fn read<T, E: Into<FeedError>>(
        &self,
        read: impl AsyncFnOnce(&History) -> Result<T, E>,
    ) -> Result<T, Problem> {
        let (history, _) = self.enabled()?;
        let Ok(_permit) = self.requests.try_acquire() else {
            return Err(unavailable(format!(
                "{REQUESTS_MAX} other requests are reading the history; try again"
            )));
        };
        within_deadline(read(history)).await
    }

    fn feed(&self) -> Result<Arc<Feed>, Problem> {
        self.enabled().map(|(_, feed)| Arc::clone(feed))
    }

    fn enabled(&self) -> Result<&(History, Arc<Feed>), Problem> {
        self.enabled.as_ref().ok_or_else(|| {
            let detail = "there is no history, because HISTORY_RETENTION is 0";
            Problem::new(StatusCode::NOT_FOUND, detail)
        })
    }
}

/// Reads the objects that are gone page by page until `limit` of them are in `ids`.
async fn gone_among(
    history: &History,
    since: Moment,
    first: i64,
    limit: usize,
    ids: &[i64],
) -> Result<Vec<Change>, StoreError> {
    let (mut found, mut next) = (Vec::new(), ids.iter().copied().find(|id| *id >= first));
    while let Some(first) = next
        && found.len() < limit
    {
        let page = history.gone_since(since, first, GONE_PAGE).await?;
        let last = page.last().filter(|_| page.len() == GONE_PAGE as usize);
        // Continues with the next id that matters.
        next = last.and_then(|last| ids.get(ids.partition_point(|id| *id <= last.id)).copied());
        found.extend(page.into_iter().filter(|change| ids.binary_search(&change.id).is_ok()));
    }
    found.truncate(limit);
    Ok(found)
}

fn as_u32(limit: usize) -> u32 {
    u32::try_from(limit).unwrap_or(u32::MAX)
}

/// Ends a reading of the history that takes longer than a request may take.
async fn within_deadline<T, E: Into<FeedError>>(
    read: impl Future<Output = Result<T, E>>,
) -> Result<T, Problem> {
    let Ok(outcome) = timeout(READ_TIMEOUT, read).await else {
        let seconds = READ_TIMEOUT.as_secs();
        return Err(unavailable(format!("the history could not be read within {seconds} s")));
    };
    outcome.map_err(|error| Problem::from(error.into()))
}

impl From<store::Session> for Session {
    fn from(session: store::Session) -> Self {
        let store::Session { online_at, gone_at, last_seen } = session;
        Self {
            online_at: online_at.map(text),
            gone_at: gone_at.map(text),
            last_seen: last_seen.map(text),
        }
    }
}

/// When the object of this change was deleted; `None` if the change does not say it.
pub(crate) fn gone_at(change: &Change) -> Option<String> {
    (change.presence == Presence::Gone).then(|| text(change.at))
}

/// The name of the change in the API.
fn name(presence: Presence) -> &'static str {
    match presence {
        Presence::Online => "online",
        Presence::Gone => "gone",
    }
}

pub(crate) fn text(moment: Moment) -> String {
    format_time(moment.micros())
}
