//! `GET /groups`: the groups and their statuses.

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use groups::{GroupIndex, source_hash};
use runtime::problem::Problem;
use serde::{Deserialize, Serialize};
use tokio::task::yield_now;
use utoipa::{IntoParams, ToSchema};

use super::members::{no_such_group, not_ready};
use super::shown::{self, Group};
use super::{Groups, Live};
use crate::api::{Shared, bad_request, parse_number, parse_page_limit};
use crate::openapi;

const DEPTH_MAX: usize = 100;
/// Number of groups to show while holding the lock: each may have many objects or levels.
const SHOWN_TOGETHER: usize = 16;

pub(crate) fn router() -> Router<Shared> {
    Router::new().route("/groups", get(groups)).route("/groups/{*path}", get(group))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct GroupsQuery {
    /// Number of levels to list, from the roots on
    #[param(value_type = Option<u32>, minimum = 1, maximum = 100, default = 2)]
    depth: Option<String>,
    /// Maximum number of groups
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// The field `next` of the previous page
    #[param(max_length = 1024)]
    after: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct GroupQuery {
    /// Number of levels below the group to list
    #[param(value_type = Option<u32>, minimum = 0, maximum = 100, default = 1)]
    depth: Option<String>,
    /// Maximum number of groups
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// The field `next` of the previous page
    #[param(max_length = 1024)]
    after: Option<String>,
}

/// A page of groups.
#[derive(Serialize, ToSchema)]
pub(crate) struct GroupPage {
    /// The groups; each one before its subgroups.
    groups: Vec<Group>,
    /// The value of `after` for the next page: the path of the last group; null if this is the last
    /// page.
    next: Option<String>,
}

/// List groups
///
/// The groups and their statuses, in pages, each group before its subgroups. To follow changes, use
/// the event `group` of `GET /events`, or repeat the request with the `ETag` as `If-None-Match`.
#[utoipa::path(
    get, path = "/groups",
    params(
        GroupsQuery,
        ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier response"),
    ),
    responses(
        (status = 200, description = "A page of groups", body = GroupPage, headers(("ETag" = String, description = "Identifies the content of the response"))),
        (status = 304, description = "Nothing has changed since the response with this ETag"),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no group `after`, or GROUPS_FILE is not set", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The viewer has not read the table and the history yet", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn groups(
    State(shared): State<Shared>,
    query: Result<Query<GroupsQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let groups = shared.groups()?;
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let levels = parse_depth(query.depth.as_deref(), 1, 2)?;
    let limit = parse_page_limit(query.limit.as_deref()).map_err(bad_request)?;
    let listing = Listing { top: None, levels, limit, after: query.after.as_deref() };
    respond(&groups.page(listing).await?, &headers)
}

/// Get a group
///
/// The group and its subgroups, each group before its subgroups.
#[utoipa::path(
    get, path = "/groups/{path}",
    params(
        ("path" = String, Path, description = "The group's path, such as `shop/berlin`: the names of its ancestors and its own name; each name is percent-encoded", min_length = 1),
        GroupQuery,
        ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier response"),
    ),
    responses(
        (status = 200, description = "A page that begins with the group", body = GroupPage, headers(("ETag" = String, description = "Identifies the content of the response"))),
        (status = 304, description = "Nothing has changed since the response with this ETag"),
        (status = 400, description = "A parameter is invalid", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 404, description = "There is no such group, no group `after` below it, or GROUPS_FILE is not set", body = openapi::ProblemDetails, content_type = "application/problem+json"),
        (status = 431, description = "The request's head is larger than 16 KiB"),
        (status = 503, description = "The viewer has not read the table and the history yet", body = openapi::ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn group(
    State(shared): State<Shared>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<GroupQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let groups = shared.groups()?;
    let Path(path) = path.map_err(|error| bad_request(error.body_text()))?;
    let query = query.map_err(|error| bad_request(error.body_text()))?.0;
    let levels = parse_depth(query.depth.as_deref(), 0, 1)?;
    let limit = parse_page_limit(query.limit.as_deref()).map_err(bad_request)?;
    let listing = Listing { top: Some(&path), levels, limit, after: query.after.as_deref() };
    respond(&groups.page(listing).await?, &headers)
}

fn parse_depth(text: Option<&str>, min: usize, default: usize) -> Result<usize, Problem> {
    let Some(text) = text else { return Ok(default) };
    parse_number("depth", text, min..=DEPTH_MAX).map_err(bad_request)
}

/// Answers 304 if the client has the same page already.
fn respond(page: &GroupPage, headers: &HeaderMap) -> Result<Response, Problem> {
    let body = serde_json::to_vec(page)
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let etag = format!("\"{:016x}\"", source_hash([("", body.as_slice())]));
    let known = headers.get_all(header::IF_NONE_MATCH).into_iter();
    let is_known = known.filter_map(|value| value.to_str().ok()).any(|list| {
        let mut tags = list.split(',').map(|tag| tag.trim().trim_start_matches("W/"));
        tags.any(|tag| tag == "*" || tag == etag)
    });
    let caching = [(header::ETAG, etag), (header::CACHE_CONTROL, "no-cache".to_owned())];
    if is_known {
        return Ok((StatusCode::NOT_MODIFIED, caching).into_response());
    }
    let content_type = [(header::CONTENT_TYPE, "application/json")];
    Ok((caching, content_type, Bytes::from(body)).into_response())
}

/// Which groups to list.
struct Listing<'a> {
    top: Option<&'a str>,
    levels: usize,
    limit: usize,
    after: Option<&'a str>,
}

/// A group to list, the number of its ancestors, and its path.
type Listed = (GroupIndex, usize, String);

impl Groups {
    async fn page(&self, listing: Listing<'_>) -> Result<GroupPage, Problem> {
        loop {
            let (definition, mut listed) = self.list(&listing)?;
            let has_more = listed.len() > listing.limit;
            listed.truncate(listing.limit);
            if let Some(groups) = self.show(definition, &listed).await {
                let next = listed.pop().filter(|_| has_more).map(|(_, _, path)| path);
                return Ok(GroupPage { groups, next });
            }
        }
    }

    /// Up to one group more than `limit`, which shows that there is a further page, and the number
    /// of the definition.
    fn list(&self, listing: &Listing<'_>) -> Result<(u64, Vec<Listed>), Problem> {
        let live = self.live.read();
        let Live { tree, definition, .. } = live.as_ref().ok_or_else(not_ready)?;
        let find = |path: &str| shown::find(tree, path).ok_or_else(|| no_such_group(path));
        let top = listing.top.map(find).transpose()?;
        let is_listed = |&after: &GroupIndex| top.is_none_or(|top| tree.contains(top, after));
        let after = listing.after.map(|after| {
            let after = shown::find(tree, after).filter(is_listed);
            after.ok_or_else(|| {
                let detail = "after: no such group is listed; begin with the first page again";
                Problem::new(StatusCode::NOT_FOUND, detail)
            })
        });
        let listed = tree.walk(top, listing.levels, after.transpose()?);
        let listed = listed.filter_map(|(group, depth)| {
            Some((group, depth.saturating_sub(1), shown::path(tree, group)?))
        });
        Ok((*definition, listed.take(listing.limit.saturating_add(1)).collect()))
    }

    /// `None` if another definition has taken effect.
    async fn show(&self, definition: u64, listed: &[Listed]) -> Option<Vec<Group>> {
        let mut groups = Vec::with_capacity(listed.len());
        // Releases the lock in between, because it delays the publication of changes.
        for listed in listed.chunks(SHOWN_TOGETHER) {
            {
                let live = self.live.read();
                let live = live.as_ref().filter(|live| live.definition == definition)?;
                groups.extend(listed.iter().filter_map(|(group, depth, _)| {
                    Group::new(&live.tree, &live.announcer, *group, *depth)
                }));
            }
            yield_now().await;
        }
        Some(groups)
    }
}
