//! Stand-ins for the Go services, with their messages and their SQL.

use std::time::Duration;

use lapin::options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use serde_json::Value;
use sqlx::PgPool;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The table as the Go services' migration creates it.
pub(crate) const TABLE: &str = "
    CREATE TABLE object (id INTEGER NOT NULL, last_seen TIMESTAMP NOT NULL, PRIMARY KEY (id));
    CREATE INDEX idx_last_seen ON object (last_seen)";

const PERSISTENT: u8 = 2;

/// Accepts callbacks and publishes their ids as `{"ID":42}`. Returns the callback URL.
pub(crate) async fn producer(running: &mut JoinSet<()>, amqp_uri: &str, queue: &str) -> String {
    let connection = testbed::connect(amqp_uri).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    declare(&channel, queue).await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let endpoint = format!("http://{}/callback", listener.local_addr().unwrap());
    let queue = queue.to_owned();
    running.spawn(async move {
        let _connection = connection;
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let Some(callback) = body(&mut client).await else { continue };
            let response = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            _ = client.write_all(response).await;
            for id in callback["object_ids"].as_array().unwrap() {
                let message = format!(r#"{{"ID":{id}}}"#);
                let persistent = BasicProperties::default().with_delivery_mode(PERSISTENT);
                let (name, options) = (queue.as_str().into(), BasicPublishOptions::default());
                let published =
                    channel.basic_publish("".into(), name, options, message.as_bytes(), persistent);
                published.await.unwrap();
            }
        }
    });
    endpoint
}

/// Reads the JSON body of a request with a `Content-Length`.
async fn body(client: &mut TcpStream) -> Option<Value> {
    let mut request = Vec::new();
    loop {
        if client.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let head = head.to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        if body.len() >= length?.trim().parse::<usize>().ok()? {
            return serde_json::from_str(body).ok();
        }
    }
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
        let connection = testbed::connect(&amqp_uri).await.unwrap();
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
