//! Questions and their answers, over HTTP.

mod query;

use std::sync::{Arc, LazyLock};

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use serde::Serialize;
use service::problem::Problem;
use service::{CancellationToken, DependencyStatus};
use tokio::sync::watch;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use crate::hosts::{self, Hosts};
use crate::metrics_scraper::{Numbers, Services};
use crate::stream::{self, Subscribers};
use crate::view_state::{Sighted, ViewState, micros_of, text_of};
use crate::{docs, openapi, page};

pub(crate) use query::{ObjectId, ObjectsQuery, StreamQuery};

/// Made when they are first asked for: a start that is quick is worth more.
static DOCUMENT: LazyLock<OpenApi> = LazyLock::new(openapi::document);
static DOCS: LazyLock<String> = LazyLock::new(|| docs::html(&DOCUMENT));

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What the requests share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) view: Arc<ViewState>,
    pub(crate) services: Arc<Services>,
    pub(crate) subscribers: Subscribers,
    pub(crate) table: watch::Receiver<DependencyStatus>,
    pub(crate) events: watch::Receiver<DependencyStatus>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) hosts: Hosts,
}

pub(crate) fn router(shared: Shared) -> Router {
    let html = [(header::CONTENT_TYPE, "text/html; charset=utf-8")];
    Router::new()
        .route("/objects", get(objects))
        .route("/objects/{id}", get(object))
        .route("/stats", get(stats))
        .route("/events", get(changes))
        .route("/openapi.json", get(async || Json(&*DOCUMENT)))
        .route("/docs", get(async move || (html, DOCS.as_str())))
        .merge(page::router())
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(shared.hosts.clone(), hosts::refuse_others))
        .layer(middleware::map_response(with_headers))
        .with_state(shared)
}

/// An object that is online.
#[derive(Serialize, ToSchema)]
pub(crate) struct OnlineObject {
    /// A signed 64-bit integer, as a string: many JSON parsers keep only 53 bits of a number.
    id: ObjectId,
    /// When it was last seen, by the database's clock.
    #[schema(value_type = String, format = DateTime)]
    last_seen: String,
}

/// Some of the objects that are online.
#[derive(Serialize, ToSchema)]
pub(crate) struct Page {
    /// In ascending order of their ids.
    objects: Vec<OnlineObject>,
    /// What to ask for the next ones with, as `after`; null if there are none.
    next: Option<String>,
}

/// An object that is online, and its latest sightings.
#[derive(Serialize, ToSchema)]
pub(crate) struct ObjectInDetail {
    #[serde(flatten)]
    object: OnlineObject,
    /// When it was seen, the latest first: at most 20, and those since this viewer knows of it.
    #[schema(value_type = Vec<String>, format = DateTime)]
    sightings: Vec<String>,
}

/// How things stand.
#[derive(Serialize, ToSchema)]
pub(crate) struct Stats {
    /// What the database's clock says, by which all of `last_seen` is.
    #[schema(value_type = String, format = DateTime)]
    at: String,
    /// How many objects are online.
    online: usize,
    /// How many are connected to the stream of changes.
    subscribers: usize,
    /// "ok", or why the table cannot be read.
    table: String,
    /// "ok", or why no events come; the table is looked at all the more often then.
    events: String,
    #[serde(flatten)]
    numbers: Numbers,
}

impl From<Sighted> for OnlineObject {
    fn from(Sighted { id, last_seen }: Sighted) -> Self {
        Self { id: ObjectId(id), last_seen: text_of(last_seen) }
    }
}

