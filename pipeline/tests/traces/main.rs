//! Traces of callbacks through all services. Neither callbacks nor shutdown depend on the
//! collector.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod spans;

use std::time::Duration;

use lapin::message::BasicGetMessage;
use pipeline::{Partner, System, callback_endpoint};
use reqwest::Client;
use service::CancellationToken;
use testbed::{Answer, Database, Process, Proxy, Queue, StatusApi, amqp_uri, eventually};
use tokio::time::timeout;
use url::Url;

use spans::{HEADERS, Span, SpanCollector, attribute, linked, traceparent_of};

const PATIENCE: Duration = Duration::from_mins(1);
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Makes the services export spans while they run, and not only when they stop.
const EXPORT_SOON: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "50");

/// Spans of partners.
const PARTNERS: [&str; 2] = [
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
];

/// A status API that answers no lookup until the token is cancelled.
fn status_api() -> (StatusApi, CancellationToken) {
    let answers = CancellationToken::new();
    let held = answers.clone();
    let status_api =
        StatusApi::start(move |_, _| Answer::Gated(held.clone(), Box::new(Answer::Online)));
    (status_api, answers)
}

async fn wait_until_looked_up(status_api: &StatusApi, ids: &[i64]) {
    eventually("all are looked up", PATIENCE, async || {
        ids.iter().all(|id| status_api.lookups_of(*id) > 0).then_some(())
    })
    .await;
}

/// Posts a callback as a child of the partner's span.
async fn post(endpoint: &str, traceparent: &str, ids: &[i64]) {
    // It fails only if another test of this process has installed the provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().no_proxy().build().unwrap();
    let body = serde_json::json!({ "object_ids": ids }).to_string();
    let request = client.post(endpoint).header("traceparent", traceparent).body(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
}

/// Waits for the first message in the queue, and removes it.
async fn first_message(queue: &Queue) -> BasicGetMessage {
    eventually("a message is published", PATIENCE, async || {
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
    service.terminate();
    assert_eq!(service.wait().await.code(), Some(0));
    let log = service.log().join("\n");
    assert!(!log.contains("s3cret") && !log.contains("cannot send traces"), "{log}");
}

#[tokio::test]
async fn trace_connects_the_partners_span_with_the_commit() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let (spans, (status_api, answers)) = (SpanCollector::start().await, status_api());
    let system = System::new(&amqp_uri(), &queue.name, database.environment(), &status_api);
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
    eventually("all is acked", PATIENCE, async || {
        let acked = consumer.metric("lastseen_settled_total{disposition=\"ack\"}").await;
        (acked >= 2.0).then_some(())
    })
    .await;
    tokio::join!(stop(producer), stop(consumer));

    let (publish, process) = (format!("publish {}", queue.name), format!("process {}", queue.name));
    let upserts = spans.named("the consumer", "UPSERT object");
    let [upsert] = upserts.as_slice() else { panic!("{upserts:?}") };
    let mut commits = Vec::new();
    for (partner, id) in PARTNERS.iter().zip([2, 4]) {
        let callbacks = spans.named("producer", "POST /callback");
        let of_partner =
            |span: &&Span| *partner == spans::traceparent(&span.trace_id, &span.parent_span_id);
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
    let (spans, (status_api, answers)) = (SpanCollector::start().await, status_api());
    let system = System::new(&amqp_uri(), &queue.name, database.environment(), &status_api);
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
    eventually("all messages are delivered", PATIENCE, async || {
        (consumer.metric("lastseen_deliveries_total").await >= 3.0).then_some(())
    })
    .await;
    answers.cancel();

    let process = format!("process {}", queue.name);
    eventually("all spans are exported", PATIENCE, async || {
        (spans.named("consumer", &process).len() == 3).then_some(())
    })
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
        let system = System::new(&amqp_uri(), &queue.name, database.environment(), &status_api);
        let producer = system.spawn("producer", variables);
        producer.ready().await;
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
    let mut uri = Url::parse(&amqp_uri()).unwrap();
    let broker = format!("{}:{}", uri.host_str().unwrap(), uri.port().unwrap_or(5672));
    let proxy = Proxy::start(broker).await;
    uri.set_host(Some(&proxy.addr().ip().to_string())).unwrap();
    uri.set_port(Some(proxy.addr().port())).unwrap();
    proxy.cut();
    let system = System {
        amqp_uri: uri.to_string(),
        queue: queue.name.clone(),
        database: Vec::new(),
        status_api: "http://127.0.0.1:1".to_owned(),
    };
    let collector = spans.collector.endpoint();
    let traced =
        [(ENDPOINT, collector.as_str()), ("OTEL_EXPORTER_OTLP_HEADERS", HEADERS), EXPORT_SOON];
    let producer = system.spawn("producer", &traced);
    producer.ready().await;
    post(&callback_endpoint(&producer).await, PARTNERS[0], &[1]).await;
    proxy.restore();
    let message = first_message(&queue).await;
    let publish = format!("publish {}", queue.name);
    let publish = eventually("its span is exported", PATIENCE, async || {
        spans.named("producer", &publish).pop()
    })
    .await;
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
    let system = System::new(&amqp_uri(), &queue.name, database.environment(), &status_api);
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
    eventually("all are stored", PATIENCE, async || {
        let count = sqlx::query_scalar("SELECT count(*) FROM object").fetch_one(database.pool());
        let stored: i64 = count.await.unwrap();
        (stored == 4_000).then_some(())
    })
    .await;
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
