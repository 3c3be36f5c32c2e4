//! Traces of callbacks through all services. Neither callbacks nor shutdown depend on the
//! collector.

use std::time::Duration;

use lapin::message::BasicGetMessage;
use testkit::{
    Answer, Database, PATIENCE, Partner, Process, Proxy, Queue, StatusApi, System, amqp_uri,
    callback_endpoint, http_client, wait_for, wait_until,
};
use tokio::time::timeout;

use crate::pipeline::stored;
use crate::spans::{HEADERS, Span, SpanCollector, attribute, linked, traceparent_of};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Makes the services export spans while they run, and not only when they stop.
const EXPORT_SOON: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "50");

/// Spans of partners.
const PARTNERS: [&str; 2] = [
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
];

async fn wait_until_looked_up(status_api: &StatusApi, ids: &[i64]) {
    wait_until("all are looked up", async || ids.iter().all(|id| status_api.lookups_of(*id) > 0))
        .await;
}

/// Posts a callback as a child of the partner's span.
async fn post(endpoint: &str, traceparent: &str, ids: &[i64]) {
    let client = http_client(PATIENCE);
    let body = serde_json::json!({ "object_ids": ids }).to_string();
    let request = client.post(endpoint).header("traceparent", traceparent).body(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
}

/// Waits for the first message in the queue, and removes it.
async fn first_message(queue: &Queue) -> BasicGetMessage {
    wait_for("a message is published", async || {
        // The queue does not exist at first.
        (queue.depth(&queue.name).await? > 0).then_some(())
    })
    .await;
    queue.get(&queue.name).await.unwrap()
}

/// The `traceparent` header of a message.
fn traceparent_header(message: &BasicGetMessage) -> Option<String> {
    let headers = message.delivery.properties.headers().as_ref()?;
    let traceparent = headers.inner().get("traceparent")?;
    Some(traceparent.as_long_string().unwrap().to_string())
}

/// Stops the service, and checks that it has logged neither a secret nor a failed export.
async fn stop(service: Process) {
    service.stop().await;
    let log = service.log().join("\n");
    assert!(!log.contains("s3cret") && !log.contains("cannot send traces"), "{log}");
}

#[tokio::test]
async fn trace_connects_the_partners_span_with_the_commit() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let (spans, (status_api, answers)) = (SpanCollector::start().await, StatusApi::gated());
    let system = System::new(&queue, &database, &status_api.endpoint());
    let collector = spans.collector.endpoint();
    let traced = [(ENDPOINT, collector.as_str()), ("OTEL_EXPORTER_OTLP_HEADERS", HEADERS)];
    let producer = system.spawn("producer", &traced);
    // Both results are in one batch even on a slow machine.
    let one_batch = [("WRITE_BATCH_MAX", "2"), ("WRITE_BATCH_LINGER", "1m")];
    let named = ("OTEL_SERVICE_NAME", "the consumer");
    let consumer = system.spawn("consumer", &[&traced[..], &one_batch, &[named]].concat());
    tokio::join!(producer.ready(), consumer.ready());
    let endpoint = callback_endpoint(&producer).await;
    for (partner, ids) in PARTNERS.iter().zip([[2].as_slice(), &[4]]) {
        post(&endpoint, partner, ids).await;
    }
    wait_until_looked_up(&status_api, &[2, 4]).await;
    answers.cancel();
    consumer.wait_for_metric("lastseen_settled_total{disposition=\"ack\"}", 2.0).await;
    tokio::join!(stop(producer), stop(consumer));

    let (publish, process) = (format!("publish {}", queue.name), format!("process {}", queue.name));
    let upserts = spans.named("the consumer", "UPSERT object");
    let [upsert] = upserts.as_slice() else { panic!("{upserts:?}") };
    let mut commits = Vec::new();
    for (partner, id) in PARTNERS.iter().zip([2, 4]) {
        let callbacks = spans.named("producer", "POST /callback");
        let of_partner = |span: &&Span| {
            *partner == crate::spans::traceparent(&span.trace_id, &span.parent_span_id)
        };
        let callback = callbacks.iter().find(of_partner).unwrap();
        assert_eq!(attribute(callback, "http.response.status_code").unwrap(), "200");
        let publish = spans.child_of(callback, "producer", &publish);
        assert_eq!(attribute(&publish, "messaging.batch.message_count").unwrap(), "1");
        let process = spans.child_of(&publish, "the consumer", &process);
        assert_eq!(attribute(&process, "lastseen.object_id").unwrap(), id.to_string());
        let lookup = spans.child_of(&process, "the consumer", "GET /objects/{id}");
        assert_eq!(attribute(&lookup, "http.response.status_code").unwrap(), "200");
        assert_eq!(status_api.traceparents(id), [traceparent_of(&lookup)]);
        let commit = spans.child_of(&process, "the consumer", "commit");
        assert_eq!(linked(&commit), [upsert.span_id.as_slice()]);
        commits.push(commit);
    }
    // The batch is a child of a span in one of the two traces, and is linked to the other one.
    commits.sort_by_key(|commit| commit.span_id != upsert.parent_span_id);
    assert_eq!(upsert.parent_span_id, commits[0].span_id);
    assert_eq!(linked(upsert), [commits[1].span_id.as_slice()]);
    assert_eq!(attribute(upsert, "db.operation.batch.size").unwrap(), "2");
}

