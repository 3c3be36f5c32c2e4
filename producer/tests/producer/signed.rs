//! Signed callbacks, with `CALLBACK_SECRET`.

use std::time::{Duration, SystemTime};

use axum::http::HeaderName;
use reqwest::RequestBuilder;
use runtime::authenticity::{ID, Keys, SIGNATURE, TIMESTAMP};
use testkit::{Process, Queue, System, Wire, producer_address, wait_until};

use crate::harness::{Answer, CLIENT_TIMEOUT, Producer, assert_problem_reply};
use crate::spool::HangingDisk;

const OLD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEW: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const OTHER: &str = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn secret() -> String {
    format!("--callback-secret={NEW} {OLD}")
}

async fn start_with_secret() -> Producer {
    Producer::start(&[&secret()]).await
}

/// The headers that a sender with `key` adds to a callback at `time`.
fn headers(key: &str, id: &str, time: SystemTime, body: &str) -> [(HeaderName, String); 3] {
    let signed = key.parse::<Keys>().unwrap().sign(id, time, body.as_bytes());
    [(ID, id.to_owned()), (TIMESTAMP, signed.timestamp), (SIGNATURE, signed.signature)]
}

fn request(producer: &Producer, headers: &[(HeaderName, String)], body: &str) -> RequestBuilder {
    let request = producer.request("POST", "/callback").body(body.to_owned());
    headers.iter().fold(request, |request, (name, value)| request.header(name, value))
}

async fn post(producer: &Producer, id: &str, body: &str) -> Answer {
    let headers = headers(NEW, id, SystemTime::now(), body);
    producer.send(request(producer, &headers, body)).await
}

