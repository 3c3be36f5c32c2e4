//! Invalid bodies of many kinds.

use testkit::Wire;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Siege, exchange, statuses};

const MIB: usize = 1 << 20;

/// A request with these headers and this body. It asks the server to close the connection.
fn request(headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST /callback HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Invalid requests: a description, the bytes, and the expected status.
fn invalid_requests() -> Vec<(&'static str, Vec<u8>, u16)> {
    let good = r#"{"object_ids":[666]}"#.as_bytes();
    let ids = |count: usize| format!(r#"{{"object_ids":[{}1]}}"#, "1,".repeat(count - 1));
    let of_id = |id: String| format!(r#"{{"object_ids":[{id}]}}"#);
    let utf16: Vec<u8> =
        r#"{"object_ids":[666]}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let deep = format!(r#"{{"object_ids":{}"#, "[".repeat(MIB - 20));
    let unknown = format!(r#"{{"x":{}"#, "[{\"x\":".repeat(MIB / 8));
    let typed = |kind: &str| request(&format!("Content-Type: {kind}\r\n"), good);
    let encoded = |kind: &str| request(&format!("Content-Encoding: {kind}\r\n"), good);
    vec![
        ("brackets", request("", "[".repeat(MIB).as_bytes()), 400),
        ("brackets for ids", request("", deep.as_bytes()), 400),
        ("brackets in an unknown field", request("", unknown.as_bytes()), 400),
        ("a million ids", request("", ids(1_000_000).as_bytes()), 413),
        ("500,000 ids", request("", ids(500_000).as_bytes()), 422),
        ("an id of 10 KB", request("", of_id("7".repeat(10_000)).as_bytes()), 400),
        (
            "a negative id of 10 KB",
            request("", of_id(format!("-{}", "7".repeat(10_000))).as_bytes()),
            400,
        ),
        (
            "an exponent of 10,000 digits",
            request("", of_id(format!("1e{}", "9".repeat(10_000))).as_bytes()),
            400,
        ),
        ("an infinite id", request("", of_id("1e999999".to_owned()).as_bytes()), 400),
        ("NUL bytes", request("", &vec![0; MIB]), 400),
        ("invalid UTF-8", request("", &vec![0xff; MIB]), 400),
        ("UTF-16", request("", &utf16), 400),
        (
            "UTF-16 with its charset",
            request("Content-Type: application/json; charset=utf-16\r\n", &utf16),
            400,
        ),
        ("gzip", encoded("gzip"), 415),
        ("gzip twice", encoded("identity, gzip"), 415),
        ("an unknown encoding", encoded("\u{fc}"), 415),
        ("a multipart form", typed("multipart/form-data; boundary=x"), 415),
        ("multipart in capitals", typed(" Multipart/Mixed"), 415),
    ]
}

#[tokio::test]
async fn invalid_bodies_are_answered_4xx() {
    let siege = Siege::begin(&[]).await;
    for (what, bytes, expected) in invalid_requests() {
        let mut clients = JoinSet::new();
        for _ in 0..4 {
            let (address, bytes) = (siege.address, bytes.clone());
            clients.spawn(async move { exchange(address, &bytes).await });
        }
        for answer in clients.join_all().await {
            assert_eq!(statuses(&answer), [expected], "{what}: {answer}");
        }
    }
    siege.assert_withstood(0, 120).await;
}

#[tokio::test]
async fn callback_is_accepted_with_any_content_type() {
    // Field case 1.2.
    let siege = Siege::begin(&[]).await;
    let kinds = [
        "application/json",
        "Application/JSON; charset=\"UTF-8\"",
        "application/json; charset=utf8",
        "application/json; charset=ISO-8859-1",
        "application/problem+json",
        "application/octet-stream",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "",
    ];
    for kind in kinds {
        let headers = format!("Content-Type: {kind}\r\nContent-Encoding: identity\r\n");
        let bytes = request(&headers, br#"{"object_ids":[1]}"#);
        let answer = exchange(siege.address, &bytes).await;
        assert_eq!(statuses(&answer), [200], "{kind}: {answer}");
    }
    siege.assert_withstood(9, 120).await;
}

#[tokio::test]
async fn truncated_body_is_rejected() {
    let siege = Siege::begin(&[]).await;
    let whole = request("", br#"{"object_ids":[666]}  "#);
    let chunked = b"POST /callback HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n{\"object_ids\":[666]}\r\n";
    // Each request has the complete JSON, but not the end of the body.
    for bytes in [&whole[..whole.len() - 2], chunked, &chunked[..chunked.len() - 2]] {
        let mut stream = TcpStream::connect(siege.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer).await.unwrap();
        assert!(matches!(statuses(&answer).as_slice(), [] | [400]), "{answer}");
    }
    siege.assert_withstood(0, 120).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_large_bodies_stay_within_their_memory_limit() {
    super::allow_files(4_000);
    let siege = Siege::begin(&[("BODY_TIMEOUT", "4s")]).await;
    let body = vec![b' '; MIB];
    let whole = request("", &body);
    let unfinished: &'static [u8] = Box::leak(whole[..whole.len() - 1].to_vec().into());
    let mut clients = JoinSet::new();
    for _ in 0..400 {
        let address = siege.address;
        clients.spawn(async move { exchange(address, unfinished).await });
    }
    for answer in clients.join_all().await {
        // The producer answers 503 to a body without permits at its deadline, and 408 to the others
        // once they are too slow.
        assert!(matches!(statuses(&answer).as_slice(), [] | [408 | 503]), "{answer}");
    }
    // Large bodies are accepted again.
    let mut wire = Wire::connect(siege.address).await;
    wire.send(request("", &[&body[20..], br#"{"object_ids":[1]}"#].concat())).await;
    assert_eq!(wire.reply().await.status, 200);
    siege.assert_withstood(1, 150).await;
}
