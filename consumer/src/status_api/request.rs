//! The requests to the status API.

use std::io;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::HOST;
use http::{Request, Uri};
use httparse::EMPTY_HEADER;
use percent_encoding::percent_decode_str;
use runtime::traces::TRACEPARENT;
use url::Url;

const USER_AGENT: &str = concat!("lastseen/", env!("CARGO_PKG_VERSION"));

/// More fields than a request has.
const FIELDS_MAX: usize = 8;

/// The parts of a request that are the same for all objects.
pub(super) struct RequestTemplate {
    /// Everything before the id.
    before_id: String,
    /// The rest of the request line and the fields.
    after_id: String,
}

impl RequestTemplate {
    pub(super) fn new(endpoint: &Url) -> Self {
        let path = endpoint.path().trim_end_matches('/');
        let host = endpoint.host_str().unwrap_or_default();
        // `Url` omits the port if it is the default one of the scheme.
        let port = endpoint.port().map(|port| format!(":{port}")).unwrap_or_default();
        let authorization = credentials(endpoint)
            .map(|text| format!("authorization: Basic {}\r\n", BASE64_STANDARD.encode(text)))
            .unwrap_or_default();
        let after_id = format!(
            " HTTP/1.1\r\nhost: {host}{port}\r\naccept: */*\r\nuser-agent: {USER_AGENT}\r\n\
             {authorization}"
        );
        Self { before_id: format!("GET {path}/objects/"), after_id }
    }

    /// The request about an object. `traceparent` must not contain a line break.
    pub(super) fn about(&self, id: i64, traceparent: Option<&str>) -> Vec<u8> {
        let Self { before_id, after_id } = self;
        let traceparent =
            traceparent.map(|value| format!("{TRACEPARENT}: {value}\r\n")).unwrap_or_default();
        format!("{before_id}{id}{after_id}{traceparent}\r\n").into_bytes()
    }
}

/// The same request for HTTP/2. It has the same fields, but the host is a part of the URI.
pub(super) fn to_http2(request: &[u8]) -> io::Result<Request<()>> {
    let mut fields = [EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    parsed.parse(request).map_err(io::Error::other)?;
    let mut uri = Uri::builder().scheme("https").path_and_query(parsed.path.unwrap_or_default());
    let mut http2 = Request::builder();
    for field in parsed.headers {
        if field.name == HOST {
            uri = uri.authority(field.value);
        } else {
            http2 = http2.header(field.name, field.value);
        }
    }
    let http2 = uri.build().and_then(|uri| http2.uri(uri).body(()));
    http2.map_err(io::Error::other)
}

/// The user name and password of the URL, separated by a colon.
fn credentials(endpoint: &Url) -> Option<Vec<u8>> {
    let (name, password) = (endpoint.username(), endpoint.password());
    if name.is_empty() && password.is_none() {
        return None;
    }
    let mut credentials: Vec<u8> = percent_decode_str(name).collect();
    credentials.push(b':');
    credentials.extend(percent_decode_str(password.unwrap_or_default()));
    Some(credentials)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(endpoint: &str, traceparent: Option<&str>) -> String {
        let template = RequestTemplate::new(&endpoint.parse().unwrap());
        String::from_utf8(template.about(42, traceparent)).unwrap()
    }

    #[test]
    fn request_over_http2_has_the_same_uri_and_fields() {
        let request = request("https://me:a%2Fb@[::1]:81/v%201//", Some("00-1-2-01"));
        let http2 = to_http2(request.as_bytes()).unwrap();
        assert_eq!(
            (http2.method().as_str(), http2.uri().to_string().as_str()),
            ("GET", "https://[::1]:81/v%201/objects/42")
        );
        let fields =
            http2.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap()));
        let expected = [
            ("accept", "*/*"),
            ("user-agent", USER_AGENT),
            // The base64 of "me:a/b".
            ("authorization", "Basic bWU6YS9i"),
            ("traceparent", "00-1-2-01"),
        ];
        assert_eq!(fields.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn request_has_the_path_host_and_user_of_the_endpoint() {
        let expected = format!(
            "GET /objects/42 HTTP/1.1\r\nhost: api\r\naccept: */*\r\nuser-agent: {USER_AGENT}\r\n\r\n"
        );
        assert_eq!(request("http://api", None), expected);
        assert_eq!(request("https://api:443/", None), expected);
        let with_all = request("http://me:a%2Fb@[::1]:81/v%201//", Some("00-1-2-01"));
        for part in [
            "GET /v%201/objects/42 HTTP/1.1\r\nhost: [::1]:81\r\n",
            // The base64 of "me:a/b".
            "\r\nauthorization: Basic bWU6YS9i\r\n",
            "\r\ntraceparent: 00-1-2-01\r\n\r\n",
        ] {
            assert!(with_all.contains(part), "{part} is missing in {with_all}");
        }
    }
}
