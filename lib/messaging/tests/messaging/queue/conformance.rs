//! Tests that hold for all backends. Each case runs on each backend and uses only the public
//! interface.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use messaging::queue::{DeadLetterAction, Disposition, Inspector, Origin, Selection, Settled};
use testkit::eventually;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::queue::test_queue::{
    Backend, PATIENCE, QUIET_TIME, SECOND, TestQueue, ack_next, consumer, dead, ids, next,
    poll_times, process_all, retry, take,
};

/// Generates a test of each case for each backend.
macro_rules! on_every_backend {
    ($($case:ident)*) => {
        on_every_backend!(quorum, Quorum, $($case)*);
        on_every_backend!(classic, Classic, $($case)*);
        on_every_backend!(file, File, $($case)*);
    };
    ($module:ident, $backend:ident, $($case:ident)*) => {
        mod $module {
            use crate::queue::test_queue::Backend;

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
    confirmed_batch_is_delivered_with_its_callback_id
    message_keeps_its_span_in_all_dispositions
    empty_batch_publishes_nothing
    messages_are_delivered_in_order
    concurrent_callers_are_all_confirmed
    deliveries_in_flight_never_exceed_the_prefetch
    larger_prefetch_applies_without_duplicates
    smaller_prefetch_gives_back_prefetched_messages
    stopped_consumer_gives_back_and_can_settle_the_rest
    closed_consumer_gives_back_unsettled_messages
    deliveries_can_be_settled_in_any_order
    given_back_message_goes_to_another_consumer
    message_settled_before_the_close_is_not_redelivered
    delivery_of_a_lost_consumer_is_redelivered
    two_consumers_share_the_queue_without_duplicates
    ack_survives_a_reopen
    confirmed_messages_survive_a_reopen
    retry_is_delivered_after_its_delay_and_counted
    requeued_message_is_last_and_otherwise_unchanged
    requested_delay_of_a_retry_is_kept
    delayed_message_survives_a_reopen
    dead_letter_keeps_its_body_and_history
    dead_letters_survive_a_reopen
    depths_count_ready_delayed_and_dead_messages
    dead_letters_are_selected_by_id_and_reason
    listing_changes_nothing
    redrive_sends_selected_letters_back_as_new
    purge_deletes_only_selected_letters
    redrive_reaches_a_waiting_consumer
    letter_given_up_again_is_not_redriven_twice
    interrupted_redrive_loses_no_letter
}

async fn confirmed_batch_is_delivered_with_its_callback_id(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("callback-1", &[3, -7, i64::MAX], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 10);
    for id in [3, -7, i64::MAX] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.id().unwrap(), delivery.callback_id()), (id, "callback-1"));
        assert_eq!((delivery.failed_attempts(), delivery.redelivered()), (0, false));
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    queue.ends_empty(consumer).await;
}

async fn message_keeps_its_span_in_all_dispositions(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    let traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let origin = Origin { callback_id: "callback-1", traceparent };
    publisher.publish_ids(origin, &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    for disposition in [retry("no answer"), Disposition::Requeue, dead("answered 500")] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-1", traceparent));
        assert_eq!(delivery.settle(disposition).await, Settled::Done);
    }
    queue.wait_for_depths(0, 0, 1).await;
    let redriven = process_all(&queue.config, DeadLetterAction::Redrive).await;
    assert_eq!(redriven[0].callback_id, "callback-1");
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-1", traceparent));
    delivery.settle(Disposition::Ack).await;
    publisher.publish_ids("callback-2", &[8], PATIENCE).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.callback_id(), delivery.traceparent()), ("callback-2", None));
}

async fn empty_batch_publishes_nothing(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("c", &[], SECOND).await.unwrap();
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    assert_eq!(queue.depths().await.ready, 1);
}

async fn messages_are_delivered_in_order(backend: Backend) {
    let (_queue, publisher) = TestQueue::with(backend, &[]).await;
    let sent: Vec<i64> = (0..600).map(|n| n * 7_919 % 600).collect();
    for batch in sent.chunks(150) {
        publisher.publish_ids("c", batch, PATIENCE).await.unwrap();
    }
    let mut consumer = consumer(&publisher, 40);
    assert_eq!(ack_next(&mut consumer, sent.len()).await, sent);
}

async fn concurrent_callers_are_all_confirmed(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
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
    assert_eq!(queue.depths().await.ready, 2_000);
}

