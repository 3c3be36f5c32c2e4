//! Ambiguous requests, for which two servers might disagree where one request ends and the next
//! begins.

use super::{Siege, exchange, statuses};

/// The request that an attacker hides in another request. The producer must never read it as a
/// request.
const HIDDEN: &str =
    "POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"object_ids\":[666]}";
const POST: &str = "POST /callback HTTP/1.1\r\nHost: x\r\n";
const BODY: &str = r#"{"object_ids":[1]}"#;

/// A request with these headers, `rest` after them, and then the hidden request.
fn hiding(headers: &str, rest: &str) -> Vec<u8> {
    format!("{POST}{headers}\r\n{rest}{HIDDEN}").into_bytes()
}

fn chunked(rest: &str) -> Vec<u8> {
    hiding("Transfer-Encoding: chunked\r\n", rest)
}

/// A request with a valid body, and `header` in its head.
fn with(header: &str) -> Vec<u8> {
    hiding(&format!("{header}\r\nContent-Length: 18\r\n"), BODY)
}

fn ambiguous_requests() -> Vec<(&'static str, Vec<u8>)> {
    let one_chunk = "12\r\n{\"object_ids\":[1]}\r\n0\r\n\r\n";
    let with_te = |value: &str| hiding(&format!("Transfer-Encoding: {value}\r\n"), one_chunk);
    let with_length = |value: &str| hiding(&format!("Content-Length: {value}\r\n"), BODY);
    let mut requests = vec![
        ("two lengths", hiding("Content-Length: 18\r\nContent-Length: 0\r\n", BODY)),
        ("a list of lengths", with_length("18, 0")),
        ("a length with a sign", with_length("+18")),
        ("a negative length", with_length("-1")),
        ("a length in hex", with_length("0x12")),
        ("a length beyond 64 bits", with_length("18446744073709551634")),
        ("an empty length", with_length("")),
        ("chunked and then not", with_te("chunked, identity")),
        ("not chunked", with_te("identity")),
        ("nearly chunked", with_te("xchunked")),
        ("a line feed in chunked", with_te("chun\nked")),
        ("chunked in HTTP/1.0", {
            let head = "POST /callback HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
            format!("{head}{one_chunk}{HIDDEN}").into_bytes()
        }),
        ("a space before the colon", with("Transfer-Encoding : chunked")),
        ("a folded header", with("X: a\r\n b")),
        ("a folded length", hiding("Content-Length:\r\n 18\r\n", BODY)),
        ("a header that begins with a space", hiding(" Content-Length: 18\r\n", BODY)),
        ("a header without a name", with(": a")),
        ("a header without a colon", with("abc")),
        ("a NUL in a header", with("X: a\0b")),
        ("a NUL in a name", with("X\0: a")),
        ("a bare carriage return", with("X: a\rContent-Length: 0")),
        ("1,000 headers", with(&vec!["X: a"; 1_000].join("\r\n"))),
        ("a header of 100 KB", with(&format!("X: {}", "a".repeat(100_000)))),
        ("a request line of 100 KB", {
            format!("POST /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(100_000)).into_bytes()
        }),
        ("a NUL in the path", b"POST /call\0back HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a line feed in the path", b"POST /call\nback HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("two spaces", format!("POST  /callback HTTP/1.1\r\n\r\n{HIDDEN}").into_bytes()),
        (
            "a tunnel",
            b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\nConnection: close\r\n\r\n".to_vec(),
        ),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("HTTP/3", format!("POST /callback HTTP/3.0\r\n\r\n{HIDDEN}").into_bytes()),
        ("HTTP/0.9", format!("POST /callback\r\n\r\n{HIDDEN}").into_bytes()),
        ("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n".to_vec()),
        ("a chunk extension of 100 KB", chunked(&format!("12;{}\r\n", "a".repeat(100_000)))),
        ("trailers of 100 KB", chunked(&format!("0\r\nX: {}\r\n\r\n", "a".repeat(100_000)))),
    ];
    let sizes = ["zz", "-1", "0x12", "12 12", "", "fffffffffffffffff", "12\n", "\r12"];
    let sizes = sizes.map(|size| chunked(&format!("{size}\r\n{BODY}\r\n0\r\n\r\n")));
    requests.extend(sizes.map(|bytes| ("a bad chunk size", bytes)));
    requests
        .push(("a chunk that ends by a line feed", chunked(&format!("12\n{BODY}\r\n0\r\n\r\n"))));
    requests.push((
        "a chunk that is longer than its size",
        chunked(&format!("2\r\n{BODY}\r\n0\r\n\r\n")),
    ));
    requests
}

#[tokio::test]
async fn ambiguous_request_is_rejected_and_ends_the_connection() {
    let siege = Siege::begin(&[]).await;
    for (what, bytes) in ambiguous_requests() {
        let answer = exchange(siege.address, &bytes).await;
        let statuses = statuses(&answer);
        let refused = match statuses.as_slice() {
            [] => true,
            [status] => (400..500).contains(status) || [501, 505].contains(status),
            _ => false,
        };
        assert!(refused, "{what}: {statuses:?} {answer}");
    }
    siege.assert_withstood(0, 120).await;
}

/// By RFC 9112 (6.3), the chunked encoding overrides a length, and the connection must be closed.
#[tokio::test]
async fn chunked_request_is_the_last_on_its_connection() {
    let siege = Siege::begin(&[]).await;
    let one_chunk = "12\r\n{\"object_ids\":[1]}\r\n0\r\n\r\n";
    let headers = [
        "Transfer-Encoding: chunked\r\n",
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Content-Length: 4\nTransfer-Encoding: chunked\r\n",
    ];
    for headers in headers {
        let answer = exchange(siege.address, &hiding(headers, one_chunk)).await;
        assert_eq!(statuses(&answer), [200], "{headers}: {answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
    let elsewhere = "POST /elsewhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let hiding = format!("{elsewhere}{one_chunk}{HIDDEN}");
    let answer = exchange(siege.address, hiding.as_bytes()).await;
    assert_eq!(statuses(&answer), [404], "{answer}");
    siege.assert_withstood(4, 120).await;
}

/// A server must accept the first of these requests (RFC 9112, 3.2.2), and may accept the others
/// (2.2, 6.3).
#[tokio::test]
async fn unusual_but_unambiguous_requests_are_accepted() {
    let siege = Siege::begin(&[]).await;
    let rest = format!("Connection: close\r\nContent-Length: 18\r\n\r\n{BODY}");
    let requests = [
        format!("POST http://x/callback HTTP/1.1\r\nHost: x\r\n{rest}"),
        format!("POST /callback HTTP/1.1\nHost: x\n{}", rest.replace("\r\n", "\n")),
        format!("{POST}Content-Length: 18\r\n{rest}"),
        format!("\r\n{POST}{rest}"),
    ];
    for request in requests {
        let answer = exchange(siege.address, request.as_bytes()).await;
        assert_eq!(statuses(&answer), [200], "{request}: {answer}");
    }
    siege.assert_withstood(4, 120).await;
}
