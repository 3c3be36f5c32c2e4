//! What holds wherever the queue lies. Each case runs on each backend, and is looked at from outside
//! only.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use broker::{Disposition, Inspector, Origin, Selection, Settled, Treatment};
use testbed::eventually;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::test_queue::{
    A_WHILE, Backend, PATIENCE, Place, SECOND, consumer, dead, drain, for_steps, ids, next, retry,
};

/// Makes a test of each case for each backend.
macro_rules! on_every_backend {
    ($($case:ident)*) => {
        on_every_backend!(quorum, Quorum, $($case)*);
        on_every_backend!(classic, Classic, $($case)*);
        on_every_backend!(file, File, $($case)*);
    };
    ($module:ident, $backend:ident, $($case:ident)*) => {
        mod $module {
            use crate::test_queue::Backend;

            $(
                #[tokio::test]
                async fn $case() {
                    super::$case(Backend::$backend).await;
                }
            )*
        }
    };
}

on_every_backend! {
    a_confirmed_batch_is_delivered_id_by_id_with_its_callback_id
    a_message_comes_from_the_same_span_whatever_is_done_with_it
    with_nothing_to_publish_nothing_is_published
    what_was_published_first_is_delivered_first
    many_callers_at_once_are_all_confirmed
    no_more_than_the_prefetch_is_delivered_until_something_is_settled
    a_prefetch_that_grows_is_heeded_and_nothing_is_delivered_twice
    a_prefetch_that_shrinks_gives_back_what_was_not_begun
    a_stopped_consumer_gives_back_what_it_had_not_begun_and_settles_the_rest
    a_closed_consumer_gives_back_what_it_had_not_settled
    deliveries_may_be_settled_in_any_order_and_many_at_once
    what_is_given_back_can_be_had_by_another_at_once
    what_was_settled_before_the_close_is_not_delivered_again
    what_a_lost_consumer_had_taken_is_delivered_again
    two_consumers_share_the_queue_and_no_message_goes_to_both
    an_ack_is_final_also_when_everything_is_opened_again
    what_was_confirmed_is_there_when_everything_is_opened_again
    a_retry_comes_back_after_its_wait_and_counts_the_attempt
    what_is_requeued_comes_last_as_it_was_and_as_if_for_the_first_time
    a_wait_that_the_peer_asked_for_is_kept
    a_delayed_message_is_there_when_everything_is_opened_again
    a_dead_letter_keeps_its_body_and_tells_its_history
    dead_letters_are_there_when_everything_is_opened_again
    the_depths_tell_what_is_ready_delayed_and_dead
    dead_letters_are_listed_by_object_by_reason_by_both_and_all
    a_look_changes_nothing
    a_redrive_sends_back_what_is_selected_as_if_it_were_new
    a_purge_deletes_what_is_selected_and_nothing_else
    a_redrive_reaches_a_consumer_that_waits
    what_is_redriven_and_given_up_again_is_not_treated_twice
    a_redrive_that_is_dropped_midway_loses_no_letter
}