async fn deliveries_in_flight_never_exceed_the_prefetch(backend: Backend) {
    let (_queue, publisher) = TestQueue::with(backend, &[1, 2]).await;
    let mut full = consumer(&publisher, 2);
    let first = next(&mut full).await;
    let _second = next(&mut full).await;
    let mut other = consumer(&publisher, 1);
    // All of these go to the other consumer, although the full one has waited longer.
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

async fn larger_prefetch_applies_without_duplicates(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &(1..=30).collect::<Vec<_>>()).await;
    let mut consumer = consumer(&publisher, 10);
    let mut in_flight = vec![next(&mut consumer).await];
    // Nine more have been prefetched by now, or are on their way.
    consumer.set_prefetch(20).await;
    in_flight.extend(take(&mut consumer, 19).await);
    assert!(timeout(QUIET_TIME, consumer.next()).await.is_err(), "a delivery beyond the prefetch");
    for taken in 1..=30 {
        let delivery = in_flight.pop().unwrap();
        assert!(!delivery.redelivered());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
        if taken <= 10 {
            in_flight.push(next(&mut consumer).await);
        }
    }
    queue.ends_empty(consumer).await;
}

async fn smaller_prefetch_gives_back_prefetched_messages(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &(1..=30).collect::<Vec<_>>()).await;
    let mut consumer = consumer(&publisher, 20);
    let mut ids = BTreeSet::new();
    let in_flight = take(&mut consumer, 5).await;
    consumer.set_prefetch(2).await;
    // Deliveries from before the change can still be settled.
    for delivery in in_flight {
        ids.insert(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    let two = take(&mut consumer, 2).await;
    assert!(timeout(QUIET_TIME, consumer.next()).await.is_err(), "a delivery beyond the prefetch");
    for delivery in two {
        ids.insert(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    ids.extend(ack_next(&mut consumer, 23).await);
    assert_eq!(ids, (1..=30).collect());
    queue.ends_empty(consumer).await;
}

async fn stopped_consumer_gives_back_and_can_settle_the_rest(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1, 2, 3, 4]).await;
    let mut stopping = consumer(&publisher, 4);
    let in_flight = next(&mut stopping).await;
    stopping.stop().await;
    let mut other = consumer(&publisher, 10);
    let mut ids = ack_next(&mut other, 3).await;
    ids.sort_unstable();
    assert_eq!(ids, [2, 3, 4]);
    assert_eq!(in_flight.settle(Disposition::Ack).await, Settled::Done);
    queue.ends_empty(stopping).await;
}

async fn closed_consumer_gives_back_unsettled_messages(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1, 2, 3, 4, 5, 6]).await;
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
    queue.ends_empty(other).await;
}

/// The acks of a prefix share one frame. The broker would close the channel for a wrong tag.
async fn deliveries_can_be_settled_in_any_order(backend: Backend) {
    const COUNT: usize = 500;
    let (queue, publisher) = TestQueue::with(backend, &(0..500).collect::<Vec<_>>()).await;
    let mut consumer = consumer(&publisher, 500);
    let mut deliveries = BTreeMap::new();
    for number in 0..COUNT {
        deliveries.insert(number * 7_919 % COUNT, next(&mut consumer).await);
    }
    let mut settling = JoinSet::new();
    for (number, delivery) in deliveries {
        settling.spawn(delivery.settle(Disposition::Ack));
        if number % 100 == 99 {
            // Wait until all of these are acked, so that later prefixes include acked tags.
            while let Some(settled) = settling.join_next().await {
                assert_eq!(settled.unwrap(), Settled::Done);
            }
        }
    }
    queue.ends_empty(consumer).await;
}

async fn given_back_message_goes_to_another_consumer(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1, 2, 3]).await;
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
    queue.ends_empty(other).await;
}

async fn message_settled_before_the_close_is_not_redelivered(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    // Three times, because a broker that discards buffered acks is sometimes fast enough.
    for _ in 0..3 {
        publisher.publish_ids("c", &(0..300).collect::<Vec<i64>>(), PATIENCE).await.unwrap();
        let mut closing = consumer(&publisher, 200);
        // Far more acks than RabbitMQ has pending at a quorum queue.
        let deliveries = take(&mut closing, 100).await;
        assert!(deliveries.iter().map(|delivery| delivery.id().unwrap()).eq(0..100));
        closing.stop().await;
        // All at once, as after a commit.
        let acks = deliveries.into_iter().map(|delivery| delivery.settle(Disposition::Ack));
        let settled = acks.collect::<JoinSet<Settled>>().join_all().await;
        assert_eq!(settled, [Settled::Done; 100]);
        closing.close().await;

        let mut other = consumer(&publisher, 1);
        let mut ids = ack_next(&mut other, 200).await;
        ids.sort_unstable();
        assert_eq!(ids, (100..300).collect::<Vec<i64>>());
        queue.ends_empty(other).await;
    }
}

