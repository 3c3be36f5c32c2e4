use messaging::events::{Emitter, Exchange, Kind, Notification, Subscriber};
use runtime::Supervisor;

use crate::events::{expect_event, expect_missed, given_up, group_changes, next, objects};

#[tokio::test]
async fn each_subscriber_receives_all_events_in_order() {
    let exchange = Exchange::in_process();
    let emitter = Emitter::start(&exchange, "test", &Supervisor::default());
    let mut subscribers = [(); 2].map(|()| Subscriber::new(&exchange, "test"));
    emitter.publish(Kind::Online, objects(1..=3).into_iter());
    emitter.publish(Kind::Seen, objects([]).into_iter());
    emitter.publish_given_up(given_up(7));
    emitter.publish_groups(group_changes(2));
    emitter.publish(Kind::Gone, objects([2]).into_iter());
    for subscriber in &mut subscribers {
        expect_missed(subscriber).await;
        expect_event(subscriber, Kind::Online, 1..=3).await;
        assert_eq!(next(subscriber).await, Notification::GivenUp(vec![given_up(7)]));
        expect_event(subscriber, Kind::Gone, [2]).await;
    }
}

#[tokio::test]
async fn slow_subscriber_misses_events_and_receives_the_latest() {
    let exchange = Exchange::in_process();
    let emitter = Emitter::start(&exchange, "test", &Supervisor::default());
    let mut subscriber = Subscriber::new(&exchange, "test");
    expect_missed(&mut subscriber).await;
    for id in 0..10_000 {
        emitter.publish(Kind::Online, objects([id]).into_iter());
    }
    expect_missed(&mut subscriber).await;
    let mut received = 0;
    loop {
        received += 1;
        match next(&mut subscriber).await {
            Notification::Committed(_, objects) if objects[0].id == 9_999 => break,
            Notification::Committed(..) => {}
            other => panic!("expected events, got {other:?}"),
        }
    }
    assert!(received < 5_000, "{received} events were kept for a slow subscriber");
}

#[tokio::test]
async fn disabled_exchange_drops_all_events() {
    let emitter = Emitter::start(&Exchange::disabled(), "test", &Supervisor::default());
    emitter.publish(Kind::Online, objects(1..=3).into_iter());
    emitter.publish_given_up(given_up(7));
    emitter.publish_groups(group_changes(2));
    assert!(emitter.status().is_none());
    assert!(Subscriber::new(&Exchange::disabled(), "test").status().borrow().is_err());
    emitter.close().await;
}

#[tokio::test]
async fn left_gap_reaches_subscribers_with_its_reason() {
    let exchange = Exchange::in_process();
    let mut subscriber = Subscriber::new(&exchange, "test");
    expect_missed(&mut subscriber).await;
    let emitter = Emitter::start(&exchange, "test", &Supervisor::default());
    emitter.leave_gap("for a test");
    assert_eq!(expect_missed(&mut subscriber).await, "for a test");
}