async fn a_confirmed_batch_is_delivered_id_by_id_with_its_callback_id(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-1", &[3, -7, i64::MAX], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 10);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.callback_id(), "callback-1");
        assert_eq!(delivery.failed_attempts(), 0);
        assert!(!delivery.redelivered());
        ids.push(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    assert_eq!(ids, [3, -7, i64::MAX]);
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn a_message_comes_from_the_same_span_whatever_is_done_with_it(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    let traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let origin = Origin { callback_id: "callback-1", traceparent };
    publisher.publish_ids(origin, &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    for disposition in [retry("no answer"), Disposition::Requeue, dead("answered 500")] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-1", traceparent));
        assert_eq!(delivery.settle(disposition).await, Settled::Done);
    }
    place.holds(0, 0, 1).await;
    let redriven = place.treat(&Selection::default(), Treatment::Redrive).await;
    assert_eq!(redriven[0].callback_id, "callback-1");
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-1", traceparent));
    delivery.settle(Disposition::Ack).await;
    publisher.publish_ids("callback-2", &[8], PATIENCE).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-2", None));
}

async fn with_nothing_to_publish_nothing_is_published(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[], SECOND).await.unwrap();
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    assert_eq!(place.depths().await.ready, 1);
}

async fn what_was_published_first_is_delivered_first(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    let sent: Vec<i64> = (0..600).map(|n| n * 7_919 % 600).collect();
    for batch in sent.chunks(150) {
        publisher.publish_ids("c", batch, PATIENCE).await.unwrap();
    }
    let mut consumer = consumer(&publisher, 40);
    assert_eq!(drain(&mut consumer, sent.len()).await, sent);
}

async fn many_callers_at_once_are_all_confirmed(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    let mut callers = JoinSet::new();
    for caller in 0..50 {
        let publisher = publisher.clone();
        callers.spawn(async move {
            let ids: Vec<i64> = (caller * 100..caller * 100 + 40).collect();
            publisher.publish_ids("c", &ids, PATIENCE).await
        });
    }
    while let Some(published) = callers.join_next().await {
        published.unwrap().unwrap();
    }
    assert_eq!(place.depths().await.ready, 2_000);
}

async fn no_more_than_the_prefetch_is_delivered_until_something_is_settled(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2], PATIENCE).await.unwrap();
    let mut full = consumer(&publisher, 2);
    let first = next(&mut full).await;
    let _second = next(&mut full).await;
    let mut other = consumer(&publisher, 1);
    // All of these go to the other one, although the full one has asked first.
    for id in 3..10 {
        publisher.publish_ids("c", &[id], PATIENCE).await.unwrap();
        let delivery = tokio::select! {
            biased;
            _ = full.next() => panic!("{id} was delivered beyond the prefetch"),
            delivery = next(&mut other) => delivery,
        };
        assert_eq!(delivery.id().unwrap(), id);
        delivery.settle(Disposition::Ack).await;
    }
    other.close().await;
    publisher.publish_ids("c", &[10], PATIENCE).await.unwrap();
    assert_eq!(first.settle(Disposition::Ack).await, Settled::Done);
    assert_eq!(next(&mut full).await.id().unwrap(), 10);
}

async fn a_prefetch_that_grows_is_heeded_and_nothing_is_delivered_twice(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &(1..=30).collect::<Vec<_>>(), PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 10);
    let mut in_flight = vec![next(&mut consumer).await];
    // Nine more have been sent to it by now, or are on their way.
    consumer.set_prefetch(20).await;
    for _ in 1..20 {
        in_flight.push(next(&mut consumer).await);
    }
    assert!(timeout(A_WHILE, consumer.next()).await.is_err(), "one beyond the prefetch");
    for taken in 1..=30 {
        let delivery = in_flight.pop().unwrap();
        assert!(!delivery.redelivered());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
        if taken <= 10 {
            in_flight.push(next(&mut consumer).await);
        }
    }
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn a_prefetch_that_shrinks_gives_back_what_was_not_begun(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &(1..=30).collect::<Vec<_>>(), PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 20);
    let mut ids = BTreeSet::new();
    let mut in_flight = Vec::new();
    for _ in 0..5 {
        in_flight.push(next(&mut consumer).await);
    }
    consumer.set_prefetch(2).await;
    // They were taken before, and can be settled all the same.
    for delivery in in_flight {
        ids.insert(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    let two = [next(&mut consumer).await, next(&mut consumer).await];
    assert!(timeout(A_WHILE, consumer.next()).await.is_err(), "one beyond the prefetch");
    for delivery in two {
        ids.insert(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    ids.extend(drain(&mut consumer, 23).await);
    assert_eq!(ids, (1..=30).collect());
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn a_stopped_consumer_gives_back_what_it_had_not_begun_and_settles_the_rest(
    backend: Backend,
) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2, 3, 4], PATIENCE).await.unwrap();
    let mut stopping = consumer(&publisher, 4);
    let in_flight = next(&mut stopping).await;
    stopping.stop().await;
    let mut other = consumer(&publisher, 10);
    let mut ids = drain(&mut other, 3).await;
    ids.sort_unstable();
    assert_eq!(ids, [2, 3, 4]);
    assert_eq!(in_flight.settle(Disposition::Ack).await, Settled::Done);
    stopping.close().await;
    place.holds(0, 0, 0).await;
}

async fn a_closed_consumer_gives_back_what_it_had_not_settled(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2, 3, 4, 5, 6], PATIENCE).await.unwrap();
    let mut closing = consumer(&publisher, 4);
    let settled = next(&mut closing).await;
    let _begun = next(&mut closing).await;
    assert_eq!(settled.settle(Disposition::Ack).await, Settled::Done);
    closing.close().await;
    let mut other = consumer(&publisher, 1);
    let mut again = BTreeMap::new();
    for _ in 0..5 {
        let delivery = next(&mut other).await;
        again.insert(delivery.id().unwrap(), delivery.redelivered());
        delivery.settle(Disposition::Ack).await;
    }
    assert_eq!(again.keys().copied().collect::<Vec<i64>>(), [2, 3, 4, 5, 6]);
    assert!(again[&2], "{again:?}");
    other.close().await;
    place.holds(0, 0, 0).await;
}

