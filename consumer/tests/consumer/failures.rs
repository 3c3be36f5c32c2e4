use lapin::BasicProperties;
use lapin::types::AMQPValue;
use testbed::{Answer, StatusApi, eventually};

use crate::{CALLBACK_ID, PATIENCE, SECOND, Surroundings, looked_up, times_of};

/// A header as the text that a person would see.
pub(crate) fn header(properties: &BasicProperties, name: &str) -> String {
    match properties.headers().as_ref().and_then(|headers| headers.inner().get(name)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        Some(AMQPValue::LongLongInt(number)) => number.to_string(),
        other => panic!("unexpected header {name}: {other:?}"),
    }
}

#[tokio::test]
async fn each_way_of_failing_is_tried_again_later_and_then_recorded() {
    let around = Surroundings::new().await;
    let elsewhere = StatusApi::start(|_, _| Answer::Online);
    let redirect = format!("{}/objects/6", elsewhere.endpoint());
    // Right in all but its size.
    let huge = format!(r#"{{"id":7,"online":true,"more":"{}"}}"#, "x".repeat(1024 * 1024));
    let api = StatusApi::start(move |id, lookup| match (id, lookup) {
        (1, 1) => Answer::Status(500),
        (2, 1) => Answer::StatusWithHeader(429, "retry-after", "2".to_owned()),
        (3, 1) => Answer::Hang,
        (4, 1) => Answer::Body("<html>online</html>".to_owned()),
        (5, 1) => Answer::Body(r#"{"id":7000,"online":true}"#.to_owned()),
        (6, 1) => Answer::Redirect(redirect.clone()),
        (7, 1) => Answer::Body(huge.clone()),
        // The server drops a connection whose handler unwinds.
        (8, 1) => std::panic::resume_unwind(Box::new("the connection is closed")),
        _ => Answer::Online,
    });
    around.publish(1..=8).await;
    let consumer = around.start(&api.endpoint(), &["--status-timeout=1s"]);
    around.recorded(1..=8).await;
    for id in 1..=8 {
        let times = times_of(&api, id);
        assert_eq!(times.len(), 2, "lookups of {id}");
        let wait = times[1] - times[0];
        assert!(wait >= SECOND, "{id} was tried again after {wait:?}");
    }
    assert_eq!(elsewhere.lookups(), [], "a redirect was followed");
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn the_wait_that_the_status_api_asks_for_is_kept() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::StatusWithHeader(429, "retry-after", "3".to_owned()),
        _ => Answer::Online,
    });
    around.publish([42]).await;
    let consumer = around.start(&api.endpoint(), &[]);
    around.recorded([42]).await;
    let times = times_of(&api, 42);
    assert_eq!(times.len(), 2);
    assert!(times[1] - times[0] >= SECOND * 3, "tried again after {:?}", times[1] - times[0]);
    consumer.stop().await;
}

#[tokio::test]
async fn what_fails_as_often_as_allowed_becomes_a_dead_letter_that_tells_its_history() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|id, _| match id {
        42 => Answer::Status(500),
        _ => Answer::Offline,
    });
    let consumer = around.start(&api.endpoint(), &["--max-attempts=2"]);
    // The API answers others all the time, before its failures and after.
    let mut other = 1_000;
    let mut answers_others = async || {
        other += 1;
        around.publish([other]).await;
    };
    eventually("others are answered", PATIENCE, async || {
        answers_others().await;
        (api.lookups().len() > 3).then_some(())
    })
    .await;
    around.publish([42]).await;
    eventually("a dead letter", PATIENCE, async || {
        answers_others().await;
        (around.dead().await == 1).then_some(())
    })
    .await;
    eventually("no other is left", PATIENCE, async || (around.waiting().await == 0).then_some(()))
        .await;
    consumer.stop().await;
    assert_eq!(api.lookups_of(42), 2);
    let letter = around.queue.get(&around.queue.dead()).await.unwrap().delivery;
    assert_eq!(letter.data, br#"{"id":42}"#);
    let properties = &letter.properties;
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), CALLBACK_ID);
    let reason = header(properties, "lastseen-reason");
    assert!(reason.contains("answered 500"), "{reason}");
    assert_eq!(header(properties, "lastseen-attempts"), "2");
    let first = header(properties, "lastseen-first-failed-at");
    let last = header(properties, "lastseen-last-failed-at");
    assert!(first < last, "first {first}, last {last}");
    // With the letter taken out, nothing is left.
    around.assert_all_settled().await;
}

#[tokio::test]
async fn what_cannot_be_decoded_becomes_a_dead_letter_at_once_without_a_lookup() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    around.queue.publish_raw(b"not json").await;
    around.publish([42]).await;
    // With one place, the good one comes after the bad one.
    let consumer = around.start(&api.endpoint(), &["--max-consumers=1"]);
    around.recorded([42]).await;
    eventually("a dead letter", PATIENCE, async || (around.dead().await == 1).then_some(())).await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [42]);
    let letter = around.queue.get(&around.queue.dead()).await.unwrap().delivery;
    assert_eq!(letter.data, b"not json");
    let reason = header(&letter.properties, "lastseen-reason");
    assert!(reason.contains("the body is not"), "{reason}");
    assert_eq!(header(&letter.properties, "lastseen-attempts"), "1");
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_lookup_that_fails_again_and_again_does_not_hold_up_the_others() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|id, _| match id {
        1 => Answer::Status(500),
        _ => Answer::Online,
    });
    around.publish(1..=21).await;
    let consumer = around.start(&api.endpoint(), &["--max-consumers=1"]);
    around.recorded(2..=21).await;
    let (failed, given_up) = (api.lookups_of(1), around.dead().await);
    assert!((1..8).contains(&failed), "{failed} lookups of the one that fails");
    assert_eq!(given_up, 0);
    // It is still being tried.
    eventually("another try", PATIENCE, async || (api.lookups_of(1) > failed).then_some(())).await;
    consumer.stop().await;
}
