//! The files of the live page, which are compiled into the program.
//!
//! Decision: docs/decisions/0054-how-is-the-live-page-built.md

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::get;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// A file of `viewer/page/`, as at build time.
struct File {
    name: &'static str,
    content_type: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($name:literal as $content_type:expr),* $(,)?) => {
        [$(File {
            name: $name,
            content_type: $content_type,
            text: include_str!(concat!("../page/", $name)),
        }),*]
    };
}

/// The page is served only at `/`, because its links are relative to `/`.
const INDEX: &[File] = &files! { "index.html" as HTML };
/// The files under `/page/`. Add a new file here.
const FILES: &[File] = &files! {
    "page.css" as CSS,
    "icon.svg" as SVG,
    "api.js" as JS,
    "chart.js" as JS,
    "feed.js" as JS,
    "field.js" as JS,
    "field-input.js" as JS,
    "format.js" as JS,
    "fragment.js" as JS,
    "group-tree.js" as JS,
    "groups.js" as JS,
    "main.js" as JS,
    "object.js" as JS,
    "object-history.js" as JS,
    "presence.js" as JS,
    "recent-changes.js" as JS,
    "shared-feed.js" as JS,
    "stats.js" as JS,
    "tab-feed.js" as JS,
    "tiles.js" as JS,
};

pub(crate) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let index = INDEX.iter().map(|file| ("/".to_owned(), file));
    let under_page = FILES.iter().map(|file| (format!("/page/{}", file.name), file));
    index.chain(under_page).fold(Router::new(), |router, (path, file)| {
        router.route(&path, get(async || respond(file)))
    })
}

fn respond(file: &'static File) -> impl IntoResponse {
    // The files change with the program's version, so browsers must revalidate them.
    let headers: [(HeaderName, &str); 2] =
        [(header::CONTENT_TYPE, file.content_type), (header::CACHE_CONTROL, "no-cache")];
    (headers, file.text)
}
