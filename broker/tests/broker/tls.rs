//! `amqps://`, at a broker whose certificate is of a private authority.

use broker::{Config, Publisher, QueueConfig, QueueType};
use testbed::{Authority, RabbitNode};
use tokio::time::timeout;

use crate::test_queue::{PATIENCE, SECOND, connected, consumer, drain};

fn config(uri: &str, authority: Option<&Authority>) -> Config {
    let amqp_ca = authority.map(|authority| authority.pem().to_owned());
    let queue =
        QueueConfig { queue_name: "objects".to_owned(), queue_type: QueueType::Quorum, amqp_ca };
    Config { amqp_uri: uri.parse().unwrap(), queue }
}

/// Why there is no connection.
async fn refused(config: &Config) -> String {
    let publisher = Publisher::start(config, "test").unwrap();
    let mut status = publisher.status();
    let refused = status
        .wait_for(|status| status.as_ref().is_err_and(|reason| reason.starts_with("cannot reach")));
    let reason = timeout(PATIENCE, refused).await.unwrap().unwrap().clone().unwrap_err();
    assert!(publisher.publish_ids("c", &[1], SECOND).await.is_err());
    assert!(!reason.contains("guest"), "{reason}");
    reason
}

#[tokio::test]
async fn a_broker_is_trusted_by_its_authority_and_its_name_or_not_at_all() {
    let authority = Authority::new();
    let node = RabbitNode::start_with_tls(&authority).await;
    let by_name = node.amqps_uri("localhost");

    let publisher = connected(&config(&by_name, Some(&authority))).await;
    publisher.publish_ids("c", &[1, 2], SECOND * 5).await.unwrap();
    assert_eq!(drain(&mut consumer(&publisher, 5), 2).await, [1, 2]);

    let stranger = refused(&config(&by_name, None)).await;
    assert!(stranger.contains("UnknownIssuer"), "{stranger}");
    let other = refused(&config(&by_name, Some(&Authority::new()))).await;
    assert!(other.contains("invalid peer certificate"), "{other}");
    let other_name = refused(&config(&node.amqps_uri("127.0.0.1"), Some(&authority))).await;
    assert!(other_name.contains("not valid for name"), "{other_name}");

    // A listener that speaks plain AMQP is not spoken to in plain text.
    let plain = node.amqp_uri().replace("amqp://", "amqps://");
    refused(&config(&plain, Some(&authority))).await;
    let connections = node.rabbitmqctl(&["list_connections", "ssl", "--no-table-headers"]).await;
    assert!(connections.lines().all(|ssl| ssl == "true"), "{connections}");
}
