//! Normalizes the paths of requests.

use axum::http::Uri;
use axum::http::uri::PathAndQuery;

/// The URI with its path in normal form, or `None` if it already has that form.
///
/// Percent-encoded letters, digits, `-`, `.`, `_` and `~` are decoded, and `.` and `..` are
/// resolved (RFC 3986, section 6.2.2). Empty segments, including the last one, are removed, because
/// they result from joining URLs with a slash on both sides. Paths are case-sensitive.
pub(super) fn normalized(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let may_differ = path.contains('%') || path.contains("//") || path.contains("/.");
    if !path.starts_with('/') || path == "/" || !may_differ && !path.ends_with('/') {
        return None;
    }
    let decoded = decode_unreserved(path);
    let mut segments = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = segments.pop(),
            segment => segments.push(segment),
        }
    }
    let mut text = format!("/{}", segments.join("/"));
    if text == path {
        return None;
    }
    if let Some(query) = uri.query() {
        text.push('?');
        text.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(text).ok()?);
    Uri::from_parts(parts).ok()
}

fn decode_unreserved(path: &str) -> String {
    let mut decoded = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, encoded) = rest.split_at(at);
        decoded.push_str(before);
        let code = encoded.get(1..3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code.map(char::from) {
            Some(letter) if letter.is_ascii_alphanumeric() || "-._~".contains(letter) => {
                decoded.push(letter);
                rest = &encoded[3..];
            }
            _ => {
                decoded.push('%');
                rest = &encoded[1..];
            }
        }
    }
    decoded.push_str(rest);
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> String {
        let uri: Uri = text.parse().unwrap();
        normalized(&uri).unwrap_or(uri).to_string()
    }

    /// Field case 1.1.
    #[test]
    fn equivalent_paths_have_one_form() {
        for equivalent in [
            "/callback",
            "/callback/",
            "//callback",
            "/callback//",
            "/./callback",
            "/a/../callback",
            "/../callback/.",
            "/%63allback",
            "/%2E/callback",
            "/callb%61ck/",
        ] {
            assert_eq!(path(equivalent), "/callback", "{equivalent}");
        }
        assert_eq!(path("/callback/?a=/b/"), "/callback?a=/b/");
        assert_eq!(path("http://host//callback/"), "http://host/callback");
        assert_eq!(path("//"), "/");
    }

    #[test]
    fn different_paths_stay_different() {
        for text in
            ["/Callback", "/callback%2F", "/callback/1", "/call%zzback", "/%c3%a4", "*", "/"]
        {
            assert_eq!(path(text), text);
        }
    }
}
