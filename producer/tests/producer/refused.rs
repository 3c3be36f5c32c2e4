use testkit::Wire;

use crate::harness::{Producer, assert_problem_reply};

#[tokio::test]
async fn invalid_body_is_answered_400_with_the_fault_and_position() {
    let producer = Producer::start(&[]).await;
    let bad: &[(&[u8], &str)] = &[
        (b"", "the body must be a JSON object"),
        (b"object_ids=1", "the body must be a JSON object"),
        (b"[1,2,3]", "the body must be a JSON object"),
        (b"[[1,2,3]]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b"{", "the body is not JSON"),
        (br#"{"object_ids":[1,}"#, "the body is not JSON"),
        (br#"{"object_ids":[1]"#, "the body is not JSON"),
        (b"{\"object_ids\":[1,\xff]}", "the body is not JSON"),
        (br#"{"object_ids":[1]} extra"#, "there is more after the end"),
        (b"{}", "the body must look like"),
        (br#"{"object_ids":7}"#, "the body must look like"),
        (br#"{"object_ids":null}"#, "the body must look like"),
        (br#"{"object_ids":{"0":1}}"#, "the body must look like"),
        (br#"{"object_ids":[1],"object_ids":[2]}"#, "the body must look like"),
        (br#"{"object_ids":[" 7"]}"#, "object_ids[0] is not a 64-bit integer"),
        (br#"{"object_ids":[1,2.5]}"#, "object_ids[1] is not a 64-bit integer"),
        (br#"{"object_ids":[1,2,1e30]}"#, "object_ids[2] is not a 64-bit integer"),
        (br#"{"object_ids":[1,2,3,null]}"#, "object_ids[3] is not a 64-bit integer"),
        (br#"{"object_ids":[9223372036854775808]}"#, "object_ids[0] is not a 64-bit integer"),
        (br#"{"object_ids":[-9223372036854775809]}"#, "object_ids[0] is not a 64-bit integer"),
        (br#"{"object_ids":[1,[2]]}"#, "object_ids[1] is not a 64-bit integer"),
    ];
    for (body, expected) in bad {
        let text = String::from_utf8_lossy(body);
        let answer = producer.post(body.to_vec()).await;
        let detail = answer.assert_problem(400);
        assert!(detail.starts_with(expected), "{text}: {detail}");
        assert!(!answer.header("callback-id").is_empty(), "{text}");
    }
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn body_announced_as_too_large_is_answered_413_unread() {
    let producer = Producer::start(&["--max-body-bytes=64"]).await;
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 65\r\n\r\n").await;
    let reply = wire.reply().await;
    assert_problem_reply(&reply, 413, "64 bytes");
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn chunked_body_is_answered_413_as_soon_as_it_is_too_large() {
    let producer = Producer::start(&["--max-body-bytes=64"]).await;
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let spaces = " ".repeat(30);
    for chunk in ["{\"object_ids\":[1],", &spaces, &spaces] {
        wire.send(format!("{:x}\r\n{chunk}\r\n", chunk.len())).await;
    }
    let reply = wire.reply().await;
    assert_problem_reply(&reply, 413, "64 bytes");
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn client_still_sending_a_large_body_receives_the_413() {
    let producer = Producer::start(&[]).await;
    for _ in 0..10 {
        let answer = producer.post(vec![b' '; 8 << 20]).await;
        answer.assert_problem(413);
    }
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn body_of_exactly_the_limit_is_accepted() {
    let producer = Producer::start(&["--max-body-bytes=64"]).await;
    let callback = format!("{:<64}", r#"{"object_ids":[1]}"#);
    assert_eq!(producer.post(callback.clone()).await.status, 200);
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    wire.send(format!("40\r\n{callback}\r\n0\r\n\r\n")).await;
    assert_eq!(wire.reply().await.status, 200);
    assert_eq!(producer.ids().await, [1, 1]);
}

#[tokio::test]
async fn more_ids_than_allowed_are_answered_422() {
    let producer = Producer::start(&["--max-ids-per-callback=3"]).await;
    let answer = producer.post_ids(&[1, 1, 1, 1]).await;
    assert!(answer.assert_problem(422).contains("more than the 3 of one callback"), "{answer:?}");
    producer.assert_nothing_queued().await;
    assert_eq!(producer.post_ids(&[1, 1, 1]).await.status, 200);
}

/// Field case 1.14: every rejection has an id and is counted.
#[tokio::test]
async fn another_method_is_answered_405_with_the_allowed_one() {
    let producer = Producer::start(&[]).await;
    for method in ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let request = producer.request(method, "/callback").body(r#"{"object_ids":[1]}"#);
        let answer = producer.send(request).await;
        assert_eq!(answer.assert_problem(405), "method not allowed: POST callbacks to /callback");
        assert_eq!(answer.header("allow"), "POST", "{method}");
        assert!(!answer.header("callback-id").is_empty(), "{method}");
    }
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn another_path_is_answered_404() {
    let producer = Producer::start(&[]).await;
    for path in ["/", "/Callback", "/callbacks", "/callback/1", "/callback%2F", "/metrics"] {
        let request = producer.request("POST", path).body(r#"{"object_ids":[1]}"#);
        let answer = producer.send(request).await;
        let detail = answer.assert_problem(404);
        assert!(detail.contains(&format!("nothing at {path}:")), "{detail}");
        assert!(!answer.header("callback-id").is_empty(), "{path}");
    }
    producer.assert_nothing_queued().await;
}

// Field case 7.6
#[tokio::test]
async fn callback_from_a_web_page_of_another_site_is_answered_403() {
    let producer = Producer::start(&[]).await;
    for (site, status) in [("cross-site", 403), ("same-origin", 200), ("none", 200)] {
        let request = producer.request("POST", "/callback").header("Sec-Fetch-Site", site);
        let request = request.header("Content-Type", "text/plain").body(r#"{"object_ids":[1]}"#);
        assert_eq!(producer.send(request).await.status, status, "{site}");
    }
    assert_eq!(producer.ids().await, [1, 1]);
}

// Field case 1.5
#[tokio::test]
async fn client_that_sends_all_before_it_reads_receives_the_error() {
    let producer = Producer::start(&[]).await;
    for (path, size, status) in
        [("/callback", 20 << 20, 413), ("/elsewhere", 900 << 10, 404), ("/livez", 900 << 10, 405)]
    {
        for _ in 0..5 {
            let mut wire = Wire::connect(producer.address).await;
            let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n");
            wire.send(head).await;
            wire.send(vec![b' '; size]).await;
            assert_eq!(wire.reply().await.status, status, "{path}");
        }
    }
    producer.assert_nothing_queued().await;
}

/// Field case 1.1.
#[tokio::test]
async fn equivalent_paths_accept_callbacks() {
    let producer = Producer::start(&[]).await;
    let paths = ["/callback/", "//callback", "/%63allback", "/./callback", "/x/../callback?a=b"];
    for path in paths {
        // A client library would normalise the path itself.
        let mut wire = Wire::connect(producer.address).await;
        let body = r#"{"object_ids":[1]}"#;
        let length = body.len();
        wire.send(format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
        .await;
        assert_eq!(wire.reply().await.status, 200, "{path}");
    }
    assert_eq!(producer.ids().await, vec![1; paths.len()]);
}
