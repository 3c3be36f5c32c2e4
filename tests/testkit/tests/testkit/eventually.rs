use std::time::Duration;

use testkit::eventually;

#[tokio::test]
async fn eventually_returns_the_first_value_of_the_condition() {
    let mut polls = 0;
    let value = eventually("the third poll", Duration::from_secs(10), async || {
        polls += 1;
        (polls == 3).then_some(polls)
    });
    assert_eq!(value.await, 3);
}

#[tokio::test]
#[should_panic(expected = "not within 50ms: the moon is blue")]
async fn eventually_panics_with_the_awaited_condition() {
    eventually("the moon is blue", Duration::from_millis(50), async || None::<()>).await;
}

#[tokio::test]
#[should_panic(expected = "not within 50ms: the moon is blue")]
async fn eventually_cuts_off_a_poll_that_hangs() {
    let hang = async || std::future::pending::<Option<()>>().await;
    eventually("the moon is blue", Duration::from_millis(50), hang).await;
}
