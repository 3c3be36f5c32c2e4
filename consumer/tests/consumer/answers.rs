//! Which answers mean offline, and which are failed lookups.

use testkit::{Answer, StatusApi, wait_until};

use crate::failures::header;
use crate::{TestEnv, looked_up};

const HTML: &str = "<html><body><h1>404 Not Found</h1></body></html>";

fn page(status: u16, content_type: &'static str, body: &str) -> Answer {
    Answer::Page(status, content_type, body.to_owned())
}

// Field case 5.1.
#[tokio::test]
async fn a_404_that_need_not_mean_offline_is_a_failed_lookup() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (1, 1) => page(404, "text/html", HTML),
        (2, 1) => page(404, "application/json", HTML),
        (3, 1) => page(404, "text/plain; charset=utf-8", "404 page not found\n"),
        (4, 1) => page(404, "text/plain", "default backend - 404"),
        (5, 1) => {
            page(404, "application/json", r#"{"message":"no Route matched with those values"}"#)
        }
        (6, 1) => page(404, "application/json", r#"{"message":"Cannot GET /objects/6"}"#),
        // Contradicts itself.
        (7, 1) => page(404, "application/json", r#"{"id":7,"online":true}"#),
        // Too large to be read to its end.
        (8, 1) => page(404, "application/json", &format!(r#"{{"more":"{}"}}"#, "x".repeat(20_000))),
        // JSON, but not an object.
        (9, 1) => page(404, "application/json", "404"),
        _ => Answer::Online,
    });
    env.publish(1..=9).await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded(1..=9).await;
    for id in 1..=9 {
        assert_eq!(api.lookups_of(id), 2, "lookups of {id}");
    }
    env.drain(consumer).await;
}

// Field case 5.1.
#[tokio::test]
async fn a_404_of_the_api_means_offline() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        1 => Answer::Status(404),
        2 => page(404, "text/html", ""),
        3 => page(404, "application/json", r#"{"error":"not found"}"#),
        4 => page(404, "application/problem+json", r#"{"title":"no such object","status":404}"#),
        5 => page(404, "text/plain", "\u{feff}{\"id\":5,\"online\":false}"),
        _ => Answer::Online,
    });
    env.publish(1..=6).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=1"]);
    env.wait_until_recorded([6]).await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5, 6]);
    env.assert_all_settled().await;
}

#[tokio::test]
async fn every_404_is_a_failed_lookup_if_so_configured() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::Status(404),
        _ => Answer::Online,
    });
    env.publish([1]).await;
    let consumer = env.start(&api.endpoint(), &["--status-404=failed"]);
    env.wait_until_recorded([1]).await;
    env.drain(consumer).await;
}

// Field case 1.3.
#[tokio::test]
async fn a_byte_order_mark_before_the_answer_is_ignored() {
    let env = TestEnv::new().await;
    let api =
        StatusApi::start(|id, _| Answer::Body(format!("\u{feff}{{\"id\":{id},\"online\":true}}")));
    env.publish([1]).await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded([1]).await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [1]);
}

// Field case 5.5.
#[tokio::test]
async fn a_dead_letter_quotes_an_answer_that_is_not_understood() {
    let env = TestEnv::new().await;
    let long = format!("<html>\u{1b}[31m{}</html>", "x".repeat(5_000));
    let api = StatusApi::start(move |id, _| match id {
        42 => page(200, "text/html", &long),
        _ => Answer::Offline,
    });
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    // The failure counts only if the API answers other lookups before and after it. So publish
    // other ids all the time, and id 42 after ten of them.
    let mut other_id = 1_000;
    wait_until("a dead letter", async || {
        other_id += 1;
        env.publish([other_id]).await;
        if other_id == 1_010 {
            env.publish([42]).await;
        }
        env.dead_letters().await == 1
    })
    .await;
    consumer.stop().await;
    let letter = env.queue.get(&env.queue.dead()).await.unwrap().delivery;
    let reason = header(&letter.properties, "lastseen-reason");
    for part in ["200 OK", "text/html", r"<html>\u{1b}[31mxxx"] {
        assert!(reason.contains(part), "{part} is missing in {reason}");
    }
    assert!(reason.len() < 400, "{} bytes", reason.len());
}

// Field case 3.7.
#[tokio::test]
async fn a_huge_retry_after_does_not_stop_the_consumer() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (1, 1) => Answer::StatusWithHeader(500, "retry-after", u64::MAX.to_string()),
        (2, 1) => Answer::StatusWithHeader(500, "retry-after", "9".repeat(40)),
        (3, 1) => Answer::StatusWithHeader(429, "retry-after", u64::MAX.to_string()),
        _ => Answer::Online,
    });
    env.publish(1..=3).await;
    let consumer = env.start(&api.endpoint(), &[]);
    wait_until("each is looked up", async || looked_up(&[&api]).len() >= 3).await;
    // The consumer caps the pause that the 429 asks for at a minute. That is too long for a test,
    // so this one does not wait for the lookups after it.
    consumer.stop().await;
}
