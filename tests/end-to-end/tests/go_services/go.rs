//! Stand-ins for the Go services, with their messages and their SQL.

use std::time::Duration;

use axum::Router;
use axum::routing::post;
use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use runtime::CancellationToken;
use runtime::http::{Limits, serve};
use serde_json::Value;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const PERSISTENT: u8 = 2;

/// Accepts callbacks and publishes their ids as `{"ID":42}`. Returns the callback URL.
pub(crate) async fn producer(running: &mut JoinSet<()>, amqp_uri: &str, queue: &str) -> String {
    let connection = testkit::connect(amqp_uri).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    declare(&channel, queue).await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let endpoint = format!("http://{}/callback", listener.local_addr().unwrap());
    let queue = queue.to_owned();
    let publish = async move |callback: String| {
        let callback: Value = serde_json::from_str(&callback).unwrap();
        for id in callback["object_ids"].as_array().unwrap() {
            let message = format!(r#"{{"ID":{id}}}"#);
            let persistent = BasicProperties::default().with_delivery_mode(PERSISTENT);
            let (name, options) = (queue.as_str().into(), BasicPublishOptions::default());
            let published =
                channel.basic_publish("".into(), name, options, message.as_bytes(), persistent);
            published.await.unwrap();
        }
    };
    let router = Router::new().route("/callback", post(publish));
    running.spawn(async move {
        let _connection = connection;
        serve(listener, router, Limits::default(), CancellationToken::new()).await;
    });
    endpoint
}

/// Looks up the objects in the queue, and writes the local time of Berlin.
pub(crate) fn consumer(
    running: &mut JoinSet<()>,
    (amqp_uri, queue): (String, String),
    pool: PgPool,
    status_api: String,
) {
    running.spawn(async move {
        let upsert = "INSERT INTO object VALUES ($1, now() AT TIME ZONE 'Europe/Berlin')
                      ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen";
        let connection = testkit::connect(&amqp_uri).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        declare(&channel, &queue).await;
        loop {
            let got = channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true });
            let Some(message) = got.await.unwrap() else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let message: Value = serde_json::from_slice(&message.data).unwrap();
            let id = message["id"].as_i64().or(message["ID"].as_i64()).unwrap();
            let status = reqwest::get(format!("{status_api}/objects/{id}")).await;
            let Ok(status) = status else { continue };
            let status: Value = serde_json::from_str(&status.text().await.unwrap()).unwrap();
            if status["online"] == true {
                let id = i32::try_from(id).unwrap();
                sqlx::query(upsert).bind(id).execute(&pool).await.unwrap();
            }
        }
    });
}

/// Deletes rows that were last seen more than 4 s ago.
pub(crate) fn routine(running: &mut JoinSet<()>, pool: PgPool) {
    running.spawn(async move {
        let delete = "DELETE FROM object
                      WHERE last_seen < now() AT TIME ZONE 'Europe/Berlin' - interval '4 s'";
        loop {
            sqlx::query(delete).execute(&pool).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
}

async fn declare(channel: &Channel, queue: &str) {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
}
