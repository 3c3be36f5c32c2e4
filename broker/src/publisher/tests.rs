use super::*;
use crate::QueueType;
use testbed::Queue;

fn outgoing(routing_key: &str) -> Outgoing {
    let properties = BasicProperties::default();
    Outgoing { routing_key: routing_key.into(), body: b"{}".to_vec(), properties }
}

/// lapin hands a returned message to whichever publish is confirmed next, often another caller's.
/// Without telling them apart by their ids, a caller whose message is gone would hear "confirmed".
#[tokio::test]
async fn among_interleaved_batches_one_without_a_queue_is_never_confirmed() {
    let queue = Queue::new();
    let config = Config {
        amqp_uri: testbed::amqp_uri().parse().unwrap(),
        queue_name: queue.name.clone(),
        queue_type: QueueType::Quorum,
    };
    let publisher = Publisher::start(&config, "test");
    let mut status = publisher.status();
    let within = Duration::from_secs(30);
    let nowhere = format!("{}.nowhere", queue.name);
    let mut confirmed = 0;
    for _round in 0..10 {
        // Each unroutable message ends the session.
        timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        publisher.publish(vec![outgoing(&queue.name)], within).await.unwrap();
        confirmed += 1;
        let mut batches = tokio::task::JoinSet::new();
        for batch in 0..60 {
            let publisher = publisher.clone();
            let key = if batch == 30 { nowhere.clone() } else { queue.name.clone() };
            batches.spawn(
                async move { (batch, publisher.publish(vec![outgoing(&key)], within).await) },
            );
        }
        while let Some(published) = batches.join_next().await {
            match published.unwrap() {
                (30, outcome) => {
                    outcome.expect_err("a message without a queue must not be confirmed");
                }
                (_, Ok(())) => confirmed += 1,
                (_, Err(error)) => assert!(matches!(error, PublishError::Away(_)), "{error}"),
            }
        }
    }
    assert!(queue.depth(&queue.name).await.unwrap() >= confirmed);
}

#[test]
fn a_return_that_comes_with_another_publishs_confirm_is_kept_for_its_own() {
    let returned_with = |own: &str| {
        let properties = BasicProperties::default().with_message_id(own.into());
        let mut delivery =
            lapin::message::Delivery::mock(0, "".into(), "gone".into(), false, Vec::new());
        delivery.properties = properties;
        lapin::message::BasicReturnMessage {
            delivery,
            reply_code: 312,
            reply_text: "NO_ROUTE".into(),
        }
    };
    let mut returned = HashSet::new();
    let other = Ok(Confirmation::Ack(Some(returned_with("2"))));
    assert_eq!(verdict(1, other, &mut returned), Verdict::Confirmed);
    assert_eq!(verdict(3, Ok(Confirmation::Ack(None)), &mut returned), Verdict::Confirmed);
    assert_eq!(verdict(2, Ok(Confirmation::Ack(None)), &mut returned), Verdict::Unroutable);
    assert_eq!(verdict(4, Ok(Confirmation::Nack(None)), &mut returned), Verdict::Refused);
    let own = Ok(Confirmation::Ack(Some(returned_with("5"))));
    assert_eq!(verdict(5, own, &mut returned), Verdict::Unroutable);
    assert!(returned.is_empty());
}
