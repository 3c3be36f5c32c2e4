use std::sync::Arc;

use serde_json::json;
use tokio::task::JoinSet;

use crate::harness::{Producer, id_in};

#[tokio::test]
async fn each_distinct_id_becomes_one_persistent_message() {
    let producer = Producer::start(&[]).await;
    let answer = producer.post(r#"{"object_ids":[7,-1,7,9223372036854775807]}"#).await;
    assert_eq!((answer.status, &answer.body), (200, &json!({"accepted": 4, "queued": 3})));
    assert_eq!(answer.header("content-type"), "application/json");
    let callback_id = answer.header("callback-id");
    assert!(uuid::Uuid::try_parse(callback_id).is_ok(), "{callback_id:?}");

    let messages = producer.messages().await;
    let mut ids = Vec::new();
    for message in messages {
        let properties = &message.delivery.properties;
        assert_eq!(*properties.delivery_mode(), Some(2));
        let correlation_id =
            properties.correlation_id().as_ref().map(lapin::types::ShortString::as_str);
        assert_eq!(correlation_id, Some(callback_id));
        ids.push(id_in(&message.delivery.data));
    }
    ids.sort_unstable();
    assert_eq!(ids, [-1, 7, i64::MAX]);
}

#[tokio::test]
async fn empty_list_is_accepted_and_queues_nothing() {
    let producer = Producer::start(&[]).await;
    let answer = producer.post_ids(&[]).await;
    assert_eq!((answer.status, &answer.body), (200, &json!({"accepted": 0, "queued": 0})));
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn unknown_fields_and_default_content_types_are_accepted() {
    let producer = Producer::start(&[]).await;
    let answer = producer.post(r#"{"at":"now","object_ids":[1],"more":{"object_ids":[9]}}"#).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let types = ["application/json", "text/plain", "application/x-www-form-urlencoded"];
    for (id, content_type) in (2..).zip(types) {
        let request = producer.request("POST", "/callback").header("content-type", content_type);
        let answer = producer.send(request.body(format!(r#"{{"object_ids":[{id}]}}"#))).await;
        assert_eq!(answer.status, 200, "{content_type}: {answer:?}");
    }
    assert_eq!(producer.ids().await, [1, 2, 3, 4]);
}

#[tokio::test]
async fn concurrent_callbacks_are_accepted_and_queued_once() {
    let producer = Arc::new(Producer::start(&[]).await);
    let mut clients = JoinSet::new();
    for client in 0..64 {
        let producer = Arc::clone(&producer);
        clients.spawn(async move {
            for callback in 0..20 {
                let first = (client * 20 + callback) * 3;
                let answer = producer.post_ids(&[first, first + 1, first + 2]).await;
                assert_eq!(answer.status, 200, "{answer:?}");
                assert_eq!(answer.body, json!({"accepted": 3, "queued": 3}));
            }
        });
    }
    clients.join_all().await;
    assert_eq!(producer.ids().await, (0..64 * 20 * 3).collect::<Vec<_>>());
}
