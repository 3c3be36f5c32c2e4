//! `GET /changes`: the feed of changes, in pages or as server-sent events.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use runtime::problem::Problem;
use serde::Serialize;
use store::History;
use utoipa::ToSchema;

use super::feed::{self, FeedError};
use super::query::{ChangesQuery, LastEventId, Start};
use super::{name, text, within_deadline};
use crate::api::{LAST_EVENT_ID, ObjectId, Shared, bad_request, unavailable};
use crate::openapi;
use crate::stream;

/// A change of an object.
#[derive(Serialize, ToSchema)]
pub(crate) struct Change {
    /// The position in the feed.
    cursor: String,
    id: ObjectId,
    /// Whether the object came online or is gone.
    #[schema(value_type = ChangeKind)]
    kind: &'static str,
    /// When that happened.
    #[schema(value_type = String, format = DateTime)]
    at: String,
    /// When the object was last seen, as of this change.
    #[schema(value_type = String, format = DateTime)]
    last_seen: String,
}

#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes the values in the API's description")]
pub(crate) enum ChangeKind {
    Online,
    Gone,
}

/// A page of the feed.
#[derive(Serialize, ToSchema)]
pub(crate) struct FeedPage {
    /// The changes, in the order of the feed.
    changes: Vec<Change>,
    /// The value of `after` for the next page; the same as in this request if there is no change.
    next: String,
    /// Whether more changes follow now. If not, ask again later.
    has_more: bool,
}

impl From<&store::Change> for Change {
    fn from(change: &store::Change) -> Self {
        let store::Change { position, id, presence, at, last_seen } = *change;
        Self {
            cursor: position.to_string(),
            id: ObjectId(id),
            kind: name(presence),
            at: text(at),
            last_seen: text(last_seen),
        }
    }
}

/// Follow the history
///
/// Each change of an object's presence exactly once, also if a client was away in between: all
/// changes after a cursor. The changes of one object arrive in the order in which they happened.
/// Without a cursor, the feed begins with the oldest change of the history. With `after=latest`, it
/// begins with the next one.
///
/// With `Accept: text/event-stream`, which browsers send for an `EventSource`, the response is an
/// endless stream of server-sent events. `event` is `online` or `gone`, `id` is the cursor, and
/// `data` is `{"id":"2","at":"…","last_seen":"…"}`. If nothing else arrives, a comment arrives
/// every 15 s.
#[utoipa::path(
    get, path = "/changes",
    params(ChangesQuery, LastEventId),
    responses(
        (status = 200, description = "A page of changes, or the event stream", content((FeedPage = "application/json"), (String = "text/event-stream"))),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no history", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 410, description = "The history no longer has all changes after the cursor: read /objects again, and continue after its cursor", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The database does not answer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn presence_changes(
    State(shared): State<Shared>,
    query: Result<Query<ChangesQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let request = query.parse(headers.get(LAST_EVENT_ID)).map_err(bad_request)?;
    let response = if accepts_events(&headers) {
        event_stream(shared, request.start).await?
    } else {
        page(&shared, request.start, request.limit).await?.into_response()
    };
    // A cache must not answer a request for one with the other.
    Ok(([(header::VARY, "accept")], response).into_response())
}

async fn page(shared: &Shared, start: Start, limit: usize) -> Result<Json<FeedPage>, Problem> {
    let read = async |history: &History| match start {
        Start::After(position) => {
            let page = feed::changes_after(history, position, limit).await?;
            let last = page.changes.last().map_or(position, |last| last.position);
            Ok::<_, FeedError>((page, last))
        }
        Start::Latest => Ok((store::ChangePage::default(), feed::latest(history).await?)),
    };
    let (page, last) = shared.history.read(read).await?;
    let changes = page.changes.iter().map(Change::from).collect();
    Ok(Json(FeedPage { changes, next: last.to_string(), has_more: page.has_more }))
}

async fn event_stream(shared: Shared, start: Start) -> Result<Response, Problem> {
    let feed = shared.history.feed()?;
    let position = match start {
        Start::After(position) => position,
        Start::Latest => {
            shared.history.read(async |history: &History| feed::latest(history).await).await?
        }
    };
    let subscription = feed.subscribe(position, shared.subscribers.join());
    within_deadline(subscription.check()).await?;
    Ok((stream::HEADERS, subscription.into_body(shared.shutdown)).into_response())
}

fn accepts_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).into_iter();
    accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/event-stream"))
}

impl From<FeedError> for Problem {
    fn from(error: FeedError) -> Self {
        match error {
            FeedError::Expired => Self::new(
                StatusCode::GONE,
                "the history no longer has all changes after this cursor; read /objects again, \
                 and continue after its cursor",
            ),
            FeedError::Store(error) => unavailable(error.to_string()),
        }
    }
}
