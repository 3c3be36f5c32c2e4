//! The HTTP API: routes, handlers and response bodies.

mod query;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use runtime::problem::Problem;
use runtime::{CancellationToken, Status};
use serde::Serialize;
use store::Change;
use tokio::sync::watch;
use utoipa::{OpenApi as _, ToSchema};

use crate::groups::{self, Groups, SharedMembers};
use crate::history::{self, HistoryReader};
use crate::hosts::{self, Hosts};
use crate::metrics_scraper::{MetricsScraper, PipelineMetrics};
use crate::object::{Micros, Object, format_time, to_micros};
use crate::stream::{self, Filter, Request, Subscribers};
use crate::view_state::ViewState;
use crate::{openapi, page};

use query::Listed;

pub(crate) use query::{
    ObjectId, ObjectsQuery, StreamQuery, parse_duration, parse_number, parse_page_limit,
};

/// Built at the first request, so that the process starts quickly.
static DOCUMENT: LazyLock<utoipa::openapi::OpenApi> = LazyLock::new(openapi::Document::openapi);

pub(crate) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) view: Arc<ViewState>,
    pub(crate) scraper: Arc<MetricsScraper>,
    pub(crate) subscribers: Subscribers,
    pub(crate) table_status: watch::Receiver<Status>,
    pub(crate) events_status: watch::Receiver<Status>,
    pub(crate) history: HistoryReader,
    /// `None` without `GROUPS_FILE`.
    pub(crate) groups: Option<Arc<Groups>>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) hosts: Hosts,
}

pub(crate) fn router(shared: Shared) -> Router {
    Router::new()
        .route("/objects", get(objects))
        .route("/objects/{id}", get(object))
        .route("/stats", get(stats))
        .route("/events", get(changes))
        .route("/openapi.json", get(async || Json(&*DOCUMENT)))
        .merge(history::router())
        .merge(groups::router())
        .merge(page::router())
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(shared.hosts.clone(), hosts::reject_unknown_hosts))
        .layer(middleware::map_response(add_security_headers))
        .with_state(shared)
}

/// Whether an object is online, and when it was last seen.
#[derive(Serialize, ToSchema)]
pub(crate) struct ObjectPresence {
    /// A signed 64-bit integer, as a string: many JSON parsers keep only 53 bits of a number.
    id: ObjectId,
    /// Whether it is online.
    online: bool,
    /// When it was last seen, by the database's clock.
    #[schema(value_type = String, format = DateTime)]
    last_seen: String,
    /// When it was deleted from the table, by the database's clock; null if it is online, or if the
    /// history does not have the deletion.
    #[schema(value_type = Option<String>, format = DateTime)]
    gone_at: Option<String>,
}

/// A page of objects.
#[derive(Serialize, ToSchema)]
pub(crate) struct Page {
    /// The objects, in ascending order of their ids.
    objects: Vec<ObjectPresence>,
    /// The value of `after` for the next page; null if this is the last one.
    next: Option<String>,
    /// The page shows the effects of all changes up to this cursor of `GET /changes`, and perhaps
    /// of later ones; null if it is not known, or if there is no history.
    cursor: Option<String>,
}

/// An object, and its latest sightings.
#[derive(Serialize, ToSchema)]
pub(crate) struct ObjectInDetail {
    #[serde(flatten)]
    object: ObjectPresence,
    /// The times of its latest sightings, latest first: at most 20, and none from before this
    /// viewer first saw it online. None if the object is gone.
    #[schema(value_type = Vec<String>, format = DateTime)]
    sightings: Vec<String>,
}

/// Current statistics.
#[derive(Serialize, ToSchema)]
pub(crate) struct Stats {
    /// The time by the database's clock, which also sets every `last_seen`.
    #[schema(value_type = String, format = DateTime)]
    at: String,
    /// Number of objects that are online.
    online: usize,
    /// Number of clients connected to the stream of changes.
    subscribers: usize,
    /// `ok`, or why the table cannot be read.
    table: String,
    /// `ok`, or why no events arrive; the viewer then reads the table more often.
    events: String,
    #[serde(flatten)]
    metrics: PipelineMetrics,
}

impl From<Object> for ObjectPresence {
    fn from(Object { id, last_seen }: Object) -> Self {
        let last_seen = format_time(last_seen);
        Self { id: ObjectId(id), online: true, last_seen, gone_at: None }
    }
}

