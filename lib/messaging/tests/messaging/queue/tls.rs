//! Connects by `amqps://` to a broker whose certificate is signed by a private authority.

use messaging::queue::{Config, QueueType};
use testkit::{Authority, RabbitNode};

use crate::queue::test_queue::{SECOND, ack_next, config_at, connected, consumer, refused};

fn config(uri: &str, authority: Option<&Authority>) -> Config {
    let mut config = config_at(uri, "objects", QueueType::Quorum);
    config.queue.amqp_ca = authority.map(|authority| authority.pem().to_owned());
    config
}

/// Returns the reason why there is no connection.
async fn connect_error(config: &Config) -> String {
    let publisher = refused(config, "cannot reach").await;
    let reason = publisher.status().borrow().clone().unwrap_err();
    assert!(reason.starts_with("cannot reach"), "{reason}");
    assert!(publisher.publish_ids("c", &[1], SECOND).await.is_err());
    assert!(!reason.contains("guest"), "{reason}");
    reason
}

#[tokio::test]
async fn broker_needs_a_trusted_certificate_for_its_name() {
    let authority = Authority::new();
    let node = RabbitNode::start_with_tls(&authority).await;
    let by_name = node.amqps_uri("localhost");

    let publisher = connected(&config(&by_name, Some(&authority))).await;
    publisher.publish_ids("c", &[1, 2], SECOND * 5).await.unwrap();
    assert_eq!(ack_next(&mut consumer(&publisher, 5), 2).await, [1, 2]);

    let untrusted = connect_error(&config(&by_name, None)).await;
    assert!(untrusted.contains("UnknownIssuer"), "{untrusted}");
    let other = connect_error(&config(&by_name, Some(&Authority::new()))).await;
    assert!(other.contains("invalid peer certificate"), "{other}");
    let other_name = connect_error(&config(&node.amqps_uri("127.0.0.1"), Some(&authority))).await;
    assert!(other_name.contains("not valid for name"), "{other_name}");

    // A connection by `amqps://` never falls back to plain text.
    let plain = node.amqp_uri().replace("amqp://", "amqps://");
    connect_error(&config(&plain, Some(&authority))).await;
    let connections = node.rabbitmqctl(&["list_connections", "ssl", "--no-table-headers"]).await;
    assert!(connections.lines().all(|ssl| ssl == "true"), "{connections}");
}