#[tokio::test]
async fn coalesced_deliveries_are_linked_to_their_lookup() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let (spans, (status_api, answers)) = (SpanCollector::start().await, StatusApi::gated());
    let system = System::new(&queue, &database, &status_api.endpoint());
    let collector = spans.collector.endpoint();
    let traced =
        [(ENDPOINT, collector.as_str()), ("OTEL_EXPORTER_OTLP_HEADERS", HEADERS), EXPORT_SOON];
    let producer = system.spawn("producer", &traced);
    let consumer = system.spawn("consumer", &traced);
    tokio::join!(producer.ready(), consumer.ready());
    let endpoint = callback_endpoint(&producer).await;
    // The others arrive during the lookup for the first one, and wait for the next lookup.
    post(&endpoint, PARTNERS[0], &[7]).await;
    wait_until_looked_up(&status_api, &[7]).await;
    for partner in PARTNERS {
        post(&endpoint, partner, &[7]).await;
    }
    consumer.wait_for_metric("lastseen_deliveries_total", 3.0).await;
    answers.cancel();

    let process = format!("process {}", queue.name);
    wait_until("all spans are exported", async || spans.named("consumer", &process).len() == 3)
        .await;
    let deliveries = spans.named("consumer", &process);
    let lookups = spans.named("consumer", "GET /objects/{id}");
    let [alone, shared] = lookups.as_slice() else { panic!("{lookups:?}") };
    assert_eq!(alone.parent_span_id, deliveries[0].span_id);
    assert!(alone.links.is_empty());
    assert_eq!(shared.parent_span_id, deliveries[1].span_id);
    assert_eq!(linked(shared), [deliveries[2].span_id.as_slice()]);
    assert_ne!(deliveries[1].trace_id, deliveries[2].trace_id);
    tokio::join!(stop(producer), stop(consumer));
}

#[tokio::test]
async fn without_a_collector_no_trace_context_is_propagated() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let disabled = [(ENDPOINT, "http://127.0.0.1:1"), ("OTEL_SDK_DISABLED", "true")];
    for (id, variables) in [(1, &[][..]), (2, &disabled)] {
        let (queue, database) = (Queue::new(), Database::new().await);
        let system = System::new(&queue, &database, &status_api.endpoint());
        let producer = system.start("producer", variables).await;
        let endpoint = callback_endpoint(&producer).await;
        post(&endpoint, PARTNERS[0], &[id]).await;
        let message = first_message(&queue).await;
        assert_eq!(traceparent_header(&message), None);

        let consumer = system.spawn("consumer", variables);
        post(&endpoint, PARTNERS[0], &[id]).await;
        wait_until_looked_up(&status_api, &[id]).await;
        assert!(status_api.traceparents(id).is_empty());
        drop((producer, consumer));
    }
}

#[tokio::test]
async fn spooled_message_stays_in_its_trace() {
    let (queue, spans) = (Queue::new(), SpanCollector::start().await);
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    proxy.cut();
    let system = System::of_producers(&uri, &queue);
    let collector = spans.collector.endpoint();
    let traced =
        [(ENDPOINT, collector.as_str()), ("OTEL_EXPORTER_OTLP_HEADERS", HEADERS), EXPORT_SOON];
    let producer = system.start("producer", &traced).await;
    post(&callback_endpoint(&producer).await, PARTNERS[0], &[1]).await;
    proxy.restore();
    let message = first_message(&queue).await;
    let publish = format!("publish {}", queue.name);
    let publish =
        wait_for("its span is exported", async || spans.named("producer", &publish).pop()).await;
    assert_eq!(attribute(&publish, "lastseen.spooled").unwrap(), "true");
    assert_eq!(traceparent_header(&message), Some(traceparent_of(&publish)));
    let callback = spans.named("producer", "POST /callback").pop().unwrap();
    assert_eq!(publish.parent_span_id, callback.span_id);
}

#[tokio::test]
async fn silent_collector_delays_neither_callbacks_nor_shutdown() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let system = System::new(&queue, &database, &status_api.endpoint());
    let collector = format!("http://{}", silent.local_addr().unwrap());
    let traced = [(ENDPOINT, collector.as_str()), EXPORT_SOON];
    let producer = system.spawn("producer", &traced);
    let consumer = system.spawn("consumer", &traced);
    tokio::join!(producer.ready(), consumer.ready());
    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::default();
    // More spans than the export queue holds.
    for first in (0..4_000).step_by(200) {
        let ids: Vec<i64> = (first..first + 200).collect();
        assert!(partner.post(&endpoint, &ids).await, "{:?}", partner.ledger());
    }
    wait_until("all are stored", async || stored(database.pool()).await.len() == 4_000).await;
    for service in [&producer, &consumer] {
        // It is logged once, when the first batch of spans is discarded.
        service.wait_for_log("cannot send traces").await;
        service.terminate();
        // Each unanswered batch takes 5 s, and there are several.
        let ended = timeout(Duration::from_secs(10), service.wait()).await;
        assert_eq!(ended.expect("it should not wait for the collector").code(), Some(0));
        let log = service.log();
        let warnings = log.iter().filter(|line| line.contains("cannot send traces"));
        assert_eq!(warnings.count(), 1, "{log:?}");
    }
}