/// The acks of a prefix go out as one; a broker would close the channel for a wrong one.
async fn deliveries_may_be_settled_in_any_order_and_many_at_once(backend: Backend) {
    const COUNT: usize = 500;
    let place = Place::new(backend);
    let publisher = place.open().await;
    let ids: Vec<i64> = (0..500).collect();
    publisher.publish_ids("c", &ids, PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 500);
    let mut deliveries = BTreeMap::new();
    for number in 0..COUNT {
        deliveries.insert(number * 7_919 % COUNT, next(&mut consumer).await);
    }
    let mut settling = JoinSet::new();
    for (number, delivery) in deliveries {
        settling.spawn(delivery.settle(Disposition::Ack));
        if number % 100 == 99 {
            // Those so far, and nothing beyond, so that a later prefix includes what was acked before.
            while let Some(settled) = settling.join_next().await {
                assert_eq!(settled.unwrap(), Settled::Done);
            }
        }
    }
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn what_is_given_back_can_be_had_by_another_at_once(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2, 3], PATIENCE).await.unwrap();
    let mut first = consumer(&publisher, 3);
    let [one, two, three] =
        [next(&mut first).await, next(&mut first).await, next(&mut first).await];
    first.stop().await;
    two.give_back().await;
    let mut other = consumer(&publisher, 1);
    let two = next(&mut other).await;
    assert_eq!(two.id().unwrap(), 2);
    for delivery in [one, two, three] {
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    first.close().await;
    other.close().await;
    place.holds(0, 0, 0).await;
}

async fn what_was_settled_before_the_close_is_not_delivered_again(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    // Now and then a broker that forgets what it was not given the time for is quick enough.
    for _ in 0..3 {
        publisher.publish_ids("c", &(0..300).collect::<Vec<i64>>(), PATIENCE).await.unwrap();
        let mut closing = consumer(&publisher, 200);
        let mut deliveries = Vec::new();
        // Far more than what RabbitMQ has under way to a quorum queue at once.
        for id in 0..100 {
            let delivery = next(&mut closing).await;
            assert_eq!(delivery.id().unwrap(), id);
            deliveries.push(delivery);
        }
        closing.stop().await;
        // All together, as after a commit.
        let acks = deliveries.into_iter().map(|delivery| delivery.settle(Disposition::Ack));
        let settled = acks.collect::<JoinSet<Settled>>().join_all().await;
        assert_eq!(settled, [Settled::Done; 100]);
        closing.close().await;

        let mut other = consumer(&publisher, 1);
        let mut ids = drain(&mut other, 200).await;
        ids.sort_unstable();
        assert_eq!(ids, (100..300).collect::<Vec<i64>>());
        other.close().await;
        place.holds(0, 0, 0).await;
    }
}

async fn what_a_lost_consumer_had_taken_is_delivered_again(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[7], PATIENCE).await.unwrap();
    let mut lost = consumer(&publisher, 1);
    let delivery = next(&mut lost).await;
    drop(lost);
    let mut other = consumer(&publisher, 1);
    let again = next(&mut other).await;
    assert_eq!((again.id().unwrap(), again.redelivered()), (7, true));
    // The first one can no longer be settled, and says so.
    assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Lost);
    assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
    other.close().await;
    place.holds(0, 0, 0).await;
}

