use lapin::BasicProperties;
use lapin::types::AMQPValue;
use testkit::{Answer, StatusApi, wait_until};

use crate::{CALLBACK_ID, SECOND, TestEnv, looked_up, lookup_times};

/// A header as text.
pub(crate) fn header(properties: &BasicProperties, name: &str) -> String {
    match properties.headers().as_ref().and_then(|headers| headers.inner().get(name)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        Some(AMQPValue::LongLongInt(number)) => number.to_string(),
        other => panic!("unexpected header {name}: {other:?}"),
    }
}

#[tokio::test]
async fn every_kind_of_failure_is_retried_later() {
    let env = TestEnv::new().await;
    let elsewhere = StatusApi::start(|_, _| Answer::Online);
    let redirect = format!("{}/objects/6", elsewhere.endpoint());
    // Valid except for its size.
    let huge = format!(r#"{{"id":7,"online":true,"more":"{}"}}"#, "x".repeat(1024 * 1024));
    let api = StatusApi::start(move |id, lookup| match (id, lookup) {
        (1, 1) => Answer::Status(500),
        (2, 1) => Answer::StatusWithHeader(429, "retry-after", "2".to_owned()),
        (3, 1) => Answer::Hang,
        (4, 1) => Answer::Body("<html>online</html>".to_owned()),
        (5, 1) => Answer::Body(r#"{"id":7000,"online":true}"#.to_owned()),
        (6, 1) => Answer::Redirect(redirect.clone()),
        (7, 1) => Answer::Body(huge.clone()),
        // A panic in the handler makes the server drop the connection.
        (8, 1) => std::panic::resume_unwind(Box::new("the connection is closed")),
        _ => Answer::Online,
    });
    env.publish(1..=8).await;
    let consumer = env.start(&api.endpoint(), &["--status-timeout=1s"]);
    env.wait_until_recorded(1..=8).await;
    for id in 1..=8 {
        let times = lookup_times(&api, id);
        assert_eq!(times.len(), 2, "lookups of {id}");
        let wait = times[1] - times[0];
        assert!(wait >= SECOND, "{id} was retried after {wait:?}");
    }
    assert_eq!(elsewhere.lookups(), [], "a redirect was followed");
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_retry_waits_as_long_as_retry_after_says() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::StatusWithHeader(429, "retry-after", "3".to_owned()),
        _ => Answer::Online,
    });
    env.publish([42]).await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded([42]).await;
    let times = lookup_times(&api, 42);
    assert_eq!(times.len(), 2);
    assert!(times[1] - times[0] >= SECOND * 3, "retried after {:?}", times[1] - times[0]);
    consumer.stop().await;
}

#[tokio::test]
async fn after_the_last_attempt_a_message_becomes_a_dead_letter() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        42 => Answer::Status(500),
        _ => Answer::Offline,
    });
    let consumer = env.start(&api.endpoint(), &["--max-attempts=2"]);
    // The API must answer other lookups before and after a failure for it to count.
    let mut other = 1_000;
    let mut publish_other = async || {
        other += 1;
        env.publish([other]).await;
    };
    wait_until("others are answered", async || {
        publish_other().await;
        api.lookups().len() > 3
    })
    .await;
    env.publish([42]).await;
    wait_until("a dead letter", async || {
        publish_other().await;
        env.dead_letters().await == 1
    })
    .await;
    wait_until("no other is left", async || env.ready().await == 0).await;
    consumer.stop().await;
    assert_eq!(api.lookups_of(42), 2);
    let letter = env.queue.get(&env.queue.dead()).await.unwrap().delivery;
    assert_eq!(letter.data, br#"{"id":42}"#);
    let properties = &letter.properties;
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), CALLBACK_ID);
    let reason = header(properties, "lastseen-reason");
    assert!(reason.contains("answered 500"), "{reason}");
    assert_eq!(header(properties, "lastseen-attempts"), "2");
    let first = header(properties, "lastseen-first-failed-at");
    let last = header(properties, "lastseen-last-failed-at");
    assert!(first < last, "first {first}, last {last}");
    // The dead letter was taken out above.
    env.assert_all_settled().await;
}

#[tokio::test]
async fn an_undecodable_message_becomes_a_dead_letter_at_once() {
    let (env, api) = TestEnv::with_all_online().await;
    env.queue.publish_raw(b"not json").await;
    env.publish([42]).await;
    // With one lookup at a time, the good message is handled after the bad one.
    let consumer = env.start(&api.endpoint(), &["--max-consumers=1"]);
    env.wait_until_recorded([42]).await;
    wait_until("a dead letter", async || env.dead_letters().await == 1).await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [42]);
    let letter = env.queue.get(&env.queue.dead()).await.unwrap().delivery;
    assert_eq!(letter.data, b"not json");
    let reason = header(&letter.properties, "lastseen-reason");
    assert!(reason.contains("the body is not"), "{reason}");
    assert_eq!(header(&letter.properties, "lastseen-attempts"), "1");
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_lookup_that_always_fails_does_not_delay_others() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        1 => Answer::Status(500),
        _ => Answer::Online,
    });
    env.publish(1..=21).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=1"]);
    env.wait_until_recorded(2..=21).await;
    let (failed, dead_letters) = (api.lookups_of(1), env.dead_letters().await);
    assert!((1..8).contains(&failed), "{failed} lookups of object 1");
    assert_eq!(dead_letters, 0);
    // Object 1 is still retried.
    wait_until("another attempt", async || api.lookups_of(1) > failed).await;
    consumer.stop().await;
}
