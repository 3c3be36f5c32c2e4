//! Tests with pgbouncer in its default settings. Field case 9.5.

use std::str::FromStr as _;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Row as _};
use store::{Config, Objects, Sighting};
use testkit::{Database, PgBouncer};
use tokio::task::JoinSet;

use super::start_with;
use crate::{HOUR, delete_stale, ready, seen};

#[tokio::test]
async fn store_works_behind_a_pooler_in_session_mode() {
    works_behind("session", 20).await;
}

#[tokio::test]
async fn store_works_behind_a_pooler_in_transaction_mode() {
    works_behind("transaction", 3).await;
}

#[tokio::test]
async fn store_works_behind_a_pooler_in_statement_mode() {
    works_behind("statement", 3).await;
}

/// Several stores share fewer sessions than they have connections, and run different statements at
/// once.
async fn works_behind(mode: &str, sessions: u32) {
    const STORES: i64 = 4;
    const ROWS: i64 = 300;
    let database = Database::new().await;
    let table = "CREATE TABLE object (id INTEGER PRIMARY KEY, last_seen TIMESTAMP NOT NULL)";
    sqlx::raw_sql(table).execute(database.pool()).await.unwrap();
    let bouncer = PgBouncer::start(database.url(), mode, sessions).await;
    let tz = Some("Europe/Berlin".parse().unwrap());
    let config = Config { tz, ..Config::at(bouncer.url().parse().unwrap()) };
    let mut stores = JoinSet::new();
    for store in 0..STORES {
        let config = config.clone();
        stores.spawn(async move {
            let ids = store * ROWS..(store + 1) * ROWS;
            let store = start_with(&config, 2);
            ready(&store).await;
            for first in ids.step_by(10) {
                let stale: Vec<Sighting> =
                    (first..first + 10).map(|id| seen(id, 2 * HOUR)).collect();
                let fresh: Vec<Sighting> =
                    (first..first + 5).map(|id| seen(id, Duration::ZERO)).collect();
                assert_eq!(store.record_seen(&stale).await.unwrap().inserted.len(), 10);
                let (recorded, deleted, now) = tokio::join!(
                    store.record_seen(&fresh),
                    store.delete_stale(store.now().await.unwrap().before(10 * HOUR), 10),
                    store.now()
                );
                assert_eq!(recorded.unwrap().updated.len(), 5);
                assert_eq!(deleted.unwrap(), []);
                now.unwrap();
            }
            store
        });
    }
    let stores = stores.join_all().await;
    let mut objects = Objects::open(&config).await.unwrap();
    let all = usize::try_from(STORES * ROWS).unwrap();
    assert_eq!(objects.count().await.unwrap(), all as u64);
    let page = objects.page(None, 10_000).await.unwrap();
    let fresh = page.iter().filter(|object| object.age < HOUR).count();
    assert_eq!((page.len(), fresh), (all, all / 2));
    assert_eq!(delete_stale(&stores[0], HOUR, 10_000).await.unwrap(), (all / 2) as u64);

    // The sessions keep no settings that could affect other applications.
    let options = PgConnectOptions::from_str(bouncer.url()).unwrap().extra_float_digits(None);
    let mut other = options.connect().await.unwrap();
    let timeout = sqlx::raw_sql("SHOW statement_timeout").fetch_one(&mut other).await.unwrap();
    assert_eq!(timeout.get::<String, _>(0), "0");
}