async fn delivery_of_a_lost_consumer_is_redelivered(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[7]).await;
    let mut lost = consumer(&publisher, 1);
    let delivery = next(&mut lost).await;
    drop(lost);
    let mut other = consumer(&publisher, 1);
    let again = next(&mut other).await;
    assert_eq!((again.id().unwrap(), again.redelivered()), (7, true));
    // The first delivery can no longer be settled.
    assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Lost);
    assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
    queue.ends_empty(other).await;
}

async fn two_consumers_share_the_queue_without_duplicates(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
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
    // Most of the time, both consumers wait when a batch arrives.
    for batch in sent.chunks(6) {
        publisher.publish_ids("c", batch, PATIENCE).await.unwrap();
        for _ in batch {
            seen.push(timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap());
        }
    }
    queue.wait_for_depths(0, 0, 0).await;
    while let Ok(more) = deliveries.try_recv() {
        seen.push(more);
    }
    assert!(
        seen.iter().any(|(name, _)| *name != seen[0].0),
        "both consumers should have deliveries"
    );
    let mut ids: Vec<i64> = seen.iter().map(|(_, id)| *id).collect();
    ids.sort_unstable();
    assert_eq!(ids, sent);
}

async fn ack_survives_a_reopen(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1, 2]).await;
    let mut before = consumer(&publisher, 1);
    assert_eq!(ack_next(&mut before, 1).await, [1]);
    before.close().await;
    publisher.close().await;

    let publisher = queue.open().await;
    publisher.publish_ids("c", &[3], PATIENCE).await.unwrap();
    let mut after = consumer(&publisher, 10);
    assert_eq!(ack_next(&mut after, 2).await, [2, 3]);
    publisher.close().await;
    queue.ends_empty(after).await;
}

async fn confirmed_messages_survive_a_reopen(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("callback-3", &[1, 2, 3], PATIENCE).await.unwrap();
    publisher.close().await;
    assert_eq!(queue.depths().await.ready, 3);

    let publisher = queue.open().await;
    let mut consumer = consumer(&publisher, 10);
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.id().unwrap(), delivery.callback_id()), (1, "callback-3"));
    delivery.settle(Disposition::Ack).await;
    assert_eq!(ack_next(&mut consumer, 2).await, [2, 3]);
}