/// Who is online
///
/// Page by page, in ascending order of the ids.
#[utoipa::path(
    get, path = "/objects", params(ObjectsQuery),
    responses(
        (status = 200, description = "Some of them", body = Page),
        (status = 400, description = "A parameter is not as it should be", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head has more than 16 KiB"),
        (status = 503, description = "The table was not read yet", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn objects(
    State(shared): State<Shared>,
    query: Result<Query<ObjectsQuery>, QueryRejection>,
) -> Result<Json<Page>, Problem> {
    let wanted = query.map_err(|error| bad(error.body_text()))?.0.read().map_err(bad)?;
    shared.must_know()?;
    let within = |within| micros_of(shared.view.now()).saturating_sub(within);
    let since = wanted.seen_within_micros.map(within);
    let (found, more) = match &wanted.ids {
        None => match wanted.after.map_or(Some(i64::MIN), |after| after.checked_add(1)) {
            Some(first) => shared.view.page(first, since, wanted.limit).await,
            None => (Vec::new(), false),
        },
        Some(ids) => {
            let ids = ids.iter().filter(|id| wanted.after.is_none_or(|after| **id > after));
            let found = ids.filter_map(|id| shared.view.get(*id));
            let mut found: Vec<Sighted> = found
                .filter(|seen| since.is_none_or(|since| seen.last_seen >= since))
                .take(wanted.limit + 1)
                .collect();
            let more = found.len() > wanted.limit;
            found.truncate(wanted.limit);
            (found, more)
        }
    };
    let next = found.last().filter(|_| more).map(|last| query::cursor(last.id));
    Ok(Json(Page { objects: found.into_iter().map(OnlineObject::from).collect(), next }))
}

/// One object
///
/// When it was last seen, and before that.
#[utoipa::path(
    get, path = "/objects/{id}", params(("id" = ObjectId, Path, description = "Which")),
    responses(
        (status = 200, description = "It is online", body = ObjectInDetail),
        (status = 400, description = "The id is no 64-bit integer", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "It is not online", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head has more than 16 KiB"),
        (status = 503, description = "The table was not read yet", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn object(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ObjectInDetail>, Problem> {
    let Path(text) = id.map_err(|error| bad(error.body_text()))?;
    let id = query::id(&text).map_err(bad)?;
    shared.must_know()?;
    let Some((object, sightings)) = shared.view.sightings(id) else {
        return Err(Problem::new(StatusCode::NOT_FOUND, format!("object {id} is not online")));
    };
    let sightings = sightings.into_iter().map(text_of).collect();
    Ok(Json(ObjectInDetail { object: object.into(), sightings }))
}

/// Numbers
///
/// How many are online, and what the services do.
#[utoipa::path(get, path = "/stats", responses(
    (status = 200, description = "Current statistics", body = Stats),
    (status = 431, description = "The request's head has more than 16 KiB"),
))]
pub(crate) async fn stats(State(shared): State<Shared>) -> Json<Stats> {
    let text = |status: &watch::Receiver<DependencyStatus>| {
        status.borrow().clone().err().unwrap_or_else(|| "ok".to_owned())
    };
    Json(Stats {
        at: events::format_time(shared.view.now()),
        online: shared.view.len(),
        subscribers: shared.subscribers.count(),
        table: text(&shared.table),
        events: text(&shared.events),
        numbers: shared.services.numbers(),
    })
}

/// Changes, as they are committed
///
/// Server-sent events without end. `event` is `snapshot` (forget what you know: these are online), `more` (these are
/// online, too), `online` (these were not before), `seen` (these were, and were seen again) or `gone` (these are not any
/// more). `data` is `{"objects":[{"id":"2","last_seen":"…"}]}`; of objects that are gone, `last_seen` is the last that is
/// known.
///
/// A new stream begins with a `snapshot` and, with many objects, `more` events, in ascending order of the ids. They have a
/// field `remaining`: `follow` (`more` events follow), `none` (those were all) or `over_limit` (those were as many as
/// `limit`). Changes come between them, and only of objects that were listed before. With `limit`, further
/// objects are listed when a quarter of them is gone, and a new `snapshot` comes when there are a quarter more.
///
/// Changes that come within 40 ms, or longer with thousands of subscribers, are sent together. With the `id` of the last
/// event as `Last-Event-ID`, as a browser sends it by itself, the stream begins with `resumed` and goes on there without a
/// gap or a repeat, or, if that is too long ago, with a new snapshot. A comment comes every 15 s if nothing else does. A subscriber that reads
/// more slowly than objects change is disconnected, with a `retry` of 30 s.
#[utoipa::path(
    get, path = "/events",
    params(
        StreamQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that was received"),
    ),
    responses(
        (status = 200, description = "The stream", body = String, content_type = "text/event-stream"),
        (status = 400, description = "A parameter is not as it should be", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head has more than 16 KiB"),
    )
)]
pub(crate) async fn changes(
    State(shared): State<Shared>,
    query: Result<Query<StreamQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = headers.get(LAST_EVENT_ID).and_then(|name| name.to_str().ok());
    let request = query.map_err(|error| bad(error.body_text()))?.0.read(after).map_err(bad)?;
    let body = stream::of(&shared.view, &shared.subscribers, request, shared.shutdown);
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        // A proxy that compresses may hold events back.
        (header::CACHE_CONTROL, "no-store, no-transform"),
        // nginx would collect events before it passes them on.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, body).into_response())
}

impl Shared {
    fn must_know(&self) -> Result<(), Problem> {
        if *self.view.is_complete().borrow() {
            return Ok(());
        }
        let reason = self.table.borrow().clone().err().unwrap_or_default();
        Err(Problem {
            status: StatusCode::SERVICE_UNAVAILABLE,
            detail: format!("the table was not read yet: {reason}"),
            retry_after_seconds: Some(1),
        })
    }
}

fn bad(detail: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

async fn method_not_allowed(method: Method) -> Problem {
    let detail = format!("{method} is not allowed; use GET");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

async fn not_found(uri: Uri) -> Problem {
    let detail = format!("there is nothing at {}: see /docs", uri.path());
    Problem::new(StatusCode::NOT_FOUND, detail)
}

/// Whatever somebody has managed to have shown as a page, it can do nothing.
async fn with_headers(mut response: Response) -> Response {
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
