//! The description of the API, generated from the code.

use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::{api, groups, history};

/// Why a request failed (RFC 9457).
#[derive(Serialize, ToSchema)]
pub(crate) struct ProblemDetails {
    /// Always `about:blank`.
    r#type: String,
    /// The name of the status.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What was wrong, and what to do.
    detail: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lastseen: the viewer",
        description = "Which objects are online, and when each was last seen. Ids are signed 64-bit integers. In JSON they are strings, because many JSON parsers keep only 53 bits of a number. A 4xx or 5xx response gives the reason as application/problem+json (RFC 9457).",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    // Relative to this document, because a proxy may serve the viewer under another path.
    servers((url = "./", description = "this viewer")),
    paths(
        api::objects,
        api::object,
        history::sessions,
        history::availability,
        history::changes::presence_changes,
        groups::api::groups,
        groups::api::group,
        api::stats,
        api::changes,
    )
)]
pub(crate) struct Document;

#[cfg(test)]
mod tests {
    use messaging::events::Kind;

    use super::*;

    #[test]
    fn every_referenced_schema_exists() {
        let document = serde_json::to_value(Document::openapi()).unwrap();
        let text = document.to_string();
        let names = text.split("#/components/schemas/").skip(1);
        for name in names.filter_map(|rest| rest.split('"').next()) {
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn version_is_3_1_and_each_event_kind_is_documented() {
        let document = serde_json::to_value(Document::openapi()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let stream = document["paths"]["/events"]["get"]["description"].as_str().unwrap();
        for name in std::iter::once("snapshot").chain(Kind::ALL.map(Kind::name)) {
            assert!(stream.contains(&format!("`{name}`")), "{name}: {stream}");
        }
    }
}