async fn retry_is_delivered_after_its_delay_and_counted(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("callback-9", &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let failed_at = Instant::now();
    assert_eq!(delivery.settle(retry("answered 500")).await, Settled::Done);
    // The retry does not hold up later messages.
    publisher.publish_ids("callback-10", &[8], PATIENCE).await.unwrap();
    assert_eq!(ack_next(&mut consumer, 1).await, [8]);
    let again = next(&mut consumer).await;
    assert!(failed_at.elapsed() >= SECOND, "delivered again after {:?}", failed_at.elapsed());
    assert_eq!((again.id().unwrap(), again.callback_id()), (7, "callback-9"));
    assert_eq!(again.failed_attempts(), 1);
    assert!(!again.redelivered(), "a retry is a new message, not a redelivery");
    assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
    queue.ends_empty(consumer).await;
}

async fn requeued_message_is_last_and_otherwise_unchanged(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
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
    let properties =
        (last.id().unwrap(), last.callback_id(), last.failed_attempts(), last.redelivered());
    assert_eq!(properties, (1, "callback-1", 1, false));
    assert_eq!(last.settle(Disposition::Ack).await, Settled::Done);
    queue.ends_empty(consumer).await;
}

async fn requested_delay_of_a_retry_is_kept(backend: Backend) {
    let (_queue, publisher) = TestQueue::with(backend, &[7]).await;
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let failed_at = Instant::now();
    let after = Some(SECOND * 3);
    let retry = Disposition::Retry { reason: "answered 429".to_owned(), after };
    assert_eq!(delivery.settle(retry).await, Settled::Done);
    next(&mut consumer).await;
    assert!(failed_at.elapsed() >= SECOND * 3, "delivered again after {:?}", failed_at.elapsed());
}

async fn delayed_message_survives_a_reopen(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("callback-4", &[7], PATIENCE).await.unwrap();
    let mut before = consumer(&publisher, 1);
    let failed_at = Instant::now();
    assert_eq!(next(&mut before).await.settle(retry("no answer")).await, Settled::Done);
    before.close().await;
    publisher.close().await;

    let publisher = queue.open().await;
    let mut after = consumer(&publisher, 1);
    let again = next(&mut after).await;
    assert!(failed_at.elapsed() >= SECOND, "delivered again after {:?}", failed_at.elapsed());
    assert_eq!((again.id().unwrap(), again.callback_id()), (7, "callback-4"));
    assert_eq!((again.failed_attempts(), again.redelivered()), (1, false));
}

async fn dead_letter_keeps_its_body_and_history(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    // RabbitMQ stores the time to the second.
    let started_at = SystemTime::now() - SECOND;
    publisher.publish_ids("callback-5", &[7], PATIENCE).await.unwrap();
    let published_before = SystemTime::now();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("no answer")).await;
    assert_eq!(next(&mut consumer).await.settle(dead("answered 500")).await, Settled::Done);
    consumer.close().await;
    queue.wait_for_depths(0, 0, 1).await;

    let letters = queue.letters().await;
    let [letter] = letters.as_slice() else { panic!("{letters:?}") };
    assert_eq!((letter.id, letter.attempts), (Some(7), 2));
    assert_eq!(letter.body, br#"{"id":7}"#);
    assert_eq!(letter.callback_id, "callback-5");
    assert_eq!(letter.reason, "answered 500");
    let published_at = letter.published_at.unwrap();
    assert!(started_at < published_at && published_at <= published_before, "{letter:?}");
    let (first, last) = (letter.first_failed_at.unwrap(), letter.last_failed_at.unwrap());
    assert!(
        started_at < first && first + SECOND <= last && last <= SystemTime::now(),
        "{letter:?}"
    );
}

async fn dead_letters_survive_a_reopen(backend: Backend) {
    let queue = TestQueue::new(backend);
    queue.add_dead_letters(&[(1, "answered 404"), (2, "answered 500")]).await;
    let before = queue.letters().await;
    queue.open().await.close().await;
    assert_eq!(queue.letters().await, before);
    assert_eq!(ids(&before), [1, 2]);
}

async fn depths_count_ready_delayed_and_dead_messages(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1, 2, 3, 4, 5, 6]).await;
    let mut consumer = consumer(&publisher, 1);
    // Two delay queues, each long enough for an inspection.
    for seconds in [16, 32] {
        let after = Some(SECOND * seconds);
        let retry = Disposition::Retry { reason: "answered 503".to_owned(), after };
        next(&mut consumer).await.settle(retry).await;
    }
    next(&mut consumer).await.settle(dead("answered 404")).await;
    consumer.close().await;
    queue.wait_for_depths(3, 2, 1).await;
}

/// Four dead letters: odd ids with one reason, even ids with another.
async fn queue_with_four_letters(backend: Backend) -> TestQueue {
    let queue = TestQueue::new(backend);
    let (odd, even) = ("answered 500: oops", "answered 404");
    queue.add_dead_letters(&[(1, odd), (2, even), (3, odd), (4, even)]).await;
    queue
}

fn selection(ids: &[i64], reason: Option<&str>) -> Selection {
    Selection { ids: ids.to_vec(), reason: reason.map(str::to_owned) }
}

async fn dead_letters_are_selected_by_id_and_reason(backend: Backend) {
    let queue = queue_with_four_letters(backend).await;
    let cases = [
        (selection(&[], None), vec![1, 2, 3, 4]),
        (selection(&[4, 1, 9], None), vec![1, 4]),
        (selection(&[], Some("500")), vec![1, 3]),
        (selection(&[2, 3, 4], Some("answered 404")), vec![2, 4]),
        (selection(&[2], Some("500")), vec![]),
        (selection(&[9], None), vec![]),
    ];
    for (selection, expected) in cases {
        let letters = queue.process(&selection, DeadLetterAction::List).await;
        assert_eq!(ids(&letters), expected, "{selection:?}");
    }
}

async fn listing_changes_nothing(backend: Backend) {
    let queue = queue_with_four_letters(backend).await;
    let before = (queue.depths().await, queue.letters().await);
    queue.process(&selection(&[2], None), DeadLetterAction::List).await;
    for _ in 0..5 {
        assert_eq!((queue.depths().await, queue.letters().await), before);
    }
    assert_eq!(before.1.len(), 4);
}

