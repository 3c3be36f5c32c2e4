//! The store against a real Postgres. One binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod outage;
mod schema;
mod sightings;
mod stale_rows;

use std::time::Duration;

use sqlx::PgPool;
use store::{Config, Sighting, Store};
use testbed::Database;
use tokio::time::timeout;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_hours(1);

fn config(url: &str) -> Config {
    Config {
        database_url: Some(url.parse().unwrap()),
        postgres_host: String::new(),
        postgres_port: 0,
        postgres_user: String::new(),
        postgres_password: String::new().into(),
        postgres_db: String::new(),
    }
}

/// A store with the schema in place, on a database of its own.
async fn open() -> (Database, Store) {
    let database = Database::new().await;
    let store = Store::start(&config(database.url()), "test", 8);
    ready(&store).await;
    (database, store)
}

async fn ready(store: &Store) {
    let mut status = store.status();
    let ready = timeout(DEADLINE, status.wait_for(Result::is_ok)).await;
    assert!(ready.is_ok(), "not ready: {:?}", *store.status().borrow());
}

fn seen(id: i64, age: Duration) -> Sighting {
    Sighting { id, age }
}

/// Writes the rows `ids`, each `age` old, past the store.
async fn insert(pool: &PgPool, ids: std::ops::RangeInclusive<i64>, age: Duration) {
    let sql = "INSERT INTO object (id, last_seen)
               SELECT id, now() - make_interval(secs => $3) FROM generate_series($1, $2) AS id";
    let query = sqlx::query(sql).bind(ids.start()).bind(ids.end()).bind(age.as_secs_f64());
    query.execute(pool).await.unwrap();
}

/// The ids in the table, in ascending order.
async fn ids(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("SELECT id FROM object ORDER BY id").fetch_all(pool).await.unwrap()
}

/// `last_seen` of a row, as text of the database's own: exact, and comparable by equality.
async fn last_seen(pool: &PgPool, id: i64) -> String {
    let sql = "SELECT last_seen::text FROM object WHERE id = $1";
    sqlx::query_scalar(sql).bind(id).fetch_one(pool).await.unwrap()
}

/// How old a row is by the database's clock.
async fn age_seconds(pool: &PgPool, id: i64) -> f64 {
    let sql = "SELECT extract(epoch FROM now() - last_seen)::float8 FROM object WHERE id = $1";
    sqlx::query_scalar(sql).bind(id).fetch_one(pool).await.unwrap()
}
