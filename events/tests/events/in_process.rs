use events::{Emitter, Exchange, Kind, Notice, Subscriber};

use crate::{hears, is_told_it_missed, next, objects};

#[tokio::test]
async fn what_is_told_is_heard_by_each_subscriber_in_its_order() {
    let exchange = Exchange::in_process();
    let emitter = Emitter::start(&exchange, "test");
    let mut subscribers = [(); 2].map(|()| Subscriber::new(&exchange, "test"));
    emitter.tell(Kind::Online, objects(1..=3).into_iter());
    emitter.tell(Kind::Seen, objects([]).into_iter());
    emitter.tell(Kind::Gone, objects([2]).into_iter());
    for subscriber in &mut subscribers {
        is_told_it_missed(subscriber).await;
        hears(subscriber, Kind::Online, 1..=3).await;
        hears(subscriber, Kind::Gone, [2]).await;
    }
}

#[tokio::test]
async fn who_is_too_slow_is_told_that_it_has_missed_something_and_hears_the_latest() {
    let exchange = Exchange::in_process();
    let emitter = Emitter::start(&exchange, "test");
    let mut subscriber = Subscriber::new(&exchange, "test");
    is_told_it_missed(&mut subscriber).await;
    for id in 0..10_000 {
        emitter.tell(Kind::Online, objects([id]).into_iter());
    }
    is_told_it_missed(&mut subscriber).await;
    let mut heard = 0;
    loop {
        heard += 1;
        match next(&mut subscriber).await {
            Notice::Committed(_, objects) if objects[0].id == 9_999 => break,
            Notice::Committed(..) => {}
            Notice::Missed(why) => panic!("missed once more: {why}"),
        }
    }
    assert!(heard < 5_000, "{heard} were kept for one who did not listen");
}

#[tokio::test]
async fn nowhere_nothing_is_heard_and_told_all_the_same() {
    let emitter = Emitter::start(&Exchange::nowhere(), "test");
    emitter.tell(Kind::Online, objects(1..=3).into_iter());
    assert!(emitter.status().is_none());
    assert!(Subscriber::new(&Exchange::nowhere(), "test").status().borrow().is_err());
    emitter.close().await;
}

#[tokio::test]
async fn a_gap_that_is_left_is_missed_by_subscribers() {
    let exchange = Exchange::in_process();
    let mut subscriber = Subscriber::new(&exchange, "test");
    is_told_it_missed(&mut subscriber).await;
    let emitter = Emitter::start(&exchange, "test");
    emitter.leave_gap("for a test");
    assert_eq!(is_told_it_missed(&mut subscriber).await, "for a test");
}