async fn redrive_sends_selected_letters_back_as_new(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[]).await;
    publisher.publish_ids("callback-6", &[1, 2, 3], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    for _ in 0..3 {
        next(&mut consumer).await.settle(dead("answered 500")).await;
    }
    let before = queue.letters().await;
    let redriven = queue.process(&selection(&[1, 3], None), DeadLetterAction::Redrive).await;
    assert_eq!(redriven, [before[0].clone(), before[2].clone()]);
    for id in [1, 3] {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.id().unwrap(), delivery.callback_id()), (id, "callback-6"));
        assert_eq!((delivery.failed_attempts(), delivery.redelivered()), (0, false));
        delivery.settle(dead("answered 502")).await;
    }
    consumer.close().await;
    queue.wait_for_depths(0, 0, 3).await;
    let after = queue.letters().await;
    assert_eq!(after[0], before[1], "an unselected letter should be unchanged");
    assert_eq!((after[1].id, after[1].attempts), (Some(1), 1), "the history should start anew");
    assert_eq!(after[1].first_failed_at, after[1].last_failed_at);
    assert_eq!(after[1].published_at, before[0].published_at);
    assert_eq!(after[1].body, before[0].body);
}

async fn purge_deletes_only_selected_letters(backend: Backend) {
    let queue = queue_with_four_letters(backend).await;
    let purged = queue.process(&selection(&[1, 2], Some("404")), DeadLetterAction::Purge).await;
    assert_eq!(ids(&purged), [2]);
    assert_eq!(ids(&queue.letters().await), [1, 3, 4]);
    let purged = process_all(&queue.config, DeadLetterAction::Purge).await;
    assert_eq!(ids(&purged), [1, 3, 4]);
    queue.wait_for_depths(0, 0, 0).await;
    assert_eq!(process_all(&queue.config, DeadLetterAction::Purge).await, []);
}

async fn redrive_reaches_a_waiting_consumer(backend: Backend) {
    let (queue, publisher) = TestQueue::with(backend, &[1]).await;
    let mut waiting = consumer(&publisher, 5);
    next(&mut waiting).await.settle(dead("answered 500")).await;
    let delivery = tokio::spawn(async move { ack_next(&mut waiting, 1).await });
    queue.process(&selection(&[1], None), DeadLetterAction::Redrive).await;
    assert_eq!(delivery.await.unwrap(), [1]);
    queue.wait_for_depths(0, 0, 0).await;
}

async fn letter_given_up_again_is_not_redriven_twice(backend: Backend) {
    let queue = TestQueue::new(backend);
    let letters: Vec<_> = (0..700).map(|id| (id, "answered 500")).collect();
    queue.add_dead_letters(&letters).await;
    let publisher = queue.open().await;
    let mut consumer = consumer(&publisher, 50);
    // Redriven messages are given up again at once.
    let giving_up = tokio::spawn(async move {
        for _ in 0..700 {
            next(&mut consumer).await.settle(dead("answered 500")).await;
        }
    });
    let redriven = process_all(&queue.config, DeadLetterAction::Redrive).await;
    assert_eq!(ids(&redriven), (0..700).collect::<Vec<i64>>());
    giving_up.await.unwrap();
    queue.wait_for_depths(0, 0, 700).await;
}

async fn interrupted_redrive_loses_no_letter(backend: Backend) {
    const LETTERS: u64 = 300;
    let queue = TestQueue::new(backend);
    let letters: Vec<_> = (0..LETTERS.cast_signed()).map(|id| (id, "answered 500")).collect();
    queue.add_dead_letters(&letters).await;
    let mut inspector = Inspector::open(&queue.config).await.unwrap();
    let mut polls = 0;
    let mut is_finished = false;
    while !is_finished {
        polls += 1 + rand::random::<u32>() % 2;
        let all = Selection::default();
        let redrive = inspector.dead_letters(&all, DeadLetterAction::Redrive, drop);
        is_finished = poll_times(polls, redrive).await.is_some_and(|outcome| outcome.is_ok());
        eventually("each letter is a message or a dead letter", PATIENCE, async || {
            let depths = inspector.depths().await.unwrap();
            let sum = depths.ready + depths.dead;
            let may_be_duplicated = backend != Backend::File;
            (sum == LETTERS || (may_be_duplicated && sum > LETTERS)).then_some(())
        })
        .await;
    }
    let publisher = queue.open().await;
    let mut consumer = consumer(&publisher, 100);
    let mut missing: BTreeSet<i64> = (0..LETTERS.cast_signed()).collect();
    while !missing.is_empty() {
        for id in ack_next(&mut consumer, 1).await {
            missing.remove(&id);
        }
    }
    consumer.close().await;
    if backend == Backend::File {
        queue.wait_for_depths(0, 0, 0).await;
    }
}
