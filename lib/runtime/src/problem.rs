//! Errors as RFC 9457 `application/problem+json`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Maximum length of `detail`, in bytes of its JSON text. A detail may quote the request, which can
/// be a megabyte long, and the response stays in memory until the client has read it.
const DETAIL_MAX_BYTES: usize = 512;
const ELLIPSIS: &str = "…";

/// An error response: the status, what was wrong, and what to do about it.
///
/// The `type` is always the default, `about:blank`, so the `title` is the status's standard phrase.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The HTTP status.
    pub status: StatusCode,
    /// What was wrong with this request, and what to do. The response contains at most 512 bytes of
    /// this text.
    pub detail: String,
    /// After how many seconds the client may try again (`Retry-After`).
    pub retry_after_seconds: Option<u32>,
}

impl Problem {
    /// A problem without `Retry-After`.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: truncated(detail.into()), retry_after_seconds: None }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            // Truncated here too, because the field is public.
            "detail": truncated(self.detail),
        });
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (self.status, content_type, body.to_string()).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Truncates `detail` to [`DETAIL_MAX_BYTES`] of JSON text.
fn truncated(detail: String) -> String {
    let bytes_before_ellipsis = DETAIL_MAX_BYTES - ELLIPSIS.len();
    let (mut length, mut end) = (0, 0);
    for (at, character) in detail.char_indices() {
        length += json_bytes(character);
        if length > DETAIL_MAX_BYTES {
            // Copied, so that the memory of the long text is freed.
            return format!("{}{ELLIPSIS}", &detail[..end]);
        }
        if length <= bytes_before_ellipsis {
            end = at + character.len_utf8();
        }
    }
    detail
}

/// The length of `character` in a JSON string, in bytes.
fn json_bytes(character: char) -> usize {
    match character {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        '\0'..='\u{1f}' => "\\u0000".len(),
        _ => character.len_utf8(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json_length(detail: &str) -> usize {
        serde_json::to_string(detail).unwrap().len() - "\"\"".len()
    }

    // Field case 2.1
    #[test]
    fn long_detail_is_truncated_to_512_bytes_of_json() {
        for part in ["a", "\u{301}", "\\", "\"", "\0", "\n", "\u{1f}", "😀", "a😀\0"] {
            let long = part.repeat(1 << 20);
            let detail = Problem::new(StatusCode::BAD_REQUEST, long.clone()).detail;
            assert!(detail.ends_with(ELLIPSIS), "{part:?}");
            assert!(long.starts_with(detail.trim_end_matches(ELLIPSIS)), "{part:?}");
            let length = json_length(&detail);
            assert!((500..=512).contains(&length), "{part:?} takes {length}");
        }
    }

    #[test]
    fn short_detail_is_not_truncated() {
        for text in ["", "no luck", &"\0".repeat(85), &"é".repeat(256)] {
            assert_eq!(Problem::new(StatusCode::BAD_REQUEST, text).detail, text);
        }
    }

    // Field case 2.1
    #[tokio::test]
    async fn response_is_small_even_if_the_detail_was_set_directly() {
        let detail = "\u{7}".repeat(1 << 20);
        let problem =
            Problem { status: StatusCode::BAD_REQUEST, detail, retry_after_seconds: None };
        let body = axum::body::to_bytes(problem.into_response().into_body(), 1024).await.unwrap();
        assert!(serde_json::from_slice::<serde_json::Value>(&body).is_ok());
    }
}