/// An object that the viewer does not list, by its latest change. If that change is not a deletion,
/// a program that records no history has deleted the object's row.
impl From<&Change> for ObjectPresence {
    fn from(change: &Change) -> Self {
        Self {
            id: ObjectId(change.id),
            online: false,
            last_seen: history::text(change.last_seen),
            gone_at: history::gone_at(change),
        }
    }
}

/// List objects
///
/// Those that are online or, with `online=false`, those that are gone since a time, in pages, in
/// ascending order of the ids.
#[utoipa::path(
    get, path = "/objects", params(ObjectsQuery),
    responses(
        (status = 200, description = "A page of objects", body = Page),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no history of objects that are gone, or no such group", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The viewer has not read the table yet, or the database does not answer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn objects(
    State(shared): State<Shared>,
    query: Result<Query<ObjectsQuery>, QueryRejection>,
) -> Result<Json<Page>, Problem> {
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let query = query.parse().map_err(bad_request)?;
    // Before the objects are read, so that they contain the changes up to it.
    let cursor = shared.view.cursor().map(|position| position.to_string());
    let Some(first) = query.first else {
        return Ok(Json(Page { objects: Vec::new(), next: None, cursor }));
    };
    let members = query.group.map(|path| shared.members(path)).transpose()?;
    let members = members.as_ref().map(SharedMembers::ids);
    // One object more than `limit` shows that there is a further page.
    let max = query.limit + 1;
    let mut objects: Vec<ObjectPresence> = match query.listed {
        Listed::Online { ids, seen_within } => {
            shared.require_table()?;
            let since = seen_within.map(|within| shared.seen_since(within));
            let found = match ids.as_deref().or(members) {
                None => shared.view.page(first, since, max).await,
                Some(ids) => shared.view.page_of(ids, first, since, max).await,
            };
            found.into_iter().map(ObjectPresence::from).collect()
        }
        Listed::Gone { within } => {
            let found = shared.history.gone(within, first, max, members).await?;
            found.iter().map(ObjectPresence::from).collect()
        }
    };
    let has_more = objects.len() > query.limit;
    objects.truncate(query.limit);
    let next = objects.last().filter(|_| has_more).map(|last| query::page_cursor(last.id.0));
    Ok(Json(Page { objects, next, cursor }))
}

/// Get one object
///
/// With its latest sightings, or when it was gone.
#[utoipa::path(
    get, path = "/objects/{id}", params(("id" = ObjectId, Path, description = "The object's id")),
    responses(
        (status = 200, description = "The object is online, or the history has a change of it", body = ObjectInDetail),
        (status = 400, description = "The id is not a 64-bit integer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "The object is neither online nor in the history", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The viewer has not read the table yet, or the object is not online and the database does not answer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn object(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ObjectInDetail>, Problem> {
    let id = path_id(id)?;
    shared.require_table()?;
    if let Some((object, sightings)) = shared.view.sightings(id) {
        let sightings = sightings.into_iter().map(format_time).collect();
        return Ok(Json(ObjectInDetail { object: object.into(), sightings }));
    }
    let Some(change) = shared.history.latest_change(id).await? else {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            format!("object {id} is neither online nor in the history"),
        ));
    };
    Ok(Json(ObjectInDetail { object: (&change).into(), sightings: Vec::new() }))
}

/// Get statistics
///
/// The number of objects that are online, and metrics of the services.
#[utoipa::path(get, path = "/stats", responses(
    (status = 200, description = "Current statistics", body = Stats),
    (status = 431, description = "The request's head is larger than 16 KiB"),
))]
pub(crate) async fn stats(State(shared): State<Shared>) -> Json<Stats> {
    let text = |status: &watch::Receiver<Status>| {
        status.borrow().clone().err().unwrap_or_else(|| "ok".to_owned())
    };
    Json(Stats {
        at: messaging::events::format_time(shared.view.now()),
        online: shared.view.len(),
        subscribers: shared.subscribers.count(),
        table: text(&shared.table_status),
        events: text(&shared.events_status),
        metrics: shared.scraper.metrics(),
    })
}