async fn two_consumers_share_the_queue_and_no_message_goes_to_both(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    let (delivered, mut deliveries) = mpsc::unbounded_channel();
    let mut consumers = JoinSet::new();
    for name in ["one", "other"] {
        let mut consumer = consumer(&publisher, 4);
        let delivered = delivered.clone();
        consumers.spawn(async move {
            loop {
                let delivery = consumer.next().await;
                delivered.send((name, delivery.id().unwrap())).unwrap();
                assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
            }
        });
    }
    let mut seen = Vec::new();
    let sent: Vec<i64> = (0..300).collect();
    // When it comes, both are mostly waiting for it.
    for batch in sent.chunks(6) {
        publisher.publish_ids("c", batch, PATIENCE).await.unwrap();
        for _ in batch {
            seen.push(timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap());
        }
    }
    place.holds(0, 0, 0).await;
    while let Ok(more) = deliveries.try_recv() {
        seen.push(more);
    }
    assert!(seen.iter().any(|(name, _)| *name != seen[0].0), "both have their share");
    let mut ids: Vec<i64> = seen.iter().map(|(_, id)| *id).collect();
    ids.sort_unstable();
    assert_eq!(ids, sent);
}

async fn an_ack_is_final_also_when_everything_is_opened_again(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2], PATIENCE).await.unwrap();
    let mut before = consumer(&publisher, 1);
    assert_eq!(drain(&mut before, 1).await, [1]);
    before.close().await;
    publisher.close().await;

    let publisher = place.open().await;
    publisher.publish_ids("c", &[3], PATIENCE).await.unwrap();
    let mut after = consumer(&publisher, 10);
    assert_eq!(drain(&mut after, 2).await, [2, 3]);
    after.close().await;
    publisher.close().await;
    place.holds(0, 0, 0).await;
}

async fn what_was_confirmed_is_there_when_everything_is_opened_again(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-3", &[1, 2, 3], PATIENCE).await.unwrap();
    publisher.close().await;
    assert_eq!(place.depths().await.ready, 3);

    let publisher = place.open().await;
    let mut consumer = consumer(&publisher, 10);
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.id().unwrap(), delivery.callback_id()), (1, "callback-3"));
    delivery.settle(Disposition::Ack).await;
    assert_eq!(drain(&mut consumer, 2).await, [2, 3]);
}

