//! Tests of Postgres only.

mod clock;
mod go_table;
mod history;
mod locks;
mod objects;
mod outage;
mod pooler;
mod refusals;
mod roles;
mod schema;
mod servers;
mod tls;

use std::time::Duration;

use runtime::Supervisor;
use sqlx::PgPool;
use store::{Config, Sighting, Store};
use testkit::{Database, wait_for};

use crate::ready;

fn start(url: &str, connections: u32) -> Store {
    start_with(&config(url), connections)
}

fn start_with(config: &Config, connections: u32) -> Store {
    Store::start(config.open(&Supervisor::default()).unwrap(), "test", connections)
}

fn config(url: &str) -> Config {
    Config::at(url.parse().unwrap())
}

/// A store on a new database, with the schema in place.
async fn open() -> (Database, Store) {
    let database = Database::new().await;
    let store = start(database.url(), 8);
    ready(&store).await;
    (database, store)
}

/// Writes the rows `ids`, each `age` old, without the store.
async fn insert(pool: &PgPool, ids: std::ops::RangeInclusive<i64>, age: Duration) {
    let sql = "INSERT INTO object (id, last_seen)
               SELECT id, now() - make_interval(secs => $3) FROM generate_series($1, $2) AS id";
    let query = sqlx::query(sql).bind(ids.start()).bind(ids.end()).bind(age.as_secs_f64());
    query.execute(pool).await.unwrap();
}

/// Waits until the store records the sighting after an outage.
async fn wait_until_recorded(store: &Store, sighting: Sighting) {
    let recorded = async || store.record_seen(&[sighting]).await.ok();
    wait_for("sightings are recorded again", recorded).await;
}

/// The ids in the table, in ascending order.
async fn ids(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("SELECT id FROM object ORDER BY id").fetch_all(pool).await.unwrap()
}

/// The age of a row by the database's clock.
async fn age_seconds(pool: &PgPool, id: i64) -> f64 {
    let sql = "SELECT extract(epoch FROM now() - last_seen)::float8 FROM object WHERE id = $1";
    sqlx::query_scalar(sql).bind(id).fetch_one(pool).await.unwrap()
}

/// The number of statements that wait for a lock in this database.
async fn waiting(pool: &PgPool) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND wait_event_type = 'Lock'";
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}