/// Follow changes as they are committed
///
/// An endless stream of server-sent events. `event` is `snapshot` (these objects are online, and
/// they replace all that the client knows), `more` (these objects are online, too), `online` (these
/// objects came online), `seen` (these objects were online and were seen again) or `gone` (these
/// objects are no longer online). `data` is `{"objects":[{"id":"2","last_seen":"…"}]}`; for an
/// object that is gone, `last_seen` is the last known value.
///
/// With `GROUPS_FILE`, the event `group` reports that the statuses of groups have changed. `data`
/// is `{"groups":[{"path":"shop/berlin","was":"up","is":"degraded","online":79,"total":100,
/// "because":{"path":"shop/berlin","object":"142","kind":"gone"}}]}`; `because` is null if the
/// group is up. Read `GET /groups` after a `snapshot` or `resumed`. With `group`, the stream begins
/// again with a `snapshot` when a new definition gives the group other objects, and ends when it
/// removes the group.
///
/// A new stream begins with a `snapshot`. If there are many objects, `more` events follow, in
/// ascending order of the ids. Both have a field `remaining`: `follow` (`more` events follow),
/// `none` (all objects are listed) or `over_limit` (`limit` objects are listed). Changes arrive
/// between these events, but only of objects that are already listed. With `limit`, the stream
/// lists further objects when a quarter of the listed ones is gone, and begins again with a
/// `snapshot` when a quarter more than `limit` are online.
///
/// Changes within 40 ms (longer with thousands of subscribers) arrive together. If the client sends
/// the `id` of its last event as `Last-Event-ID`, as browsers do, the stream begins with `resumed`
/// and continues without a gap or a repeat; if that event is too old, it begins with a new
/// `snapshot`. If nothing else arrives, a comment arrives every 15 s. A client that reads more
/// slowly than objects change is disconnected, with a `retry` of 30 s.
#[utoipa::path(
    get, path = "/events",
    params(
        StreamQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that the client received"),
    ),
    responses(
        (status = 200, description = "The event stream", body = String, content_type = "text/event-stream"),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no such group", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The viewer has not read the groups yet", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn changes(
    State(shared): State<Shared>,
    query: Result<Query<StreamQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = headers.get(LAST_EVENT_ID).and_then(|id| id.to_str().ok());
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let query = query.parse(after).map_err(bad_request)?;
    let filter = match (query.ids, query.group) {
        (Some(ids), _) => Filter::Ids(ids),
        (None, Some(path)) => Filter::Group(shared.members(path)?),
        (None, None) => Filter::All,
    };
    let request = Request { filter, limit: query.limit, after: query.after };
    let body = stream::body(&shared.view, &shared.subscribers, request, shared.shutdown);
    Ok((stream::HEADERS, body).into_response())
}

impl Shared {
    /// Rejects a request while the viewer has not read the table yet.
    fn require_table(&self) -> Result<(), Problem> {
        if *self.view.is_complete().borrow() {
            return Ok(());
        }
        let reason = self.table_status.borrow().clone().err().unwrap_or_default();
        Err(unavailable(format!("the viewer has not read the table yet: {reason}")))
    }

    /// The groups, if there are any.
    pub(crate) fn groups(&self) -> Result<&Arc<Groups>, Problem> {
        self.groups.as_ref().ok_or_else(|| {
            let detail = "there are no groups, because GROUPS_FILE is not set";
            Problem::new(StatusCode::NOT_FOUND, detail)
        })
    }

    /// The objects of the group with this path.
    fn members(&self, path: String) -> Result<SharedMembers, Problem> {
        self.groups()?.members(path)
    }

    fn seen_since(&self, within: Duration) -> Micros {
        let within = i64::try_from(within.as_micros()).unwrap_or(i64::MAX);
        to_micros(self.view.now()).saturating_sub(within)
    }
}

/// Parses the id in the path of a request.
pub(crate) fn path_id(id: Result<Path<String>, PathRejection>) -> Result<i64, Problem> {
    let Path(text) = id.map_err(|error| bad_request(error.body_text()))?;
    query::parse_id(&text).map_err(bad_request)
}

pub(crate) fn unavailable(detail: String) -> Problem {
    let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail);
    Problem { retry_after_seconds: Some(1), ..problem }
}

pub(crate) fn bad_request(detail: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

async fn method_not_allowed(method: Method) -> Problem {
    let detail = format!("{method} is not allowed; use GET");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

async fn not_found(uri: Uri) -> Problem {
    let detail = format!("no such path: {}; see /openapi.json", uri.path());
    Problem::new(StatusCode::NOT_FOUND, detail)
}

/// Adds headers that forbid foreign scripts, embedding and content sniffing, which limits the harm
/// if untrusted text ever ends up on a page.
async fn add_security_headers(mut response: Response) -> Response {
    let headers = [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