async fn a_retry_comes_back_after_its_wait_and_counts_the_attempt(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-9", &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let failed_at = Instant::now();
    assert_eq!(delivery.settle(retry("answered 500")).await, Settled::Done);
    // It does not hold up what comes after it.
    publisher.publish_ids("callback-10", &[8], PATIENCE).await.unwrap();
    assert_eq!(drain(&mut consumer, 1).await, [8]);
    let again = next(&mut consumer).await;
    assert!(failed_at.elapsed() >= SECOND, "back after {:?}", failed_at.elapsed());
    assert_eq!((again.id().unwrap(), again.callback_id()), (7, "callback-9"));
    assert_eq!(again.failed_attempts(), 1);
    assert!(!again.redelivered(), "it is a new message, not the old one again");
    assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn what_is_requeued_comes_last_as_it_was_and_as_if_for_the_first_time(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-1", &[1], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("answered 500")).await;
    let again = next(&mut consumer).await;
    publisher.publish_ids("callback-2", &[2], PATIENCE).await.unwrap();
    assert_eq!(again.settle(Disposition::Requeue).await, Settled::Done);
    let other = next(&mut consumer).await;
    assert_eq!(other.id().unwrap(), 2);
    other.settle(Disposition::Ack).await;
    let last = next(&mut consumer).await;
    let told = (last.id().unwrap(), last.callback_id(), last.failed_attempts(), last.redelivered());
    assert_eq!(told, (1, "callback-1", 1, false));
    assert_eq!(last.settle(Disposition::Ack).await, Settled::Done);
    consumer.close().await;
    place.holds(0, 0, 0).await;
}

async fn a_wait_that_the_peer_asked_for_is_kept(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let failed_at = Instant::now();
    let after = Some(SECOND * 3);
    let retry = Disposition::Retry { reason: "answered 429".to_owned(), after };
    assert_eq!(delivery.settle(retry).await, Settled::Done);
    next(&mut consumer).await;
    assert!(failed_at.elapsed() >= SECOND * 3, "back after {:?}", failed_at.elapsed());
}

async fn a_delayed_message_is_there_when_everything_is_opened_again(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-4", &[7], PATIENCE).await.unwrap();
    let mut before = consumer(&publisher, 1);
    let failed_at = Instant::now();
    assert_eq!(next(&mut before).await.settle(retry("no answer")).await, Settled::Done);
    before.close().await;
    publisher.close().await;

    let publisher = place.open().await;
    let mut after = consumer(&publisher, 1);
    let again = next(&mut after).await;
    assert!(failed_at.elapsed() >= SECOND, "back after {:?}", failed_at.elapsed());
    assert_eq!((again.id().unwrap(), again.callback_id()), (7, "callback-4"));
    assert_eq!((again.failed_attempts(), again.redelivered()), (1, false));
}

async fn a_dead_letter_keeps_its_body_and_tells_its_history(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    // RabbitMQ knows it to the second.
    let began_at = SystemTime::now() - SECOND;
    publisher.publish_ids("callback-5", &[7], PATIENCE).await.unwrap();
    let published_by = SystemTime::now();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("no answer")).await;
    assert_eq!(next(&mut consumer).await.settle(dead("answered 500")).await, Settled::Done);
    consumer.close().await;
    place.holds(0, 0, 1).await;

    let letters = place.letters().await;
    let [letter] = letters.as_slice() else { panic!("{letters:?}") };
    assert_eq!(letter.id, Some(7));
    assert_eq!(letter.body, br#"{"id":7}"#);
    assert_eq!(letter.callback_id, "callback-5");
    assert_eq!(letter.reason, "answered 500");
    assert_eq!(letter.attempts, 2);
    let published_at = letter.published_at.unwrap();
    assert!(began_at < published_at && published_at <= published_by, "{letter:?}");
    let (first, last) = (letter.first_failed_at.unwrap(), letter.last_failed_at.unwrap());
    assert!(began_at < first && first + SECOND <= last && last <= SystemTime::now(), "{letter:?}");
}

async fn dead_letters_are_there_when_everything_is_opened_again(backend: Backend) {
    let place = Place::new(backend);
    place.bury(&[(1, "answered 404"), (2, "answered 500")]).await;
    let before = place.letters().await;
    place.open().await.close().await;
    assert_eq!(place.letters().await, before);
    assert_eq!(ids(&before), [1, 2]);
}

async fn the_depths_tell_what_is_ready_delayed_and_dead(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1, 2, 3, 4, 5, 6], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    // Two levels of delay, each long enough for a look.
    for seconds in [16, 32] {
        let after = Some(SECOND * seconds);
        let retry = Disposition::Retry { reason: "answered 503".to_owned(), after };
        next(&mut consumer).await.settle(retry).await;
    }
    next(&mut consumer).await.settle(dead("answered 404")).await;
    consumer.close().await;
    place.holds(3, 2, 1).await;
}

/// Four letters: odd objects for one reason, even ones for another.
async fn four_letters(backend: Backend) -> Place {
    let place = Place::new(backend);
    let (odd, even) = ("answered 500: oops", "answered 404");
    place.bury(&[(1, odd), (2, even), (3, odd), (4, even)]).await;
    place
}

fn selection(ids: &[i64], reason: Option<&str>) -> Selection {
    Selection { ids: ids.to_vec(), reason: reason.map(str::to_owned) }
}

async fn dead_letters_are_listed_by_object_by_reason_by_both_and_all(backend: Backend) {
    let place = four_letters(backend).await;
    let cases = [
        (selection(&[], None), vec![1, 2, 3, 4]),
        (selection(&[4, 1, 9], None), vec![1, 4]),
        (selection(&[], Some("500")), vec![1, 3]),
        (selection(&[2, 3, 4], Some("answered 404")), vec![2, 4]),
        (selection(&[2], Some("500")), vec![]),
        (selection(&[9], None), vec![]),
    ];
    for (selection, expected) in cases {
        let letters = place.treat(&selection, Treatment::Look).await;
        assert_eq!(ids(&letters), expected, "{selection:?}");
    }
}

async fn a_look_changes_nothing(backend: Backend) {
    let place = four_letters(backend).await;
    let before = (place.depths().await, place.letters().await);
    place.treat(&selection(&[2], None), Treatment::Look).await;
    for _ in 0..5 {
        assert_eq!((place.depths().await, place.letters().await), before);
    }
    assert_eq!(before.1.len(), 4);
}