async fn assert_only_queued(producer: &Producer, expected: &[i64]) {
    assert_eq!(post(producer, "the-last", r#"{"object_ids":[4711]}"#).await.status, 200);
    assert_eq!(producer.ids().await, [expected, &[4_711]].concat());
}

#[tokio::test]
async fn callback_signed_with_any_of_the_keys_is_accepted() {
    let producer = start_with_secret().await;
    for (key, id) in [(OLD, 1), (NEW, 2)] {
        let body = format!(r#"{{"object_ids":[{id}]}}"#);
        let headers = headers(key, &format!("msg_{id}"), SystemTime::now(), &body);
        let answer = producer.send(request(&producer, &headers, &body)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_only_queued(&producer, &[1, 2]).await;
}

#[tokio::test]
async fn valid_signature_among_other_signatures_is_found() {
    let producer = start_with_secret().await;
    let body = r#"{"object_ids":[1]}"#;
    let mut headers = headers(OLD, "msg_1", SystemTime::now(), body);
    headers[2].1 = format!("v1a,AAAA v2,x nonsense v1,AAAA {} v1,", headers[2].1);
    assert_eq!(producer.send(request(&producer, &headers, body)).await.status, 200);
}

#[tokio::test]
async fn unsigned_or_wrongly_signed_callback_is_401_and_not_queued() {
    let producer = start_with_secret().await;
    let body = r#"{"object_ids":[1]}"#;
    let now = SystemTime::now();
    let valid = headers(NEW, "msg_1", now, body);
    let six_minutes = Duration::from_mins(6);
    let without = |index: usize| {
        let mut headers = valid.to_vec();
        headers.remove(index);
        headers
    };
    let with = |index: usize, value: &str| {
        let mut headers = valid.to_vec();
        headers[index].1 = value.to_owned();
        headers
    };
    let twice = [valid.as_slice(), &valid[..1]].concat();
    let cases = [
        (Vec::new(), "the header webhook-id is missing"),
        (without(0), "the header webhook-id is missing"),
        (without(1), "the header webhook-timestamp is missing"),
        (without(2), "the header webhook-signature is missing"),
        (twice, "the header webhook-id must not be repeated"),
        (with(0, ""), "the header webhook-id must be"),
        (with(0, "msg.1"), "the header webhook-id must be"),
        (with(0, "msg_2"), "no v1 signature"),
        (with(1, "soon"), "the header webhook-timestamp must be"),
        (with(1, "+1"), "the header webhook-timestamp must be"),
        (with(2, ""), "no v1 signature"),
        (with(2, "v1,"), "no v1 signature"),
        (headers(NEW, "msg_1", now, r#"{"object_ids":[2]}"#).to_vec(), "no v1 signature"),
        (headers(OTHER, "msg_1", now, body).to_vec(), "no v1 signature"),
        // 360 to 369 seconds old.
        (
            headers(NEW, "msg_1", now - six_minutes, body).to_vec(),
            "the header webhook-timestamp is 36",
        ),
        // Up to 360 seconds ahead, but a little less by the time of the request.
        (
            headers(NEW, "msg_1", now + six_minutes, body).to_vec(),
            "the header webhook-timestamp is 3",
        ),
    ];
    for (headers, expected) in cases {
        let answer = producer.send(request(&producer, &headers, body)).await;
        let detail = answer.assert_problem(401);
        assert!(detail.starts_with(expected), "{headers:?}: {detail}");
        // A response that quoted the valid signature would help to forge callbacks.
        assert!(!detail.contains(&valid[2].1[3..]), "{detail}");
    }
    // A difference of four minutes is allowed.
    for time in [now - Duration::from_mins(4), now + Duration::from_mins(4)] {
        let body = r#"{"object_ids":[7]}"#;
        let headers = headers(NEW, "msg_7", time, body);
        assert_eq!(producer.send(request(&producer, &headers, body)).await.status, 200);
    }
    assert_only_queued(&producer, &[7]).await;
}

#[tokio::test]
async fn unsigned_callback_is_answered_before_its_body_is_sent() {
    let producer = start_with_secret().await;
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n").await;
    let reply = wire.reply().await;
    assert_eq!(reply.status, 401, "{reply:?}");
    assert_problem_reply(&reply, 401, "must be signed");
}

#[tokio::test]
async fn body_is_parsed_only_after_its_signature_is_verified() {
    let producer = start_with_secret().await;
    let headers = headers(OTHER, "msg_1", SystemTime::now(), "{");
    producer.send(request(&producer, &headers, "{")).await.assert_problem(401);
    post(&producer, "msg_1", "{").await.assert_problem(400);
}

#[tokio::test]
async fn repeat_gets_the_same_answer_and_is_published_once() {
    let producer = start_with_secret().await;
    let body = r#"{"object_ids":[1,2,2]}"#;
    // Post all at the same time, so that most of them arrive while the first is in flight.
    let posts = (0..20).map(|_| post(&producer, "msg_1", body));
    let mut answers = futures_util::future::join_all(posts).await;
    // A client that tries again sends a new timestamp.
    let later = SystemTime::now() + Duration::from_secs(9);
    let later = headers(OLD, "msg_1", later, body);
    answers.push(producer.send(request(&producer, &later, body)).await);
    for answer in answers {
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.body, serde_json::json!({ "accepted": 3, "queued": 2 }));
    }
    assert_only_queued(&producer, &[1, 2]).await;
}

#[tokio::test]
async fn two_callbacks_with_one_id_are_both_published() {
    let producer = start_with_secret().await;
    for body in [r#"{"object_ids":[1]}"#, r#"{"object_ids":[2]}"#] {
        assert_eq!(post(&producer, "msg_1", body).await.status, 200);
    }
    assert_only_queued(&producer, &[1, 2]).await;
}

#[tokio::test]
async fn repeat_of_a_failed_callback_is_published() {
    // A file instead of a directory, so that there is no spool.
    let scratch = testkit::Scratch::new("no-spool");
    let file = scratch.path().join("file");
    std::fs::write(&file, "").unwrap();
    let no_spool = format!("--spool-dir={}", file.join("spool").display());
    let (proxy, producer) = Producer::behind_proxy(&[&secret(), &no_spool]).await;
    wait_until("the broker confirms a callback", async || {
        post(&producer, "msg_0", "{\"object_ids\":[0]}").await.status == 200
    })
    .await;
    proxy.silence();
    let body = r#"{"object_ids":[1]}"#;
    // One request waits for the broker, and the other one for the outcome of the first.
    let both = tokio::join!(post(&producer, "msg_1", body), post(&producer, "msg_1", body));
    for answer in [both.0, both.1] {
        answer.assert_problem(503);
        assert!(answer.took < CLIENT_TIMEOUT, "{answer:?}");
    }
    proxy.restore();
    wait_until("the broker confirms a callback", async || {
        post(&producer, "msg_1", body).await.status == 200
    })
    .await;
    assert!(producer.ids().await.contains(&1));
}

/// Field case 1.11. The repeats arrive while the first request waits for a silent broker, and then
/// for a hanging disk.
#[tokio::test]
async fn repeats_are_answered_within_the_clients_timeout() {
    let (proxy, producer) = Producer::behind_proxy(&[&secret()]).await;
    producer.connected().await;
    proxy.silence();
    let _hanging = HangingDisk::of_spool(&producer);
    let repeats = (0..6).map(|number| {
        let producer = &producer;
        async move {
            tokio::time::sleep(Duration::from_millis(150) * number).await;
            post(producer, "msg_1", r#"{"object_ids":[1]}"#).await
        }
    });
    for answer in futures_util::future::join_all(repeats).await {
        answer.assert_problem(503);
        assert!(answer.took < CLIENT_TIMEOUT, "{answer:?}");
    }
}

#[tokio::test]
async fn invalid_secret_ends_the_process_with_78_and_is_not_shown() {
    let scratch = testkit::Scratch::new("secret");
    let file = scratch.path().join("secret");
    std::fs::write(&file, "whsec_tooshort\n").unwrap();
    let bad = [
        ("CALLBACK_SECRET", format!("{NEW},s3cret"), "key 2 of 2 does not begin with whsec_"),
        ("CALLBACK_SECRET", " ".to_owned(), "there is no key"),
        ("CALLBACK_SECRET_FILE", file.display().to_string(), "key 1 of 1 has 6 bytes"),
    ];
    for (name, value, reason) in bad {
        let producer = Process::spawn("producer", &[(name, value)], &[]);
        assert_eq!(producer.wait().await.code(), Some(78));
        let log = producer.log().join("\n");
        assert!(log.starts_with(&format!("producer: CALLBACK_SECRET=***: {reason}")), "{log}");
        assert!(!log.contains(&NEW[6..]) && !log.contains("s3cret"), "{log}");
        assert!(!log.contains("tooshort"), "{log}");
    }
}

#[tokio::test]
async fn secret_from_a_file_is_not_logged_at_any_level() {
    let scratch = testkit::Scratch::new("secret");
    let file = scratch.path().join("secret");
    std::fs::write(&file, format!("{NEW}\n{OLD}\n")).unwrap();
    let queue = Queue::new();
    let system = System::of_producers(&testkit::amqp_uri(), &queue);
    let file = file.display().to_string();
    let process =
        system.spawn("producer", &[("CALLBACK_SECRET_FILE", &file), ("RUST_LOG", "trace")]);
    process.ready().await;
    let address = producer_address(&process).await;
    let mut wire = Wire::connect(address).await;
    assert_eq!(wire.post_callback(1).await.status, 401);
    process.wait_for_log("requests rejected").await;
    let log = process.log().join("\n");
    assert!(!log.contains(&NEW[6..]) && !log.contains(&OLD[6..]));
}
