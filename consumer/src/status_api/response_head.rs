//! Parses the head of an HTTP/1.1 response.

use std::str;

use http::StatusCode;
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING,
};
use httparse::{EMPTY_HEADER, Header, Response, Status};

/// More fields than this are an error.
pub(super) const FIELDS_MAX: usize = 100;

/// The parts of a head that a lookup needs.
#[derive(Debug)]
pub(super) struct ResponseHead {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) retry_after: Option<HeaderValue>,
    pub(super) body_length: BodyLength,
    /// Whether the server keeps the connection open after this response.
    pub(super) keeps_alive: bool,
}

/// How the end of a body is recognised (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyLength {
    Bytes(u64),
    Chunked,
    UntilClose,
}

/// A response that does not conform to HTTP/1.1.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidResponse {
    #[error("invalid response: {0}")]
    Syntax(#[from] httparse::Error),
    #[error("invalid response: the status code is below 100")]
    Status,
    #[error("invalid response: the Content-Length is not one number")]
    ContentLength,
    #[error("invalid response: HTTP/1.0 with Transfer-Encoding")]
    TransferEncoding,
    #[error("invalid response: a chunk does not end where its size says")]
    Chunk,
    #[error("the response has more than {0} bytes without the end of its head, chunk or trailers")]
    TooLarge(usize),
}

impl ResponseHead {
    /// Parses a head. Returns it with its length, or `None` if `bytes` does not contain its end.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, InvalidResponse> {
        let mut fields = [EMPTY_HEADER; FIELDS_MAX];
        let mut response = Response::new(&mut fields);
        Ok(match response.parse(bytes)? {
            Status::Complete(length) => Some((Self::from_parsed(&response)?, length)),
            Status::Partial => None,
        })
    }

    /// Whether the head of the actual response follows (1xx).
    pub(super) fn is_interim(&self) -> bool {
        self.status.is_informational() && self.status != StatusCode::SWITCHING_PROTOCOLS
    }

    fn from_parsed(response: &Response<'_, '_>) -> Result<Self, InvalidResponse> {
        let status = StatusCode::from_u16(response.code.unwrap_or_default());
        let status = status.map_err(|_| InvalidResponse::Status)?;
        let fields: &[Header<'_>] = response.headers;
        let is_http_1_0 = response.version == Some(0);
        let first = |name: &str| {
            let field = fields.iter().find(|field| field.name.eq_ignore_ascii_case(name));
            field.and_then(|field| HeaderValue::from_bytes(field.value).ok())
        };
        let body_length = body_length(status, is_http_1_0, fields)?;
        Ok(Self {
            status,
            content_type: first(CONTENT_TYPE.as_str()),
            retry_after: first(RETRY_AFTER.as_str()),
            body_length,
            keeps_alive: body_length != BodyLength::UntilClose
                && status != StatusCode::SWITCHING_PROTOCOLS
                && !has_element(fields, "close")
                && (!is_http_1_0 || has_element(fields, "keep-alive")),
        })
    }
}

fn body_length(
    status: StatusCode,
    is_http_1_0: bool,
    fields: &[Header<'_>],
) -> Result<BodyLength, InvalidResponse> {
    if status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
    {
        return Ok(BodyLength::Bytes(0));
    }
    if let Some(encodings) = values(fields, TRANSFER_ENCODING.as_str()).last() {
        // The encodings are listed in the order in which the server applied them.
        let last = encodings.rsplit(|byte| *byte == b',').next().unwrap_or_default();
        return match last.trim_ascii() {
            _ if is_http_1_0 => Err(InvalidResponse::TransferEncoding),
            last if last.eq_ignore_ascii_case(b"chunked") => Ok(BodyLength::Chunked),
            _ => Ok(BodyLength::UntilClose),
        };
    }
    let mut length = None;
    for value in elements(fields, CONTENT_LENGTH.as_str()) {
        let number = number(value).ok_or(InvalidResponse::ContentLength)?;
        if length.is_some_and(|length| length != number) {
            return Err(InvalidResponse::ContentLength);
        }
        length = Some(number);
    }
    Ok(length.map_or(BodyLength::UntilClose, BodyLength::Bytes))
}

fn values<'a>(fields: &[Header<'a>], name: &str) -> impl Iterator<Item = &'a [u8]> {
    fields
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .map(|field| field.value)
}

/// The elements of a comma-separated list, which may be distributed over several fields.
fn elements<'a>(fields: &[Header<'a>], name: &str) -> impl Iterator<Item = &'a [u8]> {
    values(fields, name).flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

/// Whether the field `Connection` has this element.
fn has_element(fields: &[Header<'_>], element: &str) -> bool {
    elements(fields, CONNECTION.as_str())
        .any(|found| found.eq_ignore_ascii_case(element.as_bytes()))
}

/// Parses digits. Unlike this function, the standard library accepts a sign.
fn number(digits: &[u8]) -> Option<u64> {
    let is_number = digits.iter().all(u8::is_ascii_digit);
    str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}