async fn a_redrive_sends_back_what_is_selected_as_if_it_were_new(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("callback-6", &[1, 2, 3], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    for _ in 0..3 {
        next(&mut consumer).await.settle(dead("answered 500")).await;
    }
    let before = place.letters().await;
    let redriven = place.treat(&selection(&[1, 3], None), Treatment::Redrive).await;
    assert_eq!(redriven, [before[0].clone(), before[2].clone()]);
    for id in [1, 3] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.id().unwrap(), delivery.callback_id()), (id, "callback-6"));
        assert_eq!((delivery.failed_attempts(), delivery.redelivered()), (0, false));
        delivery.settle(dead("answered 502")).await;
    }
    consumer.close().await;
    place.holds(0, 0, 3).await;
    let after = place.letters().await;
    assert_eq!(after[0], before[1], "what was not selected is as it was");
    assert_eq!((after[1].id, after[1].attempts), (Some(1), 1), "its history begins anew");
    assert_eq!(after[1].first_failed_at, after[1].last_failed_at);
    assert_eq!(after[1].published_at, before[0].published_at);
    assert_eq!(after[1].body, before[0].body);
}

async fn a_purge_deletes_what_is_selected_and_nothing_else(backend: Backend) {
    let place = four_letters(backend).await;
    let purged = place.treat(&selection(&[1, 2], Some("404")), Treatment::Purge).await;
    assert_eq!(ids(&purged), [2]);
    assert_eq!(place.dead_ids().await, [1, 3, 4]);
    let purged = place.treat(&selection(&[], None), Treatment::Purge).await;
    assert_eq!(ids(&purged), [1, 3, 4]);
    place.holds(0, 0, 0).await;
    assert_eq!(place.treat(&selection(&[], None), Treatment::Purge).await, []);
}

async fn a_redrive_reaches_a_consumer_that_waits(backend: Backend) {
    let place = Place::new(backend);
    let publisher = place.open().await;
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    let mut waiting = consumer(&publisher, 5);
    next(&mut waiting).await.settle(dead("answered 500")).await;
    let delivery = tokio::spawn(async move { drain(&mut waiting, 1).await });
    place.treat(&selection(&[1], None), Treatment::Redrive).await;
    assert_eq!(delivery.await.unwrap(), [1]);
    place.holds(0, 0, 0).await;
}

async fn what_is_redriven_and_given_up_again_is_not_treated_twice(backend: Backend) {
    let place = Place::new(backend);
    let letters: Vec<_> = (0..700).map(|id| (id, "answered 500")).collect();
    place.bury(&letters).await;
    let publisher = place.open().await;
    let mut burying = consumer(&publisher, 50);
    // As fast as it is redriven, it is given up again.
    let giving_up = tokio::spawn(async move {
        for _ in 0..700 {
            next(&mut burying).await.settle(dead("answered 500")).await;
        }
    });
    let redriven = place.treat(&selection(&[], None), Treatment::Redrive).await;
    assert_eq!(ids(&redriven), (0..700).collect::<Vec<i64>>());
    giving_up.await.unwrap();
    place.holds(0, 0, 700).await;
}

async fn a_redrive_that_is_dropped_midway_loses_no_letter(backend: Backend) {
    const LETTERS: u64 = 300;
    let place = Place::new(backend);
    let buried: Vec<_> = (0..LETTERS.cast_signed()).map(|id| (id, "answered 500")).collect();
    place.bury(&buried).await;
    let mut inspector = Inspector::open(&place.config).await.unwrap();
    let mut steps = 0;
    let mut finished = false;
    while !finished {
        steps += 1 + rand::random::<u32>() % 2;
        let all = Selection::default();
        let redrive = inspector.dead_letters(&all, Treatment::Redrive, drop);
        finished = for_steps(steps, redrive).await.is_some_and(|outcome| outcome.is_ok());
        eventually("each is a message or a dead letter", PATIENCE, async || {
            let depths = inspector.depths().await.unwrap();
            let sum = depths.ready + depths.dead;
            let twice = backend != Backend::File;
            (sum == LETTERS || (twice && sum > LETTERS)).then_some(())
        })
        .await;
    }
    let publisher = place.open().await;
    let mut consumer = consumer(&publisher, 100);
    let mut missing: BTreeSet<i64> = (0..LETTERS.cast_signed()).collect();
    while !missing.is_empty() {
        for id in drain(&mut consumer, 1).await {
            missing.remove(&id);
        }
    }
    consumer.close().await;
    if backend == Backend::File {
        place.holds(0, 0, 0).await;
    }
}
