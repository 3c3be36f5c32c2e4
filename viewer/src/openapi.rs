//! The description of the API, made from the code.

use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::api;

/// What was wrong with a request, as RFC 9457 has it.
#[derive(Serialize, ToSchema)]
pub(crate) struct ProblemDetails {
    /// Always `about:blank`.
    r#type: String,
    /// The status in words.
    title: String,
    /// The status.
    status: u16,
    /// What was wrong and what to do.
    detail: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lastseen: the viewer",
        description = "Which objects are online now, and when each was last seen. Ids are signed 64-bit integers, in JSON as strings: many JSON parsers keep only 53 bits of a number. A response of 4xx or 5xx says why as application/problem+json (RFC 9457).",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    // Relative to this document, since a proxy may serve the viewer under a path of its own.
    servers((url = "./", description = "this viewer")),
    paths(api::objects, api::object, api::stats, api::changes)
)]
struct Document;

pub(crate) fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[cfg(test)]
mod tests {
    use events::Kind;

    use super::*;

    #[test]
    fn each_shape_that_is_referred_to_is_there() {
        let document = serde_json::to_value(document()).unwrap();
        let text = document.to_string();
        let names = text.split("#/components/schemas/").skip(1);
        for name in names.filter_map(|rest| rest.split('"').next()) {
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn it_is_of_version_3_1_and_names_each_event_of_the_stream() {
        let document = serde_json::to_value(document()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let stream = document["paths"]["/events"]["get"]["description"].as_str().unwrap();
        for name in std::iter::once("snapshot").chain(Kind::ALL.map(Kind::name)) {
            assert!(stream.contains(&format!("`{name}`")), "{name}: {stream}");
        }
    }
}
